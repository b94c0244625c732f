"""YAML as Kubernetes reads it, from anybody: what JSON can say, with a line for every mistake, in bounded time.

    for node, value in documents(text): ...

No dates, binaries or sets; a key may not stand twice; aliases are allowed until they multiply. Everything that is wrong
is a yaml.YAMLError, so that no file, however odd, ends in a traceback or never.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_DEPTH = 100
"""A pod is some fifteen levels deep; PyYAML composes by recursion, three frames a level, and Python allows 1,000."""
MAX_VALUES = 1_000_000
"""Values of one document with its aliases written out: etcd takes 1.5 MiB, 750,000 numbers of one digit."""
KUBERNETES_FLOAT = re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$")
"""What Kubernetes' YAML reader takes for a number; PyYAML wants a dot and a sign in the exponent."""
_INTEGER = re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)$")
"""Without PyYAML's sixties: 12:30 is text."""
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = frozenset({_PREFIX + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")})


def documents(text: str) -> Iterator[tuple[yaml.Node, Any]]:
    """Every document that says anything, as its node (for lines) and its value. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None and not (isinstance(node, yaml.ScalarNode) and node.value == ""):
                yield node, loader.construct_document(node)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._values_of: dict[int, int] = {}
        """id of a node that is composed to its end -> values in it."""

    def compose_document(self) -> yaml.Node | None:
        self._values, self._values_of = 0, {}
        return super().compose_document()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._values_of:
                raise yaml.composer.ComposerError(None, None, "an alias stands inside of what it repeats", mark)
            self._values += self._values_of[id(node)]
        else:
            before = self._values
            self._values += 1
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            self._values_of[id(node)] = self._values - before
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
        if self._values > MAX_VALUES:
            told = f"with its aliases written out it has more than {MAX_VALUES} values"
            raise yaml.composer.ComposerError(None, None, told, mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Raises ConstructorError for whatever JSON has no word for."""
        if node.tag not in _PLAIN and node.tag != _PREFIX + "merge":
            raise _wrong(node, f"the tag {node.tag} is not allowed")
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError) as error:  # `!!int x`, an integer of 5,000 digits
            raise _wrong(node, f"{node.value[:40]!r} is no {node.tag.removeprefix(_PREFIX)}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(node, f"{node.value} is no number that JSON knows")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _wrong(node, "half of a surrogate pair is no text")
        return value


def _check_keys(node: yaml.MappingNode) -> None:
    """Before any merge is written out, after which keys may well stand twice."""
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _wrong(key, "a key must be text")
        if key.value in seen and key.tag != _PREFIX + "merge":
            raise _wrong(key, f"key {key.value!r} stands twice")
        seen.add(key.value)


def _wrong(node: yaml.Node, told: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, told, node.start_mark)


_LEFT_OUT = {_PREFIX + kind for kind in ("timestamp", "value", "int", "float")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _LEFT_OUT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_PREFIX + "int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(_PREFIX + "float", KUBERNETES_FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(_PREFIX + "float", re.compile(r"^([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), list("-+."))
_Loader.yaml_constructors = {
    **yaml.SafeLoader.yaml_constructors,
    _PREFIX + "merge": yaml.SafeLoader.construct_yaml_str,
}
