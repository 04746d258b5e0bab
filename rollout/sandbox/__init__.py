"""Sandboxes: an agent's tools run in them, isolated from the network, the host's files and other episodes.

interface.py    the public interface: `Sandbox`, `SandboxPool`, `RunResult`
factory.py      `make_pool(config)`, `probe(config)`
bubblewrap.py   the default pool
jail.py         the command line, the interpreter and the system-call filter of one sandbox
inside/         the program that runs in a sandbox and serves its requests
unsafe.py       plain subprocesses, used if bubblewrap can't run and the user allows it
"""
