"""Fits what answers for each expert should it be lost, on text, and chooses by held-out error.

The picks of an expert e give pairs (x, y = expert_e(x)) with routing weights w; an answer g costs w^2 |y - g(x)|^2 per
pick, the square of what it shifts in the residual stream. Candidates, all scored on windows that the fit has not seen:

    drop        the token's other picks take the weight: g is their weighted mean
    constant    the weighted mean of y
    shared      scale * shared(x), where the layer has an always-on expert
    low_rank    reduced-rank ridge regression (Izenman 1975) with an intercept, ridge chosen by held-out error
    stand_in    the other expert that is nearest on e's own tokens

Only second moments are kept, so that memory does not grow with the text; error is a quadratic form in them. Runs in one
process on the whole model, in passes over groups of layers that fit MEMORY_BYTES.

N picks of one expert, D model, A = D + 1 (x and a one for the intercept), E logical experts, r rank of the map.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_runtime.experts.families import ExpertsModule, facts_of, find_experts, shared_expert_of
from moe_runtime.experts.generalists import Generalists, LayerGeneralists
from moe_runtime.experts.ladder import SharedExpert
from moe_runtime.experts.routed import RoutedLayer, restored
from moe_runtime.experts.router_files import SavedRouter

HELDOUT_SHARE = 0.3
WINDOWS_PER_BATCH = 16
MEMORY_BYTES = 1 << 30
"""Of the second moments of one pass; one layer's always fit."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the mean variance of x."""
PROBES = 128
"""Held-out picks per expert on which all other experts are tried as stand-ins."""
WORTHWHILE = 0.98
"""A stand-in must have at most this share of the best local answer's error: it costs an exchange, a map none."""


@dataclass
class Moments:
    """Weighted second moments of the picks of every expert of one layer. float64."""

    xx_EAA: torch.Tensor
    xy_EAD: torch.Tensor
    yy_E: torch.Tensor
    weight_E: torch.Tensor
    count_E: torch.Tensor
    drop_E: torch.Tensor
    """Summed error of drop and renormalise."""
    zz_E: torch.Tensor
    zy_E: torch.Tensor
    """Of z = shared(x): z.z and z.y."""

    @classmethod
    def zero(cls, num_experts: int, dim: int) -> "Moments":
        def of(*shape: int) -> torch.Tensor:
            return torch.zeros(num_experts, *shape, dtype=torch.float64)

        return cls(of(dim + 1, dim + 1), of(dim + 1, dim), of(), of(), of(), of(), of(), of())


@dataclass
class Probe:
    """A few held-out picks of one expert: inputs, outputs, squared weights."""

    x: list[torch.Tensor] = field(default_factory=list)
    y: list[torch.Tensor] = field(default_factory=list)
    q: list[torch.Tensor] = field(default_factory=list)
    count: int = 0


@dataclass(frozen=True, slots=True)
class _Map:
    """down [r, D], up [r, D], bias [D]; a map has either these or a scale for the shared expert, never both."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    scale: float = 0.0


class _Watcher:
    """Sees what a layer's experts are asked during a forward, and adds it to the moments."""

    def __init__(
        self,
        entry: ExpertsModule,
        num_experts: int,
        dim: int,
        shared: SharedExpert | None,
        router: RoutedLayer | None = None,
    ) -> None:
        self.entry, self.num_experts, self.shared, self.router = entry, num_experts, shared, router
        self.fit, self.heldout = Moments.zero(num_experts, dim), Moments.zero(num_experts, dim)
        self.probes = [Probe() for _ in range(num_experts)]
        self.is_heldout = False
        self._original: Any = entry.module.forward

    def __enter__(self) -> "_Watcher":
        self.entry.module.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        self.entry.module.forward = self._original

    def run_expert(self, x_ND: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._original(x_ND, expert_N.unsqueeze(-1), torch.ones(len(x_ND), 1, dtype=x_ND.dtype))
        return output

    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        x_TD, expert_TK, weight_TK = (*args, *kwargs.values())
        if self.router is not None:
            return self.router.mix(x_TD, None, self._mixture, group=None)
        return self._mixture(x_TD, expert_TK, weight_TK)

    def _mixture(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        of_tokens: bool = True,  # noqa: ARG002 - experts do not care what their rows are
    ) -> torch.Tensor:
        num_tokens, top_k = expert_TK.shape
        # a pick that nobody takes is computed like any other: its weight is zero
        taken_N = expert_TK.clamp_min(0).reshape(-1)
        y_TKD = self.run_expert(x_TD.repeat_interleave(top_k, 0), taken_N).view(num_tokens, top_k, -1)
        mixed_TKD = y_TKD * weight_TK.unsqueeze(-1)
        mixture_TD: torch.Tensor = mixed_TKD.sum(1)
        others_TK1 = (weight_TK.sum(-1, keepdim=True) - weight_TK).unsqueeze(-1)
        others_TKD = (mixture_TD.unsqueeze(1) - mixed_TKD) / others_TK1.clamp_min(1e-9)
        drop_TK = (y_TKD - others_TKD).square().sum(-1)
        z_TD = self.shared(x_TD) if self.shared is not None else torch.zeros_like(x_TD)
        self._add(x_TD, expert_TK, weight_TK, y_TKD, drop_TK, z_TD)
        return mixture_TD.to(x_TD.dtype)

    def _add(  # noqa: PLR0917 - one step's arrays, all by position in the math above
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        y_TKD: torch.Tensor,
        drop_TK: torch.Tensor,
        z_TD: torch.Tensor,
    ) -> None:
        moments = self.heldout if self.is_heldout else self.fit
        x_TA = torch.cat([x_TD, torch.ones_like(x_TD[:, :1])], dim=1)
        for e in range(self.num_experts):
            token_N, pick_N = torch.nonzero(expert_TK == e, as_tuple=True)
            if token_N.numel() == 0:
                continue
            x_NA, y_ND, z_ND = x_TA[token_N], y_TKD[token_N, pick_N], z_TD[token_N]
            q_N = weight_TK[token_N, pick_N].float().square()
            qy_ND = y_ND * q_N.unsqueeze(-1)
            moments.xx_EAA[e] += x_NA.T @ (x_NA * q_N.unsqueeze(-1))
            moments.xy_EAD[e] += x_NA.T @ qy_ND
            moments.yy_E[e] += (qy_ND * y_ND).sum()
            moments.weight_E[e] += q_N.sum()
            moments.count_E[e] += len(q_N)
            moments.drop_E[e] += (q_N * drop_TK[token_N, pick_N]).sum()
            moments.zz_E[e] += (q_N * z_ND.square().sum(-1)).sum()
            moments.zy_E[e] += (qy_ND * z_ND).sum()
            probe = self.probes[e]
            if self.is_heldout and probe.count < PROBES:
                probe.x.append(x_NA[:PROBES, :-1])
                probe.y.append(y_ND[:PROBES])
                probe.q.append(q_N[:PROBES])
                probe.count += len(q_N)


@torch.no_grad()
def calibrate(
    model: torch.nn.Module,
    ids_NQ: torch.Tensor,
    *,
    map_rank: int = 16,
    router: SavedRouter | None = None,
) -> Generalists:
    """Fit every (layer, expert) of a whole transformers model on windows of tokens [N, Q]; the last HELDOUT_SHARE of
    the windows only scores. Raises UnsupportedModel. CPU, float32.

    router: what routes instead of the family's own.
    """
    entries = find_experts(model)
    layers_of: Sequence[RoutedLayer | None] = [None] * len(entries)
    if router is not None:
        routed = restored(model, entries, router, facts=facts_of(model.config, entries))
        routed.watch(model)
        layers_of = routed.layers
    num_experts, dim = entries[0].module.num_experts, int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
    assert isinstance(num_experts, int)
    num_fit = max(1, round(len(ids_NQ) * (1 - HELDOUT_SHARE)))
    per_layer = 2 * 8 * num_experts * (dim + 1) * (2 * dim + 1)
    per_pass = max(1, MEMORY_BYTES // per_layer)
    layers: list[LayerGeneralists] = []
    errors: list[dict[str, list[float]]] = []
    for first in range(0, len(entries), per_pass):
        watchers = [
            _Watcher(entry, num_experts, dim, shared_expert_of(model, entry), layer_router)
            for entry, layer_router in list(zip(entries, layers_of, strict=True))[first : first + per_pass]
        ]
        for ids_BQ, is_heldout in _batches(ids_NQ, num_fit):
            _watch(model, ids_BQ, watchers, is_heldout=is_heldout)
        for watcher in watchers:
            layer, layer_errors = _choose(watcher, map_rank=min(map_rank, dim))
            layers.append(layer)
            errors.append(layer_errors)
    report = {"fit_tokens": num_fit * ids_NQ.shape[1], "map_rank": map_rank, "relative_error": errors}
    return Generalists(tuple(layers), report)


def _batches(ids_NQ: torch.Tensor, num_fit: int) -> Iterator[tuple[torch.Tensor, bool]]:
    for part, is_heldout in ((ids_NQ[:num_fit], False), (ids_NQ[num_fit:], True)):
        for batch in torch.split(part, WINDOWS_PER_BATCH):
            if len(batch):
                yield batch, is_heldout


def _watch(model: Any, ids_BQ: torch.Tensor, watchers: list[_Watcher], *, is_heldout: bool) -> None:
    with contextlib.ExitStack() as stack:
        for watcher in watchers:
            watcher.is_heldout = is_heldout
            stack.enter_context(watcher)
        model(input_ids=ids_BQ, use_cache=False, logits_to_keep=1)


def _choose(watcher: _Watcher, *, map_rank: int) -> tuple[LayerGeneralists, dict[str, list[float]]]:
    """The best answer per expert, and every candidate's held-out error relative to answering nothing."""
    num_experts, dim = watcher.num_experts, watcher.fit.xy_EAD.shape[-1]
    down_ERD, up_ERD = torch.zeros(num_experts, map_rank, dim), torch.zeros(num_experts, map_rank, dim)
    bias_ED, scale_E = torch.zeros(num_experts, dim), torch.zeros(num_experts)
    stand_in_error_EE = _stand_in_errors(watcher)
    kinds: list[str] = []
    has_map: list[bool] = []
    stand_ins: list[int] = []
    relative: dict[str, list[float]] = {name: [] for name in ("drop", "constant", "shared", "low_rank", "stand_in")}
    for e in range(num_experts):
        heldout = watcher.heldout if watcher.heldout.count_E[e] > 0 else watcher.fit
        error: dict[str, float] = {"drop": float(heldout.drop_E[e])}
        maps: dict[str, _Map] = {}
        if watcher.fit.weight_E[e] > 0:
            maps = _fit_maps(watcher, e, map_rank=map_rank)
            error |= {name: _map_error(heldout, e, fitted) for name, fitted in maps.items()}
        nothing = float(heldout.yy_E[e])
        kind = min(error, key=lambda name: error[name])
        if kind in maps:
            best = maps[kind]
            down_ERD[e], up_ERD[e], bias_ED[e], scale_E[e] = best.down, best.up, best.bias, best.scale
        has_map.append(kind in maps)
        nearest = int(stand_in_error_EE[e].argmin())
        is_better = False
        if math.isfinite(stand_in_error_EE[e, nearest]):
            error["stand_in"] = float(stand_in_error_EE[e, nearest]) * nothing
            is_better = error["stand_in"] < WORTHWHILE * error[kind]
        stand_ins.append(nearest if is_better else -1)
        kinds.append("stand_in" if is_better else kind)
        for name, values in relative.items():
            values.append(round(error.get(name, nothing) / nothing, 4) if nothing else 1.0)
    return (
        LayerGeneralists(down_ERD, up_ERD, bias_ED, scale_E, tuple(has_map), tuple(stand_ins), tuple(kinds)),
        relative,
    )


def _fit_maps(watcher: _Watcher, e: int, *, map_rank: int) -> dict[str, _Map]:
    """Candidate maps by kind."""
    fit = watcher.fit
    dim = fit.xy_EAD.shape[-1]
    weight = fit.weight_E[e].clamp_min(1e-30)
    mean_x, mean_y = fit.xx_EAA[e, -1, :-1] / weight, fit.xy_EAD[e, -1] / weight
    none = torch.zeros(map_rank, dim, dtype=torch.float64)
    maps = {"constant": _Map(none, none, mean_y)}
    if fit.zz_E[e] > 0:
        maps["shared"] = _Map(none, none, torch.zeros_like(mean_y), float(fit.zy_E[e] / fit.zz_E[e]))
    # centred moments: the intercept is not penalised
    cov_xx = fit.xx_EAA[e, :-1, :-1] / weight - torch.outer(mean_x, mean_x)
    cov_xy = fit.xy_EAD[e, :-1] / weight - torch.outer(mean_x, mean_y)
    heldout = watcher.heldout if watcher.heldout.count_E[e] > 0 else fit
    ridge_unit = cov_xx.trace() / dim * torch.eye(dim, dtype=torch.float64)
    slopes = [torch.linalg.solve(cov_xx + (ridge + 1e-9) * ridge_unit, cov_xy) for ridge in RIDGES]
    eye = torch.eye(dim, dtype=torch.float64)
    slope = min(slopes, key=lambda w: _map_error(heldout, e, _Map(w.T, eye, mean_y - mean_x @ w)))
    # reduced rank: keep the directions of the output along which the fit varies most
    _, vectors = torch.linalg.eigh(slope.T @ cov_xx @ slope)
    basis = vectors[:, -map_rank:]
    maps["low_rank"] = _Map((slope @ basis).T, basis.T, mean_y - mean_x @ slope @ basis @ basis.T)
    return maps


def _map_error(moments: Moments, e: int, fitted: _Map) -> float:
    """Sum over picks of q |y - g(x)|^2."""
    scale = fitted.scale
    if scale:
        return float(moments.yy_E[e] - 2 * scale * moments.zy_E[e] + scale * scale * moments.zz_E[e])
    slope = torch.cat([fitted.down.T @ fitted.up, fitted.bias.unsqueeze(0)])
    cross = (slope * moments.xy_EAD[e]).sum()
    return float(moments.yy_E[e] - 2 * cross + (slope * (moments.xx_EAA[e] @ slope)).sum())


def _stand_in_errors(watcher: _Watcher) -> torch.Tensor:
    """[E, E] error, relative to answering nothing, of expert j on the picks of e; infinite for itself."""
    errors_EE = torch.full((watcher.num_experts, watcher.num_experts), float("inf"))
    for e, probe in enumerate(watcher.probes):
        if probe.count == 0:
            continue
        x_ND, y_ND, q_N = torch.cat(probe.x), torch.cat(probe.y), torch.cat(probe.q)
        others = [j for j in range(watcher.num_experts) if j != e]
        expert_M = torch.tensor(others).repeat_interleave(len(x_ND))
        y_JND = watcher.run_expert(x_ND.repeat(len(others), 1), expert_M).view(len(others), *y_ND.shape)
        nothing = (q_N * y_ND.square().sum(-1)).sum().clamp_min(1e-30)
        errors_EE[e, others] = (q_N * (y_JND - y_ND).square().sum(-1)).sum(-1) / nothing
    return errors_EE
