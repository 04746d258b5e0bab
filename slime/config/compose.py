"""Composition of a configuration. For each key, later sources override earlier ones, in this order:

    schema < recipe < model < cluster < command line

A recipe sets the task and the algorithm. A model sets its files and all numbers that depend on its scale (window,
reserve, lengths, learning rates). A cluster sets everything that depends on machines (processes, precision). So any
recipe can be combined with any model and any cluster. Each file contains only the values that it changes. Its position
in the order is the position of `_self_` in its defaults list, so a recipe can also override models and clusters, and a
recipe that starts with another one (`defaults: [ppo_coding, _self_]`) overrides that recipe's values.

Hydra finds the files, reads their defaults lists and merges them (its YAML is widely known, and it checks types
against dataclasses). `OmegaConf.to_object` converts the result to plain dataclasses once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from launch.environment import expand
from recipes.catalogue import GROUPS, find, names, search_path
from slime.config.checks import check, get
from slime.config.effect import without_effect
from slime.config.keys import all_keys, expected, hint, mapping_of
from slime.config.settings import ConfigError, hints, sections, settings
from slime.schema import Config, Kind

_PATHS = ("runs_dir", "cache_dir", "model.path", "task.train", "task.eval")
_ARGUMENT = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Loaded:
    """A checked configuration and the origin of each of its values."""

    config: Config
    origins: dict[str, str]  # dotted key -> default | recipe NAME | model NAME | cluster NAME | command line | derived
    start: tuple[str, ...] = ()  # recipe, model and cluster of the warm start, if any


@dataclass(frozen=True)
class _Layer:
    """One source of values: `origin` is its name for display, `tree` its values as nested dicts."""

    origin: str
    tree: dict[str, Any]


def load(arguments: list[str], recipes_dir: Path | None = None) -> Loaded:
    """Compose and check the configuration for `recipe=NAME [model=NAME] [cluster=NAME] [key=value ...]`.

    `recipes_dir` is searched before `./recipes` and slime's own recipes.
    ConfigError: a user error, described in one line.
    """
    loaded, given = _compose(arguments, recipes_dir)
    check(loaded.config)
    for problem in without_effect(loaded.config, given):
        raise ConfigError(problem)
    return loaded


def _compose(arguments: list[str], recipes_dir: Path | None) -> tuple[Loaded, list[str]]:
    """Compose like `load`, without checks. Also return the keys whose values the command line changes."""
    try:
        folders = search_path(recipes_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    chosen, values = _split(arguments, folders)
    schema = _schema()
    command_line = _Layer("command line", _parse_values(values))
    scratch = schema.copy()
    _check_layer(command_line, scratch)
    try:
        files, composed = _files(tuple(chosen.items()), tuple(folders), _texts(folders))
        for layer in files:
            _check_layer(layer, scratch)
        before = OmegaConf.merge(schema, composed)
        tree = OmegaConf.merge(before, command_line.tree)
        assert isinstance(tree, DictConfig)
        OmegaConf.update(tree, "recipe", chosen["recipe"])
        OmegaConf.resolve(tree)
        _expand_paths(tree)
        now, then = (leaves(OmegaConf.to_container(one, enum_to_str=True)) for one in (tree, before))
        given = [key for key in leaves(command_line.tree) if key in now and now[key] != then.get(key)]
        config = _to_object(tree)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_one_line(error)) from error
    origins = _origins(tree, config, [*files, command_line])
    if config.model.start and find(folders, "recipe", config.model.start) is None:
        raise ConfigError(_unknown("model.start", config.model.start, names(folders, "recipe")))
    return Loaded(config, origins, _start(config, files)), given


def load_start(loaded: Loaded, recipes_dir: Path | None = None) -> Config | None:
    """Return the warm start's own configuration, or None without a warm start.

    ConfigError: its recipe is not of kind sft, or see `load`.
    """
    if not loaded.start:
        return None
    name = loaded.config.model.start
    passed = [
        key
        for key, origin in loaded.origins.items()
        if key.startswith(_PASSED_ON) and origin.startswith(("recipe ", "command line"))
    ]
    try:
        config = _compose(list(loaded.start), recipes_dir)[0].config
        config = _with_values(config, {key: get(loaded.config, key) for key in (*_SAME_PLACE, *passed)})
        check(config)
    except ConfigError as error:
        raise ConfigError(f"model.start={name}: {error}") from error
    if config.kind is not Kind.sft:
        raise ConfigError(
            f"model.start={name} is a recipe of kind {config.kind.value}: name one of kind sft, or use model.start=''"
        )
    return config


# Keys that the warm start always takes from the run.
_SAME_PLACE = ("seed", "runs_dir", "cache_dir", "tracking.wandb", "rollout.sandbox.allow_unsafe")
# Keys that the warm start takes from the run if the recipe or the command line sets them, like `model=` and `cluster=`.
_PASSED_ON = ("model.path", "model.template", "cluster.", "tracking.project", "rollout.sandbox.", "sft.")


def _start(config: Config, files: Sequence[_Layer]) -> tuple[str, ...]:
    if config.kind is Kind.sft or not config.model.start:
        return ()
    chosen = dict(layer.origin.split(" ", 1) for layer in files)
    return f"recipe={config.model.start}", f"model={chosen['model']}", f"cluster={chosen['cluster']}"


def _with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of a config, or of a section, with other values under dotted keys."""
    inside: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        inside.setdefault(name, {})[rest] = value
    return replace(
        config,
        **{
            name: below[""] if "" in below else _with_values(getattr(config, name), below)
            for name, below in inside.items()
        },
    )


def dump(config: Config) -> str:
    """Return the configuration as YAML with every key. `parse` is the inverse."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse(text: str) -> Config:
    """Parse the output of `dump`. ConfigError: it does not match this version's keys and types."""
    try:
        return _to_object(OmegaConf.merge(_schema(), OmegaConf.create(text)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_one_line(error)) from error


def differences(old_yaml: str, config: Config) -> list[str]:
    """Return the differences between a dumped configuration and this one as lines `key: old -> new`."""
    old, new = (leaves(OmegaConf.to_container(OmegaConf.create(text))) for text in (old_yaml, dump(config)))
    keys = [*new, *(key for key in old if key not in new)]
    return [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in keys
        if key not in old or key not in new or old[key] != new[key]
    ]


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to {dotted key: value}; an empty dict counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _split(arguments: list[str], folders: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Split arguments into ({group: name}, {key: value as text}). The last value of a repeated key counts.

    ConfigError: a malformed argument, an unknown key or an unknown name.
    """
    chosen: dict[str, str] = {}
    values: dict[str, str] = {}
    for argument in arguments:
        match = _ARGUMENT.fullmatch(argument)
        if match is None:
            raise ConfigError(f"{argument!r} is not key=value (no spaces around '=', no '+' or '~' before the key)")
        key, text = match.groups()
        if key not in GROUPS:
            hint(key)
            values[key] = text
        elif text not in names(folders, key):
            raise ConfigError(_unknown(key, text, names(folders, key)))
        else:
            chosen[key] = text
    if "recipe" not in chosen:
        raise ConfigError(f"recipe=NAME is missing; recipes: {', '.join(names(folders, 'recipe'))}")
    return chosen, values


def _texts(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the contents of all files from which a configuration can be composed."""
    found = (path for folder in folders for group in GROUPS for path in sorted((folder / group).glob("*.yaml")))
    return tuple(f"{path}\n{path.read_text(encoding='utf-8', errors='replace')}" for path in found)


@lru_cache(maxsize=64)  # Hydra takes a quarter of a second
def _files(
    chosen: tuple[tuple[str, str], ...], folders: tuple[Path, ...], texts: tuple[str, ...]
) -> tuple[list[_Layer], dict[str, Any]]:
    """Return the YAML files that Hydra composes, in its order, and what it composes from them. Do not modify either.

    `texts`: their contents, on which the result depends. ConfigError: see `_file_layers`.
    """
    groups = dict(chosen)
    run = {"defaults": [{"recipe": groups["recipe"]}, "_self_"]}
    search = {"hydra": {"searchpath": [f"file://{folder}" for folder in folders[1:]]}}
    ConfigStore.instance().store(name="_run", node=run | search)
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        layers = _file_layers(groups, list(folders))
        composed = OmegaConf.to_container(compose("_run", _group_overrides(groups)))
    assert isinstance(composed, dict)
    return layers, {str(key): value for key, value in composed.items()}


def _group_overrides(chosen: dict[str, str]) -> list[str]:
    return [f"{group}={name}" for group, name in chosen.items() if group != "recipe"]


def _file_layers(chosen: dict[str, str], folders: list[Path]) -> list[_Layer]:
    """Return the YAML files that Hydra composes, in its order.

    ConfigError: a group is not chosen, or a file is not a mapping.
    """
    loader = GlobalHydra.instance().config_loader()
    recipe = chosen["recipe"]
    defaults = loader.compute_defaults_list("_run", [], RunMode.RUN).defaults
    for group in ("model", "cluster"):
        if not any(str(default.config_path).startswith(f"{group}/") for default in defaults):
            hint = f"its defaults list needs a line '- /{group}: NAME' ({', '.join(names(folders, group))})"
            raise ConfigError(f"recipe {recipe} chooses no {group}: {hint}")
    if overrides := _group_overrides(chosen):
        defaults = loader.compute_defaults_list("_run", overrides, RunMode.RUN).defaults
    layers = []
    for default in defaults:
        group, _, name = str(default.config_path).partition("/")
        if group not in GROUPS:
            continue
        path = find(folders, group, name)
        if path is None:
            raise ConfigError(_unknown(group, name, names(folders, group)))
        tree = OmegaConf.to_container(OmegaConf.load(path))
        if default.package != "" or not isinstance(tree, dict):
            raise ConfigError(f"{path}: begin with the line '# @package _global_', then write 'key: value' lines")
        tree.pop("defaults", None)
        layers.append(_Layer(f"{group} {name}", {str(key): value for key, value in tree.items()}))
    return layers


def _parse_values(values: dict[str, str]) -> dict[str, Any]:
    """Parse command-line values into nested dicts. ConfigError: a value can't be parsed."""
    tree: dict[str, Any] = {}
    for key, text in values.items():
        try:
            override = OverridesParser.create().parse_override(_quoted(key, text))
        except HydraException as error:
            cure = "put text with special characters in quotes"
            if mapping_of(key) == key:
                cure = f"write {key}.NAME=VALUE for each option, or {key}={{name: value}}"
            raise ConfigError(f"{key}={text}: can't be read; {cure}") from error
        if override.is_sweep_override():
            raise ConfigError(f"{key}={text}: one value only; a list is written [1,2]")
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = override.value()
    return tree


def _quoted(key: str, text: str) -> str:
    """Return `key=text` in Hydra's syntax: quote text values, and allow new keys in a mapping."""
    if hint(key) is str and not text.startswith(("'", '"')):
        text = "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
    return f"{'++' if mapping_of(key) else ''}{key}={text}"


@cache
def _schema() -> DictConfig:
    """Return the schema with its plain defaults, before any section's `__post_init__` derives values. Do not modify."""
    tree: DictConfig = OmegaConf.structured(Config)
    for section in sections():  # a tree of frozen dataclasses is read-only
        OmegaConf.set_readonly(OmegaConf.select(tree, section.key) if section.key else tree, None)
    for setting in settings().values():
        OmegaConf.update(tree, setting.key, setting.default)
    return tree


def _unknown(group: str, name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{group}={name}: no such {group.replace('model.start', 'recipe')}; {hint}known: {', '.join(known)}"


def _check_layer(layer: _Layer, scratch: DictConfig) -> None:
    """Write the layer's values into `scratch`. ConfigError: an unknown key or a value of the wrong type."""
    where = "" if layer.origin == "command line" else f"{layer.origin}: "
    for key, value in leaves(layer.tree).items():
        try:
            kind = hint(key)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
        if isinstance(value, str) and "${" in value:
            continue  # an interpolation: its type is checked when it is resolved
        if is_dataclass(kind) and not isinstance(value, dict):
            raise ConfigError(f"{where}{key}={value} is a section; set its keys, e.g. {key}.{next(iter(hints(kind)))}")
        if kind is Any or is_dataclass(kind):
            continue
        try:
            OmegaConf.update(scratch, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}{key}={value}: {expected(kind)}") from error


def _expand_paths(tree: DictConfig) -> None:
    """Expand home folders and environment variables in every path. ConfigError: one of them does not exist."""
    for key in _PATHS:
        try:
            OmegaConf.update(tree, key, expand(OmegaConf.select(tree, key)))
        except ValueError as error:
            raise ConfigError(f"{key}={error}") from error


def _to_object(tree: Any) -> Config:
    """Convert the tree to dataclasses. ConfigError: a section refuses its values; the message names the section."""
    try:
        config = OmegaConf.to_object(tree)
    except ValueError as error:
        raise ConfigError(_where(tree, str(error))) from error
    assert isinstance(config, Config)
    return config


def _where(tree: Any, message: str) -> str:
    """Prefix the message with the dotted name of the section that refuses its values."""
    for key in sorted(all_keys(), key=lambda key: -key.count(".")):
        node = OmegaConf.select(tree, key)
        if isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict:
            try:
                OmegaConf.to_object(node)
            except ValueError as error:
                message = str(error)
                return message if message.startswith(key) else f"{key}: {message}"
    return message


def _origins(tree: DictConfig, config: Config, layers: list[_Layer]) -> dict[str, str]:
    before = leaves(OmegaConf.to_container(tree))
    origins = dict.fromkeys(before, "default")
    for layer in layers:
        origins |= dict.fromkeys((key for key in leaves(layer.tree) if key in origins), layer.origin)
    origins["recipe"] = "command line"
    for key, value in before.items():
        if not mapping_of(key) and get(config, key) != value:
            origins[key] = "derived"
    return origins


def _one_line(error: BaseException) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).strip().splitlines()[0].split()) or type(error).__name__
