"""Cut an episode's turns into the token sequences that are trained."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from buffer.types import Episode, Status, SubTrace, SubTraceKind, Successor, Turn, TurnKind


@dataclass
class _Segment:
    """Consecutive turns of one agent in which each prompt extends the tokens before it."""

    agent: int
    turns: list[int] = field(default_factory=list)  # indices into Episode.turns


def cut(episode: Episode) -> tuple[SubTrace, ...]:
    """Return the sub-traces of an episode, in the time order of their first turns.

    The cut rule: a new sub-trace begins where a turn's prompt does not extend the tokens before it
    (prompt and output of the same agent's previous turn). Compaction, template drift and edited
    history are one case. Tokens are the engine's ids, never retokenized text.

    Worked example: four turns of one agent with reward 1; `[...]` is sampled:

        turn 0  ACT      prompt 1 2               output [3 4]
        turn 1  ACT      prompt 1 2 3 4 5         output [6]      extends turn 0; 5 is tool output
        turn 2  SUMMARY  prompt 1 2 3 4 5 6 7     output [8 9]    extends turn 1
        turn 3  ACT      prompt 1 8 9             output [4]      does not extend: cut

        position 0  tokens 1 2 [3 4] 5 [6] 7 [8 9]  COMPACTED  successor (1, 0)   rewards all 0
        position 1  tokens 1 8 9 [4]                FINAL      successor None     rewards 0 0 0 1

    The summary 8 9 is trained at position 0, where the policy wrote it; at position 1 it is context.

    - Every output token of every turn is an action token of exactly one sub-trace.
    - Turns without output are skipped because nothing was sampled. The result is () if no turn has output.
    - `successor` is the first action of the same agent's next sub-trace. For an agent's last sub-trace it is
      the first later action of its nearest ancestor that acts again, or None if no ancestor acts again.
    - A turn's reward is placed on the turn's last output token, for every agent.
    - The terminal reward is added on the last action token of the root agent's last sub-trace only. A
      sub-agent whose ancestors do not act again receives none of it.
    - `kind` is SUB_AGENT for every agent except the root. The root's last sub-trace is FINAL and its
      earlier ones are COMPACTED.

    ValueError: the episode failed (it is never trained), turns contradict each other, a reward is not
    finite, or a turn has a reward but no output token to place it on.
    """
    _check(episode)
    segments = _segments(episode)
    if not segments:
        return ()
    successors = _successors(episode, segments)
    of_root = [position for position, segment in enumerate(segments) if segment.agent == 0]
    if not of_root:
        raise ValueError(
            f"episode {episode.episode_id}: the root agent 0 sampled nothing, but agent {segments[0].agent} did: "
            "Turn.agent or Episode.parents is wrong"
        )
    return tuple(
        _sub_trace(episode, segment, position, successors[position], final=position == of_root[-1])
        for position, segment in enumerate(segments)
    )


def _check(episode: Episode) -> None:
    name = f"episode {episode.episode_id}"
    if episode.status is Status.FAILED:
        raise ValueError(
            f"{name} failed ({episode.error or 'no reason given'}): it can't be trained; report its ticket as failed"
        )
    if not np.isfinite(episode.reward):
        raise ValueError(f"{name}: reward is {episode.reward}, but it must be finite")
    for agent, parent in enumerate(episode.parents):
        if (parent != -1) if agent == 0 else not 0 <= parent < agent:
            raise ValueError(
                f"{name}: parents[{agent}]={parent}: the root is agent 0 with parent -1, "
                "and a sub-agent comes after the agent that started it"
            )
    for index, turn in enumerate(episode.turns):
        sizes = (len(turn.output_ids), len(turn.logprobs), len(turn.versions), len(turn.stale_mask))
        if len(set(sizes)) != 1:
            raise ValueError(
                f"{name}, turn {index}: output_ids, logprobs, versions, stale_mask have lengths {sizes}: must be equal"
            )
        if not 0 <= turn.agent < len(episode.parents):
            raise ValueError(f"{name}, turn {index}: agent {turn.agent} is not among {len(episode.parents)} agents")
        if not np.isfinite(turn.reward):
            raise ValueError(f"{name}, turn {index}: reward is {turn.reward}, but it must be finite")
        if turn.reward and not sizes[0]:
            raise ValueError(
                f"{name}, turn {index}: reward {turn.reward} for a turn without output has no sampled token; "
                "assign it to an earlier turn or to the episode's reward"
            )
        if sizes[0] and not len(turn.prompt_ids):
            raise ValueError(f"{name}, turn {index}: prompt_ids is empty: the first sampled token needs a context")


def _extends(turn: Turn, before: Turn) -> bool:
    """Return whether the prompt begins with the prompt and the output of the previous turn."""
    seam = len(before.prompt_ids)
    end = seam + len(before.output_ids)
    return (
        len(turn.prompt_ids) >= end
        and np.array_equal(turn.prompt_ids[seam:end], before.output_ids)
        and np.array_equal(turn.prompt_ids[:seam], before.prompt_ids)
    )


def _segments(episode: Episode) -> list[_Segment]:
    """Return segments in the time order of their first turns; a segment's index is its position."""
    segments: list[_Segment] = []
    open_of: dict[int, _Segment] = {}  # agent -> its segment that may continue
    for index, turn in enumerate(episode.turns):
        if not len(turn.output_ids):
            continue
        segment = open_of.get(turn.agent)
        if segment is None or not _extends(turn, episode.turns[segment.turns[-1]]):
            segment = open_of[turn.agent] = _Segment(turn.agent)
            segments.append(segment)
        segment.turns.append(index)
    return segments


def _successors(episode: Episode, segments: list[_Segment]) -> list[Successor | None]:
    first_action: dict[int, Successor] = {}  # turn -> location of its first output token
    turns_of: dict[int, list[int]] = {}  # agent -> its turns
    for position, segment in enumerate(segments):
        action = 0
        for index in segment.turns:
            first_action[index] = Successor(position, action)
            action += len(episode.turns[index].output_ids)
        turns_of.setdefault(segment.agent, []).extend(segment.turns)

    def later(agent: int, index: int) -> Successor | None:
        """Return the first action after a turn of the agent or else of its nearest ancestor that acts."""
        while agent != -1:
            turns = turns_of.get(agent, [])
            place = bisect_right(turns, index)
            if place < len(turns):
                return first_action[turns[place]]
            agent = episode.parents[agent]
        return None

    return [later(segment.agent, segment.turns[-1]) for segment in segments]


def _sub_trace(
    episode: Episode, segment: _Segment, position: int, successor: Successor | None, final: bool
) -> SubTrace:
    turns = [episode.turns[index] for index in segment.turns]
    tokens = np.concatenate([turns[-1].prompt_ids, turns[-1].output_ids]).astype(np.int32, copy=False)
    num_tokens = len(tokens)
    action_mask = np.zeros(num_tokens, np.bool_)
    summary_mask = np.zeros(num_tokens, np.bool_)
    logprobs = np.zeros(num_tokens, np.float32)
    rewards = np.zeros(num_tokens, np.float32)
    versions = np.full(num_tokens, -1, np.int32)
    stale_mask = np.zeros(num_tokens, np.bool_)
    for turn in turns:
        sampled = slice(len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.output_ids))
        action_mask[sampled] = True
        summary_mask[sampled] = turn.kind is TurnKind.SUMMARY
        logprobs[sampled] = turn.logprobs
        versions[sampled] = turn.versions
        stale_mask[sampled] = turn.stale_mask
        rewards[sampled.stop - 1] = turn.reward
    kind = SubTraceKind.COMPACTED
    if segment.agent != 0:
        kind = SubTraceKind.SUB_AGENT
    elif final:
        kind = SubTraceKind.FINAL
        rewards[-1] += episode.reward  # a segment ends with output, so its last token is an action
    return SubTrace(
        tokens=tokens,
        action_mask=action_mask,
        logprobs=logprobs,
        rewards=rewards,
        versions=versions,
        stale_mask=stale_mask,
        summary_mask=summary_mask,
        episode_id=episode.episode_id,
        position=position,
        successor=successor,
        kind=kind,
        status=episode.status,
    )
