"""Every setting has help, bounds and unit; configs are frozen; docs/configuration.md is made from them."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from enum import Enum

import pytest
from tree import ROOT

from buffer.config import BufferConfig
from machine.settings import setting
from slime.config.reference import PAGE, page
from slime.config.settings import Bounds, sections, settings
from slime.schema import Config


def test_every_setting_has_one_sentence_of_help() -> None:
    wrong = [key for key, one in settings().items() if not one.help.endswith(".") or "\n" in one.help]
    assert wrong == []
    assert [section.key for section in sections() if not section.help] == []


def test_every_number_has_bounds_that_its_default_keeps() -> None:
    numbers = {key for key, one in settings().items() if one.kind in (int, float)}
    assert {key for key, one in settings().items() if one.bounds} == numbers
    for key in numbers:
        one = settings()[key]
        assert one.bounds is not None
        assert one.bounds.ends[0] <= one.bounds.ends[1], key
        assert one.bounds.cure(one.default) == "", key


@pytest.mark.parametrize("suffix", ["_s", "_gb", "_mb", "_tokens", "episodes"])
def test_a_unit_in_a_name_stands_beside_it(suffix: str) -> None:
    for key, one in settings().items():
        if key.endswith(suffix) and one.kind in (int, float):
            assert one.unit, key


def test_every_choice_has_a_docstring() -> None:
    choices = {one.kind for one in settings().values() if isinstance(one.kind, type) and issubclass(one.kind, Enum)}
    assert [kind.__name__ for kind in choices if not kind.__doc__] == []


@pytest.mark.parametrize(
    ("text", "value", "cure"),
    [
        ("[1, inf)", 1, ""),
        ("[1, inf)", 0, "the nearest that works is 1"),
        ("(0, 1)", 1.0, "use a number below 1"),
        ("(0, inf)", 0.0, "use a number above 0"),
        ("(0, inf)", float("nan"), "use a finite number"),
        ("(0, inf)", float("inf"), "use a finite number"),
        ("[0, 1]", 1.5, "the nearest that works is 1"),
    ],
)
def test_bounds_name_the_nearest_number_that_works(text: str, value: float, cure: str) -> None:
    assert Bounds(text).cure(value) == cure


def test_defaults_are_those_of_the_schema_with_derived_ones_left_open() -> None:
    found = settings()
    assert (found["buffer.episodes_per_step"].default, found["buffer.slots"].default) == (128, 0)
    assert (found["policy.optimizer.lr"].default, found["critic.optimizer.lr"].default) == (1e-6, 5e-6)


# ------------------------------------------------------------------------------- frozen


def test_nothing_assigns_to_a_config() -> None:
    for section in sections():
        config = section.kind()
        name = fields(config)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(config, name, getattr(config, name))


def test_only_the_helper_on_the_ground_floor_writes_into_a_frozen_config() -> None:
    """A config's own `__post_init__` gives it, through `derive`, the values that follow from its others."""
    folders = ("machine", "buffer", "rollout", "trainer", "critic", "launch", "recipes", "slime")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
            assert "object.__setattr__" not in called or name == "machine/settings.py", name
            assert "derive" not in called or function.name == "__post_init__", name


def test_each_config_has_its_own_lists_and_mappings() -> None:
    one, other = Config(), Config()
    one.task.options["a"] = 1
    one.critic.freeze.append("*")
    assert (other.task.options, other.critic.freeze) == ({}, [])


def test_derived_values_follow_from_the_others() -> None:
    buffer = BufferConfig(episodes_per_step=6)
    assert (buffer.slots, buffer.window) == (6, 6)
    assert replace(buffer, slots=12, window=0).window == 12
    assert Config(recipe="mine").run == "mine"


def test_a_default_needs_no_more_than_help() -> None:
    one = setting(3, "How many.")
    assert (one.default, dict(one.metadata)) == (3, {"help": "How many.", "bounds": "", "unit": ""})


# ---------------------------------------------------------------------- reference page


def test_the_reference_page_is_what_the_schema_says() -> None:
    assert (ROOT / PAGE).read_text() == page(), "stale: run .venv/bin/python -m slime.config.reference"


def test_the_reference_page_names_every_setting_once() -> None:
    lines = page().splitlines()
    for key, one in settings().items():
        assert sum(line.startswith(f"| `{key.rpartition('.')[2]}` |") for line in lines) >= 1, key
        assert any(one.help in line for line in lines), key
    assert max(map(len, lines)) <= 240
    assert not any(is_dataclass(one.kind) for one in settings().values())
