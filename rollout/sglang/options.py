"""Other arguments of SGLang's server: `rollout.engine.options`.

    rollout.engine.options.chunked_prefill_size=512    becomes    --chunked-prefill-size=512

Names are those of SGLang, with "_" instead of "-". `true` sets a flag without a value; `no_x=true` becomes --no-x.
SGLang's parser runs in a separate process, because its import takes seconds and sets environment variables.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any, NoReturn

KEY = "rollout.engine.options"
PARSE_TIMEOUT_S = 300.0
# SGLang's names of arguments that a run sets itself or relies on -> the setting to use instead; "": none.
OURS = {
    "model_path": "model.path",
    "context_length": "rollout.compaction.context_tokens",
    "max_running_requests": "rollout.engine.max_running_requests",
    "max_total_tokens": "rollout.engine.max_total_tokens",
    "mem_fraction_static": "rollout.engine.memory_fraction",
    "tp_size": "rollout.engine.tensor_parallel",
    "dp_size": "rollout.engine.num_engines",
    "pp_size": "rollout.engine.tensor_parallel",
    "nnodes": "cluster.num_nodes",
    "device": "cluster.gpus_per_node",
    "enable_memory_saver": "cluster.sharing",
    "random_seed": "seed",
    **dict.fromkeys(("host", "port", "nccl_port", "dist_init_addr", "node_rank", "api_key", "admin_api_key"), ""),
    **dict.fromkeys(("tokenizer_path", "skip_tokenizer_init", "skip_server_warmup", "sleep_on_idle"), ""),
    **dict.fromkeys(("grammar_backend", "log_level_http", "weight_version", "dtype", "config"), ""),
}
OURS_ON_CPUS = dict.fromkeys(
    ("attention_backend", "sampling_backend", "disable_overlap_schedule", "enable_deterministic_inference"), ""
)


def option_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return the options as arguments of SGLang's server."""
    arguments: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def refused_options(options: Mapping[str, Any], cpu: bool) -> list[str]:
    """Return one line for each option that SGLang rejects, or that a run sets itself.

    RuntimeError: SGLang's parser can't be run.
    """
    return list(_ask(json.dumps(options), cpu)) if options else []


@functools.cache
def _ask(options: str, cpu: bool) -> tuple[str, ...]:
    command = [sys.executable, "-m", __name__, options, "cpu" if cpu else "gpu"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PARSE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{KEY}: SGLang's argument parser has not answered within {PARSE_TIMEOUT_S:g} s") from error
    if done.returncode:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{KEY}: SGLang's argument parser failed: {reason}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def _problems(options: Mapping[str, Any], cpu: bool) -> Iterator[str]:
    """Yield the lines of `refused_options`. Imports SGLang."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    ours = OURS | (OURS_ON_CPUS if cpu else {})
    dest_of = {
        flag.removeprefix("--").replace("-", "_"): action.dest
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and action.dest != "help"
    }
    for name, value in options.items():
        told = f"{KEY}.{name}={str(value).lower() if isinstance(value, bool) else value}"
        if name not in dest_of:
            near = get_close_matches(name, sorted(set(dest_of) - set(ours)), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "its server_args.py lists them"
            yield f"{told}: SGLang {version('sglang')} has no such argument; {hint}"
        elif (dest := dest_of[name]) in ours:
            yield f"{told}: {f'use {ours[dest]}' if ours[dest] else 'a run sets this itself: leave it out'}"
        elif value is None or value is False:
            yield f"{told}: give a value; to keep SGLang's default, leave it out"
        else:
            try:
                parser.parse_args(["--model-path", "m", *option_arguments({name: value})])
            except ValueError as error:
                yield f"{told}: SGLang {version('sglang')} refuses it: {error}"


if __name__ == "__main__":
    print("\n" + json.dumps(list(_problems(json.loads(sys.argv[1]), sys.argv[2] == "cpu"))))
