"""Training tokens a second: four ranks against the same model in one process that has all cores. CPU only.

    PYTHONPATH=tests:operator:runtime python tests/bench/training.py --turns 10

The model, text, batch, optimizer, learning rate and precision are those of examples/job-tiny.yaml. One process takes
the windows of all four ranks as one batch through plain transformers, with each of its ways to run experts, and applies
our optimizer (transformers has no Muon). The two work in turn; a turn is a few whole optimizer steps. Prints tokens a
second, processor seconds a step, and the ratio turn by turn.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crew import Crew, Timing, Ways, shown
from demo_job import demo_job
from gloo_ranks import join_group
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_core.experts.assign import assign, even_slots
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.train.data import WindowOrder, load_corpus
from moe_runtime.train.loop import BITS, MAX_GRADIENT_NORM, Trainer
from moe_runtime.train.losses import balance_loss
from moe_runtime.train.optim import Optimizer, Trained, rule_for
from moe_runtime.train.schedule import rate_share

IMPLEMENTATIONS = ("grouped_mm", "eager")


def in_order(shape: ModelShape, num_ranks: int) -> ExpertMap:
    return assign(
        "linear",
        num_layers=shape.num_hidden_layers,
        num_logical_experts=shape.num_experts,
        slots_of_rank=even_slots(shape.num_experts, num_ranks, redundant_per_rank=0),
    )


def ranks(rank: int, store_path: str, *, size: int, output: str) -> Ways:
    shape, config = demo_job(output_path=output)
    expert_map = in_order(shape, size)
    epm = ExpertParallelModel.load(ModelSource(shape=shape), expert_map=expert_map, rank=rank, seed=config.seed)
    epm.module.train()
    trainer = Trainer(config, epm, run_id="bench")
    group = join_group(store_path, ranks=range(size), rank=rank) if size > 1 else None
    epm.bind(group)
    trainer.bind(group)
    trainer.restore()
    return {"step": lambda: trainer.step().loss_bits}


def one_process(rank: int, store_path: str, *, size: int, output: str) -> Ways:
    return {name: plain_step(name, size=size, output=output) for name in IMPLEMENTATIONS}


def plain_step(implementation: str, *, size: int, output: str) -> Callable[[], float]:
    """A training step as one would write it without us."""
    shape, config = demo_job(output_path=output)
    whole = ExpertParallelModel.load(ModelSource(shape=shape), expert_map=in_order(shape, 1), rank=0, seed=config.seed)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(whole.module.config, experts_implementation=implementation)
    model.load_state_dict(whole.module.state_dict())
    model.train()
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    trained = [
        Trained(
            name,
            p,
            rule_for(
                p,
                optimizer=config.optimizer,
                per_expert=name in experts,
                is_embedding=id(p) in embeddings,
                num_experts=shape.num_experts,
            ),
            name in experts,
        )
        for name, p in model.named_parameters()
    ]
    optimizer = Optimizer(trained, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    order = WindowOrder(load_corpus(config.data).training_N, length=config.sequence_length + 1, seed=config.seed)
    batch = config.sequences_per_rank * size
    taken = 0

    def step() -> float:
        nonlocal taken
        torch.set_float32_matmul_precision(config.matmul_precision.lower())
        ids_BQ = torch.from_numpy(order.take(taken * batch, count=batch))
        model.zero_grad(set_to_none=True)
        output = model(input_ids=ids_BQ[:, :-1], use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), ids_BQ[:, 1:].reshape(-1))
        router_loss = balance_loss(output.router_logits, shape.num_experts_per_tok, like=loss)
        torch.autograd.backward(loss + config.aux_loss_coefficient * router_loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        gradients = {
            name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()
        }
        optimizer.apply(gradients, rate_share=rate_share(config, step=taken, done=0.0), step=taken)
        taken += 1
        return float(loss.detach()) * BITS

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a turn (default 4)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/training.json"))
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    _, config = demo_job(output_path="")
    tokens = options.ranks * config.sequences_per_rank * config.sequence_length

    turns: dict[str, list[Timing]] = {}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as home:
        common = {"size": options.ranks, "output": f"{home}/out"}
        with (
            Crew(ranks, members=options.ranks, store_path=f"{home}/store", **common) as ours,
            Crew(one_process, members=1, store_path="", threads=cores, **common) as plain,
        ):
            for turn in range(options.turns + 1):  # the first warms up
                for name, crew, way in (
                    ("moerator", ours, "step"),
                    *((f"one process, {i}", plain, i) for i in IMPLEMENTATIONS),
                ):
                    timing, values = crew.run(way, repeats=options.steps)
                    losses.setdefault(name, []).append(values[0])
                    if turn:
                        turns.setdefault(name, []).append(timing)

    best = min((n for n in turns if n != "moerator"), key=lambda n: sum(t.wall_s for t in turns[n]))
    for name, timings in turns.items():
        per_s = [tokens / t.wall_s for t in timings]
        ratio = [b.wall_s / t.wall_s for t, b in zip(timings, turns[best], strict=True)]
        processor_ms = [t.cpu_s * 1000 for t in timings]
        print(
            f"{name:26} {shown(per_s, digits=0):>22} tokens/s  {shown(processor_ms, digits=0):>16} ms of processor a"
            f" step  last loss {losses[name][-1]:.3f} bits  ratio {shown(ratio)}"
        )
    rows = {name: [t.wall_s for t in timings] for name, timings in turns.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"step_s": rows, "tokens": tokens, "cores": cores}, indent=2))
    print(
        f"{options.turns} turns of {options.steps} steps, {cores} cores, load {os.getloadavg()[0]:.1f}; {options.json}"
    )


if __name__ == "__main__":
    main()
