"""`loramux adapters compose arrow NAME=PATH …`: one adapter out of several, without training."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loramux.bases import DEFAULT_BASE
from loramux.cli.base import load_base, native_path
from loramux.console import say
from loramux.errors import ConfigError, LoramuxError
from loramux_adapters import AdapterError, LoweredAdapter, lower
from loramux_adapters.compose.arrow import arrow
from loramux_adapters.native import write_native
from loramux_adapters.tasks import at_task


def main(argv: Sequence[str] | None = None) -> int:
    """Write the composed adapter as a native file; 1 if an adapter, the base or the place is refused."""
    options = _parser().parse_args(argv)
    try:
        composed = _compose(options)
    except (AdapterError, LoramuxError, OSError) as error:
        sys.stderr.write(f"loramux adapters compose: {error}\n")
        return 1
    names = ", ".join(name for name, _ in options.adapters)
    say(f"{options.out}: arrow over {names}; {len(composed.sites)} sites, rank {composed.rank}")
    return 0


def _compose(options: argparse.Namespace) -> LoweredAdapter:
    base = load_base(options.base)
    adapters: dict[str, LoweredAdapter] = {}
    for name, path in options.adapters:
        if name in adapters:
            raise ConfigError(f"Two adapters are called {name}.", hint="Give each a name of its own.")
        adapters[name] = at_task(lower(path, base))
    composed = arrow(list(adapters.items()), base=base, top_k=options.top_k, temperature=options.temperature)
    write_native(options.out, composed, base.name)
    return composed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loramux adapters compose", description=__doc__)
    methods = parser.add_subparsers(required=True, metavar="METHOD")
    command = methods.add_parser(
        "arrow",
        help="route every token to the LoRAs whose prototypes fit it best (arXiv 2405.11157)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("adapters", nargs="+", type=_named_path, metavar="NAME=PATH", help="plain LoRAs, in order")
    command.add_argument("--out", required=True, type=native_path, metavar="FILE.safetensors", help="what to write")
    command.add_argument("--top-k", type=int, default=3, metavar="K", help="LoRAs that a token uses")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the softmax over those")
    command.add_argument("--base", default=DEFAULT_BASE, metavar="BASE", help="a folder or a name")
    return parser


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)
