"""Credit crosses a compaction unchanged: an episode that was cut and its uncut twin are trained alike.

The twin: a sub-trace is cut in two and the second one's context repeats all tokens of the first, so that every
action is sampled, valued and predicted in the context that it had before. Nothing may notice the cut: not the
advantages, not the loss, not the gradient, not the weights after the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twins import pair

from buffer.trace import cut
from buffer.types import Batch, Episode, Float32, Status, SubTrace, SubTraceInfo, Turn
from critic.advantages import advantages
from critic.config import AdvantageConfig, Credit
from machine.ports import ReservedPort

EXACT = [
    AdvantageConfig(),
    AdvantageConfig(gamma=0.97, lambda_policy=0.9, lambda_critic=0.95),
    AdvantageConfig(gamma=0.99, lambda_alpha=0.5),
    AdvantageConfig(lambda_policy=0.9, whiten=True),
]


def by_action(traces: Sequence[SubTrace], columns: Sequence[Float32]) -> Float32:
    """One number an action token, in the order of the episodes."""
    return np.concatenate([column[trace.action_mask] for trace, column in zip(traces, columns, strict=True)])


def targets_of(
    traces: list[SubTrace], values: list[Float32], config: AdvantageConfig, backwards: bool = False
) -> tuple[Float32, Float32]:
    """Advantages and returns by action; `backwards`: as computed from a batch in the opposite order."""
    step = -1 if backwards else 1
    targets = advantages(traces[::step], values[::step], config)[::step]
    return by_action(traces, [t.advantages for t in targets]), by_action(traces, [t.returns for t in targets])


@pytest.mark.parametrize("config", EXACT)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_cut_changes_no_advantage_and_no_return(config: AdvantageConfig, backwards: bool) -> None:
    p = pair(seed=3)
    whole = targets_of(p.whole, p.whole_values, config)
    parts = targets_of(p.parts, p.parts_values, config, backwards)
    for uncut, was_cut in zip(whole, parts, strict=True):
        assert np.abs(uncut).max() > 0.1
        np.testing.assert_allclose(was_cut, uncut, atol=1e-6)


@pytest.mark.parametrize("credit", [Credit.independent, Credit.discounted])
def test_the_other_credit_modes_do_notice_the_cut(credit: Credit) -> None:
    p, config = pair(0), AdvantageConfig(credit=credit, lambda_policy=0.9)
    uncut, _ = targets_of(p.whole, p.whole_values, config)
    was_cut, _ = targets_of(p.parts, p.parts_values, config)
    assert np.abs(uncut - was_cut).max() > 0.1


def turn(prompt: Sequence[int], output: Sequence[int], logprobs: Sequence[float]) -> Turn:
    ids = np.array(prompt, np.int32), np.array(output, np.int32)
    none = np.zeros(len(output), np.bool_)
    return Turn(*ids, np.array(logprobs, np.float32), np.zeros(len(output), np.int32), none, "stop")


def test_one_turn_or_several_are_the_same_sub_trace() -> None:
    prompt, said, logprobs = [1, 2, 3], [4, 5, 6, 7], [-0.1, -0.2, -0.3, -0.4]
    at_once = Episode("e", 0, (turn(prompt, said, logprobs),), 1.0, Status.FINISHED)
    pieces = (
        turn(prompt, said[:1], logprobs[:1]),
        turn(prompt + said[:1], said[1:3], logprobs[1:3]),
        turn(prompt + said[:3], said[3:], logprobs[3:]),
    )
    (one,), (several,) = cut(at_once), cut(replace(at_once, turns=pieces))
    for name in ("tokens", "action_mask", "logprobs", "rewards", "versions", "stale_mask"):
        assert getattr(one, name).tolist() == getattr(several, name).tolist()


# The real trainer ----------------------------------------------------------------------------------------------------


class Lab:
    """A policy worker of one process, put back to its first weights before each experiment."""

    def __init__(self, folder: Path) -> None:
        from recipes.coding.model import build_model
        from trainer.config import LayoutConfig, OptimizerConfig, PolicyConfig
        from trainer.engine import EngineSettings
        from trainer.megatron.config import MegatronConfig
        from trainer.policy import PolicyWorker

        build_model(folder, seed=0)
        # A large eps: Adam would otherwise blow the rounding of gradients near zero up to whole steps.
        optimizer = OptimizerConfig(lr=1e-2, eps=1e-3, max_grad_norm=100.0)
        layout = LayoutConfig(), MegatronConfig()
        self.worker: Any = PolicyWorker(
            EngineSettings(0, *layout, optimizer, str(folder), 0, 1, 60.0), PolicyConfig(clip_low=0.2, clip_high=0.28)
        )
        with ReservedPort("127.0.0.1") as port:
            self.worker.start("127.0.0.1", port.number)
        self.first = self.parameters()

    def parameters(self) -> dict[str, Float32]:
        return {name: p.detach().float().numpy().copy() for name, p in self.worker.engine.models[0].named_parameters()}

    def reset(self) -> None:
        import torch

        from trainer.megatron.optimizer import build_optimizer

        with torch.no_grad():
            for name, parameter in self.worker.engine.models[0].named_parameters():
                parameter.copy_(torch.from_numpy(self.first[name]))
        w = self.worker.engine
        w.optimizer = build_optimizer(w.chunks, w.settings.optimizer, w.settings.layout.precision)
        w.chunks[0].config.grad_scale_func = w.optimizer.scale_loss
        w.updates_done = 0

    def update(
        self, traces: list[SubTrace], values: list[Float32], loss: str, norm: str, two_rows: bool
    ) -> tuple[dict[str, float], dict[str, Float32]]:
        """One optimizer step on whole episodes. Returns loss and gradient norm, and the weights after it."""
        from buffer.packing import pack
        from trainer.columns import loss_weights, token_kinds
        from trainer.config import Loss, LossNorm
        from trainer.group import reduced

        self.reset()
        self.worker.config = replace(self.worker.config, loss=Loss(loss), loss_norm=LossNorm(norm))
        lengths = [len(trace.tokens) for trace in traces]
        grid = pack(lengths, 1, 150 if two_rows else 8192)
        assert (len(grid[0]) > 1) is two_rows
        items = [SubTraceInfo(t, t.episode_id, len(t.tokens), t.num_actions, 0) for t in traces]
        old = self.worker.logprobs(traces, grid)
        targets = advantages(traces, values, AdvantageConfig(gamma=0.99, lambda_policy=0.9))
        moved = {i: (old[i] + 0.6 * np.sin(10 * old[i])).astype(np.float32) for i in old}  # so that some are clipped
        columns = {
            "advantages": {i: target.advantages for i, target in enumerate(targets)},
            "weights": loss_weights(Batch(0, tuple(items), ()), traces, [grid], LossNorm(norm)),
            "old_logprobs": moved,
            "engine_logprobs": moved,
            "kind": {i: token_kinds(trace) for i, trace in enumerate(traces)},
        }
        metrics = reduced([self.worker.update(traces, [columns], [grid])])
        return metrics, self.parameters()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("credit") / "model")
    yield made
    from megatron.core import parallel_state

    made.worker.stop()
    parallel_state.destroy_model_parallel()


@pytest.mark.e2e
@pytest.mark.parametrize(("loss", "norm"), [("ppo", "token"), ("dis", "token"), ("ppo", "episode")])
def test_a_cut_changes_no_gradient_and_no_weight(lab: Lab, loss: str, norm: str) -> None:
    p = pair(7)
    uncut, uncut_weights = lab.update(p.whole, p.whole_values, loss, norm, two_rows=False)
    was_cut, cut_weights = lab.update(p.parts, p.parts_values, loss, norm, two_rows=True)
    assert uncut["grad_norm"] > 0.1
    assert 0.05 < uncut["clip_fraction"] < 0.95
    for name in ("loss", "grad_norm", "clip_fraction", "kl"):
        assert was_cut[name] == pytest.approx(uncut[name], rel=1e-5, abs=1e-6), name
    step = max(np.abs(uncut_weights[name] - before).max() for name, before in lab.first.items())
    assert step > 1e-3
    for name, weights in uncut_weights.items():
        np.testing.assert_allclose(cut_weights[name], weights, atol=1e-3 * step, err_msg=name)


@pytest.mark.e2e
def test_training_the_copied_context_again_would_be_noticed(lab: Lab) -> None:
    """The same experiment with every copy trained too: it can tell the difference."""
    p = pair(7)
    uncut, _ = lab.update(p.whole, p.whole_values, "ppo", "token", two_rows=False)
    again = [replace(part, action_mask=np.arange(len(part.tokens)) > 0) for part in p.parts]
    wrong, _ = lab.update(again, p.parts_values, "ppo", "token", two_rows=True)
    assert abs(wrong["grad_norm"] / uncut["grad_norm"] - 1) > 0.05
