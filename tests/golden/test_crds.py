"""crds/ is generated; a change of a model without `make crds` fails here."""

from pathlib import Path

import pytest

from moe_core.spec.crd import crd_files

CRDS = Path(__file__).parents[2] / "crds"


@pytest.mark.parametrize("name", sorted(crd_files()))
def test_the_file_equals_what_the_models_give(name: str) -> None:
    assert (CRDS / name).read_text() == crd_files()[name], "run `make crds`"


def test_no_other_file_lies_among_the_crds() -> None:
    assert {path.name for path in CRDS.iterdir()} == set(crd_files())
