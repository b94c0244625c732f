"""The real helm against a test's control plane, with a home of its own: it touches nothing of a person's."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.controlplane.build import ensure


@dataclass(frozen=True)
class Helm:
    """`home` takes helm's cache, configuration and data."""

    home: Path
    kubeconfig: Path | None = None

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        places = {f"HELM_{name}_HOME": str(self.home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        return subprocess.run(
            [ensure(["helm"])["helm"], *arguments],
            env=os.environ | places | {"KUBECONFIG": str(self.kubeconfig or self.home / "none")},
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    def __call__(self, *arguments: str) -> str:
        """What helm printed.

        Raises:
            AssertionError: it failed; the text is its message.
        """
        done = self.run(*arguments)
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}"
        return done.stdout
