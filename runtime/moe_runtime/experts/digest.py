"""What lies in a slot, in one number: to see that a moved expert arrived, and that its copies are copies.

Serving stacks have been seen to answer with silently damaged experts after a move (vllm-project/vllm issue 28377). The
digest is a checksum against accidents (bits, rows or whole experts in the wrong place), not against somebody who means
to deceive: 64 bits, computed where the tensor lies. One busy core reads 0.5 GiB a second (load 13), so it is done
while loading and staging, beside the steps.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap

Expert = tuple[int, int]
"""(MoE layer, logical expert)"""
_CHUNK = 1 << 20
_ODD = 0x1E3779B97F4A7C15


def slot_digests(stacks: Mapping[str, torch.Tensor], logical_of_slot: Sequence[int]) -> tuple[int, ...]:
    """One per slot of a layer, over all its stacks [slots, ...]; 0 for an empty slot."""
    digests = [0] * len(logical_of_slot)
    for _, stack in sorted(stacks.items()):
        for slot, logical_id in enumerate(logical_of_slot):
            if logical_id != EMPTY_SLOT:
                digests[slot] = _wrapped(digests[slot] * _ODD + _digest(stack[slot]))
    return tuple(digests)


@torch.no_grad()
def _digest(tensor: torch.Tensor) -> int:
    raw = tensor.detach().contiguous().reshape(-1)
    words = raw.view(torch.int32 if raw.numel() * raw.element_size() % 4 == 0 else torch.uint8)
    index = torch.arange(min(_CHUNK, words.numel()), dtype=torch.int64, device=words.device) * _ODD
    weights = (index ^ (index >> 29)) * _ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        total = total * _ODD + (chunk * weights[: chunk.numel()]).sum()
    return int(total)  # device sync: digests are exchanged on the host


def _wrapped(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def as_row(digests_LS: Sequence[Sequence[int]], expert_map: ExpertMap) -> tuple[int, ...]:
    """Digests [L][local slots] of one rank as a row of the same length on every rank of the map."""
    stride = max(expert_map.slots_of_rank)
    return tuple(d for row in digests_LS for d in (*row, *(0,) * (stride - len(row))))


def copies_of(
    rows: Sequence[Sequence[int]], ranks: Sequence[int], expert_map: ExpertMap
) -> dict[Expert, dict[int, int]]:
    """(layer, expert) -> rank -> digest of its copy there; rows by position of `ranks`. One rank has one copy each."""
    stride = max(expert_map.slots_of_rank)
    copies: dict[Expert, dict[int, int]] = {}
    for rank, row in zip(ranks, rows, strict=True):
        for layer_idx, logical_of_slot in enumerate(expert_map.logical_of_slot):
            for local, slot_id in enumerate(expert_map.slot_range(rank)):
                if (logical_id := logical_of_slot[slot_id]) != EMPTY_SLOT:
                    copies.setdefault((layer_idx, logical_id), {})[rank] = row[layer_idx * stride + local]
    return copies


def wrong_copies(
    copies: Mapping[Expert, Mapping[int, int]], known: Mapping[Expert, int]
) -> dict[Expert, tuple[int, ...]]:
    """(layer, expert) -> ranks whose copy is not what is known of it; where nothing is known, what most copies are.

    Of as many against as many the lowest rank's side is believed.
    """
    wrong = {}
    for expert, digest_of_rank in sorted(copies.items()):
        votes = Counter(digest for _, digest in sorted(digest_of_rank.items()))
        right = known.get(expert, votes.most_common(1)[0][0])
        if bad := tuple(rank for rank, digest in sorted(digest_of_rank.items()) if digest != right):
            wrong[expert] = bad
    return wrong


def named(experts: Iterable[Expert]) -> str:
    """
    >>> named([(0, 3), (1, 7)])
    'expert 3 of layer 0, expert 7 of layer 1'
    """
    return ", ".join(f"expert {logical_id} of layer {layer_idx}" for layer_idx, logical_id in sorted(experts)[:8])
