"""Checks of the nodes of a Ray cluster: those of one machine on each of them, and what holds between them.

    alone       launch/doctor/machine.py and software.py on each node (launch/doctor/node.py)
    versions    Python, packages, driver and the project's own files are those of this machine
    model       the model's folder has the same files
    folders     a file goes to each node and back (launch/doctor/shared.py)
    clock       read from here; the skew is known within half of the fastest round trip
    network     each node connects to every other
    all-reduce  ranks on all nodes add up numbers

Judgments are in launch/doctor/compare.py. A node that does not answer in time is named, and left out of the checks that
follow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from launch.doctor import shared, software
from launch.doctor.collective import TIMEOUT_S, EndedRank, backend_of, judged, running
from launch.doctor.compare import NodeClock, alike, clocks, differing, judged_replies, on, unreached
from launch.doctor.finding import Finding, Needs, problem
from launch.doctor.machine import WRITE_BYTES
from launch.doctor.node import NodeCheck
from launch.nodes import Node, NodeError, find_nodes, on_node
from machine.actors import call, handle
from machine.failures import reason

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

T = TypeVar("T")
ANSWER_WAIT_S = 120.0  # a node's first Python process may read its packages from a slow shared disk
ROUND_TRIPS = 5
SETTLE_S = 5.0  # between ranks that fail for the same reason


def joined(needs: Needs) -> list[Finding]:
    """Join the cluster at `ray_address`, make all checks of its nodes, and leave it."""
    from launch.local import start_ray, stop_ray  # imports Ray

    try:
        start_ray(needs.cluster)
        return check(needs, find_nodes(needs.cluster), WRITE_BYTES, all_reduce=True)
    except NodeError as error:
        in_slurm = "; `slime submit slurm` starts Ray on its job's nodes and checks them" * (
            "SLURM_JOB_ID" in os.environ
        )
        return problem("nodes", f"{error}{in_slurm}")
    finally:
        stop_ray()


def check(needs: Needs, nodes: Sequence[Node], num_bytes: int, all_reduce: bool) -> list[Finding]:
    """Return the findings of the nodes. `num_bytes`: size of the files that test the shared folders."""
    import ray

    needs = replace(
        needs,
        runs_dir=needs.runs_dir.absolute(),
        model_folder=needs.model_folder and needs.model_folder.absolute(),
    )
    made = ray.remote(NodeCheck)
    addresses = [node.address for node in nodes]
    actors = {
        node.address: handle(
            made.options(num_cpus=0, scheduling_strategy=on_node(node)).remote(node.address, addresses)
        )
        for node in nodes
    }
    try:
        return NodeChecks(actors, needs).check(num_bytes, all_reduce)
    finally:
        for actor in actors.values():
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)


class NodeChecks:
    """The actors on the nodes that answer, by address, and what was found."""

    def __init__(
        self, actors: Mapping[str, ActorHandle[NodeCheck]], needs: Needs, wait_s: float = ANSWER_WAIT_S
    ) -> None:
        """Prepare the checks. `wait_s`: for an answer of a node."""
        self._wait_s = wait_s
        self._actors = dict(actors)
        self._needs = needs
        self._found: list[Finding] = []

    def check(self, num_bytes: int, all_reduce: bool) -> list[Finding]:
        """Return the findings; see the function `check`."""
        self._look()
        self._folders(num_bytes)
        self._found += clocks({address: self._clock(address) for address in self._actors})
        self._network()
        if all_reduce and self._actors:
            self._all_reduce()
        return self._found

    def _ask(self, check: str, ask: Callable[[str, ActorHandle[NodeCheck]], ObjectRef[T]]) -> dict[str, T]:
        """Ask all nodes at once and return their answers; a node without one is named and asked no more."""
        asked = {address: ask(address, actor) for address, actor in self._actors.items()}
        deadline = time.monotonic() + self._wait_s
        answers = {}
        for address, pending in asked.items():
            try:
                answers[address] = _get(pending, deadline - time.monotonic())
            except NodeError as error:
                why = (
                    str(error)
                    or f"has not answered in {self._wait_s:g} s: see whether the machine and its Ray are alive"
                )
                self._found += on([address], problem(check, why))
                del self._actors[address]
        return answers

    def _look(self) -> None:
        needs = self._needs
        with_sandboxes = list(self._actors)[: needs.num_rollout_workers]
        views = self._ask(
            "answer", lambda address, actor: call(actor, NodeCheck.look, needs, address in with_sandboxes)
        )
        self._found += alike({address: view.findings for address, view in views.items()})
        self._found += differing({address: view.versions for address, view in views.items()}, software.versions())
        if needs.model_folder:
            here = shared.digest_of_model(needs.model_folder)
            others = [address for address, view in views.items() if view.model_digest != here]
            self._found += on(
                others,
                problem(
                    "model",
                    f"model.path={needs.model_folder} is not there, or another one than on the machine that starts the "
                    f"run: {shared.CURE}",
                ),
            )

    def _folders(self, num_bytes: int) -> None:
        named = {"runs_dir": self._needs.runs_dir, "cache_dir": self._needs.cache_dir}
        settings: dict[Path, list[str]] = {}
        for setting, folder in named.items():
            if folder is not None:
                settings.setdefault(shared.existing(folder), []).append(setting)
        offers = []
        try:
            for folder, names in settings.items():
                try:
                    offers.append(shared.offer(",".join(names), folder, num_bytes))
                except OSError as error:
                    text = f"{folder} can't be written to ({error.strerror or error}): let this user write there"
                    self._found += problem("shared folders", text)
            number = {address: str(index) for index, address in enumerate(self._actors)}
            replies = self._ask(
                "shared folders", lambda address, actor: call(actor, NodeCheck.reply, offers, number[address])
            )
            for index, offered in enumerate(offers):
                self._found += judged_replies(offered, {address: many[index] for address, many in replies.items()})
        finally:
            for offered in offers:
                shared.remove(offered)

    def _clock(self, address: str) -> NodeClock | None:
        """None: the node does not answer."""
        best: NodeClock | None = None
        for _ in range(ROUND_TRIPS):
            before = time.time()
            try:
                there = _get(call(self._actors[address], NodeCheck.clock), self._wait_s)
            except NodeError:
                return best
            after = time.time()
            clock = NodeClock(there - (before + after) / 2, (after - before) / 2)
            best = clock if best is None or clock.within_s < best.within_s else best
        return best

    def _network(self) -> None:
        ports = self._ask("network", lambda address, actor: call(actor, NodeCheck.listen))
        lacking = self._ask("network", lambda address, actor: call(actor, NodeCheck.reach, ports))
        self._found += unreached(lacking)

    def _all_reduce(self) -> None:
        gpus = self._needs.cluster.gpus_per_node
        each = gpus or (1 if len(self._actors) > 1 else 2)
        size, first = each * len(self._actors), next(iter(self._actors))
        ranks = {address: list(range(n * each, (n + 1) * each)) for n, address in enumerate(self._actors)}
        run = NodeCheck.run_gpu_ranks if gpus else NodeCheck.run_ranks
        try:
            port = _get(call(self._actors[first], NodeCheck.reserve_port), self._wait_s)
        except NodeError as error:
            self._found += on([first], problem("all-reduce", str(error) or f"no port in {self._wait_s:g} s: try again"))
            return
        began = time.monotonic()
        asked = {
            address: call(actor, run, ranks[address], size, first, port, TIMEOUT_S)
            for address, actor in self._actors.items()
        }
        ended = self._ended(asked)
        listed = [one for address in asked for one in ended.get(address) or [running(address)] * each]
        self._found += judged(listed, backend_of(gpus), time.monotonic() - began)

    def _ended(self, asked: Mapping[str, ObjectRef[list[EndedRank]]]) -> dict[str, list[EndedRank]]:
        """Return what has become of the ranks. Those that wait for a failed one are not waited for."""
        import ray

        deadline = time.monotonic() + TIMEOUT_S + self._wait_s
        ended: dict[str, list[EndedRank]] = {}
        waiting = dict(asked)
        while waiting and time.monotonic() < deadline:
            done, _ = ray.wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            for address in [address for address, pending in waiting.items() if pending in done]:
                try:
                    ended[address] = _get(waiting.pop(address), self._wait_s)
                except NodeError as error:
                    ended[address] = [EndedRank(1, (str(error),), address)]
                if any(one.code for one in ended[address]):
                    deadline = min(deadline, time.monotonic() + SETTLE_S)
        return ended


def _get(pending: ObjectRef[T], wait_s: float) -> T:
    """Return an answer. NodeError: there is none in time (without text), or the reason why there is none."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(pending, timeout=max(0.0, wait_s))
    except GetTimeoutError as error:
        raise NodeError from error
    except RayError as error:
        cure = "slime, its packages and Ray must be the same there, and its Ray alive"
        raise NodeError(f"the checks can't run there: {reason(error)}: {cure}") from error
