"""The inputs of data/enron/prepare.py: which files are mail, and batches of mail for the worker processes."""

import contextlib
import hashlib
import multiprocessing
import os
import re
import stat
import tarfile
import zlib
from codecs import BOM_UTF8
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common import results
from common.problems import UserError
from common.process import end_with_parent
from data.enron.mail import read_mails
from data.enron.pairs import Best, best_pairs

BATCH_MAILS = 256
BATCH_BYTES = 4 << 20
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHER_ENDING = re.compile(r"\.[A-Za-z]{1,5}\d?$")  # .json, .html, .mp3: not mail

# file names (from a folder), or (label, bytes) of mails (from anything else)
Batch = list[str] | list[tuple[str, bytes]]
Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
T = TypeVar("T")


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
        raise UserError(f"--input {path}: no such file or folder")
    try:
        with open(path, "rb") as file:
            start = file.read(8).removeprefix(BOM_UTF8)[:5]
        with contextlib.suppress(EOFError, zlib.error):
            if tarfile.is_tarfile(path):
                return "tar"
    except OSError as error:
        raise UserError(f"--input {path}: cannot be read ({error.strerror})") from None
    if path.name.lower().endswith(TAR_ENDINGS):
        raise UserError(f"--input {path}: not a readable tar archive (damaged, or another format)")
    if start == b"From ":
        return "mbox"
    if is_mail_name(path.name):
        return "mail"
    raise UserError(f"--input {path}: neither a folder, a tar archive, an mbox nor a .eml or .txt message")


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


def walk(folder: Path, skipped: Counter[str]) -> Iterator[str]:
    """The files below `folder` that may be mail, sorted; counts the others in `skipped`."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"--input {error.filename}: cannot be listed ({error.strerror}); fix its permissions")

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


def tar_mails(path: Path, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """(member name, bytes) of every mail in a tar archive, in one sequential pass."""
    with tarfile.open(path, "r|*") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every header in memory
            if not member.isreg():
                continue
            if is_mail_name(os.path.basename(member.name)):
                content = archive.extractfile(member)
                assert content is not None  # it is a regular file
                yield from read_mails(content, member.name)
            else:
                skipped["files that are no messages by their name"] += 1


def batches(path: Path, kind: str, skipped: Counter[str]) -> Iterator[Batch]:
    """What the workers read, in pieces."""
    if kind == "folder":
        files: list[str] = []
        for file in walk(path, skipped):
            files.append(file)
            if len(files) == BATCH_MAILS:
                yield files
                files = []
        if files:
            yield files
        return
    batch: list[tuple[str, bytes]] = []
    size, n = 0, 0
    try:
        with contextlib.ExitStack() as stack:
            if kind == "tar":
                mails = tar_mails(path, skipped)
            else:
                mails = read_mails(stack.enter_context(open(path, "rb")), path.name)
            for label, raw in mails:
                batch.append((label, raw))
                size, n = size + len(raw), n + 1
                if len(batch) == BATCH_MAILS or size > BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    except TAR_ERRORS as error:
        raise UserError(f"--input {path}: damaged after {n:,} messages ({error}); fetch or copy it again") from None
    if batch:
        yield batch


def read_batch(
    batch: Batch, seed: int, root: str
) -> tuple[dict[bytes, Best], dict[str, int], list[tuple[str, str]], list[bytes]]:
    """A worker's task: `best_pairs` of a batch, plus the SHA-256 of every file opened for it."""
    digests: list[bytes] = []

    def mails() -> Iterator[tuple[str, bytes | OSError]]:
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
                    yield from read_mails(file, label)
            except OSError as error:
                yield label, error

    return *best_pairs(mails(), seed), digests


def in_order(function: Callable[..., T], items: Iterable[Arguments], workers: int) -> Iterator[tuple[Arguments, T]]:
    """(item, function(*item)) in input order, computed by `workers` processes with a bounded number in flight."""
    if workers == 1:
        for item in items:
            yield item, function(*item)
        return
    pending: deque[tuple[Arguments, Future[T]]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        for item in items:
            pending.append((item, pool.submit(function, *item)))
            if len(pending) > 2 * workers:
                item, future = pending.popleft()
                yield item, future.result()
        for item, future in pending:
            yield item, future.result()


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


def add_file(digest: "hashlib._Hash", name: str, content: bytes) -> None:
    digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
