"""The numbers of a base model's layers as its files hold them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramux_adapters import AdapterUnsupportedFeature
from loramux_adapters.base_weights import BaseWeights

NAME, D_IN, D_OUT = "model.layers.0.q_proj", 300, 140


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> BaseWeights:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return BaseWeights(folder)


def rows(weights: BaseWeights, transposed: bool = False) -> torch.Tensor:
    return torch.cat(list(weights.row_blocks(NAME, (D_IN, D_OUT), transposed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("elements", [1, 1000, 1 << 22])
def test_floats_row_by_row(
    tmp_path: Path, dtype: torch.dtype, transposed: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_adapters.base_weights.BLOCK_ELEMENTS", elements)
    weight = torch.randn(D_OUT, D_IN).to(dtype)
    weights = write(tmp_path, {f"{NAME}.weight": weight.T.contiguous() if transposed else weight})
    assert torch.equal(rows(weights, transposed), weight.double())


def test_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    """Its names begin one part later."""
    weight, bias = torch.randn(D_OUT, D_IN), torch.randn(D_OUT)
    weights = write(tmp_path, {"layers.0.q_proj.weight": weight, "layers.0.q_proj.bias": bias})
    assert torch.equal(rows(weights), weight.double()) and torch.equal(weights.bias(NAME, D_OUT), bias)


@pytest.mark.parametrize("shape", [(1,), (), (D_OUT, 1), (D_OUT,)])
def test_fp8_with_a_scale_for_all_or_for_each_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scale = torch.randn(D_OUT, D_IN).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    weights = write(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale})
    factors = scale.double().reshape(-1, 1)
    assert torch.equal(rows(weights), weight.double() * factors)


@pytest.mark.parametrize("elements", [5000, 1 << 22])
def test_fp8_with_a_scale_for_each_block(tmp_path: Path, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end beyond the weight, and pieces that end within a block."""
    monkeypatch.setattr("loramux_adapters.base_weights.BLOCK_ELEMENTS", elements)
    weight, scale = torch.randn(D_OUT, D_IN).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.5
    weights = write(
        tmp_path,
        {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scale},
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    for row, column in ((0, 0), (127, 128), (128, 255), (139, 299)):
        expected = weight[row, column].double() * scale[row // 128, column // 128].double()
        assert rows(weights)[row, column] == expected


FP8 = torch.ones(D_OUT, D_IN).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({}, "weight"),
        ({"weight": torch.ones(D_IN, D_OUT)}, "weight"),
        ({"weight": FP8}, "weight"),
        ({"weight": torch.ones(D_OUT, D_IN), "weight_scale": torch.ones(1)}, "weight"),
        ({"weight": torch.ones(D_OUT, D_IN).to(torch.int8), "weight_scale": torch.ones(1)}, "weight"),
        ({"weight": FP8, "weight_scale": torch.ones(D_OUT - 1)}, "weight_scale"),
        ({"weight": FP8, "weight_scale": torch.ones(1, D_IN)}, "weight_scale"),
        ({"weight": FP8, "weight_scale_inv": torch.ones(2, 3)}, "weight_scale_inv"),
        ({"qweight": torch.ones(8, 8, dtype=torch.int32), "scales": torch.ones(1)}, "weight"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor], field: str) -> None:
    weights = write(tmp_path, {f"{NAME}.{key}": value for key, value in tensors.items()} or {"x": torch.ones(1)})
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        rows(weights)
    assert refusal.value.field == f"{NAME}.{field}" and refusal.value.hint


@pytest.mark.parametrize("bias", [None, torch.ones(D_OUT + 1), torch.ones(D_OUT, dtype=torch.int8)])
def test_a_bias_that_is_none(tmp_path: Path, bias: torch.Tensor | None) -> None:
    weights = write(tmp_path, {"x": torch.ones(1)} if bias is None else {f"{NAME}.bias": bias})
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        weights.bias(NAME, D_OUT)
    assert refusal.value.field == f"{NAME}.bias"


@pytest.mark.parametrize("index", [None, "{", "[]", '{"weight_map": 3}', "{}"])
def test_a_folder_without_weights_that_can_be_read(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        rows(BaseWeights(tmp_path))
    assert refusal.value.field == "model.safetensors"


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    index = {"weight_map": {f"{NAME}.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        rows(BaseWeights(tmp_path))
    assert refusal.value.field == f"{NAME}.weight"


def test_a_hub_id_that_was_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = BaseWeights("nobody/has-such-a-model")
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        rows(weights)
    assert "hf download nobody/has-such-a-model" in refusal.value.hint
    assert weights.identity() == ""


def test_the_identity_changes_with_the_files(tmp_path: Path) -> None:
    assert BaseWeights(tmp_path).identity() == ""
    seen = set()
    for value in (torch.ones(1), torch.ones(2)):
        weights = write(tmp_path, {"x": value})
        assert weights.identity() == weights.identity()
        seen.add(weights.identity())
    assert len(seen) == 2
