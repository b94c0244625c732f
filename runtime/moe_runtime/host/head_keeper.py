"""Keeps the newest copy of the store of Ray's head in this pod, and gives it to a coordinator that has none.

Runs in every pod with a Ray node of its own: who would die with the head's state is who keeps it. The copy stays in
memory, because it is of use exactly as long as this pod's node lives. A thread with plain HTTP, as ranks report: it
needs neither Ray nor an event loop that is free.

    GET /v1/head-store?have=SEAL&pod=UID&wait_s=S   200 a copy other than SEAL, 204 no news, 404 I have none: give yours
    PUT /v1/head-store?pod=UID                      204 taken, 409 not asked for
"""

import http.client
import threading
from urllib.parse import quote, urlsplit

from moe_runtime.host.head_store import BadCopy, label_of

HOLD_S = 2.0
_CALL_S = 5.0
"""A coordinator that is gone without a word (its node is lost) is given up after this long."""
_RETRY_S = 0.3


class HeadKeeper:
    """`seal` and `copy` are of the newest copy; empty before the first."""

    def __init__(self, url: str, *, token: str, pod_uid: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
        self._pod = quote(pod_uid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="head-keeper", daemon=True)
        self.seal = ""
        self.copy = b""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends once the question under way is answered."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            if connection is None:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=_CALL_S)
            try:
                settled = self._round(connection)
            except (OSError, http.client.HTTPException):
                connection.close()
                connection = None
                settled = False
            if not settled:
                self._stop.wait(_RETRY_S)
        if connection is not None:
            connection.close()

    def _round(self, connection: http.client.HTTPConnection) -> bool:
        """One question; False when the next one shall wait a little."""
        query = f"have={self.seal}&pod={self._pod}&wait_s={HOLD_S}"
        status, body = self._call(connection, "GET", query)
        if status == 200:
            try:
                self.seal, self.copy = label_of(body).seal, body
            except BadCopy as error:
                print(f"the coordinator's copy of the head's store is refused: {error}", flush=True)
                return False
            return True
        if status == 404 and self.copy:
            self._call(connection, "PUT", f"pod={self._pod}", self.copy)
            return False
        return status == 204

    def _call(
        self, connection: http.client.HTTPConnection, method: str, query: str, body: bytes | None = None
    ) -> tuple[int, bytes]:
        connection.request(method, f"/v1/head-store?{query}", body=body, headers=self._headers)
        response = connection.getresponse()
        return response.status, response.read()
