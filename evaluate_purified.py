"""Merge → measure over a tree of checkpoints: the extraction attack on every checkpoint-* below a directory.

python evaluate_purified.py --model ./pythia-1.4b --dataset ./data/enron.jsonl
python evaluate_purified.py --model ./pythia-1.4b --mia                     # membership inference on each as well
python evaluate_purified.py --model ./opt-1.3b --is_opt --save_merged --temp ./tempMerged
torchrun --nproc_per_node=4 evaluate_purified.py --model ./pythia-1.4b

Each base model is loaded once; adapters are merged into it in memory and taken out again bit for bit. Results stand in
each checkpoint's own directory (see measure_purified.py). Checkpoints measured completely with the same settings are
skipped, partly measured ones are continued; run it again after any interruption. At the end a table a checkpoint: the
newest measurement of each temperature, whenever it was made.
"""

import sys
import traceback
from pathlib import Path

import measure_purified
from common import cli, dataset, distributed, models, results
from mia import mia


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Run the extraction attack on every checkpoint-* below a directory.",
        "python evaluate_purified.py --model ./pythia-1.4b --dataset ./data/enron.jsonl",
    )
    parser.add_argument("-m", "--model", default="./pythia-1.4b", help="directory searched for checkpoint-*")
    parser.add_argument("-t", "--temp", default="./tempMerged", help="where --save_merged writes merged models")
    parser.add_argument("--is_opt", action="store_true", help="guess a missing base model's name as facebook/opt-*")
    parser.add_argument("--base_model", help="base of every adapter, instead of the one its configuration names")
    parser.add_argument("--save_merged", action="store_true", help="also write each merged model below --temp")
    parser.add_argument(
        "--mia",
        action="store_true",
        help="also mia/mia.py's core attacks: the training rows of --dataset against its held-out head",
    )
    measure_purified.add_measure_flags(parser)
    cli.add_model_flags(parser)
    return parser


def run(args) -> int:
    problems = cli.Problems()
    args.dataset = dataset.default_dataset(args.dataset)
    distributed.check_environment(problems, args.device_map)
    checkpoints = []
    if not Path(args.model).is_dir():
        problems.add(f"--model {args.model}: no such directory")
    else:
        checkpoints = models.find_checkpoints(args.model)
        if not checkpoints:
            problems.add(f"--model {args.model}: no checkpoint-* directory below it")
        cli.check_writable(args.model, problems, "--model")
    if args.save_merged:
        cli.check_writable(args.temp, problems, "--temp")
        if args.dtype not in ("auto", "float32"):
            problems.add("--save_merged: merging needs --dtype float32; half precision rounds a small update away")
        elif args.dtype == "auto":
            args.dtype = "float32"
    study, sets, membership = measure_purified.prepare(args, problems), None, None
    if args.mia:
        words = ["--dir", args.model, "--members", args.dataset, "--seed", args.seed, "--dtype", args.dtype]
        membership = mia.make_parser().parse_args([str(word) for word in words])
        sets = mia.prepare(membership, problems)
    problems.check()
    with results.output_folder(args.model, args.dry_run, measure_purified.KEY) as place:
        return evaluate(args, study, checkpoints, sets, membership, place)


def merged_folder(args, checkpoint: Path) -> Path:
    return Path(args.temp) / checkpoint.relative_to(Path(args.model).parent)


def evaluate(args, study, checkpoints: list[Path], sets, membership, place) -> int:
    import torch

    if not args.dry_run:
        results.tidy(checkpoints, measure_purified.KEY)
        for folder in {merged_folder(args, one).parent for one in checkpoints} if args.save_merged else ():
            results.remove_leftovers(folder)
    dtype = str(models.resolve_dtype(args.dtype, "cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype.removeprefix("torch.")
    failures: dict[str, str] = {}
    refs: dict = {}  # checkpoint → ModelRef
    todo: list[tuple] = []  # (base, checkpoint, ref, partial file, temperatures that are missing)
    skipped = 0
    for checkpoint in checkpoints:
        try:
            ref = models.find_model(str(checkpoint), args.revision, args.base_model, is_opt=args.is_opt)
            key = measure_purified.model_key(ref) | {"dtype": dtype}
            found = measure_purified.find_results(checkpoint, study, key, args.save_responses)
            refs[checkpoint] = ref
        except cli.UserError as error:
            failures[str(checkpoint)] = "; ".join(error.problems)
            continue
        done = {line["temperature"] for line in measure_purified.newest(found)}
        missing = [temperature for temperature in args.temperatures if temperature not in done]
        if missing:
            todo.append((ref.base, checkpoint, ref, found[-1][0] if found else None, missing))
        else:
            skipped += 1
    if args.dry_run:
        print(f"{len(checkpoints)} checkpoints: {skipped} complete, {len(todo)} to measure, {len(failures)} unusable")
        for _, checkpoint, ref, path, missing in todo:
            print(f"  {checkpoint} on {ref.base}: temperatures {missing}{f', continuing {path.name}' if path else ''}")
        return cli.report_failures(failures, True)

    world = distributed.start()
    dtype = models.resolve_dtype(args.dtype, world.device)
    world.say(f"{len(checkpoints)} checkpoints: {skipped} complete, {len(todo)} to measure, {len(failures)} unusable")
    run_file = Path(args.model) / "run_evaluate_purified.json"
    with results.Run(run_file, args, study.inputs, world, place) as record:
        base = loaded = tokenizer = None
        for number, (name, checkpoint, ref, path, missing) in enumerate(sorted(todo, key=lambda job: job[0]), 1):
            world.say(f"[{number}/{len(todo)}] {checkpoint}")
            try:
                if name != loaded:
                    base = loaded = None  # free the last base before the next is loaded
                    base = models.load_base(ref, dtype, world.device, args.device_map)
                    loaded = name
                tokenizer = models.load_tokenizer(ref)
                with models.adapted(base, ref.adapter) as (model, change):
                    info = measure_purified.describe(ref, dtype, change)
                    args.output_dir = checkpoint
                    if args.save_merged and ref.adapter and world.main:
                        _save(model, tokenizer, merged_folder(args, checkpoint))
                    measure_purified.measure_model(model, tokenizer, study, args, info, world, path, missing)
            except cli.UserError as error:
                failures[str(checkpoint)] = "; ".join(error.problems)
            except Exception as error:  # one checkpoint's failure must not cost the others theirs; exit 1 tells of it
                traceback.print_exc()
                failures[str(checkpoint)] = f"{type(error).__name__}: {error}"
                loaded = None  # nobody knows what it left behind: the next checkpoint gets a fresh base
        for checkpoint, ref in refs.items() if world.main else ():
            key = measure_purified.model_key(ref) | {"dtype": str(dtype).removeprefix("torch.")}
            lines = measure_purified.newest(measure_purified.find_results(checkpoint, study, key))
            if lines:
                print(f"\n{checkpoint}")
                measure_purified.print_table(lines, study)
                models.say_if_hardly_moved(ref, lines[-1]["relative_change"])
        if args.mia:
            base = None
            usable = {checkpoint: ref for checkpoint, ref in refs.items() if str(checkpoint) not in failures}
            failures |= mia.measure_all(usable, sets, membership, world, mia.cache_folder(args.model))
        record["checkpoints"] = {
            "found": len(checkpoints),
            "measured": len(checkpoints) - len(failures),
            "failed": failures,
        }
        if failures:
            record["error"] = f"{len(failures)} of {len(checkpoints)} checkpoints failed"
    world.close()
    return cli.report_failures(failures, world.main)


def _save(model, tokenizer, folder: Path) -> None:
    with results.atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def main(argv=None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
