"""`loramux adapters mean PATH --out PLACE`: a Bayesian adapter without its posterior, for whatever knows of none."""

import argparse
from collections.abc import Iterator, Sequence

from loramux.cli import making
from loramux.cli.base import load_base
from loramux.units import format_bytes
from loramux_adapters import lower
from loramux_adapters.native import SUFFIX, write_native
from loramux_adapters.peft.export import write_peft


def main(argv: Sequence[str] | None = None) -> int:
    """Write the mean as a native file or a PEFT folder; 1 if the adapter, the base or the place is refused."""
    return making.run(_parser(), argv, _make, _rows)


def _make(options: argparse.Namespace) -> making.Report:
    base = load_base(options.base)
    adapter = lower(options.path, base)
    mean = adapter.mean
    if options.out.suffix == SUFFIX:
        write_native(options.out, mean, base.name)
    else:
        write_peft(options.out, mean, base.name)
    return {"method": mean.method, "posterior": adapter.posterior, "bytes": mean.nbytes(), "ranks": mean.ranks}


def _rows(report: making.Report) -> Iterator[tuple[str, str]]:
    yield "written", f"{report['out']}, {report['method']}, {format_bytes(report['bytes'])}"
    yield "posterior", f"{report['posterior']}, left out" if report["posterior"] else "none, as before"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loramux adapters mean", description=__doc__)
    making.add_output(parser, details="every module's rank", folders=True)
    making.add_adapter(parser)
    return parser
