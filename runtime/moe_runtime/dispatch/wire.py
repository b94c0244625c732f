"""What rows of numbers are while they travel between ranks: as they are, in half the bits, or in a quarter.

    Float32   as the rank computed them
    BFloat16  half
    Float8    e4m3 with one scale for each row: its largest number becomes the largest that e4m3 has (448)
    Int8      whole numbers -127..127 with one scale for each row

A row that holds no number (inf, nan) arrives as one that holds none: whoever checks for divergence still sees it.
Collectives carry bytes, since Gloo has neither bfloat16 nor eight-bit floats. After DeepSeek-V3 (arXiv:2412.19437),
which dispatches in eight bits and combines in sixteen.

R rows, D numbers each, B bytes of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moe_core.contract.dispatch import SCALE_BYTES, Wire, gradient_wire, row_bytes

_FLOAT8_MAX = 448.0
_INT8_MAX = 127.0
_LEAST_SCALE = 1e-30
"""Of a row of zeros; its inverse still is a float32."""


def encode(rows_RD: torch.Tensor, wire: Wire) -> torch.Tensor:
    """[R, D] -> bytes [R, B]."""
    if wire == "Float32":
        return rows_RD.contiguous().view(torch.uint8)
    if wire == "BFloat16":
        return rows_RD.to(torch.bfloat16).contiguous().view(torch.uint8)
    largest = _FLOAT8_MAX if wire == "Float8" else _INT8_MAX
    rows_RD = rows_RD.float()
    scale_R1 = (rows_RD.abs().amax(dim=1, keepdim=True) / largest).clamp_min(_LEAST_SCALE)
    scaled_RD = rows_RD / scale_R1
    if wire == "Float8":
        # rounding may leave the largest number above what e4m3 has, which would make it nan
        coded_RD = scaled_RD.clamp(-largest, largest).to(torch.float8_e4m3fn)
    else:
        coded_RD = scaled_RD.round().to(torch.int8)
    return torch.cat([coded_RD.view(torch.uint8), scale_R1.contiguous().view(torch.uint8)], dim=1)


def decode(bytes_RB: torch.Tensor, wire: Wire, *, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [R, B] -> [R, D] in `dtype`, that of the rows before they were encoded."""
    if wire == "Float32":
        return bytes_RB.contiguous().view(dtype)
    if wire == "BFloat16":
        return bytes_RB.contiguous().view(torch.bfloat16).to(dtype)
    coded = torch.float8_e4m3fn if wire == "Float8" else torch.int8
    scale_R1 = _numbers(bytes_RB[:, -SCALE_BYTES:], torch.float32)
    return (bytes_RB[:, :-SCALE_BYTES].contiguous().view(coded).float() * scale_R1).to(dtype)


def _numbers(bytes_RB: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """A copy always: bytes of a single row are contiguous as they lie, at an address that numbers may not have."""
    return bytes_RB.clone(memory_format=torch.contiguous_format).view(kind)


def bytes_of_row(rows_RD: torch.Tensor, wire: Wire) -> int:
    """B of these rows."""
    dim = rows_RD.shape[1]
    return dim * rows_RD.element_size() if wire == "Float32" else row_bytes(wire, dim)


_SAMPLED_ROWS = 64
"""Of one exchange: the relative error of that many rows is that of all within a few per cent."""


class WireError:
    """How far what arrives is from what was sent: the root of the squared error over that of the squared numbers.

    Measured on a sample of the rows of every exchange by whoever sends them. `leg`: dispatch, combine, gradient.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def note(self, leg: str, rows_RD: torch.Tensor, wire: Wire) -> None:
        if wire == "Float32" or not len(rows_RD):
            return
        some_SD = rows_RD[:: -(-len(rows_RD) // _SAMPLED_ROWS)]
        arrived_SD = decode(encode(some_SD, wire), wire, dtype=some_SD.dtype)
        squares = torch.stack([(arrived_SD - some_SD).double().square().sum(), some_SD.double().square().sum()])
        self._sums[leg] = self._sums[leg] + squares if leg in self._sums else squares

    def take(self) -> dict[str, float]:
        """By leg, of everything since the last call; legs on which nothing travelled are left out."""
        sums, self._sums = self._sums, {}
        # device sync: told every few steps
        told = {leg: squares.tolist() for leg, squares in sorted(sums.items())}
        return {leg: (error / whole) ** 0.5 for leg, (error, whole) in told.items() if whole > 0}


@dataclass(frozen=True, slots=True)
class Leg:
    """One way of a layer's rows: there (dispatch) or back (combine), and what its gradients are on their way."""

    name: str = "dispatch"
    wire: Wire = "Float32"
    error: WireError = field(default_factory=WireError)

    @property
    def of_gradient(self) -> "Leg":
        return Leg("gradient", gradient_wire(self.wire), self.error)

    def pack(self, rows_RD: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        """Rows and what goes with them, each [R, ...] of four-byte numbers, as bytes: [R, B]."""
        self.error.note(self.name, rows_RD, self.wire)
        coded_RB = encode(rows_RD, self.wire)
        if not beside:
            return coded_RB
        return torch.cat([coded_RB, *(part.contiguous().view(torch.uint8) for part in beside)], dim=1)

    def unpack(
        self, bytes_RB: torch.Tensor, *, dtype: torch.dtype, beside: Sequence[tuple[torch.dtype, int]] = ()
    ) -> list[torch.Tensor]:
        """What `pack` was given; `beside`: type and columns of each part after the rows."""
        end = bytes_RB.shape[1] - sum(4 * columns for _, columns in beside)
        parts = [decode(bytes_RB[:, :end], self.wire, dtype=dtype)]
        for kind, columns in beside:
            parts.append(_numbers(bytes_RB[:, end : end + 4 * columns], kind))
            end += 4 * columns
        return parts


@dataclass(frozen=True, slots=True)
class Legs:
    """Both ways of a layer's rows."""

    there: Leg = field(default_factory=Leg)
    back: Leg = field(default_factory=lambda: Leg("combine"))

    @classmethod
    def of(cls, *, dispatch: Wire, combine: Wire) -> "Legs":
        error = WireError()
        return cls(Leg("dispatch", dispatch, error), Leg("combine", combine, error))

    @property
    def error(self) -> WireError:
        return self.there.error


PLAIN = Legs()
"""Rows as they are: nothing is lost, so its error is never written."""
