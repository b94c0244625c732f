"""Commands that look at, or reach into, what runs: a local run of this user, or a cluster through kubectl."""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from moe_core.decide.times import seconds_of
from moe_core.spec.kinds import KINDS, Column, ResourceKind
from moe_core.spec.load import Document
from moe_operator.cli_files import EXIT_INVALID, EXIT_MISSING, read_files
from moe_operator.cli_run import condition, outcome_of
from moe_operator.cluster.local_runs import is_living, living_runs

POD_COLUMNS = (
    Column("Phase", ".status.phase"),
    Column("Ready", '.status.conditions[?(@.type=="Ready")].status'),
    Column("Restarts", ".status.containerStatuses[*].restartCount"),
    Column("Message", ".status.message", wide=True),
)
DRILL_POLL_S = 0.3


def apply_files(names: Sequence[str], *, run: Path | None) -> int:
    from moe_operator.cluster.local_face import FaceRefused, ask

    texts = [(name, read_files([name])) for name in names]
    folder = _need_run(run)
    for _, documents in texts:
        try:
            for applied in ask(folder, "POST", "/v1/apply", _as_text(documents)):
                typer.echo(f"{applied} applied")
        except FaceRefused as refused:
            typer.echo(str(refused), err=True)
            return EXIT_MISSING
    return 0


def delete_resource(kind: str, name: str, *, namespace: str, run: Path | None) -> int:
    from moe_operator.cluster.local_face import FaceRefused, ask

    found = _kind_of(kind)
    try:
        typer.echo(f"{ask(_need_run(run), 'DELETE', f'/v1/objects/{found.kind}/{namespace}/{name}')} deleted")
    except FaceRefused as refused:
        typer.echo(str(refused), err=True)
        return EXIT_MISSING
    return 0


def list_resources(kind: str, *, run: Path | None, cluster: bool, wide: bool) -> int:
    folder = None if cluster else _find_run(run)
    if folder is None:
        return _kubectl("get", kind, *(["-o", "wide"] if wide else []))
    if kind in ("pods", "pod", "po"):
        _print_table("Pod", POD_COLUMNS, _objects(folder, "Pod"), wide=wide)
        return 0
    for resource in KINDS if kind == "moe" else (_kind_of(kind),):
        things = _objects(folder, resource.kind)
        if things:
            _print_table(resource.kind, resource.columns, things, wide=wide)
    return 0


def show_status(kind: str, name: str, *, namespace: str, run: Path | None, cluster: bool) -> int:
    resource = _kind_of(kind)
    folder = None if cluster else _find_run(run)
    if folder is None:
        thing = json.loads(
            _kubectl_output("get", f"{resource.plural}.moerator.dev", name, "-n", namespace, "-o", "json")
        )
    else:
        found = [t for t in _objects(folder, resource.kind) if t["metadata"]["name"] == name]
        if not found:
            typer.echo(f"{resource.kind}/{name} does not exist in the run {folder}", err=True)
            return EXIT_MISSING
        thing = found[0]
    typer.echo(f"{resource.kind} {thing['metadata']['namespace']}/{name}")
    status = dict(thing.get("status", {}))
    status.pop("memory", None)  # the brain's own notes
    for c in status.pop("conditions", ()):
        typer.echo(f"  {c['type']:<16} {c['status']:<8} {c['reason']:<22} {c['message']}")
    if status:
        typer.echo(yaml.safe_dump(status, sort_keys=False, width=120).rstrip())
    return 0


def run_drill(names: Sequence[str], *, run: Path | None) -> int:
    """Apply the drills to a local run, or with kubectl, and wait for their verdicts. Exit code 1 when one failed."""
    documents = read_files(names)
    if wrong := [document for document in documents if document.kind != "MoEDrill"]:
        typer.echo(f"{wrong[0].kind}/{wrong[0].name} is no MoEDrill; `moerator apply` takes other kinds", err=True)
        return 2
    folder = _find_run(run)
    if folder is None:
        if code := _kubectl("apply", "-f", "-", given=_as_text(documents)):
            return code
    elif over := [document.name for document in documents if outcome_of(_drill_of_run(folder, document)) is not None]:
        typer.echo(
            f"MoEDrill/{over[0]} is over already; `moerator delete drill {over[0]}` or another name lets it run again",
            err=True,
        )
        return EXIT_INVALID
    elif not _apply_to_run(folder, documents):
        return EXIT_MISSING
    told: dict[str, str] = {}
    waiting = {document.name: document for document in documents}
    passed = True
    while waiting:
        for name, document in list(waiting.items()):
            thing = _drill_of_cluster(document) if folder is None else _drill_of_run(folder, document)
            complete = condition(thing, "Complete")
            if complete and told.get(name) != complete["message"]:
                told[name] = complete["message"]
                typer.echo(f"MoEDrill/{name}: {complete['reason']}: {complete['message']}")
            outcome = outcome_of(thing)
            if outcome is not None:
                del waiting[name]
                passed = passed and outcome
        time.sleep(DRILL_POLL_S)
    return 0 if passed else 1


def _apply_to_run(folder: Path, documents: Sequence[Document]) -> bool:
    from moe_operator.cluster.local_face import FaceRefused, ask

    try:
        ask(folder, "POST", "/v1/apply", _as_text(documents))
    except FaceRefused as refused:
        typer.echo(str(refused), err=True)
        return False
    return True


def _drill_of_run(folder: Path, drill: Document) -> dict[str, Any]:
    if not is_living(folder):
        typer.echo(f"the run {folder} ended before the drill did", err=True)
        raise typer.Exit(EXIT_MISSING)
    meant = (drill.namespace, drill.name)
    things = (t for t in _objects(folder, "MoEDrill") if (t["metadata"]["namespace"], t["metadata"]["name"]) == meant)
    return next(things, {})


def _drill_of_cluster(drill: Document) -> dict[str, Any]:
    """Where the file names no namespace, kubectl's own is meant."""
    given = drill.raw["metadata"].get("namespace")
    where = ["-n", given] if given else []
    found: dict[str, Any] = json.loads(
        _kubectl_output("get", "moedrills.moerator.dev", drill.name, *where, "-o", "json")
    )
    return found


def evaluate_path(thing: Any, path: str) -> str:
    """A printer column's value: dots, `[*]`, and `[?(@.type=="X")]`, which is all our columns use.

    >>> evaluate_path({"status": {"conditions": [{"type": "Ready", "status": "True"}]}},
    ...               '.status.conditions[?(@.type=="Ready")].status')
    'True'
    """
    found = [thing]
    for step in _steps_of(path):
        if step == "[*]":
            found = [item for value in found if isinstance(value, list) for item in value]
        elif step.startswith("[?"):
            wanted = step.split('"')[1]
            found = [item for value in found if isinstance(value, list) for item in value if item["type"] == wanted]
        else:
            found = [value[step] for value in found if isinstance(value, dict) and step in value]
    return ",".join(str(value) for value in found if value is not None)


def _as_text(documents: Sequence[Document]) -> str:
    """Documents as JSON, which is YAML that no reader takes otherwise than it was meant."""
    return "\n---\n".join(json.dumps(document.raw) for document in documents)


def _steps_of(path: str) -> list[str]:
    steps: list[str] = []
    for part in path.lstrip(".").replace("[?(@.", "\0[?(@\1").replace("[*]", "\0[*]").split("."):
        steps += [step.replace("\1", ".") for step in part.split("\0") if step]
    return steps


def _print_table(kind: str, columns: Sequence[Column], things: Sequence[dict[str, Any]], *, wide: bool) -> None:
    shown = [column for column in columns if wide or not column.wide]
    rows = [[kind.upper(), *(column.name.upper() for column in shown)]]
    for thing in things:
        rows.append([thing["metadata"]["name"], *(_cell(thing, column) for column in shown)])
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(thing: dict[str, Any], column: Column) -> str:
    value = evaluate_path(thing, column.path)
    if value and column.type == "date":
        return age(time.time() - (seconds_of(value) or 0.0))
    return value or "-"


def age(seconds: float) -> str:
    """As kubectl shows it.

    >>> age(47), age(200), age(7300), age(200_000)
    ('47s', '3m20s', '2h1m', '2d7h')
    """
    left = max(0, int(seconds))
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts: list[str] = []
    for unit, size in units:
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return "".join(part for part in parts[:2] if not (part.startswith("0") and len(parts) > 1))


def _objects(run: Path, kind: str) -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    things = []
    for path in sorted((run / "objects" / kind).glob("*.yaml")):
        try:
            things.append(yaml.load(path.read_text(), Loader=loader))
        except FileNotFoundError:
            continue  # deleted meanwhile
    return things


def _kind_of(word: str) -> ResourceKind:
    for resource in KINDS:
        if word.lower() in (resource.kind.lower(), resource.plural, resource.short_name):
            return resource
    known = ", ".join(f"{resource.plural} ({resource.short_name})" for resource in KINDS)
    raise typer.BadParameter(f"{word} is none of {known}")


def _find_run(run: Path | None) -> Path | None:
    if run is not None and not (run / "objects").is_dir():
        raise typer.BadParameter(f"{run} is no run folder", param_hint="--run")
    return run or next(iter(living_runs()), None)


def _need_run(run: Path | None) -> Path:
    found = _find_run(run)
    if found is None:
        typer.echo("no local run goes on; `moerator run -f FILE` starts one", err=True)
        raise typer.Exit(EXIT_MISSING)
    return found


def _kubectl(*arguments: str, given: str | None = None) -> int:
    done = subprocess.run([_need_kubectl(), *arguments], check=False, input=given, text=True)
    _tell_failure(done.returncode)
    return done.returncode


def _kubectl_output(*arguments: str) -> str:
    done = subprocess.run([_need_kubectl(), *arguments], check=False, stdout=subprocess.PIPE, text=True)
    _tell_failure(done.returncode)
    if done.returncode:
        raise typer.Exit(done.returncode)
    return done.stdout


def _tell_failure(code: int) -> None:
    """kubectl has said what is wrong, but not why it was asked."""
    if code and not living_runs():
        typer.echo("no local run goes on (`moerator run -f FILE` starts one), so kubectl was asked", err=True)


def _need_kubectl() -> str:
    found = shutil.which("kubectl")
    if found is None:
        typer.echo("no local run goes on, and there is no kubectl to ask a cluster with", err=True)
        raise typer.Exit(EXIT_MISSING)
    return found
