"""The order of a training step: every group of processes is called before the loop waits for any result."""

from __future__ import annotations

import ast
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from roles import batch_of, sub_trace

from buffer.types import EpisodeStats, Targets
from critic.estimators import StepTargets
from slime import loop
from slime.config import load
from slime.run import Run


class Role:
    """A fake group of processes that records when it is called and when its result is awaited."""

    def __init__(self, name: str, events: list[str], says: dict[str, Any]) -> None:
        self._name, self._events, self._says = name, events, says

    def __getattr__(self, method: str) -> Any:
        if method not in self._says:
            raise AttributeError(method)
        what = f"{self._name}.{method}"

        def ask(*arguments: Any) -> Any:
            def result() -> Any:
                self._events.append(f"wait {what}")
                return self._says[method]

            self._events.append(f"ask {what}")
            return SimpleNamespace(result=result)

        return ask


def test_roles_work_side_by_side_and_weights_are_published_after_both(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rng = np.random.default_rng(0)
    traces = [sub_trace(rng, 20, episode) for episode in range(4)]
    batch = batch_of(traces)
    object.__setattr__(batch, "episodes", tuple(EpisodeStats(1.0, num_sampled=1, duration_s=1.0) for _ in traces))
    scores = {i: trace.logprobs for i, trace in enumerate(traces)}
    targets = [Targets(*(np.zeros(20, np.float32) for _ in range(3))) for _ in traces]

    def judged(*rest: Any) -> StepTargets:
        events.append("targets")
        return StepTargets(targets, {})

    estimator: Any = Role("critic", events, {"ask": scores, "update": {"loss": 0.0}})
    estimator.targets = judged
    policy: Any = Role("policy", events, {"logprobs": scores, "update": {"loss": 0.0}})
    reference: Any = Role("reference", events, {"logprobs": {}})
    note = lambda what: lambda *rest: events.append(what)  # noqa: E731
    for name, role in (("policy", policy), ("reference", reference)):
        role.peak_memory = functools.partial(dict, {f"{name}/peak_memory_gb": 1.0})
    parts: dict[str, Any] = {
        **dict.fromkeys(("rollout", "engines", "servers", "model_folder", "rows")),  # nobody asks these
        "buffer": SimpleNamespace(take=lambda waiting: batch, release=note("release")),
        "models": SimpleNamespace(policy=policy, reference=reference, estimator=estimator, groups=[policy, reference]),
        "weights": SimpleNamespace(version=0, lend_memory=lambda: None, publish=note("publish")),
    }
    run = Run(**parts)
    monkeypatch.setattr("ray.get", lambda refs, timeout: refs)
    watch: Any = SimpleNamespace(sample=lambda *rest: None)
    config = load(["recipe=ppo_coding", "policy.max_logprob_diff=1"], None).config
    metrics = loop.train_step(config, run, watch, 1, evaluating=False)
    forward = {"critic.ask", "policy.logprobs", "reference.logprobs"}
    updates = {"critic.update", "policy.update"}
    assert set(events[:3]) == {f"ask {one}" for one in forward}
    assert set(events[3:6]) == {f"wait {one}" for one in forward}
    assert events[6] == "targets"
    assert set(events[7:9]) == {f"ask {one}" for one in updates}
    assert set(events[9:11]) == {f"wait {one}" for one in updates}
    assert events[11:] == ["publish", "release"]
    assert {name for name in metrics if "memory" in name} == {"policy/peak_memory_gb", "reference/peak_memory_gb"}


def test_measuring_takes_at_most_three_lines_of_a_step() -> None:
    (step,) = ast.parse(inspect.getsource(loop.train_step)).body
    assert isinstance(step, ast.FunctionDef)
    lines = [ast.unparse(statement) for statement in step.body]
    assert len([line for line in lines if any(word in line for word in ("clock", "observe", "watch.", "time."))]) <= 3
