"""`slime config` and `slime train` refuse the same, in one line, before any process starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import Machine
from recipes.coding.model import build_model
from slime import cli, train
from slime.config import load, load_start, missing
from slime.observe.failures import Failures
from slime.schema import Config

PPO, SFT = "recipe=ppo_coding", "recipe=sft_coding"
ROOMY = Machine(num_cpus=2, free_memory_gb=16, free_disk_gb=50, free_temporary_gb=50, free_shm_gb=8, num_gpus=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and models are made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build_model(folder := tmp_path_factory.mktemp("whole") / "model", 0)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A complete model folder, which a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Machine, "read", lambda count_gpus: ROOMY)
    monkeypatch.setattr("slime.start.prepare.TRAIN_ROWS", 64)  # thousands take seconds
    monkeypatch.setattr(train, "start_ray", lambda cluster: pytest.fail("started Ray"))
    monkeypatch.setattr(train, "stop_ray", lambda: None)


def told(capsys: pytest.CaptureFixture[str], cache: Path, *arguments: str) -> str:
    """Return the lines with which both commands refuse a run; they must be equal."""
    said = []
    for command in ("config", "train"):
        code = cli.main([command, f"cache_dir={cache}", *arguments])
        out, err = capsys.readouterr()
        verdict = out.partition("this machine can not run it:\n  ")[2]
        line = err.removeprefix("slime: error: ") or verdict
        assert code == (0 if verdict else 2)
        assert line.count("\n") == 1
        said.append(line)
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["policy.layout.num_processes=3", "policy.megatron.tensor_parallel=3"],
            ["policy.megatron: tensor_parallel=3", "num_attention_heads=4", "nearest that works"],
        ),
        (["critic.layout.num_processes=4", "critic.megatron.pipeline_parallel=4"], ["critic.megatron", "_layers=3"]),
        (["rollout.engine.tensor_parallel=3"], ["rollout.engine.tensor_parallel=3", "the nearest that works is 2"]),
        (
            ["rollout.compaction.context_tokens=1000", "model.start="],
            ["rollout.compaction.context_tokens=1000", "=256", "use at most 256"],
        ),
        (
            ["model.template=chatml", "model.start="],
            ["model.template=chatml", "'<|im_end|>'", "use model.template=tiny"],
        ),
        (["model.template=chat"], ["model.template='chat': no such template; known: tiny, chatml"]),
        (["task.options={mode: a}"], ["task.options.mode: CodingTask takes no options"]),
        (["task.target=recipes.coding:Nothing"], ["Nothing"]),
        (["model.start=ppo_coding_async"], ["model.start=ppo_coding_async is a recipe of kind ppo"]),
    ],
)
def test_a_model_made_on_the_spot_is_looked_at(
    arguments: list[str], parts: list[str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = told(capsys, cache, PPO, *arguments)
    for part in parts:
        assert part in line


def tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


TOO_MANY = {"id": 644, "content": "=?;a", "special": False}
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut off": (lambda f: (f / "model.safetensors").write_bytes(b"abc"), ["model.safetensors", "is cut off after 3"]),
    "no tokenizer": (without_tokenizer, ["holds no tokenizer (tokenizer.json)"]),
    "ids above the vocabulary": (
        lambda f: tokenizer(f, lambda t: t["added_tokens"].append(TOO_MANY)),
        ["gives '=?;a' the id 644", "vocab_size-1=643"],
    ),
    "words above the vocabulary": (
        lambda f: tokenizer(f, lambda t: t["model"]["vocab"].update({"wörd": 99999})),
        ["gives 'wörd' the id 99999"],
    ),
    "no stop token": (
        lambda f: tokenizer(f, lambda t: (t["model"]["vocab"].pop("$"), t.update(added_tokens=[]))),
        ["model.template=tiny ends a turn with '$', which is no token of", "use a model whose tokenizer has it"],
    ),
    "a tokenizer of another kind": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ["tokenizer.json: is no tokenizer that can be read (KeyError('model'))"],
    ),
    "a tokenizer that is a pointer": (
        lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid"),
        ["tokenizer.json: is a pointer of git-LFS"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["holds no config.json"]),
    "a config that is a pointer": (
        lambda f: (f / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid"),
        ["config.json: is a pointer of git-LFS"],
    ),
}


@pytest.mark.parametrize("recipe", [PPO, SFT])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_told_by_both_commands(
    fault: str, recipe: str, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, parts = FAULTS[fault]
    make(folder)
    line = told(capsys, cache, recipe, f"model.path={folder}")
    for part in parts:
        assert part in line


def test_a_whole_folder_passes(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert missing(load([PPO, f"model.path={folder}"]).config) == []
    assert cli.main(["config", PPO, f"model.path={folder}", f"cache_dir={cache}"]) == 0
    assert capsys.readouterr().out.endswith("this machine can run it\n")


@pytest.mark.parametrize(
    "vocabulary",
    [{"tokenizer.json": {"model": {"vocab": [["$", 0.0], ["a", -1.5]]}}}, {"vocab.json": {"$": 0}}],
    ids=["unigram", "of a library of its own"],
)
def test_tokenizers_of_other_kinds_pass(vocabulary: dict[str, Any], folder: Path) -> None:
    without_tokenizer(folder)
    for name, content in vocabulary.items():
        (folder / name).write_text(json.dumps(content))
    assert missing(load([PPO, f"model.path={folder}"]).config) == []


def test_a_task_that_makes_no_model_or_none_that_can_be_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        "from recipes.coding import CodingTask\n"
        "class Without(CodingTask):\n    def make_model(self, folder, seed):\n        pass\n"
        "class Empty(CodingTask):\n    def make_model(self, folder, seed):\n        folder.mkdir()\n"
        "class Refuses(CodingTask):\n    def make_model(self, folder, seed):\n"
        "        raise ValueError('set model.path')\n"
    )
    (tmp_path / "own_models.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, part in (
        ("Without", "own_models:Without: make_model wrote nothing to "),
        ("Empty", "config.json: no such file"),
        ("Refuses", "own_models:Refuses: set model.path"),
    ):
        assert part in told(capsys, cache, PPO, f"task.target=own_models:{name}", "model.start=")


def test_a_model_is_made_anew_for_other_options(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.start.prepare import make_task, untrained_model

    source = (
        "from recipes.coding import CodingTask\n"
        "class Sized(CodingTask):\n"
        "    def __init__(self, size=1):\n        self.size = size\n"
        "    def make_model(self, folder, seed):\n        folder.mkdir()\n        (folder / str(self.size)).touch()\n"
    )
    (tmp_path / "sized.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for size in (1, 2):
        arguments = ["task.target=sized:Sized", f"task.options.size={size}", f"cache_dir={cache}"]
        config = load([PPO, *arguments]).config
        assert (untrained_model(config, make_task(config)) / str(size)).exists()


def test_the_warm_start_runs_once_with_the_model_that_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, str]] = []

    def run_sft(config: Config, run_dir: Path, failures: Failures, warnings: Sequence[str]) -> Path:
        trained.append((config.model.path, run_dir.name))
        return Path(shutil.copytree(config.model.path, run_dir / "model"))

    monkeypatch.setattr(train, "run_sft", run_sft)
    for runs in ("first", "second"):
        loaded = load([PPO, f"model.path={folder}", f"cache_dir={tmp_path / 'cache'}", f"runs_dir={runs}"])
        found = train.start_model(loaded.config, load_start(loaded), Failures(tmp_path))
        assert (found / "model.safetensors").is_file()
        assert found != folder
    assert trained == [(str(folder), "sft_coding")]
    alone = load([PPO, f"model.path={folder}", "model.start="])
    assert train.start_model(alone.config, load_start(alone), Failures(tmp_path)) == folder.resolve()
    assert len(trained) == 1
