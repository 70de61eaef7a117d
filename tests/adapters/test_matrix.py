"""What every method says of itself is what its samples show, and the README has the table that is made of it.

That what is served is *exact* is the subject of `methods/test_<name>.py` and, on the real base, `e2e/test_methods.py`.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux_adapters import AdapterError, BaseModel, LoweredAdapter, lower, matrix, prepare, unserved
from loramux_adapters.abilities import OUR_READING, OURS
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS, Method
from loramux_adapters.native import digest_of, write_native
from loramux_adapters.tasks import at_task

from .checkpoints import BASE
from .form import site_delta
from .layouts.table import SAMPLES, Sample

README = Path(__file__).parents[2] / "adapters/README.md"


def samples_of(method: Method) -> list[Sample]:
    return [sample for sample in SAMPLES if sample.method == method.name]


def lowered(method: Method, base: BaseModel, tmp_path: Path) -> list[LoweredAdapter]:
    """Every sample of the method that is read, in the one form."""
    read = [sample for sample in samples_of(method) if sample.read]
    return [at_task(lower(sample.write(tmp_path / str(i)), base)) for i, sample in enumerate(read)]


each = pytest.mark.parametrize("method", [m for m in METHODS if m.name != "native"], ids=lambda method: method.name)


@each
def test_read_is_what_can_be_lowered(method, base, tmp_path):
    for i, sample in enumerate(samples_of(method)):
        try:
            lower(sample.write(tmp_path / str(i)), base)
        except AdapterError:
            assert not method.abilities.read
        else:
            assert method.abilities.read


@each
def test_serve_is_what_prepare_takes(method, base, tmp_path):
    """All, some or none of its samples; none needs a reason."""
    taken = set()
    for i, sample in enumerate(samples_of(method)):
        try:
            prepare(sample.write(tmp_path / str(i)), base, tmp_path / "cache")
        except AdapterError:
            taken.add(False)
        else:
            taken.add(True)
    assert taken == ({True, False} if isinstance(method.abilities.serve, str) else {method.abilities.serve})
    assert bool(method.abilities.why) == (method.abilities.serve is False)


@each
def test_router_is_the_kind_of_its_gates(method, base, tmp_path):
    adapters = lowered(method, base, tmp_path)
    kinds = {gate.kind.value for adapter in adapters for gate in adapter.gates.values()}
    if method.abilities.read:
        assert kinds == ({method.abilities.router} - {"none"})


@each
def test_with_a_prefix_cache_a_token_depends_on_no_later_one(method, base, tmp_path):
    """A prefix alone gets what it gets with more tokens behind it; otherwise its blocks could not be shared."""
    adapters = [adapter for adapter in lowered(method, base, tmp_path) if not unserved(adapter)]
    assert method.abilities.prefix_cache or not adapters
    assert any(adapter.limited for adapter in adapters) == isinstance(method.abilities.prefix_cache, str)
    for adapter in adapters:
        for module, site in adapter.sites.items():
            x = torch.randn(9, BASE.linears[module][0], generator=torch.Generator().manual_seed(0))
            added = replace(site, magnitude=None, variance=None)  # both are the same for every token
            whole, prefix = (site_delta(added, adapter.gates, part) for part in (x, x[:5]))
            torch.testing.assert_close(whole[:5], prefix, rtol=1e-12, atol=1e-12)


@each
def test_posterior_is_what_its_adapters_have(method, base, tmp_path):
    for adapter in lowered(method, base, tmp_path):
        assert adapter.posterior == method.abilities.posterior


@each
def test_on_a_quantised_base_means_lowered_without_its_weights(method, tmp_path):
    """BASE has names and widths only: it could be one in any number format."""
    for i, sample in enumerate(samples_of(method) if method.abilities.quantised_base is True else ()):
        if sample.read:
            lower(sample.write(tmp_path / str(i)), BASE)


@each
def test_exactness_is_qualified_where_no_code_is_public(method):
    """A paper that was read in full, or code: exact. OUR_READING is for nothing else."""
    if method.abilities.exact is not True:
        assert method.abilities.exact == OUR_READING
        assert {layout.origin for layout in method.abilities.layouts} == {OURS}


def test_write_is_peft_s_lora_and_the_native_format_which_keeps_every_adapter(base, tmp_path):
    """What the first keeps is in `peft/test_export.py`."""
    assert [method.name for method in METHODS if method.abilities.write] == ["native", "lora"]
    for i, sample in enumerate(sample for sample in SAMPLES if sample.read):
        adapter = lower(sample.write(tmp_path / str(i)), base)
        path = write_native(tmp_path / f"{i}.safetensors", adapter, base.name)
        assert [m.name for m in METHODS if m.detect(AdapterFolder(path))] == ["native"]
        assert digest_of(lower(path, base)) == digest_of(adapter)


def test_the_readme_is_up_to_date():
    text = README.read_text()
    assert matrix.updated(text) == text, "adapters/README.md has an old table of methods: run `make matrix`"


def test_a_file_is_updated_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    matrix.main([str(path)])
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == [method.name for method in METHODS]
    assert len({line.count(" | ") for line in lines if line.startswith("|")}) == 1


@pytest.mark.parametrize("text", ["", matrix.BEGIN, matrix.END, f"{matrix.BEGIN}\n{matrix.BEGIN}\n{matrix.END}"])
def test_a_file_without_the_markers_is_left_alone(text, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="one line"):
        matrix.main([str(path)])
    assert path.read_text() == text


def test_a_refused_method_has_its_reason_in_the_table():
    table = matrix.markdown()
    for method in METHODS:
        assert method.abilities.why in table
