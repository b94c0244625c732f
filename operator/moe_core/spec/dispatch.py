"""How tokens travel to their experts and back, in MoEJob and MoEService."""

from pydantic import Field

from moe_core.contract.dispatch import Hierarchy, Wire
from moe_core.spec.base import SpecModel


class Dispatch(SpecModel):
    wire: Wire = Field(
        default="Float32",
        description="What a token's numbers travel as on their way to its experts. Float8 (e4m3) and Int8 have a scale "
        "for each token. Gradients travel as BFloat16 where this is not Float32.",
    )
    combine_wire: Wire | None = Field(
        default=None, description="What experts' results travel as on their way back; as wire without it."
    )
    hierarchy: Hierarchy = Field(
        default="Auto",
        description="ByNode sends a token once to each node that it needs, where it is passed on; Flat sends it to "
        "ranks. Auto goes by node where that spares a tenth of the rows between nodes, except in small steps.",
    )

    @property
    def way_back(self) -> Wire:
        return self.combine_wire or self.wire
