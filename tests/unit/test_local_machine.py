"""Ports of the local shell: the one that was asked for, unless somebody listens there."""

import socket

from moe_operator.cluster.local_machine import Ports, is_free


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert Ports().take(port) != port


def test_a_port_whose_last_connection_is_still_closing_is_free() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        served, _ = listener.accept()
        served.close()  # the side that closes first keeps the port in TIME_WAIT
        client.close()
    ports = Ports()
    assert ports.take(port) == port
    assert ports.take(port) != port  # each port is given out once
