"""crds/ is generated; a change of a model without `make crds` fails here."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core.spec.crd import crd_files

CRDS = Path(__file__).parents[2] / "crds"


@pytest.mark.parametrize("name", sorted(crd_files()))
def test_the_file_equals_what_the_models_give(name: str) -> None:
    assert (CRDS / name).read_text() == crd_files()[name], "run `make crds`"


def test_no_other_file_lies_among_the_crds() -> None:
    assert {path.name for path in CRDS.iterdir()} == set(crd_files())


@pytest.mark.parametrize("name", sorted(crd_files()))
def test_kubectl_explain_has_words_for_every_field_that_is_ours(name: str) -> None:
    [version] = yaml.safe_load(crd_files()[name])["spec"]["versions"]
    whole = version["schema"]["openAPIV3Schema"]["properties"]
    assert [path for part in ("spec", "status") for path in undescribed(part, whole[part])] == []


def undescribed(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    """Fields without a description; what a pod is made of is Kubernetes' own."""
    if "description" not in node and not path.endswith("[]"):
        yield path
    if path.endswith(".template"):
        return
    for name, child in node.get("properties", {}).items():
        yield from undescribed(f"{path}.{name}", child)
    if "items" in node:
        yield from undescribed(f"{path}[]", node["items"])
