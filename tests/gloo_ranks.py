"""Real rank processes over real Gloo for tests: forked from one preloaded process, bounded in time, killed at the end.

`run_ranks(task, num_ranks=4, ...)` calls `task(rank, store_path, **arguments)` in every process and returns the
results by rank; a rank that died has none. Tasks live in importable modules (tests/ is on the path), because processes
are started by name.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore

from moe_runtime.membership.group import EpochGroup

PRELOAD = [
    "torch",
    "torch.distributed",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.olmoe.modeling_olmoe",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "moe_runtime.engine.model",
    "moe_runtime.membership.group",
]


def join_group(
    store_path: str,
    *,
    ranks: Sequence[int],
    rank: int,
    epoch: int = 1,
    timeout_ms: int = 20000,
    nodes: Sequence[str] | None = None,
    device: str = "cpu",
) -> EpochGroup:
    """The group of `ranks` over a store in a file: what a membership's store does, without the membership."""
    store = PrefixStore(f"epoch{epoch}", FileStore(store_path, -1))
    return EpochGroup(store, ranks, rank, address="127.0.0.1", device=device, timeout_ms=timeout_ms, domains=nodes)


def _main(
    task: Callable[..., Any], connection: Connection, rank: int, store_path: str, arguments: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    try:
        connection.send((True, task(rank, store_path, **arguments)))
    except BaseException:  # noqa: BLE001 - whatever went wrong belongs in the test's report
        connection.send((False, traceback.format_exc()))


def run_ranks(
    task: Callable[..., Any],
    *,
    num_ranks: int,
    store_path: str,
    timeout_s: float = 90,
    expected_ranks: Collection[int] | None = None,
    **arguments: Any,
) -> dict[int, Any]:
    """Results by rank; ranks that died are missing. Raises AssertionError with the traceback of a rank that failed.

    Returns once `expected_ranks` (all by default) have answered or died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ends: dict[Connection, int] = {}
    processes = []
    results: dict[int, Any] = {}
    try:
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_main, args=(task, there, rank, store_path, arguments), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            ends[here] = rank
        deadline = time.monotonic() + timeout_s
        awaited = set(range(num_ranks) if expected_ranks is None else expected_ranks)
        while awaited & set(ends.values()) and time.monotonic() < deadline:
            for ready in wait(list(ends), timeout=0.5):
                assert isinstance(ready, Connection)
                rank = ends.pop(ready)
                try:
                    ok, value = ready.recv()
                except EOFError:
                    continue
                assert ok, f"rank {rank}:\n{value}"
                results[rank] = value
        late = awaited & set(ends.values())
        assert not late, f"ranks {sorted(late)} did not finish in {timeout_s} s"
    finally:
        for process in processes:
            process.kill()
            process.join(5)
    return results
