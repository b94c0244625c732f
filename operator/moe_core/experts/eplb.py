"""`rebalance_experts` with the face and the results of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB), in numpy.

EPLB's idea: the expert with the most load per copy gets the next copy; copies are packed onto GPUs heaviest first, each
onto the lightest GPU that has a slot left. With group-limited routing, groups of experts are first packed onto nodes in
the same way, and the rest happens inside each node. What it leaves to the caller (an empty load, copies of one expert
on one GPU) `moe_core.experts.assign` adds; here the published results hold, ties going to the lowest index.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_core.experts.checks import FloatArray, IntArray, as_load_LE
from moe_core.outcome import InvalidInput


def pack_evenly(weight: FloatArray, num_packs: int) -> tuple[IntArray, IntArray]:
    """Pack each row's n items into packs of n / num_packs items each, as evenly by weight as greedy packing gets.

    weight [X, n] -> (pack_of_item [X, n], place_in_pack [X, n]).
    """
    num_rows, num_items = weight.shape
    room = num_items // num_packs
    if room == 1:
        pack = np.tile(np.arange(num_items, dtype=np.int64), (num_rows, 1))
        return pack, np.zeros_like(pack)
    pack = np.zeros((num_rows, num_items), dtype=np.int64)
    place = np.zeros_like(pack)
    heaviest_first = np.argsort(-weight.astype(np.float32), axis=-1, kind="stable")
    for row in range(num_rows):
        pack_weight = np.zeros(num_packs)
        pack_items = np.zeros(num_packs, dtype=np.int64)
        for item in heaviest_first[row]:
            lightest = int(np.argmin(np.where(pack_items < room, pack_weight, np.inf)))
            pack[row, item] = lightest
            place[row, item] = pack_items[lightest]
            pack_weight[lightest] += weight[row, item]
            pack_items[lightest] += 1
    return pack, place


def add_copies(weight: FloatArray, num_physical: int) -> tuple[IntArray, IntArray, IntArray]:
    """Give each further physical expert to the logical one with the most load per copy.

    weight [X, E] -> (logical_of_physical [X, P], copy_idx_of_physical [X, P], copies_of_logical [X, E]).
    """
    num_rows, num_logical = weight.shape
    rows = np.arange(num_rows)
    logical = np.tile(np.arange(num_physical, dtype=np.int64), (num_rows, 1))
    copy_idx = np.zeros_like(logical)
    copies = np.ones((num_rows, num_logical), dtype=np.int64)
    for physical in range(num_logical, num_physical):
        hottest = np.argmax(weight / copies, axis=-1)
        logical[:, physical] = hottest
        copy_idx[:, physical] = copies[rows, hottest]
        copies[rows, hottest] += 1
    return logical, copy_idx, copies


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[IntArray, IntArray, IntArray]:
    """EPLB's entry point. weight [L, E] is the load; num_replicas is the number of physical experts per layer.

    Returns (phy2log [L, num_replicas], log2phy [L, E, most copies] padded with -1, logcnt [L, E]).
    Raises InvalidInput where EPLB would fail an assert or return a wrong map.
    """
    load_LE = as_load_LE(weight)
    num_logical = load_LE.shape[1]
    if min(num_replicas, num_groups, num_nodes, num_gpus) < 1:
        raise InvalidInput(
            "num_replicas, num_groups, num_nodes and num_gpus must be at least 1, "
            f"got {num_replicas}, {num_groups}, {num_nodes}, {num_gpus}"
        )
    if num_replicas < num_logical:
        raise InvalidInput(f"num_replicas must hold every expert: {num_replicas} slots for {num_logical} experts")
    if num_replicas % num_gpus:
        raise InvalidInput(f"num_replicas must be a multiple of num_gpus: {num_replicas} over {num_gpus}")
    if num_groups % num_nodes:  # EPLB's published rule: groups that do not divide over nodes are balanced globally
        num_groups = num_nodes = 1
    if num_logical % num_groups:
        raise InvalidInput(f"experts must divide into num_groups: {num_logical} over {num_groups}")
    if num_gpus % num_nodes:
        raise InvalidInput(f"num_gpus must be a multiple of num_nodes: {num_gpus} over {num_nodes}")
    logical, copy_idx, copies = _by_node(load_LE, num_replicas, num_groups, num_nodes, num_gpus)
    slots = np.full((*load_LE.shape, int(copies.max())), -1, dtype=np.int64)
    layer_idx = np.arange(load_LE.shape[0])[:, None]
    slots[layer_idx, logical, copy_idx] = np.arange(num_replicas)
    return logical, slots, copies


def _by_node(
    load_LE: FloatArray,
    num_physical: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """Groups to nodes, copies inside each node, copies to the node's GPUs; N nodes, n experts and p slots per node."""
    num_layers, num_logical = load_LE.shape
    group_size, groups_per_node = num_logical // num_groups, num_groups // num_nodes
    group_load = load_LE.reshape(num_layers, num_groups, group_size).sum(-1)
    node_of_group, place_of_group = pack_evenly(group_load, num_nodes)
    first_of_group = (node_of_group * groups_per_node + place_of_group) * group_size
    sorted_of_logical = (first_of_group[..., None] + np.arange(group_size)).reshape(num_layers, num_logical)
    logical_of_sorted = np.argsort(sorted_of_logical, axis=-1)

    load_Nn = np.take_along_axis(load_LE, logical_of_sorted, -1).reshape(num_layers * num_nodes, -1)
    in_node, copy_idx, copies_Nn = add_copies(load_Nn, num_physical // num_nodes)
    load_Np = np.take_along_axis(load_Nn / copies_Nn, in_node, -1)
    gpu, place = pack_evenly(load_Np, num_gpus // num_nodes)
    physical_of_slot = np.argsort(gpu * (num_physical // num_gpus) + place, axis=-1)

    in_node = np.take_along_axis(in_node, physical_of_slot, -1).reshape(num_layers, num_nodes, -1)
    first_of_node = np.arange(num_nodes)[None, :, None] * (num_logical // num_nodes)
    logical = np.take_along_axis(logical_of_sorted, (in_node + first_of_node).reshape(num_layers, -1), -1)
    copy_idx = np.take_along_axis(copy_idx, physical_of_slot, -1).reshape(num_layers, num_physical)
    copies = np.take_along_axis(copies_Nn.reshape(num_layers, num_logical), sorted_of_logical, -1)
    return logical, copy_idx, copies
