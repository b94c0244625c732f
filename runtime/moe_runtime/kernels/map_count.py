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
    expert_TK: torch.Tensor,
    address_WE: torch.Tensor,
    *,
    first_way: int,
    load_E: torch.Tensor,
    may_be_nowhere: bool = True,
) -> torch.Tensor:
    """[T, K] int64 where each pick goes; adds the picks to load_E [E] int64.

    may_be_nowhere: NOWHERE stands among the experts; who knows better spares plain torch the looking.
    """
    if runs_triton(expert_TK):
        from moe_runtime.kernels.map_count_triton import map_and_count_triton

        return map_and_count_triton(expert_TK, address_WE, first_way=first_way, load_E=load_E)
    return map_and_count_reference(
        expert_TK, address_WE, first_way=first_way, load_E=load_E, may_be_nowhere=may_be_nowhere
    )


def map_and_count_reference(
    expert_TK: torch.Tensor,
    address_WE: torch.Tensor,
    *,
    first_way: int,
    load_E: torch.Tensor,
    may_be_nowhere: bool = True,
) -> torch.Tensor:
    """The same in plain torch, whatever the device."""
    expert_N = expert_TK.reshape(-1)
    if may_be_nowhere:
        expert_N = expert_N[expert_N >= 0]
    load_E += torch.bincount(expert_N, minlength=address_WE.shape[1])
    if not may_be_nowhere:
        return addresses_of(expert_TK, address_WE, first_way=first_way)
    address_TK = addresses_of(expert_TK.clamp_min(0), address_WE, first_way=first_way)
    return address_TK.masked_fill(expert_TK < 0, NOWHERE)


def addresses_of(expert_TK: torch.Tensor, address_WE: torch.Tensor, *, first_way: int) -> torch.Tensor:
    """[T, K] where picks of experts go, in plain torch."""
    num_ways = len(address_WE)
    if num_ways == 1:
        return address_WE[0][expert_TK]
    way_T = torch.arange(first_way, first_way + len(expert_TK), device=expert_TK.device) % num_ways
    return address_WE[way_T.unsqueeze(-1), expert_TK]
