"""Helpers for tests of sandboxes."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from rollout.config import SandboxConfig
from rollout.sandbox.bubblewrap import BubblewrapPool
from rollout.sandbox.factory import probe
from rollout.sandbox.interface import RunResult, Sandbox, SandboxPool

CONFIG = SandboxConfig(run_timeout_s=5.0, num_prestarted=0)
BROKEN = probe(CONFIG)
needs_bubblewrap = pytest.mark.skipif(BROKEN is not None, reason=f"bubblewrap does not work here: {BROKEN}")

Body = Callable[[Sandbox], Awaitable[None]]


@asynccontextmanager
async def opened(pool: SandboxPool) -> AsyncIterator[SandboxPool]:
    try:
        yield pool
    finally:
        await pool.close()


def use(body: Body, kind: type[SandboxPool] = BubblewrapPool, config: SandboxConfig = CONFIG) -> None:
    """Run a test's body with one sandbox."""

    async def main() -> None:
        async with opened(kind(config)) as pool:  # type: ignore[call-arg]
            await body(await pool.acquire())

    asyncio.run(main())


def run_program(source: str, stdin: str = "", config: SandboxConfig = CONFIG) -> RunResult:
    """Return the result of one program in a new sandbox."""
    results: list[RunResult] = []

    async def body(box: Sandbox) -> None:
        results.append(await box.run_python(textwrap.dedent(source), stdin))

    use(body, config=config)
    return results[0]
