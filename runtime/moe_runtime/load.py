"""Load windows: tokens per logical expert, as ranks count them and the operator reads them."""

from collections.abc import Collection, Sequence

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.measure import Balance, balance


def balance_in_force(
    expert_map: ExpertMap | None, load_LE: Sequence[Sequence[int]], *, map_digest: str, live_ranks: Collection[int]
) -> Balance | None:
    """How evenly the load falls on the active ranks; None without load, or when the map known here is not in force."""
    if expert_map is None or expert_map.digest != map_digest or not load_LE or not live_ranks:
        return None
    if len(load_LE) != expert_map.num_layers or len(load_LE[0]) != expert_map.num_logical_experts:
        return None
    return balance(expert_map, load_LE, [rank for rank in live_ranks if rank < expert_map.num_ranks])
