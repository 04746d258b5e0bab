"""An algorithm is one file: it registers itself with its arrays, its windows and its rows of the documentation."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tree import ROOT

from trainer.config import Loss, PolicyConfig
from trainer.losses import algorithms, policy_loss, registry
from trainer.policy import token_loss

NEW = """
from trainer.losses.registry import PolicyLoss, Window, register
from trainer.losses.token import TokenLoss


def plain(logprobs_T, advantages_T, clip_low, clip_high):
    ratio_T = logprobs_T.detach().exp()
    return TokenLoss(-advantages_T * logprobs_T, ratio_T, ratio_T > 1 + clip_high)


register(
    PolicyLoss("plain", plain, ("advantages",), "none", "-A log pi_theta", "Williams 1992", (Window("1", "9", "wide"),))
)
"""


@pytest.fixture
def _with_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file among the algorithms, and nothing else."""
    (tmp_path / "plain.py").write_text(NEW)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    algorithms.load()
    yield
    vars(algorithms).pop("plain")


def computed(name: str, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of three tokens in two sequences, as the trainer's process computes it."""
    config: Any = SimpleNamespace(loss=SimpleNamespace(value=name), clip_low=0.2, clip_high=0.28, dual_clip=0.0)
    batch: Any = SimpleNamespace(
        columns=columns, sequence_P=torch.tensor([0, 0, 1]), action_P=torch.tensor([True] * 3), lengths=[2, 1]
    )
    return token_loss(config, torch.tensor([-1.0, -2.0, -3.0]), batch).loss_T


@pytest.mark.usefixtures("_with_plain")
def test_a_new_file_is_a_new_loss() -> None:
    loss = computed("plain", {"advantages": torch.tensor([1.0, -1.0, 2.0])})
    assert loss.tolist() == [1.0, -2.0, 6.0]
    assert "| `plain` | none | -A log pi_theta | Williams 1992 |" in registry.documentation()
    assert "| `plain` | wide | `policy.loss=plain policy.clip_low=1 policy.clip_high=9` |" in registry.documentation()


def test_a_loss_gets_the_arrays_that_it_names_and_no_others() -> None:
    every = {name: torch.zeros(3) for name in ("advantages", "old_logprobs", "engine_logprobs")}
    for loss in registry.policy_losses():
        named = {name: every[name] for name in loss.reads}
        assert computed(loss.name, named).shape == (3,)
        for name in loss.reads:
            with pytest.raises(KeyError, match=name):
                computed(loss.name, {other: array for other, array in named.items() if other != name})
        parameters = list(inspect.signature(loss.function).parameters)
        assert parameters[1 : 1 + len(loss.reads)] == [f"{name}_T" for name in loss.reads]


def test_every_choice_of_the_configuration_is_registered() -> None:
    assert {loss.value for loss in Loss} == {loss.name for loss in registry.policy_losses()}
    files = {path.stem for path in (ROOT / "trainer" / "losses" / "algorithms").glob("*.py")} - {"__init__"}
    assert files == {loss.name for loss in registry.policy_losses()}


def test_the_command_line_offers_a_new_file(tmp_path: Path) -> None:
    copy = tmp_path / "trainer"
    shutil.copytree(ROOT / "trainer", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "losses" / "algorithms" / "plain.py").write_text(NEW)
    program = "from trainer.config import PolicyConfig, Loss; print(PolicyConfig(loss=Loss('plain')).loss.value)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "plain\n", done.stderr


def test_the_default_window_is_that_of_the_default_loss() -> None:
    config = PolicyConfig()
    window = policy_loss(config.loss.value).windows[0]
    assert (float(window.clip_low), float(window.clip_high)) == (config.clip_low, config.clip_high)


def test_the_page_shows_what_is_registered() -> None:
    assert registry.documentation() in (ROOT / "docs" / "algorithms.md").read_text(), registry.documentation()


def test_a_name_is_taken_once_and_a_loss_has_a_window() -> None:
    ppo = policy_loss("ppo")
    with pytest.raises(ValueError, match="'ppo' is registered twice"):
        registry.register(ppo)
    with pytest.raises(ValueError, match="'none' names no window"):
        registry.register(registry.PolicyLoss("none", ppo.function, (), "", "", "", ()))
    with pytest.raises(ValueError, match=r"no policy loss 'pppo': there are cispo, .*, ppo"):
        policy_loss("pppo")
