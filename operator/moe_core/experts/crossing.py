"""How many picks leave their failure domain under a layout and its split, before anything runs, as traffic.py has it
exactly but for whole lanes: quick enough to weigh every layout that a plan considers.

The n_g sources of domain g of R in all find n_g / R of an expert's tokens near, as far as the copies in g answer so
many; the rest goes where copies answer more than their own domain has. Without a trace every source picks alike.

Shapes as in shelf.py; G failure domains. from_LEG [L, E, G] picks by source domain, in any unit.
"""

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray, check_shape
from moe_core.experts.fleet import Fleet
from moe_core.experts.split import shares_of
from moe_core.outcome import InvalidInput


def picks_across(
    load_LE: FloatArray,
    logical_LRS: IntArray,
    share_LRS: FloatArray,
    fleet: Fleet,
    from_LEG: FloatArray | None = None,
) -> FloatArray:
    """[L, G, G] of the load's picks, from the source's domain to the answering one. Raises InvalidInput."""
    num_layers, num_experts = load_LE.shape
    num_domains = fleet.num_domains
    if from_LEG is not None:
        check_shape("from", from_LEG, (num_layers, num_experts, num_domains))
    of_sources_G = np.bincount(fleet.domain_R[fleet.slots_R > 0], minlength=num_domains) / fleet.ranks_with_slots
    rows = np.arange(num_layers)[:, None, None] * (num_experts + 2) + logical_LRS
    key_LRS = rows * num_domains + fleet.domain_R[None, :, None]
    size = num_layers * (num_experts + 2) * num_domains
    answered = np.bincount(key_LRS.reshape(-1), share_LRS.reshape(-1), minlength=size)
    answered_LEG = answered.reshape(num_layers, num_experts + 2, num_domains)[:, :num_experts]
    near_LEG = np.minimum(answered_LEG, of_sources_G)
    room_LEG = answered_LEG - near_LEG
    room_LEG = room_LEG / np.maximum(room_LEG.sum(2, keepdims=True), 1e-300)
    leaves_LEG = 1 - near_LEG / np.maximum(of_sources_G, 1e-300)
    picked_LEG = load_LE[..., None] * _parts_of_sources(from_LEG, of_sources_G)
    found = (picked_LEG * leaves_LEG).transpose(0, 2, 1) @ room_LEG
    domains = np.arange(num_domains)
    found[:, domains, domains] += (picked_LEG * (1 - leaves_LEG)).sum(1)
    return np.asarray(found)


def picks_across_in_groups(
    load_LE: FloatArray, logical_LRS: IntArray, share_LRS: FloatArray, fleet: Fleet, group_ranks: int
) -> FloatArray:
    """As `picks_across` where ranks are in EP groups of neighbours, each with all experts: picks stay in their group.
    All groups pick as much.
    """
    num_groups = fleet.num_ranks // group_ranks
    found = np.zeros((len(load_LE), fleet.num_domains, fleet.num_domains))
    for group in range(num_groups):
        own = slice(group * group_ranks, (group + 1) * group_ranks)
        ids, inside_R = np.unique(fleet.domain_R[own], return_inverse=True)
        members = Fleet(fleet.slots_of_rank[own], domain_of_rank=tuple(str(domain) for domain in inside_R))
        order = ids[list(dict.fromkeys(inside_R.tolist()))]  # as the members' own domains are numbered
        logical, width = logical_LRS[:, own], int(members.slots_R.max())
        share = shares_of(share_LRS[:, own], logical, load_LE.shape[1])
        picks = picks_across(load_LE / num_groups, logical[..., :width], share[..., :width], members)
        found[:, order[:, None], order] += picks
    return found


def _parts_of_sources(from_LEG: FloatArray | None, of_sources_G: FloatArray) -> FloatArray:
    """[L, E, G] or [G] part of an expert's picks that each domain's sources make; of one that nobody picked, evenly."""
    if from_LEG is None:
        return of_sources_G
    total_LE1 = from_LEG.sum(2, keepdims=True)
    return np.where(total_LE1 > 0, from_LEG / np.where(total_LE1 > 0, total_LE1, 1.0), of_sources_G)


def leaving(picks_LGG: FloatArray) -> float:
    """Picks that leave their domain."""
    return float(picks_LGG.sum() - np.trace(picks_LGG, axis1=1, axis2=2).sum())


def between_domains(cost_RR: FloatArray, fleet: Fleet) -> FloatArray:
    """[G, G] the mean of a cost between ranks, over the ranks that have slots. Raises InvalidInput."""
    check_shape("links", cost_RR, (fleet.num_ranks, fleet.num_ranks))
    bad = ~np.isfinite(cost_RR) | (cost_RR < 0)
    if bad.any():
        source, target = (int(i) for i in np.argwhere(bad)[0])
        raise InvalidInput(f"links[{source}][{target}] must be finite and not negative, got {cost_RR[source, target]}")
    member_GR = (fleet.domain_R[None, :] == np.arange(fleet.num_domains)[:, None]) & (fleet.slots_R > 0)
    mean_GR = member_GR / np.maximum(member_GR.sum(1, keepdims=True), 1)
    return np.asarray(mean_GR @ cost_RR @ mean_GR.T)
