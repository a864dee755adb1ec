"""What rows mean: their shapes, validation, prompt templates and the published split.

A row is a dict of one of seven shapes (`shape_of`): 'text', 'chat', 'enron', 'instruction', 'review', 'completion' or
'prompt'.
"""

import math
import os
import sys
from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import chat
from common.formats import read_rows
from common.manifests import check_manifest, manifest_path
from common.problems import AnyPath, UserError, one_line
from common.results import ROOT
from common.rows import Faults, Lazy, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_ROWS = 1110  # evaluation head of the published split (perplexity)
PII_ROWS = 1000  # the first rows of the head, which are attacked

INSTRUCTION_TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
INSTRUCTION_TEMPLATE_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"
REVIEW_FIELDS = ("System prompt", "Rating", "Review Title", "Review", "Product Title", "Product Categories")
REVIEW_TEMPLATE = (
    "{System prompt}\n\nProduct: {Product Title}\nCategories: {Product Categories}\nRating: {Rating}\n{title}Review:"
)


def shape_of(row: Row) -> str | None:
    """The shape of a row, judged by its fields; None if unknown."""
    if "text" in row:
        return "text"
    if chat.is_chat(row):
        return "chat"
    if "gt-name" in row or "gt-email" in row:
        return "enron"
    if "instruction" in row and "output" in row:
        return "instruction"
    if "Review" in row and "Rating" in row:
        return "review"
    if "prompt" in row and "completion" in row:
        return "completion"
    if "prompt" in row and "continuation" in row:
        return "prompt"
    return None


REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "chat": (),  # see `chat.problems_of`
    "enron": ("gt-name", "gt-email", "prompt", "continuation"),
    "instruction": ("instruction", "output"),
    "review": ("Review", "Rating"),
    "completion": ("prompt", "completion"),
    "prompt": ("prompt", "continuation"),
}


def validate(path: AnyPath, rows: Sequence[Row], fields: tuple[str, ...] | None = None) -> str:
    """Check that every row has the (string) fields of its shape, or `fields`; return the file's shape.

    Raises UserError with one line per bad row (the first few; rows count from 0), also for rows of mixed shapes
    (without `fields`), and if the file does not match its manifest.
    """
    check_manifest(path, len(rows))
    note_lost_manifest(path, rows)
    shape, any_shape = shape_of(rows[0]) or "", fields is not None
    if fields is None:
        if not shape:
            known = "; ".join(", ".join(names) or "messages" for names in REQUIRED.values())
            raise UserError(f"{path}: row 0: no known set of fields; expected one of: {known}")
        fields = REQUIRED[shape]
    absent = [field for field in fields if all(row.get(field) is None for row in rows)]
    words = " and ".join(f"'{field}'" for field in absent)
    faults = Faults()
    if absent:
        faults.add(f"{path}: no row has the field {words}; give a file that has it")
    fields = tuple(field for field in fields if field not in absent)
    for index, row in enumerate(rows):
        if not any_shape and (own := shape_of(row) or "") != shape:
            faults.add(f"{path}: row {index}: has the fields of another row type ({own}, row 0: {shape})")
            continue
        for problem in row_problems(row, fields):
            faults.add(f"{path}: row {index}: {problem}")
    faults.check()
    return shape


# optional text fields by row shape: the prompt templates use them
OPTIONAL = {"review": tuple(field for field in REVIEW_FIELDS if field != "Rating"), "instruction": ("input",)}


def row_problems(row: Row, fields: Iterable[str]) -> Iterator[str]:
    """Why a row cannot be used, one line per field, without quoting its text."""
    for field in fields:
        value = row.get(field)
        if value is None:
            yield f"field '{field}' is missing; add it or remove the row"
        elif field == "Rating":
            if not _is_number(value):
                kind = "one with hundreds of digits" if type(value) is int else type(value).__name__
                yield f"field 'Rating' must be a number, not {kind}"
        elif not isinstance(value, str):
            yield f"field '{field}' must be text, not {type(value).__name__}"
        elif field == "gt-email" and not 0 < value.find("@") < len(value) - 1:
            yield "gt-email must look like local@domain"
        elif field == "gt-name" and not value.strip():
            yield "gt-name is empty"
    shape = shape_of(row)
    if shape == "chat":
        yield from chat.problems_of(row)
    for field in OPTIONAL.get(shape or "", ()):
        value = row.get(field)
        if field not in fields and value is not None and not isinstance(value, str):
            yield f"field '{field}' must be text, not {type(value).__name__}"
    number = row.get("row_id")
    if number is not None and not is_count(number) and (shape == "enron" or not isinstance(number, str)):
        yield "row_id must be a whole number from 0, below 2^63"


def _is_number(value: Any) -> bool:
    """Whether a value is, or spells, a number that fits a float."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def user_of(row: Row) -> str | None:
    """The author of a row, by its user_id: text, or an integer as text (5, 5.0, "5" and " 5" are the same); None if
    absent. Privacy units, halves and canaries all use this: a user counted as two would get half the noise."""
    value = row.get("user_id")
    if isinstance(value, float) and value.is_integer():  # an Arrow column with nulls
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value).strip() or None


def is_count(value: object) -> bool:
    """Whether a value is an integer in 0 … 2⁶³ − 1 (not a bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def read_with_broken(path: AnyPath, fields: tuple[str, ...]) -> tuple[list[Row], dict[int, str]]:
    """(all rows, {index of a broken row: why}) for builders that skip broken rows; all others fit an Arrow file.

    UserError if the file does not match its manifest."""
    broken: dict[int, str] = {}
    rows = read_rows(path, broken)
    check_manifest(path, len(rows))
    note_lost_manifest(path, rows)
    for index, row in enumerate(rows):
        problem = broken.get(index) or next(row_problems(row, fields), None)
        if problem:
            broken[index] = problem
    return rows, broken


def row_text(row: Row) -> tuple[str, int | None]:
    """(training text without EOS, character where the completion starts, or None if the row has no prompt)."""
    shape = shape_of(row)
    if shape == "text":
        prompt = row.get("prompt")
        if isinstance(prompt, str) and isinstance(row.get("generation"), str) and row["text"].startswith(prompt):
            return row["text"], len(prompt)
        return row["text"], None
    if shape in ("enron", "prompt"):
        prompt, completion = row["prompt"], row["continuation"]
    elif shape == "completion":
        prompt, completion = row["prompt"], row["completion"]
    elif shape == "instruction":
        prompt, completion = instruction_prompt(row), row["output"]
    elif shape == "review":
        prompt, completion = review_prompt(row), " " + row["Review"].strip()
    else:
        raise ValueError(f"row of unknown shape: {sorted(row)}")
    return prompt + completion, len(prompt)


def has_completion(row: Row) -> bool:
    """Whether a row says which part the model should generate (--loss_on completion)."""
    return shape_of(row) == "chat" or row_text(row)[1] is not None


def read_renderer(
    rows: Iterable[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase | None", template: str | None, model: str
) -> chat.Renderer | None:
    """The renderer of chat rows; None for other rows, whose text needs no tokenizer.

    template: --chat_template. UserError if chat rows have no template, or other rows are given one.
    """
    if shape_of(next(iter(rows))) == "chat":
        source = chat.read_template(template, tokenizer, model)
        assert tokenizer is not None  # whoever reads chat rows has the tokenizer of their model
        return chat.Renderer(tokenizer, source)
    if template is not None:
        raise UserError(f"--chat_template {template}: the rows are not chat rows; drop the flag")
    return None


def render(
    path: AnyPath, rows: Sequence[Row], indices: Iterable[int], renderer: chat.Renderer | None
) -> list[chat.Rendered]:
    """The rows with these indices, rendered as in training. UserError naming those that the chat template rejects."""
    rendered, faults = [], Faults()
    for index in indices:
        if renderer is None:
            text, start = row_text(rows[index])
            rendered.append(chat.Rendered(text, None if start is None else ((start, len(text)),)))
            continue
        try:
            rendered.append(renderer.render(rows[index]))
        except ValueError as error:
            faults.add(f"{path}: row {index}: {error}")
    faults.check()
    return rendered


def rendering(
    path: AnyPath, rows: Sequence[Row], indices: Sequence[int], renderer: chat.Renderer | None
) -> Sequence[chat.Rendered]:
    """`render`, but rows that are on disk are rendered when asked for, each with its own UserError."""
    if isinstance(rows, list):
        return render(path, rows, indices, renderer)
    return Lazy(lambda place: render(path, rows, [indices[place]], renderer)[0], len(indices))


def written(row: Row) -> str:
    """The human-written part of a row: its text; for a chat row the contents of its messages, without the template."""
    if shape_of(row) == "chat":
        return "\n".join(message["content"] for message in chat.messages_of(row))
    return row_text(row)[0]


def instruction_prompt(row: Row) -> str:
    """The text before `output`, the same in training and generation."""
    template = INSTRUCTION_TEMPLATE if row.get("input") else INSTRUCTION_TEMPLATE_NO_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input") or "")


def review_prompt(row: Row) -> str:
    """The text before the review, the same in training and generation: metadata only, never the review itself.

    The review's title is private text too: it is included only if the row says `"condition": "title"`.
    """
    fields = {field: row.get(field) or "" for field in REVIEW_FIELDS if field != "Review"}
    title = f"Title: {fields['Review Title']}\n" if row.get("condition") == "title" else ""
    return REVIEW_TEMPLATE.format(**fields, title=title)


@dataclass(frozen=True)
class Split:
    """Row indices of the evaluation head (perplexity), its attacked part (PII) and the training rows."""

    head: Sequence[int]
    pii: Sequence[int]
    train: Sequence[int]


def split(rows: Sequence[Row], manifest: dict[str, Any] | None = None) -> Split:
    """The published split for Enron rows (gt-name, not generated); for any other file each part is the whole file.

    A manifest's `split_start` with `row_id`s decides which rows belong to the head; otherwise position does.
    """
    n = len(rows)
    if shape_of(rows[0]) != "enron":
        return Split(range(n), range(n), range(n))
    start = (manifest or {}).get("split_start")
    head: Sequence[int]
    train: Sequence[int]
    if start is not None and all(is_count(row.get("row_id")) for row in rows):
        in_head, in_train = array("q"), array("q")
        for index, row in enumerate(rows):
            (in_head if row["row_id"] < start else in_train).append(index)
        head, train = in_head, in_train
    else:
        head, train = range(min(HEAD_ROWS, n // 3)), range(min(HEAD_ROWS, n // 3), n)
    return Split(head, head[: min(PII_ROWS, n // 3)], train)


def split_source(
    rows: list[Row], broken: Container[int], manifest: dict[str, Any] | None
) -> tuple[list[Row], Split, int | None]:
    """For builders that skip the rows with indices in `broken`, without shifting the split.

    Returns (the rows, with their index as `row_id` unless all usable ones have one; the split without broken rows; the
    `split_start` of a file made from these rows, None if the row_ids of head and training rows are interleaved).
    """
    if not all(is_count(row.get("row_id")) for index, row in enumerate(rows) if index not in broken):
        rows = [{**row, "row_id": index} for index, row in enumerate(rows)]
    ids = [row["row_id"] if is_count(row.get("row_id")) else -1 for row in rows]  # -1: broken ones
    parts = split([{"gt-name": "", "row_id": row_id} for row_id in ids], manifest)
    head, pii, train = ([i for i in part if i not in broken] for part in (parts.head, parts.pii, parts.train))
    start = (manifest or {}).get("split_start")
    if start is None and train:
        first = min(ids[index] for index in parts.train if ids[index] != -1)
        start = first if all(rows[index]["row_id"] < first for index in head) else None
    return rows, Split(head, pii, train), start


def evaluated_rows(rows: Sequence[Row], manifest: dict[str, Any] | None) -> Sequence[int]:
    """Indices of rows whose source row belongs to the evaluation head (by row_id, also in a generated file)."""
    start = (manifest or {}).get("split_start")
    if shape_of(rows[0]) == "enron":
        return split(rows, manifest).head
    if start is None:
        return []
    return [index for index, row in enumerate(rows) if is_count(row.get("row_id")) and row["row_id"] < start]


@cache
def _say_once(line: str) -> None:
    print(one_line(line), file=sys.stderr)


def note_lost_manifest(path: AnyPath, rows: Sequence[Row]) -> None:
    """Warn on stderr about rows that one of these scripts derived from other rows but that have lost their manifest."""
    if manifest_path(path).exists() or int(os.environ.get("RANK", 0)):
        return
    made = "generated_text" in rows[0] or {"generation", "finish_reason"} <= rows[0].keys()
    moved = shape_of(rows[0]) == "enron" and any(row.get("row_id", index) != index for index, row in enumerate(rows))
    if made or moved:
        lost = "the privacy budget its generator spent" if made else "the set of evaluation rows"
        _say_once(f"{path}: derived from other rows, but {manifest_path(path).name} is missing: {lost} is unknown")


def default_dataset(path: AnyPath) -> Path:
    """A path as given, or relative to the repository if it exists only there."""
    path = Path(path)
    return path if path.is_absolute() or path.exists() or not (ROOT / path).exists() else ROOT / path
