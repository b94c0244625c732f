"""The port that a gateway's guard keeps open for it, and the connections that wait there while nobody serves."""

import contextlib
import socket


class Door:
    """Bound from its creation until `close()`, listening once a serving process that inherited it says so.

    `host` None: every address of the pod, which nobody shares. Else several gateways of one machine listen there
    (SO_REUSEPORT), and the kernel gives each a part of the connections.
    """

    def __init__(self, host: str | None, port: int) -> None:
        """Raises OSError when the port is taken."""
        self._host, self._port = host, port
        self.listener = _bind(host, port)
        self.waiting: list[socket.socket] = []

    def rescue(self) -> None:
        """The serving process is gone: its queue is the next one's.

        Where others listen on the same port they shall have the new connections, so the queue is taken out and the
        port left until the next one is ready. A pod of its own goes on listening: its queue needs nobody.
        """
        if self._host is None:
            return
        self.waiting += _queued(self.listener)
        self.listener.close()
        self.listener = _bind(self._host, self._port)

    def hand_over(self) -> None:
        """A serving process has inherited what waits."""
        for connection in self.waiting:
            connection.close()
        self.waiting.clear()

    def close(self) -> None:
        self.hand_over()
        self.listener.close()


def _queued(listener: socket.socket) -> list[socket.socket]:
    """Connections that the kernel has made and nobody has accepted."""
    taken: list[socket.socket] = []
    listener.setblocking(False)
    while True:
        try:
            taken.append(listener.accept()[0])
        except ConnectionAbortedError:
            continue
        except OSError:  # no more, or it never listened
            return taken


def _bind(host: str | None, port: int) -> socket.socket:
    if host is not None:
        return _bound(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port, is_shared=True)
    with contextlib.suppress(OSError):  # no IPv6 here
        return _bound(socket.AF_INET6, "::", port, is_shared=False)
    return _bound(socket.AF_INET, "0.0.0.0", port, is_shared=False)


def _bound(family: socket.AddressFamily, host: str, port: int, *, is_shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(is_shared))
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener
