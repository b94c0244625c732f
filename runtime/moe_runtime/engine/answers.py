"""Who answers for each expert while some ranks are gone, and how many picks were answered how."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.degrade import Answer, Answers, degrade
from moe_runtime.dispatch.plan import LOST, DispatchPlan
from moe_runtime.experts.generalists import Generalists
from moe_runtime.experts.slots import SlottedExperts

Fallback = Literal["Generalist", "Drop", "Refuse"]


def settle_answers(
    plan: DispatchPlan,
    layers: Sequence[SlottedExperts],
    generalists: Generalists | None,
    *,
    expert_map: ExpertMap,
    fallback: Fallback,
    num_experts: int,
    device: str,
) -> tuple[DispatchPlan, Answers]:
    """Settle who answers for lost experts; in the plan that comes back those whose stand-in lives send their picks
    there.
    """
    has_generalist_LE = np.zeros((len(layers), num_experts), dtype=np.bool_)
    planned = list(plan.layers)
    for layer in layers:
        i = layer.layer_idx
        lost = plan.layers[i].lost
        fitted = generalists.layers[i] if generalists is not None else None
        layer.ladder.set_lost(lost, fitted, num_experts=num_experts, device=device)
        if fitted is None or not lost:
            continue
        address_WE = plan.layers[i].address_WE.clone()
        for logical_id in lost:
            stand_in = fitted.stand_in[logical_id]
            if stand_in >= 0:
                address_WE[:, logical_id] = plan.layers[i].address_WE[:, stand_in]
            answers = int(address_WE[0, logical_id]) != LOST
            has_generalist_LE[i, logical_id] = fitted.has_map[logical_id] or answers
        planned[i] = replace(plan.layers[i], address_WE=address_WE)
    settled = degrade(expert_map, plan.ranks, fallback=fallback, has_generalist_LE=has_generalist_LE)
    return replace(plan, layers=tuple(planned)), settled


class PickCounts:
    """Committed picks of one rank's own tokens: by layer and expert, and by how those of lost experts were answered."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._load_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.degraded = {"generalist": 0, "drop": 0}

    def add(self, picks_LE: torch.Tensor, answers: Answers) -> None:
        """The picks of one step, on the CPU, and who answered in it."""
        self._load_LE += picks_LE
        if answers.num_lost:
            by_generalist_LE = answers.answer_LE == Answer.GENERALIST
            by_nobody_LE = (answers.answer_LE == Answer.DROP) | (answers.answer_LE == Answer.REFUSE)
            self.degraded["generalist"] += int(picks_LE[torch.from_numpy(by_generalist_LE)].sum())
            self.degraded["drop"] += int(picks_LE[torch.from_numpy(by_nobody_LE)].sum())

    def window(self, *, reset: bool) -> list[list[int]]:
        """[L][E] picks since the last reset."""
        window: list[list[int]] = self._load_LE.tolist()
        if reset:
            self._load_LE.zero_()
        return window
