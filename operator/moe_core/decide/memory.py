"""What decide must remember from one cycle to the next, kept in the resource's own status.

Everything else is observed anew each time. A memory lost or a cycle old is harmless: counters only fall back to what
can be observed, and a wish is put again under a higher generation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_core.decide.times import seconds_of

MAX_DEAD_PODS = 64


@dataclass(frozen=True, slots=True)
class Memory:
    incarnations: tuple[int, ...] = ()
    """Highest incarnation ever seen, by rank."""
    baselines: tuple[int, ...] = ()
    """Incarnations, by rank, that were not failures: up to the last suspension or planned leave."""
    wish_generation: int = 0
    wish_digest: str = ""
    wish_ranks: int = 0
    """Size of the group as last put to the coordinator; 0 when none was."""
    epoch: int = 0
    active: int = 0
    """Ranks that took part in steps when a coordinator last answered."""
    dead_pod_uids: tuple[str, ...] = ()
    """The newest pods that are proven gone."""
    num_experts: int = 0
    num_layers: int = 0
    """Logical experts and MoE layers of the model as last accepted."""
    redundant_per_rank: int = 0
    """As last accepted."""
    levels: tuple[tuple[str, str], ...] = ()
    """Levels of the ClusterTopology as last accepted."""
    heard: tuple[int, ...] = ()
    """Highest incarnation that a coordinator has heard of, by rank."""
    silent_since: tuple[tuple[int, float], ...] = ()
    """(rank, time) of ranks that run, were heard before, and are missed."""
    last_loss: str = ""
    """The rank that was last replaced, and why it was lost."""
    weighed_at: float | None = None
    """When it was last decided whether another expert map pays."""
    started_at: float | None = None
    completed_at: float | None = None

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> "Memory":
        kept = status.get("memory")
        kept = kept if isinstance(kept, Mapping) else {}
        return cls(
            incarnations=_ints(kept.get("incarnations")),
            baselines=_ints(kept.get("baselines")),
            wish_generation=_int(kept.get("wishGeneration")),
            wish_digest=str(kept.get("wishDigest", "")),
            wish_ranks=_int(kept.get("wishRanks")),
            epoch=_int(status.get("epoch")),
            active=_int(ranks.get("active")) if isinstance(ranks := status.get("ranks"), Mapping) else 0,
            dead_pod_uids=tuple(str(uid) for uid in kept.get("deadPodUids", ()))[-MAX_DEAD_PODS:],
            num_experts=_int(kept.get("numExperts")),
            num_layers=_int(kept.get("numLayers")),
            redundant_per_rank=_int(kept.get("redundantPerRank")),
            levels=tuple((str(level["name"]), str(level["nodeLabel"])) for level in kept.get("levels", ())),
            heard=_ints(kept.get("heard")),
            silent_since=tuple(
                (_int(one.get("rank")), _int(one.get("atMilliseconds")) / 1000) for one in kept.get("silentSince", ())
            ),
            last_loss=str(kept.get("lastLoss", "")),
            weighed_at=_int(at) / 1000 if (at := kept.get("weighedAtMilliseconds")) is not None else None,
            started_at=seconds_of(status.get("startTime")),
            completed_at=seconds_of(status.get("completionTime")),
        )

    def as_status(self) -> dict[str, Any]:
        weighed = {} if self.weighed_at is None else {"weighedAtMilliseconds": round(self.weighed_at * 1000)}
        return {
            **weighed,
            "incarnations": list(self.incarnations),
            "baselines": list(self.baselines),
            "wishGeneration": self.wish_generation,
            "wishDigest": self.wish_digest,
            "wishRanks": self.wish_ranks,
            "deadPodUids": list(self.dead_pod_uids),
            "heard": list(self.heard),
            "silentSince": [{"rank": rank, "atMilliseconds": round(at * 1000)} for rank, at in self.silent_since],
            "numExperts": self.num_experts,
            "numLayers": self.num_layers,
            "redundantPerRank": self.redundant_per_rank,
            "lastLoss": self.last_loss,
            "levels": [{"name": name, "nodeLabel": label} for name, label in self.levels],
        }

    def incarnation(self, rank: int) -> int:
        return self.incarnations[rank] if rank < len(self.incarnations) else 0

    def baseline(self, rank: int) -> int:
        return self.baselines[rank] if rank < len(self.baselines) else 0


def condition_in(status: Mapping[str, Any], type_: str) -> Mapping[str, Any] | None:
    """One condition of a status as it was last written."""
    for condition in status.get("conditions") or ():
        if isinstance(condition, Mapping) and condition.get("type") == type_:
            return condition
    return None


def is_true(status: Mapping[str, Any], type_: str) -> bool:
    condition = condition_in(status, type_)
    return condition is not None and condition.get("status") == "True"


def _int(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _ints(value: object) -> tuple[int, ...]:
    return tuple(_int(item) for item in value) if isinstance(value, list | tuple) else ()
