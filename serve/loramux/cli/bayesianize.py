"""`loramux adapters bayesianize PATH --out FILE …`: a posterior for a LoRA that has none, without training."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from loramux.cli import making
from loramux.cli.base import load_base, load_runnable
from loramux.console import note
from loramux.units import format_bytes
from loramux_adapters import BaseModel, LoweredAdapter, lower, posterior_of
from loramux_adapters.compact.texts import read_calibration, token_count
from loramux_adapters.native import write_native
from loramux_adapters.posterior.tfb import check_plain_sites, tfb
from loramux_adapters.posterior.tfb_search import Found, Options, search


def main(argv: Sequence[str] | None = None) -> int:
    """Write the Bayesian adapter as a native file; 1 if the adapter, a file, the base or the place is refused."""
    return making.run(_parser(), argv, _make, _rows)


def _make(options: argparse.Namespace) -> making.Report:
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
    note(f"{wanted.steps} × {wanted.samples} passes over {len(texts)} texts, {token_count(texts)} tokens")

    def progress(sigma: float, nll: float) -> None:
        note(f"σ_q {sigma:.3g}: {nll:.4f} nats per token")

    return search(model, adapter, base, texts, wanted, on_step=progress)


def _rows(report: making.Report) -> Iterator[tuple[str, str]]:
    yield "written", f"{report['out']}, {format_bytes(report['bytes'])}"
    yield "posterior", f"{report['posterior']}, σ_q = {report['sigma_q']:.3g}"
    yield "a draw", format_bytes(report["draw_bytes"])
    if report["search"] is not None:
        before, after = report["search"]["nll"]
        yield "texts", f"−log P per token {before:.4f} → {after:.4f} nats"
    for warning in report["warnings"]:
        yield "warning", warning


def _parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="loramux adapters bayesianize",
        description=__doc__,
        epilog="By TFB (arXiv 2412.05723); what it does and when not to use it: adapters/README.md.",
    )
    making.add_output(parser, details="all that was tried")
    making.add_adapter(parser)
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
