"""Versions that borrow B of another: what they compute is what they would compute alone, whoever leaves when."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux.engine.manager import AdapterManager
from loramux.staging.lending import borrowable, same_bits
from loramux_adapters.artefact import digest_of, write_artefact
from loramux_adapters.gate import Gate, Select
from loramux_adapters.lowered import LoweredAdapter, LoweredSite

from .test_manager import SITES, WIDTHS, delta, finish, load, make_manager, stagers_end, step

__all__ = ["stagers_end"]  # a fixture, for the managers of these tests too

LINE = 128
Write = Callable[[LoweredAdapter], str]


def mean(seed: int = 0, rank: int = 4) -> LoweredAdapter:
    """q_proj is a mixture, k_proj has a magnitude and a bias."""
    generator = torch.Generator().manual_seed(seed)
    sites = {
        module: LoweredSite(
            torch.randn(rank, d_in, generator=generator),
            torch.randn(rank, d_out, generator=generator),
            torch.rand(rank, generator=generator),
        )
        for module, (d_in, d_out) in WIDTHS.items()
    }
    experts = torch.arange(rank, dtype=torch.int32) % 2
    sites["q_proj"] = replace(sites["q_proj"], gate="g", expert=experts)
    sites["k_proj"] = replace(sites["k_proj"], magnitude=torch.rand(12, generator=generator) + 0.5, bias=torch.ones(12))
    gate = Gate(torch.randn(2, 24, generator=generator), select=Select.TOP_K, k=1)
    return LoweredAdapter("lora", sites, gates={"g": gate})


def draw(of: LoweredAdapter, seed: int = 1, other: Collection[str] = ()) -> LoweredAdapter:
    """Another A and scale, and another B at the modules in `other`."""
    generator = torch.Generator().manual_seed(seed)
    sites = {
        module: replace(
            site,
            a=site.a + torch.randn(site.a.shape, generator=generator),
            scale=site.scale * 1.25,
            b=site.b + 1 if module in other else site.b,
        )
        for module, site in of.sites.items()
    }
    return replace(of, sites=sites)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return lambda adapter: str(write_artefact(adapter, "base", digest_of(adapter), tmp_path))


def computed(manager: AdapterManager, version: int) -> torch.Tensor:
    step(manager, [version], [6])
    assert not manager.missing
    return delta(manager, 6)


def alone(write: Write, adapter: LoweredAdapter) -> tuple[torch.Tensor, int]:
    manager = make_manager()
    nbytes = load(manager, 1, write(adapter))["bytes"]
    return computed(manager, 1), nbytes


def bytes_of_b(modules: Collection[str], rank: int = 4) -> int:
    return sum(-(-4 * rank * WIDTHS[module][1] // LINE) * LINE for module in modules)


@pytest.mark.parametrize("other", [(), ("v_proj",), ("q_proj", "down_proj"), tuple(WIDTHS)])
@pytest.mark.parametrize("piece_bytes", [256, 2**20])
def test_what_is_the_same_is_borrowed_and_the_results_are_those_of_the_whole(
    write: Write, other: tuple[str, ...], piece_bytes: int
) -> None:
    the_mean = mean()
    made = [draw(the_mean, seed, other) for seed in (1, 2)]
    manager = make_manager(setup={"piece_bytes": piece_bytes})
    load(manager, 1, write(the_mean))
    taken = manager.pool.used_bytes
    shared = bytes_of_b(WIDTHS.keys() - set(other))
    for version, adapter in enumerate(made, 2):
        manager.begin(version, write(adapter), 1)
        answer = finish(manager, version)[-1]
        wanted, whole = alone(write, adapter)
        assert answer == {"state": "resident", "bytes": whole - shared}
        taken += whole - shared
        assert manager.pool.used_bytes == taken
        assert torch.equal(computed(manager, version), wanted)
    manager.remove(1)
    assert load(manager, 9, write(mean(9)))["state"] == "resident"  # in what the mean has left
    for version, adapter in enumerate(made, 2):
        assert torch.equal(computed(manager, version), alone(write, adapter)[0])
    for version in (2, 3, 9):
        manager.remove(version)
    assert manager.pool.used_bytes == 0


def test_whoever_has_borrowed_lends_nothing(write: Write) -> None:
    manager, the_mean = make_manager(), mean()
    load(manager, 1, write(the_mean))
    manager.begin(2, write(draw(the_mean, 1)), 1)
    finish(manager, 2)
    whole = load(manager, 3, write(draw(the_mean, 2)))["bytes"]
    manager.remove(3)
    manager.begin(3, write(draw(the_mean, 2)), 2)
    assert finish(manager, 3)[-1] == {"state": "resident", "bytes": whole}


@pytest.mark.parametrize("turns", range(14))
@pytest.mark.parametrize("first", [True, False])
def test_a_lender_that_leaves_at_any_time(write: Write, turns: int, first: bool) -> None:
    """Its slot goes to somebody else at once, who must not lend in its place."""
    manager, the_mean = make_manager(setup={"piece_bytes": 256, "pieces": 1}), mean()
    wanted, other = draw(the_mean), mean(5)
    load(manager, 1, write(the_mean))
    if not first:  # another load is under way
        manager.begin(8, write(mean(8)))
    manager.begin(2, write(wanted), 1)
    answers = [manager.advance(2)["state"] for _ in range(turns)]
    manager.remove(1)
    if "resident" not in answers:
        finish(manager, 2)
    assert load(manager, 3, write(other))["state"] == "resident"
    assert torch.equal(computed(manager, 2), alone(write, wanted)[0])
    assert torch.equal(computed(manager, 3), alone(write, other)[0])
    for version in manager.list_adapters() | {8}:
        manager.remove(version)
    assert manager.pool.used_bytes == 0


@pytest.mark.parametrize("lender", ["not there", "gone", "unreadable"])
def test_without_a_lender_it_is_loaded_whole(write: Write, lender: str) -> None:
    manager, the_mean = make_manager(), mean()
    path = write(the_mean)
    load(manager, 1, path)
    if lender == "gone":
        manager.remove(1)
    if lender == "unreadable":
        Path(path).write_bytes(b"")
    manager.begin(2, write(draw(the_mean)), 7 if lender == "not there" else 1)
    answer = finish(manager, 2)[-1]
    wanted, whole = alone(write, draw(the_mean))
    assert answer == {"state": "resident", "bytes": whole}
    assert torch.equal(computed(manager, 2), wanted)


def test_the_same_is_the_same_bits(write: Write) -> None:
    the_mean = mean()
    path = write(the_mean)
    assert borrowable(draw(the_mean), path) == WIDTHS.keys()
    assert borrowable(mean(1), path) == frozenset()
    assert borrowable(mean(0, rank=5), path) == frozenset()
    zero = torch.zeros(4, 24)
    assert torch.equal(zero, -zero) and not same_bits(zero, -zero)
    assert not same_bits(zero, zero.bfloat16()) and not same_bits(zero, zero.view(torch.int32))
    nothing = LoweredSite(torch.zeros(0, 40), torch.zeros(0, 24), torch.zeros(0), bias=torch.ones(24))
    unranked = LoweredAdapter("bitfit", {"down_proj": nothing})
    assert borrowable(unranked, write(unranked)) == frozenset()
    assert len(SITES) == 2
