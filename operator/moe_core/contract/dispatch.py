"""What the data plane does with a step's tokens and a planner has to know beforehand."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

SMALL_STEP_TOKENS = 64
"""A step without gradients and with at most this many tokens on the fullest rank dispatches by token: two exchanges per
layer instead of three, and more bytes."""

Wire = Literal["Float32", "BFloat16", "Float8", "Int8"]
"""What a row of numbers travels as. Float8 (e4m3) and Int8 have a scale for each row."""
Hierarchy = Literal["Auto", "Flat", "ByNode"]
Overlap = Literal["OneBatch", "TwoBatch"]

ADDRESS_BYTES = WEIGHT_BYTES = 4
SCALE_BYTES = 4
_NUMBER_BYTES: dict[Wire, int] = {"Float32": 4, "BFloat16": 2, "Float8": 1, "Int8": 1}
WORTH_RELAYING = 0.9
"""Of the rows between nodes; what saves less is not worth two exchanges more in every layer."""


def row_bytes(wire: Wire, num_numbers: int) -> int:
    """Of one row on the wire, its scale included."""
    return num_numbers * _NUMBER_BYTES[wire] + (SCALE_BYTES if wire in {"Float8", "Int8"} else 0)


def gradient_wire(wire: Wire) -> Wire:
    """What gradients of rows that travel as `wire` travel as. Eight bits are for values, whose error a later layer
    forgives; gradients are summed over many steps and keep the range of float32, as DeepSeek-V3 has it (its combine,
    and what follows on it, stays in bfloat16 where its dispatch is in eight bits).
    """
    return "Float32" if wire == "Float32" else "BFloat16"


def rows_between_nodes(nodes: Sequence[str], *, top_k: int, by_node: bool) -> float:
    """Rows that a token sends to other nodes, on average over the ranks that run on `nodes`, were every pick as likely
    to go to any rank as to any other. `by_node`: once to each node that it needs.

    >>> rows_between_nodes(["a", "a", "b", "b"], top_k=2, by_node=False)
    1.0
    >>> rows_between_nodes(["a", "a", "b", "b"], top_k=2, by_node=True)
    0.75
    """
    share_of = {node: count / len(nodes) for node, count in sorted(Counter(nodes).items())}
    meets_of = {node: 1 - (1 - share) ** top_k if by_node else top_k * share for node, share in share_of.items()}
    everywhere = sum(meets_of.values())
    return sum(share * (everywhere - meets_of[node]) for node, share in share_of.items())


def gate_of(nodes: Sequence[str]) -> list[list[int]]:
    """[position][node] who takes a source's tokens for a node, nodes in order of their first position: the source
    itself for its own, else that node's ranks in turn over the sources of a node.

    >>> gate_of(["a", "a", "b"])
    [[0, 2], [1, 2], [0, 2]]
    """
    members: dict[str, list[int]] = {}
    turn = []
    for position, node in enumerate(nodes):
        there = members.setdefault(node, [])
        turn.append(len(there))
        there.append(position)
    return [
        [position if node == nodes[position] else there[turn[position] % len(there)] for node, there in members.items()]
        for position in range(len(nodes))
    ]


def goes_by_node(
    hierarchy: Hierarchy,
    nodes: Sequence[str] | None,
    *,
    top_k: int,
    ranks: Sequence[int] | None = None,
    group_ranks: int = 0,
) -> bool:
    """Whether tokens cross to a node once and are passed on there. `nodes`: of each of `ranks` (by default 0, 1, ...),
    None where none are known; group_ranks: of an EP group, within which tokens stay, 0 for one of all ranks.

    Auto does so where it saves enough rows, the same on every rank of an epoch.
    """
    if hierarchy == "Flat" or nodes is None:
        return False
    if hierarchy == "ByNode":
        return True
    groups: dict[int, list[str]] = {}
    for rank, node in zip(range(len(nodes)) if ranks is None else ranks, nodes, strict=True):
        groups.setdefault(rank // group_ranks if group_ranks else 0, []).append(node)
    flat, relayed = (
        sum(len(group) * rows_between_nodes(group, top_k=top_k, by_node=by_node) for group in groups.values())
        for by_node in (False, True)
    )
    return 0 < relayed <= WORTH_RELAYING * flat
