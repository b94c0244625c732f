"""What the command line knows of a cluster without asking one: files that kubectl printed, and the resources' own."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_core.facts import NodeFact, Wish
from moe_core.outcome import InvalidInput
from moe_core.spec.job import MoEJobSpec
from moe_core.spec.load import Document
from moe_core.spec.others import ClusterTopologySpec
from moe_core.spec.service import MoEServiceSpec
from moe_core.topology.tree import Levels
from moe_operator.cli_files import read_files
from moe_operator.cluster.kubernetes_cache import Cache
from moe_operator.cluster.local_model import Checkpoint, read_checkpoint
from moe_operator.cluster.protocol import Key
from moe_operator.observe import owner_of

Object = Mapping[str, Any]
_RANGE = re.compile(r"(\d+)(?:\.\.(\d+))?")
_PLURALS = {"Node": "nodes", "Pod": "pods"}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes of a file and what pods use of them, as far as the file holds pods too."""

    cache: Cache
    uid_of_owner: Mapping[Key, str]
    num_pods: int

    def nodes_for(self, wish: Wish) -> tuple[NodeFact, ...]:
        """As the operator sees them: what the resource's own pods use is left out."""
        return self.cache.nodes(self.uid_of_owner.get(Key(wish.kind, wish.namespace, wish.name), ""))


def read_cluster(name: str) -> Cluster:
    """What `kubectl get nodes,pods -A -o yaml` prints (or json, or nodes alone); - for standard input.

    Raises InvalidInput that names the file and counts its objects.
    """
    cache, owners, counts, where = Cache(lambda _: None), {}, dict.fromkeys(_PLURALS, 0), name
    try:
        objects = _objects(sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8"))
        for number, obj in enumerate(objects, start=1):
            where = f"{name}, object {number}"
            kind, metadata = obj["kind"], obj["metadata"]
            if kind not in _PLURALS:
                raise InvalidInput(f"must hold nodes and pods, got {kind}")
            counts[kind] += 1
            uid = f"{kind}/{metadata.get('namespace', '')}/{metadata['name']}"
            cache.put(_PLURALS[kind], {**obj, "metadata": {**metadata, "uid": uid}})
            if owner := owner_of(obj):
                owners[owner.key] = owner.uid
    except OSError as error:
        raise InvalidInput(f"--nodes: {name}: {error.strerror}") from error
    except InvalidInput as error:
        raise InvalidInput(f"--nodes: {where}: {error}") from error
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        why = f"{error!r:.200}" if mark is None else f"line {mark.line + 1}: {getattr(error, 'problem', error)}"
        told = f"is not what `kubectl get nodes -o yaml` prints: {why}"
        raise InvalidInput(f"--nodes: {where} {told}") from error
    if not counts["Node"]:
        raise InvalidInput(f"--nodes: {name}: must hold nodes, got none")
    return Cluster(cache, owners, counts["Pod"])


def _objects(text: str) -> Iterable[Object]:
    """JSON by its own parser: a large cluster as YAML takes minutes."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    parts = [json.loads(text)] if text.lstrip().startswith("{") else yaml.load_all(text, Loader=loader)
    for part in parts:
        if part is not None:
            yield from part["items"] if part["kind"].endswith("List") else [part]


def read_planned(names: Sequence[str]) -> tuple[list[Document], dict[str, Levels]]:
    """Jobs and services of these files, and the levels of the topologies beside them. Raises InvalidInput if none."""
    documents = read_files(names)
    planned = [doc for doc in documents if isinstance(doc.spec, (MoEJobSpec, MoEServiceSpec))]
    if not planned:
        raise InvalidInput("-f: no MoEJob and no MoEService in these files")
    topologies = {
        doc.name: tuple((level.name, level.node_label) for level in doc.spec.levels)
        for doc in documents
        if isinstance(doc.spec, ClusterTopologySpec)
    }
    return planned, topologies


def read_counts(ranks: str | None) -> tuple[int | None, ...]:
    """`8` or `4..64`, which doubles; None, the resource's own number, where nothing is given. Raises InvalidInput."""
    if ranks is None:
        return (None,)
    match = _RANGE.fullmatch(ranks.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= 1024:
        raise InvalidInput(f"--ranks must be a number or A..B within 1..1024, got {ranks!r}")
    counts = [first]
    while counts[-1] * 2 < last:
        counts.append(counts[-1] * 2)
    return (*counts, last) if last > counts[-1] else tuple(counts)


def wish_of_document(doc: Document) -> Wish:
    """The resource as if it had just been created; with the status that the file has of it."""
    return Wish(
        kind="MoEJob" if isinstance(doc.spec, MoEJobSpec) else "MoEService",
        namespace=doc.namespace,
        name=doc.name,
        uid="00000000-0000-0000-0000-000000000000",
        generation=1,
        spec=doc.raw["spec"],
        status=doc.raw.get("status") or {},
    )


def read_model_of(doc: Document) -> Checkpoint | None:
    """The checkpoint of a service, as far as it is on this machine."""
    return read_checkpoint(Path(doc.spec.model.path)) if isinstance(doc.spec, MoEServiceSpec) else None
