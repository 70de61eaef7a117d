"""One decode or prefill step of Llama-3-8B's linears, with and without adapters, as CUDA graphs. Needs no vLLM.

    PYTHONPATH=kernels:tests/kernels python tests/benchmarks/kernel_step.py decode|mixtures|prefill|quick [BACKEND …]

Every layer has weights of its own, so that no cache holds what a model would read from memory. Rows are CSV on
standard output: device, backend, adapters' kind, tokens, adapters in the step, ms of the base linears, of these with
all adapter ops, of the adapter ops alone, and the share of the base's speed, measured and at the byte floor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.testing import mixed, random_adapter

DEVICE = "cuda"
LAYERS = 32
SHAPES = (
    (("q", "k", "v"), 4096, (4096, 1024, 1024)),
    (("o",), 4096, (4096,)),
    (("gate", "up"), 4096, (14336, 14336)),
    (("down",), 14336, (4096,)),
)
MIXTURE = TokenGate(8, "top_k", k=2)
# Kind: rank, gate, and per number of tokens the numbers of adapters among which the step's requests are spread.
PARTS: dict[str, tuple[tuple[str, int, TokenGate | None, tuple[tuple[int, tuple[int, ...]], ...]], ...]] = {
    "quick": (
        ("plain16", 16, None, ((1, (1,)), (8, (8,)), (64, (1, 8, 64)), (2048, (8,)))),
        ("mixture8x16", 128, MIXTURE, ((64, (1, 8)), (2048, (8,)))),
    ),
    "decode": (
        ("plain16", 16, None, ((1, (1,)), (8, (1, 8)), (32, (1, 8, 32)), (64, (1, 8, 32, 64)), (128, (1, 8, 64)))),
    ),
    "mixtures": (
        ("plain128", 128, None, ((64, (1, 8)),)),
        ("mixture8x16", 128, MIXTURE, ((1, (1,)), (8, (1, 8)), (32, (8,)), (64, (1, 8)), (128, (8,)))),
    ),
    "prefill": (
        ("plain16", 16, None, ((512, (1, 8)), (2048, (1, 8)), (8192, (1, 8)))),
        ("mixture8x16", 128, MIXTURE, ((512, (8,)), (2048, (8,)), (8192, (8,)))),
    ),
}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Median of five runs of ten replays."""
    for _ in range(3):
        graph.replay()
    runs = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        runs.append(float(begin.elapsed_time(end)) / 10)
    return sorted(runs)[2]


def bandwidth() -> float:
    """Bytes per ms of a copy on this device, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    graph = capture(lambda: target.copy_(source))  # type: ignore[arg-type,return-value]
    return 2 * source.nbytes / milliseconds(graph)


def full_pool(slots: int, rank: int, gate: TokenGate | None, tokens: int, backend: str) -> tuple[AdapterPool, int]:
    """A pool full of adapters of `rank` on every module, and the bytes of one."""
    specs = [
        SiteSpec(f"{layer}.{'_'.join(modules)}", tuple(f"{layer}.{m}" for m in modules), d_in, d_outs)
        for layer in range(LAYERS)
        for modules, d_in, d_outs in SHAPES
    ]
    ranks = {m: rank for s in specs for m in s.modules}
    gates = dict.fromkeys(ranks, gate) if gate is not None else {}

    def pool(capacity: int) -> AdapterPool:
        return AdapterPool(
            specs,
            capacity_bytes=capacity,
            slots=slots,
            max_rank=max(64, rank),
            max_tokens=tokens,
            max_requests=256,
            dtype=torch.bfloat16,
            device=DEVICE,
            backend=backend,
        )

    one = pool(0).bytes_for(ranks, gates)
    made = pool(one * slots)
    generator = torch.Generator(DEVICE).manual_seed(0)
    first_layer = specs[: len(SHAPES)]
    modules = [m for s in first_layer for m in s.modules]
    adapter = random_adapter(first_layer, dict.fromkeys(modules, rank), torch.bfloat16, generator)
    if gate is not None:
        # Experts of equal rank, one behind the other, as checkpoints have them.
        expert = torch.arange(rank, device=DEVICE) * gate.experts // rank
        adapter = mixed(adapter, dict.fromkeys(modules, gate), generator)
        adapter = {module: w._replace(expert=expert) for module, w in adapter.items()}
    for _ in range(slots):
        slot = made.reserve(ranks, gates)
        for module in ranks:
            w = adapter["0." + module.split(".")[1]]
            made.write(slot, module, w.a, w.b, w.scale, router=w.router, expert=w.expert)
        made.publish(slot)
    made.warmup()
    torch.cuda.synchronize()
    return made, one


def base_weights() -> list[Tensor]:
    # [outputs, inputs], as models hold them: cuBLAS has other kernels for the other layout.
    return [
        torch.randn(sum(d_outs), d_in, device=DEVICE, dtype=torch.bfloat16) * d_in**-0.5
        for _ in range(LAYERS)
        for _, d_in, d_outs in SHAPES
    ]


def time_steps(
    label: str,
    pool: AdapterPool,
    adapter_bytes: int,
    weights: list[Tensor],
    steps: tuple[tuple[int, tuple[int, ...]], ...],
    bytes_per_ms: float,
) -> None:
    for tokens, adapter_counts in steps:
        xs = [torch.randn(tokens, d_in, device=DEVICE, dtype=torch.bfloat16) for _, d_in, _ in SHAPES]
        ys = [torch.empty(tokens, sum(d_outs), device=DEVICE, dtype=torch.bfloat16) for _, _, d_outs in SHAPES]

        def step(base: bool, adapters: bool, xs: list[Tensor] = xs, ys: list[Tensor] = ys) -> None:
            for i, site in enumerate(pool.site_ids):
                x, y = xs[i % len(SHAPES)], ys[i % len(SHAPES)]
                if adapters:
                    h = lk.shrink(x, site, pool.h_width(i))
                if base:
                    torch.mm(x, weights[i].t(), out=y)
                if adapters:
                    lk.expand(y, h, site)

        pool.set_idle(True)
        graphs = {
            name: capture(lambda n=name, s=step: s("base" in n, "adapters" in n))  # type: ignore[misc]
            for name in ("base", "adapters", "base+adapters")
        }
        base = milliseconds(graphs["base"])
        for count in (0, *adapter_counts):
            requests = np.arange(min(tokens, 256), dtype=np.int32)
            lengths = np.full(requests.size, tokens // requests.size, np.int32)
            if count:
                pool.set_batch(requests % count, lengths)
            else:  # what kernels without work cost
                pool.set_idle(True)
            alone, together = milliseconds(graphs["adapters"]), milliseconds(graphs["base+adapters"])
            floor = base / (base + count * adapter_bytes / bytes_per_ms)
            say(
                f"STEP,{torch.cuda.get_device_name().replace(',', ' ')},{label},{tokens},{count},"
                f"{base:.3f},{together:.3f},{alone:.3f},{base / together:.3f},{floor:.3f}"
            )


def main(part: str, backends: list[str]) -> None:
    bytes_per_ms = bandwidth()
    say(f"COPY,{bytes_per_ms / 1e9:.2f} TB/s")
    weights = base_weights()
    for backend in backends:
        for kind, rank, gate, steps in PARTS[part]:
            most = max(count for _, counts in steps for count in counts)
            pool, nbytes = full_pool(most, rank, gate, max(2048, *(tokens for tokens, _ in steps)), backend)
            time_steps(f"{backend},{kind}", pool, nbytes, weights, steps, bytes_per_ms)
            del pool
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], sys.argv[2:] or ["auto"])
