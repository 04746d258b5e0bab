"""A handle to all engines of a run."""

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
    """The engines of a run. It makes the clients that call them."""

    urls: tuple[str, ...]
    vocab_size: int
    context_tokens: int
    config: EngineConfig
    key: str = field(default="", repr=False)  # API key that the engines were started with; "": none

    def _client(self, url: str, timeout_s: float) -> EngineClient:
        return EngineClient(
            url, self.vocab_size, self.context_tokens, timeout_s, pause_mode=self.config.pause, key=self.key
        )

    def router(self) -> EngineRouter:
        """Return a router, with its own clients, for the episodes of one process."""
        return EngineRouter(self.urls, lambda url: self._client(url, self.config.request_timeout_s))

    @contextlib.asynccontextmanager
    async def clients(self) -> AsyncIterator[list[EngineClient]]:
        """Yield a client for each engine and close them at the end.

        Their time limit is at least that of an engine's start, because a call may move a whole model.
        """
        limit_s = max(self.config.request_timeout_s, self.config.start_timeout_s)
        made = [self._client(url, limit_s) for url in self.urls]
        try:
            yield made
        finally:
            await asyncio.gather(*(client.close() for client in made))
