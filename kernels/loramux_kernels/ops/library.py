"""Registration in the `loramux` namespace.

Plain `torch.library.Library` definitions: `torch.library.custom_op` adds microseconds of dispatch to ops that run
hundreds of times per decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("loramux", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the op of `schema` for CPU and CUDA, `fake` infers its shape. A second call changes nothing."""
    name = schema.split("(", 1)[0]
    if hasattr(torch.ops.loramux, name):
        return
    # The kernels read strides, so the compiler must hand over the layout that was traced.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    _library.define(schema, tags=tags)  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"loramux::{name}", fake, lib=_library)
