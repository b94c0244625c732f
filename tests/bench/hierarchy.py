"""What rows weigh and lose on their way: dispatch by node and in fewer bits, over real Gloo; and two batches in turn.

    PYTHONPATH=tests:operator:runtime python tests/bench/hierarchy.py            # .moerator/tiny, which the demo trains

Three tables:

    wires      a checkpoint scores held-out text over four real ranks that are told that they run on two nodes, experts
               in order. Bytes are what the groups have counted to the other node, per token and layer, counts and
               addresses included; error is the relative error that the ranks report; bits are held-out bits per byte
    large      256 experts, top-8, 32 ranks on 4 nodes, tokens whose experts follow Zipf's law (exponent 1), each pick
               addressed by the ranks' own dispatch plans: rows that cross, flat and by node, experts in order as EPLB's
               linear placement has them, and planned for the load and the nodes, with 32 redundant slots
    batches    a training step's forward and backward through one model, one batch beside two in turn, in the same
               processes, turn by turn

Writes .moerator/bench/hierarchy.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crew import Crew, Ways, shown
from gloo_ranks import join_group
from moe_core.contract.dispatch import Hierarchy, Wire
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import DispatchConfig, ModelShape, ModelSource
from moe_core.experts.assign import assign, even_slots
from moe_core.experts.fleet import Fleet
from moe_core.experts.groups import pack_groups
from moe_runtime.dispatch.plan import make_plan
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.families import read_facts
from moe_runtime.train.data import load_corpus
from moe_runtime.train.evaluate import heldout_bits, prefer_plain_attention, sample

NODES = "aabb"
LENGTH, SCORED_BYTES = 128, 32_768
SENT: tuple[tuple[Hierarchy, Wire, Wire], ...] = (
    ("Flat", "Float32", "Float32"),
    ("Flat", "BFloat16", "BFloat16"),
    ("Flat", "Float8", "BFloat16"),
    ("Flat", "Float8", "Float8"),
    ("Flat", "Int8", "Int8"),
    ("ByNode", "Float32", "Float32"),
    ("ByNode", "BFloat16", "BFloat16"),
    ("ByNode", "Float8", "BFloat16"),
    ("ByNode", "Int8", "Int8"),
)
TABLES = ("wires", "large", "batches")
OUTPUT = Path(".moerator/bench/hierarchy.json")


def scoring(rank: int, store_path: str, *, folder: str, data: str) -> Ways:
    """Each way gives (bits, bytes sent to the other node, tokens of this rank, relative errors)."""
    facts = read_facts(ModelSource(path=folder))
    slots = even_slots(facts.num_experts, len(NODES), redundant_per_rank=0)
    in_order = assign("linear", num_layers=facts.num_layers, num_logical_experts=facts.num_experts, slots_of_rank=slots)
    text_N = load_corpus(data).heldout_N
    chosen = sample(text_N, length=LENGTH, num_bytes=SCORED_BYTES)
    group = join_group(store_path, ranks=range(len(NODES)), rank=rank, nodes=NODES, timeout_ms=60_000)

    def way(hierarchy: Hierarchy, wire: Wire, back: Wire) -> Any:
        dispatch = DispatchConfig(hierarchy=hierarchy, wire=wire, combine_wire=back)
        epm = ExpertParallelModel.load(ModelSource(path=folder), expert_map=in_order, rank=rank, dispatch=dispatch)
        prefer_plain_attention(epm, length=LENGTH)
        epm.bind(group)
        before = list(group.sent_bytes)
        bits = heldout_bits(epm, text_N, chosen, group=group)
        far = sum(group.sent_bytes[to] - before[to] for to in range(len(NODES)) if NODES[to] != NODES[rank])
        return bits, far, len(chosen.starts) * LENGTH * facts.num_layers, epm.wire_error()

    return {" ".join(sent): partial(way, *sent) for sent in SENT}


@dataclass(frozen=True)
class WireRow:
    hierarchy: str
    wire: str
    combine_wire: str
    bits: float
    node_bytes: float
    dispatch_error: float
    combine_error: float


def wires(folder: Path, data: str) -> list[WireRow]:
    rows = []
    with (
        tempfile.TemporaryDirectory() as store,
        Crew(scoring, members=len(NODES), store_path=f"{store}/s", folder=str(folder), data=data) as crew,
    ):
        for hierarchy, wire, back in SENT:
            _, told = crew.run(f"{hierarchy} {wire} {back}")
            errors: Mapping[str, float] = told[0][3]
            node_bytes = sum(far for _, far, _, _ in told) / told[0][2]
            lost = (errors.get("dispatch", 0.0), errors.get("combine", 0.0))
            rows.append(WireRow(hierarchy, wire, back, told[0][0], node_bytes, *lost))
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def table_of_wires(rows: list[WireRow]) -> str:
    base = rows[0]
    lines = [
        "| way | there | back | bytes to the other node | of the first | error there | back | bits | more % |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row.hierarchy} | {row.wire} | {row.combine_wire} | {row.node_bytes:.0f} | "
            f"{row.node_bytes / base.node_bytes:.3f} | {row.dispatch_error:.2%} | {row.combine_error:.2%} | "
            f"{row.bits:.4f} | {100 * (row.bits / base.bits - 1):+.2f} |"
        )
    return "\n".join(lines)


EXPERTS, TOP_K, RANKS, REDUNDANT, TOKENS = 256, 8, 32, 32, 512


def large(num_nodes: int = 4, *, seed: int = 0) -> dict[str, float]:
    """Rows that cross to another node, there, per token."""
    draw = np.random.default_rng(seed)
    share_E = draw.permutation(1 / np.arange(1, EXPERTS + 1))
    share_E /= share_E.sum()
    # the largest of share ** (1 / uniform), as sampling without replacement goes
    keys = draw.exponential(size=(RANKS, TOKENS, EXPERTS)) / share_E
    picks_RTK = np.argpartition(keys, TOP_K, axis=2)[:, :, :TOP_K]
    load_LE = np.bincount(picks_RTK.reshape(-1), minlength=EXPERTS)[None].astype(float)
    nodes = [f"n{rank * num_nodes // RANKS}" for rank in range(RANKS)]
    slots = (EXPERTS + REDUNDANT) // RANKS
    fleet = Fleet((slots,) * RANKS, domain_of_rank=tuple(nodes))
    linear = assign("linear", num_layers=1, num_logical_experts=EXPERTS, slots_of_rank=(slots,) * RANKS)
    planned = ExpertMap(
        generation=0,
        num_logical_experts=EXPERTS,
        slots_of_rank=(slots,) * RANKS,
        logical_of_slot=pack_groups(load_LE, fleet, least_copies=1).rows(),
    )
    found = {}
    for name, expert_map, domains in (("linear, blind", linear, None), ("planned", planned, nodes)):
        flat = crossing = 0
        for rank in range(RANKS):
            plan = make_plan(expert_map, range(RANKS), rank=rank, domains=domains)
            rank_TK = plan.layers[0].addresses(torch.from_numpy(picks_RTK[rank])).numpy() // plan.slots_stride
            node_TK = np.asarray([node for node in range(num_nodes) for _ in range(RANKS // num_nodes)])[rank_TK]
            home = rank * num_nodes // RANKS
            flat += int((node_TK != home).sum())
            met_TG = np.zeros((TOKENS, num_nodes), dtype=bool)
            np.put_along_axis(met_TG, node_TK, values=True, axis=1)
            met_TG[:, home] = False
            crossing += int(met_TG.sum())
        found[f"{name}, flat"] = flat / (RANKS * TOKENS)
        found[f"{name}, by node"] = crossing / (RANKS * TOKENS)
    return found


SHAPE = ModelShape(
    family="qwen3_moe",
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    vocab_size=256,
    max_position_embeddings=256,
)
SEQUENCES, SEQUENCE = 2, 128


def stepping(rank: int, store_path: str) -> Ways:
    slots = even_slots(SHAPE.num_experts, len(NODES), redundant_per_rank=0)
    in_order = assign(
        "linear", num_layers=SHAPE.num_hidden_layers, num_logical_experts=SHAPE.num_experts, slots_of_rank=slots
    )
    group = join_group(store_path, ranks=range(len(NODES)), rank=rank, nodes=NODES, timeout_ms=60_000)
    ids = torch.randint(0, 256, (SEQUENCES, SEQUENCE), generator=torch.Generator().manual_seed(rank))

    def way(hierarchy: Hierarchy, overlap: Any) -> Any:
        dispatch = DispatchConfig(hierarchy=hierarchy, overlap=overlap)
        epm = ExpertParallelModel.load(ModelSource(shape=SHAPE), expert_map=in_order, rank=rank, dispatch=dispatch)
        prefer_plain_attention(epm, length=SEQUENCE)
        epm.bind(group)

        def step() -> float:
            before = group.blocked_s
            epm.module.zero_grad(set_to_none=True)
            epm.module(input_ids=ids, use_cache=False).logits.square().mean().backward()
            epm.rollback()
            return group.blocked_s - before

        return step

    return {
        f"{hierarchy} {overlap}": way(hierarchy, overlap)
        for hierarchy in ("Flat", "ByNode")
        for overlap in ("OneBatch", "TwoBatch")
    }


def batches(turns: int) -> dict[str, list[float]]:
    """By way the milliseconds of each turn; and of two batches over one, turn by turn."""
    found: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as store,
        Crew(stepping, members=len(NODES), store_path=f"{store}/s") as crew,
    ):
        names = [f"{hierarchy} {overlap}" for hierarchy in ("Flat", "ByNode") for overlap in ("OneBatch", "TwoBatch")]
        for turn in range(turns + 1):
            for name in names:
                timing, _ = crew.run(name)
                if turn:  # the first one warms up
                    found.setdefault(name, []).append(1000 * timing.wall_s)
    for hierarchy in ("Flat", "ByNode"):
        one, two = (found[f"{hierarchy} {overlap}"] for overlap in ("OneBatch", "TwoBatch"))
        found[f"{hierarchy} two / one"] = [b / a for a, b in zip(one, two, strict=True)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(".moerator/tiny"))
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    given = parser.parse_args()
    told: dict[str, Any] = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    if "wires" in given.only:
        rows = wires(given.checkpoint, given.data)
        told["wires"] = [asdict(row) for row in rows]
        sys.stdout.write(table_of_wires(rows) + "\n\n")
    if "large" in given.only:
        told["large"] = crossing = large()
        base = crossing["linear, blind, flat"]
        for name, count in crossing.items():
            sys.stdout.write(f"{name}: {count:.3f} rows a token cross, {count / base:.3f} of the first\n")
    if "batches" in given.only:
        told["batches"] = batches(given.turns)
        for name, values in told["batches"].items():
            sys.stdout.write(f"{name}: {shown(values)}{'' if '/' in name else ' ms'}\n")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
