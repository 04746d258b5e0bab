"""Refusals before any process starts: numbers, combinations, the model's shape, the machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.config import ClusterConfig
from launch.preflight import Machine, problems
from slime.config import ConfigError, check, dump, leaves, load, missing
from slime.config.checks import RANGES
from slime.schema import Config
from slime.start.prepare import first_model, make_task

PPO = "recipe=ppo_coding"
GPU = [PPO, "model=qwen3_8b", "cluster=gpu_8"]
QWEN3_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
# Recipes are tuned; tests of numbers bring their own.
PINNED = [
    PPO,
    "buffer.episodes_per_step=128",
    "rollout.compaction.context_tokens=104",
    "rollout.compaction.reserve_tokens=39",
    "rollout.compaction.summary_tokens=8",
    "rollout.max_turn_tokens=24",
    "policy.num_minibatches=4",
    "critic.num_minibatches=4",
]
GPU_PINNED = [
    *GPU,
    "buffer.episodes_per_step=128",
    "rollout.compaction.context_tokens=32768",
    *("policy.layout.num_processes=4", "policy.megatron.tensor_parallel=2"),
    *("critic.layout.num_processes=2", "critic.megatron.tensor_parallel=2"),
    *("rollout.engine.num_engines=2", "rollout.engine.tensor_parallel=1", "cluster.gpus_per_node=8"),
]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([*arguments])
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------ numbers, one by one


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("steps=0", ["steps=0", "nearest that works is 1"]),
        ("seed=-1", ["seed=-1", "nearest that works is 0"]),
        ("seed=4294967296", ["nearest that works is 4294967295"]),
        ("policy.optimizer.lr=0", ["policy.optimizer.lr=0", "above 0"]),
        ("critic.optimizer.lr=-1e-3", ["critic.optimizer.lr=-0.001", "above 0"]),
        ("policy.optimizer.lr=nan", ["policy.optimizer.lr=nan", "finite"]),
        ("policy.optimizer.lr=inf", ["policy.optimizer.lr=inf", "finite"]),
        ("policy.optimizer.beta2=1", ["policy.optimizer.beta2=1.0", "below 1"]),
        ("advantage.lambda_policy=1.01", ["advantage.lambda_policy=1.01", "nearest that works is 1"]),
        ("advantage.lambda_critic=-0.1", ["advantage.lambda_critic=-0.1", "nearest that works is 0"]),
        ("advantage.gamma=2", ["advantage.gamma=2.0", "nearest that works is 1"]),
        ("policy.clip_low=0", ["policy.clip_low=0.0", "above 0"]),
        ("policy.clip_low=1.5", ["policy.clip_low=1.5", "nearest that works is 1"]),
        ("policy.clip_high=-0.2", ["policy.clip_high=-0.2", "above 0"]),
        ("rollout.engine.memory_fraction=1", ["memory_fraction=1.0", "below 1"]),
        ("policy.num_minibatches=0", ["policy.num_minibatches=0", "nearest that works is 1"]),
        ("eval.num_tasks=0", ["eval.num_tasks=0", "nearest that works is 1"]),
        ("checkpoint.keep=0", ["checkpoint.keep=0", "nearest that works is 1"]),
        ("run=a/b c", ["run='a/b c'", "'a-b-c'"]),
        ("run=..", ["run='..'", "'run'"]),
        ("run=" + "x" * 65, ["at most 64"]),
        ("runs_dir=", ["runs_dir is empty", "runs_dir=runs"]),
        ("task.target=recipes.coding", ["task.target='recipes.coding'", "package.module:Class"]),
        ("rollout.compaction.context_tokens=39", ["context_tokens=39", "at least 40"]),
        ("rollout.compaction.summary_tokens=39", ["summary_tokens=39", "at most 38"]),
        ("rollout.max_turn_tokens=32", ["rollout.max_turn_tokens=32", "use at most 31"]),
        ("rollout.engine.max_total_tokens=103", ["max_total_tokens=103", "at least 104"]),
        ("policy.layout.max_tokens_per_micro_batch=100", ["policy.layout.max_tokens_per_micro_batch=100", "104"]),
        ("critic.layout.max_tokens_per_micro_batch=100", ["critic.layout.max_tokens_per_micro_batch=100", "104"]),
        ("policy.num_minibatches=129", ["policy.num_minibatches=129", "at most 128"]),
        ("critic.num_minibatches=129", ["critic.num_minibatches=129", "at most 128"]),
        ("buffer.episodes_per_step=3", ["buffer.episodes_per_step=3", "num_minibatches of at most 3"]),
        ("buffer.slots=100", ["buffer.slots=100", "128"]),
        ("buffer.window=100", ["buffer.window=100", "128"]),
        ("policy.optimizer.decay_steps=5 policy.optimizer.warmup_steps=5", ["decay_steps=5", "at least 6"]),
        ("policy.layout.precision=bf16", ["policy.layout.precision=bf16", "40 times slower", "fp32"]),
        ("critic.layout.precision=bf16", ["critic.layout.precision=bf16"]),
        ("policy.megatron.sequence_parallel=true", ["policy.megatron: sequence_parallel=true", "at least 2"]),
        (
            "critic.layout.num_processes=3 critic.megatron.tensor_parallel=2",
            ["critic.megatron: layout.num_processes=3", "nearest that works is layout.num_processes=4"],
        ),
    ],
)
def test_numbers_that_can_not_work(argument: str, parts: list[str]) -> None:
    arguments = [argument] if argument.startswith("run=") else argument.split(" ")
    message = refusal(*PINNED, *arguments)
    for part in parts:
        assert part in message


def test_the_nearest_number_named_does_work() -> None:
    for argument in ("rollout.max_turn_tokens=31", "rollout.engine.max_total_tokens=104", "policy.num_minibatches=128"):
        load([*PINNED, argument])


def test_ranges_name_every_number_of_the_schema() -> None:
    """Every number must have bounds in its field."""
    numbers = {
        key
        for key, value in leaves(yaml.safe_load(dump(Config()))).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert set(RANGES) == numbers


# ----------------------------------------------------------- baselines of episodes


@pytest.mark.parametrize("baseline", ["grpo", "grpo_no_std", "rloo"])
def test_a_group_of_one_has_no_baseline(baseline: str) -> None:
    message = refusal(*PINNED, f"advantage.baseline={baseline}")
    assert f"advantage.baseline={baseline}" in message
    assert "buffer.episodes_per_prompt=1: use at least 2" in message
    load([*PINNED, f"advantage.baseline={baseline}", "buffer.episodes_per_prompt=2"])
    load([*PINNED, "advantage.baseline=reinforce_pp"])


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("buffer.episodes_per_prompt=0", ["buffer.episodes_per_prompt=0", "at least 1"]),
        ("buffer.episodes_per_prompt=12", ["buffer.episodes_per_step=128", "episodes_per_prompt=12", "works is 132"]),
        ("buffer.episodes_per_prompt=8 buffer.slots=133", ["buffer.slots=133", "nearest that works is 136"]),
        ("buffer.episodes_per_prompt=8 buffer.slots=144 buffer.window=130", ["buffer.window=130", "works is 128"]),
        ("buffer.episodes_per_prompt=8 advantage.credit=discounted", ["advantage.credit=discounted", "=chained"]),
        ("buffer.episodes_per_prompt=8 advantage.gamma=0.99", ["advantage.gamma=0.99", "use advantage.gamma=1"]),
    ],
)
def test_groups_that_can_not_work(argument: str, parts: list[str]) -> None:
    message = refusal(*PINNED, "advantage.baseline=grpo", *argument.split(" "))
    for part in parts:
        assert part in message


def test_without_a_critic_its_numbers_in_a_recipe_are_not_looked_at(tmp_path: Path) -> None:
    wrong = "# @package _global_\n# Ours\ndefaults: [ppo_coding, _self_]\ncritic: {num_minibatches: 129}\n"
    write(tmp_path / "recipe" / "mine.yaml", wrong)
    with pytest.raises(ConfigError, match=r"critic\.num_minibatches=129"):
        load(["recipe=mine"], tmp_path)
    load(["recipe=mine", "advantage.baseline=rloo", "buffer.episodes_per_prompt=8"], tmp_path)


# ------------------------------------------------------------- GPUs and the model


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["critic.layout.num_processes=4"], ["10 GPUs", "8*1=8", "works is critic.layout.num_processes=2"]),
        (["rollout.engine.num_engines=3"], ["9 GPUs", "policy.layout.num_processes=2"]),
        (["cluster.gpus_per_node=2"], ["8 GPUs", "gpus_per_node of at least 8"]),
        (["rollout.engine.tensor_parallel=16"], ["rollout.engine.tensor_parallel=16", "at most 8"]),
        (["cluster.gpus_per_node=0"], ["precision=bf16"]),
        (["policy.num_minibatches=100"], ["data_parallel=2", "policy.num_minibatches of at most 64"]),
    ],
)
def test_roles_must_fit_the_gpus(arguments: list[str], parts: list[str]) -> None:
    message = refusal(*GPU_PINNED, *arguments)
    for part in parts:
        assert part in message


def test_more_nodes_make_room() -> None:
    load([*GPU_PINNED, "critic.layout.num_processes=4", "cluster.num_nodes=2", "cluster.ray_address=auto"])


def test_a_warm_start_needs_no_gpus_for_a_critic_or_engines() -> None:
    load(["recipe=sft_coding", "cluster=gpu_8", "cluster.gpus_per_node=4"])
    assert "gpus_per_node" in refusal("recipe=sft_coding", "cluster=gpu_8", "cluster.gpus_per_node=2")


@pytest.mark.parametrize(
    ("shape", "arguments", "parts"),
    [
        ({"max_position_embeddings": 16384}, [], ["context_tokens=32768", "=16384", "use at most 16384"]),
        ({"num_attention_heads": 25}, [], ["policy.megatron: tensor_parallel=2", "=25", "works is tensor_parallel=1"]),
        ({"num_key_value_heads": 1}, [], ["policy.megatron: tensor_parallel=2", "num_key_value_heads=1"]),
        (
            {},
            [
                "critic.megatron.tensor_parallel=1",
                "critic.megatron.sequence_parallel=false",
                "critic.megatron.pipeline_parallel=2",
                "critic.megatron.virtual_stages=19",
            ],
            ["critic.megatron: pipeline_parallel*virtual_stages=2*19", "num_hidden_layers=36", "virtual_stages=18"],
        ),
        ({"model_type": "mamba"}, [], ["config.json", "'mamba' is not supported"]),
        (
            {},
            ["rollout.engine.tensor_parallel=3", "rollout.engine.num_engines=1", "cluster.gpus_per_node=9"],
            ["rollout.engine.tensor_parallel=3", "num_attention_heads=32", "nearest that works is 2"],
        ),
    ],
)
def test_the_model_must_fit_the_layout(
    tmp_path: Path, shape: dict[str, int], arguments: list[str], parts: list[str]
) -> None:
    write(tmp_path / "config.json", json.dumps(QWEN3_8B | shape))
    message = refusal(*GPU_PINNED, f"model.path={tmp_path}", *arguments)
    for part in parts:
        assert part in message


def test_a_model_that_the_task_makes_must_fit_the_layout_too(tmp_path: Path) -> None:
    four = ["critic.layout.num_processes=4", "critic.megatron.pipeline_parallel=4"]
    config = load([PPO, f"cache_dir={tmp_path}", *four]).config  # nothing is known of the model yet
    with pytest.raises(
        ConfigError, match=r"critic\.megatron: pipeline_parallel.*num_hidden_layers=3.*pipeline_parallel=2"
    ):
        first_model(config, make_task(config), None)


def test_a_broken_model_folder_is_named(tmp_path: Path) -> None:
    absent, empty = load([*GPU, "model.path=not/here"]).config, load([*GPU, f"model.path={tmp_path}"]).config
    assert [m for m in missing(absent) if "model.path=not/here: no such folder" in m]
    assert [m for m in missing(empty) if "config.json" in m]
    write(tmp_path / "config.json", "{")
    assert "not JSON" in refusal(*GPU, f"model.path={tmp_path}")
    write(tmp_path / "config.json", json.dumps(QWEN3_8B))
    (told,) = missing(load([*GPU, f"model.path={tmp_path}"]).config)
    assert "holds no weights" in told


def test_a_run_is_not_put_into_the_folder_of_its_warm_start() -> None:
    assert "run=sft_coding is the folder of the warm start" in refusal(PPO, "run=sft_coding")
    load([PPO, "run=sft_coding", "model.start=''"])


def test_rows_for_evaluation_must_suffice(tmp_path: Path) -> None:
    row = '{{"id": "{}", "domain": "d", "prompt": ""}}\n'
    rows = write(tmp_path / "eval.jsonl", "".join(row.format(number) for number in range(3)))
    assert "use at most 3" in refusal(PPO, f"task.eval={rows}")
    assert missing(load([PPO, f"task.eval={rows}", "eval.num_tasks=3"]).config) == []
    assert "task.eval=none.jsonl" in missing(load([PPO, "task.eval=none.jsonl"]).config)[0]


def test_check_takes_a_config_made_by_hand() -> None:
    config = load([PPO]).config
    check(config)
    with pytest.raises(ConfigError, match=re.escape("steps=0 is not in [1, inf)")):
        check(replace(config, steps=0))


# --------------------------------------------------------------------- preflight

ROOMY = Machine(num_cpus=2, free_memory_gb=16, free_disk_gb=50, free_temporary_gb=50, free_shm_gb=8, num_gpus=0)


@pytest.mark.parametrize(
    ("machine", "cluster", "parts"),
    [
        (ROOMY, {}, []),
        (
            replace(ROOMY, free_memory_gb=7.5),
            {},
            ["7.5 GB of memory", "min_memory_gb=8: ", "use cluster.min_memory_gb=7.5"],
        ),
        (replace(ROOMY, free_disk_gb=1), {}, ["1.0 GB of disk", "min_disk_gb=4"]),
        (replace(ROOMY, free_shm_gb=0.064), {}, ["0.06 GB", "/dev/shm", "--shm-size"]),
        (replace(ROOMY, free_temporary_gb=0.5), {}, ["0.50 GB", "TMPDIR"]),
        (ROOMY, {"gpus_per_node": 8}, ["0 GPUs found", "gpus_per_node=8", "cluster=local"]),
        (replace(ROOMY, num_gpus=8), {"gpus_per_node": 8}, []),
        (ROOMY, {"threads_per_process": 4}, ["2 CPUs", "threads_per_process=4", "use at most 2"]),
        (replace(ROOMY, free_memory_gb=1), {"gpus_per_node": 8, "ray_address": "10.0.0.1:6379"}, []),
    ],
)
def test_preflight_tells_what_is_short(machine: Machine, cluster: dict, parts: list[str]) -> None:
    found = problems(ClusterConfig(**cluster), machine)
    assert len(found) == bool(parts)
    for part in parts:
        assert part in found[0]


def test_preflight_tells_everything_at_once() -> None:
    poor = Machine(num_cpus=1, free_memory_gb=1, free_disk_gb=1, free_temporary_gb=0.1, free_shm_gb=0.01, num_gpus=0)
    assert len(problems(ClusterConfig(gpus_per_node=1, threads_per_process=2), poor)) == 6


def test_preflight_reads_this_machine() -> None:
    machine = Machine.read(count_gpus=False)
    assert machine.num_cpus >= 1
    assert machine.free_memory_gb > 0
    assert machine.free_disk_gb > 0
    assert machine.num_gpus == 0


def test_changes_only_need_engines_that_keep_their_weights() -> None:
    assert "rollout.engine.delta=true with cluster.sharing=all" in refusal(
        "recipe=ppo_coding", "cluster=gpu_1", "rollout.engine.delta=true"
    )
    load(["recipe=ppo_coding", "cluster=gpu_2", "rollout.engine.delta=true"])
