"""Order, staleness and recovery of the buffer: nothing is lost, trained twice, or too old."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from episodes import sub_trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.actor import BufferActor
from buffer.config import BufferConfig
from buffer.store import Store, Ticket
from buffer.types import EpisodeStats, SubTraceInfo


def info(ticket: Ticket, num_tokens: int = 10, version: int = 0) -> SubTraceInfo:
    return SubTraceInfo(f"ref {ticket.number}", ticket.episode_id, num_tokens, num_tokens // 2, version)


def config(episodes_per_step: int, slots: int = 0, window: int = 0, group: int = 1, **changes: float) -> BufferConfig:
    return BufferConfig(episodes_per_step, group, slots, window, **changes)


@dataclass
class Run:
    """A simulated training run on a store: weight versions, and the lag of each trained ticket."""

    store: Store
    group: int = 1  # episodes per prompt
    version: int = 0
    running: dict[Ticket, int] = field(default_factory=dict)  # ticket -> weight version at its claim
    trained: list[int] = field(default_factory=list)
    lags: dict[int, int] = field(default_factory=dict)  # ticket number -> lag

    def claim_all(self, now_s: float = 0.0) -> None:
        while (ticket := self.store.claim(now_s, f"worker {len(self.running) % 3}")) is not None:
            self.running[ticket] = self.version

    def finish(self, ticket: Ticket) -> None:
        assert self.store.add(ticket, [info(ticket, version=self.running.pop(ticket))], EpisodeStats(ticket.number))

    def train(self) -> bool:
        batch = self.store.take()
        if batch is None:
            return False
        numbers = [int(stats.reward) for stats in batch.episodes]
        assert batch.step == self.version
        assert numbers == sorted(numbers)
        assert [item.episode_id for item in batch.items] == list(batch.episode_ids)
        assert [int(episode_id.split(".")[0]) for episode_id in batch.episode_ids] == numbers
        assert batch.groups == tuple(number // self.group for number in numbers)
        assert set(Counter(batch.groups).values()) == {self.group}  # whole groups
        self.trained += numbers
        for number, item in zip(numbers, batch.items, strict=True):
            self.lags[number] = self.version - item.oldest_version
        self.version += 1
        assert self.store.release(batch.step) == len(numbers)
        return True


def test_row_order_is_a_shuffle_per_epoch_from_seed_and_epoch_alone() -> None:
    one, two, other = Store(config(1), 50, seed=3), Store(config(1), 50, seed=3), Store(config(1), 50, seed=4)
    first, second = [one.row(k) for k in range(50)], [one.row(k) for k in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [other.row(k) for k in range(50)]
    assert second == [two.row(k) for k in range(50, 100)]  # does not depend on the first epoch


def test_life_of_a_ticket() -> None:
    store = Store(config(1, slots=2), 4, seed=0)
    first, second = store.claim(0.0, "a"), store.claim(0.0, "a")
    assert first is not None
    assert second is not None
    assert (first.number, second.number, first.attempt) == (0, 1, 0)
    assert store.claim(0.0, "a") is None  # both slots are taken
    assert store.take() is None
    assert store.add(second, [info(second)], EpisodeStats(1.0))
    assert not store.add(second, [info(second)], EpisodeStats(0.0))  # already answered
    batch = store.take()
    assert batch is not None
    assert (batch.step, batch.num_tokens, batch.episodes) == (0, 10, (EpisodeStats(1.0),))
    assert store.claim(0.0, "a") is None  # taken is not released
    assert store.take() is None
    assert store.release(0) == 1
    with pytest.raises(ValueError, match="step 0: it is not taken"):
        store.release(0)
    assert not store.add(second, [info(second)], EpisodeStats(0.0))  # released long ago
    third = store.claim(0.0, "a")
    assert third is not None
    assert third.number == 2


def test_an_episode_without_sub_traces_counts() -> None:
    store = Store(config(1), 1, seed=0)
    ticket = store.claim(0.0, "a")
    assert ticket is not None
    assert store.add(ticket, [], EpisodeStats(0.25))
    batch = store.take()
    assert batch is not None
    assert (batch.items, batch.episodes) == ((), (EpisodeStats(0.25),))
    assert (batch.episode_ids, batch.groups) == (("0.0",), (0,))
    assert store.release(0) == 1


def test_sub_traces_of_another_episode_are_refused() -> None:
    store = Store(config(1), 2, seed=0)
    ticket = store.claim(0.0, "a")
    assert ticket is not None
    with pytest.raises(ValueError, match=r"ticket 0 got sub-traces of 0\.1, 5\.0: all must be of episode 0\.0"):
        store.add(ticket, [info(ticket), info(Ticket(5, 0, 0)), info(Ticket(0, 0, 1))], EpisodeStats(0.0))


def test_failed_tickets_come_first_and_run_out() -> None:
    store = Store(config(1, slots=2), 9, seed=0, max_failures=2)
    ticket = store.claim(0.0, "a")
    assert ticket is not None
    for attempt in (1, 2):
        assert store.fail(ticket, "engine died")
        assert not store.fail(ticket, "engine died")  # late
        assert not store.add(ticket, [info(ticket)], EpisodeStats(0.0))  # late
        again = store.claim(0.0, "b")
        assert again is not None
        assert (again.number, again.row, again.attempt) == (0, ticket.row, attempt)
        ticket = again
    with pytest.raises(RuntimeError, match=r"ticket 0 .*failed 3 times, more than the allowed 2.*at b: sandbox gone"):
        store.fail(ticket, "sandbox gone")


def test_a_ticket_that_is_handed_back_has_not_failed() -> None:
    store = Store(config(1, slots=1), 9, seed=0, max_failures=0)
    for attempt in range(3):
        ticket = store.claim(0.0, "a")
        assert ticket == Ticket(0, store.row(0), attempt)
        assert store.hand_back(ticket)
        assert not store.hand_back(ticket)  # it waits for a worker


def test_expired_and_lost_tickets_are_issued_again() -> None:
    store = Store(config(1, slots=3, claim_timeout_s=10), 9, seed=0)
    tickets = [store.claim(float(k), worker) for k, worker in enumerate("aba")]
    assert store.expire(10.5) == [tickets[0]]
    assert store.expire(10.5) == []
    assert store.lost("a") == [tickets[2]]
    assert store.lost("a") == []
    assert store.counts()[2:6] == (1, 1, 2, 0)  # wanted, in flight, waiting, tokens
    assert store.holders() == {"b": [1]}
    again = [store.claim(11.0, "c"), store.claim(11.0, "c"), store.claim(11.0, "c")]
    assert again == [Ticket(0, store.row(0), 1), Ticket(2, store.row(2), 1), None]
    assert store.expire(13.0) == [tickets[1]]  # the time limit of a ticket starts with its own claim


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    group=st.sampled_from([1, 1, 2, 3]),
    groups_per_step=st.integers(1, 4),
    more_window=st.integers(0, 5),
    more_slots=st.integers(0, 5),
    num_rows=st.integers(1, 7),
)
def test_lag_order_and_rows_hold_under_stragglers_failures_and_resumes(
    seed: int, group: int, groups_per_step: int, more_window: int, more_slots: int, num_rows: int
) -> None:
    rng = random.Random(seed)
    window = groups_per_step + more_window
    sizes = (group * groups_per_step, group * (window + more_slots), group * window)
    settings_ = config(*sizes, group, claim_timeout_s=50)
    run = Run(Store(settings_, num_rows, seed, max_failures=10**9), group)
    superseded: list[Ticket] = []
    for now_s in range(200):
        run.claim_all(now_s)
        if not run.running:
            assert run.train()  # all slots hold finished episodes
            continue
        oldest = min(run.running, key=lambda ticket: ticket.number)
        others = [ticket for ticket in run.running if ticket != oldest]
        ticket = rng.choice(others) if others and rng.random() < 0.9 else oldest  # the oldest one straggles
        event = rng.random()
        if event < 0.85:
            run.finish(ticket)
        elif event < 0.9:
            assert run.store.fail(ticket, "broken")
            superseded.append(ticket)
        elif event < 0.93:
            superseded += run.store.lost("worker 1")
        elif event < 0.95:
            state = pickle.loads(pickle.dumps(run.store.state_dict()))
            superseded += run.running
            run.store = Store(settings_, num_rows, seed, max_failures=10**9)
            run.store.load_state_dict(state)
        superseded += run.store.expire(now_s)
        for late in superseded:
            run.running.pop(late, None)
            assert not run.store.add(late, [sub_trace_of(late)], EpisodeStats(0.0))
        superseded = superseded[-3:]
        while rng.random() < 0.7 and run.train():
            pass
    assert max(run.lags.values(), default=0) <= settings_.max_lag
    assert len(set(run.trained)) == len(run.trained)
    goal = len(run.trained) + 3 * num_rows * group
    while len(run.trained) < goal or run.running:  # nothing is lost: the rest is trained, too
        if len(run.trained) < goal:
            run.claim_all()
        for ticket in list(run.running):
            run.finish(ticket)
        while run.train():
            pass
    assert sorted(run.trained) == list(range(len(run.trained)))
    size = num_rows * group
    for epoch in range(len(run.trained) // size):
        rows = [run.store.row(number) for number in range(epoch * size, (epoch + 1) * size)]
        assert sorted(rows[::group]) == list(range(num_rows))
        assert rows == [row for row in rows[::group] for _ in range(group)]


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("window_to_slots", [0, 1, 3])
@pytest.mark.parametrize("groups_per_step", [1, 2, 3, 5])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("last", [True, False])
def test_the_bound_is_reached_by_one_straggler(
    groups_per_step: int, more: int, window_to_slots: int, group: int, last: bool
) -> None:
    """The straggler is of the youngest group that the first `slots` claims hold, in it the last claimed or the first.

    It finishes only when nothing else can be trained.
    """
    episodes_per_step, slots = groups_per_step * group, (groups_per_step + more) * group
    settings_ = config(episodes_per_step, slots, max(episodes_per_step, slots - window_to_slots * group), group)
    run = Run(Store(settings_, num_rows=3, seed=0), group)
    straggler = slots - 1 if last else slots - group
    while straggler not in run.trained:
        run.claim_all()
        for ticket in [ticket for ticket in run.running if ticket.number != straggler]:
            run.finish(ticket)
        if not run.train():
            run.finish(next(ticket for ticket in run.running if ticket.number == straggler))
            assert run.train()
    assert run.lags[straggler] == (settings_.max_lag if slots > episodes_per_step else 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes_per_step": 99}, "episodes_per_step=99 is not a multiple of .*=8: .* nearest that works is 96"),
        ({"episodes_per_step": 100}, "episodes_per_step=100 is not a multiple of .*=8: .* nearest that works is 104"),
        ({"episodes_per_step": 2}, "episodes_per_step=2 is not a multiple of .*=8: .* nearest that works is 8"),
        ({"slots": 133}, "slots=133 is not a multiple of .*=8: .* nearest that works is 136"),
        ({"slots": 136, "window": 129}, "window=129 is not a multiple of .*=8: .* nearest that works is 128"),
        ({"episodes_per_prompt": 0}, "episodes_per_prompt=0: must be at least 1"),
    ],
)
def test_numbers_that_would_tear_groups_are_refused(changes: dict[str, int], message: str) -> None:
    numbers = {"episodes_per_step": 128, "episodes_per_prompt": 8}
    with pytest.raises(ValueError, match=message):
        BufferConfig(**(numbers | changes))
    nearest = int(message.rsplit(" ", 1)[1])
    assert BufferConfig(**(numbers | changes | {next(reversed(changes)): nearest})).max_lag >= 0


def test_a_group_is_trained_when_its_last_episode_is_there() -> None:
    """Two groups of two; the younger is whole first, the older one's second ticket fails once and keeps its place."""
    store = Store(config(2, slots=4, group=2), num_rows=9, seed=0)
    tickets = [store.claim(0.0, "a") for _ in range(4)]
    rows = [ticket.row for ticket in tickets if ticket]
    assert rows == [rows[0], rows[0], rows[2], rows[2]]
    assert rows[0] != rows[2]
    for number in (0, 2):
        assert (ticket := tickets[number]) is not None
        assert store.add(ticket, [info(ticket)], EpisodeStats(0.0))
        assert store.take() is None  # two finished episodes, no whole group
    assert store.counts()[:3] == (2, 0, 2)  # finished, takeable, wanted
    assert tickets[1] is not None
    assert tickets[3] is not None
    assert store.fail(tickets[1], "broken")
    assert store.add(tickets[3], [], EpisodeStats(0.0))
    batch = store.take()
    assert batch is not None
    assert (batch.episode_ids, batch.groups) == (("2.0", "3.0"), (1, 1))
    assert [item.episode_id for item in batch.items] == ["2.0"]
    again = store.claim(0.0, "a")
    assert again == Ticket(1, rows[0], attempt=1)
    assert store.add(again, [info(again)], EpisodeStats(0.0))
    batch = store.take()
    assert batch is not None
    assert (batch.episode_ids, batch.groups) == (("0.0", "1.1"), (0, 0))


def test_a_resume_in_the_middle_of_a_group_keeps_it_whole() -> None:
    settings_ = config(2, slots=4, group=2)
    store = Store(settings_, num_rows=6, seed=1)
    tickets = [store.claim(0.0, "a") for _ in range(3)]
    assert tickets[0] is not None
    assert store.add(tickets[0], [info(tickets[0])], EpisodeStats(0.0))
    resumed = Store(settings_, num_rows=6, seed=1)
    resumed.load_state_dict(pickle.loads(pickle.dumps(store.state_dict())))
    claims = [resumed.claim(0.0, "new") for _ in range(5)]
    assert [(ticket.number, ticket.attempt) for ticket in claims if ticket] == [(0, 1), (1, 1), (2, 1), (3, 0)]
    rows = [ticket.row for ticket in claims if ticket]
    assert rows == [rows[0], rows[0], rows[2], rows[2]]
    with pytest.raises(ValueError, match="episodes_per_prompt is 2, this run's is 1: set it back"):
        Store(config(2, slots=4), num_rows=6, seed=1).load_state_dict(store.state_dict())
    older = {name: part for name, part in store.state_dict().items() if name != "episodes_per_prompt"}
    Store(config(2, slots=4), num_rows=6, seed=1).load_state_dict(older)  # a state from a version without groups


def test_synchronous_training_has_no_lag() -> None:
    run = Run(Store(config(4), num_rows=4, seed=0))
    for _ in range(5):
        run.claim_all()
        assert len(run.running) == 4
        for ticket in sorted(run.running, key=lambda ticket: -ticket.number):
            assert not run.train()
            run.finish(ticket)
        assert run.train()
    assert set(run.lags.values()) == {0}


def test_resume_issues_open_tickets_again_and_trained_ones_never() -> None:
    run = Run(Store(config(2, slots=5), num_rows=6, seed=1))
    run.claim_all()
    tickets = sorted(run.running, key=lambda ticket: ticket.number)
    for number in (0, 2, 4):
        run.finish(tickets[number])
    assert run.train()  # 0 and 2; 4 is finished, 1 and 3 are in flight
    resumed = Store(config(2, slots=5), num_rows=6, seed=1)
    resumed.load_state_dict(pickle.loads(pickle.dumps(run.store.state_dict())))
    claims = [resumed.claim(0.0, "new") for _ in range(6)]
    assert [(ticket.number, ticket.attempt) for ticket in claims if ticket] == [(1, 1), (3, 1), (4, 1), (5, 0), (6, 0)]
    assert not resumed.add(tickets[1], [info(tickets[1])], EpisodeStats(0.0))
    for ticket in claims[:2]:
        assert ticket is not None
        assert resumed.add(ticket, [info(ticket)], EpisodeStats(0.0))
    batch = resumed.take()
    assert batch is not None
    assert batch.step == 1
    assert [number for number, _, _ in resumed.state_dict()["open"]] == [4, 5, 6]  # taken ones count as trained
    for seed, rows, message in [(2, 6, "seed is 1, this run's is 2"), (1, 7, "num_rows is 6")]:
        with pytest.raises(ValueError, match=message):
            Store(config(2, slots=5), rows, seed).load_state_dict(run.store.state_dict())


def test_actor_claim_waits_for_a_slot_and_take_for_episodes() -> None:
    async def main() -> None:
        actor = BufferActor(config(1), num_rows=3, seed=0, put=id)
        taking = asyncio.create_task(actor.take())
        first = await actor.claim("a")
        assert first is not None
        claiming = asyncio.create_task(actor.claim("a"))
        assert await actor.add(first, [sub_trace_of(first)], EpisodeStats(0.5))
        batch = await asyncio.wait_for(taking, 10)
        assert batch.episodes == (EpisodeStats(0.5),)
        assert (await actor.status())[:6] == (0, 0, 1, 0, 0, 0)
        assert not claiming.done()
        await actor.release(batch.step)
        second = await asyncio.wait_for(claiming, 10)
        assert second is not None
        assert second.number == 1
        resumed = BufferActor(config(1), num_rows=3, seed=0, put=id)
        await resumed.load_state_dict(await actor.state_dict())
        assert await resumed.claim("b") == Ticket(1, second.row, 1)

    asyncio.run(main())


def test_actor_take_names_who_is_waited_for() -> None:
    async def main() -> None:
        actor = BufferActor(config(4, take_timeout_s=0.05), num_rows=9, seed=0)
        tickets = [await actor.claim(worker) for worker in ("a", "a", "b")]
        assert tickets[0] is not None
        await actor.add(tickets[0], [], EpisodeStats(0.0))
        with pytest.raises(
            TimeoutError, match=r"3 of 4 episodes are missing .*a holds 1 \(oldest ticket 1\), b holds 1"
        ):
            await actor.take()
        grouped = BufferActor(config(4, take_timeout_s=0.05, group=2), num_rows=9, seed=0)
        with pytest.raises(TimeoutError, match=r"4 of 4 episodes \(in whole groups of 2\) are missing"):
            await grouped.take()
        full = BufferActor(config(1), num_rows=9, seed=0)
        assert await full.claim("a") is not None
        assert await full.claim("a", wait_s=0.05) is None

    asyncio.run(main())


def test_actor_reissues_overdue_tickets_while_training_waits() -> None:
    async def main() -> None:
        actor = BufferActor(config(1, claim_timeout_s=0.05, take_timeout_s=60), num_rows=9, seed=0, put=id)
        late = await actor.claim("slow")
        again = await asyncio.wait_for(actor.claim("quick"), 10)
        assert late is not None
        assert again is not None
        assert (again.number, again.attempt) == (late.number, 1)
        assert not await actor.add(late, [sub_trace_of(late)], EpisodeStats(0.0))

    asyncio.run(main())


def test_actor_ends_the_claims_of_a_lost_worker_and_tells_training_of_failures() -> None:
    async def main() -> None:
        actor = BufferActor(config(1), num_rows=9, seed=0)
        ticket = await actor.claim("dead")
        waiting = asyncio.create_task(actor.claim("dead"))
        await asyncio.sleep(0)
        assert await actor.lost("dead") == 1
        assert await asyncio.wait_for(waiting, 10) is None
        taking = asyncio.create_task(actor.take())
        for attempt in range(1, 5):
            again = await actor.claim("a")
            assert again is not None
            assert ticket is not None
            assert (again.number, again.attempt) == (ticket.number, attempt)
            assert await actor.fail(again, "engine died")
        with pytest.raises(RuntimeError, match="engine died"):
            await asyncio.wait_for(taking, 10)

    asyncio.run(main())
