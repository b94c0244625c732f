"""Bytes that leave their node, and what sparing them costs: dispatch by node, placement that knows nodes, and tokens
that prefer near experts, one after the other, against experts in order and picks sent one by one.

    PYTHONPATH=tests:operator:runtime python tests/bench/crossing.py             # .moerator/tiny, which the demo trains

A checkpoint is read and held-out text scored in one process, its windows dealt over four ranks on two nodes: every
window is routed with the distances of its own rank, and its picks are sent, on paper, as that rank's dispatch plan
says. Where experts lie is planned from what training text chose. Bytes are of tokens there and back in float32, per
token and layer; balance is the mean over the maximum of the ranks' picks, mean over layers. Writes
.moerator/bench/crossing.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.router import LocalityConfig
from moe_core.contract.runtime_config import ModelSource
from moe_core.experts.affinity import pack_together
from moe_core.experts.assign import assign, even_slots
from moe_core.experts.counts import count_copies
from moe_core.experts.fleet import Fleet
from moe_runtime.dispatch.plan import make_plan
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.families import ModelFacts, read_facts
from moe_runtime.experts.layout import layouts
from moe_runtime.train.data import load_corpus
from moe_runtime.train.evaluate import Sample, heldout_bits, prefer_plain_attention, sample

NODES = ("a", "a", "b", "b")
RANKS = tuple(range(len(NODES)))
LENGTH = 128
PLANNING_BYTES, SCORED_BYTES = 32_768, 65_536
BUDGETS = (5, 10, 20, 30)
BIAS = 10.0
"""More than any score, so that the budget alone decides."""
OUTPUT = Path(".moerator/bench/crossing.json")


@dataclass(frozen=True)
class Row:
    """near: what counts as distance and the percent that a token may give up, or nothing. flat, by_node: bytes."""

    placement: str
    redundant: int
    near: str
    bits: float
    flat: float
    by_node: float
    balance: float


class Scored:
    """A checkpoint in this process, and what its tokens chose."""

    def __init__(self, folder: Path, locality: LocalityConfig | None) -> None:
        source = ModelSource(path=str(folder))
        facts = read_facts(source)
        whole = _in_order(facts, (facts.num_experts,))
        self.epm = ExpertParallelModel.load(source, expert_map=whole, rank=0, locality=locality)
        self.facts, self.dim = facts, int(self.epm.module.config.hidden_size)
        prefer_plain_attention(self.epm, length=LENGTH)
        self._picks: list[tuple[int, torch.Tensor]] = []
        self.epm.record(self._picks.extend)
        vars(self.epm)["rollback"] = self.epm.commit  # scoring throws its picks away, we want them

    def score(self, text_N: Any, chosen: Sample) -> tuple[float, list[torch.Tensor]]:
        """Bits per byte, and per layer expert_TK."""
        self._picks.clear()
        bits = heldout_bits(self.epm, text_N, chosen)
        layers: list[list[torch.Tensor]] = [[] for _ in range(self.facts.num_layers)]
        for layer_idx, expert_TK in self._picks:
            layers[layer_idx].append(expert_TK)
        return bits, [torch.cat(parts) for parts in layers]


def measure(scored: Scored, text_N: Any, chosen: Sample, expert_map: ExpertMap) -> tuple[float, float, float, float]:
    """(bits, flat bytes, bytes by node, balance), the sample's windows dealt over the ranks."""
    bits, flat, by_node, tokens = [], 0, 0, 0
    taken_LR = torch.zeros(expert_map.num_layers, len(RANKS))
    for rank in RANKS:
        plan = make_plan(expert_map, RANKS, rank=rank, domains=NODES)
        if scored.epm.routed is not None:
            scored.epm.routed.use_layouts(layouts(expert_map, plan, NODES))
        mine = Sample(chosen.starts[rank :: len(RANKS)], chosen.length, chosen.scored)
        of_rank, picks = scored.score(text_N, mine)
        bits.append(of_rank)
        node_R = torch.tensor([name != NODES[rank] for name in NODES])
        for layer_idx, (layer, expert_TK) in enumerate(zip(plan.layers, picks, strict=True)):
            rank_TK = layer.addresses(expert_TK) // plan.slots_stride
            taken_LR[layer_idx] += torch.bincount(rank_TK.reshape(-1), minlength=len(RANKS))
            leaves_TK = node_R[rank_TK]
            flat += int(leaves_TK.sum())
            by_node += int(leaves_TK.any(dim=1).sum())  # there is one other node
            tokens += len(expert_TK)
    row_bytes = 2 * 4 * scored.dim
    balance = float((taken_LR.mean(dim=1) / taken_LR.amax(dim=1)).mean())
    return float(np.mean(bits)), flat * row_bytes / tokens, by_node * row_bytes / tokens, balance


def placements(scored: Scored, text_N: Any, redundant: int) -> dict[str, ExpertMap]:
    facts = scored.facts
    slots = even_slots(facts.num_experts, len(RANKS), redundant_per_rank=redundant)
    _, picks = scored.score(text_N, sample(text_N, length=LENGTH, num_bytes=PLANNING_BYTES))
    load_LE = np.stack([np.bincount(p.reshape(-1).numpy(), minlength=facts.num_experts) for p in picks]).astype(float)
    together_LEE = np.stack([_together(p, facts.num_experts) for p in picks])
    fleet = Fleet(slots, domain_of_rank=NODES)
    copies_LE = count_copies(load_LE, fleet.room_for(facts.num_experts), most=len(RANKS), least=1)
    rows = pack_together(load_LE, copies_LE, fleet, together_LEE).rows()
    planned = ExpertMap(generation=0, num_logical_experts=facts.num_experts, slots_of_rank=slots, logical_of_slot=rows)
    return {"linear": _in_order(facts, slots), "planned": planned}


def _in_order(facts: ModelFacts, slots_of_rank: Sequence[int]) -> ExpertMap:
    return assign(
        "linear",
        num_layers=facts.num_layers,
        num_logical_experts=facts.num_experts,
        slots_of_rank=slots_of_rank,
    )


def _together(expert_TK: torch.Tensor, num_experts: int) -> Any:
    chosen_TE = torch.zeros(len(expert_TK), num_experts).scatter_(1, expert_TK, 1.0)
    return (chosen_TE.T @ chosen_TE).double().numpy()


def table(rows: Sequence[Row]) -> str:
    base = rows[0]
    lines = [
        "| placement | redundant | budget % | bits | more % | flat | by node | of the first | balance |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        more = 100 * (row.bits / base.bits - 1)
        lines.append(
            f"| {row.placement} | {row.redundant} | {row.near} | {row.bits:.4f} | {more:.2f} | {row.flat:.0f} | "
            f"{row.by_node:.0f} | {row.by_node / base.flat:.3f} | {row.balance:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(".moerator/tiny"))
    parser.add_argument("--data", default="stdlib")
    given = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(given.data)
    chosen = sample(corpus.heldout_N, length=LENGTH, num_bytes=SCORED_BYTES)
    plain = Scored(given.checkpoint, None)
    maps = {redundant: placements(plain, corpus.training_N, redundant) for redundant in (0, 2)}
    rows = []
    for redundant, placed in maps.items():
        for name, expert_map in placed.items():
            rows.append(Row(name, redundant, "", *measure(plain, corpus.heldout_N, chosen, expert_map)))
            sys.stderr.write(f"{rows[-1]}\n")
    for by, budget in product(get_args(LocalityConfig.model_fields["by"].annotation), BUDGETS):
        near = Scored(given.checkpoint, LocalityConfig(bias=BIAS, budget_percent=budget, by=by))
        for redundant, placed in maps.items():
            figures = measure(near, corpus.heldout_N, chosen, placed["planned"])
            rows.append(Row("planned", redundant, f"{by} {budget} %", *figures))
            sys.stderr.write(f"{rows[-1]}\n")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
