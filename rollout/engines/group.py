"""Engines as their caller sees them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from rollout.config import EngineConfig
from rollout.engines.client import EngineClient


class EngineGroup:
    """All engines, over HTTP."""

    def __init__(
        self, urls: Sequence[str], vocab_size: int, context_tokens: int, config: EngineConfig, key: str = ""
    ) -> None:
        """`key`: what the engines were started with."""
        self._key = key
        self.urls = list(urls)
        self.config = config
        self._shape = (vocab_size, context_tokens)

    @contextlib.asynccontextmanager
    async def clients(self) -> AsyncIterator[list[EngineClient]]:
        """A client for each engine, closed at the end; what is asked here moves a model, as an engine's start does."""
        limit_s = max(self.config.request_timeout_s, self.config.start_timeout_s)
        made = [EngineClient(url, *self._shape, limit_s, key=self._key) for url in self.urls]
        try:
            yield made
        finally:
            await asyncio.gather(*(client.close() for client in made))
