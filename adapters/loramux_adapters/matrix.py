"""The table of methods: what each recognises, reads, writes and serves. Made of what the methods say of themselves.

`python -m loramux_adapters.matrix FILE` writes it into a Markdown file, between the two markers (`make matrix`).
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.methods import METHODS

BEGIN, END = "<!-- methods: written by `make matrix` -->", "<!-- end of methods -->"
HEADS = ("method", "read", "write", "serve", "exact", "router", "prefix cache", "quantised base", "posterior")


def data() -> list[dict[str, Any]]:
    """Every method as JSON."""
    return [
        {"name": method.name}
        | asdict(method.abilities)
        | {"layouts": [_layout_data(layout) for layout in method.abilities.layouts]}
        for method in METHODS
    ]


def cells(name: str, can: Abilities) -> tuple[str, ...]:
    """A row under HEADS. What nobody can ask about, as nothing is read or served, is "–"."""
    served = can.serve is not False
    return (
        name,
        _word(can.read),
        _word(can.write),
        f"no: {can.why}" if not served else f"partly: {can.serve}" if isinstance(can.serve, str) else "yes",
        _word(can.exact) if can.read else "–",
        can.router,
        _word(can.prefix_cache) if served or not can.prefix_cache else "–",
        _word(can.quantised_base) if served else "–",
        can.posterior or "none",
    )


def markdown() -> str:
    """The table, with the layouts as its second column."""
    lines = [_line((HEADS[0], "recognised by", *HEADS[1:])), _line(["---"] * (len(HEADS) + 1))]
    for method in METHODS:
        name, *rest = cells(f"`{method.name}`", method.abilities)
        layouts = "<br>".join(f"{layout}: {layout.sign}" for layout in method.abilities.layouts)
        lines.append(_line((name, layouts, *rest)))
    return "\n".join(lines)


def updated(text: str) -> str:
    """A Markdown text with the table between its markers. Raises ValueError unless it has both, once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs one line {BEGIN} and after it one line {END}")
    between = re.compile(f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", re.DOTALL)
    return between.sub(lambda _: markdown() + "\n", text)


def main(argv: Sequence[str]) -> None:
    for name in argv:
        path = Path(name)
        path.write_text(updated(path.read_text()))


def _word(value: bool | str) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _layout_data(layout: Layout) -> dict[str, Any]:
    return {name: value for name, value in asdict(layout).items() if name != "keys"} | {"sign": layout.sign}


if __name__ == "__main__":
    main(sys.argv[1:])
