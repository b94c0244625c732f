"""From a wish to a Plan, or to the reason why not. A refusal comes before any pod exists."""

import re
from dataclasses import dataclass

from moe_core.contract.families import why_refused
from moe_core.contract.router import why_misfit
from moe_core.decide.refusals import foreign_names
from moe_core.facts import Facts, Wish
from moe_core.manifests.config import job_config, service_config
from moe_core.manifests.plan import Plan
from moe_core.outcome import InvalidInput, InvalidSpec, Reason
from moe_core.spec.common import PodTemplate, TopologyConstraint
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.kinds import MAX_NAME, NAME_PATTERN
from moe_core.spec.load import parse_spec
from moe_core.spec.router import wire_words
from moe_core.spec.service import MoEServiceSpec
from moe_core.topology.quantity import request_of
from moe_core.topology.room import Needs, Tolerated
from moe_core.topology.shape import Pack
from moe_core.topology.tree import depth_of

MAX_PROBLEMS_TOLD = 5
MAX_SLOTS = 16384
"""Per layer, over all ranks: what an ExpertMap can hold, and what is planned in a second."""


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """`spec` is typed; `note` is the message of the Accepted condition."""

    plan: Plan
    spec: MoEJobSpec | MoEServiceSpec
    note: str


def accept(wish: Wish, facts: Facts) -> Accepted | Refusal:  # noqa: PLR0911 - each way to be refused
    if len(wish.name) > MAX_NAME:
        told = f"metadata.name: must have at most {MAX_NAME} characters: pods are named after it (got {len(wish.name)})"
        return Refusal(Reason.INVALID_SPEC, told)
    if re.fullmatch(NAME_PATTERN, wish.name) is None:  # an API server with older CRDs lets it through
        told = f"metadata.name: must match {NAME_PATTERN}: Services are named after it (got {wish.name!r})"
        return Refusal(Reason.INVALID_SPEC, told)
    try:
        spec = _parse(wish)
    except InvalidSpec as invalid:
        told = "; ".join(str(problem) for problem in invalid.problems[:MAX_PROBLEMS_TOLD])
        more = len(invalid.problems) - MAX_PROBLEMS_TOLD
        return Refusal(Reason.INVALID_SPEC, told + (f"; and {more} more" if more > 0 else ""))
    shape = _experts_of(spec, facts)
    if isinstance(shape, Refusal):
        return shape
    pack = _pack(spec.topology_constraint, facts)
    if isinstance(pack, Refusal):
        return pack
    try:
        needs = _needs(spec.template)
    except InvalidInput as error:
        return Refusal(Reason.INVALID_SPEC, f"spec.template.spec.resources: {error}")
    foreign = foreign_names(facts)
    if foreign:
        names = ", ".join(foreign)
        return Refusal(Reason.FOREIGN_OBJECT, f"{names} exists and belongs to somebody else; delete it or rename this")
    plan = _plan(wish, spec, facts, shape, pack, needs)
    refused = _coverage(plan)
    if refused is not None:
        return refused
    slots = plan.slots(plan.num_ranks)
    per_rank = str(slots[0]) if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
    note = f"{plan.num_experts} experts in {plan.num_layers} layers over {plan.num_ranks} ranks, {per_rank} slots each"
    if plan.num_groups > 1:
        note = f"{note}, in {plan.num_groups} EP groups"
    return Accepted(plan, spec, note + _packing_told(spec, facts))


def _experts_of(spec: MoEJobSpec | MoEServiceSpec, facts: Facts) -> tuple[int, int] | Refusal:  # noqa: PLR0911
    """(logical experts, MoE layers). What the shell read of the model goes before what the spec claims."""
    if facts.model is not None and facts.model.problem:
        return Refusal(Reason.MODEL_NOT_SUPPORTED, facts.model.problem)
    if isinstance(spec, MoEJobSpec):
        refused = why_refused(spec.model.shape.family, from_shape=True)
        if refused is not None:
            return Refusal(Reason.MODEL_NOT_SUPPORTED, f"spec.model.shape.family: {refused}")
        router, shape = spec.model.router, spec.model.shape
        if router is not None:
            misfits = why_misfit(router.config(), num_experts=shape.num_experts, top_k=shape.num_experts_per_tok)
            if misfits:
                return Refusal(Reason.INVALID_SPEC, f"spec.model.router: {wire_words('; '.join(misfits))}")
        if facts.model is not None:
            return facts.model.num_experts, facts.model.num_moe_layers
        return spec.model.shape.num_experts, spec.model.shape.num_hidden_layers
    model = spec.model
    if facts.model is None:
        if model.num_experts is None or model.num_moe_layers is None:
            told = (
                f"there is no checkpoint at {model.path} yet; it is served once there is one"
                if facts.local  # the pods see what we see, and whoever runs them looks for it again
                else f"no checkpoint can be read at {model.path} from here; "
                "if only the pods can reach it, give model.numExperts and model.numMoeLayers"
            )
            return Refusal(Reason.MODEL_NOT_FOUND, told)
        return model.num_experts, model.num_moe_layers
    seen = facts.model
    for name, claimed, read in (
        ("numExperts", model.num_experts, seen.num_experts),
        ("numMoeLayers", model.num_moe_layers, seen.num_moe_layers),
    ):
        if claimed is not None and claimed != read:
            return Refusal(
                Reason.INVALID_SPEC, f"spec.model.{name}: the checkpoint at {model.path} has {read} (got {claimed})"
            )
    wanted = model.expert_packing.contract() if model.expert_packing is not None else None
    if seen.packing is not None and wanted not in {None, seen.packing}:
        told = f"spec.model.expertPacking: the checkpoint at {model.path} is packed as {seen.packing} (got {wanted})"
        return Refusal(Reason.INVALID_SPEC, f"{told}; give the one that it was packed from, or leave expertPacking out")
    return seen.num_experts, seen.num_moe_layers


def _packing_told(spec: MoEJobSpec | MoEServiceSpec, facts: Facts) -> str:
    if facts.model is not None and facts.model.packing is not None:
        return f"; experts are packed as {facts.model.packing} in the checkpoint"
    if isinstance(spec, MoEServiceSpec) and spec.model.expert_packing is not None:
        return f"; experts are packed as {spec.model.expert_packing.contract()} while they are loaded"
    return ""


def _parse(wish: Wish) -> MoEJobSpec | MoEServiceSpec:
    if wish.kind == "MoEJob":
        return parse_spec(MoEJobSpec, wish.spec)
    return parse_spec(MoEServiceSpec, wish.spec)


def _pack(constraint: TopologyConstraint | None, facts: Facts) -> Pack | Refusal:
    if constraint is None:
        return Pack()
    levels = facts.topologies.get(constraint.topology_name)
    if levels is None:
        known = ", ".join(sorted(facts.topologies)) or "none"
        told = f"ClusterTopology {constraint.topology_name} does not exist; there is {known}"
        return Refusal(Reason.TOPOLOGY_NOT_FOUND, told)
    required, preferred = constraint.pack.required or "", constraint.pack.preferred or ""
    try:
        depths = depth_of(required, levels), depth_of(preferred, levels)
    except InvalidInput as error:
        return Refusal(Reason.TOPOLOGY_NOT_FOUND, f"ClusterTopology {constraint.topology_name}: {error}")
    if required and preferred and depths[1] <= depths[0]:
        told = f"spec.topologyConstraint.pack.preferred: must be narrower than required {required} (got {preferred})"
        return Refusal(Reason.INVALID_SPEC, told)
    return Pack(levels=levels, required=required, preferred=preferred)


def _needs(template: PodTemplate) -> Needs:
    spec = template.spec
    return Needs(
        request=request_of(spec.resources.requests, spec.resources.limits),
        node_selector=spec.node_selector,
        tolerations=tuple(
            Tolerated(key=t.key or "", operator=t.operator or "Equal", value=t.value or "", effect=t.effect or "")
            for t in spec.tolerations
        ),
    )


def _plan(  # noqa: PLR0917
    wish: Wish,
    spec: MoEJobSpec | MoEServiceSpec,
    facts: Facts,
    shape: tuple[int, int],
    pack: Pack,
    needs: Needs,
) -> Plan:
    serving = spec if isinstance(spec, MoEServiceSpec) else None
    constraint = spec.topology_constraint
    return Plan(
        kind="MoEService" if serving else "MoEJob",
        namespace=wish.namespace,
        name=wish.name,
        generation=wish.generation,
        num_ranks=spec.parallelism.ranks,
        num_groups=spec.parallelism.data,
        num_experts=shape[0],
        num_layers=shape[1],
        redundant_per_rank=serving.experts.redundant_per_rank if serving else 0,
        policy="linear",  # without a load; decide.assignment follows one
        probe=spec.dispatch.probe,
        rebalance=serving.experts.rebalance if serving and serving.experts.policy == "Balanced" else None,
        min_copies=serving.experts.min_copies if serving else 1,
        max_restarts=spec.failure_policy.max_restarts,
        num_gateways=serving.gateway.replicas if serving else 0,
        template=spec.template,
        needs=needs,
        pack=pack,
        ranks_per_node=(constraint.pack.ranks_per_node or 0) if constraint else 0,
        spares_per_domain=serving.spares.per_domain if serving else 0,
        config=job_config(wish, spec, facts) if isinstance(spec, MoEJobSpec) else service_config(wish, spec, facts),
        default_image=facts.default_image,
        network=facts.network,
    )


def _coverage(plan: Plan) -> Refusal | None:
    """A size whose slots cannot hold what the spec promises is refused."""
    min_copies = plan.min_copies
    per_layer = plan.num_experts * plan.num_groups + plan.num_ranks * plan.redundant_per_rank
    if per_layer > MAX_SLOTS:
        told = (
            f"spec.experts.redundantPerRank: {plan.redundant_per_rank} on each of {plan.num_ranks} ranks and "
            f"{plan.num_experts} experts make {per_layer} slots per layer, at most {MAX_SLOTS} are possible"
        )
        return Refusal(Reason.INVALID_SPEC, told)
    slots = plan.slots(plan.num_ranks)
    useful = sum(min(count, plan.num_experts) for count in slots)
    wanted = plan.num_experts * min_copies
    if useful < wanted:
        lacking = -(-(wanted - useful) // plan.num_ranks)
        told = (
            f"{plan.num_ranks} ranks have {useful} slots per layer, {min_copies} copies of {plan.num_experts} experts "
            f"need {wanted}; raise experts.redundantPerRank by {lacking} or parallelism.expert"
        )
        return Refusal(Reason.COVERAGE_IMPOSSIBLE, told)
    least = plan.least_copies(plan.num_ranks)
    if least >= min_copies:
        return None
    told = f"{plan.num_ranks} ranks can give some experts only {least} of {min_copies} copies; raise parallelism.expert"
    return Refusal(Reason.COVERAGE_IMPOSSIBLE, told)
