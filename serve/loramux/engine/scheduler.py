"""The scheduler class vLLM instantiates (`--scheduler-cls`)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from loramux.engine.settings import MISSING
from loramux_adapters.artefact import is_limited


class LoramuxScheduler(AsyncScheduler):
    """vLLM's scheduler; ends, with an error, requests whose adapter was not resident in the step.

    Requests for an adapter with a capacity compute their prompt from its first token, whatever is cached: what a token
    gets depends on counts that a block of the cache does not hold (`sequences.py`).

    Leases keep this from happening. Should one ever be wrong, the request fails and nobody gets the base model's
    answer under an adapter's name, and the engine lives on.
    """

    def add_request(self, request: Any) -> None:
        if request.lora_request is not None and _limited(request.lora_request.lora_path):
            request.skip_reading_prefix_cache = True
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        missing = getattr(model_runner_output, MISSING, ())
        failed = self.finish_requests(missing, RequestStatus.FINISHED_ERROR) if missing else []
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs


def _limited(artefact: str) -> bool:
    """Whether the adapter has a capacity; so it is taken where that cannot be read: that costs time, no answer."""
    try:
        return _is_limited(artefact)
    except Exception:
        return True


@functools.lru_cache(maxsize=4096)
def _is_limited(artefact: str) -> bool:
    """An artefact's path names its content."""
    return is_limited(Path(artefact))
