"""Map and count: plain torch against the plan's own table, Triton (interpreted) against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.kernels import map_count_triton
from moe_runtime.kernels.map_count import NOWHERE, map_and_count_reference
from moe_runtime.kernels.map_count_triton import map_and_count_triton

pytestmark = pytest.mark.usefixtures("poisoned")


@st.composite
def mappings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(expert_TK, address_WE, first_way)."""
    num_tokens, top_k, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    num_ways = draw(st.sampled_from([1, 2, 16]))
    ids = st.lists(st.integers(NOWHERE, num_experts - 1), min_size=num_tokens * top_k, max_size=num_tokens * top_k)
    expert_TK = torch.tensor(draw(ids), dtype=torch.int64).view(num_tokens, top_k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    address_WE = torch.randint(NOWHERE, 50, (num_ways, num_experts), generator=generator)
    return expert_TK, address_WE, draw(st.integers(0, 15))


@given(mappings())
def test_each_pick_goes_where_its_tokens_way_says_and_is_counted(
    case: tuple[torch.Tensor, torch.Tensor, int],
) -> None:
    expert_TK, address_WE, first_way = case
    load_E = torch.full((address_WE.shape[1],), 7)
    address_TK = map_and_count_reference(expert_TK, address_WE, first_way=first_way, load_E=load_E)
    for token, experts in enumerate(expert_TK.tolist()):
        way = (first_way + token) % len(address_WE)
        assert address_TK[token].tolist() == [NOWHERE if e < 0 else int(address_WE[way, e]) for e in experts]
    assert load_E.tolist() == [7 + expert_TK.flatten().tolist().count(e) for e in range(address_WE.shape[1])]


@settings(max_examples=40)
@given(mappings())
def test_triton_map_and_count_equals_the_reference(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    expert_TK, address_WE, first_way = case
    loads = [torch.full((address_WE.shape[1],), 7) for _ in range(2)]
    wanted = map_and_count_reference(expert_TK, address_WE, first_way=first_way, load_E=loads[0])
    got = map_and_count_triton(expert_TK, address_WE, first_way=first_way, load_E=loads[1])
    assert torch.equal(got, wanted)
    assert torch.equal(loads[1], loads[0])


def test_triton_map_and_count_walks_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_count_triton, "_CHUNK", 8)
    monkeypatch.setattr(map_count_triton, "_PROGRAMS", 3)
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.randint(-1, 5, (50, 3), generator=generator)
    address_WE = torch.randint(0, 9, (16, 5), generator=generator)
    loads = [torch.zeros(5, dtype=torch.int64) for _ in range(2)]
    wanted = map_and_count_reference(expert_TK, address_WE, first_way=11, load_E=loads[0])
    assert torch.equal(map_and_count_triton(expert_TK, address_WE, first_way=11, load_E=loads[1]), wanted)
    assert torch.equal(loads[1], loads[0])
