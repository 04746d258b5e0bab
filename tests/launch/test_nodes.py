"""Several machines: placement, shared files, and a run on two nodes of a Ray cluster on this machine."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import every_process
from runs import START_S, Place, Run, rows_of
from tree import ROOT

from launch import local, nodes
from launch.config import ClusterConfig
from launch.local import start_ray
from launch.nodes import LOOPBACK, Bundles, Node, NodeError, ProcessOptions, interface_of, look, place
from machine.ports import ReservedPort
from rollout.engines.server import KEY_VARIABLE, asks_for_key
from slime.config import ConfigError, load
from slime.config.nodes import bundles, placed
from slime.start.placement import SHARE, placement

GPUS = ["recipe=ppo_coding", "model=qwen3_8b", "cluster=gpu_2x8"]

# Arithmetic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "num_nodes", "gpus", "expected"),
    [
        # the larger blocks choose first; ranks that do not fit on a node go on, in order, on the next
        ([Bundles("policy", 4, 1), Bundles("engines", 1, 2)], 2, 3, {"engines": [0], "policy": [0, 1, 1, 1]}),
        # a role that fits on one node is not torn, though it could begin on the first
        ([Bundles("policy", 3, 2), Bundles("critic", 2, 2)], 2, 8, {"policy": [0, 0, 0], "critic": [1, 1]}),
        (
            [Bundles("policy", 8, 2), Bundles("engines", 4, 4)],
            4,
            8,
            {"engines": [0, 0, 1, 1], "policy": [2] * 4 + [3] * 4},
        ),
        # on CPUs: as evenly as it goes
        ([Bundles("policy", 3, 1), Bundles("engines", 1, 1)], 2, 0, {"policy": [0, 0, 1], "engines": [1]}),
        ([Bundles("policy", 1, 1), Bundles("engines", 1, 2)], 2, 0, {"engines": [0], "policy": [1]}),
        ([Bundles("policy", 5, 1), Bundles("critic", 5, 1)], 1, 0, {"policy": [0] * 5, "critic": [0] * 5}),
        ([Bundles("engines", 3, 2)], 2, 0, {"engines": [0, 0, 1]}),  # 3 slots a node would hold one each
    ],
)
def test_places(wanted: list[Bundles], num_nodes: int, gpus: int, expected: dict[str, list[int]]) -> None:
    assert place(wanted, num_nodes, gpus) == expected


def fits(sizes: Sequence[int], free: tuple[int, ...]) -> bool:
    """Return whether the blocks fit on the nodes, by brute force."""
    if not sizes:
        return True
    chances = {room for room in free if room >= sizes[0]}
    where = (free.index(room) for room in chances)
    return any(fits(sizes[1:], (*free[:node], free[node] - sizes[0], *free[node + 1 :])) for node in where)


def test_what_has_a_place_is_placed() -> None:
    """For sizes that divide each other, ranks stay in order and no node is overcommitted."""
    refused = 0
    counts = itertools.product(range(4), repeat=3)
    for (fours, twos, ones), num_nodes, gpus in itertools.product(counts, (1, 2, 3), (4, 5, 6)):
        wanted = [Bundles("a", ones, 1), Bundles("b", twos, 2), Bundles("c", fours, 4)]
        possible = fits([4] * fours + [2] * twos + [1] * ones, (gpus,) * num_nodes)
        try:
            found = place(wanted, num_nodes, gpus)
        except ValueError:
            assert not possible, (wanted, num_nodes, gpus)
            refused += 1
            continue
        assert {name: len(blocks) for name, blocks in found.items()} == {"a": ones, "b": twos, "c": fours}
        assert all(blocks == sorted(blocks) for blocks in found.values())
        for node in range(num_nodes):
            assert sum(one.num_gpus * found[one.name].count(node) for one in wanted) <= gpus
    assert 0 < refused < 576


# Config --------------------------------------------------------------------------------------------------------------


def test_the_cluster_file_of_two_nodes_fills_them() -> None:
    config = load(GPUS, None).config
    found = placed(config)
    taken = [sum(one.num_gpus * found[one.name].count(node) for one in bundles(config)) for node in range(2)]
    assert taken == [8, 8]
    assert all(len(set(found[role])) == 1 for role in ("policy", "critic"))  # their sums stay on a node


def test_bundles_of_a_run() -> None:
    both = ["policy.kl_coef=0.1", "policy.layout.num_processes=4", "critic.layout.num_processes=2"]
    wanted = {one.name: (one.count, one.num_gpus) for one in bundles(load([*GPUS, *both], None).config)}
    assert wanted["reference"] == wanted["policy"] == (2, 2)
    assert wanted["critic"] == (1, 2)
    for cluster, names in (("gpu_1", ["shared"]), ("gpu_2", ["shared", "rollout.engine"])):
        config = load(["recipe=ppo_coding", f"cluster={cluster}"], None).config
        assert [one.name for one in bundles(config)] == names


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cluster.ray_address=''"], ["cluster.num_nodes=2", "cluster.ray_address=auto"]),
        (  # 6 + 6 + 4 = 16 GPUs, but no node has 4 left
            [
                *("rollout.engine.num_engines=2", "rollout.engine.tensor_parallel=6"),
                *("policy.layout.num_processes=4", "policy.megatron.tensor_parallel=4"),
                *("advantage.baseline=reinforce_pp", "critic.layout.num_processes=2"),
            ],
            [
                "1 of policy's 1 blocks of 4 GPUs",
                "free GPUs per node: 2, 2; ",
                "the nearest that works is cluster.num_nodes=3",
            ],
        ),
        (  # 8 + 8 + 6: counted
            [
                *("rollout.engine.num_engines=1", "rollout.engine.tensor_parallel=6"),
                *("policy.layout.num_processes=8", "policy.megatron.tensor_parallel=8"),
                *("critic.layout.num_processes=8", "critic.megatron.tensor_parallel=8"),
            ],
            ["22 GPUs", "gpus_per_node*num_nodes=8*2=16"],
        ),
        (["rollout.engine.tensor_parallel=16"], ["rollout.engine.tensor_parallel=16", "at most 8"]),
    ],
)
def test_what_does_not_fit_the_nodes_is_refused(overrides: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load([*GPUS, *overrides], None)
    assert [part for part in told if part not in str(refusal.value)] == []


# What nodes must see -------------------------------------------------------------------------------------------------


def test_a_node_must_see_folder_and_model(tmp_path: Path) -> None:
    run_dir, model = tmp_path / "run", tmp_path / "model" / "config.json"
    run_dir.mkdir()
    model.parent.mkdir()
    model.write_text("{}")
    marker = run_dir / "marker"
    ask = partial(look, "203.0.113.9", str(marker), str(model), addresses=())
    digest = nodes._digest(model)
    assert "does not see the run's folder" in ask(digest)[0]
    marker.write_text("of another run")
    assert "does not see the run's folder" in ask(digest)[0]
    marker.write_text("marker")
    assert ask(digest) == ("", {})
    model.write_text("{'another': 1}")
    assert "does not see the model" in ask(digest)[0]
    model.unlink()
    assert "does not see the model" in ask(digest)[0]


def test_gloo_is_told_the_interface_of_the_nodes_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert interface_of("203.0.113.9") == ""
    loopback = interface_of(LOOPBACK)
    assert loopback in psutil.net_if_addrs()
    (tmp_path / "marker").write_text("marker")
    (tmp_path / "config.json").write_text("{}")
    files = str(tmp_path / "marker"), str(tmp_path / "config.json"), nodes._digest(tmp_path / "config.json")
    monkeypatch.delenv(nodes.GLOO_INTERFACE, raising=False)
    assert look(LOOPBACK, *files, []) == ("", {nodes.GLOO_INTERFACE: loopback})
    monkeypatch.setenv(nodes.GLOO_INTERFACE, "eth7")  # the user's own choice stands
    assert look(LOOPBACK, *files, []) == ("", {})


def test_options_of_processes() -> None:
    here = ProcessOptions()
    assert (here.ray(), here.address) == ({"num_cpus": 0, "num_gpus": 0.0}, LOOPBACK)
    there = ProcessOptions(1, Node("bb" * 28, "10.0.0.2", {"A": "1"}))
    assert there.address == "10.0.0.2"
    options = there.ray()
    assert (options["scheduling_strategy"].node_id, options["scheduling_strategy"].soft) == ("bb" * 28, False)
    assert (options["num_gpus"], options["runtime_env"]) == (1, {"env_vars": {"A": "1"}})


def test_placement_of_a_run_on_nodes() -> None:
    nodes = [Node(letter * 56, letter) for letter in "ab"]
    config = load([*GPUS, "rollout.num_workers=3"], None).config
    where, blocks = placement(config, nodes), placed(config)
    assert [one.node for one in where.policy] == [
        nodes[n] for n in blocks["policy"] for _ in range(config.policy.megatron.tensor_parallel)
    ]
    assert [one.node for one in where.engines] == [nodes[n] for n in blocks["rollout.engine"]]
    assert {one.num_gpus for one in where.engines} == {config.rollout.engine.tensor_parallel}
    assert [one.node for one in where.rollout] == [nodes[0], nodes[1], nodes[0]]
    assert (where.buffer.node, where.reference, where.spans_nodes) == (nodes[0], (), True)


def test_placement_on_this_machine() -> None:
    where = placement(load(["recipe=ppo_coding", "policy.kl_coef=0.1"], None).config)
    processes = (*where.engines, *where.policy, *where.reference, *where.critic, *where.rollout, where.buffer)
    assert processes == (ProcessOptions(),) * 6
    shared = placement(load(["recipe=ppo_coding", "cluster=gpu_1"], None).config)
    assert {one.num_gpus for one in (*shared.engines, *shared.policy, *shared.critic)} == {SHARE}
    warm_start = placement(load(["recipe=sft_coding"], None).config)
    assert (warm_start.engines, warm_start.critic, len(warm_start.policy)) == ((), (), 1)


def test_a_run_for_cpus_hides_the_machines_gpus_from_its_processes() -> None:
    assert local._of_processes(ClusterConfig(gpus_per_node=0))["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in local._of_processes(ClusterConfig(gpus_per_node=1))


@pytest.mark.parametrize(("status", "refused"), [(200, False), (403, False), (401, True)])
def test_an_engine_that_asks_for_no_key_is_noticed(status: int, refused: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer((LOOPBACK, 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert asks_for_key(f"http://{LOOPBACK}:{server.server_port}") is refused
        thread.join(timeout=10)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", "10.0.0.1:gcs", "NOBODY"])
def test_a_cluster_that_is_not_there_is_told_at_once(address: str) -> None:
    with ReservedPort(LOOPBACK) as port:
        address = address.replace("NOBODY", f"{LOOPBACK}:{port.number}")
        with pytest.raises(NodeError, match=re.escape(f"cluster.ray_address={address}")):
            start_ray(ClusterConfig(ray_address=address))


# Two nodes -----------------------------------------------------------------------------------------------------------

NODES = ("127.0.0.2", "127.0.0.3")
NODE_GPUS = 3  # said to be there: nothing of the run asks for them, `PROBE` does
STEPS, EPISODES, RANKS = 2, 6, 3
RUN = [
    *("recipe=ppo_coding", "run=nodes", f"steps={STEPS}", "model.start=''"),
    *("task.target=partial_credit:PartialCredit", "advantage.baseline=reinforce_pp"),
    *(f"buffer.episodes_per_step={EPISODES}", "policy.num_minibatches=1", f"policy.layout.num_processes={RANKS}"),
    "policy.entropy_coef=0.01",  # pulls also where no episode got a reward
    *("eval.num_tasks=4", "eval.every=0", "checkpoint.every=0", "tracking.wandb=false"),
]
# After the run, from a process of its own: who was where, and what Ray makes of options with GPUs.
PROBE = f"""
import json, sys
import ray
from ray._private import state
from launch.config import ClusterConfig
from launch.local import start_ray
from launch.nodes import Bundles, NodeError, ProcessOptions, find_nodes, place

cluster = ClusterConfig(num_nodes=2, gpus_per_node={NODE_GPUS}, ray_address=sys.argv[1])
start_ray(cluster)
actors = [(a["ActorClassName"], a["Address"]["IPAddress"], a["State"]) for a in state.actors().values()]
found = find_nodes(cluster)
placed = place([Bundles("engines", 1, 2), Bundles("policy", 4, 1)], 2, {NODE_GPUS})

@ray.remote(num_cpus=0)
class Probe:
    def where(self):
        return ray.util.get_node_ip_address(), len(ray.get_gpu_ids())

sizes = [("engines", 0, 2), *(("policy", rank, 1) for rank in range(4))]
made = [Probe.options(**ProcessOptions(gpus, found[placed[role][block]]).ray()).remote() for role, block, gpus in sizes]
where = ray.get([probe.where.remote() for probe in made], timeout=120)
try:
    full = find_nodes(cluster, wait_s=2.0)
except NodeError as error:
    full = str(error)
print(json.dumps([actors, [node.address for node in found], where, full]))
"""


@dataclass
class Cluster:
    """Two `ray start` processes with one token."""

    folder: Path
    address: str
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *arguments: str, inside: Sequence[str] = (), **variables: str) -> None:
        """Start a node; `inside`: the command that runs its command."""
        log = self.folder / f"node_{len(self.started)}.log"
        command = [*inside, str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments]
        command += ["--num-cpus=1", f"--num-gpus={NODE_GPUS}", f"--object-store-memory={100 << 20}"]
        # A node's variables are those of its processes; one core for each.
        environment = {**os.environ, **self.environment, "OMP_NUM_THREADS": "1", **variables}
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # empty here, and then a node may not claim GPUs
        with log.open("wb") as out:
            self.started.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
            )
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert self.started[-1].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        """Only what was started here: `ray stop` would end other clusters, too."""
        family = [p for one in self.started for p in _family(one.pid)]
        for one in self.started:
            one.send_signal(signal.SIGTERM)
        _, late = psutil.wait_procs(family, timeout=20)
        for process in late:
            process.kill()
        for one in self.started:
            one.wait(timeout=20)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def cluster(place: Place) -> Iterator[Cluster]:
    folder = place.temporary / "nodes"
    folder.mkdir()
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": "of.the.node", "NO_PROXY": ""}
    port = ReservedPort(NODES[0])
    made = Cluster(folder, f"{NODES[0]}:{port.number}", environment)
    head = ["--head", f"--port={port.number}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
    try:
        made.start(f"--node-ip-address={NODES[0]}", *head)
        made.start(f"--node-ip-address={NODES[1]}", f"--address={made.address}")
        yield made
    finally:
        made.stop()
        port.close()


@dataclass
class Seen:
    """Observations of the run's engine."""

    url: str
    key: str
    commands: list[str]  # of all processes of this machine
    answers: dict[str, int]  # status of requests
    no_proxy: set[str]  # what the engine reaches without its node's proxy


def ask(url: str, path: str, key: str | None = None, method: str = "GET") -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def handshake(url: str, path: str) -> int:
    """Status that a websocket is answered with; 101: it is open."""
    host, _, port = url.removeprefix("http://").partition(":")
    wish = [f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
    wish += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall("\r\n".join([*wish, "", ""]).encode())
        return int(line.recv(1024).split()[1])


def look_at_engine(run_dir: Path) -> Seen:
    everyone = [(process, process.info["cmdline"] or []) for process in every_process(["cmdline"])]
    log = str(run_dir / "logs" / "engine_0.log")
    leash, _ = [  # two processes, one of which follows the other
        process
        for process, command in everyone
        if "--host" in command
        and "rollout.engines.leash" in command
        and any(file == log for file in (os.readlink(f"/proc/{process.pid}/fd/1"),))
    ]
    command = leash.cmdline()
    host, port = (command[command.index(name) + 1] for name in ("--host", "--port"))
    variables = leash.environ()
    url, key, no_proxy = f"http://{host}:{port}", variables[KEY_VARIABLE], set(variables["no_proxy"].split(","))
    answers = {
        "read, no key": ask(url, "/model_info"),
        "read, another key": ask(url, "/model_info", secrets.token_hex(32)),
        "order, no key": ask(url, "/flush_cache", method="POST"),
        "generate, no key": ask(url, "/generate", method="POST"),
        "websocket, no key": handshake(url, "/v1/realtime"),
        "read, key": ask(url, "/model_info", key),
        "health, no key": ask(url, "/health"),
        "another address": 0,
    }
    try:
        ask(f"http://{LOOPBACK}:{port}", "/health")
    except urllib.error.URLError:
        answers["another address"] = -1
    return Seen(url, key, [" ".join(command) for _, command in everyone], answers, no_proxy)


@dataclass
class Story:
    run_dir: Path
    seen: Seen
    actors: list[tuple[str, str, str]]  # class, node, state
    addresses: list[str]
    probes: list[tuple[str, int]]  # node, number of GPUs
    full: str


@pytest.fixture(scope="module")
def story(place: Place, cluster: Cluster) -> Story:
    run_dir = place.run_dir("nodes")
    settings = [f"cluster.ray_address={cluster.address}", "cluster.num_nodes=2"]
    with Run(place, *RUN, *settings, environment=cluster.environment) as run:
        run.wait_until(lambda: bool(rows_of(run_dir / "metrics.jsonl")), "the first evaluation", START_S)
        with run.held():
            seen = look_at_engine(run_dir)
        run.finish()
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, cluster.address],
        env={**os.environ, **cluster.environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr
    actors, addresses, probes, full = json.loads(probe.stdout.splitlines()[-1])
    return Story(run_dir, seen, [tuple(a) for a in actors], addresses, [tuple(p) for p in probes], full)


@pytest.mark.e2e
def test_a_run_over_two_nodes_trains(story: Story) -> None:
    rows = rows_of(story.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        assert row["policy/grad_norm"] > 0
        assert row["rollout/num_episodes"] == EPISODES
        assert 0 < row["policy/engine_logprob_diff_max"] <= 1e-4  # the weights came to the engine's node
    assert (story.run_dir / "model" / "model.safetensors").is_file()


@pytest.mark.e2e
def test_a_proxy_of_the_nodes_is_for_the_world_outside(story: Story) -> None:
    assert story.seen.no_proxy == {"of.the.node", "localhost", "::1", LOOPBACK, *NODES}


@pytest.mark.e2e
def test_processes_lie_where_they_were_placed(story: Story) -> None:
    """There are three ranks and one engine on two nodes; the third rank is on the second node."""
    where = sorted((name, node) for name, node, _ in story.actors)
    first, second = NODES
    assert where == [
        ("BufferActor", first),
        ("EngineServer", second),
        *(("NodeCheck", node) for node in NODES),  # before all others
        *(("PolicyWorker", node) for node in (first, first, second)),
        ("RolloutWorker", first),
    ]
    assert {state for *_, state in story.actors} == {"DEAD"}  # nothing of the run outlives it on the cluster


@pytest.mark.e2e
def test_engines_serve_the_run_alone(story: Story) -> None:
    seen = story.seen
    assert seen.url.startswith(f"http://{NODES[1]}:")
    # Where the server knows websockets the engine has none; else the request is one like any other.
    assert seen.answers.pop("websocket, no key") in (401, 403)
    assert seen.answers == {
        **dict.fromkeys(("read, no key", "read, another key", "order, no key", "generate, no key"), 401),
        **dict.fromkeys(("read, key", "health, no key"), 200),
        "another address": -1,
    }
    assert len(seen.key) == 64
    assert not [command for command in seen.commands if seen.key in command]
    told = [
        path for path in story.run_dir.rglob("*") if path.is_file() and seen.key in path.read_text(errors="replace")
    ]
    assert told == []
    with pytest.raises(urllib.error.URLError):
        ask(seen.url, "/health")  # it has ended with the run


@pytest.mark.e2e
def test_gpus_are_taken_on_the_node_that_was_meant(story: Story) -> None:
    first, second = NODES
    assert story.addresses == [first, second]
    assert story.probes == [(first, 2), (first, 1), (second, 1), (second, 1), (second, 1)]
    assert f"{first} with 0 free GPUs, {second} with 0 free GPUs" in story.full


# slime doctor --------------------------------------------------------------------------------------------------------

BAD_NODE = "127.0.0.4"
BAD_INTERFACE = "nosuch0"


def doctor(cluster: Cluster, folder: Path, num_nodes: int) -> tuple[int, dict[str, list[tuple[str, str, str]]]]:
    """Return the exit code and, by check, node, level and text of the findings about nodes."""
    return doctor_at(cluster.address, cluster.environment, folder, num_nodes)


def doctor_at(
    address: str, environment: dict[str, str], folder: Path, num_nodes: int
) -> tuple[int, dict[str, list[tuple[str, str, str]]]]:
    settings = [f"cluster.ray_address={address}", f"cluster.num_nodes={num_nodes}", f"runs_dir={folder}"]
    settings += [f"cache_dir={folder}", "cluster.min_memory_gb=0", "cluster.min_disk_gb=0", "rollout.num_workers=2"]
    done = subprocess.run(
        [sys.executable, "-m", "slime.cli", "doctor", "recipe=ppo_coding", *settings, "--json"],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.stdout.startswith("["), done.stderr
    found: dict[str, list[tuple[str, str, str]]] = {}
    for one in json.loads(done.stdout):
        if one["node"] or one["check"] == "nodes":
            found.setdefault(one["check"], []).append((one["node"], one["level"], one["text"]))
    return done.returncode, found


@pytest.mark.e2e
def test_a_cluster_that_is_not_there_is_a_problem_with_its_cure(tmp_path: Path) -> None:
    with ReservedPort(LOOPBACK) as port:
        code, found = doctor_at(f"{LOOPBACK}:{port.number}", {"SLURM_JOB_ID": "7"}, tmp_path, 2)
    ((_, level, text),) = found["nodes"]
    assert (code, level, list(found)) == (1, "problem", ["nodes"])
    assert f"cluster.ray_address={LOOPBACK}:{port.number}: can't connect" in text
    assert text.endswith("`slime submit slurm` starts Ray on its job's nodes and checks them")


@pytest.mark.e2e
def test_nodes_that_are_fit_are_found_so(cluster: Cluster, tmp_path: Path) -> None:
    code, found = doctor(cluster, tmp_path, 2)
    assert [one for many in found.values() for one in many if one[1] == "problem"] == []
    assert code == 0
    both = ", ".join(NODES)
    for check in ("versions", "shared folders", "clock", "network", "resources", "sandbox", "all-reduce"):
        assert {node for node, *_ in found[check]} == {both}, check
    assert f"runs_dir,cache_dir={tmp_path} is read at " in found["shared folders"][0][2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
def test_a_node_that_is_not_fit_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """It has another disk in the place of the runs' folder, and no interface for gloo."""
    mounted = f'mount -t tmpfs none {tmp_path} && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"]
    node = [f"--node-ip-address={BAD_NODE}", f"--address={cluster.address}"]
    cluster.start(*node, inside=inside, GLOO_SOCKET_IFNAME=BAD_INTERFACE)
    code, found = doctor(cluster, tmp_path, 3)
    assert code == 1
    (folders,), (reduced,) = found["shared folders"], found["all-reduce"]
    assert folders[:2] == (BAD_NODE, "problem")
    assert folders[2].startswith(f"runs_dir,cache_dir={tmp_path} does not show the files of the machine")
    assert reduced[:2] == (BAD_NODE, "problem")
    assert BAD_INTERFACE in reduced[2]
    assert {one[1] for check in ("versions", "network") for one in found[check]} == {"ok"}
