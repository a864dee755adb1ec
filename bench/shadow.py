"""What shadow models buy and cost on the miniature: ref, rmia and lira side by side, K shadows against one fine-tune.

python bench/shadow.py                                    # 200 members, 200 non-members, 8 shadows
python bench/shadow.py --shadows 4 --rows 150 --epochs 2

Fine-tunes data/embedded/mini-pythia (trained beforehand on other fictional texts) on --rows training rows of
data/embedded/enron.jsonl with run_peft.py, trains --shadows with mia/shadow.py, attacks with mia/mia.py: each script is
run as a user runs it, once. Non-members are as many rows of the file's held-out head; 1 % FPR needs 99 of them. Prints
AUC and TPR at 1 % FPR with 95 % intervals, then wall and CPU seconds of each process: one fine-tune, all shadows, and
the attack without and with them.
"""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import cli, json_files, locks
from common.problems import UserError
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "data" / "embedded"
SHOWN = ("loss", "ref", "rmia", "lira_offline", "lira")


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Attack a fine-tuned miniature with and without shadow models, and time both.",
        "python bench/shadow.py --shadows 8 --rows 200",
    )
    add = parser.add_argument
    add("--shadows", type=cli.positive_int, default=8, help="shadow models")
    add("--rows", type=cli.positive_int, default=200, help="members, and as many non-members")
    add("-e", "--epochs", type=cli.positive_int, default=3, help="epochs of the target and of every shadow")
    add("-lr", "--learning_rate", type=cli.positive_float, default=1e-3, help="their learning rate")
    add("--lora_r", type=cli.positive_int, default=8, help="their rank")
    add("--threads", type=cli.positive_int, default=os.cpu_count(), help="threads of each process")
    return parser


def make_rows(folder: Path, n: int) -> Path:
    """A file of n rows of the head and n training rows of the embedded mail, with its manifest."""
    from common import dataset, formats, manifests

    source = EMBEDDED / "enron.jsonl"
    rows, manifest = formats.read_rows(source), manifests.read_manifest(source)
    split = dataset.split(rows, manifest)
    if min(len(split.head), len(split.train)) < n:
        raise UserError(f"--rows {n}: {source} has {len(split.head)} held-out and {len(split.train)} training rows")
    file = folder / "enron.jsonl"
    with locks.output_file(file) as place, place.publication() as files:
        files.write_jsonl(file, [rows[index] for index in [*split.head[:n], *split.train[:n]]])
        facts = {"tag": "original", "script": "bench/shadow.py", "argv": sys.argv, "rows": 2 * n, "split_start": n}
        manifests.write_manifest(files, file, **facts)
    return file


def timed(threads: int, *words: object) -> tuple[float, float]:
    """(wall, CPU) seconds of a script of the repository, run as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, used


def rate(value: float | None, bounds: list[float] | None) -> str:
    return "—" if value is None or bounds is None else f"{value:.1%} ({bounds[0]:.1%}–{bounds[1]:.1%})"


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = make_rows(folder, args.rows)
        training = f"-e {args.epochs} -lr {args.learning_rate} --lora_r {args.lora_r} -pdbs 8 -gas 1".split()
        words = ["run_peft.py", "-m", EMBEDDED / "mini-pythia", "-i", file, "--output_root", folder / "out", *training]
        one = timed(args.threads, *words)
        (record,) = folder.glob("out/*/*/*/run.json")
        target = max(record.parent.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, float32", flush=True)
        shadows = folder / "shadows"
        words = ["mia/shadow.py", "--like", target, "--shadows", args.shadows, "--output_dir", shadows]
        all_of_them = timed(args.threads, *words)
        words = ["mia/mia.py", "--model", target, "--members", file, "--attacks", "loss", "ref"]
        attack = timed(args.threads, *words, "--shadows", shadows, "--output_dir", folder / "results")
        plain = timed(args.threads, *words, "--output_dir", folder / "plain")
        lines = json_files.read_jsonl(folder / "results" / "results_mia.jsonl")
    found = {line["attack"]: line for line in lines}
    print(f"{args.rows} members, {args.rows} non-members, {args.epochs} epochs, learning rate {args.learning_rate}")
    print(f"{'attack':<13} {'shadows':>7}  {'AUC':<20}  {'TPR at 1 % FPR':<24}  base AUC")
    for name in SHOWN:
        line = found[name]
        low, high = line["auc_ci"]
        at_one = rate(line["tpr_at_fpr"]["0.01"], line["tpr_at_fpr_ci"]["0.01"])
        base = line["base"]["auc"]
        shown = f"{line['auc']:.3f} ({low:.3f}–{high:.3f})"
        own = "—" if base is None else f"{base:.3f}"
        print(f"{name:<13} {line['n_shadows']:>7}  {shown:<20}  {at_one:<24}  {own}")
    blind = ", ".join(f"{name} {made['auc']:.3f}" for name, made in lines[0]["blind"].items())
    print(f"controls: {blind}; flags: {', '.join(found['lira']['flags']) or 'none'}")
    for place, clock in enumerate(("wall", "CPU")):
        alone, together = one[place], all_of_them[place]
        cost = f"{together / alone:.2f} × one, {together / alone / args.shadows:.2f} × each"
        print(f"{clock}: one fine-tune {alone:.1f} s, {args.shadows} shadows {together:.1f} s ({cost})")
        print(f"{clock}: attack without shadows {plain[place]:.1f} s, with them {attack[place]:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
