"""Several nodes: what is judged of their answers, and a node that gives none."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from launch.config import ClusterConfig
from launch.doctor import shared
from launch.doctor.collective import EndedRank, judged
from launch.doctor.compare import NodeClock, alike, clocks, differing, judged_replies, unreached
from launch.doctor.finding import Finding, Level, Needs, named, ok, problem
from launch.doctor.machine import WRITE_BYTES
from launch.doctor.node import NodeCheck, NodeView
from launch.doctor.nodes import NodeChecks
from launch.doctor.rank import JOINED, SUMMED
from launch.doctor.software import DRIVER, SOURCE, versions
from launch.nodes import LOOPBACK
from machine.actors import handle

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def only(found: list[Finding]) -> Finding:
    (one,) = found
    assert "\n" not in one.text
    return one


def test_many_nodes_are_named_in_short() -> None:
    assert named([A, B, C]) == f"{A}, {B}, {C}"
    assert named([A, B, C, *"defg"]) == f"{A}, {B}, {C} and 4 more"


def test_findings_that_are_equal_become_one() -> None:
    found = alike(
        {
            A: [*ok("resources", "2 CPUs"), *ok("ports", "fine")],
            B: [*ok("resources", "4 CPUs"), *problem("ports", "none")],
            C: [*ok("resources", "2 CPUs"), *problem("ports", "none")],
        }
    )
    assert [(one.check, one.level.value, one.node) for one in found] == [
        ("resources", "ok", f"{A}, {B}, {C}"),
        ("ports", "ok", A),
        ("ports", "problem", f"{B}, {C}"),
    ]


def test_a_version_that_differs_is_named_with_its_nodes() -> None:
    here = {"python": "3.11.7", "torch": "2.8.0", DRIVER: "for CUDA 13.0"}
    same = only(differing({A: here, B: here}, here))
    assert (same.level, same.node) == (Level.ok, f"{A}, {B}")
    older = here | {"torch": "2.7.1", DRIVER: "for CUDA 12.8"}
    torch, driver = differing({A: here, B: older, C: older}, here)
    assert (torch.level, torch.node, driver.level) == (Level.problem, f"{B}, {C}", Level.warning)
    assert torch.text.startswith("torch is 2.7.1, and 2.8.0 where the run starts: ")
    assert only(differing({B: {name: here[name] for name in ("python", DRIVER)}}, here)).text.startswith(
        "torch is unknown"
    )


def test_versions_tell_the_projects_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert found["torch"].startswith("2.")
    assert found == versions()
    (tmp_path / "launch" / "doctor").mkdir(parents=True)
    monkeypatch.setattr("launch.doctor.software.__file__", str(tmp_path / "launch" / "doctor" / "software.py"))
    other = versions()
    assert {name for name in found if found[name] != other[name]} == {SOURCE}


def test_a_clock_is_wrong_by_more_than_the_round_trip_explains() -> None:
    fine = {A: NodeClock(0.2, 0.1), B: NodeClock(-3.0, 2.5)}  # of B nothing is known but that 0.5 s are missing
    assert only(clocks(fine)).level is Level.ok
    late = only(clocks(fine | {C: NodeClock(-3.0, 0.5)}))
    assert (late.level, late.node) == (Level.warning, C)
    assert late.text.startswith("the clock is 2.5 s or more behind that where the run starts")
    assert "ahead of" in only(clocks({A: NodeClock(1.5, 0.1)})).text
    assert only(clocks({A: None})).text.startswith("the clock was not told")


def test_nodes_that_do_not_reach_each_other_are_told() -> None:
    assert only(unreached({A: {}, B: {}})).level is Level.ok
    found = unreached({A: {}, B: {A: "timed out", C: "timed out"}, C: {A: "Connection refused"}})
    assert [(one.node, one.text.partition(":")[0]) for one in found] == [
        (B, f"no connection to {A}, {C} (timed out)"),
        (C, f"no connection to {A} (Connection refused)"),
    ]


def test_the_rank_to_blame_names_its_node() -> None:
    done = EndedRank(0, (JOINED, SUMMED), A)
    assert judged([done, replace(done, node=B)], "gloo", 1.0)[0].text.startswith("gloo between 2 processes on 2 nodes")
    broken = EndedRank(1, ("RuntimeError: no interface",), B)
    follows = EndedRank(1, (JOINED, "RuntimeError: connection closed"), A)
    one = only(judged([follows, broken], "gloo", 1.0))
    assert (one.level, one.node) == (Level.problem, B)
    assert "rank 1 failed: RuntimeError: no interface" in one.text
    one = only(judged([EndedRank(None, (JOINED,), A), EndedRank(None, (), B)], "nccl", 90.0))
    assert (one.node, "rank 1 did not come in 90 s" in one.text) == (B, True)


# Shared folders ------------------------------------------------------------------------------------------------------


def test_a_file_goes_to_a_node_and_back(tmp_path: Path) -> None:
    offered = shared.offer("runs_dir", tmp_path, 4096)
    answer = shared.reply(offered, "1", 0.0)
    assert shared.received(offered, answer, 0.0) == ""
    assert only(judged_replies(offered, {B: answer})).level is Level.ok
    Path(answer.path).write_text("of another disk")
    assert "a file written there is not seen on this machine: mount" in shared.received(offered, answer, 0.0)
    elsewhere = replace(offered, path=str(tmp_path / "other" / "file"))
    refused = shared.reply(elsewhere, "1", 0.0)
    assert refused.problem.startswith(f"runs_dir={tmp_path / 'other'} does not show the files")
    found = only(judged_replies(elsewhere, {A: refused, B: refused}))
    assert (found.level, found.node) == (Level.problem, f"{A}, {B}")
    shared.remove(offered)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_shown_late_is_waited_for(tmp_path: Path) -> None:
    offered = shared.offer("runs_dir", tmp_path, 4096)
    moved = Path(offered.path).rename(tmp_path / "later")
    timer = threading.Timer(0.5, lambda: moved.rename(offered.path))
    timer.start()
    assert shared.reply(offered, "1", 60.0).problem == ""
    timer.join()


def test_a_slow_folder_is_told_with_its_speed() -> None:
    offered = shared.Offer("runs_dir", "/shared/file", "", WRITE_BYTES)
    fast = shared.Reply("", "/dev/null", hashlib.sha256(b"").hexdigest(), 900.0, 400.0)
    assert only(judged_replies(offered, {A: fast})).level is Level.ok
    found = only(judged_replies(offered, {A: fast, B: replace(fast, written_mb_s=8.0)}))
    assert (found.level, found.node) == (Level.warning, B)
    assert "runs_dir=/shared is read at 900 MB/s and written at 8 MB/s" in found.text


def test_another_model_is_noticed_by_its_files(tmp_path: Path) -> None:
    assert shared.digest_of_model(tmp_path) == ""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    before = shared.digest_of_model(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"123")  # cut off
    assert shared.digest_of_model(tmp_path) not in (before, "")


# Deadlines -----------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_node_that_does_not_answer_is_named(ray_cluster: ModuleType, tmp_path: Path) -> None:
    class StuckNode(NodeCheck):
        def look(self, needs: Needs, has_sandboxes: bool) -> NodeView:
            time.sleep(1000)
            raise AssertionError

    needs = Needs(ClusterConfig(min_memory_gb=0), tmp_path, cache_dir=tmp_path)
    classes = {LOOPBACK: NodeCheck, "127.0.0.2": StuckNode}
    actors = {
        address: handle(ray_cluster.remote(kind).options(num_cpus=0).remote(address, list(classes)))
        for address, kind in classes.items()
    }
    for actor in actors.values():
        ray_cluster.get(actor.clock.remote(), timeout=300)
    found = NodeChecks(actors, needs, wait_s=20.0).check(4096, all_reduce=False)
    (silent,) = [one for one in found if one.level is Level.problem]
    assert (silent.node, silent.text.partition(":")[0]) == ("127.0.0.2", "has not answered in 20 s")
    assert {one.node for one in found if one.check in ("shared folders", "clock", "network")} == {LOOPBACK}
