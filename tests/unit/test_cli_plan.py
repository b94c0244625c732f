"""`moerator plan`: what it says of a resource, and what it refuses, with the field and the value."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moe_operator.cli import app

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}
JOB = str(EXAMPLES / "job-tiny.yaml")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    return result.exit_code, result.output


def nodes_file(folder: Path, count: int, cpu: str = "8") -> Path:
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": f"n{number}", "labels": {}},
            "status": {
                "allocatable": {"cpu": cpu, "memory": "16Gi", "pods": "110"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        for number in range(count)
    ]
    file = folder / "nodes.yaml"
    file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": nodes}))
    return file


def service_file(folder: Path, *, max_sequences: int) -> Path:
    """Two ranks, and beside it the config of a checkpoint with 8 experts in 2 layers, in bfloat16."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MIXTRAL))
    (model / "model.safetensors").touch()
    spec = {
        "model": {"path": str(model)},
        "parallelism": {"expert": 2},
        "serving": {"maxSequences": max_sequences},
    }
    file = folder / "service.yaml"
    head = {"apiVersion": "moerator.dev/v1alpha1", "kind": "MoEService", "metadata": {"name": "s"}}
    file.write_text(yaml.safe_dump({**head, "spec": spec}))
    return file


def trace_file(folder: Path, *, num_layers: int = 4) -> Path:
    """Every expert is chosen, and the four of rank 0 most of all."""
    file = folder / "trace.jsonl"
    lines = [
        {
            "step": 0,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": layer,
            "rank": 0,
            "num_tokens": 1200,
            "topk": 2,
        }
        | {"top_indices": ([[0, 1], [2, 3]] * 8 + [[even, even + 1] for even in range(0, 16, 2)]) * 50}
        for layer in range(num_layers)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_job_is_planned_without_a_cluster(tmp_path: Path) -> None:
    code, text = run("-f", JOB, "--nodes", nodes_file(tmp_path, 2), "--json")
    (plan,) = json.loads(text)[0]["plans"]
    assert (code, plan["accepted"], plan["ranks"]) == (0, True, 4)
    assert set(plan["nodeOfRank"].values()) == {"n0", "n1"}
    assert plan["slotsOfRank"] == [4, 4, 4, 4]
    assert plan["survival"]["1"]["chance"] == 0.0  # without copies every rank holds an expert that nobody else has
    assert plan["bytesByScope"]["across"] > 0


def test_a_load_shows_what_a_plan_for_it_would_win(tmp_path: Path) -> None:
    code, text = run("-f", JOB, "--load", trace_file(tmp_path), "--json")
    (plan,) = json.loads(text)[0]["plans"]
    assert code == 0
    assert plan["balancedness"] < plan["planned"]["balancedness"] <= plan["bestBalancedness"] + 1e-9
    assert plan["planned"]["moves"] > 0
    assert plan["planned"]["gainSeconds"] >= plan["planned"]["costSeconds"]
    payback = plan["planned"]["costSeconds"] / plan["planned"]["gainSeconds"]
    assert plan["planned"]["paybackOfHorizon"] == pytest.approx(payback) and payback > 0


def test_nodes_and_a_trace_show_how_far_tokens_have_to_go(tmp_path: Path) -> None:
    code, text = run("-f", JOB, "--nodes", nodes_file(tmp_path, 4), "--load", trace_file(tmp_path), "--json")
    (plan,) = json.loads(text)[0]["plans"]
    assert code == 0
    assert plan["crossings"]["together"]["nodes"] <= plan["crossings"]["by_load"]["nodes"] <= 2
    assert plan["crossings"]["assigned"]["balancedness"] < plan["crossings"]["together"]["balancedness"]
    assert run("-f", JOB, "--nodes", nodes_file(tmp_path, 1), "--load", trace_file(tmp_path))[0] == 0


@pytest.mark.parametrize(("sequences", "way"), [(64, "ByToken"), (65, "ByPick")])
def test_a_small_step_of_a_service_goes_by_token_as_the_data_plane_has_it(
    tmp_path: Path, sequences: int, way: str
) -> None:
    file = service_file(tmp_path, max_sequences=sequences)
    code, text = run("-f", file, "--json")
    (plan,) = json.loads(text)[0]["plans"]
    assert code == 0
    assert plan["step"] == {
        "tokensPerRank": sequences,
        "trains": False,
        "dispatch": way,
        "wire": "Float32",
        "combineWire": "Float32",
        "eachRankItsOwnLoad": False,
        "picksPerToken": 2,
    }
    row, layers, others = 64 * 4, 2, 2 * 1
    if way == "ByToken":
        assert plan["bytesByScope"]["across"] == layers * others * sequences * (2 * row + 2 * 8)
    else:
        half_of_the_picks = sequences * 2 // 2
        assert plan["bytesByScope"]["across"] == layers * others * (half_of_the_picks * 2 * row + 4 * 8)


def test_a_trace_of_as_many_ranks_is_counted_rank_by_rank(tmp_path: Path) -> None:
    file = service_file(tmp_path, max_sequences=65)
    record = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "num_tokens": 1, "topk": 2}
    lines = [
        {**record, "layer": layer, "rank": rank, "top_indices": [[4, 5]] if rank == 0 else [[0, 1]]}
        for layer in range(2)
        for rank in range(2)
    ]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (plan,) = json.loads(run("-f", file, "--load", tmp_path / "two.jsonl", "--json")[1])[0]["plans"]
    assert plan["step"]["eachRankItsOwnLoad"]
    counts = 2 * 2 * 4 * 8
    assert plan["bytesByScope"] == {"rank": counts, "across": 2 * 2 * (65 * 2 * 64 * 4 * 2) + counts}
    (other,) = json.loads(run("-f", file, "--load", tmp_path / "two.jsonl", "--ranks", "4", "--json")[1])[0]["plans"]
    assert not other["step"]["eachRankItsOwnLoad"]


def test_a_training_step_goes_by_pick_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "training 512 tokens a rank goes by pick" in run("-f", JOB)[1]


@pytest.mark.parametrize(
    ("router", "picks", "words"),
    [
        ({"type": "TopK"}, 2, "goes by pick"),
        ({"type": "Switch"}, 1, "goes by pick"),
        (
            {"type": "ExpertChoice", "expertCapacityFactor": "1.25"},
            None,
            "of which ExpertChoice takes",
        ),
        ({"type": "TopP"}, None, "with 2 experts a token, of which TopP takes another number"),
    ],
    ids=lambda given: given["type"] if isinstance(given, dict) else "",
)
def test_a_steps_bytes_are_of_as_many_picks_as_the_router_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router: dict[str, Any], picks: int | None, words: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    job = yaml.safe_load(Path(JOB).read_text())
    del job["spec"]["training"]["auxLossCoefficient"]
    job["spec"]["model"]["router"] = router
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    (plan,) = json.loads(run("-f", tmp_path / "job.yaml", "--json")[1])[0]["plans"]
    (family,) = json.loads(run("-f", JOB, "--json")[1])[0]["plans"]
    assert plan["step"]["picksPerToken"] == picks
    share = plan["bytesByScope"]["across"] / family["bytesByScope"]["across"]
    assert share == pytest.approx(0.5 if picks == 1 else 1, rel=0.001)  # a few counts travel whatever is picked
    assert words in run("-f", tmp_path / "job.yaml")[1]


def test_numbers_of_ranks_stand_side_by_side(tmp_path: Path) -> None:
    code, text = run("-f", JOB, "--ranks", "2..6", "--json")
    assert code == 0
    assert [plan["ranks"] for plan in json.loads(text)[0]["plans"]] == [2, 4, 6]
    assert "2 ranks" in run("-f", JOB, "--ranks", "2..6")[1]


def test_a_gang_that_does_not_fit_ends_with_one_and_says_why(tmp_path: Path) -> None:
    code, text = run("-f", JOB, "--nodes", nodes_file(tmp_path, 1, cpu="100m"), "--json")
    (plan,) = json.loads(text)[0]["plans"]
    assert code == 1
    assert plan["nodeOfRank"] is None
    assert "needs room for 4 ranks" in plan["noFit"]


def test_the_picture_has_a_square_for_every_slot(tmp_path: Path) -> None:
    drawn = tmp_path / "plan.svg"
    assert run("-f", JOB, "--plot", drawn)[0] == 0
    assert drawn.read_text().count("<title>") == 4 * 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ranks", "many"), "--ranks must be a number or A..B within 1..1024, got 'many'"),
        (("--ranks", "8..2"), "got '8..2'"),
        (("--nodes", "/nowhere"), "--nodes: /nowhere: No such file"),
        (("--nodes", JOB), "must hold nodes and pods, got MoEJob"),
        (("--nodes", EXAMPLES.parent / "LICENSE"), "is not what `kubectl get nodes -o yaml` prints"),
        (("--nodes", EXAMPLES.parent / "README.md"), ": did not find expected alphabetic"),
        (("--load", JOB), "line 1: not JSON"),
        (("--plot", "plan.png"), "must end in .svg, got plan.png"),
        (("--plot", EXAMPLES / "gone" / "plan.svg"), "plan.svg: No such file"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, ...], words: str) -> None:
    code, text = run("-f", JOB, *arguments)
    assert code == 2
    assert words in text.replace("\n", " ")


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    code, text = run("-f", JOB, "--load", trace_file(tmp_path, num_layers=3))
    assert code == 2
    assert "the trace has 3 layers and experts up to 15, the model has 4 layers and experts 0..15" in text


def test_a_config_of_which_the_size_cannot_be_told_costs_the_plan_its_bytes_only(tmp_path: Path) -> None:
    config = {
        **{"model_type": "qwen3_moe", "num_experts": 16, "num_hidden_layers": 4, "num_experts_per_tok": 2},
        **{"hidden_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 256},
        **{"num_key_value_heads": [2, 4, 2, 4], "torch_dtype": "float32"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    document = yaml.safe_load((EXAMPLES / "service-tiny.yaml").read_text())
    document["spec"]["model"] = {"path": str(tmp_path)}
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(document))
    code, text = run("-f", file)
    assert code == 0
    assert "not known: config must give num_key_value_heads" in " ".join(text.replace("│", " ").split())
    (service,) = json.loads(run("-f", file, "--json")[1])
    assert "num_key_value_heads" in service["sizeUnknown"]
    assert service["plans"][0]["slotsOfRank"] == [6, 6, 6, 6]
    assert service["plans"][0]["parameterBytesOfRank"] is None


def test_files_without_a_job_or_a_service_are_refused() -> None:
    assert run("-f", EXAMPLES / "drill-tiny.yaml") == (2, "-f: no MoEJob and no MoEService in these files\n")


def test_a_checkpoint_that_only_the_pods_can_reach_costs_the_plan_its_bytes_and_it_says_so() -> None:
    (service,) = json.loads(run("-f", EXAMPLES / "cluster" / "service-tiny.yaml", "--json")[1])
    assert service["sizeUnknown"] == "no checkpoint can be read at /models/tiny from here"
    assert service["plans"][0]["accepted"]


def test_tokens_that_cross_once_in_fewer_bits_send_a_fraction_between_nodes(tmp_path: Path) -> None:
    document = yaml.safe_load((EXAMPLES / "job-hierarchy.yaml").read_text())
    sent = {}
    for hierarchy, wire, back in (("Flat", "Float32", "Float32"), ("ByNode", "Float8", "BFloat16")):
        document["spec"]["dispatch"] = {"hierarchy": hierarchy, "wire": wire, "combineWire": back}
        file = tmp_path / f"{hierarchy}.yaml"
        file.write_text(json.dumps(document))  # which keeps "9e-3" a string
        code, text = run("-f", file, "--nodes", nodes_file(tmp_path, 2, cpu="300m"), "--json")
        assert code == 0, text
        (plan,) = json.loads(text)[0]["plans"]
        assert plan["step"]["dispatch"] == {"Flat": "ByPick", "ByNode": "ByNode"}[hierarchy]
        sent[hierarchy] = plan["bytesByScope"]["across"]
    assert sent["ByNode"] < 0.25 * sent["Flat"]


def live(folder: Path, status: object) -> Path:
    """The job as `kubectl get -o yaml` prints it while it runs."""
    document = yaml.safe_load(Path(JOB).read_text())
    file = folder / "live.json"
    file.write_text(json.dumps({**document, "status": status}))
    return file


NETWORK = {"network": {"latencyMicroseconds": 200, "bytesPerSecond": 20_000_000}}


def test_what_a_running_group_has_measured_is_planned_with_and_told(tmp_path: Path) -> None:
    status = {"links": NETWORK, "pace": {"nanosecondsPerPick": 500, "ranksPercent": {"1": 25}}, "epoch": 3}
    files = (JOB, live(tmp_path, status))
    plans = [
        json.loads(run("-f", file, "--nodes", nodes_file(tmp_path, 2), "--load", trace_file(tmp_path), "--json")[1])
        for file in files
    ]
    new, old = (found[0]["plans"][0] for found in plans)
    assert (new["measured"], new["linkSeconds"]) == ({}, None)
    assert old["measured"] == {key: status[key] for key in ("links", "pace")}
    assert old["linkSeconds"] > 0.9 * old["bytesByScope"]["across"] / 4 / 20e6
    assert old["planned"]["logicalOfSlot"] != new["planned"]["logicalOfSlot"]
    text = run("-f", files[1])[1].replace("│", " ")
    assert "network 200 us, 20 MB/s" in " ".join(text.split())


def test_a_status_that_cannot_be_read_is_refused_by_field(tmp_path: Path) -> None:
    code, text = run("-f", live(tmp_path, {"pace": {"nanosecondsPerPick": -1}}))
    assert code == 2
    assert "status: Measured.pace.nanosecondsPerPick" in text
