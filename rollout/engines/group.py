"""Engines as their caller sees them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from rollout.config import EngineConfig
from rollout.engines.client import EngineClient
from rollout.engines.router import EngineRouter


@dataclass(frozen=True)
class EngineGroup:
    """The list of a run's engines: whoever calls one gets its client here."""

    urls: tuple[str, ...]
    vocab_size: int
    context_tokens: int
    config: EngineConfig
    key: str = field(default="", repr=False)  # that the engines were started with

    def _client(self, url: str, timeout_s: float) -> EngineClient:
        return EngineClient(
            url, self.vocab_size, self.context_tokens, timeout_s, pause_mode=self.config.pause, key=self.key
        )

    def router(self) -> EngineRouter:
        """Return a router for the episodes of one process, with clients of its own."""
        return EngineRouter([self._client(url, self.config.request_timeout_s) for url in self.urls])

    @contextlib.asynccontextmanager
    async def clients(self) -> AsyncIterator[list[EngineClient]]:
        """Yield a client for each engine, closed at the end; what is asked here moves a model, as a start does."""
        limit_s = max(self.config.request_timeout_s, self.config.start_timeout_s)
        made = [self._client(url, limit_s) for url in self.urls]
        try:
            yield made
        finally:
            await asyncio.gather(*(client.close() for client in made))
