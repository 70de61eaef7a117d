"""What the API process decides and the workers must know; travels in vLLM's `additional_config`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loramux import __version__
from loramux.config import SCORE_MEMORY

KEY = "loramux"

#: Attribute of a ModelRunnerOutput that names requests whose adapter was not resident: worker -> scheduler.
MISSING = "loramux_missing"


@dataclass(frozen=True)
class DataPlaneSettings:
    """Size of the data plane of one worker."""

    adapter_bytes: int  # weights of resident adapters
    slots: int  # resident adapters at most; a table row each
    max_rank: int  # largest rank of one module; sizes the scratch between shrink and expand
    score_bytes: int = SCORE_MEMORY  # probabilities that are summed over draws, see `scoring.py`

    def as_config(self) -> dict[str, Any]:
        """For `additional_config`, which vLLM hashes into its compile-cache key.

        The version is in it because the cache key does not see the module tree: without it, a graph compiled with
        other wrappers (or none) would be loaded.
        """
        return {KEY: {**asdict(self), "version": __version__}}

    def engine_options(self) -> dict[str, Any]:
        """vLLM's engine arguments that put loramux into an engine, offline too: `LLM(model, **engine_options())`."""
        return {
            "enable_lora": True,
            # Only bytes limit how many adapters share a batch: vLLM's own limits are set where they never bind.
            "max_loras": self.slots,
            "max_cpu_loras": self.slots,
            "worker_cls": "loramux.engine.worker.LoramuxWorker",
            "scheduler_cls": "loramux.engine.scheduler.LoramuxScheduler",
            "additional_config": self.as_config(),
        }

    @classmethod
    def from_config(cls, additional_config: object) -> DataPlaneSettings:
        """Inverse of `as_config`. Raises KeyError if the engine was not started by loramux."""
        values = dict(additional_config[KEY]) if isinstance(additional_config, dict) else {}
        values.pop("version", None)
        return cls(**values)
