"""The pool's accounts, and what a step may see of a slot in each stage of its life."""

from __future__ import annotations

import gc
import itertools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.sites import lookup
from loramux_kernels.testing import Weights, load, mixed, random_adapter, with_outputs

SPECS = (SiteSpec("l0.qkv", ("q", "k", "v"), 24, (32, 8, 8)), SiteSpec("l0.o", ("o",), 32, (24,)))
RANKS = st.dictionaries(st.sampled_from("qkvo"), st.integers(0, 12), min_size=1)
TOKENS = 12


def make(capacity_bytes: int = 24 << 10, slots: int = 4, backend: str | None = None) -> AdapterPool:
    return AdapterPool(
        SPECS,
        capacity_bytes=capacity_bytes,
        slots=slots,
        max_rank=12,
        max_tokens=TOKENS,
        max_requests=8,
        dtype=torch.float32,
        device="cpu",
        backend=backend,
    )


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def state(pool: AdapterPool) -> tuple[object, ...]:
    return pool.used_bytes, pool.free_bytes, pool.free_slots, pool.resident()


def run(pool: AdapterPool, slots: list[int], lengths: list[int], x: torch.Tensor) -> torch.Tensor:
    """Output of the first site for y = 0."""
    pool.set_batch(np.array(slots, np.int32), np.array(lengths, np.int32))
    y = torch.zeros(x.shape[0], sum(SPECS[0].d_outs))
    lk.expand(y, lk.shrink(x, pool.site_ids[0], pool.h_width(0)), pool.site_ids[0])
    return y


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(RANKS, st.integers(0, 9)), max_size=25))
def test_any_order_of_reserve_write_publish_release(steps: list[dict[str, int] | int]) -> None:
    pool, held, generator = make(), {}, torch.Generator()
    for step in steps:
        before = state(pool)
        if isinstance(step, dict):
            needed = pool.bytes_for(step)
            try:
                slot = pool.reserve(step)
            except lk.PoolFull as full:
                assert state(pool) == before
                assert full.needed_bytes == needed
                assert full.free_slots == 0 or full.largest_free_bytes < needed
                continue
            assert slot not in held
            held[slot] = needed
            if sum(step.values()) % 2:
                adapter = random_adapter(SPECS, {m: r for m, r in step.items() if r}, torch.float32, generator)
                for module, w in adapter.items():
                    pool.write(slot, module, w.a, w.b, w.scale)
                pool.publish(slot)
                assert slot in pool.resident()
        elif held:
            slot = list(held)[step % len(held)]
            del held[slot]
            pool.release(slot)
            assert slot not in pool.resident()
        assert pool.used_bytes == sum(held.values()) == pool.capacity_bytes - pool.free_bytes
        assert pool.free_slots == pool.slots - len(held)
    for slot in held:
        pool.release(slot)
    assert state(pool) == (0, pool.capacity_bytes, pool.slots, ())


def test_bytes_are_the_weights_plus_less_than_a_line_per_array() -> None:
    pool = make()
    exact = 4 * (4 * 24 + 4 + 4 * 32) + 4 * (3 * 32 + 3 + 3 * 24)
    assert exact <= pool.bytes_for({"q": 4, "o": 3}) < exact + 6 * 128


def test_the_readmes_memory_table_is_the_pools_own() -> None:
    shapes = (
        (("q", "k", "v"), 4096, (4096, 1024, 1024)),
        (("o",), 4096, (4096,)),
        (("gate", "up"), 4096, (14336, 14336)),
        (("down",), 14336, (4096,)),
    )
    specs = [
        SiteSpec(f"{layer}.{names[0]}", tuple(f"{layer}.{name}" for name in names), d_in, d_outs)
        for layer in range(32)
        for names, d_in, d_outs in shapes
    ]
    pool = AdapterPool(
        specs,
        capacity_bytes=0,
        slots=1,
        max_rank=128,
        max_tokens=8,
        max_requests=8,
        dtype=torch.bfloat16,
        device="cpu",
    )
    modules = [module for spec in specs for module in spec.modules]

    def of(rank: int, **more: Any) -> int:
        return pool.bytes_for(dict.fromkeys(modules, rank), **more)

    mixture = of(128, gates=dict.fromkeys(modules, TokenGate(8, "top_k", k=2)))
    wanted = {
        "rank 8": of(8),
        "rank 16": of(16),
        "rank 16 with a borrowed B": of(16, borrowed=modules),
        "rank 16, DoRA and biases": of(16, mag=modules, bias=modules),
        "rank 64": of(64),
        "mixture of 8 experts of rank 16": mixture,
    }
    text = (Path(lk.__file__).parents[1] / "README.md").read_text()
    for name, nbytes in wanted.items():
        assert f"| {name} | {nbytes / 2**20:.2f} | {1000 * nbytes / 2**30:.1f} |" in text
    assert f"{50 * 2**30 // of(16)} adapters of rank 16\nor {50 * 2**30 // mixture} of those mixtures" in text


def test_a_fragmented_pool_says_so() -> None:
    ranks = {"q": 12}
    piece = make().bytes_for(ranks)
    pool = make(capacity_bytes=4 * piece, slots=8)
    slots = [pool.reserve(ranks) for _ in range(4)]
    pool.release(slots[0])
    pool.release(slots[2])
    before = state(pool)
    with pytest.raises(lk.PoolFull) as caught:
        pool.reserve({"q": 12, "k": 12})
    assert caught.value.largest_free_bytes == piece < caught.value.needed_bytes <= caught.value.free_bytes
    assert state(pool) == before


@pytest.mark.parametrize(
    ("ranks", "error"),
    [
        ({"q": 4, "nope": 4}, lk.UnknownModule),
        ({"q": 4, "o": 13}, lk.RankTooLarge),
        ({"q": -1}, ValueError),
        ({"q": 12, "k": 12, "v": 12, "o": 12}, lk.PoolFull),
    ],
)
def test_a_refused_reservation_changes_nothing(ranks: Mapping[str, int], error: type[Exception]) -> None:
    pool = make(capacity_bytes=2 << 10)
    pool.reserve({"k": 1})
    before = state(pool)
    with pytest.raises(error):
        pool.reserve(ranks)
    assert state(pool) == before


def test_weights_must_fit_the_reservation(generator: torch.Generator) -> None:
    pool = make()
    slot = pool.reserve({"q": 4})
    w = random_adapter(SPECS, {"q": 4}, torch.float32, generator)["q"]
    for a, b, scale in ((w.a[:3], w.b, w.scale), (w.a, w.b.t(), w.scale), (w.a, w.b, w.scale[:1])):
        with pytest.raises(lk.WrongShape):
            pool.write(slot, "q", a, b, scale)
    with pytest.raises(lk.UnknownSlot):
        pool.write(slot, "k", w.a, w.b, w.scale)
    with pytest.raises(lk.UnknownSlot):
        pool.write(slot + 1, "q", w.a, w.b, w.scale)
    with pytest.raises(lk.NotWritten):
        pool.publish(slot)
    assert pool.write(slot, "q", w.a, w.b, w.scale) == 4 * (w.a.numel() + w.b.numel() + 4)
    pool.publish(slot)


def image_of(pool: AdapterPool, adapter: Mapping[str, Weights]) -> tuple[lk.Layouts, torch.Tensor]:
    """An adapter laid out beside the pool, with what another process would have of it."""
    geometry = pickle.loads(pickle.dumps(pool.geometry))
    gates = {m: w.gate for m, w in adapter.items() if w.gate is not None}
    mag, bias = ({m for m, w in adapter.items() if getattr(w, name) is not None} for name in ("mag", "bias"))
    layouts = geometry.layouts({m: w.a.shape[0] for m, w in adapter.items()}, gates, mag=mag, bias=bias)
    image = torch.zeros(sum(layout.nbytes for layout in layouts.values()), dtype=torch.uint8)
    starts = itertools.accumulate((layout.nbytes for layout in layouts.values()), initial=0)
    for (i, layout), start in zip(layouts.items(), starts, strict=False):
        views = lk.Memory.of(image, geometry.dtype).at(geometry.sites[i], start, layout)
        for module in set(geometry.sites[i].modules) & adapter.keys():
            w = adapter[module]
            rest = {"router": w.router, "expert": w.expert, "mag": w.mag, "bias": w.bias}
            views.fill(geometry.find(module)[1], module, w.a, w.b, w.scale, **rest)
    return pickle.loads(pickle.dumps(layouts)), image


@pytest.mark.parametrize("cut", [1, 130, 4096, 10**6])
@pytest.mark.parametrize("apart", [False, True])
def test_an_image_in_any_pieces_is_the_adapter_written_by_module(
    cut: int, apart: bool, generator: torch.Generator
) -> None:
    adapter = random_adapter(SPECS, {"q": 6, "v": 8, "o": 2}, torch.float32, generator)
    gates = {"q": lk.TokenGate(3, "top_k", k=2), "o": lk.TokenGate(2, layer_norm_eps=1e-5)}
    adapter = mixed(adapter, gates, generator)
    adapter = with_outputs(adapter, {"v"}, {"o"}, generator)
    other, x = make(), torch.randn(TOKENS, 24, generator=generator)
    want = run(other, [load(other, adapter)], [TOKENS], x)
    layouts, image = image_of(other, adapter)
    pool = make(capacity_bytes=image.numel() + other.bytes_for({"k": 1}))
    if apart:  # the only room is a hole as long as the first site, and another as long as the second
        hole = pool.reserve_laid_out({0: layouts[0]})
        pool.reserve({"k": 1})
        pool.release(hole)
    before = state(pool)
    slot = pool.reserve_laid_out(layouts)
    with pytest.raises(lk.NotWritten):
        pool.publish(slot)
    for piece in image[:-1].split(cut):
        pool.write_image(slot, piece)
    with pytest.raises(lk.NotWritten):
        pool.publish(slot)
    assert not run(pool, [slot], [TOKENS], x).any()
    pool.write_image(slot, image[-1:])
    with pytest.raises(ValueError, match="1 bytes more"):
        pool.write_image(slot, image[:1])
    pool.publish(slot)
    assert torch.equal(run(pool, [slot], [TOKENS], x), want)
    with pytest.raises(ValueError, match="1 bytes more"):
        pool.write_image(slot, image[:1])
    pool.release(slot)
    assert state(pool) == before


def test_layouts_that_do_not_fit_change_nothing() -> None:
    pool = make()
    layouts = pool.geometry.layouts({"q": 12, "o": 12})
    needed = sum(layout.nbytes for layout in layouts.values())
    assert needed == pool.bytes_for({"q": 12, "o": 12})
    while pool.free_bytes >= needed:
        pool.reserve_laid_out(layouts)
    before = state(pool)
    with pytest.raises(lk.PoolFull) as caught:
        pool.reserve_laid_out(layouts)
    assert caught.value.needed_bytes == needed and state(pool) == before


def test_layers_that_are_alike_share_a_layout() -> None:
    """What an adapter says about its sites is small, however many there are."""
    specs = tuple(SiteSpec(f"l{i}.o", (f"l{i}.o",), 32, (24,)) for i in range(100))
    layouts = lk.Geometry(specs, torch.bfloat16, 16, 8).layouts({f"l{i}.o": 4 + (i == 7) for i in range(100)})
    assert len({id(layout) for layout in layouts.values()}) == 2
    assert len(pickle.dumps(layouts)) < 2000


def test_writing_converts_to_the_pools_dtype(generator: torch.Generator) -> None:
    pool, w = make(), random_adapter(SPECS, {"k": 5}, torch.float64, generator)["k"]
    slot = load(pool, {"k": w})
    held = lookup(pool.site_ids[0]).slots[slot]
    assert held is not None
    torch.testing.assert_close(held.a, w.a.float(), rtol=0, atol=0)
    torch.testing.assert_close(held.live[0].b, w.b.float(), rtol=0, atol=0)


def test_a_step_sees_a_slot_from_publish_to_release(generator: torch.Generator) -> None:
    pool, x = make(), torch.randn(TOKENS, 24, generator=generator)
    adapter = random_adapter(SPECS, {"q": 4, "v": 8}, torch.float32, generator)

    def seen() -> tuple[bool, bool]:
        """Whether the step changes rows of the slot, and whether the pool says that it does anything."""
        return bool(run(pool, [slot, -1], [5, 7], x)[:5].any()), pool.active

    slot = pool.reserve({m: w.a.shape[0] for m, w in adapter.items()})
    assert seen() == (False, False)
    for module, w in adapter.items():
        pool.write(slot, module, w.a, w.b, w.scale)
    assert seen() == (False, False)
    pool.publish(slot)
    assert seen() == (True, True)
    pool.release(slot)
    assert seen() == (False, False)


def test_same_adapter_in_another_slot_and_place_gives_the_same_bits(generator: torch.Generator) -> None:
    pool, x = make(capacity_bytes=64 << 10), torch.randn(TOKENS, 24, generator=generator)
    adapter = random_adapter(SPECS, {"q": 4, "v": 8, "o": 2}, torch.float32, generator)
    first = load(pool, adapter)
    other = load(pool, random_adapter(SPECS, {"q": 12, "k": 3}, torch.float32, generator))
    second = load(pool, adapter)
    want = run(pool, [first], [TOKENS], x)
    assert torch.equal(run(pool, [second], [TOKENS], x), want)
    pool.release(first)
    pool.release(other)
    third = load(pool, adapter)
    assert third == first
    assert torch.equal(run(pool, [third], [TOKENS], x), want)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_pool_made_in_inference_mode_is_written_outside_of_it(backend: str, generator: torch.Generator) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    with torch.inference_mode():
        pool = make(backend=backend)
    slot = load(pool, random_adapter(SPECS, {"q": 4}, torch.float32, generator))
    with torch.inference_mode():
        pool.set_batch(np.array([slot], np.int32), np.array([3], np.int32))
        pool.set_idle(True)
    pool.set_batch(np.array([slot], np.int32), np.array([3], np.int32))
    assert pool.active


@pytest.mark.parametrize("slots", [[99, -7], [2**31 - 1, -(2**31)]])
def test_a_slot_that_cannot_exist_is_a_base_row(slots: list[int], generator: torch.Generator) -> None:
    assert not run(make(), slots, [3, 4], torch.randn(TOKENS, 24, generator=generator)).any()


def test_idle_pools_do_nothing(generator: torch.Generator) -> None:
    pool, x = make(), torch.randn(TOKENS, 24, generator=generator)
    slot = load(pool, random_adapter(SPECS, {"q": 4}, torch.float32, generator))
    assert run(pool, [slot], [3], x).any()
    for launch in (True, False):
        pool.set_idle(launch)
        assert pool.active is launch
        y = torch.zeros(TOKENS, 48)
        lk.expand(y, lk.shrink(x, pool.site_ids[0], pool.h_width(0)), pool.site_ids[0])
        assert not y.any()
    assert run(pool, [slot], [3], x).any()


def test_a_step_longer_than_the_pool_was_made_for_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        make().set_batch(np.array([-1], np.int32), np.array([TOKENS + 1], np.int32))


def test_a_pool_that_nobody_holds_takes_its_memory_with_it() -> None:
    pool = make()
    site_id = pool.site_ids[0]
    del pool
    gc.collect()
    with pytest.raises(LookupError, match="no live pool"):
        lookup(site_id)


def test_backend_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend() -> str:
        pool = make()
        return lookup(pool.site_ids[0]).backend.name

    assert backend() == "cpu"
    monkeypatch.setenv("LORAMUX_KERNELS", "reference")
    assert backend() == "reference"
    monkeypatch.setenv("LORAMUX_KERNELS", "fastest")
    with pytest.raises(ValueError, match="fastest"):
        backend()


@pytest.mark.parametrize("modules", [("q",), ("q", "q")])
def test_sites_must_make_sense(modules: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"slices|two sites"):
        AdapterPool(
            [SiteSpec("s", modules, 8, (8, 8))],
            capacity_bytes=1024,
            slots=1,
            max_rank=1,
            max_tokens=1,
            max_requests=1,
            dtype=torch.float32,
            device="cpu",
        )
