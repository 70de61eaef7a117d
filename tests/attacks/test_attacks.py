"""Every hostile adapter is refused with its documented code, in bounded time and memory, leaving nothing behind."""

import os
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

from loramux_adapters import AdapterError, errors, lower, prepare
from loramux_adapters.files import AdapterFolder
from loramux_adapters.weights import open_weights

from ..adapters.checkpoints import BASE, make_tensors, write_adapter
from .build import ATTACKS, WEIGHTS
from .build_experts import SOUND_EXPERTS, write_experts
from .build_folds import SOUND, write_sound
from .build_native import NAME, write_mixture
from .build_posteriors import SOUND_POSTERIORS, write_ensemble, write_posterior


@pytest.fixture(autouse=True)
def short_budget(monkeypatch):
    monkeypatch.setattr("loramux_adapters.peft.patterns.BUDGET_S", 0.5)


@pytest.mark.parametrize("name", ATTACKS)
def test_refused(name, tmp_path):
    build, code = ATTACKS[name]
    folder, cache = tmp_path / "adapter", tmp_path / "cache"
    cache.mkdir()
    build(folder)
    before, start = sorted(tmp_path.rglob("*")), time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError) as refusal:
            prepare(folder, BASE, cache)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refusal.value.code == code
    assert peak < 256 << 20 and time.monotonic() - start < 20
    assert refusal.value.hint and str(refusal.value).isprintable() and len(str(refusal.value)) < 1000
    # No partial artefact, and a pickle that was not loaded has not run.
    assert sorted(tmp_path.rglob("*")) == before


def test_every_code_is_attacked():
    documented = {kind.code for kind in AdapterError.__subclasses__()}
    assert {code for _, code in ATTACKS.values()} == documented
    assert all(code in (errors.__doc__ or "") for code in documented)


def test_the_sound_adapter_is_accepted(tmp_path):
    """Otherwise the attacks could be refused for a reason they share."""
    assert len(lower(write_adapter(tmp_path), BASE).sites) == 4


@pytest.mark.parametrize("method", SOUND)
def test_the_sound_folds_are_accepted(tmp_path, method):
    assert lower(write_sound(tmp_path, method), BASE).method == method


@pytest.mark.parametrize("method", SOUND_EXPERTS)
def test_the_sound_mixtures_and_chains_are_accepted(tmp_path, method):
    assert lower(write_experts(tmp_path, method), BASE).method == method


@pytest.mark.parametrize("method", SOUND_POSTERIORS)
def test_the_sound_posteriors_are_accepted(tmp_path, method):
    assert lower(write_posterior(tmp_path, method), BASE).method == method


def test_the_sound_ensemble_is_accepted(tmp_path):
    assert lower(write_ensemble(tmp_path), BASE).method == "ensemble"


def test_the_sound_native_file_is_accepted(tmp_path):
    assert lower(write_mixture(tmp_path), BASE).experts == lower(tmp_path, BASE).experts == 3


@pytest.mark.parametrize("target", ["outside", "pipe", "loop"])
def test_a_native_path_that_is_no_plain_file(tmp_path, target):
    """Named itself, a file gets the same checks as one in a folder."""
    folder, path = tmp_path / "adapter", tmp_path / "adapter" / NAME
    folder.mkdir()
    if target == "outside":
        path.symlink_to(write_mixture(tmp_path / "outside"))
    elif target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.raises(AdapterError) as refusal:
        lower(path, BASE)
    assert refusal.value.code == "adapter_unsafe_file"


@pytest.mark.parametrize("step", [1, 7])
def test_any_cut_and_any_spoiled_header_byte_of_a_native_file(tmp_path, step):
    """Is refused with an AdapterError or, where the byte is a free choice such as a name, read whole."""
    path = write_mixture(tmp_path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    refused = 0
    for offset in range(step, 8 + header, 13):
        for spoiled in (whole[:offset], whole[:offset] + bytes([whole[offset] ^ step]) + whole[offset + 1 :]):
            path.write_bytes(spoiled)
            try:
                lower(path, BASE)
            except AdapterError:
                refused += 1
    assert refused > header / 13 * 1.5


def test_the_hub_cache_layout_is_no_escape(tmp_path):
    source = write_adapter(tmp_path / "source")
    snapshot, blobs = tmp_path / "models--x--y/snapshots/0123", tmp_path / "models--x--y/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(source / name, blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    assert len(lower(snapshot, BASE).sites) == 4
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(source / WEIGHTS)
    with pytest.raises(AdapterError) as refusal:
        lower(snapshot, BASE)
    assert refusal.value.code == "adapter_unsafe_file"


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    write_adapter(tmp_path)
    with open_weights(AdapterFolder(tmp_path), WEIGHTS) as weights:
        os.truncate(tmp_path / WEIGHTS, 1000)
        with pytest.raises(AdapterError) as refusal:
            for name in weights.tensors:
                weights.read(name)
    assert refusal.value.code == "adapter_corrupt"


@pytest.mark.parametrize("path", ["no\0where", "x" * 5000, "nowhere/at/all"])
def test_paths_that_cannot_exist(path):
    with pytest.raises(AdapterError) as refusal:
        lower(Path(path), BASE)
    assert refusal.value.code == "adapter_not_found" and str(refusal.value).isprintable()


def test_the_limit_is_an_argument(tmp_path):
    write_adapter(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    lower(tmp_path, BASE, max_bytes=size)
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, BASE, max_bytes=size - 1)
    assert refusal.value.code == "adapter_too_large"


@pytest.mark.parametrize("step", [1, 7])
def test_any_cut_and_any_spoiled_header_byte_is_refused(tmp_path, step):
    """With an AdapterError, never another exception."""
    path = write_adapter(tmp_path) / WEIGHTS
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for offset in range(step, 8 + header, 41):
        for spoiled in (whole[:offset], whole[:offset] + bytes([whole[offset] ^ step]) + whole[offset + 1 :]):
            path.write_bytes(spoiled)
            with pytest.raises(AdapterError):
                lower(tmp_path, BASE)


def test_weights_are_only_read_after_names_and_shapes_fit(tmp_path, monkeypatch):
    def fail(*_args: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("loramux_adapters.weights.WeightsFile.read", fail)
    write_adapter(tmp_path, None, make_tensors(targets=("q_proj",)))
    with pytest.raises(AdapterError):
        lower(tmp_path, BASE)
