"""The run of data/enron/prepare.py: read all mail, choose and order the pairs, write rows and manifest."""

import hashlib
import os
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from common import dataset, json_files, locks, manifests, results
from common.problems import UserError, report_broken
from data.enron.config import PROMPT_CHARACTERS, PROMPT_TOKENS, PrepareConfig
from data.enron.inputs import Batch, add_file, batches, in_order, read_batch
from data.enron.names import addresses
from data.enron.occurrences import MAX_CONTINUATION_CHARACTERS, MAX_PROMPT_CHARACTERS
from data.enron.pairs import MAX_SURNAMES, Pairs, group_people, shared_addresses, shuffled
from data.enron.prompts import last_tokens
from data.enron.task import Task, check

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_ROWS = 3

Source = tuple[Path, int, str | None]  # an input, its number of mails, the SHA-256 of a folder
T = TypeVar("T")


def run(config: PrepareConfig) -> dict[str, Any]:
    """Build the file; return the counts, which are also printed and written to run_prepare.json; {} if it is there."""
    output = config.output_file
    with locks.output_file(output, dry_run=config.dry_run) as target:
        task = check(config)
        if task.finished:
            manifests.say_finished(output)
            return {}
        if config.dry_run:
            print(f"would read {', '.join(f'{path} ({kind})' for path, kind in task.inputs)} and write {output}")
            return {}
        return build(config, task, target)


def build(config: PrepareConfig, task: Task, target: locks.Output) -> dict[str, Any]:
    """Read all mail and write the rows and their manifest; the counts."""
    output = config.output_file
    workers = config.workers or (os.cpu_count() or 1)
    files = [path for path, kind in task.inputs if kind != "folder"]
    cut = (
        f"{PROMPT_CHARACTERS} characters" if task.tokenizer is None else f"{PROMPT_TOKENS} tokens of {config.tokenizer}"
    )
    record = results.Run(output.parent / "run_prepare.json", config, inputs=files, output=target)
    with Pairs(output.parent) as pairs:
        started = time.monotonic()
        counts, broken, sources = collect(task.inputs, pairs, workers, config.seed)
        lines = [f"broken message {label}: {reason}" for label, reason in broken]
        report_broken("messages", lines, len(lines), config.strict)
        people = {key: pairs.read(key)[:2] for key in pairs.held}
        shared = shared_addresses(people.values())
        kept = {key: pair for key, pair in people.items() if pair[1].lower() not in shared}
        if len(kept) < MIN_ROWS:
            raise UserError(
                f"--input: only {len(kept)} pairs of a name and an address found; at least {MIN_ROWS} are needed"
            )
        head = min(dataset.HEAD_ROWS, len(kept) // 3)
        groups = group_people(kept)
        keys = shuffled(groups, config.seed, head)
        row_of = {key: index for index, key in enumerate(keys)}
        places = [[row_of[key] for key in group] for group in groups]
        both = sum(min(rows) < head <= max(rows) for rows in places)
        with record:  # opened only now, so that rejected inputs do not replace the record of an existing output
            with record.files.open(output, permissions=0o600) as file:
                overlap = write_rows(file, pairs, keys, head, task.tokenizer)
            sampling = {
                "seed": config.seed,
                "prompt": f"at most {MAX_PROMPT_CHARACTERS} characters, then {cut}",
                "continuation": f"at most {MAX_CONTINUATION_CHARACTERS} characters",
            }
            manifests.write_manifest(
                record.files,
                output,
                tag="original",
                script="data/enron/prepare.py",
                argv=sys.argv,
                rows=len(keys),
                source=sources,
                split_start=head,
                sampling=sampling,
                settings=task.settings | {"input": [known or results.sha256(path) for path, _, known in sources]},
            )
            seconds = time.monotonic() - started
            unit = 1 if sys.platform == "darwin" else 1024
            largest_worker = unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
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
            record["sources"] = [{"path": str(path), "messages": n} for path, n, _ in sources]
    report(result, output, head)
    return result


def collect(
    inputs: list[tuple[Path, str]], pairs: Pairs, workers: int, seed: int
) -> tuple[Counter[str], list[tuple[str, str]], list[Source]]:
    """Read every input into `pairs`; return (counts, broken mails, manifest sources)."""
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    broken: list[tuple[str, str]] = []
    total = [0] * len(inputs)
    digests = [hashlib.sha256() for _ in inputs]  # of the folders' files
    owner: deque[int] = deque()  # input number of each batch in flight

    def jobs() -> Iterator[tuple[Batch, int, str]]:
        for number, (path, kind) in enumerate(inputs):
            for batch in batches(path, kind, skipped):
                owner.append(number)
                yield batch, seed, str(path)

    done = in_order(read_batch, jobs(), workers)
    for (batch, _, root), (best, numbers, more_broken, hashes) in progress(done, counts):
        number = owner.popleft()
        pairs.add(best)
        counts.update(numbers)
        broken += more_broken
        total[number] += numbers["messages"]
        for file, digest in zip(batch, hashes):
            add_file(digests[number], os.path.relpath(str(file), root), digest)
    counts.update(skipped)
    empty = [f"--input {path}: contains no messages" for (path, _), n in zip(inputs, total) if n == 0]
    if empty:
        raise UserError(*empty)
    sources = [
        (path, n, digest.hexdigest() if kind == "folder" else None)
        for (path, kind), n, digest in zip(inputs, total, digests)
    ]
    return counts, broken, sources


def progress(items: Iterable[T], done: Counter[str]) -> Iterator[T]:
    """Pass the items on, showing a progress bar on a terminal, else a line every 30 seconds."""
    begun = reported = time.monotonic()
    with tqdm(unit=" messages", disable=not sys.stderr.isatty()) as bar:
        for item in items:
            yield item
            bar.update(done["messages"] - bar.n)
            if bar.disable and time.monotonic() - reported > 30:
                reported = time.monotonic()
                print(f"{done['messages']:,} messages, {done['messages'] / (reported - begun):,.0f}/s", file=sys.stderr)


def write_rows(file: IO[str], pairs: Pairs, keys: list[bytes], head: int, tokenizer: "Tokenizer | None") -> int:
    """Write one row per key; return how many addresses of the first `head` rows occur in the text of the others."""
    head_addresses: set[str] = set()
    seen: set[str] = set()
    for start in range(0, len(keys), 1000):
        names, emails, prompts, continuations = zip(*map(pairs.read, keys[start : start + 1000]))
        cut = last_tokens(list(prompts), tokenizer)
        for index, fields in enumerate(zip(names, emails, cut, continuations), start):
            row = dict(zip(("gt-name", "gt-email", "prompt", "continuation"), fields))
            file.write(json_files.dumps({**row, "row_id": index}) + "\n")
            if index < head:
                head_addresses.add(row["gt-email"].lower())
            else:
                seen.update(address.lower() for address in addresses(row["prompt"] + row["continuation"]))
    return len(head_addresses & seen)


def report(result: dict[str, Any], output: Path, head: int) -> None:
    """Print the counts."""

    def line(number: int, words: str) -> None:
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
    print(f"rows are in {output}")
