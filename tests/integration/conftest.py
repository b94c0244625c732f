"""Fixtures that several integration tests share."""

from collections import UserDict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from numerics_reference import Reference


class _References(UserDict[str, "Reference"]):
    """Made when first asked for: each takes a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, family: str) -> "Reference":
        from numerics_reference import Reference

        self[family] = Reference.make(family, self._folder / family)
        return self[family]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> "UserDict[str, Reference]":
    """Single-process transformers models by family, with their checkpoints."""
    return _References(tmp_path_factory.mktemp("references"))
