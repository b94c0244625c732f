"""What rank processes do in the numerics tests: run a family's tiny model over a group and hand back numbers."""

from pathlib import Path
from typing import Any

import torch
from gloo_ranks import GlooGroup

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.engine.model import ExpertParallelModel

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
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
    return int(COMMON["num_hidden_layers"]) - int(FAMILIES[family].get("first_k_dense_replace", 0))  # type: ignore[call-overload]


def batch_of_rank(rank: int, num_ranks: int) -> torch.Tensor:
    """[2, 9] tokens of each rank, [1, 9] of the last one: ranks need not hold equally many."""
    rows = 1 if rank == num_ranks - 1 and num_ranks > 1 else 2
    return torch.randint(0, 64, (rows, 9), generator=torch.Generator().manual_seed(100 + rank))


def load(folder: str, expert_map: ExpertMap, rank: int) -> ExpertParallelModel:
    return ExpertParallelModel.load(ModelSource(path=folder), expert_map=expert_map, rank=rank)


def forward_and_gradients(rank: int, store_path: str, *, folder: str, expert_map: ExpertMap, world: int) -> dict[str, Any]:
    """Logits of this rank's batch without a cache, and the gradients of the sum over ranks of its weighted logits."""
    epm = load(folder, expert_map, rank)
    group = GlooGroup(store_path, ranks=range(world), rank=rank)
    epm.bind(group)
    ids = batch_of_rank(rank, world)
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
        "logits": logits.detach().numpy(),
        "dense": {name: value.numpy() for name, value in dense.items()},
        "experts": {name: {e: value.numpy() for e, value in rows.items()} for name, rows in experts.items()},
        "load": epm.load_window(),
    }


def probe_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, logits.numel()).view(logits.shape)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def reference_model(family: str) -> torch.nn.Module:
    """The single-process transformers model, with weights large enough that routing and every expert matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]}))
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
