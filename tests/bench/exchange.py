"""Dispatch and combine as a layer does them, against the bare exchange of the same bytes. Four ranks, CPU only.

    PYTHONPATH=tests:operator:runtime python tests/bench/exchange.py --turns 12

    raw        torch.distributed.all_to_all_single, there and back, from tensors that lie ready into others
    moerator   picks counted, sorted, gathered and sent, results sent home, weighted and summed per token: everything
               of a layer by pick but its experts

Processes of raw are as torchrun starts them, ours as a rank is (`rank.assembly`). MiB is what a rank sends one way,
the quarter that stays included; GB/s both ways over all ranks. The ways work in turn.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from crew import Crew, Ways, shown
from gloo_ranks import join_group
from moe_core.experts.assign import assign
from moe_runtime.dispatch.all_to_all import run_by_pick
from moe_runtime.dispatch.mixture import in_turn
from moe_runtime.dispatch.plan import make_plan
from moe_runtime.host.memory import keep_freed_memory

NUM_RANKS, NUM_EXPERTS, TOP_K, DIM = 4, 32, 4, 1024
SIZES_MIB = (1, 4, 8, 32)
TURN_S = 0.15
"""About what a turn takes."""


def tokens_of(mib: int) -> int:
    return (mib << 20) // (4 * DIM * TOP_K)


def raw(rank: int, store_path: str) -> Ways:
    from torch._C._distributed_c10d import FileStore
    from torch.distributed import all_to_all_single, init_process_group

    init_process_group("gloo", store=FileStore(store_path, NUM_RANKS), rank=rank, world_size=NUM_RANKS)

    def way_of(mib: int) -> Callable[[], None]:
        rows_ND = torch.randn(tokens_of(mib) * TOP_K, DIM)
        there_ND, back_ND = torch.empty_like(rows_ND), torch.empty_like(rows_ND)

        def way() -> None:
            all_to_all_single(there_ND, rows_ND)
            all_to_all_single(back_ND, there_ND)

        return way

    return {str(mib): way_of(mib) for mib in SIZES_MIB}


def moerator(rank: int, store_path: str) -> Ways:
    each = NUM_EXPERTS // NUM_RANKS
    in_order = assign("linear", num_layers=1, num_logical_experts=NUM_EXPERTS, slots_of_rank=(each,) * NUM_RANKS)
    plan = make_plan(in_order, range(NUM_RANKS), rank=rank)
    keep_freed_memory()
    group = join_group(store_path, ranks=range(NUM_RANKS), rank=rank)

    def way_of(mib: int) -> Callable[[], bool]:
        numbers = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(tokens_of(mib), DIM, generator=numbers)
        # each rank gets as many picks as every other, in any order
        expert_TK = torch.rand(tokens_of(mib), NUM_EXPERTS, generator=numbers).argsort(1)[:, :TOP_K]
        weight_TK = torch.full((tokens_of(mib), TOP_K), 1 / TOP_K)
        address_TK = plan.layers[0].addresses(expert_TK)

        @torch.no_grad()
        def way() -> bool:
            going = run_by_pick(x_TD, address_TK, weight_TK, plan=plan, group=group, run_slots=lambda rows, _: rows)
            [mixed_TD] = in_turn([going])
            return mixed_TD.numel() > 0

        return way

    return {str(mib): way_of(mib) for mib in SIZES_MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/exchange.json"))
    options = parser.parse_args()
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="moe-bench-") as home,
        Crew(raw, members=NUM_RANKS, store_path=f"{home}/raw") as bare,
        Crew(moerator, members=NUM_RANKS, store_path=f"{home}/ours") as ours,
    ):
        print(f"{'MiB':>4}{'raw GB/s':>26}{'moerator GB/s':>26}{'moerator / raw':>26}")
        for mib in SIZES_MIB:
            crews = {"raw": bare, "moerator": ours}
            repeats = {name: max(1, round(TURN_S / crew.run(str(mib))[0].wall_s)) for name, crew in crews.items()}
            seconds: dict[str, list[float]] = {name: [] for name in crews}
            for turn in range(options.turns + 1):  # the first warms up
                for name, crew in crews.items():
                    timing, _ = crew.run(str(mib), repeats=repeats[name])
                    if turn:
                        seconds[name].append(timing.wall_s)
            moved = 2 * NUM_RANKS * (mib << 20) / 1e9
            speeds = {name: [moved / s for s in times] for name, times in seconds.items()}
            ratio = [mine / bare for mine, bare in zip(speeds["moerator"], speeds["raw"], strict=True)]
            print(f"{mib:4}{shown(speeds['raw']):>26}{shown(speeds['moerator']):>26}{shown(ratio):>26}", flush=True)
            rows.append({"mib": mib, "seconds": seconds})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=2))
    print(f"{options.turns} turns, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {options.json}")


if __name__ == "__main__":
    main()
