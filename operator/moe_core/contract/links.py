"""How fast ranks reach each other, as they have measured it themselves."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_core.contract.base import WireModel

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scope = Literal["self", "host", "network"]
"""The rank itself; another one on its machine; one on another machine."""
MOST_PLACES = 32
"""Machines up to which every pair is told apart; beyond, scopes have to do: 1,000 pairs are 12 kB of state."""


class LinkSpeed(WireModel):
    latency_us: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """One way, of a few bytes."""
    bytes_per_s: Positive
    """Of a large message."""


class Link(LinkSpeed):
    """From the rank that tells it."""

    rank: int


class Links(WireModel):
    """Means over the ranks of each scope, and from machine to machine: [source][target], None where nobody measured."""

    scopes: dict[Scope, LinkSpeed] = Field(default_factory=dict)
    places: tuple[str, ...] = ()
    between: tuple[tuple[LinkSpeed | None, ...], ...] = ()

    @model_validator(mode="after")
    def _square(self) -> Self:
        if {len(self.places)} != {len(self.between), *map(len, self.between)} and (self.places or self.between):
            raise ValueError(f"between must have a row and a column for each of the {len(self.places)} places")
        return self
