"""The page about routers names every type and option that there is, and no other."""

import re
from pathlib import Path
from typing import get_args

from pydantic.alias_generators import to_camel

from moe_core.contract.router import RouterConfig
from moe_core.contract.router_rules import RouterType

PAGE = (Path(__file__).parents[2] / "docs/routers.md").read_text()
TYPES = PAGE[PAGE.index("| type |") : PAGE.index("## What any")]
OPTIONS = PAGE[PAGE.index("## What any") : PAGE.index("## A router of your own")]


def test_every_type_has_its_row_in_the_order_of_the_contract() -> None:
    assert re.findall(r"^\| `(\w+)` \|", TYPES, flags=re.MULTILINE) == list(get_args(RouterType))


def test_every_option_is_named_and_every_name_is_an_option() -> None:
    listed = [row.split("|")[2] for row in OPTIONS.splitlines() if row.startswith("| ") and "options" not in row[:20]]
    named = re.findall(r"`(\w+)`", " ".join(listed))
    assert sorted(named) == sorted(to_camel(name) for name in RouterConfig.model_fields if name != "type")
