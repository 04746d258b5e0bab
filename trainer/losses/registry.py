"""The registry of policy losses. Each file of trainer/losses/algorithms/ registers one; no other file lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import PolicyConfig
from trainer.losses.token import TokenLoss


@dataclass(frozen=True)
class Window:
    """A recommended window of a loss's ratio, as settings and in words."""

    clip_low: str  # as written on the command line
    clip_high: str
    meaning: str


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss: the function, the arrays that it reads, and its rows in docs/algorithms.md."""

    name: str  # the value of policy.loss
    # (logprobs_T, *reads, *sequences where by_sequence, *settings) -> a TokenLoss [T]
    function: Callable[..., TokenLoss]
    reads: tuple[str, ...]  # float32 [T] each, named as in trainer/columns.py
    ratio: str  # the importance ratio that the window bounds
    formula: str  # l_i
    source: str
    windows: tuple[Window, ...]  # the first one is the default choice
    by_sequence: bool = False  # also receives each token's sequence, the action mask and the number of sequences
    settings: Callable[[PolicyConfig], tuple[float, ...]] = lambda config: (config.clip_low, config.clip_high)


_LOSSES: dict[str, PolicyLoss] = {}


def register(loss: PolicyLoss) -> PolicyLoss:
    """Add a loss to the registry and return it. ValueError: the name is taken, or the loss has no window."""
    if loss.name in _LOSSES:
        raise ValueError(f"policy loss {loss.name!r} is registered twice: choose another name")
    if not loss.windows:
        raise ValueError(f"policy loss {loss.name!r} names no window: give the clip_low and clip_high that suit it")
    _LOSSES[loss.name] = loss
    return loss


def policy_loss(name: str) -> PolicyLoss:
    """Return the loss with this name. ValueError: there is none."""
    if name not in _LOSSES:
        raise ValueError(f"no policy loss {name!r}: there are {', '.join(sorted(_LOSSES))}")
    return _LOSSES[name]


def policy_losses() -> list[PolicyLoss]:
    """Return all losses by name."""
    return [_LOSSES[name] for name in sorted(_LOSSES)]


def documentation() -> str:
    """Return the two Markdown tables of docs/algorithms.md: the losses and their windows."""
    lines = ["| `policy.loss` | ratio | l_i | source |", "|---|---|---|---|"]
    lines += [f"| `{loss.name}` | {loss.ratio} | {loss.formula} | {loss.source} |" for loss in policy_losses()]
    lines += ["", "The usual windows:", "", "| `policy.loss` | window of the ratio | settings |", "|---|---|---|"]
    for loss in policy_losses():
        for window in loss.windows:
            settings = f"policy.loss={loss.name} policy.clip_low={window.clip_low} policy.clip_high={window.clip_high}"
            lines.append(f"| `{loss.name}` | {window.meaning} | `{settings}` |")
    return "\n".join(lines)
