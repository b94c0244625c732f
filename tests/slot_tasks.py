"""What rank processes do in the tests of the slot check: two ranks, copies and experts of one rank's own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from gloo_ranks import join_group
from integration.serving_pods import spread_map
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.engine.model import ExpertParallelModel
from moe_runtime.experts.digest import slot_digests
from moe_runtime.rank.slot_check import SlotCheck, SlotsCorrupt
from tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS

NUM_RANKS = 2
WHOLE = spread_map(NUM_RANKS, copies=1)
EXPERT = (1, 2)
"""Lies on rank 0 in WHOLE."""
Outcome = tuple[str, int]


def moved_map() -> ExpertMap:
    """The two ranks have changed all experts."""
    half = NUM_EXPERTS // NUM_RANKS
    row = (*range(half, NUM_EXPERTS), *range(half))
    return ExpertMap(
        generation=2,
        num_logical_experts=NUM_EXPERTS,
        slots_of_rank=WHOLE.slots_of_rank,
        logical_of_slot=(row,) * NUM_LAYERS,
    )


def damage(epm: ExpertParallelModel, layer_idx: int, logical_id: int) -> None:
    """One bit in one weight of this rank's copy."""
    item = next(i for i in epm.expert_parameters() if i.layer_idx == layer_idx)
    with torch.no_grad():
        item.parameter[item.logical_of_slot.index(logical_id)].view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 7)


def outcome_of(check: SlotCheck, ask: Callable[[], str | None]) -> Outcome:
    try:
        said = ask() or ""
    except SlotsCorrupt as corrupt:
        said = f"ends: {corrupt}"
    return said, check.mismatches


def check_slots(rank: int, store_path: str, *, checkpoint: str) -> dict[str, Outcome]:
    """What the check says on this rank in one case after another."""
    source = ModelSource(path=checkpoint)
    outcomes: dict[str, Outcome] = {}
    with join_group(store_path, ranks=range(NUM_RANKS), rank=rank) as group:

        def placed(name: str, check: SlotCheck, epm: ExpertParallelModel) -> None:
            epm.bind(group)
            outcomes[name] = outcome_of(check, lambda: check.placed(group, epm))

        copied = ExpertParallelModel.load(source, expert_map=spread_map(NUM_RANKS, copies=2), rank=rank)
        placed("copies agree", SlotCheck(), copied)
        if rank == 0:
            damage(copied, *EXPERT)
            copied.slot_digests(fresh=True)
        placed("one copy is damaged as it is loaded", SlotCheck(), copied)

        epm, check = ExpertParallelModel.load(source, expert_map=WHOLE, rank=rank), SlotCheck()
        placed("no copies", check, epm)
        staged = epm.stage(moved_map())
        outcomes["a sound move"] = outcome_of(check, lambda: check.staged(group, epm, staged))
        bad = staged
        if rank == 1:  # where the expert is moved to
            stacks = {name: stack.clone() for name, stack in staged.tensors[EXPERT[0]].items()}
            stacks["down_proj"][EXPERT[1]] = stacks["down_proj"][EXPERT[1] + 1]
            slots = tuple(range(NUM_EXPERTS // NUM_RANKS))
            digests = (*staged.digests[:-1], slot_digests(stacks, slots))
            bad = replace(staged, tensors=(*staged.tensors[:-1], stacks), digests=digests)
        outcomes["a move that brings another expert's weights"] = outcome_of(
            check, lambda: check.staged(group, epm, bad)
        )
        epm.commit_map(staged)
        placed("the move in force", check, epm)
        if rank == 1:
            damage(epm, *EXPERT)
            epm.slot_digests(fresh=True)
        newcomer = SlotCheck() if rank == 0 else check
        placed("an only copy is damaged, the other rank is new", newcomer, epm)
    return outcomes


def check_leaver(rank: int, store_path: str, *, checkpoint: str) -> Outcome:
    """Two ranks become one."""
    epm = ExpertParallelModel.load(ModelSource(path=checkpoint), expert_map=WHOLE, rank=rank)
    alone = ExpertMap(
        generation=2,
        num_logical_experts=NUM_EXPERTS,
        slots_of_rank=(NUM_EXPERTS, 0),
        logical_of_slot=(tuple(range(NUM_EXPERTS)),) * NUM_LAYERS,
    )
    check = SlotCheck()
    with join_group(store_path, ranks=range(NUM_RANKS), rank=rank) as group:
        epm.bind(group)
        check.placed(group, epm)
        staged = epm.stage(alone) if rank == 0 else None
        return outcome_of(check, lambda: check.staged(group, epm, staged))


def write(folder: Path) -> str:
    from tiny_checkpoint import write_checkpoint

    return str(write_checkpoint(folder))
