"""Estimators turn a step's episodes into targets, with a critic or with the other episodes of the group.

The loop uses either through one protocol. It asks for values, turns them into targets, and updates:

    asked   = estimator.ask(batch)                                   runs beside the policy's own forward pass
    targets = estimator.targets(batch, sub_traces, asked.result())   where episodes are whole
    updated = estimator.update(batch, targets, rng)                  runs beside the policy's update
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from buffer.types import Batch, Float32, SubTrace, Targets, TokenColumn
from critic.advantages import advantages, whitened
from critic.config import AdvantageConfig, Truncation
from critic.diagnostics import check_returns, critic_metrics
from critic.episode_baselines import action_counts, episode_advantages, episode_returns, spread, zero_signal_fraction
from critic.group import CriticGroup
from trainer.group import Answer, Ready, WorkerGroup


@dataclass(frozen=True)
class StepTargets:
    """Targets in the order of the batch's sub-traces, and their metrics."""

    targets: list[Targets]
    metrics: dict[str, float]


class Estimator(Protocol):
    """The protocol through which the loop gets targets."""

    @property
    def roles(self) -> Sequence[WorkerGroup]:
        """Return the groups of processes that must be started, saved and loaded."""

    def ask(self, batch: Batch) -> Answer[TokenColumn]:
        """Start the forward passes that targets need."""

    def targets(self, batch: Batch, sub_traces: Sequence[SubTrace], asked: Mapping[int, Float32]) -> StepTargets:
        """Return advantages and returns of whole episodes.

        ValueError: see critic/advantages.py and critic/episode_baselines.py.
        """

    def update(
        self, batch: Batch, targets: Sequence[Targets], rng: np.random.Generator, num_epochs: int | None = None
    ) -> Answer[dict[str, float]]:
        """Start the estimator's own updates of one training step; `num_epochs` overrides the configured number."""


class CriticEstimator:
    """Generalized advantage estimation on the critic's values."""

    def __init__(self, critic: CriticGroup, config: AdvantageConfig) -> None:
        self.critic = critic
        self.config = config
        self.roles = [critic]

    def ask(self, batch: Batch) -> Answer[TokenColumn]:
        return self.critic.values(batch, beyond=self.config.truncation is Truncation.bootstrap)

    def targets(self, batch: Batch, sub_traces: Sequence[SubTrace], asked: Mapping[int, Float32]) -> StepTargets:
        values, after = [], []
        for i, trace in enumerate(sub_traces):
            values.append(asked[i][: len(trace.tokens)])
            after.append(float(asked[i][-1]))  # with `beyond` the last entry belongs to the state after the last token
        bootstrap = after if self.config.truncation is Truncation.bootstrap else None
        targets = advantages(sub_traces, values, self.config, bootstrap)
        for trace, target in zip(sub_traces, targets, strict=True):
            check_returns(target.returns[trace.action_mask], self.critic.config.value_range)
        return StepTargets(targets, critic_metrics(sub_traces, targets))

    def update(
        self, batch: Batch, targets: Sequence[Targets], rng: np.random.Generator, num_epochs: int | None = None
    ) -> Answer[dict[str, float]]:
        return self.critic.update(batch, targets, rng, num_epochs)


class EpisodeEstimator:
    """A baseline from the episodes of a group or a step: no process, nothing to update."""

    def __init__(self, config: AdvantageConfig) -> None:
        self.config = config
        self.roles: list[WorkerGroup] = []

    def ask(self, batch: Batch) -> Answer[TokenColumn]:
        return Ready(TokenColumn())

    def targets(self, batch: Batch, sub_traces: Sequence[SubTrace], asked: Mapping[int, Float32]) -> StepTargets:
        terminal = np.array([stats.reward for stats in batch.episodes])
        returns = episode_returns(sub_traces, batch.episode_ids, terminal.tolist())
        groups = np.asarray(batch.groups, np.int64)
        counts = action_counts(sub_traces, batch.episode_ids)
        advantage = episode_advantages(returns, groups, self.config.baseline, counts)
        targets = spread(sub_traces, batch.episode_ids, advantage, returns)
        if self.config.whiten:
            targets = whitened(sub_traces, targets)
        # Terminal rewards, not returns: with a KL penalty in the reward no two returns are equal.
        sampled = counts > 0
        if not sampled.any() or len(np.unique(groups)) == len(groups):
            return StepTargets(targets, {})
        return StepTargets(
            targets, {"advantage/zero_signal_groups": zero_signal_fraction(terminal[sampled], groups[sampled])}
        )

    def update(
        self, batch: Batch, targets: Sequence[Targets], rng: np.random.Generator, num_epochs: int | None = None
    ) -> Answer[dict[str, float]]:
        return Ready({})
