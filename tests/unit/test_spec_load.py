"""Bad files read well: every problem is found, named by field, value and line, with the near miss if any."""

import pytest
import yaml

from cases.documents import BROKEN, GOOD, SERVICE, Broken
from moe_core.outcome import InvalidSpec
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.load import parse_spec, read_documents


@pytest.mark.parametrize("kind", sorted(GOOD))
def test_a_good_document_is_taken(kind: str) -> None:
    [document] = read_documents(yaml.safe_dump(GOOD[kind]))
    assert (document.kind, document.name) == (kind, GOOD[kind]["metadata"]["name"])


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
def test_a_broken_document_is_refused_with_the_words_that_help(broken: Broken) -> None:
    with pytest.raises(InvalidSpec) as refused:
        read_documents(yaml.safe_dump(broken.document()))
    for word in broken.words:
        assert word in str(refused.value)


def test_the_cases_are_many_and_distinct() -> None:
    assert len({broken.id for broken in BROKEN}) == len(BROKEN) >= 40


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{a: [", ("line 1", "not YAML")),
        ("hello", ("must be a mapping",)),
        ("", ("holds no resource",)),
        ("- a\n- b\n", ("must be a mapping",)),
        ("a: 1\na: 2\n", ("line 2", "stands twice")),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {}\n", ("line 1: apiVersion", "line 2: kind")),
        ("apiVersion: moerator.dev/v1alpha1\nkind: MoeJob\nmetadata: {name: x}\nspec: {}\n", ("did you mean MoEJob",)),
    ],
)
def test_a_file_that_is_no_resource_says_what_it_is_and_where(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidSpec) as refused:
        read_documents(text)
    for word in words:
        assert word in str(refused.value)


def test_a_typo_names_its_line_and_the_field_that_was_meant() -> None:
    text = yaml.safe_dump(SERVICE, sort_keys=False).replace("redundantPerRank", "redundantPerank")
    line = next(idx for idx, row in enumerate(text.splitlines(), 1) if "redundantPerank" in row)
    with pytest.raises(InvalidSpec, match=rf"line {line}: .*redundantPerank.*did you mean redundantPerRank\?"):
        read_documents(text)


def test_all_problems_of_all_documents_are_told_at_once() -> None:
    broken = [case.document() for case in BROKEN if case.kind == "MoEDrill"]
    with pytest.raises(InvalidSpec) as refused:
        read_documents(yaml.safe_dump_all(broken))
    assert len(refused.value.problems) >= len(broken)


def test_an_unquoted_date_stays_text_as_in_kubernetes() -> None:
    [document] = read_documents(yaml.safe_dump(SERVICE) + "\n")
    text = yaml.safe_dump(SERVICE, sort_keys=False) + "  managedBy: 2026-01-01\n"
    [dated] = read_documents(text)
    assert document.spec != dated.spec


def test_a_spec_from_the_api_server_gives_every_problem() -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(MoEJobSpec, {"suspend": 3, "parallelism": {"expert": 0}})
    assert {problem.field for problem in refused.value.problems} >= {
        "spec.suspend",
        "spec.parallelism.expert",
        "spec.model",
    }
