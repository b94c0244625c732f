"""Asking a rank's guard for a drill's fault; the other side is `guard.Guard`."""

from moe_core.contract.exchange import FaultRequest
from moe_runtime.membership.wire import WireError, ask

_CALL_MS = 3000


class GuardUnreachable(RuntimeError):
    """The guard did not answer, or refused."""


def inject_fault(address: str, fault: FaultRequest, *, token: str) -> None:
    """Blocks for up to 3 s. Raises GuardUnreachable."""
    try:
        ask(
            address,
            {"op": "fault", "to": fault.pod_uid, "fault": fault.fault},
            token=token,
            timeout_ms=_CALL_MS,
        )
    except WireError as error:
        raise GuardUnreachable(str(error)) from error
