"""SGLang's out-of-tree platform for machines without a GPU.

The entry point `sglang.srt.platforms: slime_cpu` refers to `activate`. SGLang calls it during `import sglang`, in every
process of an engine, also on machines with a GPU. This module imports nothing large: the platform's class is in
rollout/sglang/cpu/platform.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from machine.stacks import listen

# SGLang imports these at module level for images and grammars; an engine that exchanges token ids uses neither.
OPTIONAL_PACKAGES = ("torchvision", "xgrammar")


class _StubModule(ModuleType):
    """A module in which every public name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012 (an instance attribute of ModuleType)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        stub = type(name, (), {"__module__": self.__name__, **_STUB_METHODS})
        setattr(self, name, stub)
        return stub


def _only_none(cls: type, source: Any, handler: Any) -> Any:
    """Return the pydantic schema of a stub type: a field of this type may only be None."""
    from pydantic_core import core_schema

    return core_schema.none_schema()


_STUB_METHODS: dict[str, Any] = {
    "__class_getitem__": classmethod(lambda cls, item: cls),
    "__get_pydantic_core_schema__": classmethod(_only_none),
}


class _StubFinder(MetaPathFinder, Loader):
    """Finds stub modules for packages that are not installed, and for their submodules."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: a stub has no code."""


def install_stubs() -> tuple[str, ...]:
    """Make the missing packages of OPTIONAL_PACKAGES importable and return their names.

    The finder is appended to sys.meta_path, so an installed package takes precedence. transformers checks for
    torchvision first and caches the result, so that it still treats torchvision as missing.
    """
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()
    absent = tuple(name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None)
    if absent:
        sys.meta_path.append(_StubFinder(absent))
    return absent


def activate() -> str | None:
    """Return the name of the platform class for SGLang, or None if a CUDA device is available.

    SIGUSR2 makes the process write its stacks from now on.
    """
    import torch

    listen()
    install_stubs()
    if os.environ.get("SLIME_ENGINE_DELTA"):
        from rollout.sglang import delta

        delta.install()
    if torch.cuda.is_available():
        return None
    return "rollout.sglang.cpu.platform.CpuPlatform"
