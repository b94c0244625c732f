"""What the communication model says of a recorded trace's steps, to be held against the bytes that were counted."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from moe_core.contract.dispatch import SMALL_STEP_TOKENS
from moe_core.contract.expert_map import ExpertMap
from moe_core.experts.trace import Trace
from moe_core.experts.traffic import StepShape, traffic_by_pick, traffic_by_token


def modelled_bytes(
    expert_map: ExpertMap, trace: Trace, *, hidden_size: int, top_k: int, trains: bool = False
) -> dict[str, float]:
    """Bytes by scope, `rank` and `across`, of all steps together. Ranks without slots, or copies that are lost: none.

    Steps of one way are taken for as many equal steps with their mean number of tokens and their load: what a person
    does who plans with a trace.
    """
    load_SLE = trace.load_of_steps()
    tokens_S = load_SLE[:, 0].sum(-1) / top_k
    fullest = fullest_rank_of_step(trace)
    is_small_S = np.asarray([not trains and fullest[step] <= SMALL_STEP_TOKENS for step in trace.steps])
    found: Counter[str] = Counter()
    for is_small in (True, False):
        steps = is_small_S == is_small
        if not steps.any():
            continue
        num_steps = int(steps.sum())
        shape = StepShape(
            tokens_per_rank=max(1, round(float(tokens_S[steps].mean()) / expert_map.num_ranks)),
            hidden_size=hidden_size,
            top_k=top_k,
            bytes_per_number=4,
        )
        load_LE = load_SLE[steps].sum(0)
        traffic = (
            traffic_by_token(expert_map, shape)
            if is_small
            else traffic_by_pick(expert_map, load_LE, shape, trains=trains)
        )
        by_scope: Mapping[str, float] = traffic.by_scope([()] * expert_map.num_ranks, ())
        found.update({scope: round(count * num_steps) for scope, count in by_scope.items()})
    return dict(found)


def fullest_rank_of_step(trace: Trace) -> dict[int, int]:
    """Most tokens of any rank, by step."""
    first = trace.layers[0]
    most: dict[int, int] = {}
    for record in trace.records:
        if record.layer_name == first:
            most[record.step] = max(most.get(record.step, 0), record.num_tokens)
    return most
