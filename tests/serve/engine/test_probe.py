"""The installed vLLM has every hook; one that has not is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from loramux.engine import probe
from loramux.engine.manager import AdapterManager
from loramux.errors import IncompatibleEngine


def test_the_installed_vllm_has_every_hook() -> None:
    assert list(probe.missing_hooks()) == []
    assert list(probe.unanswered_calls(AdapterManager)) == []
    probe.check_installed()


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        (("vllm.no_such_module", "Thing", ()), "vllm.no_such_module.Thing"),
        (("vllm.lora.request", "NoSuchClass", ()), "vllm.lora.request.NoSuchClass"),
        (("vllm.lora.request", "LoRARequest", ("lora_name", "soul")), "vllm.lora.request.LoRARequest(…, soul, …)"),
        (("vllm.v1.request", "RequestStatus.FINISHED_HAPPY", ()), "vllm.v1.request.RequestStatus.FINISHED_HAPPY"),
    ],
)
def test_a_missing_hook_is_named(hook: Any, named: str) -> None:
    assert list(probe.missing_hooks((hook,))) == [named]


def test_a_start_without_a_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "missing_hooks", lambda: iter(["vllm.some.hook"]))
    with pytest.raises(IncompatibleEngine, match=r"has no vllm\.some\.hook") as caught:
        probe.check_installed()
    assert caught.value.hint


@pytest.mark.parametrize("method", ["remove_all_adapters", "supports_tower_connector_lora", "dummy_lora_cache"])
def test_a_manager_that_lacks_a_called_method_is_found(method: str) -> None:
    methods = {name: value for name, value in vars(AdapterManager).items() if name != method}
    manager = type("Incomplete", (), methods)
    assert list(probe.unanswered_calls(manager)) == [method]


class Runner(LoRAModelRunnerMixin):  # type: ignore[misc]
    pass


def test_both_kinds_of_runner_pass_and_a_changed_one_does_not() -> None:
    probe.check_runner(Runner())
    v2: Any = Runner()
    v2.lora_state = LoraState(4)
    probe.check_runner(v2)

    v2.lora_state.make_lora_inputs = lambda req_ids, rows: None
    with pytest.raises(IncompatibleEngine, match="make_lora_inputs"):
        probe.check_runner(v2)
    v2.lora_state = SimpleNamespace(make_lora_inputs=LoraState(4).make_lora_inputs)
    with pytest.raises(IncompatibleEngine, match="lora_ids"):
        probe.check_runner(v2)
    v1: Any = Runner()
    v1.set_active_loras = lambda batch: None
    with pytest.raises(IncompatibleEngine, match="set_active_loras"):
        probe.check_runner(v1)
