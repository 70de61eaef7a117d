"""`loramux adapters compact PATH --out FILE …`: a smaller adapter, with the error that it makes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from loramux.cli import compact_report, making
from loramux.cli.base import load_base, load_runnable
from loramux.console import note
from loramux_adapters import lower
from loramux_adapters.compact import Options, compact
from loramux_adapters.compact.adapter import check_compactable
from loramux_adapters.compact.measure import output_errors
from loramux_adapters.compact.options import Grouping, Similarity
from loramux_adapters.compact.quality import score
from loramux_adapters.compact.statistics import RouterStatistics, from_texts, from_traffic
from loramux_adapters.compact.texts import read_calibration, read_tasks, read_traffic, token_count
from loramux_adapters.native import digest_of, write_native
from loramux_adapters.tasks import at_task


def main(argv: Sequence[str] | None = None) -> int:
    """Write the compacted adapter as a native file; 1 if the adapter, a file, the base or the place is refused."""
    return making.run(_parser(), argv, _make, compact_report.rows)


def _make(options: argparse.Namespace) -> making.Report:
    wanted = Options(
        experts=options.experts,
        even=options.even,
        rank=options.rank,
        error=options.error,
        residual=options.residual,
        grouping=options.grouping,
        similarity=options.similarity,
    )
    base = load_base(options.base)
    adapter = at_task(lower(options.path, base))
    check_compactable(adapter)
    # Files that are not what they must be are refused before the model is loaded.
    tasks = read_tasks(options.labelled) if options.labelled else []
    traffic = read_traffic(options.traffic) if options.traffic else None
    model, tokenizer = load_runnable(options.base) if options.calibration or tasks else (None, None)
    texts = read_calibration(options.calibration, tokenizer) if options.calibration else []
    statistics: dict[str, RouterStatistics] | None = None
    if options.calibration and adapter.gates:
        note(f"running {len(texts)} calibration texts, {token_count(texts)} tokens")
        statistics = from_texts(model, adapter, texts)
    elif traffic is not None:
        statistics = from_traffic(adapter, traffic)
    result = compact(adapter, base, wanted, statistics)
    outputs = output_errors(model, adapter, result.after, texts) if texts else None
    report = compact_report.report(result, base, outputs) | {"calibration_tokens": token_count(texts)}
    if tasks:
        note(f"answering {sum(len(task.examples) for task in tasks)} labelled texts, before and after")
        before, after = (score(model, tokenizer, each, tasks) for each in (adapter, result.after))
        report["quality"] = [
            {"task": old.task, "n": old.n, "right": [old.right, new.right], "nats": [old.nats, new.nats]}
            for old, new in zip(before, after, strict=True)
        ]
    digest = digest_of(adapter)
    write_native(options.out, compact_report.warned(result.after, digest, report), base.name)
    return {"made_from": digest, **report}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux adapters compact",
        description=__doc__,
        epilog="Experts are merged as in MC-SMoE (arXiv 2310.01334), without training: adapters/README.md.",
    )
    making.add_output(parser, details="every module's error")
    making.add_adapter(parser)
    size = parser.add_argument_group("how small")
    size.add_argument("--experts", type=int, metavar="N", help="experts that a router keeps on average")
    size.add_argument("--even", action="store_true", help="every router keeps N, whatever it loses there")
    size.add_argument("--rank", type=int, metavar="R", help="largest rank of an expert, or of a LoRA, at a site")
    size.add_argument(
        "--error",
        type=float,
        metavar="E",
        help="bound on the relative error of ΔW (Frobenius), per expert and site",
    )
    size.add_argument("--residual", type=int, default=0, metavar="R", help="rank that merged experts keep of their own")
    size.add_argument(
        "--grouping",
        type=Grouping,
        choices=list(Grouping),
        default=Grouping.LOSS,
        help="which experts are merged: where it loses least (default), or around the most used (MC-SMoE)",
    )
    size.add_argument(
        "--similarity",
        type=Similarity,
        choices=list(Similarity),
        default=Similarity.OUTPUTS,
        help="with mc-smoe, what makes experts alike: what they add (default), or their router's scores",
    )
    known = parser.add_argument_group("what the routers do, and what the result is worth")
    source = known.add_mutually_exclusive_group()
    source.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.jsonl",
        help='texts to run here, a line {"text": …} or {"messages": […]}',
    )
    source.add_argument(
        "--traffic", type=Path, metavar="FILE.jsonl", help='answers to served requests with "routing": true, one a line'
    )
    known.add_argument(
        "--labelled",
        type=Path,
        metavar="FILE.json",
        help="to be answered before and after (adapters/README.md)",
    )
    return parser
