"""Whatever a file holds, it is read or refused in sentences: no traceback, no endless work, no line break in a line."""

import copy
import json
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.documents import GOOD
from moe_core.decide import decide
from moe_core.facts import Facts, Wish
from moe_core.outcome import InvalidSpec
from moe_core.spec.load import read_documents

SYNTAX = st.text(alphabet="ab1:-[]{}&*!|>?%#'\"\\,\n \t<=~.\0é\ud800", max_size=60)
JSON = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
        st.sampled_from(["", "a", "1Gi", "Linear", "\n", "../x", "9" * 400]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def read(text: str) -> list[str]:
    """The problems, none when it was taken."""
    try:
        read_documents(text)
    except InvalidSpec as invalid:
        told = [str(problem) for problem in invalid.problems]
        assert told and all("\n" not in line for line in told), told
        return told
    return []


@settings(max_examples=400, deadline=None)
@given(SYNTAX)
def test_any_text_is_read_or_refused_in_one_line_each(text: str) -> None:
    assert read(text)


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(found for key, child in below for found in paths(child, (*path, key)))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_good_document_with_anything_in_any_place_is_read_or_refused(data: st.DataObject) -> None:
    document = copy.deepcopy(GOOD[data.draw(st.sampled_from(sorted(GOOD)))])
    *parents, last = data.draw(st.sampled_from(paths(document)[1:]))
    node = document
    for key in parents:
        node = node[key]
    node[last] = data.draw(JSON)
    read(yaml.safe_dump(document, sort_keys=False))
    read(json.dumps(document))
    kind, spec = document["kind"], document.get("spec")
    if kind in ("MoEJob", "MoEService", "MoEDrill") and isinstance(spec, dict):
        wish = Wish(kind, "default", "tiny", "u", 1, spec)
        assert decide(wish, Facts(), 0.0).conditions
