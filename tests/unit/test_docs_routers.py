"""The page about routers names every type and option that there is, and no other."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from pydantic.alias_generators import to_camel

from moe_core.contract.router import RouterConfig
from moe_core.contract.router_rules import RouterType
from moe_core.spec.router import RouterSpec
from moe_runtime.router.registry import build_router
from router_cases import DIM, SERVING, make_tokens

PAGE = (Path(__file__).parents[2] / "docs/routers.md").read_text()
TYPES = PAGE[PAGE.index("| type |") : PAGE.index("## What any")]
OPTIONS = PAGE[PAGE.index("## What any") : PAGE.index("## A router of your own")]


def test_every_type_has_its_row_in_the_order_of_the_contract() -> None:
    assert re.findall(r"^\| `(\w+)` \|", TYPES, flags=re.MULTILINE) == list(get_args(RouterType))


def test_every_option_is_named_and_every_name_is_an_option() -> None:
    listed = [row.split("|")[2] for row in OPTIONS.splitlines() if row.startswith("| ") and "options" not in row[:20]]
    named = re.findall(r"`(\w+)`", " ".join(listed))
    assert sorted(named) == sorted(to_camel(name) for name in RouterConfig.model_fields if name != "type")


def test_the_router_of_your_own_that_the_page_shows_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE[PAGE.index("## A router of your own") :]
    (code,), (config,) = (re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL) for kind in ("python", "yaml"))
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    spec = RouterSpec.model_validate(yaml.safe_load(config)["router"])
    router, tokens = build_router(spec.config(), num_experts=8, top_k=2, dim=DIM, layer_idx=0), make_tokens(5, 8)
    routing = router(tokens, SERVING)
    assert tokens.logits_TE is not None
    assert torch.equal(routing.expert_TK, tokens.logits_TE.topk(2).indices)
    torch.testing.assert_close(routing.weight_TK, torch.softmax(2 * tokens.logits_TE.topk(2).values, dim=-1))
