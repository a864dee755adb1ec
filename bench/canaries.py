"""What each family of canaries shows on the miniature: canaries placed once, fine-tuning without DP.

python bench/canaries.py                                  # 220 canaries of each family among 240 rows
python bench/canaries.py --families new_token --rows 120 --canaries 100 --epochs 2

For each family, canary/inject.py puts --canaries canaries, each with probability ½, into rows of their own among --rows
training rows of data/embedded/enron.jsonl; run_peft.py fine-tunes data/embedded/mini-pythia on the file; and
canary/measure.py scores the canaries: each script is run as a user runs it, once. The miniature is also the generator
of `model`. Prints, for the score that the family fixes, TPR at 1 % FPR with its 95 % interval (from 99 canaries left
out), AUC with its interval, and the lower bounds on ε at 95 % of Steinke et al. and by f-DP.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from canary.canaries import FAMILIES, TOKEN_FAMILIES
from common import cli, json_files
from common.problems import UserError
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "data" / "embedded"
MODEL = EMBEDDED / "mini-pythia"


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Compare the families of canaries on a fine-tuned miniature.",
        "python bench/canaries.py --canaries 220 --rows 240",
    )
    add = parser.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families to compare")
    add("--rows", type=cli.positive_int, default=240, help="training rows, those of the canaries included")
    add("--canaries", type=cli.positive_int, default=220, help="canaries of each family, about half of them placed")
    add("--secret", default="phone", help="secret of template canaries")
    add("-e", "--epochs", type=cli.positive_int, default=5, help="epochs of each fine-tune")
    add("-lr", "--learning_rate", type=cli.positive_float, default=3e-3, help="their learning rate")
    add("--lora_r", type=cli.positive_int, default=8, help="their rank")
    add("--threads", type=cli.positive_int, default=os.cpu_count(), help="threads of each process")
    add("--seed", type=cli.seed, default=3407, help="seed of the coins and of the fine-tunes")
    return parser


def make_rows(folder: Path, n: int) -> Path:
    """A file of the first n training rows of the embedded mail, without the fields that set some of them apart."""
    from common import dataset, formats, manifests, publication

    source = EMBEDDED / "enron.jsonl"
    rows = formats.read_rows(source)
    train = dataset.split(rows, manifests.read_manifest(source)).train
    if len(train) < n:
        raise UserError(f"--rows {n}: {source} has {len(train)} training rows")
    file = folder / "train.jsonl"
    kept = ("prompt", "continuation")
    publication.write_jsonl(file, [{name: rows[index][name] for name in kept} for index in train[:n]])
    return file


def run(threads: int, *words: object) -> str | None:
    """Run a script of the repository as a process of its own; the reason if it refuses."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 2:
        return done.stderr.strip().splitlines()[-1]
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stderr[-3000:]}")
    return None


def of_family(args, family: str, source: Path, folder: Path) -> str:
    """One row of the table."""
    import numpy as np

    from mia.metrics import tpr_at

    flags: list[object] = ["--family", family, "--audit", args.canaries, "--seed", args.seed]
    flags += ["--secret", args.secret] if family == "template" else []
    flags += ["--tokenizer", MODEL] if family in TOKEN_FAMILIES else []
    flags += ["--generator", MODEL] if family == "model" else []
    file, key = folder / "canaries.jsonl", folder / "key.jsonl"
    refused = run(args.threads, "canary/inject.py", "-i", source, "--output", file, "--key_file", key, *flags)
    if refused:
        return f"{family:<10}  {refused}"
    training = f"-e {args.epochs} -lr {args.learning_rate} --lora_r {args.lora_r} --loss_on completion -pdbs 8 -gas 1"
    words = ["-m", MODEL, "-i", file, "--output_root", folder / "out", *training.split(), "--seed", args.seed]
    refused = run(args.threads, "run_peft.py", *words)
    if refused:
        raise RuntimeError(refused)
    checkpoints = folder.glob("out/**/checkpoint-*")
    target = max(checkpoints, key=lambda path: int(path.name.partition("-")[2]))
    words = ["--canaries", key, "--models", f"lora={target}", "--output_dir", folder / "measured"]
    refused = run(args.threads, "canary/measure.py", *words)
    if refused:
        raise RuntimeError(refused)
    lines = json_files.read_jsonl(folder / "measured" / "results_canary.jsonl")
    scored = json_files.read_jsonl(folder / "measured" / "results_canary_rows.jsonl")
    (line,) = (line for line in lines if line["measure"] == "audit")
    signals = {
        included: np.array([row["audit_signal"] for row in scored if row["included"] is included])
        for included in (True, False)
    }
    point = tpr_at(signals[True], signals[False], "0.01")
    rate = "— (too few)" if point["tpr"] is None else f"{point['tpr']:.1%} ({{:.1%}}–{{:.1%}})".format(*point["tpr_ci"])
    auc = "—" if line["auc"] is None else f"{line['auc']:.3f} ({{:.3f}}–{{:.3f}})".format(*line["auc_ci"])
    bounds = (
        line["lower"]["95"],
        line["f_dp"]["epsilon_delta"]["lower"]["95"],
        line["f_dp"]["gaussian"]["lower"]["95"],
    )
    shown = "  ".join(f"{'—' if bound is None else format(bound, '.2f'):>8}" for bound in bounds)
    counts = f"{line['placed_trained']}/{line['placed']}"
    return f"{family:<10}  {line['score']:<6}  {counts:>8}  {rate:<24}  {auc:<20}  {shown}"


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        source = make_rows(Path(name), args.rows)
        facts = f"{args.epochs} epochs, learning rate {args.learning_rate}, rank {args.lora_r}, no DP"
        print(f"{args.canaries} canaries of each family among {args.rows} rows; {facts}")
        head = f"{'family':<10}  {'score':<6}  {'trained':>8}  {'TPR at 1 % FPR':<24}  {'AUC':<20}"
        print(f"{head}  {'Steinke':>8}  {'f-DP':>8}  {'Gaussian':>8}", flush=True)
        for family in args.families:
            folder = Path(name) / family
            folder.mkdir()
            print(of_family(args, family, source, folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # otherwise bench/ shadows the package mia
    sys.exit(entry(main))
