"""ResLoRA: block shortcuts are served exactly, the others are kept, what its code approximates is refused.

The reference does what `ResLoraLinear.forward` in its `layers.py` does.
"""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loramux_adapters import AdapterError, BaseModel, check_servable, lower, prepare, unserved
from loramux_adapters.lowered import CarryKind

from ..checkpoints import BASE, write_adapter
from ..form import logits, site_delta
from ..hooks import hooked_logits
from ..layouts.reslora import CONFIG_FILE, RANK, make_config, make_tensors
from .refusals import assert_refused, drop, poison, put

SITE = "model.layers.1.self_attn.q_proj.loras"


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Reference:
    """Its forward pass in float64: layers of a kind in order, each knows the one before if the widths agree."""

    def __init__(self, config, tensors, base, targets=("q_proj", "up_proj", "down_proj")):
        self.flag, self.scale = config["res_flag"], config["lora_alpha"] / config["rank"]
        self.most = 999 if config["pre_num"] == -1 else config["pre_num"]
        self.loras = {}
        for name, tensor in tensors.items():
            module, _, rest = name.partition(".loras.")
            self.loras.setdefault(module, {}).setdefault(int(rest[0]), {})[rest[-1]] = tensor.double()
        self.before, self.inputs = {}, {}
        for target in targets:
            group = [module for module in base.linears if target in module]
            for last, module in pairwise(group):
                if base.linears[last] == base.linears[module]:
                    self.before[module] = last

    def ancestors(self, module):
        found = []
        while module in self.before and len(found) < self.most:
            found.append(module := self.before[module])
        return found

    def delta(self, module, x):
        self.inputs[module] = x
        total = 0
        for i, lora in self.loras[module].items():
            a, b = lora["A"], lora["B"]
            if self.flag == 1:
                previous = self.inputs[self.before[module]] if module in self.before else x
                total = total + (x + previous) @ a.T @ b.T
            elif self.flag == 3:
                u = x @ a.T
                for other in self.ancestors(module):
                    u = u + self.inputs[other] @ self.loras[other][i]["A"].T
                total = total + u @ b.T
            else:
                total = total + x @ a.T @ b.T
                for other in self.ancestors(module) if self.flag == 2 else ():
                    total = total + x @ self.loras[other][i]["A"].T @ self.loras[other][i]["B"].T
        return self.scale * total

    def logits(self, model, tokens):
        return hooked_logits(model, {module: partial(self.delta, module) for module in self.loras}, tokens)


def carried_logits(model, adapter, tokens):
    """The one form with a carry, from its definition in `lowered.py`."""
    inputs = {}

    def delta(module, x):
        inputs[module] = x
        site = adapter.sites[module]
        u, carry = x @ site.a.double().T, site.carry
        if carry is not None and carry.kind is CarryKind.AHEAD_ROWS:
            u = u + inputs[carry.source] @ site.a.double().T
        elif carry is not None:
            source = carry.source
            for _ in range(carry.depth):
                other = adapter.sites[source]
                u = u + inputs[source] @ other.a.double().T
                source = other.carry.source if other.carry else None
        return (u * site.scale.double()) @ site.b.double()

    return hooked_logits(model, {module: partial(delta, module) for module in adapter.sites}, tokens)


@pytest.mark.parametrize("options", [{}, {"pre_num": 1}, {"pre_num": 0}, {"res_flag": 0}, {"merge_flag": 4}])
@pytest.mark.parametrize(("last", "dtype"), [(0, torch.float32), (1, torch.bfloat16)])
def test_block_shortcuts_have_the_logits_of_its_code(tmp_path, reference, options, last, dtype):
    tiny = reference("llama")
    config = make_config(start_index=last, lora_num=2, **options)
    tensors = make_tensors(config, tiny.base, dtype)
    adapter = lower(write(tmp_path, config, tensors), tiny.base)
    check_servable(adapter)
    assert adapter.method == "reslora" and len(adapter.sites) == 6
    linked = config["res_flag"] == 2 and config["pre_num"] != 0
    assert adapter.ranks["model.layers.1.self_attn.q_proj"] == RANK * (last + 1) * (2 if linked else 1)
    expected = Reference(config, tensors, tiny.base).logits(tiny.model, tiny.tokens)
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-10
    assert (expected - tiny.base_logits()).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"res_flag": 1}, {"res_flag": 3}, {"res_flag": 3, "pre_num": 1}])
@pytest.mark.parametrize("last", [0, 1])
def test_input_and_middle_shortcuts_are_kept_but_not_served(tmp_path, reference, options, last):
    tiny = reference("llama")
    config = make_config(start_index=last, lora_num=2, **options)
    tensors = make_tensors(config, tiny.base)
    folder = write(tmp_path / "adapter", config, tensors)
    adapter = lower(folder, tiny.base)
    expected = Reference(config, tensors, tiny.base).logits(tiny.model, tiny.tokens)
    assert (carried_logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-10
    assert (expected - tiny.base_logits()).abs().max() > 1e-3
    with pytest.raises(AdapterError) as refusal:
        prepare(folder, tiny.base, tmp_path / "cache")
    assert (refusal.value.field or "").endswith(".carry") and len(unserved(adapter)) == 3


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(-1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2),
    st.integers(0, 999),
)  # fmt: skip
def test_any_shape_and_depth(tmp_path_factory, rank, layers, most, d_in, d_out, last, seed):
    base = BaseModel("tiny", {f"model.layers.{n}.self_attn.q_proj": (d_in, d_out) for n in range(layers)})
    config = make_config(rank=rank, pre_num=most, start_index=last, lora_num=3, target_modules="q")
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write(tmp_path_factory.mktemp("reslora"), config, tensors), base)
    own = Reference(config, tensors, base)
    x = torch.randn(5, d_in, generator=torch.Generator().manual_seed(seed + 1)).double()
    for module, site in adapter.sites.items():
        expected = own.delta(module, x)
        torch.testing.assert_close(site_delta(site, {}, x), expected, rtol=1e-6, atol=1e-7)


def test_layers_of_other_widths_are_not_linked(tmp_path):
    widths = [(8, 8), (8, 8), (8, 6), (8, 6)]
    base = BaseModel("odd", {f"model.layers.{n}.self_attn.q_proj": w for n, w in enumerate(widths)})
    config = make_config(target_modules="q")
    adapter = lower(write(tmp_path, config, make_tensors(config, base)), base)
    assert list(adapter.ranks.values()) == [RANK, 2 * RANK, RANK, 2 * RANK]


def test_loras_that_its_code_added_up_are_one(tmp_path):
    """`save_lora_checkpoint` adds them up and leaves start_index as it is."""
    one = make_config()
    adapter = lower(write(tmp_path, make_config(start_index=2, lora_num=3), make_tensors(one)), BASE)
    assert adapter.ranks["model.layers.0.self_attn.q_proj"] == RANK


def test_what_grows_too_much_when_it_is_stacked_is_refused(tmp_path):
    base = BaseModel("deep", {f"model.layers.{n}.self_attn.q_proj": (24, 24) for n in range(12)})
    config = make_config(target_modules="q")
    folder = write(tmp_path, config, make_tensors(config, base))
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert len(lower(folder, base, max_bytes=7 * size).sites) == 12
    with pytest.raises(AdapterError) as refusal:
        lower(folder, base, max_bytes=2 * size)
    assert refusal.value.code == "adapter_too_large"


def test_the_pickle_it_saves_is_refused_with_the_command(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(make_config()))
    torch.save(make_tensors(make_config()), tmp_path / "pytorch_model_lora.bin")
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsafe_file", "pytorch_model_lora.bin")
    assert "'pytorch_model_lora.bin'" in refusal.value.hint and "adapter_model.safetensors" in refusal.value.hint


def test_two_configs_are_one_too_many(tmp_path):
    folder = write_adapter(tmp_path)
    (folder / CONFIG_FILE).write_text(json.dumps(make_config()))
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE)
    assert refusal.value.field == CONFIG_FILE


A0 = f"{SITE}.0.lora_A"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({"rank": None}, None, "adapter_config_invalid", "rank"),
        ({"rank": 0}, None, "adapter_config_invalid", "rank"),
        ({"rank": 5}, None, "adapter_shape_mismatch", None),
        ({"res_flag": 4}, None, "adapter_config_invalid", "res_flag"),
        ({"res_flag": 1, "merge_flag": 3}, None, "adapter_unsupported_feature", "merge_flag"),
        ({"res_flag": 3, "merge_flag": 4}, None, "adapter_unsupported_feature", "merge_flag"),
        ({"pre_num": -2}, None, "adapter_config_invalid", "pre_num"),
        ({"target_modules": "q.x"}, None, "adapter_config_invalid", "target_modules"),
        ({"target_modules": ["q"]}, None, "adapter_config_invalid", "target_modules"),
        ({"target_modules": "q"}, None, "adapter_unknown_tensor", None),
        ({"target_modules": "q.k.f"}, None, "adapter_missing_tensor", None),
        ({"target_modules": "v"}, None, "adapter_unknown_tensor", None),
        ({"lora_alpha": "8"}, None, "adapter_config_invalid", "lora_alpha"),
        ({"use_dora": True}, None, "adapter_unsupported_feature", "use_dora"),
        ({}, put(f"{SITE}.1.lora_A", RANK, 24), "adapter_missing_tensor", None),
        ({}, drop(A0), "adapter_missing_tensor", A0),
        ({}, drop(A0, f"{SITE}.0.lora_B"), "adapter_missing_tensor", "model.layers.1.self_attn.q_proj"),
        ({}, put(A0, RANK, 25), "adapter_shape_mismatch", A0),
        ({}, put(f"{SITE}.0.lora_C", 1), "adapter_unknown_tensor", f"{SITE}.0.lora_C"),
        ({}, poison(A0), "adapter_not_finite", None),
    ],
)
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(make_config()), spoil, code, field, write=write)


def test_more_loras_than_were_trained_are_refused(tmp_path):
    tensors = make_tensors(make_config(start_index=1))
    with pytest.raises(AdapterError) as refusal:
        lower(write(tmp_path, make_config(lora_num=2), tensors), BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", "start_index")
