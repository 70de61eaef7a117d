"""Trains one example adapter on a CPU with PEFT, and measures it against the base model on held-out texts.

    python adapters/examples/train.py --base PATH --task spam --out adapters/examples/spam
    python adapters/examples/train.py --base PATH --task spam --out adapters/examples/spam --evaluate

`--base` is the folder of SmolLM2-135M-Instruct. The second form trains nothing; it adds the task's numbers to
`results.json` beside this file. Both download the task's texts into `--cache` first.
"""

import argparse
import json
import logging
import os
import random
import time
from datetime import UTC, datetime
from pathlib import Path

import peft
import torch
import transformers
from encode import Encoder, shared_cache
from score import Scores, score
from sources import Rows
from tasks import SEED, TASKS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

RANK = 4
ALPHA = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH = 8
LEARNING_RATE = 1e-3
WARM_UP = 10  # steps
SHORTEST = 12  # tokens, where a task varies the length of its texts
IGNORED = -100  # the label that cross_entropy skips
RESULTS = Path(__file__).with_name("results.json")

log = logging.getLogger("train")


def train(base: PreTrainedModel, encoder: Encoder, rows: Rows) -> peft.PeftModel:
    """One pass over `rows`; the loss is on the answer and the end-of-turn token only."""
    torch.manual_seed(SEED)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM", bias="none", lora_dropout=0.0
    )
    model = peft.get_peft_model(base, config)
    batches = make_batches(encoder, rows)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / WARM_UP, (len(batches) - step) / (len(batches) - WARM_UP))
    )
    model.train()
    started, running = time.monotonic(), 0.0
    for step, (tokens, targets) in enumerate(batches, start=1):
        loss = answer_loss(base, encoder, tokens, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running = loss.item() if step == 1 else 0.9 * running + 0.1 * loss.item()
        if step % 10 == 0:
            log.info("step %d of %d: loss %.3f, %.0f s", step, len(batches), running, time.monotonic() - started)
    return model


def make_batches(encoder: Encoder, rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) pairs, both [batch, length], padded to similar lengths, in random order."""
    dice = random.Random(SEED)
    sequences = []
    for text, label in rows:
        longest = encoder.task.max_tokens
        longest = dice.randint(SHORTEST, longest) if encoder.task.vary_length else longest
        prompt, answer = encoder.suffix(encoder.cut(text, longest)), encoder.answer(label)
        # The logits at position t predict token t + 1: the prompt's last token predicts the answer's first.
        sequences.append((prompt + answer[:-1], [IGNORED] * (len(prompt) - 1) + answer))
    sequences.sort(key=lambda pair: len(pair[0]) + dice.uniform(0, 4))
    batches = []
    for start in range(0, len(sequences), BATCH):
        tokens, targets = zip(*sequences[start : start + BATCH], strict=True)
        batches.append((_pad(tokens, 0), _pad(targets, IGNORED)))
    dice.shuffle(batches)
    return batches


def _pad(rows: tuple[list[int], ...], value: int) -> torch.Tensor:
    rows_of_tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows_of_tensors, batch_first=True, padding_value=value)


def answer_loss(model: PreTrainedModel, encoder: Encoder, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the positions whose target is not IGNORED; only their logits are computed."""
    cache = shared_cache(model, encoder, len(tokens))
    hidden = model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
    wanted = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.get_submodule("lm_head")(hidden[wanted]), targets[wanted])


def save(model: peft.PeftModel, out: Path) -> None:
    """PEFT's own files, weights in bfloat16, without a machine's path and without the generated model card."""
    model.peft_config["default"].base_model_name_or_path = "smollm2-135m-instruct"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)


def evaluate(base: PreTrainedModel, encoder: Encoder, out: Path, held_out: Rows) -> dict[str, object]:
    """The task's record for results.json: base and adapter on held-out and on hand-written texts."""
    own = encoder.task.own_examples
    record: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": SEED,
        "chance": 1 / len(encoder.task.labels),
        "train_texts": encoder.task.train,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
    }
    for name in ("base", "adapter"):
        if name == "adapter":
            peft.PeftModel.from_pretrained(base, str(out))
        record[name] = {
            "held_out": _fractions(score(base, encoder, held_out)),
            "own": _fractions(own_scores := score(base, encoder, own)),
            "own_answers": own_scores.answers,
        }
        log.info("%s: %s", name, json.dumps(record[name]))
    return record


def _fractions(scores: Scores) -> dict[str, float]:
    names = ("generated", "ranked", "calibrated")
    return {"n": scores.n} | {name: round(getattr(scores, name), 4) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--out", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/loramux/examples", help="archives")
    parser.add_argument("--evaluate", action="store_true", help="measure the adapter in --out instead of training it")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    task = TASKS[args.task]
    rows, held_out = task.split(args.cache)
    encoder = Encoder.create(AutoTokenizer.from_pretrained(args.base), task)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    started, cpu = time.monotonic(), os.times()
    if args.evaluate:
        record = evaluate(base, encoder, args.out, held_out)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[task.name] = record
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    else:
        save(train(base, encoder, rows), args.out)
    seconds = os.times().user + os.times().system - cpu.user - cpu.system
    log.info("%s: %.0f s, %.0f s of CPU time", task.name, time.monotonic() - started, seconds)


if __name__ == "__main__":
    main()
