"""TCP ports reserved for servers that start later."""

from __future__ import annotations

import socket


class ReservedPort:
    """A TCP port that is reserved for a server until `close` or the end of the `with` block.

    A server spends seconds on imports between choosing a free port and listening on it. Meanwhile other processes
    may take hundreds of ports. This socket is bound but does not listen: the kernel does not assign its port to a
    socket that binds to port 0, and only a socket with SO_REUSEADDR can bind to it. The servers of SGLang, torch and
    Ray set SO_REUSEADDR.
    """

    def __init__(self, host: str) -> None:
        """Bind to a free port. `host`: the address of the interface; "" for all interfaces."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Release the reservation; a server that already listens on the port is not affected."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
