#!/usr/bin/env python3
"""Perplexity of every checkpoint below a directory, or of one model, on the evaluation head of a dataset.

python perplexity/perplexity.py ./pythia-1.4b --dataset ./data/enron.jsonl    # every checkpoint-* below the directory
python perplexity/perplexity.py --model ./pythia-1.4b/run/checkpoint-276 --output_dir ./results   # one adapter or model
torchrun --nproc_per_node=4 perplexity/perplexity.py ./pythia-1.4b            # the rows spread over four GPUs

A document is prompt + continuation; its perplexity is exp(mean NLL of its tokens 1 … T after a start token (BOS, else
EOS)). perplexity.txt gets one line a checkpoint (mean over documents), perplexity.jsonl everything about it. Documents
longer than the context are read in windows that begin every half context, each token scored once (`n_windowed` counts
them). Checkpoints measured before with the same settings and weights are skipped, so an interrupted run continues.
"""

import argparse
import gc
import sys
import time
import traceback
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # else `perplexity` would be this file, not its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, dataset, distributed, models, results
from common.distributed import progress_bar
from common.scoring import TOKEN_BUDGET, join, score

DEFAULT_DIR = "./pythia-1.4b"
SMALLEST_FILE = 3  # rows
RESAMPLES = 1000
# Where two lines agree in these, they are the same measurement; model_sha256 tells a retrained checkpoint.
SETTINGS = ("checkpoint", "model_sha256", "base_model", "revision", "dataset_sha256", "rows", "dtype", "seed")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Perplexity of every checkpoint-* below a directory, or of one model.",
        "python perplexity/perplexity.py ./pythia-1.4b --dataset ./data/enron.jsonl",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", default=None, help="same as --dir (default: --dir)")
    parser.add_argument("--dir", default=DEFAULT_DIR, help="directory searched for checkpoint-*, at any depth")
    parser.add_argument("-d", "--dataset", default="./data/enron.jsonl", help="data file (.jsonl, .arrow, .parquet)")
    parser.add_argument("--model", default=None, help="instead of --dir: one model directory, adapter or hub name")
    parser.add_argument("--base_model", default=None, help="base of every adapter, instead of the one it names itself")
    parser.add_argument(
        "--output_dir", default=None, help="where the result files go (default: that of --dir; ./ with --model)"
    )
    parser.add_argument(
        "--num_rows",
        type=cli.positive_int,
        default=None,
        help="first N rows of the file (default: its evaluation head, at most 1110 rows)",
    )
    parser.add_argument("--token_budget", type=cli.positive_int, default=TOKEN_BUDGET, help="positions a forward pass")
    cli.add_model_flags(parser)
    return parser


# ---- pure functions: texts and arrays in, numbers out


def summarize(nll: list[float], n_tokens: list[int], n_bytes: list[int], seed: int) -> dict:
    """The figures of one model over scored documents; each is null, with its reason in `undefined`, where it has none.

    nll       NLL of each document in nats, summed over its tokens.      n_tokens, n_bytes   of each document, ≥ 1.
    mean            mean over documents of exp(NLL/T), what the `evaluate` metric calls mean_perplexity
    token_weighted  exp(ΣNLL/ΣT)        median   of the documents' perplexities
    bits_per_byte   ΣNLL/(ln 2 · Σbytes of UTF-8), comparable across tokenizers
    mean_ci, token_weighted_ci   95 % percentile bootstrap over documents, 1,000 resamples from `seed`
    """
    import numpy as np

    figures = ("mean", "token_weighted", "median", "bits_per_byte", "mean_ci", "token_weighted_ci")
    if not nll:
        return {**dict.fromkeys(figures), "undefined": dict.fromkeys(figures, "no document could be scored")}
    nll, n_tokens, n_bytes = (np.asarray(values, float) for values in (nll, n_tokens, n_bytes))
    perplexities = np.exp(nll / n_tokens)
    made = {
        "mean": float(perplexities.mean()),
        "token_weighted": float(np.exp(nll.sum() / n_tokens.sum())),
        "median": float(np.median(perplexities)),
        "bits_per_byte": float(nll.sum() / (np.log(2) * n_bytes.sum())),
        "mean_ci": None,
        "token_weighted_ci": None,
        "undefined": {},
    }
    if len(nll) < 2:
        made["undefined"] = dict.fromkeys(("mean_ci", "token_weighted_ci"), "one document has no spread")
        return made
    rng, means, weighted = np.random.default_rng(seed), [], []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(nll), size=len(nll))
        means.append(perplexities[drawn].mean())
        weighted.append(np.exp(nll[drawn].sum() / n_tokens[drawn].sum()))
    made["mean_ci"] = np.quantile(means, (0.025, 0.975), method="inverted_cdf").tolist()
    made["token_weighted_ci"] = np.quantile(weighted, (0.025, 0.975), method="inverted_cdf").tolist()
    return made


def text_line(line: dict) -> str:
    """The line of perplexity.txt for a line of perplexity.jsonl."""
    return f"model path: {line['model']}; mean perplexity: {'null' if line['mean'] is None else line['mean']}"


def same(line: dict, other: dict, but: tuple[str, ...] = ()) -> bool:
    """Do two lines of perplexity.jsonl agree in SETTINGS (leaving out `but`)?"""
    return all(line.get(key) == other.get(key) for key in SETTINGS if key not in but)


# ---- models and files


def choose_rows(args, problems: cli.Problems) -> tuple[list[int], list[str]]:
    """(indices of the rows to score, their texts); what is wrong with the file goes to `problems`."""
    rows = problems.absorb(dataset.read_rows, args.dataset)
    if rows is None:
        return [], []
    if len(rows) < SMALLEST_FILE:
        problems.add(f"{args.dataset}: {len(rows)} rows; at least {SMALLEST_FILE} are needed")
        return [], []
    if args.num_rows and args.num_rows > len(rows):
        problems.add(f"--num_rows {args.num_rows}: {args.dataset} has only {len(rows)} rows")
    manifest = problems.absorb(dataset.read_manifest, args.dataset)
    if problems.absorb(dataset.validate, args.dataset, rows) is None:
        return [], []
    chosen = list(range(args.num_rows)) if args.num_rows else dataset.split(rows, manifest).head
    if not chosen:
        problems.add(f"{args.dataset}: no row belongs to the evaluation head; pass --num_rows")
    texts = [dataset.row_text(rows[index])[0] for index in chosen if index < len(rows)]
    return chosen, texts


def find_models(args, problems: cli.Problems) -> tuple[list, dict[str, str]]:
    """([(name, ModelRef, tokenizer)], {path: why it cannot be measured}), from files only.

    A single --model that cannot be measured is a problem; so are checkpoints none of which can.
    """
    if args.model:
        paths = {args.model: args.model}
    elif not Path(args.dir).is_dir():
        problems.add(f"--dir {args.dir}: no such directory; name one with checkpoint-* below it, or pass --model")
        return [], {}
    else:
        paths = {str(path): path.relative_to(args.dir).as_posix() for path in models.find_checkpoints(args.dir)}
        if not paths:
            problems.add(f"--dir {args.dir}: no checkpoint-* directory below it; for one model pass --model")
    flag = "--model" if args.model else "--dir"
    found, unusable, reasons = [], {}, []
    files_only = bool(problems.lines)  # importing transformers takes seconds
    for path, name in paths.items():
        try:
            ref = models.find_model(path, args.revision, args.base_model, flag, files_only=files_only)
            found.append((name, ref, None if files_only else models.load_tokenizer(ref, flag)))
        except cli.UserError as error:
            unusable[path] = "; ".join(error.problems)
            reasons += error.problems
    if not found:
        problems.lines.extend(reasons)
    return found, unusable


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text after a start token (BOS, else EOS; once, where the text begins with it)."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return [ids if ids[:1] == [start] else [start, *ids] for ids in encoded]


def measure(shelf: dict, ref, ids: list[list[int]], dtype, args, world) -> tuple[list[tuple], int, float | None]:
    """(this rank's part of the log-probabilities, context length, ‖ΔW‖/‖W‖ of a merged adapter).

    `shelf` holds the last base {name: model}; another base is loaded only after it has gone.
    """
    if ref.base not in shelf:
        shelf.clear()
        gc.collect()
        shelf[ref.base] = models.load_base(ref, dtype, world.device, args.device_map)
    with models.adapted(shelf[ref.base], ref.adapter) as (model, change):
        with progress_bar(sum(len(tokens) - 1 for tokens in ids) // world.size, "tokens", world) as bar:
            part = score(model, ids, token_budget=args.token_budget, world=world, progress=bar.update)
        return part, models.context_length(model), change


def describe(texts: list[str], ids: list[list[int]], logps: list, context: int, seed: int) -> dict:
    """The figures and counts of a result line, from the log-probabilities [T] of each document's tokens."""
    import numpy as np

    nll, n_tokens, n_bytes, n_windowed, dropped = [], [], [], 0, {}
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


def write(place: results.Output, folder: Path, lines: list[dict], current: list[dict]) -> None:
    """Both result files anew: perplexity.jsonl has every line, perplexity.txt the last one of each model path, where
    those of `current` come before older ones of other settings."""
    latest = {line["model"]: line for line in [*lines, *current]}
    with place.publication() as files, files.open(folder / "perplexity.txt") as file:
        files.write_jsonl(folder / "perplexity.jsonl", lines)
        file.writelines(text_line(latest[path]) + "\n" for path in sorted(latest, key=models.natural_key))


def destination(args, problems: cli.Problems) -> Path:
    """The folder of the results; settles --dir, which may be given twice."""
    if args.directory is not None:
        if args.dir not in (DEFAULT_DIR, args.directory):
            problems.add(f"--dir {args.dir}: another directory than {args.directory}; give one")
        args.dir = args.directory
    if args.model and args.dir != DEFAULT_DIR:
        problems.add(f"--model {args.model}: cannot be combined with the directory {args.dir}; give one")
    return Path(args.output_dir or ("./" if args.model else args.dir))


def prepare(args, folder: Path, problems: cli.Problems):
    """(earlier result lines, row indices, texts, models, {path: why it cannot be measured})."""
    args.dataset = dataset.default_dataset(args.dataset)
    distributed.check_environment(problems, args.device_map)
    cli.check_writable(folder, problems, "--output_dir" if args.output_dir or args.model else "--dir")
    earlier, file = [], folder / "perplexity.jsonl"
    if file.is_file() and file.stat().st_size:
        earlier = problems.absorb(dataset.read_rows, file) or []
        if any("model" not in line or "mean" not in line for line in earlier):
            problems.add(f"{file}: not written by this script; move it away or name another --output_dir")
    chosen, texts = choose_rows(args, problems)
    found, unusable = find_models(args, problems)
    return earlier, chosen, texts, found, unusable


def run(args) -> int:
    """Measure everything asked for; 0, or 1 when a checkpoint failed. Raises UserError before any model is loaded."""
    problems = cli.Problems()
    folder = destination(args, problems)
    unknown = not (args.model or args.output_dir or folder.is_dir())  # said by `prepare`, not made here
    with results.output_folder(folder, args.dry_run or unknown, "perplexity") as place:
        prepared = prepare(args, folder, problems)
        problems.check()
        return run_locked(args, folder, place, *prepared)


def run_locked(args, folder: Path, place: results.Output, earlier, chosen, texts, found, failures) -> int:
    world = distributed.start()
    dtype = models.resolve_dtype(args.dtype, world.device)
    settings = {
        "revision": args.revision,
        "dataset": str(args.dataset),
        "dataset_sha256": results.sha256(args.dataset),
        "rows": [chosen[0], chosen[-1] + 1, len(chosen)],
        "dtype": str(dtype).removeprefix("torch."),
        "seed": args.seed,
    }
    todo, current = [], []  # (ModelRef, tokenizer, result line so far); lines of an earlier run that still hold
    for name, ref, tokenizer in found:
        weights = models.weights_sha256(ref)
        line = {"model": ref.name, "checkpoint": name, "base_model": ref.base, "model_sha256": weights, **settings}
        done = [old for old in earlier if same(old, line)]
        for old in earlier:
            if (old.get("checkpoint"), old.get("model_sha256")) == (name, weights):
                old["model"] = ref.name  # the tree may have been moved, or be named by another path
        current += done
        if not done:
            todo.append((ref, tokenizer, line))
    bases = list(dict.fromkeys(ref.base for ref, *_ in todo))
    todo.sort(key=lambda job: bases.index(job[0].base))  # each base is loaded once, for all its adapters
    counts = f"{len(current)} measured before, {len(todo)} to measure, {len(failures)} unusable"
    world.say(f"{len(texts)} documents; {counts}")
    if args.dry_run:
        for ref, *_ in todo:
            world.say(f"would measure {ref.name}" + (f" on {ref.base}" if ref.adapter else ""))
        world.say(f"would write perplexity.txt and perplexity.jsonl in {folder}")
        world.close()
        return cli.report_failures(failures, world.main)

    special = models.special_tokens_in(found[0][2], texts)
    if special and world.main:
        print(models.special_tokens_note(special), file=sys.stderr)
    lines, shelf, total = list(earlier), {}, len(found) + len(failures)
    run_file = folder / "run_perplexity.json"
    with results.Run(run_file, args, [args.dataset], world) as record:
        record["special_tokens"] = special
        scored, started = 0, time.monotonic()
        for number, (ref, tokenizer, line) in enumerate(todo, 1):
            try:
                ids = tokenize(tokenizer, texts)
                parts, contexts, changes = zip(*world.together(partial(measure, shelf, ref, ids, dtype, args, world)))
                line |= describe(texts, ids, join(ids, parts), contexts[0], args.seed)
                line |= {"relative_change": changes[0], "privacy": models.privacy(ref)}
            except cli.UserError as error:
                failures[ref.name] = "; ".join(error.problems)
                continue
            except Exception as error:  # one checkpoint's failure must not cost the others theirs; exit 1 tells of it
                traceback.print_exc()
                failures[ref.name] = f"{type(error).__name__}: {error}"
                shelf.clear()  # nobody knows what it left behind
                continue
            lines = [old for old in lines if old["model"] != ref.name or not same(old, line, but=("model_sha256",))]
            lines.append(line)
            current.append(line)
            if world.main:
                write(place, folder, lines, current)
            scored += line["n_tokens"]
            world.say(f"[{number}/{len(todo)}] {text_line(line)}".rstrip())
            if world.main:
                models.say_if_hardly_moved(ref, line["relative_change"])
        if world.main and lines:
            write(place, folder, lines, current)
        record["n_tokens"] = sum(line["n_tokens"] for line in current)
        record["tokens_per_second"] = round(scored / (time.monotonic() - started), 1)
        record["failed"] = failures
        if failures:
            record["error"] = f"{len(failures)} of {total} models failed"
    world.close()
    return cli.report_failures(failures, world.main)


def main(argv=None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
