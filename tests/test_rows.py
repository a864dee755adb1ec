"""Rows that stay on disk: the same values, errors and results as rows in a list, for every kind of file."""

import csv
import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import make_rows, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import dataset, formats, json_files, rows, trained
from common.problems import UserError
from common.rows import Faults, Lazy, Lines, Table

KINDS = ("jsonl", "jsonl.gz", "json", "csv", "tsv", "csv.gz", "arrow", "file.arrow", "lz4.arrow", "parquet")
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@pytest.fixture
def on_disk(monkeypatch):
    """Every file counts as large."""
    monkeypatch.setattr(rows, "LARGE", 0)
    monkeypatch.setattr(rows, "MANY", 0)


def write(path, content):
    """Rows as a file of the kind that its name says."""
    table = pa.Table.from_pylist(content)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        options = pa.ipc.IpcWriteOptions(compression="lz4" if "lz4" in path.name else None)
        make = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
        with make(str(path), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=5)
    else:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            if ".csv" in path.name or ".tsv" in path.name:
                delimiter = "," if ".csv" in path.name else "\t"
                lines = csv.DictWriter(file, list(content[0]), delimiter=delimiter, lineterminator="\n")
                lines.writeheader()
                lines.writerows(content)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    return path


def same(first, second):
    """Equal, and of the same types."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_the_rows_of_a_list(kind, tmp_path, on_disk):
    content = make_rows(40)
    path = write(tmp_path / f"rows.{kind}", content)
    found, listed = formats.open_rows(path), formats.read_rows(path)
    assert isinstance(listed, list) and isinstance(found, Table if "arrow" in kind or kind == "parquet" else Lines)
    assert len(found) == 40 and same(list(found), listed) and listed == content
    order = random.Random(3).sample(range(40), 40)
    assert [found[index] for index in order] == [listed[index] for index in order]
    assert found[-1] == listed[-1] and list(found[5:20:3]) == listed[5:20:3] and list(found[:0]) == []
    with pytest.raises(IndexError):
        found[40]
    assert dataset.validate(path, found) == dataset.validate(path, listed) == "enron"
    assert list(dataset.split(found).train) == list(dataset.split(listed).train)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(TEXTS, min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n", "\r"]), marked=st.booleans())
def test_any_table_of_text_is_read_alike(values, end, marked, tmp_path, on_disk):
    path = tmp_path / "any.csv"
    with open(path, "w", encoding="utf-8-sig" if marked else "utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
        lines.writerows([["row_id", "text"], *enumerate(values)])
    assert list(formats.open_rows(path)) == formats.read_rows(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.tuples(TEXTS, st.integers(), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=8
    ),
    blanks=st.lists(st.sampled_from(["", "  ", "\r"]), min_size=8, max_size=8),
    marked=st.booleans(),
    ascii_only=st.booleans(),
)
def test_any_json_lines_are_read_alike(values, blanks, marked, ascii_only, tmp_path, on_disk):
    path = tmp_path / "any.jsonl"
    lines = []
    for (text, number, size), blank in zip(values, blanks):
        row = {"text": text, "n": number, "x": size, "deep": [{"a": None, "b": True}, text]}
        lines += [json.dumps(row, ensure_ascii=ascii_only), blank]
    path.write_text("\n".join(lines), encoding="utf-8-sig" if marked else "utf-8", newline="")
    assert same(list(formats.open_rows(path)), formats.read_rows(path))


def broken_files():
    good = json.dumps({"text": "fine"})
    yield "jsonl", "\n".join([good, "", good, "{broken", good, "[1]", '{"text": 1, "text": 2}', good])
    yield "jsonl", "\n".join([good] * 3 + ["{broken"] * 20)
    yield "jsonl", good + "\n" + '{"text": "\\ud800"}'
    yield "jsonl", good + "\n" + '{"text": NaN}'
    yield "csv", "text,n\na,1\nb\n"
    yield "csv", 'text,n\na,1\n"b\nc",2\n"d'
    yield "csv", "text,text\na,1\n"
    yield "csv", "text\na\0\n"
    yield "csv", b"text\nfine\n\xff\n".decode("latin-1")
    yield "tsv", "text\n"
    yield "jsonl", "\n\n"


@pytest.mark.parametrize(("kind", "content"), broken_files())
def test_errors_name_the_same_lines(kind, content, tmp_path, on_disk):
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(content.encode("latin-1" if "\xff" in content else "utf-8"))
    with pytest.raises(UserError) as listed:
        formats.read_rows(path)
    with pytest.raises(UserError) as found:
        formats.open_rows(path)
    assert found.value.problems == listed.value.problems


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_columns_that_json_lacks(kind, tmp_path, on_disk):
    import datetime
    import decimal

    table = {"text": ["a", "b", "c"], "x": [1.5, float("nan"), None], "n": [1, None, 3]}
    table |= {"day": [datetime.date(2001, 2, 3)] * 3, "cost": [decimal.Decimal("1.50")] * 3}
    path = tmp_path / f"rows.{kind}"
    write(path, pa.table(table).to_pylist())
    found = formats.open_rows(path)
    assert isinstance(found, Table) and list(found) == formats.read_rows(path)
    assert found[1]["x"] is None and found[0] == {"text": "a", "x": 1.5, "n": 1, "day": "2001-02-03", "cost": "1.50"}
    path = write(tmp_path / f"bytes.{kind}", [{"text": "a", "raw": b"\xff"}])
    with pytest.raises(UserError, match="column 'raw' holds bytes"):
        formats.open_rows(path)


def test_damaged_files_are_one_line(tmp_path, on_disk):
    for kind in ("jsonl.gz", "csv.gz", "arrow", "parquet"):
        path = write(tmp_path / f"rows.{kind}", make_rows(40))
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError) as caught:
            formats.open_rows(path)
        assert len(caught.value.problems) == 1 and str(path) in caught.value.problems[0]


def test_a_file_that_changes_is_refused(tmp_path, on_disk):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(5)])
    found = formats.open_rows(path)
    assert found[3] == {"text": "row 3"}
    with open(path, "a") as file:
        file.write('{"text": "late"}\n')
    with pytest.raises(UserError, match="changed while it was read"):
        found[3]


def test_several_files_and_renamed_columns(tmp_path, on_disk):
    content = [{"body": f"row {number}", "row_id": number} for number in range(12)]
    for part, kind in enumerate(("jsonl", "parquet", "csv")):
        write(tmp_path / f"part-{part}.{kind}", content[4 * part : 4 * part + 4])
    found = formats.open_rows(tmp_path / "part-*", ["text=body"])
    assert isinstance(found, Lazy) and len(found) == 12
    assert list(found) == [{"text": row["body"], "row_id": row["row_id"]} for row in content]
    assert found[7]["text"] == "row 7" and dataset.validate(tmp_path / "part-*", found) == "text"
    with pytest.raises(UserError, match="already"):
        formats.open_rows(tmp_path / "part-*", ["row_id=body"])


def test_rows_of_mixed_shapes_are_named(tmp_path, on_disk):
    content = [{"text": "a"}] * 3 + [{"prompt": "a", "completion": "b"}, {"text": None}, {"text": 5}]
    path = write_rows(tmp_path / "rows.jsonl", content)
    problems = []
    for read in (formats.open_rows, formats.read_rows):
        with pytest.raises(UserError) as caught:
            dataset.validate(path, read(path))
        problems.append(caught.value.problems)
    assert problems[0] == problems[1] and "row 3" in problems[0][0]


def test_faults_keep_the_first_few():
    faults = Faults()
    faults.check()
    for number in range(1000):
        faults.add(f"file:{number}: wrong")
    assert len(faults.lines) == rows.SHOWN
    with pytest.raises(UserError) as caught:
        faults.check()
    assert caught.value.problems[-1] == "file: … and 995 more like these"


def test_small_files_are_lists(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", make_rows(5))
    assert type(formats.open_rows(path)) is list


@pytest.mark.parametrize("flags", [(), ("--loss_on", "completion"), ("--packing",), ("--eval_rows", 5)])
def test_a_plan_from_disk_is_that_of_a_list(flags, models, dataset, tmp_path, monkeypatch, capsys):
    from run_peft import make_parser
    from training.plan import describe, make_plan

    argv = ["-m", str(models["neox"]), "-i", str(dataset), "--output_root", str(tmp_path), *map(str, flags)]
    config = make_parser().parse_args(argv)
    listed = make_plan(config)
    monkeypatch.setattr(rows, "LARGE", 0)
    found = make_plan(config)
    assert isinstance(found.train, Lazy) and describe(config, found) == describe(config, listed)
    assert list(found.train) == list(listed.train) == [found.train[at] for at in range(len(found.train))]
    assert found.lengths == listed.lengths and found.labels == listed.labels
    assert list(found.sequences) == list(listed.sequences) and list(found.held) == list(listed.held)


def test_training_and_attacks_from_disk_give_the_same_files(models, dataset, tmp_path, monkeypatch):
    """The bytes of the adapter and the scores, from a list and from disk; the run record names the same rows."""
    import mia.mia
    import run_peft

    made = []
    for name, large in (("list", 1 << 40), ("disk", 0)):
        monkeypatch.setattr(rows, "LARGE", large)
        root = tmp_path / name
        run_peft.main(
            ["-m", str(models["neox"]), "-i", str(dataset), "-e", "1", "-lr", "1e-3", "--output_root", str(root)]
        )
        (folder,) = {path.parent for path in root.rglob("run.json")}
        checkpoint = next(folder.glob("checkpoint-*"))
        out = root / "mia"
        argv = ["--model", str(checkpoint), "--members", str(dataset), "--output_dir", str(out), "--bootstrap", "20"]
        assert mia.mia.main([*argv, "--attacks", "loss", "recall", "--num_rows", "8"]) == 0
        taken = trained.read(checkpoint)
        assert taken is not None and isinstance(taken.rows, tuple if name == "list" else Lazy)
        texts = [dataset_text(row) for row in json_files.read_jsonl(dataset)]
        seen = [[row.row for row in taken.find(text)] for text in [*texts, "never seen"]]
        files = [folder / "trained_rows.jsonl", checkpoint / "adapter_model.safetensors", out / "scores_mia.jsonl"]
        record = json.loads((folder / "run.json").read_text())
        made.append([*(file.read_bytes() for file in files), record["trained"], record["rows"], seen])
    assert made[0] == made[1] and any(made[0][-1]) and made[0][-1][-1] == []


def dataset_text(row):
    return dataset.row_text(row)[0]
