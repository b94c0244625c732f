"""Gang fit: all ranks at once or none, near each other, and if not, why not, in numbers.

Rules, in this order:
1. required level: all ranks lie in one domain of it. Ranks that are kept (a replacement, a resize) fix which one.
2. preferred level: as few domains of it as possible, found from the narrowest domain that holds all (one rack, else one
   block with the fewest racks, else the whole cluster).
3. inside the chosen domains: evenly over domains, then evenly over nodes; of equal choices the tightest fit, then the
   first path, so that big domains stay whole for big gangs.
4. ranks are numbered along the tree, so neighbours by number are neighbours by wire.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_core.facts import NodeFact
from moe_core.outcome import NoFit
from moe_core.topology.room import Needs, Room, room_on
from moe_core.topology.tree import Levels, Path, Tree, build_tree, depth_of


@dataclass(frozen=True, slots=True)
class Fit:
    """node_of_rank for the ranks that were asked for, sorted by rank."""

    node_of_rank: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Pack:
    levels: Levels = ()
    required: str = ""
    preferred: str = ""


def fit(
    nodes: Sequence[NodeFact],
    ranks: Sequence[int],
    *,
    needs: Needs,
    pack: Pack = Pack(),
    kept: Mapping[int, str] | None = None,
    own: Mapping[str, Mapping[str, int]] | None = None,
) -> Fit | NoFit:
    """Nodes for `ranks`, all or none.

    kept: node of each rank that stays where it is; own: base units that this owner's pods use per node (kept ranks
    included). Raises InvalidInput for a level that `pack.levels` does not name.
    """
    required, preferred = depth_of(pack.required, pack.levels), depth_of(pack.preferred, pack.levels)
    tree = build_tree(nodes, pack.levels, needed=max(required, preferred))
    wanted = len(ranks)
    kept, own = kept or {}, own or {}
    rooms = [room_on(node, needs, own=own.get(node.name, {}), most=wanted) for node in tree.nodes]
    board = _Board(tree, [room.ranks for room in rooms], _count_kept(tree, kept))
    fixed = board.fixed_domain(required)
    candidates = {fixed: board.tree.domains(required)[fixed]} if fixed is not None else board.tree.domains(required)
    chosen = board.choose(candidates, wanted, required=required, preferred=max(preferred, required))
    if chosen is None:
        return _no_fit(board, rooms, candidates, wanted, pack, needs)
    taken = board.deal(chosen, wanted, depth=max(preferred, required))
    node_idx = (index for index, count in enumerate(taken) for _ in range(count))
    return Fit({rank: tree.nodes[index].name for rank, index in zip(sorted(ranks), node_idx, strict=True)})


def _count_kept(tree: Tree, kept: Mapping[int, str]) -> list[int]:
    names = list(kept.values())
    return [names.count(node.name) for node in tree.nodes]


@dataclass(frozen=True, slots=True)
class _Board:
    tree: Tree
    room: list[int]
    kept: list[int]

    def capacity(self, node_idx: Sequence[int]) -> int:
        return sum(self.room[i] for i in node_idx)

    def fixed_domain(self, depth: int) -> Path | None:
        """The domain that holds the kept ranks (most of them, if a label moved); None if nothing is kept."""
        counts = {path: sum(self.kept[i] for i in idx) for path, idx in self.tree.domains(depth).items()}
        best = min(counts, key=lambda path: (-counts[path], path), default=None)
        return best if best is not None and counts[best] else None

    def split(self, node_idx: Sequence[int], depth: int) -> dict[Path, list[int]]:
        found: dict[Path, list[int]] = {}
        for index in node_idx:
            found.setdefault(self.tree.path_of_node[index][:depth], []).append(index)
        return found

    def pick_subdomains(self, node_idx: Sequence[int], wanted: int, depth: int) -> list[int]:
        """Nodes of the fewest domains at `depth` that hold `wanted`; domains with kept ranks come first."""
        parts = self.split(node_idx, depth)
        kept = {path: sum(self.kept[i] for i in idx) for path, idx in parts.items()}
        order = sorted(parts, key=lambda p: (-kept[p], -self.capacity(parts[p]), p))
        chosen: list[Path] = []
        missing = wanted
        for path in order:
            if missing <= 0:
                break
            last = [p for p in order if p not in chosen and not kept[p] and self.capacity(parts[p]) >= missing]
            if not kept[path] and last:
                path = min(last, key=lambda p: (self.capacity(parts[p]), p))  # noqa: PLW2901 - the tightest that ends it
            chosen.append(path)
            missing -= self.capacity(parts[path])
        return [i for path in sorted(chosen) for i in parts[path]]

    def choose(
        self, candidates: Mapping[Path, Sequence[int]], wanted: int, *, required: int, preferred: int
    ) -> list[int] | None:
        """Nodes to deal over: the narrowest domain between required and preferred level that holds all."""
        inside = [i for idx in candidates.values() for i in idx]
        for depth in range(preferred, required - 1, -1):
            options = []
            for path, node_idx in self.split(inside, depth).items():
                if self.capacity(node_idx) < wanted:
                    continue
                used = self.pick_subdomains(node_idx, wanted, preferred)
                options.append(
                    (self._distance(path), len(self.split(used, preferred)), self.capacity(node_idx), path, used)
                )
            if options:
                return min(options)[-1]
        return None

    def _distance(self, path: Path) -> tuple[int, ...]:
        """Sorts domains by how many kept ranks they share a domain with, narrow levels first."""
        depths = range(len(path), -1, -1)
        return tuple(
            -sum(k for k, of in zip(self.kept, self.tree.path_of_node, strict=True) if of[:d] == path[:d])
            for d in depths
        )

    def deal(self, node_idx: Sequence[int], wanted: int, *, depth: int) -> list[int]:
        """Ranks per node (whole tree), one at a time to the emptiest domain, and there to the emptiest node."""
        taken = [0] * len(self.room)
        parts = self.split(node_idx, depth)
        for _ in range(wanted):
            open_parts = {p: [i for i in idx if taken[i] < self.room[i]] for p, idx in parts.items()}
            load = {p: sum(taken[i] + self.kept[i] for i in parts[p]) for p in parts}
            path = min((p for p in parts if open_parts[p]), key=lambda p: (load[p], p))
            best = min(open_parts[path], key=lambda i: (taken[i] + self.kept[i], i))
            taken[best] += 1
        return taken


def _no_fit(  # noqa: PLR0917
    board: _Board,
    rooms: Sequence[Room],
    candidates: Mapping[Path, Sequence[int]],
    wanted: int,
    pack: Pack,
    needs: Needs,
) -> NoFit:
    excluded: dict[str, int] = {}
    for indices in candidates.values():
        for index in indices:
            for cause, count in rooms[index].excluded.items():
                excluded[cause] = excluded.get(cause, 0) + count
    for _, label in board.tree.unlabelled:
        excluded[f"nodes without label {label}"] = excluded.get(f"nodes without label {label}", 0) + 1
    best = min(candidates, key=lambda p: (-board.capacity(candidates[p]), p), default=())
    best_room = board.capacity(candidates[best]) if candidates else 0
    name = f"{pack.required} {'/'.join(best)}" if pack.required and best else ""
    return NoFit(
        wanted=wanted,
        level=pack.required,
        best=best_room,
        best_domain=name,
        excluded=dict(sorted(excluded.items())),
        lever=_lever(board, excluded, wanted=wanted, best=best_room, pack=pack, needs=needs),
    )


def _lever(board: _Board, excluded: Mapping[str, int], *, wanted: int, best: int, pack: Pack, needs: Needs) -> str:
    """The smallest change that would help by itself, from the cheapest to the dearest."""
    if pack.required and board.capacity(range(len(board.room))) >= wanted:
        return f"the cluster has room outside one {pack.required}: use pack.preferred, or a broader pack.required"
    missing = wanted - best
    if excluded.get("cordoned", 0) >= missing:
        return f"uncordon nodes with room for {missing} more"
    taint = next((cause for cause in sorted(excluded) if cause.startswith("taint ") and excluded[cause] >= missing), "")
    if taint:
        return f"tolerate {taint} in template.spec.tolerations"
    if excluded.get("in use", 0) >= missing:
        return f"free room for {missing} more"
    asks = ", ".join(f"{resource} {amount}" for resource, amount in sorted(needs.request.items()))
    return f"add nodes with room for {missing} more" + (f" (each asks for {asks})" if asks else "")
