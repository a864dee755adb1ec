#!/usr/bin/env python3
"""Raw mail → enron.jsonl: one row a (name, address) pair, with the text before the address and from it on.

python data/enron/prepare.py --input enron_mail_20150507.tar.gz --output data/enron.jsonl   # read as a stream
python data/enron/prepare.py --input maildir --output data/enron.jsonl --workers 8
python data/enron/prepare.py --input inbox.mbox letters/ one.eml --output mine.jsonl --strict

Inputs: the CMU Enron maildir or its .tar.gz (any tar; never unpacked), mbox files, folders (recursive) of .eml, .txt,
.mbox, extension-less or number-named messages, single .eml/.txt files. What an occurrence is: data/enron/mail.py.

Rows: `gt-name` (First [Middle] Last, 'Last, First' turned), `gt-email` (the address as written in that mail, upper
and lower case kept), `prompt` (the rendered mail before the address: at most 1,024 characters, then at most 200 GPT-2
tokens, or 800 characters without that tokenizer), `continuation` (from the address on, at most 1,600 characters),
`row_id` (position in the file). Pairs that differ only in case are one. Of a pair's occurrences one in a body is
preferred to one in a header, and that to one far down a list of recipients; among equals a seeded hash of the text
decides. People are shuffled by the seed (pairs that share an address or a name are one person, and keep together), so
the evaluation head and the training rows have one distribution and no person stands on both sides. So the file does
not depend on the order of the input, on its form (folder or archive) or on --workers.
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
PROMPT_CHARACTERS = 800  # where no tokenizer is at hand
MAX_SURNAMES = 2  # an address with more different last names is a list or a role
MIN_ROWS = 3
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHER_ENDING = re.compile(r"\.[A-Za-z]{1,5}\d?$")  # .json, .html, .mp3: not a mail's


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
        "Raw mail (Enron maildir or its tar.gz, mbox, folders of messages) to rows of name, address and text.",
        "python data/enron/prepare.py --input enron_mail_20150507.tar.gz --output data/enron.jsonl",
        PrepareConfig,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        metavar="PATH",
        required=True,
        help="folders, tar archives, mbox files, single messages; also several times (default: none, required)",
    )
    parser.add_argument("--output", metavar="FILE", help="the .jsonl file to write")
    parser.add_argument(
        "--tokenizer",
        help=f"cuts prompts to {PROMPT_TOKENS} tokens: a hub name found in the local cache or a folder with "
        f"tokenizer.json; gpt2 when not cached, and 'none': cut to {PROMPT_CHARACTERS} characters",
    )
    parser.add_argument("--workers", type=cli.non_negative_int, help="processes; 0: one a core")
    parser.add_argument("--strict", action="store_true", help="fail when a message is broken")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed of the choice of occurrences and the order")
    return parser


# ---------------------------------------------------------------- finding the mails


def is_mail_name(name: str) -> bool:
    """By its name: .eml, .txt, .mbox, no extension ('inbox'), numbered ('1.', '00001.7c53…', '1034.M5P6.host:2,S')."""
    if name.startswith("."):
        return False
    lower = name.lower()
    if lower.endswith((".eml", ".txt", ".mbox")) or "." not in name.rstrip("."):
        return True
    return name[0].isdigit() and not OTHER_ENDING.search(name)


def kind_of(path: Path) -> str:
    """'folder', 'tar', 'mbox' or 'mail'. UserError when it is none of them or cannot be read."""
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
        raise cli.UserError(f"--input {path}: not a readable tar archive; it is damaged or something else")
    if start == b"From ":
        return "mbox"
    if is_mail_name(path.name):
        return "mail"
    raise cli.UserError(f"--input {path}: neither a folder, a tar archive, an mbox nor a .eml or .txt message")


def is_file_within(path: str, folder: Path) -> bool:
    """False for pipes and devices, which would hang a reader, and for links out of the folder. What cannot be looked at
    is told of when it is opened."""
    real = os.path.realpath(path)
    if not real.startswith(os.path.join(os.path.realpath(folder), "")):
        return False
    try:
        return stat.S_ISREG(os.stat(real).st_mode)
    except OSError:
        return True


def walk(folder: Path, skipped: Counter) -> Iterator[str]:
    """The files below `folder` that may be mails, sorted; the others are counted."""

    def refuse(error: OSError):
        raise cli.UserError(f"--input {error.filename}: cannot be listed ({error.strerror}); mend its mode")

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
    """(member name, bytes) of every mail in a tar archive, read once from front to back."""
    with tarfile.open(path, "r|*") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile keeps every header it has seen
            if not member.isreg():
                continue
            if is_mail_name(os.path.basename(member.name)):
                yield from mail.read_mails(archive.extractfile(member), member.name)
            else:
                skipped["files that are no messages by their name"] += 1


def batches(path: Path, kind: str, skipped: Counter) -> Iterator[list]:
    """Lists of file names (folder) or of (label, bytes) (everything else), for the workers."""
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
    """The work of a worker: `mail.best_pairs` of a batch, and the SHA-256 of every file in it that was opened here."""
    digests = []

    def mails():
        for item in batch:
            if not isinstance(item, str):
                yield item
                continue
            label = os.path.relpath(item, root)
            digests.append(b"")  # of a file that cannot be read
            try:
                with open(item, "rb") as file:
                    digests[-1] = hashlib.file_digest(file, "sha256").digest()
                    file.seek(0)
                    yield from mail.read_mails(file, label)
            except OSError as error:
                yield label, error

    return *mail.best_pairs(mails(), seed), digests


def in_order(function, items: Iterable, workers: int) -> Iterator[tuple]:
    """(item, function(item)) in the order of the items, in `workers` processes with a bounded number in flight."""
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
    """The best occurrence of every pair so far. Texts lie in an unnamed temporary file, so memory grows by a few
    hundred bytes a distinct pair and not with the mail."""

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


# ---------------------------------------------------------------- people and order


def shared_addresses(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """Addresses (lower case) that stand with more than MAX_SURNAMES different last names."""
    surnames = {}
    for name, address in pairs:
        surnames.setdefault(address.lower(), set()).add(name.casefold().split()[-1])
    return {address for address, names in surnames.items() if len(names) > MAX_SURNAMES}


def group_people(pairs: dict[bytes, tuple[str, str]]) -> list[list[bytes]]:
    """Keys of pairs that share an address or a name, directly or through others (connected components)."""
    parent = {key: key for key in pairs}

    def root(key: bytes) -> bytes:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    first = {}
    for key, (name, address) in pairs.items():
        for label in (name.casefold(), address.lower()):  # only the second has an @
            parent[root(key)] = root(first.setdefault(label, key))
    groups = {}
    for key in pairs:
        groups.setdefault(root(key), []).append(key)
    return list(groups.values())


def shuffled(groups: list[list[bytes]], seed: int, head: int) -> list[bytes]:
    """All keys in an order that depends on the keys and the seed alone, groups kept together.

    A group that would lie across position `head` is put behind it, as long as others can fill the place.
    """

    def hashed(key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=16, key=str(seed).encode()).digest()

    ordered = sorted((sorted(group, key=hashed) for group in groups), key=lambda group: hashed(min(group)))
    first, rest = [], []
    for group in ordered:
        (first if len(first) + len(group) <= head else rest).extend(group)
    return first + rest


# ---------------------------------------------------------------- the prompt's last tokens


def load_tokenizer(name: str):
    """A `tokenizers.Tokenizer` from a folder or the local hub cache (never the network), or None: characters."""
    if name == "none":
        return None
    from tokenizers import Tokenizer

    file = Path(name) / "tokenizer.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        names = ("gpt2", "openai-community/gpt2") if name == "gpt2" else (name,)
        with contextlib.suppress(HFValidationError):
            found = (try_to_load_from_cache(repository, "tokenizer.json") for repository in names)
            file = next((path for path in found if isinstance(path, str)), None)
            if file is None and name == "gpt2":
                return None
        if not isinstance(file, str):
            raise cli.UserError(
                f"--tokenizer {name}: no tokenizer.json there or in the local hub cache; fetch it first, or use 'none'"
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
        while 0 < first < len(starts) - 1 and starts[first] == starts[first - 1]:  # inside a character's bytes
            first += 1
        ends.append(prompt[starts[first] :] if first else prompt)
    return ends


# ---------------------------------------------------------------- the run


def check(config: PrepareConfig) -> tuple[list[tuple[Path, str]], object, dict, bool]:
    """([(input, kind)], tokenizer, settings for the manifest, whether the output stands already); UserError with every
    problem of the arguments and files."""
    problems = cli.Problems()
    inputs = [(Path(path), problems.absorb(kind_of, Path(path))) for path in config.input]
    output = Path(config.output)
    cli.check_output_file(output, ".jsonl", problems, config.input)
    tokenizer = problems.absorb(load_tokenizer, config.tokenizer)
    settings = None
    if not problems.lines:
        known = output.exists() and not config.overwrite  # else nothing is compared, and nothing need be read
        hashes = [input_sha256(path, kind) for path, kind in inputs] if known else None
        cut = None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        settings = dataset.settings_of(config, ("output", "workers"), input=hashes, tokenizer=cut)
    finished = problems.absorb(dataset.finished, [("--output", output)], settings, config.overwrite)
    problems.check()
    return inputs, tokenizer, settings, finished


def input_sha256(path: Path, kind: str) -> str:
    """SHA-256 of a file; of a folder, over the name and the SHA-256 of each file that may be a mail."""
    if kind != "folder":
        return results.sha256(path)
    digest = hashlib.sha256()
    for file in walk(path, Counter()):
        add_file(digest, os.path.relpath(file, path), file_digest(file))
    return digest.hexdigest()


def file_digest(file: str) -> bytes:
    """SHA-256 of a file; b"" of one that cannot be read."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return b""


def add_file(digest, name: str, content: bytes) -> None:
    digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)


def progress(found: Iterable[tuple], done: Counter) -> Iterator[tuple]:
    """Pass on what is found; a bar on a terminal, else a line every 30 seconds."""
    from tqdm import tqdm

    begun = reported = time.monotonic()
    with tqdm(unit=" messages", disable=not sys.stderr.isatty()) as bar:
        for item in found:
            yield item
            bar.update(done["messages"] - bar.n)
            if bar.disable and time.monotonic() - reported > 30:
                reported = time.monotonic()
                print(f"{done['messages']:,} messages, {done['messages'] / (reported - begun):,.0f}/s", file=sys.stderr)


def collect(inputs: list[tuple[Path, str]], pairs: Pairs, workers: int, seed: int):
    """Read every input into `pairs`. Returns (counts, broken mails, manifest sources)."""
    counts, skipped, broken = Counter(), Counter(), []
    total = [0] * len(inputs)
    digests = [hashlib.sha256() if kind == "folder" else None for _, kind in inputs]
    owner = deque()  # input number of each batch under way

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
    empty = [f"--input {path}: no messages in it" for (path, _), n in zip(inputs, total) if n == 0]
    if empty:
        raise cli.UserError(*empty)
    sources = [
        (path, n, *([digest.hexdigest()] if digest else [])) for (path, _), n, digest in zip(inputs, total, digests)
    ]
    return counts, broken, sources


def write_rows(file, pairs: Pairs, keys: list[bytes], head: int, tokenizer) -> int:
    """Write a row a key. Returns how many addresses of the first `head` rows occur in the text of the others."""
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
    """Build the file. Returns the counts that are also printed and kept in run_prepare.json; {} with nothing to do."""
    output = Path(config.output)
    with results.output_file(output, dry_run=config.dry_run) as place:
        inputs, tokenizer, settings, finished = check(config)
        if finished:
            dataset.say_finished(output)
            return {}
        if config.dry_run:
            print(f"would read {', '.join(f'{path} ({kind})' for path, kind in inputs)} and write {output}")
            return {}
        return build(config, inputs, tokenizer, settings, place)


def build(
    config: PrepareConfig, inputs: list[tuple[Path, str]], tokenizer, settings: dict, place: results.Output
) -> dict:
    output = Path(config.output)
    workers = config.workers or (os.cpu_count() or 1)
    files = [path for path, kind in inputs if kind != "folder"]
    cut = f"{PROMPT_CHARACTERS} characters" if tokenizer is None else f"{PROMPT_TOKENS} tokens of {config.tokenizer}"
    record = results.Run(output.parent / "run_prepare.json", config, inputs=files, output=place)
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
                f"--input: only {len(kept)} pairs of a name and an address found; {MIN_ROWS} are needed"
            )
        head = min(dataset.HEAD_ROWS, len(kept) // 3)
        groups = group_people(kept)
        keys = shuffled(groups, config.seed, head)
        place = {key: index for index, key in enumerate(keys)}
        both = sum(min(map(place.get, group)) < head <= max(map(place.get, group)) for group in groups)
        with record:  # from here on something is written: a record of refused inputs would replace that of the file
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
    line(result["without"], "without a usable pair")
    reasons = sorted((key for key in result if key.startswith("dropped: ")), key=lambda key: -result[key])
    for key in reasons:
        line(result[key], key)
    line(result["named"], "occurrences of a name with its address")
    line(result["duplicates"], "dropped: duplicates of a pair")
    line(result["pairs of shared addresses"], f"pairs dropped: address with more than {MAX_SURNAMES} last names")
    if "files that are no messages by their name" in result:
        line(result["files that are no messages by their name"], "files skipped: no messages by their name")
    line(result["rows"], f"rows of {result['people']:,} people in {output}")
    line(head, "of them in the evaluation head")
    line(result["people on both sides of the split"], "people both there and among the training rows")
    line(result["head addresses in training rows"], "addresses of the head that a training row's text mentions")
    print(f"prompts cut to {result['prompt cut']}")
    speed, memory = result["messages_per_s"], result["peak_bytes"] / 1e6
    print(f"{speed:,.0f} messages/s with {result['workers']} workers, peak memory {memory:,.0f} MB")


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
