"""Assignments of redundant experts: time, evenness, copies that meet on a rank, and moves; beside EPLB's own code.

    PYTHONPATH=tests:operator python tests/bench/planner.py --eplb /path/to/EPLB/eplb.py

Loads as in the field's comparisons: 58 layers of 256 experts, 524,288 routed picks a layer, drawn with numpy's
default_rng(0), popularity Zipf or lognormal and permuted in each layer. Copies share their expert's load evenly but
where a plan from the map there is (resample, drift) splits it; its budget row may move 5 % of the slots. balance is
mean over max of the ranks' load, meant over layers; bound is the best that any packing of the plan's own copies could
have; as dealt is balance with tokens on whole lanes, as the data plane has them; cross is the part of the picks that
leave their node, of four nodes. Without --eplb the peer is moerator's `deepseek` policy, which is exact on EPLB's
published example.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.align import arrivals, copies_in, slots_on_ranks
from moe_core.experts.anew import pack_anew
from moe_core.experts.bounds import bound_of_copies
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.eplb import rebalance_experts
from moe_core.experts.fleet import Fleet
from moe_core.experts.replan import Prices, Rows, replan
from moe_core.experts.shelf import Shelf, rows_of
from moe_core.experts.traffic import StepShape, picks_between

LAYERS, EXPERTS, SLOTS, PICKS = 58, 256, 288, 524_288
KINDS = ("zipf 0.5", "zipf 1.0", "lognormal 0.5", "lognormal 1.0")
NUM_NODES, NUM_GROUPS = 4, 8
CROSS_LAYERS = 8
Peer = Callable[[FloatArray, int, int, int], IntArray]
"""(load, groups, nodes, ranks) -> logical expert of each slot [L, SLOTS]."""


def popularity(kind: str, rng: np.random.Generator, num_layers: int) -> FloatArray:
    name, parameter = kind.split()
    rows = []
    for _ in range(num_layers):
        if name == "zipf":
            row = rng.permutation(1 / np.arange(1, EXPERTS + 1) ** float(parameter))
        else:
            row = rng.lognormal(0, float(parameter), EXPERTS)
        rows.append(row / row.sum())
    return np.stack(rows)


def draw(chances: FloatArray, rng: np.random.Generator) -> FloatArray:
    return np.stack([rng.multinomial(PICKS, row) for row in chances]).astype(np.float64)


def eplb_of(path: Path | None) -> tuple[str, Peer]:
    if path is None:
        return "deepseek policy", lambda load, groups, nodes, ranks: rebalance_experts(
            load, SLOTS, groups, nodes, ranks
        )[0]
    import torch

    spec = importlib.util.spec_from_file_location("eplb_peer", path)
    assert spec is not None and spec.loader is not None, f"no module at {path}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def peer(load: FloatArray, groups: int, nodes: int, ranks: int) -> IntArray:
        plan: IntArray = module.rebalance_experts(torch.from_numpy(load), SLOTS, groups, nodes, ranks)[0].numpy()
        return plan

    return "EPLB", peer


def ours(load: FloatArray, fleet: Fleet) -> Shelf:
    return pack_anew(load, fleet)


def timed(work: Callable[[], Any], runs: int) -> tuple[Any, float]:
    """The result and the median milliseconds."""
    result, times = None, []
    for _ in range(runs):
        started = time.perf_counter()
        result = work()
        times.append((time.perf_counter() - started) * 1000)
    return result, statistics.median(times)


def judged(logical_LRS: IntArray, load: FloatArray, fleet: Fleet) -> dict[str, Any]:
    """Balance, copies that share a rank with another of their expert, balance that these copies could have at best."""
    shelf = Shelf.of(load, copies_in(logical_LRS, EXPERTS), fleet, logical_LRS)
    mean = load.sum(1) / fleet.num_ranks
    bound = bound_of_copies(load, shelf.copies_LE, fleet)
    return {
        "balance": float((mean / shelf.load_LR.max(1)).mean()),
        "repeats": int(shelf.repeats_LRS().sum()),
        "bound": float((mean / bound).mean()),
        "cross": cross_of(logical_LRS, load, fleet),
    }


def cross_of(logical_LRS: IntArray, load: FloatArray, fleet: Fleet) -> float:
    """Part of the picks that leave their node, with the nearest copy that keeps the copies' parts even."""
    nodes = tuple(f"n{rank * NUM_NODES // fleet.num_ranks}" for rank in range(fleet.num_ranks))
    some = slice(0, CROSS_LAYERS)
    layout = ExpertMap(
        generation=0,
        num_logical_experts=EXPERTS,
        slots_of_rank=fleet.slots_of_rank,
        logical_of_slot=rows_of(logical_LRS[some], fleet, EXPERTS),
    )
    picks_RR = picks_between(layout, load[some], StepShape(1, 1, 1), domain_of_rank=nodes).sum(0)
    is_cross_RR = np.asarray(nodes)[:, None] != np.asarray(nodes)[None, :]
    return float(picks_RR[is_cross_RR].sum() / picks_RR.sum())


def dealt(rows: Rows, shares: Rows, load: FloatArray, fleet: Fleet) -> float:
    """Balance with each source's tokens on whole lanes, as the data plane deals them (choice.py)."""
    expert_map = ExpertMap(
        generation=0,
        num_logical_experts=EXPERTS,
        slots_of_rank=fleet.slots_of_rank,
        logical_of_slot=rows,
        share_of_slot=shares,
    )
    load_LR = picks_between(expert_map, load, StepShape(1, 1, 1)).sum(1)
    return float((load_LR.mean(1) / load_LR.max(1)).mean())


def from_scratch(num_ranks: int, peer: Peer, runs: int) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        rng = np.random.default_rng(0)
        load = draw(popularity(kind, rng, LAYERS), rng)
        for domains in (0, NUM_NODES):
            fleet = Fleet.even(SLOTS, num_ranks, num_domains=domains)
            shelf, ms = timed(partial(ours, load, fleet), runs)
            name = f"moerator, {domains} domains" if domains else "moerator"
            rows.append({"load": kind, "plan": name, "ms": ms, **judged(shelf.logical_LRS, load, fleet)})
        flat = Fleet.even(SLOTS, num_ranks)
        for name, groups, nodes in (("global", 1, 1), ("group-local", NUM_GROUPS, NUM_NODES)):
            if num_ranks % nodes or (SLOTS // num_ranks) < 1:
                continue
            rows_of_peer, ms = timed(partial(peer, load, groups, nodes, num_ranks), max(1, runs // 5))
            slots = slots_on_ranks(rows_of_peer.tolist(), flat, num_experts=EXPERTS)
            rows.append(
                {
                    "load": kind,
                    "plan": f"peer, {name}",
                    "ms": ms,
                    **judged(slots, load, flat),
                }
            )
    return rows


def resampled(peer: Peer, num_ranks: int) -> list[dict[str, Any]]:
    """The same popularity drawn again: what a plan for the new draw moves, and what it wins."""
    rows = []
    fleet = Fleet.even(SLOTS, num_ranks)
    for kind in KINDS:
        rng = np.random.default_rng(0)
        chances = popularity(kind, rng, LAYERS)
        first, second = draw(chances, rng), draw(chances, rng)
        mean = second.sum(1) / num_ranks
        start = ours(first, fleet)
        stays = judged(start.logical_LRS, second, fleet)["balance"]
        best = judged(ours(second, fleet).logical_LRS, second, fleet)["balance"]
        budget = round(0.05 * SLOTS * LAYERS)
        for name, prices in (
            ("free moves, 5 % of slots", Prices(most_moves=budget)),
            ("moves dearer than the gain", Prices(bytes_per_expert=44_000_000, horizon=1.0)),
        ):
            plan, ms = timed(partial(replan, second, fleet, start.rows(), prices=prices), 1)
            after = float((mean / np.asarray(plan.worst_after)).mean())
            rows.append(
                {
                    "load": kind,
                    "plan": name,
                    "ms": ms,
                    "moved": plan.moves / (SLOTS * LAYERS),
                    "before": stays,
                    "after": after,
                    "of the gain": (after - stays) / (best - stays),
                    "as dealt": dealt(plan.logical_of_slot, plan.share_of_slot, second, fleet),
                    "before, dealt": dealt(start.rows(), (), second, fleet),
                }
            )
        before, after_rows = (
            slots_on_ranks(peer(load, 1, 1, num_ranks).tolist(), fleet, num_experts=EXPERTS) for load in (first, second)
        )
        rows.append(
            {
                "load": kind,
                "plan": "peer",
                "ms": 0.0,
                "moved": float(arrivals(before, after_rows, EXPERTS).mean()),
                "before": judged(before, second, fleet)["balance"],
                "after": judged(after_rows, second, fleet)["balance"],
                "of the gain": 1.0,
                "as dealt": dealt(rows_of(after_rows, fleet, EXPERTS), (), second, fleet),
                "before, dealt": dealt(rows_of(before, fleet, EXPERTS), (), second, fleet),
            }
        )
    return rows


def drifted(num_ranks: int, windows: int, peer: Peer, num_layers: int = 4) -> dict[str, float]:
    """Popularity rotates by 1 % of the experts each window: replanning against a new plan every window."""
    rng = np.random.default_rng(0)
    fleet = Fleet.even(SLOTS, num_ranks)
    chances = popularity("zipf 1.0", rng, num_layers)
    load = draw(chances, rng)
    rows, fresh = ours(load, fleet).rows(), ours(load, fleet).logical_LRS
    shares: Rows = ()
    of_peer = slots_on_ranks(peer(load, 1, 1, num_ranks).tolist(), fleet, num_experts=EXPERTS)
    balances: dict[str, list[float]] = {"replan": [], "fresh": [], "peer": []}
    moves = dict.fromkeys(balances, 0)
    prices = Prices(seconds_per_pick=1.5e-7, bytes_per_expert=44_000_000, bytes_per_s=5e10, horizon=400)
    for _ in range(windows):
        for row in chances:
            turned = rng.choice(EXPERTS, max(2, EXPERTS // 100), replace=False)
            row[turned] = row[np.roll(turned, 1)]
        load = draw(chances, rng)
        plan = replan(load, fleet, rows, prices=prices, current_shares=shares)
        rows, shares = plan.logical_of_slot, plan.share_of_slot
        anew = ours(load, fleet).logical_LRS
        peer_anew = slots_on_ranks(peer(load, 1, 1, num_ranks).tolist(), fleet, num_experts=EXPERTS)
        moves["replan"] += plan.moves
        moves["fresh"] += int(arrivals(fresh, anew, EXPERTS).sum())
        moves["peer"] += int(arrivals(of_peer, peer_anew, EXPERTS).sum())
        fresh, of_peer = anew, peer_anew
        mean = load.sum(1) / num_ranks
        balances["replan"].append(float((mean / np.asarray(plan.worst_after)).mean()))
        balances["fresh"].append(judged(fresh, load, fleet)["balance"])
        balances["peer"].append(judged(of_peer, load, fleet)["balance"])
    slots = SLOTS * num_layers * windows
    return {
        **{f"balance {name}": statistics.mean(values) for name, values in balances.items()},
        **{f"moved {name}": count / slots for name, count in moves.items()},
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n  " + "".join(f"{name:>{28 if name == 'plan' else 15}}" for name in rows[0]))
    for row in rows:
        cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
        print("  " + "".join(f"{cell:>{28 if name == 'plan' else 15}}" for name, cell in zip(row, cells, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--eplb", type=Path, help="EPLB's eplb.py, to be measured beside it (needs torch)")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/planner.json"))
    options = parser.parse_args()
    name, peer = eplb_of(options.eplb)
    results: dict[str, Any] = {"peer": name, "load average": os.getloadavg()[0], "cores": os.cpu_count()}
    for num_ranks in (32, 144):
        results[f"{num_ranks} ranks"] = from_scratch(num_ranks, peer, options.runs)
        show(
            f"{LAYERS} layers, {EXPERTS} experts in {SLOTS} slots, {num_ranks} ranks; peer: {name}",
            results[f"{num_ranks} ranks"],
        )
    results["resample"] = resampled(peer, 32)
    show("the same popularity drawn again, 32 ranks", results["resample"])
    results["drift"] = drifted(32, options.windows, peer)
    show(f"drift over {options.windows} windows, 32 ranks, zipf 1.0", [results["drift"]])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
