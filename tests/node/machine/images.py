"""Images without a registry: a Debian base made here once, and our own Dockerfiles built on it.

The base is kept as a tar in the cache (debootstrap takes a minute or two); the built images are small, since the
dependencies are mounted (`EXTRAS=` in the Dockerfiles).
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.controlplane.build import cache_dir
from node.machine.isolation import run

ROOT = Path(__file__).parents[3]
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,iproute2,ca-certificates"
BASE, PAUSE = "localhost/moerator-base:test", "localhost/moerator-pause:test"
OPERATOR, RUNTIME = "localhost/moerator-operator:test", "localhost/moerator-runtime:test"


@contextlib.contextmanager
def _only_one(name: str) -> Iterator[None]:
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def base_tar() -> Path:
    """The root file system of a minimal Debian with Python, made on the first call."""
    target = cache_dir() / f"base-{SUITE}.tar"
    with _only_one("base"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".base-") as scratch:
                root = Path(scratch, "root")
                print(f"making a Debian {SUITE} base in {cache_dir()} (once)", flush=True)
                run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root, timeout_s=900)
                shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
                shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
                run("tar", "-C", root, "-cf", Path(scratch, "base.tar"), "--exclude=./dev/*", ".")
                Path(scratch, "base.tar").rename(target)
    return target


class Images:
    """Builds into a buildah store of its own below `home` and exports archives for containerd."""

    def __init__(self, home: Path) -> None:
        self._home = home
        home.mkdir(parents=True, exist_ok=True)

    def _buildah(self, *arguments: str | Path, timeout_s: float = 300) -> str:
        store: tuple[str | Path, ...] = (
            "--root",
            self._home / "store",
            "--runroot",
            self._home / "run",
            "--storage-driver",
            "overlay",
        )
        return run("buildah", *store, *arguments, timeout_s=timeout_s)

    def build_all(self) -> list[Path]:
        """Archives of base, pause, operator and runtime images, in that order."""
        context = self._home / "base"
        context.mkdir(exist_ok=True)
        link = context / "base.tar"
        if not link.exists():
            os.link(base_tar(), link)
        (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        self._build(BASE, context / "Dockerfile", context)
        pause = self._home / "pause"
        pause.mkdir(exist_ok=True)
        (pause / "Dockerfile").write_text(f'FROM {BASE}\nENTRYPOINT ["sleep", "infinity"]\n')
        self._build(PAUSE, pause / "Dockerfile", pause)
        arguments = ("--build-arg", f"BASE={BASE}", "--build-arg", "EXTRAS=")
        self._build(OPERATOR, ROOT / "deploy/operator.Dockerfile", ROOT, *arguments)
        self._build(RUNTIME, ROOT / "deploy/runtime.Dockerfile", ROOT, *arguments)
        return [self._export(name) for name in (PAUSE, OPERATOR, RUNTIME)]

    def _build(self, name: str, dockerfile: Path, context: Path, *arguments: str) -> None:
        how: list[str | Path] = ["--isolation", "chroot", "--pull=never", *arguments]
        self._buildah("build", *how, "--tag", name, "--file", dockerfile, context)

    def _export(self, name: str) -> Path:
        archive = self._home / f"{name.rpartition('/')[2].replace(':', '-')}.tar"
        archive.unlink(missing_ok=True)
        self._buildah("push", name, f"oci-archive:{archive}:{name}")
        return archive
