"""vLLM's gauge `vllm:lora_requests_info`, kept to one series."""

from __future__ import annotations

from typing import Any


class LatestOnly:
    """Stands in for a gauge whose labels are its value: what it said before is removed.

    vLLM makes a series for every *set* of adapters that ran together and never ends one. With many adapters every
    step may add one, for ever. Readers of the gauge take the newest anyhow.
    """

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge

    def labels(self, **values: Any) -> Any:
        """The series to set."""
        self._gauge.clear()
        return self._gauge.labels(**values)


def bound_lora_gauge(engine_client: Any) -> None:
    """Put `LatestOnly` in front of the gauge on this engine's loggers; without log statistics there is none."""
    for logger in getattr(getattr(engine_client, "logger_manager", None), "stat_loggers", ()):
        if (gauge := getattr(logger, "gauge_lora_info", None)) is not None:
            logger.gauge_lora_info = LatestOnly(gauge)
