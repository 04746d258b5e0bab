"""The benchmarks run, on little data; their numbers are in benchmarks/RESULTS.md."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from roles import random_qwen3
from tree import ROOT

GPU = sorted(
    path.stem for path in (ROOT / "benchmarks" / "gpu").glob("*.py") if path.stem not in ("__init__", "common")
)


def run(*arguments: str, limit_s: float = 120.0) -> str:
    """Return a benchmark's output. AssertionError: its exit code is not 0."""
    command = [sys.executable, f"benchmarks/{arguments[0]}", *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(printed: str) -> list[list[str]]:
    """Return the cells of a table, without its header."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_packing_stays_within_its_limit() -> None:
    assert "Nowhere above 2% where avoidable" in run("packing.py", "--seeds", "1")


def test_advantages() -> None:
    found = rows(run("advantages.py", "--tokens", "20000", "--repeats", "1"))
    assert [row[0] for row in found] == ["agent", "agent, whitened", "actions", "actions, whitened"]
    assert all(float(row[3].rstrip("M")) > 0 for row in found)


def test_changes_of_a_small_step(tmp_path: Path) -> None:
    """More weights change with a larger learning rate, never all."""
    found = rows(run("delta.py", "--model", str(random_qwen3(tmp_path / "model"))))
    first = [float(row[3].rstrip("%")) for row in found if row[2] == "1"]
    assert len(found) == 9
    assert 0 < first[0] < first[1] < first[2] < 100


@pytest.mark.e2e
def test_a_step_beside_a_bare_one() -> None:
    """No bound that means anything on so little: that is for the benchmark itself."""
    printed = run("step.py", "--pairs", "1", "--episodes", "4", limit_s=900.0)
    ratio = re.search(r"ours / bare by CPU seconds +([\d.]+)", printed)
    assert ratio is not None, printed
    assert 0.5 < float(ratio[1]) < 3


@pytest.mark.parametrize("name", GPU)
def test_what_needs_a_gpu_can_be_imported(name: str) -> None:
    """They run on a machine with a GPU: see docs/gpu.md."""
    assert callable(importlib.import_module(f"benchmarks.gpu.{name}").main)
