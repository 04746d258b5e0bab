"""Fixtures and settings of all tests: one thread per process, tests with engines last, one shared Ray cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from runs import Place, Run

# Before torch is imported anywhere: tests run beside engines and workers on few cores.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests are for CPUs, also where torch is its CUDA build and the machine has a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the fast tests first, so that they fail early."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[ModuleType]:
    """The `ray` module, connected to a real one-node cluster of its own with 8 logical CPUs.

    Ray would otherwise switch token authentication on by itself and write a token into the home folder, which then
    changes how later commands behave; here the token lives and dies with the cluster.
    """
    import ray

    folder = Path(
        tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    )  # short: Ray's sockets live below, their paths are limited
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    try:
        with pytest.MonkeyPatch.context() as env:
            env.setenv("RAY_AUTH_MODE", "token")
            env.setenv("RAY_AUTH_TOKEN_PATH", str(token))
            env.setenv("RAY_USAGE_STATS_ENABLED", "0")
            env.setenv("RAY_worker_niceness", "0")  # the niceness of this process, even on a busy machine
            _read_environment_again()
            try:
                _start(ray, folder)
            except Exception as error:  # noqa: BLE001  Ray raises a plain Exception when its raylet starts too slowly
                print(f"Ray did not start, trying once more: {error}", file=sys.stderr)
                ray.shutdown()
                _start(ray, folder)
            yield ray
            ray.shutdown()
    finally:
        ray.shutdown()
        _read_environment_again()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def process() -> Iterator[None]:
    """Make this process the only process of a role."""
    from machine.ports import ReservedPort
    from trainer.config import LayoutConfig, OptimizerConfig
    from trainer.engine import EngineSettings
    from trainer.megatron.config import MegatronConfig
    from trainer.megatron.model import leave_process, start_process

    settings = EngineSettings(0, LayoutConfig(), MegatronConfig(), OptimizerConfig(), "", 0, 1, 60.0)
    with ReservedPort("127.0.0.1") as port:
        start_process(settings, "127.0.0.1", port.number)
    yield
    leave_process()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The folder for runs."""
    made = Place(tmp_path_factory.mktemp("whole"))
    yield made
    shutil.rmtree(made.temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def warm_start(place: Place) -> Path:
    """The model folder of a short supervised run: it knows the actions of the coding task but solves few rows."""
    numbers = ["steps=40", "policy.optimizer.decay_steps=40", "tracking.wandb=false"]
    with Run(place, "recipe=sft_coding", "run=start", *numbers) as run:
        run.finish()
        assert run.left_over() == []
    return place.run_dir("start") / "model"


def _read_environment_again() -> None:
    """Ray reads its RAY_* settings once, when it is imported, and some other test may have imported it before."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _start(ray: ModuleType, folder: Path) -> None:
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(folder),
    )
