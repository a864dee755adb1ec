"""Result files: complete or absent, with the run that made them beside them."""

import contextlib
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from common.cli import UserError, plain

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "scikit-learn", "rapidfuzz")


@contextlib.contextmanager
def atomic(path, mode: str = "w", permissions: int = 0o644):
    """Open a temporary file in `path`'s directory; on success fsync it and rename it to `path`, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, permissions)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync_folder(folder) -> None:
    """fsync a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(folder):
    """Yield a temporary sibling directory; on success fsync its files and rename it to `folder` (replacing one)."""
    import shutil

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                os.chmod(file, 0o644)
                sync_folder(file)
        os.chmod(temporary, 0o755)
        if folder.exists():
            old = temporary.with_suffix(".old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def dumps(item) -> str:
    """One line of strict JSON; NaN is refused (a bug), infinities become 'inf'."""
    return json.dumps(plain(item), ensure_ascii=False, allow_nan=False)


def write_json(path, item) -> None:
    with atomic(path) as file:
        file.write(json.dumps(plain(item), ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_json(path, remedy: str) -> dict:
    """The JSON object in a file; UserError with `remedy` when it is damaged or another thing."""
    try:
        item = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None
    if not isinstance(item, dict):
        raise UserError(f"{path}: a JSON object was expected; {remedy}")
    return item


def write_jsonl(path, items, permissions: int = 0o644) -> None:
    with atomic(path, permissions=permissions) as file:
        for item in items:
            file.write(dumps(item) + "\n")


def read_jsonl(path) -> list[dict]:
    """Every line of a result file of ours (strict: a broken line raises)."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def append_line(file, item) -> None:
    """Write a line to an open text file so that a power cut does not lose it."""
    file.write(dumps(item) + "\n")
    file.flush()
    os.fsync(file.fileno())


def read_partial(file, settings: dict, overwrite: bool) -> list[dict]:
    """Lines of an unfinished run's hidden file: first {'settings': …}, then one for each finished piece.

    A torn last line does not count. [] when there is no file, or when it is damaged or its settings differ and
    `overwrite` is set; UserError without it.
    """
    file = Path(file)
    try:
        lines = [dict(json.loads(line)) for line in file.read_bytes().split(b"\n")[:-1]] if file.is_file() else []
        differ = [key for key, value in settings.items() if lines and lines[0]["settings"].get(key) != value]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if overwrite:
            return []
        raise UserError(
            f"--output: the unfinished run in {file} is damaged ({error!r}); give --overwrite to discard it"
        ) from None
    if differ and not overwrite:
        raise UserError(
            f"--output: an unfinished run with another {', '.join(differ)} is in {file}; repeat its arguments to "
            "continue it, or give --overwrite to discard it"
        )
    return [] if differ else lines


@cache
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path) -> str:
    """SHA-256 of a file, hexadecimal; cached while size and modification time stay."""
    status = os.stat(path)
    return _sha256(str(Path(path).resolve()), status.st_size, status.st_mtime_ns)


@cache
def commit() -> dict:
    """{'commit': hash or None, 'dirty': bool or None} of this repository."""
    try:
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run(
            ["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head.stdout.strip(), "dirty": bool(state.stdout.strip())}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> dict:
    """Peak resident bytes of this process and, with a GPU, peak allocated bytes on it."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak


class Run:
    """`run.json` / `run_<script>.json`: written as 'running', rewritten as 'ok' or 'failed' when the block ends.

    with Run(path, args, inputs=[file, …], world=world) as run:
        run["tokens"] = 123          # anything worth keeping
    A block that ends well but set run["error"] is 'failed' too. Only rank 0 writes. `args` is the parsed namespace; no
    environment variables are ever recorded.
    """

    def __init__(self, path, args, inputs=(), world=None, **more):
        self.path, self.world = Path(path), world
        self.started = time.monotonic()
        versions = {}
        for package in PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        self.record = {
            "schema": SCHEMA,
            "script": Path(sys.argv[0]).name,
            "argv": sys.argv,
            "args": {key: value for key, value in vars(args).items() if not key.startswith("_")},
            **commit(),
            "python": platform.python_version(),
            "packages": versions,
            "device": world.device if world else "cpu",
            "world_size": world.size if world else 1,
            "seed": getattr(args, "seed", None),
            "inputs": [{"path": str(file), "sha256": sha256(file)} for file in inputs],
            **more,
            "start": now(),
            "end": None,
            "status": "running",
        }

    def __setitem__(self, key, value):
        self.record[key] = value

    def __getitem__(self, key):
        return self.record[key]

    def write(self) -> None:
        if self.world is None or self.world.main:
            write_json(self.path, self.record)

    def __enter__(self):
        self.write()
        return self

    def __exit__(self, kind, error, trace):
        self.record["end"] = now()
        self.record["seconds"] = round(time.monotonic() - self.started, 3)
        self.record["peak_memory"] = peak_memory()
        if kind is not None:
            self.record["error"] = f"{kind.__name__}: {error}"
        self.record["status"] = "failed" if "error" in self.record else "ok"
        self.write()
