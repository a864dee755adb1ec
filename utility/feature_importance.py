#!/usr/bin/env python3
"""Do models trained on synthetic reviews rate by the same words as one trained on real reviews?

python utility/feature_importance.py --real train.jsonl --heldout test.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir utility-out

A TF-IDF logistic regression learns the rating from each arm's rows (as many of each). The words are those of at least
--min_rows held-out rows: another word has no importance there. The importance of a word is the expected rise of the
log-loss on the SAME held-out real rows when its column is shuffled: the expectation over all shuffles, without noise.
Each arm is compared with the model of one half of the real rows: `real` is the other half (the ceiling; no user in
both halves), `null` the first half with its ratings shuffled. Spearman and Pearson over all words, Jaccard of the top.
Repeated over --num_seeds draws of rows → feature_importance.json. `sd` is over those draws: an arm that has no more
rows than enter is the same in each, and its `sd` shows the draw of the real half alone.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from common import cli, results, reviews

RECORD = "run_feature_importance.json"
TOPS = (10, 20, 50)
FEWEST = 20  # rows of an arm


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """The flags of utility/feature_importance.py."""

    real: str
    heldout: str
    synthetic: tuple[str, ...] | None = None
    num_rows: int | None = None
    num_heldout: int = 2000
    min_rows: int = 5
    num_seeds: int = 5
    output_dir: str = "./utility-out"
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Consistency of word importance between models trained on synthetic and on real reviews.",
        "python utility/feature_importance.py --real train.jsonl --heldout test.jsonl --synthetic dp=dp.jsonl",
        ImportanceConfig,
    )
    add = parser.add_argument
    add("--real", required=True, metavar="FILE", help="review rows to train on (default: none, required)")
    add("--heldout", required=True, metavar="FILE", help="review rows to measure on (default: none, required)")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows an arm (default: none)")
    add("--num_rows", type=cli.positive_int, help="rows an arm; None: as many as all have")
    add("--num_heldout", type=cli.positive_int, help="held-out rows at most")
    add("--min_rows", type=cli.positive_int, help="held-out rows that a word must stand in")
    add("--num_seeds", type=cli.positive_int, help="draws of rows: --seed, --seed + 1, …")
    add("--output_dir", help="where the results are written")
    add("--overwrite", action="store_true", help="replace an existing feature_importance.json")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="seed of everything random")
    return parser


def importances(rows: list[dict], words: list[str], heldout: list[dict], seed: int):
    """[words] expected permutation importance on the held-out rows of a TF-IDF logistic regression of `rows`."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from utility.metrics import expected_permutation_importance

    vectorizer = TfidfVectorizer(vocabulary=words)
    model = LogisticRegression(max_iter=2000, random_state=seed)
    features = vectorizer.fit_transform([reviews.text_of(row) for row in rows])
    model.fit(features, [reviews.rating(row) for row in rows])
    weights, bias = np.zeros((len(words), 5)), np.full(5, -30.0)  # a rating that no row has: as good as impossible
    classes = [int(label) - 1 for label in model.classes_]
    if len(classes) == 2:  # scikit-learn keeps one vector for two classes
        weights[:, classes] = np.column_stack([np.zeros(len(words)), model.coef_[0]])
        bias[classes] = 0, model.intercept_[0]
    else:
        weights[:, classes], bias[classes] = model.coef_.T, model.intercept_
    features = vectorizer.transform([reviews.text_of(row) for row in heldout]).tocsc()
    truth = np.array([reviews.rating(row) - 1 for row in heldout])
    return expected_permutation_importance(features, weights, bias, truth)


def compare(reference, other) -> dict:
    """Spearman, Pearson and Jaccard@k of two importance vectors [words].

    None where one is constant, and a Jaccard@k also where there are no more than k words: all would be in both tops.
    """
    import numpy as np
    from scipy import stats

    from utility.metrics import top_jaccard

    constant = np.ptp(reference) == 0 or np.ptp(other) == 0
    found = {
        "spearman": None if constant else float(stats.spearmanr(reference, other).statistic),
        "pearson": None if constant else float(stats.pearsonr(reference, other).statistic),
    }
    trivial = {k: constant or k >= len(reference) for k in TOPS}
    return found | {f"jaccard@{k}": None if trivial[k] else top_jaccard(reference, other, k) for k in TOPS}


def run(config: ImportanceConfig) -> dict:
    """Measure and write feature_importance.json; returns its content."""
    target = Path(config.output_dir) / "feature_importance.json"
    with results.output_folder(config.output_dir, config.dry_run, "feature_importance") as place:
        samples, words, heldout, n, inputs, finished = prepare(config, target)
        if finished:
            return results.read_json(target, "remove it")
        if config.dry_run:
            print(f"would compare {config.num_seeds} draws of {n} rows an arm and write {target}")
            return {}
        with results.Run(target.with_name(RECORD), config, inputs, output=place) as record:
            content = measure(samples, words, heldout, n)
            record.files.write_json(target, content)
    for arm, one in content["arms"].items():
        print(f"{arm:>12}  " + "  ".join(f"{name} {cell(value)}" for name, value in one["mean"].items()))
    return content


def prepare(config: ImportanceConfig, target: Path) -> tuple:
    """(samples by seed, words, held-out rows, rows of a sample, input files, whether the results stand already)."""
    problems = cli.Problems()
    cli.check_writable(config.output_dir, problems)
    if config.seed + config.num_seeds > 1 << 32:
        problems.add(f"--num_seeds {config.num_seeds}: the last of --seed {config.seed}, … is above 4294967295")
    sources = reviews.split_arms(config.synthetic or [], ("real", "null", "reference"), problems)
    arms = {arm: problems.absorb(reviews.read_reviews, file, reviews.GENERATED) for arm, file in sources.items()}
    real = problems.absorb(reviews.read_reviews, config.real)
    heldout = problems.absorb(reviews.read_reviews, config.heldout)
    if real and heldout and (shared := reviews.shared_rows(real, heldout)):
        problems.add(f"--real {config.real}: {shared} of its rows are held-out rows; give other ones")
    inputs = [config.real, config.heldout, *sources.values()]
    record, hashed = target.with_name(RECORD), [] if problems.lines else inputs
    finished = problems.absorb(results.finished, record, [target], config, hashed, config.overwrite)
    problems.check()
    real, heldout, arms = (
        reviews.with_text(real),
        reviews.with_text(heldout),
        {arm: reviews.with_text(rows) for arm, rows in arms.items()},
    )
    draws = [reviews.halve(real, seed) for seed in range(config.seed, config.seed + config.num_seeds)]
    smallest = min(*(len(half) for halves in draws for half in halves), *map(len, arms.values()), len(real))
    n = config.num_rows or smallest
    if n > smallest:
        problems.add(f"--num_rows {n}: only {smallest} rows are there (an arm's rows, or half of --real)")
    measured = min(config.num_heldout, len(heldout))
    if n < FEWEST:
        problems.add(f"{n} rows with text of an arm (or half of --real); at least {FEWEST} are needed")
    if measured < FEWEST:
        problems.add(f"{measured} held-out rows (--num_heldout, and those with text); at least {FEWEST} are needed")
    problems.check()
    heldout = random.Random(f"{config.seed} heldout").sample(heldout, measured)
    samples = {seed: draw(halves, arms, n, seed) for seed, halves in enumerate(draws, config.seed)}
    check_ratings(samples, problems)
    words = problems.absorb(vocabulary, heldout, config.min_rows)
    problems.check()
    return samples, words, heldout, n, inputs, finished


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def draw(halves: tuple[list, list], arms: dict[str, list[dict]], n: int, seed: int) -> dict[str, list[dict]]:
    """{'reference', 'real', arm, …, 'null': n rows} of one seed."""
    rng = random.Random(seed)
    first, second = (half[:n] for half in halves)
    samples = {"reference": first, "real": second} | {arm: rng.sample(rows, n) for arm, rows in arms.items()}
    shuffled = [row["Rating"] for row in first]
    rng.shuffle(shuffled)
    samples["null"] = [row | {"Rating": rating} for row, rating in zip(first, shuffled)]
    return samples


def check_ratings(samples: dict[int, dict[str, list[dict]]], problems: cli.Problems) -> None:
    """A problem for each arm that has rows of one rating alone in a draw: nothing can be learned from them."""
    for arm in next(iter(samples.values())):
        alike = [seed for seed, each in samples.items() if len({reviews.rating(row) for row in each[arm]}) == 1]
        if alike and arm != "null":  # it has the ratings of the reference
            flag = "--real" if arm in ("reference", "real") else f"--synthetic {arm}"
            problems.add(
                f"{flag}: all {len(samples[alike[0]][arm])} rows drawn with seed {alike[0]} have one and the same "
                f"rating ({arm}); rows of two ratings at least are needed"
            )


def vocabulary(heldout: list[dict], min_rows: int) -> list[str]:
    """The words that stand in at least `min_rows` held-out rows, sorted. UserError when there are none."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    counter = TfidfVectorizer(min_df=min_rows)
    try:
        counter.fit([reviews.text_of(row) for row in heldout])
    except ValueError as error:  # "no terms remain": the words say what to change
        raise cli.UserError(f"--min_rows {min_rows}: no word stands in so many held-out rows ({error})") from None
    return sorted(counter.vocabulary_)


def measure(samples: dict[int, dict[str, list[dict]]], words: list[str], heldout: list[dict], n: int) -> dict:
    import numpy as np

    found: dict[str, list[dict]] = {}
    top: list[str] = []
    for seed, each in samples.items():
        vectors = {arm: importances(rows, words, heldout, seed) for arm, rows in each.items()}
        top = top or [words[index] for index in np.argsort(-vectors["reference"], kind="stable")[: TOPS[0]]]
        for arm, vector in vectors.items():
            if arm != "reference":
                found.setdefault(arm, []).append({"seed": seed, **compare(vectors["reference"], vector)})
    content = {"schema": 1, "rows": n, "heldout_rows": len(heldout), "words": len(words), "top_words": top, "arms": {}}
    for arm, lines in found.items():
        names = [name for name in lines[0] if name != "seed"]
        values = {name: [line[name] for line in lines if line[name] is not None] for name in names}
        content["arms"][arm] = {
            "mean": {name: float(np.mean(each)) if each else None for name, each in values.items()},
            "sd": {name: float(np.std(each, ddof=1)) if len(each) > 1 else None for name, each in values.items()},
            "seeds": lines,
            "n_requested": len(lines),
            "n_scored": sum(line["spearman"] is not None for line in lines),
            "n_dropped": sum(line["spearman"] is None for line in lines),
        }
    return content


def main(argv=None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
