"""The native format: exact both ways, one digest per content, and every unknown or missing part refused by name."""

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from enum import EnumType
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loramux_adapters import (
    AdapterError,
    BaseModel,
    Carry,
    Gate,
    LoweredSite,
    Variance,
    gate,
    lower,
    lowered,
    open_artefact,
    prepare,
    variance,
    write_native,
)
from loramux_adapters.artefact import stored, write_artefact
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import (
    Capacity,
    GateKind,
    GateSource,
    GateValue,
    Norm,
    Pooling,
    PostMap,
    PreMap,
    Select,
)
from loramux_adapters.lowered import CarryKind
from loramux_adapters.methods.native import read_file
from loramux_adapters.native import describe, digest_of
from loramux_adapters.tasks import at_task
from loramux_adapters.variance import VarianceKind
from loramux_adapters.verify import verify

from .checkpoints import BASE, write_adapter
from .natives import DOWN, Q, adapters, make_gate, make_mixture, make_site, same

README = Path(__file__).parents[2] / "adapters/README.md"


@settings(max_examples=150, deadline=None)
@given(adapters())
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, adapter: Any) -> None:
    verify(adapter, BASE)
    folder = tmp_path_factory.mktemp("native")
    path = write_native(folder / "x.safetensors", adapter, "tiny")
    native = read_file(AdapterFolder(path), BASE)
    assert same(native.adapter, adapter) and native.base == "tiny"
    assert same(lower(folder, BASE), adapter)

    digest = digest_of(adapter)
    assert digest_of(native.adapter) == digest
    artefact = write_artefact(adapter, "tiny", digest, folder / "cache")
    assert same(stored(artefact), adapter) and same(open_artefact(artefact), at_task(adapter))
    assert same(lower(artefact, BASE), adapter)
    assert sum(t.numel() * t.element_size() for t in load_file(path).values()) == adapter.nbytes()


@settings(max_examples=60, deadline=None)
@given(adapters(), adapters())
def test_equal_digests_mean_equal_content(one: Any, other: Any) -> None:
    content = [replace(adapter, warnings=()) for adapter in (one, other)]
    assert (digest_of(one) == digest_of(other)) == same(*content)


def test_the_digest_covers_every_field() -> None:
    """Changing any one field of a site or a gate changes it: a new field that is forgotten fails here."""
    index = torch.zeros(4, dtype=torch.int32)
    adapter = make_mixture()
    router, site = adapter.gates["q"], adapter.sites[Q]

    of_gate: dict[str, Any] = dict(
        weights=-router.weights, kind=GateKind.PROMPT, source=GateSource.FFN_INPUT, bias=torch.ones(2),
        hidden=((torch.ones(24, 24), torch.ones(24)),), pool=Pooling.MEAN, pool_weight=torch.ones(24),
        pre=PreMap.LAYER_NORM, pre_eps=1e-6, rational=torch.ones(12), post=PostMap.ABS, temperature=2.0,
        select=Select.ALL, k=2, p=0.5, threshold=0.5, adaptive_weight=torch.ones(24), adaptive_bias=torch.ones(1),
        tau_max=0.5, norm=Norm.SOFTMAX, eps=1e-6, value=GateValue.ONE, expert_map=index[:2], capacity=Capacity(1),
        task=1,
    )  # fmt: skip
    of_site: dict[str, Any] = dict(
        a=-site.a, b=-site.b, scale=-site.scale, gate=None, expert=index, arow=index, magnitude=torch.ones(24),
        bias=torch.ones(24), carry=Carry(DOWN, CarryKind.PREV_U), variance=Variance(VarianceKind.DROPOUT, rate=0.5),
        bands=2,
    )  # fmt: skip
    assert of_gate.keys() == {field.name for field in fields(Gate)}
    assert of_site.keys() == {field.name for field in fields(LoweredSite)}
    digests = [digest_of(adapter)]
    for name, value in of_gate.items():
        digests.append(digest_of(replace(adapter, gates={**adapter.gates, "q": replace(router, **{name: value})})))
    for name, value in of_site.items():
        digests.append(digest_of(replace(adapter, sites={**adapter.sites, Q: replace(site, **{name: value})})))
    assert len(set(digests)) == 1 + len(of_gate) + len(of_site)


def test_what_cannot_be_served_can_be_stored(tmp_path: Path) -> None:
    path = write_native(tmp_path / "x.safetensors", make_mixture(), "tiny")
    assert prepare(path, BASE, tmp_path / "cache").summary.experts == 3
    adapter = make_mixture()
    dora = replace(adapter, sites={**adapter.sites, Q: make_site(magnitude=torch.ones(2, 24), gate="q")})
    path = write_native(tmp_path / "y.safetensors", dora, "tiny")
    assert same(lower(path, BASE), dora)
    with pytest.raises(AdapterError) as refusal:
        prepare(path, BASE, tmp_path / "other")
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", f"sites.{Q}.magnitude")
    assert not (tmp_path / "other").exists()


def test_views_and_shared_tensors_are_written_whole(tmp_path: Path) -> None:
    weights, big = make_gate().weights, torch.randn(24, 8)
    adapter = make_mixture()
    gates = {"q": Gate(weights, select=Select.TOP_K, k=1), "twin": Gate(weights)}
    sites = {Q: replace(make_site(), a=big.T[:4], gate="q"), DOWN: make_site(DOWN)}
    sites["model.layers.1.self_attn.q_proj"] = replace(sites[Q], gate="twin")
    adapter = replace(adapter, sites=sites, gates=gates)
    assert same(lower(write_native(tmp_path / "x.safetensors", adapter, "tiny"), BASE), adapter)


def test_nothing_stays_when_writing_fails(tmp_path: Path) -> None:
    adapter = make_mixture()
    broken = replace(adapter, gates={**adapter.gates, "q": make_gate(select=Select.TOP_P, p=float("nan"))})
    with pytest.raises(ValueError, match="JSON"):
        write_native(tmp_path / "x.safetensors", broken, "tiny")
    assert list(tmp_path.iterdir()) == []


def test_another_base_of_the_same_shape_is_a_warning(tmp_path: Path) -> None:
    path = write_native(tmp_path / "x.safetensors", make_mixture(), "sister")
    (warning,) = lower(path, BASE).warnings
    assert "'sister'" in warning and "'tiny'" in warning


def test_a_folder_with_a_config_is_not_native(tmp_path: Path) -> None:
    """The same file beside adapter_config.json belongs to that config; named itself, it is native."""
    folder = write_adapter(tmp_path / "peft")
    path = write_native(folder / "adapter_model.safetensors", make_mixture(), "tiny")
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE)
    assert refusal.value.code == "adapter_unknown_tensor"
    assert lower(path, BASE).method == "mola"


def test_a_peft_file_is_no_native_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path) / "adapter_model.safetensors", BASE)
    assert refusal.value.code == "adapter_unsupported_feature" and "folder" in refusal.value.hint


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def rewrite(path: Path, change: Change) -> None:
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["loramux"])
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(description, tensors)
    save_file(tensors, path, metadata={"loramux": json.dumps(description)})


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        (lambda d, t: d.update(extra=1), "adapter_unsupported_feature", "extra"),
        (lambda d, t: d["sites"][Q].update(alpha=1), "adapter_unsupported_feature", f"sites.{Q}.alpha"),
        (lambda d, t: d["gates"]["q"].update(topk=1), "adapter_unsupported_feature", "gates.q.topk"),
        (lambda d, t: d["gates"]["q"].update(select="top_q"), "adapter_config_invalid", "gates.q.select"),
        (lambda d, t: d["gates"]["q"].update(select=["top_k"]), "adapter_config_invalid", "gates.q.select"),
        (lambda d, t: d["gates"]["q"].update(k=1.0), "adapter_config_invalid", "gates.q.k"),
        (lambda d, t: d["gates"]["q"].update(k=True), "adapter_config_invalid", "gates.q.k"),
        (lambda d, t: d["gates"]["q"].update(temperature=None), "adapter_config_invalid", "gates.q.temperature"),
        (lambda d, t: d["sites"][Q].update(tensors=["experts"]), "adapter_config_invalid", f"sites.{Q}.tensors"),
        (lambda d, t: d["sites"][Q].pop("rank"), "adapter_config_invalid", f"sites.{Q}.rank"),
        (lambda d, t: d["sites"][Q].pop("tensors"), "adapter_unknown_tensor", f"{Q}.expert"),
        (lambda d, t: d["sites"].pop(Q), "adapter_unknown_tensor", f"{Q}.A"),
        (lambda d, t: d["gates"].pop("q"), "adapter_unknown_tensor", "gate:q.weights"),
        (lambda d, t: d.update(sites=[]), "adapter_config_invalid", "sites"),
        (lambda d, t: d.update(version=2), "adapter_unsupported_feature", "version"),
        (lambda d, t: d.update(format="other"), "adapter_unsupported_feature", "format"),
        (lambda d, t: d.update(digest="0" * 64), "adapter_corrupt", "digest"),
        (lambda d, t: d.pop("method"), "adapter_config_invalid", "method"),
        (lambda d, t: d.update(method="a b"), "adapter_config_invalid", "method"),
        (lambda d, t: d.update(base="\x1b[31m"), "adapter_config_invalid", "base"),
        (lambda d, t: t.pop(f"{Q}.scale"), "adapter_missing_tensor", f"{Q}.scale"),
        (lambda d, t: t.pop(f"{Q}.expert"), "adapter_missing_tensor", f"{Q}.expert"),
        (lambda d, t: t.pop("gate:q.weights"), "adapter_missing_tensor", "gate:q.weights"),
        (lambda d, t: t.update(extra=torch.ones(1)), "adapter_unknown_tensor", "extra"),
        (lambda d, t: t.update({f"{Q}.expert": torch.zeros(4)}), "adapter_unsupported_feature", f"{Q}.expert"),
        (lambda d, t: t.update({f"{Q}.A": t[f"{Q}.A"].int()}), "adapter_unsupported_feature", f"{Q}.A"),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, change: Change, code: str, field: str) -> None:
    path = write_native(tmp_path / "x.safetensors", make_mixture(), "tiny")
    rewrite(path, change)
    with pytest.raises(AdapterError) as refusal:
        lower(path, BASE)
    assert (refusal.value.code, refusal.value.field) == (code, field)


def test_weights_are_read_only_after_names_and_shapes_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_native(tmp_path / "x.safetensors", make_mixture(), "tiny")

    def fail(*_args: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("loramux_adapters.weights.WeightsFile.read", fail)
    other = BaseModel("other", {Q: (24, 24), DOWN: (48, 24), "model.layers.0.mlp.up_proj": (24, 40)})
    with pytest.raises(AdapterError) as refusal:
        lower(path, other)
    assert refusal.value.code == "adapter_shape_mismatch"


def test_the_readmes_writer_writes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plain Python makes a file that we read, and it is the very file that we would write."""
    code = re.search(r"```python\n(# A native file.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    (path,) = tmp_path.iterdir()
    module = "model.layers.0.self_attn.q_proj"
    adapter = lower(path, BaseModel("my-base", {module: (576, 576)}))
    assert (adapter.experts, adapter.ranks, adapter.gates["q0"].k) == (3, {module: 7}, 2)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["loramux"])
    assert {key: description[key] for key in ("sites", "gates")} == {
        key: describe(adapter)[key] for key in ("sites", "gates")
    }
    again = write_native(tmp_path / "again.safetensors", adapter, "my-base")
    assert load_file(again).keys() == load_file(path).keys()


def test_the_readme_names_every_field() -> None:
    """Fields and choices of the format, in its tables."""
    text = README.read_text()
    words = set(re.findall(r"`([a-zA-Z_]+)`", text))
    parts = [*vars(gate).values(), *vars(lowered).values(), *vars(variance).values()]
    choices = {choice.value for kind in parts if isinstance(kind, EnumType) for choice in kind}
    names = {field.name for kind in (Gate, LoweredSite) for field in fields(kind)} - {"a", "b"}
    tensors = {name for shapes in variance.SHAPES.values() for name in shapes}
    assert not (choices | names | tensors) - words
