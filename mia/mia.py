#!/usr/bin/env python3
"""Membership inference: which texts was a model trained on? Every known attack from one pass, with its controls.

python mia/mia.py --model ./pythia-1.4b/run/checkpoint-276 --members data/enron.jsonl --output_dir ./results
python mia/mia.py --dir ./pythia-1.4b --members data/enron.jsonl               # every checkpoint-* below, each in place
python mia/mia.py --model ./model --ref_model ./base --members a.jsonl --nonmembers b.jsonl --combine
torchrun --nproc_per_node=4 mia/mia.py --config mia.json                       # the same keys, as JSON

Leaves results_mia.jsonl (a line an attack), scores_mia.jsonl (a line a text, members first; the text only as a hash),
roc_mia.png and run_mia.json, which has the set-level test. Every score: higher = more likely a member.
Controls always run: baselines that never see the model, the same attacks on the base model, texts that stand nearly
alike in both sets. A set that fails one is flagged in every line, in the table and in the figure.
Where run_peft.py's run.json stands beside a checkpoint, only rows that it was trained on are members (with --dir: that
all were) and rows that it was trained on are no non-members; `members_trained` is false for a run on another file than
--members, null where no run.json tells.
"""

import argparse
import gc
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # else `mia` would be this file, not its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, dataset, distributed, models, results
from common import trained as trained_rows
from mia.dataset import SHOTS, Study, choose_shots, read_sets, read_texts, sample, without

CORE = ("loss", "zlib", "lowercase", "ref", "min_k", "min_k_pp", "surp", "ez", "wbc")
FAMILIES = ("loss", "zlib", "lowercase", "ref", "min_k", "min_k_pp", "surp", "recall", "con_recall", "dc_pdd",
            "neighborhood", "grad_norm", "ez", "wbc")  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Membership inference on a model, an adapter, or every checkpoint-* below a directory.",
        "python mia/mia.py --model ./pythia-1.4b/run/checkpoint-276 --members data/enron.jsonl --output_dir ./results",
    )
    add = parser.add_argument
    add("--model", default=None, help="model directory, adapter directory or hub name")
    add("--dir", default=None, help="instead of --model: every checkpoint-* below this directory")
    add("--base_model", default=None, help="base of every adapter, instead of the one it names itself")
    add("--members", default="./data/enron.jsonl", help="texts trained on (.jsonl, .arrow, .parquet)")
    add(
        "--nonmembers",
        default=None,
        help="texts not trained on (default: the held-out head of --members, whose other rows are then the members)",
    )
    add(
        "--text_field", default=None, help="field that holds the text (default: as trained, e.g. prompt + continuation)"
    )
    add(
        "--attacks",
        nargs="+",
        default=None,
        metavar="ATTACK",
        help=f"of {' '.join(FAMILIES)}, one size as min_k_20, core, or all (default: core = {' '.join(CORE)}; recall "
        "and con_recall with --prefix_file, dc_pdd with --freq_corpus, neighborhood with --neighbor_model)",
    )
    add("--ref_model", default=None, help="reference model (default: of an adapter its base, the adapter switched off)")
    add(
        "--prefix_file",
        default=None,
        help=f'the {SHOTS} shots of recall: non-members, and members where "label" is 1 (default: rows of the two '
        "sets, which are then not scored)",
    )
    add("--neighbor_model", default=None, help="directory of a masked LM (default: proposals of the target itself)")
    add(
        "--freq_corpus",
        default=None,
        help="data file of dc_pdd's token frequencies; rows like scored ones are left out",
    )
    add("--max_length", type=cli.positive_int, default=512, help="tokens of a text; the rest is cut off")
    add("--max_samples", type=cli.positive_int, default=None, help="texts of each set, drawn by --seed (default: all)")
    add("--token_budget", type=cli.positive_int, default=4096, help="positions a forward pass")
    add("--bootstrap", type=cli.positive_int, default=1000, help="resamples of the intervals")
    add("--combine", action="store_true", help="also a cross-fitted logistic regression over all scores")
    add(
        "--output_dir",
        default=None,
        help="where the result files go (default: each checkpoint's own directory; ./ with --model)",
    )
    cli.add_model_flags(parser)
    return parser


def choose_attacks(args, problems: cli.Problems) -> list[str]:
    """The attacks asked for, in the order of FAMILIES."""
    from mia.attacks import PERCENTS

    asked = args.attacks
    if asked is None:
        extra = [("--prefix_file", ("recall", "con_recall")), ("--freq_corpus", ("dc_pdd",)),
                 ("--neighbor_model", ("neighborhood",))]  # fmt: skip
        asked = ["core", *(name for flag, names in extra if getattr(args, flag[2:]) for name in names)]
    sizes = {f"{family}_{k}": family for family in ("min_k", "min_k_pp") for k in PERCENTS}
    for name in asked:
        if name not in (*FAMILIES, *sizes, "core", "all"):
            problems.add(
                f"--attacks {name}: unknown; known are {' '.join(FAMILIES)}, min_k_10 … min_k_pp_100, core, all"
            )
    wanted = set(asked) | (set(CORE) if "core" in asked else set()) | (set(FAMILIES) if "all" in asked else set())
    if "dc_pdd" in wanted and not args.freq_corpus:
        problems.add("--attacks dc_pdd: needs --freq_corpus, a data file whose rows are in neither set")
    order = [name for family in FAMILIES for name in (family, *(size for size in sizes if sizes[size] == family))]
    return [name for name in order if name in wanted]


def prepare(args, problems: cli.Problems) -> Study | None:
    """Read and check every file that the attacks need, before any model; None when something is wrong."""
    before = len(problems.lines)
    args.members = str(dataset.default_dataset(args.members))
    attacks = choose_attacks(args, problems)
    members, nonmembers, trained, not_trained = read_sets(args, problems)
    shots, member_shots = choose_shots(args, attacks, members, nonmembers, problems)
    corpus = None
    if args.freq_corpus:
        _, corpus, _ = read_texts(args.freq_corpus, args.text_field, problems, "--freq_corpus")
    if args.neighbor_model:
        problems.absorb(check_masked, args.neighbor_model, bool(problems.lines))
    for name, items in (("members", members), ("non-members", nonmembers)):
        if len(items) < 2 and len(problems.lines) == before:
            problems.add(f"{len(items)} {name}: at least 2 are needed")
    if len(problems.lines) > before:
        return None

    counts = {"members_in_files": len(members), "nonmembers_in_files": len(nonmembers)}
    both = [*shots, *member_shots]
    members, nonmembers = without(members, both), without(nonmembers, both)
    counts["prefix_rows_excluded"] = sum(counts.values()) - len(members) - len(nonmembers)
    counts["members_not_trained"] = not_trained
    members, nonmembers = (sample(items, args.max_samples, args.seed) for items in (members, nonmembers))
    if min(len(members), len(nonmembers)) < 2:
        problems.add(f"{len(members)} members and {len(nonmembers)} non-members are left beside the shots: too few")
        return None
    texts = [text for _, text in [*members, *nonmembers]]
    if corpus is not None:
        clean = without(list(enumerate(corpus)), texts)
        counts["freq_corpus_rows_excluded"] = len(corpus) - len(clean)
        corpus = [text for _, text in clean]
        if not corpus:
            problems.add(f"--freq_corpus {args.freq_corpus}: every row stands in one of the sets; name another file")
            return None
    from mia import baselines

    pairs = baselines.near_duplicates(texts[: len(members)], texts[len(members) :])
    inputs = [args.members, args.nonmembers, args.prefix_file, args.freq_corpus]
    return Study(
        texts=texts,
        ids=[key for key, _ in [*members, *nonmembers]],
        labels=[1] * len(members) + [0] * len(nonmembers),
        attacks=attacks,
        shots=shots,
        member_shots=member_shots,
        corpus=corpus,
        inputs=[str(path) for path in dict.fromkeys(inputs) if path],
        counts=counts,
        trained=trained,
        duplicates=[(member, len(members) + other) for member, other in pairs],
    )


def check_masked(folder, files_only: bool) -> None:
    """UserError unless `folder` is the directory of a masked LM with a fast tokenizer.

    files_only: only whether it is there, without transformers.
    """
    if not (Path(folder) / "config.json").is_file():
        raise cli.UserError(f"--neighbor_model {folder}: no directory with a config.json; name a local masked LM")
    if files_only:
        return
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise cli.UserError(f"--neighbor_model {folder}: not a usable model directory ({reason})") from None
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise cli.UserError(f"--neighbor_model {folder}: not a masked language model")
    if not tokenizer.is_fast or tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise cli.UserError(f"--neighbor_model {folder}: needs a fast tokenizer with a mask and a pad token")


def members_seen(ref, study: Study) -> dict[str, int] | None:
    """{'whole', 'partly', 'never'}: how many members the training took the loss on, all their characters but those of
    the first token, some, or none; None where no trained_rows.jsonl tells."""
    folder = Path(ref.adapter or ref.base).expanduser()
    taken = trained_rows.read(folder) if folder.is_dir() else None
    if taken is None:
        return None
    counts = dict.fromkeys(("whole", "partly", "never"), 0)
    for text, label in zip(study.texts, study.labels):
        if label:
            rows = [row for row in taken.find(text) if row.loss_tokens]
            whole = any(not row.cut and row.loss_tokens >= row.tokens - 1 for row in rows)
            counts["whole" if whole else "partly" if rows else "never"] += 1
    return counts


def measure(ref, study: Study, args, world, folder, passes, name: str) -> list[dict]:
    """Attack one model and write its four files into `folder`; the result lines on rank 0, [] elsewhere.

    passes: a mia.passes.Passes, whose shelf may hold the unadapted base already; it is left bit for bit as it was.
    """
    folder = Path(folder)
    from mia.report import AGAINST_BASE, draw_roc, report, table
    from mia.signals import count_tokens, gather, score_texts

    with (
        results.output_folder(folder, key="mia") as place,
        results.Run(folder / "run_mia.json", args, study.inputs, world, place) as record,
    ):
        tokenizer = models.load_tokenizer(ref)
        record["special_tokens"] = special = models.special_tokens_in(tokenizer, study.texts)
        if special and world.main:
            print(models.special_tokens_note(special), file=sys.stderr)
        before = passes.scored
        evidence = gather(passes, ref, tokenizer, study, args, gradients=True)
        alone = replace(study, attacks=[attack for attack in study.attacks if attack not in AGAINST_BASE])
        base = reference = other = None
        if ref.adapter:
            other = models.ModelRef(ref.base, ref.base, None, ref.revision)
            base = reference = gather(passes, other, tokenizer, alone, args, gradients=False)
        if args.ref_model:
            other, against = models.find_model(args.ref_model, None, None, "--ref_model"), list(AGAINST_BASE)
            its_own = models.load_tokenizer(other, "--ref_model")
            about = replace(study, attacks=against)
            reference = gather(passes, other, its_own, about, args, gradients=False, target=evidence.encoded)
        passes.close()
        trained = study.trained.get(Path(ref.adapter or ref.base).expanduser().resolve())
        if trained is False and world.main:
            print(f"{ref.name}: was trained on another file than --members {args.members}", file=sys.stderr)
        seen = members_seen(ref, study)
        if seen and seen["partly"] + seen["never"] and world.main:
            print(
                f"{ref.name}: of {sum(seen.values())} members, {seen['partly']} were trained on in part and "
                f"{seen['never']} never (cut off, masked, or left out)", file=sys.stderr,
            )  # fmt: skip
        info = {
            "model": ref.name,
            "base_model": ref.base if ref.adapter else None,
            "reference": other.name if other else None,
            "model_sha256": models.weights_sha256(ref) if world.main else None,
            "members": args.members,
            "members_trained": trained,
            "members_seen": seen,
            "nonmembers": args.nonmembers,
            "max_length": args.max_length,
            "dtype": str(passes.dtype).removeprefix("torch."),
            "bootstrap": args.bootstrap,
            "seed": args.seed,
        }
        record["members_trained"] = trained
        record["passes"] = {"texts_scored": passes.scored - before}

        def finish():
            if not world.main:
                return []
            frequencies = count_tokens(tokenizer, study.corpus) if study.corpus else None
            found, reasons = score_texts(study, args, evidence, reference, frequencies)
            base_scores, base_reasons = {}, {}
            if base:
                base_scores, base_reasons = score_texts(alone, args, base, None, frequencies)
            lines, rows, kept = report(study, args, info, found, reasons, evidence, base_scores, base_reasons)
            for key, value in kept.items():
                record[key] = value
            record.files.write_jsonl(folder / "scores_mia.jsonl", rows)
            flags = sorted({flag for line in lines for flag in line["flags"] if not flag.startswith("coarse")})
            with record.files.open(folder / "roc_mia.png", "wb") as file:
                draw_roc(found, study, flags, name).savefig(file, format="png", dpi=120)
            record.files.write_jsonl(folder / "results_mia.jsonl", lines)
            world.say(f"{name}\n{table(lines)}")
            models.say_if_hardly_moved(ref)
            p = {who: made["p"] for who, made in kept["dataset_inference"].items() if made and made["p"] is not None}
            world.say("dataset inference: " + ", ".join(f"{who} p = {value:.2g}" for who, value in p.items()))
            return lines

        return world.together(finish)[world.rank]


def find_targets(args, problems: cli.Problems) -> tuple[list[tuple], dict[str, str]]:
    """([(name, ModelRef, folder of its results)], {path: why it cannot be measured}), from files only."""
    if bool(args.model) == bool(args.dir):
        problems.add("--model or --dir: give one of them")
        return [], {}
    if args.model:
        folder = Path(args.output_dir or "./")
        ref, _ = models.look_up(problems, args.model, args.revision, args.base_model)
        file = folder / "results_mia.jsonl"
        if ref and file.is_file():
            earlier = problems.absorb(dataset.read_rows, file) or []
            if any(line.get("model") != ref.name for line in earlier):
                problems.add(f"{file}: holds the results of another model; name another --output_dir")
            elif earlier:
                now = {key: getattr(args, key) for key in ("members", "nonmembers", "max_length", "seed")}
                other = [f"--{key} {earlier[0].get(key)}" for key, value in now.items() if earlier[0].get(key) != value]
                if other and int(os.environ.get("RANK", 0)) == 0:
                    print(f"{file}: was made with {', '.join(other)}; it will be replaced", file=sys.stderr)
        return [(args.model, ref, folder)] if ref else [], {}
    if not Path(args.dir).is_dir():
        problems.add(f"--dir {args.dir}: no such directory; name one with checkpoint-* below it")
        return [], {}
    targets, unusable, reasons = [], {}, []
    files_only = bool(problems.lines)
    for path in models.find_checkpoints(args.dir):
        inside = path.relative_to(args.dir)
        try:
            ref = models.find_model(str(path), args.revision, args.base_model, "--dir", files_only=files_only)
            if not files_only:
                models.load_tokenizer(ref, "--dir")
            targets.append((inside.as_posix(), ref, Path(args.output_dir) / inside if args.output_dir else path))
        except cli.UserError as error:
            unusable[str(path)] = "; ".join(error.problems)
            reasons += error.problems
    if not targets:
        problems.lines.extend(reasons or [f"--dir {args.dir}: no checkpoint-* directory below it"])
    return targets, unusable


def cache_folder(root) -> Path:
    return Path(root) / "mia_cache"


def run(args) -> int:
    """Attack everything asked for; 0, or 1 when a checkpoint failed. Raises UserError before any model is loaded."""
    problems = cli.Problems()
    distributed.check_environment(problems, args.device_map)
    root = args.output_dir or args.dir or "./"
    cli.check_writable(root, problems, "--output_dir" if args.output_dir or args.model else "--dir")
    study = prepare(args, problems)
    if args.ref_model:
        models.look_up(problems, args.ref_model, flag="--ref_model")
    targets, failures = find_targets(args, problems)
    problems.check()

    members = sum(study.labels)
    summary = f"{members} members, {len(study.labels) - members} non-members; attacks {' '.join(study.attacks)}"
    if args.dry_run:
        print(summary)
        for _, ref, folder in targets:
            print(f"would attack {ref.name}" + (f" on {ref.base}" if ref.adapter else "") + f", results in {folder}")
        return cli.report_failures(failures, True)

    world = distributed.start()
    world.say(summary)
    folders = {folder: ref for _, ref, folder in targets}
    failures |= measure_all(
        folders, study, args, world, cache_folder(root), {ref.name: name for name, ref, _ in targets}
    )
    world.close()
    return cli.report_failures(failures, world.main)


def measure_all(refs: dict, study: Study, args, world, cache, names: dict | None = None) -> dict[str, str]:
    """Attack every {folder of its results: ModelRef}; {model: why it failed}. A single --model's failure is raised."""
    from mia.forward import Cache, Passes

    failures, dtype = {}, models.resolve_dtype(args.dtype, world.device)
    for group in Path(cache).glob("*/"):
        results.remove_leftovers(group)
    results.tidy(refs, "mia")
    passes = Passes(Cache(cache), world, dtype, args.token_budget, args.device_map)
    for folder, ref in sorted(refs.items(), key=lambda item: item[1].base):  # each base is loaded once for its adapters
        try:
            measure(ref, study, args, world, folder, passes, (names or {}).get(ref.name, ref.name))
        except cli.UserError as error:
            if args.model:
                raise
            failures[ref.name] = "; ".join(error.problems)
        except Exception as error:  # one checkpoint's failure must not cost the others theirs; exit 1 tells of it
            if args.model:
                raise
            traceback.print_exc()
            failures[ref.name] = f"{type(error).__name__}: {error}"
            passes.shelf.clear()  # nobody knows what it left behind
            gc.collect()
        passes.close()
    return failures


def main(argv=None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
