"""What `loramux adapters compact` says it did, as data and as lines."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from loramux.cli.making import span, summary
from loramux.units import format_bytes
from loramux_adapters import BaseModel, LoweredAdapter
from loramux_adapters.compact import Compacted
from loramux_adapters.compact.report import module_errors, sizes


def report(result: Compacted, base: BaseModel, outputs: dict[str, float] | None) -> dict[str, Any]:
    """Everything `--json` prints. `outputs`: relative error of each module's outputs, if it was measured."""
    errors = module_errors(result, outputs)
    lost: dict[str, Any] = {
        "weights": summary({module: error.weights for module, error in errors.items()}),
        "worst_expert": max((error.worst_expert for error in errors.values()), default=0.0),
    }
    if outputs is not None:
        lost["outputs"] = summary(outputs)
    return {
        "method": result.after.method,
        "before": sizes(result.before, base),
        "after": sizes(result.after, base),
        "error": lost,
        "modules": {module: vars(error) for module, error in errors.items()},
    }


def warned(adapter: LoweredAdapter, digest: str, report: dict[str, Any]) -> LoweredAdapter:
    """The adapter with a word to whoever serves it, unless nothing was lost."""
    error = report["error"]["weights"]
    if not error["max"]:
        return adapter
    text = (
        f"compacted from {digest[:16]}: relative error of ΔW {error['mean']:.3g} in the mean, up to {error['max']:.3g}"
    )
    return replace(adapter, warnings=(*adapter.warnings, text))


def rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report for a person: what a line is about, and the line."""
    before, after, error = report["before"], report["after"], report["error"]
    pool = ", ".join(
        f"{format_bytes(size)} -> {format_bytes(after['pool_bytes'][dtype])} in {dtype}"
        for dtype, size in before["pool_bytes"].items()
    )
    yield "written", f"{report['out']}, {report['method']}"
    yield "experts", f"{before['experts']:.3g} -> {after['experts']:.3g} in the mean"
    yield "rank rows", f"{before['rank_rows']} -> {after['rank_rows']} at {after['sites']} sites"
    yield "file", f"{format_bytes(before['file_bytes'])} -> {format_bytes(after['file_bytes'])}"
    yield "memory", pool
    yield "error", f"of ΔW, relative: {span(error['weights'])}; of one expert up to {error['worst_expert']:.3g}"
    if "outputs" in error:
        yield "", f"of outputs, relative, on {report['calibration_tokens']} tokens: {span(error['outputs'])}"
    for task in report.get("quality", ()):
        (right, now), (nats, later) = task["right"], task["nats"]
        yield "quality", f"{task['task']}: {right} -> {now} of {task['n']} right, {nats:.3f} -> {later:.3f} nats"
