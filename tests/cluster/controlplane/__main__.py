"""A control plane to play with, until Ctrl-C; prints its kubeconfig's path.

    PYTHONPATH=tests python -m cluster.controlplane --nodes 4 --racks 2 --gpus 8

Nodes are simulated: pods are scheduled and become Running, their containers do not run.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
from pathlib import Path

from cluster.controlplane.build import BuildError
from cluster.controlplane.nodes import Node, kubelets
from cluster.controlplane.process import StartError
from cluster.controlplane.start import control_plane


def simulated_nodes(num_nodes: int, *, racks: int, gpus: int) -> list[Node]:
    """Nodes n0, n1, ... spread over racks r0, r1, ... in runs of neighbours."""
    return [
        Node(
            f"n{index}",
            {"topology.kubernetes.io/zone": "z0", "moerator.dev/rack": f"r{index * racks // num_nodes}"},
            {"nvidia.com/gpu": str(gpus)} if gpus else {},
        )
        for index in range(num_nodes)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.controlplane", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4, help="simulated nodes (default 4)")
    parser.add_argument("--racks", type=int, default=2, help="racks they are spread over, label moerator.dev/rack")
    parser.add_argument("--gpus", type=int, default=8, help="nvidia.com/gpu per node")
    parser.add_argument("--kubeconfig", type=Path, help="write the kubeconfig there too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="moerator-cluster-") as home,
            control_plane(directory=Path(home)) as cluster,
        ):
            nodes = simulated_nodes(options.nodes, racks=options.racks, gpus=options.gpus)
            with kubelets(cluster, nodes):
                path = options.kubeconfig or cluster.kubeconfig
                if options.kubeconfig:
                    options.kubeconfig.write_text(cluster.kubeconfig.read_text())
                print(
                    f"{options.nodes} nodes, ready after {cluster.ready_after_s:.1f} s; Ctrl-C stops it",
                    file=sys.stderr,
                )
                print(f"export KUBECONFIG={path} PATH={cluster.programs['kubectl'].parent}:$PATH", flush=True)
                threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except (StartError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
