"""Tokens and moments that the routers' tests share, and plain loops in numpy to hold routers against."""

from typing import Any, ClassVar

import numpy as np
import torch

from moe_core.contract.router import RouterConfig
from moe_runtime.errors import GroupFault
from moe_runtime.router.check import checked
from moe_runtime.router.face import Moment, Routing, SoftRows, Tokens
from moe_runtime.router.layer import LayerRouter
from moe_runtime.router.registry import build_router

DIM = 16


LOSSES: dict[str, Any] = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
CASES: list[dict[str, Any]] = [
    {"type": "TopK", **LOSSES, "importance_loss_coeff": 0.1, "load_balancing_type": "SeqAuxLoss"},
    {"type": "TopK", "num_groups": 4, "group_topk": 2, "score_function": "Sigmoid", "enable_expert_bias": True},
    {"type": "TopK", "expert_capacity_factor": 1.0, "overflow": "Reroute", "adaptive_capacity_decay": 0.9},
    {
        "type": "TopK",
        "expert_capacity_factor": 1.0,
        "overflow": "Queue",
        "class_capacity_percents": (70, 30),
        "class_first_ids": (97,),
    },
    {"type": "TopK", "expert_dropout": 0.3, "input_jitter_eps": 0.01, "locality_bias": 1.0},
    {"type": "TopK", "locality_bias": 1.0, "locality_by": "Domain", "locality_budget_percent": 10},
    {"type": "Switch", **LOSSES, "expert_capacity_factor": 1.25},
    {"type": "NoisyTopK", "load_loss_coeff": 0.1, **LOSSES, "expert_capacity_factor": 1.0},
    {"type": "GumbelTopK", "expert_capacity_factor": 1.0, "overflow": "Reroute"},
    {"type": "TopP", "entropy_loss_coeff": 0.01, "expert_capacity_factor": 1.0, "overflow": "Reroute"},
    {"type": "AnnealedTopK", **LOSSES, "expert_capacity_factor": 1.0},
    {"type": "Hierarchical", "num_groups": 4, "group_topk": 2, "group_aux_loss_coeff": 0.1, **LOSSES},
    {
        **{"type": "Hierarchical", "num_groups": 4, "group_topk": 1, "expert_capacity_factor": 0.7},
        "overflow": "Reroute",
    },
    {"type": "ExpertChoice", "z_loss_coeff": 0.1},
    {"type": "SoftMoE"},
    {"type": "Sinkhorn", "expert_capacity_factor": 1.0},
    {"type": "Base", "z_loss_coeff": 0.1},
    {"type": "Hash", "expert_capacity_factor": 1.0, "overflow": "Reroute"},
    {"type": "Hash", "hash_table": "Balanced"},
    {"type": "Heuristic", "heuristic": "Position", "expert_capacity_factor": 0.5},
    {
        "type": "Heuristic",
        "heuristic": "Class",
        "class_first_ids": (97,),
        **LOSSES,
        "expert_capacity_factor": 1.0,
        "overflow": "Reroute",
    },
    {"type": "Frozen"},
    {"type": "Frozen", "frozen_gate": "Model", "pre_softmax": True},
    {"type": "Cached", **LOSSES},
]
CASE_NAMES = [f"{case['type']}-{number}" for number, case in enumerate(CASES)]
"""Options that every kind of router is tried with, capacity and losses among them."""


def make_tokens(num_tokens: int, num_experts: int, *, seed: int = 0, skew: float = 0.0, rows: int = 2) -> Tokens:
    """`skew` makes the logits of low experts higher, by so much from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, DIM, generator=generator)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    length = max(1, -(-num_tokens // rows))
    return Tokens(
        x_TD=x_TD,
        logits_TE=logits_TE - skew * torch.arange(num_experts),
        ids_T=torch.randint(0, 64, (num_tokens,), generator=generator),
        sequence_T=torch.arange(num_tokens) // length,
        position_T=torch.arange(num_tokens) % length,
        class_T=torch.arange(num_tokens) % 2,
    )


def training(*, seed: int = 0, progress: float = 0.0, **more: Any) -> Moment:
    return Moment(is_training=True, progress=progress, generator=torch.Generator().manual_seed(seed), **more)


SERVING = Moment()
WHOLE_TEXTS = Moment(scores_whole_texts=True)


def make_router(num_experts: int, top_k: int, *, layer_idx: int = 0, **options: Any) -> LayerRouter:
    counts_V = torch.arange(64, 0, -1)
    router = build_router(
        RouterConfig(**options),
        num_experts=num_experts,
        top_k=top_k,
        dim=DIM,
        layer_idx=layer_idx,
        vocab_size=64,
        token_counts_V=counts_V if options.get("hash_table") == "Balanced" else None,
    )
    assert isinstance(router, LayerRouter)
    return router


def route(router: LayerRouter, tokens: Tokens, moment: Moment = SERVING) -> Routing:
    """The answer, checked."""
    assert tokens.logits_TE is not None
    return checked(router(tokens, moment), tokens, num_experts=tokens.logits_TE.shape[1])


def softmax(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    power = np.exp(row - row.max())
    return np.asarray(power / power.sum())


def dense(routing: Routing, num_experts: int) -> torch.Tensor:
    """[T, E] weights, whatever the order of picks."""
    weight_TE = routing.weight_TK.new_zeros(routing.expert_TK.shape[0], num_experts)
    return weight_TE.scatter_add(1, routing.expert_TK.clamp_min(0), routing.weight_TK.detach())


def fail(error: Exception) -> None:
    raise error


class Mine(torch.nn.Module):
    """A user's router: everybody takes the expert that the options name; `wrong` spoils the answer."""

    looks_ahead = False
    seen: ClassVar[list[torch.Tensor]] = []

    def __init__(self, *, num_experts: int, top_k: int, dim: int, layer_idx: int, options: dict[str, str]) -> None:
        super().__init__()
        self.expert, self.wrong = int(options["expert"]), options.get("wrong", "")

    def forward(self, tokens: Tokens, moment: Moment) -> Any:
        num_tokens = tokens.x_TD.shape[0]
        expert_TK, weight_TK = torch.full((num_tokens, 1), self.expert), torch.ones(num_tokens, 1)
        wrongs: dict[str, Any] = {
            "": lambda: Routing(expert_TK, weight_TK),
            "type": lambda: (expert_TK, weight_TK),
            "shape": lambda: Routing(expert_TK, weight_TK[1:]),
            "dtype": lambda: Routing(expert_TK.int(), weight_TK),
            "nan": lambda: Routing(expert_TK, weight_TK * float("nan")),
            "twice": lambda: Routing(expert_TK.repeat(1, 2), weight_TK.repeat(1, 2)),
            "nobody": lambda: Routing(expert_TK * 0 - 1, weight_TK),
            "loss": lambda: Routing(expert_TK, weight_TK, losses={"mine": torch.ones(2)}),
            "mistake": lambda: fail(KeyError("an expert")),
            "gone": lambda: fail(GroupFault("a peer is gone")),
            "count": lambda: Routing(expert_TK, weight_TK, counts={"mine": 0.5}),  # type: ignore[dict-item]
            "passes": lambda: Routing(expert_TK, weight_TK, pass_TK=expert_TK * 0, passes=0),
            "soft": lambda: Routing(expert_TK, weight_TK, soft=SoftRows(torch.ones(4, 8), torch.ones(4, 8))),
        }
        return wrongs[self.wrong]()

    def after_step(self, load_E: torch.Tensor) -> None:
        self.seen.append(load_E)


class Unlike(torch.nn.Module):
    """A user's router that is another one on every rank, in what the options name."""

    looks_ahead = False
    rank = 0

    def __init__(self, *, num_experts: int, top_k: int, dim: int, layer_idx: int, options: dict[str, str]) -> None:
        super().__init__()
        self.top_k, self.what = top_k, options["what"]
        self.scale = torch.nn.Parameter(torch.ones(()) + (self.rank if self.what == "beginning" else 0))
        if self.what == "shape":
            self.more = torch.nn.Parameter(torch.ones(1 + self.rank))

    def forward(self, tokens: Tokens, moment: Moment) -> Routing:
        assert tokens.logits_TE is not None
        weight_TK, expert_TK = (tokens.logits_TE * self.scale).softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.what == "names":
            return Routing(expert_TK, weight_TK, losses={f"of rank {self.rank}": weight_TK.sum() * 0.0})
        if self.what == "passes" and self.rank:
            pass_TK = torch.arange(self.top_k).expand_as(expert_TK)
            return Routing(expert_TK, weight_TK, pass_TK=pass_TK, passes=self.top_k + self.rank)
        return Routing(expert_TK, weight_TK)


class NoRouter:
    def __init__(self, **_: Any) -> None: ...
