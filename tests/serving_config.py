"""A RuntimeConfig for serving, for tests that are about something else."""

from typing import Any

from moe_core.contract.runtime_config import ModelSource, RuntimeConfig, ServingConfig


def serving_config(*, max_context: int = 64, served_name: str = "m", **more: Any) -> RuntimeConfig:
    """One rank, one sequence, loopback; nothing in it is started."""
    defaults: dict[str, Any] = {
        "owner_kind": "MoEService",
        "namespace": "default",
        "name": "tiny",
        "uid": "u",
        "mode": "serve",
        "model": ModelSource(path="/m"),
        "num_ranks": 1,
        "coordinator_host": "127.0.0.1",
        "coordinator_port": 7310,
        "ray_port": 6379,
        "serving": ServingConfig(
            max_sequences=1, max_context=max_context, served_name=served_name, fallback="Drop", gateway_port=8000
        ),
    }
    return RuntimeConfig(**{**defaults, **more})
