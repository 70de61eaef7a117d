"""The GPU path on a real GPU, without pytest and without vLLM.

    PYTHONPATH=kernels python tests/kernels/gpu_check.py

Every backend's own kernels against float64: lines OK and FAIL; a FAIL makes the exit status 1. float32 runs Triton's
kernels, bfloat16 and float16 the CUDA ones where they fit; `LORAMUX_KERNELS=triton` makes it Triton everywhere. Times
are measured by tests/benchmarks/kernel_step.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's deterministic mode, below

import numpy as np
import torch
from applied import Sequenced, same_bits
from torch import Tensor

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.testing import (
    POPULARITIES,
    adapter_of,
    banded,
    clear_inputs,
    exact,
    load,
    mixed,
    ragged_batch,
    random_adapter,
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
        "o": TokenGate(5, "top_k", k=2, eps=1e-6, layer_norm_eps=1e-5),
        "d": TokenGate(4, "top_k", k=2, one=True),
    },
    {
        "q": TokenGate(5, "threshold", threshold=0.22),
        "k": TokenGate(3, "threshold", threshold=1.5),
        "v": TokenGate(16, "top_k", k=3, absolute=True, renormalise=False),
        "o": TokenGate(7, eps=1e-3, groups=(0b1000001, 0b0111110, 0b1111111)),
        "d": TokenGate(15, "adaptive", threshold=0.07, bias=0.5, layer_norm_eps=1e-5),
    },
)
"""By module, of the adapters of RANKS: plain, mixtures, and plain modules beside mixtures."""
OUTPUTS = (*[("", "")] * 4, ("qkd", "vod"), ("qo", "q"), ("kod", "qd"), ("", "kvo"))
"""Modules with a mag and with a bias, of the same adapters; "q" of the sixth has no rank."""
LENGTHS = (1, 8, 16, 64, 128, 300, 1000, 2000)
PADDING = 5
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
    kinds = zip(RANKS, GATES, OUTPUTS, strict=True)
    adapters = [adapter_of(SPECS, ranks, gates, *both, dtype, generator) for ranks, gates, both in kinds]
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


def warm_pool(sites: Sequence[SiteSpec], dtype: torch.dtype, slots: int) -> AdapterPool:
    """For a few adapters and sequences."""
    pool = AdapterPool(
        sites,
        capacity_bytes=8 << 20,
        slots=slots,
        max_rank=64,
        max_tokens=1024,
        max_requests=8,
        dtype=dtype,
        device=DEVICE,
    )
    pool.warmup()
    return pool


def check_capacity(dtype: torch.dtype) -> None:
    """Sequences in chunks, long and short, each step run once and replayed from a graph: both count it alike."""
    generator, spec = torch.Generator(DEVICE).manual_seed(1), SPECS[0]
    pool = warm_pool([spec], dtype, slots=2)
    rules = (
        {"q": TokenGate(8, "top_k", k=2, capacity=30), "v": TokenGate(5, "top_k", k=3, capacity=9)},
        {"q": TokenGate(16, "top_k", k=3, capacity=5)},
    )
    plain = [random_adapter([spec], {"q": 48, "v": 20}, dtype, generator) for _ in rules]
    adapters = [mixed(a, gates, generator) for a, gates in zip(plain, rules, strict=True)]
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    which, lengths = np.array([0, 1, -1, 0], np.int32), np.array([300, 90, 5, 60], np.int32)
    total = int(lengths.sum())
    draw = lambda: torch.randn(total, spec.d_in, generator=generator, device=DEVICE).to(dtype)  # noqa: E731
    x = clear_inputs(spec, adapters, which, lengths, draw)
    y = torch.randn(total, sum(spec.d_outs), generator=generator, device=DEVICE).to(dtype)
    got, sequences, done = y.clone(), Sequenced(len(which)), np.zeros(len(which), int)
    begin, good = np.cumsum(lengths) - lengths, True
    for step in ([100, 60, 3, 20], [190, 20, 1, 39], [9, 0, 1, 0], [1, 10, 0, 1]):
        rows = np.concatenate([np.arange(b + d, b + d + n) for b, d, n in zip(begin, done, step, strict=True)])
        index, taken = torch.from_numpy(rows).to(DEVICE), np.array(step, np.int32)
        part, eager, replayed = x[index], y[index], y[index]
        pool.set_idle(True)
        graph = capture(lambda x=part, r=replayed: apply(pool, 0, x, r))  # type: ignore[misc]
        pool.set_batch(slots[which], taken, sequences.step(done, taken))
        apply(pool, 0, part, eager)
        graph.replay()
        good &= same_bits(eager, replayed)
        got[index], done = eager, done + taken
    error = worst(got, exact(spec, adapters, which, lengths, x, y))
    report(good and error <= 1, f"{dtype} capacity, error {error:.3f} of its bound, bits {good}")


def check_layer_norm(dtype: torch.dtype) -> None:
    """Routers that read LayerNorm(x), where the mean of x is thirty times its deviation."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    pool = warm_pool(SPECS, dtype, slots=2)
    rule = TokenGate(6, "top_k", k=2, layer_norm_eps=1e-5)
    ranks, rules = {"q": 48, "v": 20, "o": 33, "d": 24}, dict.fromkeys("qvod", rule)
    adapters = [mixed(random_adapter(SPECS, ranks, dtype, generator), rules, generator) for _ in range(2)]
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    largest, good = 0.0, True
    for lengths in (np.array([20, 3, 1], np.int32), np.array([300, 400, 7], np.int32)):
        which, total = np.array([0, 1, -1], np.int32), int(lengths.sum())
        pool.set_batch(slots[which], lengths)
        for index, spec in enumerate(SPECS):
            draw = lambda s=spec, n=total: (30 + torch.randn(n, s.d_in, generator=generator, device=DEVICE)).to(dtype)  # noqa: E731
            x = clear_inputs(spec, adapters, which, lengths, draw)
            y = torch.randn(total, sum(spec.d_outs), generator=generator, device=DEVICE).to(dtype)
            got = y.clone()
            with poisoned():
                apply(pool, index, x, got)
            largest = max(largest, worst(got, exact(spec, adapters, which, lengths, x, y)))
            good &= same_bits(got[-int(lengths[-1]) :], y[-int(lengths[-1]) :])
    report(good and largest <= 1, f"{dtype} LayerNorm, error {largest:.3f} of its bound, bits {good}")


def check_bands(dtype: torch.dtype) -> None:
    """Block-diagonal adapters of two and four bands, packed, beside a plain one."""
    generator, spec = torch.Generator(DEVICE).manual_seed(3), SiteSpec("qkv", ("q", "k"), 4096, (4096, 1024))
    pool = warm_pool([spec], dtype, slots=3)
    plain = [
        random_adapter([spec], ranks, dtype, generator) for ranks in ({"q": 64, "k": 6}, {"q": 12, "k": 40}, {"k": 9})
    ]
    adapters = [banded(plain[0], {"q": 2, "k": 2}), banded(plain[1], {"q": 4, "k": 4}), plain[2]]
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    packed = pool.used_bytes < sum(w.a.nbytes + w.b.nbytes for a in adapters for w in a.values()) / 2
    which, largest, good = np.array([0, 1, 2, -1], np.int32), 0.0, packed
    for lengths in (np.array([20, 3, 5, 1], np.int32), np.array([300, 400, 70, 7], np.int32)):
        total = int(lengths.sum())
        pool.set_batch(slots[which], lengths)
        x = torch.randn(total, spec.d_in, generator=generator, device=DEVICE).to(dtype)
        y = torch.randn(total, sum(spec.d_outs), generator=generator, device=DEVICE).to(dtype)
        got = y.clone()
        with poisoned():
            apply(pool, 0, x, got)
        largest = max(largest, worst(got, exact(spec, adapters, which, lengths, x, y)))
        good &= same_bits(got[-int(lengths[-1]) :], y[-int(lengths[-1]) :])
    report(good and largest <= 1, f"{dtype} bands, error {largest:.3f} of its bound, packed {packed}, bits {good}")


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


if __name__ == "__main__":
    import triton  # type: ignore[import-untyped]

    sys.stdout.write(f"DEVICE {torch.cuda.get_device_name()} torch {torch.__version__} triton {triton.__version__}\n")
    with torch.no_grad():
        for tested in (torch.float32, torch.bfloat16, torch.float16):
            check(tested)
            check_capacity(tested)
            check_layer_norm(tested)
            check_bands(tested)
        check_launches()
    sys.exit(failures > 0)
