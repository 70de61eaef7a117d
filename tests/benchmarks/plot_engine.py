"""kernels/engine_decode.svg from results/engine_decode.csv: what share of the base's speed is left under adapters.

python tests/benchmarks/plot_engine.py
"""

from __future__ import annotations

import csv
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "kernels" / "engine_decode.svg"
# Kind, requests, prompt, output, adapters; what reads every adapter once per step cannot do better than the floor.
FLOORS: dict[tuple[str, int, int, int, int], float | None] = {
    ("plain", 1, 128, 128, 1): 0.99,
    ("plain", 8, 128, 128, 8): 0.97,
    ("plain", 32, 128, 128, 32): 0.90,
    ("plain", 64, 128, 128, 1): 1.00,
    ("plain", 64, 128, 128, 8): 0.98,
    ("plain", 64, 128, 128, 64): 0.84,
    ("plain", 128, 128, 128, 64): 0.87,
    ("mixture", 64, 128, 128, 1): 0.98,
    ("mixture", 64, 128, 128, 8): 0.84,
    ("plain", 16, 512, 1, 8): None,
    ("plain", 8, 2000, 1, 8): None,
    ("mixture", 8, 2000, 1, 8): None,
}
COLOURS = {"stock": "#b0b7c3", "loramux": "#2f6f9f"}
LEFT, WIDTH, ROW, TOP = 250, 480, 40, 40


def shares() -> dict[tuple[str, tuple[str, int, int, int, int]], float]:
    """The newest share of each engine and shape."""
    found = {}
    with (HERE / "results" / "engine_decode.csv").open() as file:
        for row in sorted(csv.DictReader(file), key=lambda row: row["date"]):
            numbers = (int(row[name]) for name in ("requests", "prompt", "output", "adapters"))
            found[row["engine"], (row["kind"], *numbers)] = float(row["share_of_base"])
    return found  # type: ignore[return-value]


def picture() -> str:
    """The SVG's text."""
    known, height = shares(), TOP + ROW * len(FLOORS) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="20">share of the base model\'s own '
        "throughput: grey stock vLLM, blue loramux, | byte floor</text>",
    ]
    for i, (shape, floor) in enumerate(FLOORS.items()):
        kind, requests, prompt, output, adapters = shape
        y = TOP + ROW * i
        what = f"{requests} × {prompt} in, {output} out · {adapters} {kind}"
        parts.append(f'<text x="{LEFT - 10}" y="{y + 22}" text-anchor="end">{what}</text>')
        for engine, offset in (("stock", 4), ("loramux", 19)):
            share = known.get((engine, shape))
            text = "cannot" if share is None else f"{share:.2f}"
            length = (share or 0) * WIDTH
            parts.append(
                f'<rect x="{LEFT}" y="{y + offset}" width="{length:.0f}" height="13" fill="{COLOURS[engine]}"/>'
                f'<text x="{LEFT + length + 5:.0f}" y="{y + offset + 11}">{text}</text>'
            )
        if floor is not None:
            x = LEFT + floor * WIDTH
            parts.append(
                f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{y + 1}" y2="{y + 35}" stroke="#c0392b" stroke-width="2"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture())
