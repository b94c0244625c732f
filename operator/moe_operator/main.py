"""The operator's process: `kopf run -A -m moe_operator.main`, or `moerator operator`, which calls `run_operator`.

kopf brings the watches, the event loop and the signals; nothing of it is written to any object.
"""

import logging
import sys
from typing import Any, cast

import kopf
from kopf._core.engines.peering import Identity

from moe_operator import handlers
from moe_operator.errors import BadSettings, OperatorError
from moe_operator.settings import OperatorSettings
from moe_operator.shell import Shell

logger = logging.getLogger(__name__)

_given: list[OperatorSettings] = []

handlers.register()


def run_operator(settings: OperatorSettings | None = None) -> int:
    """Run until SIGTERM or SIGINT, then give the lease back; the exit code.

    A lost lease or a part that failed ends the process at once. Settings come from the environment if not given.
    """
    try:
        settings = settings or OperatorSettings.from_environment()
    except BadSettings as error:
        sys.stderr.write(f"{error}\n")
        return 2
    kopf.configure(
        verbose=settings.log_level == "INFO",
        debug=settings.log_level == "DEBUG",
        quiet=settings.log_level in ("WARNING", "ERROR"),
        log_format=kopf.LogFormat.JSON if settings.log_format == "json" else kopf.LogFormat.FULL,
    )
    _given[:] = [settings]
    # Named by us: kopf would ask who runs it, and a container's user has no entry in its passwd file.
    identity = Identity(settings.identity)
    if settings.namespaces:
        kopf.run(namespaces=settings.namespaces, standalone=True, identity=identity)
    else:
        kopf.run(clusterwide=True, standalone=True, identity=identity)
    return 0


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    try:
        ours = _given[0] if _given else OperatorSettings.from_environment()
        configure(settings, ours)
        memo.shell = await Shell.connect(ours)
    except OperatorError as error:
        raise kopf.PermanentError(str(error)) from error  # anything else would be tried again after a minute
    await cast(Shell, memo.shell).start()


@kopf.on.login()
async def log_in(memo: kopf.Memo, **_: Any) -> kopf.AiohttpSession:
    """kopf watches with our session, so that liveness sees its requests; asked for again when credentials expire."""
    shell = cast(Shell, memo.shell)
    return kopf.AiohttpSession(server=shell.api.url, aiohttp_session=await shell.api.open_session(shell.trace.config()))


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:
    await cast(Shell, memo.shell).close()


def configure(settings: kopf.OperatorSettings, ours: OperatorSettings) -> None:
    """Every time-out explicit, and nothing written by kopf: no peering, no events from log lines, no finalizer."""
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    # kopf removes its finalizer where no handler of this process needs it, also when another kopf operator set it.
    settings.persistence.finalizer = "moerator.dev/unused"
    settings.watching.server_timeout = ours.watch_timeout_s
    settings.watching.client_timeout = ours.watch_timeout_s + 10
    settings.watching.inactivity_timeout = ours.watch_timeout_s + 5
    settings.watching.connect_timeout = ours.request_timeout_s
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = ours.request_timeout_s
    settings.networking.enforce_retry_after = True
    settings.execution.default_backoff = 2
    settings.process.ultimate_exiting_timeout = 20
    handlers.select(settings)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("kopf.activities").setLevel(logging.WARNING)
