"""The metadata of a resource that a person wrote: what the API server would say of it, without one."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from moe_core.spec.base import Rule, SpecModel
from moe_core.spec.common import DnsLabel, LabelValue
from moe_core.spec.kinds import NAME_PATTERN

Key = Annotated[
    str,
    Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$", max_length=317),
]
"""Of a label or an annotation: a name, maybe with a domain before it."""


class OwnerReference(SpecModel):
    api_version: str = Field(min_length=1)
    kind: str = Field(min_length=1)
    name: str = Field(min_length=1)
    uid: str = Field(min_length=1)
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class Metadata(SpecModel):
    """What an API server adds is taken too, so that `kubectl get -o yaml` can be read back."""

    name: str = Field(pattern=NAME_PATTERN)
    namespace: DnsLabel | None = None
    labels: dict[Key, LabelValue] = Field(default_factory=dict)
    annotations: dict[Key, str] = Field(default_factory=dict)
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()
    generate_name: str | None = None

    uid: str | None = None
    resource_version: str | None = None
    generation: int | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: int | None = None
    managed_fields: tuple[dict[str, Any], ...] = ()
    self_link: str | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("!has(self.generateName)", "give a name, not generateName", lambda meta: meta.generate_name is None),
    )
