"""What training left in merged weights comes back as an adapter, with the error that is stated; the rest is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loramux_adapters import AdapterError, BaseModel, lower
from loramux_adapters.extract import Extracted, extract, merged_weights
from loramux_adapters.native import digest_of, write_native

from .checkpoints import BASE, with_weights, write_adapter
from .form import site_delta
from .layouts import chain

Tensors = dict[str, torch.Tensor]
Q, UP, DOWN = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))


def base_tensors(seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensors:
    """The tiny model's, with what is no linear's weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{module}.weight": widths[::-1] for module, widths in BASE.linears.items()}
    shapes |= {"model.norm.weight": (24,), "model.embed_tokens.weight": (10, 24), f"{Q}.bias": (24,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def merged(tensors: Tensors, deltas: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Tensors:
    """The base's tensors with what was trained added to them."""
    sums = {f"{m}.weight": (tensors[f"{m}.weight"].double() + delta).to(dtype) for m, delta in deltas.items()}
    return tensors | sums


def run(folder: Path, before: Tensors, after: Tensors, base: BaseModel = BASE, **options: Any) -> Extracted:
    with_weights(folder / "merged", base, after)
    return extract(merged_weights(folder / "merged"), with_weights(folder / "base", base, before), **options)


def product(rank: int, module: str, seed: int = 0) -> torch.Tensor:
    """ΔW of that rank, with singular values that fall by half."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = BASE.linears[module]
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=generator).double())[0] for n in (d_out, d_in))
    return (u * 0.5 ** torch.arange(rank)) @ v.T


def matrix(found: Extracted, module: str) -> torch.Tensor:
    site = found.adapter.sites[module]
    return site_delta(site, {}, torch.eye(site.a.shape[1])).T


def test_boosters_that_were_merged_give_the_answers_of_those_that_were_kept(tmp_path: Path) -> None:
    """XGBLoRA, trained in float32: the same adapter from either, layers that were never chosen left out."""
    config = chain.make_config(r=1, lora_alpha=1)
    kept = lower(write_adapter(tmp_path / "kept", config, chain.make_tensors(config)), BASE)
    before = base_tensors()
    deltas = {
        module: site_delta(site, {}, torch.eye(site.a.shape[1])).T.double() for module, site in kept.sites.items()
    }
    found = run(tmp_path, before, merged(before, deltas), error=1e-4)
    assert found.adapter.ranks == kept.ranks and found.errors.keys() == kept.sites.keys()
    for module, delta in deltas.items():
        assert (matrix(found, module) - delta).norm() < 2e-6 * before[f"{module}.weight"].norm()


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 20), wanted=st.integers(1, 30), seed=st.integers(0, 999))
def test_a_rank_gives_the_nearest_matrix_and_its_error(
    tmp_path_factory: pytest.TempPathFactory, rank: int, wanted: int, seed: int
) -> None:
    folder, before, delta = tmp_path_factory.mktemp("extract"), base_tensors(seed), product(rank, UP, seed)
    # W0 and the sum in float32: what was added is their difference.
    after = merged(before, {UP: delta})
    added = after[f"{UP}.weight"].double() - before[f"{UP}.weight"].double()
    found = run(folder, before, after, rank=wanted)
    assert list(found.adapter.sites) == [UP] and found.adapter.ranks[UP] <= wanted
    lost = (matrix(found, UP) - added).norm() / added.norm()
    values = torch.linalg.svdvals(added)
    assert found.errors[UP] == pytest.approx(float(lost), rel=1e-6, abs=1e-12)
    assert found.errors[UP] == pytest.approx(float(values[wanted:].norm() / values.norm()), rel=1e-4, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 20), error=st.floats(1e-5, 0.9), seed=st.integers(0, 999))
def test_a_bound_is_kept_by_the_lowest_rank_that_can(
    tmp_path_factory: pytest.TempPathFactory, rank: int, error: float, seed: int
) -> None:
    folder, before = tmp_path_factory.mktemp("extract"), base_tensors(seed)
    after = merged(before, {UP: product(rank, UP, seed)})
    added = after[f"{UP}.weight"].double() - before[f"{UP}.weight"].double()
    found = run(folder, before, after, error=error)
    values, least = torch.linalg.svdvals(added), found.adapter.ranks[UP]
    assert float((matrix(found, UP) - added).norm() / added.norm()) <= error * (1 + 1e-9)
    assert least <= rank and float(values[least - 1 :].norm() / values.norm()) > error


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_layer_much_larger_than_the_rank(tmp_path: Path, noise: float) -> None:
    """By the range finder: exact where the rank suffices, near the best where it does not, and the same every time."""
    base = BaseModel("large", {Q: (300, 500)})
    draw = torch.Generator().manual_seed(0)
    before = {f"{Q}.weight": torch.randn(500, 300, generator=draw)}
    trained = torch.randn(500, 6, generator=draw).double() @ torch.randn(6, 300, generator=draw).double()
    trained += noise * torch.randn(500, 300, generator=draw)
    after = {f"{Q}.weight": (before[f"{Q}.weight"].double() + trained).float()}
    added = after[f"{Q}.weight"].double() - before[f"{Q}.weight"].double()
    values, found = torch.linalg.svdvals(added), run(tmp_path, before, after, base, rank=6)
    best, lost = float(values[6:].norm() / values.norm()), float((matrix(found, Q) - added).norm() / added.norm())
    assert found.errors[Q] == pytest.approx(lost, rel=1e-5) and best * (1 - 1e-6) <= lost <= best * 1.001 + 1e-7
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = run(tmp_path, before, after, base, rank=6)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert digest_of(found.adapter) == digest_of(again.adapter), "and do not matter"


def test_the_rounding_of_16_bits_is_part_of_the_error(tmp_path: Path) -> None:
    """The rank that was trained leaves what the merge rounded away, and says so; no low rank keeps a small bound."""
    before, delta = base_tensors(dtype=torch.bfloat16), product(4, UP) / 4
    after = merged(before, {UP: delta}, torch.bfloat16)
    found = run(tmp_path, before, after, rank=4)
    rounding = after[f"{UP}.weight"].double() - before[f"{UP}.weight"].double() - delta
    assert 0.3 < found.errors[UP] / float(rounding.norm() / delta.norm()) < 1.1
    with pytest.raises(AdapterError, match="16 bits"):
        run(tmp_path, before, after, error=found.errors[UP] / 2, max_rank=4)


def test_every_layers_error_is_said_wherever_the_adapter_is_looked_at(tmp_path: Path) -> None:
    before = base_tensors()
    changed = [module for module in BASE.linears if module.endswith(("q_proj", "down_proj"))]
    found = run(tmp_path, before, merged(before, {m: product(4, m) for m in changed}), rank=2)
    path = write_native(tmp_path / "found.safetensors", found.adapter, "tiny")
    first, *each = lower(path, BASE).warnings
    worst = max(found.errors, key=lambda module: found.errors[module])
    assert f"{found.errors[worst]:.3g}" in first and worst in first
    assert [line.partition(" by layer: ")[0] for line in each] == [
        f"Error of model.layers.*.{name}" for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    for module, error in found.errors.items():
        layer, kind = module.split(".")[2], module.split(".", 3)[3]
        assert any(kind in line and f"{layer} {error:.2g}" in line for line in each)


def test_a_base_whose_weights_lie_across_and_names_without_the_prefix(tmp_path: Path) -> None:
    base = BaseModel("gpt", {"transformer.h.0.c_fc": (20, 30)}, transposed=frozenset({"transformer.h.0.c_fc"}))
    before = {"transformer.h.0.c_fc.weight": torch.randn(20, 30), "transformer.wte.weight": torch.randn(5, 20)}
    delta = torch.randn(30, 2) @ torch.randn(2, 20)
    after = {"h.0.c_fc.weight": before["transformer.h.0.c_fc.weight"] + delta.T} | {
        "wte.weight": before["transformer.wte.weight"].clone()
    }
    found = run(tmp_path, before, after, base, rank=2)
    torch.testing.assert_close(matrix(found, "transformer.h.0.c_fc"), delta.double(), rtol=1e-4, atol=1e-5)


def spoiled(**changes: Any) -> Tensors:
    """A sound merge but for these; None: gone."""
    before = base_tensors()
    tensors = merged(before, {Q: product(4, Q)})
    for name, value in changes.items():
        tensors[name] = value
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("after", "options", "code", "field"),
    [
        (base_tensors(), {"rank": 2}, "adapter_no_effect", None),
        (spoiled(), {}, "adapter_config_invalid", "rank"),
        (spoiled(), {"rank": 2, "error": 0.1}, "adapter_config_invalid", "rank"),
        (spoiled(), {"rank": 0}, "adapter_config_invalid", "rank"),
        (spoiled(), {"error": 1.0}, "adapter_config_invalid", "error"),
        (spoiled(), {"error": 0.1, "max_rank": 0}, "adapter_config_invalid", "max_rank"),
        (spoiled(), {"error": 1e-3, "max_rank": 3}, "adapter_unsupported_feature", Q),
        (spoiled(), {"error": 1e-12}, "adapter_unsupported_feature", Q),
        (spoiled(**{f"{Q}.weight": torch.ones(24, 23)}), {"rank": 2}, "adapter_unsupported_feature", f"{Q}.weight"),
        (spoiled(**{f"{Q}.weight": None}), {"rank": 2}, "adapter_unsupported_feature", f"{Q}.weight"),
        (spoiled(**{f"{Q}.weight": torch.ones(24, 24).int()}), {"rank": 2}, "adapter_unsupported_feature",
         f"{Q}.weight"),
        (spoiled(**{f"{Q}.weight": torch.full((24, 24), torch.nan)}), {"rank": 2}, "adapter_not_finite",
         f"{Q}.weight"),
        (spoiled(**{f"{Q}.bias": torch.ones(24)}), {"rank": 2}, "adapter_unsupported_feature",
         "layers.1.self_attn.q_proj.bias"),
        (spoiled(**{"model.norm.weight": torch.ones(24)}), {"rank": 2}, "adapter_unsupported_feature", "norm.weight"),
        (spoiled(**{"model.norm.weight": torch.ones(23)}), {"rank": 2}, "adapter_unsupported_feature", "norm.weight"),
        (spoiled(**{"model.norm.weight": None}), {"rank": 2}, "adapter_unsupported_feature", "norm.weight"),
        (spoiled(**{"lm_head.weight": torch.ones(10, 24)}), {"rank": 2}, "adapter_unsupported_feature",
         "lm_head.weight"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, after: Tensors, options: dict[str, Any], code: str, field: str | None) -> None:
    with pytest.raises(AdapterError) as refusal:
        run(tmp_path, base_tensors(), after, **options)
    assert (refusal.value.code, refusal.value.field) == (code, field) and refusal.value.hint


def test_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    with_weights(tmp_path, BASE, spoiled())
    with pytest.raises(AdapterError, match="not at hand") as refusal:
        extract(merged_weights(tmp_path), BASE, rank=2)
    assert refusal.value.code == "adapter_unsupported_feature"


def test_a_merged_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="merged model's folder"):
        extract(merged_weights(tmp_path), with_weights(tmp_path / "base", BASE, base_tensors()), rank=2)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_whole_model_given_as_an_adapter_is_told_what_makes_one_of_it(tmp_path: Path, name: str) -> None:
    save_file(spoiled(), tmp_path / name)
    with pytest.raises(AdapterError, match="loramux adapters extract") as refusal:
        lower(tmp_path, BASE)
    assert refusal.value.code == "adapter_not_found"
