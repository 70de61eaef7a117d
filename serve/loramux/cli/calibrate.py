"""`loramux adapters calibrate NAME FILE.jsonl`: labelled answers for a running server, one JSON object a line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loramux.cli.client import Client
from loramux.cli.terminal import printable, show
from loramux.errors import ConfigError

_PATIENCE_S = 24 * 3600.0
_HINT = 'A line is {"prompt": …, "completion": …, "correct": true}, or {"prompt": …, "label": …} with --labels.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.jsonl", type=Path, help="an item a line, as in the API's `data`")
    parser.add_argument("--mode", choices=("score", "decide", "fast"), help="of the answers (default: the adapter's)")
    parser.add_argument("--labels", metavar="A,B", help="that `decide` chooses from; implies it")
    parser.add_argument("--samples", type=int, metavar="S", help="draws (default: 8)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")
    parser.add_argument(
        "--method", choices=("temperature", "platt", "isotonic"), help="default: the one with the smallest Brier score"
    )


def run(client: Client, options: argparse.Namespace) -> int:
    """Exit status 0 if the server did it. Raises LoramuxError."""
    labels = options.labels.split(",") if options.labels else None
    mode = options.mode or ("decide" if labels else None)
    asked = {"mode": mode, "labels": labels, "samples": options.samples, "seed": options.seed}
    body: dict[str, Any] = {"model": options.name, "data": list(_items(options.file))}
    body["uncertainty"] = {name: value for name, value in asked.items() if value is not None}
    if options.method:
        body["method"] = options.method
    path = "/v1/uncertainty/calibrate"
    card = client.checked(client.send("POST", path, body, key=client.admin_key, timeout_s=_PATIENCE_S))
    show(card, _lines(card), as_json=options.json)
    return 0


def _items(file: Path) -> Iterator[Any]:
    """Raises ConfigError, which names the line."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", hint="Name a file of JSON lines.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise ConfigError(f"{file}, line {number}, is no JSON.", hint=_HINT) from None


def _lines(card: Mapping[str, Any]) -> Iterator[str]:
    yield f"{printable(str(card['id']))}: {printable(str(card['method']))} of {card['n']} answers"
    before = f"{card['before']['ece']:.3f} before, " if card.get("before") else ""
    yield f"ECE        {before}{card['ece']:.3f} ({printable(str(card['evaluated']))})"
    if threshold := card.get("threshold"):
        score, value = printable(str(threshold["score"])), threshold["value"]
        when = "never" if value is None else f"where {score} is above {value:.4g}"
        remain = f"of the {threshold['coverage']:.0%} that remain at most {threshold['bound']:.1%} are wrong"
        yield f"abstain    {when}: {remain}, with {1 - threshold['delta']:.0%} certainty"
