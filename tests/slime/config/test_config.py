"""Composition, origins, checks and dumps of the configuration, on the real recipes and real YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from slime.config import ConfigError, Loaded, differences, dump, leaves, load, parse
from trainer.config import Precision

PPO = "recipe=ppo_coding"
GPU = [PPO, "model=qwen3_8b", "cluster=gpu_8"]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(*arguments: str, recipes_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load([*arguments], recipes_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load([PPO])


# ---------------------------------------------------------------- composition


@pytest.mark.parametrize("recipe", ["ppo_coding", "sft_coding"])
@pytest.mark.parametrize("model", ["tiny", "qwen3_8b", "qwen3_30b_a3b"])
@pytest.mark.parametrize("cluster", ["local", "gpu_8"])
def test_every_recipe_goes_with_every_model_and_cluster(recipe: str, model: str, cluster: str) -> None:
    config = load([f"recipe={recipe}", f"model={model}", f"cluster={cluster}"]).config
    assert (config.recipe, config.model.name, config.cluster.name) == (recipe, model, cluster)
    assert config.run == recipe


def test_scale_follows_the_model_and_the_algorithm_follows_the_recipe(tiny: Loaded) -> None:
    large = load(GPU).config
    small = tiny.config
    assert large.rollout.compaction.context_tokens > 100 * small.rollout.compaction.context_tokens
    assert large.policy.optimizer.lr < small.policy.optimizer.lr / 100
    assert (large.steps, large.critic.warmup_episodes) == (small.steps, small.critic.warmup_episodes)
    assert large.policy.layout.precision is Precision.bf16


def test_a_warm_start_does_not_start_from_itself() -> None:
    assert load(["recipe=sft_coding"]).config.model.start == ""
    assert "model.start=''" in refusal("recipe=sft_coding", "model.start=sft_coding")


@pytest.mark.parametrize(
    ("key", "origin"),
    [
        ("seed", "default"),
        ("critic.optimizer.beta1", "default"),
        ("steps", "recipe ppo_coding"),
        ("rollout.compaction.context_tokens", "model qwen3_8b"),
        ("policy.optimizer.lr", "command line"),
        ("rollout.engine.num_engines", "cluster gpu_8"),
        ("rollout.max_turns", "command line"),
        ("task.options.level.depth", "command line"),
        ("buffer.slots", "derived"),
        ("buffer.window", "derived"),
        ("run", "derived"),
        ("recipe", "command line"),
    ],
)
def test_origin_names_the_layer_that_spoke_last(key: str, origin: str) -> None:
    arguments = ["policy.optimizer.lr=2e-6", "rollout.max_turns=7", "task.options.level.depth=3"]
    assert load([*GPU, *arguments]).origins[key] == origin


def test_origins_cover_every_leaf(tiny: Loaded) -> None:
    assert set(tiny.origins) == set(leaves(yaml.safe_load(dump(tiny.config))))


def test_derived_slots_follow_episodes_and_given_ones_do_not() -> None:
    derived = load([PPO, "buffer.episodes_per_step=256"])
    assert (derived.config.buffer.slots, derived.config.buffer.window) == (256, 256)
    given = load([PPO, "buffer.episodes_per_step=128", "buffer.slots=256"])
    assert (given.config.buffer.slots, given.origins["buffer.slots"]) == (256, "command line")


def test_the_critic_keeps_its_own_default_rate(tmp_path: Path) -> None:
    write(tmp_path / "recipe" / "bare.yaml", BARE)
    write(tmp_path / "model" / "none.yaml", "# @package _global_\nmodel: {name: none}\n")
    config = load(["recipe=bare", "model=none"], tmp_path).config
    assert (config.policy.optimizer.lr, config.critic.optimizer.lr) == (1e-6, 5e-6)


BARE = """\
# @package _global_
# Nothing but a task
defaults: [_self_, /model: tiny, /cluster: local]
task: {target: 'mine.task:Mine'}
policy: {layout: {max_tokens_per_micro_batch: 65536}}
critic: {layout: {max_tokens_per_micro_batch: 65536}}
"""
DERIVED = """\
# @package _global_
# Ours, with other numbers
defaults: [ppo_coding, override /model: qwen3_8b, _self_]
steps: 9
policy: {optimizer: {lr: 3.0e-6}}
"""


def test_own_recipe_may_begin_with_ours(tmp_path: Path) -> None:
    write(tmp_path / "recipe" / "mine.yaml", DERIVED)
    loaded = load(["recipe=mine"], tmp_path)
    assert loaded.config.model.name == "qwen3_8b"
    assert (loaded.config.steps, loaded.origins["steps"]) == (9, "recipe mine")
    assert (loaded.config.policy.optimizer.lr, loaded.origins["policy.optimizer.lr"]) == (3e-6, "recipe mine")
    assert loaded.origins["critic.warmup_episodes"] == "recipe ppo_coding"
    small = load(["recipe=mine", "model=tiny"], tmp_path).config
    assert small.rollout.compaction == load([PPO]).config.rollout.compaction


def test_recipes_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "recipes" / "recipe" / "mine.yaml", DERIVED)
    write(
        tmp_path / "recipes" / "cluster" / "local.yaml",
        "# @package _global_\ncluster: {name: mine, num_nodes: 3, ray_address: auto}\n",
    )
    monkeypatch.chdir(tmp_path)
    config = load(["recipe=mine"]).config
    assert (config.steps, config.cluster.num_nodes) == (9, 3)  # a name of theirs stands before ours


def test_a_folder_name_with_special_characters(tmp_path: Path) -> None:
    folder = tmp_path / "it's [my], folder=1"
    write(folder / "recipe" / "mine.yaml", DERIVED)
    assert load(["recipe=mine"], folder).config.steps == 9


@pytest.mark.parametrize("text", ["/data/a, b (2).jsonl", "it's", "5", "a=b", "true", "null", "x y", "[a]"])
def test_text_needs_no_quotes(text: str) -> None:
    assert load([PPO, f"task.train={text}"]).config.task.train == text


def test_options_of_the_task_keep_their_types() -> None:
    options = load([PPO, "task.options.depth=3", "task.options.names=[a,b]", "task.options.sub.rate=0.5"]).config.task
    assert options.options == {"depth": 3, "names": ["a", "b"], "sub": {"rate": 0.5}}


@pytest.mark.parametrize("text", ["{mode: a, sub: {rate: 0.5}}", "{mode:a,sub:{rate:0.5}}"])
def test_options_of_the_task_may_be_one_mapping_that_is_added(text: str, tmp_path: Path) -> None:
    write(tmp_path / "recipe" / "mine.yaml", BARE.replace("'mine.task:Mine'", "'mine.task:Mine', options: {depth: 3}"))
    options = load(["recipe=mine", f"task.options={text}"], tmp_path).config.task.options
    assert options == {"depth": 3, "mode": "a", "sub": {"rate": 0.5}}


# ------------------------------------------------------------- refusals by load


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["recipe=NAME is missing", "ppo_coding", "sft_coding"]),
        (["recipe=ppo_codign"], ["recipe=ppo_codign", "did you mean 'ppo_coding'?"]),
        ([PPO, "model=tinny"], ["model=tinny", "did you mean 'tiny'?"]),
        ([PPO, "model=xyz"], ["model=xyz: no such model", "known: ", "qwen3_8b", "tiny"]),
        ([PPO, "cluster=gpu8"], ["cluster=gpu8", "did you mean 'gpu_8'?"]),
        (["recipe=../recipe/ppo_coding"], ["no such recipe"]),
        (["recipe="], ["recipe=: no such recipe"]),
        ([PPO, "polcy.optimizer.lr=1"], ["unknown key 'polcy.optimizer.lr'", "'policy.optimizer.lr'"]),
        ([PPO, "policy.optimiser.lr=1"], ["unknown key", "'policy.optimizer.lr'"]),
        ([PPO, "policy.lr=1"], ["did you mean 'policy.optimizer.lr'?"]),
        ([PPO, "critic.lr=1"], ["did you mean 'critic.optimizer.lr'?"]),
        ([PPO, "lr=1"], ["did you mean 'policy.optimizer.lr'?"]),
        ([PPO, "policy.precision=bf16"], ["did you mean 'policy.layout.precision'?"]),
        ([PPO, "policy.layout.tensor_parallel=2"], ["did you mean 'policy.megatron.tensor_parallel'?"]),
        ([PPO, "critic.layout.virtual_stages=2"], ["did you mean 'critic.megatron.virtual_stages'?"]),
        ([PPO, "policy.megatron.precision=bf16"], ["did you mean 'policy.layout.precision'?"]),
        ([PPO, "rollout.tensor_parallel=2"], ["did you mean 'rollout.engine.tensor_parallel'?"]),
        ([PPO, "rollout.summary_tokens=2"], ["did you mean 'rollout.compaction.summary_tokens'?"]),
        ([PPO, "rollout.num_tasks=2"], ["did you mean 'eval.num_tasks'?"]),
        ([PPO, "cluster.gpus=2"], ["did you mean 'cluster.gpus_per_node'?"]),
        ([PPO, "lambda=1"], ["'advantage.lambda_policy' or 'advantage.lambda_critic'"]),
        ([PPO, "critic.kl_coef=1"], ["did you mean 'policy.kl_coef'?"]),
        (
            [PPO, "policy.learning_rate=1"],
            ["known: policy.layout.*, policy.megatron.*, policy.optimizer.*, policy.loss"],
        ),
        ([PPO, "policy.optimizer.lr.x=1"], ["did you mean 'policy.optimizer.lr'?"]),
        ([PPO, "critic.value_range.low=1"], ["did you mean 'critic.value_range'?"]),
        ([PPO, "lambda_policy=1"], ["unknown key 'lambda_policy'", "'advantage.lambda_policy'"]),
        ([PPO, "step=3"], ["unknown key 'step'", "'steps'"]),
        ([PPO, "eval.zzz=3"], ["unknown key 'eval.zzz'", "eval.every, eval.num_tasks"]),
        ([PPO, "zzzz=3"], ["unknown key 'zzzz'", "known: ", "steps", "policy"]),
        ([PPO, "steps.x=3"], ["unknown key 'steps.x'"]),
        ([PPO, "steps=many"], ["steps=many", "must be an integer"]),
        ([PPO, "steps=1.5"], ["steps=1.5", "must be an integer"]),
        ([PPO, "steps=null"], ["steps=None", "must be an integer"]),
        ([PPO, "steps="], ["steps=", "must be an integer"]),
        ([PPO, "policy.optimizer.lr=fast"], ["policy.optimizer.lr=fast", "must be a number"]),
        ([PPO, "resume=perhaps"], ["resume=perhaps", "must be one of never, auto, must"]),
        ([PPO, "resume_allow=[policy.lr]"], ["resume_allow: unknown key 'policy.lr'", "policy.optimizer.lr"]),
        ([PPO, "policy.loss=pppo"], ["policy.loss=pppo", "one of cispo, decoupled, dis, gspo, ppo"]),
        ([PPO, "rollout.engine.pause=abort"], ["rollout.engine.pause=abort", "one of retract, in_place"]),
        ([PPO, "policy=ppo"], ["policy=ppo is a section", "policy.layout"]),
        ([PPO, "task.options=3"], ["task.options=3", "must be a mapping"]),
        ([PPO, "task.options={mode"], ["task.options={mode: can't be read", "task.options.NAME=VALUE"]),
        ([PPO, "task.options={'mode': 1}"], ["can't be read", "task.options.NAME=VALUE", "{name: value}"]),
        ([PPO, "critic.value_range=[low]"], ["critic.value_range=['low']: must be a list, each of it a number"]),
        ([PPO, "critic.freeze=all"], ["critic.freeze=all: must be a list, each of it text"]),
        ([PPO, "steps"], ["'steps' is not key=value"]),
        ([PPO, "steps =3"], ["'steps =3' is not key=value"]),
        ([PPO, "+steps=3"], ["'+steps=3' is not key=value"]),
        ([PPO, "~steps"], ["'~steps' is not key=value"]),
        ([PPO, "=3"], ["'=3' is not key=value"]),
        ([PPO, ""], ["'' is not key=value"]),
        ([PPO, "steps=[1"], ["steps=[1: can't be read"]),
        ([PPO, "steps=1,2"], ["steps=1,2: one value only"]),
        ([PPO, "run=${nothing.here}"], ["nothing.here"]),
        ([PPO, "model.start=sft"], ["model.start=sft: no such recipe", "sft_coding"]),
    ],
)
def test_mistakes_in_arguments(arguments: list[str], parts: list[str]) -> None:
    message = refusal(*arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BARE + "stepz: 3\n", ["recipe bare", "unknown key 'stepz'", "'steps'"]),
        (BARE + "rollout: {max_turn: 3}\n", ["recipe bare", "rollout.max_turn", "did you mean 'rollout.max_turns'?"]),
        (BARE + "steps: lots\n", ["recipe bare", "steps=lots", "must be an integer"]),
        (BARE + "advantage: {credit: chain}\n", ["recipe bare", "chained, discounted, independent"]),
        (BARE + "rollout: 3\n", ["recipe bare", "rollout=3 is a section"]),
        (BARE + "rollout:\n", ["recipe bare", "rollout=None is a section"]),
        (BARE.replace("# @package _global_\n", ""), ["bare.yaml", "# @package _global_"]),
        (BARE.replace("/model: tiny, ", ""), ["recipe bare chooses no model", "qwen3_8b, smollm2_135m, tiny"]),
        (BARE.replace(", /cluster: local", ""), ["recipe bare chooses no cluster", "gpu_8, local"]),
        (BARE.replace("tiny", "tinny"), ["model/tinny"]),
        (BARE + "steps: [3\n", ["bare.yaml:", "expected ',' or ']'"]),
        (BARE.replace("target", "train"), ["task.target=''", "package.module:Class"]),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    write(tmp_path / "recipe" / "bare.yaml", text)
    message = refusal("recipe=bare", recipes_dir=tmp_path)
    for part in parts:
        assert part in message


def test_a_folder_without_groups_is_refused(tmp_path: Path) -> None:
    assert "recipe, model, cluster" in refusal(PPO, recipes_dir=tmp_path)
    assert str(tmp_path / "absent") in refusal(PPO, recipes_dir=tmp_path / "absent")


# ------------------------------------------------------------------ dump and resume


def test_dump_and_parse_are_inverse() -> None:
    config = load([*GPU, "task.options.a.b=[1,x]", "task.options.rate=1e-7", "run='7'", "policy.loss=dis"]).config
    assert parse(dump(config)) == config
    assert differences(dump(config), config) == []


def test_differences_name_each_changed_key() -> None:
    old = load([PPO, "policy.optimizer.lr=7e-4"]).config
    new = load([PPO, "policy.optimizer.lr=1e-3", "task.options.depth=2", "policy.loss=dis"]).config
    assert differences(dump(old), new) == [
        "task.options.depth: (absent) -> 2",
        "policy.optimizer.lr: 0.0007 -> 0.001",
        "policy.loss: ppo -> dis",
        "task.options: {} -> (absent)",
    ]


def test_parse_refuses_keys_of_another_version(tiny: Loaded) -> None:
    with pytest.raises(ConfigError, match="old_key"):
        parse(dump(tiny.config) + "old_key: 3\n")
