"""Experts that are chosen together live together: on loads and traces where it is plain what is best."""

import numpy as np
import pytest

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.affinity import pack_together
from moe_core.experts.checks import FloatArray, IntArray
from moe_core.experts.counts import count_copies
from moe_core.experts.fleet import Fleet
from moe_core.experts.pack import pack
from moe_core.experts.shelf import Shelf
from moe_core.experts.traffic import domains_per_token
from moe_core.outcome import InvalidInput

NUM_EXPERTS, NUM_RANKS, NUM_DOMAINS = 32, 8, 4
FLEET = Fleet.even(40, NUM_RANKS, num_domains=NUM_DOMAINS)
assert FLEET.domain_of_rank


def picks_by_topic(num_tokens: int = 2000) -> IntArray:
    """[T, 3]: each token has one of four topics, its eight experts scattered over the ids; one pick in ten is off."""
    rng = np.random.default_rng(0)
    topic_of_expert = rng.permutation(NUM_EXPERTS) % NUM_DOMAINS
    rows = []
    for topic in rng.integers(0, NUM_DOMAINS, num_tokens):
        chance = np.where(topic_of_expert == topic, 27.0, 1.0)
        rows.append(rng.choice(NUM_EXPERTS, 3, replace=False, p=chance / chance.sum()))
    return np.asarray(rows)


def seen_in(picks_TK: IntArray) -> tuple[FloatArray, FloatArray]:
    """(load [1, E], together [1, E, E])"""
    chosen_TE = np.zeros((len(picks_TK), NUM_EXPERTS))
    np.put_along_axis(chosen_TE, picks_TK, 1.0, axis=1)
    return chosen_TE.sum(0)[None], (chosen_TE.T @ chosen_TE)[None]


def crossed(shelf: Shelf, picks_TK: IntArray) -> float:
    expert_map = ExpertMap(
        generation=0,
        num_logical_experts=NUM_EXPERTS,
        slots_of_rank=FLEET.slots_of_rank,
        logical_of_slot=shelf.rows(),
    )
    return domains_per_token(expert_map, [picks_TK], domain_of_rank=FLEET.domain_of_rank)


def test_tokens_cross_fewer_domains_at_nearly_the_same_balance() -> None:
    picks = picks_by_topic()
    load, together = seen_in(picks)
    copies = count_copies(load, FLEET.num_slots, most=NUM_RANKS)
    apart, near = pack(load, copies.copy(), FLEET), pack_together(load, copies.copy(), FLEET, together)
    assert crossed(near, picks) < 0.8 * crossed(apart, picks)
    assert near.load_LR.max() < 1.1 * near.load_LR.mean()


def test_every_copy_is_placed_once_on_a_rank() -> None:
    load, together = seen_in(picks_by_topic(300))
    copies = count_copies(load, FLEET.num_slots, most=NUM_RANKS)
    shelf = pack_together(load, copies.copy(), FLEET, together)
    assert not shelf.repeats_LRS().any()
    held = [logical for logical in shelf.rows()[0] if logical >= 0]
    assert np.bincount(held, minlength=NUM_EXPERTS).tolist() == copies[0].tolist()


def test_a_table_of_another_shape_is_refused() -> None:
    load, together = seen_in(picks_by_topic(10))
    with pytest.raises(InvalidInput, match=r"together must have the shape \[1, 32, 32\], got \[1, 31, 32\]"):
        pack_together(load, np.ones((1, 32), dtype=np.int64), FLEET, together[:, 1:])
