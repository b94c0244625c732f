"""How a service keeps its experts in memory."""

from typing import ClassVar, Literal

from pydantic import Field

from moe_core.contract.packing import MAX_GROUP, Packing
from moe_core.spec.base import Rule, SpecModel


class ExpertPacking(SpecModel):
    """Keep routed experts in fewer bits; shared experts and everything else stay as the checkpoint has them."""

    precision: Literal["BFloat16", "Float8", "Int8", "Int4"] = Field(
        description="Float8 (e4m3), Int8 and Int4 have scales; products are computed in full precision."
    )
    group_size: int | None = Field(
        default=None,
        ge=0,
        le=MAX_GROUP,
        description="Numbers that share a scale, along what a product sums over; 0 is all of them. By default 64 for "
        "Int4 and 0 else.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.precision != 'BFloat16' || !has(self.groupSize)",
            "BFloat16 has no scales: leave groupSize out",
            lambda packing: packing.precision != "BFloat16" or packing.group_size is None,
        ),
    )

    def contract(self) -> Packing:
        return Packing.of(self.precision, self.group_size)
