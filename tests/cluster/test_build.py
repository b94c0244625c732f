"""Programs are built once, whole or not at all, and taken from where a person already has them."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.controlplane import build

GOOD = 'package main\n\nimport "fmt"\n\nvar version = "unset"\n\nfunc main() { fmt.Println(version) }\n'


@pytest.fixture(autouse=True)
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `small` with one program `hello`, and a cache of its own; its folder."""
    folder = tmp_path / "tools" / "small"
    folder.mkdir(parents=True)
    (folder / "go.mod").write_text("module example.test/small\n\ngo 1.26\n\n// example.test/pinned v1.2.3\n")
    (folder / "go.sum").write_text("")
    (folder / "main.go").write_text(GOOD)
    module = build.Module("small", "example.test/pinned", {"hello": "."}, ("main.version",))
    monkeypatch.setattr(build, "TOOLS", tmp_path / "tools")
    monkeypatch.setattr(build, "MODULE_OF_PROGRAM", build.MODULE_OF_PROGRAM | {"hello": module})
    monkeypatch.setenv("MOERATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    yield folder


def test_a_program_is_built_with_its_version_and_the_second_time_found(capsys: pytest.CaptureFixture[str]) -> None:
    path = build.ensure(["hello"])["hello"]
    assert subprocess.run([path], capture_output=True, text=True, check=True).stdout == "v1.2.3\n"
    assert "hello v1.2.3 built in" in capsys.readouterr().err
    assert build.ensure(["hello"])["hello"] == path
    assert capsys.readouterr().err == ""


def test_a_changed_pin_is_another_place_in_the_cache(workshop: Path) -> None:
    before = build.program_path("hello")
    (workshop / "go.sum").write_text("example.test/x v1.0.0 h1:=\n")
    assert build.program_path("hello") != before


def test_programs_that_a_person_has_are_used_and_the_others_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "etcd").write_text("")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    paths = build.ensure(["etcd", "hello"])
    assert paths["etcd"] == assets / "etcd"
    assert paths["hello"].is_relative_to(tmp_path / "cache")


def test_a_build_that_fails_says_why_and_leaves_nothing(workshop: Path, tmp_path: Path) -> None:
    (workshop / "main.go").write_text("package main\n\nfunc main() { undefined() }\n")
    with pytest.raises(build.BuildError, match=r"tools/small failed:\n(.|\n)*undefined: undefined"):
        build.ensure(["hello"])
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []


def test_two_that_need_it_at_once_build_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(build.ensure, [["hello"], ["hello"]])
    assert first == second
    assert capsys.readouterr().err.count("built in") == 1


def test_an_unknown_program_is_refused_with_those_there_are() -> None:
    with pytest.raises(build.BuildError, match=r"no program 'kubelt'; there are .*kubelet"):
        build.program_path("kubelt")
    assert build.main(["kubelt"]) == 1


@pytest.mark.parametrize("module", build.MODULES, ids=lambda module: module.name)
def test_the_version_of_every_module_is_read_from_its_pins(
    module: build.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert dataclasses.replace(module).version.startswith("v")
