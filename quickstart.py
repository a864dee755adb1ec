"""The study in miniature: does fine-tuning on mail make a model give away e-mail addresses of people it is asked for?

python quickstart.py
python quickstart.py --model EleutherAI/pythia-1.4b --dataset ./data/enron.jsonl --learning_rate 2e-6

On the embedded model and corpus (fictional people) it needs no network, no GPU and a few minutes: the base is
attacked, fine-tuned with LoRA on rows of other people, every epoch's checkpoint is attacked and its perplexity
measured, the last one is merged, and a table is printed. Every step is the script of that name, called with the
arguments that are printed; run it again and finished steps are kept. Also in --output: summary.md, summary.json.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import evaluate_purified
import measure_purified
import merge_peft
import run_peft
from common import cli, models, records, results
from perplexity import perplexity

EMBEDDED = Path(__file__).resolve().parent / "data" / "embedded"
TEMPERATURE = measure_purified.HEADLINE_TEMPERATURE


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Run the whole study in miniature and print its table.",
        "python quickstart.py --model EleutherAI/pythia-1.4b --dataset ./data/enron.jsonl --learning_rate 2e-6",
    )
    parser.add_argument(
        "-m", "--model", default=str(EMBEDDED / "mini-pythia"), help="base model: directory or hub name"
    )
    parser.add_argument("-d", "--dataset", default=str(EMBEDDED / "enron.jsonl"), help="rows in the Enron format")
    parser.add_argument(
        "--outsiders", help="rows of people that no training text names, a control (default: the embedded ones)"
    )
    parser.add_argument("--output", default="./quickstart-out", help="directory for everything the study writes")
    parser.add_argument("-lr", "--learning_rate", type=cli.positive_float, default=1e-3, help="for the embedded model")
    parser.add_argument("-e", "--epochs", type=cli.positive_int, default=3, help="epochs of fine-tuning")
    parser.add_argument(
        "-pdbs", "--per_device_batch_size", type=cli.positive_int, default=8, help="rows a forward pass"
    )
    parser.add_argument(
        "-gas", "--gradient_accumulation_steps", type=cli.positive_int, default=4, help="as run_peft.py's"
    )
    parser.add_argument("-mt", "--max_tokens", type=cli.positive_int, default=24, help="tokens of an answer")
    parser.add_argument(
        "--full", action="store_true", help="measure every epoch at all eight temperatures, not only greedy and 0.2"
    )
    cli.add_model_flags(parser)
    return parser


def call(script, *words) -> None:
    """Run a script's own entry point with the arguments printed; a user error or a failed step ends the study."""
    words = [str(word) for word in words]
    print(f"\n$ python {Path(script.__file__).name} {shlex.join(words)}", flush=True)
    status = script.main(words)
    if status:
        raise RuntimeError(f"{Path(script.__file__).name} ended with status {status}")


def measured(folder: Path) -> dict[float, dict]:
    """Temperature → result line of the newest measurement in `folder`."""
    files = sorted(folder.glob("results_purified*.jsonl"), key=lambda path: (len(path.name), path.name))
    files = [path for path in files if not path.stem.endswith("_rows")]
    return {line["temperature"]: line for line in results.read_jsonl(files[-1])}


def attack(args, model, folder: Path, dataset, *extra) -> None:
    """measure_purified.py, unless `folder` has its finished result already."""
    if any(folder.glob("results_purified*.jsonl")):
        print(f"\n{folder}: measured before, kept")
        return
    call(measure_purified, "--model", model, "--output_dir", folder, "-d", dataset, *extra)


def row_of(name: str, line: dict, perplexity_mean: float | None) -> dict:
    """One row of the table from a result line."""
    labels = [label for label in line["matches"] if label != "total"]
    return {
        "model": name,
        "matches": {label: line["matches"][label] for label in labels},
        "exact": {label: line["exact"][label] for label in labels},
        "no_pattern": sum(line["no_pattern"][label] or 0 for label in labels),
        "expected": {label: line["probabilistic"][label]["1"]["expected"] for label in labels},
        "exact_rate_ci95": line["ci95"]["exact"]["total"],
        "perplexity": perplexity_mean,
        "rows": line["matches"]["total"],
        "mcnemar_exact": {label: line["baseline"]["exact"][label] for label in labels} if "baseline" in line else None,
    }


def table(rows: list[dict], floor: dict) -> str:
    """The study's table in Markdown; counts by template are joined by slashes."""
    labels = list(rows[0]["exact"])
    letters = "/".join(labels)
    heads = ["", f"loose match {letters}", f"exact {letters}", "exact, share (95 %)", "no name rule", "perplexity"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        low, high = row["exact_rate_ci95"]
        share = sum(row["exact"].values()) / (len(labels) * row["rows"])
        cells = [row["model"], joined(row["matches"].values()), joined(row["exact"].values())]
        cells += [f"{share:.1%} ({low:.1%}–{high:.1%})", row["no_pattern"]]
        cells.append("" if row["perplexity"] is None else f"{row['perplexity']:.2f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if floor.get("rule"):
        guess = f"*no model: {floor['rule']} at {floor['domain_guess']}*"
        cells = [guess, floor["matches"], floor["exact"], f"{floor['exact'] / rows[0]['rows']:.1%}", 0, ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def joined(counts) -> str:
    return " / ".join(map(str, counts))


def verdict(rows: list[dict]) -> str:
    """What the paired tests say about the last checkpoint, by template, in words."""
    words = []
    for label, pair in (rows[-1]["mcnemar_exact"] or {}).items():
        words.append(f"{label}: +{pair['gained']} −{pair['lost']} (p = {pair['p']:.2g})")
    return "Exact hits gained and lost against the base, row by row, McNemar: " + "; ".join(words) + "."


def run(args) -> int:
    problems = cli.Problems()
    own = args.model == str(EMBEDDED / "mini-pythia")
    outsiders = args.outsiders or (str(EMBEDDED / "outsiders.jsonl") if own else None)
    rows = problems.absorb(records.read_rows, args.dataset)
    if rows:
        problems.absorb(records.validate, args.dataset, rows, ("gt-name", "gt-email", "prompt", "continuation"))
    if outsiders:
        problems.absorb(records.read_rows, outsiders)
    problems.absorb(models.find_model, args.model, args.revision)
    cli.check_writable(args.output, problems, "--output")
    problems.check()
    out = Path(args.output).absolute()
    if args.dry_run:
        print(f"would fine-tune {args.model} on {args.dataset} for {args.epochs} epochs and write {out}")
        return 0

    out.mkdir(parents=True, exist_ok=True)
    with results.Run(out / "run_quickstart.json", args, [args.dataset, *([outsiders] if outsiders else [])]) as record:
        model_flags = ["--seed", args.seed, "--dtype", args.dtype]
        model_flags += ["--device_map", args.device_map] if args.device_map else []
        heat = [] if args.full else ["--temperatures", "0", str(TEMPERATURE)]
        asked = ["-mt", args.max_tokens, *heat, *model_flags]

        attack(args, args.model, out / "base", args.dataset, *asked)
        call(
            run_peft, "-m", args.model, "-i", args.dataset, "--output_root", out, "-lr", args.learning_rate,
            "-e", args.epochs, "-pdbs", args.per_device_batch_size, "-gas", args.gradient_accumulation_steps,
            "-l", 10, *model_flags,
        )  # fmt: skip
        tree = run_folder(out)
        base_results = sorted((out / "base").glob("results_purified*.jsonl"))[0]
        call(evaluate_purified, "--model", tree, "-d", args.dataset, "--baseline", base_results, *asked)
        call(perplexity, "--model", args.model, "-d", args.dataset, "--output_dir", out / "base", *model_flags)
        call(perplexity, "--dir", tree, "-d", args.dataset, *model_flags)
        checkpoints = models.find_checkpoints(tree)
        call(merge_peft, "--model", checkpoints[-1], "--save_dir", out / "merged")
        if outsiders:
            few = [*asked, "--num_rows", len(records.read_rows(outsiders)) - 10]
            attack(args, args.model, out / "outsiders-base", outsiders, *few)
            attack(args, checkpoints[-1], out / "outsiders-tuned", outsiders, *few)

        means = {line["model"]: line["mean"] for line in results.read_jsonl(tree / "perplexity.jsonl")}
        base_line = measured(out / "base")[TEMPERATURE]
        base_mean = results.read_jsonl(out / "base" / "perplexity.jsonl")[-1]["mean"]
        summary = [row_of("base", base_line, base_mean)]
        for epoch, checkpoint in enumerate(checkpoints, 1):
            line = measured(checkpoint)[TEMPERATURE]
            summary.append(row_of(f"epoch {epoch}", line, means.get(str(checkpoint))))
        text = [
            f"Addresses given away at temperature {TEMPERATURE}, of {summary[0]['rows']} people asked by four prompts "
            "(A–D): loose matches, exact addresses, and exact ones that no name rule makes.",
            "",
            table(summary, base_line["floor"]),
            "",
            verdict(summary),
        ]
        control = []
        if outsiders:
            for name in ("base", "tuned"):
                line = measured(out / f"outsiders-{name}")[TEMPERATURE]
                control.append(row_of(f"{name}, outsiders", line, None))
            floor = measured(out / "outsiders-base")[TEMPERATURE]["floor"]
            text += ["", "The control: people whom no training text names.", "", table(control, floor)]
        results.write_json(
            out / "summary.json",
            {"temperature": TEMPERATURE, "rows": summary, "floor": base_line["floor"], "outsiders": control},
        )
        with results.atomic(out / "summary.md") as file:
            file.write("\n".join(text) + "\n")
        print("\n" + "\n".join(text))
        record["tree"] = str(tree)
    print(f"\n{record['seconds']:.0f} s; everything is in {out}")
    return 0


def run_folder(out: Path) -> Path:
    """The one training run below `out` (the directory that holds its checkpoints)."""
    return models.find_checkpoints(out)[-1].parent


def main(argv=None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
