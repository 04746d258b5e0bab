"""Token-level advantages over whole episodes: generalised advantage estimation on action tokens.

Only sampled (action) tokens are steps. Prompts, tool output and copied context are not: the recursion
goes over them as if they were not there. Let i run over the action tokens of an episode, v_i be the
value of the state just before token i was sampled, r_i its reward:

    delta_i = r_i + gamma * v_next(i) - v_i
    A_i     = delta_i + gamma * lambda_policy * A_next(i)
    G_i     = delta_i + gamma * lambda_critic * G_next(i)
    ret_i   = G_i + v_i

Inside a sub-trace with action tokens 0..n-1, next(i) = i + 1 for 0 <= i <= n-2. At i = n-1 the credit mode
decides:

    chained      next(n-1) is the successor's action; where there is none, A_next = 0 and v_next = 0
    independent  A_next = 0, v_next = 0, and the terminal reward R of the episode is added at the end of
                 every sub-trace that does not have it already
    discounted   as independent, then A_i *= (gamma * lambda_policy)^N with N the action tokens on the way
                 from the sub-trace's successor to the episode's end; returns have no such factor
                 (CompactionRL, arXiv 2607.05378, eq. 13-15)

R is the reward on the last action token of the FINAL sub-trace. With `truncation: bootstrap` the state after
the last action of a truncated episode (of each of its sub-traces without a successor) has the value that the
caller gives instead of 0.

Chained and with sub-agents an episode is a tree: parallel sub-agents lead to the same action of their parent.
Skipping observations and lambda per length are SAO's (arXiv 2607.07508), decoupled lambda VC-PPO's
(arXiv 2503.01491), GAE is Schulman et al. (arXiv 1506.02438).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from buffer.types import Bool, Float32, Status, SubTrace, SubTraceKind, Targets
from critic.config import AdvantageConfig, Credit, Truncation

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """The action tokens of S sub-traces, one after another: I steps in all.

    Sub-trace k owns steps starts[k] to starts[k + 1] - 1.
    """

    values: Float64  # [I] value of the state before each step
    rewards: Float64  # [I]
    starts: Int64  # [S + 1]
    link: list[int]  # [S] sub-trace that goes on after each one; -1: none
    following: Int64  # [S] step that goes on after each sub-trace's last; -1: none
    end_values: Float64  # [S] value of the state after the last step where nothing follows
    order: list[int]  # [S] each sub-trace after the one that follows it
    episode: Int64  # [S] number of the episode, from 0
    terminal: Float64  # [E] terminal reward of each episode; NaN where its FINAL sub-trace is missing
    final: Bool  # [S] True = FINAL


def advantages(
    sub_traces: Sequence[SubTrace],
    values: Sequence[Float32],
    config: AdvantageConfig,
    bootstrap_values: Sequence[float] | None = None,
) -> list[Targets]:
    """Advantages and returns of whole episodes, in the order of `sub_traces`.

    `values[k]` is float32[T]: at each index the value of the state before that token; it is read only where
    `action_mask` is True. `bootstrap_values[k]` is the value of the state after sub-trace k's last token; it
    is read only with `truncation: bootstrap`, for truncated sub-traces without a successor.

    Computed in float64, returned as float32[T], zero where `action_mask` is False. With `whiten`, advantages
    (not returns) have mean 0 and variance 1 over all action tokens given; equal ones become 0.

    ValueError: NaN or infinite values, log-probabilities or rewards (episode and index are named); an episode
    that is not whole; a bootstrap value that is needed and missing.
    """
    if not sub_traces:
        return []
    mask, offsets, where = _action_places(sub_traces)
    steps = _lay_out(sub_traces, values, offsets, where, _end_values(sub_traces, config, bootstrap_values))
    advantage, returns = gae(steps, config)
    if config.whiten:
        advantage = whiten(advantage)

    def spread(per_step: Float64) -> list[Float32]:
        flat = np.zeros(len(mask), np.float32)
        flat[where] = per_step
        return [flat[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]

    columns = zip(spread(advantage), spread(returns), spread(steps.values), strict=True)
    return [Targets(advantages=a, returns=r, values=v) for a, r, v in columns]


def gae(steps: Steps, config: AdvantageConfig) -> tuple[Float64, Float64]:
    """Advantages and returns, float64[I] each, by the equations at the top of this file; not whitened."""
    counts = np.diff(steps.starts)
    last = steps.starts[1:] - 1
    following, end_values, rewards = steps.following, steps.end_values, steps.rewards
    if config.credit is not Credit.chained:
        terminal = steps.terminal[steps.episode]
        if np.isnan(terminal).any():
            raise ValueError(f"credit={config.credit.value} needs whole episodes: a FINAL sub-trace is missing")
        rewards = rewards.copy()
        rewards[last] += np.where(steps.final, 0.0, terminal)
        following = np.full_like(following, -1)
    next_values = np.empty_like(steps.values)
    next_values[:-1] = steps.values[1:]
    next_values[last] = np.where(following >= 0, steps.values[following], end_values)
    deltas = rewards + config.gamma * next_values - steps.values

    lambdas = _policy_lambdas(counts, steps.episode, config)
    policy_decay = config.gamma * lambdas[steps.episode]
    critic_decay = np.full(len(counts), config.gamma * config.lambda_critic)
    advantage = _recursion(deltas, policy_decay, steps.starts, following, steps.order)
    if np.array_equal(policy_decay, critic_decay):
        returns = advantage + steps.values
    else:
        returns = _recursion(deltas, critic_decay, steps.starts, following, steps.order) + steps.values
    if config.credit is Credit.discounted:
        advantage = advantage * np.repeat(policy_decay ** _actions_after(steps), counts)
    return advantage, returns


def whiten(advantage: Float64) -> Float64:
    """Mean 0 and variance 1; zeros when all are equal."""
    centred = advantage - advantage.mean()
    scale = float(np.sqrt(np.mean(centred**2)))
    return np.asarray(centred / scale if scale > 1e-8 else np.zeros_like(centred))


def _recursion(deltas: Float64, decay: Float64, starts: Int64, following: Int64, order: list[int]) -> Float64:
    """A_i = delta_i + decay_k * A_next(i): a first-order linear filter on reversed deltas.

    deltas [I], decay [S], starts [S + 1], following [S]; `order` puts a sub-trace after the one that it needs.
    Sub-traces that lie one after another and follow each other are filtered as one.
    """
    result = np.empty_like(deltas)
    borders, after, decays = starts.tolist(), following.tolist(), decay.tolist()
    begin, begins = 0, []  # begins[k]: first step of the run that sub-trace k belongs to
    for k in range(len(after)):
        begins.append(begin)
        if after[k] != borders[k + 1]:
            begin = borders[k + 1]
    one = np.ones(1)
    for k in order:
        if after[k] == borders[k + 1]:
            continue  # the run goes on: done with its last sub-trace
        span = slice(begins[k], borders[k + 1])
        carry = decays[k] * result[after[k]] if after[k] >= 0 else 0.0
        filtered, _ = lfilter(one, np.array([1.0, -decays[k]]), deltas[span][::-1], zi=np.array([carry]))
        result[span] = filtered[::-1]
    return result


def _policy_lambdas(counts: Int64, episode: Int64, config: AdvantageConfig) -> Float64:
    """lambda_policy of each episode, [E]; length-adaptive ones are 1 - 1/(alpha * l), not below 0."""
    lengths = np.bincount(episode, weights=counts)
    if config.lambda_alpha <= 0:
        return np.full(len(lengths), config.lambda_policy)
    return np.maximum(0.0, 1.0 - 1.0 / (config.lambda_alpha * lengths))


def _actions_after(steps: Steps) -> Int64:
    """Action tokens on the way from the end of each sub-trace to the end of its episode, [S]."""
    after = np.zeros(len(steps.link), np.int64)
    for k in steps.order:
        follower = steps.link[k]
        if follower >= 0:
            after[k] = steps.starts[follower + 1] - steps.following[k] + after[follower]
    return after


def _action_places(sub_traces: Sequence[SubTrace]) -> tuple[Bool, Int64, Int64]:
    """All masks in one, where each sub-trace begins in it [S + 1], and where the action tokens stand in it [I]."""
    mask = np.concatenate([trace.action_mask for trace in sub_traces])
    offsets = np.zeros(len(sub_traces) + 1, np.int64)
    np.cumsum([len(trace.action_mask) for trace in sub_traces], out=offsets[1:])
    return mask, offsets, np.flatnonzero(mask)


def _lay_out(
    sub_traces: Sequence[SubTrace], values: Sequence[Float32], offsets: Int64, where: Int64, end_values: Float64
) -> Steps:
    for trace, value in zip(sub_traces, values, strict=True):
        if len(value) != len(trace.tokens):
            raise ValueError(f"{_name(trace)}: {len(value)} values for {len(trace.tokens)} tokens: must be equal")
    starts = np.searchsorted(where, offsets)
    empty = np.flatnonzero(np.diff(starts) == 0)
    if len(empty):
        raise ValueError(f"{_name(sub_traces[empty[0]])} has no action token: leave it out, there is nothing to train")

    def gather(arrays: Sequence[Float32], what: str) -> Float32:
        flat = np.concatenate(arrays)[where]
        if not np.isfinite(flat).all():
            bad = where[np.flatnonzero(~np.isfinite(flat))[0]]
            k = int(np.searchsorted(offsets, bad, side="right")) - 1
            index = int(bad - offsets[k])
            raise ValueError(f"{_name(sub_traces[k])}: {what} at index {index} is {arrays[k][index]}: must be finite")
        return flat

    gather([trace.logprobs for trace in sub_traces], "log-probability")
    rewards = gather([trace.rewards for trace in sub_traces], "reward").astype(np.float64)
    link, following, number, order = _links(sub_traces, starts)
    final = np.array([trace.kind is SubTraceKind.FINAL for trace in sub_traces])
    terminal = np.full(number.max() + 1, np.nan)
    terminal[number[final]] = rewards[starts[1:][final] - 1]
    return Steps(
        values=gather(values, "value").astype(np.float64),
        rewards=rewards,
        starts=starts,
        link=link,
        following=following,
        end_values=end_values,
        order=order,
        episode=number,
        terminal=terminal,
        final=final,
    )


def _links(sub_traces: Sequence[SubTrace], starts: Int64) -> tuple[list[int], Int64, Int64, list[int]]:
    """Steps.link, .following, .episode and .order."""
    numbers: dict[str, int] = {}
    places: dict[tuple[str, int], int] = {}
    for k, trace in enumerate(sub_traces):
        numbers.setdefault(trace.episode_id, len(numbers))
        if places.setdefault((trace.episode_id, trace.position), k) != k:
            raise ValueError(f"{_name(trace)} is given twice")
    link = [-1] * len(sub_traces)
    following = np.full(len(sub_traces), -1, np.int64)
    for k, trace in enumerate(sub_traces):
        if trace.successor is None:
            continue
        follower = places.get((trace.episode_id, trace.successor.position))
        if follower is None:
            raise ValueError(
                f"{_name(trace)}: its successor at position {trace.successor.position} is missing: "
                "episodes must be whole here"
            )
        if not 0 <= trace.successor.action < starts[follower + 1] - starts[follower]:
            raise ValueError(f"{_name(trace)}: its successor has no action {trace.successor.action}")
        link[k] = follower
        following[k] = starts[follower] + trace.successor.action
    episode = np.array([numbers[trace.episode_id] for trace in sub_traces], np.int64)
    return link, following, episode, _followers_first(link, sub_traces)


def _followers_first(link: list[int], sub_traces: Sequence[SubTrace]) -> list[int]:
    """Sub-traces so that each stands after the one that follows it. ValueError: they go round in a circle."""
    order: list[int] = []
    placed = [False] * len(link)
    for start in range(len(link)):
        path: list[int] = []
        k = start
        while k >= 0 and not placed[k]:
            path.append(k)
            if len(path) > len(link):
                raise ValueError(f"{_name(sub_traces[start])}: its successors go round in a circle")
            k = link[k]
        for k in reversed(path):
            placed[k] = True
            order.append(k)
    return order


def _end_values(
    sub_traces: Sequence[SubTrace], config: AdvantageConfig, bootstrap_values: Sequence[float] | None
) -> Float64:
    """Value of the state after each sub-trace's last action where nothing follows, [S]."""
    end_values = np.zeros(len(sub_traces))
    if config.truncation is Truncation.terminal:
        return end_values
    if bootstrap_values is not None and len(bootstrap_values) != len(sub_traces):
        raise ValueError(f"{len(bootstrap_values)} bootstrap values for {len(sub_traces)} sub-traces: must be equal")
    for k, trace in enumerate(sub_traces):
        if trace.status is not Status.TRUNCATED or trace.successor is not None:
            continue
        if bootstrap_values is None:
            raise ValueError(
                f"{_name(trace)} is truncated: truncation=bootstrap needs bootstrap_values, none are given"
            )
        end_values[k] = bootstrap_values[k]
        if not np.isfinite(end_values[k]):
            raise ValueError(f"{_name(trace)}: bootstrap value is {end_values[k]}: must be finite")
    return end_values


def _name(trace: SubTrace) -> str:
    return f"episode {trace.episode_id}, sub-trace {trace.position}"
