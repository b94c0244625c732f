"""How a custom resource is modelled: camelCase on the wire, snake_case here, closed and frozen.

A rule that crosses fields is written as CEL for the API server and as a predicate for everybody else, side by side, so
that `kubectl apply` and `moerator validate` refuse the same things with the same words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel, to_snake


@dataclass(frozen=True, slots=True)
class Rule:
    """`cel` as in x-kubernetes-validations; `holds` says the same of the parsed model.

    A rule about a change (`oldSelf`) has no predicate, as no document alone breaks it; `keeps` selects what of the
    parsed model must stay as it was.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool] | None = None
    keeps: Callable[[Any], object] | None = None


def unchangeable(field: str, *, lever: str = "create another object") -> Rule:
    """The optional or required `field` (wire name) must stay as it was created."""
    return Rule(
        cel=f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        message=f"{field} cannot be changed; {lever}",
        keeps=attrgetter(to_snake(field)),
    )


class SpecModel(BaseModel):
    """Base of every part of a spec. Code may build one by its own names; what a person wrote is read by wire names."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, strict=True)
    rules: ClassVar[tuple[Rule, ...]] = ()
