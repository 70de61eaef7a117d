"""One decode or prefill step of Llama-3-8B's linears, with and without adapters, as CUDA graphs. Needs no vLLM.

    PYTHONPATH=kernels python tests/benchmarks/kernel_step.py decode|mixtures|prefill|popularity|quick [BACKEND …]

Every layer has weights of its own, so that no cache holds what a model would read from memory. Rows are CSV on
standard output: device, backend, adapters' kind, tokens, adapters in the step, ms of the base linears, of these with
all adapter ops, of the adapter ops alone, and the share of the base's speed, measured and at the byte floor. Adapters
0 is the cost of kernels that find nothing to do. Then lines SITE: µs of both ops at each of a layer's four sites.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.sequences import Ints
from loramux_kernels.testing import POPULARITIES, mixed, ragged_batch, random_adapter

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
    graph = capture(lambda: target.copy_(source))  # type: ignore[arg-type]
    return 2 * source.nbytes / milliseconds(graph)


def full_pool(
    slots: int, rank: int, gate: TokenGate | None, tokens: int, backend: str, *, ranks: tuple[int, ...] = ()
) -> tuple[AdapterPool, int]:
    """A pool full of adapters of `rank`, or of `ranks` in turn, on every module, and the bytes of one of `rank`."""
    specs = [
        SiteSpec(f"{layer}.{'_'.join(modules)}", tuple(f"{layer}.{m}" for m in modules), d_in, d_outs)
        for layer in range(LAYERS)
        for modules, d_in, d_outs in SHAPES
    ]
    all_modules = [m for s in specs for m in s.modules]
    gates = dict.fromkeys(all_modules, gate) if gate is not None else {}

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

    one = pool(0).bytes_for(dict.fromkeys(all_modules, rank), gates)
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
    for i in range(slots):
        r = ranks[i % len(ranks)] if ranks else rank
        slot = made.reserve(dict.fromkeys(all_modules, r), gates)
        for module in all_modules:
            w = adapter["0." + module.split(".")[1]]
            made.write(slot, module, w.a[:r], w.b[:r], w.scale[:r], router=w.router, expert=w.expert)
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


def time_batch(
    label: str,
    pool: AdapterPool,
    weights: list[Tensor],
    which: Ints,
    lengths: Ints,
    adapter_bytes: int,
    bytes_per_ms: float,
) -> None:
    """One row: requests of `lengths` tokens, each under the adapter in slot `which`, −1 for none."""
    tokens, count = int(lengths.sum()), len(set(which[which >= 0].tolist()))
    xs = [torch.randn(tokens, d_in, device=DEVICE, dtype=torch.bfloat16) for _, d_in, _ in SHAPES]
    ys = [torch.empty(tokens, sum(d_outs), device=DEVICE, dtype=torch.bfloat16) for _, _, d_outs in SHAPES]

    def step(base: bool, adapters: bool) -> None:
        for i, site in enumerate(pool.site_ids):
            x, y = xs[i % len(SHAPES)], ys[i % len(SHAPES)]
            if adapters:
                h = lk.shrink(x, site, pool.h_width(i))
            if base:
                torch.mm(x, weights[i].t(), out=y)
            if adapters:
                lk.expand(y, h, site)

    pool.set_idle(True)
    base_graph, adapter_graph, both_graph = (
        capture(lambda b=base, a=adapters: step(b, a))  # type: ignore[misc]
        for base, adapters in ((True, False), (False, True), (True, True))
    )
    if count:
        pool.set_batch(which, lengths)
    base, alone, both = (milliseconds(graph) for graph in (base_graph, adapter_graph, both_graph))
    floor = base / (base + adapter_bytes / bytes_per_ms)
    say(
        f"STEP,{torch.cuda.get_device_name().replace(',', ' ')},{label},{tokens},{count},"
        f"{base:.3f},{both:.3f},{alone:.3f},{base / both:.3f},{floor:.3f}"
    )


def site_times(label: str, pool: AdapterPool, tokens: int, count: int) -> None:
    """µs of both ops at each site of a layer, averaged over the layers."""
    pool.set_batch(np.arange(tokens, dtype=np.int32) % count, np.ones(tokens, np.int32))
    times = []
    for site, (_, d_in, d_outs) in enumerate(SHAPES):
        x = torch.randn(tokens, d_in, device=DEVICE, dtype=torch.bfloat16)
        y = torch.empty(tokens, sum(d_outs), device=DEVICE, dtype=torch.bfloat16)

        def ops(site: int = site, x: Tensor = x, y: Tensor = y) -> None:
            for i in range(site, len(pool.site_ids), len(SHAPES)):
                lk.expand(y, lk.shrink(x, pool.site_ids[i], pool.h_width(i)), pool.site_ids[i])

        times.append(1000 * milliseconds(capture(ops)) / LAYERS)
    say(f"SITE,{label},{tokens},{count}," + ",".join(f"{time:.1f}" for time in times))


def popularity_steps(backend: str, weights: list[Tensor], bytes_per_ms: float) -> None:
    """64 requests over adapters of ranks 8 to 128 as traffic picks them."""
    pool, _ = full_pool(64, 128, None, 2048, backend, ranks=(8, 16, 32, 64, 128))
    rng = np.random.default_rng(0)
    for popularity in POPULARITIES:
        which, _ = ragged_batch(popularity, rng=rng, requests=64, adapters=64, tokens=64, base_share=0)
        time_batch(f"{backend},ranks8-128 {popularity}", pool, weights, which, np.ones(64, np.int32), 0, bytes_per_ms)


def main(part: str, backends: list[str]) -> None:
    bytes_per_ms = bandwidth()
    say(f"COPY,{bytes_per_ms / 1e9:.2f} TB/s")
    weights = base_weights()
    for backend in backends:
        if part == "popularity":
            popularity_steps(backend, weights, bytes_per_ms)
            continue
        for kind, rank, gate, steps in PARTS[part]:
            most = max(count for _, counts in steps for count in counts)
            pool, nbytes = full_pool(most, rank, gate, max(2048, *(tokens for tokens, _ in steps)), backend)
            for tokens, adapter_counts in steps:
                requests = np.arange(min(tokens, 256), dtype=np.int32)
                lengths = np.full(requests.size, tokens // requests.size, np.int32)
                for count in (0, *adapter_counts):
                    which = requests % count if count else np.full_like(requests, -1)
                    time_batch(f"{backend},{kind}", pool, weights, which, lengths, count * nbytes, bytes_per_ms)
            site_times(f"{backend},{kind}", pool, 64, most)
            del pool
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], sys.argv[2:] or ["auto"])
