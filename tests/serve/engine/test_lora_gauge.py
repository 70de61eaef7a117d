"""vLLM's gauge of running adapters does not grow with every set of adapters that met in a batch."""

from __future__ import annotations

from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Gauge

from loramux.engine.lora_gauge import bound_lora_gauge


def test_only_the_newest_set_is_shown() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("info", "-", ["running_lora_adapters", "waiting_lora_adapters"], registry=registry)
    logger, other = SimpleNamespace(gauge_lora_info=gauge), SimpleNamespace()
    bound_lora_gauge(SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=[other, logger])))
    for i in range(100):
        logger.gauge_lora_info.labels(running_lora_adapters=f"a{i},b", waiting_lora_adapters="").set_to_current_time()
    ((sample,),) = [family.samples for family in registry.collect()]
    assert sample.labels["running_lora_adapters"] == "a99,b"


def test_an_engine_without_statistics_has_no_gauge() -> None:
    bound_lora_gauge(SimpleNamespace(logger_manager=None))
    bound_lora_gauge(SimpleNamespace())
