"""Which router a model's layers get, and with which options: read by the spec, checked once, built by the runtime.

An option that a type does not use is refused, and one that is not given (None) takes its default: `router_rules`. Names
follow Megatron's, without `--moe-` and `router-`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moe_core.contract.base import WireModel
from moe_core.contract.router_rules import DEFAULTS, RouterType, why_refused

Coefficient = Annotated[float, Field(ge=0.0, le=1e6)]
TokenId = Annotated[int, Field(ge=1, le=2147483647)]
CLASS_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
Percent = Annotated[int, Field(ge=0, le=100)]


class RouterConfig(WireModel):
    """`type` and the options it uses; see the fields' descriptions. Refuses what `why_refused` tells."""

    type: RouterType

    # which experts, with what weight
    score_function: Literal["Softmax", "Sigmoid", "SqrtSoftplus"] | None = Field(
        default=None, description="What turns a gate's logits into scores."
    )
    pre_softmax: bool | None = Field(
        default=None, description="Softmax over all experts before the choice; false: over the chosen ones only."
    )
    norm_topk_prob: bool | None = Field(
        default=None,
        description="Weights of a token's chosen experts are divided by their sum; by default so unless preSoftmax.",
    )
    topk_scaling_factor: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        default=None, description="Weights are multiplied by it last."
    )
    num_groups: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="The experts are cut into so many groups of neighbours, e.g. one per node."
    )
    group_topk: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="A token takes experts of at most so many groups."
    )
    group_score: Literal["Top2Sum", "Max"] | None = Field(
        default=None, description="What groups compete by: their two best scores (DeepSeek-V3) or the best (V2)."
    )
    group_by: Literal["Index", "Device"] | None = Field(
        default=None,
        description="Index: numGroups groups of neighbours. Device: a group is what one rank holds, whatever the map.",
    )
    enable_expert_bias: bool | None = Field(
        default=None, description="Balance by a bias on the choice alone, moved after each step (no auxiliary loss)."
    )
    bias_update_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="How far the bias moves in one step."
    )
    input_jitter_eps: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="In training the gate sees its input times a factor within 1 +- eps."
    )
    expert_dropout: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="In training each expert is left out of a step's choice with this probability."
    )
    gumbel_scale: Annotated[float, Field(gt=0.0, le=100.0)] | None = Field(
        default=None, description="Scale of the Gumbel noise added to logits in training."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="A token takes its best experts until their probabilities reach this sum."
    )
    max_k: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="And never more than so many experts; by default all."
    )
    start_k: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Experts per token when training begins; by default all."
    )
    anneal_until_percent: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="Part of the training after which a token takes the model's own number of experts."
    )
    locality_bias: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        default=None, description="How much score an expert loses per unit of distance from the token's rank, at most."
    )
    locality_by: Literal["Pick", "Domain"] | None = Field(
        default=None,
        description="What the distance counts for: Pick, each of a token's experts; Domain, each domain that a token "
        "crosses to, once for all its experts there, as dispatch by node does.",
    )
    locality_budget_percent: Percent | None = Field(
        default=None, description="Part of its chosen experts' probability that a token may give up for nearer ones."
    )

    # of one type each
    rows_per_expert: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        default=None, description="Mixtures of a sequence's tokens that each expert gets."
    )
    soft_normalize: bool | None = Field(
        default=None, description="Tokens and mixture weights are normalised to length 1 before they are compared."
    )
    sinkhorn_tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="Stop when no expert's share is further than this part from even."
    )
    sinkhorn_iterations: Annotated[int, Field(ge=1, le=100000)] | None = Field(
        default=None, description="Stop after so many rounds at the latest."
    )
    hash_table: Literal["Random", "Balanced"] | None = Field(
        default=None, description="Random: any expert per token id. Balanced: even load by the data's token counts."
    )
    heuristic: Literal["Position", "Class"] | None = Field(
        default=None,
        description="Position: by place in the sequence. Class: every class of tokens (modality) has experts of its "
        "own, chosen among by the gate.",
    )
    class_first_ids: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, max_length=63)] | None = (
        Field(
            default=None,
            description="Classes by token id, ascending: ids below the first number are of class 0, those from it on "
            "of class 1, and so on, e.g. where a picture's ids begin.",
        )
    )
    num_classes: Annotated[int, Field(ge=1, le=64)] | None = Field(default=None, description="Classes of tokens.")
    frozen_gate: Literal["Random", "Model"] | None = Field(
        default=None, description="Random: a gate drawn once and never trained. Model: the model's gate, as it is."
    )
    cached_from_percent: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="Part of the training after which a token's id alone decides its experts."
    )
    cached_dim: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Width of the small router that learns the routes by token id."
    )
    distill_loss_coeff: Coefficient | None = Field(
        default=None, description="Weight of the loss by which the small router learns."
    )
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = Field(
        default=None, description="Of what is drawn once: tables and fixed gates."
    )
    class_path: Annotated[str, Field(pattern=CLASS_PATH, max_length=256)] | None = Field(
        default=None, description="`module:Class` of a router of your own (moe_runtime.router.face)."
    )
    options: dict[str, str] | None = Field(default=None, description="Given to it as they are.")

    # capacity
    expert_capacity_factor: Annotated[float, Field(gt=0.0, le=4096.0)] | None = Field(
        default=None, description="Tokens an expert takes over the even share; without it nothing is dropped."
    )
    token_drop_policy: Literal["Probs", "Position"] | None = Field(
        default=None, description="Who keeps a full expert's room: the highest weights or the first tokens."
    )
    overflow: Literal["Drop", "Reroute", "Queue"] | None = Field(
        default=None,
        description="What becomes of the others: nothing, the token's next best expert with room, or a later pass of "
        "the same step.",
    )
    queue_passes: Annotated[int, Field(ge=2, le=64)] | None = Field(
        default=None, description="Passes of one step; who finds no room in the last is dropped."
    )
    norm_kept_prob: bool | None = Field(
        default=None, description="The weights a token keeps are scaled up to the sum they had before the drop."
    )
    adaptive_capacity_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="Room follows each expert's moving average of load, with this decay per step."
    )
    class_capacity_percents: Annotated[tuple[Percent, ...], Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="Each class of tokens has this part of every expert's room to itself; they sum to 100.",
    )

    # losses
    load_balancing_type: Literal["AuxLoss", "SeqAuxLoss", "GlobalAuxLoss"] | None = Field(
        default=None, description="Over which tokens load is evened: this rank's batch, each sequence, all ranks'."
    )
    aux_loss_coeff: Coefficient | None = Field(default=None, description="Switch Transformer's balance loss.")
    aux_loss_target_percent: Annotated[int, Field(ge=1, le=99)] | None = Field(
        default=None,
        description="Balancedness that the coefficient is steered towards; without it the coefficient stays.",
    )
    aux_loss_adapt_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="Part by which the coefficient moves in one step."
    )
    importance_loss_coeff: Coefficient | None = Field(
        default=None, description="Squared variation of the experts' summed weights (Shazeer 2017)."
    )
    load_loss_coeff: Coefficient | None = Field(
        default=None, description="Squared variation of the experts' expected load under the noise (Shazeer 2017)."
    )
    group_aux_loss_coeff: Coefficient | None = Field(default=None, description="The balance loss over groups.")
    entropy_loss_coeff: Coefficient | None = Field(
        default=None, description="Entropy of the probabilities, so that few experts suffice (Huang 2024)."
    )
    z_loss_coeff: Coefficient | None = Field(default=None, description="Keeps logits small (ST-MoE).")

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        if problems := why_refused(self.type, self.given()):
            raise ValueError("; ".join(problems))
        return self

    @property
    def renormalises(self) -> bool:
        """Whether the chosen experts' weights are divided by their sum."""
        return not self.pre_softmax if self.norm_topk_prob is None else self.norm_topk_prob

    @property
    def classes(self) -> int:
        """How many classes of tokens there are."""
        if self.num_classes is not None:
            return self.num_classes
        return int(DEFAULTS["num_classes"]) if self.class_first_ids is None else len(self.class_first_ids) + 1

    def given(self) -> dict[str, Any]:
        """The options that somebody gave, by name."""
        return {name: value for name, value in self if name != "type" and value is not None}


class LocalityConfig(WireModel):
    """What a service adds to a checkpoint's routing: the options `locality_...` of its router."""

    bias: Annotated[float, Field(gt=0.0, le=1e6)]
    budget_percent: Percent
    by: Literal["Pick", "Domain"] = "Pick"


def picks_of_token(config: RouterConfig, top_k: int) -> int | None:
    """How many experts a token takes at the end of training, where nothing is dropped; `top_k`: the model's own number.

    None where that depends on the tokens, or is the router's own secret.
    """
    if config.type in {"Switch", "Base"}:
        return 1
    own = config.type in {"TopP", "SoftMoE", "Custom"}
    return (
        None if own or (config.type == "ExpertChoice" and config.expert_capacity_factor not in {None, 1.0}) else top_k
    )


def why_misfit(config: RouterConfig, *, num_experts: int, top_k: int) -> list[str]:
    """Every reason why a model with so many experts, of which a token takes `top_k`, cannot have this router."""
    problems: list[str] = []
    if top_k > num_experts:
        problems.append(f"top_k {top_k} exceeds the number of experts {num_experts}")
    if config.num_groups is not None and num_experts % config.num_groups:
        problems.append(f"num_groups must divide the number of experts (got {config.num_groups} and {num_experts})")
    elif config.num_groups is not None and config.group_topk is not None:
        reach = config.group_topk * (num_experts // config.num_groups)
        if config.group_topk > config.num_groups:
            problems.append(f"group_topk {config.group_topk} exceeds num_groups {config.num_groups}")
        elif reach < top_k:
            problems.append(f"group_topk {config.group_topk} leaves a token {reach} experts; it takes {top_k}")
        if config.type == "Hierarchical" and top_k % config.group_topk:
            problems.append(f"group_topk must divide the experts of a token (got {config.group_topk} and {top_k})")
    if config.type == "Heuristic" and config.heuristic == "Class" and num_experts // config.classes < top_k:
        problems.append(f"num_classes {config.classes} leaves a class fewer than {top_k} of {num_experts} experts")
    for name in ("max_k", "start_k"):
        value, least = getattr(config, name), top_k if name == "start_k" else 1
        if value is not None and not least <= value <= num_experts:
            of_token = f"a token's {top_k} experts" if name == "start_k" else "1"
            problems.append(f"{name} must lie between {of_token} and all {num_experts} (got {value})")
    over_chosen = config.score_function in (None, "Softmax") and not config.pre_softmax
    if top_k == 1 and config.type in ("TopK", "AnnealedTopK") and (over_chosen or config.renormalises):
        problems.append(
            "a single expert's weight would always be 1 and the gate never learn; use pre_softmax without "
            "norm_topk_prob, score_function Sigmoid without norm_topk_prob, or type Switch"
        )
    return problems
