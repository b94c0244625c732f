"""The demo's training job, as the runtime is told of it."""

from pathlib import Path
from typing import Any

import yaml

from moe_core.contract.runtime_config import ModelShape, TrainingConfig
from moe_core.facts import Facts, Wish
from moe_core.manifests.config import job_config
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.load import parse_spec

EXAMPLE = Path(__file__).parents[1] / "examples/job-tiny.yaml"
NEVER = 10**6


def demo_job(*, output_path: str, max_steps: int = NEVER, **changes: Any) -> tuple[ModelShape, TrainingConfig]:
    """examples/job-tiny.yaml, but bounded by steps and without snapshots on the way. changes: of its training."""
    spec = yaml.safe_load(EXAMPLE.read_text())["spec"]
    config = job_config(Wish("MoEJob", "d", "tiny", "u", 1, spec), parse_spec(MoEJobSpec, spec), Facts())
    assert config.training is not None and config.model.shape is not None
    bounds = {"max_steps": max_steps, "max_seconds": None, "snapshot_every_steps": NEVER}
    training = config.training.model_copy(update={**bounds, "output_path": output_path, **changes})
    return config.model.shape, training
