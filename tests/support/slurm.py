"""A real Slurm of one controller and two nodes on this machine, for tests; ends with its block."""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import psutil
from processes import every_process
from tree import ROOT

from machine.ports import ReservedPort

FOLDER = ROOT / ".cache" / "slurm-wlm"
INSTALL = ROOT / "tests" / "support" / "install_slurm.sh"
LIMIT_S = 120.0
CPUS = 8  # of a node, as Slurm is told
CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdTimeout=10
SlurmctldTimeout=10
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
JobRequeue=1
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[1]} CPUs={cpus} RealMemory=8000 Gres=gpu:h100:4
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.3 Port={ports[2]} CPUs={cpus} RealMemory=8000 Gres=gpu:h100:4
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=ci Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GRES = "NodeName=node[1-2] Name=gpu Type=h100 File=/dev/null,/dev/zero,/dev/full,/dev/random\n"


def unavailable() -> str:
    """Return why there is no Slurm to test with, "" when there is one; it is unpacked where it is not installed."""
    if shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged"):
        return ""
    FOLDER.parent.mkdir(exist_ok=True)
    done = subprocess.run(["bash", str(INSTALL), str(FOLDER)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


class SlurmCluster:
    """Its nodes are `node1` and `node2`, each with 8 CPUs and four GPUs that are none.

    Jobs of partition `high` preempt those of `low`, a minute after they have told them.

    Their addresses are loopbacks other than 127.0.0.1, which Ray takes for any address of the machine.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._stepd: list[str] = []
        self._plugins = ""
        if not shutil.which("slurmctld"):
            libraries = FOLDER / "usr" / "lib" / "x86_64-linux-gnu"
            self._stepd = ["-d", str(FOLDER / "usr" / "sbin" / "slurmstepd")]
            self._plugins = f"PluginDir={libraries / 'slurm-wlm'}\n"
            self.environment["LD_LIBRARY_PATH"] = f"{libraries}:{libraries / 'slurm-wlm'}"
            self.environment["PATH"] = f"{FOLDER / 'usr' / 'bin'}:{FOLDER / 'usr' / 'sbin'}:{os.environ['PATH']}"

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        started = [psutil.Process(one.pid) for one in self._daemons.values() if one.poll() is None]
        jobs = [child for one in started for child in one.children(recursive=True)]
        for one in [*started, *jobs, *self._steps()]:
            if one.is_running():
                one.kill()
        for daemon in self._daemons.values():
            daemon.wait(LIMIT_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[psutil.Process]:
        """The jobs' processes and what keeps them, which is a daemon of its own."""
        conf = self.environment["SLURM_CONF"]
        return [process for process in every_process() if _variable(process, "SLURM_CONF") == conf]

    def _start(self) -> None:
        (self.folder / "munge").mkdir(mode=0o700)
        (self.folder / "state").mkdir()
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = socket.gethostname().partition(".")[0]
        with ReservedPort("127.0.0.1") as one, ReservedPort("127.0.0.1") as two, ReservedPort("127.0.0.1") as three:
            ports = [one.number, two.number, three.number]
        text = CONF.format(folder=self.folder, host=host, user=getpass.getuser(), ports=ports, cpus=CPUS)
        (self.folder / "slurm.conf").write_text(text + self._plugins)
        (self.folder / "gres.conf").write_text(GRES)
        munge = [f"--{name}={self.folder}/munge/{file}" for name, file in MUNGE_FILES.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *munge)
        self._wait(lambda: (self.folder / "munge" / "sock").exists(), "munge's socket")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
        for node in ("node1", "node2"):
            self.start_node(node)
        self._wait(lambda: self.states() == {"node1": "IDLE", "node2": "IDLE"}, "idle nodes")

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-f", f"{self.folder}/slurm.conf", "-N", node, *self._stepd)

    def kill_node(self, node: str) -> None:
        """As a power failure does: the daemon and all that it has started."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait(LIMIT_S)
        jobs = [one for one in self._steps() if _variable(one, "SLURMD_NODENAME") == node]
        keepers = {parent for one in jobs for parent in one.parents() if parent.name() == "slurmstepd"}
        for one in [*keepers, *jobs]:  # a keeper that sees its job end would tell the controller
            if one.is_running():
                one.kill()

    def states(self) -> dict[str, str]:
        found = re.findall(r"NodeName=(\S+).*?State=(\w+)", self.call("scontrol", "show", "node"), re.DOTALL)
        return dict(found)

    def job(self, number: str) -> Mapping[str, str]:
        """Return what the controller says of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", number)))

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def wait_for(self, number: str, state: str, limit_s: float = LIMIT_S) -> None:
        self._wait(lambda: self.job(number).get("JobState") == state, f"{state} of job {number}", limit_s)

    def _daemon(self, name: str, *command: str) -> None:
        self._daemons[name] = subprocess.Popen(
            command,
            env={**os.environ, **self.environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / f"{name}.out").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def _wait(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            for name, daemon in self._daemons.items():
                said = (self.folder / f"{name}.out").read_text(errors="replace")
                assert daemon.poll() is None, f"{name} has ended before {what}: {said[-2000:]}"
            assert time.monotonic() < deadline, f"no {what} after {limit_s} s"
            time.sleep(0.1)


def _variable(process: psutil.Process, name: str) -> str:
    try:
        return str(process.environ().get(name, ""))
    except psutil.Error:
        return ""


MUNGE_FILES = {
    "socket": "sock",
    "key-file": "key",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}
