"""What the communication model says of a recorded trace's steps, to be held against the bytes that were counted."""

from collections import Counter
from collections.abc import Mapping

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
    small = {step for step, most in fullest_rank_of_step(trace).items() if not trains and most <= SMALL_STEP_TOKENS}
    found: Counter[str] = Counter()
    for is_small in (True, False):
        records = [record for record in trace.records if (record.step in small) == is_small]
        if not records:
            continue
        part = Trace.of(records, num_experts=expert_map.num_logical_experts)
        num_steps = len(part.steps)
        load_RLE = part.load_of_sources(expert_map.num_ranks)
        shape = StepShape(
            tokens_per_rank=float(load_RLE[:, 0].sum()) / top_k / num_steps / expert_map.num_ranks,
            hidden_size=hidden_size,
            top_k=top_k,
        )
        traffic = (
            traffic_by_token(expert_map, shape)
            if is_small
            else traffic_by_pick(expert_map, load_RLE, shape, trains=trains)
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
