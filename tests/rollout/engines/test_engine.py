"""Engines: their command line, and real servers against transformers on the same weights."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from engines import CONFIG, CONTEXT, VOCAB, make_model, prompts_with_shared_prefixes, reference

from buffer.types import Float32
from machine.ports import ReservedPort
from machine.stacks import look
from rollout.config import EngineConfig
from rollout.engines.client import EngineClient, Generation, parse_generation
from rollout.engines.server import (
    DIRECT,
    EngineServer,
    ServerSettings,
    crash_in,
    exception_in,
    server_arguments,
    server_environment,
)
from trainer.publish.broadcast import broadcast, join_update_group, leave_update_group

T = TypeVar("T")
LEASH = "rollout.engines.leash"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return make_model(folder / "model")


@pytest.fixture(scope="module")
def server(folder: Path, model: Any) -> Iterator[EngineServer]:
    engine = EngineServer(ServerSettings(CONFIG, str(folder / "model"), CONTEXT, str(folder / "engine.log"), cpu=True))
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


def with_client(server: EngineServer, work: Callable[[EngineClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with EngineClient(server.url, VOCAB, CONTEXT, CONFIG.request_timeout_s) as client:
            return await work(client)

    return asyncio.run(run())


def checksums(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the checksums that SGLang computes for these weights without tensor parallelism: 8 bytes of SHA-256."""
    wholes = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    wholes |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    fused: dict[str, list[torch.Tensor]] = {}
    for name, weight in weights.items():
        words = [wholes.get(word, word) for word in name.split(".")]
        fused.setdefault(".".join(words), []).append(weight)
    return {n: hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()[:16] for n, parts in fused.items()}


# --- fast: pure functions


def test_arguments_of_a_cpu_engine() -> None:
    config = EngineConfig(max_running_requests=7)
    arguments = server_arguments(ServerSettings(config, "/m", 100, "log", cpu=True, seed=5), 4000)
    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    assert given["--context-length"] == "108"
    assert given["--max-total-tokens"] == "1400"
    assert given["--dtype"] == "float32"
    assert given["--random-seed"] == "5"
    assert given["--weight-version"] == "0"
    assert {"--sleep-on-idle", "--disable-overlap-schedule"} <= set(arguments)
    assert server_environment(ServerSettings(config, "/m", 100, "log", cpu=True, threads=3))["OMP_NUM_THREADS"] == "3"


def test_arguments_of_a_gpu_engine() -> None:
    config = EngineConfig(tensor_parallel=4, memory_fraction=0.7)
    arguments = server_arguments(ServerSettings(config, "/m", 100, "log", cpu=False), 4000)
    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    assert (given["--dtype"], given["--tp-size"], given["--mem-fraction-static"]) == ("bfloat16", "4", "0.7")
    assert not {"--device", "--attention-backend", "--max-total-tokens", "--disable-overlap-schedule"} & set(arguments)
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in server_environment(
        ServerSettings(config, "/m", 100, "log", cpu=False)
    )


def test_importing_the_platform_is_light() -> None:
    heavy = "{'torch', 'sglang', 'transformers', 'ray'}"
    code = f"import sys, rollout, rollout.sglang.platform, rollout.engines.server; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def answer(ids: list[int], spans: list[tuple[str, int, int]], logprobs: list[float]) -> dict[str, Any]:
    meta = {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=False)],
        "weight_versions": [{"version": v, "start": s, "end": e} for v, s, e in spans],
    }
    return {"output_ids": ids, "meta_info": meta}


def test_spans_become_versions() -> None:
    found = parse_generation(answer([5, 6, 7], [("3", 0, 2), ("4", 2, 3)], [-1.0, -2.0, -3.0]))
    assert found.versions.tolist() == [3, 3, 4]
    assert found.logprobs.tolist() == [-1, -2, -3]
    assert found.stale_mask.tolist() == [False, False, False]


@pytest.mark.parametrize(("cache", "stale"), [(3, [False, False, True]), (2, [True, True, True])])
def test_tokens_of_another_version_than_the_caches_are_stale(cache: int, stale: list[bool]) -> None:
    found = parse_generation(answer([5, 6, 7], [("3", 0, 2), ("4", 2, 3)], [-1.0, -2.0, -3.0]), cache)
    assert found.stale_mask.tolist() == stale


@pytest.mark.parametrize(
    ("spans", "logprobs"),
    [([("3", 0, 2)], [-1.0, -2.0, -3.0]), ([("3", 0, 3)], [-1.0, -2.0])],
    ids=["version", "logprob"],
)
def test_a_token_without_version_or_logprob_is_an_error(
    spans: list[tuple[str, int, int]], logprobs: list[float]
) -> None:
    with pytest.raises(RuntimeError, match="3 output ids"):
        parse_generation(answer([5, 6, 7], spans, logprobs))


@pytest.mark.parametrize(
    ("prompt", "max_new", "message"),
    [
        ([1, 512, 3], 4, "id 512 at position 1 .* 512 ids"),
        ([1, -1], 4, "id -1 at position 1"),
        (list(range(256)), 4, "256 tokens leaves no room .* at most 255"),
        ([1], 0, "max_new_tokens=0"),
    ],
)
def test_the_client_refuses_bad_requests(prompt: list[int], max_new: int, message: str) -> None:
    client = EngineClient("http://127.0.0.1:1", VOCAB, CONTEXT)
    with pytest.raises(ValueError, match=message):
        asyncio.run(client.generate(prompt, max_new, []))


def test_nobody_listening_is_named_after_the_deadline() -> None:
    with ReservedPort("127.0.0.1") as port:
        url = f"http://127.0.0.1:{port.number}"
        client = EngineClient(url, VOCAB, CONTEXT, connect_timeout_s=0.5)
        with pytest.raises(RuntimeError, match=rf"/generate: no connection to {url} within 0.5 s"):
            asyncio.run(client.generate([1], 1, []))


def test_the_leash_ends_everything_with_its_asker(tmp_path: Path) -> None:
    """The starting process is killed by SIGKILL; the command's own child must die, too."""
    pids = tmp_path / "pids"
    command = f"sleep 600 & echo $$ $! > {pids}.tmp; mv {pids}.tmp {pids}; wait"
    asker = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-m', '{LEASH}', 'sh', '-c', "
        f"{command!r}], stdin=subprocess.PIPE, start_new_session=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", asker])
    wait_until(pids.exists, 30)
    process.kill()
    process.wait(10)
    for pid in map(int, pids.read_text().split()):
        wait_until(functools.partial(gone, pid), 30)


@pytest.mark.parametrize("killed", ["asker", "keeper", "follower"])
def test_nothing_outlives_the_leash_wherever_it_went(tmp_path: Path, killed: str) -> None:
    """A child in a new session, an orphan, and a command that ignores signals: all die when the first process dies.

    Ray kills its worker's own child, the keeper, when the worker exits.
    """
    pids = tmp_path / "pids"
    command = (
        f"setsid sleep 600 & one=$!; (setsid sleep 601 & echo $! > {tmp_path}/orphan); "
        f"echo $PPID $$ $one $(cat {tmp_path}/orphan) > {pids}.tmp; mv {pids}.tmp {pids}; trap '' TERM HUP INT; wait"
    )
    asker = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-m', '{LEASH}', 'sh', '-c', "
        f"{command!r}], stdin=subprocess.PIPE, start_new_session=True); print(p.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", asker], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        keeper = int(process.stdout.readline())
        wait_until(pids.exists, 30)
        follower, *rest = map(int, pids.read_text().split())
        os.kill({"asker": process.pid, "keeper": keeper, "follower": follower}[killed], signal.SIGKILL)
        try:
            for pid in (follower, *rest):
                wait_until(functools.partial(gone, pid), 30)
            wait_until(functools.partial(gone, keeper), 30)
        finally:
            process.kill()


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$", 137), ("sleep 600 & exit 0", 0)])
def test_the_leash_ends_as_its_command_does(command: str, code: int) -> None:
    leash = [sys.executable, "-m", LEASH, "sh", "-c", command]
    with subprocess.Popen(leash, stdin=subprocess.PIPE) as process:
        assert process.wait(30) == code


def test_a_servers_log_says_why_it_ended() -> None:
    crashed = "[2026-11-30] Subprocess scheduler_0 (pid=7) crashed with exit code -9. Triggering SIGQUIT for cleanup..."
    assert (
        crash_in(["ready", crashed])
        == "its process scheduler_0 was killed by SIGKILL, e.g. by the out-of-memory killer"
    )
    assert crash_in(["ready"]) == exception_in(["ready"]) == ""
    raised = ["Traceback:", "  File x", "ValueError: first", "[2026-11-30 TP0] torch.OutOfMemoryError: no room", "bye"]
    assert exception_in(raised) == "torch.OutOfMemoryError: no room"
    assert (
        exception_in(["usage: x", "launch_server.py: error: unknown: --x"]) == "launch_server.py: error: unknown: --x"
    )


def gone(pid: int) -> bool:
    return not running(pid)


def running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


def wait_until(condition: Callable[[], bool], deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not so within {deadline_s} s"
        time.sleep(0.02)


# --- with a real server


@pytest.mark.e2e
def test_the_processes_of_an_engine_write_their_stacks_and_serve_on(server: EngineServer) -> None:
    seen = look(server._process.pid, CONFIG.start_timeout_s)
    (scheduler,) = [child for child in seen.children if "scheduler" in child.name]
    assert "in event_loop" in scheduler.stacks
    assert f"{scheduler.name} is in " in seen.where
    assert with_client(server, EngineClient.version) >= 0


@pytest.mark.e2e
def test_an_option_reaches_sglang(server: EngineServer) -> None:
    with DIRECT.open(f"{server.url}/server_info", timeout=60) as response:
        assert json.load(response)["decode_log_interval"] == 7


@pytest.mark.e2e
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_equal_transformers(server: EngineServer, model: Any, temperature: float) -> None:
    prompts = prompts_with_shared_prefixes(seed=int(temperature))

    async def work(client: EngineClient) -> list[Generation]:
        return await asyncio.gather(
            *(client.generate(prompt, 3 + 7 * (i % 6), [], temperature) for i, prompt in enumerate(prompts))
        )

    for prompt, found in zip(prompts, with_client(server, work), strict=True):
        assert (found.versions == 0).all()
        expected = reference(model, prompt, found.output_ids.tolist())
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-5, rtol=0)
        if temperature == 0.0:
            with torch.no_grad():
                best = model(torch.tensor([prompt + found.output_ids.tolist()])).logits[0, len(prompt) - 1 : -1].max(-1)
                chosen = torch.tensor(found.output_ids.astype(np.int64))
                ours = model(torch.tensor([prompt + chosen.tolist()])).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(ours.gather(1, chosen[:, None])[:, 0], best.values, atol=1e-5)


@pytest.mark.e2e
def test_turns_reuse_the_prefix_and_still_equal_transformers(server: EngineServer, model: Any) -> None:
    rng = np.random.default_rng(7)

    async def episode(client: EngineClient, length: int) -> list[tuple[list[int], Generation]]:
        ids, turns = rng.integers(0, VOCAB - 1, length).tolist(), []
        for _ in range(4):
            turns.append((ids, await client.generate(ids, 7, [])))
            ids = ids + turns[-1][1].output_ids.tolist() + rng.integers(0, VOCAB - 1, 25).tolist()
        return turns

    async def work(client: EngineClient) -> list[list[tuple[list[int], Generation]]]:
        return await asyncio.gather(*(episode(client, 10 + 3 * i) for i in range(24)))

    for turns in with_client(server, work):
        for number, (prompt, found) in enumerate(turns):
            expected = reference(model, prompt, found.output_ids.tolist())
            np.testing.assert_allclose(found.logprobs, expected, atol=1e-5, rtol=0)
            if number:  # the previous turn except its last sampled token
                assert found.cached_tokens >= len(prompt) - 26


@pytest.mark.e2e
def test_score_equals_transformers(server: EngineServer, model: Any) -> None:
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, VOCAB, length).tolist() for length in (2, 9, 65, 130, CONTEXT)]

    async def work(client: EngineClient) -> list[Float32]:
        return await asyncio.gather(*(client.score(ids) for ids in sequences))

    for ids, found in zip(sequences, with_client(server, work), strict=True):
        np.testing.assert_allclose(found, reference(model, ids[:1], ids[1:]), atol=1e-5, rtol=0)


@pytest.mark.e2e
def test_ends_of_a_generation(server: EngineServer, model: Any) -> None:
    async def work(client: EngineClient) -> None:
        free = await client.generate([5, 6, 7, 8], 12, [], temperature=0.0)
        assert (free.finish_reason, len(free.output_ids)) == ("length", 12)
        stop = int(free.output_ids[2])
        first = free.output_ids.tolist().index(stop)
        stopped = await client.generate([5, 6, 7, 8], 12, [stop], temperature=0.0)
        assert stopped.finish_reason == "stop"
        assert stopped.output_ids.tolist() == free.output_ids[: first + 1].tolist()
        expected = reference(model, [5, 6, 7, 8], stopped.output_ids.tolist())
        np.testing.assert_allclose(stopped.logprobs, expected, atol=1e-5, rtol=0)
        for length in (CONTEXT - 1, CONTEXT - 10):  # the context can be filled to its last token
            full = await client.generate([9] * length, 400, [])
            assert full.finish_reason == "stop" or length + len(full.output_ids) == CONTEXT

    with_client(server, work)


def seeded(client: EngineClient, prompt: list[int], number: int) -> Awaitable[Generation]:
    return client.generate(prompt, 40, [], seed=1000 + number)


async def one_at_a_time(client: EngineClient, prompts: list[list[int]]) -> list[Generation]:
    return [await seeded(client, prompt, number) for number, prompt in enumerate(prompts)]


async def at_once(client: EngineClient, prompts: list[list[int]]) -> list[Generation]:
    return await asyncio.gather(*(seeded(client, prompt, number) for number, prompt in enumerate(prompts)))


async def among_others(client: EngineClient, prompts: list[list[int]]) -> list[Generation]:
    """Beside greedy requests and requests without a seed."""
    others = [client.generate(prompt[::-1], 60, [], temperature) for prompt in prompts for temperature in (0.0, 1.0)]
    beside = asyncio.gather(*others)
    found = await at_once(client, prompts)
    await beside
    return found


async def retracted(client: EngineClient, prompts: list[list[int]]) -> list[Generation]:
    """Interrupted up to five times, each time with keys and values thrown away."""
    running = asyncio.ensure_future(at_once(client, prompts))
    for number in range(5):
        await asyncio.sleep(0.05)
        if running.done():
            assert number, "nothing was interrupted"
            break
        await client.pause("retract")
        await client.flush()
        await client.resume()
    return await running


@pytest.mark.e2e
def test_a_request_is_answered_alike_whatever_runs_beside_it(server: EngineServer, model: Any) -> None:
    prompts = prompts_with_shared_prefixes(seed=4)[:32]

    async def work(client: EngineClient) -> None:
        await client.flush()
        base = await one_at_a_time(client, prompts)
        for play, is_warm in ((at_once, True), (at_once, False), (among_others, False), (retracted, False)):
            if not is_warm:
                await client.flush()
            found = await play(client, prompts)
            if is_warm:
                assert sum(generation.cached_tokens for generation in found) > 1000
            for one, other in zip(base, found, strict=True):
                assert one.output_ids.tolist() == other.output_ids.tolist(), play.__name__
                assert one.logprobs.tobytes() == other.logprobs.tobytes(), play.__name__

    with_client(server, work)


@pytest.mark.e2e
def test_seeds_decide_the_draws(server: EngineServer, model: Any) -> None:
    async def work(client: EngineClient) -> list[Generation]:
        return await asyncio.gather(*(client.generate([5, 6, 7], 20, [], seed=seed) for seed in (1, 1, 2, None, None)))

    one, again, other, free, freer = (found.output_ids.tolist() for found in with_client(server, work))
    assert one == again
    assert len({tuple(ids) for ids in (one, other, free, freer)}) == 4


@pytest.mark.e2e
def test_abort_all_returns_what_there_is(server: EngineServer, model: Any) -> None:
    async def work(client: EngineClient) -> list[Generation]:
        running = [asyncio.create_task(client.generate([11, 12], 250, [])) for _ in range(4)]
        await asyncio.sleep(0.2)
        await client.abort_all()
        return await asyncio.gather(*running)

    found = with_client(server, work)
    assert "abort" in {generation.finish_reason for generation in found}
    for generation in found:
        if len(generation.output_ids):
            expected = reference(model, [11, 12], generation.output_ids.tolist())
            np.testing.assert_allclose(generation.logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.e2e
def test_new_weights_in_the_middle_of_requests(server: EngineServer, folder: Path, model: Any) -> None:
    """Tokens have log-probabilities and version of the old weights before the swap, and of the new ones after it."""
    from transformers import Qwen3ForCausalLM

    changed = Qwen3ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    original = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    weights = {name: weight for name, weight in changed.state_dict().items() if name != "lm_head.weight"}
    prompts = prompts_with_shared_prefixes(seed=2)[:12]

    async def swap(client: EngineClient) -> list[Generation]:
        loop = asyncio.get_running_loop()
        with ReservedPort("127.0.0.1") as port:
            meeting = ("127.0.0.1", port.number)
            joined = loop.run_in_executor(None, join_update_group, *meeting, 0, 2, "weights", "gloo", 60.0)
            await client.init_group(*meeting, 1, 2, "weights", "gloo")
            group = await joined
        assert await client.checksums() == [checksums(original)]
        running = [asyncio.create_task(client.generate(prompt, 100, [])) for prompt in prompts]
        await asyncio.sleep(0.3)
        await client.pause("retract")
        await client.begin_update()
        sent = loop.run_in_executor(None, broadcast, weights.values(), group)
        names, dtypes = list(weights), ["float32"] * len(weights)
        await client.update_bucket(names, dtypes, [w.shape for w in weights.values()], "weights", 1, flush=True)
        await sent
        await client.end_update()
        await client.resume()
        found = await asyncio.gather(*running)
        assert (await client.version(), await client.checksums()) == (1, [checksums(weights)])
        await client.destroy_group("weights")
        leave_update_group(group)
        return found

    found = with_client(server, swap)
    assert any(set(generation.versions.tolist()) == {0, 1} for generation in found), "no request lived through the swap"
    for prompt, generation in zip(prompts, found, strict=True):
        output, versions = generation.output_ids.tolist(), generation.versions
        assert (np.diff(versions) >= 0).all()
        expected = np.where(versions == 0, reference(model, prompt, output), reference(changed, prompt, output))
        np.testing.assert_allclose(generation.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.e2e
def test_a_lost_server_is_a_clear_error(server: EngineServer) -> None:
    """This test must be the last one that uses `server`: it kills the server while a request runs."""
    group = server._process.pid
    members = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and in_group(int(p.name), group)]
    assert len(members) >= 3

    async def work(client: EngineClient) -> None:
        client.connect_timeout_s = 1.0
        request = asyncio.create_task(client.generate([3, 4], 250, []))
        await asyncio.sleep(0.1)
        for pid in members:
            if pid != group:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"/generate: .*connection"):
            await request
        assert "SIGKILL" in await asyncio.wait_for(asyncio.to_thread(server.watch), 30)
        with pytest.raises(RuntimeError, match="no connection"):
            await client.generate([3, 4], 4, [])

    with_client(server, work)
    server.stop()
    assert not any(running(pid) for pid in members)


def in_group(pid: int, group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid) == group
    return False


@pytest.mark.e2e
def test_a_server_that_can_not_start_shows_its_log(tmp_path: Path) -> None:
    engine = EngineServer(
        ServerSettings(CONFIG, str(tmp_path / "absent"), CONTEXT, str(tmp_path / "engine.log"), cpu=True)
    )
    with pytest.raises(RuntimeError, match=r"^engine ended with exit code 1") as caught:
        engine.start()
    assert re.fullmatch(r"engine .*absent.*, while it started; log: .*engine.log", str(caught.value))
    assert "last lines of" in caught.value.__notes__[0]
    assert engine.watch() != ""
    engine.stop()


def test_nobody_takes_the_port_of_a_server_that_still_imports(tmp_path: Path) -> None:
    engine = EngineServer(ServerSettings(CONFIG, str(tmp_path), CONTEXT, str(tmp_path / "engine.log"), cpu=True))
    address = ("127.0.0.1", int(engine.url.rsplit(":", 1)[1]))
    try:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
    finally:
        engine.stop()
    with socket.socket() as other:
        other.bind(address)


@pytest.mark.e2e
def test_stop_leaves_no_process(folder: Path, model: Any, tmp_path: Path) -> None:
    """This also holds while the server is still importing."""
    engine = EngineServer(
        ServerSettings(CONFIG, str(folder / "model"), CONTEXT, str(tmp_path / "engine.log"), cpu=True)
    )
    group = engine._process.pid
    wait_until(lambda: sum(in_group(int(p.name), group) for p in Path("/proc").iterdir() if p.name.isdigit()) > 1, 30)
    engine.stop()
    assert not engine.alive()
    wait_until(lambda: not any(in_group(int(p.name), group) for p in Path("/proc").iterdir() if p.name.isdigit()), 10)
