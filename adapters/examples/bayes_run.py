"""BLoB and ABMLL against what costs less, on held-out texts; a line of bayes_results.jsonl per finished run.

    python adapters/examples/bayes_run.py --base PATH --seeds 0 1 2
    python adapters/examples/bayes_plot.py                                          plots and the table, from the lines

What is there already is not run again. All methods adapt the same layers with the same rank, batch, steps and learning
rate. Draws are the served ones (`loramux_adapters.draw`), of one A for all texts.
"""

import argparse
import json
import logging
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bayes_data import LEARNED, REVIEWS, SARCASM, TOPICS, Question
from bayes_metrics import metrics, temperature
from bayes_trunk import Split, Texts, Trunk, split

from loramux_adapters import BaseModel, LoweredAdapter, draw
from loramux_adapters.applied import applied
from loramux_adapters.gate import Gate
from loramux_adapters.lowered import LoweredSite
from loramux_adapters.native import digest_of
from loramux_adapters.train import (
    BlobSite,
    HierarchicalSite,
    Options,
    Shape,
    Site,
    TrainableAdapter,
    abmll,
    adapt,
    blob,
    fit,
    meta_fit,
)
from loramux_adapters.variance import Variance, VarianceKind

RESULTS = Path(__file__).with_name("bayes_results.jsonl")
FIRST_LAYER = 28
SHAPE = Shape(rank=8, alpha=16.0)
MIXTURE = Shape(rank=4, alpha=16.0, experts=3)
BATCH, DRAWS, SAMPLES, MEMBERS = 8, 2, 8, 5
VALIDATION, TEST = 100, 300
LEARNING_RATE = 3e-3
DROPOUT = 0.1
SIGMA, PRIOR, KL_WEIGHT = 0.2, 0.2, 0.005
OFFSET, WEIGHTS = 0.03, abmll.Weights(beta=3e-2, gamma=1e-6)
LOOSE = abmll.Weights(beta=3e-3, gamma=1e-6)  # adapts further from the same θ
META_STEPS, INNER_STEPS, META_TEXTS = 60, 4, 48

log = logging.getLogger("bayes_run")


@dataclass(frozen=True)
class Setting:
    question: Question
    train: int
    steps: int
    methods: tuple[str, ...]


_ALL = ("lora", "blob", "abmll", "mcdropout", "ensemble")
SETTINGS = {
    "reviews": Setting(REVIEWS, 64, 160, (*_ALL, "abmll-loose", "blob-mixture")),
    "sarcasm": Setting(SARCASM, 64, 160, (*_ALL, "abmll-loose")),
    "sarcasm-32": Setting(SARCASM, 32, 40, _ALL),
    "reviews-32": Setting(REVIEWS, 32, 40, _ALL),
    "topics": Setting(TOPICS, 100, 160, ("lora", "blob", "mcdropout", "ensemble", "blob-mixture")),
}


class DropoutSite(Site):
    """PEFT's LoRA with dropout on its input, for each token anew in training; a draw is one mask (`mcdropout.py`)."""

    method = "mcdropout"

    def shrunk(self, x: torch.Tensor) -> torch.Tensor:
        return super().shrunk(torch.nn.functional.dropout(x, DROPOUT, self.training))

    def lowered(self, module: str) -> tuple[LoweredSite, Gate | None]:
        site, gate = super().lowered(module)
        return LoweredSite(**vars(site) | {"variance": Variance(VarianceKind.DROPOUT, rate=DROPOUT)}), gate


class Experiment:
    """One setting, one seed."""

    def __init__(self, trunk: Trunk, base: BaseModel, setting: Setting, parts: Split, seed: int, cache: Path) -> None:
        self.trunk, self.base, self.setting, self.parts, self.seed = trunk, base, setting, parts, seed
        self.cache = cache
        self._lora: torch.Tensor | None = None

    def run(self, method: str, archives: Path) -> Iterator[tuple[str, dict[str, object]]]:
        """The rows of a method: its own, and those that come with it."""
        if method == "lora":
            adapter = self.plain(self.seed)
            validation = self.predict([adapter.lowered()], self.parts.validation)[0]
            test, foreign = self.both([adapter.lowered()])
            yield "lora", metrics(test, self.parts.test.answers, foreign)
            t = temperature(validation, self.parts.validation.answers)
            cooled = [torch.log_softmax(part / t, -1) for part in (test, foreign)]
            yield (
                "lora+temperature",
                metrics(cooled[0], self.parts.test.answers, cooled[1]) | {"temperature": round(t, 4)},
            )
        elif method == "ensemble":
            members = [self.plain(self.seed + 1000 * member).lowered() for member in range(MEMBERS)]
            yield method, self.scored(members)
        else:
            trained = self.trained(method, archives).lowered()
            if method.startswith("blob"):
                yield f"{method}, mean", self.scored([trained.mean])
            digest = digest_of(trained)
            draws = [draw(trained, digest=digest, seed=0, sample=sample) for sample in range(SAMPLES)]
            yield method, self.scored(draws)

    def trained(self, method: str, archives: Path) -> TrainableAdapter[Any]:
        if method.startswith("abmll"):
            weights = LOOSE if method == "abmll-loose" else WEIGHTS
            shared = learned(self.trunk, self.base, self.seed, archives, self.cache)
            loss = self.batches(self.parts.train)
            return adapt(self.trunk.model, shared, loss, self.setting.train, self.options(DRAWS), weights)
        if method == "mcdropout":
            return self.plain(self.seed, DropoutSite)
        shape = MIXTURE if method == "blob-mixture" else SHAPE
        adapter = self.create(partial(BlobSite, sigma=SIGMA), shape, self.seed)
        penalty = blob.penalty(adapter, self.setting.train, PRIOR, KL_WEIGHT, self.setting.steps // 2)
        fit(self.trunk.model, adapter, self.batches(self.parts.train), self.options(DRAWS), penalty)
        return adapter

    def plain(self, seed: int, kind: type[Site] = Site) -> TrainableAdapter[Any]:
        adapter = self.create(kind, SHAPE, seed)
        torch.manual_seed(seed)  # of dropout
        fit(self.trunk.model, adapter, self.batches(self.parts.train, seed, 1), self.options(1))
        return adapter

    def create(self, kind: Callable[..., Any], shape: Shape, seed: int) -> TrainableAdapter[Any]:
        return TrainableAdapter.create(self.base, self.trunk.modules, kind, shape, seed)

    def options(self, draws: int) -> Options:
        return Options(self.setting.steps, LEARNING_RATE, draws=draws, seed=self.seed)

    def batches(self, texts: Texts, seed: int | None = None, draws: int = DRAWS) -> Callable[[], torch.Tensor]:
        return batches(self.trunk, texts, self.seed if seed is None else seed, draws)

    def scored(self, adapters: list[LoweredAdapter]) -> dict[str, object]:
        test, foreign = self.both(adapters)
        return metrics(test, self.parts.test.answers, foreign)

    def both(self, adapters: list[LoweredAdapter]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.predict(adapters, self.parts.test), self.predict(adapters, self.parts.foreign)

    def predict(self, adapters: list[LoweredAdapter], texts: Texts) -> torch.Tensor:
        """log P(label), [S, N, K]"""
        found = []
        for adapter in adapters:
            with applied(self.trunk.model, adapter):
                found.append(self.trunk.log_probabilities(texts))
        return torch.stack(found)


def batches(trunk: Trunk, texts: Texts, seed: int, draws: int) -> Callable[[], torch.Tensor]:
    """The loss of the next batch."""
    order = shuffled(len(texts.suffixes), BATCH, seed)
    return lambda: trunk.loss(texts, next(order), draws)


def shuffled(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Passes over the texts in random order, without end; what is left of one begins the next."""
    dice, queue = random.Random(seed), list[int]()
    while True:
        while len(queue) < batch:
            queue.extend(dice.sample(range(count), count))
        yield [queue.pop(0) for _ in range(batch)]


def learned(
    trunk: Trunk, base: BaseModel, seed: int, archives: Path, cache: Path
) -> TrainableAdapter[HierarchicalSite]:
    """ABMLL's θ of a seed, learned on LEARNED; kept in the cache."""
    shared = TrainableAdapter.create(base, trunk.modules, partial(HierarchicalSite, offset=OFFSET), SHAPE, seed)
    path = cache / f"theta-{seed}.pt"
    if path.exists():
        shared.load_state_dict(torch.load(path))
        return shared
    tasks = []
    for question in LEARNED:
        (rows,) = question.parts(archives, META_TEXTS)
        loss = batches(trunk, trunk.texts(question, rows), seed, DRAWS)
        tasks.append(abmll.Task(META_TEXTS, loss, loss))
    inner = Options(INNER_STEPS, LEARNING_RATE, warm_up=0, draws=DRAWS)
    outer = Options(META_STEPS, LEARNING_RATE, draws=DRAWS, seed=seed)
    losses = meta_fit(trunk.model, shared, tasks, outer, inner, WEIGHTS)
    log.info("θ %d: first and last losses %s %s", seed, losses[:4], losses[-4:])
    torch.save(shared.state_dict(), path)
    return shared


def recorded() -> set[tuple[str, int, str]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["setting"], row["seed"], row["method"]) for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--archives", type=Path, default=Path.home() / ".cache/loramux/examples")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/loramux/bayes", help="hidden states, ABMLL's θ"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)

    base, trunk = BaseModel.from_pretrained(args.base), Trunk(args.base, FIRST_LAYER, args.cache)
    for seed in args.seeds:
        for name in args.settings:
            setting = SETTINGS[name]
            parts = split(trunk, setting.question, args.archives, setting.train, VALIDATION, TEST)
            experiment = Experiment(trunk, base, setting, parts, seed, args.cache)
            for method in setting.methods:
                if (name, seed, method) in recorded() or (args.methods and method not in args.methods):
                    continue
                started = time.monotonic()
                for row, found in experiment.run(method, args.archives):
                    record = {
                        "date": datetime.now(UTC).date().isoformat(),
                        "commit": head.stdout.strip(),
                        "setting": name,
                        "seed": seed,
                        "method": row,
                        "steps": setting.steps,
                        "seconds": round(time.monotonic() - started),
                    } | found
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    log.info("%s", {k: v for k, v in record.items() if k not in ("bins", "risks")})


if __name__ == "__main__":
    main()
