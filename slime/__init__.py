"""Reinforcement-learning post-training for language-model agents.

User code imports from this package alone. Names load on first use, so that `slime --help` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Task": "rollout.task",
    "Demonstrator": "rollout.environment",
    "Environment": "rollout.environment",
    "Step": "rollout.environment",
    "Prompt": "rollout.rendering.messages",
    "Sandbox": "rollout.sandbox.interface",
    "RunResult": "rollout.sandbox.interface",
    "TaskRow": "buffer.tasks",
    "SubTrace": "buffer.types",
    "Episode": "buffer.types",
    "build_model": "recipes.coding.model",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'slime' has no attribute {name!r}; it exports {', '.join(sorted(_EXPORTS))}")
    return getattr(import_module(_EXPORTS[name]), name)
