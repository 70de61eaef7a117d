"""Reading by templates and letters: what is accounted for, and in which spellings. (Methods test the rest.)"""

import pytest
import torch

from loramux_adapters import AdapterError
from loramux_adapters.files import AdapterFolder
from loramux_adapters.peft.config import parse_config
from loramux_adapters.peft.sites import Part, plain_name, read_sites

from ..checkpoints import BASE, make_config, write_adapter

MODULE = "model.layers.0.self_attn.k_proj"
LAYOUT = {
    "a": Part("{module}.a.{index}", "RI"),
    "b": Part("{module}.b.{index}", "OR"),
    "again": Part("{module}.again.{index}", "RI", copy_of="a"),
    "extra": Part("{module}.extra", "1O", optional=True),
    "table": Part("table", "TT"),
}
SOUND = {"table": torch.ones(3, 3)} | {
    f"{MODULE}.{part}.{i}": torch.full(shape, i + 1.0)
    for i in range(2)
    for part, shape in (("a", (2, 24)), ("b", (12, 2)))
}


def read(folder, tensors, count=2, sparse=False):
    config = parse_config(make_config(target_modules=[MODULE]))
    folder = AdapterFolder(write_adapter(folder, None, tensors))
    sizes = {"R": 2, "T": 3}
    return read_sites(folder, BASE, config, LAYOUT, sizes, count=count, normalise=str, sparse=sparse)


def test_every_part_comes_in_the_order_of_its_index(tmp_path):
    sites = read(tmp_path, SOUND)
    (part,) = sites.modules.values()
    assert {key: len(tensors) for key, tensors in part.items()} == {"a": 2, "b": 2}
    assert [float(tensor[0, 0]) for tensor in part["a"]] == [1, 2]
    assert sites.indices == {MODULE: (0, 1)} and sites.common["table"][0].shape == (3, 3)


def test_copies_and_optional_parts_may_be_there_or_not(tmp_path):
    extra = SOUND | {f"{MODULE}.extra": torch.ones(1, 12), f"{MODULE}.again.1": SOUND[f"{MODULE}.a.1"].clone()}
    (part,) = read(tmp_path, extra).modules.values()
    assert set(part) == {"a", "b", "extra"}


def test_an_index_may_be_absent_only_where_that_is_said(tmp_path):
    second = {name: tensor for name, tensor in SOUND.items() if not name.endswith(".0")}
    for sparse, field in ((False, f"{MODULE}.a.0"), (True, "0")):
        with pytest.raises(AdapterError) as refusal:
            read(tmp_path / str(sparse), second, sparse=sparse)
        assert (refusal.value.code, refusal.value.field) == ("adapter_missing_tensor", field)


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"table": None}, "adapter_missing_tensor", "table"),
        ({"table": torch.ones(3, 2)}, "adapter_shape_mismatch", "table"),
        ({f"{MODULE}.b.1": None}, "adapter_missing_tensor", f"{MODULE}.b.1"),
        ({f"{MODULE}.a.2": torch.ones(2, 24)}, "adapter_unknown_tensor", f"{MODULE}.a.2"),
        ({f"{MODULE}.a.01": torch.ones(2, 24)}, "adapter_unknown_tensor", f"{MODULE}.a.01"),
        ({f"{MODULE}.again.0": torch.ones(2, 24).half()}, "adapter_unknown_tensor", f"{MODULE}.again.0"),
        ({f"{MODULE}.extra": torch.ones(12)}, "adapter_shape_mismatch", f"{MODULE}.extra"),
        ({f"{MODULE}.a.0": torch.ones(24, 2)}, "adapter_shape_mismatch", f"{MODULE}.a.0"),
        ({f"{MODULE}.a.0": torch.ones(2, 25), f"{MODULE}.b.0": torch.ones(13, 2)}, "adapter_wrong_base", None),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, code, field):
    tensors = {name: tensor for name, tensor in (SOUND | change).items() if tensor is not None}
    with pytest.raises(AdapterError) as refusal:
        read(tmp_path, tensors)
    assert refusal.value.code == code
    assert field is None or refusal.value.field == field


def test_no_count_means_what_the_file_has(tmp_path):
    assert read(tmp_path, SOUND, count=None).indices == {MODULE: (0, 1)}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.x.lora_A.weight", "base_model.model.x.lora_A.weight"),
        ("x.lora_A.default.0.weight", "base_model.model.x.lora_A.0.weight"),
        ("x.moe_layer.default.experts.0.lora_A.weight", "base_model.model.x.moe_layer.experts.0.lora_A.weight"),
        ("lora_gate.default.GateL.weight", "base_model.model.lora_gate.GateL.weight"),
        ("x.default.weight", "base_model.model.x.default.weight"),
    ],
)
def test_spellings_of_a_raw_state_dict(name, plain):
    assert plain_name(name) == plain
