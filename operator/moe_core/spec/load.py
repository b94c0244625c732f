"""Reading custom resources: text to typed values at the border, with every problem found and where it stands.

`parse_spec` is what `decide` uses on an object from the API server; `read_documents` is what `moerator validate` and
`moerator run` use on a file. Both refuse the same things.
"""

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moe_core.contract.names import API_VERSION
from moe_core.outcome import InvalidSpec, Problem
from moe_core.spec import yaml_text
from moe_core.spec.base import Rule, SpecModel
from moe_core.spec.crd import schema_of
from moe_core.spec.kinds import KIND_OF_NAME, ResourceKind
from moe_core.spec.metadata import Metadata

Model = TypeVar("Model", bound=SpecModel)
_schema = functools.cache(schema_of)
_READ = re.compile(r"\bself\.([a-zA-Z]\w*(?:\.[a-zA-Z]\w*)*)(?![\w(])")
"""Fields that a CEL expression reads; the methods it calls on them are none."""
_TOP_LEVEL = ("apiVersion", "kind", "metadata", "spec", "status")


@dataclass(frozen=True, slots=True)
class Document:
    """One custom resource of a file, parsed. `raw` is what was written."""

    kind: str
    name: str
    namespace: str
    spec: SpecModel
    raw: Mapping[str, Any]
    line: int


def parse_spec(model: type[Model], spec: Mapping[str, Any], *, where: str = "spec") -> Model:
    """Parse one spec, or another part of a resource: `where` names it. Raises InvalidSpec with every Problem."""
    try:
        parsed = model.model_validate_json(json.dumps(_without_nulls(spec), default=str), by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidSpec([_problem(model, where, detail) for detail in error.errors()]) from error
    if broken := _broken_rules(parsed, where):
        raise InvalidSpec(broken)
    return parsed


def broken_changes(model: type[SpecModel], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    """What of a change the API server would refuse (`oldSelf`). Raises InvalidSpec when one of the two is none."""
    before, after = parse_spec(model, old), parse_spec(model, new)
    return [
        _broken_rule(after, "spec", rule)
        for rule in model.rules
        if rule.keeps is not None and rule.keeps(before) != rule.keeps(after)
    ]


def _without_nulls(value: Any) -> Any:
    """A field given as null counts as not given, as the API server has it; a null in a list stays wrong."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value


def read_documents(text: str) -> list[Document]:
    """Parse every document of a YAML (or JSON) text.

    Raises InvalidSpec with the problems of all documents; a field reads `line 12: spec.parallelism.expert`.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    try:
        for node, value in yaml_text.documents(text):
            found = _read_one(value, node)
            if isinstance(found, Document):
                documents.append(found)
            else:
                problems.extend(found)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "document"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InvalidSpec([Problem(where, _line(text, mark), f"this is not YAML: {what}")]) from error
    if not documents and not problems:
        problems.append(Problem("document", "", "the file holds no resource"))
    if problems:
        raise InvalidSpec(problems)
    return documents


def _line(text: str, mark: Any) -> str:
    lines = text.splitlines()
    return lines[mark.line].strip() if mark is not None and mark.line < len(lines) else ""


def _read_one(value: Any, node: yaml.Node) -> Document | list[Problem]:
    problems = _envelope_problems(value)
    kind = KIND_OF_NAME.get(str(value.get("kind"))) if isinstance(value, dict) else None
    if kind is not None and isinstance(value.get("spec"), dict):
        try:
            spec = parse_spec(kind.model, value["spec"])
        except InvalidSpec as invalid:
            problems += invalid.problems
        else:
            if not problems:
                metadata = value["metadata"]
                namespace = str(metadata.get("namespace") or "default")
                return Document(kind.kind, metadata["name"], namespace, spec, value, node.start_mark.line + 1)
    lines = _lines_of(node)
    return [
        Problem(f"line {_nearest(lines, problem.field)}: {problem.field}", problem.value, problem.message, problem.hint)
        for problem in problems
    ]


def _envelope_problems(value: Any) -> list[Problem]:
    if not isinstance(value, dict):
        return [Problem("document", value, "must be a mapping with apiVersion, kind, metadata and spec")]
    problems = [
        Problem(_shown(str(key)), value[key], "unknown field", _did_you_mean(str(key), _TOP_LEVEL))
        for key in value
        if key not in _TOP_LEVEL
    ]
    if value.get("apiVersion") != API_VERSION:
        problems.append(Problem("apiVersion", value.get("apiVersion"), f"must be {API_VERSION}"))
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in KIND_OF_NAME:
        hint = _did_you_mean(str(kind), tuple(KIND_OF_NAME))
        problems.append(Problem("kind", kind, f"must be one of {', '.join(KIND_OF_NAME)}", hint))
    problems.extend(_metadata_problems(value.get("metadata"), KIND_OF_NAME.get(str(kind))))
    if not isinstance(value.get("spec"), dict):
        problems.append(Problem("spec", value.get("spec"), "is required and must be a mapping"))
    return problems


def _metadata_problems(metadata: Any, kind: ResourceKind | None) -> Sequence[Problem]:
    if not isinstance(metadata, dict):
        return [Problem("metadata", metadata, "is required and must be a mapping with a name")]
    try:
        written = parse_spec(Metadata, metadata, where="metadata")
    except InvalidSpec as invalid:
        return invalid.problems
    if kind is not None and len(written.name) > kind.max_name:
        told = f"must have at most {kind.max_name} characters: pods are named after it"
        return [Problem("metadata.name", written.name, told)]
    if kind is not None and not kind.namespaced and written.namespace is not None:
        return [Problem("metadata.namespace", written.namespace, f"a {kind.kind} belongs to no namespace")]
    return []


def _problem(model: type[SpecModel], where: str, detail: ErrorDetails) -> Problem:
    path = where + "".join(f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            known = _fields_at(model, detail["loc"][:-1])
            return Problem(path, detail["input"], "unknown field", _did_you_mean(str(detail["loc"][-1]), known))
        case "missing":
            return Problem(path, None, "is required")
        case "literal_error":
            expected = detail["ctx"]["expected"]
            hint = _did_you_mean(str(detail["input"]), tuple(re.findall(r"'([^']*)'", expected)))
            return Problem(path, detail["input"], f"must be one of {expected}", hint)
        case "string_type" if isinstance(detail["input"], int | float):
            return Problem(path, detail["input"], "must be a string", "write it in quotes")
        case "string_pattern_mismatch":
            return Problem(path, detail["input"], f"must match {detail['ctx']['pattern']}")
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return Problem(path, detail["input"], f"must be {message}" if message != detail["msg"] else message)


def _shown(key: str) -> str:
    """A key as it may stand in a line for people."""
    return key if key.isprintable() else repr(key)


def _fields_at(model: type[SpecModel], path: tuple[int | str, ...]) -> tuple[str, ...]:
    """Wire names of the fields that may stand at `path`."""
    node: Mapping[str, Any] = _schema(model)  # it already has every part inlined
    for part in path:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return tuple(node.get("properties", {}))


def _did_you_mean(word: str, known: tuple[str, ...]) -> str:
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("_", ""), folded, n=1, cutoff=0.6)
    return f"did you mean {folded[close[0]]}?" if close else ""


def _broken_rules(part: Any, path: str) -> list[Problem]:
    """Rules that cross fields, in this part and below it; the same that CEL checks in the API server."""
    if isinstance(part, tuple):
        return [problem for idx, item in enumerate(part) for problem in _broken_rules(item, f"{path}[{idx}]")]
    if not isinstance(part, SpecModel):
        return []
    problems = [
        _broken_rule(part, path, rule) for rule in part.rules if rule.holds is not None and not rule.holds(part)
    ]
    for name, info in type(part).model_fields.items():
        problems.extend(_broken_rules(getattr(part, name), f"{path}.{info.alias or name}"))
    return problems


def _broken_rule(part: SpecModel, path: str, rule: Rule) -> Problem:
    """At the field that the rule's message names first, with the values of all fields that the rule reads."""
    written = part.model_dump(by_alias=True, exclude_none=True, mode="json")
    values = {name: found for name in _READ.findall(rule.cel) if (found := _value_at(written, name)) is not None}
    told = [name for name in values if not any(other.startswith(f"{name}.") for other in values)]
    told.sort(key=lambda name: (name not in rule.message, rule.message.find(name)))
    if not told:
        return Problem(path, None, rule.message)
    value = values[told[0]] if len(told) == 1 else {name: values[name] for name in told}
    return Problem(f"{path}.{told[0]}", value, rule.message)


def _value_at(written: Any, path: str) -> Any:
    for name in path.split("."):
        written = written.get(name) if isinstance(written, dict) else None
    return written


def _lines_of(node: yaml.Node, path: str = "") -> dict[str, int]:
    """Path of every value -> line it starts on, from 1."""
    lines = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            lines |= _lines_of(child, below)
            lines[below] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for idx, child in enumerate(node.value):
            lines |= _lines_of(child, f"{path}[{idx}]")
    return lines


def _nearest(lines: Mapping[str, int], path: str) -> int:
    while path and path not in lines:
        path = path.rpartition(".")[0] if "." in path or "[" not in path else path.rpartition("[")[0]
    return lines.get(path, lines.get("", 1))
