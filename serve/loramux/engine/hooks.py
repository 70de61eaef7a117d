"""What loramux replaces on vLLM's model runner: attributes of that one instance, before it loads the model.

| attribute | runner | replaced because |
|---|---|---|
| `load_lora_model(model, vllm_config, device)` | V1, V2, CPU | our manager and wrappers instead of vLLM's |
| `set_active_loras(input_batch, num_scheduled, …)` | V1 | per-request ids, no Python tuple per token |
| `lora_state.make_lora_inputs(req_ids, idx, num_scheduled)` | V2 | the same |
| `_set_active_loras(…)` | both | dummy and capture runs; on V2 the real steps too |

And once it is loaded, because these see the hidden states of every row of a step (`scoring.py`):

| attribute | runner |
|---|---|
| `_get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)` | V1 |
| `prompt_logprobs_worker.compute_prompt_logprobs(logits_fn, hidden_states, input_batch, …)` | V2 |
| `model.compute_logits(hidden_states)`, first of a step for the tokens to sample (`entropies.py`) | V1, V2 |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig

from loramux.engine.manager import AdapterManager
from loramux.engine.scoring import Rows, Scoring


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


def install_scoring(runner: Any, scoring: Scoring) -> None:
    """Show `scoring` the hidden states of every step of `runner`, which has loaded its model, and its manager's
    `entropies` the logits."""
    runner.model.compute_logits = runner.lora_manager.entropies.wrapped(runner.model.compute_logits)
    if hasattr(runner, "lora_state"):
        _install_scoring_v2(runner, scoring)
    else:
        _install_scoring_v1(runner, scoring)


def _install_scoring_v1(runner: Any, scoring: Scoring) -> None:
    inner = runner._get_prompt_logprobs_dict

    def layout(num_scheduled: Mapping[str, int]) -> Iterator[Rows]:
        for request_id, count in num_scheduled.items():
            if scoring.wants(request_id):
                index = runner.input_batch.req_id_to_index[request_id]
                position = runner.requests[request_id].num_computed_tokens  # as it was before the step
                yield Rows(request_id, int(runner.query_start_loc.np[index]), position, count)

    def get_prompt_logprobs_dict(hidden_states: torch.Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        if not scoring.idle:
            scoring.observe(hidden_states, layout(num_scheduled_tokens), runner.model.compute_logits)
        return inner(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = get_prompt_logprobs_dict


def _install_scoring_v2(runner: Any, scoring: Scoring) -> None:
    worker = runner.prompt_logprobs_worker
    inner = worker.compute_prompt_logprobs

    def layout(batch: Any) -> Iterator[Rows]:
        for index, request_id in enumerate(batch.req_ids):
            if scoring.wants(request_id):
                # Computed so far of the prompt, and what is read is prompt: after it the position stands still.
                position, count = batch.num_computed_prefill_tokens_np[index], batch.num_scheduled_tokens[index]
                if position < batch.prefill_len_np[index]:
                    yield Rows(request_id, int(batch.query_start_loc_np[index]), int(position), int(count))

    def compute_prompt_logprobs(
        logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not scoring.idle:
            scoring.observe(hidden_states, layout(input_batch), logits_fn)
        return inner(logits_fn, hidden_states, input_batch, *args, **kwargs)

    worker.compute_prompt_logprobs = compute_prompt_logprobs


class _RealStep(tuple[Any, ...]):
    """Arguments of `AdapterManager.step`, told apart from the tuples of a dummy run by type."""

    def __new__(cls, *values: Any) -> _RealStep:
        return super().__new__(cls, values)
