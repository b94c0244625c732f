"""RuntimeConfig from a spec: what every pod of one owner is told when it starts."""

from dataclasses import dataclass
from typing import Literal

from moe_core.contract.names import COORDINATOR_PORT, RAY_PORT, child_name
from moe_core.contract.router import LocalityConfig
from moe_core.contract.runtime_config import (
    DispatchConfig,
    ModelShape,
    ModelSource,
    RuntimeConfig,
    ServingConfig,
    TraceConfig,
    TrainingConfig,
)
from moe_core.facts import Facts, Wish
from moe_core.spec.common import Parallelism, PodTemplate, RoutingTrace
from moe_core.spec.dispatch import Dispatch
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.service import Locality, MoEServiceSpec

LOOPBACK = "127.0.0.1"
AUX_LOSS_COEFFICIENT = "0.01"
"""Where a job gives none."""


def job_config(wish: Wish, spec: MoEJobSpec, facts: Facts) -> RuntimeConfig:
    training, data = spec.training, spec.training.data
    max_norm = training.max_expert_gradient_norm
    where = _where(wish, facts)
    return RuntimeConfig(
        owner_kind="MoEJob",
        namespace=wish.namespace,
        name=wish.name,
        uid=wish.uid,
        coordinator_host=where.host,
        coordinator_port=where.coordinator_port,
        ray_port=where.ray_port,
        mode="train",
        model=ModelSource(shape=ModelShape(**spec.model.shape.model_dump())),
        router=None if spec.model.router is None else spec.model.router.config(),
        num_ranks=spec.parallelism.ranks,
        faults_enabled=spec.drills == "Allowed",
        device=_device(spec.template),
        trace=_trace(spec.trace),
        dispatch=_dispatch(spec.dispatch, spec.parallelism),
        training=TrainingConfig(
            data="stdlib" if data.path is None else data.path,
            sequence_length=training.sequence_length,
            sequences_per_rank=training.sequences_per_rank,
            max_steps=training.max_steps,
            max_seconds=training.max_seconds,
            learning_rate=float(training.learning_rate),
            warmup_steps=training.warmup_steps,
            weight_decay=float(training.weight_decay),
            aux_loss_coefficient=float(training.aux_loss_coefficient or AUX_LOSS_COEFFICIENT),
            seed=training.seed,
            snapshot_every_steps=training.snapshot_every_steps,
            output_path=spec.output.path,
            optimizer=training.optimizer,
            matmul_precision=training.matmul_precision,
            max_expert_gradient_norm=None if max_norm is None else float(max_norm),
        ),
    )


def service_config(wish: Wish, spec: MoEServiceSpec, facts: Facts) -> RuntimeConfig:
    where, packing = _where(wish, facts), spec.model.expert_packing
    return RuntimeConfig(
        owner_kind="MoEService",
        namespace=wish.namespace,
        name=wish.name,
        uid=wish.uid,
        coordinator_host=where.host,
        coordinator_port=where.coordinator_port,
        ray_port=where.ray_port,
        mode="serve",
        model=ModelSource(
            path=spec.model.path,
            router_class=spec.model.router_class_path,
            packing=packing.contract() if packing is not None else None,
        ),
        num_ranks=spec.parallelism.ranks,
        faults_enabled=spec.drills == "Allowed",
        device=_device(spec.template),
        trace=_trace(spec.trace),
        dispatch=_dispatch(spec.dispatch, spec.parallelism),
        serving=ServingConfig(
            max_sequences=spec.serving.max_sequences,
            max_context=spec.serving.max_context,
            served_name=spec.model.served_name or wish.name,
            fallback=spec.experts.fallback,
            locality=_locality(spec.experts.locality),
            gateway_port=facts.ports.get("gateway", spec.gateway.port) if facts.local else spec.gateway.port,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Where:
    host: str
    coordinator_port: int
    ray_port: int


def _where(wish: Wish, facts: Facts) -> _Where:
    """The coordinator's Service in a cluster, free loopback ports in the local shell."""
    if facts.local:
        ports = facts.ports
        return _Where(LOOPBACK, ports.get("coordinator", COORDINATOR_PORT), ports.get("ray", RAY_PORT))
    service = child_name(wish.kind, wish.name, "coordinator")
    return _Where(f"{service}.{wish.namespace}.svc", COORDINATOR_PORT, RAY_PORT)


def _trace(trace: RoutingTrace | None) -> TraceConfig | None:
    if trace is None:
        return None
    return TraceConfig(folder=trace.path, every_steps=trace.every_steps, max_bytes=trace.max_megabytes * 1_000_000)


def _dispatch(dispatch: Dispatch, parallelism: Parallelism) -> DispatchConfig:
    return DispatchConfig(
        wire=dispatch.wire,
        combine_wire=dispatch.way_back,
        hierarchy=dispatch.hierarchy,
        overlap=dispatch.overlap,
        group_ranks=parallelism.group_ranks,
    )


def _locality(near: Locality | None) -> LocalityConfig | None:
    if near is None:
        return None
    return LocalityConfig(bias=float(near.bias), budget_percent=near.budget_percent, by=near.by)


def _device(template: PodTemplate) -> Literal["cpu", "cuda"]:
    """A rank that asks for a GPU computes on it."""
    resources = template.spec.resources
    asked = sorted({*resources.requests, *resources.limits})
    return "cuda" if any(name.endswith("/gpu") for name in asked) else "cpu"
