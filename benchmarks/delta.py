"""Share of a model's bf16 weights that one optimizer step changes, and the size of the resulting delta.

    .venv/bin/python benchmarks/delta.py [--model FOLDER ...]

Each model takes Adam steps with real gradients (cross-entropy of random tokens) on fp32 weights, like the trainer;
after every step its weights are rounded to bf16, as for the engines, and trainer/publish/delta.py encodes them against
those of the previous step. Without --model: a Qwen3-shaped model of 29M parameters, random with std 0.02.

A weight w changes when its step crosses the boundary between two bf16 numbers, which are 2^-8 |w| to 2^-7 |w| apart. A
step of size s changes about s / (2^-7.5 |w|) of the weights near w: a step of 1e-6 changes one in a hundred of those
near 0.02, and one in ten of those near 0.002.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.publish.delta import Base, changed

RATES = (1e-7, 1e-6, 1e-5)
STEPS = 10
SHOWN = (1, 2, 10)
TOKENS = 512


def random_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **{"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"head_dim": 64, "intermediate_size": 1536, "vocab_size": 20000, "max_position_embeddings": TOKENS},
        **{"tie_word_embeddings": True, "initializer_range": 0.02},
    )
    return Qwen3ForCausalLM(config).float()


def folder_model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rounded(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights rounded to bf16, as the engines get them."""
    return {name: weight.detach().to(torch.bfloat16) for name, weight in model.named_parameters()}


def measure(model: Any, lr: float) -> list[tuple[int, float, float]]:
    """Return (step, share of changed elements, bytes of the delta over bytes of whole weights) of each shown step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    base, held = Base(), rounded(model)
    base.keep(list(held), list(held.values()))
    found = []
    for step in range(1, STEPS + 1):
        length = min(TOKENS, model.config.max_position_embeddings)
        tokens = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        new = rounded(model)
        moved = sum(len(changed(held[name], new[name])) for name in new)
        sent = sum(part.nbytes for part in base.encode(list(new), list(new.values())))
        elements = sum(weight.numel() for weight in new.values())
        if step in SHOWN:
            found.append((step, moved / elements, sent / (2 * elements)))
        held = new
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a Hugging Face folder; may be repeated")
    options = parser.parse_args()
    print("| model | learning rate | step | elements changed | bytes of whole weights |\n|---|---|---|---|---|")
    for name in options.model or ["random"]:
        for lr in RATES:
            model = random_model() if name == "random" else folder_model(name)
            for step, share, weight in measure(model, lr):
                print(f"| {Path(name).name} | {lr:g} | {step} | {share:.2%} | {weight:.1%} |", flush=True)


if __name__ == "__main__":
    main()
