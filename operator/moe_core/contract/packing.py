"""How the numbers of routed experts are kept: in full, or as few bits with a scale per group of columns.

A matrix is meant as [rows out, columns in]; columns are what a product sums over. Everything else of a model stays as
the checkpoint has it: attention, routers, shared experts, biases, norms.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_core.contract.base import WireModel

Precision = Literal["Float32", "BFloat16", "Float8", "Int8", "Int4"]
BITS: dict[Precision, int] = {"Float32": 32, "BFloat16": 16, "Float8": 8, "Int8": 8, "Int4": 4}
SCALED: frozenset[Precision] = frozenset({"Float8", "Int8", "Int4"})
"""Those that need a scale beside the codes; Float8 is e4m3."""
SCALE_BYTES: dict[Precision, int] = {"Float8": 4, "Int8": 4, "Int4": 2}
"""Float32, and bfloat16 where groups are small: a code is chosen for the scale as it is kept."""
DEFAULT_GROUPS: dict[Precision, int] = {"Int4": 64}
MAX_GROUP = 1 << 16

CONFIG_KEY, METHOD = "quantization_config", "moerator"
"""Where config.json says that experts are packed. The key is transformers' own, which refuses the unknown method."""


class Packing(WireModel):
    """group_size: columns that share a scale, 0 for the whole row. None of a full precision."""

    precision: Precision
    group_size: Annotated[int, Field(ge=0, le=MAX_GROUP)] = 0

    @model_validator(mode="after")
    def _groups_need_scales(self) -> Self:
        if self.group_size and self.precision not in SCALED:
            raise ValueError(f"{self.precision} has no scales, so group_size must be 0, not {self.group_size}")
        return self

    @classmethod
    def of(cls, precision: Precision, group_size: int | None = None) -> "Packing":
        """With the precision's own group size where none is given. Raises ValueError."""
        return cls(
            precision=precision,
            group_size=DEFAULT_GROUPS.get(precision, 0) if group_size is None else group_size,
        )

    @property
    def is_scaled(self) -> bool:
        return self.precision in SCALED

    def num_groups(self, num_columns: int) -> int:
        """The last group may be short."""
        return -(-num_columns // self.group_size) if self.group_size else 1

    def matrix_bytes(self, num_rows: int, num_columns: int) -> int:
        """
        >>> Packing.of("Int4", 64).matrix_bytes(1, 128), Packing.of("Int8").matrix_bytes(1, 128)
        (68, 132)
        """
        codes = -(-num_columns * BITS[self.precision] // 8)
        scales = self.num_groups(num_columns) * SCALE_BYTES[self.precision] if self.is_scaled else 0
        return num_rows * (codes + scales)

    def __str__(self) -> str:
        """
        >>> str(Packing.of("Int4")), str(Packing.of("Int8")), str(Packing.of("BFloat16"))
        ('Int4 in groups of 64', 'Int8 by row', 'BFloat16')
        """
        if not self.is_scaled:
            return self.precision
        return f"{self.precision} in groups of {self.group_size}" if self.group_size else f"{self.precision} by row"


FULL = Packing(precision="Float32")


class PackedConfig(WireModel):
    """The entry of config.json under CONFIG_KEY. calibration: how the codes were chosen, for people."""

    quant_method: Literal["moerator"] = "moerator"
    version: Literal[1] = 1
    experts: Packing
    calibration: str = ""
