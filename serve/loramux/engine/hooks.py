"""What loramux replaces on vLLM's model runner: attributes of that one instance, before it loads the model.

| attribute | runner | replaced because |
|---|---|---|
| `load_lora_model(model, vllm_config, device)` | V1, V2, CPU | our manager and wrappers instead of vLLM's |
| `set_active_loras(input_batch, num_scheduled, …)` | V1 | per-request ids, no Python tuple per token |
| `lora_state.make_lora_inputs(req_ids, idx, num_scheduled)` | V2 | the same |
| `_set_active_loras(…)` | both | dummy and capture runs; on V2 the real steps too |
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig

from loramux.engine.manager import AdapterManager


def install(runner: Any) -> None:
    """Hook `runner`, which has not loaded its model yet."""

    def load_lora_model(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        runner.lora_manager = AdapterManager(vllm_config, device)
        return cast(nn.Module, runner.lora_manager.install(model))

    def select_for_dummy_run(prompt_mapping: object, token_mapping: object, requests: set[object], *_: object) -> None:
        runner.lora_manager.idle(launch=len(requests) > 0)

    runner.load_lora_model = load_lora_model
    if hasattr(runner, "lora_state"):
        _install_v2(runner, select_for_dummy_run)
    else:
        _install_v1(runner, select_for_dummy_run)


def _install_v1(runner: Any, select_for_dummy_run: Any) -> None:
    def set_active_loras(input_batch: Any, num_scheduled: np.ndarray, *_: object, **__: object) -> None:
        rows = len(num_scheduled)
        runner.lora_manager.step(input_batch.request_lora_mapping[:rows], num_scheduled, input_batch.req_ids)

    runner.set_active_loras = set_active_loras
    runner._set_active_loras = select_for_dummy_run


def _install_v2(runner: Any, select_for_dummy_run: Any) -> None:
    state = runner.lora_state

    def make_lora_inputs(req_ids: list[str], idx_mapping: np.ndarray, num_scheduled: np.ndarray) -> tuple[Any, ...]:
        return _RealStep(state.lora_ids[idx_mapping], num_scheduled, req_ids), None, None

    def set_active_loras(prompt_mapping: Any, token_mapping: Any, requests: Any, *rest: object) -> None:
        if isinstance(prompt_mapping, _RealStep):
            runner.lora_manager.step(*prompt_mapping)
        else:
            select_for_dummy_run(prompt_mapping, token_mapping, requests, *rest)

    state.make_lora_inputs = make_lora_inputs
    runner._set_active_loras = set_active_loras


class _RealStep(tuple[Any, ...]):
    """Arguments of `AdapterManager.step`, told apart from the tuples of a dummy run by type."""

    def __new__(cls, *values: Any) -> _RealStep:
        return super().__new__(cls, values)
