"""Ports kept for servers to come."""

from __future__ import annotations

import socket


class ReservedPort:
    """A free TCP port that stays free until `close`, or the end of the `with`, for a server that is told its number.

    Between asking for a free port and listening on it, a server imports for seconds, while the processes beside it take
    ports by the hundred. This socket is bound and does not listen: the kernel neither gives its port to a socket that
    asks for any, nor lets one have it that does not say SO_REUSEADDR, as servers do (SGLang's, torch's, Ray's).
    """

    def __init__(self, host: str) -> None:
        """`host`: the address of the interface; "" for all of them."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port up; a server that listens on it goes on."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
