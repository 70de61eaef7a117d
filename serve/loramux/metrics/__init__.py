"""Prometheus metrics per adapter, and the wrapper around the engine client that feeds them."""

from loramux.metrics.adapters import AdapterMetrics
from loramux.metrics.instrument import instrument
from loramux.metrics.reliability import ReliabilityMetrics
from loramux.metrics.routing import RoutingMetrics, RoutingWatch
from loramux.metrics.uncertainty import UncertaintyMetrics

__all__ = ["AdapterMetrics", "ReliabilityMetrics", "RoutingMetrics", "RoutingWatch", "UncertaintyMetrics", "instrument"]
