"""`loramux adapters extract MERGED --base BASE --out FILE …`: an adapter out of merged weights, with its error."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from loramux.cli.base import check_out, load_base, native_path
from loramux.console import say
from loramux.errors import LoramuxError
from loramux.units import format_bytes
from loramux_adapters import AdapterError
from loramux_adapters.extract import MAX_RANK, extract, merged_weights
from loramux_adapters.native import write_native


def main(argv: Sequence[str] | None = None) -> int:
    """Write the adapter as a native file; 1 if a checkpoint or the place is refused."""
    options = _parser().parse_args(argv)
    try:
        report = _run(options)
    except (AdapterError, LoramuxError, OSError) as error:
        sys.stderr.write(f"loramux adapters extract: {error}\n")
        return 1
    say(*([json.dumps(report, indent=2)] if options.json else _lines(report)))
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    check_out(options.out, force=options.force)
    base = load_base(options.base)
    count, done = len(base.linears), 0

    def progress(module: str) -> None:
        nonlocal done
        done += 1
        sys.stderr.write(f"{done} of {count}: {module}\n")

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
    where = max(errors, key=lambda module: errors[module])
    return {
        "out": str(options.out),
        "bytes": result.adapter.nbytes(),
        "unchanged": count - len(errors),
        "error": {"mean": sum(errors.values()) / len(errors), "max": errors[where], "where": where},
        "modules": {module: {"rank": result.adapter.ranks[module], "error": errors[module]} for module in errors},
    }


def _lines(report: dict[str, Any]) -> Iterator[str]:
    error, ranks = report["error"], [module["rank"] for module in report["modules"].values()]
    for name, value in (
        ("written", f"{report['out']}, {format_bytes(report['bytes'])}"),
        ("sites", f"{len(ranks)}; {report['unchanged']} layers are the base's own"),
        ("ranks", f"{min(ranks)}..{max(ranks)}"),
        ("error", f"of ΔW, relative: {error['mean']:.3g} in the mean, up to {error['max']:.3g} ({error['where']})"),
    ):
        yield f"{name:<11}{value}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux adapters extract",
        description=__doc__,
        epilog="For methods that merge as they train (XGBLoRA) and keep no factors: adapters/README.md.",
    )
    parser.add_argument("merged", metavar="MERGED", help="folder of the merged model, or its name in the hub's cache")
    parser.add_argument("--base", required=True, metavar="BASE", help="folder or name of the model it was trained from")
    parser.add_argument("--out", required=True, type=native_path, metavar="FILE.safetensors", help="what to write")
    parser.add_argument("--force", action="store_true", help="overwrite that file")
    parser.add_argument("--json", action="store_true", help="JSON, with every layer's rank and error, instead of lines")
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
