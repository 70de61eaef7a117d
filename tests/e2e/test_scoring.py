"""Teacher-forced reads in the worker equal Hugging Face's model in float64 under the same draws of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loramux.paths import cache_dir
from loramux.uncertainty import READ_KEY
from loramux.uncertainty.scores import split
from loramux_adapters import BaseModel, open_artefact, prepare, prepare_draw

from . import bayesian
from .hugging_face import encode, load

pytestmark = pytest.mark.engine

DRAWS = 4
TOLERANCE = 1e-4  # nats
ANSWER = (
    "Rain forms when warm, wet air rises and cools until the water in it gathers into drops. " * 6
)  # over a block of the KV cache


@pytest.fixture(scope="module")
def reference(base_path: Path) -> Any:
    return load(base_path, torch.float64)


@pytest.fixture(scope="module")
def text(base_path: Path) -> tuple[list[int], list[int]]:
    from transformers import AutoTokenizer

    (prompt,) = encode(base_path, ("Explain how rain forms, and why some clouds bring none of it at all.",))
    return prompt, AutoTokenizer.from_pretrained(base_path).encode(ANSWER, add_special_tokens=False)


class Draws:
    """The draws of an adapter: made resident as any adapter is, and as adapters for the reference."""

    def __init__(self, engine: Any, source: Path, base: BaseModel) -> None:
        cache = cache_dir() / "artefacts"
        artefact = prepare(source, base, cache)
        self._artefacts = [prepare_draw(artefact, cache, seed=0, sample=s) for s in range(DRAWS)]
        self.adapters = [open_artefact(artefact.path) for artefact in self._artefacts]
        self.requests = [engine.resident(artefact) for artefact in self._artefacts]


def read(engine: Any, draws: Draws, prompt: list[int], answer: list[int], job: str, **params: Any) -> dict[str, Any]:
    """One request per draw, and one of the base that decodes beside them."""
    from vllm import SamplingParams

    spec = {
        "job": job,
        "draws": DRAWS,
        "first": len(prompt) - 1,
        "targets": [[token] for token in answer],
        "full": True,
    }
    sampling = [
        SamplingParams(temperature=0, max_tokens=1, extra_args={READ_KEY: spec | {"draw": s}}, **params)
        for s in range(DRAWS)
    ]
    rows = [{"prompt_token_ids": [*prompt, *answer[:-1]]} for _ in range(DRAWS)]
    engine.llm.generate(
        [{"prompt_token_ids": prompt}, *rows],
        [SamplingParams(temperature=0, max_tokens=8), *sampling],
        lora_request=[None, *draws.requests],
        use_tqdm=False,
    )
    report: dict[str, Any] = engine.rpc("loramux_scores", job)
    return report


@pytest.mark.parametrize("mixture", [False, True], ids=["plain", "mixture"])
def test_reads_equal_hugging_face(
    engine: Any, reference: Any, base_model: BaseModel, tmp_path: Path, text: Any, mixture: bool
) -> None:
    prompt, answer = text
    adapter = bayesian.make(base_model, sigma=0.05, mixture=mixture, seed=1)
    draws = Draws(engine, bayesian.write(adapter, base_model, tmp_path / "a.safetensors"), base_model)
    report = read(engine, draws, prompt, answer, "job")
    assert report["error"] is None and np.all(report["seen"])
    tokens = split(np.array(report["total"]), np.array(report["entropy"]))

    logps = []
    for draw in draws.adapters:
        with bayesian.hooked(reference, draw) as model:
            logps.append(bayesian.log_probabilities(model, prompt, answer))
    p = torch.stack(logps).exp()
    total = torch.special.entr(p.mean(0)).sum(-1)
    aleatoric = torch.special.entr(p).sum(-1).mean(0)
    chosen = torch.stack([logp.gather(1, torch.tensor(answer)[:, None])[:, 0] for logp in logps])
    for ours, theirs in (
        (tokens.total_raw, total),
        (tokens.aleatoric, aleatoric),
        (tokens.epistemic_raw, total - aleatoric),
        (np.array(report["logp"])[..., 0], chosen),
    ):
        assert np.abs(ours - theirs.numpy()).max() < TOLERANCE
    assert tokens.epistemic_raw.mean() > 20 * TOLERANCE, "or equality would say nothing"
    engine.rpc("loramux_drop_scores", "job")


def test_without_noise_the_draws_agree(engine: Any, base_model: BaseModel, tmp_path: Path, text: Any) -> None:
    adapter = bayesian.make(base_model, sigma=0.0)
    draws = Draws(engine, bayesian.write(adapter, base_model, tmp_path / "a.safetensors"), base_model)
    # Draws of equal content share their blocks, and what comes out of the cache cannot be read.
    report = read(engine, draws, *text, "still", skip_reading_prefix_cache=True)
    tokens = split(np.array(report["total"]), np.array(report["entropy"]))
    assert tokens.epistemic.max() < 1e-6
    engine.rpc("loramux_drop_scores", "still")


def test_what_the_prefix_cache_hides_is_read_when_it_is_not_asked(
    engine: Any, base_model: BaseModel, tmp_path: Path, text: Any
) -> None:
    adapter = bayesian.make(base_model, sigma=0.05, seed=2)
    draws = Draws(engine, bayesian.write(adapter, base_model, tmp_path / "a.safetensors"), base_model)
    first = read(engine, draws, *text, "first", skip_reading_prefix_cache=True)
    hidden = read(engine, draws, *text, "again", skip_reading_prefix_cache=False)
    assert not np.all(hidden["seen"]) and np.any(hidden["seen"])
    again = read(engine, draws, *text, "again", skip_reading_prefix_cache=True)
    assert np.all(again["seen"])
    # Rows that were there before count once.
    assert np.abs(np.array(again["total"]) - first["total"]).max() < TOLERANCE
    for job in ("first", "again"):
        engine.rpc("loramux_drop_scores", job)
    assert engine.rpc("loramux_scores", "again") is None
