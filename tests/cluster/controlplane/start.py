"""A real Kubernetes control plane on loopback for as long as a `with` block lasts.

    with control_plane() as cluster:
        cluster.kubectl("get", "nodes")

etcd, kube-apiserver and, unless told otherwise, kube-controller-manager and kube-scheduler, ready in seconds. There
are no kubelets: `nodes.py` plays them. By hand, until Ctrl-C:

    PYTHONPATH=tests python -m cluster.controlplane --nodes 4
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import secrets
import shutil
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.controlplane.build import ensure
from cluster.controlplane.process import Process, StartError, free_port

ADMIN = "admin"
SERVICE_CIDR = "10.96.0.0/16"
ISSUER = "https://kubernetes.default.svc.cluster.local"
_CONTROLLERS = {"system:kube-controller-manager": ["system:masters"], "system:kube-scheduler": ["system:masters"]}
# A P-256 key is a random scalar in this frame (RFC 5915, curve prime256v1, public point left to the reader).
_EC_KEY_HEAD, _EC_KEY_TAIL = bytes.fromhex("30310201010420"), bytes.fromhex("a00a06082a8648ce3d030107")


@dataclass(frozen=True)
class Settings:
    """How the control plane is started.

    Args:
        controller_manager, scheduler: leave one out where a test plays its part.
        users: name to groups, besides the administrator. kube-apiserver reads its tokens once, at start: later
            users are service accounts (`ControlPlane.service_account_kubeconfig`) or impersonated (`kubectl --as`).
        node_monitor_grace_s: a node whose heartbeat is older than this is NotReady (Kubernetes' default is 40 to 50).
        not_ready_toleration_s: pods of such a node are evicted after this (default 300).
        bind_address, advertise_address: other than loopback only where real pods must reach the API server.
        apiserver_flags: appended, so that they win.
    """

    controller_manager: bool = True
    scheduler: bool = True
    users: Mapping[str, Sequence[str]] = field(default_factory=dict)
    node_monitor_grace_s: int = 6
    not_ready_toleration_s: int = 300
    bind_address: str = "127.0.0.1"
    advertise_address: str = ""
    apiserver_flags: Sequence[str] = ()
    controller_manager_flags: Sequence[str] = ()
    ready_timeout_s: float = 90.0


@dataclass(frozen=True)
class ControlPlane:
    """A running control plane. `url` and the kubeconfigs name loopback; nothing of it outlives the `with` block."""

    url: str
    directory: Path
    ca_file: Path
    tokens: Mapping[str, str]
    programs: Mapping[str, Path]
    processes: Mapping[str, Process]
    ready_after_s: float = 0.0

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.kubeconfig_of(ADMIN)

    def kubeconfig_of(self, user: str) -> Path:
        """A kubeconfig of a user named in `Settings.users`."""
        return self.write_kubeconfig(user, self.tokens[user])

    def write_kubeconfig(self, user: str, token: str, *, url: str | None = None, namespace: str = "default") -> Path:
        path = self.directory / f"{user.replace(':', '-').replace('/', '-')}.kubeconfig"
        ca = base64.b64encode(self.ca_file.read_bytes()).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url or self.url, "certificate-authority-data": ca}}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user, "namespace": namespace}}],
            "current-context": "test",
        }
        text = json.dumps(config, indent=1)
        if not path.exists() or path.read_text() != text:  # another thread's kubectl may be reading it
            path.touch(mode=0o600)
            path.write_text(text)
        return path

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a fresh token of this service account, as a pod of it would hold."""
        token = self.kubectl("create", "token", name, "-n", namespace, "--duration=2h").strip()
        return self.write_kubeconfig(f"{namespace}-{name}", token, namespace=namespace)

    def run_kubectl(
        self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """kubectl with the administrator's kubeconfig (or another); its exit code is the caller's business."""
        return subprocess.run(
            [self.programs["kubectl"], "--kubeconfig", kubeconfig or self.kubeconfig, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def kubectl(self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
        """As `run_kubectl`, but returns what it printed.

        Raises:
            AssertionError: kubectl failed; the text is its message.
        """
        done = self.run_kubectl(*arguments, stdin=stdin, kubeconfig=kubeconfig)
        if done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    @contextlib.contextmanager
    def paused(self, program: str) -> Iterator[None]:
        """The program hangs (SIGSTOP): its connections stay open and nobody answers."""
        self.processes[program].pause()
        try:
            yield
        finally:
            self.processes[program].resume()

    def restart(self, program: str) -> None:
        """SIGKILL and start again on the same port and data; returns once it is ready again."""
        process = self.processes[program]
        process.kill()
        process.start()
        if program == "kube-apiserver":
            process.wait_ready(self.is_ready, timeout_s=60)

    def is_ready(self) -> bool:
        return _get(f"{self.url}/readyz", self.tokens[ADMIN], self.ca_file) is not None


@contextlib.contextmanager
def control_plane(settings: Settings | None = None, *, directory: Path | None = None) -> Iterator[ControlPlane]:
    """Start everything, wait until it is ready, and kill everything at the end, also when a start fails half-way.

    Args:
        directory: where data, logs and kubeconfigs go; a temporary one, removed at the end, when not given.

    Raises:
        StartError: with the end of the failing program's log. (Its folder then stays, for the rest of the log.)
        BuildError: a program is missing and cannot be built.
    """
    settings = settings or Settings()
    wanted = ["etcd", "kube-apiserver", "kubectl"]
    wanted += ["kube-controller-manager"] * settings.controller_manager + ["kube-scheduler"] * settings.scheduler
    programs = ensure(wanted)
    home = directory or Path(tempfile.mkdtemp(prefix="moerator-cluster-"))
    home.mkdir(parents=True, exist_ok=True)
    processes: dict[str, Process] = {}
    failed = False
    try:
        yield _start_again_if_ports_clash(settings, home, programs, processes)
    except StartError:
        failed = True
        raise
    finally:
        _kill(processes)
        if directory is None and not failed:
            shutil.rmtree(home, ignore_errors=True)


def _kill(processes: dict[str, Process]) -> None:
    """The data is thrown away: nothing is gained by waiting for watches to end."""
    while processes:
        processes.popitem()[1].kill()


def _start_again_if_ports_clash(
    settings: Settings, home: Path, programs: Mapping[str, Path], processes: dict[str, Process]
) -> ControlPlane:
    """A free port may be taken by another test run before the program binds it; two more draws are enough."""
    for _ in range(2):
        try:
            return _start(settings, home, programs, processes)
        except StartError as error:
            if "address already in use" not in str(error):
                raise
        _kill(processes)
        shutil.rmtree(home / "etcd", ignore_errors=True)
    return _start(settings, home, programs, processes)


def _start(settings: Settings, home: Path, programs: Mapping[str, Path], processes: dict[str, Process]) -> ControlPlane:
    start_s = time.monotonic()
    users = {ADMIN: ["system:masters"], **_CONTROLLERS, **settings.users}
    tokens = {user: secrets.token_hex(16) for user in users}
    _write_secret(home / "tokens.csv", _token_file(users, tokens))
    _write_secret(home / "service-account.key", _new_ec_key())

    def launch(name: str, *flags: str) -> Process:
        processes[name] = Process(name, [programs[name], *flags], home / f"{name}.log")
        processes[name].start()
        return processes[name]

    etcd_port, api_port = free_port(), free_port()
    etcd_url = f"http://127.0.0.1:{etcd_port}"
    launch("etcd", *_etcd_flags(home, etcd_url)).wait_ready(
        lambda: _get(f"{etcd_url}/health") is not None, timeout_s=settings.ready_timeout_s
    )
    cluster = ControlPlane(
        url=f"https://{settings.advertise_address or '127.0.0.1'}:{api_port}",  # its certificate names this address
        directory=home,
        ca_file=home / "certificates" / "apiserver.crt",  # kube-apiserver signs its own at start
        tokens=tokens,
        programs=programs,
        processes=processes,
    )
    launch("kube-apiserver", *_apiserver_flags(settings, home, etcd_url, api_port)).wait_ready(
        cluster.is_ready, timeout_s=settings.ready_timeout_s
    )
    if settings.controller_manager:
        config = cluster.kubeconfig_of("system:kube-controller-manager")
        launch("kube-controller-manager", *_controller_manager_flags(settings, cluster, config))
    if settings.scheduler:
        config = cluster.kubeconfig_of("system:kube-scheduler")
        launch("kube-scheduler", *_scheduler_flags(home, config))
    if settings.controller_manager:
        # Pods are refused in a namespace without it, so a control plane lacking it is not ready for a test.
        account = f"{cluster.url}/api/v1/namespaces/default/serviceaccounts/default"
        processes["kube-controller-manager"].wait_ready(
            lambda: _get(account, tokens[ADMIN], cluster.ca_file) is not None, timeout_s=settings.ready_timeout_s
        )
    return dataclasses.replace(cluster, ready_after_s=time.monotonic() - start_s)


def _etcd_flags(home: Path, url: str) -> list[str]:
    peer = f"http://127.0.0.1:{free_port()}"
    return [
        *("--name=test", f"--data-dir={home / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn"),
        *(f"--listen-client-urls={url}", f"--advertise-client-urls={url}"),
        *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=test={peer}"),
    ]


def _apiserver_flags(settings: Settings, home: Path, etcd_url: str, port: int) -> list[str]:
    advertise = settings.advertise_address
    return [
        *(f"--etcd-servers={etcd_url}", f"--secure-port={port}", f"--bind-address={settings.bind_address}"),
        # Endpoints of the `kubernetes` Service may not be loopback addresses: without another there are none.
        *([f"--advertise-address={advertise}"] if advertise else ["--endpoint-reconciler-type=none"]),
        f"--cert-dir={home / 'certificates'}",
        *(f"--token-auth-file={home / 'tokens.csv'}", "--authorization-mode=Node,RBAC", "--allow-privileged=true"),
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={home / 'service-account.key'}",
        f"--service-account-signing-key-file={home / 'service-account.key'}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--default-not-ready-toleration-seconds={settings.not_ready_toleration_s}",
        f"--default-unreachable-toleration-seconds={settings.not_ready_toleration_s}",
        "--profiling=false",
        *settings.apiserver_flags,
    ]


def _controller_manager_flags(settings: Settings, cluster: ControlPlane, kubeconfig: Path) -> list[str]:
    return [
        *(f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1"),
        f"--secure-port={free_port()}",
        f"--service-account-private-key-file={cluster.directory / 'service-account.key'}",
        f"--root-ca-file={cluster.ca_file}",
        *("--node-monitor-period=1s", f"--node-monitor-grace-period={settings.node_monitor_grace_s}s"),
        *("--kube-api-qps=300", "--kube-api-burst=600", "--profiling=false"),
        *settings.controller_manager_flags,
    ]


def _scheduler_flags(home: Path, kubeconfig: Path) -> list[str]:
    config = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {"kubeconfig": str(kubeconfig), "qps": 300, "burst": 600},
        "podInitialBackoffSeconds": 1,
        "podMaxBackoffSeconds": 2,
    }
    path = home / "kube-scheduler.json"
    path.write_text(json.dumps(config))
    return [f"--config={path}", "--bind-address=127.0.0.1", f"--secure-port={free_port()}"]


def _token_file(users: Mapping[str, Sequence[str]], tokens: Mapping[str, str]) -> str:
    return "".join(f'{tokens[user]},{user},{user},"{",".join(groups)}"\n' for user, groups in users.items())


def _new_ec_key() -> str:
    scalar = b"\x00" + secrets.token_bytes(31)  # below the order of the curve, whatever was drawn
    body = base64.b64encode(_EC_KEY_HEAD + scalar + _EC_KEY_TAIL).decode()
    return f"-----BEGIN EC PRIVATE KEY-----\n{body}\n-----END EC PRIVATE KEY-----\n"


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _get(url: str, token: str = "", ca_file: Path | None = None) -> Any:
    """The JSON (or else the text) of a successful answer, None otherwise: not listening yet, or not ready."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        context = ssl.create_default_context(cafile=str(ca_file)) if ca_file else None
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=2, context=context) as answer:
            body = answer.read().decode()
    except OSError:  # URLError, refused connections, time-outs and a certificate file not written yet
        return None
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        return body
