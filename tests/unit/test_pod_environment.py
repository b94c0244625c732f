"""A pod's environment: everything wrong is said at once, by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_core.outcome import InvalidSpec
from moe_runtime.host.pod_env import ray_token, read_pod_env
from moe_runtime.host.ray_env import ray_environment, ray_temp_dir
from serving_config import serving_config

CONFIG = serving_config(num_ranks=2)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config.json").write_text(CONFIG.canonical())
    (tmp_path / "token").write_text("a-token-that-is-long-enough\n")
    return {
        "MOERATOR_ROLE": "rank",
        "MOERATOR_RANK": "1",
        "MOERATOR_POD_NAME": "tiny-svc-rank-1-0",
        "MOERATOR_POD_UID": "p1",
        "MOERATOR_POD_IP": "127.0.0.1",
        "MOERATOR_CONFIG": str(tmp_path / "config.json"),
        "MOERATOR_TOKEN_FILE": str(tmp_path / "token"),
        "MOERATOR_STATE_DIR": str(tmp_path / "state"),
    }


def fields_of(environ: dict[str, str]) -> set[str]:
    with pytest.raises(InvalidSpec) as caught:
        read_pod_env(environ)
    return {problem.field for problem in caught.value.problems}


def test_a_good_environment_is_read_whole(environ: dict[str, str]) -> None:
    env = read_pod_env(environ)
    assert (env.role, env.rank, env.config, env.shared_ray) == ("rank", 1, CONFIG, False)
    assert env.token == "a-token-that-is-long-enough"
    assert env.coordinator_url == "http://127.0.0.1:7310"
    assert env.ray_address == "127.0.0.1:6379"
    assert not env.reattach
    assert env.node_name == ""
    assert read_pod_env({**environ, "MOERATOR_NODE_NAME": "n7"}).node_name == "n7"
    assert read_pod_env({**environ, "MOERATOR_REATTACH": "1"}).reattach


def test_an_empty_environment_names_every_variable() -> None:
    assert fields_of({}) >= {"MOERATOR_ROLE", "MOERATOR_POD_UID", "MOERATOR_CONFIG", "MOERATOR_TOKEN_FILE"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOERATOR_ROLE", "ranks"),
        ("MOERATOR_RANK", "-1"),
        ("MOERATOR_RANK", "one"),
        ("MOERATOR_SHARED_RAY", "yes"),
        ("MOERATOR_CONFIG", "/nowhere/config.json"),
        ("MOERATOR_TOKEN_FILE", "/nowhere/token"),
        ("MOERATOR_STATE_DIR", ""),
        ("MOERATOR_HEALTH_PORT", "70000"),
    ],
)
def test_one_wrong_value_is_one_problem(environ: dict[str, str], name: str, value: str) -> None:
    assert fields_of({**environ, name: value}) == {name}


def test_a_short_token_is_refused_without_being_shown(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2")
    with pytest.raises(InvalidSpec) as caught:
        read_pod_env(environ)
    assert "hunter2" not in str(caught.value)


def test_a_wrong_configuration_names_its_field(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.canonical().replace('"num_ranks":2', '"num_ranks":0'))
    with pytest.raises(InvalidSpec, match="num_ranks"):
        read_pod_env(environ)


def test_rays_token_is_private_and_not_ours(environ: dict[str, str]) -> None:
    env = read_pod_env(environ)
    settings = ray_environment(env, {})
    path = Path(settings["RAY_AUTH_TOKEN_PATH"])
    assert settings["RAY_AUTH_MODE"] == "token"
    assert path.read_text() == ray_token(env.token) != env.token
    assert path.stat().st_mode & 0o077 == 0


def test_pods_that_share_a_node_find_it_and_the_head_stays_apart(environ: dict[str, str], tmp_path: Path) -> None:
    def temp_dir(role: str, state: str) -> Path:
        shared = {**environ, "MOERATOR_ROLE": role, "MOERATOR_SHARED_RAY": "1"}
        return ray_temp_dir(read_pod_env({**shared, "MOERATOR_STATE_DIR": str(tmp_path / state)}))

    assert temp_dir("rank", "a") == temp_dir("gateway", "b") == temp_dir("node", "c")
    assert temp_dir("coordinator", "d") != temp_dir("node", "c")
    assert len(str(temp_dir("node", "c"))) < 40, "Ray's sockets below it must stay under 108 bytes"


def test_the_entry_point_says_what_is_wrong_and_exits_2() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MOERATOR_")}
    done = subprocess.run(
        [sys.executable, "-m", "moe_runtime.pod"], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "MOERATOR_ROLE: environment variable is required" in done.stderr


def test_guard_and_coordinator_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys, moe_runtime.pod, moe_runtime.rank.pod, moe_runtime.coordinator.face, moe_runtime.gateway.face; "
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
