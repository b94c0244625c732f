"""Every router on the demo's model: the same shape, text, seed and number of steps; what differs is who routes.

    PYTHONPATH=tests:operator:runtime python tests/bench/routers.py                              # all, half an hour
    PYTHONPATH=tests:operator:runtime python tests/bench/routers.py --only topk hash --seeds 0 1
    PYTHONPATH=tests:operator:runtime python tests/bench/routers.py --table                      # of all runs so far

Two real ranks (Gloo), each a domain of its own, eight experts each in order: what EPLB calls linear. After training the
held-out text is scored twice: each token routed as if alone, as decoding must (`alone`), and whole windows at once, in
which routers that look ahead see what they have to predict (`whole`). Balance is the mean over the maximum of the
experts' picks of held-out tokens, mean over layers; dropped the picks without room in the last tenth of the training,
in percent; crossing the bytes that leave their domain, dispatch and combine, per held-out token and layer. A run adds a
line to .moerator/bench/routers.jsonl.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from demo_job import demo_job
from gloo_ranks import join_group, run_ranks
from moe_core.contract.router import RouterConfig
from moe_core.contract.runtime_config import ModelSource
from moe_core.experts.assign import assign
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.train.data import asked_router, load_corpus
from moe_runtime.train.evaluate import heldout_bits, sample
from moe_runtime.train.loop import Trainer

OUTPUT = Path(".moerator/bench/routers.jsonl")
DOMAINS = ("a", "b")
STEPS, SCORED_BYTES = 100, 32_768
SIGMOID = {"type": "TopK", "score_function": "Sigmoid"}
BALANCED = {"aux_loss_coeff": 0.01}
PLAIN = {"type": "TopK", **BALANCED}
UPPER = (91,)
"""First token id after the capital letters: bytes up to Z are class 0 (white space, digits, signs), others class 1."""
ROUTERS: dict[str, dict[str, Any] | None] = {
    "family": None,
    "topk": PLAIN,
    "topk-no-loss": {"type": "TopK"},
    "pre-softmax": {**PLAIN, "pre_softmax": True, "norm_topk_prob": True},
    "sigmoid": {**SIGMOID, **BALANCED},
    "bias": {**SIGMOID, "enable_expert_bias": True, "bias_update_rate": 0.01},
    "seq-aux": {**PLAIN, "load_balancing_type": "SeqAuxLoss"},
    "global-aux": {**PLAIN, "load_balancing_type": "GlobalAuxLoss"},
    "adaptive-aux": {**PLAIN, "aux_loss_target_percent": 80},
    "z-loss": {**PLAIN, "z_loss_coeff": 0.001},
    "importance": {"type": "TopK", "importance_loss_coeff": 0.01},
    "switch": {"type": "Switch", **BALANCED},
    "groups": {**PLAIN, "num_groups": 4, "group_topk": 1, "group_score": "Max"},
    "device": {**PLAIN, "group_by": "Device", "group_topk": 1},
    "locality": {**PLAIN, "locality_bias": 1.0, "locality_budget_percent": 10},
    "jitter": {**PLAIN, "input_jitter_eps": 0.01},
    "expert-dropout": {**PLAIN, "expert_dropout": 0.1},
    "noisy": {"type": "NoisyTopK", "load_loss_coeff": 0.01, "importance_loss_coeff": 0.01},
    "gumbel": {"type": "GumbelTopK", **BALANCED},
    "top-p": {"type": "TopP", "top_p": 0.4, "max_k": 4, "entropy_loss_coeff": 0.0001, **BALANCED},
    "annealed": {"type": "AnnealedTopK", "start_k": 8, **BALANCED},
    "hierarchical": {
        "type": "Hierarchical",
        "num_groups": 2,
        "group_topk": 1,
        "group_aux_loss_coeff": 0.01,
        **BALANCED,
    },
    "expert-choice": {"type": "ExpertChoice"},
    "soft-moe": {"type": "SoftMoE", "rows_per_expert": 8},
    "sinkhorn": {"type": "Sinkhorn"},
    "base": {"type": "Base"},
    "hash": {"type": "Hash"},
    "hash-balanced": {"type": "Hash", "hash_table": "Balanced"},
    "by-position": {"type": "Heuristic", "heuristic": "Position"},
    "by-class": {"type": "Heuristic", "heuristic": "Class", "class_first_ids": UPPER, **BALANCED},
    "frozen": {"type": "Frozen"},
    "cached": {"type": "Cached", **BALANCED},
    "capacity-probs": {**PLAIN, "expert_capacity_factor": 1.25},
    "capacity-position": {**PLAIN, "expert_capacity_factor": 1.25, "token_drop_policy": "Position"},
    "capacity-reroute": {**PLAIN, "expert_capacity_factor": 1.0, "overflow": "Reroute"},
    "capacity-queue": {**PLAIN, "expert_capacity_factor": 1.0, "overflow": "Queue", "queue_passes": 2},
    "capacity-adaptive": {**PLAIN, "expert_capacity_factor": 1.25, "adaptive_capacity_decay": 0.9},
    "capacity-by-class": {
        **PLAIN,
        "expert_capacity_factor": 1.25,
        "class_first_ids": UPPER,
        "class_capacity_percents": (40, 60),
    },
}
"""None: the family's own, with today's balance loss."""


@dataclass(frozen=True)
class Row:
    """bits per byte `alone` and `whole` (None: the same); see the module."""

    router: str
    seed: int
    steps: int
    alone: float
    whole: float | None
    balance: float
    dropped: float
    crossing: float
    seconds: float


def train(rank: int, store_path: str, *, name: str, seed: int, steps: int, output: str) -> dict[str, Any]:
    # each of the two ranks reads as much a step as one of the job's four
    shape, config = demo_job(output_path=output, max_steps=steps, seed=seed)
    options, corpus = ROUTERS[name], load_corpus(config.data)
    asked = None if options is None else asked_router(RouterConfig(**options), corpus)
    each = shape.num_experts // len(DOMAINS)
    linear = assign(
        "linear",
        num_layers=shape.num_hidden_layers,
        num_logical_experts=shape.num_experts,
        slots_of_rank=(each,) * len(DOMAINS),
    )
    epm = ExpertParallelModel.load(ModelSource(shape=shape), expert_map=linear, rank=rank, seed=seed, router=asked)
    trainer = Trainer(config, epm, corpus=corpus)
    with join_group(store_path, ranks=range(len(DOMAINS)), rank=rank, nodes=DOMAINS, timeout_ms=60_000) as group:
        epm.bind(group)
        trainer.bind(group)
        trainer.restore()
        began, dropped, picks = time.perf_counter(), 0, 0
        while not trainer.finished:
            report = trainer.step()
            if report.progress > 0.9:
                dropped += report.router_counts.get("dropped", 0)
                picks += report.tokens * shape.num_experts_per_tok * shape.num_hidden_layers
        seconds = time.perf_counter() - began
        load_LE = torch.zeros(shape.num_hidden_layers, shape.num_experts)
        crossed = 0

        def take(routed: Any) -> None:
            nonlocal crossed
            for layer_idx, expert_TK in routed:
                taken_N = expert_TK[expert_TK >= 0]
                load_LE[layer_idx] += torch.bincount(taken_N, minlength=shape.num_experts)
                crossed += int((taken_N // each != rank).sum())

        chosen = sample(trainer.corpus.heldout_N, length=config.sequence_length, num_bytes=SCORED_BYTES)
        looks_ahead = epm.routed is not None and epm.routed.looks_ahead
        whole = None
        if looks_ahead:
            whole = heldout_bits(epm, trainer.corpus.heldout_N, chosen, group=group, whole_texts=True)
        epm.record(take)
        vars(epm)["rollback"] = epm.commit  # scoring throws its counts away, we want them
        alone = heldout_bits(epm, trainer.corpus.heldout_N, chosen, group=group)
        group.all_reduce_sum(load_LE)
        told = torch.tensor([crossed], dtype=torch.float64)
        group.all_reduce_sum(told)
    tokens = chosen.num_bytes * 2 * shape.num_hidden_layers  # windows are scored in their second half
    return {
        "alone": round(alone, 4),
        "whole": None if whole is None else round(whole, 4),
        "balance": round(float((load_LE.mean(dim=1) / load_LE.amax(dim=1)).mean()), 3),
        "dropped": round(100 * dropped / max(1, picks), 2),
        "crossing": round(float(told) * 2 * 4 * shape.hidden_size / tokens, 1),
        "seconds": round(seconds, 1),
    }


def table(rows: list[Row]) -> str:
    lines = ["| router | alone | whole | balance | dropped % | crossing B | s |", "|---|---|---|---|---|---|---|"]
    for name in ROUTERS:
        of_router = [row for row in rows if row.router == name]
        if of_router:
            cells = [_cell([getattr(row, field) for row in of_router]) for field in FIGURES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


FIGURES = ("alone", "whole", "balance", "dropped", "crossing", "seconds")


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=sorted(ROUTERS), default=list(ROUTERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", action="store_true", help="train nothing, print what earlier runs have measured")
    given = parser.parse_args()
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    for seed in [] if given.table else given.seeds:
        for name in given.only:
            with tempfile.TemporaryDirectory() as folder:
                result = run_ranks(
                    train,
                    num_ranks=len(DOMAINS),
                    store_path=f"{folder}/store",
                    timeout_s=600,
                    name=name,
                    seed=seed,
                    steps=given.steps,
                    output=f"{folder}/output",
                )[0]
            row = Row(name, seed, given.steps, **result)
            with OUTPUT.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            sys.stderr.write(f"{row}\n")
    latest: dict[tuple[str, int], Row] = {}
    for line in OUTPUT.read_text().splitlines() if OUTPUT.exists() else ():
        row = Row(**json.loads(line))
        latest[row.router, row.seed] = row
    sys.stdout.write(table([row for row in latest.values() if row.steps == given.steps]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
