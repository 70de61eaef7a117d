"""The field `uncertainty` of a choice, from what was read: with all scores, of which `asked_for` leaves some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loramux.uncertainty.ask import SCORES, Mode
from loramux.uncertainty.clusters import agreement, clusters
from loramux.uncertainty.exchange import Exchange
from loramux.uncertainty.scores import (
    Array,
    Decision,
    decide,
    fast_scores,
    sequence_scores,
    split,
)


def scored(exchange: Exchange, posterior: str | None, logp: Array, entropy: Array, total: Array) -> dict[str, Any]:
    """Mode `score`, from log p_s(y_t) and H[p_s,t], both [S, n], and H[mean_s p_s,t], [n]; NaN is what is missing.

    With draws missing the answer is `partial`: tokens are told of the draws that read them, the whole answer of those
    that read all of it, and with less than two nothing is.
    """
    complete = [s for s in range(len(logp)) if not _missing(logp[s])]
    head = {**_head(exchange, posterior, len(complete)), "partial": len(complete) < len(logp)}
    if len(complete) < 2:
        return head | dict.fromkeys(SCORES[exchange.mode])
    tokens = split(total, entropy)
    result = head | sequence_scores(tokens, logp[complete])
    result["raw"] = {"total": float(tokens.total_raw.mean()), "epistemic": float(tokens.epistemic_raw.mean())}
    if exchange.ask.per_token:
        columns = {"total": tokens.total, "aleatoric": tokens.aleatoric, "epistemic": tokens.epistemic}
        result["tokens"] = [{name: float(values[t]) for name, values in columns.items()} for t in range(len(total))]
    return result


def decided(exchange: Exchange, posterior: str | None, logp: Array, draws: int) -> tuple[dict[str, Any], int]:
    """Mode `decide`, from log p_s(label), [S, K], of so many that were to read; and which label it is.

    One row: no draws, and nothing epistemic.
    """
    alone = len(logp) == 1
    decision: Decision = decide(logp)
    names = ("epistemic",) if alone else ()
    scores = {name: None if name in names else value for name, value in decision.scores().items()}
    labels = exchange.ask.labels
    return {
        **_head(exchange, posterior, 0 if alone else len(logp)),
        "partial": not alone and len(logp) < draws,
        **scores,
        "prediction": labels[decision.predicted],
        "labels": [
            {"label": label, "probability": float(p), "deviation": None if alone else float(d)}
            for label, p, d in zip(labels, decision.mean, decision.deviation, strict=True)
        ],
    }, decision.predicted


def sampled(exchange: Exchange, posterior: str | None, texts: Mapping[int, str]) -> dict[int, dict[str, Any]]:
    """Mode `sample`, from the texts of the choices by their index."""
    found = clusters(list(texts.values()))
    head = {**_head(exchange, posterior, len(texts)), "partial": False, **agreement(found)}
    return {index: head | {"draw": index, "cluster": cluster} for index, cluster in zip(texts, found, strict=True)}


def fast(
    exchange: Exchange, posterior: str | None, entropies: Sequence[float], logp: Sequence[float]
) -> dict[str, Any]:
    """Mode `fast`, from entropy and log-probability of every token; nothing, if it is not known of all."""
    known = bool(logp) and len(entropies) == len(logp) and all(map(math.isfinite, entropies))
    head = {**_head(exchange, posterior, 0), "partial": not known}
    if not known:
        return head | dict.fromkeys(SCORES[exchange.mode])
    result = head | fast_scores(entropies, logp)
    if exchange.ask.per_token:
        result["tokens"] = [{"total": entropy, "aleatoric": None, "epistemic": None} for entropy in entropies]
    return result


def failed(exchange: Exchange, posterior: str | None, code: str, message: str) -> dict[str, Any]:
    """An answer whose uncertainty could not be told."""
    head = {**_head(exchange, posterior, 0), "partial": True}
    return head | dict.fromkeys(SCORES[exchange.mode]) | {"error": {"code": code, "message": message}}


def asked_for(exchange: Exchange, value: dict[str, Any]) -> dict[str, Any]:
    """Without the scores that the request did not name, if it named some."""
    names = exchange.ask.scores
    left_out = set() if names is None else {*SCORES[exchange.mode]} - {*names}
    return {name: item for name, item in value.items() if name not in left_out}


def _head(exchange: Exchange, posterior: str | None, samples: int) -> dict[str, Any]:
    return {
        "mode": exchange.mode.value,
        "posterior": posterior,
        "samples": samples,
        "noise": "sequence" if posterior and exchange.mode is not Mode.FAST else None,
        "seed": exchange.ask.seed,
    } | ({"adaptive": True} if exchange.ask.adaptive and samples else {})


def _missing(values: Array) -> bool:
    return any(map(math.isnan, values))
