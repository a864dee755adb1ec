"""What each family of canaries shows on the miniature: without DP, with it, and where it does not clip.

python bench/canaries.py                                  # four families, three fine-tunes of each
python bench/canaries.py --families random --arms no_dp --rows 120 --canaries 100 --epochs 2

For each family, canary/inject.py puts --canaries canaries, each with probability ½, into rows of their own among the
--rows shortest training rows of data/embedded/enron.jsonl (of each continuation twelve words); run_peft.py fine-tunes
data/embedded/mini-pythia on the file; and canary/measure.py scores the canaries: each script is run as a user runs it,
once. The miniature is also the generator of `model`. The arms, all on the same file:

no_dp   no DP
dp      --dp --target_epsilon
fault   as dp with the noise for --fault_epsilon, but nothing is clipped (the flags say so: a clipping norm that no
        gradient reaches, and a noise multiplier that gives the same noise); caught if Steinke's bound at 99.9 % is
        above that ε

Prints, for the score that the family fixes, TPR at 1 % FPR with its 95 % interval (from 99 canaries left out), AUC with
its interval, and the lower bounds on ε: of Steinke et al. at 95 and 99.9 %, and by f-DP at 95 %.
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
ARMS = ("no_dp", "dp", "fault")
DELTA, CLIP, NEVER_CLIPS = 1e-5, 1e-3, 1e6
WORDS = 12  # of a row's continuation


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Compare the families of canaries on a fine-tuned miniature.",
        "python bench/canaries.py --canaries 220 --rows 240",
    )
    add = parser.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families to compare")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="fine-tunes of each family")
    add("--rows", type=cli.positive_int, default=240, help="training rows, those of the canaries included")
    add("--canaries", type=cli.positive_int, default=220, help="canaries of each family, about half of them placed")
    add("--secret", default="phone", help="secret of template canaries")
    add("-e", "--epochs", type=cli.positive_int, default=12, help="epochs of no_dp")
    add("-lr", "--learning_rate", type=cli.positive_float, default=1e-2, help="its learning rate")
    add("--lora_r", type=cli.positive_int, default=16, help="rank, of every arm")
    add("--dp_epochs", type=cli.positive_int, default=60, help="epochs of dp and fault, each one step over all rows")
    add("--dp_learning_rate", type=cli.positive_float, default=1e-2, help="their learning rate")
    add("--target_epsilon", type=cli.positive_float, default=8.0, help="ε of dp")
    add("--fault_epsilon", type=cli.positive_float, default=1.0, help="ε that fault is accounted")
    add("--threads", type=cli.positive_int, default=os.cpu_count(), help="threads of each process")
    add("--seed", type=cli.seed, default=3407, help="seed of the coins and of the fine-tunes")
    return parser


def make_rows(folder: Path, n: int) -> Path:
    """A file of the n shortest training rows of the embedded mail, in their order: of each the prompt and the first
    WORDS of its continuation, for in a short row more of the gradient is the canary's."""
    from common import dataset, formats, manifests, publication

    source = EMBEDDED / "enron.jsonl"
    rows = formats.read_rows(source)
    train = sorted(
        dataset.split(rows, manifests.read_manifest(source)).train,
        key=lambda index: len(rows[index]["prompt"] + rows[index]["continuation"]),
    )
    if len(train) < n:
        raise UserError(f"--rows {n}: {source} has {len(train)} training rows")
    file = folder / "train.jsonl"
    chosen = [rows[index] for index in sorted(train[:n])]
    words = [" " + " ".join(row["continuation"].split()[:WORDS]) for row in chosen]
    publication.write_jsonl(
        file, [{"prompt": row["prompt"], "continuation": text} for row, text in zip(chosen, words, strict=True)]
    )
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


def inject(args, family: str, source: Path, folder: Path) -> str | None:
    """Write canaries.jsonl and its key in a folder; the reason if that is refused."""
    flags: list[object] = ["--family", family, "--audit", args.canaries, "--seed", args.seed]
    flags += ["--secret", args.secret] if family == "template" else []
    flags += ["--tokenizer", MODEL] if family in TOKEN_FAMILIES else []
    flags += ["--generator", MODEL] if family == "model" else []
    words = ["--output", folder / "canaries.jsonl", "--key_file", folder / "canaries_key.jsonl", *flags]
    return run(args.threads, "canary/inject.py", "-i", source, *words)


def train(args, arm: str, folder: Path) -> Path:
    """Fine-tune on a folder's canaries.jsonl; returns the last checkpoint."""
    file = folder / "canaries.jsonl"
    with open(file, encoding="utf-8") as lines:
        n = sum(1 for _ in lines)
    if arm == "no_dp":
        flags = f"-e {args.epochs} -lr {args.learning_rate} -pdbs 4 -gas 1 --seed {args.seed}"
    else:
        flags = f"-e {args.dp_epochs} -lr {args.dp_learning_rate} -pdbs 32 --scheduler constant --dp"
        flags += f" --logical_batch_size {n} --target_delta {DELTA}"
        if arm == "dp":
            flags += f" --target_epsilon {args.target_epsilon} --max_grad_norm {CLIP}"
        else:
            flags += f" --noise_multiplier {noise(args) * CLIP / NEVER_CLIPS} --max_grad_norm {NEVER_CLIPS}"
    words = ["-m", MODEL, "-i", file, "--output_root", folder / arm, "--lora_r", args.lora_r, *flags.split()]
    if refused := run(args.threads, "run_peft.py", "--loss_on", "completion", "--lora_dropout", 0, *words):
        raise RuntimeError(refused)
    return max((folder / arm).glob("**/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def noise(args) -> float:
    """σ for --fault_epsilon with all rows in every step."""
    from training import dp

    return dp.noise_multiplier(args.fault_epsilon, 1.0, args.dp_epochs, DELTA)


def measured(args, arm: str, folder: Path) -> str:
    """One row of the table, without the family."""
    import numpy as np

    from mia.metrics import tpr_at

    out = folder / f"{arm}-measured"
    words = ["--models", f"lora={train(args, arm, folder)}", "--output_dir", out]
    if refused := run(args.threads, "canary/measure.py", "--canaries", folder / "canaries_key.jsonl", *words):
        raise RuntimeError(refused)
    scored = json_files.read_jsonl(out / "results_canary_rows.jsonl")
    (line,) = (line for line in json_files.read_jsonl(out / "results_canary.jsonl") if line["measure"] == "audit")
    signals = {
        included: np.array([row["audit_signal"] for row in scored if row["included"] is included])
        for included in (True, False)
    }
    point = tpr_at(signals[True], signals[False], "0.01")
    rate = "— (too few)" if point["tpr"] is None else f"{point['tpr']:.1%} ({{:.1%}}–{{:.1%}})".format(*point["tpr_ci"])
    auc = "—" if line["auc"] is None else f"{line['auc']:.3f} ({{:.3f}}–{{:.3f}})".format(*line["auc_ci"])
    bounds = [line["lower"]["95"], line["lower"]["99.9"]]
    bounds += [line["f_dp"][name]["lower"]["95"] for name in ("epsilon_delta", "gaussian")]
    shown = "  ".join(f"{'—' if bound is None else format(bound, '.2f'):>7}" for bound in bounds)
    words = ""
    if arm == "dp":
        words = f"  ε {line['upper']:.2f}"
    elif arm == "fault":
        caught = (line["lower"]["99.9"] or 0) > args.fault_epsilon
        words = f"  ε {args.fault_epsilon:g} {'caught' if caught else 'not caught'}"
    counts = f"{line['placed_trained']}/{line['placed']}"
    return f"{arm:<6}  {line['score']:<6}  {counts:>7}  {rate:<22}  {auc:<19}  {shown}{words}"


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        source = make_rows(Path(name), args.rows)
        print(f"{args.canaries} canaries of each family among {args.rows} rows; rank {args.lora_r}")
        print(f"no_dp: {args.epochs} epochs of batches of 4, learning rate {args.learning_rate:g}")
        print(f"dp, fault: {args.dp_epochs} steps over all rows, learning rate {args.dp_learning_rate:g}")
        print(f"{'family':<9}  {'arm':<6}  {'score':<6}  {'trained':>7}  {'TPR at 1 % FPR':<22}  {'AUC':<19}", end="")
        print("  Steinke   99.9 %     f-DP  Gauss.  accounted", flush=True)
        for family in args.families:
            folder = Path(name) / family
            folder.mkdir()
            if refused := inject(args, family, source, folder):
                print(f"{family:<9}  {refused}", flush=True)
                continue
            for arm in args.arms:
                print(f"{family:<9}  {measured(args, arm, folder)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # otherwise bench/ shadows the package mia
    sys.exit(entry(main))
