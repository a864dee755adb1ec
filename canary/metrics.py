"""What canaries tell: counts in generated text, exposure, signals of text alone, a bound from TPR and FPR. Pure."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from canary.audit import ranking
from common.stats import clopper_pearson

PARTS = ("name", "street", "phone", "whole")
NEAREST = 25  # generated texts whose similarity to a canary is averaged
GUESSED = 0.1  # share of the canaries, those with the highest scores, that the heuristic bound says were in
CHANCE = {"mean": 1.44, "median": 1.0}  # bits of exposure of a secret never seen: 1/ln 2 and log2 2


# ---------------------------------------------------------------- generated text


def plain_words(text: str) -> str:
    """Case, spacing and punctuation taken away: ' my name is … ', so that whole words are found by their spaces."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return f" {' '.join(words)} "


def joined_digits(text: str) -> str:
    """The text with phone punctuation and spaces between digits taken away."""
    return re.sub(r"(?<=\d)[\s().+/\-\u2010-\u2015]+(?=\d)", "", unicodedata.normalize("NFKC", text))


def pieces(canary: dict) -> dict[str, str]:
    """{part: text} of a canary: name, street and phone where it has them, and the whole sentence without its stop."""
    return {**canary["parts"], "whole": canary["sentence"].rstrip(".")}


def find(canaries: Sequence[dict], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """{'exact' | 'normalised': bool [parts, canaries, texts]}: does a text contain a part of a canary?

    normalised ignores case, spacing and punctuation (of a phone, all but its digits); what is exact is normalised too.
    """
    shape = (len(PARTS), len(canaries), len(texts))
    found = {"exact": np.zeros(shape, bool), "normalised": np.zeros(shape, bool)}
    words, digits = [plain_words(text) for text in texts], [joined_digits(text) for text in texts]
    for c, canary in enumerate(canaries):
        for part, wanted in pieces(canary).items():
            p = PARTS.index(part)
            found["exact"][p, c] = [wanted in text for text in texts]
            if part == "phone":
                number = joined_digits(wanted)
                found["normalised"][p, c] = [number in text for text in digits]
            else:
                wanted = plain_words(wanted)
                found["normalised"][p, c] = [wanted in text for text in words]
    found["normalised"] |= found["exact"]
    return found


def fisher(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """Two-sided p of Fisher's exact test of two rates. Compares two models, one training each: no arms in general."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[hits, n - hits], [other_hits, other_n - other_hits]]).pvalue)


def bigram_scores(canaries: Sequence[str], corpus: Sequence[str]) -> np.ndarray:
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


def similarity_scores(canaries: Sequence[str], corpus: Sequence[str]) -> np.ndarray:
    """[canaries] mean Jaccard similarity of a text's words to its NEAREST most similar texts of the corpus.

    Higher = more likely a member (Meeus et al. 2025: similarity signal).
    """
    from scipy.sparse import csr_matrix

    asked, made = ([set(plain_words(text).split()) for text in texts] for texts in (canaries, corpus))
    number = {word: place for place, word in enumerate(sorted(set().union(*asked)))}

    def matrix(sets):
        entries = [(row, number[word]) for row, one in enumerate(sets) for word in one if word in number]
        rows, columns = zip(*entries) if entries else ((), ())
        return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(sets), max(1, len(number))))

    shared = (matrix(asked) @ matrix(made).T).toarray()
    sizes = np.array([len(one) for one in asked])[:, None] + np.array([len(one) for one in made])[None]
    jaccard = shared / np.maximum(1, sizes - shared)
    k = min(NEAREST, len(corpus))
    return np.partition(jaccard, -k, axis=1)[:, -k:].mean(1)


# ---------------------------------------------------------------- exposure


def exposure(nll: float, references: Sequence[float]) -> float:
    """log2(n + 1) − log2(1 + references with NLL ≤ the canary's) in bits (Carlini et al. 2019), n references.

    With all other secrets as references this is log2 |R| − log2 rank; else its ceiling is log2(n + 1). Ties count
    against the canary.
    """
    references = np.asarray(references)
    return math.log2(len(references) + 1) - math.log2(1 + int((references <= nll).sum()))


def extrapolated_exposure(nll: float, references: Sequence[float], space: int) -> dict:
    """{bits, ks_p}: −log2 P(NLL ≤ the canary's) under a skew-normal fitted to the references, at most log2 |R|.

    An extrapolation (Carlini et al. 2019, section 4.4). ks_p: Kolmogorov–Smirnov p-value of the fit on its own data,
    hence too large; a small one says that bits mean nothing.
    """
    from scipy import stats

    references = np.asarray(references, dtype=float)
    shape = stats.skewnorm.fit(references)
    bits = -float(stats.skewnorm.logcdf(nll, *shape)) / math.log(2)
    ks = float(stats.kstest(references, "skewnorm", args=shape).pvalue)
    return {"bits": min(max(bits, 0.0), math.log2(space)), "ks_p": ks}


def quantiles(values: Sequence[float]) -> dict:
    """{mean, median, q05, q25, q75, q95}."""
    names, levels = ("q05", "q25", "median", "q75", "q95"), (0.05, 0.25, 0.5, 0.75, 0.95)
    return {"mean": float(np.mean(values))} | dict(zip(names, map(float, np.quantile(values, levels))))


def p_above(values: Sequence[float], others: Sequence[float]) -> float | None:
    """One-sided Mann–Whitney p that `values` are not larger than `others`; None when one of them is empty."""
    from scipy.stats import mannwhitneyu

    if not len(values) or not len(others):
        return None
    return float(mannwhitneyu(values, others, alternative="greater").pvalue)


# ---------------------------------------------------------------- bounds


def heuristic_bound(scores: Sequence[float], included: Sequence[bool], delta: float) -> dict | None:
    """ln((TPR − δ) / FPR) with Clopper–Pearson ends, the top GUESSED of the scores guessed 'in'. Heuristic.

    Canaries of one training are not independent, which the intervals take them for. Equal scores are ranked at random.
    None without both kinds.
    """
    scores, included = np.asarray(scores, dtype=float), np.asarray(included, dtype=bool)
    if included.all() or not included.any():
        return None
    top = ranking(scores)[: max(1, math.floor(GUESSED * len(scores)))]
    true, false = int(included[top].sum()), int((~included[top]).sum())
    low = clopper_pearson(true, int(included.sum()))[0]
    high = clopper_pearson(false, int((~included).sum()))[1]
    epsilon = math.log((low - delta) / high) if low > delta else 0.0
    return {"epsilon": max(0.0, epsilon), "true_positives": true, "false_positives": false, "guesses": len(top)}
