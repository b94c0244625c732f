"""CustomResourceDefinitions out of the spec models: structural schemas with CEL, so no admission webhook is needed.

The files under crds/ are written from here; a test regenerates and compares them.
"""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from moe_core.contract.names import GROUP, VERSION
from moe_core.spec.base import SpecModel
from moe_core.spec.kinds import KINDS, NAME_PATTERN, Column, ResourceKind
from moe_core.spec.yaml_text import KUBERNETES_FLOAT

_KEPT = (
    "type",
    "description",
    "enum",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
)
_MAX_ITEMS, _MAX_PROPERTIES = 64, 64
"""Bounds where the model gives none: without them the API server refuses CEL for its estimated cost."""


def crd(kind: ResourceKind) -> dict[str, Any]:
    """The CustomResourceDefinition of one kind as a plain mapping."""
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _root_schema(kind)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [_column(column) for column in kind.columns],
    }
    if kind.scale_path is not None:
        version["subresources"]["scale"] = {
            "specReplicasPath": kind.scale_path,
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.singular,
                "shortNames": [kind.short_name],
                "categories": ["moe"],
            },
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [version],
        },
    }


def crd_files() -> dict[str, str]:
    """File name -> YAML text, for crds/ and for the chart."""
    header = "# Generated from moe_core.spec by `moerator crds`; do not edit.\n"
    return {
        f"{kind.plural}.yaml": header + yaml.dump(crd(kind), Dumper=_Dumper, sort_keys=False, width=120)
        for kind in KINDS
    }


class _Dumper(yaml.SafeDumper):
    """Quotes a string such as `3e-3`: text to PyYAML, a number to Kubernetes."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", KUBERNETES_FLOAT, list("-+.0123456789"))


def _column(column: Column) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": column.name, "type": column.type, "jsonPath": column.path}
    return shown | ({"priority": 1} if column.wide else {})


def _root_schema(kind: ResourceKind) -> dict[str, Any]:
    return {
        "type": "object",
        "description": (kind.model.__doc__ or kind.kind).strip().splitlines()[0],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": schema_of(kind.model),
            "status": _status_schema(),
        },
        "x-kubernetes-validations": [
            {
                "rule": f"size(self.metadata.name) <= {kind.max_name}",
                "message": f"metadata.name must have at most {kind.max_name} characters: pods are named after it",
            },
            {
                "rule": f"self.metadata.name.matches('{NAME_PATTERN}')",
                "message": f"metadata.name must match {NAME_PATTERN}: a DNS label that begins with a letter",
            },
        ],
    }


def _status_schema() -> dict[str, Any]:
    def text(description: str, **more: Any) -> dict[str, Any]:
        return {"type": "string", "description": description, **more}

    def number(description: str) -> dict[str, Any]:
        return {"type": "integer", "description": description}

    condition = {
        "type": "object",
        "required": ["type", "status", "reason", "message", "lastTransitionTime"],
        "properties": {
            "type": text("What it is about."),
            "status": text("Whether it holds.", enum=["True", "False", "Unknown"]),
            "reason": text("Why, in one word for programs."),
            "message": text("Why, for people."),
            "observedGeneration": number("The spec's generation that this is said of."),
            "lastTransitionTime": text("When status last changed.", format="date-time"),
        },
    }
    return {
        "type": "object",
        "description": "Written by moerator only.",
        "x-kubernetes-preserve-unknown-fields": True,
        "properties": {
            "conditions": {
                "type": "array",
                "description": "What holds of the object and why.",
                "items": condition,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
            "observedGeneration": number("The spec's generation that the rest of status is of."),
            "replicas": number("Rank pods, as the scale subresource counts them."),
            "selector": text("Labels of the rank pods, for the scale subresource."),
        },
    }


def schema_of(model: type[SpecModel]) -> dict[str, Any]:
    """Structural schema of one part of a spec, its parts inlined, defaults and CEL rules included."""
    generated = model.model_json_schema(by_alias=True)
    return _object(model, generated, generated.get("$defs", {}))


def _object(model: type[SpecModel], node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    by_alias = {info.alias or name: info for name, info in model.model_fields.items()}
    properties = {}
    for alias, child in node.get("properties", {}).items():
        schema = _value(child, definitions, _part_of(by_alias[alias].annotation))
        default = by_alias[alias].get_default(call_default_factory=True)
        if not by_alias[alias].is_required() and default is not None:
            plain = to_jsonable_python(default, by_alias=True, exclude_none=True)
            schema["default"] = {} if isinstance(default, SpecModel) and default == _empty(default) else plain
        properties[alias] = schema
    shape: dict[str, Any] = {"type": "object"}
    if "description" in node:
        shape["description"] = " ".join(str(node["description"]).split())
    if node.get("required"):
        shape["required"] = list(node["required"])
    shape["properties"] = properties
    if model.rules:
        shape["x-kubernetes-validations"] = [{"rule": rule.cel, "message": rule.message} for rule in model.rules]
    return shape


def _empty(part: SpecModel) -> SpecModel | None:
    """The same part with nothing given, if it can be built so: then the API server fills it field by field."""
    if any(info.is_required() for info in type(part).model_fields.values()):
        return None
    return type(part)()


def _part_of(annotation: Any) -> type[SpecModel] | None:
    """The SpecModel inside an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, SpecModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (part := _part_of(inner)) is not None:
            return part
    return None


def _value(node: Mapping[str, Any], definitions: Mapping[str, Any], part: type[SpecModel] | None) -> dict[str, Any]:
    described = {"description": node["description"]} if "description" in node else {}
    if "$ref" in node:
        resolved = definitions[str(node["$ref"]).rsplit("/", 1)[1]]
        return _value(resolved, definitions, part) | described
    if "anyOf" in node:
        [only] = [option for option in node["anyOf"] if option.get("type") != "null"]
        return _value(only, definitions, part) | described
    if "properties" in node and part is not None:
        return _object(part, node, definitions)
    shape = {key: node[key] for key in _KEPT if key in node}
    if node.get("x-kubernetes-int-or-string"):
        either = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
        return either | described | {"pattern": node["pattern"], "minimum": 0}  # a pattern binds only strings
    if "const" in node:
        shape |= {"type": "string", "enum": [node["const"]]}
    if node.get("type") == "array":
        shape["items"] = _value(node["items"], definitions, part)
        shape.setdefault("maxItems", _MAX_ITEMS)
    if node.get("type") == "object":
        extra = node.get("additionalProperties")
        if isinstance(extra, dict):
            shape["additionalProperties"] = _value(extra, definitions, None)
            shape.setdefault("maxProperties", _MAX_PROPERTIES)
        else:
            shape["x-kubernetes-preserve-unknown-fields"] = True
    if shape.get("type") == "string" and "enum" not in shape:
        shape.setdefault("maxLength", 4096)
    return shape
