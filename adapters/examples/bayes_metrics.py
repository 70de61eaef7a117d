"""How good predictions and their uncertainties are. p_SNK: samples, texts, labels; all logarithms are natural."""

import torch

BINS = 15
COVERAGES = tuple(i / 20 for i in range(1, 21))


def metrics(
    logs_snk: torch.Tensor, answers: torch.Tensor, foreign_snk: torch.Tensor | None = None
) -> dict[str, object]:
    """Of the mean of S predictions, given as log P [S, N, K].

    ece            15 bins of equal width of the largest probability
    brier          Σ_k (p_k − y_k)², mean
    auroc_error    that a wrong answer has a higher entropy than a right one
    auroc_foreign  that a foreign text has a higher entropy than one of the question's; _mi: a higher mutual information
    accuracy_80    of the 80 % with the largest probabilities
    bins, risks    for the plots: (texts, mean confidence, accuracy) by bin, and the error by coverage
    """
    p = logs_snk.exp().mean(0)
    confidence, chosen = p.max(1)
    right = (chosen == answers).double()
    truth = torch.nn.functional.one_hot(answers, p.shape[1]).double()
    order = confidence.argsort(descending=True, stable=True)
    risks = [float(1 - right[order[: round(c * len(order))]].mean()) for c in COVERAGES]
    bins = _bins(confidence, right)
    result: dict[str, object] = {
        "n": len(answers),
        "samples": len(logs_snk),
        "accuracy": float(right.mean()),
        "ece": sum(n * abs(c - a) for n, c, a in bins) / len(answers),
        "nll": float(-p.gather(1, answers[:, None]).log().mean()),
        "brier": float((p - truth).square().sum(1).mean()),
        "auroc_error": auroc(entropy(p)[right == 0], entropy(p)[right == 1]),
        "accuracy_80": 1 - risks[COVERAGES.index(0.8)],
        "bins": [[n, round(c, 4), round(a, 4)] for n, c, a in bins],
        "risks": [round(risk, 4) for risk in risks],
    }
    if foreign_snk is not None:
        q = foreign_snk.exp().mean(0)
        result["auroc_foreign"] = auroc(entropy(q), entropy(p))
        if len(logs_snk) > 1:
            result["auroc_foreign_mi"] = auroc(information(foreign_snk), information(logs_snk))
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in result.items()}


def entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(-1)


def information(logs_snk: torch.Tensor) -> torch.Tensor:
    """H[mean] − mean H, [N]."""
    p = logs_snk.exp()
    return entropy(p.mean(0)) - entropy(p).mean(0)


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """P(positive > negative), ties half."""
    difference = positive[:, None] - negative[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


def temperature(logs_nk: torch.Tensor, answers: torch.Tensor) -> float:
    """The T of p ∝ P^(1/T) with the least −log p of the answers, between 0.2 and 20."""
    grid = torch.logspace(-0.7, 1.3, 401, dtype=torch.float64)
    costs = [torch.nn.functional.cross_entropy(logs_nk / t, answers) for t in grid]
    return float(grid[int(torch.stack(costs).argmin())])


def _bins(confidence: torch.Tensor, right: torch.Tensor) -> list[tuple[int, float, float]]:
    owner = (confidence * BINS).ceil().clamp(1, BINS) - 1
    found = []
    for i in range(BINS):
        inside = owner == i
        if bool(inside.any()):
            found.append((int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean())))
    return found
