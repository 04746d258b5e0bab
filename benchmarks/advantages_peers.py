"""The advantage functions of other trainers in a separate environment; called by advantages.py, not by hand.

`environment()` makes .cache/benchmarks/peers once (about 2 GB) and returns its interpreter. With that interpreter
`advantages_peers.py IN.npz OUT.npz` times each function on padded float32 [B, L] tensors on one thread and prints JSON:
name -> description, CPU seconds of each run, differences from ours. OUT holds the returns of each, by name.

- verl: `verl.trainer.ppo.core_algos.compute_gae_advantage_return`.
- TRL: `PPOTrainer.compute_advantages` of 0.11.4, the last release with a function for it (0.12 to 0.29 have the same
  loop in the middle of `train`, 1.16 has no PPO). It is a method that reads three settings of `self`.
- OpenRLHF: not measured. Its `RemoteExperienceMaker.get_advantages_and_returns` (0.11.2) is the loop of TRL without
  whitening, but its module imports flash-attn, which can't be built without CUDA.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VENV = Path(__file__).resolve().parent.parent / ".cache" / "benchmarks" / "peers"
ALONE = ["verl==0.9.1", "trl==0.11.4"]  # without their requirements, of which these modules import only:
NEEDS = [
    "accelerate==1.2.1",
    "codetiming",
    "datasets==3.2.0",
    "numpy==2.4.6",
    "omegaconf",
    "orjson",
    "packaging",
    "ray==2.55.0",
    "rich",
    "tensordict==0.15.3",
    "torch==2.13.0",
    "transformers==4.46.3",
    "tyro",
]
RUNS = 3


def environment() -> Path:
    """Return the interpreter that has the peers; the first call makes its environment."""
    python, ready = VENV / "bin" / "python", VENV / "ready"
    wanted = "\n".join([*ALONE, *NEEDS])
    if not ready.exists() or ready.read_text() != wanted:
        print(f"making {VENV} (a few minutes, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *NEEDS], check=True, stdout=sys.stderr)
        subprocess.run([*install, "--no-deps", *ALONE], check=True, stdout=sys.stderr)
        ready.write_text(wanted)
    return python


def verl(values: Any, rewards: Any, mask: Any, lam: float) -> Any:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    return compute_gae_advantage_return(rewards, values, mask, gamma=1.0, lam=lam)[1]


def trl(values: Any, rewards: Any, mask: Any, lam: float) -> Any:
    from trl.trainer.ppo_trainer import PPOTrainer

    settings = SimpleNamespace(config=SimpleNamespace(gamma=1.0, lam=lam, whiten_rewards=False))
    return PPOTrainer.compute_advantages(settings, values, rewards, mask)[2]


FUNCTIONS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "verl": (verl, "verl 0.9.1 `compute_gae_advantage_return`", "crosses no compaction, one lambda, whitens always"),
    "trl": (
        trl,
        "TRL 0.11.4 `PPOTrainer.compute_advantages`",
        "as verl, and walks over tool tokens: steps of value 0",
    ),
}


def main(source: str, target: str) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    with np.load(source) as arrays:
        inputs = [torch.from_numpy(arrays[name]) for name in ("values", "rewards", "mask")]
        lam = float(arrays["lam"])
    found, returns = {}, {}
    for name, (function, what, differs) in FUNCTIONS.items():
        function(*(tensor[:, :512] for tensor in inputs), lam)  # imports, first calls
        spent = []
        for _ in range(RUNS):
            began = time.process_time()
            returns[name] = function(*inputs, lam).numpy()
            spent.append(time.process_time() - began)
        found[name] = {"what": what, "seconds": spent, "differs": differs}
    np.savez(target, **returns)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
