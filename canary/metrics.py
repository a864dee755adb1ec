"""Canary metrics: counts in generated text, exposure, signals from text alone, a bound from TPR and FPR."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from canary.audit import ranking
from canary.canaries import Canary
from common.stats import clopper_pearson

PARTS = ("name", "street", "phone", "whole")
NEAREST = 25  # generated texts whose similarity to a canary is averaged
GUESSED = 0.1  # share of the canaries, by highest score, that the heuristic bound guesses "in"
CHANCE = {"mean": 1.44, "median": 1.0}  # exposure in bits of a secret never seen: 1/ln 2 and log2 2


class Heuristic(TypedDict):
    """A bound on ε from TPR and FPR, and the counts behind it."""

    epsilon: float
    true_positives: int
    false_positives: int
    guesses: int


def plain_words(text: str) -> str:
    """The text without case, punctuation and extra spaces: ' my name is … '; the outer spaces force whole words."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return f" {' '.join(words)} "


def joined_digits(text: str) -> str:
    """The text without phone punctuation and spaces between digits."""
    return re.sub(r"(?<=\d)[\s().+/\-\u2010-\u2015]+(?=\d)", "", unicodedata.normalize("NFKC", text))


def pieces(canary: Canary) -> dict[str, str]:
    """{part: text} of a canary: name, street and phone if it has them, and the sentence without its full stop."""
    return {**canary["parts"], "whole": canary["sentence"].rstrip(".")}


def find(canaries: Sequence[Canary], texts: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """{'exact' | 'normalised': bool [parts, canaries, texts]}: whether a text contains a part of a canary.

    normalised ignores case, spacing and punctuation (for phone numbers, everything but the digits); exact matches also
    count as normalised.
    """
    shape = (len(PARTS), len(canaries), len(texts))
    exact, normalised = np.zeros(shape, bool), np.zeros(shape, bool)
    words, digits = [plain_words(text) for text in texts], [joined_digits(text) for text in texts]
    for c, canary in enumerate(canaries):
        for part, wanted in pieces(canary).items():
            p = PARTS.index(part)
            exact[p, c] = [wanted in text for text in texts]
            if part == "phone":
                number = joined_digits(wanted)
                normalised[p, c] = [number in text for text in digits]
            else:
                plain = plain_words(wanted)
                normalised[p, c] = [plain in text for text in words]
    return {"exact": exact, "normalised": normalised | exact}


def fisher(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """Two-sided Fisher's exact test of two rates. It compares two trained models, not their arms in general."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[hits, n - hits], [other_hits, other_n - other_hits]]).pvalue)


def bigram_scores(canaries: Sequence[str], corpus: Sequence[str]) -> NDArray[np.float64]:
    """[canaries] log-probability in nats of each text under a 2-gram model of the corpus, add-one smoothed.

    Higher = more likely a member (Meeus et al. 2025, The Canary's Echo, arXiv:2502.14921: n-gram signal).
    """
    words = [["<s>", *plain_words(text).split()] for text in corpus]
    asked = [["<s>", *plain_words(text).split()] for text in canaries]
    vocabulary = len({word for text in (*words, *asked) for word in text})
    first = Counter(word for text in words for word in text[:-1])
    pairs = Counter(pair for text in words for pair in pairwise(text))
    return np.array(
        [math.fsum(math.log((pairs[a, b] + 1) / (first[a] + vocabulary)) for a, b in pairwise(text)) for text in asked]
    )


def similarity_scores(canaries: Sequence[str], corpus: Sequence[str]) -> NDArray[np.float64]:
    """[canaries] mean Jaccard similarity (of words) of a text to its NEAREST most similar texts in the corpus.

    Higher = more likely a member (Meeus et al. 2025: similarity signal).
    """
    from scipy.sparse import csr_matrix

    asked, generated = ([set(plain_words(text).split()) for text in texts] for texts in (canaries, corpus))
    column = {word: number for number, word in enumerate(sorted(set[str]().union(*asked)))}

    def matrix(texts: list[set[str]]) -> Any:
        cells = [(row, column[word]) for row, words in enumerate(texts) for word in words if word in column]
        rows, columns = zip(*cells) if cells else ((), ())
        return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), max(1, len(column))))

    shared = (matrix(asked) @ matrix(generated).T).toarray()
    sizes = np.array(list(map(len, asked)))[:, None] + np.array(list(map(len, generated)))[None]
    jaccard: NDArray[np.float64] = shared / np.maximum(1, sizes - shared)
    k = min(NEAREST, len(corpus))
    return np.asarray(np.partition(jaccard, -k, axis=1)[:, -k:].mean(1))


def exposure(nll: float, references: Sequence[float]) -> float:
    """log2(n + 1) − log2(1 + references with NLL ≤ the canary's) in bits (Carlini et al. 2019), n references.

    With all other secrets as references this is log2 |R| − log2 rank; otherwise it is at most log2(n + 1). Ties count
    against the canary.
    """
    return math.log2(len(references) + 1) - math.log2(1 + int((np.asarray(references) <= nll).sum()))


def extrapolated_exposure(nll: float, references: Sequence[float], space: int) -> dict[str, float]:
    """{bits, ks_p}: −log2 P(NLL ≤ the canary's) under a skew-normal fitted to the references, at most log2 |R|.

    An extrapolation (Carlini et al. 2019, section 4.4). ks_p: Kolmogorov–Smirnov p-value of the fit on its own data,
    hence too large; if it is small, bits is meaningless.
    """
    from scipy import stats

    nlls = np.asarray(references, dtype=float)
    shape = stats.skewnorm.fit(nlls)
    bits = -float(stats.skewnorm.logcdf(nll, *shape)) / math.log(2)
    ks = float(stats.kstest(nlls, "skewnorm", args=shape).pvalue)
    return {"bits": min(max(bits, 0.0), math.log2(space)), "ks_p": ks}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """{mean, median, q05, q25, q75, q95}."""
    names, levels = ("q05", "q25", "median", "q75", "q95"), (0.05, 0.25, 0.5, 0.75, 0.95)
    return {"mean": float(np.mean(values))} | dict(zip(names, map(float, np.quantile(values, levels))))


def p_above(values: Sequence[float], others: Sequence[float]) -> float | None:
    """One-sided Mann–Whitney p-value for `values` being larger than `others`; None if either is empty."""
    from scipy.stats import mannwhitneyu

    if not len(values) or not len(others):
        return None
    return float(mannwhitneyu(values, others, alternative="greater").pvalue)


def heuristic_bound(scores: Sequence[float], included: Sequence[bool], delta: float) -> Heuristic | None:
    """ln((TPR − δ) / FPR) with the pessimistic Clopper–Pearson limits; the top GUESSED scores are guessed "in".

    Heuristic: the intervals assume independent canaries, which those of one training run are not. Ties are broken at
    random. None unless there are both included and excluded canaries.
    """
    coins = np.asarray(included, dtype=bool)
    if coins.all() or not coins.any():
        return None
    top = ranking(scores)[: max(1, math.floor(GUESSED * len(scores)))]
    true, false = int(coins[top].sum()), int((~coins[top]).sum())
    of_included, of_others = clopper_pearson(true, int(coins.sum())), clopper_pearson(false, int((~coins).sum()))
    assert of_included and of_others
    low, high = of_included[0], of_others[1]
    epsilon = math.log((low - delta) / high) if low > delta else 0.0
    return {"epsilon": max(0.0, epsilon), "true_positives": true, "false_positives": false, "guesses": len(top)}
