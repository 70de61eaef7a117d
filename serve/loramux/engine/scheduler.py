"""The scheduler class vLLM instantiates (`--scheduler-cls`)."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from loramux.engine.settings import MISSING


class LoramuxScheduler(AsyncScheduler):
    """vLLM's scheduler; ends, with an error, requests whose adapter was not resident in the step.

    Leases keep this from happening. Should one ever be wrong, the request fails and nobody gets the base model's
    answer under an adapter's name, and the engine lives on.
    """

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
