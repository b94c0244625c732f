"""Codes chosen by what experts give on text, matrix by matrix.

Each matrix is packed in three ways, fitted on four of five of its rows, and the one that errs least on the fifth is
taken: error is sum over rows of count * |x (W - packed)|^2, the square of what the residual stream is off.

    nearest    nearest codes, scales of least error of the weights; no text
    weighted   the same with each column's error weighted by the mean square of what it meets
    gptq       codes that make up for each other (gptq.py), under the weighted scales

What the second matrix is multiplied with lies inside the family's module. It is read with that matrix replaced by one
that picks D of its F columns at a time, and believed if the true matrix then gives the module's own output; else the
matrix is packed as `nearest`, and said so.

Suffixes: N rows of one expert, D model, F expert hidden, M columns in, O rows out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_core.contract.packing import Packing
from moe_runtime.convert.gptq import gptq
from moe_runtime.convert.sample import LayerSample, Rows
from moe_runtime.experts.build import BuiltModel
from moe_runtime.experts.slots import SlottedExperts
from moe_runtime.experts.store import parameters_of
from moe_runtime.kernels.quantise import Packed, best_scales, pack, pack_best, unpack

WINDOWS_PER_BATCH = 16
HELD_BACK = 5
"""One row of so many only scores."""
AGREEMENT = 1e-3
"""Relative; of an output recomputed from what was read out of the module."""


@dataclass
class LayerFigures:
    """errors: squared output error over all matrices, relative to the output, nearest codes' and the chosen ones'."""

    least_own_rows: int = 0
    filled_up: int = 0
    """Experts that were given rows of other tokens."""
    nearest: float = 0.0
    chosen: float = 0.0
    output: float = 0.0
    ways: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        output = self.output or 1.0
        return {
            "least_own_rows": self.least_own_rows,
            "experts_filled_up": self.filled_up,
            "output_error_nearest": self.nearest / output,
            "output_error_chosen": self.chosen / output,
            "ways": dict(sorted(self.ways.items())),
        }


class Calibration:
    """Samples a whole model on text, then chooses codes. `built` holds all experts on one rank, in order, in full."""

    def __init__(self, built: BuiltModel, *, rows_per_expert: int) -> None:
        self._built = built
        num_experts = built.facts.num_experts
        self._samples = [
            LayerSample(num_experts, rows_per_expert=rows_per_expert, seed=layer.layer_idx) for layer in built.layers
        ]
        self._rows = rows_per_expert
        self.figures: list[LayerFigures] = []
        self.tokens = 0

    @torch.no_grad()
    def read(self, ids_WQ: torch.Tensor) -> None:
        """Read windows until every expert has been asked `rows_per_expert` rows, or there are no more."""
        for layer, sample in zip(self._built.layers, self._samples, strict=True):
            layer.watch = sample.add
        module: Any = self._built.module
        try:
            for ids_BQ in torch.split(ids_WQ, WINDOWS_PER_BATCH):
                module(input_ids=ids_BQ, use_cache=False)
                self.tokens += ids_BQ.numel()
                if min(min(sample.seen_E) for sample in self._samples) >= self._rows:
                    break
        finally:
            for layer in self._built.layers:
                layer.watch = None
        self.forget_figures()

    def forget_figures(self) -> None:
        """Before another packing is chosen on the same text."""
        self.figures = [
            LayerFigures(min(sample.seen_E), sum(seen < self._rows for seen in sample.seen_E))
            for sample in self._samples
        ]

    @property
    def least_own_rows(self) -> int:
        """Of the expert that text asked least."""
        return min(figures.least_own_rows for figures in self.figures)

    @torch.no_grad()
    def choose(self, packing: Packing, layer_idx: int, name: str, logical_id: int, weight_OM: torch.Tensor) -> Packed:
        """The way that errs least."""
        figures = self.figures[layer_idx]
        nearest = pack_best(weight_OM, packing)
        rows = self._samples[layer_idx].rows_of(logical_id)
        inputs_NM = self._inputs(self._built.layers[layer_idx], name, logical_id, rows)
        if inputs_NM is None or not packing.is_scaled or len(inputs_NM) < HELD_BACK:
            figures.ways["nearest, unread"] += 1
            return nearest
        is_fit_N = torch.arange(len(inputs_NM)) % HELD_BACK != 0
        moment_MM = _moment(inputs_NM[is_fit_N], rows.count_N[is_fit_N])
        scales = best_scales(weight_OM, packing, importance_XM=moment_MM.diagonal())
        found = {
            "nearest": nearest,
            "weighted": pack(weight_OM, packing, scales_XNG=scales),
            "gptq": gptq(weight_OM, moment_MM, packing, scales_NG=scales),
        }
        scored_NM, count_N = inputs_NM[~is_fit_N], rows.count_N[~is_fit_N]
        errors = {way: _output_error(packed, weight_OM, packing, scored_NM, count_N) for way, packed in found.items()}
        way = min(errors, key=lambda way: errors[way])
        figures.ways[way] += 1
        figures.nearest += errors["nearest"]
        figures.chosen += errors[way]
        figures.output += float(((scored_NM @ weight_OM.T).square().sum(-1) * count_N).sum())
        return found[way]

    def _inputs(self, layer: SlottedExperts, name: str, logical_id: int, rows: Rows) -> torch.Tensor | None:
        """[N, M] what this matrix is multiplied with; None where it cannot be read out of the module."""
        return _hidden(layer, logical_id, rows.x_ND) if name == "down_proj" else rows.x_ND


def _moment(x_NM: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """[M, M] mean of x x^T, rows by what they count."""
    return (x_NM * count_N.unsqueeze(-1)).T @ x_NM / count_N.sum().clamp_min(1e-30)


def _output_error(
    packed: Packed, weight_OM: torch.Tensor, packing: Packing, x_NM: torch.Tensor, count_N: torch.Tensor
) -> float:
    lost_OM = unpack(packed, packing, num_columns=weight_OM.shape[-1]) - weight_OM
    return float(((x_NM @ lost_OM.T).square().sum(-1) * count_N).sum())


def _hidden(layer: SlottedExperts, logical_id: int, x_ND: torch.Tensor) -> torch.Tensor | None:
    """[N, F] what `down_proj` is given, read by the module's own code; None where it does more than multiply."""
    module: Any = layer.entry.module
    slot = layer.logical_of_slot.index(logical_id)
    own = {name: module.get_parameter(name)[slot : slot + 1].detach() for name in layer.entry.parameter_names}
    is_turned = bool(getattr(module, "is_transposed", False))
    down_OF = own["down_proj"][0].T if is_turned else own["down_proj"][0]
    num_out, num_hidden = down_OF.shape
    picked: list[torch.Tensor] = []
    silent = {name: torch.zeros_like(value) for name, value in own.items() if name.startswith("down_proj_")}
    for first in range(0, num_hidden, num_out):
        last = min(first + num_out, num_hidden)
        pick_OF = torch.zeros(num_out, num_hidden)
        pick_OF[torch.arange(last - first), torch.arange(first, last)] = 1.0
        down = (pick_OF.T if is_turned else pick_OF).unsqueeze(0).contiguous()
        picked.append(_run(layer, {**own, **silent, "down_proj": down}, x_ND)[:, : last - first])
    hidden_NF = torch.cat(picked, dim=1)
    theirs_ND = _run(layer, {**own, **silent}, x_ND)
    off = float((hidden_NF @ down_OF.T - theirs_ND).abs().max())
    return hidden_NF if off <= AGREEMENT * float(theirs_ND.abs().max().clamp_min(1e-30)) else None


def _run(layer: SlottedExperts, parameters: dict[str, torch.Tensor], x_ND: torch.Tensor) -> torch.Tensor:
    slot_N1 = torch.zeros(len(x_ND), 1, dtype=torch.long)
    with parameters_of(layer.entry, parameters):
        output: torch.Tensor = layer.compute.family_forward(x_ND, slot_N1, torch.ones(len(x_ND), 1))
    return output


def summary(figures: Sequence[LayerFigures]) -> list[dict[str, Any]]:
    return [layer.summary() for layer in figures]
