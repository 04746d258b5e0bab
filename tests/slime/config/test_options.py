"""Options of SGLang and Megatron: checked against the libraries' own types, refused if a run sets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from roles import random_qwen3

from rollout.config import EngineConfig
from rollout.engines.server import ServerSettings, server_arguments
from rollout.sglang.options import OURS, OURS_ON_CPUS, option_arguments, refused_options
from slime.config import ConfigError, load
from slime.report import _engine_options
from slime.start.placement import placement

PPO = "recipe=ppo_coding"


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([PPO, *arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------- SGLang


def test_options_become_arguments_of_the_server() -> None:
    options = {"chunked_prefill_size": 512, "enable_metrics": True, "lora_paths": ["a", "b"], "json": {"a": 1}}
    assert option_arguments(options) == [
        "--chunked-prefill-size=512",
        "--enable-metrics",
        *("--lora-paths", "a", "b"),
        '--json={"a": 1}',
    ]


@pytest.mark.parametrize("cpu", [True, False])
def test_every_argument_that_a_run_sets_is_among_those_refused(cpu: bool) -> None:
    config = EngineConfig(max_total_tokens=1000)
    given = server_arguments(ServerSettings(config, "/m", 100, "log", cpu, yields_memory=True), 4000)
    flags = {flag.removeprefix("--").replace("-", "_") for flag in given if flag.startswith("--")} | {"nccl_port"}
    assert flags - set(OURS | (OURS_ON_CPUS if cpu else {})) == set()


def test_sglang_says_what_it_takes() -> None:
    """One process checks all options, because importing SGLang takes seconds."""
    wrong: dict[str, tuple[Any, str]] = {
        "chunked_prefil_size": (512, "has no such argument; did you mean 'chunked_prefill_size'?"),
        "zzzz": (1, "has no such argument; its server_args.py lists them"),
        "chunked_prefill_size": ("many", "refuses it: argument --chunked-prefill-size: invalid int value: 'many'"),
        "max_prefill_tokens": (1.5, "refuses it: argument --max-prefill-tokens: Invalid integer value: '1.5'"),
        "schedule_policy": ("best", "refuses it: argument --schedule-policy: invalid choice: 'best'"),
        "disable_radix_cache": (3, "refuses it: argument --disable-radix-cache: ignored explicit argument '3'"),
        "page_size": (True, "refuses it: argument --page-size: expected one argument"),
        "enable_mixed_chunk": (False, "=false: give a value; to keep SGLang's default, leave it out"),
        "tensor_parallel_size": (2, "use rollout.engine.tensor_parallel"),
        "sampling_backend": ("pytorch", "a run sets this itself: leave it out"),
        "enable_deterministic_inference": (True, "a run sets this itself: leave it out"),
        "attention_backend": ("triton", "a run sets this itself: leave it out"),
    }
    right = {"decode_log_interval": 7, "enable_metrics": True, "schedule_policy": "lpm"}
    told = refused_options({name: value for name, (value, _) in wrong.items()} | OURS, cpu=True)
    assert all(line.startswith(f"rollout.engine.options.{name}=") for name, line in zip(wrong, told, strict=False))
    for (value, part), line in zip(wrong.values(), told, strict=False):
        assert part in line, value
    # Names of this version of SGLang: each argument that a run sets is known by the name that it is refused by.
    assert [line for line in told[len(wrong) :] if "has no such argument" in line] == []
    assert len(told) == len(wrong) + len(OURS)
    assert refused_options(right | {"sampling_backend": "pytorch", "attention_backend": "triton"}, cpu=False) == []


def test_an_argument_of_sglangs_is_refused_before_anything_starts() -> None:
    line = refusal("rollout.engine.options.chunked_prefill_sizes=512")
    assert line.startswith("rollout.engine.options.chunked_prefill_sizes=512: SGLang ")
    assert "did you mean 'chunked_prefill_size'?" in line


def test_a_warm_start_has_no_engine_whose_options_could_count() -> None:
    with pytest.raises(ConfigError, match=r"rollout.engine.options.page_size=16 has no effect in a recipe of kind sft"):
        load(["recipe=sft_coding", "rollout.engine.options.page_size=16"])


# ----------------------------------------------------------------------------- Megatron


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = random_qwen3(tmp_path_factory.mktemp("options") / "model")
    return f"model.path={folder}"


WINDOW = [
    *("rollout.compaction.context_tokens=104", "rollout.compaction.reserve_tokens=39"),
    *("rollout.compaction.summary_tokens=8", "rollout.max_turn_tokens=24"),
]


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("attention_softmax_in_fp23=true", "has no such setting; did you mean 'attention_softmax_in_fp32'?"),
        ("attention_softmax_in_fp32=3", "refuses it: Input should be a valid boolean"),
        ("moe_router_dtype=fp3", "refuses it: Input should be 'fp32' or 'fp64'"),
        ("init_method=x", "refuses it: Input should be callable"),
        ("bf16=true", "a run sets this itself: use {role}.layout.precision"),
        ("tensor_model_parallel_size=2", "a run sets this itself: use {role}.megatron.tensor_parallel"),
        ("hidden_size=64", "a run sets this itself: leave it out"),
        ("num_layers_in_first_pipeline_stage=1", "refuses them: "),
    ],
)
def test_megatron_says_what_it_takes(role: str, option: str, part: str, model: str) -> None:
    line = refusal(model, *WINDOW, f"{role}.engine.options.{option}")
    assert line.startswith(f"{role}.engine.options")
    assert part.format(role=role) in line


def test_options_are_in_the_configuration_and_in_the_report(model: str) -> None:
    loaded = load([model, *WINDOW, PPO, "policy.engine.options.attention_softmax_in_fp32=false"])
    assert loaded.config.policy.engine.options == {"attention_softmax_in_fp32": False}
    assert loaded.origins["policy.engine.options.attention_softmax_in_fp32"] == "command line"
    config = {"policy": {"engine": {"options": {"a": 1}}}, "rollout": {"engine": {"options": {"b": True}}}}
    assert _engine_options(config) == "rollout.engine.options.b=True, policy.engine.options.a=1"
    assert _engine_options({}) == ""


@pytest.mark.usefixtures("process")
def test_options_reach_megatrons_model(model: str) -> None:
    from trainer.config import LayoutConfig
    from trainer.megatron.config import MegatronConfig
    from trainer.megatron.model import build_models
    from trainer.models.families import read_shape

    shape = read_shape(Path(model.partition("=")[2]))
    plain = build_models(shape, LayoutConfig(), MegatronConfig())[0].config
    given = build_models(shape, LayoutConfig(), MegatronConfig(), options={"init_method_std": 0.5})[0].config
    assert (plain.init_method_std, given.init_method_std) == (0.02, 0.5)


def test_each_roles_processes_are_given_its_options(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from slime import build

    seen = []

    class Actor:
        @staticmethod
        def remote(settings: Any, role: Any) -> None:
            seen.append(settings.options)

    monkeypatch.setattr(build.ray, "remote", lambda cls: SimpleNamespace(options=lambda **_: Actor))
    monkeypatch.setattr(build, "watch", lambda name, actor, effect: actor)
    options = ["policy.engine.options.init_method_std=0.5", "critic.engine.options.init_method_std=0.25"]
    config = load([PPO, model, *WINDOW, *options]).config
    build.build_policy(config, Path(), placement(config))
    build.build_estimator(config, Path(), placement(config))
    assert seen == [{"init_method_std": 0.5}, {"init_method_std": 0.25}]
