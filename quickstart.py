"""The study in miniature: does fine-tuning on mail make a model leak the e-mail addresses of people it is asked about?

python quickstart.py
python quickstart.py --full                                   # every epoch of every arm, all eight temperatures
python quickstart.py --arms original generated self_instruct prompt_only --pretraining_membership --seeds 5
python quickstart.py --study privacy                          # effect and cost of differential privacy
python quickstart.py --study reviews                          # synthetic reviews: privacy, fidelity, utility
python quickstart.py --model EleutherAI/pythia-1.4b --generator EleutherAI/pythia-12b --dataset ./data/enron.jsonl \\
    --learning_rate 2e-6 --generated_tokens 1000

With the embedded model and corpus (fictional people) it takes a few minutes and needs neither network nor GPU. Study
mail: the base is attacked, then fine-tuned with LoRA on other people's rows (original), on text that a larger sibling
wrote in their place (generated), and on the same rows with everybody replaced by invented people (replaced). Every arm
is attacked, its perplexity and membership inference are measured, and a table is printed. Further --arms: rows that the
generator wrote by self-instruct (self_instruct), the original's prompts alone (prompt_only), and text of a generator
that never saw the evaluated people (generated_unseen). --pretraining_membership: can texts of the base's pre-training
corpus be recognised, and more easily after fine-tuning? --seeds N repeats generation, training and attacks.

Each step does what the command line that is printed would do. Rerunning with the same settings keeps finished steps. In
--output: summary.md, summary.json, report/report.html; with --seeds also the folder seed_N of each run.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import plot_results
from common import cli, json_files, locks, results, strict_json
from common.problems import Problems, UserError, check_writable
from common.process import entry
from studies import arms, mail, privacy, reviews, seeds
from studies.config import EMBEDDED, QuickstartConfig, StudyConfig
from studies.steps import Study, call

STUDIES: dict[str, Study] = {"mail": mail, "privacy": privacy, "reviews": reviews}
MAY_DIFFER = {
    "output",
    "arms",
    "full",
    "dry_run",
    "seeds",
    "pretraining_membership",
}  # flags that may change when a study is resumed


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Run a small-scale version of a whole study and print its table.",
        "python quickstart.py --model EleutherAI/pythia-1.4b --dataset ./data/enron.jsonl --learning_rate 2e-6",
        QuickstartConfig,
    )
    add = parser.add_argument
    add("--study", choices=sorted(STUDIES), help="System P (mail), the cost of DP-SGD (privacy), System S (reviews)")
    add("-m", "--model", help="base model: directory or hub name")
    add("-d", "--dataset", "--data", help="rows in the Enron format")
    add("--outsiders", help="control: rows of people named in no training text (default: the embedded ones)")
    add("--generator", help="model that writes the generated arm (default: mini-pythia-xl for mini-pythia, else none)")
    add("--generated_tokens", type=cli.positive_int, help="tokens per generated continuation")
    add(
        "--arms",
        nargs="+",
        choices=arms.ARMS,
        help="training sets (default: the first three; generated only with a generator)",
    )
    add("--unseen_generator", help="model that never saw the evaluated people and writes the arm generated_unseen")
    add(
        "--seed_tasks",
        help="of the arm self_instruct (default: data/seedTasks.json; embedded model: tasks on its mail)",
    )
    add(
        "--self_instruct_rows",
        type=cli.positive_int,
        help="rows of the arm self_instruct (default: 2220; embedded model 300)",
    )
    add(
        "--pretraining_membership",
        action="store_true",
        help="attack membership in the base's pre-training corpus, on the base and on every arm",
    )
    add(
        "--pretraining_members", metavar="FILE", help="texts that the base was pre-trained on (default: of mini-pythia)"
    )
    add("--pretraining_nonmembers", metavar="FILE", help="texts of the same kind that it was not pre-trained on")
    add("--seeds", type=cli.positive_int, help="repeat the study with so many seeds, from --seed on (study mail)")
    add("--output", "--output_dir", help="directory for everything the study writes")
    add("-lr", "--learning_rate", type=cli.positive_float, help="learning rate (default: 1e-3; study reviews 3e-3)")
    add("-e", "--epochs", type=cli.positive_int, help="epochs (default: 2; studies privacy 10, reviews 5)")
    add("-pdbs", "--per_device_batch_size", type=cli.positive_int, help="rows per forward pass")
    add("-gas", "--gradient_accumulation_steps", type=cli.positive_int, help="as in run_peft.py")
    add("--lora_r", type=cli.positive_int, help="rank (default: 64; embedded model 16; studies privacy, reviews 8)")
    add("-mt", "--max_tokens", type=cli.positive_int, help="tokens per answer")
    add("--full", action="store_true", help="attack every epoch of every arm, at all eight temperatures")
    cli.add_model_flags(parser)
    return parser


def check_same(out: Path, config: StudyConfig) -> None:
    """Raise a UserError if `out` has a study with other settings or input files, whose results would be kept."""
    file, remedy = out / "run_quickstart.json", "choose another directory"
    if not file.exists():
        return
    try:
        record = json_files.read_json(file, remedy)
        defaults = cli.defaults_of(QuickstartConfig)
        earlier, inputs = defaults | record["args"], {entry["path"]: entry["sha256"] for entry in record["inputs"]}
    except (UserError, OSError, KeyError, TypeError, ValueError):
        raise UserError(f"--output {out}: its run_quickstart.json cannot be read; {remedy}") from None
    now = {key: value for key, value in strict_json.plain(vars(config)).items() if key not in MAY_DIFFER}
    other = [f"--{key} was {earlier.get(key)}, now {value}" for key, value in now.items() if earlier.get(key) != value]
    if (earlier.get("seeds", 1) > 1) != (getattr(config, "seeds", 1) > 1):
        other.append(f"--seeds was {earlier.get('seeds')}, now {config.seeds}")
    files = [str(path) for path in STUDIES[config.study].inputs(config) if Path(path).is_file()]
    other += [f"{path} has changed since" for path in files if path in inputs and inputs[path] != results.sha256(path)]
    if other:
        raise UserError(f"--output {out}: has a study with other settings ({'; '.join(other)}); {remedy}")


def with_defaults(flags: QuickstartConfig) -> StudyConfig:
    """The flags, with the defaults that depend on the study and the model filled in."""
    embedded = flags.model == str(EMBEDDED / "mini-pythia")
    study = STUDIES[flags.study]
    if embedded:
        outsiders = flags.outsiders or str(EMBEDDED / "outsiders.jsonl")
        generator = flags.generator or str(EMBEDDED / "mini-pythia-xl")
        flags = replace(flags, outsiders=outsiders, generator=generator)
    settings = vars(flags) | {
        "epochs": flags.epochs or study.EPOCHS,
        "learning_rate": flags.learning_rate or study.RATE,
        "lora_r": flags.lora_r or (study.RANK if embedded or flags.study != "mail" else 64),
        "arms": flags.arms or tuple(arm for arm in arms.DEFAULT if arm != "generated" or flags.generator),
        "self_instruct_rows": flags.self_instruct_rows or (arms.EMBEDDED_ROWS if embedded else arms.ROWS),
    }
    return StudyConfig(**settings)


def run(flags: QuickstartConfig) -> int:
    config = with_defaults(flags)
    study = STUDIES[config.study]
    problems = Problems()
    if config.study != "mail" and config.seeds > 1:
        problems.add(f"--seeds {config.seeds}: only study mail is repeated")
    check_writable(config.output, problems, "--output")
    problems.absorb(study.check, config)
    out = Path(config.output).absolute()
    with locks.output_folder(out, config.dry_run) as output:
        problems.absorb(check_same, out, config)
        problems.check()
        if config.dry_run:
            plan = f"{config.model} on {config.dataset}, {config.epochs} epochs"
            print(f"study {config.study}: would fine-tune {plan}, write {out}")
            return 0
        return run_locked(config, out, output)


def run_locked(config: StudyConfig, out: Path, output: locks.Output) -> int:
    study = STUDIES[config.study]
    started = time.monotonic()
    with results.Run(out / "run_quickstart.json", config, study.inputs(config), output=output) as record:
        text = seeds.run(config, out, record) if config.seeds > 1 else study.run(config, out, record)
        with record.files.open(out / "summary.md") as file:
            file.write(text + "\n")
    shown = plot_results.ReportConfig(directories=(str(out),), output=str(out / "report"), no_figures=not config.full)
    call("plot_results.py", plot_results.run, shown)
    print("\n" + text)
    print(f"\n{time.monotonic() - started:.0f} s; results are in {out}, the report is {out / 'report' / 'report.html'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(entry(main))
