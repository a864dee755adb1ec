#!/usr/bin/env python3
"""Build enron.jsonl from raw mail: one row per (name, address) pair, with the text before the address and from it on.

python data/enron/prepare.py --input enron_mail_20150507.tar.gz --output data/enron.jsonl   # reads the tar as a stream
python data/enron/prepare.py --input maildir --output data/enron.jsonl --workers 8
python data/enron/prepare.py --input inbox.mbox letters/ one.eml --output mine.jsonl --strict

Inputs: the CMU Enron maildir or its .tar.gz (or any tar; never unpacked), mbox files, folders (recursive) of .eml,
.txt, .mbox, extension-less or number-named messages, single .eml/.txt files. data/enron/mail.py defines an occurrence.

Rows: `gt-name` (First [Middle] Last; 'Last, First' is reordered), `gt-email` (the address as written in that mail, with
its case), `prompt` (the rendered mail before the address: at most 1,024 characters, then at most 200 GPT-2 tokens, or
800 characters without that tokenizer), `continuation` (from the address on, at most 1,600 characters), `row_id`
(position in the file). Pairs that differ only in case are the same. Of a pair's occurrences, one in a body is preferred
to one in a header, which is preferred to one far down a recipient list; a seeded hash of the text breaks ties. People
are shuffled by the seed (pairs that share an address or a name count as one person and stay together), so the
evaluation head and the training rows have the same distribution and no person is in both. The output does not depend on
the order of the input, its form (folder or archive) or --workers.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import resource
import stat
import sys
import tarfile
import tempfile
import time
import zlib
from codecs import BOM_UTF8
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import cli, dataset, results
from data.enron import mail

BATCH_MAILS = 256
BATCH_BYTES = 4 << 20
PROMPT_TOKENS = 200
PROMPT_CHARACTERS = 800  # without a tokenizer
MAX_SURNAMES = 2  # an address used with more different last names is a list or a role
MIN_ROWS = 3
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHER_ENDING = re.compile(r"\.[A-Za-z]{1,5}\d?$")  # .json, .html, .mp3: not mail


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The flags of data/enron/prepare.py."""

    input: tuple[str, ...]
    output: str = "./data/enron.jsonl"
    tokenizer: str = "gpt2"
    workers: int = 0
    strict: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Build rows of name, address and text from raw mail (Enron maildir or tar.gz, mbox, folders of messages).",
        "python data/enron/prepare.py --input enron_mail_20150507.tar.gz --output data/enron.jsonl",
        PrepareConfig,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        metavar="PATH",
        required=True,
        help="folders, tar archives, mbox files, single messages; repeatable (default: none, required)",
    )
    parser.add_argument("--output", metavar="FILE", help="the .jsonl file to write")
    parser.add_argument(
        "--tokenizer",
        help=f"cuts prompts to {PROMPT_TOKENS} tokens: a hub name in the local cache or a folder with tokenizer.json; "
        f"with 'none', or if gpt2 is not cached, prompts are cut to {PROMPT_CHARACTERS} characters",
    )
    parser.add_argument("--workers", type=cli.non_negative_int, help="processes; 0: one per core")
    parser.add_argument("--strict", action="store_true", help="fail if a message is malformed")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed for choosing occurrences and shuffling people")
    return parser


def is_mail_name(name: str) -> bool:
    """Whether the name is one of mail: .eml, .txt, .mbox, no extension ('inbox') or numbered ('1.', '00001.7c53…',
    '1034.M5P6.host:2,S')."""
    if name.startswith("."):
        return False
    lower = name.lower()
    if lower.endswith((".eml", ".txt", ".mbox")) or "." not in name.rstrip("."):
        return True
    return name[0].isdigit() and not OTHER_ENDING.search(name)


def kind_of(path: Path) -> str:
    """'folder', 'tar', 'mbox' or 'mail'; UserError if it is none of them or cannot be read."""
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise cli.UserError(f"--input {path}: no such file or folder")
    try:
        with open(path, "rb") as file:
            start = file.read(8).removeprefix(BOM_UTF8)[:5]
        with contextlib.suppress(EOFError, zlib.error):
            if tarfile.is_tarfile(path):
                return "tar"
    except OSError as error:
        raise cli.UserError(f"--input {path}: cannot be read ({error.strerror})") from None
    if path.name.lower().endswith(TAR_ENDINGS):
        raise cli.UserError(f"--input {path}: not a readable tar archive (damaged, or another format)")
    if start == b"From ":
        return "mbox"
    if is_mail_name(path.name):
        return "mail"
    raise cli.UserError(f"--input {path}: neither a folder, a tar archive, an mbox nor a .eml or .txt message")


def is_file_within(path: str, folder: Path) -> bool:
    """False for pipes and devices, which would hang a reader, and for links out of the folder. An inaccessible file
    counts as one: opening it reports the error."""
    real = os.path.realpath(path)
    if not real.startswith(os.path.join(os.path.realpath(folder), "")):
        return False
    try:
        return stat.S_ISREG(os.stat(real).st_mode)
    except OSError:
        return True


def walk(folder: Path, skipped: Counter) -> Iterator[str]:
    """The files below `folder` that may be mail, sorted; counts the others in `skipped`."""

    def refuse(error: OSError):
        raise cli.UserError(f"--input {error.filename}: cannot be listed ({error.strerror}); fix its permissions")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            if not is_file_within(path, folder):
                skipped["pipes, devices and links out of the folder"] += 1
            elif is_mail_name(name):
                yield path
            else:
                skipped["files that are no messages by their name"] += 1


def tar_mails(path: Path, skipped: Counter) -> Iterator[tuple[str, bytes]]:
    """(member name, bytes) of every mail in a tar archive, in one sequential pass."""
    with tarfile.open(path, "r|*") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # otherwise tarfile keeps every header in memory
            if not member.isreg():
                continue
            if is_mail_name(os.path.basename(member.name)):
                yield from mail.read_mails(archive.extractfile(member), member.name)
            else:
                skipped["files that are no messages by their name"] += 1


def batches(path: Path, kind: str, skipped: Counter) -> Iterator[list]:
    """Batches for the workers: lists of file names (from a folder) or of (label, bytes) (from anything else)."""
    if kind == "folder":
        batch = []
        for file in walk(path, skipped):
            batch.append(file)
            if len(batch) == BATCH_MAILS:
                yield batch
                batch = []
        if batch:
            yield batch
        return
    batch, size, n = [], 0, 0
    try:
        with contextlib.ExitStack() as stack:
            if kind == "tar":
                mails = tar_mails(path, skipped)
            else:
                mails = mail.read_mails(stack.enter_context(open(path, "rb")), path.name)
            for label, raw in mails:
                batch.append((label, raw))
                size, n = size + len(raw), n + 1
                if len(batch) == BATCH_MAILS or size > BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    except TAR_ERRORS as error:
        raise cli.UserError(f"--input {path}: damaged after {n:,} messages ({error}); fetch or copy it again") from None
    if batch:
        yield batch


def read_batch(batch: list, seed: int, root: str) -> tuple[dict, dict, list, list[bytes]]:
    """A worker's task: `mail.best_pairs` of a batch, plus the SHA-256 of every file opened for it."""
    digests = []

    def mails():
        for item in batch:
            if not isinstance(item, str):
                yield item
                continue
            label = os.path.relpath(item, root)
            digests.append(b"")  # stays empty if the file cannot be read
            try:
                with open(item, "rb") as file:
                    digests[-1] = hashlib.file_digest(file, "sha256").digest()
                    file.seek(0)
                    yield from mail.read_mails(file, label)
            except OSError as error:
                yield label, error

    return *mail.best_pairs(mails(), seed), digests


def in_order(function, items: Iterable, workers: int) -> Iterator[tuple]:
    """(item, function(*item)) in input order, computed by `workers` processes with a bounded number in flight."""
    if workers == 1:
        for item in items:
            yield item, function(*item)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    pending = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=cli.end_with_parent) as pool:
        for item in items:
            pending.append((item, pool.submit(function, *item)))
            if len(pending) > 2 * workers:
                item, future = pending.popleft()
                yield item, future.result()
        for item, future in pending:
            yield item, future.result()


class Pairs:
    """The best occurrence of every pair so far. Texts are kept in an unnamed temporary file, so memory grows by a few
    hundred bytes per distinct pair, not with the amount of mail."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self.held: dict[bytes, tuple[bytes, int]] = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def add(self, best: dict[bytes, tuple]) -> None:
        self.file.seek(0, os.SEEK_END)
        for key, (rank, *fields) in best.items():
            if key not in self.held or rank < self.held[key][0]:
                self.held[key] = (rank, self.file.tell())
                self.file.write(json.dumps(fields).encode() + b"\n")

    def read(self, key: bytes) -> tuple[str, str, str, str]:
        """(name, address, prompt, continuation)."""
        self.file.seek(self.held[key][1])
        return tuple(json.loads(self.file.readline()))


def shared_addresses(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """Addresses (lower case) that occur with more than MAX_SURNAMES different last names."""
    surnames = {}
    for name, address in pairs:
        surnames.setdefault(address.lower(), set()).add(name.casefold().split()[-1])
    return {address for address, names in surnames.items() if len(names) > MAX_SURNAMES}


def group_people(pairs: dict[bytes, tuple[str, str]]) -> list[list[bytes]]:
    """Group the keys of pairs that share an address or a name, directly or through others (connected components)."""
    parent = {key: key for key in pairs}

    def root(key: bytes) -> bytes:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    first = {}
    for key, (name, address) in pairs.items():
        for label in (name.casefold(), address.lower()):  # cannot collide: only addresses contain an @
            parent[root(key)] = root(first.setdefault(label, key))
    groups = {}
    for key in pairs:
        groups.setdefault(root(key), []).append(key)
    return list(groups.values())


def shuffled(groups: list[list[bytes]], seed: int, head: int) -> list[bytes]:
    """All keys in an order that depends only on the keys and the seed, keeping groups together.

    A group that would straddle position `head` is moved after it, as long as other groups can fill the gap.
    """

    def hashed(key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=16, key=str(seed).encode()).digest()

    ordered = sorted((sorted(group, key=hashed) for group in groups), key=lambda group: hashed(min(group)))
    first, rest = [], []
    for group in ordered:
        (first if len(first) + len(group) <= head else rest).extend(group)
    return first + rest


def load_tokenizer(name: str):
    """A `tokenizers.Tokenizer` from a folder or the local hub cache (never the network); None to cut by characters."""
    if name == "none":
        return None
    from tokenizers import Tokenizer

    file = Path(name) / "tokenizer.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        names = ("gpt2", "openai-community/gpt2") if name == "gpt2" else (name,)
        with contextlib.suppress(HFValidationError):
            cached = (try_to_load_from_cache(repository, "tokenizer.json") for repository in names)
            file = next((path for path in cached if isinstance(path, str)), None)
            if file is None and name == "gpt2":
                return None
        if not isinstance(file, str):
            raise cli.UserError(
                f"--tokenizer {name}: no tokenizer.json there or in the local hub cache; download it, or use 'none'"
            )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise cli.UserError(f"--tokenizer {name}: {file} cannot be read ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def last_tokens(prompts: list[str], tokenizer) -> list[str]:
    """The end of each prompt: its last 200 tokens, or its last 800 characters without a tokenizer."""
    if tokenizer is None:
        return [prompt[-PROMPT_CHARACTERS:] for prompt in prompts]
    ends = []
    for prompt, encoding in zip(prompts, tokenizer.encode_batch(prompts, add_special_tokens=False)):
        starts = [start for start, _ in encoding.offsets]
        first = max(0, len(starts) - PROMPT_TOKENS)
        while 0 < first < len(starts) - 1 and starts[first] == starts[first - 1]:  # inside a multi-byte character
            first += 1
        ends.append(prompt[starts[first] :] if first else prompt)
    return ends


def check(config: PrepareConfig) -> tuple[list[tuple[Path, str]], object, dict, bool]:
    """([(input, kind)], tokenizer, settings for the manifest, whether the output already exists); problems with the
    arguments and files raise one UserError."""
    problems = cli.Problems()
    inputs = [(Path(path), problems.absorb(kind_of, Path(path))) for path in config.input]
    output = Path(config.output)
    cli.check_output_file(output, ".jsonl", problems, config.input)
    tokenizer = problems.absorb(load_tokenizer, config.tokenizer)
    settings = None
    if not problems.lines:
        known = output.exists() and not config.overwrite  # otherwise there is nothing to compare with
        hashes = [input_sha256(path, kind) for path, kind in inputs] if known else None
        cut = None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        settings = dataset.settings_of(config, ("output", "workers"), input=hashes, tokenizer=cut)
    finished = problems.absorb(dataset.finished, [("--output", output)], settings, config.overwrite)
    problems.check()
    return inputs, tokenizer, settings, finished


def input_sha256(path: Path, kind: str) -> str:
    """SHA-256 of a file; for a folder, over the name and the SHA-256 of each file that may be mail."""
    if kind != "folder":
        return results.sha256(path)
    digest = hashlib.sha256()
    for file in walk(path, Counter()):
        add_file(digest, os.path.relpath(file, path), file_digest(file))
    return digest.hexdigest()


def file_digest(file: str) -> bytes:
    """SHA-256 of a file, or b"" if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return b""


def add_file(digest, name: str, content: bytes) -> None:
    digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)


def progress(items: Iterable[tuple], done: Counter) -> Iterator[tuple]:
    """Pass the items on, showing a progress bar on a terminal, else a line every 30 seconds."""
    from tqdm import tqdm

    begun = reported = time.monotonic()
    with tqdm(unit=" messages", disable=not sys.stderr.isatty()) as bar:
        for item in items:
            yield item
            bar.update(done["messages"] - bar.n)
            if bar.disable and time.monotonic() - reported > 30:
                reported = time.monotonic()
                print(f"{done['messages']:,} messages, {done['messages'] / (reported - begun):,.0f}/s", file=sys.stderr)


def collect(inputs: list[tuple[Path, str]], pairs: Pairs, workers: int, seed: int):
    """Read every input into `pairs`; return (counts, broken mails, manifest sources)."""
    counts, skipped, broken = Counter(), Counter(), []
    total = [0] * len(inputs)
    digests = [hashlib.sha256() if kind == "folder" else None for _, kind in inputs]
    owner = deque()  # input number of each batch in flight

    def jobs():
        for number, (path, kind) in enumerate(inputs):
            for batch in batches(path, kind, skipped):
                owner.append(number)
                yield batch, seed, str(path)

    for (batch, _, root), (best, numbers, more_broken, hashes) in progress(
        in_order(read_batch, jobs(), workers), counts
    ):
        number = owner.popleft()
        pairs.add(best)
        counts.update(numbers)
        broken += more_broken
        total[number] += numbers["messages"]
        for file, digest in zip(batch, hashes):
            add_file(digests[number], os.path.relpath(file, root), digest)
    counts.update(skipped)
    empty = [f"--input {path}: contains no messages" for (path, _), n in zip(inputs, total) if n == 0]
    if empty:
        raise cli.UserError(*empty)
    sources = [
        (path, n, *([digest.hexdigest()] if digest else [])) for (path, _), n, digest in zip(inputs, total, digests)
    ]
    return counts, broken, sources


def write_rows(file, pairs: Pairs, keys: list[bytes], head: int, tokenizer) -> int:
    """Write one row per key; return how many addresses of the first `head` rows occur in the text of the others."""
    head_addresses, seen = set(), set()
    for start in range(0, len(keys), 1000):
        names, addresses, prompts, continuations = zip(*map(pairs.read, keys[start : start + 1000]))
        prompts = last_tokens(list(prompts), tokenizer)
        for index, fields in enumerate(zip(names, addresses, prompts, continuations), start):
            row = dict(zip(("gt-name", "gt-email", "prompt", "continuation"), fields))
            file.write(results.dumps({**row, "row_id": index}) + "\n")
            if index < head:
                head_addresses.add(row["gt-email"].lower())
            else:
                seen.update(address.lower() for address in mail.addresses(row["prompt"] + row["continuation"]))
    return len(head_addresses & seen)


def run(config: PrepareConfig) -> dict:
    """Build the file; return the counts, which are also printed and written to run_prepare.json; {} if it is there."""
    output = Path(config.output)
    with results.output_file(output, dry_run=config.dry_run) as locked:
        inputs, tokenizer, settings, finished = check(config)
        if finished:
            dataset.say_finished(output)
            return {}
        if config.dry_run:
            print(f"would read {', '.join(f'{path} ({kind})' for path, kind in inputs)} and write {output}")
            return {}
        return build(config, inputs, tokenizer, settings, locked)


def build(
    config: PrepareConfig, inputs: list[tuple[Path, str]], tokenizer, settings: dict, locked: results.Output
) -> dict:
    output = Path(config.output)
    workers = config.workers or (os.cpu_count() or 1)
    files = [path for path, kind in inputs if kind != "folder"]
    cut = f"{PROMPT_CHARACTERS} characters" if tokenizer is None else f"{PROMPT_TOKENS} tokens of {config.tokenizer}"
    record = results.Run(output.parent / "run_prepare.json", config, inputs=files, output=locked)
    with Pairs(output.parent) as pairs:
        started = time.monotonic()
        counts, broken, sources = collect(inputs, pairs, workers, config.seed)
        lines = [f"broken message {label}: {reason}" for label, reason in broken]
        cli.report_broken("messages", lines, len(lines), config.strict)
        people = {key: pairs.read(key)[:2] for key in pairs.held}
        shared = shared_addresses(people.values())
        kept = {key: pair for key, pair in people.items() if pair[1].lower() not in shared}
        if len(kept) < MIN_ROWS:
            raise cli.UserError(
                f"--input: only {len(kept)} pairs of a name and an address found; at least {MIN_ROWS} are needed"
            )
        head = min(dataset.HEAD_ROWS, len(kept) // 3)
        groups = group_people(kept)
        keys = shuffled(groups, config.seed, head)
        row_of = {key: index for index, key in enumerate(keys)}
        both = sum(min(map(row_of.get, group)) < head <= max(map(row_of.get, group)) for group in groups)
        with record:  # opened only now, so that rejected inputs do not replace the record of an existing output
            with record.files.open(output, permissions=0o600) as file:
                overlap = write_rows(file, pairs, keys, head, tokenizer)
            sampling = {
                "seed": config.seed,
                "prompt": f"at most {mail.MAX_PROMPT_CHARACTERS} characters, then {cut}",
                "continuation": f"at most {mail.MAX_CONTINUATION_CHARACTERS} characters",
            }
            dataset.write_manifest(
                record.files,
                output,
                tag="original",
                script="data/enron/prepare.py",
                argv=sys.argv,
                rows=len(keys),
                source=sources,
                split_start=head,
                sampling=sampling,
                settings=settings
                | {"input": [known[0] if known else results.sha256(path) for path, _, *known in sources]},
            )
            seconds = time.monotonic() - started
            largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
            result = {
                **counts,
                "duplicates": counts["named"] - len(people),
                "pairs": len(people),
                "pairs of shared addresses": len(people) - len(kept),
                "rows": len(keys),
                "people": len(groups),
                "people on both sides of the split": both,
                "head addresses in training rows": overlap,
                "prompt cut": cut,
                "workers": workers,
                "peak_bytes": results.peak_memory()["cpu_bytes"] + (workers * largest_worker if workers > 1 else 0),
                "messages_per_s": round(counts["messages"] / seconds, 1),
            }
            record["counts"] = result
            record["sources"] = [{"path": str(path), "messages": n} for path, n, *_ in sources]
    report(result, output, head)
    return result


def report(result: dict, output: Path, head: int) -> None:
    def line(number, words: str) -> None:
        print(f"{number:>12,}  {words}")

    line(result["messages"], "messages")
    line(result["broken"], "broken")
    line(result["without"], "without a usable name–address pair")
    reasons = sorted((key for key in result if key.startswith("dropped: ")), key=lambda key: -result[key])
    for key in reasons:
        line(result[key], key)
    line(result["named"], "occurrences of a name with its address")
    line(result["duplicates"], "dropped: repeated pairs")
    line(result["pairs of shared addresses"], f"pairs dropped: address used with more than {MAX_SURNAMES} last names")
    if "files that are no messages by their name" in result:
        line(result["files that are no messages by their name"], "files skipped: name is not that of a message")
    line(result["rows"], f"rows of {result['people']:,} people in {output}")
    line(head, "of them in the evaluation head")
    line(result["people on both sides of the split"], "people in both the head and the training rows")
    line(result["head addresses in training rows"], "head addresses that occur in the text of training rows")
    print(f"prompts cut to {result['prompt cut']}")
    speed, memory = result["messages_per_s"], result["peak_bytes"] / 1e6
    print(f"{speed:,.0f} messages/s with {result['workers']} workers, peak memory {memory:,.0f} MB")


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
