"""What is checked before gigabytes are read: flags, files, and whether there is anything to do."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import manifests, results
from common.problems import Problems, check_writable
from data.amazon.config import PrepareConfig
from data.amazon.lines import damage, is_gzip

MEMORY = re.compile(r"(\d+\.?\d*)\s*([KMGT]i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """settings: those of the manifests; finished: all files are there already."""

    settings: dict[str, Any]
    finished: bool


def check(config: PrepareConfig) -> Task:
    """One UserError with every problem of the arguments and files, or else one with every damaged .gz."""
    problems = Problems()
    inputs = {"--reviews": Path(config.reviews), "--meta": Path(config.meta)}
    check_flags(config, inputs, problems)
    settings: dict[str, Any] | None = None
    if not problems.lines:
        hashes = {flag.removeprefix("--"): results.sha256(path) for flag, path in inputs.items()}
        settings = manifests.settings_of(config, ("output_dir", "threads", "memory_limit"), **hashes)
    named = [("--output_dir", path) for path in config.output_files.values()]
    finished = problems.absorb(manifests.finished, named, settings, config.overwrite)
    problems.check()  # report mistyped flags before reading gigabytes
    assert settings is not None
    if finished:
        return Task(settings, True)
    packed = {flag: path for flag, path in inputs.items() if is_gzip(path)}
    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        for (flag, path), reason in zip(packed.items(), pool.map(damage, packed.values())):
            if reason:
                problems.add(f"{flag} {path}: damaged ({reason}); download it again")
    problems.check()
    return Task(settings, False)


def check_flags(config: PrepareConfig, inputs: dict[str, Path], problems: Problems) -> None:
    """Problems of flags and of files that cannot be opened or written."""
    for flag, path in inputs.items():
        if not path.is_file():
            what = "is a directory, not a file" if path.is_dir() else "no such file"
            problems.add(f"{flag} {path}: {what}; pass a .jsonl or .jsonl.gz file")
            continue
        try:
            is_gzip(path)
        except OSError as error:
            problems.add(f"{flag} {path}: cannot be read ({error.strerror})")
    if os.path.realpath(inputs["--reviews"]) == os.path.realpath(inputs["--meta"]):
        problems.add(f"--meta {config.meta}: the same file as --reviews; pass the meta_… file of the category")
    amount = MEMORY.fullmatch(config.memory_limit.strip())
    if not amount or float(amount[1]) == 0:
        problems.add(f"--memory_limit {config.memory_limit}: expected a number and a unit, e.g. 800MB or 1.2GB")
    for path in config.output_files.values():
        if any(os.path.realpath(path) == os.path.realpath(source) for source in inputs.values()):
            problems.add(f"--output_dir {config.output_dir}: {path} is also an input; choose another directory")
        elif path.is_dir():
            problems.add(f"--output_dir {config.output_dir}: {path} is a directory; remove it or choose another place")
    if "?" in str(Path(config.output_dir).absolute()):
        problems.add(f"--output_dir {config.output_dir}: DuckDB cannot use a path with '?'; choose another directory")
    check_writable(config.output_dir, problems)
