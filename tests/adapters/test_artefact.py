"""The artefact on disk: exact, content-addressed, written whole or not at all."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loramux_adapters import AdapterError, LoweredSite, lower, open_artefact, prepare
from loramux_adapters.artefact import digest_of

from .checkpoints import BASE, make_config, make_tensors, write_adapter


@pytest.fixture
def source(tmp_path):
    return write_adapter(tmp_path / "source", make_config(lora_alpha=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(tmp_path, dtype):
    source = write_adapter(tmp_path / "source", None, make_tensors(dtype=dtype))
    made = prepare(source, BASE, tmp_path / "cache")
    lowered, opened = lower(source, BASE), open_artefact(made.path)
    assert (opened.method, opened.warnings) == (lowered.method, lowered.warnings)
    assert opened.sites.keys() == lowered.sites.keys()
    for module, site in lowered.sites.items():
        for name, tensor in site.tensors().items():
            other = opened.sites[module].tensors()[name]
            assert other.dtype == tensor.dtype and torch.equal(other, tensor)
    assert made.digest == digest_of(opened) == made.path.name.removesuffix(".safetensors")
    assert made.digest.startswith(made.short) and len(made.short) == 16
    summary = made.summary
    assert (summary.method, summary.rank, summary.sites, summary.base) == ("lora", 4, 4, "tiny")
    assert summary.dtype == str(dtype).removeprefix("torch.")
    assert summary.nbytes == lowered.nbytes() == lowered.nbytes(dtype)
    assert list((tmp_path / "cache").iterdir()) == [made.path]


def test_the_file_is_what_the_readme_says(source, tmp_path):
    made = prepare(source, BASE, tmp_path / "cache")
    with safe_open(made.path, "pt") as file:
        description = json.loads(file.metadata()["loramux"])
        assert set(file.keys()) == {f"{m}.{part}" for m in description["sites"] for part in ("A", "B", "scale")}
    assert description["format"] == "loramux" and description["version"] == 1
    assert description["digest"] == made.digest and description["sites"]["model.layers.0.mlp.down_proj"] == {"rank": 4}


def test_the_digest_is_of_the_content(source, tmp_path):
    """Not of the path, the name of the base or the file's spelling; but of every bit of the result."""
    digest = digest_of(lower(source, BASE))
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in make_tensors().items()}
    other = write_adapter(tmp_path / "other", make_config(lora_alpha=5, base_model_name_or_path="x/y"), bare)
    assert digest_of(lower(other, BASE)) == digest

    adapter = lower(source, BASE)
    module, site = next(iter(adapter.sites.items()))
    digests = {digest}
    for changed in (
        replace(site, a=torch.nextafter(site.a, site.a + 1)),
        replace(site, b=-site.b),
        replace(site, scale=site.scale * 2),
        LoweredSite(site.b, site.a, site.scale),
        replace(site, a=site.a.view(torch.int32).view(torch.float32).bfloat16()),
    ):
        digests.add(digest_of(replace(adapter, sites={**adapter.sites, module: changed})))
    digests.add(digest_of(replace(adapter, method="other")))
    digests.add(digest_of(replace(adapter, sites={f"x.{name}": s for name, s in adapter.sites.items()})))
    assert len(digests) == 8
    assert digest_of(replace(adapter, warnings=("something",))) == digest


def test_an_intact_artefact_is_not_written_again(source, tmp_path):
    made = prepare(source, BASE, tmp_path / "cache")
    before = made.path.stat()
    assert prepare(source, BASE, tmp_path / "cache") == made
    assert (made.path.stat().st_ino, made.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other content"])
def test_a_damaged_artefact_is_replaced(source, tmp_path, damage):
    made = prepare(source, BASE, tmp_path / "cache")
    whole = made.path.read_bytes()
    if damage == "flip":
        made.path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncate":
        made.path.write_bytes(whole[:-1])
    elif damage == "empty":
        made.path.write_bytes(b"")
    else:
        save_file({"x": torch.zeros(1)}, made.path)
    assert prepare(source, BASE, tmp_path / "cache").path.read_bytes() == whole


def test_the_same_adapter_makes_the_same_bytes(source, tmp_path):
    first, second = (prepare(source, BASE, tmp_path / name).path.read_bytes() for name in ("one", "two"))
    assert first == second


def test_many_at_once(source, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: prepare(source, BASE, tmp_path / "cache"), range(16)))
    assert len(set(a.digest for a in made)) == 1 and list((tmp_path / "cache").iterdir()) == [made[0].path]


def test_nothing_stays_when_the_disk_fails(source, tmp_path, monkeypatch):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loramux_adapters.native.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        prepare(source, BASE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_leftovers_of_a_killed_writer_go(source, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    old, new = cache / ".0123.abc.tmp", cache / ".0123.def.tmp"
    for leftover in (old, new):
        leftover.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    made = prepare(source, BASE, cache)
    assert sorted(cache.iterdir()) == sorted([made.path, new])


def _rewrite(path: Path, change) -> None:
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["loramux"])
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(description, tensors)
    save_file(tensors, path, metadata={"loramux": json.dumps(description)})


@pytest.mark.parametrize(
    "change",
    [
        lambda d, t: d.update(version=2),
        lambda d, t: d.update(format="other"),
        lambda d, t: d.update(digest="0" * 64),
        lambda d, t: d.pop("method"),
        lambda d, t: d.update(sites=[]),
        lambda d, t: d["sites"].popitem(),
        lambda d, t: t.popitem(),
        lambda d, t: t.update(extra=torch.zeros(1)),
        lambda d, t: t.update({k: v[:-1].clone() for k, v in t.items() if k.endswith(".A")}),
        lambda d, t: t.update({k: v[None].clone() for k, v in t.items() if k.endswith(".B")}),
        lambda d, t: d["sites"].update({m: {"rank": 3} for m in d["sites"]}),
    ],
)
def test_a_file_that_is_no_artefact_is_refused(source, tmp_path, change):
    made = prepare(source, BASE, tmp_path / "cache")
    _rewrite(made.path, change)
    with pytest.raises(AdapterError) as refusal:
        open_artefact(made.path)
    assert refusal.value.code == "adapter_corrupt"


def test_a_renamed_artefact_is_refused(source, tmp_path):
    made = prepare(source, BASE, tmp_path / "cache")
    other = made.path.rename(made.path.with_name(f"{'0' * 64}.safetensors"))
    with pytest.raises(AdapterError) as refusal:
        open_artefact(other)
    assert refusal.value.code == "adapter_corrupt"
    with pytest.raises(AdapterError) as refusal:
        open_artefact(made.path)
    assert refusal.value.code == "adapter_not_found"


def test_opening_maps_the_file(tmp_path):
    """Opening a large artefact must not read it: 64 MiB of weights, under 8 MiB of new resident memory."""
    base = replace(BASE, linears={"model.layers.0.q_proj": (4096, 4096)})
    tensors = make_tensors(base, ("q_proj",), {"model.layers.0.q_proj": 2048})
    source = write_adapter(tmp_path / "source", make_config(r=2048), tensors)
    path = prepare(source, base, tmp_path / "cache").path
    del tensors

    def resident() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    opened = open_artefact(path)
    assert resident() - before < 8 << 20
    assert opened.nbytes() > 64 << 20
