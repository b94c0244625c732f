"""What the command line says about files."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_operator.cli import app

GOOD = """
apiVersion: moerator.dev/v1alpha1
kind: MoEService
metadata: {name: tiny}
spec:
  model: {path: checkpoint}
  parallelism: {expert: 4}
"""


def run(*arguments: str, text: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, input=text)
    return result.exit_code, result.output


def test_every_document_of_a_good_file_is_named() -> None:
    code, said = run("validate", "-f", "-", text=GOOD + "---" + GOOD.replace("tiny", "other"))
    assert (code, said.splitlines()) == (0, ["MoEService/tiny is valid", "MoEService/other is valid"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("parallelism", "paralelism"), ["line 7", "spec.paralelism", "did you mean parallelism?"]),
        (GOOD.replace("MoEService", "MoEServce"), ["line 3", "kind", "did you mean MoEService?"]),
        (GOOD.replace("expert: 4", "expert: 0"), ["line 7", "spec.parallelism.expert", "got 0"]),
        ("a: [", ["this is not YAML"]),
        ("", ["the file holds no resource"]),
    ],
    ids=["a typo near a field", "an unknown kind", "a value out of bounds", "not YAML", "an empty file"],
)
def test_a_bad_file_is_refused_with_what_to_write_instead(text: str, words: list[str]) -> None:
    code, said = run("validate", "-f", "-", text=text)
    assert code == 2
    assert [word for word in words if word not in said] == []


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    code, said = run("validate", "-f", str(tmp_path / "nowhere.yaml"))
    assert (code, "nowhere.yaml: cannot be read: No such file or directory" in said) == (2, True)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00")
    code, said = run("validate", "-f", str(path))
    assert (code, "not UTF-8" in said) == (2, True)


def test_an_expert_map_is_not_run_from_a_file() -> None:
    text = """
apiVersion: moerator.dev/v1alpha1
kind: ExpertMap
metadata: {name: x}
spec: {generation: 0, digest: d, numLogicalExperts: 1, slotsOfRank: [1], layers: [{logicalOfSlot: [0]}]}
"""
    code, said = run("run", "-f", "-", text=text)
    assert (code, "written by moerator" in said) == (2, True)


def test_help_names_every_command_and_the_exit_codes() -> None:
    code, said = run("--help")
    assert code == 0
    assert [
        word for word in ("run", "validate", "demo", "drill", "get", "status", "crds", "operator") if word not in said
    ] == []
    assert "130 interrupted" in " ".join(said.split())
