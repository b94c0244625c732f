"""Where experts lie as one rank sees them: what routers that prefer near experts go by.

G ranks of the epoch, L layers, E logical experts, W ways of a plan.
"""

from collections.abc import Sequence

import torch

from moe_core.contract.expert_map import ExpertMap
from moe_runtime.dispatch.plan import LOST, DispatchPlan
from moe_runtime.router.face import Layout

WITHIN_DOMAIN, ACROSS = 0.25, 1.0
"""Distances to another rank; without known domains every other rank is across. A quarter: what links inside a node or
rack are rarely slower than, against those between them.
"""


def layouts(expert_map: ExpertMap, plan: DispatchPlan, domains: Sequence[str] | None) -> list[Layout]:
    """[L] under this plan. A lost expert is answered for on the token's own rank, and so is near.

    Distances are those that picks travel: a plan that shares tokens among copies gives their mean.
    """
    here = plan.position
    distance_G = torch.full((plan.size,), ACROSS)
    if domains is not None:
        distance_G[[name == domains[here] for name in domains]] = WITHIN_DOMAIN
    distance_G[here] = 0.0
    names = domains if domains is not None else [str(rank) for rank in plan.ranks]  # each rank a domain of its own
    number_of = {name: number for number, name in enumerate(dict.fromkeys([names[here], *names]))}
    domain_G = torch.tensor([number_of[name] for name in names])
    found = []
    for layer_idx, layer in enumerate(plan.layers):
        address_WE = layer.address_WE.cpu()
        position_WE = torch.where(address_WE == LOST, here, address_WE // plan.slots_stride)
        holds_GE = torch.zeros(plan.size, expert_map.num_logical_experts, dtype=torch.bool)
        row = expert_map.logical_of_slot[layer_idx]
        for position, rank in enumerate(plan.ranks):
            held = [row[slot] for slot in expert_map.slot_range(rank) if row[slot] >= 0]
            holds_GE[position, held] = True
        holds_GE[here, list(layer.lost)] = True
        device = layer.address_WE.device
        found.append(Layout(distance_G[position_WE].mean(dim=0).to(device), holds_GE.to(device), domain_G.to(device)))
    return found
