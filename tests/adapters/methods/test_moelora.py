"""MOELoRA: one task is the plain LoRA of the formula, all tasks are a table, and the rest is refused by name."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import BaseModel, check_servable, lower, prepare
from loramux_adapters.artefact import digest_of
from loramux_adapters.errors import AdapterUnsupportedFeature
from loramux_adapters.gate import GateKind
from loramux_adapters.tasks import at_task, task_count

from ..checkpoints import BASE, write_adapter
from ..form import logits, site_delta
from ..hooks import hooked_logits
from ..layouts.moelora import EMBEDDING, GATE, NUMBER, RANK, TASKS, delta, make_config, make_tensors
from .refusals import assert_refused, drop, poison, put

SITE = "base_model.model.model.layers.0.self_attn.q_proj"
A1, COPY = f"{SITE}.lora_A.loraA.1.mlp.weight", f"{SITE}.lora_A.loraA.1.weight"


@pytest.mark.parametrize("kind", ["MMOELORAS", "MMOELORA"])
@pytest.mark.parametrize(("task", "dtype"), [(0, torch.float32), (TASKS, torch.bfloat16)])
def test_one_task_has_the_logits_of_the_formula(tmp_path, reference, kind, task, dtype):
    tiny = reference("llama")
    config = make_config(peft_type=kind, task_id=task)
    tensors = make_tensors(config, tiny.base, dtype)
    table = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    check_servable(table)
    assert {gate.task for gate in table.gates.values()} == {task} and task_count(table) == TASKS + 1
    adapter = at_task(table)
    assert adapter.method == "moelora" and not adapter.gates and set(adapter.ranks.values()) == {RANK}
    assert all(site.a.dtype == site.b.dtype == dtype and site.expert is None for site in adapter.sites.values())
    deltas = {module: partial(delta, config, tensors, module) for module in adapter.sites}
    expected = hooked_logits(tiny.model, deltas, tiny.tokens)
    moved = (expected - tiny.base_logits()).abs().max()
    assert len(deltas) == 4 and moved > 1e-3
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-6 * moved


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20),
    st.integers(0, 999), st.data(),
)  # fmt: skip
def test_any_shape(tmp_path_factory, rank, number, tasks, width, d_in, d_out, seed, data):
    base = BaseModel("tiny", {"model.layers.0.self_attn.q_proj": (d_in, d_out)})
    task = data.draw(st.integers(0, tasks))
    sizes = {"r": rank * number, "expert_num": number, "task_num": tasks, "task_embedding_dim": width}
    config = make_config(task_id=task, **sizes)
    tensors = make_tensors(config, base, seed=seed)
    adapter = at_task(lower(write_adapter(tmp_path_factory.mktemp("moelora"), config, tensors), base))
    ((module, site),) = adapter.sites.items()
    x = torch.randn(5, d_in, generator=torch.Generator().manual_seed(seed + 1))
    expected = delta(config, tensors, module, x)
    tolerance = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(site_delta(site, {}, x), expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("kind", ["MMOELORAS", "MMOELORA"])
def test_without_a_task_it_is_a_table_of_all_and_serving_asks_for_one(tmp_path, kind):
    config = make_config(peft_type=kind)
    tensors = make_tensors(config)
    folder = write_adapter(tmp_path / "all", config, tensors)
    adapter = lower(folder, BASE)
    x = torch.randn(3, 24)
    for task in range(TASKS + 1):
        one = at_task(adapter, task)
        assert not one.gates and digest_of(at_task(at_task(adapter, task))) == digest_of(one)
        chosen = lower(write_adapter(tmp_path / str(task), config | {"task_id": task}, tensors), BASE)
        assert digest_of(at_task(chosen)) == digest_of(one) and digest_of(at_task(chosen, 1)) == digest_of(
            at_task(adapter, 1)
        )
        for module, site in adapter.sites.items():
            gate = adapter.gates[site.gate]
            assert gate.kind is GateKind.TASK and gate.weights.shape == (TASKS + 1, NUMBER)
            expected = delta(config | {"task_id": task}, tensors, module, x)
            torch.testing.assert_close(site_delta(one.sites[module], {}, x), expected, rtol=1e-6, atol=1e-6)
    assert at_task(adapter) is adapter
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        prepare(folder, BASE, tmp_path / "cache")
    assert (refusal.value.field or "").endswith(".task")
    assert f'"task_id", 0 to {TASKS}' in refusal.value.message


def test_gates_that_its_code_does_not_read_are_told(tmp_path):
    config = make_config(task_id=1)
    tensors = make_tensors(config)
    told = lower(write_adapter(tmp_path / "all", config, tensors), BASE)
    assert any("gates of single sites" in warning for warning in told.warnings)
    shared = {name: t for name, t in tensors.items() if "layers" not in name or "lora_A" in name or "lora_B" in name}
    quiet = lower(write_adapter(tmp_path / "shared", config, shared), BASE)
    assert digest_of(quiet) == digest_of(told) and not any("gates" in warning for warning in quiet.warnings)


def test_a_raw_state_dict_means_the_same(tmp_path):
    config = make_config(task_id=2)
    tensors = make_tensors(config)
    raw = {
        name.replace("lora_A.", "lora_A.default.")
        .replace("lora_B.", "lora_B.default.")
        .replace("lora_gate.", "lora_gate.default.")
        .replace("lora_task_embedding.", "lora_task_embedding.default."): tensor
        for name, tensor in tensors.items()
    }
    digests = {digest_of(lower(write_adapter(tmp_path / n, config, t), BASE)) for n, t in (("a", tensors), ("b", raw))}
    assert len(digests) == 1


def test_the_pickle_it_saves_is_refused_with_the_command(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(make_config(task_id=0)))
    torch.save(make_tensors(make_config()), tmp_path / "adapter_model.bin")
    with pytest.raises(Exception, match="pickle") as refusal:
        lower(tmp_path, BASE)
    assert "save_file" in refusal.value.hint


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({"task_id": TASKS + 1}, None, "adapter_config_invalid", "task_id"),
        ({"task_id": -1}, None, "adapter_config_invalid", "task_id"),
        ({"task_id": "mri"}, None, "adapter_config_invalid", "task_id"),
        ({"task_id": True}, None, "adapter_config_invalid", "task_id"),
        ({"r": 6}, None, "adapter_config_invalid", "r"),
        ({"r": 12}, None, "adapter_shape_mismatch", None),
        ({"task_num": None}, None, "adapter_config_invalid", "task_num"),
        ({"task_num": 4}, None, "adapter_shape_mismatch", None),
        ({"task_embedding_dim": 6}, None, "adapter_shape_mismatch", None),
        ({"expert_num": 8}, None, "adapter_missing_tensor", None),
        ({"expert_num": 2}, None, "adapter_unknown_tensor", None),
        ({"depart_num": 3}, None, "adapter_unsupported_feature", "depart_num"),
        ({"peft_type": "MMOELORA"}, None, "adapter_unknown_tensor", None),
        ({}, drop(EMBEDDING), "adapter_missing_tensor", f"base_model.model.{EMBEDDING}"),
        ({}, drop(GATE), "adapter_missing_tensor", f"base_model.model.{GATE}"),
        ({}, drop(A1), "adapter_missing_tensor", A1),
        ({}, put(GATE, NUMBER, 4), "adapter_shape_mismatch", GATE),
        ({}, put(A1, 2, 25), "adapter_shape_mismatch", A1),
        ({}, put(COPY, 2, 24), "adapter_unknown_tensor", COPY),
        ({}, put(f"{SITE}.lora_A.loraA.4.mlp.weight", 2, 24), "adapter_unknown_tensor", None),
        ({}, poison(EMBEDDING), "adapter_not_finite", None),
        ({"task_id": 0}, poison(EMBEDDING), "adapter_not_finite", None),
    ],
)
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(make_config()), spoil, code, field)
