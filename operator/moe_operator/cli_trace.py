"""`moerator trace`: what a routing trace says about the load, and what ways of assigning would have made of it."""

import json
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from moe_core.experts.assign import even_slots
from moe_core.experts.checks import FloatArray
from moe_core.experts.replan import Prices
from moe_core.experts.replay import WAYS, Replayed, replay
from moe_core.experts.trace import Trace
from moe_core.outcome import InvalidInput
from moe_operator.cli_files import EXIT_INVALID
from moe_operator.cli_plan import read_trace


def show_trace(
    path: Path, *, ranks: int, redundant: int, window: int, horizon: float, expert_bytes: int, as_json: bool
) -> int:
    """0, or 2 for a trace that cannot be read or played."""
    try:
        trace = read_trace(path)
        load_WLE = windows_of(trace, window)
        slots = even_slots(trace.num_experts, ranks, redundant_per_rank=redundant)
        prices = Prices(bytes_per_expert=expert_bytes, horizon=horizon)
        played = [replay(load_WLE, slots, way, prices=prices) for way in WAYS if _fits(way, slots)]
    except InvalidInput as error:
        typer.echo(str(error), err=True)
        return EXIT_INVALID
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "layers": len(trace.layers),
                    "experts": trace.num_experts,
                    "windows": len(load_WLE),
                    "replayed": [_as_json(one) for one in played],
                },
                indent=2,
            )
        )
        return 0
    console = Console()
    hottest = load_WLE.sum(0).max(1) / np.maximum(load_WLE.sum(0).mean(1), 1e-300)
    console.print(
        f"{len(trace.records)} records of {len(trace.steps)} steps: {len(trace.layers)} layers, {trace.num_experts} "
        f"experts; the hottest expert has {hottest.mean():.1f} times the mean load, {hottest.max():.1f} in one layer"
    )
    table = Table(title=f"{len(load_WLE)} windows over {ranks} ranks, {slots[0]} slots", title_justify="left")
    for column in ("way", "balancedness", "worst window", "moves", "slots that change in a window"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for one in played:
        worst, share = min(one.balancedness), one.moved_share
        table.add_row(one.way, f"{one.mean:.3f}", f"{worst:.3f}", str(sum(one.moves)), f"{share:.1%}")
    console.print(table)
    return 0


def windows_of(trace: Trace, window: int) -> FloatArray:
    """[windows, L, E] picks of `window` steps each; steps of a last, shorter window go with the one before."""
    load_SLE = trace.load_of_steps().astype(np.float64)
    starts = np.arange(0, max(1, len(load_SLE) // window)) * window
    return np.add.reduceat(load_SLE, starts, axis=0)


def _fits(way: str, slots: tuple[int, ...]) -> bool:
    return way != "deepseek" or len(set(slots)) == 1


def _as_json(one: Replayed) -> dict[str, object]:
    return {"way": one.way, "balancedness": one.balancedness, "moves": one.moves, "slots": one.slots}
