"""One real node: containerd, kubelet, kube-proxy and CoreDNS beside the control plane, while a `with` block lasts.

Pods get a routed veth each (CNI `ptp`), Services work through kube-proxy, names through CoreDNS: what a user's cluster
has. Everything runs in the namespaces of `isolation.py`.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.controlplane.build import NODE_PROGRAMS, ensure
from cluster.controlplane.process import Process
from cluster.controlplane.start import ControlPlane, Settings, control_plane
from node.machine.images import PAUSE, Images
from node.machine.isolation import isolated, run

NAME, ADDRESS, POD_SUBNET = "node-1", "10.89.0.1", "10.88.0.0/24"
KUBELET, PROXY, DNS = f"system:node:{NAME}", "system:kube-proxy", "coredns"

CONTAINERD = """\
version = 3
root = "{home}/root"
state = "{home}/state"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{home}/cni"
"""
COREFILE = """\
.:53 {{
    bind {address}
    errors
    kubernetes cluster.local {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 1
    }}
}}
"""


@dataclass(frozen=True)
class Node:
    cluster: ControlPlane
    home: Path
    socket: Path

    def load(self, archives: Sequence[Path]) -> None:
        """Make images known to the kubelet."""
        for archive in archives:
            run(self.cluster.programs["ctr"], "--address", self.socket, "-n", "k8s.io", "images", "import", archive)


@contextlib.contextmanager
def node(home: Path, *, keep: Sequence[int] = ()) -> Iterator[Node]:
    """A Ready node with our images on it. `home` must be on a real disk: overlayfs does not stack on itself.
    Children in `keep` are not of the node and live on at its end.

    Raises:
        StartError, RuntimeError: with the end of the log of the program that did not come up.
    """
    programs = ensure(NODE_PROGRAMS)
    archives = Images(home / "images").build_all()
    settings = Settings(
        bind_address="0.0.0.0",  # of this network namespace only
        advertise_address=ADDRESS,
        users={KUBELET: ["system:nodes"], PROXY: ["system:node-proxier"], DNS: ["system:masters"]},
        node_monitor_grace_s=20,
    )
    processes: list[Process] = []
    with isolated(ADDRESS, keep=keep), control_plane(settings, directory=home / "control-plane") as plane:
        cluster = ControlPlane(**{**plane.__dict__, "programs": {**plane.programs, **programs}})
        made = Node(cluster, home, home / "containerd.sock")
        try:
            processes.append(_containerd(made))
            made.load(archives)
            processes.append(_kubelet(made))
            processes.append(_proxy(made))
            processes.append(_dns(made))
            _wait_ready(made, processes)
            yield made
        finally:
            for process in reversed(processes):
                process.kill()


def _start(made: Node, name: str, *flags: str | Path) -> Process:
    process = Process(name, [made.cluster.programs[name], *flags], made.home / f"{name}.log")
    process.start()
    return process


def _containerd(made: Node) -> Process:
    home = made.home / "containerd"
    (home / "cni").mkdir(parents=True, exist_ok=True)
    ipam = {
        "type": "host-local",
        "dataDir": str(home / "addresses"),
        "ranges": [[{"subnet": POD_SUBNET}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}]}
    (home / "cni" / "10-pods.conflist").write_text(json.dumps(network))
    config = home / "config.toml"
    config.write_text(CONTAINERD.format(home=home, socket=made.socket, pause=PAUSE))
    shim = made.cluster.programs["containerd-shim-runc-v2"]  # looked for on PATH
    command = ["env", f"PATH={shim.parent}:/usr/sbin:/usr/bin:/sbin:/bin", str(made.cluster.programs["containerd"])]
    process = Process("containerd", [*command, "--config", str(config)], made.home / "containerd.log")
    process.start()
    process.wait_ready(lambda: made.socket.exists() and _answers(made), timeout_s=30)
    return process


def _answers(made: Node) -> bool:
    try:
        run(made.cluster.programs["ctr"], "--address", made.socket, "version", timeout_s=5)
    except (RuntimeError, TimeoutError):
        return False
    return True


def _kubelet(made: Node) -> Process:
    home = made.home / "kubelet"
    home.mkdir(exist_ok=True)
    (home / "resolv.conf").write_text(f"nameserver {ADDRESS}\n")
    config = {
        "kind": "KubeletConfiguration",
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "failCgroupV1": False,
        "failSwapOn": False,
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": f"unix://{made.socket}",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},  # nobody outside the network namespace reaches it
        "clusterDNS": [ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(home / "resolv.conf"),
        "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
        "localStorageCapacityIsolation": False,
    }
    path = home / "config.json"
    path.write_text(json.dumps(config))
    kubeconfig = made.cluster.kubeconfig_of(KUBELET)
    return _start(
        made,
        "kubelet",
        *(f"--config={path}", f"--kubeconfig={kubeconfig}", f"--root-dir={home / 'root'}"),
        *(f"--hostname-override={NAME}", f"--node-ip={ADDRESS}", f"--cert-dir={home / 'pki'}"),
    )


def _proxy(made: Node) -> Process:
    kubeconfig = made.cluster.kubeconfig_of(PROXY)
    return _start(
        made,
        "kube-proxy",
        *("--proxy-mode=iptables", f"--kubeconfig={kubeconfig}", f"--hostname-override={NAME}"),
        *(f"--cluster-cidr={POD_SUBNET}", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s"),
        *("--conntrack-tcp-timeout-close-wait=0s", "--healthz-bind-address="),
    )


def _dns(made: Node) -> Process:
    corefile = made.home / "Corefile"
    corefile.write_text(COREFILE.format(address=ADDRESS, kubeconfig=made.cluster.kubeconfig_of(DNS)))
    return _start(made, "coredns", "-conf", corefile)


def _wait_ready(made: Node, processes: Sequence[Process], *, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    path = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
    while made.cluster.run_kubectl("get", "node", NAME, "-o", path).stdout != "True":
        for process in processes:
            process.wait_ready(lambda: True, timeout_s=0)  # raises with the log when it has ended
            if not process.is_running:
                raise RuntimeError(f"{process.name} ended{process.log_tail()}")
        if time.monotonic() > deadline:
            logs = "".join(process.log_tail(8) for process in processes)
            raise RuntimeError(f"{NAME} was not Ready after {timeout_s:.0f} s{logs}")
        time.sleep(0.5)
