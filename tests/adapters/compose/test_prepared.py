"""One adapter out of prepared ones: kept by content, bounded in rank, with one task of those that have several."""

from dataclasses import replace

import pytest
import torch

from loramux_adapters import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnsupportedFeature,
    open_artefact,
    prepare,
)
from loramux_adapters.compose.prepared import Part, Router, compose
from loramux_adapters.gate import PostMap, Select
from loramux_adapters.native import digest_of
from loramux_adapters.prepare import keep

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..layouts import moelora
from .plain import MODULES, plain


def test_the_artefact_is_kept_by_content(tmp_path):
    prepared = [keep(plain(seed), BASE.name, tmp_path) for seed in (1, 2)]
    made = [Part(name, one, weight) for name, one, weight in zip("ab", prepared, (0.7, 0.3), strict=True)]
    cache = tmp_path / "composed"
    artefact = compose(made, base=BASE, cache=cache, max_rank=6)
    assert compose(made, base=BASE, cache=cache, max_rank=6) == artefact
    assert [path.name for path in cache.iterdir()] == [f"{artefact.digest}.safetensors"]
    assert (artefact.summary.method, artefact.summary.rank) == ("linear", 6)
    assert digest_of(open_artefact(artefact.path)) == artefact.digest
    with pytest.raises(AdapterTooLarge, match=r"add up to 6 \(3 \+ 3\).*is 5"):
        compose(made, base=BASE, cache=cache, max_rank=5)
    prepared[0].path.write_bytes(b"damaged")
    with pytest.raises(AdapterCorrupt):
        compose(made, base=BASE, cache=cache, max_rank=6)
    prepared[0].path.unlink()
    with pytest.raises(AdapterNotFound):
        compose(made, base=BASE, cache=cache, max_rank=6)


def test_a_task_is_a_part(tmp_path):
    """Two tasks of one MOELoRA, each as its own formula says, and the default where none is given."""
    config = moelora.make_config(task_id=1)
    tensors = moelora.make_tensors(config)
    whole = prepare(write_adapter(tmp_path / "med", config, tensors), BASE, tmp_path / "cache")
    assert whole.summary.tasks == moelora.TASKS + 1
    parts = [Part("med", whole, weight, task) for weight, task in ((0.5, 0), (-1.0, 3), (2.0, None))]
    made = open_artefact(compose(parts, base=BASE, cache=tmp_path / "composed", max_rank=64).path)
    x = torch.randn(3, 24)
    for module, site in made.sites.items():
        expected = sum(
            weight * moelora.delta(config | {"task_id": task}, tensors, module, x)
            for weight, task in ((0.5, 0), (-1.0, 3), (2.0, 1))
        )
        torch.testing.assert_close(site_delta(site, {}, x), expected, rtol=1e-5, atol=1e-6)


def prepared(folder, *adapters, task=None):
    return [Part(f"n{i}", keep(adapter, BASE.name, folder), 1.0, task) for i, adapter in enumerate(adapters)]


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0)])
def test_a_router_computes_arrows_formula(tmp_path, top_k, temperature):
    """Over unequal ranks, layers and dtypes, from the factors of the parts alone."""
    adapters = [plain(1), plain(2, MODULES[:2], rank=5), plain(3, rank=2, dtype=torch.bfloat16)]
    parts = prepared(tmp_path, *adapters)
    artefact = compose(parts, Router(top_k, temperature), base=BASE, cache=tmp_path / "composed", max_rank=10)
    made = open_artefact(artefact.path)
    assert (artefact.summary.method, artefact.summary.experts) == ("arrow", 3) and set(made.sites) == set(MODULES)
    for module, site in made.sites.items():
        gate = made.gates[site.gate]
        assert (gate.select, gate.k, gate.post, gate.temperature) == (Select.TOP_K, top_k, PostMap.ABS, temperature)
        d_in, d_out = BASE.linears[module]
        deltas = [
            (one.sites[module].b.double().T * one.sites[module].scale.double()) @ one.sites[module].a.double()
            if module in one.sites
            else torch.zeros(d_out, d_in, dtype=torch.float64)
            for one in adapters
        ]
        heads = torch.stack([torch.linalg.svd(delta).Vh[0] if delta.any() else delta[0] for delta in deltas])
        x = torch.randn(50, d_in, generator=torch.Generator().manual_seed(7)).double()
        scores, chosen = ((x @ heads.T).abs() / temperature).topk(top_k)
        g = torch.zeros(len(x), 3, dtype=torch.float64).scatter(1, chosen, torch.softmax(scores, 1))
        expected = sum(g[:, e, None] * (x @ delta.T) for e, delta in enumerate(deltas))
        # Prototypes are kept in float32.
        torch.testing.assert_close(site_delta(site, made.gates, x), expected, rtol=1e-4, atol=1e-4)


def test_a_router_is_its_content(tmp_path):
    """Options and the order of the experts are in it, names are not."""
    parts = prepared(tmp_path, plain(1), plain(2), plain(3))

    def digest(parts, *options):
        return compose(parts, Router(*options), base=BASE, cache=tmp_path / "composed", max_rank=9).digest

    first = digest(parts, 2)
    assert digest([replace(part, name="other") for part in parts], 2, 1.0) == first
    others = {digest(parts[::-1], 2), digest(parts[:2], 2), digest(parts, 1), digest(parts, 2, 0.5)}
    assert len(others | {first}) == 5
    assert len(list((tmp_path / "composed").iterdir())) == 5
    with pytest.raises(AdapterTooLarge, match="3 \\+ 3 \\+ 3"):
        compose(parts, Router(2), base=BASE, cache=tmp_path / "composed", max_rank=8)


@pytest.mark.parametrize(
    ("odd", "field"),
    [({"magnitude": torch.ones(24)}, "magnitude"), ({"bias": torch.ones(24)}, "bias"), (None, "gates")],
)
def test_what_a_router_cannot_route_is_refused_by_name(tmp_path, odd, field):
    plains = [plain(seed) for seed in (1, 2)]
    if odd is None:
        made = compose(prepared(tmp_path, *plains), Router(1), base=BASE, cache=tmp_path, max_rank=64)
        part = Part("odd", made, 1.0)
    else:
        module = next(name for name in MODULES if BASE.linears[name][1] == 24)
        site = replace(plains[0].sites[module], **odd)
        part = Part("odd", keep(replace(plains[0], sites={module: site}), BASE.name, tmp_path), 1.0)
    with pytest.raises(AdapterUnsupportedFeature, match=f"'odd'.*{field}") as refusal:
        compose([*prepared(tmp_path, *plains), part], Router(1), base=BASE, cache=tmp_path / "composed", max_rank=64)
    assert refusal.value.field == "odd" and not (tmp_path / "composed").exists()


def test_tasks_are_experts(tmp_path):
    """Of one adapter for several tasks, beside its default."""
    config = moelora.make_config(task_id=1)
    whole = prepare(write_adapter(tmp_path / "med", config, moelora.make_tensors(config)), BASE, tmp_path / "cache")
    parts = [Part("med", whole, 1.0, task) for task in (0, 3, None)]
    made = open_artefact(compose(parts, Router(3), base=BASE, cache=tmp_path / "composed", max_rank=64).path)
    assert whole.summary.warnings and not made.warnings
    for module, site in made.sites.items():
        for expert, task in enumerate((0, 3, 1)):
            own = open_artefact(whole.path, task).sites[module]
            assert torch.equal(site.scale[site.expert == expert], own.scale)
