"""Attention masks of a serving step, in the form that the family's attention takes."""

from collections.abc import Mapping

import torch

from moe_runtime.engine.cache import SlotKVCache


def attention_masks(
    cache: SlotKVCache, windows: Mapping[str, int | None], *, additive: torch.dtype | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """One [B, 1, Q, S] mask, or one per layer type for a model that mixes types.

    windows: sliding window per layer type, None for full attention. additive None: bool masks, as sdpa takes them; else
    floats of that type to add to the scores, as eager attention takes them.
    """
    masks: dict[str, torch.Tensor] = {}
    for layer_type, window in windows.items():
        visible = cache.visible_BQS(sliding_window=window)
        if additive is not None:
            visible = torch.zeros_like(visible, dtype=additive).masked_fill(~visible, torch.finfo(additive).min)
        masks[layer_type] = visible
    return masks if len(masks) > 1 else next(iter(masks.values()))
