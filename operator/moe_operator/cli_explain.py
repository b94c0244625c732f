"""`moerator explain`: whether a resource fits on given nodes, if not why, in numbers, and what would help."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_core.decide.accept import Refusal
from moe_core.facts import Facts
from moe_core.outcome import InvalidInput, NoFit
from moe_core.preview.explain import MOST_MORE, Explained, explain
from moe_core.spec.load import Document
from moe_core.topology.fit import Fit
from moe_core.topology.survey import DomainRoom
from moe_core.topology.tree import Path
from moe_operator.cli_facts import read_cluster, read_counts, read_model_of, read_planned, wish_of_document
from moe_operator.cli_files import EXIT_INVALID, EXIT_NOT_AS_WISHED

MOST_NAMED = 3
MOST_SHOWN = 12
"""Domains in a table; the others are summed up, and told one by one as JSON."""


def show_explanation(names: Sequence[str], *, nodes: str, ranks: str | None, as_json: bool) -> int:
    """0 when everything fits, 1 when something does not or is refused, 2 for bad input."""
    try:
        documents, topologies = read_planned(names)
        counts = read_counts(ranks)
        cluster = read_cluster(nodes)
        answers: list[tuple[Document, Explained | Refusal]] = []
        for doc in documents:
            wish, checkpoint = wish_of_document(doc), read_model_of(doc)
            model = None if checkpoint is None else checkpoint.fact
            facts = Facts(nodes=cluster.nodes_for(wish), topologies=topologies, model=model)
            answers += [(doc, explain(wish, facts, num_ranks=count)) for count in counts]
    except InvalidInput as error:
        typer.echo(str(error), err=True)
        return EXIT_INVALID
    if as_json:
        typer.echo(json.dumps([_as_json(doc, found) for doc, found in answers], indent=2))
    else:
        console = Console(highlight=False)
        for doc, found in answers:
            _print(console, f"{doc.kind}/{doc.name}", found)
        if not cluster.num_pods:
            console.print("The file holds no pods, so nothing counts as in use: `kubectl get nodes,pods -A -o yaml`.")
    fits = all(isinstance(found, Explained) and isinstance(found.placement, Fit) for _, found in answers)
    return 0 if fits else EXIT_NOT_AS_WISHED


def _print(console: Console, name: str, found: Explained | Refusal) -> None:
    if isinstance(found, Refusal):
        console.print(f"[bold]{name}[/] is refused, {found.reason}:")
        console.print(f"  {found.message}", markup=False)
    elif isinstance(found.placement, NoFit):
        _print_no_fit(console, name, found, found.placement)
    else:
        _print_fit(console, name, found, found.placement)
    if isinstance(found, Explained) and (told := found.measured.told()):
        console.print(f"Measured while it ran: {told}.", markup=False)
    console.print()


def _print_no_fit(console: Console, name: str, found: Explained, why: NoFit) -> None:
    if why.beside:
        console.print(f"[bold]{name}[/] does not fit: {escape(str(why))}.")
        return
    console.print(f"[bold]{name}[/] does not fit: {escape(_asked(why))}.")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(found.level or "cluster")
    for column in ("nodes", "room", "wanted"):
        table.add_column(column, justify="right")
    table.add_column("what takes the rest")
    for domain in found.domains[:MOST_SHOWN]:
        name_of, room = "/".join(domain.path) or "all nodes", str(domain.room)
        counts = (str(domain.num_nodes), room, str(found.num_ranks))
        table.add_row(escape(name_of), *counts, escape(_counted(domain.excluded)))
    others = found.domains[MOST_SHOWN:]
    if others:
        nodes = sum(domain.num_nodes for domain in others)
        table.add_row(
            f"{len(others)} more", str(nodes), f"<= {others[0].room}", "", escape(_counted(_together(others)))
        )
    if found.domains:
        console.print(table)
    for label, count in found.outside.items():
        console.print(f"Outside the topology: {_several(count, 'node')} without the label {label}.", markup=False)
    if not why.relaxations:
        console.print(why.lever, markup=False)
        return
    console.print("What would help, each tried alone with the same placement, the cheapest first:")
    steps = Table.grid(padding=(0, 1))
    for number, change in enumerate(why.relaxations, start=1):
        steps.add_row(f"  {number}.", escape(change.text))
    console.print(steps)


def _print_fit(console: Console, name: str, found: Explained, placed: Fit) -> None:
    num_nodes = len(set(placed.node_of_rank.values()))
    level = found.home_level or "cluster"
    where = f"{_several(num_nodes, 'node')} of {_several(len(found.homes), level)}" if found.home_level else ""
    console.print(
        f"[bold]{name}[/] fits: {_several(found.num_ranks, 'rank')} on {where or _several(num_nodes, 'node')}."
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(level)
    for column in ("ranks", "nodes", "room left"):
        table.add_column(column, justify="right")
    table.add_column("a lost rank goes")
    table.add_column("a lost node's ranks go")
    shown, in_use = found.homes[:MOST_SHOWN], {home.path for home in found.homes}
    for home in shown:
        counts = (str(count) for count in (home.num_ranks, home.num_nodes, home.room))
        lost = (_goes(home.path, to, in_use, level) for to in (home.rank_lost, home.node_lost))
        table.add_row(escape("/".join(home.path)) or "all nodes", *counts, *map(escape, lost))
    if len(found.homes) > len(shown):
        table.add_row(f"{len(found.homes) - len(shown)} more")
    console.print(table)
    beside = ("At least " if found.more == MOST_MORE else "") + _several(found.more, "more such gang")
    console.print(f"{beside} would fit beside it." if found.more else "No second gang like it would fit beside it.")


def _asked(why: NoFit) -> str:
    """The NoFit without its counts and levers, which the table and the list have."""
    where = f"in one {why.level}" if why.level else "in the cluster"
    where += f" {why.terms}" if why.terms else ""
    best = f"{why.best_domain} has room for {why.best}" if why.best_domain else f"there is room for {why.best}"
    return f"it needs room for {_several(why.wanted, 'rank')} {where}, and {best}"


def _goes(home: Path, to: tuple[Path, ...] | None, in_use: Set[Path], level: str) -> str:
    if to is None:
        return "nowhere"
    if to == (home,):
        return f"to the same {level}" if home else "to other nodes"
    if len(to) <= MOST_NAMED:
        return f"to {', '.join('/'.join(path) for path in to)}"
    new = len(set(to) - in_use)
    return f"to {len(to)} {level}s" + (f", {new} of them new" if new else " in use")


def _counted(excluded: Mapping[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in excluded.items()) or "nothing"


def _together(domains: Sequence[DomainRoom]) -> dict[str, int]:
    total: dict[str, int] = {}
    for domain in domains:
        for cause, count in domain.excluded.items():
            total[cause] = total.get(cause, 0) + count
    return dict(sorted(total.items()))


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _as_json(doc: Document, found: Explained | Refusal) -> dict[str, Any]:
    head: dict[str, Any] = {"kind": doc.kind, "name": doc.name}
    if isinstance(found, Refusal):
        return head | {"accepted": False, "fits": False, "reason": str(found.reason), "message": found.message}
    head |= {"accepted": True, "ranks": found.num_ranks, "level": found.level or None}
    head |= {"measured": found.measured.as_status()}
    rooms = {
        "domains": [
            {"path": one.path, "nodes": one.num_nodes, "room": one.room, "excluded": dict(one.excluded)}
            for one in found.domains
        ],
        "nodesWithoutLabel": dict(found.outside),
    }
    if isinstance(found.placement, NoFit):
        changes = [asdict(change) for change in found.placement.relaxations]
        return head | {"fits": False, "message": str(found.placement), "relaxations": changes} | rooms
    homes = [
        {"path": one.path, "ranks": one.num_ranks, "nodes": one.num_nodes, "roomLeft": one.room}
        | {"rankLostGoesTo": one.rank_lost, "nodeLostGoesTo": one.node_lost}
        for one in found.homes
    ]
    placed = {"nodeOfRank": dict(found.placement.node_of_rank), "spareNodes": found.placement.spare_nodes}
    return head | {"fits": True, **placed, "homes": homes, "moreGangs": found.more} | rooms
