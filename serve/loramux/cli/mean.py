"""`loramux adapters mean PATH --out PLACE`: a Bayesian adapter without its posterior, for whatever knows of none."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from loramux.bases import DEFAULT_BASE
from loramux.cli.base import load_base
from loramux.cli.making import check_out
from loramux.console import note, say
from loramux.errors import LoramuxError
from loramux_adapters import AdapterError, lower
from loramux_adapters.native import SUFFIX, write_native
from loramux_adapters.peft.export import write_peft


def main(argv: Sequence[str] | None = None) -> int:
    """Write the mean as a native file or a PEFT folder; 1 if the adapter, the base or the place is refused."""
    options = _parser().parse_args(argv)
    try:
        check_out(options.out, force=options.force)
        base = load_base(options.base)
        adapter = lower(options.path, base)
        if options.out.suffix == SUFFIX:
            write_native(options.out, adapter.mean, base.name)
        else:
            write_peft(options.out, adapter.mean, base.name)
    except (AdapterError, LoramuxError, OSError) as error:
        note(f"loramux adapters mean: {error}")
        return 1
    say(f"{options.out}: {adapter.method} without {adapter.posterior or 'a posterior, as it was'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loramux adapters mean", description=__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="the adapter's folder, or a native file")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="PLACE",
        help="a native file if it ends in .safetensors; else a folder, as PEFT writes one",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument(
        "--base", default=DEFAULT_BASE, metavar="BASE", help=f"folder or name (default: {DEFAULT_BASE})"
    )
    return parser
