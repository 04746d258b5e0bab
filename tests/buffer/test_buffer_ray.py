"""The buffer as a Ray actor: references inside records, calls that wait, workers that die."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from buffer.actor import BufferActor
from buffer.config import BufferConfig
from buffer.handle import BufferHandle
from buffer.store import Ticket
from buffer.types import EpisodeStats, Status, SubTrace, SubTraceKind, Successor
from machine.actors import call
from machine.failures import reason

pytestmark = pytest.mark.e2e

LIMIT_S = 60.0
PLAIN = BufferConfig(episodes_per_step=2, slots=3, window=3)


def sub_trace(ticket: Ticket, position: int) -> SubTrace:
    """Return tokens that identify their ticket."""
    mask = np.array([False, True, True])
    return SubTrace(
        tokens=np.array([ticket.number, ticket.row, position], np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -0.5, 0).astype(np.float32),
        rewards=np.zeros(3, np.float32),
        versions=np.where(mask, 4, -1).astype(np.int32),
        stale_mask=np.zeros(3, bool),
        summary_mask=np.zeros(3, bool),
        episode_id=ticket.episode_id,
        position=position,
        successor=None if position else Successor(1, 0),
        kind=SubTraceKind.FINAL if position else SubTraceKind.COMPACTED,
        status=Status.FINISHED,
    )


class Player:
    """A rollout worker without engines."""

    def __init__(self, name: str, buffer: BufferHandle) -> None:
        self.name = name
        self.buffer = buffer

    async def claim(self, wait_s: float = 30.0) -> Ticket | None:
        return await call(self.buffer.actor, BufferActor.claim, self.name, wait_s)

    async def play(self, ticket: Ticket) -> bool:
        traces = [sub_trace(ticket, position) for position in (0, 1)]
        return await self.buffer.add(ticket, traces, EpisodeStats(float(ticket.number)))


class Stage:
    """A buffer and two players."""

    def __init__(self, ray: ModuleType, config: BufferConfig) -> None:
        self.ray = ray
        self.buffer = ray.remote(BufferActor).options(num_cpus=0, max_concurrency=64).remote(config, 100, 0)
        remote = ray.remote(Player).options(num_cpus=0, max_concurrency=8)
        self.players = [remote.remote(f"w{number}", BufferHandle(self.buffer)) for number in range(2)]

    def get(self, ref: Any) -> Any:
        return self.ray.get(ref, timeout=LIMIT_S)

    def waits(self, ref: Any) -> bool:
        """Return True if there is no answer for a while."""
        return not self.ray.wait([ref], timeout=1.0)[0]


@pytest.fixture
def stage(ray_cluster: ModuleType, request: pytest.FixtureRequest) -> Iterator[Stage]:
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    made = Stage(ray_cluster, getattr(request, "param", PLAIN))
    yield made
    for actor in (made.buffer, *made.players):
        ray_cluster.kill(actor)


def test_finished_episodes_outlive_their_worker(stage: Stage) -> None:
    for player in stage.players:
        assert stage.get(player.play.remote(stage.get(player.claim.remote())))
        stage.ray.kill(player)
    batch = stage.get(stage.buffer.take.remote())
    assert [trace.episode_id for trace in stage.get([item.ref for item in batch.items])] == ["0.0", "0.0", "1.0", "1.0"]


def test_episodes_travel_by_reference(stage: Stage) -> None:
    """The buffer hands out references inside records, and frees them when the step is released."""
    first, second = (stage.get(player.claim.remote()) for player in stage.players)
    taking = stage.buffer.take.remote()
    assert stage.get(stage.players[1].play.remote(second))
    assert stage.waits(taking)
    assert stage.get(stage.players[0].play.remote(first))
    batch = stage.get(taking)
    assert [item.episode_id for item in batch.items] == ["0.0", "0.0", "1.0", "1.0"]  # ticket order
    assert all(isinstance(item.ref, stage.ray.ObjectRef) for item in batch.items)
    assert batch.episodes == (EpisodeStats(0.0), EpisodeStats(1.0))
    assert (batch.episode_ids, batch.groups) == (("0.0", "1.0"), (0, 1))
    traces = stage.get([item.ref for item in batch.items])
    for trace, ticket, position in zip(traces, (first, first, second, second), (0, 1, 0, 1), strict=True):
        wanted = sub_trace(ticket, position)
        assert (trace.tokens.tolist(), trace.successor, trace.kind) == (
            wanted.tokens.tolist(),
            wanted.successor,
            wanted.kind,
        )
        assert trace.logprobs.tolist() == wanted.logprobs.tolist()


def test_a_claim_waits_for_a_free_slot(stage: Stage) -> None:
    player = stage.players[0]
    tickets = [stage.get(player.claim.remote()) for _ in range(3)]
    waiting = player.claim.remote()
    assert stage.waits(waiting)
    assert stage.get(player.claim.remote(0.2)) is None  # no ticket within the time limit: claim again
    assert all(stage.get([player.play.remote(ticket) for ticket in tickets]))
    batch = stage.get(stage.buffer.take.remote())
    assert stage.waits(waiting)  # trained, but the new weights are not published yet
    stage.get(stage.buffer.release.remote(batch.step))
    assert stage.get(waiting).number == 3


def test_tickets_of_a_dead_worker_are_issued_again(stage: Stage) -> None:
    dying, living = stage.players
    lost = [stage.get(dying.claim.remote()) for _ in range(2)]
    kept = stage.get(living.claim.remote())
    its_wait, other_wait = stage.buffer.claim.remote("w0"), living.claim.remote()
    assert stage.waits(its_wait)
    stage.ray.kill(dying)
    assert stage.get(stage.buffer.lost.remote("w0")) == 2
    assert stage.get(its_wait) is None  # a pending claim of the dead worker gets no ticket
    again = [stage.get(other_wait), stage.get(living.claim.remote())]
    assert [(t.number, t.row, t.attempt) for t in again] == [(t.number, t.row, 1) for t in lost]
    assert stage.get(stage.buffer.add.remote(lost[0], [], {})) is False  # too late
    assert all(stage.get([living.play.remote(ticket) for ticket in (*again, kept)]))
    batch = stage.get(stage.buffer.take.remote())
    assert [item.episode_id for item in batch.items[::2]] == ["0.1", "1.1"]


@pytest.mark.parametrize("stage", [BufferConfig(episodes_per_step=2, slots=2, take_timeout_s=1.0)], indirect=True)
def test_a_deadline_names_who_is_waited_for(stage: Stage) -> None:
    stage.get(stage.players[0].claim.remote())
    stage.get(stage.players[1].play.remote(stage.get(stage.players[1].claim.remote())))
    with pytest.raises(TimeoutError, match=r"1 of 2 episodes are missing after 1 s: w0 holds 1 \(oldest ticket 0\)"):
        stage.get(stage.buffer.take.remote())


@pytest.mark.parametrize("stage", [BufferConfig(episodes_per_step=1, slots=1, claim_timeout_s=1.0)], indirect=True)
def test_an_overdue_ticket_goes_to_another(stage: Stage) -> None:
    first, overdue = (stage.get(player.claim.remote()) for player in stage.players[:2])
    assert (overdue.number, overdue.attempt) == (first.number, 1)


def test_an_episode_that_fails_too_often_ends_training(stage: Stage) -> None:
    taking = stage.buffer.take.remote()
    for attempt in range(4):
        ticket = stage.get(stage.players[0].claim.remote())
        assert (ticket.number, ticket.attempt) == (0, attempt)
        assert stage.waits(taking) if attempt == 3 else True
        stage.get(stage.buffer.fail.remote(ticket, f"sandbox {attempt} broke", f"trace {attempt}"))
    with pytest.raises(RuntimeError, match=r"ticket 0 .* failed 4 times.*w0: sandbox 3 broke") as caught:
        stage.get(taking)
    assert reason(caught.value).startswith("ticket 0 (row ")
    assert "trace 3" in "".join(traceback.format_exception(caught.value))


def test_a_resumed_buffer_goes_on(stage: Stage) -> None:
    player = stage.players[0]
    tickets = [stage.get(player.claim.remote()) for _ in range(3)]
    stage.get([player.play.remote(ticket) for ticket in tickets[:2]])
    batch = stage.get(stage.buffer.take.remote())
    stage.get(stage.buffer.release.remote(batch.step))
    state = stage.get(stage.buffer.state_dict.remote())
    resumed = Stage(stage.ray, PLAIN)
    stage.get(resumed.buffer.load_state_dict.remote(state))
    found = [stage.get(resumed.players[1].claim.remote()) for _ in range(2)]
    assert [(t.number, t.attempt) for t in found] == [(2, 1), (3, 0)]
    assert found[0].row == tickets[2].row
    for actor in (resumed.buffer, *resumed.players):
        stage.ray.kill(actor)
