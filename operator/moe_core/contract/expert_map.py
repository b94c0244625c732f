"""The assignment: which logical expert lives in which slot of which rank, per MoE layer.

Slots are numbered globally: rank r owns the slots `slot_range(r)`. A rank that left keeps its number and has no slots,
so rank ids stay stable over a resize. -1 marks an empty slot.

Copies of one expert divide its tokens in proportion to their shares. Whole numbers, so that a map is the same text
everywhere; without shares, and where every live copy has 0, they divide evenly.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from moe_core.contract.base import WireModel, digest_of

EMPTY_SLOT = -1
MAX_SHARE = 1_000_000
"""Finer than any copy's part can be met; a layer of 16,384 slots still fits into an object."""


class ExpertMap(WireModel):
    """logical_of_slot for every MoE layer, and how the slots fall to ranks.

    Shapes: slots_of_rank [ranks]; logical_of_slot [L][S] with S = sum(slots_of_rank), values in -1..E-1; share_of_slot
    [L][S], values in 0..MAX_SHARE and 0 for an empty slot, or () for even shares.
    """

    generation: int = Field(ge=0)
    num_logical_experts: int = Field(ge=1)
    slots_of_rank: tuple[int, ...]
    logical_of_slot: tuple[tuple[int, ...], ...]
    share_of_slot: tuple[tuple[int, ...], ...] = ()

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        num_slots = sum(self.slots_of_rank)
        for layer_idx, row in enumerate(self.logical_of_slot):
            if len(row) != num_slots:
                raise ValueError(f"layer {layer_idx} has {len(row)} slots, ranks own {num_slots}")
            if row and not (min(row) >= EMPTY_SLOT and max(row) < self.num_logical_experts):
                raise ValueError(f"layer {layer_idx} names expert {max(row)} of {self.num_logical_experts}")
        if self.share_of_slot and len(self.share_of_slot) != self.num_layers:
            raise ValueError(f"share_of_slot has {len(self.share_of_slot)} layers, logical_of_slot {self.num_layers}")
        for layer_idx, shares in enumerate(self.share_of_slot):
            if len(shares) != num_slots:
                raise ValueError(f"share_of_slot[{layer_idx}] has {len(shares)} slots, ranks own {num_slots}")
            for slot_id, (share, logical_id) in enumerate(zip(shares, self.logical_of_slot[layer_idx], strict=True)):
                if not 0 <= share <= MAX_SHARE:
                    raise ValueError(f"share_of_slot[{layer_idx}][{slot_id}] must be in 0..{MAX_SHARE}, got {share}")
                if share and logical_id == EMPTY_SLOT:
                    raise ValueError(f"share_of_slot[{layer_idx}][{slot_id}] is {share}, and the slot is empty")
        return self

    @model_serializer(mode="wrap")
    def _even_shares_go_unsaid(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Maps without shares read, and are called, as they were before there were any."""
        fields: dict[str, Any] = handler(self)
        if not self.share_of_slot:
            fields.pop("share_of_slot", None)
        return fields

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but what was computed of the old values stays behind: a new map has a digest of its own."""
        copied = super().model_copy(update=update, deep=deep)
        if set(update or ()) - {"generation"}:
            for name in set(copied.__dict__) - set(type(self).model_fields):
                del copied.__dict__[name]
        return copied

    @property
    def num_layers(self) -> int:
        return len(self.logical_of_slot)

    @property
    def num_ranks(self) -> int:
        return len(self.slots_of_rank)

    @cached_property
    def first_slot_of_rank(self) -> tuple[int, ...]:
        return (0, *accumulate(self.slots_of_rank))[:-1]

    def slot_range(self, rank: int) -> range:
        """Global slot ids that `rank` owns; none for a rank that joins later than this map."""
        if rank >= self.num_ranks:
            return range(0)
        first = self.first_slot_of_rank[rank]
        return range(first, first + self.slots_of_rank[rank])

    @cached_property
    def rank_of_slot(self) -> tuple[int, ...]:
        return tuple(rank for rank, count in enumerate(self.slots_of_rank) for _ in range(count))

    @cached_property
    def table_LS(self) -> NDArray[np.int64]:
        """logical_of_slot as one read-only array [L, S], made once: what has to answer within a step works on it."""
        table = np.asarray(self.logical_of_slot, dtype=np.int64).reshape(self.num_layers, sum(self.slots_of_rank))
        table.flags.writeable = False
        return table

    @cached_property
    def share_LS(self) -> NDArray[np.int64]:
        """share_of_slot as one read-only array [L, S]; for even shares 1 in every slot that is not empty."""
        shares: NDArray[np.int64] = (self.table_LS != EMPTY_SLOT).astype(np.int64)
        if self.share_of_slot:
            shares = np.asarray(self.share_of_slot, dtype=np.int64).reshape(shares.shape)
        shares.flags.writeable = False
        return shares

    def slots_of_logical(self, layer_idx: int) -> tuple[tuple[int, ...], ...]:
        """[E] tuples of global slot ids, ascending."""
        slots: list[list[int]] = [[] for _ in range(self.num_logical_experts)]
        for slot_id, logical_id in enumerate(self.logical_of_slot[layer_idx]):
            if logical_id != EMPTY_SLOT:
                slots[logical_id].append(slot_id)
        return tuple(tuple(s) for s in slots)

    def __eq__(self, other: object) -> bool:
        """By the digest: comparing half a million slots would cost more than what it is asked for."""
        return isinstance(other, ExpertMap) and (self.generation, self.digest) == (other.generation, other.digest)

    def __hash__(self) -> int:
        return hash((self.generation, self.digest))

    @cached_property
    def digest(self) -> str:
        """Names the assignment; the generation does not take part, equal assignments have equal digests."""
        return digest_of(self.model_copy(update={"generation": 0}).canonical())
