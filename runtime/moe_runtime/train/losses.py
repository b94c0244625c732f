"""What a step minimises: the text's cross-entropy, and a little of the routers' imbalance."""

from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.engine.model import ExpertParallelModel


@dataclass(frozen=True, slots=True)
class Losses:
    """`text`: nats per byte. `router`: what is added to it, by name, scaled, averaged over layers; the same names on
    all ranks.
    """

    text: torch.Tensor
    router: dict[str, torch.Tensor]

    @property
    def total(self) -> torch.Tensor:
        return torch.stack([self.text, *self.router.values()]).sum()


def losses(epm: ExpertParallelModel, ids_BQ: torch.Tensor, *, aux_coefficient: float) -> Losses:
    """Of this rank's rows of input and target. Raises GroupFault.

    aux_coefficient weighs the balance loss of a family that routes itself; a router of ours has its own.
    """
    routed = epm.routed
    asked = {"output_router_logits": True} if routed is None else {}
    output = epm.module(input_ids=ids_BQ[:, :-1], use_cache=False, **asked)
    text = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), ids_BQ[:, 1:].reshape(-1))
    if routed is not None:
        return Losses(text, routed.losses())
    balance = balance_loss(getattr(output, "router_logits", None), epm.top_k, like=text)
    return Losses(text, {"balance": aux_coefficient * balance})


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
