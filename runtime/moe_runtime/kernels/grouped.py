"""What the grouped GEMMs must equal, in plain torch: one slot after the other, over rows as `index` lays them out.

Rows that serve no pick are zero in every result, rows of unused blocks too.

Suffixes: F expert hidden, S slots, P padded rows; M, N the sides of any matrix.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import silu

from moe_runtime.kernels.index import SlotRows


def rows_of_slots(rows: SlotRows) -> Iterator[tuple[int, slice]]:
    """Each slot with its rows, without the padding. Waits for the device."""
    for slot, (start, count) in enumerate(zip(rows.start_S1.tolist()[:-1], rows.count_S.tolist(), strict=True)):
        yield slot, slice(start, start + count)


def rows_times_weights(a_PM: torch.Tensor, weight_SNM: torch.Tensor, rows: SlotRows) -> torch.Tensor:
    """[P, N] each row times its slot's weight, transposed as a linear layer's is."""
    out_PN = a_PM.new_zeros(a_PM.shape[0], weight_SNM.shape[1])
    for slot, own in rows_of_slots(rows):
        out_PN[own] = a_PM[own] @ weight_SNM[slot].T
    return out_PN


def swiglu(gate_up_P2F: torch.Tensor) -> torch.Tensor:
    """[P, F] silu(gate) * up; the gate is the first half (Shazeer 2020)."""
    gate_PF, up_PF = gate_up_P2F.float().chunk(2, dim=-1)
    return (silu(gate_PF) * up_PF).to(gate_up_P2F.dtype)


def swiglu_backward(
    d_hidden_PF: torch.Tensor, gate_up_P2F: torch.Tensor, weight_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the mixture sum(weight * down(hidden)): d_hidden is the gradient that `down` sends back for weight one.

    Returns the gradient of gate_up [P, 2F], weight * hidden [P, F] (what d_down needs), the weight's gradient [P].
    """
    gate_PF, up_PF = gate_up_P2F.float().chunk(2, dim=-1)
    d_PF, sigmoid_PF = d_hidden_PF.float(), torch.sigmoid(gate_PF)
    silu_PF = gate_PF * sigmoid_PF
    weighted_PF = d_PF * weight_P.unsqueeze(-1)
    d_gate_PF = weighted_PF * up_PF * (sigmoid_PF + silu_PF * (1 - sigmoid_PF))
    d_gate_up_P2F = torch.cat([d_gate_PF, weighted_PF * silu_PF], dim=-1)
    hidden_PF = silu_PF * up_PF
    dtype = gate_up_P2F.dtype
    return d_gate_up_P2F.to(dtype), (hidden_PF * weight_P.unsqueeze(-1)).to(dtype), (d_PF * hidden_PF).sum(-1)


def weights_gradient(left_PM: torch.Tensor, right_PN: torch.Tensor, rows: SlotRows) -> torch.Tensor:
    """[S, M, N] sum over a slot's rows of left^T right: zero for a slot without rows."""
    out_SMN = left_PM.new_zeros(rows.count_S.shape[0], left_PM.shape[1], right_PN.shape[1])
    for slot, own in rows_of_slots(rows):
        out_SMN[slot] = left_PM[own].T @ right_PN[own]
    return out_SMN
