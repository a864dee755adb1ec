"""What is to be read and written: inputs, tokenizer and settings, all checked before any mail is read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import manifests
from common.problems import Problems, check_output_file
from data.enron.config import PrepareConfig
from data.enron.inputs import input_sha256, kind_of
from data.enron.prompts import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Task:
    """inputs: (path, kind) of each; settings: those of the manifest; finished: the output is there already."""

    inputs: list[tuple[Path, str]]
    tokenizer: "Tokenizer | None"
    settings: dict[str, Any]
    finished: bool


def check(config: PrepareConfig) -> Task:
    """Read and check every argument and file. UserError with all problems."""
    problems = Problems()
    kinds = [problems.absorb(kind_of, Path(path)) for path in config.input]
    inputs = [(Path(path), kind) for path, kind in zip(config.input, kinds) if kind]
    output = config.output_file
    check_output_file(output, ".jsonl", problems, config.input)
    tokenizer = problems.absorb(load_tokenizer, config.tokenizer)
    settings: dict[str, Any] | None = None
    if not problems.lines:
        known = output.exists() and not config.overwrite  # otherwise there is nothing to compare with
        hashes = [input_sha256(path, kind) for path, kind in inputs] if known else None
        cut = None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        settings = manifests.settings_of(config, ("output", "workers"), input=hashes, tokenizer=cut)
    finished = problems.absorb(manifests.finished, [("--output", output)], settings, config.overwrite)
    problems.check()
    assert settings is not None
    return Task(inputs, tokenizer, settings, bool(finished))
