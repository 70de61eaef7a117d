"""Every layout that is known: claimed by one method, named, read or refused with the reason; spoilt, refused by name.

What only one of them has is in `methods/test_<name>.py`.
"""

import pytest
import torch

from loramux_adapters import AdapterError, lower, prepare, unserved
from loramux_adapters.detect import find_layout
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from .checkpoints import BASE, make_config
from .layouts.draw import Tensors
from .layouts.table import CONFIG, SAMPLES, Sample

READ = [sample for sample in SAMPLES if sample.read]
FILES = [sample for sample in READ if sample.make]
NAMED = {str(layout): layout for method in METHODS for layout in method.abilities.layouts}


def label(sample: Sample) -> str:
    return f"{sample.layout} {'' if sample.served else 'unserved'}"


def every(samples):
    return pytest.mark.parametrize("sample", samples, ids=label)


def refusal_of(folder, base) -> AdapterError:
    with pytest.raises(AdapterError) as refusal:
        lower(folder, base)
    assert refusal.value.hint
    return refusal.value


def names_it(error: AdapterError, name: str) -> bool:
    """With or without the prefix that a code base puts before the module's name, and the adapter's own name."""
    name = name.replace(".default.", ".")
    return error.field is not None and (error.field.endswith(name) or name.endswith(error.field))


def needed(sample: Sample, tensors: Tensors) -> list[str]:
    """Tensors of the first module and of the whole adapter, less those that may be absent."""
    first = min(module for module in BASE.linears if any(module.removeprefix("model.") in name for name in tensors))
    layer = first.removeprefix("model.")
    own = [name for name in tensors if layer in name or "layers." not in name]
    return [name for name in own if not any(spare in name for spare in sample.spare)]


@every(SAMPLES)
def test_one_method_claims_it_and_it_is_named(sample, tmp_path):
    folder = AdapterFolder(sample.write(tmp_path))
    assert [method.name for method in METHODS if method.detect(folder)] == [sample.method]
    assert str(find_layout(folder)) == sample.layout


@every(SAMPLES)
def test_it_is_served_read_or_refused_with_the_reason(sample, base, tmp_path):
    folder = sample.write(tmp_path / "adapter")
    if sample.served:
        prepare(folder, base, tmp_path / "cache")
        return
    if sample.read:
        assert unserved(lower(folder, base))
    with pytest.raises(AdapterError) as refusal:
        prepare(folder, base, tmp_path / "cache")
    assert refusal.value.code == "adapter_unsupported_feature" and refusal.value.field
    if not sample.read:
        (method,) = (method for method in METHODS if method.name == sample.method)
        assert method.abilities.why in refusal.value.message


@every(FILES)
def test_no_tensor_may_be_missing(sample, base, tmp_path):
    whole = sample.tensors()
    for i, name in enumerate(needed(sample, whole)):
        error = refusal_of(sample.write(tmp_path / str(i), tensors={n: t for n, t in whole.items() if n != name}), base)
        assert error.code == "adapter_missing_tensor" and names_it(error, name)


@every(FILES)
def test_no_tensor_may_be_wider(sample, base, tmp_path):
    """A router of the wrong width among them."""
    for i, (name, tensor) in enumerate(sample.tensors().items()):
        wider = torch.cat((tensor, tensor[..., :1]), dim=-1).clone()
        error = refusal_of(sample.write(tmp_path / str(i), tensors=sample.tensors() | {name: wider}), base)
        assert error.code == "adapter_shape_mismatch" and error.field == name


@every(FILES)
def test_no_number_may_be_nan(sample, base, tmp_path):
    for i, name in enumerate(needed(sample, sample.tensors())):
        tensors = sample.tensors()
        tensors[name].view(-1)[tensors[name].numel() // 2] = float("nan")
        # Where a tensor is repeated, its copy differs now.
        assert refusal_of(sample.write(tmp_path / str(i), tensors=tensors), base).code in (
            "adapter_not_finite",
            "adapter_unknown_tensor",
        )


@every(FILES)
def test_no_tensor_may_be_too_many(sample, base, tmp_path):
    name = needed(sample, sample.tensors())[0]
    more = f"{name.rpartition('.lora_')[0] or name.rpartition('.')[0]}.lora_other.weight"
    error = refusal_of(sample.write(tmp_path, tensors=sample.tensors() | {more: torch.ones(1)}), base)
    assert error.code in ("adapter_unknown_tensor", "adapter_unsupported_feature") and error.field == more


@every([sample for sample in READ if sample.rank])
def test_a_rank_that_lies_is_refused(sample, base, tmp_path):
    lies = dict(sample.config) | {sample.rank: sample.config[sample.rank] + 1}
    error = refusal_of(sample.write(tmp_path, config=lies), base)
    by_shape = error.code == "adapter_shape_mismatch" and error.field in sample.tensors()
    assert by_shape or (error.code, error.field) == ("adapter_config_invalid", sample.rank)


@every([sample for sample in READ if sample.alpha])
@pytest.mark.parametrize("alpha", ["sixteen", None, True, 1e-60])
def test_a_foreign_alpha_is_refused(sample, alpha, base, tmp_path):
    error = refusal_of(sample.write(tmp_path, config=dict(sample.config) | {sample.alpha: alpha}), base)
    assert (error.code, error.field) == ("adapter_config_invalid", sample.alpha)


@every(READ)
def test_fields_of_other_code_bases_are_refused(sample, base, tmp_path):
    foreign = {"entirely_new": 1, **sample.foreign} | ({} if sample.rslora else {"use_rslora": True})
    for i, (field, value) in enumerate(foreign.items()):
        error = refusal_of(sample.write(tmp_path / str(i), config=dict(sample.config) | {field: value}), base)
        assert error.code in ("adapter_config_invalid", "adapter_unsupported_feature")
        assert error.field == field, (field, error)


TOLD = [sample for sample in FILES if NAMED[sample.layout].keys]


@every(TOLD)
def test_without_a_config_the_names_tell_whose_it_is(sample, base, tmp_path):
    folder = sample.write(tmp_path)
    (folder / sample.file).unlink()
    error = refusal_of(folder, base)
    assert (error.code, error.field) == ("adapter_not_found", CONFIG)
    assert sample.layout in error.message and NAMED[sample.layout].sign in error.hint


@every([sample for sample in TOLD if sample.file == CONFIG])
@pytest.mark.parametrize("peft_type", ["LORA", "SOMETHING"])
def test_with_the_config_of_another_kind_the_names_tell_whose_it_is(sample, peft_type, base, tmp_path):
    error = refusal_of(sample.write(tmp_path, config=make_config(peft_type=peft_type)), base)
    assert sample.layout in error.message and NAMED[sample.layout].sign in error.hint


def test_the_layouts_are_those_of_the_methods():
    """A layout without a sample is one that no test reads. The native format has its own tests."""
    assert {sample.layout for sample in SAMPLES} == NAMED.keys() - {"native (loramux)"}
    assert len(NAMED) == sum(len(method.abilities.layouts) for method in METHODS)
