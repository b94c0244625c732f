"""Experts that the same tokens choose live in the same failure domain, so that a token crosses fewer of them.

1. homes    each expert gets a home domain: the hottest first, each where most of what is chosen with it is already and
            most of what chooses it comes from, as long as the domain has room and is not too heavy; then pairs change
            homes while that brings more together
2. copies   further copies go to other domains, those that ask most for them first, unless they are too heavy: sources
            there stop crossing
3. ranks    inside each domain pack.py spreads what is there over the ranks; what is then still uneven by more than a
            few percent is exchanged between domains after all

Kernighan and Lin's exchange is where the second half of step 1 comes from. What it needs is a trace (trace.py): a load
alone cannot say who is chosen with whom.
"""

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray, check_shape
from moe_core.experts.copies import proportional_shares
from moe_core.experts.fleet import Fleet
from moe_core.experts.pack import deal, even, pack, part
from moe_core.experts.shelf import Shelf

_HEAVY = 1.05
"""A domain may carry this much of the mean load after step 1; copies and ranks even out the rest."""
_MOST_EXCHANGES = 400
_ROUNDS, _UNEVEN = 12, 0.02


def pack_together(
    load_LE: FloatArray,
    copies_LE: IntArray,
    fleet: Fleet,
    together_LEE: FloatArray,
    from_LEG: FloatArray | None = None,
) -> Shelf:
    """As `pack`, with `together_LEE` tokens that chose both and `from_LEG` picks by the source's domain, alike from all
    where it is None. Raises InvalidInput for another shape of them.
    """
    num_layers, num_experts = load_LE.shape
    from_LEG = np.zeros((num_layers, num_experts, fleet.num_domains)) if from_LEG is None else from_LEG
    check_shape("together", together_LEE, (num_layers, num_experts, num_experts))
    check_shape("from", from_LEG, (num_layers, num_experts, fleet.num_domains))
    room_G = np.bincount(fleet.domain_R, weights=fleet.slots_R, minlength=fleet.num_domains).astype(np.int64)
    logical_LRS = np.full((num_layers, fleet.num_ranks, int(fleet.slots_R.max())), num_experts + 1, dtype=np.int64)
    held_LEG = np.stack(
        [
            _copies_of_domains(load, copies, _homes(load, together, source, room_G), source, fleet)
            for load, copies, together, source in zip(load_LE, copies_LE, together_LEE, from_LEG, strict=True)
        ]
    )
    held_LE = held_LEG.sum(2)
    for domain in range(fleet.num_domains):
        ranks = np.flatnonzero((fleet.domain_R == domain) & (fleet.slots_R > 0))
        if ranks.size == 0:
            continue
        own = Fleet(tuple(fleet.slots_R[ranks].tolist()), tuple(fleet.speed_R[ranks].tolist()))
        here_LE = held_LEG[:, :, domain]
        lay = pack if own.is_uniform else deal  # on uneven ranks the copies of one domain alone may not fit apart
        inside = lay(load_LE / held_LE * here_LE, here_LE, own).logical_LRS
        logical_LRS[:, ranks, : inside.shape[2]] = inside
    shelf = Shelf.of(load_LE, held_LE, fleet, logical_LRS)
    part(shelf)
    even(shelf, rounds=_ROUNDS, even_enough=_UNEVEN)
    return shelf


def _homes(load_E: FloatArray, together_EE: FloatArray, from_EG: FloatArray, room_G: IntArray) -> IntArray:
    """[E] the home of each expert: in proportion to the domains' slots, together with what is chosen with it."""
    num_experts = len(load_E)
    together = together_EE - np.diag(np.diag(together_EE))
    seats_G = np.asarray(proportional_shares(num_experts, room_G.tolist()))
    limit_G = load_E.sum() * room_G / room_G.sum() * _HEAVY
    home_E = np.full(num_experts, -1, dtype=np.int64)
    near_EG = from_EG.astype(np.float64)
    load_G = np.zeros(len(room_G))
    for expert in np.argsort(-load_E, kind="stable").tolist():
        fits = seats_G > 0
        light = fits & (load_G + load_E[expert] <= limit_G)
        keys = (load_G / np.maximum(room_G, 1), -near_EG[expert], ~light, ~fits)
        home = int(np.lexsort(keys)[0])
        home_E[expert] = home
        seats_G[home] -= 1
        load_G[home] += load_E[expert]
        near_EG[:, home] += together[:, expert]
    return _exchange(home_E, near_EG, together, load_E, load_G, limit_G)


def _exchange(  # noqa: PLR0917
    home_E: IntArray,
    near_EG: FloatArray,
    together: FloatArray,
    load_E: FloatArray,
    load_G: FloatArray,
    limit_G: FloatArray,
) -> IntArray:
    """Pairs that bring more together, the best first; no domain grows beyond its limit by one."""
    rows = np.arange(len(home_E))
    for _ in range(_MOST_EXCHANGES):
        here_E = near_EG[rows, home_E]
        there_EE = near_EG[:, home_E]  # [a, b]: what a would be near to in b's home
        gain_EE = there_EE + there_EE.T - here_E[:, None] - here_E[None, :] - 2 * together
        shift_EE = load_E[None, :] - load_E[:, None]  # what a's home gains when b comes
        too_heavy = (load_G[home_E][:, None] + shift_EE > limit_G[home_E][:, None]) & (shift_EE > 0)
        gain_EE[(home_E[:, None] == home_E[None, :]) | too_heavy | too_heavy.T] = 0.0
        best = int(gain_EE.argmax())
        a, b = divmod(best, len(home_E))
        if gain_EE[a, b] <= 1e-9:
            break
        home_a, home_b = int(home_E[a]), int(home_E[b])
        near_EG[:, home_a] += together[:, b] - together[:, a]
        near_EG[:, home_b] += together[:, a] - together[:, b]
        load_G[home_a] += load_E[b] - load_E[a]
        load_G[home_b] += load_E[a] - load_E[b]
        home_E[a], home_E[b] = home_b, home_a
    return home_E


def _copies_of_domains(
    load_E: FloatArray, copies_E: IntArray, home_E: IntArray, from_EG: FloatArray, fleet: Fleet
) -> IntArray:
    """[E, G] copies in each domain: one at home, the others evenly over the domains, first where they are asked for."""
    room_G = np.bincount(fleet.domain_R, weights=fleet.slots_R, minlength=fleet.num_domains).astype(np.int64)
    ranks_G = np.bincount(fleet.domain_R[fleet.slots_R > 0], minlength=fleet.num_domains)
    held_EG = np.zeros((len(load_E), len(room_G)), dtype=np.int64)
    per_copy_E = load_E / copies_E
    held_EG[np.arange(len(load_E)), home_E] = 1
    load_G = per_copy_E @ held_EG
    limit_G = load_E.sum() * room_G / room_G.sum() * _HEAVY
    free_G = room_G - held_EG.sum(0)
    further = np.repeat(np.arange(len(load_E)), copies_E - 1)
    for expert in further[np.argsort(-per_copy_E[further], kind="stable")].tolist():
        is_full = (free_G <= 0) | (held_EG[expert] >= ranks_G)
        if is_full.all():
            if not _make_room(expert, held_EG, free_G, ranks_G, per_copy_E):
                continue
            load_G = per_copy_E @ held_EG
            is_full = (free_G <= 0) | (held_EG[expert] >= ranks_G)
        is_heavy = load_G + per_copy_E[expert] > limit_G
        keys = (load_G / np.maximum(room_G, 1), -from_EG[expert], is_heavy, held_EG[expert], is_full)
        domain = int(np.lexsort(keys)[0])
        held_EG[expert, domain] += 1
        load_G[domain] += per_copy_E[expert]
        free_G[domain] -= 1
    return held_EG


def _make_room(expert: int, held_EG: IntArray, free_G: IntArray, ranks_G: IntArray, per_copy_E: FloatArray) -> bool:
    """Every free slot is where `expert` is already: copies of others go there, and leave a slot where it may enter.

    The shortest augmenting path of a flow from experts to domains. False where there is none: on very uneven ranks so
    many copies do not fit apart, and this one has no place.
    """
    to_look_at = np.flatnonzero(held_EG[expert] < ranks_G).tolist()
    left_by: dict[int, tuple[int, int]] = {}
    for domain in to_look_at:
        if free_G[domain] > 0:
            break
        for other in sorted({*range(len(free_G))} - {*to_look_at}):
            may_go = np.flatnonzero((held_EG[:, domain] > 0) & (held_EG[:, other] < ranks_G[other]))
            if may_go.size:
                left_by[other] = domain, int(may_go[per_copy_E[may_go].argmin()])
                to_look_at.append(other)
    else:
        return False
    free_G[domain] -= 1
    while domain in left_by:
        source, moved = left_by[domain]
        held_EG[moved, domain] += 1
        held_EG[moved, source] -= 1
        domain = source
    free_G[domain] += 1
    return True
