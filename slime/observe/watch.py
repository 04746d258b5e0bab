"""Observation of a run: live view, metrics, sample episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from buffer.store import Counts
from buffer.tasks import TaskRow
from buffer.types import Batch, EpisodeStats, SubTrace, Targets
from rollout.worker import Played
from slime.observe.tracking import Tracker
from slime.observe.view import View


def record(
    prompt: str,
    stats: EpisodeStats,
    sub_traces: Sequence[SubTrace],
    targets: Sequence[Targets] | None,
    names: Any,
) -> dict[str, Any]:
    """Return one episode for the report: every token as text with its measurements."""
    cards = []
    for place, trace in enumerate(sub_traces):
        target = targets[place] if targets else None
        tokens = []
        for t, text in enumerate(names(trace.tokens.tolist())):
            action = bool(trace.action_mask[t])
            tokens.append(
                {
                    "text": text,
                    "action": action,
                    "summary": bool(trace.summary_mask[t]),
                    "logprob": float(trace.logprobs[t]) if action else None,
                    "value": float(target.values[t]) if action and target else None,
                    "advantage": float(target.advantages[t]) if action and target else None,
                    "version": int(trace.versions[t]) if action else None,
                }
            )
        cards.append({"kind": trace.kind.value, "tokens": tokens})
    return {
        "episode_id": sub_traces[0].episode_id,
        "row": stats.row,
        "prompt": prompt,
        "reward": stats.reward,
        "status": sub_traces[0].status.value,
        "sub_traces": cards,
        "guard_events": [],
    }


class Watch:
    """The observers of a run."""

    def __init__(
        self,
        view: View,
        tracker: Tracker,
        tokenizer: Any,
        train_rows: Sequence[TaskRow],
        eval_rows: Sequence[TaskRow],
        sample_every: int,
        sample_episodes: int,
    ) -> None:
        self.view = view
        self.tracker = tracker
        self._tokenizer = tokenizer
        self._rows = {"train": train_rows, "eval": eval_rows}
        self._every = sample_every
        self._count = sample_episodes

    def phase(self, name: str) -> None:
        self.view.phase(name)

    def note(self, text: str) -> None:
        """Print a permanent line."""
        self.view.note(text)

    def rewind(self, step: int) -> None:
        """Remove the steps after `step`, which happen again."""
        self.view.rewind(self.tracker.rewind(step))

    def rollout(self, counts: Counts) -> None:
        """Show the progress of the episodes that training waits for."""
        self.view.rollout(counts.finished, counts.wanted, counts.in_flight, counts.tokens_per_s)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the end of a step."""
        self.tracker.log(step, metrics)
        self.view.step({"step": step, "time_s": self.tracker.elapsed_s, **metrics})

    def _token_texts(self, ids: list[int]) -> list[str]:
        return [self._tokenizer.decode([i]) for i in ids]

    def sample(
        self, step: int, split: str, batch: Batch, sub_traces: Sequence[SubTrace], targets: Sequence[Targets]
    ) -> None:
        """Record some of a step's episodes, with values and advantages, every `sample_every` steps."""
        if step % self._every and step != 1:
            return
        places: dict[str, list[int]] = {}
        for place, trace in enumerate(sub_traces):
            places.setdefault(trace.episode_id, []).append(place)
        stats = {str(i): s for i, s in enumerate(s for s in batch.episodes if s.num_sub_traces)}
        records = []
        for (_, mine), one in list(zip(places.items(), stats.values(), strict=True))[: self._count]:
            prompt = self._rows[split][one.row].prompt
            chosen = [sub_traces[i] for i in mine], [targets[i] for i in mine]
            records.append(record(prompt, one, *chosen, self._token_texts))
        self.tracker.episodes(step, split, records)

    def sample_played(self, step: int, split: str, played: Sequence[Played]) -> None:
        """Record evaluation episodes."""
        records = [
            record(self._rows[split][one.row].prompt, one.stats, one.sub_traces, None, self._token_texts)
            for one in played
        ]
        self.tracker.episodes(step, split, records)
