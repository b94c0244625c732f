"""From logical experts to the addresses of their copies, and the load counted, in one pass over the picks.

The copy is chosen by the token's turn: token t takes the way (first_way + t) mod W (`dispatch.plan`). Load is what EPLB
records: picks per logical expert, whichever copy answers them and also where none is left.

Suffixes: T tokens, K picks of a token, E logical experts, W ways.
"""

import torch

from moe_runtime.kernels.choose import runs_triton

NOWHERE = -1
"""Expert of a pick that nobody takes, which is not counted; address of such a pick, and of an expert without a copy."""


def map_and_count(
    expert_TK: torch.Tensor, address_WE: torch.Tensor, *, first_way: int, load_E: torch.Tensor
) -> torch.Tensor:
    """[T, K] int64 where each pick goes; adds the picks to load_E [E] int64."""
    if runs_triton(expert_TK):
        from moe_runtime.kernels.map_count_triton import map_and_count_triton

        return map_and_count_triton(expert_TK, address_WE, first_way=first_way, load_E=load_E)
    return map_and_count_reference(expert_TK, address_WE, first_way=first_way, load_E=load_E)


def map_and_count_reference(
    expert_TK: torch.Tensor, address_WE: torch.Tensor, *, first_way: int, load_E: torch.Tensor
) -> torch.Tensor:
    """The same in plain torch, whatever the device."""
    num_ways, num_experts = address_WE.shape
    # picks of nobody count for one expert more, which is cut off
    counted_N = torch.where(expert_TK < 0, num_experts, expert_TK).reshape(-1)
    load_E += torch.bincount(counted_N, minlength=num_experts + 1)[:num_experts]
    way_T = (torch.arange(len(expert_TK), device=expert_TK.device) + first_way) % num_ways
    return address_WE[way_T.unsqueeze(-1), expert_TK.clamp_min(0)].masked_fill(expert_TK < 0, NOWHERE)
