"""Whether a checkpoint's experts are packed, and how the ranks shall keep them; from JSON alone."""

import json
from pathlib import Path

from moe_core.contract.packing import CONFIG_KEY, FULL, METHOD, PackedConfig, Packing
from moe_core.contract.runtime_config import ModelSource
from moe_core.outcome import InvalidInput


def read_packed(folder: Path) -> PackedConfig | None:
    """None where the experts are in full, or packed by somebody else. Raises OSError, InvalidInput."""
    try:
        found = json.loads((folder / "config.json").read_text()).get(CONFIG_KEY)
    except (ValueError, AttributeError) as error:
        raise InvalidInput(f"{folder / 'config.json'} holds no JSON object: {error}") from error
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return None
    return PackedConfig.parse(json.dumps(found))


def packing_of(source: ModelSource) -> Packing:
    """How experts are kept in memory. Raises InvalidInput where checkpoint and wish disagree, OSError."""
    packed = None if source.path is None else read_packed(Path(source.path))
    if packed is None:
        return source.packing or FULL
    if source.packing not in {None, packed.experts}:
        raise InvalidInput(
            f"the experts in {source.path} are packed as {packed.experts} already, not as {source.packing}: "
            "give the checkpoint that they were packed from, or leave the packing out"
        )
    return packed.experts
