"""How long the gang fit takes and how it grows with nodes and ranks. One thread of CPU, no cluster.

    PYTHONPATH=tests:operator python tests/bench/topology.py --runs 200

The cluster is drawn: 3 levels (zone of 10 blocks, block of 10 racks, rack of 16 nodes with 8 devices), part of it in
use, cordoned, tainted; the seed is printed. The tree is built once, then every run asks for something a little
different (packs, sizes, lost ranks), so that p99 is one over asks and not over noise alone.

    build     facts to tree
    fit       1,000 ranks: anywhere, preferred rack or block, required zone
    groups    32 subgroups of 32, each in one rack, on whole nodes, with 2 spares per rack
    replace   8 lost of 1,024
    no fit    4,096 ranks in one block: the exclusions and every relaxation tried

Prints tables and writes the same as JSON. Nothing is asserted here: what has to hold is in tests/property.
"""

import argparse
import gc
import json
import os
import platform
import random
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_core.facts import NodeFact, Taint
from moe_core.outcome import NoFit
from moe_core.topology.fit import Fit, fit
from moe_core.topology.room import Needs, rooms
from moe_core.topology.score import Score, score
from moe_core.topology.shape import Pack, Subgroups
from moe_core.topology.tree import Tree, build_tree

LEVELS = (("zone", "net/zone"), ("block", "net/block"), ("rack", "net/rack"))
REQUEST = {"nvidia.com/gpu": 1, "cpu": 8000, "memory": 64 << 30}
NEEDS = Needs(request=REQUEST)
PACKS = (
    Pack(LEVELS, preferred="rack"),
    Pack(LEVELS, preferred="block"),
    Pack(LEVELS),
    Pack(LEVELS, preferred="rack", required="zone"),
)
SEED = 0


def draw_cluster(num_nodes: int) -> list[NodeFact]:
    """In no order, as a watch gives them."""
    chance = random.Random(SEED)
    nodes = [
        NodeFact(
            name=f"node-{i:06}",
            labels={
                "net/zone": f"z{i // 1600}",
                "net/block": f"b{i // 160 % 10}",
                "net/rack": f"r{i // 16 % 10}",
                "kubernetes.io/hostname": f"node-{i:06}",
            },
            allocatable={"nvidia.com/gpu": 8, "cpu": 128_000, "memory": 2 << 40, "pods": 110},
            used={"nvidia.com/gpu": chance.choice((0, 0, 0, 3, 8)), "cpu": 4000, "memory": 8 << 30, "pods": 12},
            unschedulable=chance.random() < 0.02,
            taints=(Taint("gpu", "reserved"),) if chance.random() < 0.05 else (),
        )
        for i in range(num_nodes)
    ]
    chance.shuffle(nodes)
    return nodes


def timed(asks: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Milliseconds an ask, after one that warms up: by the clock and of the processor, which a busy box spares."""
    asks[0]()
    by_clock, on_cpu = [], []
    for ask in asks:
        begun, cpu_begun = time.perf_counter(), time.thread_time()
        ask()
        on_cpu.append((time.thread_time() - cpu_begun) * 1000)
        by_clock.append((time.perf_counter() - begun) * 1000)
    p50, p99 = np.percentile(by_clock, (50, 99))
    cpu_p50, cpu_p99 = np.percentile(on_cpu, (50, 99))
    return {
        "p50": float(p50),
        "p99": float(p99),
        "max": max(by_clock),
        "cpu_p50": float(cpu_p50),
        "cpu_p99": float(cpu_p99),
        "runs": len(asks),
    }


def expect(found: Fit | NoFit, kind: type[Fit | NoFit]) -> None:
    """A bench that times the wrong answer says nothing."""
    if not isinstance(found, kind):
        raise SystemExit(f"expected a {kind.__name__}, got {found}")


def fit_asks(tree: Tree, num_ranks: int, runs: int, packs: Sequence[Pack] = PACKS) -> list[Callable[[], object]]:
    def ask(run: int) -> None:
        expect(fit(tree, range(num_ranks - run % 7), needs=NEEDS, pack=packs[run % len(packs)]), Fit)

    return [lambda run=run: ask(run) for run in range(runs)]  # type: ignore[misc]


def group_asks(tree: Tree, runs: int) -> list[Callable[[], object]]:
    def ask(run: int) -> None:
        groups = Subgroups(size=32, level="rack")
        ranks = range(32 * (32 - run % 3))
        found = fit(tree, ranks, needs=NEEDS, pack=PACKS[2], subgroups=groups, ranks_per_node=8, spares_per_domain=2)
        expect(found, Fit)

    return [lambda run=run: ask(run) for run in range(runs)]  # type: ignore[misc]


def replace_asks(tree: Tree, runs: int) -> list[Callable[[], object]]:
    """What stays and what it uses is worked out before the clock runs: the operator knows it from its pods."""
    whole = fit(tree, range(1024), needs=NEEDS, pack=PACKS[0])
    assert isinstance(whole, Fit), whole
    chance = random.Random(SEED)
    asks: list[Callable[[], object]] = []
    for _ in range(runs):
        lost = sorted(chance.sample(range(1024), 8))
        kept = {rank: node for rank, node in whole.node_of_rank.items() if rank not in lost}
        own: dict[str, dict[str, int]] = {}
        for node in kept.values():
            on_node = own.setdefault(node, {})
            for resource, amount in {"pods": 1, **REQUEST}.items():
                on_node[resource] = on_node.get(resource, 0) + amount

        def ask(
            lost: list[int] = lost, kept: Mapping[int, str] = kept, own: Mapping[str, dict[str, int]] = own
        ) -> None:
            expect(fit(tree, lost, needs=NEEDS, pack=PACKS[0], kept=kept, own=own), Fit)

        asks.append(ask)
    return asks


def no_fit_asks(tree: Tree, runs: int) -> list[Callable[[], object]]:
    def ask() -> None:
        expect(fit(tree, range(4096), needs=NEEDS, pack=Pack(LEVELS, required="block")), NoFit)

    return [ask] * runs


def first_come(tree: Tree, num_ranks: int, order: Sequence[int]) -> dict[int, str]:
    """Rank after rank to the first node of `order` that has room: what pods placed one at a time come to."""
    free = rooms(tree, NEEDS, own={}, most=num_ranks).ranks
    places = np.repeat(order, free[list(order)])[:num_ranks]
    return {rank: tree.nodes[index].name for rank, index in enumerate(places.tolist())}


def scores(tree: Tree, num_ranks: int) -> dict[str, Score]:
    """Of the fit, beside nodes by name and by least use, which know no topology."""
    found = fit(tree, range(num_ranks), needs=NEEDS, pack=PACKS[0])
    assert isinstance(found, Fit), found
    by_use = np.lexsort((np.arange(len(tree.nodes)), tree.used["nvidia.com/gpu"])).tolist()
    shuffled = random.Random(SEED).sample(range(len(tree.nodes)), len(tree.nodes))
    ways = {
        "fit": found.node_of_rank,
        "least used first": first_come(tree, num_ranks, by_use),
        "any order": first_come(tree, num_ranks, shuffled),
    }
    return {name: score(tree, way) for name, way in ways.items()}


def tree_mib(nodes: Sequence[NodeFact]) -> float:
    tracemalloc.start()
    tree = build_tree(nodes, LEVELS)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tree.nodes) == len(nodes)
    return held / 2**20


def both(row: Mapping[str, float], clock: str = "") -> str:
    return f"{row[clock + 'p50']:.1f} / {row[clock + 'p99']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="asks of each kind at 5,000 nodes (default 200)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 5000, 20_000, 100_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/topology.json"))
    options = parser.parse_args()

    by_nodes: dict[int, dict[str, dict[str, float]]] = {}
    memory: dict[int, float] = {}
    by_ranks: dict[int, dict[str, float]] = {}
    ways: dict[int, dict[str, Score]] = {}
    for num_nodes in options.nodes:
        nodes = draw_cluster(num_nodes)
        gc.collect()
        few = max(5, options.runs * 5000 // max(5000, num_nodes))
        builds = timed([lambda nodes=nodes: build_tree(nodes, LEVELS)] * max(5, few // 10))  # type: ignore[misc]
        tree = build_tree(nodes, LEVELS)
        by_nodes[num_nodes] = {
            "build": builds,
            "fit": timed(fit_asks(tree, 1000, few)),
            "groups": timed(group_asks(tree, few)),
            "replace": timed(replace_asks(tree, few)),
            "no fit": timed(no_fit_asks(tree, max(5, few // 10))),
        }
        memory[num_nodes] = tree_mib(nodes)
        ways[num_nodes] = scores(tree, 1000)
        if num_nodes == max(options.nodes):
            for num_ranks in options.ranks:
                by_ranks[num_ranks] = timed(fit_asks(tree, num_ranks, few, PACKS[:3]))

    print("ms, p50 / p99 by the clock; below it on the processor, and its microseconds per node: flat means linear")
    kinds = list(next(iter(by_nodes.values())))
    print(f"{'nodes':>8}" + "".join(f"{kind:>20}" for kind in kinds) + f"{'tree MiB':>12}")
    for num_nodes, row in by_nodes.items():
        cells = "".join(f"{both(row[kind]):>20}" for kind in kinds)
        print(f"{num_nodes:>8}{cells}{memory[num_nodes]:>12.1f}")
        print(f"{'cpu':>8}" + "".join(f"{both(row[kind], 'cpu_'):>20}" for kind in kinds))
        per_node = "".join(f"{row[k]['cpu_p50'] * 1000 / num_nodes:>20.2f}" for k in kinds)
        print(f"{'us/node':>8}{per_node}{memory[num_nodes] * 2**20 / num_nodes:>8.0f} B/n")
    print(f"\nfit on {max(options.nodes)} nodes by ranks, ms, p50 / p99")
    for num_ranks, row_ms in by_ranks.items():
        print(f"{num_ranks:>8}{both(row_ms):>20}   cpu {both(row_ms, 'cpu_')}")
    print(f"\nwhere the bytes of an all-to-all of 1,000 ranks go, {min(options.nodes)} to {max(options.nodes)} nodes")
    for num_nodes, by_way in ways.items():
        for name, of_way in by_way.items():
            print(f"{num_nodes:>8}  {name:18}{of_way}")
    machine = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "seed": SEED,
    }
    shares = {of: {name: dict(s.share) for name, s in by_way.items()} for of, by_way in ways.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps(
            {"ms": by_nodes, "tree_mib": memory, "ms_by_ranks": by_ranks, "share": shares, "machine": machine}, indent=2
        )
    )
    print(f"seed {SEED}, load {machine['load']:.1f}, {machine['cores']} cores; {options.json}")


if __name__ == "__main__":
    main()
