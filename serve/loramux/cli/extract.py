"""`loramux adapters extract MERGED --base BASE --out FILE …`: an adapter out of merged weights, with its error."""

import argparse
from collections.abc import Iterator, Sequence

from loramux.cli import making
from loramux.cli.base import load_base
from loramux.console import note
from loramux.units import format_bytes
from loramux_adapters.extract import MAX_RANK, extract, merged_weights
from loramux_adapters.native import write_native


def main(argv: Sequence[str] | None = None) -> int:
    """Write the adapter as a native file; 1 if a checkpoint or the place is refused."""
    return making.run(_parser(), argv, _make, _rows)


def _make(options: argparse.Namespace) -> making.Report:
    base = load_base(options.base)
    count, done = len(base.linears), 0

    def progress(module: str) -> None:
        nonlocal done
        done += 1
        note(f"{done} of {count}: {module}")

    result = extract(
        merged_weights(options.merged),
        base,
        rank=options.rank,
        error=options.error,
        max_rank=options.max_rank,
        on_layer=progress,
    )
    write_native(options.out, result.adapter, base.name)
    errors = result.errors
    return {
        "bytes": result.adapter.nbytes(),
        "unchanged": count - len(errors),
        "error": making.summary(errors),
        "modules": {module: {"rank": result.adapter.ranks[module], "error": errors[module]} for module in errors},
    }


def _rows(report: making.Report) -> Iterator[tuple[str, str]]:
    ranks = [module["rank"] for module in report["modules"].values()]
    yield "written", f"{report['out']}, {format_bytes(report['bytes'])}"
    yield "sites", f"{len(ranks)}; {report['unchanged']} layers are the base's own"
    yield "ranks", f"{min(ranks)}..{max(ranks)}"
    yield "error", f"of ΔW, relative: {making.span(report['error'])}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux adapters extract",
        description=__doc__,
        epilog="For methods that merge as they train (XGBLoRA) and keep no factors: adapters/README.md.",
    )
    parser.add_argument("merged", metavar="MERGED", help="folder of the merged model, or its name in the hub's cache")
    parser.add_argument("--base", required=True, metavar="BASE", help="folder or name of the model it was trained from")
    making.add_output(parser, details="every layer's rank and error")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="R", help="rank of every layer that was changed")
    size.add_argument("--error", type=float, metavar="E", help="bound on ‖ΔW' − ΔW‖ / ‖ΔW‖ (Frobenius) of every layer")
    parser.add_argument(
        "--max-rank",
        type=int,
        default=MAX_RANK,
        metavar="R",
        help=f"with --error, the rank above which a layer is refused (default: {MAX_RANK})",
    )
    return parser
