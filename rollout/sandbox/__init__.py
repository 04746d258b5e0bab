"""Sandboxes: where an agent's tools run, cut off from the network, the host's files and other episodes.

interface.py    what the rest of the project sees: `Sandbox`, `SandboxPool`, `RunResult`
factory.py      `make_pool(config)`, `probe(config)`
bubblewrap.py   the pool that is meant to be used
jail.py         the command line, the interpreter and the system-call filter of one sandbox
inside/         the program that runs in a sandbox and serves its requests
unsafe.py       plain subprocesses, where bubblewrap can't run and the user allows it
"""
