"""What a pod's environment says, read once at the border; every mistake names its variable.

Not the rendered configuration of the whole group (that is `RuntimeConfig`, a file this environment points to).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from moe_core.contract.names import ROLE_COORDINATOR, ROLE_GATEWAY, ROLE_NODE, ROLE_RANK, ray_namespace
from moe_core.contract.runtime_config import (
    ENV_CONFIG,
    ENV_HEALTH_PORT,
    ENV_NODE_NAME,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_POD_UID,
    ENV_RANK,
    ENV_REATTACH,
    ENV_ROLE,
    ENV_RUN,
    ENV_SHARED_RAY,
    ENV_STATE_DIR,
    ENV_TOKEN_FILE,
    RuntimeConfig,
)
from moe_core.outcome import InvalidInput, InvalidSpec, Problem

Role = Literal["coordinator", "rank", "gateway", "node"]
_ROLES = (ROLE_COORDINATOR, ROLE_RANK, ROLE_GATEWAY, ROLE_NODE)
_MAX_RANK = 1 << 20


@dataclass(frozen=True, slots=True)
class PodEnv:
    """One pod. `rank` is None for every role but rank."""

    role: Role
    rank: int | None
    pod_name: str
    pod_uid: str
    pod_ip: str
    token: str
    state_dir: Path
    shared_ray: bool
    config_path: Path
    token_path: Path
    config: RuntimeConfig
    node_name: str = ""
    health_port: int | None = None
    reattach: bool = False
    """This coordinator takes the place of one that is gone, and pods of the group may live."""
    run_folder: Path = Path("/tmp")
    """What pods of one machine share lies here."""

    @property
    def ray_namespace(self) -> str:
        return ray_namespace(self.config.namespace, self.config.owner_kind, self.config.name)

    @property
    def ray_address(self) -> str:
        """host:port of the Ray head, which lives in the coordinator's pod."""
        return f"{self.config.coordinator_host}:{self.config.ray_port}"

    @property
    def coordinator_url(self) -> str:
        return f"http://{self.config.coordinator_host}:{self.config.coordinator_port}"


def ray_token(token: str) -> str:
    """Ray's own token: derived, so that one secret is enough and neither reveals the other.

    >>> len(ray_token("secret"))
    64
    """
    return sha256(b"moerator ray token:" + token.encode()).hexdigest()


def read_pod_env(environ: Mapping[str, str]) -> PodEnv:
    """Read and check the environment, the token and the configuration. Raises InvalidSpec with every Problem found."""
    problems: list[Problem] = []

    def need(name: str) -> str:
        value = environ.get(name, "")
        if not value:
            problems.append(Problem(name, value, "environment variable is required"))
        return value

    role, uid, name, ip = need(ENV_ROLE), need(ENV_POD_UID), need(ENV_POD_NAME), need(ENV_POD_IP)
    config_path, token_path = need(ENV_CONFIG), need(ENV_TOKEN_FILE)
    state_dir = need(ENV_STATE_DIR)
    if role and role not in _ROLES:
        problems.append(Problem(ENV_ROLE, role, f"must be one of {', '.join(_ROLES)}"))
    rank = _read_rank(environ, problems) if role == ROLE_RANK else None
    health_port = environ.get(ENV_HEALTH_PORT, "")
    if health_port and not (health_port.isdecimal() and 0 < int(health_port) < 65536):
        problems.append(Problem(ENV_HEALTH_PORT, health_port, "must be a port"))
    shared, reattach = environ.get(ENV_SHARED_RAY, ""), environ.get(ENV_REATTACH, "")
    for switch, value in ((ENV_SHARED_RAY, shared), (ENV_REATTACH, reattach)):
        if value not in ("", "0", "1"):
            problems.append(Problem(switch, value, "must be 0 or 1"))
    token = _read_token(token_path, problems) if token_path else ""
    config = _read_config(config_path, problems) if config_path else None
    if problems or config is None:
        raise InvalidSpec(problems)
    return PodEnv(
        role=role,  # type: ignore[arg-type]  # checked above against the literal's values
        rank=rank,
        pod_name=name,
        pod_uid=uid,
        pod_ip=ip,
        token=token,
        state_dir=Path(state_dir),
        shared_ray=shared == "1",
        config_path=Path(config_path),
        token_path=Path(token_path),
        config=config,
        node_name=environ.get(ENV_NODE_NAME, ""),
        health_port=int(health_port) if health_port else None,
        reattach=reattach == "1",
        run_folder=Path(environ.get(ENV_RUN) or "/tmp"),
    )


def _read_rank(environ: Mapping[str, str], problems: list[Problem]) -> int | None:
    text = environ.get(ENV_RANK, "")
    if not text.isdecimal() or int(text) >= _MAX_RANK:
        problems.append(Problem(ENV_RANK, text, "must be a rank id, a whole number from 0"))
        return None
    return int(text)


def _read_token(path: str, problems: list[Problem]) -> str:
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(ENV_TOKEN_FILE, path, f"cannot be read: {error}"))
        return ""
    if len(token) < 16:
        problems.append(
            Problem(ENV_TOKEN_FILE, path, f"holds a token of {len(token)} characters, at least 16 are needed")
        )
    return token


def _read_config(path: str, problems: list[Problem]) -> RuntimeConfig | None:
    try:
        return RuntimeConfig.parse(Path(path).read_bytes())
    except OSError as error:
        problems.append(Problem(ENV_CONFIG, path, f"cannot be read: {error}"))
    except InvalidInput as error:
        problems.append(Problem(ENV_CONFIG, path, str(error)))
    return None
