"""Hands a manifest to the cluster that kubectl is set up for."""

from __future__ import annotations

import shutil
import subprocess

TIMEOUT_S = 60.0


class KubectlError(RuntimeError):
    """kubectl is not there, has refused or has not answered: one line with its own words."""


def apply(text: str) -> str:
    """Return what `kubectl apply` says to a manifest. KubectlError: it has not taken it."""
    program = shutil.which("kubectl")
    if program is None:
        raise KubectlError(
            "kubectl is not on PATH: run this where it is, or print the manifest with --dry-run into a file "
            "and apply that there"
        )
    try:
        done = subprocess.run(
            [program, "apply", "-f", "-"], input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KubectlError(f"kubectl has not answered in {TIMEOUT_S:g} s: does the cluster answer?") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise KubectlError(f"kubectl apply: {said or f'exit code {done.returncode}'}")
    return done.stdout.strip()
