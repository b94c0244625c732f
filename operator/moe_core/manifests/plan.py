"""An accepted MoEJob or MoEService in the one form that placing, rendering and following need."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.names import child_name, pod_name
from moe_core.contract.runtime_config import RuntimeConfig
from moe_core.experts.assign import Policy, assign, even_slots
from moe_core.experts.fleet import Fleet
from moe_core.experts.groups import pack_groups
from moe_core.experts.measure import copies_of_logical
from moe_core.experts.tiers import side_by_side
from moe_core.facts import NetworkFact
from moe_core.spec.common import PodTemplate
from moe_core.spec.service import Rebalance
from moe_core.topology.room import Needs
from moe_core.topology.shape import Pack


@dataclass(frozen=True, slots=True)
class Plan:
    kind: Literal["MoEJob", "MoEService"]
    namespace: str
    name: str
    generation: int
    num_ranks: int
    num_experts: int
    num_layers: int
    redundant_per_rank: int
    policy: Policy
    rebalance: Rebalance | None
    """None where the map does not follow the load."""
    min_copies: int
    max_restarts: int
    num_gateways: int
    template: PodTemplate
    needs: Needs
    pack: Pack
    config: RuntimeConfig
    num_groups: int = 1
    """EP groups side by side, of equally many ranks."""
    probe: int = 0
    """Raised by whoever wants the links measured again."""
    ranks_per_node: int = 0
    """0 for any number."""
    spares_per_domain: int = 0
    default_image: str = ""
    network: NetworkFact | None = None

    def child(self, what: str) -> str:
        return child_name(self.kind, self.name, what)

    def pod(self, role: str, index: int, incarnation: int) -> str:
        return pod_name(self.kind, self.name, role, index=index, incarnation=incarnation)

    def expert_map(self, num_ranks: int) -> ExpertMap:
        """The assignment for this many ranks while no load is known; its generation is the resource's.

        Where every expert is to have several copies and the load will be followed, they lie on fixed groups of ranks.
        """
        slots, groups = self._slots_of_group(num_ranks), self.groups(num_ranks)
        copies = self.copies_in_group(num_ranks)
        if self.rebalance is not None and copies > 1:
            group = _in_groups(self.num_layers, self.num_experts, slots, copies, self.generation)
        else:
            group = _assigned(self.policy, self.num_layers, self.num_experts, slots, self.generation)
        return group if groups == 1 else _side_by_side(group, groups)

    @property
    def group_ranks(self) -> int:
        """Of each of several EP groups, whose number changes and whose size does not; 0 for one group of all ranks."""
        return self.num_ranks // self.num_groups if self.num_groups > 1 else 0

    def groups(self, num_ranks: int) -> int:
        """EP groups of a group of this many ranks: another number than wished for while it grows."""
        return num_ranks // self.group_ranks if self.group_ranks else 1

    def copies_in_group(self, num_ranks: int) -> int:
        """Of every expert, so that it has the copies that were promised over all groups."""
        return -(-self.min_copies // self.groups(num_ranks))

    def slots(self, num_ranks: int) -> tuple[int, ...]:
        """Of each rank."""
        return self._slots_of_group(num_ranks) * self.groups(num_ranks)

    def _slots_of_group(self, num_ranks: int) -> tuple[int, ...]:
        size = num_ranks // self.groups(num_ranks)
        return even_slots(self.num_experts, size, redundant_per_rank=self.redundant_per_rank)

    def least_copies(self, num_ranks: int) -> int:
        """Copies that the worst off expert has by this plan."""
        slots = self._slots_of_group(num_ranks)
        return self.groups(num_ranks) * _least_copies(self.policy, self.num_layers, self.num_experts, slots)

    @property
    def in_mirrors(self) -> bool:
        """Whether copies lie on fixed sets of ranks that hold the same."""
        return self.min_copies > 1 or self.num_groups > 1


@lru_cache(maxsize=32)
def _assigned(policy: Policy, num_layers: int, num_experts: int, slots: tuple[int, ...], generation: int) -> ExpertMap:
    """A memo of a pure function: decide runs every second, a map changes once a day. One object, so one digest."""
    return assign(
        policy, num_layers=num_layers, num_logical_experts=num_experts, slots_of_rank=slots, generation=generation
    )


@lru_cache(maxsize=32)
def _side_by_side(group: ExpertMap, num_groups: int) -> ExpertMap:
    return side_by_side(group, num_groups)


@lru_cache(maxsize=32)
def _in_groups(
    num_layers: int, num_experts: int, slots: tuple[int, ...], min_copies: int, generation: int
) -> ExpertMap:
    fleet = Fleet(slots)
    [row] = pack_groups(np.ones((1, num_experts)), fleet, least_copies=min_copies).rows()
    return ExpertMap(
        generation=generation,
        num_logical_experts=num_experts,
        slots_of_rank=slots,
        logical_of_slot=(row,) * num_layers,
    )


@lru_cache(maxsize=32)
def _least_copies(policy: Policy, num_layers: int, num_experts: int, slots: tuple[int, ...]) -> int:
    expert_map = _assigned(policy, min(num_layers, 1), num_experts, slots, 0)  # without load all layers are alike
    return int(copies_of_logical(expert_map).min(initial=len(slots)))


def merged(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """The user's labels or annotations with ours on top, sorted."""
    both = {**theirs, **ours}
    return {key: both[key] for key in sorted(both)}
