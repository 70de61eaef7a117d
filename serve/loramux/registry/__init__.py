"""Adapters by name: their states, their versions, and who uses them. Knows neither HTTP nor vLLM."""

from loramux.registry.entry import AdapterEntry, State
from loramux.registry.registry import AdapterRegistry, DataPlane, Directory, Observer

__all__ = ["AdapterEntry", "AdapterRegistry", "DataPlane", "Directory", "Observer", "State"]
