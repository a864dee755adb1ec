"""Bounds on ε from generated text alone, without DP: a model trained on the text beside its 2-grams; prints a table.

python bench/auxiliary.py --output_dir aux-bench
python bench/auxiliary.py --output_dir aux-bench --epochs 5 --prompts heldout

Fictional reviews of the embedded shop; canaries inserted once with probability ½; the embedded model is trained on
them without noise or clipping for each of --epochs, and writes --copies reviews for the metadata of each held-out or
training row (--prompts; with the latter the generator is asked for the rows it saw). Of these rows: canary/auxiliary.py
and the 2-gram signal. model: the bound of canary/measure.py from the generator itself. Finished steps are kept.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # otherwise `fidelity` and `mia` would be the scripts beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, json_files, process, publication
from studies.config import EMBEDDED


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Bounds on ε from generated text alone, without DP.", "python bench/auxiliary.py --output_dir aux-bench"
    )
    add = parser.add_argument
    add("-m", "--model", default=str(EMBEDDED / "mini-pythia"), help="base of the generator and of the auxiliary model")
    add("--train", type=cli.positive_int, default=600, help="training rows, about half of --audit fewer are left")
    add("--audit", type=cli.positive_int, default=400, help="canaries inserted once with probability 1/2")
    add("--secret", default="phone", help="as in canary/inject.py")
    add("--epochs", type=cli.positive_int, nargs="+", default=[5, 30], help="of the generator")
    add("--prompts", nargs="+", choices=("heldout", "train"), default=["heldout", "train"], help="whose metadata")
    add("--copies", type=cli.positive_int, default=2, help="reviews per prompt")
    add("--aux_epochs", type=cli.positive_int, default=4, help="of the auxiliary model")
    add("--output_dir", required=True, help="directory for everything")
    add("--seed", type=cli.seed, default=3407, help="random seed")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    from canary import auxiliary
    from canary.config import InjectConfig, MeasureConfig
    from canary.injection import run as inject
    from canary.measurement import run as measure
    from common import formats
    from common.checkpoints import find_checkpoints
    from data.synthetic.config import SyntheticConfig
    from data.synthetic.run import run as generate
    from studies.reviews import PRIVATE, make_split, step
    from studies.steps import build, train
    from training.config import TrainConfig

    out = Path(args.output_dir)
    real = make_split(out / "reviews", 4 * args.train, args.train, args.train, PRIVATE, args.seed)
    rows, key = out / "train_canaries.jsonl", out / "train_canaries_key.jsonl"
    source = str(real / "train.jsonl")
    build(
        "canary/inject.py",
        inject,
        InjectConfig(input=source, output=str(rows), audit=args.audit, secret=args.secret, seed=args.seed),
    )
    prompts = {"heldout": real / "test.jsonl", "train": rows}
    for name, file in prompts.items():
        prompts[name] = out / f"prompts_{name}.jsonl"
        if not prompts[name].exists():
            publication.write_jsonl(prompts[name], formats.read_rows(file) * args.copies)
    lines = [
        "| epochs | prompts | model: ε ≥ | AUC | auxiliary: ε ≥ | f-DP | AUC | TPR at 1 % FPR "
        "| secret alone: ε ≥ | AUC | 2-gram: ε ≥ | AUC |",
        "|" + "---|" * 12,
    ]
    for epochs in args.epochs:
        training = TrainConfig(
            model=args.model,
            input=str(rows),
            output_root=str(out / f"generator-{epochs}"),
            epochs=epochs,
            learning_rate=3e-3,
            per_device_batch_size=16,
            gradient_accumulation_steps=1,
            lora_r=64,
            lora_dropout=0.0,
            loss_on="completion",
            logging_steps=50,
        )
        checkpoint = find_checkpoints(train(training))[-1]
        own = MeasureConfig(
            canaries=str(key), models=(f"a={checkpoint}",), output_dir=str(out / f"model-{epochs}"), overwrite=True
        )
        step("canary/measure.py", measure, own)
        (model,) = json_files.read_jsonl(out / f"model-{epochs}" / "results_canary.jsonl")
        for name in args.prompts:
            text = out / f"generated_{epochs}_{name}.jsonl"
            written = SyntheticConfig(
                model=str(checkpoint),
                input=str(prompts[name]),
                arm="a",
                training=str(rows),
                max_new_tokens=160,
                output=str(text),
                seed=args.seed,
            )
            build("data/synthetic/generate.py", generate, written)
            folder = out / f"auxiliary-{epochs}-{name}"
            config = auxiliary.Config(
                model=args.model,
                canaries=str(key),
                synthetic=(f"a={text}",),
                epochs=args.aux_epochs,
                learning_rate=3e-3,
                per_device_batch_size=16,
                lora_r=64,
                output_dir=str(folder),
                seed=args.seed,
            )
            step("canary/auxiliary.py", auxiliary.run, config)
            found = {line["signal"]: line for line in json_files.read_jsonl(folder / "results_auxiliary.jsonl")}
            whole, secret, grams = (found[signal] for signal in ("auxiliary", "auxiliary, secret", "2-gram"))
            cells = [epochs, name, *pair(model), whole["lower"]["95"], whole["f_dp"]["epsilon_delta"]["lower"]["95"]]
            cells += [whole["auc"], (whole["tpr_at_fpr"] or {}).get("tpr"), *pair(secret), *pair(grams)]
            lines.append("| " + " | ".join(map(shown, cells)) + " |")
            print("\n".join(lines), flush=True)
    return 0


def pair(line: dict) -> list:
    return [line["lower"]["95"], line["auc"]]


def shown(value) -> str:
    return "none" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(process.entry(main))
