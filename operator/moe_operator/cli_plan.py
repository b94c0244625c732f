"""`moerator plan`: what would come of a resource, as a table, as JSON, or as a picture; nothing is started."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from moe_core.contract.packing import FULL
from moe_core.contract.trace import TraceRecord
from moe_core.decide.accept import Refusal
from moe_core.experts.trace import Trace, read_lines
from moe_core.facts import Facts
from moe_core.outcome import InvalidInput, NoFit
from moe_core.preview.outlook import Outlook, Step, look_ahead
from moe_core.preview.size import size_of_config, size_of_shape
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.load import Document
from moe_core.spec.service import MoEServiceSpec
from moe_core.topology.tree import Levels
from moe_operator.cli_facts import Cluster, read_cluster, read_counts, read_model_of, read_planned, wish_of_document
from moe_operator.cli_files import EXIT_INVALID, EXIT_NOT_AS_WISHED
from moe_operator.plan_picture import picture


@dataclass(frozen=True, slots=True)
class _Planned:
    """`no_size` says why bytes and memory are not shown, where the model's config does not tell its size."""

    doc: Document
    looks: tuple[Outlook | Refusal, ...]
    no_size: str = ""


def show_plan(
    names: Sequence[str], *, nodes: str | None, load: str | None, ranks: str | None, as_json: bool, plot: Path | None
) -> int:
    """0 when everything would be accepted and placed, 1 when something would not be, 2 for bad input."""
    if plot is not None and plot.suffix != ".svg":
        return _refuse(f"--plot: the picture is an SVG and its file must end in .svg, got {plot}")
    try:
        documents, topologies = read_planned(names)
        counts = read_counts(ranks)
        cluster = None if nodes is None else read_cluster(nodes)
        trace = None if load is None else read_trace(Path(load))
        planned = [_look(doc, topologies, cluster, counts, trace) for doc in documents]
    except InvalidInput as error:
        return _refuse(str(error))
    if as_json:
        typer.echo(json.dumps([_as_json(one) for one in planned], indent=2))
    else:
        console = Console()
        for one in planned:
            _print(console, one)
    if plot is not None:
        shown = [found for one in planned for found in one.looks if isinstance(found, Outlook)]
        if not shown:
            return _refuse("--plot: nothing that would be accepted")
        try:
            plot.write_text(picture(shown[0]), encoding="utf-8")
        except OSError as error:
            return _refuse(f"--plot: {plot}: {error.strerror}")
        typer.echo(
            f"{plot}: the slots of {documents[0].kind}/{documents[0].name} on {shown[0].num_ranks} ranks", err=True
        )
    wished = all(_is_wished(found) for one in planned for found in one.looks)
    return 0 if wished else EXIT_NOT_AS_WISHED


def _refuse(text: str) -> int:
    typer.echo(text, err=True)
    return EXIT_INVALID


def read_trace(path: Path) -> Trace:
    """One file, or a folder of what the pods of one run recorded. Raises InvalidInput that names the file."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"{path}: no *.jsonl lies in this folder")
    records: list[TraceRecord] = []
    file_of: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            found = list(read_lines(_whole_lines(file)))
        except OSError as error:
            raise InvalidInput(f"{file}: {error.strerror}") from error
        except (InvalidInput, UnicodeDecodeError) as error:
            raise InvalidInput(f"{file}: {error}") from error
        for step, rank in sorted({(record.step, record.rank) for record in found}):
            if (other := file_of.setdefault((step, rank), file)) != file:
                raise InvalidInput(f"{file}: step {step} of rank {rank} is in {other.name} too: these are two traces")
        records += found
    try:
        return Trace.of(records)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _whole_lines(file: Path) -> Iterator[str]:
    """Without a last line that was cut off: whoever wrote it was killed."""
    with file.open(encoding="utf-8") as lines:
        yield from (line for line in lines if line.endswith(("\n", "}")))


def _look(
    doc: Document,
    topologies: Mapping[str, Levels],
    cluster: Cluster | None,
    counts: Sequence[int | None],
    trace: Trace | None,
) -> _Planned:
    wish, checkpoint, size, no_size = wish_of_document(doc), read_model_of(doc), None, ""
    try:
        if isinstance(doc.spec, MoEJobSpec):
            router = doc.spec.model.router
            size = size_of_shape(doc.spec.model.shape, None if router is None else router.config())
        elif checkpoint is None:
            no_size = f"no checkpoint can be read at {doc.raw['spec']['model']['path']} from here"
        elif not checkpoint.fact.problem:
            asked = doc.spec.model.expert_packing if isinstance(doc.spec, MoEServiceSpec) else None
            kept = checkpoint.fact.packing or (asked.contract() if asked is not None else FULL)
            size = size_of_config(checkpoint.config, packing=kept)
    except InvalidInput as error:
        no_size = str(error)
    facts = Facts(
        nodes=() if cluster is None else cluster.nodes_for(wish),
        topologies=topologies,
        model=None if checkpoint is None else checkpoint.fact,
    )
    looks = tuple(look_ahead(wish, facts, num_ranks=count, trace=trace, size=size) for count in counts)
    return _Planned(doc, looks, no_size)


def _is_wished(found: Outlook | Refusal) -> bool:
    return isinstance(found, Outlook) and not isinstance(found.placement, NoFit)


def _print(console: Console, planned: _Planned) -> None:
    doc, looks = planned.doc, planned.looks
    table = Table(title=f"{doc.kind}/{doc.name}", title_justify="left", show_lines=len(looks) > 1)
    table.add_column("")
    for found in looks:
        table.add_column("refused" if isinstance(found, Refusal) else f"{found.num_ranks} ranks", overflow="fold")
    rows = [_cells(found, planned.no_size) for found in looks]
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    for name in names:
        table.add_row(name, *(row.get(name, "") for row in rows))
    console.print(table)


def _cells(found: Outlook | Refusal, no_size: str) -> dict[str, str]:
    if isinstance(found, Refusal):
        return {"accepted": f"no, {found.reason}: {found.message}"}
    cells = {"accepted": found.note, "placement": _placement(found)}
    cells["copies of an expert"] = f"{found.least_copies} to {found.most_copies}"
    cells["coverage survives"] = ", ".join(
        f"{one.failures} rank{'s' if one.failures > 1 else ''} {one.chance:.1%}" for one in found.survival
    )
    if found.survival_of_nodes:
        cells["coverage survives nodes"] = ", ".join(f"{s.failures}: {s.chance:.1%}" for s in found.survival_of_nodes)
    cells["balancedness"] = f"{found.balance.balancedness:.3f} (best possible {found.bound:.3f})"
    if found.size is not None:
        cells["parameters per rank"] = _bytes(max(found.size.rank_bytes(found.expert_map)))
    if found.traffic is not None:
        scopes = dict(found.bytes_by_scope)
        stays = _bytes(scopes.pop("rank"))
        sent = ", ".join(f"{scope} {_bytes(count)}" for scope, count in scopes.items())
        cells["bytes of a step"] = (
            f"{_bytes(found.traffic.sent_bytes)} sent ({sent}), {stays} stay on their rank; {_way(found.step)}"
        )
        if found.size is not None and found.size.uncounted:
            cells["bytes of a step"] += (
                f"; with {found.size.top_k} experts a token, of which {found.size.uncounted} takes another number"
            )
    if told := found.measured.told():
        cells["measured"] = told
        if found.links_s is not None:
            cells["links take"] = f"{found.links_s * 1e3:.3g} ms of a step"
        elif found.measured.links and found.placement is None:
            cells["links take"] = "not known: links count between the nodes of --nodes"
    if no_size:
        cells["bytes and memory"] = f"not known: {no_size}"
    if found.planned is not None:
        cells["planned for this load"] = f"balancedness {found.planned_balance:.3f}; {found.planned.reason}"
        if found.planned.moves:
            cells["moves are paid back in"] = f"{found.planned.payback:.1%} of the horizon"
    if found.crossings is not None:
        cells["other nodes a token meets"] = "; ".join(
            f"{way} {one.nodes:.2f} at balancedness {one.balancedness:.3f}"
            for way, one in (
                ("as assigned", found.crossings.assigned),
                ("packed by load", found.crossings.by_load),
                ("chosen together kept together", found.crossings.together),
            )
        )
    return cells


def _way(step: Step) -> str:
    kind = "training" if step.trains else "decoding"
    way = {"ByNode": "node", "ByToken": "token", "ByPick": "pick"}[step.way]
    of_each = ", each rank with its own load" if step.way != "ByToken" and step.each_rank_its_own_load else ""
    wires = dict.fromkeys((step.dispatch.wire, step.dispatch.combine_wire))
    bits = "" if list(wires) == ["Float32"] else f", in {' and '.join(wires)}"
    return f"{kind} {step.tokens_per_rank} tokens a rank goes by {way}{bits}{of_each}"


def _placement(found: Outlook) -> str:
    if found.placement is None:
        return "not asked (--nodes)"
    if isinstance(found.placement, NoFit):
        return str(found.placement)
    nodes = list(dict.fromkeys(found.placement.node_of_rank.values()))
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}: {', '.join(nodes[:4])}{' ...' if len(nodes) > 4 else ''}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _as_json(planned: _Planned) -> dict[str, Any]:
    return {
        "kind": planned.doc.kind,
        "name": planned.doc.name,
        "sizeUnknown": planned.no_size or None,
        "plans": [_plan_as_json(found) for found in planned.looks],
    }


def _plan_as_json(found: Outlook | Refusal) -> dict[str, Any]:
    if isinstance(found, Refusal):
        return {"accepted": False, "reason": str(found.reason), "message": found.message}
    placed = found.placement
    return {
        "accepted": True,
        "ranks": found.num_ranks,
        "note": found.note,
        "nodeOfRank": dict(placed.node_of_rank) if placed is not None and not isinstance(placed, NoFit) else None,
        "noFit": str(placed) if isinstance(placed, NoFit) else None,
        "slotsOfRank": found.expert_map.slots_of_rank,
        "mapDigest": found.expert_map.digest,
        "logicalOfSlot": found.expert_map.logical_of_slot,
        "copies": {"least": found.least_copies, "most": found.most_copies},
        "survival": {str(s.failures): {"chance": s.chance, "error": s.error} for s in found.survival},
        "survivalOfNodes": {str(s.failures): {"chance": s.chance, "error": s.error} for s in found.survival_of_nodes},
        "balancedness": found.balance.balancedness,
        "balancednessMin": found.balance.balancedness_min,
        "bestBalancedness": found.bound,
        "parameterBytesOfRank": None if found.size is None else found.size.rank_bytes(found.expert_map),
        "step": {
            "tokensPerRank": found.step.tokens_per_rank,
            "trains": found.step.trains,
            "dispatch": found.step.way,
            "wire": found.step.dispatch.wire,
            "combineWire": found.step.dispatch.combine_wire,
            "eachRankItsOwnLoad": found.step.each_rank_its_own_load,
            "picksPerToken": None if found.size is None or found.size.uncounted else found.size.top_k,
        },
        "bytesByScope": dict(found.bytes_by_scope),
        "bytesBetweenRanks": None if found.traffic is None else found.traffic.total_RR.tolist(),
        "measured": found.measured.as_status(),
        "linkSeconds": found.links_s,
        "crossings": None if found.crossings is None else asdict(found.crossings),
        "planned": None
        if found.planned is None
        else {
            "balancedness": found.planned_balance,
            "moves": found.planned.moves,
            "gainSeconds": found.planned.gain_s,
            "costSeconds": found.planned.cost_s,
            "paybackOfHorizon": found.planned.payback if found.planned.gain_s > 0 else None,
            "reason": found.planned.reason,
            "crossDomainBytes": {"before": found.planned.crossed_before, "after": found.planned.crossed_after},
            "logicalOfSlot": found.planned.logical_of_slot,
            "shareOfSlot": found.planned.share_of_slot,
        },
    }
