"""shrink and expand against float64 from the adapters' own tensors, and as torch.compile sees them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec
from loramux_kernels.sites import lookup
from loramux_kernels.testing import POPULARITIES, Ints, exact, load, ragged_batch, random_adapter, worst

from .applied import BITS, apply, same_bits

QKV = SiteSpec("qkv", ("q", "k", "v"), 96, (160, 33, 32))
ODD = SiteSpec("odd", ("o",), 2049, (2049,))
SPECS = (QKV, ODD)
RANKS = (
    {"q": 1, "k": 4, "v": 8, "o": 12},
    {"q": 24, "o": 64},
    {"k": 256, "o": 1},
    {"q": 16, "k": 16, "v": 16},
    {"o": 256},
)


pytestmark = pytest.mark.usefixtures("poison")


def make(dtype: torch.dtype, backend: str = "cpu", specs: tuple[SiteSpec, ...] = SPECS) -> AdapterPool:
    return AdapterPool(
        specs,
        capacity_bytes=24 << 20,
        slots=8,
        max_rank=256,
        max_tokens=64,
        max_requests=16,
        dtype=dtype,
        device="cpu",
        backend=backend,
    )


def inputs(spec: SiteSpec, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and y as views of wider rows, which is how fused layers hand them over."""
    x = torch.randn(tokens, spec.d_in + 5, generator=generator).to(dtype)[:, : spec.d_in]
    return x, torch.randn(tokens, sum(spec.d_outs), generator=generator).to(dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_against_float64(dtype: torch.dtype, backend: str) -> None:
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    adapters = [random_adapter(SPECS, ranks, dtype, generator) for ranks in RANKS]
    pool = make(dtype, backend)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    for popularity in POPULARITIES:
        for requests, tokens in ((1, 1), (9, 9), (16, 41)):
            which, lengths = ragged_batch(popularity, rng=rng, requests=requests, adapters=len(RANKS), tokens=tokens)
            pool.set_batch(slots[which], lengths)
            base = torch.from_numpy(np.r_[np.repeat(which, lengths), [-1, -1]] < 0)
            for index, spec in enumerate(SPECS):
                x, y = inputs(spec, tokens + 2, dtype, generator)
                got = apply(pool, index, x, y)
                assert worst(got, exact(spec, adapters, which, lengths, x, y)) <= 1
                assert same_bits(got[base], y[base])


def test_the_bound_notices_a_single_wrong_rank_row() -> None:
    """Guards the other tests: their bound is tight enough to see the smallest mistake a kernel could make."""
    generator = torch.Generator().manual_seed(0)
    adapter = random_adapter([ODD], {"o": 256}, torch.float32, generator)
    w = adapter["o"]
    x, y = inputs(ODD, 3, torch.float32, generator)
    which, lengths = np.array([0], np.int32), np.array([3], np.int32)
    wrong = y + (x @ w.a.t() * w.scale)[:, :-1] @ w.b[:-1]
    assert worst(wrong, exact(ODD, [adapter], which, lengths, x, y)) > 100


def batch_rows(lengths: Ints, order: Ints) -> Tensor:
    """Rows of the tokens of the requests in `order`."""
    ends = np.cumsum(lengths)
    return torch.from_numpy(np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in order]))


def test_the_order_of_a_batch_changes_no_answer() -> None:
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    adapters = [random_adapter(SPECS, ranks, torch.float32, generator) for ranks in RANKS]
    pool = make(torch.float32)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    which, lengths = ragged_batch("uniform", rng=rng, requests=14, adapters=len(RANKS), tokens=40)
    x, y = inputs(QKV, 40, torch.float32, generator)
    pool.set_batch(slots[which], lengths)
    want, bound = apply(pool, 0, x, y), exact(QKV, adapters, which, lengths, x, y).bound
    for _ in range(5):
        order = rng.permutation(14).astype(np.int32)
        rows = batch_rows(lengths, order)
        pool.set_batch(slots[which[order]], lengths[order])
        got = apply(pool, 0, x[rows], y[rows])
        assert ((got - want[rows]).abs() <= 2 * bound[rows]).all()


def test_last_adapter_is_not_given_to_base_rows() -> None:
    """Negative slots must not index the last one. All slots are in use, so that a wrong index finds weights."""
    generator = torch.Generator().manual_seed(2)
    pool = make(torch.float32)
    while pool.free_slots:
        slot = load(pool, random_adapter(SPECS, {"q": 2, "o": 2}, torch.float32, generator))
    x, y = inputs(QKV, 6, torch.float32, generator)
    pool.set_batch(np.array([-1, slot, -1], np.int32), np.array([2, 2, 2], np.int32))
    got = apply(pool, 0, x, y)
    changed = (got != y).any(1)
    assert changed.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_leading_axes_are_flattened(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    pool = make(torch.float32, backend)
    slot = load(pool, random_adapter(SPECS, {"q": 8, "v": 3}, torch.float32, generator))
    pool.set_batch(np.array([slot], np.int32), np.array([6], np.int32))
    x, y = torch.randn(6, 96, generator=generator), torch.randn(6, 225, generator=generator)
    assert torch.equal(apply(pool, 0, x.view(2, 3, 96), y.view(2, 3, 225)).view(6, 225), apply(pool, 0, x, y))


def test_wrong_inputs_are_named() -> None:
    pool = make(torch.float32)
    slot = load(pool, random_adapter(SPECS, {"q": 8}, torch.float32, torch.Generator()))
    pool.set_batch(np.array([slot], np.int32), np.array([6], np.int32))
    site, rows = pool.site_ids[0], pool.h_width(0)
    x = torch.randn(6, 96)
    for bad, width in ((x[:, :95], rows), (x.double(), rows), (x[:5], rows), (x, rows - 1)):
        with pytest.raises(ValueError, match="site qkv"):
            lk.shrink(bad, site, width)
    h = lk.shrink(x, site, rows)
    for y, g in ((torch.zeros(6, 224), h), (torch.zeros(6, 225).double(), h), (torch.zeros(6, 225), h[:5])):
        with pytest.raises(ValueError, match="site qkv"):
            lk.expand(y, g, site)


def test_as_pytorch_checks_ops() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs of two runs, h's unwritten part included
    pool = make(torch.float32)
    pool.set_idle(True)
    x, y, site = torch.randn(4, 96), torch.randn(4, 225), pool.site_ids[0]
    ops, rows = torch.ops.loramux, pool.h_width(0)
    # h is uninitialised memory, which a comparison of values between two runs cannot like.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.shrink.default, (x, site, rows), test_utils=utils)
    torch.library.opcheck(ops.expand.default, (torch.zeros(4, rows), y, site))


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """What an older loramux left in the compiler's cache may call the ops otherwise."""
    torch._dynamo.reset()
    with fresh_cache():
        yield


class Adapted(nn.Module):
    """A linear with an adapter site, as a serving engine wraps one."""

    def __init__(self, site: Tensor, rows: int, weight: Tensor) -> None:
        super().__init__()
        self.site, self.rows, self.weight = site, rows, weight

    def forward(self, x: Tensor) -> Tensor:
        h = lk.shrink(x, self.site, self.rows)
        y = x @ self.weight
        lk.expand(y, h, self.site)
        return y @ self.weight


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("compiled_anew")
@torch.inference_mode()
def test_all_layers_compile_to_one_graph(compiler: str) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    generator, weight = torch.Generator().manual_seed(4), torch.randn(24, 24)
    specs = tuple(SiteSpec(f"l{i}", (f"m{i}",), 24, (24,)) for i in range(4))
    pool = make(torch.float32, specs=specs)
    ranks = {s.modules[0]: 3 + i for i, s in enumerate(specs)}
    slot = load(pool, random_adapter(specs, ranks, torch.float32, generator))
    layers = [Adapted(site, pool.h_width(i), weight) for i, site in enumerate(pool.site_ids)]

    @torch.compile(fullgraph=True, backend=compiler)
    def layer(x: Tensor, weight: Tensor, site: Tensor, rows: int) -> Tensor:
        h = lk.shrink(x, site, rows)
        y = x @ weight
        lk.expand(y, h, site)
        return y @ weight

    x = torch.randn(5, 24, generator=generator)
    outputs = []
    for slots in ([slot, -1], [-1, slot], [-1, -1]):
        pool.set_batch(np.array(slots, np.int32), np.array([2, 3], np.int32))
        for module in layers:
            want = module(x)
            torch.testing.assert_close(layer(x, weight, module.site, module.rows), want)
            outputs.append(want)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}
    # The layers' adapters differ, so a graph that had baked one site in would have failed above.
    assert not torch.equal(outputs[0], outputs[1])

    model = nn.Sequential(*layers)
    counters.clear()
    pool.set_batch(np.array([slot, -1], np.int32), np.array([2, 3], np.int32))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=compiler)(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("functionalized_v2", [False, True])  # vLLM turns it off
@pytest.mark.usefixtures("compiled_anew")
@torch.inference_mode()
def test_a_compiler_leaves_the_shrink_before_the_base_linear(functionalized_v2: bool) -> None:
    pool = make(torch.float32, specs=(SiteSpec("s", ("m",), 24, (24,)),))
    site, rows = pool.site_ids[0], pool.h_width(0)

    def layer(x: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        x = torch.nn.functional.rms_norm(x, (24,), norm)
        h = lk.shrink(x, site, rows)
        y = torch.nn.functional.linear(x, weight)
        lk.expand(y, h, site, x)
        return torch.nn.functional.silu(y)

    options = {"enable_auto_functionalized_v2": functionalized_v2}
    compiled = torch.compile(layer, fullgraph=True, backend="inductor", options=options)
    _, (code,) = run_and_get_code(compiled, torch.randn(5, 24), torch.randn(24, 24), torch.randn(24))
    order = re.findall(r"(shrink|expand)\.default\(|\.(mm|addmm)\(", code.split("def call(")[-1])
    assert ["".join(names) for names in order] == ["shrink", "mm", "expand"]


def test_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import loramux_kernels.testing"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def environment(**more: str) -> dict[str, str]:
    kernels = str(Path(lk.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": kernels, "OMP_NUM_THREADS": "1", **more}


def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, env=environment(TRITON_INTERPRET="1")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("OK ") == 75


def test_sites_are_told_apart_by_a_cpu_tensor() -> None:
    pool, other = make(torch.float32), make(torch.float32)
    ids = [int(i) for i in (*pool.site_ids, *other.site_ids)]
    assert len(set(ids)) == len(ids)
    assert all(i.device.type == "cpu" and i.dtype == torch.int64 and i.dim() == 0 for i in pool.site_ids)
    assert [lookup(i).spec for i in pool.site_ids] == list(SPECS)


def test_the_readme_example_runs() -> None:
    text = (Path(lk.__file__).parents[1] / "README.md").read_text()
    code, *more = (part.split("```")[0] for part in text.split("```python\n")[1:6])
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, names)
    assert names["y"][:3, :64].all()
    assert not names["y"][3:].any()
    assert not names["y"][:, 64:96].any()
    for example in more:
        exec(example, names)
    assert names["pool"].resident() == tuple(names[name] for name in ("mixture", "scaled", "packed", "drawn"))
