"""What a step minimises: the text's cross-entropy, and a little of the routers' imbalance."""

from typing import Any

import torch

from moe_runtime.engine.model import ExpertParallelModel


def losses(epm: ExpertParallelModel, ids_BQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats per byte, load-balancing loss) of this rank's rows of input and target. Raises GroupFault."""
    output = epm.module(input_ids=ids_BQ[:, :-1], use_cache=False, output_router_logits=True)
    text_loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), ids_BQ[:, 1:].reshape(-1))
    return text_loss, balance_loss(getattr(output, "router_logits", None), epm.top_k, like=text_loss)


def balance_loss(router_logits: Any, top_k: int, *, like: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's load-balancing loss per layer, averaged: 1 when every expert gets the same share.

    router_logits: per layer [T, E], before the softmax; None or empty for a family that does not give them: no loss.
    """
    losses = []
    for logits_TE in router_logits or ():
        probability_TE = logits_TE.float().softmax(dim=-1)
        num_experts = probability_TE.shape[-1]
        picks_TK = probability_TE.topk(top_k, dim=-1).indices
        share_E = torch.bincount(picks_TK.reshape(-1), minlength=num_experts).float() / picks_TK.numel()
        losses.append(num_experts * (share_E * probability_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean() if losses else torch.zeros_like(like)
