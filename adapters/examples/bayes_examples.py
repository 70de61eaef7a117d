"""Trains the two Bayesian examples, and measures them: `reviews`, a BLoB LoRA, and `topics`, a mixture of three.

    python adapters/examples/bayes_examples.py --base PATH --example reviews
    python adapters/examples/bayes_examples.py --base PATH --example topics

Unlike the experiment's, their loss is on what is written, the answer and the end of the turn, among all tokens.
"""

import argparse
import json
import logging
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from bayes_data import REVIEWS, TOPICS, Question
from bayes_metrics import metrics
from bayes_run import BATCH, DRAWS, TEST, VALIDATION, shuffled
from bayes_trunk import Texts, Trunk

from loramux_adapters import BaseModel, draw, lower, write_native
from loramux_adapters.applied import applied
from loramux_adapters.native import digest_of
from loramux_adapters.train import BlobSite, Options, Shape, TrainableAdapter, blob, fit

HERE = Path(__file__).parent
RESULTS = HERE / "bayes_examples.json"
BASE_NAME = "smollm2-135m-instruct"
EXAMPLES = {"reviews": (REVIEWS, Shape(8, 16.0), 256), "topics": (TOPICS, Shape(4, 16.0, experts=3), 200)}
FIRST_LAYER, STEPS, SAMPLES = 26, 160, 8
LEARNING_RATE, SIGMA, PRIOR, KL_WEIGHT = 3e-3, 0.1, 0.2, 0.005

log = logging.getLogger("bayes_examples")


def train(trunk: Trunk, base: BaseModel, texts: Texts, shape: Shape) -> TrainableAdapter[BlobSite]:
    adapter = TrainableAdapter.create(base, trunk.modules, partial(BlobSite, sigma=SIGMA), shape, 0)
    order = shuffled(len(texts.suffixes), BATCH, 0)
    started = time.monotonic()

    def loss() -> torch.Tensor:
        value = trunk.written_loss(texts, next(order), DRAWS)
        log.info("loss %.3f, %.0f s", value.item(), time.monotonic() - started)
        return value

    penalty = blob.penalty(adapter, len(texts.suffixes), PRIOR, KL_WEIGHT, STEPS // 2)
    fit(trunk.model, adapter, loss, Options(STEPS, LEARNING_RATE, draws=DRAWS), penalty)
    return adapter


def save(name: str, adapter: TrainableAdapter[BlobSite]) -> Path:
    """In bfloat16: BLoB's own layout, or a native file."""
    if name == "reviews":
        adapter.save_peft(HERE / name, BASE_NAME, torch.bfloat16)
        return HERE / name
    return write_native(HERE / f"{name}.safetensors", adapter.bfloat16().lowered(), BASE_NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--example", required=True, choices=EXAMPLES)
    parser.add_argument("--archives", type=Path, default=Path.home() / ".cache/loramux/examples")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/loramux/bayes", help="hidden states")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    question: Question
    question, shape, count = EXAMPLES[args.example]
    held_out, _, rows = question.parts(args.archives, TEST, VALIDATION, count)
    trunk, base = Trunk(args.base, FIRST_LAYER, args.cache), BaseModel.from_pretrained(args.base, BASE_NAME)
    adapter = train(trunk, base, trunk.texts(question, rows, answered=True), shape)
    saved = lower(save(args.example, adapter), base)
    texts, digest = trunk.texts(question, held_out), digest_of(saved)
    logs = []
    for sample in range(SAMPLES):
        with applied(trunk.model, draw(saved, digest=digest, seed=0, sample=sample)):
            logs.append(trunk.log_probabilities(texts))
    found = {
        name: value
        for name, value in metrics(torch.stack(logs), texts.answers).items()
        if name not in ("bins", "risks")
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[args.example] = {"date": datetime.now(UTC).date().isoformat(), "train_texts": count} | found
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
