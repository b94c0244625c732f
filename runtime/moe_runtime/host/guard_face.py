"""A rank's guard as peers and coordinator reach it: TCP, JSON lines, bearer token.

{"op": "status", "to": POD_UID}                      -> {"state": "alive", "pid": 1, "silent_ms": 80, "reason": ""}
{"op": "fence",  "to": POD_UID, "reason": "..."}     -> {"state": "reaped", ...}
{"op": "fault",  "to": POD_UID, "fault": "hang"}     -> {"state": ...}, or an error unless faults are enabled
"""

from moe_runtime.host.guard import Guard
from moe_runtime.membership.wire import Json, LineServer


class GuardFace:
    """Listens from its creation until `close()`; `address` is host:port."""

    def __init__(
        self, guard: Guard, *, token: str, host: str = "127.0.0.1", port: int = 0, faults_enabled: bool = False
    ) -> None:
        self._guard = guard
        self._faults_enabled = faults_enabled
        self._server = LineServer(self._answer, token=token, host=host, port=port)
        self.address = self._server.address

    def close(self) -> None:
        self._server.close()

    def _answer(self, request: Json) -> Json:
        guard, op = self._guard, request["op"]
        if request["to"] != guard.pod_uid:
            return {"error": f"this guards {guard.pod_uid}, not {request['to']}"}
        if op == "fence":
            guard.fence(str(request.get("reason", "asked to")))
        elif op == "fault":
            if not self._faults_enabled:
                return {"error": "forbidden: faults are not enabled for this pod"}
            guard.inject(str(request["fault"]))
        elif op != "status":
            return {"error": f"unknown op {op!r}"}
        silent_ms = round(guard.silent_s * 1000)
        return {"state": guard.state, "pid": guard.pid, "silent_ms": silent_ms, "reason": guard.reason}
