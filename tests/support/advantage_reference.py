"""Helpers for tests of advantages: small and random sub-traces, and an O(n^2) reference in plain Python."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from episodes import random_episode
from numpy.typing import NDArray

from buffer.trace import cut
from buffer.types import Float32, Status, SubTrace, SubTraceKind
from critic.advantages import gae
from critic.config import AdvantageConfig, Credit, LambdaLength, Truncation

Float64 = NDArray[np.float64]


def sub_trace(mask: list[int], rewards: dict[int, float] | None = None, **changes: Any) -> SubTrace:
    """Return a finished episode of one sub-trace with the given action mask; `rewards` by token index."""
    num_tokens = len(mask)
    given_rewards = np.zeros(num_tokens, np.float32)
    for index, reward in (rewards or {}).items():
        given_rewards[index] = reward
    action_mask = np.array(mask, bool)
    plain = SubTrace(
        tokens=np.zeros(num_tokens, np.int32),
        action_mask=action_mask,
        logprobs=np.where(action_mask, -1, 0).astype(np.float32),
        rewards=given_rewards,
        versions=np.where(action_mask, 0, -1).astype(np.int32),
        stale_mask=np.zeros(num_tokens, bool),
        summary_mask=np.zeros(num_tokens, bool),
        episode_id="e",
        position=0,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )
    return replace(plain, **changes)


def core(
    traces: list[SubTrace], values: list[Float32], config: AdvantageConfig, bootstrap: list[float] | None = None
) -> tuple[Float64, Float64]:
    """Return advantages and returns of all action tokens in float64."""
    pairs = gae(traces, values, config, bootstrap, np.float64)
    for trace, pair in zip(traces, pairs, strict=True):
        assert not any(column[~trace.action_mask].any() for column in pair)
    masks = [trace.action_mask for trace in traces]
    advantage = np.concatenate([pair[0][mask] for pair, mask in zip(pairs, masks, strict=True)])
    return advantage, np.concatenate([pair[1][mask] for pair, mask in zip(pairs, masks, strict=True)])


def reference(
    traces: list[SubTrace], values: list[Float32], config: AdvantageConfig, bootstrap: list[float]
) -> tuple[list[float], list[float]]:
    """Compute each advantage as an explicit sum over the following tokens, in O(n^2) of plain Python."""
    advantage, returns = [], []
    for k, trace in enumerate(traces):
        family = {other.position: j for j, other in enumerate(traces) if other.episode_id == trace.episode_id}
        final = next(traces[j] for j in family.values() if traces[j].kind is SubTraceKind.FINAL)
        outcome = float(final.rewards[np.flatnonzero(final.action_mask)[-1]])

        def decay(at: int, family: dict[int, int] = family) -> float:
            """Return gamma * lambda for a step of sub-trace `at`."""
            counted = [at] if config.lambda_length is LambdaLength.sub_trace else list(family.values())
            length = sum(int(traces[j].action_mask.sum()) for j in counted)
            if config.lambda_alpha > 0:
                return config.gamma * max(0.0, 1 - 1 / (config.lambda_alpha * length))
            return config.gamma * config.lambda_policy

        def path(start: int, follow: bool, k: int = k, family: dict[int, int] = family) -> list[tuple[int, int]]:
            """Return (sub-trace, token index) of the action tokens from action `start` of sub-trace k onward."""
            steps, at, action = [], k, start
            while True:
                steps += [(at, int(index)) for index in np.flatnonzero(traces[at].action_mask)[action:]]
                successor = traces[at].successor
                if not follow or successor is None:
                    return steps
                at, action = family[successor.position], successor.action

        def deltas(steps: list[tuple[int, int]], outcome: float = outcome) -> list[float]:
            result = []
            for place, (at, index) in enumerate(steps):
                reward = float(traces[at].rewards[index])
                if place + 1 < len(steps):
                    after = float(values[steps[place + 1][0]][steps[place + 1][1]])
                else:
                    bootstrapped = config.truncation is Truncation.bootstrap and traces[at].status is Status.TRUNCATED
                    after = bootstrap[at] if bootstrapped and traces[at].successor is None else 0.0
                    if config.credit is not Credit.chained and traces[at].kind is not SubTraceKind.FINAL:
                        reward += outcome
                result.append(reward + config.gamma * after - float(values[at][index]))
            return result

        for action, index in enumerate(np.flatnonzero(trace.action_mask)):
            steps = path(action, follow=config.credit is Credit.chained)
            weight, total, monte_carlo = 1.0, 0.0, 0.0
            for j, ((at, _), delta) in enumerate(zip(steps, deltas(steps), strict=True)):
                total += weight * delta
                monte_carlo += (config.gamma * config.lambda_critic) ** j * delta
                weight *= decay(at)
            if config.credit is Credit.discounted:
                own_last = int(trace.action_mask.sum()) - action - 1
                total *= float(np.prod([decay(at) for at, _ in path(action, follow=True)[own_last:-1]]))
            advantage.append(total)
            returns.append(monte_carlo + float(values[k][index]))
    return advantage, returns


def random_values(traces: list[SubTrace], seed: int) -> list[Float32]:
    """Return values of whole sub-traces, with NaN where they must not be read."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=len(trace.tokens)).astype(np.float32) for trace in traces]
    return [np.where(trace.action_mask, v, np.nan).astype(np.float32) for trace, v in zip(traces, values, strict=True)]


def random_traces(seed: int, num_episodes: int = 2) -> list[SubTrace]:
    """Return sub-traces of several episodes in random order, also with rewards per turn."""
    traces = [trace for j in range(num_episodes) for trace in cut(random_episode(seed + j, max_depth=2 - j % 3))]
    rng = np.random.default_rng(seed)
    traces = [traces[k] for k in rng.permutation(len(traces))]
    given_rewards = [np.where(trace.action_mask, rng.random(len(trace.tokens)) < 0.1, 0) for trace in traces]
    return [
        replace(t, rewards=(t.rewards + extra).astype(np.float32))
        for t, extra in zip(traces, given_rewards, strict=True)
    ]
