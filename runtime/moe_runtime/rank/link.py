"""A rank's line to the coordinator: reports go there, the newest directive comes back. Steps never wait for it.

While no coordinator answers, the last directive stays: ranks go on with what they know. A rank whose line has broken by
a mistake of ours ends: nobody would hear of it again.
"""

import http.client
import os
import threading
import time
import traceback
from collections.abc import Callable
from urllib.parse import urlsplit

from moe_core.outcome import InvalidInput
from moe_runtime.registration import Directive, RankReport

_HOLD_S = 0.4
"""The coordinator holds its answer for so long when there is no news, so no phase is reported later than this."""
_CALL_S = 3.0
_RETRY_S = 0.3
EXIT_LINK_BROKEN = 72


class Loads:
    """Leaves the load out of most reports: () says that there is none newer than the last."""

    def __init__(self) -> None:
        self._sent: tuple[tuple[int, ...], ...] = ()
        self._due = 0.0

    def thin(self, report: RankReport, now: float, *, every_s: float) -> RankReport:
        if now < self._due or report.load == self._sent:
            return report.model_copy(update={"load": ()})
        self._sent, self._due = report.load, now + every_s
        return report


def _end_process(code: int) -> None:
    os._exit(code)


def _print(text: str) -> None:
    print(text, flush=True)


class CoordinatorLink:
    """`directive` is the newest that came back; an empty one before the first."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        end_process: Callable[[int], None] = _end_process,
        say: Callable[[str], None] = _print,
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._end_process, self._tell = end_process, say
        self._stop = threading.Event()
        self._trouble = ""
        self.directive = Directive()

    def start(self, report: Callable[[], RankReport], *, heard: Callable[[Directive], object]) -> None:
        """`report()` is called before every message, `heard` with every directive, both from the link's thread."""
        threading.Thread(target=self._keep, args=(report, heard), name="coordinator-link", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _keep(self, make_report: Callable[[], RankReport], heard: Callable[[Directive], object]) -> None:
        try:
            self._run(make_report, heard)
        finally:
            if not self._stop.is_set():
                traceback.print_exc()
                self._end_process(EXIT_LINK_BROKEN)

    def _say(self, trouble: str) -> None:
        """When it begins, when it becomes another, and when it is over."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._tell(trouble or "the coordinator answers again")

    def _run(self, make_report: Callable[[], RankReport], heard: Callable[[Directive], object]) -> None:
        connection: http.client.HTTPConnection | None = None
        loads = Loads()
        while not self._stop.is_set():
            if connection is None:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=_CALL_S)
                loads = Loads()  # whoever answers may be a new coordinator, which knows none
            report = loads.thin(make_report(), time.monotonic(), every_s=self.directive.load_every_s).model_copy(
                update={"directive_seen": self.directive.seal, "wait_s": _HOLD_S}
            )
            try:
                connection.request("POST", "/v1/register", body=report.canonical(), headers=self._headers)
                response = connection.getresponse()
                body = response.read()
                if response.status == 200:
                    self.directive = Directive.parse(body)
                    heard(self.directive)
                if response.status in (200, 204):
                    self._say("")
                else:
                    self._say(f"the coordinator refused a report: {response.status} {body[:300]!r}")
                    self._stop.wait(_RETRY_S)
            except (OSError, http.client.HTTPException, InvalidInput) as error:
                self._say(f"no answer from the coordinator at {self._host}:{self._port}: {error}")
                connection.close()
                connection = None
                self._stop.wait(_RETRY_S)
