"""A setting is used or refused: unused settings on the command line, and those that apply to the warm start."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tree import ROOT

from slime.config import ConfigError, Loaded, dump, leaves, load, load_start
from slime.config.effect import without_effect
from slime.schema import Config
from slime.start.prepare import start_folder

PPO, SFT = "recipe=ppo_coding", "recipe=sft_coding"
GROUPS = ("advantage.baseline=grpo", "buffer.episodes_per_prompt=8")
GPU = ("model=qwen3_8b", "cluster=gpu_8")
KEYS = [key for key in leaves(yaml.safe_load(dump(Config()))) if not key.startswith("task.options")]


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([*arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "key", "cure"),
    [
        # (what goes before, the key that nothing reads then, what makes it count; "": only leaving it out does)
        ((PPO, *GROUPS), "critic.num_epochs=3", "advantage.baseline=critic"),
        ((PPO, *GROUPS), "critic.optimizer.lr=1e-4", "advantage.baseline=critic"),
        ((PPO, *GROUPS), "advantage.lambda_policy=0.9", "advantage.baseline=critic"),
        ((PPO, *GROUPS), "advantage.lambda_alpha=1.5", "advantage.baseline=critic"),
        ((PPO, "advantage.lambda_alpha=1.5"), "advantage.lambda_policy=0.9", "advantage.lambda_alpha=0"),
        ((PPO,), "model.name=qwen3_8b", ""),
        ((PPO,), "cluster.name=gpu_8", ""),
        ((PPO,), "advantage.lambda_length=sub_trace", "advantage.lambda_alpha=1.5"),
        ((PPO, "critic.warmup_episodes=0"), "critic.warmup_epochs=3", "critic.warmup_episodes=640"),
        ((PPO, "critic.warmup_episodes=0"), "critic.warmup_explained_variance=0.5", "critic.warmup_episodes=640"),
        ((PPO,), "policy.kl=k2", "policy.kl_coef=1e-3"),
        ((PPO,), "policy.kl_in=reward", "policy.kl_coef=1e-3"),
        ((PPO,), "policy.correction_bounds=[0.9,1.1]", "policy.correction=icepop"),
        (
            (PPO, "policy.optimizer.decay_steps=0"),
            "policy.optimizer.final_lr_ratio=0.5",
            "policy.optimizer.decay_steps=100",
        ),
        (
            (PPO, "critic.optimizer.decay_steps=0"),
            "critic.optimizer.final_lr_ratio=0.5",
            "critic.optimizer.decay_steps=100",
        ),
        ((PPO, "rollout.compaction.max_compactions=0"), "rollout.compaction.keep_steps=1", ""),
        ((PPO, "rollout.compaction.max_compactions=0"), "policy.train_summaries=false", ""),
        ((PPO, "tracking.wandb=false"), "tracking.project=mine", "tracking.wandb=true"),
        ((PPO, "tracking.sample_episodes=0"), "tracking.sample_every=2", "tracking.sample_episodes=1"),
        ((PPO, "resume=never"), "resume_allow=[policy.loss]", "resume=auto"),
        ((PPO,), "rollout.engine.memory_fraction=0.5", ""),
        ((PPO,), "policy.layout.offload=role", ""),
        ((PPO,), "critic.layout.offload=optimizer", ""),
        ((PPO, "model.start="), "sft.batch_sub_traces=8", "model.start=sft_coding"),
        ((SFT,), "model.start=sft_other", ""),
        ((SFT,), "buffer.slots=256", ""),
        ((SFT,), "policy.loss=dis", ""),
        ((SFT,), "policy.num_minibatches=2", ""),
        ((SFT,), "advantage.gamma=0.9", ""),
        ((SFT,), "critic.layout.precision=bf16", ""),
        ((SFT,), "rollout.engine.num_engines=2", ""),
        ((SFT,), "eval.every=1", ""),
        ((SFT,), "checkpoint.every=1", ""),
        ((SFT,), "resume_allow=[policy.loss]", ""),
        ((SFT,), "tracking.sample_every=1", ""),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(
    arguments: tuple[str, ...], key: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "recipes" / "recipe" / "sft_other.yaml"
    other.parent.mkdir(parents=True)
    other.write_text("# @package _global_\n# Another\ndefaults: [sft_coding, _self_]\n")
    monkeypatch.chdir(tmp_path)
    load([*arguments])
    message = refusal(*arguments, key)
    assert message.startswith(f"{key.partition('=')[0]}=")
    assert "has no effect" in message
    if cure:
        assert cure.partition("=")[0].rpartition(".")[2] in message
        more = ["buffer.episodes_per_prompt=1"] if cure == "advantage.baseline=critic" else []
        load([*arguments, key, cure, *more])


def test_what_a_recipe_sets_and_this_run_does_not_read_is_not_refused() -> None:
    load([PPO, *GROUPS])  # the recipe sets the critic's numbers and lambda_policy
    load([SFT, *GPU])  # the cluster's file sets engines


def test_the_value_that_it_has_anyway_is_not_refused() -> None:
    given = ["critic.num_minibatches=4", "advantage.lambda_policy=0.98", "policy.kl=k3", "policy.correction_bounds=[]"]
    load([PPO, *GROUPS, *given])
    assert "critic.num_minibatches=2 has no effect" in refusal(PPO, *GROUPS, *given, "critic.num_minibatches=2")


def read_by(*arguments: str) -> set[str]:
    """Return the keys that a run of this kind reads."""
    config = load([*arguments]).config
    return {key for key in KEYS if not list(without_effect(config, [key]))}


def below(*sections: str) -> set[str]:
    return {key for key in KEYS if key.startswith(tuple(f"{section}." for section in sections)) or key in sections}


def test_a_warm_start_reads_these_settings_and_no_others() -> None:
    common = below(
        "recipe", "kind", "run", "runs_dir", "cache_dir", "seed", "steps", "resume", "task", "cluster", "sft"
    )
    model = below("model.path", "model.template")
    rollout = below("rollout.num_workers", "rollout.max_turns", "rollout.max_turn_tokens", "rollout.compaction")
    policy = below("policy.layout", "policy.megatron", "policy.optimizer", "policy.engine")
    tracking = {"tracking.wandb", "tracking.project"}
    every = (common | model | rollout | policy | tracking | below("rollout.sandbox")) - {"cluster.name"}
    assert read_by(SFT, *GPU) == every
    assert read_by(SFT) == every - {"policy.layout.offload"}


def test_a_group_baseline_reads_no_setting_of_a_critic() -> None:
    lost = read_by(PPO) - read_by(PPO, *GROUPS)
    of_advantage = {"advantage.lambda_policy", "advantage.lambda_critic", "advantage.lambda_alpha"}
    assert lost == (below("critic") & read_by(PPO)) | of_advantage


def test_on_gpus_everything_but_what_is_switched_off_is_read() -> None:
    switched_off = {
        *("model.name", "cluster.name"),
        *("advantage.lambda_length", "policy.kl", "policy.kl_in", "policy.correction_bounds"),
    }
    assert read_by(PPO, *GPU, "model.start=sft_coding") == set(KEYS) - switched_off
    assert read_by(PPO, *GPU) == set(KEYS) - switched_off - below("sft")


# ------------------------------------------------------------------- the warm start


def start_of(*arguments: str, recipes_dir: Path | None = None) -> Config:
    start = load_start(load([PPO, *arguments], recipes_dir), recipes_dir)
    assert start is not None
    return start


def test_the_warm_start_trains_the_model_that_is_named() -> None:
    assert start_of().model.path == ""
    start = start_of("model.path=it's [mine], x=1", "model.template=chatml")
    assert (start.recipe, start.model.path, start.model.template) == ("sft_coding", "it's [mine], x=1", "chatml")
    assert start_of("model=qwen3_8b", "model.start=sft_coding").model.path == "models/Qwen3-8B"
    assert start_of("model=qwen3_8b", "model.start=sft_coding", "model.path=other").model.path == "other"
    assert load_start(load([PPO, "model.path=other", "model.start="])) is None


def test_what_is_said_of_machines_and_places_reaches_the_warm_start() -> None:
    start = start_of(
        *("cluster=gpu_8", "cluster.gpus_per_node=16", "cluster.min_memory_gb=3", "seed=5"),
        *(
            "runs_dir=a b",
            "cache_dir=c",
            "tracking.project=p",
            "rollout.sandbox.memory_mb=64",
            "sft.batch_sub_traces=8",
        ),
        *("rollout.sandbox.allow_unsafe=true", "cluster.start_timeout_s=12.5"),
    )
    cluster, sandbox = start.cluster, start.rollout.sandbox
    assert (cluster.name, cluster.gpus_per_node, cluster.min_memory_gb, cluster.start_timeout_s) == (
        "gpu_8",
        16,
        3,
        12.5,
    )
    assert (start.seed, start.runs_dir, start.cache_dir, start.tracking.project) == (5, "a b", "c", "p")
    assert (sandbox.memory_mb, sandbox.allow_unsafe, start.sft.batch_sub_traces) == (64, True, 8)
    assert start.policy == load([SFT, "cluster=gpu_8"]).config.policy  # its own


def test_the_files_that_are_chosen_count_not_the_names_in_them(tmp_path: Path) -> None:
    for group, name in (("cluster", "local"), ("model", "tiny")):
        text = (ROOT / "recipes" / group / f"{name}.yaml").read_text()
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text.replace("max_turn_tokens: 22", "max_turn_tokens: 21"))
    arguments = load([PPO, "model=mine", "cluster=mine"], tmp_path).start
    assert {"model=mine", "cluster=mine"} <= set(arguments)
    assert start_of("model=mine", "cluster=mine", recipes_dir=tmp_path).rollout.max_turn_tokens == 21


def test_a_start_that_can_not_be_one_is_refused(tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_start(load([PPO, *arguments], tmp_path), tmp_path)
        return str(caught.value)

    (tmp_path / "recipe").mkdir()
    wrong = "# @package _global_\n# Ours\ndefaults: [sft_coding, _self_]\nsft: {batch_sub_traces: 0}\n"
    (tmp_path / "recipe" / "sft_wrong.yaml").write_text(wrong)
    assert "model.start=ppo_coding_async is a recipe of kind ppo" in told("model.start=ppo_coding_async")
    assert "model.start=sft_wrong: sft.batch_sub_traces=0" in told("model.start=sft_wrong")


def test_a_warm_starts_result_is_cached_by_what_it_is_made_from(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"1")
    run = load([PPO, f"model.path={tmp_path / 'model'}", f"cache_dir={tmp_path}"])
    start = load_start(run)
    assert start is not None
    first = start_folder(run.config, start)
    assert start_folder(run.config, start) == first
    assert start_folder(run.config, replace(start, rollout=replace(start.rollout, max_turns=3))) != first
    assert start_folder(run.config, replace(start, tracking=replace(start.tracking, wandb=False))) == first
    weights.write_bytes(b"22")
    assert start_folder(run.config, start) != first
    shutil.rmtree(tmp_path / "model")


def test_loaded_configurations_know_their_start() -> None:
    assert load([SFT]).start == ()
    assert isinstance(load([PPO]), Loaded)
    assert load([PPO]).start[0] == "recipe=sft_coding"


def test_the_warm_start_is_a_copy_with_other_values_and_no_text_is_read_again() -> None:
    """Every text reaches the warm start unchanged, because none is formatted as a command-line argument."""
    for text in ("it's \\' [mine], x=1", "${oc.env:HOME} \\\\", "'quoted'"):
        run = load([PPO])
        named = replace(run, config=replace(run.config, model=replace(run.config.model, path=text)))
        start = load_start(replace(named, origins=named.origins | {"model.path": "command line"}))
        assert start is not None
        assert (start.model.path, start.cluster) == (text, run.config.cluster)


def test_the_warm_start_is_checked_with_the_values_that_it_is_given(tmp_path: Path) -> None:
    """The recipe of the warm start sets 0 GPUs; the value of the run's command line applies."""
    (tmp_path / "recipe").mkdir()
    wide = "# @package _global_\n# Ours\ndefaults: [sft_coding, _self_]\n"
    wide += "sft: {batch_sub_traces: 8}\ncluster: {gpus_per_node: 0}\n"
    (tmp_path / "recipe" / "sft_wide.yaml").write_text(wide)
    start = start_of("cluster=gpu_8", "model.start=sft_wide", "cluster.gpus_per_node=16", recipes_dir=tmp_path)
    assert (start.cluster.gpus_per_node, start.sft.batch_sub_traces) == (16, 8)
