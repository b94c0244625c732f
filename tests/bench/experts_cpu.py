"""A rank's experts on rows that have arrived, on a CPU: ours against transformers' own ways to run them.

    PYTHONPATH=tests:operator:runtime python tests/bench/experts_cpu.py --turns 15

Forward without gradients, and forward with backward, over the same module and rows, in one process; the ways work in
turn. Outputs and gradients are compared with grouped_mm's.

even: as many rows to every expert; zipf: by Zipf's law with exponent 1.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crew import shown
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_core.experts.assign import assign
from moe_runtime.engine.model import ExpertParallelModel

PEERS = ("grouped_mm", "batched_mm", "eager")
BATCHED_BYTES = 2**29
"""batched_mm copies a pair of matrices for each row: above this it is left out."""


@dataclass(frozen=True, slots=True)
class Case:
    """R rows, D model, F expert hidden, S slots of the rank."""

    name: str
    R: int
    D: int
    F: int
    S: int
    load: str = "even"

    @property
    def title(self) -> str:
        return f"{self.name:14} R{self.R} D{self.D} F{self.F} S{self.S}"


CASES = [
    Case("demo", 1024, 128, 128, 4),
    Case("demo, skewed", 1024, 128, 128, 4, "zipf"),
    Case("many small", 2048, 256, 128, 64),
    Case("many, skewed", 2048, 256, 128, 64, "zipf"),
    Case("fine", 2048, 1024, 256, 16),
    Case("fine, skewed", 2048, 1024, 256, 16, "zipf"),
    Case("few big", 512, 1024, 2048, 4),
    Case("decode, tiny", 8, 128, 128, 4),
    Case("decode, small", 16, 512, 256, 8),
    Case("decode, fine", 32, 1024, 256, 16),
    Case("decode, big", 8, 1024, 2048, 4),
    Case("one row", 1, 1024, 2048, 4),
]


def slots_of(case: Case) -> torch.Tensor:
    """[R] in any order."""
    numbers = np.random.default_rng(3)
    weight_S = np.ones(case.S) if case.load == "even" else 1 / (numbers.permutation(case.S) + 1.0)
    if case.load == "even":
        return torch.from_numpy(numbers.permutation(np.arange(case.R) % case.S))
    return torch.from_numpy(numbers.choice(case.S, size=case.R, p=weight_S / weight_S.sum()))


Way = Callable[[bool], list[torch.Tensor]]


def ways_of(case: Case) -> dict[str, Way]:
    """By name: rows through the experts and what comes out; with backward when asked, and then the gradients."""
    shape = ModelShape(
        family="qwen3_moe",
        hidden_size=case.D,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=case.D // 2,
        num_experts=case.S,
        num_experts_per_tok=1,
        moe_intermediate_size=case.F,
        vocab_size=16,
        max_position_embeddings=16,
    )
    every = assign("linear", num_layers=1, num_logical_experts=case.S, slots_of_rank=(case.S,))
    layer = ExpertParallelModel.load(ModelSource(shape=shape), expert_map=every, rank=0)._layers[0]
    torch.manual_seed(0)
    rows_RD, slot_R, grad_RD = torch.randn(case.R, case.D), slots_of(case), torch.randn(case.R, case.D)
    ones_R1 = torch.ones(case.R, 1)
    module: Any = layer.entry.module

    def through(run: Callable[[torch.Tensor], torch.Tensor], *, implementation: str) -> Way:
        def way(learns: bool) -> list[torch.Tensor]:
            module.config._experts_implementation = implementation
            if not learns:
                with torch.no_grad():
                    return [run(rows_RD)]
            module.zero_grad(set_to_none=True)
            x_RD = rows_RD.clone().requires_grad_()
            torch.autograd.backward(run(x_RD), grad_RD)
            return [t.grad for t in (x_RD, *module.parameters()) if t.grad is not None]

        return way

    def theirs(x_RD: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = layer.compute.family_forward(x_RD, slot_R.unsqueeze(-1), ones_R1)
        return output

    ways = {"moerator": through(lambda x: layer.run_slots(x, slot_R), implementation="grouped_mm")}
    for peer in PEERS:
        if peer != "batched_mm" or case.R * 3 * case.D * case.F * 4 <= BATCHED_BYTES:
            ways[peer] = through(theirs, implementation=peer)
    return ways


def difference_of(one: Way, other: Way, learns: bool) -> float:
    """The largest over all tensors, relative to the tensor's largest number."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one(learns), other(learns), strict=True))


def seconds_of(way: Way, learns: bool, *, at_least_s: float = 0.02) -> float:
    """A mean over as many calls as fill `at_least_s`."""
    began, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < at_least_s:
        way(learns)
        calls += 1
    return spent / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the process; a rank has one (default)")
    parser.add_argument("--only", default="", help="cases whose title holds this")
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/experts_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    print(f"{'':38}{'moerator us':>24}" + "".join(f"{'/ ' + peer:>20}" for peer in PEERS) + f"{'difference':>12}")
    for case in [case for case in CASES if options.only in case.title]:
        ways = ways_of(case)
        for learns in (False, True):
            difference = difference_of(ways["moerator"], ways["grouped_mm"], learns)
            turns: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(options.turns + 1):  # the first warms up
                for name, way in ways.items():
                    spent = seconds_of(way, learns)
                    if turn:
                        turns[name].append(spent)
            ratios = [
                shown([t / m for t, m in zip(turns[peer], turns["moerator"], strict=True)]) if peer in turns else "-"
                for peer in PEERS
            ]
            title = case.title + (" backward" if learns else "")
            print(
                f"{title:38}{shown([t * 1e6 for t in turns['moerator']], digits=0):>24}"
                + "".join(f"{ratio:>20}" for ratio in ratios)
                + f"{difference:>12.1e}",
                flush=True,
            )
            rows.append({**asdict(case), "backward": learns, "seconds": turns, "difference": difference})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=2))
    print(f"{options.turns} turns, {options.threads} threads, load {os.getloadavg()[0]:.1f}; {options.json}")


if __name__ == "__main__":
    main()
