"""Every model type of transformers whose plan dispatches experts: two ranks' logits against its own single process.

    PYTHONPATH=tests:operator:runtime python tests/bench/families.py                   # one minute
    PYTHONPATH=tests:operator:runtime python tests/bench/families.py --only mixtral gpt_oss

Model types are enumerated from the installed transformers, so a new one shows by itself. Each that builds with tiny
numbers runs over two real ranks (Gloo, five slots each, two experts in two copies) and in one process by transformers
alone, from the same checkpoint: the largest difference of logits, and of gradients relative to their largest. One that
does not run shows its cause, and where in transformers it stands. Writes .moerator/bench/families.json.
"""

import argparse
import inspect
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import numerics_tasks as tasks
from gloo_ranks import run_ranks
from moe_core.contract.expert_map import ExpertMap
from moe_core.contract.runtime_config import ModelSource
from moe_runtime.experts.families import UnsupportedModel, build_meta_model, read_facts
from numerics_families import moe_families, save_tiny, tiny_config
from numerics_reference import Reference

TOLERANCE = 1e-4
WORLD = 2
OUTPUT = Path(".moerator/bench/families.json")


@dataclass(frozen=True)
class Row:
    """logits, gradients: largest difference, None where the family does not run; cause: why it does not."""

    family: str
    logits: float | None
    gradients: float | None
    cause: str

    @property
    def is_equal(self) -> bool:
        errors = (self.logits, self.gradients)
        return all(error is not None and error <= TOLERANCE for error in errors)


def compare(family: str, folder: Path) -> Row:
    try:
        config = tiny_config(family)
    except Exception as error:  # noqa: BLE001 - whatever the family's own validation says is the answer
        return Row(family, None, None, f"its config cannot be made tiny: {type(error).__name__}: {first_line(error)}")
    try:
        build_meta_model(config)
    except UnsupportedModel as error:
        return Row(family, None, None, f"{error.why}; {upstream(config)}")
    checkpoint = folder / "checkpoint"
    try:
        reference = Reference(family, checkpoint, save_tiny(family, checkpoint))
        theirs, gradients = reference.logits_and_gradients(WORLD)
    except Exception as error:  # noqa: BLE001 - transformers' own single process fails: that is the cause
        return Row(family, None, None, f"transformers alone fails: {type(error).__name__}: {first_line(error)}")
    try:
        ours = run_ranks(
            tasks.forward_and_gradients,
            num_ranks=WORLD,
            store_path=str(folder / "store"),
            folder=str(checkpoint),
            expert_map=two_ranks(checkpoint),
            world=WORLD,
        )
    except (AssertionError, UnsupportedModel) as error:
        return Row(family, None, None, f"ours fails: {str(error).strip().splitlines()[-1]}")
    logits = float(np.max([np.abs(ours[rank]["logits"] - theirs[rank]).max() for rank in range(WORLD)]))
    return Row(family, logits, worst_gradient(ours, gradients), "")


def two_ranks(checkpoint: Path) -> ExpertMap:
    """Experts in no order, the first two in two copies."""
    facts = read_facts(ModelSource(path=str(checkpoint)))
    row = [*range(0, facts.num_experts, 2), 1, *range(3, facts.num_experts, 2), 1, 0]
    half = len(row) // 2
    return ExpertMap(
        generation=1,
        num_logical_experts=facts.num_experts,
        slots_of_rank=(half, len(row) - half),
        logical_of_slot=(tuple(row),) * facts.num_layers,
    )


def worst_gradient(ours: dict[int, Any], theirs: dict[str, torch.Tensor]) -> float:
    dense = ours[0]["dense"]
    errors = [relative(sum(ours[r]["dense"][name] for r in range(WORLD)), theirs[name].numpy()) for name in dense]
    for name in ours[0]["experts"]:
        for logical_id, expected in enumerate(theirs[name].numpy()):
            parts = [ours[rank]["experts"][name].get(logical_id) for rank in range(WORLD)]
            errors.append(relative(sum(np.asarray(part) for part in parts if part is not None), expected))
    return float(np.max(errors))


def relative(ours: Any, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max(initial=0)) / max(1.0, float(np.abs(theirs).max(initial=0)))


def upstream(config: Any) -> str:
    """Where transformers shows the cause: what its modeling file has for this config instead of a language model."""
    from transformers import CONFIG_MAPPING

    if layers := re.findall(r"\w*reference\w*", " ".join(getattr(config.get_text_config(), "layer_types", None) or ())):
        return f"layer_types {sorted(set(layers))} in {where(type(config))}"
    classes = models_of(type(config))
    if not classes:
        return f"no model takes {where(type(config))}"
    whole = [
        family
        for family in moe_families()
        if getattr(CONFIG_MAPPING[family], "sub_configs", {}).get("text_config") is type(config)
    ]
    within = f"; the text part of {', '.join(whole)}" if whole else ""
    return "all that takes its config: " + ", ".join(where(one) for one in classes) + within


def models_of(config_class: type) -> list[type]:
    """Model classes of transformers built from this config, bases and parts that only stand under others left out."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if config_class in MODEL_MAPPING:
        found = MODEL_MAPPING[config_class]
        module = sys.modules[(found[0] if isinstance(found, tuple) else found).__module__]
    else:
        name = config_class.__module__.replace("configuration_", "modeling_")
        try:
            module = __import__(name, fromlist=["*"])
        except ImportError:
            return []
    return [
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, PreTrainedModel)
        and one.__module__ == module.__name__
        and not one.__name__.endswith("PreTrainedModel")
        and getattr(one, "config_class", None) is config_class
    ]


def where(one: type) -> str:
    """The class with its file and line in transformers."""
    file = Path(inspect.getsourcefile(one) or "")
    return f"{one.__name__} ({file.parent.name}/{file.name}:{inspect.getsourcelines(one)[1]})"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def table(rows: list[Row]) -> str:
    import transformers

    equal = [row for row in rows if row.is_equal]
    lines = [
        f"transformers {transformers.__version__}, {len(rows)} model types, {len(equal)} equal (<= {TOLERANCE}); "
        f"largest difference of logits {max((row.logits or 0.0) for row in equal):.1e}",
        "",
        "| family | logits | gradients | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.logits is None or row.gradients is None:
            lines.append(f"| {row.family} | - | - | {row.cause} |")
        else:
            verdict = "" if row.is_equal else "**differs**"
            lines.append(f"| {row.family} | {row.logits:.1e} | {row.gradients:.1e} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), help="these families")
    families = parser.parse_args().only or moe_families()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(family, Path(folder)))
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
