"""Plots and the table in adapters/README.md, from bayes_results.jsonl: means over the seeds that are there.

python adapters/examples/bayes_plot.py
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- uncertainty: written by bayes_plot.py -->", "<!-- end of uncertainty -->"
COLUMNS = {
    "accuracy": "accuracy",
    "ece": "ECE",
    "nll": "NLL",
    "brier": "Brier",
    "auroc_error": "AUROC of errors",
    "auroc_foreign": "AUROC of foreign texts",
    "accuracy_80": "accuracy at 80 % coverage",
}
ORDER = (
    "lora",
    "lora+temperature",
    "mcdropout",
    "ensemble",
    "blob, mean",
    "blob",
    "blob-mixture, mean",
    "blob-mixture",
    "abmll",
    "abmll-loose",
)
COLOURS = {
    "lora": "#7f8896",
    "lora+temperature": "#c98a1b",
    "mcdropout": "#3c9d6b",
    "ensemble": "#8e5ea8",
    "blob": "#2f6f9f",
    "abmll": "#c0392b",
}
SIDE, LEFT, TOP = 260, 50, 34
Rows = dict[str, list[dict[str, Any]]]


def rows() -> dict[str, Rows]:
    """By setting and method."""
    found: dict[str, Rows] = defaultdict(lambda: defaultdict(list))
    for line in (HERE / "bayes_results.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["setting"]][row["method"]].append(row)
    return found


def table(found: Rows) -> str:
    """Mean over seeds, and in brackets the standard deviation of accuracy, ECE and NLL."""
    lines = [f"| method | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method in (name for name in ORDER if name in found):
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in found[method]]
            spread = f" ({pstdev(values):.3f})" if column in ("accuracy", "ece", "nll") and len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {method} | {len(found[method])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: Rows, title: str) -> str:
    """Reliability on the left, risk by coverage on the right."""
    names = [name for name in COLOURS if name in found]
    height = TOP + SIDE + 50 + 16 * ((len(names) + 2) // 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (LEFT + SIDE) + 40}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>',
    ]
    risks = [value for name in names for row in found[name] for value in row["risks"]]
    highest = max(0.1, -(-max(risks) * 10 // 1) / 10)
    parts += _axes(LEFT, f"{title}: accuracy by confidence", "confidence", 0.0, 1.0)
    parts += _axes(2 * LEFT + SIDE, "error by coverage", "share of texts answered", 0.0, highest)
    parts.append(_line([(0, 0), (1, 1)], LEFT, 1.0, "#d8dce2"))
    for i, name in enumerate(names):
        parts.append(_line(_reliability(found[name]), LEFT, 1.0, COLOURS[name], dots=True))
        count = len(found[name][0]["risks"])
        curve = [((j + 1) / count, mean(row["risks"][j] for row in found[name])) for j in range(count)]
        parts.append(_line(curve, 2 * LEFT + SIDE, highest, COLOURS[name]))
        x, y = LEFT + 190 * (i % 3), TOP + SIDE + 46 + 16 * (i // 3)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 15}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _reliability(found: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The seeds' bins put together, in at most eight of about equal numbers of texts."""
    bins = sorted((tuple(one) for row in found for one in row["bins"]), key=lambda one: one[1])
    total, points, gathered = sum(n for n, _, _ in bins), [], [0.0, 0.0, 0.0]
    for n, confidence, accuracy in bins:
        gathered = [gathered[0] + n, gathered[1] + n * confidence, gathered[2] + n * accuracy]
        if gathered[0] >= total / 8 or (n, confidence, accuracy) == bins[-1]:
            points.append((gathered[1] / gathered[0], gathered[2] / gathered[0]))
            gathered = [0.0, 0.0, 0.0]
    return points


def _axes(left: int, title: str, label: str, low: float, high: float) -> list[str]:
    parts = [
        f'<text x="{left}" y="20" font-weight="bold">{title}</text>',
        f'<rect x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#9aa2ae"/>',
        f'<text x="{left + SIDE / 2}" y="{TOP + SIDE + 28}" text-anchor="middle">{label}</text>',
    ]
    for i in range(6):
        y, x = TOP + SIDE * (1 - i / 5), left + SIDE * i / 5
        parts.append(f'<text x="{left - 5}" y="{y + 4:.0f}" text-anchor="end">{low + (high - low) * i / 5:.2f}</text>')
        parts.append(f'<text x="{x:.0f}" y="{TOP + SIDE + 14}" text-anchor="middle">{i / 5:.1f}</text>')
    return parts


def _line(points: list[tuple[float, float]], left: int, high: float, colour: str, dots: bool = False) -> str:
    places = [(left + SIDE * x, TOP + SIDE * (1 - y / high)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places) if dots else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>{marks}'


def main() -> None:
    found = rows()
    parts = []
    for setting in sorted(found, key=lambda name: ("-" in name, name == "topics", name)):
        methods = found[setting]
        (HERE / f"bayes_{setting}.svg").write_text(picture(methods, setting))
        parts.append(f"`{setting}`\n\n{table(methods)}\n\n![{setting}](examples/bayes_{setting}.svg)\n")
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n" + "\n".join(parts) + END + after)


if __name__ == "__main__":
    main()
