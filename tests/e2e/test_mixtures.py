"""Mixtures of LoRA experts through the engine equal plain torch hooks on the Hugging Face model.

The hooks are written from the formula, expert by expert; nothing of loramux computes them:

    l = |W x| / T     p = softmax(l)     g = p on the selected experts     y += Σ_e g_e · s_e · B_e (A_e x)

Top-k routing is discontinuous in rounding noise, so weights are mild and every reference is also run in float64: where
float32 and float64 references agree, no token of the test hangs on a route that rounding decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import BaseModel, LoweredAdapter, LoweredSite
from loramux_adapters.gate import Gate, Norm, PostMap, Select
from loramux_adapters.native import write_native

from ..adapters.hooks import hooked
from .hugging_face import TOLERANCE, Answer, assert_equal, difference, encode, generate, load

pytestmark = pytest.mark.engine

PROMPTS = ("Explain how rain forms.", "List three uses of copper.", "Write a line about a lighthouse.")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """Ranks per expert as a function of the layer, and the gate's options.

    `users`: which of the router's experts use each of these rank blocks, where they are not one each; `weights`: the
    index of each in the native format.
    """

    ranks: Callable[[int], tuple[int, ...]]
    targets: tuple[str, ...]
    gate: dict[str, Any] = field(default_factory=dict)
    users: tuple[tuple[int, ...], ...] = ()
    weights: tuple[int, ...] = ()

    def routed(self, blocks: int) -> int:
        """Experts of the router."""
        return 1 + max(e for users in self.users for e in users) if self.users else blocks


MIXTURES: dict[str, Mixture] = {
    "top2_of_4": Mixture(lambda layer: (8, 8, 4, 12), ATTENTION, {"select": Select.TOP_K, "k": 2}),
    "top3_of_7_by_layer": Mixture(
        lambda layer: tuple(4 + (layer + e) % 5 for e in range(7)), ATTENTION + MLP, {"select": Select.TOP_K, "k": 3}
    ),
    "dense_of_3": Mixture(lambda layer: (3, 1, 64), MLP, {"select": Select.ALL, "norm": Norm.SOFTMAX}),
    "fewer_experts_in_deep_layers": Mixture(
        lambda layer: (6,) * (16 if layer < 10 else 5), ("q_proj", "down_proj"), {"select": Select.TOP_K, "k": 2}
    ),
    "threshold": Mixture(
        lambda layer: (8, 8, 8), ("v_proj", "up_proj"), {"select": Select.THRESHOLD, "threshold": 0.34}
    ),
    "top_p_kept_as_is": Mixture(
        lambda layer: (4, 8, 4, 8, 2), ATTENTION, {"select": Select.TOP_P, "p": 0.6, "norm": Norm.SOFTMAX}
    ),
    "arrow_like": Mixture(
        lambda layer: (4, 4, 4),
        ATTENTION,
        {"select": Select.TOP_K, "k": 1, "post": PostMap.ABS, "temperature": 0.7},
    ),
    "one_expert": Mixture(lambda layer: (16,), ("o_proj",), {"select": Select.TOP_K, "k": 1}),
    # As `loramux adapters compact` leaves them: two groups of five experts, and expert 3 with rows of its own.
    "shared_rows": Mixture(
        lambda layer: (8, 6, 2),
        ATTENTION,
        {"select": Select.TOP_K, "k": 2, "expert_map": torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32)},
        users=((0, 2), (1, 3, 4), (3,)),
        weights=(0, 1, 2 + 3),
    ),
}


@dataclass(frozen=True)
class Experts:
    """One linear's experts: A_e [r_e, d_in], B_e [d_out, r_e], s_e, and the router W [E, d_in].

    `users`: which experts of the router each of them stands for; itself, but where experts share rows.
    """

    a: list[torch.Tensor]
    b: list[torch.Tensor]
    scale: list[float]
    router: torch.Tensor
    users: tuple[tuple[int, ...], ...]


def _random(mixture: Mixture, linears: Any, seed: int) -> dict[str, Experts]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (d_in, d_out) in linears.items():
        if not name.endswith(mixture.targets):
            continue
        ranks = mixture.ranks(int(name.split(".")[2]))
        made[name] = Experts(
            [torch.randn(r, d_in, generator=generator) * 0.05 for r in ranks],
            [torch.randn(d_out, r, generator=generator) * 0.02 for r in ranks],
            [1.0 + 0.5 * e for e in range(len(ranks))],
            torch.randn(mixture.routed(len(ranks)), d_in, generator=generator) * 0.1,
            mixture.users or tuple((e,) for e in range(len(ranks))),
        )
    return made


def _native(mixture: Mixture, experts: dict[str, Experts], path: Path) -> Path:
    sites, gates = {}, {}
    for name, site in experts.items():
        ranks = torch.tensor([len(a) for a in site.a])
        gates[name] = Gate(site.router, **mixture.gate)
        sites[name] = LoweredSite(
            torch.cat(site.a),
            torch.cat(site.b, dim=1).T.contiguous(),
            torch.repeat_interleave(torch.tensor(site.scale), ranks),
            gate=name,
            expert=torch.repeat_interleave(torch.tensor(mixture.weights or range(len(ranks))), ranks).int(),
        )
    write_native(path, LoweredAdapter("mixture", sites, gates=gates), "smollm2-135m-instruct")
    return path


def _gates(mixture: Mixture, scores: torch.Tensor) -> torch.Tensor:
    """The formula, token by token and expert by expert."""
    options = mixture.gate
    if options.get("post") is PostMap.ABS:
        scores = scores.abs()
    probabilities = torch.softmax(scores / options.get("temperature", 1.0), -1)
    gates = torch.zeros_like(probabilities)
    for t, p in enumerate(probabilities):
        order = sorted(range(len(p)), key=lambda e: (-float(p[e]), e))
        match options["select"]:
            case Select.ALL:
                chosen = order
            case Select.TOP_K:
                chosen = order[: options["k"]]
            case Select.THRESHOLD:
                chosen = [e for e in order if p[e] >= options["threshold"]]
            case Select.TOP_P:
                chosen, total = [], 0.0
                for e in order:
                    if total >= options["p"]:
                        break
                    chosen.append(e)
                    total += float(p[e])
        for e in chosen:
            gates[t, e] = p[e]
        if options.get("norm", Norm.RENORM) is Norm.RENORM and chosen:
            gates[t] /= gates[t].sum()
    return gates


class Formula:
    """What one mixture adds, in its input's dtype. `gates`: what it decided in the last pass, by linear."""

    def __init__(self, mixture: Mixture, experts: dict[str, Experts]) -> None:
        self.deltas = {name: partial(self._delta, name) for name in experts}
        self.gates: dict[str, torch.Tensor] = {}
        self._mixture, self._experts = mixture, experts

    def _delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        site = self._experts[name]
        gates = self.gates[name] = _gates(self._mixture, x @ site.router.to(x.dtype).T)
        total = torch.zeros(len(x), len(site.b[0]), dtype=x.dtype)
        for a, b, scale, users in zip(site.a, site.b, site.scale, site.users, strict=True):
            for e in users:
                total += gates[:, e, None] * scale * (x @ a.to(x.dtype).T @ b.to(x.dtype).T)
        return total


@pytest.fixture(scope="module")
def prompts(base_path: Path) -> list[list[int]]:
    return encode(base_path, PROMPTS)


@pytest.fixture(scope="module")
def models(base_path: Path) -> Iterator[tuple[Any, Any]]:
    yield load(base_path, torch.float32), load(base_path, torch.float64)


@pytest.fixture(scope="module")
def expected(
    models: Any, prompts: Any, base_model: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[int], Answer]]:
    """For each mixture: its native file, a prompt, and what the hooked float32 model answers, checked in float64."""
    folder = tmp_path_factory.mktemp("mixtures")
    single, double = models
    made = {}
    for i, (name, mixture) in enumerate(MIXTURES.items()):
        experts = _random(mixture, base_model.linears, seed=i)
        prompt = prompts[i % len(prompts)]
        formula = Formula(mixture, experts)
        with hooked(single, formula.deltas) as model:
            answer = generate(model, prompt)
        with hooked(double, formula.deltas) as model, torch.inference_mode():
            logits = model(torch.tensor([prompt + answer[0]])).logits[0, len(prompt) - 1 : -1]
        control = torch.log_softmax(logits, -1)
        gap = max(abs(float(control[t, token]) - p) for t, (token, p) in enumerate(zip(*answer, strict=True)))
        assert gap < TOLERANCE / 2, f"{name}: rounding decides a route of the reference itself ({gap}); change the seed"
        made[name] = (_native(mixture, experts, folder / f"{name}.safetensors"), prompt, answer)
    return made


@pytest.mark.parametrize("name", MIXTURES)
def test_alone_equals_hooks(engine: Any, expected: Any, name: str) -> None:
    source, prompt, answer = expected[name]
    assert_equal(engine.greedy([(prompt, source)])[0], answer, name)


def test_mixtures_change_the_answer(engine: Any, expected: Any) -> None:
    base = engine.greedy([(prompt, None) for _, prompt, _ in expected.values()])
    for (name, (_, _, answer)), plain in zip(expected.items(), base, strict=True):
        assert difference(answer, plain) > 10 * TOLERANCE, name


@pytest.mark.parametrize("order", range(3))
def test_one_batch_with_plain_adapters_and_base_rows(
    engine: Any, expected: Any, models: Any, prompts: Any, spare_adapters: Path, order: int
) -> None:
    """All mixtures, two plain adapters and two base rows share each step, with a chunked prefill, in three orders."""
    rows = [(name, prompt, source, answer) for name, (source, prompt, answer) in expected.items()]
    for i in (0, 3):
        source = spare_adapters / f"spare{i}"
        rows.append((source.name, prompts[0], source, engine.greedy([(prompts[0], source)])[0]))
    rows += [("base", prompts[i], None, generate(models[0], prompts[i])) for i in (1, 2)]
    random.Random(order).shuffle(rows)
    answers = engine.greedy([(prompt, source) for _, prompt, source, _ in rows])
    for (name, _, _, answer), ours in zip(rows, answers, strict=True):
        assert_equal(ours, answer, f"{name} in a mixed batch")


@pytest.mark.parametrize("name", ["top2_of_4", "threshold", "dense_of_3", "shared_rows"])
def test_the_routing_report_is_what_the_hooks_decided(
    engine: Any, expected: Any, models: Any, base_path: Path, base_model: BaseModel, name: str
) -> None:
    """A prompt that no test has run before, so that none of it is in the prefix cache; others share its steps."""
    from vllm import SamplingParams

    from loramux.metrics.routing import REQUEST_KEY

    (prompt,) = encode(base_path, ("Name the parts of a bicycle, then of a boat.",))
    source, other_prompt, _ = expected[name]
    asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args={REQUEST_KEY: name})
    silent = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    adapter = engine.adapter(source)
    outputs = engine.llm.generate(
        [{"prompt_token_ids": ids} for ids in (other_prompt, prompt, other_prompt)],
        [silent, asked, silent],
        lora_request=[adapter, adapter, None],
        use_tqdm=False,
    )
    report = engine.rpc("loramux_routing_report", name)
    seen = prompt + list(outputs[1].outputs[0].token_ids)[:-1]
    mixture = MIXTURES[name]
    experts = _random(mixture, base_model.linears, seed=list(MIXTURES).index(name))
    formula = Formula(mixture, experts)
    with hooked(models[0], formula.deltas) as model, torch.inference_mode():
        model(torch.tensor([seen]))
    gates = torch.stack(list(formula.gates.values()))  # [linears, tokens, experts]
    assert report["tokens"] == len(seen) and report["decisions"] == gates.shape[0] * gates.shape[1]
    assert report["selected"] == (gates > 0).sum((0, 1)).tolist()
    share = (gates / gates.sum(-1, keepdim=True)).nan_to_num(0).sum((0, 1))
    weight = torch.tensor(report["weight"], dtype=torch.float64)
    torch.testing.assert_close(weight, share.double(), rtol=1e-3, atol=0)
