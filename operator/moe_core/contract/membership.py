"""Committed membership: who takes part in steps. It belongs to the ranks; everybody else only reads it."""

from typing import Self

from pydantic import Field, model_validator

from moe_core.contract.base import WireModel


class Member(WireModel):
    """One rank as the others reach it. `pod_uid` tells incarnations of the same rank apart."""

    rank: int = Field(ge=0)
    pod_uid: str
    address: str
    """host:port of the rank's peer face (membership votes)."""
    guard_address: str = ""
    """host:port of the guard: the parent process in the same pod, which can fence this rank by SIGKILL."""
    node: str = ""
    """The machine that the pod runs on, where the pod was told."""

    @property
    def place(self) -> str:
        """Equal for ranks on one machine, as far as that is known. A pod has an address of its own on most clusters."""
        return self.node or self.address.rpartition(":")[0]


class Membership(WireModel):
    """One epoch. Members are sorted by rank; `map_digest` is the assignment in force."""

    epoch: int = Field(ge=0)
    members: tuple[Member, ...]
    map_digest: str

    @model_validator(mode="after")
    def _sorted_and_distinct(self) -> Self:
        ranks = [m.rank for m in self.members]
        if ranks != sorted(set(ranks)):
            raise ValueError(f"members must be sorted by rank, each once: {ranks}")
        return self

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(m.rank for m in self.members)

    @property
    def pod_uids(self) -> tuple[str, ...]:
        return tuple(m.pod_uid for m in self.members)

    def is_quorum(self, ranks: frozenset[int]) -> bool:
        """Whether `ranks` may decide the next epoch: a majority, or exactly half with the lowest rank in it.

        Any two quorums intersect, so two halves can never both go on.
        """
        present = ranks & frozenset(self.ranks)
        if 2 * len(present) == len(self.members):
            return min(self.ranks) in present
        return 2 * len(present) > len(self.members)
