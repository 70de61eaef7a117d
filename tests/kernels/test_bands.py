"""Block-diagonal adapters, packed without their zeros: results in float64, bytes, and what cannot be packed."""

from __future__ import annotations

import pytest
import torch

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.testing import Weights, banded, load, mixed, random_adapter, with_outputs

from .applied import check_against_float64

QKV = SiteSpec("qkv", ("q", "k", "v"), 96, (160, 32, 32))
OUT = SiteSpec("out", ("o",), 72, (130,))
SPECS = (QKV, OUT)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poison")


def make(dtype: torch.dtype = torch.float32, backend: str = "cpu") -> AdapterPool:
    return AdapterPool(
        SPECS,
        capacity_bytes=4 << 20,
        slots=8,
        max_rank=64,
        max_tokens=64,
        max_requests=16,
        dtype=dtype,
        device="cpu",
        backend=backend,
    )


def adapters_of(dtype: torch.dtype, generator: torch.Generator) -> list[dict[str, Weights]]:
    """Four bands at one site and two at the other, with outputs; a slice left out; one module banded and one not, so
    that neither is packed; plain; a mixture."""
    plain = [
        random_adapter(SPECS, ranks, dtype, generator)
        for ranks in (
            {"q": 16, "k": 8, "v": 4, "o": 6},
            {"q": 8, "v": 24},
            {"q": 8, "k": 3, "o": 2},
            {"q": 24, "v": 8, "o": 40},
            {"k": 12, "o": 9},
        )
    ]
    return [
        with_outputs(banded(plain[0], {"q": 4, "k": 4, "v": 4, "o": 2}), "qo", "vo", generator),
        banded(plain[1], {"q": 8, "v": 8}),
        banded(plain[2], {"q": 2, "o": 2}),
        plain[3],
        mixed(plain[4], {"o": TokenGate(3, "top_k", k=1)}, generator),
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    check_against_float64(make(dtype, backend), SPECS, adapters_of(dtype, generator), dtype, generator)


def test_bytes_are_those_of_the_blocks() -> None:
    pool = make()
    whole = pool.bytes_for({"q": 4, "k": 4, "v": 4})
    ranks, bands = {"q": 16, "k": 16, "v": 16}, {"q": 4, "k": 4, "v": 4}
    # As many as those of a rank as small as one block's, and a scale for each row of all blocks.
    assert pool.bytes_for(ranks, bands=bands) == whole + 128
    slot = load(pool, banded(random_adapter((QKV,), ranks, torch.float32, torch.Generator().manual_seed(1)), bands))
    assert pool.used_bytes == whole + 128
    pool.release(slot)
    assert pool.used_bytes == 0


@pytest.mark.parametrize(
    ("ranks", "gates", "bands"),
    [
        ({"q": 8, "k": 8}, {}, {"q": 4, "k": 2}),
        ({"q": 8, "k": 8}, {}, {"q": 4}),
        ({"q": 8}, {"q": TokenGate(2)}, {"q": 4}),
        ({"o": 8}, {}, {"o": 4}),  # 130 outputs
        ({"o": 10}, {}, {"o": 5}),  # and 72 inputs
    ],
)
def test_what_cannot_be_packed_is_laid_out_as_it_is(
    ranks: dict[str, int], gates: dict[str, TokenGate], bands: dict[str, int]
) -> None:
    assert make().bytes_for(ranks, gates, bands=bands) == make().bytes_for(ranks, gates)


def test_on_a_device_bands_are_as_wide_as_what_kernels_take_and_few() -> None:
    spec = SiteSpec("o", ("o",), 2048, (1024,))
    geometry = lk.Geometry((spec,), torch.bfloat16, 512, 8, tiled=True)

    def bands(rank: int, n: int) -> int:
        return geometry.layouts({"o": rank}, bands={"o": n})[0].bands

    assert [bands(16, n) for n in (1, 2, 4, 8, 16)] == [1, 2, 4, 8, 1]
    assert [bands(rank, 8) for rank in (128, 256, 264)] == [8, 8, 1]


def test_what_is_not_block_diagonal_is_refused_before_anything_is_copied() -> None:
    pool, generator = make(), torch.Generator().manual_seed(2)
    bands = {"o": 2}
    w = banded(random_adapter((OUT,), {"o": 6}, torch.float32, generator), bands)["o"]
    with pytest.raises(ValueError, match="rank 7, which 2 bands do not divide"):
        pool.reserve({"o": 7}, bands=bands)
    slot = pool.reserve({"o": 6}, bands=bands)
    for a, b, name in ((w.a + 1, w.b, "a"), (w.a, w.b + 1, "b")):
        with pytest.raises(ValueError, match=f"module o: {name} is not zero outside of its 2 bands"):
            pool.write(slot, "o", a, b, w.scale)
    for a, b, scale in ((w.a[:3], w.b, w.scale), (w.a, w.b[:, 1:], w.scale), (w.a, w.b, w.scale[1:])):
        with pytest.raises(lk.WrongShape):
            pool.write(slot, "o", a, b, scale)
    with pytest.raises(lk.NotWritten):
        pool.publish(slot)
    assert pool.write(slot, "o", w.a, w.b, w.scale) == 4 * (3 * 72 + 3 * 130 + 6)
