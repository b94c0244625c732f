"""Routers of ours in front of a model's experts: what a layer's tokens are asked with, and what becomes of the answer.

    routed = make_routed(model, entries, RouterRequest(config), facts=facts, seed=0)   # one RoutedLayer per MoE layer
    routed.watch(model)                                                # what a forward's tokens are
    routed.use_layouts(layouts)                                        # at each new epoch
    routed.begin(step=7, progress=0.1, group=group)                    # before the forward of a training step
    output_TD = routed.layers[i].mix(x_TD, valid_V, run, group=group)  # what a layer's entry calls
    routed.losses()                                                    # what the step adds to the text's loss

The family's gate keeps its module and its weight; what it computes itself is left unused. Parameters and tables of the
routers are dense tensors, the same on all ranks, under names that begin with `moerator_router.`.

T tokens, D model, E logical experts, K picks, P rows that Soft MoE mixes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from moe_core.contract.router import LocalityConfig, RouterConfig
from moe_core.outcome import InvalidInput
from moe_runtime.dispatch.group_face import Group
from moe_runtime.experts.families import ExpertsModule, ModelFacts
from moe_runtime.experts.gates import Gate, find_gate
from moe_runtime.experts.router_files import SavedRouter
from moe_runtime.router.custom import CustomRouter
from moe_runtime.router.face import NO_EXPERT, Layout, Moment, Router, Routing, SoftRows, SumOverRanks, Tokens
from moe_runtime.router.registry import build_router

PREFIX = "moerator_router."


class RunPicks(Protocol):
    """The experts, wherever they live."""

    def __call__(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, /, *, of_tokens: bool = True
    ) -> torch.Tensor:
        """[T, D] each row's weighted sum over its picks; NO_EXPERT gives nothing. `of_tokens`: a row is a token."""


@dataclass(frozen=True, slots=True)
class RouterRequest:
    """A router for a model that has none of ours yet. token_counts_V: how often each token id occurs in its text."""

    config: RouterConfig
    token_counts_V: torch.Tensor | None = None


@dataclass(slots=True)
class _Now:
    """The forward that is next, for all layers."""

    seed: int
    class_first_ids: torch.Tensor | None = None
    moment: Moment = field(default_factory=Moment)
    position: int = 0
    ids_T: torch.Tensor | None = None
    sequence_T: torch.Tensor | None = None
    position_T: torch.Tensor | None = None
    losses: list[dict[str, torch.Tensor]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class RoutedLayer:
    """One MoE layer's gate and router."""

    def __init__(self, layer_idx: int, gate: Gate, router: Router, *, num_experts: int, now: _Now) -> None:
        self.layer_idx, self.gate, self.router = layer_idx, gate, router
        self._num_experts, self._now = num_experts, now
        self.may_differ_by_rank = isinstance(router, CustomRouter)
        """Whether a token's number of picks, or of passes, may be another one on another rank."""

    def route(self, x_TD: torch.Tensor, valid_V: torch.Tensor | None = None) -> Routing:
        """Of tokens of the running forward: those that `valid_V` (flat indices) names, None: all."""
        now = self._now
        ids_T, sequence_T, position_T = (
            told if told is None or valid_V is None else told[valid_V]
            for told in (now.ids_T, now.sequence_T, now.position_T)
        )
        moment = self._moment(x_TD.device)
        logits_TE = self.gate.logits(self.router.before_gate(x_TD, moment))
        class_T = None
        if now.class_first_ids is not None and ids_T is not None:
            class_T = torch.bucketize(ids_T, now.class_first_ids.to(ids_T.device), right=True)
        tokens = Tokens(x_TD, logits_TE, ids_T=ids_T, sequence_T=sequence_T, position_T=position_T, class_T=class_T)
        routing = self.router(tokens, moment)
        for name, count in routing.counts.items():
            now.counts[name] = now.counts.get(name, 0) + count
        if moment.is_training:
            now.losses.append(routing.losses)
        return routing

    def mix(
        self, x_TD: torch.Tensor, valid_V: torch.Tensor | None, run: RunPicks, *, group: Group | None
    ) -> torch.Tensor:
        """[T, D] the layer's output for these tokens. Raises GroupFault."""
        routing = self.route(x_TD, valid_V)
        passes = 1 if routing.pass_TK is None else routing.passes
        if self.may_differ_by_rank and group is not None:
            # a rank that made fewer exchanges than another would take the rows of one for those of the next
            passes = max(told for (told,) in group.all_gather_ints((passes,)))
        parts = [self._pass(number, passes, x_TD, routing, run) for number in range(passes)]
        return parts[0] if passes == 1 else torch.stack(parts).sum(dim=0)

    def _pass(self, number: int, passes: int, x_TD: torch.Tensor, routing: Routing, run: RunPicks) -> torch.Tensor:
        if routing.soft is not None and number == 0:
            return self._mix_rows(x_TD, routing.soft, run)
        expert_TK, weight_TK = routing.expert_TK, routing.weight_TK.to(x_TD.dtype)
        if passes > 1:
            pass_TK = torch.zeros_like(expert_TK) if routing.pass_TK is None else routing.pass_TK
            later_TK = pass_TK != number
            expert_TK, weight_TK = expert_TK.masked_fill(later_TK, NO_EXPERT), weight_TK.masked_fill(later_TK, 0.0)
        return run(x_TD, expert_TK, weight_TK)

    def _mix_rows(self, x_TD: torch.Tensor, soft: SoftRows, run: RunPicks) -> torch.Tensor:
        mix_TP, share_TP = soft.mix_TP.to(x_TD.dtype), soft.share_TP.to(x_TD.dtype)
        row_P1 = torch.arange(mix_TP.shape[1], device=x_TD.device).unsqueeze(-1)
        expert_P1 = row_P1 // max(1, mix_TP.shape[1] // self._num_experts)
        ones_P1 = torch.ones_like(expert_P1, dtype=x_TD.dtype)
        return share_TP @ run(mix_TP.T @ x_TD, expert_P1, ones_P1, of_tokens=False)

    def _moment(self, device: torch.device) -> Moment:
        now = self._now
        if not now.moment.is_training:
            return now.moment
        # a step that is run again draws the same; every step, layer and rank draws something else
        generator = torch.Generator(device)
        generator.manual_seed(_seed(now.seed, now.moment.step, self.layer_idx, now.position))
        return replace(now.moment, generator=generator)


class Routed:
    """The routers of all layers. Hears from a hook on the model which tokens a forward has."""

    def __init__(self, config: RouterConfig, layers: Sequence[RoutedLayer], now: _Now) -> None:
        self.config, self.layers, self._now = config, tuple(layers), now
        self._scores_whole_texts = False
        self._modules = torch.nn.ModuleList([layer.router for layer in layers])  # type: ignore[misc]

    @property
    def may_differ_by_rank(self) -> bool:
        """Whether what a router answers, and how it calls it, may be another on another rank."""
        return any(layer.may_differ_by_rank for layer in self.layers)

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's picks depend on tokens that come after it."""
        return any(layer.router.looks_ahead for layer in self.layers)

    def losses(self) -> dict[str, torch.Tensor]:
        """Of the last training forward, by name: scaled, mean over layers."""
        found: dict[str, list[torch.Tensor]] = {}
        for of_layer in self._now.losses:
            for name, loss in of_layer.items():
                found.setdefault(name, []).append(loss)
        return {name: torch.stack(terms).sum() / len(self.layers) for name, terms in sorted(found.items())}

    @property
    def counts(self) -> Mapping[str, int]:
        """What the routers counted since the last `forget`."""
        return dict(self._now.counts)

    def begin(self, *, step: int, progress: float, group: Group | None) -> None:
        """The next forward is of this training step."""
        self.forget()
        self._now.position = 0 if group is None else group.position
        self._now.moment = Moment(
            is_training=True, step=step, progress=progress, sum_over_ranks=None if group is None else _sum_over(group)
        )

    def forget(self) -> None:
        """No training step is under way, and nothing was counted."""
        self._now.moment = Moment(scores_whole_texts=self._scores_whole_texts)
        self._now.losses, self._now.counts = [], {}

    @contextmanager
    def scoring_whole_texts(self) -> Iterator[None]:
        """Forwards in which tokens compete with each other as in training, so that what is told of one may leak what
        comes after it.
        """
        self._scores_whole_texts = True
        self.forget()
        try:
            yield
        finally:
            self._scores_whole_texts = False
            self.forget()

    def use_layouts(self, layouts: Sequence[Layout]) -> None:
        """Of all layers, under the map and the living ranks of the epoch."""
        for layer, layout in zip(self.layers, layouts, strict=True):
            layer.router.use_layout(layout)

    def after_step(self, load_LE: torch.Tensor) -> None:
        """[L, E] picks of all ranks in the step that is committed."""
        for layer, load_E in zip(self.layers, load_LE, strict=True):
            layer.router.after_step(load_E)

    def watch(self, model: torch.nn.Module) -> None:
        """Learn from each forward of `model` which tokens it is given."""

        def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            ids_BQ = named.get("input_ids", given[0] if given else None)
            self._now.ids_T = self._now.sequence_T = self._now.position_T = None
            if isinstance(ids_BQ, torch.Tensor):
                num_rows, length = ids_BQ.shape
                places_BQ = named.get("position_ids")
                if places_BQ is None:
                    places_BQ = torch.arange(length, device=ids_BQ.device)
                elif places_BQ.ndim == 3:  # a family that also counts rows and columns of pictures
                    places_BQ = places_BQ[0]
                self._now.ids_T = ids_BQ.reshape(-1)
                self._now.position_T = places_BQ.expand(num_rows, length).reshape(-1)
                self._now.sequence_T = torch.arange(num_rows, device=ids_BQ.device).repeat_interleave(length)

        model.register_forward_pre_hook(note, with_kwargs=True)

    # ---------------------------------------------------------------- tensors

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((PREFIX + name, parameter) for name, parameter in self._modules.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that a checkpoint holds."""
        saved = self._modules.state_dict()
        return ((PREFIX + name, buffer) for name, buffer in self._modules.named_buffers() if name in saved)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint holds, the live ones."""
        return {PREFIX + name: tensor for name, tensor in self._modules.state_dict().items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises InvalidInput unless these are all of this model's routers' tensors, and no others."""
        own = self.tensors()
        shapes, given = ({name: list(t.shape) for name, t in side.items()} for side in (own, tensors))
        if shapes != given:
            odd = sorted(name for name in {*shapes, *given} if shapes.get(name) != given.get(name))
            raise InvalidInput(
                f"router tensors do not fit: {odd[0]} must be {shapes.get(odd[0])}, is {given.get(odd[0])}"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def to(self, device: str) -> None:
        self._modules.to(device)

    def zero_grad(self) -> None:
        self._modules.zero_grad(set_to_none=True)


def make_routed(
    model: torch.nn.Module,
    entries: Sequence[ExpertsModule],
    asked: RouterRequest,
    *,
    facts: ModelFacts,
    seed: int,
) -> Routed:
    """Routers for `model`, which may have no weights yet; `watch` comes next. Raises UnsupportedModel, InvalidInput."""
    starts = asked.config.class_first_ids
    now = _Now(seed, class_first_ids=None if starts is None else torch.tensor(starts))
    counts_V = asked.token_counts_V
    if counts_V is not None:  # ids beyond the text's do not occur
        counts_V = torch.nn.functional.pad(counts_V, (0, facts.vocab_size - len(counts_V)))
    layers = []
    for layer_idx, entry in enumerate(entries):
        gate = find_gate(model, entry)
        with torch.random.fork_rng(devices=[]):  # what a router of the user's own draws is the same on all ranks, too
            torch.manual_seed(_seed(seed, layer_idx))
            router = build_router(
                asked.config,
                num_experts=entry.num_experts,
                top_k=facts.top_k,
                dim=gate.dim,
                layer_idx=layer_idx,
                vocab_size=facts.vocab_size,
                token_counts_V=counts_V,
                seed=seed,
            )
        if asked.config.type == "Frozen":
            gate.holder.get_parameter("weight").requires_grad_(False)
        layers.append(RoutedLayer(layer_idx, gate, router, num_experts=entry.num_experts, now=now))
    return Routed(asked.config, layers, now)


def restored(
    model: torch.nn.Module, entries: Sequence[ExpertsModule], saved: SavedRouter, *, facts: ModelFacts
) -> Routed:
    """The routers of a checkpoint; `watch` comes next. Raises UnsupportedModel, InvalidInput."""
    any_counts_V = torch.ones(facts.vocab_size)  # what was made of the real ones is among the tensors
    routed = make_routed(model, entries, RouterRequest(saved.config, any_counts_V), facts=facts, seed=0)
    routed.fill(saved.tensors)
    return routed


def with_locality(
    model: torch.nn.Module,
    entries: Sequence[ExpertsModule],
    routed: Routed,
    locality: LocalityConfig,
    *,
    facts: ModelFacts,
) -> Routed:
    """The same routers, which prefer near experts. Raises InvalidInput for a type that cannot."""
    options: dict[str, Any] = {
        "locality_bias": locality.bias,
        "locality_budget_percent": locality.budget_percent,
        "locality_by": locality.by,
    }
    asked = RouterConfig.parse(json.dumps(routed.config.model_dump(exclude_none=True) | options))
    return restored(model, entries, SavedRouter(asked, routed.tensors()), facts=facts)


def _sum_over(group: Group) -> SumOverRanks:
    def summed(tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.detach().clone()
        if group.size > 1:
            group.all_reduce_sum(total)
        return total

    return summed


def _seed(*parts: int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
