"""Copies to ranks from scratch, evenly by load: deal in rounds, part what may not be together, then swap.

1. deal     heaviest copies first, one to each rank a round; the rank with the least load so far takes the heaviest
2. part     a copy that met another of its expert on a rank, or one too many in a failure domain, changes places with
            the copy that makes the two ranks most even
3. even     heavy ranks are paired with light ones, and each pair makes the one exchange that evens it most; again
4. settle   in small layouts, where single slots matter, the heaviest rank makes the best exchange with any other; again

All layers go through each step together. LPT scheduling is where the first step comes from; pairing is what makes the
third cheap: after a few rounds nothing is left to win.
"""

from collections.abc import Callable

import numpy as np

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.copies import lay_out
from moe_core.experts.fleet import Fleet
from moe_core.experts.naming import Naming
from moe_core.experts.shelf import BoolArray, Shelf

ROUNDS, ROUNDS_UNEVEN = 4, 16
"""Rounds of step 3. On 58 layers of 288 slots, 32 ranks, four load kinds: 0.997 after step 2, 0.9990 after 4 rounds,
0.9993 after 6, 0.9996 after 10, each round 1 to 2 ms. A rank wider than others starts far off, as it gets the lightest
copies, and comes nearer by one exchange a round: one of 24 among 15 of 16 slots is within 0.5 % after 4 rounds, 0.02 %
after 16."""
EVEN_ENOUGH = 2e-4
MOST_STEPS, STEP_EFFORT = 64, 100_000
"""Steps of step 4, and exchanges looked at in all of them: 2 ms. A few dozen slots get all the steps they can use; at
58 layers of 288 slots, where step 3 leaves nothing worth a step (2 ms each), it is none."""


def pack(load_LE: FloatArray, copies_LE: IntArray, fleet: Fleet) -> Shelf:
    """A layout of exactly these copies. They must fit: each at most once per rank, all within the fleet's slots."""
    naming = Naming.of(load_LE, -copies_LE)
    shelf = deal(naming.by_number(load_LE), naming.by_number(copies_LE), fleet)
    part(shelf)
    even(shelf, rounds=ROUNDS if fleet.is_uniform else ROUNDS_UNEVEN)
    settle(shelf)
    return Shelf.of(load_LE, naming.by_name(shelf.copies_LE), fleet, naming.names(shelf.logical_LRS))


def deal(load_LE: FloatArray, copies_LE: IntArray, fleet: Fleet) -> Shelf:
    """Step 1. Wider ranks take part in more rounds, and these come last, with the lightest copies."""
    num_layers, num_experts = load_LE.shape
    widest = int(fleet.slots_R.max())
    per_copy_LE = load_LE / np.maximum(copies_LE, 1)
    logical_LC = _heaviest_first(per_copy_LE, copies_LE, fill=num_experts, width=fleet.num_slots)
    with_empty_LX = np.concatenate([per_copy_LE, np.zeros((num_layers, 1))], axis=1)
    weight_LC = np.take_along_axis(with_empty_LX, logical_LC, axis=1)
    logical_LRS = np.full((num_layers, fleet.num_ranks, widest), num_experts + 1, dtype=np.int64)
    load_LR = np.zeros((num_layers, fleet.num_ranks))
    interleaved_R = _interleaved(fleet)
    dealt = 0
    for place in range(widest):
        ranks = interleaved_R[fleet.slots_R[interleaved_R] > place]
        dealt_to = slice(dealt, dealt + len(ranks))
        by_need = ranks[np.argsort(load_LR[:, ranks], axis=1, kind="stable")]
        np.put_along_axis(logical_LRS[:, :, place], by_need, logical_LC[:, dealt_to], axis=1)
        so_far = np.take_along_axis(load_LR, by_need, axis=1)
        np.put_along_axis(load_LR, by_need, so_far + weight_LC[:, dealt_to] / fleet.speed_R[by_need], axis=1)
        dealt += len(ranks)
    return Shelf.of(load_LE, copies_LE, fleet, logical_LRS)


def _heaviest_first(per_copy_LE: FloatArray, copies_LE: IntArray, *, fill: int, width: int) -> IntArray:
    """[L, width] logical ids of all copies, heaviest first, then `fill`."""
    order_LE = np.argsort(-per_copy_LE, axis=1, kind="stable")
    ends_LE = np.take_along_axis(copies_LE, order_LE, axis=1).cumsum(1)
    found = np.full((len(order_LE), width), fill, dtype=np.int64)
    for row, (order, ends) in enumerate(zip(order_LE, ends_LE, strict=True)):
        found[row, : ends[-1]] = np.repeat(order, np.diff(ends, prepend=0))
    return found


def _interleaved(fleet: Fleet) -> IntArray:
    """Ranks with neighbours in distinct domains, fast ones first: the order in which equals are dealt to."""
    place_in_domain = np.zeros(fleet.num_ranks, dtype=np.int64)
    seen = np.zeros(fleet.num_domains, dtype=np.int64)
    for rank, domain in enumerate(fleet.domain_R):
        place_in_domain[rank] = seen[domain]
        seen[domain] += 1
    return np.lexsort((fleet.domain_R, place_in_domain, -fleet.speed_R))


def part(shelf: Shelf) -> None:
    """Step 2. Ranks first, then domains; one slot per layer at a time. What no exchange can part is laid out anew."""
    _part(shelf, Shelf.repeats_LRS)
    repeated_LRS = shelf.repeats_LRS()
    for layer in np.flatnonzero(repeated_LRS.any((1, 2))):
        _lay_out_anew(shelf, int(layer))
    _part(shelf, Shelf.crowded_LRS)


def _part(shelf: Shelf, find: Callable[[Shelf, IntArray | slice], BoolArray]) -> None:
    """Exchange what `find` finds, until there is nothing left or no partner for it."""
    to_other_domain = find == Shelf.crowded_LRS
    wrong_LRS = find(shelf, slice(None))
    given_up_LRS = np.zeros_like(wrong_LRS)
    while True:
        layer = np.flatnonzero(wrong_LRS.any((1, 2)))
        if layer.size == 0:
            return
        width = shelf.logical_LRS.shape[2]
        rank, place = np.divmod(wrong_LRS[layer].reshape(len(layer), -1).argmax(1), width)
        partner = _partners(shelf, layer, rank, place, to_other_domain=to_other_domain)
        has_partner = partner >= 0
        given_up_LRS[layer[~has_partner], rank[~has_partner], place[~has_partner]] = True
        partner_slot = np.divmod(partner[has_partner], width)
        shelf.swap(layer[has_partner], (rank[has_partner], place[has_partner]), partner_slot)
        wrong_LRS[layer] = find(shelf, layer) & ~given_up_LRS[layer]


def _partners(shelf: Shelf, layer: IntArray, rank: IntArray, place: IntArray, *, to_other_domain: bool) -> IntArray:
    """For a slot of each layer the one to exchange with, as rank * S + place, -1 for none: the pair ends most even."""
    logical_NRS = shelf.logical_LRS[layer]
    rows = np.arange(len(layer))
    mine_N = logical_NRS[rows, rank, place]
    held_NX = np.zeros((len(layer), shelf.num_experts + 2), dtype=bool)
    np.put_along_axis(held_NX, logical_NRS[rows, rank], True, axis=1)
    held_NX[:, shelf.num_experts] = False  # any number of empty slots may be on one rank,
    held_NX[:, shelf.num_experts + 1] = True  # and nothing goes where there is no slot
    lacks_mine_NR = ~(logical_NRS == mine_N[:, None, None]).any(2)
    ranks_R = np.arange(shelf.fleet.num_ranks)
    lacks_mine_NR &= shelf.may_enter(layer[:, None], mine_N[:, None], source=rank[:, None], target=ranks_R[None, :])
    if to_other_domain:
        domain_R = shelf.fleet.domain_R
        lacks_mine_NR &= domain_R[None, :] != domain_R[rank][:, None]
    fits_NRS = lacks_mine_NR[:, :, None] & ~np.take_along_axis(held_NX[:, None, :], logical_NRS, axis=2)
    fits_NRS &= shelf.may_enter(
        layer[:, None, None], logical_NRS, source=ranks_R[None, :, None], target=rank[:, None, None]
    )
    shift_NRS = shelf.per_copy_LX[layer, mine_N][:, None, None] - shelf.weight_of(layer)
    speed_R = shelf.fleet.speed_R
    after_mine = shelf.load_LR[layer, rank][:, None, None] - shift_NRS / speed_R[rank][:, None, None]
    after_other = shelf.load_LR[layer][:, :, None] + shift_NRS / speed_R[None, :, None]
    worst = np.where(fits_NRS, np.maximum(after_mine, after_other), np.inf).reshape(len(layer), -1)
    best = worst.argmin(1)
    return np.where(np.isfinite(worst[rows, best]), best, -1)


def _lay_out_anew(shelf: Shelf, layer: int) -> None:
    """Very uneven ranks: chains of moves are needed, which `lay_out` finds; even() then works on its result."""
    load_E = shelf.per_copy_LX[layer, :-2] * shelf.copies_LE[layer]
    by_load = np.argsort(-load_E, kind="stable")  # the names of the experts must not matter
    least = int(shelf.copies_LE[layer].min())
    laid_out = lay_out(shelf.fleet.slots_of_rank, shelf.num_experts, load_E[by_load], least=least)
    slots_RS = shelf.logical_LRS[layer]
    slots_RS[slots_RS <= shelf.num_experts] = shelf.num_experts
    for rank, row in enumerate(laid_out.rows()):
        slots_RS[rank, : len(row)] = by_load[row]
    shelf.copies_LE[layer] = np.bincount(slots_RS.reshape(-1), minlength=shelf.num_experts)[: shelf.num_experts]
    only = np.asarray([layer])
    shelf.take(only, Shelf.of(load_E[None], shelf.copies_LE[only], shelf.fleet, shelf.logical_LRS[only]))


def even(shelf: Shelf, *, rounds: int, even_enough: float = EVEN_ENOUGH) -> None:
    """Step 3. No exchange makes the heavier rank of a pair as heavy as before, so the largest load never grows.

    A rank that is no more than `even_enough` above the mean load is left alone.
    """
    fleet = shelf.fleet
    working_R = np.flatnonzero(fleet.slots_R)
    if len(working_R) < 2:
        return
    total_L = (shelf.load_LR * fleet.speed_R).sum(1)
    mean_L = total_L / fleet.speed_R[working_R].sum()
    for turn in range(rounds):
        load_LR = shelf.load_LR[:, working_R]
        is_heavy_LR = load_LR > mean_L[:, None] * (1 + even_enough)
        num_pairs = min(int(is_heavy_LR.sum(1).max(initial=0)), len(working_R) // 2)
        if num_pairs == 0:
            return
        layer = np.flatnonzero(is_heavy_LR.any(1))
        by_load = working_R[np.argsort(load_LR[layer], axis=1, kind="stable")]
        heavy, light = by_load[:, ::-1][:, :num_pairs], by_load[:, : len(working_R) // 2]
        _exchange_in_pairs(shelf, layer[:, None], heavy, np.roll(light, -turn, axis=1)[:, :num_pairs])


def settle(shelf: Shelf, *, even_enough: float = EVEN_ENOUGH) -> None:
    """Step 4. A step is the best exchange of a layer's heaviest rank with any other, and lowers its load."""
    fleet = shelf.fleet
    working_R = np.flatnonzero(fleet.slots_R)
    num_layers, _, width = shelf.logical_LRS.shape
    steps = min(MOST_STEPS, STEP_EFFORT // max(num_layers * len(working_R) * width * width, 1))
    if len(working_R) < 2 or steps == 0:
        return
    target_L = (shelf.load_LR * fleet.speed_R).sum(1) / fleet.speed_R[working_R].sum() * (1 + even_enough)
    layer = np.arange(num_layers)
    for _ in range(steps):
        layer = layer[shelf.load_LR[layer].max(1) > target_L[layer]]
        if layer.size == 0:
            return
        heavy = shelf.load_LR[layer].argmax(1)
        others = np.stack([working_R[working_R != rank] for rank in heavy])
        worst, places = _best_exchanges(shelf, layer[:, None], np.broadcast_to(heavy[:, None], others.shape), others)
        best = worst.argmin(1)
        rows = np.flatnonzero(worst[np.arange(len(layer)), best] < shelf.load_LR[layer, heavy] * (1 - 1e-9))
        mine, other = np.divmod(places[rows, best[rows]], width)
        shelf.swap(layer[rows], (heavy[rows], mine), (others[rows, best[rows]], other))
        layer = layer[rows]


def _best_exchanges(shelf: Shelf, layer: IntArray, heavy: IntArray, light: IntArray) -> tuple[FloatArray, IntArray]:
    """The best exchange for each pair of ranks: the larger load of the two after it, inf where there is none, and the
    places as heavy's * S + light's. layer [N, 1]; heavy, light [N, P].
    """
    mine, other = shelf.logical_LRS[layer, heavy], shelf.logical_LRS[layer, light]  # [N, P, S]
    same = mine[..., :, None] == other[..., None, :]
    same &= mine[..., :, None] != shelf.num_experts
    lane = layer[..., None]
    mine_stays = same.any(3) | ~shelf.may_enter(lane, mine, source=heavy[..., None], target=light[..., None])
    other_stays = same.any(2) | ~shelf.may_enter(lane, other, source=light[..., None], target=heavy[..., None])
    mine_stays |= mine > shelf.num_experts
    other_stays |= other > shelf.num_experts
    shift = shelf.per_copy_LX[lane, mine][..., :, None] - shelf.per_copy_LX[lane, other][..., None, :]
    speed_R = shelf.fleet.speed_R
    after = np.maximum(
        shelf.load_LR[layer, heavy][..., None, None] - shift / speed_R[heavy][..., None, None],
        shelf.load_LR[layer, light][..., None, None] + shift / speed_R[light][..., None, None],
    )
    after[np.broadcast_to(mine_stays[..., :, None] | other_stays[..., None, :], after.shape)] = np.inf
    flat = after.reshape(*heavy.shape, -1)
    best = flat.argmin(2)
    return np.take_along_axis(flat, best[..., None], axis=2)[..., 0], best


def _exchange_in_pairs(shelf: Shelf, layer: IntArray, heavy: IntArray, light: IntArray) -> None:
    """The best exchange for each pair of ranks. layer [N, 1]; heavy, light [N, P], all different within a row."""
    worst, best = _best_exchanges(shelf, layer, heavy, light)
    row, pair = np.nonzero(worst < shelf.load_LR[layer, heavy] * (1 - 1e-9))
    place_mine, place_other = np.divmod(best[row, pair], shelf.logical_LRS.shape[2])
    # Two exchanges of one layer could both bring the same expert into one domain: the domain rule is checked against
    # the layout before both. At most one exchange per expert and layer then.
    if shelf.in_domain_LXG is not None:
        keep = _first_of_each(
            layer[row, 0],
            shelf.logical_LRS[layer[row, 0], heavy[row, pair], place_mine],
            shelf.logical_LRS[layer[row, 0], light[row, pair], place_other],
            shelf.num_experts + 2,
        )
        row, pair, place_mine, place_other = row[keep], pair[keep], place_mine[keep], place_other[keep]
    shelf.swap(layer[row, 0], (heavy[row, pair], place_mine), (light[row, pair], place_other))


def _first_of_each(layer: IntArray, logical_a: IntArray, logical_b: IntArray, width: int) -> BoolArray:
    """Exchanges neither of whose experts an earlier one of the same layer moves."""
    key_a, key_b = layer * width + logical_a, layer * width + logical_b
    keys = np.stack([key_a, key_b], axis=1).reshape(-1)
    _, first = np.unique(keys, return_index=True)
    is_first = np.zeros(len(keys), dtype=bool)
    is_first[first] = True
    return np.asarray(is_first.reshape(-1, 2).all(1))
