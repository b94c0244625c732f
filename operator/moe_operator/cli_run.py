"""`moerator run`: resources on this machine until they are over, with every turn of their conditions on one line."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import typer

from moe_core.outcome import Reason
from moe_core.spec.load import Document
from moe_operator.cli_files import EXIT_INVALID, read_files
from moe_operator.cluster.local import RESOURCE_KINDS
from moe_operator.cluster.local_shell import LocalShell
from moe_operator.cluster.protocol import Key

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def run_files(names: Sequence[str], *, keep: bool) -> int:
    """Exit code: 1 when a job or drill failed, 130 when it was interrupted before everything was over."""
    documents = read_files(names)
    if refused := [document for document in documents if document.kind == "ExpertMap"]:
        typer.echo(f"ExpertMap/{refused[0].name}: ExpertMaps are written by moerator; apply a MoEService", err=True)
        return EXIT_INVALID
    try:
        return asyncio.run(_run(documents, keep=keep))
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("stopped; no process is left", err=True)
        serves = any(document.kind == "MoEService" for document in documents)
        return 0 if serves and all(document.kind == "MoEService" for document in documents) else EXIT_INTERRUPTED


async def _run(documents: Sequence[Document], *, keep: bool) -> int:
    async with LocalShell(keep=keep) as shell:
        typer.echo(f"run folder {shell.cluster.folder}" + (" (kept)" if keep else ""))
        teller = ConditionTeller(started_at=time.monotonic())
        keys = [shell.apply(document.raw) for document in documents]
        watched = [key for key in keys if key.kind in RESOURCE_KINDS]
        while True:
            things = [thing for key in watched if (thing := shell.cluster.resource(key)) is not None]
            for thing in things:
                for line in teller.news(thing):
                    typer.echo(line)
                with contextlib.suppress(KeyError):
                    if thing["kind"] == "MoEService" and teller.first_time_ready(thing):
                        port = shell.cluster.port_of(_key(thing), "gateway")
                        wanted = thing["spec"].get("gateway", {}).get("port", port)
                        taken = "" if port == wanted else f" (somebody else listens on its port {wanted})"
                        typer.echo(f"{thing['metadata']['name']} answers at http://127.0.0.1:{port}/v1{taken}")
            outcomes = [outcome_of(thing) for thing in things]
            if all(outcome is not None for outcome in outcomes):
                return 0 if all(outcomes) else EXIT_FAILED
            await shell.changed()


def _key(thing: dict[str, Any]) -> Key:
    return Key(thing["kind"], thing["metadata"]["namespace"], thing["metadata"]["name"])


def condition(thing: dict[str, Any], kind: str) -> dict[str, Any]:
    """One condition of a resource; empty before it was first decided."""
    return next((c for c in thing.get("status", {}).get("conditions", ()) if c["type"] == kind), {})


_FOR_GOOD = (Reason.INVALID_SPEC, Reason.MODEL_NOT_SUPPORTED, Reason.COVERAGE_IMPOSSIBLE)


def outcome_of(thing: dict[str, Any]) -> bool | None:
    """How a resource ended: True well, False badly, None while it goes on."""
    accepted = condition(thing, "Accepted")
    is_new = thing.get("metadata", {}).get("generation", 1) == 1  # a refused edit ends nothing
    if is_new and accepted.get("status") == "False" and accepted.get("reason") in _FOR_GOOD:
        return False
    if condition(thing, "Failed").get("status") == "True":
        return False
    if condition(thing, "Complete").get("status") == "True":
        return str(thing.get("status", {}).get("verdict", "Passed")) == "Passed"
    return None


class ConditionTeller:
    """Turns status into lines: one per condition whose status or reason changed."""

    def __init__(self, *, started_at: float) -> None:
        self._started_at = started_at
        self._told: dict[tuple[str, str, str], tuple[str, str]] = {}
        self._ready: set[str] = set()

    def news(self, thing: dict[str, Any]) -> list[str]:
        """Lines with the seconds since the start, for every turn since the last call."""
        seconds = time.monotonic() - self._started_at
        name = f"{thing['kind']}/{thing['metadata']['name']}"
        return [
            f"{seconds:6.1f} s  {name}  {c['type']}={c['status']} {c['reason']}: {c['message']}"
            for c in self.turns(thing)
        ]

    def turns(self, thing: dict[str, Any]) -> list[dict[str, Any]]:
        """The conditions that changed their status or reason since the last call."""
        turned = []
        for c in thing.get("status", {}).get("conditions", ()):
            key, now = (thing["kind"], thing["metadata"]["name"], c["type"]), (c["status"], c["reason"])
            if self._told.get(key) != now:
                self._told[key] = now
                turned.append(c)
        return turned

    def first_time_ready(self, thing: dict[str, Any]) -> bool:
        uid = thing["metadata"]["uid"]
        if uid in self._ready or condition(thing, "Ready").get("status") != "True":
            return False
        self._ready.add(uid)
        return True
