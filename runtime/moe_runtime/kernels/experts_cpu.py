"""SwiGLU experts on a CPU in float32, forward and backward: large products on oneDNN, small ones in torch's grouped_mm.

torch multiplies float32 with MKL, which on AMD's AVX-512 reaches half of what oneDNN does (92 against 200 GFLOP/s a
core, EPYC of 2025), and its grouped_mm is a loop over the same. oneDNN's linear with the activation or the product with
`up` inside is what torch's compiler puts into models. It makes code for each number of rows that it meets, in half a
millisecond: a slot's rows are padded to few different numbers.

R rows in any order, D model, F expert hidden, S slots; P rows of a batch with its padding, C without; M, N the sides of
any weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grouped_mm, silu

SMALL_FLOP = 3e6
"""Of one product: below, oneDNN's call (16 us against 4) costs more than its arithmetic saves. Measured equal at 2e6
for matrices of 128 x 256 and 1024 x 512."""
FEW_ROWS = 4
"""Below, the time goes into reading the weights, which MKL does as quickly and in place."""

Counts = npt.NDArray[np.int64]


def runs_here(gate_up_S2FD: torch.Tensor, down_SDF: torch.Tensor) -> bool:
    """Whether these weights can be multiplied here: float32 on a CPU for which torch has oneDNN, and sides that
    grouped_mm takes (rows of whole 16 bytes).
    """
    return (
        all(
            w.dtype == torch.float32 and w.device.type == "cpu" and w.shape[-1] % 4 == 0
            for w in (gate_up_S2FD, down_SDF)
        )
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def run_experts(
    rows_RD: torch.Tensor, slot_R: torch.Tensor, gate_up_S2FD: torch.Tensor, down_SDF: torch.Tensor
) -> torch.Tensor:
    """[R, D] down(silu(gate(x)) * up(x)) of each row's slot, differentiable in rows and both weights. R >= 1."""
    batches = list(_batches(slot_R, num_slots=len(down_SDF), weight_size=down_SDF[0].numel()))
    if not torch.is_grad_enabled():
        return _forward_only(rows_RD, batches, gate_up_S2FD, down_SDF)
    output_RD: torch.Tensor = _Experts.apply(rows_RD, batches, gate_up_S2FD, down_SDF)
    return output_RD


# ---------------------------------------------------------------- rows that are multiplied together


def padded(count: int) -> int:
    """A number of rows that is met often: a multiple of 4, and above 64 of an eighth of the next lower power of two.

    >>> [padded(n) for n in (1, 17, 65, 129, 300, 1000)]
    [4, 20, 72, 144, 320, 1024]
    """
    step = max(4, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _onednn(x_PM: torch.Tensor, weight_NM: torch.Tensor, activation: str = "none") -> torch.Tensor:
    product_PN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_PM, weight_NM, None, activation, [], "")
    return product_PN


@dataclass(frozen=True, slots=True)
class _Single:
    """One slot's rows, on oneDNN."""

    slot: int
    row_C: torch.Tensor

    @property
    def num_rows(self) -> int:
        return padded(len(self.row_C))

    def linear(self, x_PM: torch.Tensor, weight_SNM: torch.Tensor) -> torch.Tensor:
        return _onednn(x_PM, weight_SNM[self.slot])

    def linear_back(self, d_PN: torch.Tensor, weight_SNM: torch.Tensor) -> torch.Tensor:
        return _onednn(d_PN, weight_SNM[self.slot].t())

    def swiglu(self, x_PD: torch.Tensor, gate_up_S2FD: torch.Tensor) -> torch.Tensor:
        gate_FD, up_FD = gate_up_S2FD[self.slot].chunk(2)
        hidden_PF = _onednn(x_PD, gate_FD, "swish")
        product_PF: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_PD, hidden_PF, up_FD, None, "mul")
        return product_PF

    def weight_gradient(self, d_PN: torch.Tensor, x_PM: torch.Tensor) -> torch.Tensor:
        """[N, M]"""
        return _onednn(d_PN.t(), x_PM.t())


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of many slots in their order, in one call. ends_S: where each slot's rows end."""

    ends_S: torch.Tensor
    row_C: torch.Tensor

    @property
    def num_rows(self) -> int:
        return len(self.row_C)

    def linear(self, x_PM: torch.Tensor, weight_SNM: torch.Tensor) -> torch.Tensor:
        return grouped_mm(x_PM, weight_SNM.mT, offs=self.ends_S)

    def linear_back(self, d_PN: torch.Tensor, weight_SNM: torch.Tensor) -> torch.Tensor:
        return grouped_mm(d_PN, weight_SNM, offs=self.ends_S)

    def swiglu(self, x_PD: torch.Tensor, gate_up_S2FD: torch.Tensor) -> torch.Tensor:
        gate_PF, up_PF = self.linear(x_PD, gate_up_S2FD).chunk(2, dim=-1)
        return silu(gate_PF).mul_(up_PF)

    def weight_gradient(self, d_PN: torch.Tensor, x_PM: torch.Tensor) -> torch.Tensor:
        """[S, N, M], zero for slots without rows here."""
        return grouped_mm(d_PN.t(), x_PM, offs=self.ends_S)


def _batches(slot_R: torch.Tensor, *, num_slots: int, weight_size: int) -> Iterator[_Single | _Group]:
    slots = slot_R.numpy()
    # numpy sorts 16-bit numbers by radix, which torch does not
    order_R = torch.from_numpy(np.argsort(slots.astype(np.int16) if num_slots < 1 << 15 else slots, kind="stable"))
    count_S: Counts = np.bincount(slots, minlength=num_slots)
    is_small_S = (count_S < FEW_ROWS) | (2.0 * weight_size * count_S < SMALL_FLOP)
    few_S = np.where(is_small_S, count_S, 0)
    ends_S = torch.from_numpy(few_S.cumsum().astype(np.int32))
    if few_S.sum() == len(slots):
        yield _Group(ends_S, order_R)
        return
    if few_S.any():
        yield _Group(ends_S, order_R[torch.from_numpy(is_small_S.repeat(count_S))])
    for slot, row_C in enumerate(torch.split(order_R, count_S.tolist())):
        if not is_small_S[slot]:
            yield _Single(slot, row_C)


def _taken(rows_RM: torch.Tensor, batch: _Single | _Group) -> torch.Tensor:
    """[P, M] the batch's rows, then zeros."""
    taken_PM, count = rows_RM.new_empty(batch.num_rows, rows_RM.shape[1]), len(batch.row_C)
    torch.index_select(rows_RM, 0, batch.row_C, out=taken_PM[:count])
    taken_PM[count:].zero_()
    return taken_PM


def _put(rows_PM: torch.Tensor, batch: _Single | _Group, into_RM: torch.Tensor) -> None:
    into_RM.index_copy_(0, batch.row_C, rows_PM[: len(batch.row_C)])


# ---------------------------------------------------------------- forward and backward


def _forward_only(
    rows_RD: torch.Tensor, batches: list[_Single | _Group], gate_up_S2FD: torch.Tensor, down_SDF: torch.Tensor
) -> torch.Tensor:
    output_RD = torch.empty_like(rows_RD)
    for batch in batches:
        hidden_PF = batch.swiglu(_taken(rows_RD, batch), gate_up_S2FD)
        _put(batch.linear(hidden_PF, down_SDF), batch, output_RD)
    return output_RD


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: torch.Tensor,
        batches: list[_Single | _Group],
        gate_up_S2FD: torch.Tensor,
        down_SDF: torch.Tensor,
    ) -> torch.Tensor:
        output_RD, kept = torch.empty_like(rows_RD), []
        for batch in batches:
            x_PD = _taken(rows_RD, batch)
            gate_up_P2F = batch.linear(x_PD, gate_up_S2FD)
            gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
            _put(batch.linear(silu(gate_PF).mul_(up_PF), down_SDF), batch, output_RD)
            kept += [x_PD, gate_up_P2F]
        ctx.save_for_backward(gate_up_S2FD, down_SDF, *kept)
        ctx.batches = batches
        return output_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up_S2FD, down_SDF, *kept = ctx.saved_tensors
        d_rows_RD = torch.empty_like(d_output_RD)
        gate_up_gradients, down_gradients = [], []
        for batch, x_PD, gate_up_P2F in zip(ctx.batches, kept[::2], kept[1::2], strict=True):
            gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
            d_output_PD = _taken(d_output_RD, batch)
            d_hidden_PF = batch.linear_back(d_output_PD, down_SDF)
            silu_PF = silu(gate_PF)
            d_gate_up_P2F = torch.empty_like(gate_up_P2F)
            d_gate_PF, d_up_PF = d_gate_up_P2F.chunk(2, dim=-1)
            torch.mul(d_hidden_PF, silu_PF, out=d_up_PF)
            torch.ops.aten.silu_backward.grad_input(d_hidden_PF.mul_(up_PF), gate_PF, grad_input=d_gate_PF)
            down_gradients.append(batch.weight_gradient(d_output_PD, silu_PF.mul_(up_PF)))
            gate_up_gradients.append(batch.weight_gradient(d_gate_up_P2F, x_PD))
            _put(batch.linear_back(d_gate_up_P2F, gate_up_S2FD), batch, d_rows_RD)
        d_gate_up_S2FD = _stacked(gate_up_gradients, ctx.batches, like=gate_up_S2FD)
        return d_rows_RD, None, d_gate_up_S2FD, _stacked(down_gradients, ctx.batches, like=down_SDF)


def _stacked(
    gradients: Sequence[torch.Tensor], batches: Sequence[_Single | _Group], *, like: torch.Tensor
) -> torch.Tensor:
    """[S, N, M] of all batches; the group, if there is one, comes first and knows all slots."""
    if isinstance(batches[0], _Group):
        stacked_SNM, *gradients = gradients
        batches = batches[1:]
    else:
        stacked_SNM = torch.empty_like(like)
        present = {batch.slot for batch in batches if isinstance(batch, _Single)}
        for slot in set(range(len(like))) - present:
            stacked_SNM[slot].zero_()
    for gradient_NM, batch in zip(gradients, batches, strict=True):
        assert isinstance(batch, _Single), "there is one group at most"
        stacked_SNM[batch.slot] = gradient_NM
    return stacked_SNM
