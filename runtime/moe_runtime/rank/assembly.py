"""Puts one rank's parts together. Imports torch and transformers: only inside the rank's own process."""

import os
from collections.abc import Callable

import torch

from moe_core.contract.runtime_config import RuntimeConfig
from moe_runtime.host.memory import keep_freed_memory
from moe_runtime.membership.keeper import MembershipKeeper
from moe_runtime.rank.desk import Desk
from moe_runtime.rank.link import CoordinatorLink
from moe_runtime.rank.loop import StepLoop
from moe_runtime.rank.work import Work


def assemble(
    config: RuntimeConfig,
    *,
    token: str,
    rank: int,
    pod_uid: str,
    pod_ip: str,
    node_name: str,
    guard_address: str,
    coordinator_url: str,
    desk: Desk,
    settled: Callable[[], None],
) -> StepLoop:
    """The step loop with its link started; `run` it in a thread of its own. `settled` is called after each step."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    keep_freed_memory()
    keeper = MembershipKeeper(
        rank=rank,
        pod_uid=pod_uid,
        token=token,
        host=pod_ip,
        guard_address=guard_address,
        node=node_name,
    )
    link = CoordinatorLink(coordinator_url, token)
    loop = StepLoop(
        config,
        rank=rank,
        token=token,
        keeper=keeper,
        work=_work(config, rank=rank, desk=desk),
        directive=lambda: link.directive,
        settled=settled,
    )
    # A minority that waits in `recover` goes on at the word itself, not when it next looks at the directive.
    link.start(loop.report, heard=lambda d: keeper.vouch(d.vouched_dead, newest_epoch=d.newest_epoch))
    return loop


def _work(config: RuntimeConfig, *, rank: int, desk: Desk) -> Work:
    if config.mode == "train":
        from moe_runtime.rank.train import TrainWork

        return TrainWork(config, rank=rank)
    from moe_runtime.rank.serve import ServeWork

    return ServeWork(config, rank=rank, desk=desk)
