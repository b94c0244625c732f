"""One MoE layer's experts over four Gloo ranks, forward: ours against transformers' own expert parallelism. CPU only.

    PYTHONPATH=tests:operator:runtime python tests/bench/ep_layer.py --turns 10

Ours is a layer of an `ExpertParallelModel`, as serving and training run it. Theirs are `AllToAllEP`, each rank with
tokens of its own as ours has, and `AllReduceEP`, which wants every rank to hold the same batch: it gets the tokens of
all four. Both run torch's grouped_mm and have equal shares of experts in order; ours places two redundant experts a
rank by its planner where the load is skewed, from another sample of the same distribution. All get the same weights,
tokens and picks, outputs are compared, and the ways work in turn. Processes of theirs are as torchrun starts them, ours
as a rank (`rank.assembly`), all with one thread.

even: all experts alike; zipf: Zipf's law with exponent 1 over the experts in any order, K different ones a token.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crew import Crew, Ways, shown
from gloo_ranks import join_group
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelShape, ModelSource
from moe_core.experts.anew import pack_anew
from moe_core.experts.assign import assign
from moe_core.experts.fleet import Fleet
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.host.memory import keep_freed_memory

NUM_RANKS = 4
WAYS = ("moerator", "AllToAllEP", "AllReduceEP")
REDUNDANT = 2
"""Slots a rank beyond the even share, where the load is skewed."""


@dataclass(frozen=True, slots=True)
class Case:
    """T tokens a rank, D model, F expert hidden, E experts, K picks a token."""

    load: str
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def title(self) -> str:
        return f"{self.load:4} T{self.T} D{self.D} F{self.F} E{self.E} K{self.K}"


SHAPES = (
    (64, 128, 128, 16, 2),
    (512, 128, 128, 16, 2),
    (4096, 128, 128, 16, 2),
    (64, 512, 256, 32, 4),
    (1024, 512, 256, 32, 4),
    (64, 1024, 256, 64, 8),
    (512, 1024, 256, 64, 8),
    (64, 2048, 768, 16, 2),
    (512, 2048, 768, 16, 2),
)
CASES = [Case(load, *sizes) for load in ("even", "zipf") for sizes in SHAPES]
TURN_S = 0.1
"""About what a turn of one way takes."""


def popularity(case: Case) -> npt.NDArray[np.float64]:
    """[E] log of each expert's part of the load, up to a constant."""
    if case.load == "even":
        return np.zeros(case.E)
    log_E: npt.NDArray[np.float64] = -np.log(np.random.default_rng(7).permutation(case.E) + 1.0)
    return log_E


def picks(case: Case, *, tokens: int, seed: int) -> npt.NDArray[np.int64]:
    """[T, K] different experts a token, drawn in proportion (Gumbel's way to draw without putting back)."""
    noise = np.random.default_rng(seed).gumbel(size=(tokens, case.E))
    chosen: npt.NDArray[np.int64] = np.argsort(-(popularity(case) + noise), axis=1)[:, : case.K]
    return chosen


def planned_map(case: Case) -> ExpertMap:
    """As the operator would place after a window of such load."""
    if case.load == "even":
        return plain_map(case)
    window = np.bincount(picks(case, tokens=4096, seed=99).reshape(-1), minlength=case.E)
    fleet = Fleet.even(case.E + NUM_RANKS * REDUNDANT, NUM_RANKS)
    placed = pack_anew(window[None].astype(np.float64), fleet).rows()
    return ExpertMap(
        generation=0, num_logical_experts=case.E, slots_of_rank=fleet.slots_of_rank, logical_of_slot=placed
    )


@dataclass(frozen=True, slots=True)
class Scene:
    """What all ways get on one rank."""

    x_TD: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor

    @classmethod
    def of(cls, case: Case, rank: int) -> "Scene":
        numbers = torch.Generator().manual_seed(rank)
        return cls(
            torch.randn(case.T, case.D, generator=numbers),
            torch.from_numpy(picks(case, tokens=case.T, seed=rank)),
            torch.rand(case.T, case.K, generator=numbers).softmax(-1),
        )


def plain_map(case: Case) -> ExpertMap:
    """Equal shares in order."""
    return assign("linear", num_layers=1, num_logical_experts=case.E, slots_of_rank=(case.E // NUM_RANKS,) * NUM_RANKS)


def model(case: Case, expert_map: ExpertMap, rank: int) -> ExpertParallelModel:
    shape = ModelShape(
        family="qwen3_moe",
        hidden_size=case.D,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=case.D // 2,
        num_experts=case.E,
        num_experts_per_tok=case.K,
        moe_intermediate_size=case.F,
        vocab_size=16,
        max_position_embeddings=16,
    )
    return ExpertParallelModel.load(ModelSource(shape=shape), expert_map=expert_map, rank=rank, seed=0)


def silent(way: Callable[[], torch.Tensor]) -> Callable[[], bool]:
    return lambda: way().numel() > 0  # tensors stay in their process


def ours(rank: int, store_path: str, *, case: Case) -> Ways:
    keep_freed_memory()
    epm = model(case, planned_map(case), rank)
    epm.bind(join_group(store_path, ranks=range(NUM_RANKS), rank=rank))
    layer, scene = epm._layers[0].entry.module, Scene.of(case, rank)

    @torch.no_grad()
    def moerator() -> torch.Tensor:
        with epm._context.running(None, case.T, (case.T,) * NUM_RANKS):
            mixed: torch.Tensor = layer(scene.x_TD, scene.expert_TK, scene.weight_TK)
        return mixed

    return {"moerator": silent(moerator), "moerator's": lambda: moerator().numpy()}


def theirs(rank: int, store_path: str, *, case: Case) -> Ways:
    from torch._C._distributed_c10d import FileStore
    from torch.distributed import init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP

    init_process_group("gloo", store=FileStore(store_path, NUM_RANKS), rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS, 1), mesh_dim_names=("ep", "tp"))
    scene = Scene.of(case, rank)

    def implementation(kind: Any, ep_mesh: Any, tp_mesh: Any) -> Any:
        held = model(case, plain_map(case), rank)._layers[0]
        experts: Any = held.entry.module
        experts.forward = held.compute.family_forward
        experts._is_expert_parallel = True  # as its `grouped_gemm` style sets it
        assert experts.config._experts_implementation == "grouped_mm"
        return kind(experts, ep_mesh, tp_mesh)

    all_to_all = implementation(AllToAllEP, mesh["ep"], mesh["tp"])
    all_reduce = implementation(AllReduceEP, mesh["ep"], mesh["ep"])
    everyone = [Scene.of(case, other) for other in range(NUM_RANKS)]
    shared = tuple(torch.cat([getattr(one, name) for one in everyone]) for name in ("x_TD", "expert_TK", "weight_TK"))

    @torch.no_grad()
    def a2a() -> torch.Tensor:
        mixed: torch.Tensor = all_to_all(scene.x_TD, scene.expert_TK, scene.weight_TK)
        return mixed

    @torch.no_grad()
    def reduce() -> torch.Tensor:
        mixed: torch.Tensor = all_reduce(*shared)
        return mixed[rank * case.T : (rank + 1) * case.T]

    return {
        "AllToAllEP": silent(a2a),
        "AllReduceEP": silent(reduce),
        "AllToAllEP's": lambda: a2a().numpy(),
        "AllReduceEP's": lambda: reduce().numpy(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--only", default="", help="cases whose title holds this")
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/ep_layer.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    print(f"{'':32}{'moerator ms':>24}{'/ AllToAllEP':>22}{'/ AllReduceEP':>22}{'difference':>12}")
    for case in [case for case in CASES if options.only in case.title]:
        turns: dict[str, list[float]] = {}
        with (
            tempfile.TemporaryDirectory(prefix="moe-bench-") as home,
            Crew(ours, members=NUM_RANKS, store_path=f"{home}/ours", case=case) as mine,
            Crew(theirs, members=NUM_RANKS, store_path=f"{home}/theirs", case=case) as peers,
        ):
            crews = {way: mine if way == "moerator" else peers for way in WAYS}
            outputs = {way: np.concatenate(crews[way].run(f"{way}'s")[1]) for way in WAYS}
            difference = max(
                float(np.abs(outputs["moerator"] - outputs[peer]).max() / np.abs(outputs[peer]).max())
                for peer in WAYS[1:]
            )
            repeats = {way: max(1, round(TURN_S / crews[way].run(way)[0].wall_s)) for way in WAYS}
            for turn in range(options.turns + 1):  # the first warms up
                for way in WAYS:
                    timing, _ = crews[way].run(way, repeats=repeats[way])
                    if turn:
                        turns.setdefault(way, []).append(timing.wall_s)
        times = {
            way: [t / m for t, m in zip(turns[way], turns["moerator"], strict=True)]
            for way in ("AllToAllEP", "AllReduceEP")
        }
        print(
            f"{case.title:32}{shown([t * 1000 for t in turns['moerator']]):>24}"
            f"{shown(times['AllToAllEP']):>22}{shown(times['AllReduceEP']):>22}{difference:>12.1e}",
            flush=True,
        )
        rows.append({**asdict(case), "seconds": turns, "difference": difference})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=2))
    print(f"{options.turns} turns, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {options.json}")


if __name__ == "__main__":
    main()
