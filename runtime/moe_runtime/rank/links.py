"""What this rank knows of its links, and when it wants them measured: when a pod is new to it, and when it is asked to.

Ranks measure together, at a boundary of steps that all see in the control exchange. A pod is tried once: a probe that
ends in a fault is not begun again by the next epoch of the same pods.
"""

from collections.abc import Sequence

from moe_core.contract.links import Link
from moe_core.contract.membership import Membership
from moe_runtime.membership.group import EpochGroup
from moe_runtime.membership.link_probe import probe_links


class LinkBook:
    def __init__(self) -> None:
        self._tried: frozenset[str] = frozenset()
        self._probed = 0
        self.links: tuple[Link, ...] = ()

    def asks(self, membership: Membership, *, probe: int) -> int:
        """For the control exchange: whether this rank wants a probe (lowest bit), and the number it was asked with."""
        is_alone = len(membership.members) == 1
        wants = not is_alone and (probe > self._probed or not self._tried.issuperset(membership.pod_uids))
        return 2 * probe + wants

    def follow(self, membership: Membership, group: EpochGroup, asked: Sequence[int]) -> bool:
        """Measure if any rank asks to; True if so. `asked`: what all ranks said at this boundary. Raises GroupFault."""
        if not any(value & 1 for value in asked):
            return False
        self._tried = frozenset(membership.pod_uids)
        self._probed = max(self._probed, *(value >> 1 for value in asked))
        found = probe_links(group)
        self.links = tuple(Link(rank=rank, **speed.model_dump()) for rank, speed in sorted(found.items()))
        return True
