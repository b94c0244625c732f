"""A router of ours that answers as a family's own does, so that what only ours can (prefer near experts) works for a
checkpoint of any such family.

Nothing here knows a family by name: the ways in which families are known to route are tried on a few tokens, and the
one that gives the same experts and weights in every layer is taken. If none does, that is said.

T tokens, K picks, E logical experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_core.contract.router import RouterConfig
from moe_core.outcome import InvalidInput
from moe_runtime.experts.families import ExpertsModule, ModelFacts, UnsupportedModel, text_config
from moe_runtime.experts.gates import check_gates, find_gate
from moe_runtime.experts.routed import PREFIX, Routed, RouterRequest, make_routed

PROBE_TOKENS = 64
TOLERANCE = 1e-4
"""Of a weight; a softmax in another order of operations was seen to differ by 1e-6."""
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"pre_softmax": True},
    {"pre_softmax": True, "norm_topk_prob": True},
    {"score_function": "Sigmoid"},
    {"score_function": "Sigmoid", "norm_topk_prob": False},
    {"score_function": "SqrtSoftplus"},
)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a layer's experts were given."""

    x_TD: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor


@torch.no_grad()
def imitated(model: torch.nn.Module, entries: Sequence[ExpertsModule], *, facts: ModelFacts) -> Routed:
    """`model` must have weights; its experts may be off. Raises UnsupportedModel."""
    check_gates(model, entries, [find_gate(model, entry) for entry in entries])
    seen = _watch(model, entries)
    for options in _candidates(text_config(model.config)):
        try:
            routed = make_routed(model, entries, RouterRequest(RouterConfig(**options)), facts=facts, seed=0)
        except (InvalidInput, ValueError):  # these options do not go together, or not with this model
            continue
        routed.to(str(seen[0].x_TD.device))
        _take_corrections(routed)
        scale = _scale(routed, seen)
        if scale is None:
            continue
        if abs(scale - 1.0) <= TOLERANCE:
            return routed
        scaled = RouterConfig(**options, topk_scaling_factor=scale)
        exact = make_routed(model, entries, RouterRequest(scaled), facts=facts, seed=0)
        exact.fill(routed.tensors())
        return exact
    raise UnsupportedModel(facts.family, "no router of ours gives the picks and weights that its own gives")


@torch.no_grad()
def answers_alike(model: torch.nn.Module, entries: Sequence[ExpertsModule], routed: Routed) -> bool:
    """Whether the family's own routing gives the same, once its bias on the choice, if it has one, is these routers';
    then it keeps that bias.
    """
    biases = routed.tensors()
    lent: list[torch.Tensor] = []
    for layer in routed.layers:
        bias_E = biases.get(f"{PREFIX}{layer.layer_idx}.kind.bias_E")
        correction_E = layer.gate.correction()
        if bias_E is not None and correction_E is not None:
            lent.append(correction_E.copy_(bias_E))
    scale = _scale(routed, _watch(model, entries))
    if scale is not None and abs(scale - 1.0) <= TOLERANCE:
        return True
    for correction_E in lent:
        correction_E.zero_()
    return False


def _candidates(config: Any) -> Iterator[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{}]
    num_groups, group_topk = getattr(config, "n_group", None), getattr(config, "topk_group", None)
    if isinstance(num_groups, int) and isinstance(group_topk, int) and num_groups > 1:
        limits = {"num_groups": num_groups, "group_topk": group_topk}
        groups = [{**limits, "group_score": "Top2Sum"}, {**limits, "group_score": "Max"}, {}]
    for way in WAYS:
        for group in groups:
            for bias in ({}, {"enable_expert_bias": True}):
                yield {"type": "TopK", **way, **group, **bias}


def _watch(model: torch.nn.Module, entries: Sequence[ExpertsModule]) -> list[_Seen]:
    found: dict[int, _Seen] = {}

    def note(module: torch.nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        found[id(module)] = _Seen(*(*given, *named.values()))

    hooks = [entry.module.register_forward_pre_hook(note, with_kwargs=True) for entry in entries]
    device = next(model.parameters()).device
    ids_T = torch.arange(1, 1 + PROBE_TOKENS, device=device) * 7 % int(text_config(model.config).vocab_size)
    try:
        model(input_ids=ids_T.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[id(entry.module)] for entry in entries]


def _take_corrections(routed: Routed) -> None:
    """The family's own bias on the choice, where it has one and this router too."""
    tensors = routed.tensors()
    for layer in routed.layers:
        bias_E = tensors.get(f"{PREFIX}{layer.layer_idx}.kind.bias_E")
        correction_E = layer.gate.correction()
        if bias_E is not None and correction_E is not None:
            bias_E.copy_(correction_E)


def _scale(routed: Routed, seen: Sequence[_Seen]) -> float | None:
    """What the family's weights are over ours, one number for all tokens and layers; None if there is none, or if
    experts differ.
    """
    shares = []
    for layer, given in zip(routed.layers, seen, strict=True):
        routing = layer.route(given.x_TD.reshape(-1, given.x_TD.shape[-1]))
        ours_TK, order_TK = routing.expert_TK.sort(dim=-1)
        theirs_TK, their_order_TK = given.expert_TK.long().sort(dim=-1)
        if not torch.equal(ours_TK, theirs_TK):
            return None
        weight_TK = given.weight_TK.float().gather(1, their_order_TK)
        shares.append((weight_TK / routing.weight_TK.gather(1, order_TK)).reshape(-1))
    share_N = torch.cat(shares)
    mean = float(f"{float(share_N.mean()):.6g}")  # a config's own number, without the last bits of a mean
    return mean if float((share_N / mean - 1.0).abs().max()) <= TOLERANCE else None
