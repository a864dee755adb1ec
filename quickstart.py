"""The study in miniature: does fine-tuning on mail make a model give away e-mail addresses of people it is asked for?

python quickstart.py
python quickstart.py --full                                   # every epoch of every arm, all eight temperatures
python quickstart.py --study privacy                          # what differential privacy changes, and costs
python quickstart.py --study reviews                          # synthetic reviews: privacy, fidelity, utility
python quickstart.py --model EleutherAI/pythia-1.4b --generator EleutherAI/pythia-12b --dataset ./data/enron.jsonl \\
    --learning_rate 2e-6 --generated_tokens 1000

On the embedded model and corpus (fictional people) it needs no network, no GPU and a few minutes. Study mail: the base
is attacked; it is fine-tuned with LoRA on rows of other people (original), on what a larger sibling wrote in their
place (generated), and on the same rows with everybody replaced by invented people (replaced); every arm is attacked,
its perplexity and membership inference measured, and a table printed. Every step is the script of that name, called
with the arguments that are printed; run it again with the same settings and finished steps are kept. In --output:
summary.md, summary.json, report/report.html.
"""

import sys
import time
from pathlib import Path

import plot_results
from common import cli, results
from studies import mail, privacy, reviews
from studies.steps import EMBEDDED, call

STUDIES = {"mail": mail, "privacy": privacy, "reviews": reviews}
MAY_DIFFER = {"output", "arms", "full", "dry_run"}  # when a study is continued


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Run a whole study in miniature and print its table.",
        "python quickstart.py --model EleutherAI/pythia-1.4b --dataset ./data/enron.jsonl --learning_rate 2e-6",
    )
    add = parser.add_argument
    add("--study", choices=sorted(STUDIES), default="mail", help="System P; DP-SGD's price; System S")
    add("-m", "--model", default=str(EMBEDDED / "mini-pythia"), help="base model: directory or hub name")
    add("-d", "--dataset", default=str(EMBEDDED / "enron.jsonl"), help="rows in the Enron format")
    add("--outsiders", help="rows of people that no training text names, a control (default: the embedded ones)")
    add("--generator", help="model that writes the generated arm (default: mini-pythia-xl for mini-pythia, else none)")
    add("--generated_tokens", type=cli.positive_int, default=120, help="tokens of a generated continuation")
    add("--arms", nargs="+", choices=mail.ARMS, help="training sets (default: all; generated only with a generator)")
    add("--output", default="./quickstart-out", help="directory for everything the study writes")
    add("-lr", "--learning_rate", type=cli.positive_float, help="of fine-tuning (default: 1e-3; study reviews 3e-3)")
    add("-e", "--epochs", type=cli.positive_int, help="epochs (default: 2; studies privacy 10, reviews 5)")
    add("-pdbs", "--per_device_batch_size", type=cli.positive_int, default=8, help="rows a forward pass")
    add("-gas", "--gradient_accumulation_steps", type=cli.positive_int, default=4, help="as run_peft.py's")
    add("--lora_r", type=cli.positive_int, help="rank (default: 64; embedded model 16; studies privacy, reviews 8)")
    add("-mt", "--max_tokens", type=cli.positive_int, default=24, help="tokens of an answer")
    add("--full", action="store_true", help="attack every epoch of every arm, at all eight temperatures")
    cli.add_model_flags(parser)
    return parser


def check_same(out: Path, args) -> None:
    """UserError when `out` holds a study of other settings or input files, whose results this one would keep."""
    file, remedy = out / "run_quickstart.json", "name another place"
    if not file.exists():
        return
    try:
        record = results.read_json(file, remedy)
        earlier, inputs = dict(record["args"]), {one["path"]: one["sha256"] for one in record["inputs"]}
    except (cli.UserError, OSError, KeyError, TypeError, ValueError):
        raise cli.UserError(f"--output {out}: its run_quickstart.json cannot be read; {remedy}") from None
    now = {key: value for key, value in cli.plain(vars(args)).items() if key not in MAY_DIFFER}
    other = [f"--{key} {earlier.get(key)} then, {value} now" for key, value in now.items() if earlier.get(key) != value]
    files = [str(path) for path in STUDIES[args.study].inputs(args) if Path(path).is_file()]
    other += [f"{path} has changed since" for path in files if path in inputs and inputs[path] != results.sha256(path)]
    if other:
        raise cli.UserError(f"--output {out}: holds a study of other settings ({'; '.join(other)}); {remedy}")


def run(args) -> int:
    own = args.model == str(EMBEDDED / "mini-pythia")
    study = STUDIES[args.study]
    if own:
        args.outsiders = args.outsiders or str(EMBEDDED / "outsiders.jsonl")
        args.generator = args.generator or str(EMBEDDED / "mini-pythia-xl")
    args.epochs = args.epochs or study.EPOCHS
    args.learning_rate = args.learning_rate or study.RATE
    args.lora_r = args.lora_r or (study.RANK if own or args.study != "mail" else 64)
    args.arms = args.arms or [arm for arm in mail.ARMS if arm != "generated" or args.generator]
    problems = cli.Problems()
    if args.study == "mail" and "generated" in args.arms and not args.generator:
        problems.add("--arms generated: give --generator, the model that writes it")
    cli.check_writable(args.output, problems, "--output")
    problems.absorb(study.check, args)
    out = Path(args.output).absolute()
    with results.output_folder(out, args.dry_run) as place:
        problems.absorb(check_same, out, args)
        problems.check()
        if args.dry_run:
            words = f"{args.model} on {args.dataset}, {args.epochs} epochs"
            print(f"study {args.study}: would fine-tune {words}, write {out}")
            return 0
        return run_locked(args, study, out, place)


def run_locked(args, study, out: Path, place: results.Output) -> int:
    started = time.monotonic()
    with results.Run(out / "run_quickstart.json", args, study.inputs(args), output=place) as record:
        text = study.run(args, out, record)
        with record.files.open(out / "summary.md") as file:
            file.write(text + "\n")
    call(plot_results, out, "--output", out / "report", *([] if args.full else ["--no_figures"]))
    print("\n" + text)
    print(f"\n{time.monotonic() - started:.0f} s; everything is in {out}, to look at: {out / 'report' / 'report.html'}")
    return 0


def main(argv=None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
