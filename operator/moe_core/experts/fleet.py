"""The ranks a plan is made for: how many slots each owns, how fast it is, and what it would die together with."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_core.experts.checks import FloatArray, IntArray
from moe_core.outcome import InvalidInput


@dataclass(frozen=True)
class Fleet:
    """slots_of_rank [R], 0 for a rank that is gone; speed_of_rank [R] in any one unit, alike by default;
    domain_of_rank [R] names each rank's failure domain (a node, a rack), a domain of its own by default.

    Raises InvalidInput that names the argument.

    >>> Fleet((9, 9, 9, 9), domain_of_rank=("a", "a", "b", "b")).num_domains
    2
    """

    slots_of_rank: tuple[int, ...]
    speed_of_rank: tuple[float, ...] = ()
    domain_of_rank: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num_ranks = len(self.slots_of_rank)
        if not any(self.slots_of_rank):
            raise InvalidInput(f"slots_of_rank must hold at least one slot, got {list(self.slots_of_rank)}")
        for name, values in (("speed_of_rank", self.speed_of_rank), ("domain_of_rank", self.domain_of_rank)):
            if len(values) not in (0, num_ranks):
                raise InvalidInput(f"{name} must have one entry for each of the {num_ranks} ranks, got {len(values)}")
        for rank, count in enumerate(self.slots_of_rank):
            if count < 0:
                raise InvalidInput(f"slots_of_rank[{rank}] must not be negative, got {count}")
        for rank, speed in enumerate(self.speed_of_rank):
            if not (np.isfinite(speed) and speed > 0):
                raise InvalidInput(f"speed_of_rank[{rank}] must be positive and finite, got {speed}")

    @classmethod
    def even(cls, num_slots: int, num_ranks: int, *, num_domains: int = 0) -> "Fleet":
        """Equal ranks, in `num_domains` equal runs of neighbours. Raises InvalidInput where they do not divide."""
        if num_ranks < 1 or num_slots % num_ranks:
            raise InvalidInput(f"num_slots must be a multiple of num_ranks: {num_slots} over {num_ranks}")
        if num_domains and num_ranks % num_domains:
            raise InvalidInput(f"num_ranks must be a multiple of num_domains: {num_ranks} over {num_domains}")
        domains = tuple(f"d{rank * num_domains // num_ranks}" for rank in range(num_ranks)) if num_domains else ()
        return cls((num_slots // num_ranks,) * num_ranks, domain_of_rank=domains)

    @property
    def num_ranks(self) -> int:
        return len(self.slots_of_rank)

    @property
    def num_slots(self) -> int:
        return sum(self.slots_of_rank)

    @cached_property
    def ranks_with_slots(self) -> int:
        """No expert can have more copies than this without two on one rank."""
        return sum(1 for count in self.slots_of_rank if count)

    @cached_property
    def is_uniform(self) -> bool:
        """All ranks that have slots are as wide and as fast as each other."""
        working_R = self.slots_R > 0
        return bool(np.ptp(self.slots_R[working_R]) == 0 and np.ptp(self.speed_R[working_R]) == 0)

    def room_for(self, num_experts: int) -> int:
        """Slots that can be filled: a rank has no use for more than one copy of each expert."""
        return int(np.minimum(self.slots_R, num_experts).sum())

    @cached_property
    def slots_R(self) -> IntArray:
        return np.asarray(self.slots_of_rank, dtype=np.int64)

    @cached_property
    def exists_RS(self) -> NDArray[np.bool_]:
        """Whether the rank has so many slots, up to the widest rank's."""
        return np.asarray(np.arange(int(self.slots_R.max()))[None, :] < self.slots_R[:, None])

    @cached_property
    def speed_R(self) -> FloatArray:
        """Scaled to a mean of 1 over the ranks that have slots, so that loads keep their unit."""
        speed = np.asarray(self.speed_of_rank or (1.0,) * self.num_ranks, dtype=np.float64)
        return np.asarray(speed / speed[self.slots_R > 0].mean())

    @cached_property
    def domain_R(self) -> IntArray:
        """Domain ids 0..G-1, in order of first appearance."""
        if not self.domain_of_rank:
            return np.arange(self.num_ranks, dtype=np.int64)
        ids: dict[str, int] = {}
        return np.asarray([ids.setdefault(name, len(ids)) for name in self.domain_of_rank], dtype=np.int64)

    @cached_property
    def num_domains(self) -> int:
        return int(self.domain_R.max()) + 1

    @cached_property
    def domains_with_slots(self) -> int:
        return len(np.unique(self.domain_R[self.slots_R > 0]))
