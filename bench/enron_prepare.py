"""Time data/enron/prepare.py on synthetic mail in the Enron format: messages/s and peak memory at two corpus sizes.

python bench/enron_prepare.py                                  # 20,000 and 80,000 messages, folder and tar.gz
python bench/enron_prepare.py --messages 2000 8000 --runs 1    # a quick look

This script creates the corpus (fictional people, the headers of the CMU maildir, Exchange names in X-From and X-To,
forwarded and quoted mails) below --work_dir, as a folder and as a tar.gz of it, and removes it at the end. Each
measurement is a separate process; the median of --runs is reported. Memory is the peak of the main process plus the
number of workers times the peak of the largest one: an upper bound on the total. The goal: 3,000 messages/s on two
cores, and memory that does not grow with the corpus.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from common import cli
from common.problems import UserError
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
GOAL = 3000  # messages/s on two cores
WORDS = 400
PEOPLE = 5000


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Time the Enron builder on synthetic mail at two corpus sizes.",
        "python bench/enron_prepare.py --messages 20000 80000 --workers 2",
    )
    parser.add_argument(
        "--messages", type=cli.positive_int, nargs=2, default=[20000, 80000], help="the two corpus sizes"
    )
    parser.add_argument("--workers", type=cli.positive_int, default=2, help="worker processes of the builder")
    parser.add_argument("--runs", type=cli.positive_int, default=3, help="runs of each; the median is reported")
    parser.add_argument("--work_dir", default=None, help="directory for the corpus; None: the temporary directory")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the corpus")
    return parser


def make_people(rng: random.Random, fake) -> list[tuple[str, str, str]]:
    """(first, last, address) of PEOPLE fictional people."""
    people = []
    for number in range(PEOPLE):
        first, last = fake.first_name(), fake.last_name()
        local = f"{first}.{last}{number}".lower() if rng.random() < 0.7 else f"{first[0]}{last}{number}".lower()
        people.append((first, last, f"{local}@{rng.choice(('hartwell', 'norbeck', 'quillan'))}.example"))
    return people


def make_message(rng: random.Random, people: list, words: list[str], number: int) -> bytes:
    """A mail like those in the CMU maildir: about 3 KB, 1–10 recipients, a quoted mail in every second body."""
    sender, *to = rng.sample(people, rng.choice((1, 1, 1, 2, 3, 10)) + 1)
    lines = [
        f"Message-ID: <{number}.JavaMail.mail@hartwell.example>",
        "Date: Mon, 14 May 2001 16:39:00 -0700 (PDT)",
        f"From: {sender[2]}",
        "To: " + ", \n\t".join(address for *_, address in to),
        f"Subject: {' '.join(rng.choices(words, k=5))}",
        "Mime-Version: 1.0",
        "Content-Type: text/plain; charset=us-ascii",
        "Content-Transfer-Encoding: 7bit",
        f"X-From: {sender[1]}, {sender[0]} </O=HARTWELL/OU=NA/CN=RECIPIENTS/CN={sender[1].upper()}>",
        "X-To: " + ", ".join(f"{last}, {first} </O=HARTWELL/OU=NA/CN=RECIPIENTS/CN=X>" for first, last, _ in to),
        "X-cc: ",
        "X-Folder: \\Mail\\All documents",
        "X-Origin: Mail-X",
        "X-FileName: mail.nsf",
        "",
    ]

    def text(n: int) -> None:
        lines.extend(" ".join(rng.choices(words, k=10)) for _ in range(n // 10))

    text(WORDS // 2)
    if number % 2:
        first, last, address = rng.choice(people)
        lines.extend(("", "-----Original Message-----", f"From: {first} {last} [mailto:{address}]", "Subject: x", ""))
    text(WORDS // 2)
    return "\n".join(lines).encode()


def make_corpora(folder: Path, sizes: list[int], seed: int) -> dict[tuple[str, int], Path]:
    from faker import Faker

    fake, rng = Faker("en_US"), random.Random(seed)
    fake.seed_instance(seed)
    people, words, corpora = make_people(rng, fake), [fake.word() for _ in range(800)], {}
    for size in sizes:
        maildir = folder / f"maildir-{size}"
        for number in range(size):
            # 500 messages per folder, named as in the corpus: 1. 2. …
            mailbox = maildir / f"user-{number // 2000}" / f"folder-{number // 500 % 4}"
            if number % 500 == 0:
                mailbox.mkdir(parents=True)
            (mailbox / f"{number % 500 + 1}.").write_bytes(make_message(rng, people, words, number))
        archive = folder / f"maildir-{size}.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=6, format=tarfile.GNU_FORMAT) as tar:
            tar.add(maildir, maildir.name)
        corpora["folder", size], corpora["tar.gz", size] = maildir, archive
    return corpora


def measure(source: Path, output: Path, workers: int) -> dict:
    """{'speed': messages per wall second incl. startup, 'cpu': messages per CPU second, 'bytes': peak, 'rows'}."""
    script = [sys.executable, str(ROOT / "data/enron/prepare.py"), "--input", str(source), "--output", str(output)]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([*script, "--workers", str(workers), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    counts = json.loads((output.parent / "run_prepare.json").read_text(encoding="utf-8"))["counts"]
    return {
        "speed": counts["messages"] / seconds,
        "cpu": counts["messages"] / cpu,
        "bytes": counts["peak_bytes"],
        "rows": counts["rows"],
    }


def run(args) -> list[dict]:
    results = []
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        corpora = make_corpora(Path(folder), args.messages, args.seed)
        load = os.getloadavg()[0]
        print(f"{len(os.sched_getaffinity(0))} cores, load {load:.1f} at the start, {args.workers} workers")
        print(f"{'input':>8} {'messages':>9} {'rows':>7} {'messages/s':>11} {'per CPU second':>15} {'peak MB':>8}")
        for (form, size), source in corpora.items():
            runs = [measure(source, Path(folder, "out", "rows.jsonl"), args.workers) for _ in range(args.runs)]
            median = {key: statistics.median(measured[key] for measured in runs) for key in runs[0]}
            results.append({"form": form, "messages": size, **median})
            numbers = f"{median['speed']:>11,.0f} {median['cpu']:>15,.0f} {median['bytes'] / 1e6:>8,.0f}"
            print(f"{form:>8} {size:>9,} {median['rows']:>7,.0f} {numbers}", flush=True)
    small, large = args.messages
    for form in ("folder", "tar.gz"):
        of_small, of_large = (
            next(line for line in results if (line["form"], line["messages"]) == (form, n)) for n in (small, large)
        )
        verdict = "reached" if of_large["speed"] >= GOAL else "missed"
        print(f"{form}: memory × {of_large['bytes'] / of_small['bytes']:.2f} for messages × {large / small:.1f}")
        print(
            f"{form}: goal of {GOAL:,} messages/s {verdict} at load {os.getloadavg()[0]:.1f}; "
            f"on two idle cores, by CPU time: about {2 * of_large['cpu']:,.0f}"
        )
    return results


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.messages[0] >= args.messages[1]:
        raise UserError("--messages: the second size must be above the first")
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
