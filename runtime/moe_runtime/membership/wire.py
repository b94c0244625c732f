"""One JSON line asked, one JSON line answered, over TCP with a bearer token and a deadline on everything.

Ranks (votes, rendezvous) and guards (fencing) share this wire. It is not HTTP on purpose: a vote costs one round trip
and a frozen peer, whose kernel still accepts connections, must cost exactly the deadline and nothing more. Nothing
here imports torch: the guard is a small process.

    >>> ask("127.0.0.1:7400", {"op": "probe"}, token="...", timeout_ms=700)      # doctest: +SKIP
    {'epoch': 3, ...}

Raises WireError and nothing else: RefusedCall (nobody listens), SilentCall (no answer in time), BrokenCall (an answer
that cannot be used, the wrong token included).
"""

import hmac
import json
import selectors
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Json = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)

_MAX_LINE_BYTES = 4 << 20
"""A membership of 8,192 ranks is about 1 MiB."""
_IDLE_S = 10.0
"""A connection that sends nothing for so long is closed, so that a frozen client does not hold a thread for good."""


class WireError(RuntimeError):
    """A call that brought no usable answer."""


class RefusedCall(WireError):
    """Nobody listens there: the process is gone or was never up."""


class SilentCall(WireError):
    """No answer in time: hung, cut off, or far too slow. It may still be alive."""


class BrokenCall(WireError):
    """The connection broke, or the answer was not one (a wrong token, another program on that port)."""


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` -> (host, port). Raises BrokenCall for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BrokenCall(f"not an address: {address!r}")
    return host.strip("[]"), int(port)


class LineServer:
    """Serves `answer(request) -> reply` on its own threads until `close()`. `answer` may block for a bounded time."""

    def __init__(self, answer: Callable[[Json], Json], *, token: str, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET

        class Server(socketserver.ThreadingTCPServer):
            address_family = family
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - not ours to name
                """A client that hangs up is no event worth a traceback on stderr; a mistake of ours is."""
                if not isinstance(sys.exc_info()[1], OSError):
                    traceback.print_exc()

        class Handler(socketserver.StreamRequestHandler):
            timeout = _IDLE_S

            def handle(self) -> None:
                while line := self.rfile.readline(_MAX_LINE_BYTES):
                    reply, is_allowed = _reply(line, token, answer)
                    self.wfile.write(_encode(reply))
                    if not is_allowed:
                        return

        self._server = Server((host, port), Handler)
        bound_host, bound_port = self._server.server_address[:2]
        self.address = f"[{host}]:{bound_port}" if family == socket.AF_INET6 else f"{bound_host!s}:{bound_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name=f"wire-{bound_port}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2.0)


def _encode(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _reply(line: bytes, token: str, answer: Callable[[Json], Json]) -> tuple[Json, bool]:
    try:
        request = json.loads(line)
    except ValueError:
        return {"error": "not JSON"}, False
    if not isinstance(request, dict) or not hmac.compare_digest(str(request.pop("token", "")).encode(), token.encode()):
        return {"error": "unauthorized"}, False
    try:
        return answer(request), True
    except (KeyError, TypeError, ValueError) as error:
        return {"error": f"bad request: {type(error).__name__}: {error}"}, True


class _Call:
    """One request on its way: a non-blocking socket with what is still to be sent and what has come."""

    def __init__(self, address: str, payload: bytes) -> None:
        host, port = split_address(address)
        self.address = address
        self.out = payload
        self.received = b""
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        try:
            self.sock.connect_ex((host, port))
        except OSError as error:  # a name that does not resolve
            self.sock.close()
            raise RefusedCall(f"{address}: {error}") from error

    def advance(self, events: int) -> Json | None:
        """Send or receive what is possible now; the reply once it is whole. Raises WireError."""
        try:
            if events & selectors.EVENT_WRITE and self.out:
                if code := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(code, "connect")
                self.out = self.out[self.sock.send(self.out) :]
            if events & selectors.EVENT_READ:
                chunk = self.sock.recv(1 << 16)
                if not chunk:
                    raise BrokenCall(f"{self.address}: closed without an answer")
                self.received += chunk
        except ConnectionRefusedError as error:
            raise RefusedCall(f"{self.address}: nobody listens") from error
        except BlockingIOError:
            return None
        except OSError as error:
            # No route and the like count as nobody there: the next probe asks again anyway.
            raise (BrokenCall if self.received else RefusedCall)(f"{self.address}: {error}") from error
        if len(self.received) > _MAX_LINE_BYTES:
            raise BrokenCall(f"{self.address}: answer is longer than {_MAX_LINE_BYTES} bytes")
        if not self.received.endswith(b"\n"):
            return None
        return _decode(self.address, self.received)


def _decode(address: str, line: bytes) -> Json:
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise BrokenCall(f"{address}: answer is not JSON") from error
    if not isinstance(reply, dict) or "error" in reply:
        raise BrokenCall(f"{address}: {reply['error'] if isinstance(reply, dict) else 'answer is not an object'}")
    return reply


def ask_many(requests: Mapping[Key, tuple[str, Json]], *, token: str, timeout_ms: float) -> dict[Key, Json | WireError]:
    """Ask several addresses side by side, in the calling thread; every key gets its reply or why there is none.

    Ends when all have answered or failed, or at the deadline; who has not answered by then gets SilentCall.
    """
    deadline = time.monotonic() + timeout_ms / 1000
    results: dict[Key, Json | WireError] = {}
    with selectors.DefaultSelector() as selector:
        open_calls: dict[Key, _Call] = {}

        def settle(key: Key, result: Json | WireError) -> None:
            results[key] = result
            if (call := open_calls.pop(key, None)) is not None:
                selector.unregister(call.sock)
                call.sock.close()

        for key, (address, request) in requests.items():
            try:
                call = _Call(address, _encode({**request, "token": token}))
            except WireError as error:
                settle(key, error)
                continue
            open_calls[key] = call
            selector.register(call.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, key)
        while open_calls:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                break
            for ready, events in selector.select(remaining_s):
                key = ready.data
                call = open_calls[key]
                try:
                    reply = call.advance(events)
                except WireError as error:
                    settle(key, error)
                    continue
                if reply is not None:
                    settle(key, reply)
                elif not call.out:
                    selector.modify(call.sock, selectors.EVENT_READ, key)
        for key in list(open_calls):
            settle(key, SilentCall(f"{open_calls[key].address}: no answer within {timeout_ms:.0f} ms"))
    return results


def ask(address: str, request: Json, *, token: str, timeout_ms: float) -> Json:
    """Ask one address. Raises WireError."""
    result = ask_many({0: (address, request)}, token=token, timeout_ms=timeout_ms)[0]
    if isinstance(result, WireError):
        raise result
    return result
