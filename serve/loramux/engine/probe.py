"""Does the installed vLLM have every hook that correct answers depend on? Checked before anything is served.

A missing hook is named and the start refused: a server that starts and serves the base model under an adapter's
name would be worse than none.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from loramux.errors import IncompatibleEngine

#: Oldest and newest vLLM that the tests run with.
TESTED_VLLM = ("0.26", "0.32")

#: (module, attribute path, parameters a callable must accept by these names)
HOOKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.lora.request", "LoRARequest", ("lora_name", "lora_int_id", "lora_path")),
    ("vllm.lora.layers", "BaseLayerWithLoRA", ()),
    ("vllm.model_executor.layers.linear", "QKVParallelLinear", ()),
    ("vllm.model_executor.layers.linear", "MergedColumnParallelLinear", ()),
    ("vllm.model_executor.layers.linear", "RowParallelLinear", ()),
    ("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", ("self",)),
    (
        "vllm.v1.core.sched.async_scheduler",
        "AsyncScheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
    ),
    ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler.finish_requests", ("request_ids", "finished_status")),
    ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler.add_request", ("request",)),
    (
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("scheduled_new_reqs", "scheduled_cached_reqs", "finished_req_ids", "preempted_req_ids"),
    ),
    ("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params", "num_computed_tokens")),
    ("vllm.v1.core.sched.output", "CachedRequestData", ("req_ids", "num_computed_tokens")),
    ("vllm.v1.request", "Request.get_skip_reading_prefix_cache", ("self",)),
    ("vllm.v1.engine", "EngineCoreOutput", ("request_id", "new_token_ids", "finish_reason", "events")),
    ("vllm.v1.request", "RequestStatus.FINISHED_ERROR", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("prompt", "sampling_params", "request_id", "lora_request")),
    ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method", "args")),
    ("vllm.plugins", "load_endpoint_plugins", ()),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", ("lora_request",)),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.resolve_lora", ("lora_name",)),
)

#: Modules whose calls on `self.lora_manager` our AdapterManager must answer.
RUNNERS = (
    "vllm.v1.worker.lora_model_runner_mixin",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.mm.lora",
)


def missing_hooks(hooks: tuple[tuple[str, str, tuple[str, ...]], ...] = HOOKS) -> Iterator[str]:
    """Names of hooks the installed vLLM lacks, most fundamental first."""
    for module, path, parameters in hooks:
        try:
            target: Any = importlib.import_module(module)
            for attribute in path.split("."):
                target = getattr(target, attribute)
        except (ImportError, AttributeError):
            yield f"{module}.{path}"
            continue
        accepted = _parameters(target)
        for parameter in parameters:
            if parameter not in accepted:
                yield f"{module}.{path}(…, {parameter}, …)"


def unanswered_calls(manager: type) -> Iterator[str]:
    """Methods vLLM's runners call on `lora_manager` that `manager` does not have."""
    called: set[str] = set()
    for name in RUNNERS:
        try:
            source = inspect.getsource(importlib.import_module(name))
        except (ImportError, OSError):
            continue
        called.update(re.findall(r"\blora_manager\.(\w+)\(", source))
    yield from sorted(name for name in called if not hasattr(manager, name))


def check_installed() -> None:
    """Raises IncompatibleEngine, naming the first missing hook of the installed vLLM."""
    from loramux.engine.manager import AdapterManager

    for missing in missing_hooks():
        raise _incompatible(missing)
    for missing in unanswered_calls(AdapterManager):
        raise _incompatible(f"lora_manager.{missing}, which its model runner calls")


def check_runner(runner: Any) -> None:
    """The same for the model runner this worker made. Raises IncompatibleEngine."""
    _require(runner, "load_lora_model", ("model", "vllm_config", "device"))
    if hasattr(runner, "lora_state"):
        _require(runner.lora_state, "make_lora_inputs", ("req_ids", "idx_mapping", "num_scheduled_tokens"))
        if not hasattr(runner.lora_state, "lora_ids"):
            raise _incompatible("lora_state.lora_ids of the model runner")
    else:
        _require(runner, "set_active_loras", ("input_batch", "num_scheduled_tokens"))
    _require(runner, "_set_active_loras", ())


def check_loaded_runner(runner: Any) -> None:
    """What the runner has only once its model is loaded. Raises IncompatibleEngine."""
    if hasattr(runner, "lora_state"):
        parameters = ("logits_fn", "hidden_states", "input_batch")
        _require(runner.prompt_logprobs_worker, "compute_prompt_logprobs", parameters)
    else:
        _require(runner, "_get_prompt_logprobs_dict", ("hidden_states", "num_scheduled_tokens"))


def _require(owner: Any, name: str, parameters: tuple[str, ...]) -> None:
    method: Callable[..., Any] | None = getattr(owner, name, None)
    if method is None or not set(parameters) <= _parameters(method):
        raise _incompatible(f"{type(owner).__name__}.{name}({', '.join(parameters)})")


def _parameters(target: Any) -> set[str]:
    try:
        return set(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return set(getattr(target, "__struct_fields__", ()))


def _incompatible(hook: str) -> IncompatibleEngine:
    from vllm import __version__ as installed

    return IncompatibleEngine(
        f"vLLM {installed} has no {hook}.",
        hint=f"loramux is tested with vLLM {' to '.join(TESTED_VLLM)}. Install one of these, or a newer loramux.",
    )
