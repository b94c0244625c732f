"""Bad files read well: every problem is found, named by field, value and line, with the near miss if any."""

from itertools import pairwise
from typing import Any

import pytest
import yaml

from cases.documents import BROKEN, GOOD, SERVICE, Broken
from moe_core.contract.names import child_name
from moe_core.outcome import InvalidSpec
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.kinds import KIND_OF_NAME, KINDS, MAX_NAME, ResourceKind
from moe_core.spec.load import broken_changes, parse_spec, read_documents
from moe_core.spec.service import MoEServiceSpec
from moe_core.spec.yaml_text import documents


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


BOMB = (
    "a: &a ["
    + "x," * 9
    + "]\n"
    + "".join(f"{name}: &{name} [" + f"*{before}," * 9 + "]\n" for before, name in pairwise("abcdefghij"))
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b\0c", "special characters are not allowed"),
        ("spec: &s {model: *s}", "line 1, column 18: this is not YAML: an alias stands inside of what it repeats"),
        ("&s [*s]", "an alias stands inside"),
        ("[" * 3000, "nested deeper than 100 levels"),
        ("{a: " * 1500, "nested deeper than 100 levels"),
        (BOMB, "more than 1000000 values"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!int ''", "'' is no int"),
        ("a: " + "9" * 5000, "is no int"),
        ("a: .nan", "no number that JSON knows"),
        ("a: -.inf", "no number that JSON knows"),
        ('a: "\\ud800"', "surrogate"),
        ("a: !!timestamp 2020-01-01", "the tag tag:yaml.org,2002:timestamp is not allowed"),
        ("? !!binary aGk=\n: 1", "binary is not allowed"),
        ("a: !!python/object:os.system x", "is not allowed"),
        ("? [a]\n: b", "a key must be text"),
        ("a: {b: 1, b: 2}", "key 'b' stands twice"),
        ("%YAML 3.0\n---\na: 1", "version"),
    ],
    ids=lambda given: given[:12],
)
def test_hostile_yaml_ends_at_once_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        read_documents(text)
    [problem] = refused.value.problems
    assert words in str(problem)
    assert "\n" not in str(problem)


HEAD = "apiVersion: moerator.dev/v1alpha1\nkind: MoEService\nmetadata: {name: tiny}\nspec:\n"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (
            "  model: {path: m}\n  parallelism: {expert: 4}\n  experts:\n    policy: Linear\n    minCopies: 9\n",
            "line 9: spec.experts.minCopies: experts.minCopies must not exceed parallelism.expert (times data): copies "
            "live on distinct ranks (got {'experts.minCopies': 9, 'parallelism.expert': 4, 'parallelism.data': 1})",
        ),
        (
            "  parallelism: {expert: 4}\n  model:\n    path: m\n    expertPacking:\n"
            "      precision: BFloat16\n      groupSize: 64\n",
            "line 10: spec.model.expertPacking.groupSize: BFloat16 has no scales: leave groupSize out "
            "(got {'groupSize': 64, 'precision': 'BFloat16'})",
        ),
        (
            "  model: {path: m}\n  parallelism: {expert: 4}\n  dispatch:\n    wire: int8\n",
            "line 8: spec.dispatch.wire: must be one of 'Float32', 'BFloat16', 'Float8' or 'Int8' (got 'int8'); "
            "did you mean Int8?",
        ),
        (
            "  parallelism: {expert: 4}\n  model: {path: 7}\n",
            "line 6: spec.model.path: must be a string (got 7); write it in quotes",
        ),
    ],
    ids=["values of two parts", "values of one part", "near miss", "number for text"],
)
def test_a_problem_names_the_line_and_the_values_that_it_is_about(spec: str, told: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        read_documents(HEAD + spec)
    assert [str(problem) for problem in refused.value.problems] == [told]


def test_a_wrong_head_hides_nothing_that_is_wrong_below() -> None:
    wrong = {**SERVICE, "metadata": {"name": "A"}, "spec": {**SERVICE["spec"], "gatway": {}}}
    with pytest.raises(InvalidSpec) as refused:
        read_documents(yaml.safe_dump(wrong))
    told = " ".join(str(problem) for problem in refused.value.problems)
    assert "metadata.name" in told and "spec.gatway" in told


def test_a_key_that_would_break_the_line_is_shown_in_quotes() -> None:
    with pytest.raises(InvalidSpec) as refused:
        read_documents(yaml.safe_dump({**SERVICE, "a\nb": 1, "spec": {**SERVICE["spec"], "c\td": 1}}))
    assert all("\n" not in str(problem) and "\t" not in str(problem) for problem in refused.value.problems)


def test_aliases_merges_and_times_of_day_are_read_as_kubernetes_reads_them() -> None:
    [(_, value)] = documents("a: &x {b: 1, k: 2}\nc: {<<: *x, k: 12:30}\nd: [*x, 0o17, =, 1e3]\n")
    assert value == {"a": {"b": 1, "k": 2}, "c": {"b": 1, "k": "12:30"}, "d": [{"b": 1, "k": 2}, 15, "=", 1000.0]}


def test_what_kubectl_get_writes_is_read_back() -> None:
    written = {
        "uid": "u",
        "resourceVersion": "7",
        "generation": 2,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
        "labels": {"app.kubernetes.io/name": "tiny"},
        "annotations": {"note": "a b"},
        "namespace": "team-a",
    }
    [document] = read_documents(yaml.safe_dump({**SERVICE, "metadata": {"name": "tiny", **written}, "status": {}}))
    assert (document.namespace, document.name) == ("team-a", "tiny")


@pytest.mark.parametrize("namespace", [5, ["a"], "", "A_B", "../../x", "a\n"])
def test_a_namespace_is_a_name_and_no_path(namespace: object) -> None:
    with pytest.raises(InvalidSpec, match=r"metadata\.namespace"):
        read_documents(yaml.safe_dump({**SERVICE, "metadata": {"name": "tiny", "namespace": namespace}}))


def test_a_cluster_wide_kind_belongs_to_no_namespace() -> None:
    with pytest.raises(InvalidSpec, match="a ClusterTopology belongs to no namespace"):
        read_documents(yaml.safe_dump({**GOOD["ClusterTopology"], "metadata": {"name": "a", "namespace": "b"}}))


def test_generate_name_is_refused_because_a_file_is_applied_again() -> None:
    with pytest.raises(InvalidSpec, match="give a name, not generateName"):
        read_documents(yaml.safe_dump({**SERVICE, "metadata": {"name": "a", "generateName": "b"}}))


@pytest.mark.parametrize("kind", ["MoEJob", "MoEService"])
def test_the_children_of_the_longest_name_have_valid_names(kind: str) -> None:
    for what in ("coordinator", "gateway", "map-511"):
        assert len(child_name(kind, "x" * MAX_NAME, what)) <= KIND_OF_NAME["ExpertMap"].max_name == 63


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


SERVICE_NOW: dict[str, Any] = {
    "model": {"path": "/model"},
    "parallelism": {"expert": 4},
    "gateway": {"port": 8000},
    "template": {"spec": {"image": "a"}},
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"gateway": {"port": 9000}}, "gateway.port cannot be changed"),
        ({"model": {"path": "/other"}}, "model cannot be changed"),
        ({"serving": {"maxContext": 64}}, "serving cannot be changed"),
        ({"experts": {"fallback": "Drop"}}, "experts.fallback cannot be changed"),
        ({"drills": "Allowed"}, "drills cannot be changed"),
        ({"template": {"spec": {"image": "b"}}}, "template cannot be changed"),
        ({"dispatch": {"wire": "Int8"}}, "of dispatch only probe can be changed"),
        ({"topologyConstraint": {"topologyName": "net", "pack": {"required": "rack"}}}, "topologyConstraint cannot"),
    ],
)
def test_a_change_that_the_api_server_refuses_is_known_without_one(change: dict[str, Any], word: str) -> None:
    [problem] = broken_changes(MoEServiceSpec, SERVICE_NOW, {**SERVICE_NOW, **change})
    assert problem.message.startswith(word)


def test_what_may_change_may_change() -> None:
    wider = {**SERVICE_NOW, "parallelism": {"expert": 6}, "gateway": {"port": 8000, "replicas": 3}, "suspend": True}
    assert broken_changes(MoEServiceSpec, SERVICE_NOW, {**wider, "spares": {"perDomain": 1}}) == []
    assert broken_changes(MoEServiceSpec, SERVICE_NOW, {**SERVICE_NOW, "dispatch": {"probe": 1}}) == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_rule_about_a_change_says_what_it_keeps(kind: ResourceKind) -> None:
    assert [rule.message for rule in kind.model.rules if ("oldSelf" in rule.cel) != (rule.keeps is not None)] == []
