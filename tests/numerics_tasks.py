"""What rank processes do in the numerics tests: run a family's tiny model over a group and hand back numbers."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import FileStore

from gloo_ranks import join_group
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import DispatchConfig, ModelSource
from moe_runtime.dispatch import mixture
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.errors import GroupFault
from moe_runtime.membership.group import EpochGroup
from moe_runtime.membership.group import _backend as backend_of
from numerics_families import tiny_model

T = TypeVar("T")
NUM_LAYERS = 3
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
NUM_EXPERTS = 8
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16, "sliding_window": 6},
    "olmoe": {"num_experts": 8, "intermediate_size": 16},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "head_dim": 8,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def num_moe_layers(family: str) -> int:
    dense_layers: int = FAMILIES[family].get("first_k_dense_replace", 0)
    return NUM_LAYERS - dense_layers


def batch_of_rank(rank: int, num_ranks: int) -> torch.Tensor:
    """[2, 9] tokens of each rank, [1, 9] of the last one: ranks need not hold equally many."""
    rows = 1 if rank == num_ranks - 1 and num_ranks > 1 else 2
    return torch.randint(0, 64, (rows, 9), generator=torch.Generator().manual_seed(100 + rank))


def load(
    folder: str,
    expert_map: ExpertMap,
    rank: int,
    dispatch: DispatchConfig | None = None,
    *,
    device: str = "cpu",
) -> ExpertParallelModel:
    source = ModelSource(path=folder)
    return ExpertParallelModel.load(source, expert_map=expert_map, rank=rank, dispatch=dispatch, device=device)


def forward_and_gradients(
    rank: int,
    store_path: str,
    *,
    folder: str,
    expert_map: ExpertMap,
    world: int,
    nodes: str | None = None,
    dispatch: DispatchConfig | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Logits of this rank's batch without a cache, and the gradients of the sum over ranks of its weighted logits.

    nodes: one letter for each rank.
    """
    epm = load(folder, expert_map, rank, dispatch, device=device)
    group = join_group(store_path, ranks=range(world), rank=rank, nodes=nodes, device=device)
    epm.bind(group)
    ids = batch_of_rank(rank, world).to(device)
    logits = epm.module(input_ids=ids).logits
    (logits * probe_of(logits)).sum().backward()
    epm.commit()
    dense = {name: _gradient(p) for name, p in epm.dense_parameters()}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for entry in epm.expert_parameters():
        rows = experts.setdefault(entry.name, {})
        gradient = _gradient(entry.parameter)
        for slot, logical_id in enumerate(entry.logical_of_slot):
            if logical_id >= 0:
                rows[logical_id] = rows.get(logical_id, 0) + gradient[slot]
    return {
        "logits": logits.detach().cpu().numpy(),
        "dense": {name: value.numpy() for name, value in dense.items()},
        "experts": {name: {e: value.numpy() for e, value in rows.items()} for name, rows in experts.items()},
        "load": epm.load_window(),
        "sent": list(group.sent_bytes),
        "wire_error": epm.wire_error(),
    }


def probe_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, logits.numel(), device=logits.device).view(logits.shape)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter, device="cpu") if parameter.grad is None else parameter.grad.cpu()


def reference_model(family: str) -> torch.nn.Module:
    """The single-process transformers model, with weights large enough that routing and every expert matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        other: torch.nn.Module = tiny_model(family)
        return other
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name or "sinks" in name:
                parameter.normal_(std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.eval()


def save_reference(family: str, folder: Path) -> None:
    reference_model(family).save_pretrained(folder)  # type: ignore[operator]


PROMPT_LENGTHS = ((5, 9), (7,), (), (3, 4, 11))
"""Prompts of ranks 0..3: uneven, and rank 2 has none."""
NEW_TOKENS = 6


def prompts_of_rank(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(500 + rank)
    return [torch.randint(0, 64, (length,), generator=generator) for length in PROMPT_LENGTHS[rank]]


@dataclass(frozen=True)
class Fault:
    """`victim` stops being of use at its `exchange`-th exchange: signal before sending, or after the exchange is
    done.
    """

    victim: int
    exchange: int
    after: bool
    signal: int = signal.SIGKILL


class FaultyGroup:
    """A group whose owner is hit by a signal in the middle of a step."""

    def __init__(self, group: EpochGroup, fault: Fault) -> None:
        self._group, self._fault, self._done = group, fault, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def all_to_all(self, rows: torch.Tensor, send_counts: Any, receive_counts: Any) -> torch.Tensor:
        return self._hit(lambda: self._group.all_to_all(rows, send_counts, receive_counts))

    def post_all_to_all(self, rows: torch.Tensor, send_counts: Any, receive_counts: Any) -> Any:
        return self._hit(lambda: self._group.post_all_to_all(rows, send_counts, receive_counts))

    def post_telling(self, rows: torch.Tensor, send_counts: Any, told_GC: torch.Tensor) -> Any:
        return self._hit(lambda: self._group.post_telling(rows, send_counts, told_GC))

    def _hit(self, exchange: Callable[[], T]) -> T:
        self._done += 1
        hit = self._done == self._fault.exchange
        if hit and not self._fault.after:
            os.kill(os.getpid(), self._fault.signal)
        received = exchange()
        if hit and self._fault.after:
            os.kill(os.getpid(), self._fault.signal)
        return received


def serve(
    rank: int,
    store_path: str,
    *,
    folder: str,
    expert_map: ExpertMap,
    world: int,
    forced: list[list[list[int]]],
    fault: Fault | None = None,
    timeout_ms: int = 20000,
    by_pick: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Prefill and decode this rank's prompts in cache rows of their own, feeding the tokens `forced[rank][prompt]`.

    A fault is met as the step loop does: roll back, build a group of the living, bind, run the same step again.
    """
    if by_pick:
        vars(mixture)["SMALL_STEP_TOKENS"] = -1
    epm = load(folder, expert_map, rank, device=device)
    group: Any = join_group(store_path, ranks=range(world), rank=rank, timeout_ms=timeout_ms, device=device)
    if fault is not None and fault.victim == rank:
        group = FaultyGroup(group, fault)
    epm.bind(group)
    cache = epm.new_cache(num_rows=5, max_length=24)
    prompts = prompts_of_rank(rank)
    rows = [4, 1, 2][: len(prompts)]
    steps: list[Any] = []
    faults = 0
    fault_seconds = 0.0
    for step in range(NEW_TOKENS):
        ids, positions = _step_inputs(prompts, forced[rank], step)
        if ids is not None and positions is not None:
            ids, positions = ids.to(device), positions.to(device)
        started = time.monotonic()
        try:
            logits = epm.forward_tokens(ids, positions, rows, cache)
        except GroupFault:
            faults += 1
            fault_seconds = time.monotonic() - started
            assert fault is not None
            epm.rollback()
            group.destroy()
            living = [r for r in range(world) if r != fault.victim]
            group = join_group(store_path, ranks=living, rank=rank, epoch=2, timeout_ms=timeout_ms)
            epm.bind(group)
            logits = epm.forward_tokens(ids, positions, rows, cache)
        epm.commit()
        steps.append(logits.cpu().numpy())
    return {
        "steps": steps,
        "faults": faults,
        "fault_seconds": fault_seconds,
        "lengths": [cache.lengths[row] for row in rows],
        "picks": sum(map(sum, epm.load_window())),
        "degraded": epm.degraded_tokens(),
    }


def _step_inputs(
    prompts: list[torch.Tensor], forced: list[list[int]], step: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The prompts padded (left and right by turns) at step 0, one token each after that."""
    if not prompts:
        return None, None
    if step:
        ids = torch.tensor([[tokens[step - 1]] for tokens in forced])
        return ids, torch.tensor([[len(prompt) + step - 1] for prompt in prompts])
    width = max(len(prompt) for prompt in prompts)
    ids, positions = torch.zeros(len(prompts), width, dtype=torch.long), torch.full((len(prompts), width), -1)
    for row, prompt in enumerate(prompts):
        first = width - len(prompt) if row % 2 else 0
        ids[row, first : first + len(prompt)] = prompt
        positions[row, first : first + len(prompt)] = torch.arange(len(prompt))
    return ids, positions


def train_through_fault(
    rank: int,
    store_path: str,
    *,
    folder: str,
    expert_map: ExpertMap,
    world: int,
    fault: Fault,
    nodes: str | None = None,
    dispatch: DispatchConfig | None = None,
    timeout_ms: int = 20000,
) -> dict[str, Any]:
    """Forward and backward with a death in the middle, then again among the living; gradients as before the fault."""
    epm = load(folder, expert_map, rank, dispatch)
    group: Any = join_group(store_path, ranks=range(world), rank=rank, nodes=nodes, timeout_ms=timeout_ms)
    if fault.victim == rank:
        group = FaultyGroup(group, fault)
    epm.bind(group)
    ids = batch_of_rank(rank, world)
    started = time.monotonic()
    try:
        epm.module(input_ids=ids).logits.square().sum().backward()
        outcome = "finished"
    except GroupFault:
        outcome = "fault"
    epm.rollback()
    epm.module.zero_grad()
    group.destroy()
    seconds = time.monotonic() - started
    living = [r for r in range(world) if r != fault.victim]
    nodes_left = None if nodes is None else [nodes[r] for r in living]
    epm.bind(join_group(store_path, ranks=living, rank=rank, epoch=2, nodes=nodes_left))
    logits = epm.module(input_ids=ids).logits
    logits.square().sum().backward()
    epm.commit()
    return {
        "outcome": outcome,
        "seconds": seconds,
        "logits": logits.detach().numpy(),
        "picks": sum(map(sum, epm.load_window())),
    }


def degraded_logits(
    rank: int, store_path: str, *, folder: str, expert_map: ExpertMap, ranks: list[int], fallback: Any
) -> dict[str, Any]:
    """Logits of a fixed batch while only `ranks` live; the generalists are those beside the checkpoint."""
    source = ModelSource(path=folder)
    epm = ExpertParallelModel.load(source, expert_map=expert_map, rank=ranks[rank], fallback=fallback)
    epm.bind(join_group(store_path, ranks=ranks, rank=ranks[rank]))
    cache = epm.new_cache(num_rows=2, max_length=16)
    ids = batch_of_rank(0, 1)
    logits = epm.forward_tokens(ids, torch.arange(9).repeat(2, 1), (0, 1), cache)
    degraded_rows = list(epm.degraded_rows)
    epm.commit()
    return {
        "logits": logits.numpy(),
        "degraded": epm.degraded_tokens(),
        "rows": degraded_rows,
        "lost": epm.lost_experts(),
        "load": epm.load_window(),
    }


def move_between_steps(rank: int, store_path: str, *, folder: str, maps: list[ExpertMap], world: int) -> dict[str, Any]:
    """Two decoding steps with a committed map in between; the cache goes on."""
    epm = load(folder, maps[0], rank)
    group = join_group(store_path, ranks=range(world), rank=rank)
    epm.bind(group)
    cache = epm.new_cache(num_rows=2, max_length=16)
    ids = batch_of_rank(0, 1)
    positions = torch.arange(9).repeat(2, 1)
    steps = [epm.forward_tokens(ids[:, :5], positions[:, :5], (0, 1), cache).numpy()]
    epm.commit()
    staged = epm.stage(maps[1])
    steps.append(epm.forward_tokens(ids[:, 5:7], positions[:, 5:7], (0, 1), cache).numpy())
    epm.commit()
    epm.commit_map(staged)
    epm.bind(group, expert_map=maps[1])
    steps.append(epm.forward_tokens(ids[:, 7:], positions[:, 7:], (0, 1), cache).numpy())
    epm.commit()
    return {"steps": steps, "slots": [layer.logical_of_slot for layer in epm._layers]}


def on_a_gpu(rank: int, store_path: str, *, name: str, **arguments: Any) -> dict[str, Any]:
    """A task of this module, on the rank's GPU; ranks share GPUs where there are not enough."""
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    done: dict[str, Any] = globals()[name](rank, store_path, device=device, **arguments)
    return done


def alone_over_nccl(rank: int, store_path: str) -> dict[str, Any]:
    """A group of one sends nothing; here it gets the backend of larger ones all the same."""
    store = FileStore(store_path, 1)
    group = EpochGroup(store, (0,), rank, address="127.0.0.1", device="cuda", timeout_ms=20000)
    group._backend = backend_of(store, 0, 1, address="127.0.0.1", device=group.device, timeout_ms=20000)
    rows = group.all_to_all(torch.tensor([[3.0], [4.0]], device="cuda"), (2,), (2,))
    ints = group.all_gather_ints([5, -6])
    total = torch.tensor([7.0], device="cuda")
    group.all_reduce_sum(total)
    done: dict[str, Any] = {"rows": rows.flatten().tolist(), "ints": ints, "sum": total.tolist()}
    group.destroy()
    try:
        group.all_gather_ints([1])
    except GroupFault as fault:
        done["after"] = str(fault).rpartition(" ")[2]
    return done
