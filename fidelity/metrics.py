"""Metrics of how close synthetic text is to real text. Pure functions of texts and arrays; no models, no paths.

A comparison has two samples of n documents. The documents of both are assigned to the same GROUPS groups, and every
interval is a delete-one-group jackknife: the metric is computed on all documents, and again without each group in both
samples (a bootstrap repeats documents, which biases divergences, nearest-neighbour metrics and distinct-n). `keep` is
the boolean mask [n] of the remaining documents, the same for both samples; "replicates" are the [1 + GROUPS] values,
with that of all documents first.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

GROUPS = 20
NEIGHBOURS = 5  # k of precision, recall, density and coverage
DEPTH = 8 * NEIGHBOURS  # neighbours stored: enough to have k left when any one group is deleted
CHUNK = 1000  # rows of a distance matrix computed at a time
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++(?=\s|$)|\n+")  # matches a run of marks only once
WORD_BINS = (0, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, np.inf)  # words per document
SENTENCE_BINS = (*range(11), 15, 20, 30, np.inf)  # sentences per document
LETTER_BINS = (*range(1, 13), np.inf)  # characters per word
POSITIVE = (
    "amazing awesome beautiful best better bright clean clear comfortable cute durable easy enjoy enjoyed excellent "
    "fantastic fine firm fit fits fresh fun glad good great happy helpful highly ideal impressed like liked love loved "
    "loves lovely neat nice perfect perfectly pleased quality quick recommend recommended reliable satisfied smooth "
    "smoothly soft solid strong sturdy super useful well wonderful works worth"
)
NEGATIVE = (
    "annoying awful bad bent bin blurred broke broken cheap cheaply complaint cracked crooked crushed defective "
    "difficult disappointed disappointing fail failed fails faded fell flimsy hard hate horrible itches jams junk "
    "leaked leaks loose lost mediocre misleading missing never noisy not poor poorly problem problems refund return "
    "returned ripped slippery stopped terrible thin tore ugly unfortunately unhappy useless warped waste wasted weak "
    "worse worst wrong"
)


def deal(n: int, seed: int) -> np.ndarray:
    """[n] group of each document, 0 … GROUPS − 1, assigned at random; group sizes differ by at most one."""
    return np.random.default_rng(seed).permutation(np.arange(n) % GROUPS)


def masks(groups: np.ndarray) -> list[np.ndarray]:
    """The 1 + GROUPS masks [n] of a jackknife: all documents, then all but one group each."""
    return [np.ones(len(groups), bool)] + [groups != group for group in range(GROUPS)]


Replicates = dict[str, np.ndarray]  # measure → its replicates


def replicate(measure: Callable[[np.ndarray], dict[str, float]], groups: np.ndarray) -> Replicates:
    """The replicates of each value that `measure(mask)` returns."""
    values = [measure(keep) for keep in masks(groups)]
    return {name: np.array([value[name] for value in values], float) for name in values[0]}


class Estimate(TypedDict):
    """A value with the ends of its interval; None if undefined, with the reason."""

    value: float | None
    low: float | None
    high: float | None
    reason: NotRequired[str]
    sd: NotRequired[float]


WIDER = {"Wasserstein-1 words a review": 1.15}  # the plain jackknife covers only 91–92 % (bench/coverage.py)


def interval(replicates: np.ndarray, wider: float = 1.0) -> Estimate:
    """The value and its 95 % interval from a delete-one-group jackknife (Shao & Tu 1995, section 2.3).

    wider: factor on the width, for a metric whose interval is known to undercover (`WIDER`).
    se² = (G − 1)/G · Σ (θ₍g₎ − mean)², and value ± wider · t(0.975, G − 1) · se. NaN counts as undefined.
    """
    value, deleted = float(replicates[0]), np.asarray(replicates[1:], float)
    if np.isnan(value):
        return {"value": None, "low": None, "high": None, "reason": "undefined on this sample"}
    if np.isnan(deleted).any():
        return {"value": value, "low": None, "high": None, "reason": "undefined without one of the groups"}
    g = len(deleted)
    half = wider * stats.t.ppf(0.975, g - 1) * np.sqrt((g - 1) / g * np.sum((deleted - deleted.mean()) ** 2))
    return {"value": value, "low": value - float(half), "high": value + float(half)}


def words(text: str) -> list[str]:
    """Runs of letters and digits, case-folded; an apostrophe inside a run is part of it."""
    return WORD.findall(text.casefold())


def count_of(text: Sequence[str], wordlist: str) -> int:
    """How many words of a text are in a space-separated word list."""
    listed = frozenset(wordlist.split())
    return sum(word in listed for word in text)


def count_sentences(text: str) -> int:
    """Number of parts that contain a word, split at full stops, exclamation marks, question marks and line ends."""
    return sum(WORD.search(part) is not None for part in SENTENCE_END.split(text))


class Corpus(NamedTuple):
    """Concatenated word ids of all documents [T], the document of each [T], and the number of documents."""

    tokens: np.ndarray
    document: np.ndarray
    size: int


def make_corpus(texts: Sequence[str], vocabulary: dict[str, int]) -> Corpus:
    """The words of `texts` as ids in `vocabulary`, which is extended by new words."""
    tokens: list[int] = []
    lengths = []
    for text in texts:
        ids = [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
        tokens += ids
        lengths.append(len(ids))
    return Corpus(np.array(tokens, np.int64), np.repeat(np.arange(len(texts)), lengths), len(texts))


def ngrams(corpus: Corpus, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(document [P], n-gram id [P]) of every n-gram within a document; ids are exact, not hashes."""
    tokens, document, _ = corpus
    start, gram = np.arange(len(tokens)), tokens
    for step in range(1, order):
        inside = start + step < len(tokens)
        inside[inside] = document[start[inside] + step] == document[start[inside]]
        start, gram = start[inside], gram[inside]
        if len(start):
            gram = np.unique(gram * (tokens.max() + 1) + tokens[start + step], return_inverse=True)[1]
    return document[start], gram


def kl_divergence(real: ArrayLike, other: ArrayLike, edges: Sequence[float]) -> float:
    """KL(real ‖ other) in bits between the histograms of two samples, bins [edges[i], edges[i+1]), add-one smoothed."""
    p, q = (np.histogram(sample, np.asarray(edges, float))[0] + 1.0 for sample in (real, other))
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log2(p / q)))


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> float:
    """Jensen–Shannon divergence in bits, 0 … 1, of two count vectors over the same words (Lin 1991)."""
    shares = [np.asarray(counts, float) / np.sum(counts) for counts in (p, q)]
    middle = (shares[0] + shares[1]) / 2
    return float(sum(np.sum(x[x > 0] * np.log2(x[x > 0] / middle[x > 0])) for x in shares) / 2)


def distinct(document: np.ndarray, gram: np.ndarray, keep: np.ndarray, budget: int) -> float:
    """Share of distinct n-grams among the first `budget` n-grams of the kept documents (Li et al. 2016).

    The share falls with the number of n-grams counted, so samples are compared at the same budget.
    """
    kept = gram[keep[document]][:budget]
    return len(np.unique(kept)) / len(kept) if len(kept) else float("nan")


def repetition(document: np.ndarray, gram: np.ndarray, size: int) -> np.ndarray:
    """[size] share of a document's n-grams that occur earlier in it (seq-rep-n, Welleck et al. 2020).

    NaN for a document without n-grams.
    """
    total = np.bincount(document, minlength=size)
    pairs = np.unique(np.stack([document, gram]), axis=1) if len(gram) else np.empty((2, 0), int)
    different = np.bincount(pairs[0], minlength=size)
    with np.errstate(invalid="ignore"):
        return 1 - different / total


class Counts(NamedTuple):
    """How often each document contains each n-gram, sorted by n-gram, then by descending frequency; [E] entries."""

    document: np.ndarray
    gram: np.ndarray
    frequency: np.ndarray


def gram_counts(corpus: Corpus, order: int) -> Counts:
    """The counts of a corpus's n-grams of one order."""
    document, gram = ngrams(corpus, order)
    if not len(gram):
        return Counts(document, gram, gram)
    pairs, frequency = np.unique(gram * corpus.size + document, return_counts=True)
    gram, document = np.divmod(pairs, corpus.size)
    sort = np.lexsort((-frequency, gram))
    return Counts(document[sort], gram[sort], frequency[sort])


def self_bleu(counts: Sequence[Counts], lengths: np.ndarray, keep: np.ndarray) -> float:
    """Mean BLEU-4 of each kept document against all others (Zhu et al. 2018), 0 … 1; higher: less diverse.

    counts: `gram_counts` of orders 1 … 4; lengths: [n] words of each document.
    A document's BLEU is sacrebleu's sentence BLEU: counts clipped at the maximum over the references, closest reference
    length (the shorter of two), effective order, exponential smoothing. It is exact over all references in linear time:
    the maximum over the other documents is the n-gram's highest count, or the second-highest for the document that has
    the highest.
    """
    documents = np.flatnonzero(keep & (lengths > 0))
    if len(documents) < 2:
        return float("nan")
    log_precision, orders = np.zeros(len(lengths)), np.zeros(len(lengths))
    smooth, any_hit = np.ones(len(lengths)), np.zeros(len(lengths), bool)
    for order, (document, gram, frequency) in enumerate(counts, 1):
        kept = keep[document]
        document, gram, frequency = document[kept], gram[kept], frequency[kept]
        first = np.append(True, gram[1:] != gram[:-1])[: len(gram)]
        highest = frequency[first][np.cumsum(first) - 1]
        second = np.zeros_like(frequency)
        follows = np.flatnonzero(first[:-1] & ~first[1:])
        second[follows] = frequency[follows + 1]
        clipped = np.minimum(frequency, np.where(first, second, highest))
        hits = np.bincount(document, clipped, len(lengths))
        total = np.maximum(lengths - order + 1, 0)
        has = total > 0
        missed = has & (hits == 0)
        smooth[missed] *= 2
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(missed, 1 / (smooth * total), hits / total)
            log_precision[has] += np.log(precision[has])
        orders += has
        any_hit |= hits > 0
    own = lengths[documents]
    closest = _closest_other(own)
    penalty = np.where(own < closest, np.exp(1 - closest / own), 1.0)
    bleu = penalty * np.exp(log_precision[documents] / orders[documents])
    return float(np.mean(np.where(any_hit[documents], bleu, 0.0)))


def _closest_other(lengths: np.ndarray) -> np.ndarray:
    """[n] the nearest other length to each length, the shorter one in a tie; n ≥ 2."""
    order = np.argsort(lengths, kind="stable")
    padded = np.concatenate([[-np.inf], lengths[order], [np.inf]])
    below, above = padded[:-2], padded[2:]  # sorted neighbours, one of which is the nearest other length
    nearest = np.empty(len(lengths))
    nearest[order] = np.where(lengths[order] - below <= above - lengths[order], below, above)
    return nearest


def rank_correlations(columns: np.ndarray) -> np.ndarray:
    """Spearman correlations [C, C] of the columns of [n, C]; NaN for constant columns."""
    ranks = stats.rankdata(columns, axis=0)
    ranks -= ranks.mean(0)
    scale = np.sqrt((ranks**2).sum(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlations: np.ndarray = (ranks.T @ ranks) / np.outer(scale, scale)
    return correlations


def frechet_distance(real: np.ndarray, other: np.ndarray) -> float:
    """Fréchet distance ‖μ₁−μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of Gaussian fits to two samples [n, d] (Heusel et al. 2017).

    Biased upwards on small samples: only compare samples of the same size.
    """
    first, second = np.cov(real, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(first))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ np.atleast_2d(second) @ root), 0)).sum()
    shift = np.sum((real.mean(0) - other.mean(0)) ** 2)
    return float(max(0.0, shift + np.trace(np.atleast_2d(first + second)) - 2 * cross))


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, m]; squares are rounded to 1e-6, so that equal vectors have distance exactly 0."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * (x @ y.T)
    distances: np.ndarray = np.sqrt(np.maximum(np.round(squares, 6), 0))
    return distances


def _own_neighbours(x: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(distances, indices) [n, depth] of each row's nearest other rows, nearest first."""
    near, index = [], []
    for start in range(0, len(x), CHUNK):
        distances = _distances(x[start : start + CHUNK], x)
        distances[np.arange(len(distances)), start + np.arange(len(distances))] = np.inf
        chosen = np.argpartition(distances, depth - 1, axis=1)[:, :depth]
        values = np.take_along_axis(distances, chosen, 1)
        order = np.argsort(values, axis=1, kind="stable")
        near.append(np.take_along_axis(values, order, 1))
        index.append(np.take_along_axis(chosen, order, 1))
    return np.concatenate(near), np.concatenate(index)


def _radii(near: np.ndarray, index: np.ndarray, keep: np.ndarray, k: int) -> np.ndarray:
    """[n] distance to the k-th nearest kept row."""
    rank = np.cumsum(keep[index], axis=1)
    if (rank[:, -1] < k).any():
        raise ValueError(f"a row has fewer than {k} kept neighbours among its {near.shape[1]} nearest")
    radii: np.ndarray = near[np.arange(len(near)), (rank >= k).argmax(1)]
    return radii


def manifold_measures(real: np.ndarray, other: np.ndarray, groups: np.ndarray, k: int = NEIGHBOURS) -> Replicates:
    """Precision, recall, density and coverage of two samples [n, d] of the same n.

    A row's ball extends to the k-th nearest row of its own sample. Precision: share of `other` in a ball of `real`;
    recall: share of `real` in a ball of `other` (Kynkäänniemi et al. 2019). Density: mean number of balls of `real`
    that contain a row of `other`, divided by k; coverage: share of `real` whose ball contains a row of `other` (Naeem
    et al. 2020).
    """
    depth = min(DEPTH, len(real) - 1)
    balls = [_own_neighbours(sample, depth) for sample in (real, other)]
    kept = masks(groups)
    radii = [[_radii(*ball, keep, k) for keep in kept] for ball in balls]
    widest_real, widest_other = (np.max(each, axis=0) for each in radii)
    pairs = []  # only pairs within the widest ball of either row can count
    for start in range(0, len(real), CHUNK):
        distances = _distances(real[start : start + CHUNK], other)
        row, column = np.nonzero(
            (distances <= widest_real[start : start + CHUNK, None]) | (distances <= widest_other[None])
        )
        pairs.append((row + start, column, distances[row, column]))
    row, column, distance = (np.concatenate(part) for part in zip(*pairs))
    measures: dict[str, list[float]] = {name: [] for name in ("precision", "recall", "density", "coverage")}
    for keep, real_radius, other_radius in zip(kept, *radii):
        n, both = keep.sum(), keep[row] & keep[column]
        in_real, in_other = both & (distance <= real_radius[row]), both & (distance <= other_radius[column])
        measures["precision"].append(len(np.unique(column[in_real])) / n)
        measures["recall"].append(len(np.unique(row[in_other])) / n)
        measures["density"].append(in_real.sum() / (k * n))
        measures["coverage"].append(len(np.unique(row[in_real])) / n)
    return {name: np.array(values) for name, values in measures.items()}


def nearest_cosine(x: np.ndarray, pool: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[n, GROUPS] highest cosine of each row of x [n, d] (unit rows) to the rows of each group in the pool [m, d].

    −∞ for a group without rows in the pool, so that leaving it out changes nothing.
    """
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    sorted_pool = pool[order]
    best = np.full((len(x), GROUPS), -np.inf, np.result_type(x, pool))
    for start in range(0, len(x), CHUNK):
        cosines = x[start : start + CHUNK] @ sorted_pool.T
        best[start : start + CHUNK, present] = np.maximum.reduceat(cosines, starts, axis=1)
    return best


def mean_nearest(best: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[1 + GROUPS] replicates of the mean highest cosine: each leaves a group out of both the rows and the pool.

    best: [n, GROUPS] from `nearest_cosine`; groups: [n] of its rows.
    """
    means = [best.max(1).mean()]
    means += [np.delete(best, group, axis=1)[groups != group].max(1).mean() for group in range(GROUPS)]
    return np.array(means, float)
