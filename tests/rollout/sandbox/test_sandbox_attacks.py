"""Programs that try to escape from their sandbox, break it, or leave data for the next episode."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sandboxes import CONFIG, needs_bubblewrap, opened, run_program, use

from rollout.config import SandboxConfig
from rollout.sandbox.bubblewrap import BubblewrapPool
from rollout.sandbox.interface import RunResult, Sandbox
from rollout.sandbox.jail import limits


def two_episodes(first: str, second: str) -> RunResult:
    """Run `first`, release the sandbox, acquire the same sandbox again, and run `second` in it."""

    async def main() -> RunResult:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            box = await pool.acquire()
            result = await box.run_python(textwrap.dedent(first))
            assert result.exit_code == 0, result
            await pool.release(box)
            again = await pool.acquire()
            assert again is box
            return await again.run_python(textwrap.dedent(second))

    return asyncio.run(main())


# What must not work -----------------------------------------------------------------------------------------------


@contextmanager
def listener() -> Iterator[int]:
    """The port of a server on the host's loopback interface that sends a greeting."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"hello")
                connection.close()

        threading.Thread(target=greet, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@needs_bubblewrap
def test_no_network() -> None:
    with listener() as port:
        connect = f"import socket; print(socket.create_connection(('127.0.0.1', {port}), 2).recv(9))"
        outside = subprocess.run(
            [sys.executable, "-c", connect], capture_output=True, text=True, timeout=30, check=True
        )
        assert "hello" in outside.stdout
        assert "ConnectionRefusedError" in run_program(connect).stderr
    families = "import socket\nfor f in (17, 38, 40):\n  try: socket.socket(f, 1)\n  except OSError: print(f)"
    assert run_program(families).stdout.split() == ["17", "38", "40"]


@needs_bubblewrap
def test_host_is_out_of_sight(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the host's secret")
    kept = [] if os.getuid() == 0 else [1000, 65534]  # an ordinary user's own groups: only root can drop them
    os.environ["SANDBOX_TEST_SECRET"] = "in the environment"
    try:
        seen = run_program(f"""
            import os
            print(os.path.exists({str(secret)!r}), os.path.exists({str(Path.cwd())!r}), os.path.exists("/root"))
            print("SANDBOX_TEST_SECRET" in os.environ, os.getuid(), os.getgid())
            print({{*os.getgroups()}} - {{*{kept}}})
            print(sorted(int(p) for p in os.listdir("/proc") if p.isdigit())[-1] < 100)
            """)
    finally:
        del os.environ["SANDBOX_TEST_SECRET"]
    assert seen.stdout.splitlines() == ["False False False", "False 1000 1000", "set()", "True"]


ATTEMPTS = {  # each is one statement that must raise OSError
    "write /usr": "open('/usr/x', 'w')",
    "write /": "open('/x', 'w')",
    "write /etc": "open('/etc/x', 'w')",
    "host's core pattern": "open('/proc/sys/kernel/core_pattern', 'w').write('x')",
    "supervisor's memory": "open('/proc/1/mem', 'rb')",
    "supervisor's environment": "open('/proc/1/environ').read()",
    "supervisor's pipe": "open('/proc/1/fd/1', 'w')",
    "handler's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "handler's pipe": "open(f'/proc/{os.getppid()}/fd/1', 'w')",
    "inherited pipe": "os.fstat(3)",
    "trace the supervisor": "call(libc.ptrace, 16, 1, 0, 0)",
    "trace the handler": "call(libc.ptrace, 16, os.getppid(), 0, 0)",
    "steal a descriptor": "call(libc.syscall, 438, os.pidfd_open(os.getppid()), 1, 0)",
    "limit the supervisor": "resource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3))",
    "slow the supervisor": "os.setpriority(os.PRIO_PROCESS, 1, 19)",
    "pin the supervisor": "os.sched_setaffinity(1, {0})",
    "new user namespace": "call(libc.unshare, 0x10000000)",
    "mount": "call(libc.mount, b'none', b'/tmp', b'tmpfs', 0, None)",
    "io_uring": "call(libc.syscall, 425, 8, None)",
    "kernel keys": "call(libc.syscall, 250, 0, -3, 1)",
    "become root": "os.setuid(0)",
    "shared memory that stays": "call(libc.shmget, 1, 4096, 0o1666)",
    "attributes that stay": "os.setxattr('/box', 'user.note', b'x')",
}


@needs_bubblewrap
def test_attempts_are_refused() -> None:
    source = f"""
        import ctypes, os, resource
        libc = ctypes.CDLL(None, use_errno=True)
        def call(function, *args):
            if function(*args) == -1:
                raise OSError(ctypes.get_errno(), "refused")
        for name, statement in {ATTEMPTS!r}.items():
            try:
                exec(statement)
            except OSError:
                continue
            print("SUCCEEDED:", name)
        """
    assert run_program(source) == RunResult(0, "", "")


@needs_bubblewrap
def test_signals_to_supervisor_and_handler() -> None:
    async def body(box: Sandbox) -> None:
        storm = "import os\nfor s in range(1, 65):\n  try: os.kill(1, s)\n  except OSError: pass\nprint('done')"
        assert (await box.run_python(storm)).stdout == "done\n"
        for number in (signal.SIGKILL, signal.SIGSTOP):
            result = await box.run_python(f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(60)")
            assert result.exit_code == -signal.SIGKILL
            assert "attacked" in result.stderr
        await box.write_files({"x": "still works"})
        assert await box.read_file("x") == "still works"

    use(body)


@needs_bubblewrap
def test_forged_answers_are_not_possible() -> None:
    """A program that writes frames to its stdout only writes output."""
    source = "import os, struct; os.write(1, struct.pack('>I', 2) + b'{}'); os.write(2, b'x')"
    assert run_program(source) == RunResult(0, "\0\0\0\x02{}", "x")


@needs_bubblewrap
def test_fork_bomb_is_bounded() -> None:
    limit = int(limits(CONFIG)["num_processes"])
    count = f"""
        import os, time
        for number in range({limit}):
            try:
                if os.fork() == 0: time.sleep(60)
            except OSError:
                print(number)
                break
        """

    async def body(box: Sandbox) -> None:
        bomb = await box.run_python("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass")
        assert bomb.timed_out
        counted = await box.run_python(textwrap.dedent(count))
        assert limit - 10 < int(counted.stdout) < limit

    use(body, config=SandboxConfig(run_timeout_s=1.0, num_prestarted=0))


@needs_bubblewrap
def test_memory_of_all_processes_together_is_bounded() -> None:
    hog = """
        import mmap, os, time
        for _ in range(8):
            if os.fork() == 0:
                memory = mmap.mmap(-1, 60 << 20)
                for at in range(0, 60 << 20, 4096): memory[at] = 1
                time.sleep(60)
        time.sleep(60)
        """
    result = run_program(hog, config=SandboxConfig(memory_mb=96, num_prestarted=0))
    assert result.exit_code == -signal.SIGKILL
    assert "more than 192 MiB of memory" in result.stderr


@needs_bubblewrap
def test_full_workspace_is_an_error_and_then_empty_again() -> None:
    async def main() -> None:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            box = await pool.acquire()
            fill = "import itertools\nfor n in itertools.count(): open(f'f{n}', 'wb').write(bytes(1 << 20))"
            assert "No space left" in (await box.run_python(fill)).stderr
            with pytest.raises(OSError, match="No space left"):
                await box.write_files({"new": "x" * 100_000})
            await pool.release(box)
            again = await pool.acquire()
            await again.write_files({"new": "x" * 1_000_000})
            assert (await again.run_python("import os; print(os.listdir())")).stdout == "['new']\n"

    asyncio.run(main())


# Isolation of consecutive episodes ----------------------------------------------------------------------------------

TRACES = {  # a program of a first episode that leaves something: a program of a second one that looks for it
    "for d in ('/box', '/tmp', '/dev/shm'): open(d + '/note', 'w').write('x')": (
        "import os; found = [f for d in ('/box', '/tmp', '/dev/shm') for f in os.listdir(d)]"
    ),
    "import os\nos.makedirs('a/b'); open('a/b/c', 'w'); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('/box', 0)": (
        "import os; found = [*os.listdir('/box'), *([] if os.access('/box', 7) else ['closed'])]"
    ),
    "import os; os.utime('/box', (123, 123)); os.chmod('/tmp', 0o1700)": (
        "import os; found = [s for s in map(os.stat, ('/box', '/tmp')) if s.st_mtime == 123 or s.st_mode == 0o41700]"
    ),
    "import math, builtins, json; math.note = builtins.note = json.note = 1": (
        "import math, builtins, json; found = [m for m in (math, builtins, json) if hasattr(m, 'note')]"
    ),
    "open('json.py', 'w').write('note = 1'); open('encodings.py', 'w').write('note = 1')": (
        "import json; found = [json] if hasattr(json, 'note') else []"
    ),
    "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(60)\n  os._exit(0)": (
        "import os; own = (1, os.getppid(), os.getpid())\n"
        "found = [p for p in os.listdir('/proc') if p.isdigit() and int(p) not in own]"
    ),
    "import socket, os, time\ns = socket.create_server(('', 5555))\nif os.fork() == 0:\n  time.sleep(60)": (
        "import socket; found = [1] if socket.socket().connect_ex(('127.0.0.1', 5555)) == 0 else []"
    ),
}


@needs_bubblewrap
@pytest.mark.parametrize("leave", TRACES)
def test_nothing_is_left_for_the_next_episode(leave: str) -> None:
    result = two_episodes(leave, TRACES[leave] + "\nprint(found)")
    assert result == RunResult(0, "[]\n", "")


@needs_bubblewrap
def test_memory_of_the_next_episode_holds_nothing_of_the_last() -> None:
    """The search has the secret with every byte incremented, so that it does not find itself."""
    look = """
        shift = bytes((byte + 1) % 256 for byte in range(256))
        needle = b"ijeefo.botxfs.5822"
        hits = 0
        with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
            for line in maps:
                span, access, *_ = line.split()
                if access.startswith("rw"):
                    start, end = (int(word, 16) for word in span.split("-"))
                    memory.seek(start)
                    hits += memory.read(end - start).translate(shift).count(needle)
        print(hits)
        """
    assert int(run_program(look + "secret = 'hidden-answer-4711'").stdout) > 0
    leave = "note = 'hidden-answer-4711' * 1000; open('note', 'w').write(note); print(note)"
    assert two_episodes(leave, look) == RunResult(0, "0\n", "")


@needs_bubblewrap
def test_workspace_that_can_not_be_emptied_costs_its_sandbox() -> None:
    async def main() -> None:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            box = await pool.acquire()
            deep = "import os\nfor _ in range(100): os.mkdir('d' * 100); os.chdir('d' * 100)"  # longer than any path
            assert (await box.run_python(deep)).exit_code == 0
            await pool.release(box)
            other = await pool.acquire()
            assert other is not box
            assert (await other.run_python("import os; print(os.listdir())")).stdout == "[]\n"

    asyncio.run(main())


@needs_bubblewrap
def test_daemon_does_not_outlive_its_run() -> None:
    async def body(box: Sandbox) -> None:
        daemon = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(.3)\n  open('late', 'w')"
        assert (await box.run_python(daemon)).exit_code == 0
        await asyncio.sleep(0.5)
        with pytest.raises(FileNotFoundError):
            await box.read_file("late")

    use(body)
