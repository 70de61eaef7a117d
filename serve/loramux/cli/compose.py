"""`loramux adapters compose arrow NAME=PATH …`: one adapter out of several, without training."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from loramux.bases import DEFAULT_BASE
from loramux.cli import making
from loramux.cli.base import load_base
from loramux.errors import ConfigError
from loramux.units import format_bytes
from loramux_adapters import LoweredAdapter, lower
from loramux_adapters.compose.arrow import arrow
from loramux_adapters.native import write_native
from loramux_adapters.tasks import at_task


def main(argv: Sequence[str] | None = None) -> int:
    """Write the composed adapter as a native file; 1 if an adapter, the base or the place is refused."""
    return making.run(_parser(), argv, _make, _rows)


def _make(options: argparse.Namespace) -> making.Report:
    base = load_base(options.base)
    adapters: dict[str, LoweredAdapter] = {}
    for name, path in options.adapters:
        if name in adapters:
            raise ConfigError(f"Two adapters are called {name}.", hint="Give each a name of its own.")
        adapters[name] = at_task(lower(path, base))
    composed = arrow(list(adapters.items()), base=base, top_k=options.top_k, temperature=options.temperature)
    write_native(options.out, composed, base.name)
    return {"method": composed.method, "experts": list(adapters), "bytes": composed.nbytes(), "ranks": composed.ranks}


def _rows(report: making.Report) -> Iterator[tuple[str, str]]:
    ranks = report["ranks"].values()
    yield "written", f"{report['out']}, {report['method']}, {format_bytes(report['bytes'])}"
    yield "experts", ", ".join(report["experts"])
    yield "sites", f"{len(ranks)}, rank {max(ranks)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loramux adapters compose", description=__doc__)
    methods = parser.add_subparsers(required=True, metavar="METHOD")
    command = methods.add_parser(
        "arrow",
        help="route every token to the LoRAs whose prototypes fit it best (arXiv 2405.11157)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("adapters", nargs="+", type=_named_path, metavar="NAME=PATH", help="plain LoRAs, in order")
    making.add_output(command, details="every module's rank")
    command.add_argument("--top-k", type=int, default=3, metavar="K", help="LoRAs that a token uses")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the softmax over those")
    command.add_argument("--base", default=DEFAULT_BASE, metavar="BASE", help="a folder or a name")
    return parser


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)
