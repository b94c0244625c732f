"""However the shell of a local run ends, no process stays; the pods' program is a stand-in, the ends are real."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

HERE = Path(__file__).parent
SHELL = """
import asyncio, sys, yaml
from pathlib import Path
from moe_operator.cluster.local_shell import LocalShell

async def main():
    async with LocalShell(program=(sys.executable, sys.argv[1], "daemon")) as shell:
        document = yaml.safe_load(Path(sys.argv[2]).read_text())
        document["spec"]["model"]["path"] = sys.argv[3]
        shell.apply(document)
        print(shell.cluster.folder, flush=True)
        while True:
            await shell.changed()

try:
    asyncio.run(main())
except (KeyboardInterrupt, asyncio.CancelledError):
    sys.exit(130)
"""
PODS = 8  # coordinator, two gateways, four ranks, the Ray node they share


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A shell in a process of its own with every pod of a service running; and its run folder."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 16, "num_hidden_layers": 2}')
    example = HERE.parents[1] / "examples" / "service-tiny.yaml"
    arguments = [str(HERE / "local_stand_in.py"), str(example), str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", SHELL, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        folder = Path(process.stdout.readline().strip())
        wait(lambda: len(list(folder.glob("p/*/moerator-state/daemon"))) == PODS)
        yield process, folder
    finally:
        process.stdout.close()
        process.kill()
        process.wait()


def wait(holds: object, *, within_s: float = 30) -> None:
    assert callable(holds)
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def marked(folder: Path) -> list[int]:
    """Living processes that belong to the run."""
    mark, found = f"MOERATOR_RUN={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_shell_that_is_asked_to_end_leaves_neither_process_nor_file(
    shell: tuple[subprocess.Popen[str], Path], number: signal.Signals
) -> None:
    process, folder = shell
    assert len(marked(folder)) >= 2 * PODS
    process.send_signal(number)
    assert process.wait(20) == 130
    assert marked(folder) == []
    assert not folder.exists()


def test_a_shell_that_is_killed_leaves_no_process(shell: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = shell
    process.kill()
    process.wait()
    wait(lambda: not marked(folder), within_s=10)
    assert marked(folder) == []


def test_what_a_killed_shell_left_is_removed_by_the_next_one(shell: tuple[subprocess.Popen[str], Path]) -> None:
    from moe_operator.cluster.local_runs import remove_dead_runs

    process, folder = shell
    process.kill()
    process.wait()
    wait(lambda: not marked(folder), within_s=10)
    remove_dead_runs()
    assert not folder.exists()


def test_a_kill_while_pods_start_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 16, "num_hidden_layers": 2}')
    example = HERE.parents[1] / "examples" / "service-tiny.yaml"
    arguments = [str(HERE / "local_stand_in.py"), str(example), str(tmp_path)]
    for wait_s in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-c", SHELL, *arguments], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            folder = Path(process.stdout.readline().strip())
            time.sleep(wait_s)
            process.kill()
            process.wait()
        wait(lambda folder=folder: not marked(folder), within_s=10)
        assert marked(folder) == []
        assert os.getpid() not in marked(folder)
