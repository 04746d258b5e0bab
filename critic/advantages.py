"""Token-level advantages over whole episodes: generalized advantage estimation on action tokens.

Only sampled (action) tokens are steps. Prompts, tool output and copied context are not: the recursion
skips them. Let i run over the action tokens of an episode, k(i) be the
sub-trace that contains i, v_i the value of the state just before token i was sampled, r_i its reward
(`SubTrace.rewards`: per turn, at the end, or both):

    delta_i = r_i + gamma * v_next(i) - v_i
    A_i     = delta_i + gamma * lambda_k(i) * A_next(i)
    G_i     = delta_i + gamma * lambda_critic * G_next(i)
    ret_i   = G_i + v_i

Inside a sub-trace with action tokens 0..n-1, next(i) = i + 1 for 0 <= i <= n-2. At i = n-1 the credit mode
decides:

    chained      next(n-1) is the successor's action; without a successor, A_next = 0 and v_next = 0
    independent  A_next = 0, v_next = 0, and the terminal reward R of the episode is added to r_(n-1) of
                 every sub-trace except the FINAL one, which already has it
    discounted   like independent, then A_i of sub-trace k is multiplied by D_k, the product of
                 gamma * lambda_k(j) over the steps j that lead from k's last action to the episode's last:
                 j = n-1, next(n-1), ..., the second to last, next as in `chained`. With one lambda this is
                 (gamma * lambda)^N, N the action tokens after k on that path (CompactionRL, arXiv 2607.05378,
                 eq. 13-15). Returns have no such factor.

R is the reward on the last action token of the FINAL sub-trace, including a per-turn reward on the same token.
With `truncation: bootstrap` the state after the last action of a truncated episode (of each of its sub-traces
without a successor) has the value that the caller passes instead of 0; rewards do not change.

lambda_k is `lambda_policy`, or with `lambda_alpha` > 0

    lambda_k = max(0, 1 - 1 / (lambda_alpha * l))

with l the action tokens of the whole episode (`lambda_length: episode`) or of sub-trace k alone (`sub_trace`).
The maximum is part of the definition: lengths l < 1 / lambda_alpha have lambda 0, that is, one-step advantages.
A step that crosses to a successor decays like any other step of its sub-trace: by the lambda of the sub-trace
that it leaves.

With chained credit and sub-agents an episode is a tree: parallel sub-agents lead to the same action of their parent.
Sources: GAE is from Schulman et al. (arXiv 1506.02438), decoupled lambda from VC-PPO (arXiv 2503.01491), skipping
observations and length-adaptive lambda from SAO (arXiv 2607.07508).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from buffer.types import Bool, Float32, Status, SubTrace, SubTraceKind, Targets
from critic.config import AdvantageConfig, Credit, LambdaLength, Truncation

Float64 = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]
State = tuple[float, float, float]  # v, A and G of the next step

EQUAL = 1e-6  # a smaller deviation, as a fraction of the largest advantage, is only float32 rounding


@dataclass(frozen=True)
class Links:
    """The links between S sub-traces and their successors."""

    episode: list[int]  # [S] number of the episode, from 0
    num_actions: list[int]  # [S]
    follower: list[int]  # [S] index of the sub-trace that continues each one; -1: none
    action: list[int]  # [S] the follower's action that continues it, counted among the follower's action tokens
    token: list[int]  # [S] the same action as an index into the follower's tokens
    order: list[int]  # [S] processing order: each sub-trace comes after its follower


def advantages(
    sub_traces: Sequence[SubTrace],
    values: Sequence[Float32],
    config: AdvantageConfig,
    bootstrap_values: Sequence[float] | None = None,
) -> list[Targets]:
    """Return advantages and returns of whole episodes, in the order of `sub_traces`.

    `values[k]` is float32[T]: the value of the state before each token; it is read only where `action_mask` is
    True. `bootstrap_values[k]` is the value of the state after the last token of sub-trace k; it is read only
    with `truncation: bootstrap`, for truncated sub-traces without a successor.

    Results are computed in float64 and returned as float32[T], zero where `action_mask` is False. With `whiten`,
    advantages (not returns) have mean 0 and variance 1 over all action tokens given, or are 0 when all are equal.
    Without sub-traces the result is [].

    ValueError: NaN or infinite values, log-probabilities or rewards on an action token, or a reward on any other
    token (the message names episode, index and number); results beyond float32; arrays whose shape is not [T]; a
    sub-trace without action tokens, or with one at index 0, before which there is no state; an incomplete episode;
    a missing bootstrap value; gamma or a lambda outside [0, 1].
    """
    estimates = gae(sub_traces, values, config, bootstrap_values)
    targets = []
    for trace, value, (advantage, returns) in zip(sub_traces, values, estimates, strict=True):
        kept = np.where(trace.action_mask, value, 0).astype(np.float32, copy=False)
        targets.append(Targets(advantages=advantage, returns=returns, values=kept))
    return whitened(sub_traces, targets) if config.whiten else targets


def gae(
    sub_traces: Sequence[SubTrace],
    values: Sequence[Float32],
    config: AdvantageConfig,
    bootstrap_values: Sequence[float] | None = None,
    dtype: type[np.floating[Any]] = np.float32,
) -> list[tuple[Floats, Floats]]:
    """Return (advantages [T], returns [T]) of each sub-trace by the equations above, as `dtype`, without whitening."""
    _check_settings(config)
    links = _links(sub_traces, _check_arrays(sub_traces, values))
    end_values = _end_values(sub_traces, config, bootstrap_values)
    end_rewards = _end_rewards(sub_traces, links, config)
    decays = [config.gamma * lam for lam in _policy_lambdas(links, config)]
    discounts = _discounts(links, decays, config)
    chained = config.credit is Credit.chained
    entries: list[set[int]] = [set() for _ in sub_traces]  # tokens at which other sub-traces continue
    for k, follower in enumerate(links.follower):
        if chained and follower >= 0:
            entries[follower].add(links.token[k])
    results: dict[int, tuple[Floats, Floats]] = {}
    states: dict[tuple[int, int], State] = {}
    for k in links.order:
        trace, end = sub_traces[k], len(sub_traces[k].tokens)
        result = np.zeros(end, dtype), np.zeros(end, dtype)
        state = (end_values[k], 0.0, 0.0)
        if chained and links.follower[k] >= 0:
            state = states[links.follower[k], links.token[k]]
        rates = float(config.gamma), decays[k], float(config.gamma * config.lambda_critic), discounts[k]
        for begin in [*sorted(entries[k], reverse=True), 0]:
            arrays = trace.action_mask, trace.rewards, values[k], *result
            state = states[k, begin] = _walk(begin, end, state, end_rewards[k], rates, arrays)
            end = begin
        _require_finite(trace, result)
        results[k] = result
    return [results[k] for k in range(len(sub_traces))]


@njit(nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _walk(
    begin: int,
    end: int,
    state: State,
    end_reward: float,
    rates: tuple[float, float, float, float],
    arrays: tuple[Bool, Float32, Float32, Floats, Floats],
) -> State:
    """Run the recursion over the action tokens in [begin, end), last one first, and write both results.

    `state` belongs to the step after them; `end_reward` is added to the reward of the last one. Returns the state
    of the first one. numba compiles the function at its first call in a process, which takes about a second.
    """
    gamma, policy_decay, critic_decay, discount = rates
    action_mask_T, rewards_T, values_T, advantages_T, returns_T = arrays
    v_next, a_next, g_next = state
    for t in range(end - 1, begin - 1, -1):
        if action_mask_T[t]:
            v = np.float64(values_T[t])
            delta = rewards_T[t] + end_reward + gamma * v_next - v
            a_next = delta + policy_decay * a_next
            g_next = delta + critic_decay * g_next
            advantages_T[t] = discount * a_next
            returns_T[t] = g_next + v
            v_next, end_reward = v, 0.0
    return v_next, a_next, g_next


def whitened(sub_traces: Sequence[SubTrace], targets: Sequence[Targets]) -> list[Targets]:
    """Return the same targets with advantages whitened over all action tokens; all others stay 0."""
    columns = _whiten([target.advantages for target in targets], [trace.action_mask for trace in sub_traces])
    return [replace(target, advantages=column) for target, column in zip(targets, columns, strict=True)]


def whiten(advantage: Floats) -> Floats:
    """Scale to mean 0 and (population) variance 1, [I]; zeros when all are equal.

    Advantages count as equal when their root-mean-square deviation is at most `EQUAL` times the largest absolute
    advantage: float32 rounding alone causes such a deviation, and scaling would only magnify it.
    """
    return _whiten([advantage], [np.ones(len(advantage), np.bool_)])[0]


def _whiten(columns: Sequence[Floats], masks: Sequence[Bool]) -> list[Floats]:
    """Whiten all columns together, [T] each, 0 where the mask is False. Their order does not change a bit."""
    count = sum(int(np.count_nonzero(mask)) for mask in masks)
    mean = math.fsum(float(column.sum(dtype=np.float64)) for column in columns) / max(count, 1)

    def centered(column: Floats, mask: Bool) -> Float64:
        return np.subtract(column, mean, out=np.zeros(len(column)), where=mask, dtype=np.float64)

    pairs = list(zip(columns, masks, strict=True))
    scale = math.sqrt(math.fsum(float(np.square(centered(*pair)).sum()) for pair in pairs) / max(count, 1))
    largest = max((float(np.abs(column).max()) for column in columns), default=0.0)
    if scale <= EQUAL * largest:
        return [np.zeros_like(column) for column in columns]
    return [(centered(*pair) / scale).astype(pair[0].dtype) for pair in pairs]


def _policy_lambdas(links: Links, config: AdvantageConfig) -> list[float]:
    """Return lambda_k of each sub-trace, [S]."""
    if config.lambda_alpha <= 0:
        return [float(config.lambda_policy)] * len(links.order)
    lengths = links.num_actions
    if config.lambda_length is LambdaLength.episode:
        whole = np.bincount(links.episode, weights=links.num_actions)
        lengths = [int(whole[number]) for number in links.episode]
    return [max(0.0, 1.0 - 1.0 / (config.lambda_alpha * length)) for length in lengths]


def _discounts(links: Links, decays: Sequence[float], config: AdvantageConfig) -> list[float]:
    """Return D_k of each sub-trace, [S]; 1 unless `credit: discounted` is set."""
    factors = [1.0] * len(links.order)
    if config.credit is Credit.discounted:
        for k in links.order:
            follower = links.follower[k]
            if follower >= 0:
                inner_steps = links.num_actions[follower] - links.action[k] - 1
                factors[k] = decays[k] * decays[follower] ** inner_steps * factors[follower]
    return factors


def _end_rewards(sub_traces: Sequence[SubTrace], links: Links, config: AdvantageConfig) -> list[float]:
    """Return the number that is added to the reward of each sub-trace's last action, [S]: R, or 0 if chained or FINAL.

    ValueError: an episode with no FINAL sub-trace, or with two of them.
    """
    if config.credit is Credit.chained:
        return [0.0] * len(sub_traces)
    terminal: dict[int, float] = {}
    for number, trace in zip(links.episode, sub_traces, strict=True):
        if trace.kind is SubTraceKind.FINAL:
            if number in terminal:
                raise ValueError(f"{trace.name} is the second FINAL sub-trace of its episode: there must be only one")
            terminal[number] = float(trace.rewards[np.flatnonzero(trace.action_mask)[-1]])
    for number, trace in zip(links.episode, sub_traces, strict=True):
        if number not in terminal:
            raise ValueError(
                f"episode {trace.episode_id}: credit={config.credit.value} needs whole episodes: "
                "a FINAL sub-trace is missing"
            )
    return [
        0.0 if trace.kind is SubTraceKind.FINAL else terminal[number]
        for number, trace in zip(links.episode, sub_traces, strict=True)
    ]


def _end_values(
    sub_traces: Sequence[SubTrace], config: AdvantageConfig, bootstrap_values: Sequence[float] | None
) -> list[float]:
    """Return the value of the state after the last action of each sub-trace without a successor, [S]."""
    end_values = [0.0] * len(sub_traces)
    if config.truncation is Truncation.terminal:
        return end_values
    if bootstrap_values is not None and len(bootstrap_values) != len(sub_traces):
        raise ValueError(f"{len(bootstrap_values)} bootstrap values for {len(sub_traces)} sub-traces: must be equal")
    for k, trace in enumerate(sub_traces):
        if trace.status is not Status.TRUNCATED or trace.successor is not None:
            continue
        if bootstrap_values is None:
            raise ValueError(
                f"{trace.name} is truncated: truncation=bootstrap needs bootstrap_values, but none were given"
            )
        end_values[k] = float(bootstrap_values[k])
        if not math.isfinite(end_values[k]):
            raise ValueError(f"{trace.name}: bootstrap value is {end_values[k]}: must be finite")
    return end_values


def _links(sub_traces: Sequence[SubTrace], num_actions: list[int]) -> Links:
    numbers: dict[str, int] = {}
    index_of: dict[tuple[str, int], int] = {}
    for k, trace in enumerate(sub_traces):
        numbers.setdefault(trace.episode_id, len(numbers))
        if index_of.setdefault((trace.episode_id, trace.position), k) != k:
            raise ValueError(f"{trace.name} is given twice")
    nothing = [-1] * len(sub_traces)
    follower, action, token = nothing.copy(), nothing.copy(), nothing.copy()
    for k, trace in enumerate(sub_traces):
        if trace.successor is None:
            continue
        found = index_of.get((trace.episode_id, trace.successor.position))
        if found is None:
            raise ValueError(
                f"{trace.name}: its successor at position {trace.successor.position} is missing: "
                "episodes must be whole here"
            )
        action[k] = trace.successor.action
        if not 0 <= action[k] < num_actions[found]:
            raise ValueError(f"{trace.name}: its successor has no action {action[k]}")
        mask = sub_traces[found].action_mask
        follower[k] = found
        token[k] = int(np.argmax(mask) if action[k] == 0 else np.flatnonzero(mask)[action[k]])
    episode = [numbers[trace.episode_id] for trace in sub_traces]
    return Links(episode, num_actions, follower, action, token, _followers_first(follower, sub_traces))


def _followers_first(follower: list[int], sub_traces: Sequence[SubTrace]) -> list[int]:
    """Return the sub-traces in an order in which each comes after its follower. ValueError: they form a cycle."""
    order: list[int] = []
    placed = [False] * len(follower)
    for start in range(len(follower)):
        path: list[int] = []
        k = start
        while k >= 0 and not placed[k]:
            path.append(k)
            if len(path) > len(follower):
                raise ValueError(f"{sub_traces[start].name}: its successors form a cycle")
            k = follower[k]
        for k in reversed(path):
            placed[k] = True
            order.append(k)
    return order


def _check_settings(config: AdvantageConfig) -> None:
    for name in ("gamma", "lambda_policy", "lambda_critic"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"advantage.{name}={getattr(config, name)}: must be in [0, 1]")
    if not 0 <= config.lambda_alpha < math.inf:
        raise ValueError(f"advantage.lambda_alpha={config.lambda_alpha}: must be finite and not below 0 (0: off)")


def _check_arrays(sub_traces: Sequence[SubTrace], values: Sequence[Float32]) -> list[int]:
    """Return the number of action tokens of each sub-trace, [S]. ValueError: arrays that the recursion can't read."""
    if len(values) != len(sub_traces):
        raise ValueError(f"values of {len(values)} sub-traces for {len(sub_traces)} sub-traces: must be equal")
    counts = []
    for trace, value in zip(sub_traces, values, strict=True):
        columns = {"action_mask": trace.action_mask, "log-probability": trace.logprobs}
        columns |= {"reward": trace.rewards, "value": value}
        for what, array in columns.items():
            if array.shape != trace.tokens.shape or array.ndim != 1:
                raise ValueError(f"{trace.name}: {what} has shape {array.shape} for {len(trace.tokens)} tokens")
        counts.append(int(np.count_nonzero(trace.action_mask)))
        if not counts[-1]:
            raise ValueError(f"{trace.name} has no action token: leave it out, there is nothing to train")
        if trace.action_mask[0]:
            raise ValueError(f"{trace.name}: action_mask is True at index 0, but no state comes before it")
        t = _first_bad(trace.action_mask, trace.logprobs, trace.rewards, value)
        if t >= 0 and not trace.action_mask[t]:
            raise ValueError(
                f"{trace.name}: reward at index {t} is {trace.rewards[t]}, but that token is not an action: "
                "put the reward on an action token"
            )
        if t >= 0:
            what = next(what for what, array in columns.items() if not np.isfinite(array[t]))
            raise ValueError(f"{trace.name}: {what} at index {t} is {columns[what][t]}: must be finite")
    return counts


@njit(nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _first_bad(action_mask_T: Bool, logprobs_T: Float32, rewards_T: Float32, values_T: Float32) -> int:
    """Return the first action token with a non-finite number, or other token with a reward; -1: there is none."""
    for t in range(len(action_mask_T)):
        if action_mask_T[t]:
            if not np.isfinite(np.float64(logprobs_T[t]) + rewards_T[t] + values_T[t]):
                return t
        elif rewards_T[t] != 0:
            return t
    return -1


def _require_finite(trace: SubTrace, result: tuple[Floats, Floats]) -> None:
    for what, array in zip(("advantage", "return"), result, strict=True):
        finite = np.isfinite(array)
        if not finite.all():
            t = int(np.argmin(finite))
            raise ValueError(f"{trace.name}: {what} at index {t} is beyond {array.dtype}: scale the rewards down")
