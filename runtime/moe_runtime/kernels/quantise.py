"""Weights as few bits with a scale per group of columns, in plain torch: what every kernel that reads them must equal.

A weight is [.., N rows out, M columns in]; a product sums over M. W is about code * scale.

    Float8    codes float8_e4m3fn [.., N, M]
    Int8      codes int8 [.., N, M], -127 .. 127
    Int4      codes uint8 [.., N, ceil(M / 2)]: column 2j in the low nibble, 2j + 1 in the high one, each its value + 8
    BFloat16  codes bfloat16 [.., N, M], no scales; Float32 alike

scales [.., N, G]: float32, of Int4 bfloat16. A scale may be negative: of Int4's sixteen values eight are below zero and
seven above, and the larger extreme takes the longer side (as in ggml's q4_0).

Suffixes: N rows, M columns, G groups, C columns of a group; X anything in front (layers, slots).
"""

from dataclasses import dataclass

import torch

from moe_core.contract.packing import Packing
from moe_core.outcome import InvalidInput

CODES, SCALES = "codes", "scales"
CODE_DTYPES = {
    "Float32": torch.float32,
    "BFloat16": torch.bfloat16,
    "Float8": torch.float8_e4m3fn,
    "Int8": torch.int8,
    "Int4": torch.uint8,
}
SCALE_DTYPES = {"Float8": torch.float32, "Int8": torch.float32, "Int4": torch.bfloat16}
LARGEST_FLOAT8 = 448.0
STEP_RANGE = {"Int8": (-127, 127), "Int4": (-8, 7)}
SCALE_OF_EXTREME = {"Float8": (1 / LARGEST_FLOAT8,), "Int8": (1 / 127,), "Int4": (-1 / 8, 1 / 7)}
"""Scale, as a share of a group's extreme, that makes it the largest code."""
CLIPS = tuple(1.0 - 0.05 * step for step in range(11))
"""Of the extreme, tried by `best_scales`: a smaller one clips few numbers and resolves all others better."""


@dataclass(frozen=True, slots=True)
class Packed:
    """codes and scales as above; scales None where the precision has none."""

    codes: torch.Tensor
    scales: torch.Tensor | None


def pack(weight_XNM: torch.Tensor, packing: Packing, *, scales_XNG: torch.Tensor | None = None) -> Packed:
    """Each number as its nearest code; scales so that the extreme of each group is kept, unless given.

    The same numbers give the same codes whatever lies beside them. Raises InvalidInput (not a number, wrong shape).
    """
    if not packing.is_scaled:
        return Packed(weight_XNM.to(CODE_DTYPES[packing.precision]), None)
    weight_XNM = weight_XNM.float()
    if scales_XNG is None:
        scales_XNG = extreme_scales(weight_XNM, packing)
    groups = packing.num_groups(weight_XNM.shape[-1])
    if scales_XNG.shape != (*weight_XNM.shape[:-1], groups):
        raise InvalidInput(f"scales must be {[*weight_XNM.shape[:-1], groups]}, not {list(scales_XNG.shape)}")
    kept_XNG = scales_XNG.to(SCALE_DTYPES[packing.precision])
    return Packed(encode(steps(weight_XNM, kept_XNG, packing), packing), kept_XNG)


def pack_best(weight_XNM: torch.Tensor, packing: Packing) -> Packed:
    """Each number as its nearest code under the scales of least squared error. Raises InvalidInput (not a number)."""
    return pack(weight_XNM, packing, scales_XNG=best_scales(weight_XNM, packing) if packing.is_scaled else None)


def unpack(packed: Packed, packing: Packing, *, num_columns: int) -> torch.Tensor:
    """[.., N, M] float32."""
    if not packing.is_scaled:
        return packed.codes.float()
    assert packed.scales is not None
    return decode(packed.codes, packing, num_columns=num_columns) * per_column(
        packed.scales, packing, num_columns=num_columns
    )


def extreme_scales(weight_XNM: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[.., N, G] float32: the extreme of each group lands on the largest code. Raises InvalidInput (not a number)."""
    return _extremes(weight_XNM, packing) * SCALE_OF_EXTREME[packing.precision][0]


def best_scales(
    weight_XNM: torch.Tensor, packing: Packing, *, importance_XM: torch.Tensor | None = None
) -> torch.Tensor:
    """[.., N, G] float32: of the extreme's scale and smaller ones the one with the least squared error per group.

    importance_XM: what an error in a column counts, such as the mean square of what it is multiplied with; broadcast
    against [.., M]. Clipping for the least squared error: Banner et al. 2018 (arXiv 1810.05723).
    """
    extreme_XNG = _extremes(weight_XNM, packing)
    best_XNG, least_XNG = extreme_XNG, torch.full_like(extreme_XNG, torch.inf)
    for share in [clip * unit for clip in CLIPS for unit in SCALE_OF_EXTREME[packing.precision]]:
        tried_XNG = extreme_XNG * share
        packed = pack(weight_XNM, packing, scales_XNG=tried_XNG)
        error_XNM = (unpack(packed, packing, num_columns=weight_XNM.shape[-1]) - weight_XNM).square()
        if importance_XM is not None:
            error_XNM = error_XNM * importance_XM.unsqueeze(-2)
        error_XNG = grouped(error_XNM, packing).sum(-1)
        is_less_XNG = error_XNG < least_XNG
        best_XNG = torch.where(is_less_XNG, tried_XNG, best_XNG)
        least_XNG = torch.where(is_less_XNG, error_XNG, least_XNG)
    return best_XNG


def _extremes(weight_XNM: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[.., N, G] the number of largest magnitude with its sign; of precisions whose codes are symmetric without it."""
    weight_XNGC = grouped(weight_XNM.float(), packing)
    at_XNG1 = weight_XNGC.abs().argmax(dim=-1, keepdim=True)
    extreme_XNG = torch.gather(weight_XNGC, -1, at_XNG1).squeeze(-1)
    if not bool(torch.isfinite(extreme_XNG).all()):  # device sync: what is no number has no code
        raise InvalidInput("weights must be finite numbers, there is a NaN or an infinity among them")
    return extreme_XNG if packing.precision == "Int4" else extreme_XNG.abs()


def steps(weight_XNM: torch.Tensor, scales_XNG: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[.., N, M] how many scales each number is, as near as the precision has it; nothing is packed yet."""
    scale_XNM = per_column(scales_XNG, packing, num_columns=weight_XNM.shape[-1])
    steps_XNM = torch.where(scale_XNM == 0, 0.0, weight_XNM / scale_XNM)
    if packing.precision == "Float8":
        return steps_XNM.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float()
    low, high = STEP_RANGE[packing.precision]
    return steps_XNM.round().clamp(low, high)


def encode(steps_XNM: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Steps as codes."""
    if packing.precision != "Int4":
        return steps_XNM.to(CODE_DTYPES[packing.precision])
    nibble_XNM = (steps_XNM + 8).to(torch.uint8)
    if nibble_XNM.shape[-1] % 2:
        nibble_XNM = torch.nn.functional.pad(nibble_XNM, (0, 1), value=8)
    return nibble_XNM[..., 0::2] | (nibble_XNM[..., 1::2] << 4)


def decode(codes_X: torch.Tensor, packing: Packing, *, num_columns: int) -> torch.Tensor:
    """[.., N, M] codes as steps, float32."""
    if packing.precision != "Int4":
        return codes_X.float()
    nibble_XNM = torch.stack([codes_X & 15, codes_X >> 4], dim=-1).flatten(-2)
    return nibble_XNM[..., :num_columns].float() - 8


def codes_per_row(packing: Packing, num_columns: int) -> int:
    """Entries of `codes` for one row."""
    return -(-num_columns // 2) if packing.precision == "Int4" else num_columns


def grouped(values_XNM: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[.., N, G, C], a short last group filled up with zeros."""
    num_columns = values_XNM.shape[-1]
    size = packing.group_size or num_columns
    padding = packing.num_groups(num_columns) * size - num_columns
    if padding:
        values_XNM = torch.nn.functional.pad(values_XNM, (0, padding))
    return values_XNM.reshape(*values_XNM.shape[:-1], packing.num_groups(num_columns), size)


def per_column(scales_XNG: torch.Tensor, packing: Packing, *, num_columns: int) -> torch.Tensor:
    """[.., N, M] float32 each column's scale; [.., N, 1] where a row has one."""
    scales_XNG = scales_XNG.float()
    if not packing.group_size:
        return scales_XNG
    return scales_XNG.repeat_interleave(packing.group_size, dim=-1)[..., :num_columns]
