"""A model's routers beside its checkpoint, so that it is served and scored as it was trained.

    router.json            version, RouterConfig, and whether the family's own routing gives the same
    router.safetensors     the routers' own tensors; the gates' weights lie in the checkpoint, under the family's names

Plain transformers knows nothing of these files: it loads the checkpoint and routes as the family does. Where the two
are one (DeepSeek-V3's routing in a GLM-4 MoE, whose bias the checkpoint then holds), `as_family` is true.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_core.contract.router import RouterConfig
from moe_core.outcome import InvalidInput

JSON_FILE = "router.json"
TENSOR_FILE = "router.safetensors"
VERSION = 1


@dataclass(frozen=True, slots=True)
class SavedRouter:
    config: RouterConfig
    tensors: Mapping[str, torch.Tensor]
    as_family: bool = False


def write_router(folder: Path, saved: SavedRouter) -> None:
    """Raises OSError."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in saved.tensors.items()}
    save_file(tensors, str(folder / TENSOR_FILE))
    options = saved.config.model_dump(mode="json", exclude_none=True)
    document = {"version": VERSION, "router": options, "as_family": saved.as_family}
    (folder / JSON_FILE).write_text(json.dumps(document, indent=1))


def read_router(folder: Path, *, router_class: str | None = None) -> SavedRouter | None:
    """None when the folder holds none. Raises OSError, InvalidInput for files that are not ours.

    router_class: the one class, other than ours, that the router may be of. Building it runs code of that module, so a
    file's word is not enough.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / JSON_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text())
        version = document["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is none of this runtime's: {error!r}") from error
    if version != VERSION:
        raise InvalidInput(f"{path} has version {version}, this runtime reads {VERSION}")
    config = RouterConfig.parse(json.dumps(document.get("router")))
    if config.class_path != router_class and config.class_path is not None:
        raise InvalidInput(
            f"{folder} was trained with the router {config.class_path}; name it in model.routerClassPath to have it "
            f"imported (got {router_class})"
        )
    try:
        return SavedRouter(config, load_file(str(folder / TENSOR_FILE)), bool(document.get("as_family")))
    except SafetensorError as error:
        raise InvalidInput(f"{folder / TENSOR_FILE} is not a readable safetensors file: {error}") from error


def remove_router(folder: Path) -> None:
    """What an earlier run with a router of ours left there."""
    for name in (JSON_FILE, TENSOR_FILE):
        (folder / name).unlink(missing_ok=True)
