"""What adapters/README.md says of Bayesian adapters is what was measured; and its scores, against plain definitions."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[3] / "adapters" / "examples"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_plots_are_made_of_the_results() -> None:
    plot = _script("bayes_plot")
    readme = (EXAMPLES.parent / "README.md").read_text()
    found = plot.rows()
    assert found
    for setting, methods in found.items():
        assert plot.table(methods) in readme
        assert (EXAMPLES / f"bayes_{setting}.svg").read_text() == plot.picture(methods, setting)
        for method, rows in methods.items():
            assert len({row["seed"] for row in rows}) == len(rows), (setting, method)


def test_scores() -> None:
    """On small numbers, against loops."""
    scores = _script("bayes_metrics")
    dice = np.random.default_rng(0)
    p_snk = dice.dirichlet([1.0, 1.0, 1.0], size=(4, 40))
    answers = dice.integers(0, 3, 40)
    foreign = dice.dirichlet([5.0, 5.0, 5.0], size=(4, 9))
    found = scores.metrics(torch.tensor(p_snk).log(), torch.tensor(answers), torch.tensor(foreign).log())

    p, q = p_snk.mean(0), foreign.mean(0)
    right = p.argmax(1) == answers
    entropy = [-(row * np.log(row)).sum() for row in p]
    assert found["accuracy"] == pytest.approx(right.mean(), abs=1e-4)
    assert found["nll"] == pytest.approx(np.mean([-np.log(p[i, answers[i]]) for i in range(40)]), abs=1e-4)
    brier = np.mean([sum((p[i, k] - (k == answers[i])) ** 2 for k in range(3)) for i in range(40)])
    assert found["brier"] == pytest.approx(brier, abs=1e-4)
    pairs = [(entropy[i], entropy[j]) for i in range(40) if not right[i] for j in range(40) if right[j]]
    assert found["auroc_error"] == pytest.approx(np.mean([wrong > good for wrong, good in pairs]), abs=1e-4)
    pairs = [(-(row * np.log(row)).sum(), own) for row in q for own in entropy]
    assert found["auroc_foreign"] == pytest.approx(np.mean([other > own for other, own in pairs]), abs=1e-4)
    sure = sorted(range(40), key=lambda i: -p[i].max())[:32]
    assert found["accuracy_80"] == pytest.approx(np.mean(right[sure]), abs=1e-4)
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = [i for i in range(40) if low < p[i].max() <= low + 1 / 15]
        if inside:
            ece += abs(np.mean(right[inside]) - np.mean(p[inside].max(1))) * len(inside) / 40
    assert found["ece"] == pytest.approx(ece, abs=1e-4)


def test_temperature_undoes_a_temperature() -> None:
    scores = _script("bayes_metrics")
    logits = torch.randn(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answers = torch.distributions.Categorical(logits=logits).sample()
    assert scores.temperature(torch.log_softmax(3 * logits, -1), answers) == pytest.approx(3, rel=0.05)
