"""Looking at a local run from its run folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_operator import cli_look
from moe_operator.cli import app
from moe_operator.cli_look import evaluate_path
from moe_operator.cli_run import ConditionTeller, outcome_of
from moe_operator.cluster.local_runs import PID_FILE
from moe_operator.cluster.local_store import ObjectStore

SERVICE: dict[str, Any] = {
    "apiVersion": "moerator.dev/v1alpha1",
    "kind": "MoEService",
    "metadata": {"name": "tiny"},
    "spec": {"model": {"path": "x"}, "parallelism": {"expert": 4}},
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What the shell of a run mirrors: one service with a status."""
    (tmp_path / PID_FILE).write_text(str(os.getpid()))
    store = ObjectStore(tmp_path / "objects", clock=lambda: 0.0)
    thing, _ = store.put_resource(SERVICE)
    ready = {"type": "Ready", "status": "True", "reason": "AllActive", "message": "4 of 4 ranks active"}
    thing["status"] = {"ranks": {"desired": 4, "active": 4}, "conditions": [ready], "memory": {"secret": 1}}
    store.touch(thing)
    store.write_mirror()
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (".spec.levels[*].name", "zone,rack"),
        ('.status.conditions[?(@.type=="Ready")].status', "True"),
        ('.status.conditions[?(@.type=="Nope")].status', ""),
        (".status.ranks.active", "4"),
        (".status.nothing.here", ""),
    ],
)
def test_a_columns_path_is_evaluated_as_kubectl_does(path: str, value: str) -> None:
    thing = {
        "spec": {"levels": [{"name": "zone"}, {"name": "rack"}]},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "ranks": {"active": 4}},
    }
    assert evaluate_path(thing, path) == value


def test_get_prints_the_columns_of_the_crd(run_folder: Path) -> None:
    code, said = run("get", "moesvc", "--run", str(run_folder))
    assert code == 0
    heading, row = said.splitlines()
    assert heading.split()[:4] == ["MOESERVICE", "RANKS", "ACTIVE", "READY"]
    assert row.split()[:4] == ["tiny", "4", "4", "True"]


def test_status_prints_conditions_and_numbers_but_not_the_brains_notes(run_folder: Path) -> None:
    code, said = run("status", "moesvc", "tiny", "--run", str(run_folder))
    assert (code, "AllActive" in said, "active: 4" in said, "secret" in said) == (0, True, True, False)


def test_a_drill_that_is_over_is_not_told_again_as_if_it_had_run(run_folder: Path, tmp_path: Path) -> None:
    target = {"kind": "MoEService", "name": "tiny", "rank": 2}
    drill = {"apiVersion": "moerator.dev/v1alpha1", "kind": "MoEDrill", "metadata": {"name": "ouch"}}
    drill["spec"] = {"target": target, "fault": {"type": "KillRank"}}
    store = ObjectStore(run_folder / "objects", clock=lambda: 0.0)
    thing, _ = store.put_resource(drill)
    passed = {"type": "Complete", "status": "True", "reason": "DrillPassed", "message": "restored after 17 s"}
    thing["status"] = {"verdict": "Passed", "conditions": [passed]}
    store.touch(thing)
    store.write_mirror()
    file = tmp_path / "drill.yaml"
    file.write_text(json.dumps(drill))
    code, said = run("drill", "-f", str(file), "--run", str(run_folder))
    assert code == 2
    assert "MoEDrill/ouch is over already; `moerator delete drill ouch`" in said


def test_a_missing_object_and_a_wrong_kind_are_refused_in_words(run_folder: Path) -> None:
    missing = run("status", "moesvc", "nobody", "--run", str(run_folder))
    wrong = run("get", "gateways", "--run", str(run_folder))
    assert (missing[0], "MoEService/nobody does not exist" in missing[1]) == (3, True)
    assert wrong[0] == 2
    assert "moeservices (moesvc)" in " ".join(wrong[1].split())


def test_an_edit_of_the_spec_raises_the_generation_and_nothing_else_does(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path, clock=lambda: 0.0)
    store.put_resource(SERVICE)
    _, changed_same = store.put_resource(SERVICE)
    edited, changed = store.put_resource({**SERVICE, "spec": {**SERVICE["spec"], "parallelism": {"expert": 3}}})
    assert (changed_same, changed, edited["metadata"]["generation"]) == (False, True, 2)


def test_only_turns_of_a_condition_are_told() -> None:
    teller = ConditionTeller(started_at=0.0)
    thing = {
        "kind": "MoEJob",
        "metadata": {"name": "tiny"},
        "status": {"conditions": [{"type": "Ready", "status": "False", "reason": "Starting", "message": "1 of 4"}]},
    }
    first = len(teller.turns(thing))
    thing["status"]["conditions"][0]["message"] = "2 of 4"  # type: ignore[index]
    again = len(teller.turns(thing))
    thing["status"]["conditions"][0]["reason"] = "Forming"  # type: ignore[index]
    assert (first, again, len(teller.turns(thing))) == (1, 0, 1)


@pytest.mark.parametrize(
    ("conditions", "outcome"),
    [
        ({}, None),
        ({"Complete": "True"}, True),
        ({"Failed": "True", "Complete": "False"}, False),
        ({"Ready": "False"}, None),
    ],
)
def test_a_resource_is_over_when_it_says_so(conditions: dict[str, str], outcome: bool | None) -> None:
    listed = [{"type": kind, "status": status, "reason": "R", "message": ""} for kind, status in conditions.items()]
    assert outcome_of({"status": {"conditions": listed}}) is outcome


@pytest.mark.parametrize(("verdict", "code"), [("Passed", 0), ("Failed", 1)])
def test_a_drill_on_a_cluster_is_applied_waited_for_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: str, code: int
) -> None:
    over = {"type": "Complete", "status": "True", "reason": f"Drill{verdict}", "message": "restored after 9.0 s"}
    (tmp_path / "answer.json").write_text(json.dumps({"status": {"verdict": verdict, "conditions": [over]}}))
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'case "$1" in apply) cat > {tmp_path}/applied;; get) cat {tmp_path}/answer.json;; esac\n'
    )
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(cli_look, "living_runs", list)
    file = tmp_path / "drill.yaml"
    file.write_text(
        "apiVersion: moerator.dev/v1alpha1\nkind: MoEDrill\nmetadata: {name: ouch, namespace: team-a}\n"
        "spec: {target: {kind: MoEService, name: chat, rank: 1}, fault: {type: KillRank}}\n"
    )
    ended, said = run("drill", "-f", str(file))
    assert (ended, f"MoEDrill/ouch: Drill{verdict}: restored after 9.0 s" in said) == (code, True)
    assert json.loads((tmp_path / "applied").read_text())["metadata"]["name"] == "ouch"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["apply -f -", "get moedrills.moerator.dev ouch -n team-a -o json"]


@pytest.mark.parametrize("verb", [("get",), ("status", "moej", "a")], ids=lambda verb: verb[0])
def test_a_cluster_that_does_not_answer_was_asked_because_no_local_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(cli_look, "living_runs", list)
    assert run(*verb) == (1, "no local run goes on (`moerator run -f FILE` starts one), so kubectl was asked\n")


@pytest.mark.parametrize(("generation", "outcome"), [(1, False), (2, None)])
def test_a_refused_edit_ends_no_run_and_a_resource_that_was_never_accepted_does(
    generation: int, outcome: bool | None
) -> None:
    refused = {"type": "Accepted", "status": "False", "reason": "CoverageImpossible", "message": ""}
    thing = {"metadata": {"generation": generation}, "status": {"conditions": [refused]}}
    assert outcome_of(thing) is outcome
