"""`spec.model.router`: RouterConfig as people write it. Fields, rules and their words are made from the contract's
tables, so that the two cannot drift apart.
"""

import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import Field, create_model
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from moe_core.contract.router import RouterConfig
from moe_core.contract.router_rules import CLASHES, DEFAULTS, GIVEN, NEEDS, OPTIONS_OF, REQUIRED_BY
from moe_core.spec.base import Rule, SpecModel
from moe_core.spec.common import Decimal

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _bounds(info: FieldInfo) -> dict[str, float] | None:
    """Of a field that holds a float: operator -> bound. None for any other."""
    inner = next((part for part in get_args(info.annotation) if part is not types.NoneType), info.annotation)
    if get_origin(inner) is not Annotated or get_args(inner)[0] is not float:
        return None
    found: dict[str, float] = {}
    for part in get_args(inner)[1].metadata:
        found |= {sign: float(getattr(part, name)) for name, sign in _BOUNDS.items() if hasattr(part, name)}
    return found


DECIMALS = {name: bounds for name, info in RouterConfig.model_fields.items() if (bounds := _bounds(info)) is not None}
"""Options that a spec holds as decimal strings, with their bounds."""


def _fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, info in RouterConfig.model_fields.items():
        if info.is_required():
            fields[name] = (info.annotation, Field(description="Which experts a token takes: docs/routers.md."))
            continue
        told = info.description or ""
        if name in DEFAULTS:
            told += f" {_shown(DEFAULTS[name])} by default."
        kind = Union[Decimal, None] if name in DECIMALS else info.annotation  # noqa: UP007 - a value, no annotation
        fields[name] = (kind, Field(default=None, description=told))
    return fields


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _cel(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else _shown(value)


def _rules() -> Iterator[Rule]:
    for name, bounds in DECIMALS.items():
        wire = to_camel(name)
        inside = " && ".join(f"double(self.{wire}) {sign} {bound!r}" for sign, bound in bounds.items())
        told = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items())
        yield Rule(f"!has(self.{wire}) || ({inside})", f"{wire} must be {told}", _inside(name, bounds))
    for name in RouterConfig.model_fields:
        users = [kind for kind, options in OPTIONS_OF.items() if name in options]
        if users:
            listed = ", ".join(f"'{kind}'" for kind in users)
            cel = f"!has(self.{to_camel(name)}) || self.type in [{listed}]"
            yield Rule(cel, f"{to_camel(name)} is used by type {', '.join(users)} only", _used(name, by=users))
    for kind, names in REQUIRED_BY.items():
        for name in names:
            cel = f"self.type != '{kind}' || has(self.{to_camel(name)})"
            yield Rule(cel, f"type {kind} needs {to_camel(name)}", _required(name, by=kind))
    for name, needs in NEEDS.items():
        cel = " || ".join([f"!has(self.{to_camel(name)})", *(_is_cel(*need) for need in needs)])
        told = f"{to_camel(name)} needs {' or '.join(_told(*need) for need in needs)}"
        yield Rule(cel, told, _beside(name, needs=needs))
    for name, clash in ((name, clash) for name, clashes in CLASHES.items() for clash in clashes):
        cel = f"!has(self.{to_camel(name)}) || !({_is_cel(*clash)})"
        yield Rule(cel, f"{to_camel(name)} means nothing with {_told(*clash)}", _apart(name, clash=clash))
    yield Rule(
        "!has(self.classCapacityPercents) || self.classCapacityPercents.sum() == 100",
        "classCapacityPercents must sum to 100",
        lambda router: router.class_capacity_percents is None or sum(router.class_capacity_percents) == 100,
    )
    yield Rule(
        "!has(self.classFirstIds) || self.classFirstIds.size() < 2 || self.classFirstIds.isSorted()",
        "classFirstIds must ascend",
        lambda router: router.class_first_ids is None or list(router.class_first_ids) == sorted(router.class_first_ids),
    )
    for name, size, count in (
        ("numClasses", "self.numClasses", lambda router: router.num_classes),
        (
            "classCapacityPercents",
            "self.classCapacityPercents.size()",
            lambda router: router.class_capacity_percents and len(router.class_capacity_percents),
        ),
    ):
        yield Rule(
            f"!has(self.classFirstIds) || !has(self.{name}) || {size} == self.classFirstIds.size() + 1",
            f"classFirstIds makes one class more than it has numbers; {name} must say so",
            _as_many_classes(count),
        )
    # only here: code that builds a router may say each token's class itself
    told = "needs classFirstIds, which says what class a token is of"
    yield Rule(
        "!has(self.classCapacityPercents) || has(self.classFirstIds)",
        f"classCapacityPercents {told}",
        lambda router: router.class_capacity_percents is None or router.class_first_ids is not None,
    )
    yield Rule(
        "!has(self.heuristic) || self.heuristic != 'Class' || has(self.classFirstIds)",
        f"heuristic Class {told}",
        lambda router: router.heuristic != "Class" or router.class_first_ids is not None,
    )


Holds = Callable[[Any], bool]


def _as_many_classes(count: Callable[[Any], int | None]) -> Holds:
    def holds(router: Any) -> bool:
        starts, given = router.class_first_ids, count(router)
        return starts is None or given is None or given == len(starts) + 1

    return holds


def _used(name: str, *, by: Sequence[str]) -> Holds:
    return lambda router: getattr(router, name) is None or router.type in by


def _required(name: str, *, by: str) -> Holds:
    return lambda router: router.type != by or getattr(router, name) is not None


def _beside(name: str, *, needs: Sequence[tuple[str, Any]]) -> Holds:
    return lambda router: getattr(router, name) is None or any(_is(router, *need) for need in needs)


def _apart(name: str, *, clash: tuple[str, Any]) -> Holds:
    return lambda router: getattr(router, name) is None or not _is(router, *clash)


def _inside(name: str, bounds: dict[str, float]) -> Holds:
    compare = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}

    def holds(router: Any) -> bool:
        text = getattr(router, name)
        return text is None or all(compare[sign](float(text), bound) for sign, bound in bounds.items())

    return holds


def _is(router: Any, name: str, wanted: Any) -> bool:
    value = getattr(router, name)
    return value is not None and (wanted is GIVEN or value == wanted)


def _is_cel(name: str, wanted: Any) -> str:
    has = f"has(self.{to_camel(name)})"
    return has if wanted is GIVEN else f"({has} && self.{to_camel(name)} == {_cel(wanted)})"


def _told(name: str, wanted: Any) -> str:
    return to_camel(name) if wanted is GIVEN else f"{to_camel(name)} {_shown(wanted)}"


_Options: Any = create_model("_Options", __base__=SpecModel, **_fields())


class RouterSpec(_Options):
    """How tokens are routed; without it as the model's family does. Options that the type does not use are refused."""

    rules: ClassVar[tuple[Rule, ...]] = tuple(_rules())

    def config(self) -> RouterConfig:
        """What the runtime is told. Raises ValueError where a rule of this spec does not hold."""
        given = self.model_dump(exclude_none=True)
        return RouterConfig(**{name: float(value) if name in DECIMALS else value for name, value in given.items()})


def wire_words(told: str) -> str:
    """A sentence about options, with their names as people write them.

    >>> wire_words("num_groups must divide the number of experts")
    'numGroups must divide the number of experts'
    """
    return re.sub(r"[a-z]+(_[a-z]+)+", lambda name: _wire(name[0]), told)


def _wire(name: str) -> str:
    return to_camel(name) if name in RouterConfig.model_fields else name
