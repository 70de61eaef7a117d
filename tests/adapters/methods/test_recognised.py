"""What is recognised and refused says why, whatever else is in the folder.

The file names are those of EricLBuehler/xlora (`xlora_config.json`, `xlora_classifier.safetensors`) and microsoft/mttl
(`mttl_config.json`, `mttl_weights.bin` in `mttl/models/base_model.py`); XLORA is PEFT's own type.
"""

import pytest
import torch
from peft import PeftType
from safetensors.torch import save_file

from loramux_adapters import AdapterError, lower
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from ..checkpoints import BASE, make_config, write_adapter


@pytest.mark.parametrize(
    ("name", "peft_type", "reason"),
    [
        ("xlora", PeftType.XLORA.value, "first pass"),
        ("milora", "MILORA", "whole prompt"),
        ("milora", "MIDORA", "whole prompt"),
    ],
)
def test_by_its_type(tmp_path, name, peft_type, reason):
    folder = write_adapter(tmp_path, make_config(peft_type=peft_type))
    assert_refused(folder, name, "peft_type", reason)


@pytest.mark.parametrize(
    ("name", "file", "reason"),
    [
        ("xlora", "xlora_config.json", "first pass"),
        ("mttl", "mttl_config.json", "bilinear"),
        ("mttl", "mttl_weights.bin", "bilinear"),
    ],
)
def test_by_a_file_of_its_own(tmp_path, name, file, reason):
    (tmp_path / file).write_text("{}")
    save_file({"last.weight": torch.ones(1)}, tmp_path / "xlora_classifier.safetensors")
    assert_refused(tmp_path, name, file, reason)


def assert_refused(folder, name, field, reason):
    assert [method.name for method in METHODS if method.detect(AdapterFolder(folder))] == [name]
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", field)
    assert reason in refusal.value.message and refusal.value.hint


def test_x_lora_beside_an_adapter_is_not_overlooked(tmp_path):
    folder = write_adapter(tmp_path, make_config())
    (folder / "xlora_config.json").write_text("{}")
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE)
    assert refusal.value.field == "xlora_config.json"


def test_a_folder_without_any_config_is_still_not_found(tmp_path):
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_not_found", "adapter_config.json")
