"""What answers for an expert without a live copy: the generalist, or nobody (drop and renormalise).

A generalist is a small map computed on the token's own rank, so that it needs no peer: `up^T (down x) + bias`,
fitted per (layer, expert) by `experts.calibrate`. File format, beside the checkpoint's weights:
`generalist.safetensors` with `layer.{i}.down` [E, r, D], `layer.{i}.up` [E, r, D], `layer.{i}.bias` [E, D] and
`generalist.json` with each expert's chosen kind, its stand-in expert if that was measured better, and the held-out
errors of all candidates.

T tokens, K picks, D model, E logical experts, M lost experts with a generalist, r rank of the map.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_runtime.dispatch.plan import LOST

TENSOR_FILE = "generalist.safetensors"
JSON_FILE = "generalist.json"


@dataclass(frozen=True, slots=True)
class LayerGeneralists:
    """One layer. down_ERD, up_ERD [E, r, D], bias_ED [E, D]; stand_in[e]: another expert that answers better, or -1."""

    down_ERD: torch.Tensor
    up_ERD: torch.Tensor
    bias_ED: torch.Tensor
    stand_in: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Generalists:
    layers: tuple[LayerGeneralists, ...]
    report: dict[str, object] = field(default_factory=dict)
    """What calibration measured; kept for people."""


def write_generalists(generalists: Generalists, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for layer_idx, layer in enumerate(generalists.layers):
        tensors[f"layer.{layer_idx}.down"] = layer.down_ERD.contiguous()
        tensors[f"layer.{layer_idx}.up"] = layer.up_ERD.contiguous()
        tensors[f"layer.{layer_idx}.bias"] = layer.bias_ED.contiguous()
    save_file(tensors, str(folder / TENSOR_FILE))
    document = {
        "version": 1,
        "stand_in": [list(layer.stand_in) for layer in generalists.layers],
        "report": generalists.report,
    }
    (folder / JSON_FILE).write_text(json.dumps(document, indent=1))


def read_generalists(folder: Path) -> Generalists | None:
    """None when the folder holds none. Raises OSError, ValueError for a file that is not ours."""
    from safetensors.torch import load_file

    if not (folder / JSON_FILE).is_file():
        return None
    document = json.loads((folder / JSON_FILE).read_text())
    if document.get("version") != 1:
        raise ValueError(f"{folder / JSON_FILE} has version {document.get('version')}, this runtime reads 1")
    tensors = load_file(str(folder / TENSOR_FILE))
    layers = tuple(
        LayerGeneralists(
            tensors[f"layer.{i}.down"], tensors[f"layer.{i}.up"], tensors[f"layer.{i}.bias"], tuple(stand_in)
        )
        for i, stand_in in enumerate(document["stand_in"])
    )
    return Generalists(layers, document["report"])


class LayerLadder:
    """The lost experts of one layer in one epoch. Empty while every expert has a live copy."""

    def __init__(self) -> None:
        self._column_E: torch.Tensor | None = None

    def set_lost(
        self, lost: Sequence[int], generalists: LayerGeneralists | None, *, num_experts: int, device: str
    ) -> None:
        """`generalists` None: the picks of lost experts are dropped and the other weights take their share."""
        if not lost:
            self._column_E = None
            return
        index = torch.tensor(list(lost), device=device)
        self._generalists = generalists is not None
        # where each lost expert's map lies; living experts point past the end
        column_M = torch.arange(len(lost), device=device)
        self._column_E = torch.full((num_experts,), len(lost), device=device).index_copy(0, index, column_M)
        self._num_lost = len(lost)
        if generalists is not None:
            self._down_MRD = generalists.down_ERD.to(device)[index]
            self._up_MRD = generalists.up_ERD.to(device)[index]
            self._bias_MD = generalists.bias_ED.to(device)[index]

    def answer(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, address_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(address_TK, weight_TK, what this rank adds itself [T, D] or None)."""
        column_E = self._column_E
        if column_E is None:
            return address_TK, weight_TK, None
        lost_TK = address_TK == LOST
        if not self._generalists:
            kept_TK = weight_TK.masked_fill(lost_TK, 0.0)
            kept_T1 = kept_TK.sum(-1, keepdim=True)
            share_T1 = weight_TK.sum(-1, keepdim=True) / torch.where(kept_T1 == 0, torch.ones_like(kept_T1), kept_T1)
            return address_TK, kept_TK * share_T1, None
        lost_weight_TK = weight_TK.masked_fill(~lost_TK, 0.0)
        column_TK = column_E[expert_TK]
        weight_TM = x_TD.new_zeros(x_TD.shape[0], self._num_lost + 1).scatter_add(1, column_TK, lost_weight_TK)[:, :-1]
        num_lost, rank, dim = self._down_MRD.shape
        inner_TMR = (x_TD @ self._down_MRD.reshape(num_lost * rank, dim).T).view(-1, num_lost, rank)
        inner_TMR = inner_TMR * weight_TM.unsqueeze(-1)
        local_TD = inner_TMR.reshape(-1, num_lost * rank) @ self._up_MRD.reshape(num_lost * rank, dim)
        return address_TK, weight_TK, local_TD + weight_TM @ self._bias_MD
