"""Load windows: tokens per logical expert, as ranks count them and the operator reads them."""

from collections.abc import Sequence


def balancedness(load_LE: Sequence[Sequence[int]]) -> float | None:
    """Mean over max of the load of experts, mean over layers; None without load.

    >>> balancedness([[4, 4], [8, 0]])
    0.75
    """
    per_layer = [sum(row) / len(row) / max(row) for row in load_LE if row and max(row) > 0]
    return sum(per_layer) / len(per_layer) if per_layer else None
