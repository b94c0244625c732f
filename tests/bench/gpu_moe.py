"""Experts of a MoE layer on one GPU: each of our kernels against torch and against its floor, in one run.

    PYTHONPATH=operator:runtime python tests/bench/gpu_moe.py                # about two minutes on an H100
    PYTHONPATH=operator:runtime python tests/bench/gpu_moe.py --case e128 --part layer

The peer of a whole layer is transformers' own `grouped_mm` experts (sort, gather, torch's grouped matrix product,
SwiGLU, grouped product, weight, scatter), as it is and through torch.compile; that of a kernel is the same step in
torch. The floor is the larger of two times: the operations at the rate of a large matrix product, the bytes (each input
read once, each output written once) at the rate of a large copy, both measured first, in the same run. Times are
medians of at least 60 ms and eight runs, in ms, with the 20th and 80th percentile. Picks are drawn evenly, numbers at
random. Writes .moerator/bench/gpu_moe.json. Without a GPU it says so and ends.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import silu

from moe_core.contract.packing import Packing
from moe_runtime.kernels import mixture as mixtures
from moe_runtime.kernels.index import index_rows, index_rows_reference
from moe_runtime.kernels.permute import combine, combine_reference, permute, permute_reference
from moe_runtime.kernels.quantise import pack

OUTPUT = Path(".moerator/bench/gpu_moe.json")
BF16 = 2
"""Bytes of a number."""
LEAST_RUNS = 8


@dataclass(frozen=True)
class Case:
    """T tokens, K picks of each, S experts, D model, F expert hidden."""

    t: int
    k: int
    s: int
    d: int
    f: int

    @property
    def n(self) -> int:
        return self.t * self.k


CASES = {
    "e128": Case(32768, 8, 128, 2048, 768),
    "e512": Case(32768, 10, 512, 2048, 512),
    "e8": Case(32768, 2, 8, 4096, 14336),
    "decode": Case(64, 8, 128, 2048, 768),
}
PARTS = ("layer", "kernels", "training", "packed", "float32")


@dataclass(frozen=True)
class Row:
    """One line: ours and torch's as (median, 20 %, 80 %) ms; floor in ms."""

    case: str
    what: str
    ours: tuple[float, float, float]
    torch: tuple[float, float, float] | None
    floor: float


class Machine:
    """What this GPU reaches with the plainest work."""

    def __init__(self) -> None:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * 8192**3 / timed(lambda: a @ b)[0] * 1e3
        source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self.bytes = 2 * source.numel() / timed(lambda: target.copy_(source))[0] * 1e3

    def floor(self, *, flops: float = 0.0, num_bytes: float = 0.0) -> float:
        return max(flops / self.flops, num_bytes / self.bytes) * 1e3


def timed(run: Callable[[], object]) -> tuple[float, float, float]:
    from triton.testing import do_bench

    quantiles = [0.5, 0.2, 0.8]
    median, low, high = do_bench(run, warmup=20, rep=60, quantiles=quantiles)
    if median > 60 / LEAST_RUNS:
        median, low, high = do_bench(run, warmup=0, rep=LEAST_RUNS * median, quantiles=quantiles)
    return median, low, high


class Layer:
    """A case's tensors, and transformers' own module around them."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16).to(dtype)

        self.case = case
        self.x = normal(case.t, case.d)
        self.gate_up = torch.nn.Parameter(normal(case.s, 2 * case.f, case.d) * case.d**-0.5)
        self.down = torch.nn.Parameter(normal(case.s, case.d, case.f) * case.f**-0.5)
        score = torch.rand(case.t, case.s, generator=generator, device="cuda")
        self.slot = score.topk(case.k).indices
        self.weight = torch.rand(case.t, case.k, generator=generator, device="cuda").softmax(-1).to(dtype)

    @property
    def matrix_bytes(self) -> float:
        """Of one of gate, up and down, over all experts that some pick reaches: few picks do not reach each of them."""
        case = self.case
        return min(1.0, case.n / case.s) * case.s * case.d * case.f * BF16

    def ours(self) -> torch.Tensor:
        return mixtures.mixture(self.x, self.slot, self.weight, self.gate_up, self.down)

    def peer(self) -> torch.nn.Module:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config: Any = SimpleNamespace(
            num_experts=self.case.s,
            num_local_experts=self.case.s,
            hidden_size=self.case.d,
            moe_intermediate_size=self.case.f,
            hidden_act="silu",
            _experts_implementation="grouped_mm",
        )
        with torch.device("meta"):
            module: torch.nn.Module = Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = self.gate_up, self.down
        return module


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def layer_rows(name: str, layer: Layer, machine: Machine) -> Iterator[Row]:
    case, peer = layer.case, layer.peer()
    floor = machine.floor(
        flops=6 * case.n * case.d * case.f, num_bytes=3 * layer.matrix_bytes + 2 * case.t * case.d * BF16
    )
    with torch.no_grad():
        expected = peer(layer.x, layer.slot, layer.weight)
        print(f"{name}: relative difference from the peer {difference(layer.ours(), expected):.1e}")
        ours = timed(layer.ours)
        yield Row(name, "forward / transformers", ours, timed(lambda: peer(layer.x, layer.slot, layer.weight)), floor)
        compiled = torch.compile(peer)
        compiled(layer.x, layer.slot, layer.weight)
        seconds = timed(lambda: compiled(layer.x, layer.slot, layer.weight))
        yield Row(name, "forward / transformers, compiled", ours, seconds, floor)


def kernel_rows(name: str, layer: Layer, machine: Machine) -> Iterator[Row]:
    from moe_runtime.kernels import grouped_triton

    case = layer.case
    n, d, f = case.n, case.d, case.f
    block_rows = grouped_triton.block_rows_for(n, case.s, layer.x.device)
    slot_N = layer.slot.reshape(-1)
    rows = index_rows(slot_N, num_slots=case.s, block_rows=block_rows)
    yield Row(
        name,
        "index",
        timed(lambda: index_rows(slot_N, num_slots=case.s, block_rows=block_rows)),
        timed(lambda: index_rows_reference(slot_N, num_slots=case.s, block_rows=block_rows)),
        machine.floor(num_bytes=n * (8 + 4 + 4)),
    )
    with torch.no_grad():
        yield Row(
            name,
            "permute",
            timed(lambda: permute(layer.x, rows, top_k=case.k)),
            timed(lambda: permute_reference(layer.x, rows, top_k=case.k)),
            machine.floor(num_bytes=(case.t + n) * d * BF16),
        )
        order_N = torch.sort(slot_N).indices
        x_ND = layer.x[order_N // case.k]
        ends_S = rows.count_S.cumsum(0).int()

        def torch_gate_up() -> torch.Tensor:
            gate, up = torch._grouped_mm(x_ND, layer.gate_up.transpose(1, 2), offs=ends_S).chunk(2, dim=-1)
            return silu(gate) * up

        x_PD = permute(layer.x, rows, top_k=case.k)
        row_bytes, of_torch = n * (d + f) * BF16, timed(torch_gate_up)
        up_floor = machine.floor(flops=4 * n * d * f, num_bytes=2 * layer.matrix_bytes + row_bytes)
        for what, x, top_k in (("gathered", layer.x, case.k), ("permuted", x_PD, None)):
            run = timed(lambda x=x, k=top_k: grouped_triton.gate_up(x, layer.gate_up, rows, gather_top_k=k))  # type: ignore[misc]
            yield Row(name, f"gate, up, SwiGLU, {what}", run, of_torch, up_floor)
        hidden_NF, hidden_PF = torch_gate_up(), torch.randn(len(rows.pick_P), f, device="cuda", dtype=torch.bfloat16)
        yield Row(
            name,
            "down",
            timed(lambda: grouped_triton.rows_times_weights(hidden_PF, layer.down, rows, transposed=True)),
            timed(lambda: torch._grouped_mm(hidden_NF, layer.down.transpose(1, 2), offs=ends_S)),
            machine.floor(flops=2 * n * d * f, num_bytes=layer.matrix_bytes + row_bytes),
        )
        yield Row(
            name,
            "combine",
            timed(lambda: combine(x_PD, layer.weight, rows)),
            timed(lambda: combine_reference(x_PD, layer.weight, rows)),
            machine.floor(num_bytes=(case.t + n) * d * BF16),
        )


def training_rows(name: str, layer: Layer, machine: Machine) -> Iterator[Row]:
    case, peer = layer.case, layer.peer()
    x = layer.x.clone().requires_grad_()
    weight = layer.weight.clone().requires_grad_()
    leaves = (x, weight, layer.gate_up, layer.down)
    d_out = torch.randn_like(layer.x)

    def ours() -> tuple[torch.Tensor, ...]:
        out = mixtures.mixture(x, layer.slot, weight, layer.gate_up, layer.down)
        return torch.autograd.grad(out, leaves, d_out)

    def theirs() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(peer(x, layer.slot, weight), leaves, d_out)

    names = ("x", "weight", "gate_up", "down")
    errors = [difference(a, b) for a, b in zip(ours(), theirs(), strict=True)]
    print(f"{name}: gradients differ by", ", ".join(f"{n} {e:.1e}" for n, e in zip(names, errors, strict=True)))
    floor = machine.floor(flops=18 * case.n * case.d * case.f)
    yield Row(name, "forward and backward / transformers", timed(ours), timed(theirs), floor)


def packed_rows(name: str, layer: Layer, machine: Machine) -> Iterator[Row]:
    case = layer.case
    with torch.no_grad():
        plain = timed(layer.ours)
        for packing in (Packing.of("Float8"), Packing.of("Int8"), Packing.of("Int4")):
            gate_up, down = (pack(w.detach(), packing) for w in (layer.gate_up, layer.down))
            assert gate_up.scales is not None and down.scales is not None
            tensors = (gate_up.codes, gate_up.scales, down.codes, down.scales)
            num_bytes = sum(t.numel() * t.element_size() for t in tensors) * min(1.0, case.n / case.s)

            def run(gate_up: Any = gate_up, down: Any = down, packing: Packing = packing) -> torch.Tensor:
                return mixtures.mixture_packed(layer.x, layer.slot, layer.weight, gate_up, down, packing=packing)

            flops = 6 * case.n * case.d * case.f
            floor = machine.floor(flops=flops, num_bytes=num_bytes)
            yield Row(name, f"{packing} / ours in bf16", timed(run), plain, floor)
            if packing.precision == "Float8":

                def multiplied(gate_up: Any = gate_up, down: Any = down) -> torch.Tensor:
                    return mixtures.mixture_float8(layer.x, layer.slot, layer.weight, gate_up, down)

                floor = machine.floor(flops=flops / 2, num_bytes=num_bytes)  # two for one of bfloat16
                yield Row(name, "multiplied as float8 / ours in bf16", timed(multiplied), plain, floor)


def float32_rows(name: str, layer: Layer, machine: Machine) -> Iterator[Row]:
    """Ours by three tf32 products for one of float32; the floor is bfloat16's."""
    layer = Layer(layer.case, torch.float32)
    peer = layer.peer()
    with torch.no_grad():
        print(f"{name}: float32 differs by {difference(layer.ours(), peer(layer.x, layer.slot, layer.weight)):.1e}")
        theirs = timed(lambda: peer(layer.x, layer.slot, layer.weight))
        flops = 6 * layer.case.n * layer.case.d * layer.case.f
        yield Row(name, "float32 forward / transformers", timed(layer.ours), theirs, machine.floor(flops=flops))


def show(rows: list[Row], machine: Machine, output: Path) -> None:
    """The table, and the same as JSON."""
    import triton

    figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    print(f"matrix product {machine.flops / 1e12:.0f} TFLOP/s, copy {machine.bytes / 1e12:.2f} TB/s")
    print("\n| case | what | ours ms (20 %, 80 %) | torch ms (20 %, 80 %) | ours / torch | floor ms | of the floor |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ours, low, high = row.ours
        theirs = "{:.3f} ({:.3f}, {:.3f}) | {:.2f}".format(*row.torch, ours / row.torch[0]) if row.torch else "| "
        share = f"{row.floor:.3f} | {row.floor / ours:.0%}"
        print(f"| {row.case} | {row.what} | {ours:.3f} ({low:.3f}, {high:.3f}) | {theirs} | {share} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**figures, **vars(machine), "rows": [vars(row) for row in rows]}, indent=2))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing is measured")
        return 0
    machine = Machine()
    parts = {
        "layer": layer_rows,
        "kernels": kernel_rows,
        "training": training_rows,
        "packed": packed_rows,
        "float32": float32_rows,
    }
    rows: list[Row] = []
    for case in options.case:
        layer = Layer(CASES[case])
        for part in options.part:
            rows += parts[part](case, layer, machine)
            torch.cuda.empty_cache()
    show(rows, machine, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
