"""The plan from scratch: as even as packing gets it, and of the layouts as even as that the safest.

Copies are counted by load and packed (pack.py). Where there is room for several of each expert, the same experts on
fixed groups of ranks (mirror.py) are mostly as even, and safer. In small layouts, where single slots decide, exchanges
leave fewer sets of hosts (hosts.py), and EPLB's plan is one more to start from: ours is then never less even than it,
nor less likely to keep every expert when 1 to 4 ranks fail.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np

from moe_core.experts.align import copies_in
from moe_core.experts.checks import FloatArray
from moe_core.experts.counts import count_copies
from moe_core.experts.eplb import rebalance_experts
from moe_core.experts.fleet import Fleet
from moe_core.experts.hosts import MOST_RANKS, chances, thin_out
from moe_core.experts.mirror import filled, pack_mirrored
from moe_core.experts.naming import Naming
from moe_core.experts.pack import pack, part, settle
from moe_core.experts.shelf import Shelf
from moe_core.experts.split import best_shares, level_of_ranks

AS_EVEN = 1e-3
"""So much more on the heaviest rank is given for a safer layout: what a window of half a million picks is sure of."""
SMALL = 2048
"""Slots of all layers in a small layout: 10 to 100 ms."""
LARGEST_GROUP = 8
"""Ranks that hold the same experts: no seven failures lose one, and every size below is a plan more."""
_STEPS = 400
"""Exchanges looked for in a small layout: 0.1 ms each."""


def pack_anew(load_LE: FloatArray, fleet: Fleet, *, least_copies: int = 1) -> Shelf:
    """The plan from scratch: in all slots that can be filled, at least `least_copies` of each expert where they fit.

    The same load in another unit gives the same plan.
    """
    naming = Naming.of(load_LE)
    found = _pack_anew(naming.by_number(load_LE) / (float(load_LE.sum()) or 1.0), fleet, least_copies)
    return Shelf.of(load_LE, naming.by_name(found.copies_LE), fleet, naming.names(found.logical_LRS))


def _pack_anew(load_LE: FloatArray, fleet: Fleet, least_copies: int) -> Shelf:
    room = fleet.room_for(load_LE.shape[1])
    copies_LE = count_copies(load_LE, room, most=fleet.ranks_with_slots, least=least_copies)
    packed = pack(load_LE, copies_LE, fleet)
    mirrored = _mirrored(load_LE, fleet, least_copies)
    if len(load_LE) * fleet.num_slots <= SMALL and fleet.num_ranks <= MOST_RANKS:
        return _safest(load_LE, packed, [*mirrored], least_copies)
    first = next(mirrored, None)
    if first is None:
        return packed
    bound_L, crowded = _heaviest(load_LE, packed) * (1 + AS_EVEN), packed.crowded_LRS().sum()
    for shelf in chain((first,), mirrored):
        if shelf.crowded_LRS().sum() <= crowded and (_heaviest(load_LE, shelf) <= bound_L).all():
            return shelf
    return packed


def _mirrored(load_LE: FloatArray, fleet: Fleet, least_copies: int) -> Iterator[Shelf]:
    """On groups of as many ranks as every expert can have copies, then on smaller ones."""
    num_experts = load_LE.shape[1]
    largest = min(fleet.room_for(num_experts) // num_experts, fleet.ranks_with_slots, LARGEST_GROUP)
    for size in range(largest, max(least_copies, 2) - 1, -1):
        shelf = pack_mirrored(load_LE, fleet, size)
        if shelf is not None:
            yield shelf


def _heaviest(load_LE: FloatArray, shelf: Shelf) -> FloatArray:
    """[L] the largest load of a rank when copies divide their expert's load as well as they can."""
    share_LRS = best_shares(load_LE, shelf.logical_LRS, shelf.fleet)
    return np.asarray(level_of_ranks(load_LE, shelf.logical_LRS, share_LRS, shelf.fleet).max(1))


@dataclass(frozen=True, slots=True)
class _Judged:
    """A layout, the load of its heaviest rank [L], and its chances to survive (hosts.py)."""

    shelf: Shelf
    heaviest_L: FloatArray
    chances_F: FloatArray
    crowded: int
    """Copies beyond what an even spread over the domains needs."""

    @classmethod
    def of(cls, load_LE: FloatArray, shelf: Shelf) -> Self:
        return cls(shelf, _heaviest(load_LE, shelf), chances(shelf), int(shelf.crowded_LRS().sum()))

    def is_within(self, bound_L: FloatArray) -> bool:
        return bool((self.heaviest_L <= bound_L * (1 + 1e-6)).all())

    def is_as_safe_as(self, needed_F: FloatArray) -> bool:
        return bool((self.chances_F >= needed_F - 1e-12).all())


def _safest(load_LE: FloatArray, packed: Shelf, mirrored: list[Shelf], least_copies: int) -> Shelf:
    """First of all spread over the domains; then as safe as EPLB's plan and not less even; then as even as the evenest;
    then the safest.
    """
    peer = _eplb(load_LE, packed.fleet)
    peers_L, needed_F = np.zeros(len(load_LE)), np.zeros(1)
    evenest, starts = packed, [packed]
    if peer is not None:
        peers_L, needed_F = peer.load_LR.max(1), chances(peer)
        mended = _mended(load_LE, peer)
        if mended.copies_LE.min() >= least_copies:
            evenest = _evener(load_LE, packed, mended)
            starts = [evenest, mended]
    thinned = [_copy(load_LE, start) for start in starts]
    for shelf in thinned:
        thin_out(shelf, np.maximum(shelf.load_LR.max(1), peers_L), most_steps=_STEPS)
    found = [_Judged.of(load_LE, shelf) for shelf in (*starts, *thinned, *mirrored)]
    evenest_L = found[0].heaviest_L
    as_even_L = evenest_L * (1 + AS_EVEN)
    if peer is not None:
        as_even_L = np.minimum(as_even_L, np.maximum(peers_L, evenest_L))

    def worth(judged: _Judged) -> tuple[int, bool, bool, float, float]:
        is_even = judged.is_within(as_even_L)
        is_no_worse = judged.is_as_safe_as(needed_F) and judged.is_within(np.maximum(peers_L, as_even_L))
        return -judged.crowded, is_no_worse, is_even, float(judged.chances_F.sum()), -float(judged.heaviest_L.sum())

    return max(found, key=worth).shelf


def _eplb(load_LE: FloatArray, fleet: Fleet) -> Shelf | None:
    """EPLB's plan as it is; None for ranks that it cannot plan for."""
    num_layers, num_experts = load_LE.shape
    live, width = np.flatnonzero(fleet.slots_R), int(fleet.slots_R.max())
    if (fleet.slots_R[live] < width).any() or width > num_experts:
        return None
    logical, _, copies_LE = rebalance_experts(load_LE, len(live) * width, 1, 1, len(live))
    logical_LRS = np.full((num_layers, fleet.num_ranks, width), num_experts + 1, dtype=np.int64)
    logical_LRS[:, live] = logical.reshape(num_layers, len(live), width)
    return Shelf.of(load_LE, copies_LE, fleet, logical_LRS)


def _mended(load_LE: FloatArray, shelf: Shelf) -> Shelf:
    """With something else for a second copy on a rank: the first can carry the load of both, and no host is lost."""
    logical_LRS = shelf.logical_LRS.copy()
    logical_LRS[shelf.repeats_LRS()] = load_LE.shape[1]
    mended = filled(load_LE, shelf.fleet, logical_LRS)
    part(mended)
    return mended


def _evener(load_LE: FloatArray, packed: Shelf, mended: Shelf) -> Shelf:
    """Of each layer the more even one."""
    settled = _copy(load_LE, mended)
    settle(settled)
    is_evener_L = _heaviest(load_LE, settled) < _heaviest(load_LE, packed)
    return _of(load_LE, packed.fleet, np.where(is_evener_L[:, None, None], settled.logical_LRS, packed.logical_LRS))


def _copy(load_LE: FloatArray, shelf: Shelf) -> Shelf:
    return _of(load_LE, shelf.fleet, shelf.logical_LRS.copy())


def _of(load_LE: FloatArray, fleet: Fleet, logical_LRS: np.ndarray) -> Shelf:
    return Shelf.of(load_LE, copies_in(logical_LRS, load_LE.shape[1]), fleet, logical_LRS)
