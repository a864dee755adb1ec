#!/usr/bin/env python3
"""Train on synthetic, test on real: the same base model learns to rate reviews from each arm's rows.

python utility/downstream.py --model meta-llama/Llama-3.1-8B --real train.jsonl --heldout validation.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir utility-out

Every arm (real, and each --synthetic) gives the same number of rows, so run_peft.py, called in process with equal
arguments, takes the same number of optimiser steps; both are checked. --num_seeds seeds draw the rows and train. A
model rates a held-out real review by the most probable of the five labels "1" … "5" after the prompt: one forward pass,
no sampling. The prompt holds the review alone (its first tokens where it is long), not its title or product.

results_utility.jsonl: a line an arm and seed (accuracy, macro-F1, mean absolute error in stars; exact McNemar p against
the real arm of that seed), the untuned base and the majority class of the real training rows, then a line an arm with
mean and spread over seeds. A trained arm's line has its run's relative_change and notes ("the model has hardly moved").
results_utility_rows.jsonl: truth and rating of every row, no text. Trained runs stay below
--output_dir/models and are taken up again by a call with the same settings; one with other settings is refused.
"""

import argparse
import os
import random
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from common import cli, dataset, distributed, models, results, reviews
from common.distributed import progress_bar
from common.stats import clopper_pearson, mcnemar
from training.checkpoint import checkpoints
from training.config import TrainConfig
from training.run import run as fine_tune

INSTRUCTION = "Rate the customer's review below with 1 to 5 stars. Answer with the number alone."
LABELS = ("1", "2", "3", "4", "5")
SHOWN = ("accuracy", "macro_f1", "mae")
MARGIN = 4  # tokens that cutting a review may add, and the EOS
FREE = ("output_dir", "dry_run", "allow_overlap", "real", "heldout", "synthetic")  # of the files the content counts


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig(cli.ModelConfig):
    """The flags of utility/downstream.py."""

    real: str
    heldout: str
    model: str = TrainConfig.model
    synthetic: tuple[str, ...] | None = None
    num_rows: int | None = None
    num_heldout: int = 2000
    num_seeds: int = 3
    allow_overlap: bool = False
    output_dir: str = "./utility-out"
    epochs: int = TrainConfig.epochs
    learning_rate: float = TrainConfig.learning_rate
    per_device_batch_size: int = TrainConfig.per_device_batch_size
    gradient_accumulation_steps: int = TrainConfig.gradient_accumulation_steps
    warmup_steps: int = TrainConfig.warmup_steps
    peft_type: str = TrainConfig.peft_type
    lora_r: int = TrainConfig.lora_r
    lora_alpha: float = TrainConfig.lora_alpha
    max_length: int = TrainConfig.max_length


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Fine-tune one base on real and on synthetic reviews, rate held-out real ones.",
        "python utility/downstream.py -m MODEL --real train.jsonl --heldout test.jsonl --synthetic dp=dp.jsonl",
        DownstreamConfig,
    )
    add = parser.add_argument
    add("-m", "--model", help="hub name or directory of a causal LM")
    add("--real", required=True, metavar="FILE", help="review rows to train on (default: none, required)")
    add("--heldout", required=True, metavar="FILE", help="review rows to rate (default: none, required)")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows an arm (default: none)")
    add("--num_rows", type=cli.positive_int, help="training rows an arm; None: as many as all have")
    add("--num_heldout", type=cli.positive_int, help="held-out rows at most")
    add("--num_seeds", type=cli.positive_int, help="seeds: --seed, --seed + 1, …")
    add("--allow_overlap", action="store_true", help="allow arms made from the metadata of held-out rows")
    add("--output_dir", help="where models and results are written")
    with parser.section("training, as run_peft.py's"):
        add("-e", "--epochs", type=cli.positive_int, help="passes over the rows")
        add("-lr", "--learning_rate", type=cli.non_negative_float, help="peak learning rate")
        add("-pdbs", "--per_device_batch_size", type=cli.positive_int, help="rows held at once")
        add("-gas", "--gradient_accumulation_steps", type=cli.positive_int, help="batches of a step")
        add("-w", "--warmup_steps", type=cli.non_negative_int, help="steps until the full learning rate")
        add("-pt", "--peft_type", choices=("lora", "dora", "pissa"), help="kind of adapter")
        add("--lora_r", type=cli.positive_int, help="rank")
        add("--lora_alpha", type=cli.positive_float, help="the update is scaled by alpha / r")
        add("--max_length", type=cli.positive_int, help="tokens of a row; the rest is cut off")
    cli.add_model_flags(parser)
    return parser


# ---------------------------------------------------------------- rows


def check_overlap(arms: dict[str, list[dict]], heldout: list[dict], allowed: bool, problems: cli.Problems) -> None:
    """Problems for real training rows that are held-out rows too, and for arms made from held-out rows' metadata."""
    keys = {reviews.source_key(row) for row in heldout if row.get("row_id") is not None}
    for arm, rows in arms.items():
        if arm == "real":
            shared = reviews.shared_rows(rows, heldout)
            if shared:
                problems.add(f"--real: {shared} of its rows are held-out rows; give other ones")
        elif not allowed and (shared := sum(reviews.source_key(row) in keys for row in rows)):
            problems.add(
                f"--synthetic {arm}: {shared} rows have the product and rating of held-out rows; hold out other rows, "
                "or pass --allow_overlap"
            )


def review_room(tokenizer, max_length: int) -> int:
    """Tokens of a review that fit into max_length with the prompt around it, the label and EOS; may be below 1."""
    frame = dataset.instruction_prompt({"instruction": INSTRUCTION, "input": "x"}) + LABELS[0]
    return max_length - len(tokenizer(frame).input_ids) - MARGIN


def instruction_rows(rows: list[dict], tokenizer, max_length: int) -> tuple[list[dict], int]:
    """(instruction rows that fit max_length tokens with label and EOS, how many reviews were cut for that)."""
    room = review_room(tokenizer, max_length)
    texts = [reviews.text_of(row) for row in rows]
    offsets = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False, verbose=False).offset_mapping
    made, n_cut = [], 0
    for row, text, spans in zip(rows, texts, offsets):
        if len(spans) > room:
            text, n_cut = text[: spans[room - 1][1]].rstrip(), n_cut + 1
        made.append({"instruction": INSTRUCTION, "input": text, "output": str(reviews.rating(row))})
    return made, n_cut


# ---------------------------------------------------------------- models


def label_log_probabilities(model, tokenizer, prompts: list[str], bar) -> list[list[float]]:
    """[n][5] log p(label | prompt) in nats, tokenised as in training: prompt and label as one text.

    Where the five labels differ in one last token, one pass a prompt gives all five; else each label is scored.
    """
    from common.scoring import join, score

    encoded = models.encode_texts(tokenizer, [prompt + label for prompt in prompts for label in LABELS])
    encoded = [models.without_end(tokenizer, ids) for ids in encoded]
    groups = [encoded[start : start + len(LABELS)] for start in range(0, len(encoded), len(LABELS))]
    last = [[ids[-1] for ids in group] for group in groups]
    if all(last[0] == each for each in last) and all(len({tuple(ids[:-1]) for ids in group}) == 1 for group in groups):
        sequences = [group[0] for group in groups]

        def statistics(logits, targets):
            return logits.log_softmax(-1)[:, last[0]]

        found = join(sequences, [score(model, sequences, statistics=statistics, progress=bar.update)])
        return [values[-1].tolist() for values in found]
    found = iter(join(encoded, [score(model, encoded, progress=bar.update)]))
    totals = []
    for group in groups:
        shared = next((k for k, column in enumerate(zip(*group)) if len(set(column)) > 1), min(map(len, group)))
        totals.append([float(next(found)[max(0, shared - 1) :].sum()) for _ in group])
    return totals


def rate(base, adapter, tokenizer, prompts: list[str]) -> list[int]:
    """[n] ratings 1 … 5 by the base with `adapter` (None: as it is)."""
    with models.adapted(base, adapter) as (model, _), progress_bar(None, "tokens") as bar:
        found = label_log_probabilities(model, tokenizer, prompts, bar)
    return [1 + max(range(5), key=lambda label: values[label]) for values in found]


def training_config(config: DownstreamConfig, file: Path, seed: int) -> TrainConfig:
    """run_peft.py's configuration of one arm and seed; they differ in --input and --seed alone."""
    same = {field.name for field in fields(TrainConfig)} - {"output_dir", "allow_overlap"}
    return replace(
        TrainConfig(**{key: value for key, value in vars(config).items() if key in same}),
        input=str(file),
        output_root=str(Path(config.output_dir) / "models"),
        seed=seed,
        loss_on="completion",
        logging_steps=10,
        resume=True,
    )


def what_moved(checkpoint: Path) -> dict:
    """{relative_change, notes} of the run that a checkpoint belongs to."""
    record = models.training_record(checkpoint) or {}
    return {"relative_change": record.get("relative_change"), "notes": record.get("notes") or []}


# ---------------------------------------------------------------- the command


def settings(args: dict, contents: list[str]) -> dict[str, object]:
    """{flag: value} of what the results depend on; of --real, --heldout and each arm the SHA-256 in `contents`."""
    arms = [f"--synthetic {word.partition('=')[0]}" for word in args.get("synthetic") or []]
    flags = {f"--{key}": value for key, value in args.items() if key not in FREE}
    return flags | dict(zip(["--real", "--heldout", *arms], contents))


def check_earlier(config: DownstreamConfig, inputs: list, problems: cli.Problems) -> None:
    """A problem when --output_dir holds a run, finished or not, with other settings: it would be replaced."""
    folder, advice = Path(config.output_dir), "name another place, or remove this one"
    file = folder / "run_downstream.json"
    if not file.is_file():
        if (folder / "results_utility.jsonl").exists():
            problems.add(f"--output_dir {folder}: has results_utility.jsonl without its run_downstream.json; {advice}")
        return
    record = problems.absorb(results.read_json, file, advice)
    if record is None:
        return
    then = settings(record.get("args", {}), [one["sha256"] for one in record.get("inputs", [])])
    now = settings(cli.plain(vars(config)), [results.sha256(path) for path in inputs])
    different = [
        f"{key} {str(then.get(key))[:40]} there, {str(now.get(key))[:40]} here"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if different:
        problems.add(f"--output_dir {folder}: holds a run with other settings ({'; '.join(different)}); {advice}")


def input_files(config: DownstreamConfig) -> list[str]:
    return [config.real, config.heldout, *(word.partition("=")[2] for word in config.synthetic or [])]


def prepare(config: DownstreamConfig, problems: cli.Problems):
    """(model reference, tokenizer, tokens a row may have, {arm: rows}, held-out rows, training rows an arm, blank rows
    left out of each)."""
    from types import SimpleNamespace

    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        problems.add("WORLD_SIZE: runs as one process; start it without torchrun")
    cli.check_writable(config.output_dir, problems)
    if config.seed + config.num_seeds > 1 << 32:
        problems.add(f"--num_seeds {config.num_seeds}: the last of --seed {config.seed}, … is above 4294967295")
    files = reviews.split_arms(config.synthetic or [], ("real", "base", "majority"), problems)
    arms = {"real": problems.absorb(reviews.read_reviews, config.real)}
    arms |= {arm: problems.absorb(reviews.read_reviews, file, reviews.GENERATED) for arm, file in files.items()}
    heldout = problems.absorb(reviews.read_reviews, config.heldout)
    ref, tokenizer = models.look_up(problems, config.model, config.revision)
    if ref and ref.adapter:
        problems.add(f"--model {config.model}: is an adapter; merge it into its base first (merge_peft.py)")
    max_length = config.max_length
    if tokenizer:
        from transformers import AutoConfig

        architecture = AutoConfig.from_pretrained(ref.base, revision=ref.revision)
        max_length = min(max_length, models.context_length(SimpleNamespace(config=architecture)))
        lacking = 1 - review_room(tokenizer, max_length)
        if lacking > 0:
            problems.add(
                f"--max_length {config.max_length}: no token is left for the review; at least {max_length + lacking} "
                "are needed, in the model's context too"
            )
    problems.check()
    check_earlier(config, input_files(config), problems)
    check_overlap(arms, heldout, config.allow_overlap, problems)
    dropped = {arm: len(rows) - len(reviews.with_text(rows)) for arm, rows in [*arms.items(), ("heldout", heldout)]}
    arms = {arm: reviews.with_text(rows) for arm, rows in arms.items()}
    heldout = reviews.with_text(heldout)
    n = config.num_rows or min(map(len, arms.values()))
    for arm, rows in arms.items():
        if len(rows) < max(n, 1):
            problems.add(f"--num_rows {n}: {arm} has only {len(rows)} rows with text")
    if not heldout:
        problems.add(f"--heldout {config.heldout}: no row has text")
    problems.check()
    heldout = random.Random(f"{config.seed} heldout").sample(heldout, min(config.num_heldout, len(heldout)))
    return ref, tokenizer, max_length, arms, heldout, n, dropped


def line_of(arm: str, seed: int | None, truth: list[int], predicted: list[int], **more) -> dict:
    from utility.metrics import rating_scores

    hits = sum(map(int.__eq__, truth, predicted))
    counts = {"n_requested": len(truth), "n_scored": len(truth), "n_dropped": 0}
    scores = rating_scores(truth, predicted) | {"accuracy_ci95": clopper_pearson(hits, len(truth))}
    return {"arm": arm, "seed": seed, **scores, **counts, **more}


def paired(truth: list[int], real: list[int], other: list[int]) -> dict:
    """Rows that only `other` rates rightly (gained), that only `real` does (lost), exact McNemar p."""
    right = [(a == t, b == t) for t, a, b in zip(truth, real, other)]
    gained, lost = sum(b and not a for a, b in right), sum(a and not b for a, b in right)
    return {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def summary(arm: str, lines: list[dict]) -> dict:
    """Mean, standard deviation and range over the seeds of an arm's lines."""
    import statistics

    found = {"arm": arm, "seed": None, "seeds": [line["seed"] for line in lines]}
    for name in SHOWN:
        values = [line[name] for line in lines]
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {"mean": statistics.mean(values), "sd": spread, "low": min(values), "high": max(values)}
    return found


def run(config: DownstreamConfig) -> list[dict]:
    """Train, rate, write; returns the lines of results_utility.jsonl. UserError before a model is loaded."""
    data = Path(config.output_dir) / "data"
    with results.output_folder(config.output_dir, config.dry_run, "downstream") as place:
        if not config.dry_run and data.is_dir():
            results.tidy([data])
        return run_locked(config, place)


def run_locked(config: DownstreamConfig, place: results.Output) -> list[dict]:
    problems = cli.Problems()
    ref, tokenizer, max_length, arms, heldout, n, dropped = prepare(config, problems)
    folder = Path(config.output_dir)
    print(f"{n} rows an arm ({', '.join(arms)}), {len(heldout)} held-out rows, {config.num_seeds} seeds", flush=True)
    if config.dry_run:
        print(f"would write results_utility.jsonl in {folder}")
        return []
    world = distributed.start()
    with results.Run(folder / "run_downstream.json", config, input_files(config), world, place) as record:
        record["dropped_blank"] = dropped
        lines, rows, record["steps"] = measure(config, ref, tokenizer, max_length, arms, heldout, n, world)
        record.files.write_jsonl(folder / "results_utility_rows.jsonl", rows)
        record.files.write_jsonl(folder / "results_utility.jsonl", lines)
    for line in lines:
        if line["seed"] is None:
            mean = {name: line[name]["mean"] if isinstance(line[name], dict) else line[name] for name in SHOWN}
            print(f"{line['arm']:>12}  " + "  ".join(f"{name} {value:.4f}" for name, value in mean.items()))
    for line in lines:
        for note in line.get("notes", ()):
            print(f"{line['arm']}, seed {line['seed']}: {note}; what it shows is the base")
    return lines


def measure(
    config: DownstreamConfig, ref, tokenizer, max_length, arms, heldout, n, world
) -> tuple[list[dict], list[dict], int]:
    from utility.metrics import majority

    dtype = models.resolve_dtype(config.dtype, world.device)
    asked, n_cut = instruction_rows(heldout, tokenizer, max_length)
    prompts, truth = [dataset.instruction_prompt(row) for row in asked], [reviews.rating(row) for row in heldout]
    runs, found, lines = {}, {}, []
    for seed in range(config.seed, config.seed + config.num_seeds):
        for arm, rows in arms.items():
            chosen = random.Random(f"{seed} {arm}").sample(rows, n)
            file = Path(config.output_dir) / "data" / f"{arm}-seed{seed}.jsonl"
            made, arm_cut = instruction_rows(chosen, tokenizer, max_length)
            results.write_jsonl(file, made, permissions=0o600)
            last = checkpoints(fine_tune(training_config(config, file, seed)))[-1]
            runs[arm, seed] = {
                "checkpoint": str(last),
                "steps": int(last.name.rpartition("-")[2]),
                "train_cut": arm_cut,
                **what_moved(last),
            }
    steps = {one["steps"] for one in runs.values()}
    if len(steps) != 1:
        raise RuntimeError(f"the arms took different numbers of optimiser steps: {runs}")
    base = models.load_base(ref, dtype, world.device, config.device_map)
    for (arm, seed), one in runs.items():  # the real arm comes first
        predicted = found[arm, seed] = rate(base, one["checkpoint"], tokenizer, prompts)
        against = paired(truth, found["real", seed], predicted) if arm != "real" else None
        more = {"train_rows": n, **one, "mcnemar_against_real": against}
        lines.append(line_of(arm, seed, truth, predicted, n_cut=n_cut, **more))
    lines += [summary(arm, [line for line in lines if line["arm"] == arm]) for arm in arms]
    untuned = rate(base, None, tokenizer, prompts)
    commonest = majority([reviews.rating(row) for row in arms["real"]])
    for arm, predicted in (("base", untuned), ("majority", [commonest] * len(truth))):
        found[arm, None] = predicted
        lines.append(line_of(arm, None, truth, predicted, n_cut=n_cut))
    rows = [
        {"arm": arm, "seed": seed, "row_id": row.get("row_id"), "truth": reviews.rating(row), "rating": rating}
        for (arm, seed), predicted in found.items()
        for row, rating in zip(heldout, predicted)
    ]
    return lines, rows, steps.pop()


def main(argv=None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
