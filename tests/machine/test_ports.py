"""Ports that are reserved for later servers."""

from __future__ import annotations

import socket
import socketserver
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from machine.ports import ReservedPort

HOST = "127.0.0.1"


class Server(socketserver.TCPServer):
    """Listen on a port like most servers do."""

    allow_reuse_address = True


@pytest.fixture(params=[HOST, ""])
def port(request: pytest.FixtureRequest) -> Iterator[ReservedPort]:
    with ReservedPort(request.param) as found:
        yield found


def test_a_reserved_port_goes_to_the_server_alone(port: ReservedPort) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, port.number))
    with Server((HOST, port.number), socketserver.BaseRequestHandler) as server:
        socket.create_connection((HOST, port.number), timeout=10).close()
        with pytest.raises(OSError, match="in use"):
            Server(server.server_address, socketserver.BaseRequestHandler)


@pytest.mark.parametrize("libuv", [True, False])
def test_ranks_can_meet_at_a_reserved_port(port: ReservedPort, libuv: bool) -> None:
    server = TCPStore(HOST, port.number, 2, True, timedelta(seconds=30), wait_for_workers=False, use_libuv=libuv)
    client = TCPStore(HOST, port.number, 2, False, timedelta(seconds=30), use_libuv=libuv)
    server.set("said", "here")
    assert client.get("said") == b"here"


def test_a_closed_reservation_is_anyones(port: ReservedPort) -> None:
    port.close()
    with socket.socket() as other:
        other.bind((HOST, port.number))
