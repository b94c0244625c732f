"""Where the ranks of one epoch find each other's sockets: a small key-value store inside a rank's peer face.

torch's own TCPStore does not fit here: a client of a stopped (SIGSTOP) TCPStore waits for good, whatever its time-out
says (seen with torch 2.15: `get` and the constructor both over 40 s with a time-out of 1 s), it listens without a
token, and it cannot tell epochs apart. Here every wait has its deadline, the token is checked, and an epoch's keys go
when a newer comes.
"""

import base64
import datetime
import threading
import time

from torch._C._distributed_c10d import Store

from moe_runtime.membership.wire import Json, WireError, ask

_LONG_POLL_MS = 400.0
"""How long the host holds a question whose keys are not all there yet; then it is asked again."""
_KEPT_EPOCHS = 3


class RendezvousBook:
    """The host's side: keys by epoch prefix. Thread-safe; only the newest few prefixes are kept."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._keys: dict[str, dict[str, str]] = {}

    def answer(self, request: Json) -> Json:
        """Ops `put` (key, value) and `get` (keys, wait_ms), both within a prefix."""
        prefix = str(request["prefix"])
        if request["op"] == "rendezvous_put":
            with self._changed:
                self._table(prefix)[str(request["key"])] = str(request["value"])
                self._changed.notify_all()
            return {"ok": True}
        wanted = [str(key) for key in request["keys"]]
        with self._changed:
            table = self._table(prefix)
            self._changed.wait_for(lambda: all(key in table for key in wanted), float(request["wait_ms"]) / 1000)
            return {"values": {key: table[key] for key in wanted if key in table}}

    def _table(self, prefix: str) -> dict[str, str]:
        if prefix not in self._keys:
            self._keys[prefix] = {}
            for old in list(self._keys)[:-_KEPT_EPOCHS]:
                del self._keys[old]
        return self._keys[prefix]


class RendezvousStore(Store):
    """torch's Store face over a host's RendezvousBook. Raises RuntimeError when the host is gone, silent or late."""

    def __init__(self, address: str, *, prefix: str, token: str, timeout_ms: float) -> None:
        super().__init__()
        self._address = address
        self._prefix = prefix
        self._token = token
        self._deadline = time.monotonic() + timeout_ms / 1000

    def set(self, key: str, value: str | bytes) -> None:
        text = base64.b64encode(value.encode() if isinstance(value, str) else value).decode()
        self._ask({"op": "rendezvous_put", "key": key, "value": text})

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        while True:
            wait_ms = max(0.0, min(_LONG_POLL_MS, self._remaining_ms() - 50))
            values = self._ask({"op": "rendezvous_get", "keys": keys, "wait_ms": wait_ms})["values"]
            if len(values) == len(set(keys)):
                return [base64.b64decode(values[key]) for key in keys]

    def check(self, keys: list[str]) -> bool:
        values = self._ask({"op": "rendezvous_get", "keys": keys, "wait_ms": 0})["values"]
        return len(values) == len(set(keys))

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """One deadline holds for the whole rendezvous; a backend's own, longer one does not extend it."""
        del timeout
        self.multi_get(keys)

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """Kept to the deadline given at the start."""

    def _remaining_ms(self) -> float:
        return (self._deadline - time.monotonic()) * 1000

    def _ask(self, request: Json) -> Json:
        remaining_ms = self._remaining_ms()
        if remaining_ms <= 0:
            raise WireError(f"rendezvous {self._prefix} at {self._address} was not complete in time")
        return ask(self._address, {**request, "prefix": self._prefix}, token=self._token, timeout_ms=remaining_ms)
