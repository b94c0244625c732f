"""How a custom resource is modelled: camelCase on the wire, snake_case here, closed and frozen.

Rules that CEL can check are written next to the model (`cel_rules`), so that the CRD and `moerator validate` agree.
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class SpecModel(BaseModel):
    """Base of every part of a spec. `cel_rules` become x-kubernetes-validations of the part: (rule, message)."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, strict=True)
    cel_rules: ClassVar[tuple[tuple[str, str], ...]] = ()
