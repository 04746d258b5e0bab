"""Baselines without a critic: an episode is compared with the others of its prompt, or of its step.

Statistics run over *episodes*, however many sub-traces each of them was cut into. Let e run over the E episodes of
a step, R_e be the return of e (the sum of the rewards on all its action tokens, undiscounted), g(e) its group (the
attempts at one prompt), n_g the number of episodes in group g and w_e the number of action tokens of e:

    m_g   = 1/n_g       sum_{e in g} R_e                                     mean of a group
    s_g^2 = 1/(n_g - 1) sum_{e in g} (R_e - m_g)^2                           its sample variance

    grpo          A_e = (R_e - m_g(e)) / (s_g(e) + EPS)                      DeepSeekMath, arXiv 2402.03300, 4.1.2
    grpo_no_std   A_e = R_e - m_g(e)                                         Dr. GRPO, arXiv 2503.20783
    rloo          A_e = R_e - 1/(n_g(e) - 1) sum_{j in g(e), j != e} R_j     RLOO, arXiv 2402.14740
    reinforce_pp  A_e = (C_e - m) / (s + EPS)                                REINFORCE++, arXiv 2501.03262

        C_e = R_e where every group has one episode, R_e - m_g(e) where every group has more (REINFORCE++-baseline)
        m   = sum_e w_e C_e         / sum_e w_e                              over the action tokens of the step
        s^2 = sum_e w_e (C_e - m)^2 / sum_e w_e

All action tokens of an episode have its advantage; other tokens are ignored.

- The GRPO paper does not say which standard deviation it means; the sample one is what public trainers compute
  (torch.std), so a group of two with different returns gets +-1/sqrt(2).
- REINFORCE++ normalizes over tokens, not over episodes (A_{q,t} in the paper's equation, the masked mean in its
  authors' OpenRLHF): a long episode counts more. w_e does not depend on how e was cut, since a token is trained once.
- A group whose episodes all have the same return carries no signal: its advantages are exactly 0 (for reinforce_pp
  before the step's mean is subtracted). `zero_signal_fraction` returns the share of such groups.
- An episode in which nothing was sampled (w_e = 0) is excluded from m, s, n_g and C, and its advantage is 0. An episode
  that is then alone in its group has no other to be compared with: its advantage is 0, too (before the step's mean is
  subtracted).
- Discounts, lambdas, credit modes and the critic's settings do not apply. Settings that a user must have set on purpose
  (advantage.gamma, credit, truncation) are refused before a run; lambdas and critic.*, which recipes set, are not read.
  `advantage.whiten` is applied to the result: it makes grpo differ from the paper and leaves reinforce_pp unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.types import SubTrace, SubTraceKind, Targets
from critic.config import Baseline

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

EPS = 1e-6  # added to standard deviations, which may be 0


def episode_advantages(returns: Float64, groups: Int64, kind: Baseline, num_actions: Int64 | None = None) -> Float64:
    """Return the advantage of each episode, float64[E], by the equations at the top of this file.

    `returns[e]` is R_e, `groups[e]` the number of the group (any number, equal for episodes of one prompt),
    `num_actions[e]` is w_e: required for reinforce_pp; the others exclude episodes where it is 0. Groups may differ in
    size.

    Hand-computed, two groups of two and three, returns 1 0 | 1 1 0:

        grpo_no_std    1/2   -1/2    |  1/3    1/3   -2/3
        grpo           .7071 -.7071  |  .5773  .5773 -1.1547
        rloo           1     -1      |  1/2    1/2   -1

    ValueError: no episodes, lengths that differ, a return that is not finite, a group of one episode where more are
    needed, groups of one beside larger ones for reinforce_pp (whatever was sampled), `num_actions` missing or negative.
    """
    group, sizes = _check(returns, groups)
    if kind is Baseline.critic:
        raise ValueError("baseline=critic gives every token an advantage of its own: use critic/advantages.py")
    weights = _weights(len(returns), kind, num_actions)
    alone = np.flatnonzero(sizes == 1)
    if kind is Baseline.reinforce_pp:
        if 0 < len(alone) < len(sizes):
            raise ValueError(
                f"baseline=reinforce_pp: {len(alone)} of {len(sizes)} groups have one episode, the others more: "
                "the same buffer.episodes_per_prompt must hold for the whole step"
            )
    elif len(alone):
        raise ValueError(
            f"baseline={kind.value} needs buffer.episodes_per_prompt of at least 2: "
            f"group {groups[group == alone[0]][0]} has one episode, nothing to compare it with"
        )
    found = np.zeros(len(returns))
    sampled = weights > 0
    if sampled.any():
        group, sizes = _check(returns[sampled], groups[sampled])
        if kind is Baseline.reinforce_pp:
            centered = returns[sampled] if len(alone) else _centered(returns[sampled], group, sizes)
            found[sampled] = _over_step(centered, weights[sampled])
        else:
            found[sampled] = _over_groups(returns[sampled], group, sizes, kind)
    return found


def _over_groups(returns: Float64, group: Int64, sizes: Int64, kind: Baseline) -> Float64:
    """Return advantages of grpo, grpo_no_std and rloo, [E]; 0 for an episode that is alone in its group."""
    others = np.maximum(sizes - 1, 1)
    centered = _centered(returns, group, sizes)
    if kind is Baseline.grpo_no_std:
        return centered
    if kind is Baseline.rloo:  # n R - n m = (n - 1) R - (sum of the others)
        return np.asarray(centered * (sizes / others)[group])
    variance = np.bincount(group, weights=centered**2) / others
    return np.asarray(centered / (np.sqrt(variance) + EPS)[group])


def zero_signal_fraction(returns: Float64, groups: Int64) -> float:
    """Return the share of groups whose episodes all have the same return, in [0, 1]; a group of one counts as such."""
    group, sizes = _check(returns, groups)
    low, high = np.full(len(sizes), np.inf), np.full(len(sizes), -np.inf)
    np.minimum.at(low, group, returns)
    np.maximum.at(high, group, returns)
    return float(np.mean(low == high))


def episode_returns(sub_traces: Sequence[SubTrace], episode_ids: Sequence[str], terminal: Sequence[float]) -> Float64:
    """Return R_e of each episode, float64[E], in the order of `episode_ids`.

    R_e is the sum of `SubTrace.rewards` over the action tokens of all sub-traces of the episode: the terminal reward,
    rewards of turns, and a KL penalty if it is part of the reward. An episode without sub-traces (nothing was sampled)
    has `terminal[e]`, rounded to float32 like rewards. The sum is rounded once, so neither cuts nor order change it.

    ValueError: a reward that is NaN or infinite (the message names episode, sub-trace and index), sub-traces of an
    episode that is not in `episode_ids`, an id that is in it twice, an incomplete episode.
    """
    if len(terminal) != len(episode_ids):
        raise ValueError(f"{len(terminal)} terminal rewards for {len(episode_ids)} episodes: must be equal")
    owners = _owners(sub_traces, episode_ids)
    rewards: list[list[float]] = [[] for _ in episode_ids]
    for trace, owner in zip(sub_traces, owners, strict=True):
        given = trace.rewards[trace.action_mask]
        if not np.isfinite(given).all():
            index = int(np.flatnonzero(trace.action_mask)[~np.isfinite(given)][0])
            raise ValueError(f"{trace.name}: reward at index {index} is {trace.rewards[index]}: must be finite")
        rewards[owner] += given[given != 0].tolist()
    found = np.array([math.fsum(numbers) for numbers in rewards])
    for owner in set(range(len(episode_ids))) - set(owners):
        found[owner] = np.float32(terminal[owner])
        if not np.isfinite(found[owner]):
            raise ValueError(f"episode {episode_ids[owner]}: reward is {terminal[owner]}: must be finite")
    _check_whole(sub_traces)
    return found


def action_counts(sub_traces: Sequence[SubTrace], episode_ids: Sequence[str]) -> Int64:
    """Return w_e, the number of action tokens of each episode over all its sub-traces, int64[E].

    ValueError: see `episode_returns`.
    """
    counts = np.zeros(len(episode_ids), np.int64)
    for trace, owner in zip(sub_traces, _owners(sub_traces, episode_ids), strict=True):
        counts[owner] += trace.num_actions
    return counts


def spread(
    sub_traces: Sequence[SubTrace], episode_ids: Sequence[str], advantages: Float64, returns: Float64
) -> list[Targets]:
    """Return targets in the order of `sub_traces`, float32[T] each, zero where `action_mask` is False.

    Every action token has the advantage and the return of its episode. `values` is 0 everywhere, because there is no
    critic; `returns` is read by metrics only.

    ValueError: sub-traces of an unknown episode, lengths that differ.
    """
    for what, numbers in (("advantages", advantages), ("returns", returns)):
        if len(numbers) != len(episode_ids):
            raise ValueError(f"{len(numbers)} {what} for {len(episode_ids)} episodes: must be equal")
    found = []
    for trace, owner in zip(sub_traces, _owners(sub_traces, episode_ids), strict=True):
        here = trace.action_mask.astype(np.float32)
        found.append(
            Targets(
                advantages=here * np.float32(advantages[owner]),
                returns=here * np.float32(returns[owner]),
                values=np.zeros(len(here), np.float32),
            )
        )
    return found


def _weights(num_episodes: int, kind: Baseline, num_actions: Int64 | None) -> Int64:
    """Return w_e of each episode, [E]; 1 if they are not given and not needed. ValueError: see `episode_advantages`."""
    if num_actions is None and kind is not Baseline.reinforce_pp:
        return np.ones(num_episodes, np.int64)
    if num_actions is None or len(num_actions) != num_episodes:
        given = "none are given" if num_actions is None else f"{len(num_actions)} are given"
        raise ValueError(f"baseline={kind.value} needs num_actions of {num_episodes} episodes: {given}")
    if num_actions.min() < 0:
        raise ValueError(f"num_actions of episode {int(num_actions.argmin())} is {num_actions.min()}: must not be < 0")
    return num_actions


def _over_step(centered: Float64, num_actions: Int64) -> Float64:
    """Scale to mean 0 and variance 1 over the action tokens of the step, [E]; zeros when all are equal."""
    shifted = centered - centered[0]  # equal ones become exactly 0
    shifted = shifted - np.average(shifted, weights=num_actions)
    return np.asarray(shifted / (np.sqrt(np.average(shifted**2, weights=num_actions)) + EPS))


def _centered(returns: Float64, group: Int64, sizes: Int64) -> Float64:
    """Return R_e - m_g(e), [E]; exactly 0 in a group of equal returns."""
    low = np.full(len(sizes), np.inf)
    np.minimum.at(low, group, returns)
    shifted = returns - low[group]
    return np.asarray(shifted - (np.bincount(group, weights=shifted) / sizes)[group])


def _check(returns: Float64, groups: Int64) -> tuple[Int64, Int64]:
    """Return the group number of each episode, from 0 without gaps, [E], and the sizes of the groups.

    ValueError: no episodes, lengths that differ, a return that is not finite.
    """
    if not len(returns):
        raise ValueError("no episodes: there is nothing to compare")
    if len(groups) != len(returns):
        raise ValueError(f"{len(groups)} group numbers for {len(returns)} returns: must be equal")
    bad = np.flatnonzero(~np.isfinite(returns))
    if len(bad):
        raise ValueError(f"return of episode {bad[0]} is {returns[bad[0]]}: must be finite")
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return group, sizes


def _owners(sub_traces: Sequence[SubTrace], episode_ids: Sequence[str]) -> list[int]:
    """Return the index into `episode_ids` of each sub-trace's episode. ValueError: an id is there twice, or missing."""
    index_of = {episode_id: index for index, episode_id in enumerate(episode_ids)}
    if len(index_of) < len(episode_ids):
        twice = next(name for index, name in enumerate(episode_ids) if index_of[name] != index)
        raise ValueError(f"episode {twice} is in episode_ids twice: each id must be there once")
    for trace in sub_traces:
        if trace.episode_id not in index_of:
            raise ValueError(f"{trace.name}: its episode is not one of the {len(index_of)} in episode_ids")
    return [index_of[trace.episode_id] for trace in sub_traces]


def _check_whole(sub_traces: Sequence[SubTrace]) -> None:
    """Require whole episodes. ValueError: a position is missing or repeated, or there is no FINAL sub-trace."""
    positions: dict[str, list[int]] = {}
    final: set[str] = set()
    for trace in sub_traces:
        positions.setdefault(trace.episode_id, []).append(trace.position)
        if trace.kind is SubTraceKind.FINAL:
            final.add(trace.episode_id)
    for episode_id, found in positions.items():
        if sorted(found) != list(range(len(found))) or episode_id not in final:
            raise ValueError(
                f"episode {episode_id} is not whole: sub-traces {sorted(found)} are given, "
                f"{'with the' if episode_id in final else 'without a'} FINAL one; pass each of its sub-traces once"
            )
