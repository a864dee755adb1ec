"""Rows of every data file: reading, validating, splitting, prompt templates, manifests.

A row is a dict of one of seven shapes (`shape_of`): 'text', 'chat', 'enron', 'instruction', 'review', 'completion' or
'prompt'.
"""

import gzip
import itertools
import math
import os
import re
import sys
import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common import chat, records, strict_json, tables
from common import rows as row_files
from common.json_files import read_json
from common.problems import AnyPath, UserError, one_line
from common.publication import Publication
from common.results import ROOT, commit, now, sha256
from common.rows import Faults, Lazy, Row, Table, TextFile
from common.sources import data_files
from common.strict_json import plain

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

HEAD_ROWS = 1110  # evaluation head of the published split (perplexity)
PII_ROWS = 1000  # the first rows of the head, which are attacked
MANIFEST_SCHEMA = 1

INSTRUCTION_TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
INSTRUCTION_TEMPLATE_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"
REVIEW_FIELDS = ("System prompt", "Rating", "Review Title", "Review", "Product Title", "Product Categories")
REVIEW_TEMPLATE = (
    "{System prompt}\n\nProduct: {Product Title}\nCategories: {Product Categories}\nRating: {Rating}\n{title}Review:"
)


FORMATS = ".jsonl, .json, .csv, .tsv, .arrow or .parquet"


def read_rows(path: AnyPath, broken: dict[int, str] | None = None, columns: Sequence[str] = ()) -> list[Row]:
    """All rows of a .jsonl, .json, .csv or .tsv (gzipped or not), .arrow (stream or file format) or .parquet file, of
    the files that a pattern matches, or of a folder of `Dataset.save_to_disk`.

    A .json file is a list of objects, {"data": such a list}, or one object per line.
    Raises UserError naming the file (and the line of broken JSON) if it is missing, empty or unreadable. With a dict
    `broken`, an unusable line is not an error: its row is {}, and `broken[index]` says why. Values that JSON lacks are
    converted: NaN in an Arrow column becomes None, dates and decimals become text. `columns`:
    "NEW=OLD" for each field to rename.
    """
    rows: list[Row] = []
    for file in data_files(path):
        own: dict[int, str] | None = None if broken is None else {}
        rows_of_file = _read_file(file, own)
        if broken is not None and own:
            broken.update({len(rows) + index: reason for index, reason in own.items()})
        rows += rows_of_file
    return list(rename(path, rows, columns)) if columns else rows


def open_rows(path: AnyPath, columns: Sequence[str] = ()) -> Sequence[Row]:
    """`read_rows`, but the rows of large files (`rows.LARGE`, `rows.MANY`) stay on disk until they are asked for."""
    rows = row_files.join([_read_file(file, None, on_disk=True) for file in data_files(path)])
    return rename(path, rows, columns) if columns else rows


def rename(path: AnyPath, rows: Sequence[Row], columns: Sequence[str]) -> Sequence[Row]:
    """The rows with fields renamed, "NEW=OLD" each. UserError for other words, a field that no row has, and a new name
    that a row has already."""
    names: dict[str, str] = {}
    problems = []
    for text in columns:
        new, _, old = text.partition("=")
        if not new or not old or old in names or new in names.values():
            problems.append(f"--columns {text}: give NEW=OLD, each name once")
        elif not any(old in row for row in rows):
            problems.append(f"--columns {text}: no row of {path} has the field {old!r}")
        names[old] = new
    fresh = {new: old for old, new in names.items() if new not in names}
    taken = sorted({new for row in rows for new, old in fresh.items() if new in row and old in row})
    problems += [f"--columns: rows of {path} have a field {name!r} already; rename it too" for name in taken]
    if problems:
        raise UserError(*problems)
    return row_files.convert(rows, lambda row: {names.get(key, key): value for key, value in row.items()})


def _read_file(path: Path, broken: dict[int, str] | None, on_disk: bool = False) -> Sequence[Row]:
    """The rows of one file; a list, unless they may stay `on_disk` and are many."""
    if not os.path.isfile(path):
        what = (
            "is a directory, not a file" if path.is_dir() else "not a file" if os.path.exists(path) else "no such file"
        )
        hint = ", or build it from raw mail with data/enron/prepare.py" if path.name == "enron.jsonl" else ""
        raise UserError(f"{path}: {what}; give a {FORMATS} file{hint}")
    name = path.name.removesuffix(".gz")
    text = name.endswith((".json", ".jsonl", ".csv", ".tsv"))
    try:
        gzipped = text and is_gzip(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None
    rows: Sequence[Row] | None
    if text and on_disk and row_files.is_large(path, gzipped):
        rows = _map_text(path, name, gzipped)
    elif name.endswith(".json") and (listed := tables.read_json_list(path, gzipped)) is not None:
        rows = listed
    elif name.endswith((".jsonl", ".json")):
        rows = _read_jsonl(path, broken)
    elif name.endswith((".csv", ".tsv")):
        rows = tables.read_csv(path, "\t" if name.endswith(".tsv") else ",", gzipped)
    elif name.endswith(".arrow"):
        rows = _read_arrow(path, on_disk)
    elif name.endswith(".parquet"):
        rows = _read_parquet(path, on_disk)
    else:
        raise UserError(f"{path}: unknown extension; give a {FORMATS} file")
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    return rows


def _map_text(path: Path, name: str, gzipped: bool) -> Sequence[Row]:
    """The rows of a large text file, which stay on disk, except those of a .json list, which is one document."""
    if name.endswith((".csv", ".tsv")):
        return tables.map_csv(path, "\t" if name.endswith(".tsv") else ",", gzipped)
    if name.endswith(".json") and not tables.is_json_lines(path, gzipped):
        listed = tables.read_json_list(path, gzipped)
        if listed is not None:
            return listed
    file, starts, faults = TextFile(path, gzipped), array("q"), Faults()

    def refuse(number: int, reason: str, advice: str, row: Row | None) -> None:
        faults.add(f"{path}:{number}: {reason}{advice}")

    for start, _ in _parsed(path, file.file, refuse):
        starts.append(start)
    faults.check()
    return row_files.jsonl(file, starts)


def _read_jsonl(path: Path, broken: dict[int, str] | None = None) -> list[Row]:
    rows: list[Row] = []
    faults = Faults()

    def refuse(number: int, reason: str, advice: str, row: Row | None) -> None:
        if broken is None:
            faults.add(f"{path}:{number}: {reason}{advice}")
        else:
            broken[len(rows)] = reason
            rows.append(row or {})

    try:
        with gzip.open(path, "rb") if is_gzip(path) else open(path, "rb") as file:
            for _, row in _parsed(path, file, refuse):
                rows.append(row)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None
    faults.check()
    return rows


def _parsed(
    path: Path, file: Iterable[bytes], refuse: Callable[[int, str, str, Row | None], None]
) -> Iterator[tuple[int, Row]]:
    """(its first byte, row) of each line with an object. The others go to `refuse`: line number, reason, advice, and
    the row of a line whose text has a lone surrogate, to keep its row_id."""
    end = 0
    for number, line in enumerate(file, 1):
        start, end = end, end + len(line)
        if not line.strip():
            continue
        if number == 1 and line.startswith(strict_json.UTF16):
            raise UserError(f"{path}: UTF-16 text; save the file as UTF-8")
        try:
            row = strict_json.parse(line)
        except ValueError as error:
            item = getattr(error, "item", None)
            refuse(number, str(error), "; fix or remove the line", item if isinstance(item, dict) else None)
            continue
        if isinstance(row, dict):
            yield start, row
        else:
            what = "an array; write one object per line" if isinstance(row, list) else type(row).__name__
            refuse(number, f"expected a JSON object, not {what}", "", None)


def is_gzip(path: AnyPath) -> bool:
    """Whether a file starts with the gzip magic number, whatever its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow IPC streaming format: continuation marker, length 0


def read_arrow(path: Path) -> list[Row]:
    """The rows of an Arrow file, stream or file format, whatever its name. UserError if it is damaged."""
    return list(_read_arrow(path, False))


def _read_arrow(path: Path, on_disk: bool) -> Sequence[Row]:
    import pyarrow as pa

    large = on_disk and os.path.getsize(path) > row_files.LARGE
    try:
        source = pa.memory_map(str(path))
        try:
            stream = pa.ipc.open_stream(source)
            schema, batches = stream.schema, _batches(stream, large)
        except (pa.ArrowInvalid, OSError):
            source.seek(0)
            file = pa.ipc.open_file(source)
            schema = file.schema
            batches = _batches((file.get_batch(index) for index in range(file.num_record_batches)), large)
        else:
            source.seek(max(0, source.size() - len(END_OF_STREAM)))
            if source.read() != END_OF_STREAM:  # truncated between two batches, it would pass for a shorter file
                raise UserError(f"{path}: the Arrow stream has no end marker; the file is truncated")
        return _rows_of(path, schema, batches, large or (on_disk and sum(map(len, batches)) > row_files.MANY))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not an Arrow file, or truncated ({_first_line(error)})") from None


def _batches(source: "Iterable[pyarrow.RecordBatch]", large: bool) -> "list[pyarrow.RecordBatch]":
    """All batches of a mapped file; the buffers of a `large` compressed one are not kept in memory."""
    import pyarrow as pa

    batches = iter(source)
    before = pa.total_allocated_bytes()
    first = next(batches, None)
    if first is None:
        return []
    if large and pa.total_allocated_bytes() - before > first.nbytes / 2:  # not mapped, but decompressed
        return row_files.map_batches(itertools.chain([first], batches), first.schema)
    return [first, *batches]


def _read_parquet(path: Path, on_disk: bool) -> Sequence[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        large = sum(group.total_byte_size for group in groups) > row_files.LARGE
        if on_disk and (large or file.metadata.num_rows > row_files.MANY):
            batches = row_files.map_batches(file.iter_batches(row_files.BLOCK), file.schema_arrow)
            return _rows_of(path, file.schema_arrow, batches, True)
        table = pyarrow.parquet.read_table(path)
        return _rows_of(path, table.schema, table.to_batches(), False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file, or damaged ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _rows_of(
    path: Path, schema: "pyarrow.Schema", batches: "Sequence[pyarrow.RecordBatch]", on_disk: bool
) -> Sequence[Row]:
    """The rows of Arrow batches as JSON values. UserError for a column of bytes or of text that is not UTF-8."""
    import pyarrow as pa

    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{path}: two columns have the same name; rename one")
    for field in schema:
        kind = field.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            raise UserError(f"{path}: column {field.name!r} holds bytes; remove it or convert it to text")
    if on_disk:
        return Table(batches, lambda piece: _table_rows(path, piece))
    return _table_rows(path, pa.Table.from_batches(batches, schema))


def _table_rows(path: Path, table: "pyarrow.Table") -> list[Row]:
    import pyarrow as pa
    import pyarrow.compute as pc

    for index, name in enumerate(table.column_names):
        column, kind = table.column(index), table.schema.field(index).type
        if pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        elif pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
            column = column.cast(pa.string())
        table = table.set_column(index, name, column)
    try:
        rows: list[Row] = table.to_pylist()
    except UnicodeDecodeError:
        raise UserError(f"{path}: contains text that is not UTF-8; write the file again") from None
    return rows


def check_columns(path: AnyPath, rows: list[Row]) -> None:
    """UserError naming each field of `rows` whose values do not fit one Arrow column; shows no values.

    Builders of Arrow files call it before they start.
    """
    import pyarrow as pa

    problems = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            column = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):  # their messages would quote values
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            reason = (
                f"values of different types ({', '.join(kinds)})" if len(kinds) > 1 else "values of different types"
            )
            if kinds == ["int"]:
                reason = "integers beyond 64 bits"
            problems.append(f"{path}: column {name!r} has {reason}; an Arrow column has one type: fix or remove it")
            continue
        if column.to_pylist() != values:  # a dict's missing keys become None, 1 becomes 1.0 or True
            problems.append(
                f"{path}: column {name!r} would not be read back unchanged (objects with different fields, or numbers "
                "of different types); fix or remove it"
            )
    if problems:
        raise UserError(*problems)


def write_arrow(file: IO[bytes], rows: list[Row]) -> None:
    """Write rows to an open binary file in the stream format of datasets (read by `datasets.Dataset.from_file`)."""
    import pyarrow as pa

    columns = dict.fromkeys(name for row in rows for name in row)  # from_pylist alone uses the first row's keys
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


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


def manifest_path(path: AnyPath) -> Path:
    path = Path(path)
    return path.parent / f"{path.name}.meta.json"


TAG_BYTES = 100  # tags become part of output folder names


def read_manifest(path: AnyPath) -> dict[str, Any] | None:
    """The manifest beside a data file, or None. UserError if it is broken."""
    beside = manifest_path(path)
    if not os.path.isfile(beside):
        return None
    remedy = f"remove it or build {path} again"
    manifest = read_json(beside, remedy)
    records.check(manifest, records.Manifest, beside, remedy)
    tag = manifest.get("tag") or ""
    if "/" in tag or not tag.isprintable() or tag in (".", "..") or len(tag.encode()) > TAG_BYTES:
        raise UserError(f"{beside}: tag is not a folder name (at most {TAG_BYTES} bytes, no slash); {remedy}")
    return manifest


def check_manifest(path: AnyPath, n: int) -> None:
    """UserError if the file (of n rows) does not match the manifest beside it."""
    manifest, name = read_manifest(path) or {}, manifest_path(path).name
    advice = f"build it again, or remove {name} if the file was changed on purpose"
    if manifest.get("rows", n) != n:
        raise UserError(f"{path}: has {n} rows, its manifest says {manifest['rows']}; {advice}")
    recorded = manifest.get("sha256")
    if recorded is not None and recorded != (actual := sha256(path)):
        raise UserError(f"{path}: its SHA-256 is {actual[:12]}…, its manifest says {recorded[:12]}…; {advice}")


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


def write_manifest(
    files: Publication,
    path: AnyPath,
    *,
    tag: str,
    script: str,
    argv: list[str],
    rows: int,
    source: Iterable[dict[str, Any] | tuple[AnyPath, int] | tuple[AnyPath, int, str | None]] = (),
    split_start: int | None = None,
    generator: object = None,
    sampling: object = None,
    settings: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Write `<path>.meta.json` for a complete data file in `files`; the two are published together.

    source: (path, row count) of each; (path, row count, sha256) of what is not a single file; or the entry itself.
    settings: see `settings_of`. more: additional keys.
    """
    files.write_json(
        manifest_path(path),
        {
            "schema": MANIFEST_SCHEMA,
            "tag": tag,
            "script": script,
            "argv": argv,
            "commit": commit()["commit"],
            "source": [entry if isinstance(entry, dict) else _source(*entry) for entry in source],
            "split_start": split_start,
            "generator": generator,
            "sampling": sampling,
            "rows": rows,
            "settings": settings,
            "sha256": sha256(files.hidden(path)),
            "created": now(),
            **(more or {}),
        },
    )


def _source(path: AnyPath, rows: int, known: str | None = None) -> dict[str, Any]:
    return {"path": str(path), "sha256": known or sha256(path), "rows": rows}


def settings_of(args: object, skip: tuple[str, ...] = ("output",), **inputs: Any) -> dict[str, Any]:
    """What determines the content of a built file: the flags except `skip`, and the SHA-256s of its inputs by flag."""
    outside = {*skip, "overwrite", "dry_run"}
    settings: dict[str, Any] = plain({k: v for k, v in vars(args).items() if k not in outside} | inputs)
    return settings


def finished(
    outputs: Sequence[tuple[str, Path]],
    settings: dict[str, Any] | None,
    overwrite: bool,
    others: Sequence[tuple[str, Path]] = (),
) -> bool:
    """Whether a run with these settings has built the `outputs` and nothing has changed since.

    outputs: (flag, path) of files with a manifest; others: of files written with them that have none; settings: as in
    their manifests, None if the inputs cannot be read. UserError for each existing file that was built differently,
    unless `overwrite`.
    """
    if overwrite:
        return False
    existing = [(flag, path) for flag, path in (*outputs, *others) if path.exists()]
    complete = len(existing) == len(outputs) + len(others)
    if existing and complete and settings is not None and all(_made_with(path, settings) for _, path in outputs):
        return True
    if existing:
        raise UserError(
            *(f"{flag} {path}: exists; give --overwrite to replace it, or another name" for flag, path in existing)
        )
    return False


def _made_with(path: Path, settings: dict[str, Any]) -> bool:
    try:
        manifest = read_manifest(path) or {}
    except UserError:
        return False
    return manifest.get("settings") == plain(settings) and manifest.get("sha256") == sha256(path)


def say_finished(*paths: Path) -> None:
    for path in paths:
        print(f"{path}: already finished with the same inputs and settings; nothing to do (--overwrite repeats it)")


def data_tag(path: AnyPath, manifest: dict[str, Any] | None) -> str:
    """The tag that identifies a data file in output directory names: the manifest's, else the file's stem."""
    tag = (manifest or {}).get("tag")
    if isinstance(tag, str) and tag:
        return tag
    stem = Path(path).name.split(".")[0]
    return stem if os.path.exists(path) else re.sub(r"[*?\[\]:]+", "", stem) or "data"  # of a pattern, or a hub name


def default_dataset(path: AnyPath) -> Path:
    """A path as given, or relative to the repository if it exists only there."""
    path = Path(path)
    return path if path.is_absolute() or path.exists() or not (ROOT / path).exists() else ROOT / path
