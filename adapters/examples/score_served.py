"""Accuracy of a model behind a running server, on every task's held-out texts: for adapters that PEFT cannot load.

    python adapters/examples/score_served.py --base PATH --model desk [--url http://127.0.0.1:8000/v1]

Only `score.py`'s *generated*: greedy, at most four tokens, right when the first word is the label. The record goes into
results.json under the model's name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
from datetime import UTC, datetime
from pathlib import Path

from encode import Encoder
from openai import AsyncOpenAI
from score import NEW_TOKENS
from sources import Rows
from tasks import TASKS
from transformers import AutoTokenizer

RESULTS = Path(__file__).with_name("results.json")
CONCURRENT = 16

log = logging.getLogger("score_served")


async def generated(client: AsyncOpenAI, model: str, encoder: Encoder, rows: Rows) -> float:
    """Fraction of right answers."""
    free = asyncio.Semaphore(CONCURRENT)

    async def right(text: str, label: str) -> bool:
        message = encoder.task.message(encoder.cut(text, encoder.task.max_tokens))
        async with free:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": message}], temperature=0, max_tokens=NEW_TOKENS
            )
        word = re.match(r"\W*(\w*)", answer.choices[0].message.content or "")
        return word is not None and word[1].lower() == label

    seen = await asyncio.gather(*(right(text, label) for text, label in rows))
    return sum(seen) / len(rows)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base model, for its tokeniser")
    parser.add_argument("--model", required=True, help="name of the adapter on the server")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/loramux/examples", help="archives")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    client = AsyncOpenAI(base_url=args.url, api_key="EMPTY", timeout=600)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tasks: dict[str, dict[str, float]] = {}
    for name, task in TASKS.items():
        encoder = Encoder.create(tokenizer, task)
        _, held_out = task.split(args.cache)
        tasks[name] = {
            "n": len(held_out),
            "generated": round(await generated(client, args.model, encoder, held_out), 4),
            "own": round(await generated(client, args.model, encoder, task.own_examples), 4),
        }
        log.info("%s on %s: %s", args.model, name, tasks[name])
    results = json.loads(RESULTS.read_text())
    results[args.model] = {"date": datetime.now(UTC).date().isoformat(), "tasks": tasks}
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
