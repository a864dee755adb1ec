"""The record of a run, next to its result files: arguments, inputs, versions, how it ended.

How a script writes its output:

    with locks.output_folder(folder, dry_run=args.dry_run) as output:         # or output_file(path, key_file, …)
        …checks that look at existing files…                                  # locked: nobody else changes them
        with results.Run(folder / "run_x.json", args, inputs, world, output=output) as run:
            run.files.write_jsonl(folder / "results.jsonl", lines)            # hidden until the block succeeds

`run.files` is a `Publication`: its files and the run's record are renamed into place together.
"""

import contextlib
import hashlib
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from common.json_files import read_json
from common.problems import AnyPath, UserError
from common.publication import write_json
from common.sources import data_files
from common.strict_json import plain

if TYPE_CHECKING:
    from common.distributed import World
    from common.locks import Output
    from common.publication import Publication

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "scikit-learn", "rapidfuzz")


@cache
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: AnyPath) -> str:
    """SHA-256 of a file, hexadecimal; of several files (`sources.data_files`), over their digests in order. Cached
    until a size or a modification time changes."""
    digests = []
    for file in data_files(path):
        status = os.stat(file)
        digests.append(_sha256(str(file.resolve()), status.st_size, status.st_mtime_ns))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@cache
def commit() -> dict[str, Any]:
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
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process and, with a GPU, peak allocated bytes on it."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def finished(
    record_file: AnyPath,
    outputs: Sequence[AnyPath],
    args: object,
    inputs: Iterable[AnyPath],
    overwrite: bool,
    **more: object,
) -> bool:
    """Whether an earlier run of the same script made `outputs` from the same arguments and inputs, successfully.

    more: what else its record must say. UserError for each existing output that was made differently, unless
    `overwrite`.
    """
    existing = [path for path in map(Path, outputs) if path.exists()]
    if overwrite or not existing:
        return False
    try:
        record = read_json(record_file, "") if Path(record_file).is_file() else {}
        free = {"overwrite", "dry_run", "output_dir"}
        ours, theirs = ({k: v for k, v in x.items() if k not in free} for x in (plain(vars(args)), record["args"]))
        hashes = [entry["sha256"] for entry in record["inputs"]]
        same = record["status"] == "ok" and theirs == ours and hashes == [sha256(file) for file in inputs]
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        same = False
    if same and len(existing) == len(outputs) and all(record.get(key) == plain(value) for key, value in more.items()):
        print(f"{record_file}: already finished with the same inputs and settings; nothing to do")
        return True
    raise UserError(
        *(f"--output_dir: {path} exists; give --overwrite to replace it, or another directory" for path in existing)
    )


class Run:
    """`run.json` / `run_<script>.json`: status 'running', then 'ok' or 'failed' when the block ends.

    with Run(path, args, inputs=[file, …], world=world, output=output) as run:
        run["tokens"] = 123          # anything worth recording
        run.files.write_json(…)      # with an `Output`: published together with the record if the block succeeds
    A block that succeeds but sets run["error"] is 'failed' too. Only rank 0 writes. `args` is the parsed namespace or
    configuration; environment variables are never recorded.
    """

    def __init__(
        self,
        path: AnyPath,
        args: object,
        inputs: Iterable[AnyPath] = (),
        world: "World | None" = None,
        output: "Output | None" = None,
        **more: object,
    ) -> None:
        self.path, self.world = Path(path), world
        self._files = output.publication() if output else None
        self.started = time.monotonic()
        versions = {}
        for package in PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        self.record: dict[str, Any] = {
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

    @property
    def files(self) -> "Publication":
        """Files published together with the record. ValueError without an `Output`."""
        if self._files is None:
            raise ValueError(f"{self.path}: a run without an output publishes no files")
        return self._files

    def __setitem__(self, key: str, value: object) -> None:
        self.record[key] = value

    def __getitem__(self, key: str) -> Any:
        return self.record[key]

    def write(self) -> None:
        """Write the record as it stands (rank 0)."""
        if self.world is None or self.world.main:
            write_json(self.path, self.record)

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.record["end"] = now()
        self.record["seconds"] = round(time.monotonic() - self.started, 3)
        self.record["peak_memory"] = peak_memory()
        if kind is not None:
            self.record["error"] = f"{kind.__name__}: {error}"
        self.record["status"] = "failed" if "error" in self.record else "ok"
        main = self.world is None or self.world.main
        if kind is None and self._files and main:
            self._files.write_json(self.path, self.record)
            self._files.commit()
            return
        if self._files:
            self._files.discard()
        self.write()
