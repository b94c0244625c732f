"""Map and count on a GPU: reads N experts, writes N addresses; the table stays in the cache.

Suffixes: T tokens, K picks of a token, N = T*K, E logical experts (Z: rounded up), W ways, C picks at a time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.choose import multiprocessors

_CHUNK = 1024
_MIN_BINS = 32  # of tl.histogram
_PROGRAMS = 4


@triton.jit
def _map_and_count(
    expert_ptr,
    table_ptr,
    address_ptr,
    load_ptr,
    num_picks,
    first_way,
    E,
    K: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    Z: tl.constexpr,
):
    count_Z = tl.zeros([Z], dtype=tl.int32)
    for chunk in range(tl.program_id(0), tl.cdiv(num_picks, C), tl.num_programs(0)):
        pick_C = chunk * C + tl.arange(0, C)
        is_pick_C = pick_C < num_picks
        expert_C = tl.load(expert_ptr + pick_C, mask=is_pick_C, other=-1).to(tl.int32)
        is_taken_C = (expert_C >= 0) & (expert_C < E)
        way_C = (first_way + pick_C // K) % W
        address_C = tl.load(table_ptr + way_C * E + expert_C, mask=is_taken_C, other=-1)
        tl.store(address_ptr + pick_C, address_C, mask=is_pick_C)
        count_Z += tl.histogram(tl.where(is_taken_C, expert_C, 0), Z, mask=is_taken_C)
    at_Z = tl.arange(0, Z)
    tl.atomic_add(load_ptr + at_Z, count_Z.to(tl.int64), mask=(at_Z < E) & (count_Z > 0), sem="relaxed")


def map_and_count_triton(
    expert_TK: torch.Tensor, address_WE: torch.Tensor, *, first_way: int, load_E: torch.Tensor
) -> torch.Tensor:
    """Equals `map_count.map_and_count_reference`."""
    expert_TK, address_WE = expert_TK.contiguous(), address_WE.contiguous()
    num_ways, num_experts = address_WE.shape
    address_TK = torch.empty(expert_TK.shape, dtype=torch.int64, device=expert_TK.device)
    num_picks = expert_TK.numel()
    if num_picks:
        chunks = triton.cdiv(num_picks, _CHUNK)
        _map_and_count[(min(chunks, _PROGRAMS * multiprocessors(expert_TK.device)),)](
            expert_TK,
            address_WE,
            address_TK,
            load_E,
            num_picks,
            first_way,
            num_experts,
            K=expert_TK.shape[1],
            W=num_ways,
            C=_CHUNK,
            Z=max(_MIN_BINS, triton.next_power_of_2(num_experts)),
        )
    return address_TK
