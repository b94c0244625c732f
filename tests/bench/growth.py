"""How planning grows: time and memory against ranks, experts, layers and nodes, up to 100,000. One thread of CPU.

    PYTHONPATH=tests:operator python tests/bench/growth.py --plot tests/bench/growth.svg

Each row of the table is one thing that grows while all others stay: milliseconds on the processor at each size, and the
power of the size that they grow with, from the steepness between the larger half of the sizes (least squares of the
logarithms). 1 is linear; less, where something that does not grow still counts. The most memory that was in use at the
largest size is what Python and numpy asked for.

Loads are Zipf 1.0, permuted, in each layer; the second load of a replan is the first one drawn again. What is evenest
is known only within bounds: `over bound` is the heaviest rank's load over what no packing of the same copies can be
below, at the largest size.
"""

import argparse
import json
import os
import platform
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bench.loglog import Line, Panel, picture
from bench.planner import PICKS, draw, ours
from bench.topology import LEVELS, PACKS, draw_cluster, fit_asks, replace_asks, timed, tree_mib
from moe_core.experts.bounds import bound_of_copies
from moe_core.experts.checks import FloatArray
from moe_core.experts.fleet import Fleet
from moe_core.experts.replan import Prices, replan
from moe_core.topology.tree import build_tree

NUM_EXPERTS, NUM_RANKS, NUM_LAYERS = 256, 32, 58
RANKS = (8, 32, 128, 512, 2048, 8192, 32_768, 100_000)
EXPERTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAYERS = (1, 4, 16, 64, 256, 1024)
MOST_COPIED = 8192
"""Ranks for 256 experts, two slots each: 64 copies of an expert in the mean."""
NODES = (1000, 3000, 10_000, 30_000, 100_000)
GANGS = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
BUDGET_S = 1.5
"""Time for the runs of one size, of which there are 3 to 30."""
Ask = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Growth:
    """One thing measured at growing sizes; `more` says something of the answer at the largest one."""

    name: str
    grows: str
    sizes: tuple[int, ...]
    ms: tuple[float, ...]
    p99_ms: tuple[float, ...]
    peak_mib: float
    more: str = ""

    @property
    def power(self) -> float:
        return power(self.sizes, self.ms)


def power(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of the size that the values grow with, by the larger half."""
    half = min(len(sizes) // 2, len(sizes) - 2)
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0]) if len(sizes) > 2 else float("nan")


def measured(name: str, grows: str, asks: Iterator[tuple[int, Ask]], more: Callable[[], str] = str) -> Growth:
    """`asks` are worked off one at a time, so that only one size is in memory."""
    sizes, ms, p99_ms, peak = [], [], [], 0.0
    for size, ask in asks:
        begun = time.perf_counter()
        ask()
        runs = int(np.clip(BUDGET_S / (time.perf_counter() - begun), 3, 30))
        found = timed([ask] * runs)
        sizes.append(size)
        ms.append(found["cpu_p50"])
        p99_ms.append(found["cpu_p99"])
        tracemalloc.start()
        ask()
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    grown = Growth(name, grows, tuple(sizes), tuple(ms), tuple(p99_ms), peak, more())
    print(row_of(grown), flush=True)
    return grown


def zipf(num_layers: int, num_experts: int, rng: np.random.Generator) -> FloatArray:
    row = 1 / np.arange(1, num_experts + 1)
    return rng.permuted(np.tile(row / row.sum(), (num_layers, 1)), axis=1)


def slots_for(num_experts: int, num_ranks: int) -> int:
    """Of each rank: one in eight more than there are experts, and two at least."""
    return max(2, -(-num_experts * 9 // (8 * num_ranks)))


@dataclass(frozen=True, slots=True)
class Case:
    num_layers: int
    num_experts: int
    num_ranks: int
    ranks_per_domain: int = 0

    @property
    def fleet(self) -> Fleet:
        slots = slots_for(self.num_experts, self.num_ranks) * self.num_ranks
        per_domain = self.ranks_per_domain
        return Fleet.even(slots, self.num_ranks, num_domains=self.num_ranks // per_domain if per_domain else 0)

    @property
    def load(self) -> FloatArray:
        return zipf(self.num_layers, self.num_experts, np.random.default_rng(0)) * PICKS

    def over_bound(self) -> str:
        load, fleet = self.load, self.fleet
        shelf = ours(load, fleet)
        return f"{float((shelf.load_LR.max(1) / bound_of_copies(load, shelf.copies_LE, fleet)).max()):.3f} x bound"

    def anew(self) -> Ask:
        return partial(ours, self.load, self.fleet)

    def again(self) -> Ask:
        rng = np.random.default_rng(0)
        chances = zipf(self.num_layers, self.num_experts, rng)
        fleet, first, second = self.fleet, draw(chances, rng), draw(chances, rng)
        return partial(replan, second, fleet, ours(first, fleet).rows(), prices=Prices())


def anew(name: str, grows: str, sizes: Sequence[int], cases: Callable[[int], Case]) -> Growth:
    asks = ((size, cases(size).anew()) for size in sizes)
    return measured(f"from scratch: {name}", grows, asks, cases(sizes[-1]).over_bound)


def again(name: str, grows: str, sizes: Sequence[int], cases: Callable[[int], Case]) -> Growth:
    return measured(f"replan: {name}", grows, ((size, cases(size).again()) for size in sizes))


def assignments(most: int) -> list[Growth]:
    ranks, experts, layers = (tuple(s for s in sizes if s <= most) for sizes in (RANKS, EXPERTS, LAYERS))
    few = tuple(n for n in ranks if n <= MOST_COPIED)
    return [
        anew("8 experts a rank", "ranks", ranks, lambda n: Case(1, 8 * n, n)),
        anew("256 experts", "ranks", few, lambda n: Case(1, NUM_EXPERTS, n)),
        anew("256 experts, domains of 8 ranks", "ranks", few, lambda n: Case(1, NUM_EXPERTS, n, 8)),
        anew("58 layers, 32 ranks", "experts", experts, lambda n: Case(NUM_LAYERS, n, NUM_RANKS)),
        anew("256 experts, 32 ranks", "layers", layers, lambda n: Case(n, NUM_EXPERTS, NUM_RANKS)),
        again("256 experts", "ranks", few, lambda n: Case(1, NUM_EXPERTS, n)),
        again("256 experts, domains of 8 ranks", "ranks", few, lambda n: Case(1, NUM_EXPERTS, n, 8)),
        again("58 layers, 32 ranks", "experts", experts[:-2], lambda n: Case(NUM_LAYERS, n, NUM_RANKS)),
    ]


def topology(most: int) -> tuple[list[Growth], Line]:
    """The times, and the memory that the tree holds."""
    sizes = [n for n in NODES if n <= most]
    clusters = {n: draw_cluster(n) for n in sizes}
    trees = {n: build_tree(clusters[n], LEVELS) for n in sizes}
    gangs = [n for n in GANGS if n <= most]
    largest = trees[sizes[-1]]
    rows = [
        measured("tree build", "nodes", ((n, partial(build_tree, clusters[n], LEVELS)) for n in sizes)),
        measured("fit of 1,000 ranks", "nodes", ((n, fit_asks(trees[n], 1000, 1, PACKS)[0]) for n in sizes)),
        measured("replace 8 of 1,024 ranks", "nodes", ((n, replace_asks(trees[n], 1)[0]) for n in sizes)),
        measured(f"fit on {sizes[-1]:,} nodes", "ranks", ((n, fit_asks(largest, n, 1, PACKS)[0]) for n in gangs)),
    ]
    held = tuple((n, tree_mib(clusters[n])) for n in sizes)
    told = ", ".join(f"{mib:.2f} MiB of {n:,} nodes" for n, mib in held)
    print(f"\nThe tree holds {told}: power {power(sizes, [mib for _, mib in held]):.2f}.")
    return rows, Line("what the tree holds, MiB, by nodes", held, is_dashed=True)


def line_of(growth: Growth) -> Line:
    name = f"{growth.name}, by {growth.grows}: power {growth.power:.2f}"
    return Line(name, tuple(zip(growth.sizes, growth.ms, strict=True)))


HEAD = "| what | grows | ms at each size | power | peak MiB | |\n|---|---|---|---|---|---|"


def row_of(growth: Growth) -> str:
    at = ", ".join(f"{size:,}: {ms:.3g}" for size, ms in zip(growth.sizes, growth.ms, strict=True))
    return f"| {growth.name} | {growth.grows} | {at} | {growth.power:.2f} | {growth.peak_mib:,.0f} | {growth.more} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=100_000, help="largest size (default 100,000)")
    parser.add_argument("--plot", type=Path, default=Path(".moerator/bench/growth.svg"))
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/growth.json"))
    options = parser.parse_args()
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    print(HEAD)
    of_experts = assignments(options.most)
    of_nodes, held = topology(options.most)
    machine["load at the end"] = os.getloadavg()[0]
    for path in (options.plot, options.json):
        path.parent.mkdir(parents=True, exist_ok=True)
    panels = (
        Panel("Experts to slots", "ranks, experts or layers", "ms", tuple(map(line_of, of_experts))),
        Panel("Ranks to nodes", "nodes or ranks", "ms (dashed: MiB)", (*map(line_of, of_nodes), held)),
    )
    options.plot.write_text(picture(panels))
    rows = [asdict(row) | {"power": row.power} for row in (*of_experts, *of_nodes)]
    options.json.write_text(json.dumps({"rows": rows, "tree_mib": held.points, "machine": machine}, indent=2))
    print(f"{machine}; {options.plot}, {options.json}")


if __name__ == "__main__":
    main()
