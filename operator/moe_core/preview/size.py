"""How big a model is, as far as a preview needs it: what travels with a token, and what a rank holds in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.packing import FULL, Packing
from moe_core.contract.router import RouterConfig, picks_of_token
from moe_core.outcome import InvalidInput
from moe_core.spec.common import ModelShapeSpec

BYTES_PER_NUMBER = 4
"""The runtime computes in float32, whatever a checkpoint is stored in."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """dense_numbers: what every rank holds, all layers together: embeddings, attention, routers, shared experts.
    packing: how routed experts are kept.
    """

    hidden_size: int
    moe_intermediate_size: int
    top_k: int
    dense_numbers: int
    packing: Packing = FULL
    uncounted: str = ""
    """A type of router that takes another number of experts than `top_k`, by the tokens that it meets."""

    @property
    def expert_bytes(self) -> int:
        """One physical expert of one layer: gate and up of what comes in, down of what lies between."""
        gate_up = self.packing.matrix_bytes(2 * self.moe_intermediate_size, self.hidden_size)
        return gate_up + self.packing.matrix_bytes(self.hidden_size, self.moe_intermediate_size)

    def rank_bytes(self, expert_map: ExpertMap) -> tuple[int, ...]:
        """Parameters in each rank's memory; caches, activations and optimizer state come on top."""
        dense = self.dense_numbers * BYTES_PER_NUMBER
        return tuple(dense + slots * expert_map.num_layers * self.expert_bytes for slots in expert_map.slots_of_rank)


def size_of_shape(shape: ModelShapeSpec, router: RouterConfig | None = None) -> ModelSize:
    """A model that a job builds; router: where it is not the family's."""
    picks = shape.num_experts_per_tok if router is None else picks_of_token(router, shape.num_experts_per_tok)
    return ModelSize(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.moe_intermediate_size,
        top_k=shape.num_experts_per_tok if picks is None else picks,
        uncounted=router.type if router is not None and picks is None else "",
        dense_numbers=_dense_numbers(
            hidden=shape.hidden_size,
            layers=shape.num_hidden_layers,
            heads=shape.num_attention_heads,
            kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            vocab=shape.vocab_size,
            experts=shape.num_experts,
        ),
    )


def size_of_config(config: Mapping[str, Any], *, packing: Packing = FULL) -> ModelSize:
    """A checkpoint's config.json, by the names that transformers' families use. Raises InvalidInput."""
    heads = _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    return ModelSize(
        hidden_size=hidden,
        moe_intermediate_size=_number(config, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
        top_k=_number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"),
        dense_numbers=_dense_numbers(
            hidden=hidden,
            layers=_number(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_number(config, "num_key_value_heads", default=heads),
            head_dim=_number(config, "head_dim", default=hidden // heads),
            vocab=_number(config, "vocab_size"),
            experts=_number(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        ),
        packing=packing,
    )


def _dense_numbers(
    *, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, experts: int
) -> int:
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    return 2 * vocab * hidden + layers * (attention + hidden * experts + 2 * hidden) + hidden


def _number(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    """The first that is given; `default` if none is."""
    if default and all(config.get(name) is None for name in names):
        return default
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise InvalidInput(f"config must give {' or '.join(names)} as a positive number, got {config.get(names[0])!r}")
