"""The main job, through the command line as a person uses it: real training, real serving, a real SIGKILL."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
MOERATOR = (sys.executable, "-c", "from moe_operator.cli import main; main()")


def example(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "examples" / f"{name}-tiny.yaml").read_text())
    return document


def processes_in(folder: Path) -> set[int]:
    """Every living process that works in `folder`; pods work where their shell was started."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@dataclass(frozen=True)
class Served:
    url: str
    process: subprocess.Popen[str]
    folder: Path
    run: Path


def line_with(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Reads what the process says until a line matches."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"nothing said {pattern!r}:\n{''.join(said[-30:])}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model of three training steps, trained and then served by `moerator run`, each as a person would."""
    folder = tmp_path_factory.mktemp("run")
    job, service, drill = example("job"), example("service"), example("drill")
    del job["spec"]["training"]["maxSeconds"]
    job["spec"]["training"] |= {"maxSteps": 3, "warmupSteps": 1}
    job["spec"]["output"]["path"] = service["spec"]["model"]["path"] = str(folder / "tiny")
    for name, document in (("job", job), ("service", service), ("drill", drill)):
        (folder / f"{name}.yaml").write_text(json.dumps(document))
    train = [*MOERATOR, "run", "-f", "job.yaml"]
    trained = subprocess.run(train, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert processes_in(folder) == set()
    serve = [*MOERATOR, "run", "-f", "service.yaml"]
    process = subprocess.Popen(serve, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        run = Path(line_with(process, r"run folder (\S+)")[1])
        url = line_with(process, r"answers at (\S+)")[1]
        yield Served(url, process, folder, run)
    finally:
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        process.wait(30)


def test_the_checkpoint_loads_with_transformers_own_from_pretrained(served: Served) -> None:
    code = "import transformers as t; print(t.AutoModelForCausalLM.from_pretrained('tiny').num_parameters())"
    load = [sys.executable, "-c", code]
    done = subprocess.run(load, cwd=served.folder, capture_output=True, text=True, check=False)
    assert int(done.stdout or 0) > 1_000_000, done.stderr


def test_the_official_openai_client_works_unchanged(served: Served) -> None:
    from openai import OpenAI

    with OpenAI(base_url=served.url, api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.completions.create(model="tiny", prompt="def main(", max_tokens=12, temperature=0)
        stream = client.completions.create(model="tiny", prompt="def main(", max_tokens=12, temperature=0, stream=True)
        pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert "".join(pieces) == whole.choices[0].text


def test_a_drill_heals_and_the_run_can_be_looked_at(served: Served) -> None:
    arguments = ["drill", "-f", str(served.folder / "drill.yaml"), "--run", str(served.run)]
    drill = subprocess.run([*MOERATOR, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert (drill.returncode, "DrillPassed" in drill.stdout) == (0, True), drill.stdout + drill.stderr
    table = subprocess.run(
        [*MOERATOR, "get", "pods", "--run", str(served.run)], capture_output=True, text=True, check=False
    )
    assert "tiny-svc-rank-2-2" in table.stdout
    assert "tiny-svc-rank-2-1" not in table.stdout


def test_the_service_ends_on_ctrl_c_and_leaves_nothing(served: Served) -> None:
    assert len(processes_in(served.folder)) > 10
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 0
    assert processes_in(served.folder) == set()
    assert not served.run.exists()


def test_the_demo_keeps_its_promise_and_says_so_in_json(tmp_path: Path) -> None:
    """The very examples, in a folder of its own so that `.moerator/tiny` of the checkout stays."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    started = time.monotonic()
    done = subprocess.run([*MOERATOR, "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False)
    took_s = time.monotonic() - started
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads((tmp_path / ".moerator" / "demo.json").read_text())
    assert said["broken_promises"] == []
    assert said["serving"]["requests_failed"] == 0
    assert said["serving"]["requests_continued_on_another_rank"] >= 1
    assert said["heldout_bits_per_byte"]["generalist"] < said["heldout_bits_per_byte"]["dropped"]
    assert sum(said["seconds"].values()) - said["seconds"]["total"] < took_s
    assert processes_in(tmp_path) == set()


@pytest.mark.parametrize("after_s", [0.5, 3.0, 12.0])
def test_ctrl_c_during_the_demo_leaves_no_process(tmp_path: Path, after_s: float) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    process = subprocess.Popen([*MOERATOR, "demo"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after_s)  # the moment is the test
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert processes_in(tmp_path) == set()
