"""Rows of every data file: reading, validating, splitting, prompt templates, manifests.

A row is a dict. Five shapes are known (`shape_of`): 'text', 'enron', 'instruction', 'review' and 'prompt'.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from common.results import ROOT, commit, now, read_json, sha256, write_json

HEAD_ROWS = 1110  # evaluation head of the published split (perplexity)
PII_ROWS = 1000  # its first rows are attacked
MANIFEST_SCHEMA = 1
SHOWN = 5  # problems of one kind that are spelled out

INSTRUCTION_TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
INSTRUCTION_TEMPLATE_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"
REVIEW_FIELDS = ("System prompt", "Rating", "Review Title", "Review", "Product Title", "Product Categories")
REVIEW_TEMPLATE = (
    "{System prompt}\n\nProduct: {Product Title}\nCategories: {Product Categories}\nRating: {Rating}\n{title}Review:"
)


def read_rows(path, broken: dict[int, str] | None = None) -> list[dict]:
    """All rows of a .jsonl (.gz), .arrow (stream or file format) or .parquet file.

    Raises UserError naming the file (and the line of broken JSON) when it is missing, empty or unreadable. With a dict
    `broken` a line that is no JSON object is no error: {} stands in its place, and `broken[index]` says why.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; name a .jsonl, .arrow or .parquet file")
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        rows = _read_jsonl(path, broken)
    elif name.endswith(".arrow"):
        rows = _read_arrow(path)
    elif name.endswith(".parquet"):
        rows = _read_parquet(path)
    else:
        raise UserError(f"{path}: unknown ending; the formats are .jsonl, .arrow and .parquet")
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    return rows


def _read_jsonl(path: Path, broken: dict[int, str] | None = None) -> list[dict]:
    rows, problems = [], []

    def refuse(number: int, reason: str, advice: str) -> None:
        if broken is None:
            problems.append(f"{path}:{number}: {reason}{advice}")
        else:
            broken[len(rows)] = reason
            rows.append({})

    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    refuse(number, f"not JSON ({error})", "; mend or remove the line")
                    continue
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    refuse(number, f"a JSON object was expected, not {type(row).__name__}", "")
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if problems:
        raise UserError(*_shorten(problems))
    return rows


END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow IPC streaming format: continuation mark, length 0


def _read_arrow(path: Path) -> list[dict]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()
        except (pa.ArrowInvalid, OSError):
            try:
                source.seek(0)
                table = pa.ipc.open_file(source).read_all()
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{path}: not an Arrow file, or cut ({error})") from None
        else:
            source.seek(max(0, source.size() - len(END_OF_STREAM)))
            if source.read() != END_OF_STREAM:  # cut between two batches it would pass for a shorter file
                raise UserError(f"{path}: the Arrow stream has no end; the file was cut")
        return table.to_pylist()


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None


def write_arrow(path, rows: list[dict]) -> None:
    """Write rows in the datasets stream format (`datasets.Dataset.from_file` reads it), complete or not at all."""
    import pyarrow as pa

    from common.results import atomic

    columns = dict.fromkeys(name for row in rows for name in row)  # from_pylist alone would take the first row's
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    with atomic(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def _shorten(problems: list[str]) -> list[str]:
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], f"{problems[0].split(':')[0]}: … and {len(problems) - SHOWN} more like these"]


def shape_of(row: dict) -> str | None:
    """The shape of a row, by its fields; None when it is none of the known ones."""
    if "text" in row:
        return "text"
    if "gt-name" in row or "gt-email" in row:
        return "enron"
    if "instruction" in row and "output" in row:
        return "instruction"
    if "Review" in row and "Rating" in row:
        return "review"
    if "prompt" in row and "continuation" in row:
        return "prompt"
    return None


REQUIRED = {
    "text": ("text",),
    "enron": ("gt-name", "gt-email", "prompt", "continuation"),
    "instruction": ("instruction", "output"),
    "review": ("Review", "Rating"),
    "prompt": ("prompt", "continuation"),
}


def validate(path, rows: list[dict], fields: tuple[str, ...] | None = None) -> str:
    """Check that every row has the (string) fields of its shape, or `fields`; return the file's shape.

    Raises UserError, one line a row (the first few), counting rows from 0. Also when the file is not the one that its
    manifest describes.
    """
    check_manifest(path, len(rows))
    shape = shape_of(rows[0])
    if fields is None:
        if shape is None:
            known = "; ".join(", ".join(names) for names in REQUIRED.values())
            raise UserError(f"{path}: row 0: no known set of fields; expected one of: {known}")
        fields = REQUIRED[shape]
    absent = [field for field in fields if all(row.get(field) is None for row in rows)]
    words = " and ".join(f"'{field}'" for field in absent)
    problems = [f"{path}: no row has the field {words}; name a file that has it"] if absent else []
    fields = [field for field in fields if field not in absent]
    for index, row in enumerate(rows):
        problems += [f"{path}: row {index}: {problem}" for problem in row_problems(row, fields)]
    if problems:
        raise UserError(*_shorten(problems))
    return shape


def row_problems(row: dict, fields: Iterable[str]) -> Iterator[str]:
    """Why a row cannot be used, a line a field, without its text."""
    for field in fields:
        value = row.get(field)
        if value is None:
            yield f"field '{field}' is missing; add it or remove the row"
        elif not isinstance(value, str) and field != "Rating":
            yield f"field '{field}' must be text, not {type(value).__name__}"
        elif field == "gt-email" and not 0 < value.find("@") < len(value) - 1:
            yield "gt-email must look like local@domain"
        elif field == "gt-name" and not value.strip():
            yield "gt-name is empty"


def read_with_broken(path, fields: tuple[str, ...]) -> tuple[list[dict], dict[int, str]]:
    """(all rows, {index of a broken one: why}) for builders that leave broken rows out; Arrow takes all others."""
    broken = {}
    rows = read_rows(path, broken)
    for index, row in enumerate(rows):
        problem = broken.get(index) or next(row_problems(row, fields), None)
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            problem = problem or "half of a surrogate pair in its text"
        if problem:
            broken[index] = problem
    return rows, broken


def row_text(row: dict) -> tuple[str, int | None]:
    """(training text without EOS, character where the completion starts or None when the row has no prompt part)."""
    shape = shape_of(row)
    if shape == "text":
        prompt = row.get("prompt")
        known = isinstance(prompt, str) and isinstance(row.get("generation"), str) and row["text"].startswith(prompt)
        return row["text"], len(prompt) if known else None
    if shape in ("enron", "prompt"):
        prompt, completion = row["prompt"], row["continuation"]
    elif shape == "instruction":
        prompt, completion = instruction_prompt(row), row["output"]
    elif shape == "review":
        prompt, completion = review_prompt(row), " " + row["Review"].strip()
    else:
        raise ValueError(f"row of unknown shape: {sorted(row)}")
    return prompt + completion, len(prompt)


def instruction_prompt(row: dict) -> str:
    """The text before `output`, as trained and as generated from."""
    template = INSTRUCTION_TEMPLATE if row.get("input") else INSTRUCTION_TEMPLATE_NO_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input") or "")


def review_prompt(row: dict) -> str:
    """The text before the review, as trained and as generated from: metadata only, never the review itself.

    The review's title is private text too: it enters only where the row says `"condition": "title"`.
    """
    fields = {field: row.get(field) or "" for field in REVIEW_FIELDS if field != "Review"}
    title = f"Title: {fields['Review Title']}\n" if row.get("condition") == "title" else ""
    return REVIEW_TEMPLATE.format(**fields, title=title)


@dataclass(frozen=True)
class Split:
    """Row indices of the evaluation head (perplexity), of its attacked part (PII) and of the rows to train on."""

    head: list[int]
    pii: list[int]
    train: list[int]


def split(rows: list[dict], manifest: dict | None = None) -> Split:
    """The published split where rows carry gt-name and are not generated; any other file is used whole, by each part.

    A manifest's `split_start` with `row_id`s decides which rows belong to the head; else position does.
    """
    n = len(rows)
    if shape_of(rows[0]) != "enron":
        everything = list(range(n))
        return Split(everything, everything, everything)
    start = (manifest or {}).get("split_start")
    if start is not None and all(isinstance(row.get("row_id"), int) for row in rows):
        head = [index for index, row in enumerate(rows) if row["row_id"] < start]
        train = [index for index, row in enumerate(rows) if row["row_id"] >= start]
    else:
        head, train = list(range(min(HEAD_ROWS, n // 3))), list(range(min(HEAD_ROWS, n // 3), n))
    return Split(head, head[: min(PII_ROWS, n // 3)], train)


def split_source(rows: list[dict], broken, manifest: dict | None) -> tuple[list[dict], Split, int | None]:
    """For builders that leave the rows with indices in `broken` out but let them keep their places in the split.

    Returns (the rows, with their index as `row_id` unless all whole ones have one; the split without broken rows; the
    `split_start` of a file made from these rows, None when the row_ids of head and training rows lie mixed).
    """
    if not all(isinstance(row.get("row_id"), int) for index, row in enumerate(rows) if index not in broken):
        rows = [{**row, "row_id": index} for index, row in enumerate(rows)]
    ids = [row["row_id"] if isinstance(row.get("row_id"), int) else -1 for row in rows]  # -1: broken ones
    parts = split([{"gt-name": "", "row_id": one} for one in ids], manifest)
    head, pii, train = ([i for i in part if i not in broken] for part in (parts.head, parts.pii, parts.train))
    start = (manifest or {}).get("split_start")
    if start is None and train:
        first = min(ids[index] for index in parts.train if ids[index] != -1)
        start = first if all(rows[index]["row_id"] < first for index in head) else None
    return rows, Split(head, pii, train), start


def evaluated_rows(rows: list[dict], manifest: dict | None) -> list[int]:
    """Indices of rows whose source row belongs to the evaluation head (a generated file's rows too, by row_id)."""
    start = (manifest or {}).get("split_start")
    if shape_of(rows[0]) == "enron":
        return split(rows, manifest).head
    if start is None:
        return []
    return [index for index, row in enumerate(rows) if isinstance(row.get("row_id"), int) and row["row_id"] < start]


def manifest_path(path) -> Path:
    path = Path(path)
    return path.with_name(path.name + ".meta.json")


MANIFEST_TYPES = {"rows": int, "split_start": int, "sha256": str, "source": list, "privacy": dict}


def read_manifest(path) -> dict | None:
    """The manifest beside a data file, or None. UserError when there is one and it is broken."""
    beside = manifest_path(path)
    if not beside.is_file():
        return None
    remedy = f"remove it or build {path} again"
    manifest = read_json(beside, remedy)
    for key, kind in MANIFEST_TYPES.items():
        if not isinstance(manifest.get(key), (kind, type(None))):
            raise UserError(f"{beside}: {key} is a {type(manifest[key]).__name__}, not a {kind.__name__}; {remedy}")
    if not all(isinstance(one, dict) for one in manifest.get("source") or []):
        raise UserError(f"{beside}: source is not a list of objects; {remedy}")
    return manifest


def check_manifest(path, n: int) -> None:
    """UserError when the file (of n rows) is not the one that the manifest beside it describes."""
    manifest, name = read_manifest(path) or {}, manifest_path(path).name
    advice = f"build it again, or remove {name} if the file was changed on purpose"
    if manifest.get("rows", n) != n:
        raise UserError(f"{path}: has {n} rows, its manifest says {manifest['rows']}; {advice}")
    told = manifest.get("sha256")
    if told is not None and told != (found := sha256(path)):
        raise UserError(f"{path}: its SHA-256 is {found[:12]}…, its manifest says {told[:12]}…; {advice}")


def write_manifest(
    path,
    *,
    tag: str,
    script: str,
    argv: list[str],
    rows: int,
    source=(),
    split_start=None,
    generator=None,
    sampling=None,
    more: dict | None = None,
) -> None:
    """Write `<path>.meta.json` for a data file that is complete.

    `source`: [(path, row count)], or (path, row count, sha256) for what is not one file. `more`: further keys.
    """
    write_json(
        manifest_path(path),
        {
            "schema": MANIFEST_SCHEMA,
            "tag": tag,
            "script": script,
            "argv": argv,
            "commit": commit()["commit"],
            "source": [
                {"path": str(file), "sha256": known[0] if known else sha256(file), "rows": count}
                for file, count, *known in source
            ],
            "split_start": split_start,
            "generator": generator,
            "sampling": sampling,
            "rows": rows,
            "sha256": sha256(path),
            "created": now(),
            **(more or {}),
        },
    )


def data_tag(path, manifest: dict | None) -> str:
    """The tag that names a data file in output directories: the manifest's, else the file's stem."""
    tag = (manifest or {}).get("tag")
    return tag if isinstance(tag, str) and tag else Path(path).name.split(".")[0]


def default_dataset(path) -> Path:
    """A path as given, or below the repository when it is relative and exists only there."""
    path = Path(path)
    return path if path.is_absolute() or path.exists() or not (ROOT / path).exists() else ROOT / path
