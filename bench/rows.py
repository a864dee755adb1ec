"""Measure the memory of run_peft.py --dry_run, mia/mia.py and audit.py --quick on a file of many rows.

python bench/rows.py --folder /tmp/rows                       # 5,000,000 rows of 1 kB: needs 6 GB of disk
python bench/rows.py --folder /tmp/rows --rows 1000000 --scripts run_peft

Writes rows of generated text about invented people (one file for training, one of 1 % of its size, held out), unless
the folder has them. Each script is a process of its own on the embedded model; /proc/PID/status of it and its children
is read every 0.1 s. RssAnon is memory that only that process has; VmRSS adds the pages of mapped files and libraries,
which the system takes back when it needs them.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.inputs import fictional_people
from common import cli
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "data" / "embedded" / "mini-pythia"
SCRIPTS = ("run_peft", "mia", "audit")
EVERY = 0.1  # seconds between two looks


def make_parser() -> cli.Parser:
    parser = cli.Parser("Measure time and memory on files of many rows.", "python bench/rows.py --folder /tmp/rows")
    add = parser.add_argument
    add("--folder", default=None, help="where the rows are written and kept (default: a temporary folder)")
    add("--rows", type=cli.positive_int, default=5_000_000, help="training rows")
    add("--length", type=cli.positive_int, default=1000, help="bytes per row")
    add("--train_rows", type=cli.positive_int, default=None, help="rows that run_peft.py tokenises (default: all)")
    add("--num_rows", type=cli.positive_int, default=100, help="rows per side that mia/mia.py and audit.py measure")
    add("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="what to run")
    add("--threads", type=cli.positive_int, default=os.cpu_count(), help="OMP_NUM_THREADS and RAYON_NUM_THREADS")
    add("--seed", type=int, default=3407, help="seed of the texts")
    return parser


def write_rows(path: Path, n: int, length: int, seed: int) -> None:
    """n rows of `length` bytes: a line about an invented person, with a mail address and a phone number, and sentences
    from a list that is much longer than a row."""
    rng = random.Random(seed)
    people = fictional_people(2000)
    things = ("meeting", "contract", "invoice", "delivery", "budget", "supplier", "report", "office", "review")
    verbs = ("sent", "checked", "signed", "returned", "forwarded", "delayed", "approved", "printed", "copied")
    sentences = "".join(
        f" The {rng.choice(things)} was {rng.choice(verbs)} with the {rng.choice(things)} {rng.randrange(1000)}."
        for _ in range(20_000)
    )
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="ascii") as file:
        for row in range(n):
            name, address = rng.choice(people)
            local, _, domain = address.partition("@")
            head = f"{name} <{local}{row}@{domain}>, phone 0{rng.randrange(10**9):09d}, wrote:"
            start = rng.randrange(len(sentences) - length)
            first, last = f'{{"row_id": {row}, "text": "{head}', '"}\n'
            file.write(first + sentences[start : start + max(0, length - len(first) - len(last))] + last)
    partial.rename(path)


def family(process: int) -> list[int]:
    """A process and its descendants."""
    found = [process]
    for one in found:
        try:
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def memory(process: int) -> tuple[int, int]:
    """(RssAnon, VmRSS) in bytes, summed over a process and its descendants."""
    anonymous = resident = 0
    for one in family(process):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in lines)
        anonymous += int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
        resident += int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
    return anonymous, resident


def command(script: str, train: Path, heldout: Path, out: Path, args: argparse.Namespace) -> list[str]:
    model = ["--model", str(MODEL)]
    if script == "run_peft":
        flags = ["run_peft.py", *model, "-i", str(train), "--dry_run", "--output_root", str(out)]
        flags += ["--train_rows", str(args.train_rows)] if args.train_rows else []
    elif script == "mia":
        sets = ["--members", str(train), "--nonmembers", str(heldout), "--bootstrap", "100"]
        flags = ["mia/mia.py", *model, *sets, "--output_dir", str(out)]
    else:
        flags = ["audit.py", *model, "--train", str(train), "--heldout", str(heldout), "--quick"]
        flags += ["--output_dir", str(out)]
    more = [] if script == "run_peft" else ["--num_rows", str(args.num_rows)]
    return [sys.executable, *flags, *more]


def measure(script: str, train: Path, heldout: Path, args: argparse.Namespace) -> tuple[float, int, int]:
    """(seconds, peak RssAnon, peak VmRSS) of one run."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "RAYON_NUM_THREADS": str(args.threads)}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as out, open(Path(out) / "log", "w+b") as log:
        argv = command(script, train, heldout, Path(out) / "results", args)
        begun, peaks = time.monotonic(), (0, 0)
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now = memory(process.pid)
            peaks = max(peaks[0], now[0]), max(peaks[1], now[1])
            time.sleep(EVERY)
        seconds = time.monotonic() - begun
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{script}: exit status {process.returncode}\n{log.read().decode()[-2000:]}")
    return seconds, *peaks


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        train, heldout = folder / f"train_{args.rows}.jsonl", folder / f"heldout_{args.rows}.jsonl"
        for path, n, seed in ((train, args.rows, args.seed), (heldout, max(1000, args.rows // 100), args.seed + 1)):
            if not path.exists():
                write_rows(path, n, args.length, seed)
        print(f"{machine()}; {args.threads} threads; {args.rows:,} rows, {train.stat().st_size / 1e9:.2f} GB")
        print("| script | rows | seconds | peak RssAnon | peak VmRSS |\n|---|---|---|---|---|", flush=True)
        for script in args.scripts:
            seconds, anonymous, resident = measure(script, train, heldout, args)
            sizes = f"{anonymous / 1e6:,.0f} MB | {resident / 1e6:,.0f} MB"
            print(f"| {script} | {args.rows:,} | {seconds:,.0f} | {sizes} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
