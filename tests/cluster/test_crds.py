"""The five kinds on a real API server: taken, refused with words that help, scaled, shown.

The cases are those of `moerator validate` (tests/cases): one list, so that a file check and `kubectl apply` never
disagree.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cases.documents import BROKEN, GOOD, JOB, MAP, SERVICE, Broken
from cluster.controlplane.api import Api, ApiError, Object
from cluster.controlplane.start import ControlPlane
from cluster.waiting import eventually
from moe_core.outcome import InvalidSpec
from moe_core.spec.kinds import KIND_OF_NAME, KINDS
from moe_core.spec.load import parse_spec, read_documents

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("crds")]

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("**/*.yaml"))
STRICT = {"fieldValidation": "Strict"}  # what kubectl sends


def collection(document: Object, namespace: str) -> str:
    kind = KIND_OF_NAME[document["kind"]]
    scope = f"/namespaces/{namespace}" if kind.namespaced else ""
    return f"/apis/{document['apiVersion']}{scope}/{kind.plural}"


@pytest.fixture
async def service(api: Api, namespace: str) -> AsyncIterator[str]:
    """A MoEService named tiny, 4 ranks; its path."""
    path = collection(SERVICE, namespace)
    await api.create(path, SERVICE)
    yield f"{path}/tiny"


async def refusal(api: Api, document: Object, namespace: str = "default") -> str:
    """What the API server says against it, empty where it would take it."""
    try:
        await api.request("POST", collection(document, namespace), document, params=STRICT | {"dryRun": "All"})
    except ApiError as error:
        assert error.status in (400, 422), str(error)
        return error.message
    return ""


def test_all_five_kinds_are_established_with_structural_schemas(crds: list[Object]) -> None:
    assert {crd["spec"]["names"]["kind"] for crd in crds} == {kind.kind for kind in KINDS}
    for crd in crds:
        conditions = {c["type"]: c["status"] for c in crd["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}, crd["metadata"]["name"]


def test_applying_them_again_changes_nothing(cluster: ControlPlane, crds: list[Object]) -> None:
    folder = str(REPOSITORY / "crds")
    cluster.kubectl("apply", "--server-side", "-f", folder)
    again = json.loads(cluster.kubectl("get", "-f", folder, "-o", "json"))["items"]
    assert [c["metadata"]["generation"] for c in again] == [c["metadata"]["generation"] for c in crds]


@pytest.mark.parametrize("kind", sorted(GOOD))
async def test_a_good_document_is_taken_and_its_defaults_are_the_models(api: Api, namespace: str, kind: str) -> None:
    path = collection(GOOD[kind], namespace)
    created = await api.request("POST", path, GOOD[kind], params=STRICT)
    model = KIND_OF_NAME[kind].model
    assert parse_spec(model, created["spec"]) == parse_spec(model, GOOD[kind]["spec"])
    if not KIND_OF_NAME[kind].namespaced:
        await api.delete(f"{path}/{created['metadata']['name']}")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
async def test_a_broken_document_is_refused_with_the_words_that_help(api: Api, broken: Broken) -> None:
    message = await refusal(api, broken.document())
    assert message, "the API server took it"
    for word in broken.words:
        assert word in message


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_taken(cluster: ControlPlane, path: Path) -> None:
    answer = cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(path))
    assert "created (server dry run)" in answer


def test_kubectl_shows_the_reason_of_a_refusal(cluster: ControlPlane) -> None:
    [broken] = [case for case in BROKEN if case.path == "spec.gatway"]
    done = cluster.run_kubectl("apply", "-f", "-", stdin=yaml.safe_dump(broken.document()))
    assert done.returncode == 1
    assert 'unknown field "spec.gatway"' in done.stderr


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 1.5, 10**10),
    *("", "x", "A B", "3", "1e3", "x" * 5000),
    *([], [None], [{}], [0] * 65, {}, {"a": 1}, {"a": "1"}, {f"a{i}": "1" for i in range(65)}),
)


OPTIONAL: dict[str, Object] = {
    "MoEJob": {
        "managedBy": "moerator.dev/operator",
        "activeDeadlineSeconds": 60,
        "ttlSecondsAfterFinished": 60,
        "topologyConstraint": {
            "topologyName": "racks",
            "pack": {"required": "rack", "preferred": "host", "ranksPerNode": 2},
        },
    },
    "MoEService": {
        "model": {"path": "/models/tiny", "servedName": "tiny", "numExperts": 16, "numMoeLayers": 4},
        "template": {
            "metadata": {"labels": {"team": "a"}},
            "spec": {
                "imagePullPolicy": "Always",
                "imagePullSecrets": ["registry"],
                "resources": {"requests": {"cpu": 2, "memory": "2Gi"}},
                "env": [{"name": "A", "value": "b"}],
                "volumeMounts": [{"name": "models", "mountPath": "/models", "subPath": "a"}],
                "volumes": [{"name": "models", "emptyDir": {}}],
                "nodeSelector": {"pool": "moe"},
                "tolerations": [{"key": "gpu", "operator": "Equal", "value": "a", "effect": "NoExecute"}],
                "priorityClassName": "high",
                "runtimeClassName": "nvidia",
            },
        },
    },
    "ExpertMap": {"policy": "Linear", "firstLayer": 1},
}


def mutations(document: Object) -> Iterator[tuple[str, Object]]:
    """The document with each of its values replaced by each odd one, or removed."""
    for path in list(_paths(document["spec"])):
        for value in (..., *ODD_VALUES):
            changed = copy.deepcopy(document)
            node: Any = changed["spec"]
            for part in path[:-1]:
                node = node[part]
            if value is ...:
                del node[path[-1]]
            else:
                node[path[-1]] = value
            yield f"{'.'.join(map(str, path))}={'(removed)' if value is ... else repr(value)[:60]}", changed


def _paths(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from _paths(child, (*path, key))


@pytest.mark.parametrize("kind", sorted(GOOD))
async def test_a_file_check_and_the_api_server_agree_on_odd_values_everywhere(api: Api, kind: str) -> None:
    full = copy.deepcopy(GOOD[kind])
    model = KIND_OF_NAME[kind].model
    full["spec"] = parse_spec(model, full["spec"] | OPTIONAL.get(kind, {})).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    slots = asyncio.Semaphore(16)

    async def disagreement(what: str, document: Object) -> str | None:
        async with slots:
            said = await refusal(api, document)
        try:
            read_documents(json.dumps(document))
        except InvalidSpec as invalid:
            return None if said else f"{what}: only the file check refuses: {invalid}"
        return f"{what}: only the API server refuses: {said}" if said else None

    found = await asyncio.gather(*(disagreement(what, document) for what, document in mutations(full)))
    assert len(found) > 50
    assert [line for line in found if line] == []


FROZEN = [
    ("MoEJob", {"parallelism": {"expert": 8}}, "parallelism cannot be changed; create another MoEJob"),
    ("MoEJob", {"training": {"maxSteps": 20}}, "training cannot be changed"),
    ("MoEJob", {"topologyConstraint": {"topologyName": "racks", "pack": {"required": "rack"}}}, "topologyConstraint"),
    ("MoEJob", {"drills": "Allowed"}, "drills cannot be changed"),
    ("MoEService", {"model": {"path": "/elsewhere"}}, "model cannot be changed; create another MoEService"),
    ("MoEService", {"serving": {"maxContext": 1024}}, "serving cannot be changed"),
    ("MoEService", {"template": {"spec": {"image": "other"}}}, "template cannot be changed"),
    ("MoEService", {"experts": {"fallback": "Drop"}}, "experts.fallback cannot be changed"),
    ("MoEService", {"experts": {"minCopies": 5}}, "experts.minCopies must not exceed parallelism.expert"),
    ("MoEService", {"parallelism": {"data": 2}}, "nor parallelism.data to or from 1"),
    ("MoEService", {"dispatch": {"combineWire": "Int8"}}, "of dispatch only probe can be changed"),
    ("MoEJob", {"dispatch": {"overlap": "TwoBatch"}}, "of dispatch only probe can be changed"),
    ("MoEService", {"gateway": {"port": 9000}}, "gateway.port cannot be changed"),
    ("MoEDrill", {"fault": {"type": "HangRank"}}, "a drill cannot be changed; create another MoEDrill"),
]


@pytest.mark.parametrize(("kind", "change", "words"), FROZEN, ids=lambda value: str(value)[:40])
async def test_a_change_that_would_be_ignored_is_refused(
    api: Api, namespace: str, kind: str, change: Object, words: str
) -> None:
    path = collection(GOOD[kind], namespace)
    created = await api.create(path, GOOD[kind])
    with pytest.raises(ApiError) as refused:
        await api.patch(f"{path}/{created['metadata']['name']}", {"spec": change})
    assert refused.value.status == 422
    assert words in refused.value.message


async def test_what_may_change_may_change(api: Api, service: str) -> None:
    change: Object = {
        "parallelism": {"expert": 6, "data": 1},
        "suspend": True,
        "failurePolicy": {"maxRestarts": 3},
        "spares": {"perDomain": 1},
    }
    changed = await api.patch(service, {"spec": change})
    assert changed["metadata"]["generation"] == 2
    assert {key: changed["spec"][key] for key in change} == change
    widened = await api.patch(service, {"spec": {"gateway": {"replicas": 3}, "experts": {"redundantPerRank": 1}}})
    assert widened["spec"]["gateway"] == {"port": 8000, "replicas": 3}
    probed = await api.patch(service, {"spec": {"dispatch": {"probe": 1}}})
    assert probed["spec"]["dispatch"]["probe"] == 1


async def test_ep_groups_of_one_size_may_become_more_and_not_larger(api: Api, namespace: str) -> None:
    path = collection(GOOD["MoEService"], namespace)
    spec = {**GOOD["MoEService"]["spec"], "parallelism": {"expert": 2, "data": 2}}
    created = await api.create(path, {**GOOD["MoEService"], "spec": spec})
    service = f"{path}/{created['metadata']['name']}"
    more = await api.patch(service, {"spec": {"parallelism": {"data": 3}}})
    assert more["spec"]["parallelism"] == {"expert": 2, "data": 3}
    for change in ({"expert": 3}, {"data": 1}):
        with pytest.raises(ApiError, match=r"parallelism.expert of several EP groups cannot be changed"):
            await api.patch(service, {"spec": {"parallelism": change}})


async def test_status_is_a_subresource_of_its_own(api: Api, service: str) -> None:
    ignored = await api.patch(service, {"status": {"epoch": 9}})
    assert "status" not in ignored
    condition = {"type": "Ready", "status": "True", "reason": "AllRanksActive", "message": "4 of 4"}
    condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    written = await api.patch(
        f"{service}/status", {"status": {"epoch": 9, "conditions": [condition]}, "spec": {"suspend": True}}
    )
    assert written["status"]["epoch"] == 9
    assert written["spec"]["suspend"] is False
    assert written["metadata"]["generation"] == 1
    with pytest.raises(ApiError, match=r"Unsupported value: .*Maybe"):
        await api.patch(f"{service}/status", {"status": {"conditions": [condition | {"status": "Maybe"}]}})


async def test_kubectl_scales_a_service(cluster: ControlPlane, api: Api, service: str, namespace: str) -> None:
    await api.patch(f"{service}/status", {"status": {"replicas": 4, "selector": "moerator.dev/owner=tiny"}})
    answer = await asyncio.to_thread(cluster.kubectl, "scale", "moesvc/tiny", "--replicas=6", "-n", namespace)
    assert "moeservice.moerator.dev/tiny scaled" in answer
    assert (await api.get(service))["spec"]["parallelism"] == {"expert": 6, "data": 1}
    scale = await api.get(f"{service}/scale")
    assert scale["spec"]["replicas"] == 6
    assert scale["status"] == {"replicas": 4, "selector": "moerator.dev/owner=tiny"}


@pytest.mark.parametrize(
    ("replicas", "words"), [("0", "greater than or equal to 1"), ("1025", "less than or equal to 1024")]
)
async def test_a_scale_out_of_bounds_is_refused(
    cluster: ControlPlane, service: str, namespace: str, replicas: str, words: str
) -> None:
    done = await asyncio.to_thread(
        cluster.run_kubectl, "scale", "moesvc/tiny", f"--replicas={replicas}", "-n", namespace
    )
    assert done.returncode == 1
    assert "spec.parallelism.expert" in done.stderr
    assert words in done.stderr


async def test_a_scale_below_the_copies_asked_for_is_refused(api: Api, service: str) -> None:
    await api.patch(service, {"spec": {"experts": {"minCopies": 3}}})
    with pytest.raises(ApiError, match=r"experts\.minCopies must not exceed parallelism"):
        await api.patch(f"{service}/scale", {"spec": {"replicas": 2}})


async def test_the_columns_show_what_a_person_asks_first(
    cluster: ControlPlane, api: Api, service: str, namespace: str
) -> None:
    def condition(kind: str, status: str, message: str) -> Object:
        return {
            **{"type": kind, "status": status, "reason": "Tested", "message": message},
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }

    conditions = [condition("Ready", "False", "3 of 4 ranks active"), condition("ExpertCoverage", "True", "16 of 16")]
    status = {"ranks": {"desired": 4, "active": 3}, "epoch": 7, "restarts": 1, "conditions": conditions}
    await api.patch(f"{service}/status", {"status": status})

    async def shown(*more: str) -> list[list[str]]:
        table = await asyncio.to_thread(cluster.kubectl, "get", "moesvc", "-n", namespace, *more)
        return [[cell for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]

    header, row = await shown()
    assert [cell.strip() for cell in header] == ["NAME", "RANKS", "ACTIVE", "READY", "COVERAGE", "AGE"]
    assert [cell.strip() for cell in row[:5]] == ["tiny", "4", "3", "False", "True"]
    header, row = await shown("-o", "wide")
    assert [cell.strip() for cell in header[6:]] == ["RESTARTS", "EPOCH", "REASON"]
    assert [cell.strip() for cell in row[6:]] == ["1", "7", "3 of 4 ranks active"]


async def test_every_kind_has_its_short_name_and_its_place_among_kubectl_get_moe(
    cluster: ControlPlane, api: Api, namespace: str
) -> None:
    for document in (JOB, SERVICE, MAP, GOOD["MoEDrill"]):
        await api.create(collection(document, namespace), document)
    listing = await asyncio.to_thread(cluster.kubectl, "get", "moe", "-n", namespace, "-o", "name")
    assert {line.split(".")[0] for line in listing.splitlines()} >= {"moejob", "moeservice", "expertmap", "moedrill"}
    resources = await asyncio.to_thread(cluster.kubectl, "api-resources", "--api-group=moerator.dev", "--no-headers")
    assert {line.split()[1] for line in resources.splitlines()} == {kind.short_name for kind in KINDS}


def test_kubectl_explains_every_field_of_a_service_that_a_person_writes(cluster: ControlPlane) -> None:
    text = cluster.kubectl("explain", "moesvc.spec.experts", "--api-version=moerator.dev/v1alpha1")
    assert "redundantPerRank" in text
    assert "Slots per rank and layer beyond an even share." in text


async def test_a_map_of_a_large_model_fits_into_an_object(api: Api, namespace: str) -> None:
    large = copy.deepcopy(MAP)
    large["spec"] |= {
        "numLogicalExperts": 256,
        "slotsOfRank": [4] * 72,
        "layers": [{"logicalOfSlot": [slot % 256 for slot in range(288)]} for _ in range(58)],
    }
    created = await api.request("POST", collection(large, namespace), large, params=STRICT)
    assert len(json.dumps(created)) < 256 * 1024


async def test_deleting_a_namespace_takes_its_objects_along(api: Api, cluster: ControlPlane, namespace: str) -> None:
    path = collection(SERVICE, namespace)
    await api.create(path, SERVICE)
    await asyncio.to_thread(cluster.kubectl, "delete", "moesvc", "--all", "-n", namespace)
    await eventually(lambda: api.find(f"{path}/tiny"), lambda seen: seen is None, what="its end")
