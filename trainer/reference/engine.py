"""The reference engine in plain PyTorch: one process, a transformers model, AdamW.

Read it before the Megatron engine: it has no code for several processes. From the same micro-batches and losses both
engines compute the same numbers (tests/trainer/test_equality.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from trainer.batching import MicroBatch
from trainer.config import Offload, Precision, Recompute
from trainer.engine import (
    EngineSettings,
    LossFunction,
    Memory,
    RankShare,
    ScalarHead,
    StepResult,
    SummedLoss,
    frozen_names,
    learning_rate,
    require_finite_norm,
)
from trainer.megatron.config import MegatronConfig
from trainer.models.entries import entries, weight_shapes
from trainer.models.families import read_shape
from trainer.models.files import check_weights, headers

_FILE = "state.pt"
_HEAD = ("output_layer.weight", "output_layer.bias")  # names of the scalar head in patterns to freeze


class Written:
    """A complete checkpoint on disk; there is only one rank."""

    def result(self) -> bytes | None:
        return b""

    def finish(self, of_ranks: Sequence[bytes]) -> None:
        """Do nothing: the checkpoint is complete."""


class TorchEngine:
    """A whole model on one device, in fp32; see trainer/engine.py."""

    def __init__(self, settings: EngineSettings, head: ScalarHead | None = None, freeze: Sequence[str] = ()) -> None:
        layout = settings.layout
        found = layout.num_processes, layout.precision, layout.recompute, layout.offload
        if found != (1, Precision.fp32, Recompute.none, Offload.none):
            asked = ", ".join(str(getattr(one, "value", one)) for one in found)
            raise ValueError(
                f"num_processes, precision, recompute, offload are {asked}; this engine has only 1, fp32, none, none"
            )
        if settings.megatron != MegatronConfig():
            raise ValueError(f"{settings.megatron}: this engine has only Megatron's defaults, one process")
        self.settings = settings
        self.head = head
        self.freeze = freeze
        self.share = RankShare()
        self.updates_done = 0  # optimizer steps

    def start(self, master: str, port: int) -> None:
        """Read the model; no process group is joined. ValueError: bad config or weights, or bad patterns to freeze."""
        s, folder = self.settings, Path(self.settings.model_folder)
        self.shape = read_shape(folder)
        check_weights(folder, self.shape)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(s.threads)
        torch.manual_seed(s.seed)
        found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.model = found.to(self.device).train()
        if self.head is not None:
            drawn = torch.randn(1, self.shape.hidden, generator=torch.Generator().manual_seed(s.seed))
            self.weight = torch.nn.Parameter((drawn * self.head.init_std).to(self.device))
            self.bias = torch.nn.Parameter(torch.zeros(1, device=self.device))
        self._freeze()
        self.optimizer = self._build_optimizer()

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters by name; those of the head under the names that `freeze` patterns use."""
        found = dict(self.model.named_parameters())
        if self.head is not None:
            found = {name: p for name, p in found.items() if not name.startswith("lm_head.")}
            found |= zip(_HEAD, (self.weight, self.bias), strict=True)
        return found

    def _freeze(self) -> None:
        """Freeze the parameters that match a pattern on the names of trainer/models/entries.py.

        ValueError: see `frozen_names`; also a tensor that transformers stores jointly with others.
        """
        theirs = {entry.ours: entry.theirs for entry in entries(self.shape, self.head is not None)}
        theirs |= {name: (name,) for name in _HEAD if self.head is not None}
        own = self._parameters()
        for name in (one for ours in frozen_names(list(theirs), self.freeze) for one in theirs[ours]):
            if name not in own:
                raise ValueError(
                    f"freeze: transformers stores {name} jointly with others: do not freeze single experts"
                )
            own[name].requires_grad_(False)

    def _build_optimizer(self) -> torch.optim.AdamW:
        """Return AdamW without weight decay of norms and biases."""
        c = self.settings.optimizer
        trained = [p for p in self._parameters().values() if p.requires_grad and not self.settings.frozen]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": c.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, c.lr, (c.beta1, c.beta2), c.eps)

    def _output(self, batch: MicroBatch) -> torch.Tensor:
        """Return log-probabilities of the labels and entropies, [2, P]; with a head, values [1, P]."""
        sequence_P = batch.sequence_P
        sees_PP = (sequence_P[:, None] == sequence_P).tril()  # causal, within each sequence
        positions, mask = batch.packing.position_T[None], sees_PP[None, None]
        out = self.model.model(batch.tokens_1P, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden_1PH = out.last_hidden_state
        if self.head is not None:
            value_1P = F.linear(hidden_1PH, self.weight, self.bias)[:, :, 0]
            return value_1P if self.head.activation is None else self.head.activation(value_1P)
        log_p_PV = self.model.lm_head(hidden_1PH)[0].log_softmax(-1)
        logprobs_P = log_p_PV.gather(1, batch.labels_1P[0][:, None])[:, 0]
        return torch.stack([logprobs_P, -(log_p_PV.exp() * log_p_PV).sum(1)])

    def forward(self, batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, torch.Tensor]]:
        """Return log-probabilities, or values, [P] of each micro-batch."""
        with torch.no_grad():
            return [(batch, self._output(batch)[0]) for batch in batches]

    def update(self, steps: Iterable[Sequence[MicroBatch]], loss: LossFunction) -> list[StepResult]:
        """Take one optimizer step for each list of micro-batches. RuntimeError: a gradient that is not finite."""
        return [self._step(batches, loss) for batches in steps]

    def _step(self, batches: Sequence[MicroBatch], loss: LossFunction) -> StepResult:
        c = self.settings.optimizer
        lr = learning_rate(c, self.updates_done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        num_actions = max(1, sum(batch.num_actions for batch in batches))
        losses = []
        for batch in batches:
            found = loss(self._output(batch), batch)
            (found.total / num_actions).backward()
            losses.append(SummedLoss(found.total.detach(), found.sums, found.maxima))
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, c.max_grad_norm or float("inf")))
        require_finite_norm(norm, self.updates_done)
        self.optimizer.step()
        self.updates_done += 1
        return StepResult(norm, lr, tuple(losses))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor except the head's, as transformers writes it: in memory some of them may be joined."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            found = headers(Path(folder))
            for entry in entries(self.shape, self.head is not None):
                for name in entry.theirs:
                    with safe_open(found[name].file, "pt", device=str(self.device)) as file:
                        yield name, file.get_tensor(name)

    def weight_shapes(self) -> list[tuple[str, str, list[int]]]:
        """Return (Hugging Face name, dtype, shape) of the tensors that `weights` yields."""
        return weight_shapes(self.shape, "float32")

    def save(self, folder: Path) -> Written:
        """Write weights, optimizer state and generator before returning. OSError: the disk is full."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: p.detach() for name, p in self._parameters().items()}
        torch.save([self.updates_done, state, self.optimizer.state_dict(), torch.get_rng_state()], folder / _FILE)
        return Written()

    def load(self, folder: Path) -> None:
        """Read a checkpoint that `save` wrote. ValueError: it can't be read, or is of another model."""
        try:
            self.updates_done, state, adam, generator = torch.load(folder / _FILE, map_location=self.device)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder / _FILE}: can't be read: {error}") from error
        own = self._parameters()
        if {name: p.shape for name, p in state.items()} != {name: p.shape for name, p in own.items()}:
            raise ValueError(f"{folder / _FILE}: holds the tensors of another model")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self.optimizer.load_state_dict(adam)
        torch.set_rng_state(generator.cpu())

    def present(self, *memory: Memory) -> AbstractContextManager[None]:
        """Do nothing: all memory is always on the device."""
        return nullcontext()

    def stop(self) -> None:
        """Do nothing: there is no process group."""
