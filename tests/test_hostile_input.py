"""Odd and broken inputs: each ends in the right rows, or in one line that names file and row and shows no value."""

import gzip
import json
import time

import pyarrow as pa
import pytest
from conftest import make_rows, write_rows

from common import arrow_files, dataset, formats, json_files, manifests, reviews, strict_json
from common.problems import UserError
from common.process import entry
from common.text import emails, first_email
from data import replacement, scanner
from data.continuation.text_statistics import address_counts
from data.leaks import leaks
from data.self_instruct import filters
from fidelity.metrics import count_sentences, words

ROWS = make_rows(12)
REVIEW = {
    "System prompt": "Write a review.", "Rating": 5, "Review Title": "Fine", "Review": "Works {well}.",
    "Product Title": "Lamp {0}", "Product Categories": "Home > Light", "row_id": 0, "user_id": "u",
}  # fmt: skip


def lines_of(rows) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def with_line(number: int, line: str) -> bytes:
    """The rows as a file, with line `number` (from 1) replaced by `line`."""
    lines = lines_of(ROWS)
    lines[number - 1] = line
    return ("\n".join(lines) + "\n").encode()


PLAIN = ("\n".join(lines_of(ROWS)) + "\n").encode()
PACKED = gzip.compress(PLAIN, mtime=0)
RIGHT = {
    "bom": ("r.jsonl", b"\xef\xbb\xbf" + PLAIN),
    "bom on each line": ("r.jsonl", b"".join(b"\xef\xbb\xbf" + line + b"\n" for line in PLAIN.splitlines())),
    "crlf": ("r.jsonl", PLAIN.replace(b"\n", b"\r\n")),
    "no newline at the end": ("r.jsonl", PLAIN[:-1]),
    "gzip": ("r.jsonl.gz", PACKED),
    "gzip without its suffix": ("r.jsonl", PACKED),
    "the suffix without gzip": ("r.jsonl.gz", PLAIN),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_read_as_it_is_meant(kind, tmp_path):
    name, content = RIGHT[kind]
    (tmp_path / name).write_bytes(content)
    assert formats.read_rows(tmp_path / name) == ROWS


def test_line_separators_within_a_text(tmp_path):
    rows = [{"text": "one\u2028two\u2029three\x85four"}, {"text": "nul \0 and \U0001f469‍\U0001f467"}]
    write_rows(tmp_path / "r.jsonl", rows)
    assert formats.read_rows(tmp_path / "r.jsonl") == rows


SECRET = "private-words"
WRONG = {
    "array": (with_line(4, f'["{SECRET}"]'), "r.jsonl:4: expected a JSON object, not an array"),
    "nan": (with_line(4, f'{{"text": "{SECRET}", "score": NaN}}'), "r.jsonl:4: not JSON (NaN is not JSON"),
    "infinity": (with_line(4, '{"text": "a", "score": 1e999}'), "r.jsonl:4: not JSON (a number too large"),
    "field twice": (with_line(4, f'{{"text": "{SECRET}", "text": "b"}}'), "r.jsonl:4: not JSON (the field 'text'"),
    "long integer": (with_line(4, '{"n": ' + "9" * 5000 + "}"), "r.jsonl:4: not JSON (an integer of more than 4,300"),
    "deep": (with_line(4, '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}"), "r.jsonl:4: nested more than 100 deep"),
    "deep, but parsed": (with_line(4, '{"n": ' + "[" * 200 + "]" * 200 + "}"), "r.jsonl:4: nested more than 100 deep"),
    "half a pair": (with_line(4, f'{{"text": "{SECRET} \\ud83d"}}'), "r.jsonl:4: half of a surrogate pair"),
    "half a pair in a key": (with_line(4, '{"\\udc00": "x"}'), "r.jsonl:4: half of a surrogate pair"),
    "trailing comma": (with_line(4, lines_of(ROWS)[3] + ","), "r.jsonl:4: not JSON (Extra data"),
    "cut": (PLAIN[:-40], "r.jsonl:12: not JSON (Unterminated string"),
    "raw nul": (with_line(4, '{"text": "a\0b"}'), "r.jsonl:4: not JSON (Invalid control character"),
    "latin-1": ('{"text": "J\xf6rg"}\n'.encode("latin-1"), "r.jsonl:1: not UTF-8 (byte 11)"),
    "utf-16": ('{"text": "a"}\n{"text": "b"}'.encode("utf-16"), "r.jsonl: UTF-16 text; save the file as UTF-8"),
    "cr alone": (PLAIN.replace(b"\n", b"\r"), "its lines end in CR alone"),
    "blank": (b"\n\n \n", "r.jsonl: the file has no rows"),
    "gzip: bad checksum": (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "r.jsonl: cannot be read"),
    "gzip: cut": (PACKED[: len(PACKED) // 2], "r.jsonl: cannot be read"),
    "gzip: flipped": (PACKED[:40] + bytes([PACKED[40] ^ 0xFF]) + PACKED[41:], "r.jsonl: cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_one_line_for_a_broken_file(kind, tmp_path):
    content, said = WRONG[kind]
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        formats.read_rows(tmp_path / "r.jsonl")
    (line,) = error.value.problems
    assert said in line and SECRET not in line and "\n" not in line


def test_an_array_in_one_line(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(ROWS))
    with pytest.raises(UserError, match=r"r\.jsonl:1: .* write one object per line"):
        formats.read_rows(tmp_path / "r.jsonl")


ODD_ROWS = [
    ({"row_id": True}, "row_id must be a whole number"), ({"row_id": 3.0}, "row_id must be a whole number"),
    ({"row_id": "3"}, "row_id must be a whole number"), ({"row_id": 1 << 63}, "row_id must be a whole number"),
    ({"row_id": -1}, "row_id must be a whole number"), ({"prompt": 5}, "field 'prompt' must be text, not int"),
    ({"continuation": ["a"]}, "field 'continuation' must be text, not list"),
    ({"text": "of another shape"}, "has the fields of another row type (text, row 0: enron)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), ODD_ROWS)
def test_a_row_of_other_types(change, said, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [*ROWS[:3], ROWS[3] | change, *ROWS[4:]])
    with pytest.raises(UserError) as error:
        dataset.validate(path, formats.read_rows(path))
    (line,) = error.value.problems
    assert line.startswith(f"{path}: row 3: {said}")


@pytest.mark.parametrize("field", ["System prompt", "Review Title", "Product Title", "Product Categories", "Rating"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, True])
def test_a_review_of_other_types(field, value, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [REVIEW, REVIEW | {field: value}])
    for read in (lambda: dataset.validate(path, formats.read_rows(path)), lambda: reviews.read_reviews(path)):
        with pytest.raises(UserError, match=f"row 1: field '{field}' must be"):
            read()


def test_braces_in_a_row_are_text():
    text, start = dataset.row_text(REVIEW)
    assert "Lamp {0}" in text and text[start:] == " Works {well}."


MANIFESTS = [
    ('{"rows": true}', "rows: expected int, got bool"), ('{"split_start": -5}', "split_start: expected int >= 0"),
    ('{"rows": "30"}', "rows: expected int, got str"),
    ('{"rows": ' + "9" * 5000 + "}", "an integer of more than 4,300 digits"),
    ("[" * 50_000, "nested more than 100 deep"), ("[]", "expected a JSON object"),
    ('{"tag": "../../elsewhere"}', "tag is not a folder"), ('{"tag": "' + "x" * 300 + '"}', "tag is not a folder"),
    ('{"tag": "a\\u0000b"}', "tag is not a folder"), ('{"tag": 5}', "tag: expected str, got int"),
    ('{"tag": "\\ud800"}', "half of a surrogate pair"),
    ('{"source": [{"path": 5}]}', "source[0].path: expected str, got int"),
    ('{"privacy": {"epsilon": "8"}}', "privacy.epsilon: expected float, got str"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), MANIFESTS)
def test_a_manifest_of_another_kind(text, said, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    (tmp_path / "r.jsonl.meta.json").write_text(text)
    with pytest.raises(UserError) as error:
        manifests.read_manifest(path)
    (line,) = error.value.problems
    assert said in line and line.endswith(f"remove it or build {path} again")


COLUMNS = [
    (["a", 5], "column 'note' has values of different types (int, str)"),
    ([5, "a"], "column 'note' has values of different types (int, str)"),
    ([["a"], {"a": 1}], "column 'note' has values of different types (dict, list)"),
    ([1 << 64, 1 << 63], "column 'note' has integers beyond 64 bits"),
    ([{"a": 1}, {"b": 1}], "column 'note' would not be read back unchanged"),
    ([True, 1], "column 'note' has values of different types (bool, int)"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), COLUMNS)
def test_columns_that_arrow_cannot_hold(values, said, tmp_path):
    rows = [{"text": SECRET, "note": value} for value in values]
    with pytest.raises(UserError) as error:
        arrow_files.check_columns("r.jsonl", rows)
    (line,) = error.value.problems
    assert said in line and SECRET not in line
    arrow_files.check_columns("r.jsonl", [{"a": 1, "b": [1], "c": {}}, {"a": 2.5, "b": None}])


@pytest.mark.parametrize("script", ["continuation", "replace_pii"])
def test_builders_of_arrow_files_refuse_a_mixed_column_first(script, models, tmp_path):
    """Before a model is loaded, without the values, with nothing written."""
    from data import replace_pii
    from data.continuation import generate

    rows = [row | {"note": SECRET if row["row_id"] < 11 else 5} for row in ROWS]
    path = write_rows(tmp_path / "r.jsonl", rows)
    words = ["--output", str(tmp_path / "out.arrow")]
    main, words = {
        "continuation": (generate.main, ["-m", str(models["llama"]), "-d", str(path), *words]),
        "replace_pii": (replace_pii.main, ["--input", str(path), *words]),
    }[script]
    with pytest.raises(UserError) as error:
        main(words)
    assert error.value.problems == [
        f"{path}: column 'note' has values of different types (int, str); "
        "an Arrow column has one type: fix or remove it"
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


def test_arrow_values_that_json_lacks(tmp_path):
    import datetime

    def write(**columns):
        table = pa.table(columns)
        with pa.OSFile(str(tmp_path / "r.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        return formats.read_rows(tmp_path / "r.arrow")

    day = datetime.date(2001, 2, 3)
    assert write(text=["a"], x=[float("nan")], day=[day]) == [{"text": "a", "x": None, "day": "2001-02-03"}]
    with pytest.raises(UserError, match="column 'text' holds bytes"):
        write(text=[b"a"])
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    with pytest.raises(UserError, match="not UTF-8"):
        write(text=bad)


def test_json_files_of_ours(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested more than 100 deep; build it again"):
        json_files.read_json(tmp_path / "a.json", "build it again")
    assert strict_json.parse(b'{"a": "\\ud83d\\ude00", "b": [1, 2.5, null]}') == {
        "a": "\U0001f600",
        "b": [1, 2.5, None],
    }


def test_the_process_prints_the_same_line(tmp_path, capsys):
    path = write_rows(tmp_path / "r.jsonl", [{"text": "a"}])
    path.write_text('{"text": "\\ud83d"}\n')
    assert entry(lambda: formats.read_rows(path)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------- long texts without content

PIECES = (
    "a-",
    "Aa ",
    "Aa, ",
    "a at b dot ",
    "from: ",
    "hi, ",
    ", ",
    "\n> ",
    "created by Aa ",
    f"{ROWS[0]['gt-name']} ",
    "A",
    "a+",
    "a.",
    "a ",
    "a, ",
    "a (at) ",
    "a at ",
    "a@",
    "<",
    "(",
    ".",
    ".!",
    "-",
    " ",
    "\n",
    " \n",
    "a\n ",
    "A.",
)
ADDRESS = "jane.roe@hartwell.example"


def seconds(function, text: str, tries: int = 1) -> float:
    times = []
    for _ in range(tries):
        start = time.process_time()
        function(text)
        times.append(time.process_time() - start)
    return min(times)


def assert_linear(function, piece: str, ending: str = "") -> None:
    """Ten times the text takes about ten times as long (a hundred times: quadratic)."""
    short, long = ((piece * (size // len(piece))) + ending for size in (100_000, 1_000_000))
    taken = max(seconds(function, short, 3), 0.02)
    assert taken < 10  # and the long one is not tried
    assert seconds(function, long) < 25 * taken


def instances(completion: str) -> None:
    for output_first in (True, False):
        filters.parse_instances(completion, True, output_first)


def filter_all(text: str) -> None:
    filters.instruction_fault(text)
    filters.parse_instructions(text, True)
    filters.filter_instances([(text, text + "a"), ("a", text)])


def replace_all(text: str) -> None:
    """All of data/replace_pii.py that reads texts: people, stand-ins, the scan, the leak check."""
    rows = [dict(row, notes=text if row is ROWS[0] else "") for row in ROWS]
    people, scan = replacement.meet(rows, 1)
    replaced = scan.replace(scanner.strings(rows[0]))
    leaks([{"text": text} for text in replaced], people)


READERS = {
    "replacement": replace_all,
    "emails": lambda text: list(emails(text)),
    "address counts": lambda text: address_counts([text], {ADDRESS}),
    "sentences": count_sentences,
    "words": words,
    "instances": instances,
    "filters": filter_all,
}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("reader", READERS)
def test_time_is_linear_in_a_hostile_text(reader, piece):
    assert_linear(READERS[reader], piece)


def word(number: int) -> str:
    """A distinct word for every number: a consonant and a vowel for each of its digits."""
    syllables = []
    while number or len(syllables) < 3:
        number, digit = divmod(number, 20)
        syllables.append("bcdfghjklmnpqrstvwxz"[digit] + "aeiou"[digit % 5])
    return "".join(syllables)


# Pieces that differ are stored and looked up, not only read: each text has about `n` characters.
DISTINCT = {
    "one domain of many labels": lambda n: "a@" + "a." * (n // 2) + "a",
    "many top domains": lambda n: " ".join(f"a@{word(i)}.{word(i + 7)}" for i in range(n // 18)),
    "more one-letter domains than short new ones": lambda n: " ".join(f"a@b.{chr(0x4E00 + i)}" for i in range(n // 6)),
    "one first name, alone": lambda n: (
        "\n".join(f"From: Anna {word(i).title()}" for i in range(n // 40)) + "\n" + " Anna," * (n // 12)
    ),
    "many spellings with addresses": lambda n: "\n".join(
        f"Anna {word(i).title()} Smith <a{word(i)}smith@b.example>" for i in range(n // 45)
    ),
}


@pytest.mark.parametrize("kind", DISTINCT)
def test_replacement_is_linear_in_distinct_content(kind):
    short, long = DISTINCT[kind](20_000), DISTINCT[kind](160_000)
    replace_all("warm up")
    taken = max(seconds(replace_all, short, 3), 0.05)
    assert taken < 5  # and the long one is not tried
    assert seconds(replace_all, long) < 24 * taken  # linear: 8, quadratic: 64


@pytest.mark.parametrize("piece", PIECES)
def test_what_follows_a_hostile_text_is_read(piece):
    text = piece * (1_000_000 // len(piece))
    assert list(emails(f"{text} {ADDRESS}"))[-1] == ADDRESS
    assert first_email(f"{text}\n{ADDRESS}") == ("a@a" if piece == "a@" else ADDRESS)
    assert count_sentences(f"{text}\nOne. Two! Three?") >= 3
    assert filters.parse_instances(f" a\nOutput: b{text}\nExample 2\nInput: c\nOutput: d", True, False)[0][1] == (
        "c",
        "d",
    )
