"""Prometheus metrics per adapter, and the wrapper around the engine client that feeds them."""

from loramux.metrics.adapters import AdapterMetrics
from loramux.metrics.instrument import instrument
from loramux.metrics.routing import RoutingMetrics, RoutingWatch
from loramux.metrics.uncertainty import UncertaintyMetrics

__all__ = ["AdapterMetrics", "RoutingMetrics", "RoutingWatch", "UncertaintyMetrics", "instrument"]
