"""How long four ranks need from a SIGKILL to the next step, against the least that Gloo itself needs. CPU only.

    PYTHONPATH=tests:operator:runtime python tests/bench/recovery.py --runs 10

Two ways in turn, so that a busy machine slows both:

    moerator   membership as in the pods: the fault is noticed, the living agree on an epoch, build a group, step
    raw        three processes that are told beforehand who dies: their collective fails, they build the group, step

raw has no agreement, no probe, no fencing: what it takes, nobody can save. Prints both, the ratio run by run, and the
parts of ours; writes the same as JSON.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore

from membership_lab import Lab, Program
from moe_runtime.errors import GroupFault
from moe_runtime.membership.group import EpochGroup

NUM_RANKS, VICTIM = 4, 2
PARTS = ("detect", "agree", "rebuild", "step")


def recover_ours(program: Program, folder: Path) -> dict[str, float]:
    """Milliseconds from the kill to the first step of the next epoch, with its parts, as the slowest rank saw them."""
    lab = Lab(program, folder)
    try:
        ranks = lab.form(NUM_RANKS)
        time.sleep(0.3)  # somewhere in the middle of its steps
        killed_at = ranks[VICTIM].kill()
        resumed = lab.settled({r.uid for r in ranks if r.rank != VICTIM}, above=1)
        slowest = max(resumed.values(), key=lambda event: float(event["at"]))
        parts = slowest["parts"]
        total_ms = (slowest["at"] - killed_at) * 1000
        detect_ms = (parts["detected_at"] - killed_at) * 1000
        rest_ms = total_ms - detect_ms - parts["agree_ms"] - parts["rebuild_ms"]
        return dict(
            zip(("all", *PARTS), (total_ms, detect_ms, parts["agree_ms"], parts["rebuild_ms"], rest_ms), strict=True)
        )
    finally:
        lab.close()


def raw_rank(rank: int, folder: str, told: Connection) -> None:
    """Steps until its group fails, builds the next one at once with those it knows will live, steps, says when."""
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", -1)
    living = list(range(NUM_RANKS))
    is_second = False
    while True:
        group = EpochGroup(
            PrefixStore(f"epoch{len(living)}", store), living, rank, address="127.0.0.1", device="cpu", timeout_ms=5000
        )
        try:
            while True:
                group.all_gather_ints([rank])
                size = len(living)
                group.all_to_all(torch.zeros(size, 3), [1] * size, [1] * size)
                if is_second:
                    told.send(time.time())
                    return
                told.send(0.0)
                time.sleep(0.002)
        except GroupFault:
            living = [r for r in living if r != VICTIM]
            is_second = True
        finally:
            group.destroy()


def recover_raw(context: ForkServerContext, folder: Path) -> float:
    """Milliseconds from the kill to the first step of the slowest of three."""
    ends, processes = [], []
    try:
        for rank in range(NUM_RANKS):
            here, there = context.Pipe()
            process = context.Process(target=raw_rank, args=(rank, str(folder), there), daemon=True)
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        for end in ends:
            end.recv()
        time.sleep(0.3)
        killed_at = time.time()
        victim_pid = processes[VICTIM].pid
        assert victim_pid is not None
        os.kill(victim_pid, signal.SIGKILL)
        return (max(last_word(end) for rank, end in enumerate(ends) if rank != VICTIM) - killed_at) * 1000
    finally:
        for process in processes:
            process.kill()
            process.join(5)
        for end in ends:
            end.close()


def last_word(end: Connection) -> float:
    said = 0.0
    while not said:
        assert end.poll(20), "no step after the kill"
        said = end.recv()
    return said


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": statistics.median(ordered), "max": ordered[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="pairs of runs (default 10)")
    parser.add_argument("--json", type=Path, default=Path(".moerator/bench/recovery.json"))
    options = parser.parse_args()

    context = ForkServerContext()
    context.set_forkserver_preload(["torch", "moe_runtime.membership.group"])
    program = Program()
    ours: list[dict[str, float]] = []
    raw: list[float] = []
    with contextlib.closing(program), tempfile.TemporaryDirectory(prefix="moe-bench-") as home:
        for run in range(options.runs + 1):  # the first warms up: imports, page cache
            for name in ("ours", "raw"):
                Path(home, f"{name}{run}").mkdir()
            ours.append(recover_ours(program, Path(home, f"ours{run}")))
            raw.append(recover_raw(context, Path(home, f"raw{run}")))
    ours, raw = ours[1:], raw[1:]

    rows = {f"moerator, {part}": spread([run[part] for run in ours]) for part in ("all", *PARTS)}
    rows["raw"] = spread(raw)
    ratio = spread([mine["all"] / least for mine, least in zip(ours, raw, strict=True)])
    for name, row in rows.items():
        print(f"{name:22}" + "".join(f"{key} {value:7.1f} ms  " for key, value in row.items()))
    print(f"{'moerator / raw':22}" + "".join(f"{key} {value:7.2f}     " for key, value in ratio.items()))
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"ms": rows, "ratio": ratio, "runs": options.runs, "machine": machine}, indent=2)
    )
    print(f"{options.runs} pairs, load {machine['load']:.1f}; {options.json}")


if __name__ == "__main__":
    main()
