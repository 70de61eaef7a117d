"""vLLM's own register of names, as a view of ours."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from vllm.lora.request import LoRARequest

from loramux.http.composition import Composed, answered_by
from loramux.registry import AdapterRegistry, Version

#: What this request's model name was found to mean: vLLM looks it up several times for one request.
_found: ContextVar[tuple[str, Version] | None] = ContextVar("loramux_found", default=None)


class EngineDirectory:
    """Puts our registry where vLLM's `OpenAIServingModels` keeps names, by attributes of that instance.

    vLLM looks `model` up in `lora_requests`; what is not there it asks `resolve_lora` for, which waits, and then
    looks again. The request it finds is named `name@digest`, which keys the KV cache by content; `base_model_name`,
    which vLLM does not read, carries the name the caller wrote, for the answer.
    """

    def __init__(self, models: Any, registry: AdapterRegistry) -> None:
        self._models = models
        self._registry = registry
        models.lora_requests = _Requests(registry)
        models.resolve_lora = self._resolve_lora
        models.model_name = self._model_name

    async def _resolve_lora(self, name: str) -> LoRARequest:
        version = await self._registry.resolve(name)
        _found.set((name, version))
        return lora_request(name, version)

    def _model_name(self, lora_request: LoRARequest | None = None) -> str:
        if lora_request is None:
            return str(self._models.base_model_paths[0].name)
        if (composed := _composed(lora_request.lora_name)) is not None:
            return composed.model
        return str(lora_request.base_model_name or lora_request.lora_name)


class _Requests(dict[str, LoRARequest]):
    """Holds nothing: knows every way to write the name of a version that is on the device.

    Every look-up makes a request of its own, so that one answer can be held to one version (`metrics.instrument`).
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        super().__init__()
        self._registry = registry

    def __contains__(self, spelling: object) -> bool:
        return self._version(spelling) is not None

    def __missing__(self, spelling: str) -> LoRARequest:
        if (version := self._version(spelling)) is None:
            raise KeyError(spelling)
        return lora_request(spelling, version)

    def get(self, spelling: str, default: Any = None) -> Any:
        version = self._version(spelling)
        return default if version is None else lora_request(spelling, version)

    def _version(self, spelling: object) -> Version | None:
        if not isinstance(spelling, str):
            return None
        if (composed := _composed(spelling)) is not None:
            return composed.version
        if (version := self._registry.lookup(spelling)) is not None:
            _found.set((spelling, version))
            return version
        # It may have left the device since the last look-up: the lease will bring it back.
        found = _found.get()
        return found[1] if found and found[0] == spelling and not found[1].retired else None


def _composed(tag: str) -> Composed | None:
    """What this request composed, if that is its tag."""
    composed = answered_by.get()
    return composed if composed is not None and composed.version.tag == tag else None


def lora_request(spelling: str, version: Version) -> LoRARequest:
    """What vLLM is given for a version that the caller wrote as `spelling`."""
    assert version.artefact is not None
    return LoRARequest(
        lora_name=version.tag,
        lora_int_id=version.version_id,
        lora_path=str(version.artefact.path),
        base_model_name=spelling,
    )
