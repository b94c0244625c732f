"""From logits to picks in order of their experts, on one GPU: our kernels against torch and the byte floor, in one run.

    PYTHONPATH=operator:runtime:tests python tests/bench/gpu_gate.py           # about a minute on an H100

The peer is what routers in torch do: scores, topk, the division, then the picks sorted by expert (stably), counted and
numbered, as it is and through torch.compile. It leaves out what our index tells besides (blocks, padding). Times are
medians as in gpu_moe.py, whose ceiling of bytes is measured here too; "replayed" rows are CUDA graphs, free of what the
host takes to launch. Writes .moerator/bench/gpu_gate.json. Without a GPU it says so and ends.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_moe import Machine, Row, show, timed
from moe_runtime.kernels.gate import TINY, GateRule, gate
from moe_runtime.kernels.index import SlotRows, index_rows
from moe_runtime.kernels.map_count import map_and_count, map_and_count_reference

TOKENS = 32768
BLOCK_ROWS, WAYS = 128, 16
OUTPUT = Path(".moerator/bench/gpu_gate.json")


@dataclass(frozen=True)
class Case:
    num_experts: int
    rule: GateRule
    has_bias: bool = False


CASES = {
    "e128 top8": Case(128, GateRule(8, renormalise=True)),
    "e512 top10": Case(512, GateRule(10, renormalise=True)),
    "e8 top2": Case(8, GateRule(2, over_chosen=True)),
    "e256 top8, 4 of 8 groups": Case(
        256, GateRule(8, "Sigmoid", renormalise=True, scale=2.5, num_groups=8, group_topk=4), has_bias=True
    ),
}


def torch_gate(
    logits_TE: torch.Tensor, rule: GateRule, bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' routers do it: Mixtral's, Qwen3's, DeepSeek-V3's."""
    if rule.over_chosen:
        top_TK, expert_TK = logits_TE.topk(rule.top_k, dim=-1)
        return expert_TK, top_TK.softmax(dim=-1)
    score_TE = logits_TE.softmax(dim=-1) if rule.function == "Softmax" else logits_TE.sigmoid()
    choice_TE = score_TE if bias_E is None else score_TE + bias_E
    if rule.is_grouped:
        choice_TGJ = choice_TE.view(len(choice_TE), rule.num_groups, -1)
        group_TG = choice_TGJ.topk(rule.group_best, dim=-1).values.sum(dim=-1)
        chosen_TG = group_TG.topk(rule.group_topk, dim=-1, sorted=False).indices
        mask_TG = torch.zeros_like(group_TG).scatter_(1, chosen_TG, 1)
        choice_TE = choice_TGJ.masked_fill(~mask_TG.bool().unsqueeze(-1), float("-inf")).flatten(1)
    expert_TK = choice_TE.topk(rule.top_k, dim=-1, sorted=False).indices
    weight_TK = score_TE.gather(1, expert_TK)
    if rule.renormalise:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + TINY)
    return expert_TK, weight_TK * rule.scale


def torch_index(expert_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """(pick of each row, row of each pick, first row of each expert)."""
    sorted_N, order_N = torch.sort(expert_TK.reshape(-1), stable=True)
    row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    experts_E = torch.arange(num_experts, device=order_N.device)
    return order_N, row_N, torch.searchsorted(sorted_N, experts_E)


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rows_of(name: str, case: Case, machine: Machine) -> Iterator[Row]:
    rule, num_experts, num_picks = case.rule, case.num_experts, TOKENS * case.rule.top_k
    generator = torch.Generator("cuda").manual_seed(0)
    logits_TE = torch.randn(TOKENS, num_experts, generator=generator, device="cuda")
    bias_E = torch.randn(num_experts, generator=generator, device="cuda") * 0.01 if case.has_bias else None

    def ours() -> SlotRows:
        expert_TK, _, _ = gate(logits_TE, rule, bias_E)
        return index_rows(expert_TK.reshape(-1), num_slots=num_experts, block_rows=BLOCK_ROWS)

    def theirs() -> tuple[torch.Tensor, ...]:
        return torch_index(torch_gate(logits_TE, rule, bias_E)[0], num_experts)

    gate_bytes, index_bytes = 4 * logits_TE.numel() + 12 * num_picks, 16 * num_picks
    floor = machine.floor(num_bytes=gate_bytes)
    with torch.no_grad():
        here_TK, there_TK = gate(logits_TE, rule, bias_E)[0], torch_gate(logits_TE, rule, bias_E)[0]
        same = here_TK.sort(-1).values == there_TK.sort(-1).values
        print(f"{name}: {float(same.all(-1).float().mean()):.4%} of the tokens have torch's experts")
        of_torch = timed(lambda: torch_gate(logits_TE, rule, bias_E))
        yield Row(name, "gate", timed(lambda: gate(logits_TE, rule, bias_E)), of_torch, floor)
        both, both_floor = timed(ours), machine.floor(num_bytes=gate_bytes + index_bytes)
        yield Row(name, "gate and index", both, timed(theirs), both_floor)
        compiled = torch.compile(theirs)
        compiled()
        yield Row(name, "gate and index / compiled", both, timed(compiled), both_floor)
        yield Row(name, "gate and index, replayed", timed(replayed(ours)), timed(replayed(theirs)), both_floor)
        expert_TK = gate(logits_TE, rule, bias_E)[0]
        table_WE = torch.randint(0, 2 * num_experts, (WAYS, num_experts), device="cuda")
        load_E = torch.zeros(num_experts, dtype=torch.int64, device="cuda")
        yield Row(
            name,
            "map and count",
            timed(lambda: map_and_count(expert_TK, table_WE, first_way=0, load_E=load_E)),
            timed(lambda: map_and_count_reference(expert_TK, table_WE, first_way=0, load_E=load_E)),
            machine.floor(num_bytes=16 * num_picks),
        )
    leaf_TE = logits_TE.clone().requires_grad_()
    probe_TK = torch.randn(TOKENS, rule.top_k, generator=generator, device="cuda")
    yield Row(
        name,
        "gate, forward and backward",
        timed(lambda: torch.autograd.grad(gate(leaf_TE, rule, bias_E)[1], leaf_TE, probe_TK)),
        timed(lambda: torch.autograd.grad(torch_gate(leaf_TE, rule, bias_E)[1], leaf_TE, probe_TK)),
        machine.floor(num_bytes=gate_bytes + 8 * logits_TE.numel() + 12 * num_picks),
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing is measured")
        return 0
    machine = Machine()
    show([row for name in options.case for row in rows_of(name, CASES[name], machine)], machine, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
