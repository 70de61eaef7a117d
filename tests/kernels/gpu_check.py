"""The CUDA path on a real GPU, without pytest and without vLLM.

    PYTHONPATH=kernels python tests/kernels/gpu_check.py [check|time]

First correctness (lines OK and FAIL; a FAIL makes the exit status 1), then the time of one Llama-3-8B step made of
its linears alone, as CUDA graphs: the base GEMMs, and these with all adapter ops, bfloat16. Lines STEP: plain
adapters of rank 16; lines MIX: mixtures of 8 experts of rank 16, two per token; lines WIDE: plain adapters of the
mixtures' rank 128, which tells what the gate costs and what its skipped rows save.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's deterministic mode, below

import numpy as np
import torch
from torch import Tensor

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.testing import (
    POPULARITIES,
    clear_inputs,
    exact,
    load,
    mixed,
    ragged_batch,
    random_adapter,
    with_outputs,
    worst,
    worst_trace,
)

DEVICE = "cuda"
SPECS = (
    SiteSpec("qkv", ("q", "k", "v"), 1024, (1024, 256, 256)),
    SiteSpec("o", ("o",), 576, (1040,)),
    SiteSpec("odd", ("d",), 2049, (2049,)),
)
RANKS = (
    {"q": 1, "k": 4, "v": 8, "o": 12, "d": 4},
    {"q": 24, "o": 64, "d": 12},
    {"k": 256, "d": 1},
    {"q": 16, "k": 16, "v": 16, "o": 16},
    {"q": 256, "k": 256, "v": 256, "o": 256, "d": 256},
    {"o": 8, "d": 24},
    {"q": 128, "k": 64, "v": 9, "o": 100, "d": 24},
    {"q": 33, "k": 12, "v": 256, "o": 128, "d": 40},
)
GATES: tuple[dict[str, TokenGate], ...] = (
    *[{}] * 6,
    {
        "q": TokenGate(8, "top_k", k=2),
        "k": TokenGate(16, "top_p", p=0.7, temperature=0.5),
        "v": TokenGate(1),
        "o": TokenGate(5, "threshold", threshold=0.22),
        "d": TokenGate(4, "top_k", k=2, one=True),
    },
    {
        "k": TokenGate(3, "threshold", threshold=1.5),
        "v": TokenGate(16, "top_k", k=3, absolute=True, renormalise=False),
        "o": TokenGate(7, eps=1e-3),
        "d": TokenGate(2, "top_k", k=1),
    },
)
"""By module, of the adapters of RANKS: plain, mixtures, and plain modules beside mixtures."""
OUTPUTS = (*[("", "")] * 4, ("qkd", "vod"), ("qo", "q"), ("kod", "qd"), ("", "kvo"))
"""Modules with a mag and with a bias, of the same adapters; "q" of the sixth has no rank."""
LENGTHS = (1, 8, 16, 64, 128, 300, 1000, 2000)
PADDING = 5
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
failures = 0


def report(good: bool, text: str) -> None:
    global failures
    failures += not good
    sys.stdout.write(f"{'OK  ' if good else 'FAIL'} {text}\n")
    sys.stdout.flush()


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` returns NaN inside."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def apply(pool: AdapterPool, index: int, x: Tensor, y: Tensor) -> None:
    lk.expand(y, lk.shrink(x, pool.site_ids[index], pool.h_width(index)), pool.site_ids[index])


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def check(dtype: torch.dtype) -> None:
    generator, rng = torch.Generator(DEVICE).manual_seed(0), np.random.default_rng(0)
    pool = AdapterPool(
        SPECS,
        capacity_bytes=64 << 20,
        slots=len(RANKS) + 1,
        max_rank=256,
        max_tokens=2048,
        max_requests=64,
        dtype=dtype,
        device=DEVICE,
    )
    began = time.perf_counter()
    pool.warmup()
    torch.cuda.synchronize()
    report(not pool.active, f"{dtype} warm-up {time.perf_counter() - began:.1f} s")
    adapters = []
    for ranks, gates, (mag, bias) in zip(RANKS, GATES, OUTPUTS, strict=True):
        unranked = dict.fromkeys(mag + bias, 0)
        adapter = mixed(random_adapter(SPECS, unranked | ranks, dtype, generator), gates, generator)
        adapters.append(with_outputs(adapter, mag, bias, generator))
    hole = load(pool, adapters[2])
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    pool.release(hole)
    by_slot = dict(zip(slots.tolist(), adapters, strict=False))
    for index, spec in enumerate(SPECS):
        for tokens in LENGTHS:
            padded = tokens + PADDING

            def draw(rows: int = padded, spec: SiteSpec = spec) -> Tensor:
                return torch.randn(rows, spec.d_in, generator=generator, device=DEVICE).to(dtype)

            x = draw()
            y = torch.randn(padded, sum(spec.d_outs), generator=generator, device=DEVICE).to(dtype)
            eager, replayed = y.clone(), y.clone()
            pool.set_idle(True)
            with poisoned():
                graph = capture(lambda i=index, x=x, r=replayed: apply(pool, i, x, r))  # type: ignore[misc]
            good, largest, traced = same_bits(replayed, y), 0.0, 0.0
            for popularity in POPULARITIES:
                which, lengths = ragged_batch(
                    popularity, rng=rng, requests=min(tokens, 60), adapters=len(RANKS), tokens=tokens
                )
                pool.set_batch(slots[which], lengths)
                x.copy_(clear_inputs(spec, adapters, which, lengths, draw))
                eager.copy_(y)
                replayed.copy_(y)
                with poisoned():
                    apply(pool, index, x, eager)
                # The flag is read by the kernel, so one captured graph serves steps with and without a trace.
                pool.trace(True)
                graph.replay()
                traced = max(traced, worst_trace(pool.take_trace(), SPECS, by_slot, {spec.name: x}))
                pool.trace(False)
                base = torch.from_numpy(np.r_[np.repeat(which, lengths), [-1] * PADDING] < 0).to(DEVICE)
                largest = max(largest, worst(eager, exact(spec, adapters, which, lengths, x, y)))
                good &= same_bits(eager, replayed) and same_bits(eager[base], y[base])
            # A graph with adapter kernels replayed for a step without adapters.
            pool.set_batch(np.array([-1], np.int32), np.array([tokens], np.int32))
            replayed.copy_(y)
            graph.replay()
            good &= same_bits(replayed, y)
            report(
                good and largest <= 1 and traced <= 1,
                f"{dtype} {spec.name} T={tokens} error {largest:.3f}, trace {traced:.3f} of its bound, bits {good}",
            )


def kernels_of(run: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.name.startswith(("shrink_", "expand_")) for e in profile.events())


def check_launches() -> None:
    pool = AdapterPool(
        SPECS[:1],
        capacity_bytes=1 << 20,
        slots=1,
        max_rank=16,
        max_tokens=64,
        max_requests=8,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    pool.warmup()
    slot = load(pool, random_adapter(SPECS, {"q": 4}, torch.bfloat16, torch.Generator(DEVICE)))
    x = torch.randn(8, 1024, device=DEVICE, dtype=torch.bfloat16)
    y = torch.randn(8, 1536, device=DEVICE, dtype=torch.bfloat16)
    seen = []
    for batch in ([-1, -1], [-1, slot]):
        pool.set_batch(np.array(batch, np.int32), np.array([4, 4], np.int32))
        seen.append(kernels_of(lambda: apply(pool, 0, x, y)))
    pool.set_idle(False)
    seen.append(kernels_of(lambda: apply(pool, 0, x, y)))
    if seen[1] == 0:
        sys.stdout.write("SKIP launches cannot be counted: the profiler saw none where there are two\n")
    else:
        report(seen == [0, 2, 0], f"launches for base rows, a mixed batch, idle: {seen}")


LAYERS = 32
SHAPES = (
    (("q", "k", "v"), 4096, (4096, 1024, 1024)),
    (("o",), 4096, (4096,)),
    (("gate", "up"), 4096, (14336, 14336)),
    (("down",), 14336, (4096,)),
)


# Tokens of the step, and among how many adapters its requests are spread. The last two are prefill.
STEPS = (
    (1, (1,)),
    (8, (1, 8)),
    (32, (1, 8, 32)),
    (64, (1, 8, 32, 64)),
    (128, (1, 8, 32, 64)),
    (512, (1, 8, 64)),
    (2048, (1, 8)),
)
MIXTURE, MIXTURE_RANK = TokenGate(8, "top_k", k=2), 8 * 16
MIXTURE_STEPS = ((64, (1, 8)),)


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


def llama_pool(slots: int, rank: int, gate: TokenGate | None = None) -> AdapterPool:
    """A pool full of adapters of `rank` on every module, mixtures where there is a gate."""
    specs = [
        SiteSpec(f"{layer}.{'_'.join(modules)}", tuple(f"{layer}.{m}" for m in modules), d_in, d_outs)
        for layer in range(LAYERS)
        for modules, d_in, d_outs in SHAPES
    ]
    ranks = {m: rank for s in specs for m in s.modules}
    gates = dict.fromkeys(ranks, gate) if gate is not None else {}
    sizing = {
        "slots": slots,
        "max_rank": max(64, rank),
        "max_tokens": 2048,
        "max_requests": 256,
        "dtype": torch.bfloat16,
        "device": DEVICE,
    }
    one = AdapterPool(specs, capacity_bytes=0, **sizing).bytes_for(ranks, gates)  # type: ignore[arg-type]
    pool = AdapterPool(specs, capacity_bytes=one * slots, **sizing)  # type: ignore[arg-type]
    generator = torch.Generator(DEVICE).manual_seed(0)
    modules = [m for s in specs[: len(SHAPES)] for m in s.modules]
    first = random_adapter(specs[: len(SHAPES)], dict.fromkeys(modules, rank), torch.bfloat16, generator)
    if gate is not None:
        # Experts of equal rank, one behind the other, as checkpoints have them.
        expert = torch.arange(rank, device=DEVICE) * gate.experts // rank
        first = mixed(first, dict.fromkeys(modules, gate), generator)
        first = {module: w._replace(expert=expert) for module, w in first.items()}
    reserve_s = write_s = 0.0
    for _ in range(slots):
        at = time.perf_counter()
        slot = pool.reserve(ranks, gates)
        reserve_s += time.perf_counter() - at
        at = time.perf_counter()
        for module in ranks:
            w = first["0." + module.split(".")[1]]
            pool.write(slot, module, w.a, w.b, w.scale, router=w.router, expert=w.expert)
        pool.publish(slot)
        torch.cuda.synchronize()
        write_s += time.perf_counter() - at
    sys.stdout.write(
        f"LOAD adapter of {one >> 20} MiB from device memory: reserve {reserve_s / slots * 1e3:.1f} ms, "
        f"write and publish {write_s / slots * 1e3:.1f} ms; beside the arena {pool.overhead_bytes >> 20} MiB\n"
    )
    began = time.perf_counter()
    pool.warmup()
    torch.cuda.synchronize()
    sys.stdout.write(f"WARMUP {time.perf_counter() - began:.1f} s\n")
    return pool


def base_weights() -> list[Tensor]:
    return [
        torch.randn(d_in, sum(d_outs), device=DEVICE, dtype=torch.bfloat16) * d_in**-0.5
        for _ in range(LAYERS)
        for _, d_in, d_outs in SHAPES
    ]


def time_steps(
    label: str, pool: AdapterPool, weights: list[Tensor], steps: tuple[tuple[int, tuple[int, ...]], ...]
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
                    torch.mm(x, weights[i], out=y)
                if adapters:
                    lk.expand(y, h, site)

        pool.set_idle(True)
        graphs = {
            name: capture(lambda n=name, s=step: s("base" in n, "adapters" in n))  # type: ignore[misc]
            for name in ("base", "adapters", "base+adapters")
        }
        base = milliseconds(graphs["base"])
        empty = milliseconds(graphs["adapters"])
        line = f"{label} tokens {tokens:4d} base {base:.3f} ms | adapter ops over an empty plan {empty:.3f}"
        for count in adapter_counts:
            requests = np.arange(min(tokens, 256), dtype=np.int32)
            lengths = np.full(requests.size, tokens // requests.size, np.int32)
            at = time.perf_counter()
            pool.set_batch(requests % count, lengths)
            plan_us = (time.perf_counter() - at) * 1e6
            alone, together = milliseconds(graphs["adapters"]), milliseconds(graphs["base+adapters"])
            line += f" | {count} adapters: alone {alone:.3f} step {together:.3f} ({100 * (together / base - 1):+.1f} %)"
        sys.stdout.write(f"{line} | plan {plan_us:.0f} us\n")
        sys.stdout.flush()


if __name__ == "__main__":
    import triton  # type: ignore[import-untyped]

    sys.stdout.write(f"DEVICE {torch.cuda.get_device_name()} torch {torch.__version__} triton {triton.__version__}\n")
    with torch.no_grad():
        if sys.argv[1:] != ["time"]:
            for tested in (torch.float32, torch.bfloat16):
                check(tested)
            check_launches()
        if sys.argv[1:] != ["check"]:
            weights = base_weights()
            time_steps("STEP", llama_pool(64, 16), weights, STEPS)
            time_steps("WIDE", llama_pool(8, MIXTURE_RANK), weights, MIXTURE_STEPS)
            time_steps("MIX ", llama_pool(8, MIXTURE_RANK, MIXTURE), weights, MIXTURE_STEPS)
    sys.exit(failures > 0)
