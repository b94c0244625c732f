"""How tokens travel to their experts and back, in MoEJob and MoEService."""

from pydantic import Field

from moe_core.contract.dispatch import Hierarchy, Overlap, Wire
from moe_core.spec.base import Rule, SpecModel


class Dispatch(SpecModel):
    """How tokens travel to experts and back."""

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

    overlap: Overlap = Field(
        default="OneBatch",
        description="TwoBatch sends one half of a large step's tokens while experts compute the other half; it needs "
        "cores or a network that would wait otherwise.",
    )
    probe: int = Field(
        default=0,
        ge=0,
        le=2147483647,
        description="Ranks measure their links when one joins; raise this number to have them measured again.",
    )

    @property
    def way_back(self) -> Wire:
        return self.combine_wire or self.wire


_NOW, _BEFORE = "self.dispatch", "oldSelf.dispatch"
ONLY_PROBE_CHANGES = Rule(
    f"{_NOW}.wire == {_BEFORE}.wire && {_NOW}.hierarchy == {_BEFORE}.hierarchy && "
    f"{_NOW}.overlap == {_BEFORE}.overlap && "
    f"has({_NOW}.combineWire) == has({_BEFORE}.combineWire) && "
    f"(!has({_NOW}.combineWire) || {_NOW}.combineWire == {_BEFORE}.combineWire)",
    "of dispatch only probe can be changed; create another object",
    keeps=lambda spec: spec.dispatch.model_copy(update={"probe": 0}),
)
"""Of the spec of a job and of a service."""
