"""The records that are exchanged between rollout, buffer, critic and policy.

    Turn          one call of the engine                 (rollout writes it)
    Episode       one attempt at one prompt: its turns   (rollout writes it)
    EpisodeStats  the numbers measured on an Episode     (rollout writes it)
    SubTrace      tokens trained in one forward pass     (buffer.trace cuts an Episode into them)
    Batch         the sub-traces of one training step    (buffer hands it out)
    Targets       advantages and returns of a sub-trace  (critic.advantages writes it)

Every record is frozen. Shapes: T tokens of a sub-trace, P prompt tokens and N sampled
tokens of a turn. Log-probabilities are natural logarithms at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


class TurnKind(str, Enum):
    """The purpose of a turn."""

    ACT = "act"
    SUMMARY = "summary"  # a compaction: the policy condenses its own context


class Status(str, Enum):
    """How an episode ended."""

    FINISHED = "finished"  # the agent submitted or the environment ended it
    TRUNCATED = "truncated"  # a budget ran out (turns, tokens, compactions): trained with its reward
    FAILED = "failed"  # infrastructure broke: never trained, its ticket is issued again


class SubTraceKind(str, Enum):
    """The role of a sub-trace in its episode."""

    FINAL = "final"  # ends with the episode
    COMPACTED = "compacted"  # ends with a summary from which a later sub-trace continues
    SUB_AGENT = "sub_agent"  # ran as a sub-agent


@dataclass(frozen=True)
class Turn:
    """One call of the engine: its prompt and its sampled output."""

    prompt_ids: Int32  # [P] exactly the ids that the engine received
    output_ids: Int32  # [N] the ids that it sampled, including the stop id if there was one
    logprobs: Float32  # [N] log-probability of each output id under the weights that sampled it
    versions: Int32  # [N] weight version that sampled each output id
    stale_mask: Bool  # [N] True = sampled with cached keys and values of another weight version
    finish_reason: str  # "stop" | "length" | "abort"
    kind: TurnKind = TurnKind.ACT
    agent: int = 0  # index into Episode.parents
    observation: str = ""  # the environment's answer as text, for display
    reward: float = 0.0  # reward of this turn, in addition to the episode's terminal reward


@dataclass(frozen=True)
class Episode:
    """One attempt at one prompt.

    `turns` are in time order over all agents. `parents[k]` is the agent that started agent k
    (-1 for the root agent 0). `reward` is the terminal reward.
    """

    episode_id: str
    row: int  # line of the task file that the prompt came from, from 0
    turns: tuple[Turn, ...]
    reward: float
    status: Status
    parents: tuple[int, ...] = (-1,)
    prompt_tokens: int = 0  # length of the task's prompt, before the first output of the policy
    error: str = ""  # the reason if status is FAILED
    guard_events: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpisodeStats:
    """The numbers of one episode from which metrics are computed."""

    reward: float  # the terminal reward
    row: int = 0  # as in Episode
    truncated: bool = False  # a budget ran out
    num_turns: int = 0  # including summaries
    num_compactions: int = 0  # turns that wrote a summary
    num_sub_traces: int = 0
    compacted: bool = False  # a sub-trace ends with a compaction
    num_sampled: int = 0  # tokens that the policy sampled
    prompt_tokens: int = 0  # as in Episode
    duration_s: float = 0.0  # from the sandbox to the reward
    engine_s: float = 0.0  # time that the episode waited for the engine


class Successor(NamedTuple):
    """The action whose state follows a sub-trace's last action."""

    position: int  # SubTrace.position of the sub-trace that continues
    action: int  # index among that sub-trace's action tokens, from 0


@dataclass(frozen=True)
class SubTrace:
    """A token sequence that is trained in one forward pass.

    Example: a compacted coding episode; `[...]` is sampled by the policy (action_mask True):

        position 0  task [cat a8] file [cat b9] file <compact> [a=17;b=12]   COMPACTED, successor (1, 0)
        position 1  task <summary> a=17;b=12 [put ...] [submit]              FINAL, successor None

    The summary is trained where the policy wrote it (position 0); its copy in position 1 is context.
    """

    tokens: Int32  # [T]
    action_mask: Bool  # [T] True = sampled by the policy here; never True at index 0
    logprobs: Float32  # [T] engine log-probability of each action token, 0 elsewhere
    rewards: Float32  # [T] reward given at each action token (a turn's at its last one), 0 elsewhere
    versions: Int32  # [T] weight version of each action token, -1 elsewhere
    stale_mask: Bool  # [T] True = action token sampled with keys and values of another weight version: off-policy
    summary_mask: Bool  # [T] True = action token of a summary turn
    episode_id: str
    position: int  # index among the sub-traces of its episode, from 0, in time order
    successor: Successor | None
    kind: SubTraceKind
    status: Status

    @property
    def name(self) -> str:
        """Return the name used in messages."""
        return f"episode {self.episode_id}, sub-trace {self.position}"

    @property
    def num_actions(self) -> int:
        return int(self.action_mask.sum())

    @property
    def oldest_version(self) -> int:
        """Return the smallest weight version among the action tokens."""
        return int(self.versions[self.action_mask].min())


@dataclass(frozen=True)
class SubTraceInfo:
    """The buffer's record of a sub-trace: a reference and numbers, without the tokens."""

    ref: Any  # Ray object reference of the SubTrace (or the SubTrace itself, in unit tests)
    episode_id: str
    num_tokens: int
    num_actions: int
    oldest_version: int


@dataclass(frozen=True)
class Batch:
    """The whole episodes of one training step. It contains all episodes of each group.

    `episodes`, `episode_ids` and `groups` have one entry per episode, in the same order. An episode in which nothing
    was sampled has entries there but no items.
    """

    step: int
    items: tuple[SubTraceInfo, ...]
    episodes: tuple[EpisodeStats, ...]
    episode_ids: tuple[str, ...] = ()  # as in SubTraceInfo.episode_id
    groups: tuple[int, ...] = ()  # group numbers: equal for the attempts at one prompt, unique in a run
    tokens_per_s: float | None = None  # sampled since the previous batch, while episodes ran; None: not measured

    @property
    def num_actions(self) -> int:
        return sum(item.num_actions for item in self.items)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


# grid[rank][micro_batch] -> indices of sub-traces. Every rank has the same number of micro-batches;
# an empty list is a padding micro-batch with zero loss.
Grid = list[list[list[int]]]


class TokenColumn(Mapping[int, Float32]):
    """A number for every token of a batch: a float32 [T] array per sub-trace, by its index in the batch."""

    def __init__(self, arrays: Mapping[int, Float32] | Iterable[tuple[int, Float32]] = ()) -> None:
        self._arrays = dict(arrays)

    def __getitem__(self, index: int) -> Float32:
        return self._arrays[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def part(self, indices: Iterable[int]) -> TokenColumn:
        """Return a column of these sub-traces only. KeyError: one of them is missing."""
        return TokenColumn((index, self._arrays[index]) for index in indices)

    @staticmethod
    def joined(columns: Iterable[TokenColumn]) -> TokenColumn:
        """Return one column with the sub-traces of all columns."""
        return TokenColumn(pair for column in columns for pair in column.items())


@dataclass(frozen=True)
class Scores:
    """Results of the forward passes over a batch before its first update."""

    values: TokenColumn = field(
        default_factory=TokenColumn
    )  # the critic's; [T], or [T + 1] with the value after the last token
    old_logprobs: TokenColumn = field(default_factory=TokenColumn)  # the policy's
    reference_logprobs: TokenColumn = field(default_factory=TokenColumn)  # the reference model's; empty without one


@dataclass(frozen=True)
class Targets:
    """Training targets of a sub-trace; zero where its action_mask is False."""

    advantages: Float32  # [T]
    returns: Float32  # [T]
    values: Float32  # [T] the critic's value before each action token, computed before the first update
