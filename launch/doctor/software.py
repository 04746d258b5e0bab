"""Checks of what is installed: Python, packages, torch's build against the driver, names that hide a package."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.doctor.finding import Finding, ok, problem, warning

MIN_PYTHON, TOO_NEW_PYTHON = (3, 11), (3, 13)
OWN = ("slime", "launch", "recipes", "critic", "trainer", "rollout", "buffer", "machine")
OTHERS = ("torch", "ray", "sglang", "megatron", "transformers", "numpy", "hydra", "omegaconf", "safetensors", "wandb")


DRIVER, SOURCE = "the CUDA driver", "slime's own source (digest)"
COMPARED = ("torch", "ray", "sglang", "megatron-core", "transformers")  # the same on all nodes


@dataclass(frozen=True)
class Versions:
    """Releases of a package that are known to work, and why others may not."""

    package: str
    first: str  # "" for any
    end: str  # the first one that is too new; "" for any
    reason: str


KNOWN = (
    Versions("ray", "2.60", "2.61", "private functions of this release are replaced"),
    Versions("sglang", "0.5.23", "0.5.24", "functions of this release are replaced"),
    Versions("megatron-core", "0.16", "0.17", "later ones need Python 3.12, and private functions are used"),
    Versions("torch", "", "", "all training processes and engines need it"),
    Versions("psutil", "", "", "without it Megatron's checkpoint writer waits forever"),
)


def python(found: tuple[int, ...] = sys.version_info[:3]) -> list[Finding]:
    """Check the interpreter's version."""
    name = ".".join(map(str, found))
    if not MIN_PYTHON <= found[:2] < TOO_NEW_PYTHON:
        return problem("python", f"Python {name}: make the environment anew with Python 3.11 or 3.12")
    return ok("python", name)


def packages(known: Sequence[Versions] = KNOWN) -> list[Finding]:
    """Check that packages are there, in releases that are known to work."""
    found, wrong = [], []
    for one in known:
        try:
            here = version(one.package)
        except PackageNotFoundError:
            wrong += problem("packages", f"{one.package} is not installed ({one.reason}): install locks/*.txt")
            continue
        found.append(f"{one.package} {here}")
        if one.first and not _key(one.first) <= _key(here) < _key(one.end):
            text = (
                f"{one.package} {here}, tested with {one.first} and below {one.end} ({one.reason}): install locks/*.txt"
            )
            wrong += warning("packages", text)
    return wrong or ok("packages", ", ".join(found))


def versions() -> dict[str, str]:
    """Return what should be the same on all nodes: Python, packages, the CUDA driver, and the project's own files."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), DRIVER: _dotted(driver_cuda())}
    for name in COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    home, files = Path(__file__).resolve().parents[2], hashlib.sha256()
    for name in OWN:
        for path in sorted((home / name).rglob("*.py")):
            files.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    return found | {SOURCE: files.hexdigest()[:12]}


def _key(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("+")[0])[:3])


def cuda(needs_gpus: bool, build: str | None = None, driver: tuple[int, int] | None = None) -> list[Finding]:
    """Check torch's CUDA build against the driver's; both are this machine's by default, "" and (0, 0) mean none."""
    build = torch_cuda() if build is None else build
    driver = driver_cuda() if driver is None else driver
    shown = f"torch built for {f'CUDA {build}' if build else 'CPUs'}, driver {_dotted(driver)}"
    if not needs_gpus:
        return ok("cuda", f"{shown}; not needed (cluster.gpus_per_node=0)")
    if not driver[0]:
        return problem("cuda", f"{shown}: install NVIDIA's driver, or give the container its GPUs")
    if not build:
        return problem("cuda", f"{shown}: install locks/gpu.txt, whose torch uses GPUs")
    if int(build.partition(".")[0]) > driver[0]:
        return problem("cuda", f"{shown}: install a driver for CUDA {build}, or a torch built {_dotted(driver)}")
    return ok("cuda", shown)


def _dotted(driver: tuple[int, int]) -> str:
    return f"for CUDA {driver[0]}.{driver[1]}" if driver[0] else "not found"


def torch_cuda() -> str:
    """Return the CUDA version that the installed torch was built for, "" for none, without importing it."""
    spec = PathFinder.find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    match = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", path.read_text(), re.MULTILINE) if path and path.is_file() else None
    return match[1] if match else ""


def driver_cuda() -> tuple[int, int]:
    """Return the newest CUDA version that the driver supports; (0, 0) when there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, 0
    number = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def shadows(folders: Sequence[Path] | None = None) -> list[Finding]:
    """Check that nothing in the current folder or on PYTHONPATH is imported in place of a package.

    Engines start with `python -m`, which looks into the current folder first.
    """
    if folders is None:
        listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        folders = [Path.cwd(), *(Path(one).absolute() for one in listed if one)]
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    found = [one for folder in folders for one in _shadows_in(folder, folders)]
    return found or ok("names", "no file in the current folder or on PYTHONPATH hides a package")


def _shadows_in(folder: Path, folders: Sequence[Path]) -> Iterator[Finding]:
    home = Path(__file__).resolve().parents[2]  # of our own packages
    elsewhere = [one for one in sys.path if one and Path(one).resolve() not in folders]
    for name in (*OWN, *OTHERS):
        # A folder without __init__.py hides no package that has one: `wandb/` and `recipes/` of a user are harmless.
        path = next((one for one in (folder / name / "__init__.py", folder / f"{name}.py") if one.is_file()), None)
        installed = any(folder.glob(f"{name}*.dist-info")) or (name in OWN and folder == home)
        if path and not installed and (name in OWN or PathFinder.find_spec(name, elsewhere)):
            shown = path.parent if path.name == "__init__.py" else path
            yield from problem("names", f"{shown} hides the package {name}: rename it, or start from another folder")
    for path in sorted(folder.glob("*.py")):
        if path.stem in sys.stdlib_module_names:
            yield from warning("names", f"{path} hides Python's own module {path.stem}: rename it")
