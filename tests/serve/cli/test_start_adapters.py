"""What `loramux serve` looks at before it starts, and what it leaves for later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramux.cli.start_adapters import (
    FEW,
    _fingerprint,
    adapters_in,
    check,
    composed_folder,
    draw_memory_of,
    draws_among,
    find,
    memory_of,
    open_store,
)
from loramux.config import ServeConfig
from loramux.errors import ConfigError
from loramux.registry import Store
from loramux_adapters import AdapterCorrupt, Artefact, BaseModel, Gate, LoweredAdapter
from loramux_adapters.artefact import summarise, write_artefact
from loramux_adapters.base_weights import BaseWeights
from loramux_adapters.gate import Capacity, Select
from loramux_adapters.lowered import LoweredSite
from loramux_adapters.native import digest_of
from loramux_adapters.variance import Variance, VarianceKind
from loramux_kernels.arena import aligned

from ..fakes import FakePrepare, make_artefact

BASE = BaseModel("org/base", {"up_proj": (4, 8)})


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str, int], Path]:
    def make(name: str, count: int) -> Path:
        for i in range(count):
            (tmp_path / name / f"{name}{i}").mkdir(parents=True)
            (tmp_path / name / f"{name}{i}" / "adapter_config.json").write_text("{}")
        return tmp_path / name

    return make


def test_adapters_of_a_folder(folder: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = folder("a", 2)
    (path / "native.safetensors").write_text("")
    (path / "notes").mkdir()
    (path / "bad name").mkdir()
    (path / "bad name" / "adapter_config.json").write_text("{}")
    assert dict(adapters_in(path)) == {
        "a0": path / "a0", "a1": path / "a1", "native": path / "native.safetensors"
    }  # fmt: skip
    assert "bad name" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        list(adapters_in(path / "nowhere"))


def test_named_ones_are_required_and_come_first(folder: Callable[[str, int], Path]) -> None:
    path = folder("a", 3)
    config = ServeConfig(adapters={"x": Path("x"), "a1": Path("other")}, adapter_dirs=(path,))
    found = find(config, ["base"])
    assert list(found) == ["x", "a1", "a0", "a2"]
    assert [one.required for one in found.values()] == [True, True, False, False]
    assert found["a1"].source == Path("other")
    assert all(one.settle for one in found.values())


def test_many_are_left_for_later(folder: Callable[[str, int], Path]) -> None:
    config = ServeConfig(adapters={"x": Path("x")}, adapter_dirs=(folder("a", FEW + 1),))
    found = find(config, ["base"])
    assert found.pop("x").settle
    assert not any(one.settle for one in found.values())
    prepare = FakePrepare()
    assert check(found, prepare, Store.in_memory(), all_of_them=False) == {} and prepare.read == []
    assert len(check(found, prepare, Store.in_memory(), all_of_them=True)) == FEW + 1


@pytest.mark.parametrize("name", ["base", "alias", "alias:a"])
def test_the_bases_names_are_taken(name: str) -> None:
    with pytest.raises(ConfigError, match="base model's"):
        find(ServeConfig(adapters={name: Path("x")}), ["base", "alias"])


def test_a_required_adapter_that_fails_ends_the_start_and_others_do_not(
    folder: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, prepare = folder("a", 2), FakePrepare()
    prepare.errors[path / "a0"] = AdapterCorrupt("Broken.", hint="Copy it again.")
    found = find(ServeConfig(adapter_dirs=(path,)), ["base"])
    assert set(check(found, prepare, Store.in_memory(), all_of_them=False)) == {"a1"}
    assert "a0: Broken." in capsys.readouterr().out
    found = find(ServeConfig(adapters={"x": path / "a0"}), ["base"])
    with pytest.raises(ConfigError, match="Not started: x"):
        check(found, prepare, Store.in_memory(), all_of_them=False)
    prepare.errors[path / "a0"] = OSError(28, "No space left on device")
    with pytest.raises(ConfigError, match="No space left"):
        check(found, prepare, Store.in_memory(), all_of_them=False)


def test_the_state_file_is_named_by_base_and_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    open_store(ServeConfig(), BASE, 8000, tmp_path).close()
    assert (tmp_path / "state" / "org--base-8000.sqlite").is_file()
    open_store(ServeConfig(state=tmp_path / "mine"), BASE, 8000, tmp_path).close()
    assert (tmp_path / "mine").is_file()
    open_store(ServeConfig(state=tmp_path / "unused", dry_run=True), BASE, 8000, tmp_path).close()
    assert not (tmp_path / "unused").exists()


def test_what_requests_compose_lies_apart_for_each_state_file_and_ends_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    cache = tmp_path / "artefacts"
    (cache / "composed").mkdir(parents=True)
    kept = cache / "mine.safetensors"
    kept.write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    mine, other = ServeConfig(state=tmp_path / "mine"), ServeConfig(state=tmp_path / "other")
    folders = [composed_folder(config, BASE, 8000, cache) for config in (mine, other, ServeConfig())]
    folders.append(composed_folder(ServeConfig(), BASE, 8001, cache))
    assert len(set(folders)) == 4 and {folder.parent for folder in folders} == {cache / "composed"}
    for folder in folders:
        folder.mkdir()
        (folder / "sum.safetensors").write_text("")
    assert composed_folder(ServeConfig(state=tmp_path / "link"), BASE, 9000, cache) == folders[0]
    assert [folder.exists() for folder in folders] == [False, True, True, True] and kept.exists()


def test_the_state_forgets_what_was_checked_on_other_weights(tmp_path: Path) -> None:
    """A DoRA's lowered form depends on them, though the layers are the same."""
    digests = set()
    for size in (1, 2):
        save_file({"x": torch.ones(size)}, tmp_path / "model.safetensors")
        base = replace(BASE, weights=BaseWeights(tmp_path))
        digests.add(_fingerprint(base))
    assert len(digests | {_fingerprint(BASE)}) == 3


def test_memory_of_a_router_counts_its_rows(tmp_path: Path) -> None:
    """One per score, also where the scores are of more experts than there are weights, and one for a threshold."""
    owners = torch.tensor([0, 1], dtype=torch.int32)
    site = LoweredSite(torch.ones(2, 4), torch.ones(2, 8), torch.ones(2), gate="g", expert=owners)
    merged = Gate(torch.ones(3, 4), expert_map=torch.tensor([0, 1, 0], dtype=torch.int32))
    own = {"tau_max": 0.5, "adaptive_weight": torch.ones(4), "adaptive_bias": torch.zeros(1)}
    for gate in (merged, Gate(torch.ones(2, 4), select=Select.ADAPTIVE, **own)):
        adapter = LoweredAdapter("mole", {"up_proj": site}, gates={"g": gate})
        layout = [(2 + 3) * 4 * 2, 2 * 4, 2 * 4, 2 * 8 * 2]  # A and router, scale, expert, B
        expected = sum(map(aligned, layout))
        assert memory_of(written(adapter, tmp_path), BASE, 2, max_requests=1, exact=True) == expected


def test_memory_of_a_capacity_counts_for_every_request(tmp_path: Path) -> None:
    """Two rows of counts, of four bytes for each expert."""
    owners = torch.tensor([0, 1], dtype=torch.int32)
    site = LoweredSite(torch.ones(2, 4), torch.ones(2, 8), torch.ones(2), gate="g", expert=owners)
    sizes = []
    for capacity in (None, Capacity(5)):
        adapter = LoweredAdapter("sira", {"up_proj": site}, gates={"g": Gate(torch.ones(3, 4), capacity=capacity)})
        sizes.append(memory_of(written(adapter, tmp_path), BASE, 2, max_requests=100, exact=True))
    assert sizes[1] - sizes[0] == aligned(100 * 2 * 3 * 4)


def test_memory_of_magnitudes_and_biases(tmp_path: Path) -> None:
    """Four bytes for each output; a bias also where the base's own must stay as it is."""
    site = LoweredSite(torch.ones(2, 4), torch.ones(2, 8), torch.ones(2), magnitude=torch.ones(8))
    plain = aligned(2 * 4 * 2) + aligned(2 * 4) + aligned(2 * 8 * 2)
    for biased, has_bias, words in ((False, False, 1), (True, False, 2), (False, True, 2), (True, True, 2)):
        adapter = LoweredAdapter("dora", {"up_proj": replace(site, bias=torch.ones(8) if has_bias else None)})
        base = replace(BASE, biased=frozenset({"up_proj"} if biased else ()))
        found = memory_of(written(adapter, tmp_path), base, 2, max_requests=1, exact=True)
        assert found == plain + words * aligned(4 * 8)


def test_memory_of_bands_is_that_of_where_they_are_packed(tmp_path: Path) -> None:
    """Not on a GPU, for blocks of two inputs."""
    a, b = torch.block_diag(torch.ones(1, 2), torch.ones(1, 2)), torch.block_diag(torch.ones(1, 4), torch.ones(1, 4))
    adapter = LoweredAdapter("melora", {"up_proj": LoweredSite(a, b, torch.ones(2), bands=2)})
    for tiled, rows in ((False, 1), (True, 2)):
        expected = sum(map(aligned, (rows * 4 * 2, 2 * 4, rows * 8 * 2)))
        found = memory_of(written(adapter, tmp_path), BASE, 2, max_requests=1, exact=True, tiled=tiled)
        assert found == expected


def written(adapter: LoweredAdapter, cache: Path) -> Artefact:
    digest = digest_of(adapter)
    return Artefact(write_artefact(adapter, "b", digest, cache), digest, summarise(adapter, "b"))


def test_draws_are_planned_without_what_their_mean_has(tmp_path: Path) -> None:
    deviations = {"sigma_a": torch.ones(2, 4)}
    site = LoweredSite(torch.ones(2, 4), torch.ones(2, 8), torch.ones(2))
    of_a = replace(site, variance=Variance(VarianceKind.DIAGONAL_A, deviations))
    both = Variance(VarianceKind.DIAGONAL_AB, deviations | {"sigma_b": torch.ones(2, 8)})
    damaged = written(LoweredAdapter("blob", {"up_proj": replace(of_a, b=torch.zeros(2, 8))}), tmp_path)
    damaged.path.write_text("damaged")
    adapters = {
        "plain": written(LoweredAdapter("lora", {"up_proj": site}), tmp_path),
        "blob": written(LoweredAdapter("blob", {"up_proj": of_a}), tmp_path),
        "ivon": written(LoweredAdapter("ivon", {"up_proj": replace(site, variance=both)}), tmp_path),
        "damaged": damaged,
    }
    found = draws_among(adapters, functools.partial(draw_memory_of, base=BASE, item_bytes=2, max_requests=1))
    own = aligned(2 * 4 * 2) + aligned(2 * 4)
    assert found == {"blob": own, "ivon": own + aligned(2 * 8 * 2)}


@pytest.mark.parametrize("exact", [True, False])
def test_memory_of_an_artefact_that_is_damaged_is_told_from_its_summary(tmp_path: Path, exact: bool) -> None:
    artefact = make_artefact("a", tmp_path)
    artefact.path.write_text("damaged")
    assert memory_of(artefact, BASE, 2, max_requests=1, exact=exact) == artefact.summary.nbytes // 2
