"""`loramux adapters bayesianize PATH --out FILE …`: a posterior for a LoRA that has none, without training."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loramux.bases import DEFAULT_BASE
from loramux.cli.base import check_out, load_base, load_runnable, native_path
from loramux.console import say
from loramux.errors import LoramuxError
from loramux.units import format_bytes
from loramux_adapters import AdapterError, BaseModel, LoweredAdapter, lower, posterior_of
from loramux_adapters.compact.texts import read_calibration, token_count
from loramux_adapters.native import write_native
from loramux_adapters.posterior.tfb import check_plain_sites, tfb
from loramux_adapters.posterior.tfb_search import Found, Options, search


def main(argv: Sequence[str] | None = None) -> int:
    """Write the Bayesian adapter as a native file; 1 if the adapter, a file, the base or the place is refused."""
    options = _parser().parse_args(argv)
    try:
        report = _run(options)
    except (AdapterError, LoramuxError, OSError) as error:
        sys.stderr.write(f"loramux adapters bayesianize: {error}\n")
        return 1
    say(*([json.dumps(report, indent=2)] if options.json else _lines(report)))
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    check_out(options.out, force=options.force)
    wanted = Options(options.change, options.samples, options.steps)
    base = load_base(options.base)
    adapter = lower(options.path, base)
    check_plain_sites(adapter)
    found = None if options.sigma else _search(options, adapter, base, wanted)
    result = tfb(adapter, base, found.sigma_q if found else options.sigma)
    write_native(options.out, result, base.name)
    posterior = posterior_of(result)
    assert posterior is not None
    return {
        "out": str(options.out),
        "bytes": result.nbytes(),
        "sigma_q": found.sigma_q if found else options.sigma,
        "posterior": posterior.family,
        "draw_bytes": posterior.draw_bytes,
        "search": None if found is None else {"nll": [found.before, found.after], "tried": found.tried},
        "warnings": posterior.warnings,
    }


def _search(options: argparse.Namespace, adapter: LoweredAdapter, base: BaseModel, wanted: Options) -> Found:
    model, tokenizer = load_runnable(options.base)
    texts = read_calibration(options.anchors, tokenizer)
    sys.stderr.write(f"{wanted.steps} × {wanted.samples} passes over {len(texts)} texts, {token_count(texts)} tokens\n")

    def progress(sigma: float, nll: float) -> None:
        sys.stderr.write(f"σ_q {sigma:.3g}: {nll:.4f} nats per token\n")

    return search(model, adapter, base, texts, wanted, on_step=progress)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        ("written", f"{report['out']}, {format_bytes(report['bytes'])}"),
        ("posterior", f"{report['posterior']}, σ_q = {report['sigma_q']:.3g}"),
        ("a draw", format_bytes(report["draw_bytes"])),
    ]
    if report["search"] is not None:
        before, after = report["search"]["nll"]
        rows.append(("texts", f"−log P per token {before:.4f} → {after:.4f} nats"))
    rows += [("warning", warning) for warning in report["warnings"]]
    for name, value in rows:
        yield f"{name:<11}{value}"


def _parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="loramux adapters bayesianize",
        description=__doc__,
        epilog="By TFB (arXiv 2412.05723); what it does and when not to use it: adapters/README.md.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the adapter's folder, or a native file")
    parser.add_argument("--out", required=True, type=native_path, metavar="FILE.safetensors", help="what to write")
    parser.add_argument("--force", action="store_true", help="overwrite that file")
    parser.add_argument(
        "--base", default=DEFAULT_BASE, metavar="BASE", help=f"folder or name (default: {DEFAULT_BASE})"
    )
    parser.add_argument("--json", action="store_true", help="JSON, with all that was tried, instead of lines")
    noise = parser.add_mutually_exclusive_group(required=True)
    noise.add_argument("--sigma", type=_positive, metavar="S", help="σ_q, the deviation along each direction of B")
    noise.add_argument(
        "--anchors",
        type=Path,
        metavar="FILE.jsonl",
        help='texts to find it on, a line {"text": …} or {"messages": […]}, like those it is used for',
    )
    parser.add_argument(
        "--change",
        type=float,
        default=defaults.change,
        metavar="C",
        help=f"with --anchors, by how much −log P may change, relatively (default: {defaults.change})",
    )
    parser.add_argument(
        "--samples", type=int, default=defaults.samples, metavar="S", help=f"draws (default: {defaults.samples})"
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, metavar="N", help=f"of bisection (default: {defaults.steps})"
    )
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
