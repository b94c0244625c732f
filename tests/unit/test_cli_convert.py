"""The verb hands over to the runtime and says what came back."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_operator.cli import app

CONVERTED = {
    "experts": "Int4 in groups of 64",
    "calibration": "2048 tokens of text",
    "full_bytes": 8 << 20,
    "packed_bytes": 1 << 20,
    "errors": [0.0083],
    "layers": [
        {
            "least_own_rows": 200,
            "experts_filled_up": 3,
            "output_error_nearest": 6e-3,
            "output_error_chosen": 4e-4,
            "ways": {"gptq": 31, "nearest": 1},
        }
    ],
}


@pytest.fixture(autouse=True)
def in_a_folder_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


def answer(monkeypatch: pytest.MonkeyPatch, *, returncode: int = 0, stdout: str = "", stderr: str = "") -> list[Any]:
    asked: list[Any] = []

    def run(program: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.extend(program[1:])
        return subprocess.CompletedProcess(program, returncode, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def convert(*arguments: str, source: str = "a", destination: str = "b") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", "quantise", source, destination, *arguments])
    return result.exit_code, result.output


def test_what_came_of_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, stdout=json.dumps(CONVERTED))
    code, told = convert("--experts", "Int4", "--group-size", "64", "--calibrate", "stdlib", "--rows", "512")
    assert code == 0
    assert asked[:4] == ["-m", "moe_runtime.convert.quantise", "a", "b"]
    assert asked[4:] == [
        *("--experts", "Int4", "--calibrate", "stdlib", "--rows", "512"),
        *("--group-size", "64"),
    ]
    assert "b: experts as Int4 in groups of 64, 2048 tokens of text" in told
    assert "8.0 MiB in Float32, 1.0 MiB packed (8.0x)" in told
    assert "4.00e-04" in told and "gptq 31" in told


def test_json_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, stdout=json.dumps(CONVERTED))
    assert json.loads(convert("--experts", "Int4", "--json")[1]) == CONVERTED


def test_a_refusal_is_its_last_line_and_a_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, returncode=1, stderr="a warning\nb is not empty\n")
    assert convert("--experts", "Int4") == (2, "b is not empty\n")


def test_a_machine_without_the_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, returncode=1, stderr="/usr/bin/python: No module named 'moe_runtime'\n")
    code, told = convert("--experts", "Int4")
    assert code == 3
    assert "moerator[runtime]" in told


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--experts", "Int3"], "must be BFloat16, Float8, Int8 or Int4 (got Int3)"),
        (["--experts", "Float32"], "must be BFloat16, Float8, Int8 or Int4 (got Float32)"),
        (["--experts", "BFloat16", "--group-size", "8"], "BFloat16 has no scales (got 8)"),
        (["--experts", "Int4", "--rows", "512"], "--rows 512 means nothing without --calibrate"),
        (["--experts", "Int4", "--windows", "9"], "--windows 9 means nothing without --calibrate"),
        (["--experts", "Int4", "--calibrate", "c"], "--calibrate must be stdlib or a folder of text (got c)"),
    ],
)
def test_what_is_no_packing_is_refused_before_anything_is_started(
    given: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch)
    code, told = convert(*given)
    assert (code, asked) == (2, [])
    assert why in told


@pytest.mark.parametrize(
    ("source", "destination", "why"),
    [
        ("c", "b", "source must be the folder of a checkpoint: c holds no config.json"),
        ("a", "a", "destination must be an empty folder or not there (got a)"),
        ("a", "a/config.json", "destination must be an empty folder or not there (got a/config.json)"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_refused_before_anything_is_started(
    source: str, destination: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch)
    assert convert("--experts", "Int4", source=source, destination=destination) == (2, f"{why}\n")
    assert asked == []
