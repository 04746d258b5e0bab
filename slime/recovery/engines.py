"""Replacement of engines that die, while training goes on.

    an engine dies -> workers leave it -> a new one starts -> it joins at a publication -> workers use it

A new engine holds the weights that the run started from, so no episode may use it before it has been sent the policy's.
It joins the weight group at the next publication. While the loop waits for episodes, the policy holds the weights that
were published last, and the loop publishes them again as soon as the engine is up (`Run.check`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray

from launch.deaths import ProcessDied, actor_id
from machine.actors import call
from machine.failures import reason
from rollout.engines.server import EngineServer
from slime.recovery.recovery import limit_deaths

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from slime.run import Run


@dataclass
class _Place:
    url: str  # "" while it starts
    starting: ObjectRef[str] | None = None  # its URL, as soon as it serves
    began_s: float = 0.0
    deaths: list[str] = field(default_factory=list)  # since the last publication to it


class EngineReplacer:
    """Replaces the engines of one run."""

    def __init__(
        self, run: Run, start: Callable[[int], ActorHandle[EngineServer]], note: Callable[[str], None]
    ) -> None:
        """Prepare replacements. `start` begins to start an engine, by its number; `note` tells the user a line."""
        self._run = run
        self._start = start
        self._note = note
        self._engines = [_Place(url) for url in run.engines.urls]
        self._numbers = {actor_id(server): number for number, server in enumerate(run.servers)}

    @property
    def joining(self) -> bool:
        """Return whether an engine is up that waits for a publication."""
        return any(engine.url and engine.began_s for engine in self._engines)

    def replaces(self, death: ProcessDied) -> bool:
        """Return whether an engine has died."""
        return death.actor_id in self._numbers

    def replace(self, death: ProcessDied) -> None:
        """Take a dead engine out of use and begin to start another one.

        RuntimeError: an engine at this place dies again and again.
        """
        number = self._numbers[death.actor_id]
        if death.actor_id == actor_id(self._run.servers[number]):  # else it was replaced before its death was found
            self._replace(number, str(death))

    def advance(self) -> None:
        """Let engines that are up join at the next publication. RuntimeError: see `replace`."""
        for number, engine in enumerate(self._engines):
            if engine.starting is None or not ray.wait([engine.starting], timeout=0)[0]:
                continue
            try:
                engine.url, engine.starting = ray.get(engine.starting), None
            except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
                self._replace(number, reason(error))
            else:
                self._run.weights.use_engines(self._urls())

    def joined(self) -> None:
        """Let episodes use the engines that have been sent the policy's weights."""
        self._run.rollout.set_engines(self._urls())
        for number, engine in enumerate(self._engines):
            if not engine.url:
                continue
            if engine.began_s:
                self._run.recovery.count("recovery/engines")
                self._note(f"engine {number} serves again after {time.monotonic() - engine.began_s:.0f} s")
            engine.began_s, engine.deaths = 0.0, []

    def _replace(self, number: int, why: str) -> None:
        engine, server = self._engines[number], self._run.servers[number]
        engine.deaths.append(why)
        limit_deaths(f"engine {number}", engine.deaths)
        self._note(f"{why}; another engine {number} is started")
        engine.url = ""
        self._run.rollout.set_engines(self._urls())
        self._run.weights.use_engines(self._urls())
        ray.kill(server)
        server = self._run.servers[number] = self._start(number)
        self._numbers[actor_id(server)] = number
        engine.starting, engine.began_s = call(server, EngineServer.start), time.monotonic()

    def _urls(self) -> Sequence[str]:
        return [engine.url for engine in self._engines if engine.url]
