"""The node tier's one node for all its tests. Where it cannot run it says why; nothing is skipped silently."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.machine import undertaker
from node.machine.node import Node, node

PROGRAMS = ("runc", "buildah", "debootstrap", "ip", "iptables")


def why_not() -> str:
    """Why pods cannot really run here; empty when they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux: it makes namespaces, mounts and containers"
    if sys.version_info[:2] != (3, 11):
        return "the pods' Debian has Python 3.11 and mounts this environment: it must be 3.11 too"
    missing = [name for name in PROGRAMS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing:
        return f"needs the Debian packages of {', '.join(missing)} (.ci/run installs them)"
    if not Path("/usr/lib/cni/ptp").exists():
        return "needs the Debian package containernetworking-plugins (.ci/run installs it)"
    return ""


@pytest.fixture(scope="session")
def real_node() -> Iterator[Node]:
    if reason := why_not():
        pytest.skip(reason)
    home = Path(tempfile.mkdtemp(prefix="moerator-node-", dir="/var/tmp"))
    watch = subprocess.Popen([sys.executable, undertaker.__file__, str(os.getpid()), str(home)], start_new_session=True)
    try:
        with node(home, keep=(watch.pid,)) as running:
            yield running
    finally:
        watch.kill()
        watch.wait()
        undertaker.bury(str(home))
