"""vLLM's own name registry, kept in step with ours."""

from __future__ import annotations

from typing import Any

from vllm.lora.request import LoRARequest

from loramux.registry import AdapterEntry, AdapterRegistry


class EngineDirectory:
    """Implements `loramux.registry.Directory` on vLLM's `OpenAIServingModels`, by attributes of that instance.

    vLLM looks `model` up in `lora_requests` (a plain dict). The request it finds there is named `name@digest`,
    which keys the KV cache by content; answers carry the name the caller used.
    """

    def __init__(self, models: Any) -> None:
        self._models = models
        models.model_name = self._model_name

    def attach(self, registry: AdapterRegistry) -> None:
        """Let names that are not resident yet be waited for, where vLLM asks its resolvers."""

        async def resolve_lora(name: str) -> LoRARequest:
            entry = await registry.resolve(name)
            return self._models.lora_requests.get(name) or _request(entry)

        self._models.resolve_lora = resolve_lora

    def publish(self, entry: AdapterEntry) -> None:
        self._models.lora_requests[entry.name] = _request(entry)

    def withdraw(self, name: str) -> None:
        self._models.lora_requests.pop(name, None)

    def _model_name(self, lora_request: LoRARequest | None = None) -> str:
        if lora_request is not None:
            return str(lora_request.lora_name).rpartition("@")[0]
        return str(self._models.base_model_paths[0].name)


def _request(entry: AdapterEntry) -> LoRARequest:
    assert entry.artefact is not None
    return LoRARequest(
        lora_name=entry.version,
        lora_int_id=entry.version_id,
        lora_path=str(entry.artefact.path),
        load_inplace=False,
    )
