"""Connections that nobody has taken outlive the process that should have."""

import socket
from collections.abc import Iterator

import pytest

from moe_runtime.gateway.door import Door

HOST = "127.0.0.1"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def door(port: int) -> Iterator[Door]:
    made = Door(HOST, port)
    yield made
    made.close()


def test_what_waits_on_a_shared_port_is_taken_along_and_new_connections_go_elsewhere(door: Door, port: int) -> None:
    door.listener.listen()
    with socket.create_connection((HOST, port)) as early:
        door.rescue()
        (taken,) = door.waiting
        early.sendall(b"still there")
        assert taken.recv(100) == b"still there"
    with pytest.raises(ConnectionRefusedError), socket.create_connection((HOST, port)):
        pass


def test_a_door_that_never_opened_has_nobody_waiting(door: Door) -> None:
    door.rescue()
    assert door.waiting == []


def test_a_port_of_ones_own_stays_open_between_two_processes(port: int) -> None:
    door = Door(None, port)
    door.listener.listen()
    try:
        with socket.create_connection((HOST, port)) as early:
            door.rescue()
            with socket.create_connection((HOST, port)):
                early.sendall(b"first")
                taken, _ = door.listener.accept()
                with taken:
                    assert taken.recv(100) == b"first"
    finally:
        door.close()


def test_a_port_that_somebody_else_has_is_refused(port: int) -> None:
    with socket.create_server((HOST, port)), pytest.raises(OSError, match="in use"):
        Door(HOST, port)
