"""Sandboxes in every kind of pool: programs, files, limits, and how pools lend and end sandboxes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from sandboxes import CONFIG, needs_bubblewrap, opened, use

from rollout.config import SandboxConfig
from rollout.sandbox import factory, jail
from rollout.sandbox.bubblewrap import BubblewrapPool, BubblewrapSandbox, encode, run_once
from rollout.sandbox.factory import make_pool, probe
from rollout.sandbox.interface import RunResult, Sandbox, SandboxPool
from rollout.sandbox.unsafe import SubprocessPool

HASTY = SandboxConfig(run_timeout_s=0.5, num_prestarted=0)
POOLS = [pytest.param(BubblewrapPool, marks=needs_bubblewrap), SubprocessPool]


# Every kind of pool ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLS)
def test_program_output_exit_code_and_stdin(kind: type[SandboxPool]) -> None:
    async def body(box: Sandbox) -> None:
        echo = "import sys; text = sys.stdin.read(); print(text.upper()); print('bad', file=sys.stderr); sys.exit(7)"
        assert await box.run_python(echo, "grüße ✓") == RunResult(7, "GRÜSSE ✓\n", "bad\n")
        shell = await box.run(["sh", "-c", "cat; echo oops >&2; exit 3"], "in")
        assert shell == RunResult(3, "in", "oops\n")
        assert (await box.run(["no-such-command"])).exit_code == 127
        assert (await box.run_python("import os; os.kill(os.getpid(), 15)")).exit_code == -signal.SIGTERM
        failed = await box.run_python("def f():\n    return 1 / 0\nf()")
        assert failed.exit_code == 1
        assert "line 2, in f" in failed.stderr
        assert "ZeroDivisionError" in failed.stderr
        assert (await box.run_python("x = (")).stderr.strip().endswith("SyntaxError: '(' was never closed")
        assert (await box.run_python("print('a\\x00b', '\\ud800'.encode('utf-8', 'replace'))")).exit_code == 0

    use(body, kind)


@pytest.mark.parametrize("kind", POOLS)
def test_files_go_in_and_come_out(kind: type[SandboxPool]) -> None:
    async def body(box: Sandbox) -> None:
        await box.write_files({"a/b/värde.txt": "naïve ✓\n", "helper.py": "VALUE = 41"})
        program = (
            "import helper; print(open('a/b/värde.txt').read()); open('out.txt', 'w').write(str(helper.VALUE + 1))"
        )
        assert (await box.run_python(program)).stdout == "naïve ✓\n\n"
        assert await box.read_file("out.txt") == "42"
        await box.write_files({"out.txt": "new"})
        assert await box.read_file("a/../out.txt") == "new"
        await box.run_python(
            "open('raw', 'wb').write(b'a\\xffb'); import os; os.mkfifo('pipe'); os.symlink('raw', 'link')"
        )
        assert await box.read_file("raw") == "a\ufffdb"
        assert await box.read_file("link") == "a\ufffdb"
        for absent in ("nothing", "a", "pipe", "raw/below"):
            with pytest.raises(FileNotFoundError):
                await box.read_file(absent)

    use(body, kind)


@pytest.mark.parametrize("kind", POOLS)
def test_paths_that_leave_the_workspace_are_refused(kind: type[SandboxPool]) -> None:
    async def body(box: Sandbox) -> None:
        links = (
            "import os; [os.symlink(t, n) for n, t in (('p', '/etc/passwd'), ('e', '/proc/1/environ'), ('d', '/tmp'))]"
        )
        assert (await box.run_python(links)).exit_code == 0
        for path in ("../x", "/etc/passwd", "a/../../x", "p", "e", "d/x", ".", "", "a\0b", "\ud800"):
            with pytest.raises(ValueError, match=r"leaves the workspace|not a valid path"):
                await box.read_file(path)
            with pytest.raises(ValueError, match=r"leaves the workspace|not a valid path"):
                await box.write_files({path: "x"})

    use(body, kind)


@pytest.mark.parametrize("kind", POOLS)
def test_what_is_no_text_is_refused_by_name_and_costs_no_sandbox(kind: type[SandboxPool]) -> None:
    async def body(box: Any) -> None:
        await box.write_files({"f": "x"})
        refused = [
            (box.write_files({"a": None}), "content of file 'a' must be text, found NoneType"),
            (box.write_files({"a": b"x"}), "content of file 'a' must be text, found bytes"),
            (box.write_files({1: "x"}), "path of a file must be text, found int"),
            (box.write_files(["a"]), "files must be .*, found list"),
            (box.write_files({"a": "\udcff"}), "the text of 'a' can't be encoded as UTF-8"),
            (box.write_files({"a" * 256: ""}), "'a+' is not a valid path: .* 255 bytes"),
            (box.read_file("a/" * 2000 + "b"), "is not a valid path: use at most 100 parts"),
            (box.read_file(None), "path must be text, found NoneType"),
            (box.run_python(None), "source must be text, found NoneType"),
            (box.run_python("", b""), "stdin must be text, found bytes"),
            (box.run(["echo", 1]), r"argv\[1\] must be text, found int"),
            (box.run("echo 1"), "argv='echo 1': must be a list"),
            (box.run([]), r"argv=\[\]: must be a list"),
        ]
        for call, message in refused:
            with pytest.raises(ValueError, match=message):
                await call
        for files in ({"f/g": "x"}, {"d/g": "x", "d": "y"}):  # one path as a file and as a folder
            with pytest.raises(OSError, match=r"'.*/box/[fd]'"):
                await box.write_files(files)
        for argument in ("a\0b", "x" * 3_000_000):
            assert (await box.run(["echo", argument])).exit_code == 127
        assert (await box.run(["echo", "a\udcffb"])).stdout == "a\ufffdb\n"
        assert await box.read_file("f") == "x"  # the same sandbox is still alive

    use(body, kind)


@pytest.mark.parametrize("kind", POOLS)
def test_endless_program_times_out_and_the_next_one_runs(kind: type[SandboxPool]) -> None:
    async def body(box: Sandbox) -> None:
        started = time.monotonic()
        result = await box.run_python("print('before', flush=True)\nwhile True: pass")
        assert result.timed_out
        assert result.exit_code == -signal.SIGKILL
        assert result.stdout == "before\n"
        assert time.monotonic() - started < 5
        assert (await box.run_python("print(1)")) == RunResult(0, "1\n", "")

    use(body, kind, HASTY)


@pytest.mark.parametrize("kind", POOLS)
def test_huge_output_is_cut(kind: type[SandboxPool]) -> None:
    async def body(box: Sandbox) -> None:
        result = await box.run_python("import sys\nfor s in (sys.stdout, sys.stderr): s.write('x' * 3_000_000)")
        for text in (result.stdout, result.stderr):
            assert text.startswith("x" * jail.OUTPUT_BYTES)
            assert len(text) < jail.OUTPUT_BYTES + 100
            assert text.endswith("[sandbox: output truncated]\n")
        assert result.exit_code == 0

    use(body, kind)


@pytest.mark.parametrize("kind", POOLS)
def test_memory_hog_fails_alone(kind: type[SandboxPool]) -> None:
    async def body(box: Sandbox) -> None:
        result = await box.run_python("x = bytearray(1 << 30)")
        assert result.exit_code == 1
        assert "MemoryError" in result.stderr
        assert (await box.run_python("print(1)")).stdout == "1\n"

    use(body, kind)


@pytest.mark.parametrize("kind", POOLS)
def test_pool_takes_back_only_what_it_has_lent(kind: type[SandboxPool]) -> None:
    async def main() -> None:
        async with opened(kind(CONFIG)) as one, opened(kind(CONFIG)) as other:  # type: ignore[call-arg]
            box = await one.acquire()
            with pytest.raises(ValueError, match="not lent"):
                await other.release(box)
            await one.release(box)
            with pytest.raises(ValueError, match="not lent"):
                await one.release(box)

    asyncio.run(main())


# How programs behave ----------------------------------------------------------------------------------------------

ODD_ENDINGS = {
    "import os; print('kept', flush=True); os._exit(5)": RunResult(5, "kept\n", ""),
    "import os; os.close(1); os.close(2)": RunResult(0, "", ""),
    "import sys; print('x'); sys.stdout.close()": RunResult(0, "x\n", ""),
    "exit('bye')": RunResult(1, "", "bye\n"),
    "import sys; sys.exit(256 + 3)": RunResult(3, "", ""),
    "import atexit; atexit.register(print, 'last')": RunResult(0, "last\n", ""),
    "import threading, time; threading.Thread(target=lambda: (time.sleep(.05), print('t'))).start()": RunResult(
        0, "t\n", ""
    ),
    "if __name__ == '__main__': print(__name__)": RunResult(0, "__main__\n", ""),
    "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)": RunResult(0, "True\n", ""),
    "from multiprocessing import Pool\nwith Pool(2) as p: print(sum(p.map(abs, [-1, -2])))": RunResult(0, "3\n", ""),
    "print(hash('a') == hash('a'), len(input()))": RunResult(0, "True 3\n", ""),
}


@needs_bubblewrap
def test_odd_endings() -> None:
    async def body(box: Sandbox) -> None:
        for source, wanted in ODD_ENDINGS.items():
            assert await box.run_python(source, "abc\n" + "y" * 300_000) == wanted, source

    use(body)


# The pool ---------------------------------------------------------------------------------------------------------


@needs_bubblewrap
def test_many_at_once_and_none_left_after_close() -> None:
    async def episode(pool: SandboxPool, number: int) -> str:
        box = await pool.acquire()
        await box.write_files({"n": str(number)})
        result = await box.run_python("print(int(open('n').read()) ** 2)")
        await pool.release(box)
        return result.stdout.strip()

    async def main() -> list[psutil.Process]:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            results = await asyncio.gather(*(episode(pool, number) for number in range(32)))
            assert results == [str(number**2) for number in range(32)]
            lent = await pool.acquire()
            running = asyncio.create_task(lent.run_python("while True: pass"))
            await asyncio.sleep(0.1)
            processes = psutil.Process().children(recursive=True)
            assert len(processes) >= 2
        with pytest.raises(RuntimeError, match=r"sandbox .* is gone"):
            await running
        with pytest.raises(RuntimeError, match="closed"):
            await pool.acquire()
        return processes

    _, alive = psutil.wait_procs(asyncio.run(main()), timeout=10)
    assert alive == []


@needs_bubblewrap
def test_one_that_is_killed_while_it_opens_does_not_end_its_process() -> None:
    """On uvloop, as in a Ray actor: libuv aborts if a socket that it starts to watch is closed."""
    program = """
    import asyncio, uvloop
    from rollout.config import SandboxConfig
    from rollout.sandbox.bubblewrap import BubblewrapSandbox
    from rollout.sandbox.jail import build_jail

    async def main():
        config = SandboxConfig()
        for turns in range(5):
            box = BubblewrapSandbox(build_jail(config), config)
            opening = asyncio.create_task(box.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            box.kill("a test")
            assert "gone: a test" in str((await asyncio.gather(opening, return_exceptions=True))[0])
            await box.gone()

    uvloop.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_that_closes_under_its_users_ends_them_with_one_reason(kind: type[SandboxPool]) -> None:
    """No sandbox starts afterwards, and releasing one is not another error."""

    async def play(pool: SandboxPool, began: asyncio.Event) -> None:
        while True:
            box = await pool.acquire()
            try:
                await box.write_files({"a.py": ""})
                began.set()
                await box.run(["true"])
            finally:
                await pool.release(box)

    async def main() -> None:
        pool, began = kind(CONFIG), asyncio.Event()  # type: ignore[call-arg]
        users = [asyncio.create_task(play(pool, began)) for _ in range(12)]
        await began.wait()
        await pool.close()
        ends = await asyncio.gather(*users, return_exceptions=True)
        assert {type(end) for end in ends} <= {RuntimeError}, ends
        assert psutil.Process().children(recursive=True) == []

    asyncio.run(main())


@needs_bubblewrap
def test_cancelled_run_costs_its_sandbox_but_not_the_pool() -> None:
    async def main() -> None:
        async with opened(BubblewrapPool(CONFIG)) as pool:
            box = await pool.acquire()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(box.run_python("while True: pass"), 0.2)
            await pool.release(box)
            other = await pool.acquire()
            assert other is not box
            assert (await other.run_python("print(1)")).stdout == "1\n"
            with pytest.raises(RuntimeError, match="is gone"):
                await box.run_python("print(1)")

    asyncio.run(main())


@needs_bubblewrap
def test_idle_ones_are_kept_ready_and_dead_ones_replaced() -> None:
    async def main() -> None:
        async with opened(BubblewrapPool(SandboxConfig(num_prestarted=2))) as pool:
            first = await pool.acquire()
            async with asyncio.timeout(30):
                while len(psutil.Process().children()) < 3:
                    await asyncio.sleep(0.02)
            await pool.release(first)
            for process in psutil.Process().children():
                process.kill()
            psutil.wait_procs(psutil.Process().children(), timeout=10)
            box = await pool.acquire()
            assert (await box.run_python("print(1)")).stdout == "1\n"

    asyncio.run(main())


@needs_bubblewrap
def test_sandboxes_die_with_their_owner() -> None:
    source = """
        import asyncio
        from rollout.config import SandboxConfig
        from rollout.sandbox.bubblewrap import BubblewrapPool
        async def main():
            box = await BubblewrapPool(SandboxConfig(num_prestarted=0)).acquire()
            task = asyncio.create_task(box.run_python("while True: pass"))
            await asyncio.sleep(0.2)
            print("running", flush=True)
            await task
        asyncio.run(main())
        """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "running\n"
        below = psutil.Process(owner.pid).children(recursive=True)
        assert len(below) >= 3
        owner.kill()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []


# Choosing ---------------------------------------------------------------------------------------------------------


def test_without_bubblewrap_only_an_explicit_setting_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "find_bwrap", lambda uid: Path("/usr/bin/false"))
    reason = probe(CONFIG)
    assert reason is not None
    assert "\n" not in reason
    with pytest.raises(RuntimeError, match="allow_unsafe=true"):
        make_pool(CONFIG)
    assert isinstance(make_pool(SandboxConfig(allow_unsafe=True)), SubprocessPool)


@needs_bubblewrap
def test_bubblewrap_is_chosen_where_it_works() -> None:
    async def main() -> None:
        async with opened(factory.make_pool(SandboxConfig(allow_unsafe=True))) as pool:
            assert isinstance(pool, BubblewrapPool)

    asyncio.run(main())


@needs_bubblewrap
def test_parts_out_of_reach_are_brought_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """/usr has no Python, and root's Python and bwrap are in folders that the sandbox's user can't enter."""
    find = jail.find_interpreter
    monkeypatch.setattr(jail, "find_interpreter", lambda uid: find(uid, tmp_path / "none"))
    monkeypatch.setattr(jail, "_open_to_all", lambda path: False)
    answer = run_once(jail.build_jail(CONFIG), "import ctypes, json, sys; print(sys.version_info[:2])")
    assert answer["stdout"] == f"{sys.version_info[:2]}\n"


def test_a_report_that_comes_after_its_answer_is_no_answer_to_the_next_request() -> None:
    """A handler answers, ends too late, and is reported: every later request still gets its own answer."""
    box: Any = BubblewrapSandbox.__new__(BubblewrapSandbox)

    async def ask(*frames: dict[str, Any]) -> dict[str, Any]:
        for frame in frames:
            box._reader.feed_data(encode(frame))
        return await box._exchange({"op": "read", "path": "a"})

    async def body() -> None:
        async def drain() -> None:
            return None

        box._reader, box._num_requests = asyncio.StreamReader(), 0
        box._writer = SimpleNamespace(write=lambda data: None, drain=drain)
        assert await ask({"number": 0, "text": "first"}) == {"text": "first"}
        late = {"number": 0, "handler_ended": None}
        assert await ask(late, {"number": 1, "text": "second"}) == {"text": "second"}
        assert await ask({"number": 2, "handler_ended": -9}) == {"handler_ended": -9}
        with pytest.raises(ValueError, match="answer to request 9 came for request 3"):
            await ask({"number": 9, "text": "from nowhere"})

    asyncio.run(body())
