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


class Work:
    """A case's tensors, and both ways from logits to the order of picks."""

    def __init__(self, case: Case) -> None:
        self.num_experts, self.rule = case.num_experts, case.rule
        generator = torch.Generator("cuda").manual_seed(0)
        self.logits_TE = torch.randn(TOKENS, case.num_experts, generator=generator, device="cuda")
        bias_E = torch.randn(case.num_experts, generator=generator, device="cuda") * 0.01
        self.bias_E = bias_E if case.has_bias else None
        self.probe_TK = torch.randn(TOKENS, case.rule.top_k, generator=generator, device="cuda")
        self.gate_bytes = 4 * self.logits_TE.numel() + 12 * self.probe_TK.numel()
        self.bytes = self.gate_bytes + 16 * self.probe_TK.numel()

    def ours(self) -> SlotRows:
        expert_TK, _, _ = gate(self.logits_TE, self.rule, self.bias_E)
        return index_rows(expert_TK.reshape(-1), num_slots=self.num_experts, block_rows=BLOCK_ROWS)

    def theirs(self) -> tuple[torch.Tensor, ...]:
        return torch_index(torch_gate(self.logits_TE, self.rule, self.bias_E)[0], self.num_experts)


def rows_of(name: str, work: Work, machine: Machine) -> Iterator[Row]:
    rule, num_experts, logits_TE, bias_E = work.rule, work.num_experts, work.logits_TE, work.bias_E
    with torch.no_grad():
        here_TK, there_TK = gate(logits_TE, rule, bias_E)[0], torch_gate(logits_TE, rule, bias_E)[0]
        same = here_TK.sort(-1).values == there_TK.sort(-1).values
        print(f"{name}: {float(same.all(-1).float().mean()):.4%} of the tokens have torch's experts")
        yield Row(
            name,
            "gate",
            timed(lambda: gate(logits_TE, rule, bias_E)),
            timed(lambda: torch_gate(logits_TE, rule, bias_E)),
            machine.floor(num_bytes=work.gate_bytes),
        )
        floor = machine.floor(num_bytes=work.bytes)
        yield Row(name, "gate and index", timed(work.ours), timed(work.theirs), floor)
        yield Row(name, "gate and index, replayed", timed(replayed(work.ours)), timed(replayed(work.theirs)), floor)
        expert_TK = gate(logits_TE, rule, bias_E)[0]
        table_WE = torch.randint(0, 2 * num_experts, (WAYS, num_experts), device="cuda")
        load_E = torch.zeros(num_experts, dtype=torch.int64, device="cuda")
        yield Row(
            name,
            "map and count",
            timed(lambda: map_and_count(expert_TK, table_WE, first_way=0, load_E=load_E)),
            timed(lambda: map_and_count_reference(expert_TK, table_WE, first_way=0, load_E=load_E)),
            machine.floor(num_bytes=16 * expert_TK.numel()),
        )
    leaf_TE = logits_TE.clone().requires_grad_()
    yield Row(
        name,
        "gate, forward and backward",
        timed(lambda: torch.autograd.grad(gate(leaf_TE, rule, bias_E)[1], leaf_TE, work.probe_TK)),
        timed(lambda: torch.autograd.grad(torch_gate(leaf_TE, rule, bias_E)[1], leaf_TE, work.probe_TK)),
        machine.floor(num_bytes=2 * work.gate_bytes + 4 * logits_TE.numel()),
    )


def compiled_row(name: str, work: Work, machine: Machine) -> Row:
    """Last of all: what the compiler leaves running takes processor time from those who launch."""
    with torch.no_grad():
        compiled = torch.compile(work.theirs)
        compiled()
        floor = machine.floor(num_bytes=work.bytes)
        return Row(name, "gate and index / compiled", timed(work.ours), timed(compiled), floor)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing is measured")
        return 0
    machine = Machine()
    works = {name: Work(CASES[name]) for name in options.case}
    rows = [row for name, work in works.items() for row in rows_of(name, work, machine)]
    rows += [compiled_row(name, work, machine) for name, work in works.items()]
    show(rows, machine, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
