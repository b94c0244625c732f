"""What a gang asks of the tree, in levels as a person names them and in depths as the fit counts them."""

from dataclasses import dataclass

from moe_core.outcome import InvalidInput
from moe_core.topology.tree import Levels, depth_of


@dataclass(frozen=True, slots=True)
class Pack:
    levels: Levels = ()
    required: str = ""
    preferred: str = ""


@dataclass(frozen=True, slots=True)
class Subgroups:
    """Ranks 0 to size-1 are the first subgroup, and so on: EP groups, say. Each lies inside one domain of `level`.

    No resource asks for them yet: its ranks are one EP group, until there is data parallelism over several.
    """

    size: int
    level: str
    apart: bool = False
    """No two subgroups share a domain."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The same in depths: 0 is the cluster, `stages` go from broad to narrow."""

    required: int = 0
    stages: tuple[int, ...] = (0,)
    """The gang takes the fewest domains of the first, inside each the fewest of the next."""
    group_depth: int = 0
    group_size: int = 1
    """1 without subgroups: then every rank is its own, and any domain will do."""
    apart: bool = False
    ranks_per_node: int = 0
    """0 for any number."""
    is_new: bool = True
    """Nothing of the gang stands: it fills every node with exactly ranks_per_node. What joins ranks that are kept may
    leave a node short of it, because the other way would be to move ranks that live."""
    spares: int = 0
    """Places that stay free for this gang in every domain of the narrowest stage that takes a rank."""

    @property
    def narrowest(self) -> int:
        return self.stages[-1]


def shape_of(
    pack: Pack, *, subgroups: Subgroups | None = None, ranks_per_node: int = 0, spares_per_domain: int = 0
) -> Shape:
    """Raises InvalidInput for a level that `pack.levels` does not name and for numbers that do not go together."""
    required = depth_of(pack.required, pack.levels)
    preferred = depth_of(pack.preferred, pack.levels)
    for name, number in (("ranks_per_node", ranks_per_node), ("spares_per_domain", spares_per_domain)):
        if number < 0:
            raise InvalidInput(f"{name} must not be negative, got {number}")
    if subgroups is None:
        return Shape(required, (max(required, preferred),), ranks_per_node=ranks_per_node, spares=spares_per_domain)
    if subgroups.size < 1 or (ranks_per_node and subgroups.size % ranks_per_node):
        raise InvalidInput(f"a subgroup must be whole nodes of {ranks_per_node or 1}, got {subgroups.size} ranks")
    group_depth = max(required, depth_of(subgroups.level, pack.levels))
    stages = {group_depth, max(required, preferred)} if preferred else {group_depth}
    return Shape(
        required=required,
        stages=tuple(sorted(stages)),
        group_depth=group_depth,
        group_size=subgroups.size,
        apart=subgroups.apart,
        ranks_per_node=ranks_per_node,
        spares=spares_per_domain,
    )
