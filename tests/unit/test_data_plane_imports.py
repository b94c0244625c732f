"""Router, dispatch and kernels come without Ray and transformers, and on a CPU without Triton."""

import os
import pkgutil
import subprocess
import sys

from moe_runtime import dispatch, kernels, router

UNASKED = ("ray", "transformers", "triton")


def test_router_dispatch_and_kernels_import_nothing_that_was_not_asked_for() -> None:
    names = [
        f"{package.__name__}.{module.name}"
        for package in (dispatch, kernels, router)
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.endswith("_triton")
    ]
    assert len(names) > 30
    code = f"import sys, {', '.join(names)}; print([name for name in {UNASKED} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
