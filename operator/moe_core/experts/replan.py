"""The next assignment: stay, split anew, improve what is there, or start anew, whichever wins most by the clock.

Everything is weighed in seconds over the horizon, the time for which the load that was measured is believed to last:

    step_s    a step is as slow as its slowest rank: per layer the largest load of a rank x seconds_per_pick,
              and where links have a cost, what a rank spends on them: picks x bytes x seconds per byte / ranks
    moved_s   bytes that go to other ranks / bytes_per_s

Per layer there are these choices, and the one with the largest gain less cost is taken, the earliest of equals:

    stay      as it is
    split     the same slots, other shares of the copies (split.py): nothing moves
    improve   a few slots at a time, split after each step (improve.py): about one layout for each slot that moves
    anew      the best from scratch (pack.py), and with a trace the one that keeps together what is chosen together
              (affinity.py), both brought near to the current one (align.py) and split

Where the moves of all layers exceed the budget, the price of a move is raised until they do not. The result says both
numbers and, where it stays, why.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_core.experts.affinity import pack_together
from moe_core.experts.align import align, arrivals, copies_in, keep_places, slots_on_ranks
from moe_core.experts.checks import FloatArray, IntArray, check_shape
from moe_core.experts.counts import count_copies
from moe_core.experts.crossing import between_domains, leaving
from moe_core.experts.fleet import Fleet
from moe_core.experts.improve import improve
from moe_core.experts.naming import Naming, first_slots
from moe_core.experts.pack import pack
from moe_core.experts.shelf import Shelf, rows_of
from moe_core.experts.split import best_shares, follow, parts_on_ranks, said_parts, shares_of, whole_parts
from moe_core.experts.weigh import Scale, Weighs
from moe_core.outcome import InvalidInput

Rows = tuple[tuple[int, ...], ...]
"""logical_of_slot or share_of_slot of an ExpertMap: [L][slots]."""
_STEPS = 24
"""Improving steps per layer: four layers of five are level after twelve."""
WORTH_CHANGING = 1e-3
"""What a layer must win to be changed, as a part of its step: less is within what the next window differs by anyway."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a plan weighs. All times in seconds, sizes in bytes.

    seconds_per_pick: time of one token at one expert on a rank of speed 1; horizon: how many windows like the measured
    one are expected; bytes_per_s: what one rank can receive while it works; most_moves: budget over all layers, None
    for no bound; bytes_per_pick: what a pick that is answered elsewhere sends, there and back.
    """

    seconds_per_pick: float = 1e-6
    bytes_per_expert: int = 0
    bytes_per_s: float = 1e9
    horizon: float = 10.0
    most_moves: int | None = None
    bytes_per_pick: int = 1

    def __post_init__(self) -> None:
        for name in ("seconds_per_pick", "bytes_per_s", "horizon"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise InvalidInput(f"{name} must be positive and finite, got {value}")
        for name in ("bytes_per_expert", "bytes_per_pick"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} must not be negative, got {getattr(self, name)}")
        if self.most_moves is not None and self.most_moves < 0:
            raise InvalidInput(f"most_moves must not be negative, got {self.most_moves}")


@dataclass(frozen=True, slots=True)
class Replan:
    """logical_of_slot and share_of_slot [L][slots], as in an ExpertMap: no shares where all copies share evenly.

    worst_before and worst_after [L] are loads of the heaviest rank over its speed; crossed_before and crossed_after the
    bytes of one window like the measured one that leave their failure domain. moves counts experts that a rank has to
    be sent; gain_s is over the horizon, cost_s once.
    """

    logical_of_slot: Rows
    share_of_slot: Rows
    moves: int
    worst_before: tuple[float, ...]
    worst_after: tuple[float, ...]
    crossed_before: float
    crossed_after: float
    gain_s: float
    cost_s: float
    reason: str

    @property
    def payback(self) -> float:
        """Share of the horizon after which the gain has paid for the moves; 0 without moves, inf without gain."""
        if self.cost_s == 0:
            return 0.0
        return self.cost_s / self.gain_s if self.gain_s > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class _Task:
    """What is asked, with experts by number (naming.py); `start` is where the slots are now.

    load_LE sums to 1, so that the same load in another unit gives the same plan; `picks` is what it stands for.
    """

    load_LE: FloatArray
    picks: float
    fleet: Fleet
    start_LRS: IntArray
    prices: Prices
    least_copies: int
    scale: Weighs
    together_LEE: FloatArray | None
    from_LEG: FloatArray | None

    @property
    def num_experts(self) -> int:
        return int(self.load_LE.shape[1])

    @property
    def seconds(self) -> float:
        """Of all picks over the horizon, one after the other on a rank of speed 1: what costs are parts of."""
        return self.picks * self.prices.seconds_per_pick * self.prices.horizon

    @property
    def sent_bytes(self) -> float:
        """If every pick of a window were answered elsewhere."""
        return self.picks * self.prices.bytes_per_pick

    @property
    def move_s(self) -> float:
        return self.prices.bytes_per_expert / self.prices.bytes_per_s

    def across(self, logical_LRS: IntArray, share_LRS: FloatArray) -> FloatArray:
        return self.scale.across(self.load_LE, logical_LRS, share_LRS, self.from_LEG)

    def weigh(self, logical_LRS: IntArray, part_LRS: IntArray) -> tuple[FloatArray, FloatArray]:
        share_LRS = shares_of(part_LRS, logical_LRS, self.num_experts)
        return self.scale.weigh(self.load_LE, logical_LRS, share_LRS, self.from_LEG)


@dataclass(frozen=True, slots=True)
class _Choices:
    """Per layer the layouts to choose among, K of them; the first is to stay. cost_KL: parts of `_Task.seconds`."""

    logical_KLRS: IntArray
    part_KLRS: IntArray
    worst_KL: FloatArray
    cost_KL: FloatArray
    moves_KL: IntArray

    def best(self, move_cost: float) -> IntArray:
        """[L] the choice with the largest gain less cost; of equals the earliest, which moves least."""
        value_KL = self.cost_KL[0] * (1 - WORTH_CHANGING) - self.cost_KL - self.moves_KL * move_cost
        value_KL[0] = 0.0
        return np.asarray(value_KL.argmax(0))


def replan(
    load_LE: FloatArray,
    fleet: Fleet,
    current: Sequence[Sequence[int]],
    *,
    prices: Prices,
    current_shares: Sequence[Sequence[int]] = (),
    least_copies: int = 1,
    links_RR: FloatArray | None = None,
    together_LEE: FloatArray | None = None,
    from_LEG: FloatArray | None = None,
    scale: Weighs | None = None,
) -> Replan:
    """The assignment to go on with. `current` [L][slots] must hold every expert, `current_shares` is its share_of_slot;
    slots of ranks that are gone (none in `fleet`) are in neither. Raises InvalidInput.

    links_RR: seconds per byte between ranks, [source, target]; together_LEE: tokens that chose both; from_LEG: picks by
    the source's failure domain, see trace.py. scale: what layouts are weighed on instead of the fleet and links_RR.
    """
    start_LRS = slots_on_ranks(current, fleet, num_experts=load_LE.shape[1])
    copies_LE = copies_in(start_LRS, load_LE.shape[1])
    if not copies_LE.all():
        layer, expert = (int(i) for i in np.argwhere(copies_LE == 0)[0])
        raise InvalidInput(f"current[{layer}] must hold every expert, expert {expert} is in no slot")
    start_part_LRS = parts_on_ranks(current_shares, start_LRS, fleet, load_LE.shape[1])
    naming = Naming.of(load_LE, first_slots(start_LRS, load_LE.shape[1]))
    if together_LEE is not None:
        check_shape("together", together_LEE, (*load_LE.shape, load_LE.shape[1]))
        together_LEE = naming.by_numbers(together_LEE)
    if from_LEG is not None:
        check_shape("from", from_LEG, (*load_LE.shape, fleet.num_domains))
        from_LEG = naming.by_number(from_LEG)
    load_LE, start_LRS = naming.by_number(load_LE), naming.numbers(start_LRS)
    picks = float(load_LE.sum()) or 1.0
    scale = scale or scale_of(fleet, prices, links_RR)
    task = _Task(load_LE / picks, picks, fleet, start_LRS, prices, least_copies, scale, together_LEE, from_LEG)
    choices = _choices(task, start_part_LRS)
    return _replan(task, naming, choices, _within(choices, task.move_s / task.seconds, prices.most_moves))


def scale_of(fleet: Fleet, prices: Prices, links_RR: FloatArray | None, *, group_ranks: int = 0) -> Scale:
    links_GG = None if links_RR is None else between_domains(links_RR, fleet)
    return Scale(fleet, links_GG, prices.bytes_per_pick / prices.seconds_per_pick, group_ranks)


def _choices(task: _Task, start_part_LRS: IntArray) -> _Choices:
    """All choices; a layout from scratch whose copies are nearer to each other, or too few, is none."""
    shelves = list(_from_scratch(task))
    path = improve(task.load_LE, task.start_LRS, task.fleet, most_steps=_STEPS, least_copies=task.least_copies)
    aligned = [align(shelf.logical_LRS, task.start_LRS, task.fleet, task.num_experts) for shelf in shelves]
    layouts = [task.start_LRS, *path.layouts, *aligned]
    shares = [*path.shares, *(best_shares(task.load_LE, slots, task.fleet) for slots in aligned)]
    parts = [
        start_part_LRS,
        *(whole_parts(share, slots, task.num_experts) for share, slots in zip(shares, layouts[1:], strict=True)),
    ]
    measured = [task.weigh(slots, part) for slots, part in zip(layouts, parts, strict=True)]
    cost_KL = np.stack([cost for _, cost in measured])
    near_L = _too_near(task.load_LE, task.start_LRS, task.fleet)
    floor_LE = np.minimum(copies_in(task.start_LRS, task.num_experts), task.least_copies)
    for place, slots in enumerate(aligned, start=len(layouts) - len(aligned)):
        is_none_L = _too_near(task.load_LE, slots, task.fleet) > near_L
        is_none_L |= (copies_in(slots, task.num_experts) < floor_LE).any(1)
        cost_KL[place, is_none_L] = np.inf
    return _Choices(
        np.stack(layouts),
        np.stack(parts),
        np.stack([worst for worst, _ in measured]),
        cost_KL,
        np.stack([arrivals(task.start_LRS, slots, task.num_experts).sum((1, 2)) for slots in layouts]),
    )


def _from_scratch(task: _Task) -> Iterator[Shelf]:
    fleet = task.fleet
    room = fleet.room_for(task.num_experts)
    copies_LE = count_copies(task.load_LE, room, most=fleet.ranks_with_slots, least=task.least_copies)
    yield pack(task.load_LE, copies_LE.copy(), fleet)
    if task.together_LEE is not None:
        yield pack_together(task.load_LE, copies_LE.copy(), fleet, task.together_LEE, task.from_LEG)


def _too_near(load_LE: FloatArray, logical_LRS: IntArray, fleet: Fleet) -> IntArray:
    """[L] copies that share a rank, or a domain without need, with another of their expert."""
    shelf = Shelf.of(load_LE, copies_in(logical_LRS, load_LE.shape[1]), fleet, logical_LRS)
    return np.asarray((shelf.repeats_LRS() | shelf.crowded_LRS()).sum((1, 2)))


def _within(choices: _Choices, move_cost: float, most: int | None) -> IntArray:
    """The best choices whose moves fit the budget: a dearer move makes every layer choose fewer of them."""
    layers = np.arange(choices.moves_KL.shape[1])

    def moves(chosen_L: IntArray) -> int:
        return int(choices.moves_KL[chosen_L, layers].sum())

    best_L = choices.best(move_cost)
    if most is None or moves(best_L) <= most:
        return best_L
    low, high = move_cost, max(float(choices.cost_KL[0].max()), move_cost) * 2 + 1e-12
    for _ in range(50):
        middle = (low + high) / 2
        if moves(choices.best(middle)) <= most:
            high = middle
        else:
            low = middle
    return choices.best(high)


def _replan(task: _Task, naming: Naming, choices: _Choices, chosen_L: IntArray) -> Replan:
    layers = np.arange(len(chosen_L))
    slots, parts = choices.logical_KLRS[chosen_L, layers], choices.part_KLRS[chosen_L, layers]
    moves = int(choices.moves_KL[chosen_L, layers].sum())
    before_L, after_L, least_L = choices.cost_KL[0], choices.cost_KL[chosen_L, layers], choices.cost_KL.min(0)
    best_s = float((before_L - least_L).sum()) * task.seconds
    gain_s, cost_s = float((before_L - after_L).sum()) * task.seconds, moves * task.move_s
    kept = keep_places(slots, task.start_LRS, task.num_experts)
    kept_parts = np.where((chosen_L == 0)[:, None, None], parts, follow(parts, slots, kept, task.num_experts))
    crossed_before, crossed_after = (
        leaving(task.across(logical, shares_of(part, logical, task.num_experts))) * task.sent_bytes
        for logical, part in ((task.start_LRS, choices.part_KLRS[0]), (kept, kept_parts))
    )
    return Replan(
        logical_of_slot=rows_of(naming.names(kept), task.fleet, task.num_experts),
        share_of_slot=said_parts(kept_parts, kept, task.fleet, task.num_experts),
        moves=moves,
        worst_before=tuple((choices.worst_KL[0] * task.picks).tolist()),
        worst_after=tuple((choices.worst_KL[chosen_L, layers] * task.picks).tolist()),
        crossed_before=crossed_before,
        crossed_after=crossed_after,
        gain_s=gain_s,
        cost_s=cost_s,
        reason=reason_of(moves, gain_s, cost_s, best_s, changes=bool(chosen_L.any())),
    )


def reason_of(moves: int, gain_s: float, cost_s: float, best_s: float, *, changes: bool) -> str:
    if moves:
        return f"{moves} moves cost {cost_s:.3g} s and save {gain_s:.3g} s over the horizon"
    if changes:
        return f"no moves: other shares of the copies save {gain_s:.3g} s over the horizon"
    if best_s <= 0:
        return "stays: no other assignment is more even"
    return f"stays: the most even assignment saves {best_s:.3g} s over the horizon, less than its moves cost"
