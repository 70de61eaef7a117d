"""mag and bias of a slice through shrink and expand, on the CPU and the reference, against float64."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pytest
import torch

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.sites import lookup
from loramux_kernels.testing import (
    Weights,
    adapter_of,
    exact,
    load,
    random_adapter,
    with_outputs,
    worst,
)

from .applied import apply, check_against_float64, same_bits

QKV = SiteSpec("qkv", ("q", "k", "v"), 96, (160, 33, 32))
ODD = SiteSpec("odd", ("o",), 259, (129,))
SPECS = (QKV, ODD)
# Ranks, gates, modules with a mag, modules with a bias. Some have no rank, the third nothing but outputs, the last is
# plain.
Kind = tuple[Mapping[str, int], Mapping[str, TokenGate], str, str]
ADAPTERS: tuple[Kind, ...] = (
    ({"q": 8, "k": 0, "v": 5, "o": 12}, {}, "qko", "kv"),
    ({"q": 7, "v": 64, "o": 12}, {"v": TokenGate(3, "top_k", k=1), "o": TokenGate(4)}, "vo", "qv"),
    ({"k": 0, "v": 0, "o": 0}, {}, "ko", "vo"),
    ({"q": 24, "v": 8, "o": 64}, {}, "", ""),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BACKENDS = ("cpu", "reference")


pytestmark = pytest.mark.usefixtures("poison")


def make(dtype: torch.dtype = torch.float32, backend: str = "cpu", capacity_bytes: int = 4 << 20) -> AdapterPool:
    return AdapterPool(
        SPECS,
        capacity_bytes=capacity_bytes,
        slots=6,
        max_rank=64,
        max_tokens=64,
        max_requests=16,
        dtype=dtype,
        device="cpu",
        backend=backend,
    )


def build(kind: Kind, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Weights]:
    return adapter_of(SPECS, *kind, dtype, generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64_beside_plain_and_base_rows(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [build(kind, dtype, generator) for kind in ADAPTERS]
    check_against_float64(make(dtype, backend), SPECS, adapters, dtype, generator)


def test_the_bound_notices_a_mag_or_a_bias_of_another_output() -> None:
    """Guards the other tests."""
    generator = torch.Generator().manual_seed(1)
    w = build(({"o": 4}, {}, "o", "o"), torch.float32, generator)["o"]
    assert w.mag is not None and w.bias is not None
    which, lengths = np.array([0], np.int32), np.array([3], np.int32)
    x, y = torch.randn(3, 259, generator=generator), torch.randn(3, 129, generator=generator)
    want = exact(ODD, [{"o": w}], which, lengths, x, y)
    for wrong in (
        w._replace(mag=w.mag.roll(1)),
        w._replace(bias=w.bias.roll(1)),
        w._replace(mag=None),
        w._replace(b=w.b * w.mag),
    ):
        pool = make()
        pool.set_batch(np.array([load(pool, {"o": wrong})], np.int32), lengths)
        assert worst(apply(pool, 1, x, y), want) > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_slices_have_the_bits_of_a_pool_without_any_outputs(backend: str) -> None:
    """Another adapter's mag, and one in another slice of the same adapter, do not touch a plain slice."""
    generator = torch.Generator().manual_seed(2)
    plain = random_adapter(SPECS, {"q": 24, "k": 4, "v": 8, "o": 64}, torch.float32, generator)
    partly = with_outputs(plain, "k", "k", generator)
    alone, beside = make(backend=backend), make(backend=backend)
    slots = [load(beside, build(ADAPTERS[0], torch.float32, generator)), load(beside, partly), load(beside, plain)]
    slot = load(alone, plain)
    for index, spec in enumerate(SPECS):
        x = torch.randn(12, spec.d_in, generator=generator)
        y = torch.randn(12, sum(spec.d_outs), generator=generator)
        beside.set_batch(np.array(slots, np.int32), np.array([3, 4, 5], np.int32))
        got = apply(beside, index, x, y)
        # The same rows as one request, because products over other numbers of rows may round otherwise.
        for rows, lengths in ((slice(3, 7), [3, 4, 5]), (slice(7, 12), [7, 5])):
            alone.set_batch(np.array([-1, slot, -1][: len(lengths)], np.int32), np.array(lengths, np.int32))
            want = apply(alone, index, x, y)
            same = torch.ones(sum(spec.d_outs), dtype=torch.bool)
            same[160:193] = spec is ODD or rows.stop == 12
            assert same_bits(got[rows][:, same], want[rows][:, same])
            assert not (got[rows] == want[rows])[:, ~same].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_selects_no_expert_still_has_its_outputs(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    w = build(({"o": 40}, {"o": TokenGate(4, "threshold", threshold=1.5)}, "o", "o"), torch.float32, generator)["o"]
    assert w.mag is not None and w.bias is not None
    pool = make(backend=backend)
    pool.set_batch(np.array([load(pool, {"o": w})], np.int32), np.array([6], np.int32))
    x, y = torch.randn(6, 259, generator=generator), torch.randn(6, 129, generator=generator)
    torch.testing.assert_close(apply(pool, 1, x, y), y * w.mag + w.bias)


def test_bytes_are_counted() -> None:
    pool = make()
    plain = pool.bytes_for({"q": 8, "k": 4})
    # 33 and 160 floats take one and a half, and five lines of 128 bytes.
    assert pool.bytes_for({"q": 8, "k": 4}, mag="k") == plain + 256
    assert pool.bytes_for({"q": 8, "k": 4}, mag="kq", bias="q") == plain + 256 + 2 * 640
    assert pool.bytes_for({}, mag="o") == pool.bytes_for({"o": 0}, mag="o") == 640
    slot = pool.reserve({"q": 8, "k": 4}, mag="kq", bias="qo")
    assert pool.used_bytes == plain + 256 + 3 * 640
    pool.release(slot)
    assert pool.used_bytes == 0


def test_a_slot_that_is_used_again_keeps_nothing_of_its_last_adapter() -> None:
    generator = torch.Generator().manual_seed(4)
    pool = make()
    pool.release(load(pool, build(ADAPTERS[0], torch.float32, generator)))
    plain = build(ADAPTERS[3], torch.float32, generator)
    which, lengths = np.array([0], np.int32), np.array([5], np.int32)
    assert load(pool, plain) == 0
    pool.set_batch(which, lengths)
    x, y = torch.randn(5, 96, generator=generator), torch.randn(5, 225, generator=generator)
    assert worst(apply(pool, 0, x, y), exact(QKV, [plain], which, lengths, x, y)) <= 1


@pytest.mark.parametrize(
    ("mag", "bias", "error"),
    [(("nope",), (), lk.UnknownModule), ((), ("nope",), lk.UnknownModule), (("q",), ("q",), lk.PoolFull)],
)
def test_a_refused_reservation_changes_nothing(
    mag: Collection[str], bias: Collection[str], error: type[Exception]
) -> None:
    pool = make(capacity_bytes=1024)
    with pytest.raises(error):
        pool.reserve({}, mag=mag, bias=bias)
    assert pool.used_bytes == 0 and pool.free_slots == 6


def test_arrays_must_be_those_of_the_reservation() -> None:
    generator = torch.Generator().manual_seed(5)
    w = build(({"k": 3}, {}, "k", "k"), torch.float32, generator)["k"]
    assert w.mag is not None and w.bias is not None
    pool = make()
    both, plain = pool.reserve({"k": 3}, mag="k", bias="k"), pool.reserve({"k": 3})
    for mag, bias, error in (
        (w.mag[1:], w.bias, lk.WrongShape),
        (w.mag, w.bias[None], lk.WrongShape),
        (None, w.bias, ValueError),
        (w.mag, None, ValueError),
    ):
        with pytest.raises(error, match=r'module "?k'):
            pool.write(both, "k", w.a, w.b, w.scale, mag=mag, bias=bias)
    with pytest.raises(ValueError, match="bias reserved: False, given: True"):
        pool.write(plain, "k", w.a, w.b, w.scale, bias=w.bias)
    with pytest.raises(lk.NotWritten):
        pool.publish(both)
    written = pool.write(both, "k", w.a, w.b, w.scale, mag=w.mag.double(), bias=w.bias)
    assert written == 4 * (w.a.numel() + w.b.numel() + 3 + 2 * 33)
    pool.publish(both)
    held = lookup(pool.site_ids[0]).slots[both]
    assert held is not None and held.live[0].mag is not None and held.live[0].bias is not None
    assert torch.equal(held.live[0].mag, w.mag) and torch.equal(held.live[0].bias, w.bias)


def test_a_module_without_rank_must_be_written_too() -> None:
    pool = make()
    slot = pool.reserve({}, mag="o")
    with pytest.raises(lk.NotWritten):
        pool.publish(slot)
    pool.write(slot, "o", torch.empty(0, 259), torch.empty(0, 129), torch.empty(0), mag=torch.full((129,), 2.0))
    pool.publish(slot)
    pool.set_batch(np.array([slot, -1], np.int32), np.array([2, 1], np.int32))
    y = torch.randn(3, 129)
    assert torch.equal(apply(pool, 1, torch.randn(3, 259), y), y * torch.tensor([[2.0], [2.0], [1.0]]))
