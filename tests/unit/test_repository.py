"""What must hold of the repository itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    if name
]
MODULES = [path for path in TRACKED if path.suffix == ".py"]
MAX_LINES = 600


@pytest.mark.parametrize("root", ["operator", "runtime"])
def test_a_source_root_is_no_package(root: str) -> None:
    assert not (ROOT / root / "__init__.py").exists(), (
        f"{root}/__init__.py would shadow a module of the standard library"
    )


def test_the_standard_librarys_operator_is_still_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import operator; print(operator.add(1, 2))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "3\n"


def test_tests_are_no_package() -> None:
    assert not [path for path in TRACKED if path.name == "__init__.py" and "tests" in path.parts]


def test_every_module_is_small_enough_to_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in MODULES
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_every_package_says_why_it_exists() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.name != "conftest.py" and not path.read_text().lstrip().startswith(('"""', "r'''", 'r"""'))
    ]
    assert not silent


def test_pinned_versions_record_no_download_address() -> None:
    assert not re.findall(r"https?:|@ |--index|--find-links", (ROOT / "constraints.txt").read_text())


def test_no_exception_is_caught_blindly_outside_reconcile() -> None:
    """`except Exception` may note something and raise again; swallowing is reconcile's alone, which says why."""
    blind = [
        f"{path.relative_to(ROOT)}:{handler.lineno}"
        for path in MODULES
        if "tests" not in path.parts and path.name != "reconcile.py"
        for handler in ast.walk(ast.parse(path.read_text()))
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException"))
        and not any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
    ]
    assert not blind


def test_the_guide_to_the_planner_names_every_module_of_it() -> None:
    folder = ROOT / "operator/moe_core/experts"
    guide = set(re.findall(r"\w+", (folder / "__init__.py").read_text()))
    assert not {path.stem for path in folder.glob("*.py")} - {"__init__"} - guide
