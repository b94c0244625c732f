"""Where weights come from: a safetensors checkpoint read slot by slot, or a seed. Never more than this rank needs.

Checkpoints name and stack experts otherwise than the modules do (w1/w2/w3 per expert, gate_proj/up_proj per expert, one
stacked tensor). transformers' own conversion mapping says how, and is applied here to the wanted experts only.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from moe_core.outcome import InvalidInput
from moe_runtime.experts.families import ExpertsModule


class WeightSource(Protocol):
    """Gives whole dense tensors and single experts' rows."""

    def fill_dense(self, model: torch.nn.Module, expert_parameter_names: frozenset[str]) -> None:
        """Write every dense parameter and buffer of `model`, in place."""

    def read_experts(self, entry: ExpertsModule, parameter_name: str, logical_ids: Sequence[int]) -> torch.Tensor:
        """[len(logical_ids), ...] rows of one stacked parameter."""


class CheckpointWeights:
    """A folder of safetensors. Raises InvalidInput for a folder that does not fit the model, OSError for unreadable
    files.
    """

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        *,
        file_of_key: Mapping[str, str] | None = None,
        beside: str | None = None,
    ) -> None:
        """file_of_key: where each tensor lies, None: as transformers' index says; names that start with `beside` are
        no tensors of the model.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.folder = folder
        self.file_of_key = _index(folder) if file_of_key is None else dict(file_of_key)
        self._handles: dict[str, Any] = {}
        mapping = get_model_conversion_mapping(model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._converter_of_pattern = {p: c for c in converters for p in c.source_patterns}
        names = model.state_dict()
        prefix = model.base_model_prefix
        # target parameter -> [(pattern of a converter or None, key in the checkpoint)], experts in natural order
        self._sources: dict[str, list[tuple[str | None, str]]] = {}
        for key in sorted(self.file_of_key, key=dot_natural_key):
            if beside is not None and key.startswith(beside):
                continue
            target, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if target not in names and key in names:
                target, pattern = rename_source_key(key, [], [], prefix, names)
            self._sources.setdefault(target, []).append((pattern, key))
        # a converter may make several parameters of the same keys; they are filed under its first
        self._filed_under = {name: first for first in self._sources for name in self._made_with(first)}

    def _made_with(self, first: str) -> list[str]:
        pattern = self._sources[first][0][0]
        targets = self._converter_of_pattern[pattern].target_patterns if pattern is not None else [first]
        return [first.replace(targets[0], target) for target in targets]

    def fill_dense(self, model: torch.nn.Module, expert_parameter_names: frozenset[str]) -> None:
        wanted = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in expert_parameter_names}
        filled: set[str] = set()
        for target in self._sources:
            if not wanted.keys().isdisjoint(self._made_with(target)):
                for name, value in self._convert(target, self._sources[target], model).items():
                    if name not in wanted:
                        continue
                    if wanted[name].shape != value.shape:
                        shapes = f"{list(value.shape)}, the model wants {list(wanted[name].shape)}"
                        raise InvalidInput(f"{self.folder}: {name} has shape {shapes}")
                    with torch.no_grad():
                        wanted[name].copy_(value)
                    self._must_be_numbers(name, wanted[name])
                    filled.add(name)
        tied = {id(wanted[name]) for name in filled}
        missing = [
            n for n, t in wanted.items() if n not in filled and id(t) not in tied and n not in _tied_names(model)
        ]
        if missing:
            raise InvalidInput(f"{self.folder} lacks {len(missing)} tensors, first {missing[0]}")

    def read_experts(self, entry: ExpertsModule, parameter_name: str, logical_ids: Sequence[int]) -> torch.Tensor:
        target = f"{entry.name}.{parameter_name}"
        if target not in self._filed_under:
            raise InvalidInput(f"{self.folder} lacks {target}")
        rows = self._rows(entry, target, logical_ids)
        for logical_id, row in zip(logical_ids, rows, strict=True):
            self._must_be_numbers(f"expert {logical_id} of {target}", row)
        return rows

    def _rows(self, entry: ExpertsModule, target: str, logical_ids: Sequence[int]) -> torch.Tensor:
        filed_under = self._filed_under[target]
        sources = self._sources[filed_under]
        if sources[0][0] is None:
            rows = self._slice(sources[0][1])
            return torch.stack([rows[logical_id] for logical_id in logical_ids])
        per_pattern: dict[str | None, list[str]] = {}
        for pattern, key in sources:
            per_pattern.setdefault(pattern, []).append(key)
        if {len(keys) for keys in per_pattern.values()} == {entry.num_experts}:
            chosen = [(pattern, keys[e]) for pattern, keys in per_pattern.items() for e in logical_ids]
            return self._convert(target, chosen, _FullExperts(entry))[target]
        # Not one tensor per expert: convert the whole layer, keep the wanted rows.
        return self._convert(filed_under, sources, _FullExperts(entry))[target][list(logical_ids)].clone()

    def _must_be_numbers(self, name: str, tensor: torch.Tensor) -> None:
        """A model that holds inf or nan answers with words all the same: nobody would see it there."""
        if not tensor.is_floating_point() or not tensor.numel():
            return
        least, most = torch.aminmax(tensor.detach().float())  # both are nan if anything is
        if not (least.isfinite() and most.isfinite()):
            broken = int((~tensor.float().isfinite()).sum())
            raise InvalidInput(f"{self.folder}: {name} holds {broken} values that are no finite numbers")

    def _convert(
        self, target: str, sources: Iterable[tuple[str | None, str]], model: "torch.nn.Module | _FullExperts"
    ) -> dict[str, torch.Tensor]:
        sources = list(sources)
        if sources[0][0] is None:
            return {target: self.tensor(sources[0][1])}
        converter = copy.deepcopy(self._converter_of_pattern[sources[0][0]])
        for pattern, key in sources:
            converter.add_tensor(target, key, pattern, self.tensor(key))
        converted = converter.convert(target, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def dense_tensors(
        self, model: torch.nn.Module, expert_parameter_names: frozenset[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) of all that is no routed expert: as it lies in the checkpoint, or by its name in the model
        where the same keys make routed experts too (Ernie 4.5 VL keeps its vision experts among them).
        """
        for target, sources in self._sources.items():
            if expert_parameter_names.isdisjoint(self._made_with(target)):
                yield from ((key, self.tensor(key)) for _, key in sources)
            elif not expert_parameter_names.issuperset(self._made_with(target)):
                made = self._convert(target, sources, model)
                yield from ((name, value) for name, value in made.items() if name not in expert_parameter_names)

    def tensor(self, key: str) -> torch.Tensor:
        """As it lies in the checkpoint."""
        tensor: torch.Tensor = self._handle(key).get_tensor(key)
        return tensor

    def _slice(self, key: str) -> Any:
        return self._handle(key).get_slice(key)

    def _handle(self, key: str) -> Any:
        file = self.file_of_key[key]
        if file not in self._handles:
            self._handles[file] = _open(self.folder / file)
        return self._handles[file]


class _FullExperts:
    """What a conversion may ask of the model: the shape that a layer's experts have before they become slots."""

    def __init__(self, entry: ExpertsModule) -> None:
        self._entry = entry

    def get_parameter(self, name: str) -> torch.Tensor:
        now = self._entry.module.get_parameter(name.rpartition(".")[2])
        return torch.empty(self._entry.num_experts, *now.shape[1:], device="meta")


def _index(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return weight_map
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    return dict.fromkeys(_open(folder / "model.safetensors").keys(), "model.safetensors")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise InvalidInput(f"{path} is not a readable safetensors file: {error}") from error


def _tied_names(model: torch.nn.Module) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or {})


class SeedWeights:
    """The family's own initialisation, drawn per module and per expert from a seed.

    An expert's weights depend on (seed, layer, logical id) only, never on who holds it.
    """

    def __init__(self, seed: int, model: torch.nn.Module) -> None:
        self._seed, self._model = seed, model

    def fill_dense(self, model: torch.nn.Module, expert_parameter_names: frozenset[str]) -> None:
        experts = {name.rsplit(".", 1)[0] for name in expert_parameter_names}
        for name, module in model.named_modules():
            if name not in experts:
                self._draw(name, module)

    def read_experts(self, entry: ExpertsModule, parameter_name: str, logical_ids: Sequence[int]) -> torch.Tensor:
        # A copy of one expert: the module itself may be in the middle of a step.
        single = copy.copy(entry.module)
        shapes = {name: entry.module.get_parameter(name).shape[1:] for name in entry.parameter_names}
        rows: list[torch.Tensor] = []
        for logical_id in logical_ids:
            single._parameters = {name: torch.nn.Parameter(torch.zeros(1, *shape)) for name, shape in shapes.items()}
            self._draw(f"{entry.name}[{logical_id}]", single)
            rows.append(single.get_parameter(parameter_name).detach()[0])
        return torch.stack(rows)

    def _draw(self, name: str, module: torch.nn.Module) -> None:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            self._model._init_weights(module)  # type: ignore[operator]
