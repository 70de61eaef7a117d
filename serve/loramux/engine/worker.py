"""The worker class vLLM instantiates (`--worker-cls`)."""

from __future__ import annotations

from typing import Any, cast

from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput

from loramux.engine import hooks, probe
from loramux.engine.manager import AdapterManager
from loramux.engine.scoring import Scoring
from loramux.engine.settings import MISSING, DataPlaneSettings
from loramux.metrics.routing import REQUEST_KEY
from loramux.uncertainty import ENTROPY_KEY, READ_KEY

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker  # type: ignore[assignment]


class LoramuxWorker(PlatformWorker):
    """vLLM's worker with our data plane; the `loramux_*` methods are called by collective RPC between steps."""

    def load_model(self, **kwargs: Any) -> None:
        probe.check_runner(self.model_runner)
        hooks.install(self.model_runner)
        super().load_model(**kwargs)
        probe.check_loaded_runner(self.model_runner)
        settings = DataPlaneSettings.from_config(self.vllm_config.additional_config)
        self._scoring = Scoring(
            vocabulary=self.vllm_config.model_config.get_vocab_size(),
            state_bytes=settings.score_bytes,
            device=self.model_runner.device,
        )
        hooks.install_scoring(self.model_runner, self._scoring)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._adapters.scheduled(scheduler_output)
        self._adapters.uncritical(self._watch, scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        self._adapters.forward_issued()
        return self._mark(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._mark(super().sample_tokens(*args, **kwargs))

    def loramux_begin(self, version_id: int, artefact: str, lender: int | None = None) -> None:
        self._adapters.begin(version_id, artefact, lender)

    def loramux_advance(self, version_id: int) -> dict[str, Any]:
        return self._adapters.advance(version_id)

    def loramux_remove(self, version_id: int) -> bool:
        return self._adapters.remove(version_id)

    def loramux_stats(self) -> dict[str, int]:
        return self._adapters.stats()

    def loramux_routing(self) -> dict[int, dict[str, Any]]:
        return self._adapters.routing.take_sums()

    def loramux_routing_report(self, tag: str) -> dict[str, Any] | None:
        return self._adapters.routing.take_report(tag)

    def loramux_score_rows(self) -> int:
        return self._scoring.rows

    def loramux_scores(self, job: str) -> dict[str, Any] | None:
        return self._scoring.take(job)

    def loramux_entropies(self, tag: str) -> list[float | None]:
        return self._adapters.entropies.take(tag)

    def loramux_drop_scores(self, job: str) -> None:
        self._scoring.drop(job)

    @property
    def _adapters(self) -> AdapterManager:
        return cast(AdapterManager, self.model_runner.lora_manager)

    def _watch(self, scheduler_output: Any) -> None:
        """Requests that ask what their routers decide, or are to be read, say so in their sampling parameters."""
        routing, scoring, entropies = self._adapters.routing, self._scoring, self._adapters.entropies
        for watcher in (routing, scoring, entropies):
            watcher.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            extra = getattr(request.sampling_params, "extra_args", None) or {}
            if isinstance(tag := extra.get(REQUEST_KEY), str):
                routing.watch(request.req_id, tag)
            if isinstance(spec := extra.get(READ_KEY), dict):
                scoring.watch(request.req_id, spec)
            if isinstance(tag := extra.get(ENTROPY_KEY), str) and request.prompt_token_ids is not None:
                entropies.watch(request.req_id, tag, len(request.prompt_token_ids))
        entropies.plan(scheduler_output)

    def _mark(self, output: Any) -> Any:
        if output is None or not self._adapters.missing:  # None: the tokens are sampled by another call
            return output
        missing = self._adapters.take_missing()
        if isinstance(output, AsyncModelRunnerOutput):
            return _Marked(output, missing)
        setattr(output, MISSING, missing)
        return output


class _Marked(AsyncModelRunnerOutput):
    """An asynchronous output that carries the mark once its copy to the host is done."""

    def __init__(self, output: AsyncModelRunnerOutput, missing: frozenset[str]) -> None:
        self._output = output
        self._missing = missing

    def get_output(self) -> Any:
        output = self._output.get_output()
        setattr(output, MISSING, self._missing)
        return output
