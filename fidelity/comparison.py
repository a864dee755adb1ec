"""All metrics of one sample of reviews against another, as jackknife replicates. No models, no files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from common import reviews
from common.text import COPY_STEPS, copied_lengths, longest_copy
from fidelity import metrics as m
from fidelity.samples import Row

SELF_BLEU_ROWS = 2000
MAUVE_SEEDS = 5
MAUVE = {"kmeans_num_redo": 1, "kmeans_max_iter": 100, "kmeans_explained_var": 0.9, "mauve_scaling_factor": 5}
ATTRIBUTES = ("rating", "words", "sentences", "positive words", "negative words", "exclamation marks")


@dataclass(frozen=True)
class Sample:
    """n reviews with the counts that the word metrics need."""

    texts: list[str]
    corpus: m.Corpus
    words: np.ndarray  # [n]
    sentences: np.ndarray  # [n]
    letters: np.ndarray  # [total words] characters of each word
    attributes: np.ndarray  # [n, len(ATTRIBUTES)]
    ngrams: dict[int, tuple[np.ndarray, np.ndarray]]  # order 1 … 4 → output of metrics.ngrams
    repeated: np.ndarray  # [n] share of a review's 4-grams that occur earlier in it
    truncated: np.ndarray | None  # [n] whether generation hit its token limit; None if the rows do not say

    def kept_letters(self, keep: np.ndarray) -> np.ndarray:
        """Characters of each word of the kept reviews."""
        letters: np.ndarray = self.letters[keep[self.corpus.document]]
        return letters

    def word_counts(self, keep: np.ndarray, vocabulary_size: int) -> np.ndarray:
        """[vocabulary_size] how often each word occurs in the kept reviews."""
        return np.bincount(self.corpus.tokens[keep[self.corpus.document]], minlength=vocabulary_size)


def describe(rows: Sequence[Row], vocabulary: dict[str, int]) -> Sample:
    """The sample of these rows; adds new words to `vocabulary`."""
    texts = [reviews.text_of(row) for row in rows]
    corpus = m.make_corpus(texts, vocabulary)
    split = [m.words(text) for text in texts]
    words = np.bincount(corpus.document, minlength=len(rows))
    sentences = np.array([m.count_sentences(text) for text in texts])
    columns = {
        "rating": np.array([reviews.rating(row) for row in rows]),
        "words": words,
        "sentences": sentences,
        "positive words": np.array([m.count_of(text, m.POSITIVE) for text in split]),
        "negative words": np.array([m.count_of(text, m.NEGATIVE) for text in split]),
        "exclamation marks": np.array([text.count("!") for text in texts]),
    }
    reasons = [row.get("finish_reason") for row in rows]
    ngrams = {order: m.ngrams(corpus, order) for order in (1, 2, 3, 4)}
    return Sample(
        texts=texts,
        corpus=corpus,
        words=words,
        sentences=sentences,
        letters=np.array([len(word) for text in split for word in text]),
        attributes=np.column_stack([columns[name] for name in ATTRIBUTES]).astype(float),
        ngrams=ngrams,
        repeated=m.repetition(*ngrams[4], len(rows)),
        truncated=None if None in reasons else np.array([reason == "length" for reason in reasons]),
    )


def ngram_budgets(samples: Sequence[Sample]) -> dict[int, int]:
    """{order 1 … 3: n-grams that distinct-n counts}: 0.9 of those in the smallest sample, so that jackknife subsets
    with shorter reviews still have their share."""
    return {order: int(0.9 * min(len(sample.ngrams[order][1]) for sample in samples)) for order in (1, 2, 3)}


def word_measures(
    real: Sample, other: Sample, groups: np.ndarray, budgets: dict[int, int], vocabulary_size: int
) -> m.Replicates:
    """The metrics that only need words."""
    counts = self_bleu_counts(other.corpus)

    def measure(keep: np.ndarray) -> dict[str, float]:
        measures = length_measures(real, other, keep)
        measures["Jensen-Shannon word frequencies (bits)"] = m.jensen_shannon(
            real.word_counts(keep, vocabulary_size), other.word_counts(keep, vocabulary_size)
        )
        measures |= diversity_measures(other, keep, budgets, counts)
        measures |= attribute_measures(real, other, keep)
        if other.truncated is not None:
            measures["cut at the token limit"] = mean(other.truncated.astype(float)[keep])
        return measures

    return m.replicate(measure, groups)


def mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def length_measures(real: Sample, other: Sample, keep: np.ndarray) -> dict[str, float]:
    """Lengths of reviews, sentences and words, and the divergences of their distributions."""
    real_letters, letters = real.kept_letters(keep), other.kept_letters(keep)
    real_words, words = real.words[keep], other.words[keep]
    real_sentences, sentences = real.sentences[keep], other.sentences[keep]
    return {
        "words a review": mean(words),
        "sentences a review": mean(sentences),
        "words a sentence": float(words.sum() / max(1, sentences.sum())),
        "characters a word": float(letters.mean()) if len(letters) else float("nan"),
        "KL words a review (bits)": m.kl_divergence(real_words, words, m.WORD_BINS),
        "KL sentences a review (bits)": m.kl_divergence(real_sentences, sentences, m.SENTENCE_BINS),
        "KL characters a word (bits)": m.kl_divergence(real_letters, letters, m.LETTER_BINS),
        "Wasserstein-1 words a review": float(stats.wasserstein_distance(real_words, words)),
    }


def self_bleu_counts(corpus: m.Corpus) -> list[m.Counts]:
    """N-gram counts of orders 1 … 4 in the first SELF_BLEU_ROWS reviews."""
    size = min(SELF_BLEU_ROWS, corpus.size)
    end = int(np.searchsorted(corpus.document, size))
    first = m.Corpus(corpus.tokens[:end], corpus.document[:end], size)
    return [m.gram_counts(first, order) for order in (1, 2, 3, 4)]


def diversity_measures(
    other: Sample, keep: np.ndarray, budgets: dict[int, int], counts: Sequence[m.Counts]
) -> dict[str, float]:
    """distinct-n, self-BLEU and repetition within one sample; counts: its `self_bleu_counts`."""
    n = keep.sum()
    measures = {
        f"distinct-{order}": m.distinct(*other.ngrams[order], keep, int(budget * n / len(keep)))
        for order, budget in budgets.items()
    }
    measures["self-BLEU"] = m.self_bleu(counts, other.words[:SELF_BLEU_ROWS], keep[:SELF_BLEU_ROWS])
    measures["repeated 4-grams in a review"] = mean(other.repeated[keep])
    different = len({text for text, kept in zip(other.texts, keep) if kept})
    measures["exact duplicates in the sample"] = float(1 - different / n)
    return measures


def attribute_measures(real: Sample, other: Sample, keep: np.ndarray) -> dict[str, float]:
    """Rank correlations of the rating with the other attributes, and the mean shift of all pairwise correlations from
    the real ones."""
    real_correlations, correlations = (m.rank_correlations(sample.attributes[keep]) for sample in (real, other))
    pairs = list(zip(*np.triu_indices(len(ATTRIBUTES), 1)))
    shifts = [abs(real_correlations[pair] - correlations[pair]) for pair in pairs]
    known = [shift for shift in shifts if np.isfinite(shift)]
    measures = {
        f"Spearman rating × {name}": float(correlations[0, column])
        for column, name in enumerate(ATTRIBUTES)
        if name != "rating"
    }
    return measures | {"attribute correlations, mean shift": float(np.mean(known)) if known else float("nan")}


def find_copies(samples: dict[str, Sample], source: list[str]) -> dict[str, tuple[np.ndarray, int]]:
    """For each sample: ([n] per review, the largest step of COPY_STEPS that its longest passage shared with `source`
    reaches; length of the longest such passage in the sample). All samples have the same size."""
    together = copied_lengths([text for sample in samples.values() for text in sample.texts], source)
    copies = {}
    for (name, sample), copied in zip(samples.items(), np.split(together, len(samples))):
        top = int(copied.max())
        candidates = [text for text, length in zip(sample.texts, copied) if length == top]
        copies[name] = copied, longest_copy(candidates, source, top)
    return copies


def copy_measures(copied: np.ndarray, groups: np.ndarray) -> m.Replicates:
    """For each step: the share of reviews that have a passage of at least that length in common with a training row."""

    def measure(keep: np.ndarray) -> dict[str, float]:
        return {f"copies >= {step} characters": float((copied[keep] >= step).mean()) for step in COPY_STEPS}

    return m.replicate(measure, groups)


Vectors = dict[str, np.ndarray]  # sample → its reviews as unit vectors [n, d]
Pools = dict[str, tuple[np.ndarray, np.ndarray]]  # 'held-out', 'training' → (unit vectors [p, d], their groups [p])


def embedding_measures(real: np.ndarray, other: np.ndarray, groups: np.ndarray, pools: Pools) -> m.Replicates:
    """The metrics of two samples of unit vectors [n, d]; nearest neighbours are searched in the pools."""
    measures = m.replicate(lambda keep: {"Frechet distance": m.frechet_distance(real[keep], other[keep])}, groups)
    measures |= m.manifold_measures(real, other, groups)
    nearest = {name: m.mean_nearest(m.nearest_cosine(other, *pool), groups) for name, pool in pools.items()}
    measures |= {f"nearest cosine to {name} rows": values for name, values in nearest.items()}
    if "training" in nearest:
        measures["copying gap (training - held-out)"] = nearest["training"] - nearest["held-out"]
    return measures


def mauve(real: np.ndarray, other: np.ndarray, seed: int) -> m.Estimate:
    """MAUVE (Pillutla et al. 2021) of two samples of vectors [n, d], computed by the authors' library.

    Mean, minimum, maximum and standard deviation over MAUVE_SEEDS clustering seeds.
    """
    from mauve import compute_mauve  # an optional dependency

    values = [
        float(compute_mauve(p_features=real, q_features=other, seed=seed + step, **MAUVE).mauve)
        for step in range(MAUVE_SEEDS)
    ]
    return {
        "value": float(np.mean(values)),
        "low": min(values),
        "high": max(values),
        "sd": float(np.std(values, ddof=1)),
    }
