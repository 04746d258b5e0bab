"""The user's environment variables: proxies, another Ray cluster, temporary folders, paths with `~`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import getproxies, proxy_bypass

import pytest
from requests.utils import should_bypass_proxies

from launch import environment, local
from launch.config import ClusterConfig
from launch.environment import OTHER_RAY, direct, expand, forget_other_ray, temporary_problems
from launch.nodes import LOOPBACK, NodeError, look
from launch.preflight import problems
from machine.ports import ReservedPort
from rollout.engines.client import EngineClient
from rollout.engines.server import EngineServer, asks_for_key

NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses every connection
PROXIES = (
    "http_proxy",
    "HTTP_PROXY",
    "https_proxy",
    "HTTPS_PROXY",
    "all_proxy",
    "ALL_PROXY",
    "Http_Proxy",
    "grpc_proxy",
)
SPELLINGS = [*PROXIES, *environment.NO_PROXIES, *map(str.upper, environment.NO_PROXIES)]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SPELLINGS, *OTHER_RAY, "RAY_TMPDIR", "TMPDIR", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        monkeypatch.setenv(name, "")  # so that what a test removes comes back
        monkeypatch.delenv(name)


# Proxies -------------------------------------------------------------------------------------------------------------


class Answer(BaseHTTPRequestHandler):
    """A fake engine that answers every request with the same JSON."""

    def do_GET(self) -> None:
        body = b'{"weight_version": "7"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer((LOOPBACK, 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{LOOPBACK}:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("excepted", ["", "example.org"])
def test_no_request_to_an_engine_follows_a_proxy(monkeypatch: pytest.MonkeyPatch, url: str, excepted: str) -> None:
    for name in SPELLINGS:
        monkeypatch.setenv(name, excepted if name.lower().startswith("no") else NOWHERE)
    server = object.__new__(EngineServer)
    server.url, server._key = url, ""
    assert server._healthy()
    assert asks_for_key(url) is False

    async def version() -> int:
        async with EngineClient(url, 10, 10, connect_timeout_s=5.0) as client:
            return await client.version()

    assert asyncio.run(version()) == 7


@pytest.mark.parametrize("name", PROXIES)
def test_each_proxy_leaves_the_nodes_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, NOWHERE)
    monkeypatch.setenv("NO_PROXY", "corp.example, 10.1.0.0/16")
    for variable, value in direct(["10.0.0.2", "fd00::2"]).items():
        monkeypatch.setenv(variable, value)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    for host in ("127.0.0.1", "localhost", "10.0.0.2", "www.corp.example"):
        assert proxy_bypass(host), host
        assert should_bypass_proxies(f"http://{host}:3000/health", None), host
    assert should_bypass_proxies("http://10.1.2.3/", None)
    assert not proxy_bypass("api.wandb.ai")
    assert not should_bypass_proxies("https://api.wandb.ai", None)
    assert name.lower() == "grpc_proxy" or NOWHERE in getproxies().values()  # the world outside keeps its proxy


def test_exceptions_of_the_user_stay() -> None:
    proxy = {"HTTP_PROXY": NOWHERE}
    ours = "localhost,127.0.0.1,::1"
    assert direct(["10.0.0.2"], {}) == {}
    assert direct(["10.0.0.2"], {"http_proxy": "", "no_proxy": "a"}) == {}
    assert direct([], proxy) == {"no_proxy": ours, "NO_PROXY": ours}
    assert direct([], {**proxy, "no_proxy": "a", "NO_PROXY": "b"}) == {"no_proxy": f"a,{ours}", "NO_PROXY": f"b,{ours}"}
    assert direct([], {**proxy, "no_proxy": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}
    grpc = direct(["h"], {**proxy, "no_grpc_proxy": "h"})
    assert grpc["no_grpc_proxy"] == f"h,{ours}"
    assert direct(["h"], {**proxy, **direct(["h"], proxy)}) == direct(["h"], proxy)  # once is enough


def test_nodes_get_the_addresses_of_all_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launch import nodes

    (tmp_path / "marker").write_text("marker")
    (tmp_path / "config.json").write_text("{}")
    files = str(tmp_path / "marker"), str(tmp_path / "config.json"), nodes._digest(tmp_path / "config.json")
    monkeypatch.setenv("https_proxy", NOWHERE)
    monkeypatch.setenv("no_proxy", "of.this.node")
    _, variables = look("10.0.0.3", *files, ["10.0.0.2", "10.0.0.3"])
    assert variables["no_proxy"] == variables["NO_PROXY"] == "of.this.node,localhost,127.0.0.1,::1,10.0.0.2,10.0.0.3"


# Another Ray ---------------------------------------------------------------------------------------------------------


def test_what_belongs_to_another_ray_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTHER_RAY:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("RAY_LOG_TO_STDERR", "1")  # a setting of Ray's, not of another Ray
    monkeypatch.setenv("TMPDIR", "")
    forget_other_ray()
    assert not set(OTHER_RAY) & set(os.environ)
    assert "TMPDIR" not in os.environ
    assert os.environ["RAY_LOG_TO_STDERR"] == "1"


def test_ray_is_started_here_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(local.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local.ray, "init", lambda **options: asked.append({**os.environ, **options}))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    monkeypatch.setenv("http_proxy", NOWHERE)
    try:
        local.start_ray(ClusterConfig())
        (seen,) = asked
        assert seen["address"] == "local"
        assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN"} & set(seen)
        assert seen["RAY_grpc_enable_http_proxy"] == "0"
        assert seen["http_proxy"] == NOWHERE
        assert {LOOPBACK, local.ray.util.get_node_ip_address()} <= set(seen["no_proxy"].split(","))
    finally:
        local.stop_ray()


@pytest.mark.parametrize("address", ["10.0.0.1", "ray://10.0.0.1:10001"])
def test_auto_is_the_cluster_that_ray_address_names(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(NodeError, match=f"cluster.ray_address={address} is not"):
        local.start_ray(ClusterConfig(ray_address="auto"))
    with ReservedPort(LOOPBACK) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"{LOOPBACK}:{port.number}")
        with pytest.raises(NodeError, match=f"{LOOPBACK}:{port.number}: can.t connect "):
            local.start_ray(ClusterConfig(ray_address="auto"))


# Folders for temporary files -----------------------------------------------------------------------------------------


def folder_of(size: int, parent: Path = Path("/tmp")) -> Path:
    """Return a path of `size` characters."""
    return parent / ("x" * (size - len(str(parent)) - 1))


@pytest.fixture
def every_folder_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    monkeypatch.setattr(os, "access", lambda path, mode: True)


@pytest.mark.usefixtures("every_folder_is_there")
def test_the_longest_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(folder_of(100)))
    (line,) = temporary_problems()
    assert "has 100 characters" in line
    longest = int(line.partition("use at most ")[2].partition(",")[0])
    monkeypatch.setenv("TMPDIR", str(folder_of(longest)))
    assert temporary_problems() == []
    monkeypatch.setenv("TMPDIR", f"{folder_of(longest)}/")
    assert temporary_problems() == []
    monkeypatch.setenv("TMPDIR", str(folder_of(longest + 1)))
    assert len(temporary_problems()) == 1
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray's sockets have the longest names
    assert temporary_problems() == []
    monkeypatch.setenv("TMPDIR", str(folder_of(80)))
    assert "TMPDIR=" in temporary_problems()[0]
    monkeypatch.setenv("RAY_TMPDIR", str(folder_of(longest + 1)))
    assert [line.partition("=")[0] for line in temporary_problems()] == ["TMPDIR", "RAY_TMPDIR"]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("tmp", "TMPDIR=tmp is not an absolute path"),
        ("~/tmp", "is not an absolute path"),
        ("/tmp/ö", "has non-ASCII characters"),
        ("/absent/tmp", "TMPDIR=/absent/tmp: no such folder"),
        ("/etc/hostname", "no such folder"),
        ("/proc/self", "may not write there"),
        ("", ""),
        ("/tmp", ""),
    ],
)
def test_a_folder_that_can_not_be_used_is_told_before_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str, part: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))  # root may everything
    monkeypatch.setenv("TMPDIR", value)
    told = [line for line in problems(ClusterConfig(min_memory_gb=0, min_disk_gb=0)) if "TMPDIR" in line]
    assert len(told) == bool(part)
    assert all(part in line for line in told)
    assert problems(ClusterConfig(min_disk_gb=0, ray_address="10.0.0.1:6379")) == []  # nothing lies there then


# Paths ---------------------------------------------------------------------------------------------------------------


def test_home_folders_and_variables_are_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert expand("~/runs") == "/home/someone/runs"
    assert expand("~") == "/home/someone"
    assert expand("$SCRATCH/runs") == expand("${SCRATCH}/runs") == "/scratch/runs"
    assert expand("runs/a~b") == "runs/a~b"
    assert expand("") == ""
    with pytest.raises(ValueError, match="~nobody-here/runs starts with the home folder of a user"):
        expand("~nobody-here/runs")
    with pytest.raises(ValueError, match=r"no environment variable \$NOT_SET"):
        expand("$NOT_SET/runs")
