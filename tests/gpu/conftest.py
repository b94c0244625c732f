"""Tests on a real GPU: `make gpu`. Without one they are skipped, and say so."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not torch.cuda.is_available():
        reason = "no CUDA device on this machine"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "Triton's interpreter is on: run `make gpu`, which turns it off before triton is imported"
    if reason is not None:
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(pytest.mark.skip(reason=reason))
