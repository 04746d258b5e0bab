"""Every mapped family: what transformers computes, gradients too, and a folder that comes back bit for bit."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, random_model
from roles import batch_of, layout_of, running, sub_trace
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainer.batching import Packing
from trainer.config import LayoutConfig, OptimizerConfig, PolicyConfig, Precision
from trainer.group import PolicyGroup
from trainer.megatron import hf
from trainer.megatron.config import MegatronConfig
from trainer.megatron.model import build_models
from trainer.megatron.modules.attention import PackedSequences
from trainer.megatron.storage import checkpoint, stored
from trainer.models.entries import entries, strays, weight_shapes
from trainer.models.families import read_shape
from trainer.models.folder import write_folder
from trainer.models.mapping import unmerge
from trainer.models.rope import inverse_frequencies
from trainer.models.shape import ModelShape
from trainer.policy import PolicyWorker

LENGTHS = [11, 1, 33, 7]  # of the packed sequences
DTYPES = {Precision.fp32: "float32", Precision.bf16: "bfloat16"}


class Made(NamedTuple):
    folder: Path
    shape: ModelShape
    ours: Any
    theirs: Any


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a family's model in a dtype; made once."""
    place = tmp_path_factory.mktemp("families")
    numbers = {name: i for i, name in enumerate(FAMILIES)}

    def folder(name: str, dtype: str = "float32") -> Path:
        path = place / f"{numbers[name]}-{dtype}"
        return path if path.is_dir() else random_model(name, path, dtype)

    return folder


def loaded(folder: Path, precision: Precision = Precision.fp32) -> tuple[ModelShape, Any]:
    shape = read_shape(folder)
    models = build_models(shape, LayoutConfig(precision=precision), MegatronConfig())
    hf.load(models, shape, folder)
    return shape, models[0]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, process: None, folder_of: Callable[..., Path]) -> Made:
    folder = folder_of(request.param)
    shape, ours = loaded(folder)
    return Made(folder, shape, ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def our_scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [P]: log-probability of token t + 1 at place t, of all packed sequences."""
    packing = Packing(LENGTHS, torch.device("cpu"))
    packed, positions = PackedSequences(packing), packing.position_T[None]
    scores_2P = model(ids, positions, None, labels=ids.roll(-1, 1), packed_seq_params=packed)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    return scores_2P[0][[t for t in range(ids.shape[1]) if t not in last]]


def their_scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The same, one sequence after the other."""
    found = []
    for each in ids.split(LENGTHS, 1):
        scores_TV = model(each).logits[0, :-1].log_softmax(-1)
        found.append(scores_TV.gather(1, each[0, 1:, None])[:, 0])
    return torch.cat(found)


def test_logprobs_are_those_of_transformers(made: Made) -> None:
    ids = tokens()
    with torch.no_grad():
        found, wanted = our_scores(made.ours, ids), their_scores(made.theirs, ids)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert float(wanted.std()) > 1, "logits that say nothing prove nothing"


def split_experts(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers holds the experts of a layer as one tensor, its folders hold each alone."""
    result = {}
    for name, tensor in found.items():
        stem, _, last = name.rpartition(".")
        for i, each in enumerate(tensor if stem.endswith(".experts") else []):
            if last == "gate_up_proj":
                result[f"{stem}.{i}.gate_proj.weight"], result[f"{stem}.{i}.up_proj.weight"] = each.chunk(2)
            else:
                result[f"{stem}.{i}.{last}.weight"] = each
        if not stem.endswith(".experts"):
            result[name] = tensor
    return result


def test_gradients_are_those_of_transformers(made: Made) -> None:
    ids, weight_P = tokens(), torch.randn(sum(LENGTHS) - len(LENGTHS), generator=torch.Generator().manual_seed(2))
    for model, scores in ((made.ours, our_scores), (made.theirs, their_scores)):
        model.zero_grad()
        (scores(model, ids) * weight_P).sum().backward()
    wanted = split_experts({n: p.grad for n, p in made.theirs.named_parameters()})
    ours = {name: parameter.grad for name, parameter in made.ours.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for entry in entries(made.shape):
        if entry.ours in ours:
            found |= zip(entry.theirs, unmerge(ours[entry.ours], entry, made.shape), strict=True)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        bound = 2e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, atol=bound, rtol=0, msg=name.__add__)
    still = [name for name, gradient in wanted.items() if not gradient.any() and ".experts." not in name]
    assert not still, "a gradient that is zero anyway proves nothing"


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_comes_back_bit_for_bit(
    name: str, precision: Precision, process: None, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = folder_of(name, DTYPES[precision])
    shape, model = loaded(source, precision)
    write_folder(hf.export([model], shape), source, tmp_path / "out")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    listed = [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in hf.export([model], shape)]
    assert weight_shapes(shape, DTYPES[precision]) == listed
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")]
    assert configs[0] == configs[1]


def test_a_checkpoint_holds_every_tensor(made: Made, tmp_path: Path) -> None:
    """Also those that megatron-core saves in its own way: experts as one tensor, halves of a gated MLP, buffers."""
    writing = checkpoint.begin(tmp_path / "saved", [SimpleNamespace(module=made.ours)], None, 0)
    deadline = time.monotonic() + 30
    while (written := writing.result()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert written is not None, "nothing was written in 30 s"
    writing.finish([written])
    stored.export(tmp_path / "saved", made.folder, tmp_path / "out")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (made.folder, tmp_path / "out"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_further_layers_are_kept(name: str, process: None, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """Layers that predict further tokens are not trained; they come along as they are."""
    source = tmp_path / "source"
    random_model(name, source)
    weights = load_file(source / "model.safetensors")
    kept = {f"model.layers.3.{part}.weight": torch.randn(3, 5).bfloat16() for part in ("eh_proj", "enorm", "mlp.gate")}
    save_file(weights | kept, source / "model.safetensors", {"format": "pt"})
    shape, model = loaded(source)
    write_folder(hf.export([model], shape), source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys() | kept.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in kept.items())
    assert strays(shape, ["model.layers.4.enorm.weight", "lm_head.weight"]) == ["model.layers.4.enorm.weight"]
    assert strays(replace(shape, num_mtp=0), kept) == list(kept)


def test_a_tied_matrix_may_stand_in_the_folder_twice(folder_of: Callable[..., Path]) -> None:
    shape = read_shape(folder_of("qwen3, tied"))
    names = ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert strays(shape, names) == []
    assert strays(replace(shape, tied=False), ["lm_head.bias"]) == ["lm_head.bias"]


def test_the_correction_stays_what_it_is(process: None, folder_of: Callable[..., Path]) -> None:
    """A step of training counts tokens per expert; the correction does not follow them."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    _, model = loaded(folder_of("glm4_moe"))
    biases = [m for m in model.modules() if getattr(m, "expert_bias", None) is not None]
    before = [m.expert_bias.clone() for m in biases]
    our_scores(model, tokens()).sum().backward()
    assert [int(m.local_tokens_per_expert.sum()) for m in biases] == [2 * sum(LENGTHS)] * 2
    _update_router_expert_bias([model], model.config)
    assert all(torch.equal(m.expert_bias, old) and old.any() for m, old in zip(biases, before, strict=True))


STRETCHED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "linear": {"factor": 3.0},
}


@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize(("base", "head_dim", "original"), [(5e5, 128, 8192), (1e4, 64, 4096), (1e6, 8, 32768)])
def test_stretched_frequencies(kind: str, base: float, head_dim: int, original: int, tmp_path: Path) -> None:
    """At real sizes; by themselves, because a whole model hides an error in one of them."""
    rope = {"rope_type": kind, "rope_theta": base, "original_max_position_embeddings": original} | STRETCHED[kind]
    config = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    wanted, _ = ROPE_INIT_FUNCTIONS[kind](config, None)
    torch.testing.assert_close(inverse_frequencies(read_shape(tmp_path)), wanted, rtol=1e-6, atol=0)


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The same numbers as folders from before `rope_parameters` have them."""
    rope = dict(config.pop("rope_parameters"))
    kind = rope.pop("rope_type")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


@pytest.mark.parametrize("name", FAMILIES)
def test_older_folders_say_the_same(name: str, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of(name)
    config = older(json.loads((folder / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path) == read_shape(folder)


REFUSED = [
    ("qwen3, tied", {"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: qwen2, "),
    ("qwen3, tied", {"model_type": ["qwen3"]}, "model_type ['qwen3'] is not supported"),
    (
        "qwen3, tied",
        {"num_attention_heads": 0},
        "num_attention_heads is 0, which is not supported; supported: 1 or more",
    ),
    ("qwen3, tied", {"vocab_size": -1}, "vocab_size is -1"),
    ("qwen3_moe", {"num_experts": 0, "num_local_experts": 0}, "experts is 0"),
    ("qwen3, tied", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("qwen3, tied", {"attention_bias": True}, "attention_bias is True"),
    ("qwen3, tied", {"hidden_size": None}, "hidden_size is missing"),
    ("qwen3, tied", {"hidden_size": "32"}, "hidden_size is '32', which is not an integer"),
    ("qwen3, tied", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "norm_topk_prob is True"),
    ("llama, llama3", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama, llama3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("deepseek_v3", {"topk_group": 3}, "topk_group is 3"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_is_not_mapped_is_refused(
    name: str, change: dict[str, Any], words: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    config = json.loads((folder_of(name) / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_shape(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]"])
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"JSON|object"):
        read_shape(tmp_path)


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"num_processes": 2, "tensor_parallel": 2, "sequence_parallel": True},
    "TP2+SP x EP2": {"num_processes": 2, "tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2},
    "PP2 of 2 stages": {"num_processes": 2, "pipeline_parallel": 2, "virtual_stages": 2},
    "CP2": {"num_processes": 2, "context_parallel": 2},
}
SPREAD = [
    ("glm4", "TP2+SP"),
    ("glm4", "CP2"),
    ("glm4_moe", "TP2+SP x EP2"),
    ("deepseek_v3", "TP2+SP x EP2"),
    ("deepseek_v3", "PP2 of 2 stages"),
    ("deepseek_v3", "CP2"),
]


@pytest.mark.e2e
@pytest.mark.parametrize("name", dict(SPREAD))
def test_layout_changes_nothing(name: str, ray_cluster: None, tmp_path: Path) -> None:
    """Own modules of a family spread over processes as megatron-core's do: log-probabilities, and weights after a
    step whose learning rate equals Adam's eps, which makes them gradients."""
    folder = random_model(name, tmp_path / "model", num_layers=5)
    rng = np.random.default_rng(1)
    traces = [sub_trace(rng, length, i) for i, length in enumerate([50, 7, 33, 12, 41])]

    def run(number: int, layout: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        adam = OptimizerConfig(lr=0.1, eps=0.1, max_grad_norm=1.0)
        out = tmp_path / str(number)
        with running(PolicyGroup, PolicyWorker, folder, PolicyConfig(*layout_of(layout)), adam) as group:
            before = group.logprobs(batch_of(traces)).result()
            grid = group.grid(range(len(traces)), [len(trace.tokens) for trace in traces])
            group.imitate(batch_of(traces), grid).result()
            group.export(out).result()
        return before, load_file(out / "model.safetensors")

    one = {"max_tokens_per_micro_batch": 70}
    before, after = run(0, one)
    moved = [
        key for key, tensor in load_file(folder / "model.safetensors").items() if not torch.equal(tensor, after[key])
    ]
    assert len(moved) > 0.9 * len(after) - 10
    for i, layout in enumerate([layout for family, layout in SPREAD if family == name]):
        found, weights = run(i + 1, one | LAYOUTS[layout])
        for j, wanted in before.items():
            np.testing.assert_allclose(found[j], wanted, atol=1e-5, err_msg=layout)
        for key, wanted in after.items():
            worst = float((weights[key] - wanted).abs().max())
            assert worst < 1e-5, (layout, key)
