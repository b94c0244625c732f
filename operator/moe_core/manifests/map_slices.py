"""An ExpertMap as the specs of its objects, slices of whole layers that fit into etcd, and back.

What is read back may have been caught while it was being written: slices of two maps, or some not there yet. The digest
that every slice carries is that of the whole map, so nothing half written passes for the map that was meant. Layers do
not depend on each other, though: those of two maps for the same slots make a third one, which is nearer to either than
anything planned anew.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from moe_core.contract.expert_map import EMPTY_SLOT, ExpertMap
from moe_core.outcome import InvalidInput
from moe_core.spec.others import ExpertMapSpec, MapLayer

Rows = tuple[tuple[int, ...], ...]
MAX_SLICE_BYTES = 200 * 1024
"""An ExpertMap object stays under 256 KiB with its metadata; etcd refuses 1.5 MiB."""


def slices_of(expert_map: ExpertMap, *, policy: str) -> list[ExpertMapSpec]:
    """The specs of the map's objects by first layer; a map without layers is one slice too."""
    shares = expert_map.share_of_slot or (None,) * expert_map.num_layers
    rows = zip(expert_map.logical_of_slot, shares, strict=True)
    slices: list[list[MapLayer]] = [[]]
    size = 0
    for layer in (MapLayer(logical_of_slot=logical, share_of_slot=share) for logical, share in rows):
        layer_bytes = len(json.dumps(layer.model_dump(mode="json", exclude_none=True)))
        if slices[-1] and size + layer_bytes > MAX_SLICE_BYTES:
            slices.append([])
            size = 0
        slices[-1].append(layer)
        size += layer_bytes
    found: list[ExpertMapSpec] = []
    for layers in slices:
        found.append(
            ExpertMapSpec(
                generation=expert_map.generation,
                digest=expert_map.digest,
                num_logical_experts=expert_map.num_logical_experts,
                slots_of_rank=expert_map.slots_of_rank,
                first_layer=sum(len(part.layers) for part in found),
                layers=tuple(layers),
                policy=policy,
            )
        )
    return found


def map_of_slices(specs: Sequence[Mapping[str, Any]]) -> ExpertMap | None:
    """The map whose objects have these specs (as in the objects, in any order); None for none.

    Raises InvalidInput, saying why, for slices that belong to different maps, overlap, or are not all there.
    """
    if not specs:
        return None
    slices = sorted(map(_parsed, specs), key=lambda part: part.first_layer)
    first = slices[0]
    next_layer = 0
    for part in slices:
        for name in ("digest", "generation", "num_logical_experts", "slots_of_rank"):
            if getattr(part, name) != getattr(first, name):
                raise InvalidInput(
                    f"slices of different maps: {name} is {getattr(first, name)} from layer {first.first_layer} on "
                    f"and {getattr(part, name)} from layer {part.first_layer} on"
                )
        if part.first_layer != next_layer:
            raise InvalidInput(
                f"a slice must begin with layer {next_layer}, the next one begins with {part.first_layer}"
            )
        next_layer += len(part.layers)
    layers = [layer for part in slices for layer in part.layers]
    shares = [layer.share_of_slot for layer in layers if layer.share_of_slot is not None]
    if shares and len(shares) != len(layers):
        raise InvalidInput(f"shareOfSlot must be given for all {len(layers)} layers or for none, got {len(shares)}")
    found = _built(first, tuple(layer.logical_of_slot for layer in layers), tuple(shares))
    if found.digest != first.digest:
        raise InvalidInput(f"digest {first.digest} is of another map than these {len(layers)} layers: {found.digest}")
    return found


def map_of_mixed_slices(specs: Sequence[Mapping[str, Any]]) -> ExpertMap:
    """Each layer as the newest map has it among those for the newest one's slots, under a generation of its own.

    Raises InvalidInput where one map is all there is, or a layer is in no slice.
    """
    slices = sorted(map(_parsed, specs), key=lambda part: (part.generation, part.first_layer))
    if len({part.digest for part in slices}) < 2:
        raise InvalidInput(f"slices must be of several maps, got {len(slices)} of one")
    newest = slices[-1]
    layer_of: dict[int, MapLayer] = {}
    for part in slices:
        if (part.num_logical_experts, part.slots_of_rank) == (newest.num_logical_experts, newest.slots_of_rank):
            layer_of.update(enumerate(part.layers, start=part.first_layer))
    missing = next((place for place, layer_idx in enumerate(sorted(layer_of)) if layer_idx != place), None)
    if missing is not None:
        raise InvalidInput(f"layer {missing} is in no slice for slotsOfRank {list(newest.slots_of_rank)}")
    layers = [layer_of[layer_idx] for layer_idx in sorted(layer_of)]
    shares = tuple(map(_shares, layers)) if any(layer.share_of_slot is not None for layer in layers) else ()
    glued = _built(newest, tuple(layer.logical_of_slot for layer in layers), shares)
    return glued.model_copy(update={"generation": newest.generation + 1})


def _shares(layer: MapLayer) -> tuple[int, ...]:
    if layer.share_of_slot is not None:
        return layer.share_of_slot
    return tuple(int(logical != EMPTY_SLOT) for logical in layer.logical_of_slot)


def _built(like: ExpertMapSpec, rows: Rows, shares: Rows) -> ExpertMap:
    try:
        return ExpertMap(
            generation=like.generation,
            num_logical_experts=like.num_logical_experts,
            slots_of_rank=like.slots_of_rank,
            logical_of_slot=rows,
            share_of_slot=shares,
        )
    except ValidationError as error:
        raise InvalidInput(f"the slices are no map: {error.errors()[0]['msg']}") from error


def _parsed(spec: Mapping[str, Any]) -> ExpertMapSpec:
    try:
        return ExpertMapSpec.model_validate_json(json.dumps(spec))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InvalidInput(f"ExpertMap spec.{where}: {problem['msg']} (got {problem['input']!r:.120})") from error
