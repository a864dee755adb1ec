"""Perplexity of documents from their token log-probabilities: arrays and text in, numbers out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000


def summarize(nll: list[float], n_tokens: list[int], n_bytes: list[int], seed: int) -> dict[str, Any]:
    """The metrics of one model over scored documents; undefined ones are null, with the reason in `undefined`.

    nll             NLL of each document in nats, summed over its tokens
    n_tokens, n_bytes   sizes of each document, ≥ 1
    mean            mean over documents of exp(NLL/T), what the `evaluate` metric calls mean_perplexity
    token_weighted  exp(ΣNLL/ΣT)
    median          median of the documents' perplexities
    bits_per_byte   ΣNLL/(ln 2 · Σbytes of UTF-8), comparable across tokenizers
    mean_ci, token_weighted_ci   95 % percentile bootstrap over documents, 1,000 resamples from `seed`
    """
    names = ("mean", "token_weighted", "median", "bits_per_byte", "mean_ci", "token_weighted_ci")
    if not nll:
        return {**dict.fromkeys(names), "undefined": dict.fromkeys(names, "no document could be scored")}
    nats, tokens, sizes = (np.asarray(values, float) for values in (nll, n_tokens, n_bytes))
    perplexities = np.exp(nats / tokens)
    summary: dict[str, Any] = {
        "mean": float(perplexities.mean()),
        "token_weighted": float(np.exp(nats.sum() / tokens.sum())),
        "median": float(np.median(perplexities)),
        "bits_per_byte": float(nats.sum() / (np.log(2) * sizes.sum())),
        "mean_ci": None,
        "token_weighted_ci": None,
        "undefined": {},
    }
    if len(nll) < 2:
        summary["undefined"] = dict.fromkeys(("mean_ci", "token_weighted_ci"), "one document has no spread")
        return summary
    rng = np.random.default_rng(seed)
    means: list[float] = []
    weighted: list[float] = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(nll), size=len(nll))
        means.append(perplexities[drawn].mean())
        weighted.append(np.exp(nats[drawn].sum() / tokens[drawn].sum()))
    summary["mean_ci"] = np.quantile(means, (0.025, 0.975), method="inverted_cdf").tolist()
    summary["token_weighted_ci"] = np.quantile(weighted, (0.025, 0.975), method="inverted_cdf").tolist()
    return summary


def describe(
    texts: list[str], ids: list[list[int]], logps: Sequence[npt.NDArray[np.float32]], context: int, seed: int
) -> dict[str, Any]:
    """The metrics and counts of a result line, from each document's token log-probabilities [T]."""
    nll: list[float] = []
    n_tokens: list[int] = []
    n_bytes: list[int] = []
    n_windowed = 0
    dropped: dict[str, int] = {}
    for text, tokens, logp in zip(texts, ids, logps):
        reason = None
        if not len(logp):
            reason = "no tokens" if text else "empty document"
        elif not np.isfinite(logp).all():
            reason = "log-probability not finite"
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        nll.append(-float(np.sum(logp, dtype=np.float64)))
        n_tokens.append(len(logp))
        n_bytes.append(len(text.encode()))
        n_windowed += len(tokens) > context
    return {
        **summarize(nll, n_tokens, n_bytes, seed),
        "n_requested": len(texts),
        "n_scored": len(nll),
        "n_dropped": len(texts) - len(nll),
        "dropped": dropped,
        "n_tokens": sum(n_tokens),
        "n_bytes": sum(n_bytes),
        "n_windowed": n_windowed,
        "context": context,
        "stride": context // 2,
    }
