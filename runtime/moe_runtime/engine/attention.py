"""Attention masks of a serving step, in the form that the family's attention takes."""

from typing import Any

import torch

from moe_runtime.engine.cache import SlotKVCache
from moe_runtime.experts.families import layer_types_of


def attention_masks(module: Any, cache: SlotKVCache) -> torch.Tensor | dict[str, torch.Tensor]:
    """One [B, 1, Q, S] mask, or one per layer type for a model that mixes types.

    bool for sdpa, additive float for eager attention.
    """
    config = module.config
    types = sorted(set(layer_types_of(config)))
    masks = {t: _mask(config, cache, sliding=t == "sliding_attention", dtype=module.dtype) for t in types}
    return masks if len(masks) > 1 else masks[types[0]]


def _mask(config: Any, cache: SlotKVCache, *, sliding: bool, dtype: torch.dtype) -> torch.Tensor:
    visible = cache.visible_BQS(sliding_window=int(config.sliding_window) if sliding else None)
    if config._attn_implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
