"""Base models: the default one, and how a name becomes a folder."""

from loramux.bases.prepare import ARCHIVES, DEFAULT_BASE, BaseModelError, prepare_base

__all__ = ["ARCHIVES", "DEFAULT_BASE", "BaseModelError", "prepare_base"]
