"""data/amazon/prepare.py and make_reviews.py on hand-made and generated fictional reviews."""

import gzip
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, read_lines, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from common import dataset, formats, manifests
from common.problems import UserError
from common.process import entry
from common.results import sha256
from data.amazon import make_reviews, prepare, shop
from data.amazon.config import SPLITS
from data.amazon.database import REASONS, SYSTEM_PROMPT
from data.amazon.fields import clean
from data.amazon.phrases import KINDS
from data.amazon.split import largest_deviation, take_users

FIELDS = [*dataset.REVIEW_FIELDS, "row_id", "user_id"]
PRODUCTS = [
    {"parent_asin": "P1", "title": "Bardel &#34;D&#34; Kettle", "main_category": "Z",
     "categories": ["A", "&nbsp;", "B &amp; C"]},
    {"parent_asin": "P2", "title": "Quillan Lamp", "main_category": "Lights &amp; More", "categories": ["<br>", None]},
    {"parent_asin": "P3", "title": "Tamvel Mat", "main_category": None, "categories": None},
    {"parent_asin": "P4", "title": None, "main_category": "Home"},
    {"parent_asin": "P1", "title": "A later line about P1", "main_category": "Other", "categories": ["Z"]},
    {"title": "of no product"},
]  # fmt: skip


def review(user: str, asin: str, text, rating=5.0, title="Fine") -> dict:
    return {"rating": rating, "title": title, "text": text, "parent_asin": asin, "asin": asin, "user_id": user}


REVIEWS = [
    review("ann", "P1", "Boils fast.<br /><br />It&#39;s quiet &amp; cheap &lt;3<BR>"),
    review("ben", "P2", "Grüße — 明るい 😀", 4),
    "{not json",
    review("ann", "P3", "  padded\r\nline \u00a0", "3.0", title=" Two<br />lines "),
    review("cat", "P4", "no title, no categories list", 1.0, title=None),
    review("ben", "P2", "<br /> &nbsp;"),
    review("ben", "P2", None),
    review("dan", "P9", "its product is missing"),
    "",
    review("ann", "P1", "Boils fast.<br/><br/>It's quiet & cheap <3"),  # row 0, written without references
    review("eve", "P2", "Grüße — 明るい 😀", 4.0),  # row 1, by somebody else
    review("", "P1", "nobody wrote this"),
    review("fay", "P1", "rated six", 6),
    review("fay", "P1", "rated half", 4.5),
    review("fay", "P1", "rated in words", "five"),
    [1, 2],
    review("gus", "P1", "Boils fast.", 2.0),
]


def write(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def files(tmp_path) -> list[str]:
    """--reviews and --meta of the hand-made files."""
    reviews, meta = write(tmp_path / "r.jsonl", REVIEWS), write(tmp_path / "meta_r.jsonl", PRODUCTS)
    return ["--reviews", str(reviews), "--meta", str(meta)]


@pytest.fixture(scope="module")
def goods(tmp_path_factory) -> dict:
    """6,000 generated reviews of 300 products."""
    folder = tmp_path_factory.mktemp("goods")
    words = ["--output_dir", str(folder), "--reviews", "6000", "--products", "300"]
    return shop.run(make_reviews.make_parser().parse_args(words))


def build(folder: Path, files: list, *more, train=3000, test=600) -> dict[str, list[dict]]:
    """{split: rows} of one run."""
    words = [*files, "--output_dir", folder, "--train", train, "--test", test, *more]
    assert prepare.main([str(word) for word in words]) == 0
    return {split: read_lines(folder / f"{split}.jsonl") for split in SPLITS}


def build_goods(folder: Path, goods: dict, *more, **sizes) -> dict[str, list[dict]]:
    return build(folder, ["--reviews", goods["reviews"], "--meta", goods["meta"]], *more, **sizes)


def run_record(folder: Path) -> dict:
    return json.loads((folder / "run_prepare.json").read_text(encoding="utf-8"))


def user_hash(user: str, seed: int = 3407) -> str:
    return hashlib.md5(f"{seed}:{user}".encode()).hexdigest()[:16]


def refused(words: list) -> list[str]:
    """The problems of a run that must be refused."""
    with pytest.raises(UserError) as error:
        prepare.main([str(word) for word in words])
    return error.value.problems


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_hand_made_rows(ending, tmp_path, capsys):
    reviews, meta = write(tmp_path / f"r.jsonl{ending}", REVIEWS), write(tmp_path / f"m.jsonl{ending}", PRODUCTS)
    splits = build(tmp_path / "out", ["--reviews", reviews, "--meta", meta], train=2, test=1)
    rows = {row["row_id"]: row for part in splits.values() for row in part}
    assert {split: len(part) for split, part in splits.items()} == {"train": 2, "test": 1, "validation": 2}
    expected = {  # row_id: position among the non-blank lines
        0: ("ann", 5, "Fine", "Boils fast.\n\nIt's quiet & cheap <3", 'Bardel "D" Kettle', "A > B & C"),
        1: ("ben", 4, "Fine", "Grüße — 明るい 😀", "Quillan Lamp", "Lights & More"),
        3: ("ann", 3, "Two lines", "padded\nline", "Tamvel Mat", ""),
        4: ("cat", 1, "", "no title, no categories list", "", "Home"),
        15: ("gus", 2, "Fine", "Boils fast.", 'Bardel "D" Kettle', "A > B & C"),
    }
    assert set(rows) == set(expected)
    for index, (user, *values) in expected.items():
        assert list(rows[index]) == FIELDS
        assert rows[index]["System prompt"] == SYSTEM_PROMPT
        assert [rows[index][field] for field in FIELDS[1:6]] == values
        assert rows[index]["user_id"] == user_hash(user)
    counts = run_record(tmp_path / "out")["counts"]
    assert {key: counts[key] for key in ("review lines", *REASONS)} == {
        "review lines": 16,
        "broken": 2,
        "without a user": 1,
        "without a rating": 3,
        "empty text": 2,
    }
    assert (counts["without their product"], counts["duplicates"], counts["rows"]) == (1, 2, 5)
    assert (counts["product lines"], counts["broken product lines"], counts["products"]) == (6, 0, 4)
    shown = capsys.readouterr()
    assert f"{reviews}:3: not JSON" in shown.err and f"{reviews}:16: not one JSON object" in shown.err
    assert "dropped: duplicates" in shown.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<br />b<br>c<BR/>d", "a\nb\nc\nd"),
        ("5&#34; &quot;x&quot; &#x27;y&#x27; &amp; &euro;", '5" "x" \'y\' & €'),
        ("&amp;lt;", "&lt;"),  # decoded once
        ("&lt;br /&gt;", "<br />"),  # somebody wrote about the tag
        ("R&D, AT&T; x &copy y", "R&D, AT&T; x &copy y"),  # no complete reference
        (" \u200b\ufeff\u00a0x\r\ny\rz\0 \n", "x\ny\nz"),
        ("<br>&nbsp;", ""),
        ("i <3 it", "i <3 it"),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


NO_TEXTS = [5, 5.5, True, {"a": "b"}, ["a", None]]


@pytest.mark.parametrize("field", ["text", "title", "parent_asin"])
def test_a_review_with_a_value_that_is_no_text_is_broken(field, tmp_path, capsys):
    """It used to be written as its JSON text; a parent_asin of 5 found the product "5"."""
    reviews = [review(f"user {n}", "P1", f"text {n}") for n in range(4)]
    reviews[2:2] = [review("ann", "P1", "good") | {field: value} for value in NO_TEXTS]
    products = PRODUCTS + [{"parent_asin": json.dumps(value), "title": "a product"} for value in NO_TEXTS]
    files = ["--reviews", write(tmp_path / "r.jsonl", reviews), "--meta", write(tmp_path / "m.jsonl", products)]
    splits = build(tmp_path / "out", files, train=3, test=1)
    assert sorted(row["row_id"] for part in splits.values() for row in part) == [0, 1, 7, 8]
    counts = run_record(tmp_path / "out")["counts"]
    assert (counts["broken"], counts["broken product lines"], counts["rows"]) == (len(NO_TEXTS), 0, 4)
    assert counts["without their product"] == 0
    shown = capsys.readouterr().err.splitlines()
    kinds = ["int", "float", "bool"]
    assert [line.partition("r.jsonl")[2] for line in shown[:3]] == [
        f":{number}: field '{field}' must be text, not {kind}" for number, kind in enumerate(kinds, 3)
    ]
    assert "field" in refused([*files, "--output_dir", tmp_path / "strict", "--train", 3, "--test", 1, "--strict"])[0]


def test_a_product_with_a_value_that_is_no_text_is_broken(tmp_path, capsys):
    reviews = [review(f"user {n}", asin, "fine") for n, asin in enumerate(["P1", "P2", "P3", "7"])]
    products = [
        {"parent_asin": "P1", "title": {"a": "b"}},  # of several lines about a product, the first valid one counts
        {"parent_asin": "P1", "title": "Bardel Kettle"},
        {"parent_asin": "P2", "title": ["Quillan Lamp"]},
        {"parent_asin": "P3", "title": None},
        {"parent_asin": 7, "title": "Tamvel Mat"},
    ]
    files = ["--reviews", write(tmp_path / "r.jsonl", reviews), "--meta", write(tmp_path / "m.jsonl", products)]
    splits = build(tmp_path / "out", files, train=1, test=1)
    rows = {row["row_id"]: row["Product Title"] for part in splits.values() for row in part}
    assert rows == {0: "Bardel Kettle", 2: ""}
    counts = run_record(tmp_path / "out")["counts"]
    assert (counts["broken product lines"], counts["products"], counts["without their product"]) == (3, 2, 2)
    assert "m.jsonl:5: field 'parent_asin' must be text, not int" in capsys.readouterr().err


def test_a_category_that_is_no_text_is_absent(tmp_path, capsys):
    products = [
        {"parent_asin": "P1", "title": "a", "main_category": {"name": "Home"}},
        {
            "parent_asin": "P2",
            "title": "b",
            "main_category": "Home",
            "categories": [["Kitchen", "Mugs"], 5, None, "Cups"],
        },
        {"parent_asin": "P3", "title": "c", "main_category": "Home", "categories": [{"name": "Mugs"}, True]},
        {"parent_asin": "P4", "title": "d", "main_category": "Home", "categories": "Kitchen"},
        {"parent_asin": "P5", "title": "e", "main_category": "null", "categories": []},
    ]
    reviews = [review(f"user {n}", product["parent_asin"], "fine") for n, product in enumerate(products)]
    files = ["--reviews", write(tmp_path / "r.jsonl", reviews), "--meta", write(tmp_path / "m.jsonl", products)]
    splits = build(tmp_path / "out", files, train=4, test=1)
    rows = {row["row_id"]: row["Product Categories"] for part in splits.values() for row in part}
    assert rows == {0: "", 1: "Cups", 2: "Home", 3: "Home", 4: "null"}
    counts = run_record(tmp_path / "out")["counts"]
    # the object; the list and the number; the object and the bool; the text in place of a list
    assert (counts["broken categories"], counts["broken product lines"]) == (1 + 2 + 2 + 1, 0)
    assert "6  categories left out: not text" in capsys.readouterr().out


def test_users_are_told_apart_as_everywhere(tmp_path):
    """`dataset.user_of` is the rule: a number and its text, with white space or without, are one user."""
    same = [5, 5.0, "5", " 5", "5\u00a0", 50e-1]
    large = [12345678901234567890123, "12345678901234567890123"]
    others = ["5.0", "05", "a b", "né", "\\", '"', "null", "a\u0000", 1e22, -0.0, 2**53 + 1, "x" * 300]
    nobody, broken = ["", " ", "\t\u2003", None], [5.5, True, {"id": 5}, [5], "NaN", "1e400", "9" * 5000]
    reviews = [review(user, "P1", f"text {n}") for n, user in enumerate([*same, *large, *others, *nobody, *broken[:4]])]
    bare = [json.dumps(review("ann", "P1", "x")).replace('"ann"', number) for number in broken[4:]]
    files = ["--reviews", write(tmp_path / "r.jsonl", reviews + bare), "--meta", write(tmp_path / "m.jsonl", PRODUCTS)]
    splits = build(tmp_path / "out", files, train=6, test=2)
    users = {row["row_id"]: row["user_id"] for part in splits.values() for row in part}
    assert users == {n: user_hash(dataset.user_of(row)) for n, row in enumerate(reviews[: -len(nobody) - 4])}
    assert len(set(users.values())) == 2 + len(others)
    counts = run_record(tmp_path / "out")["counts"]
    assert (counts["without a user"], counts["broken"]) == (len(nobody), len(broken))


def test_rows_pass_the_record_checks(goods, tmp_path):
    build_goods(tmp_path, goods)
    for split in SPLITS:
        rows = formats.read_rows(tmp_path / f"{split}.jsonl")
        assert dataset.validate(tmp_path / f"{split}.jsonl", rows, dataset.REVIEW_FIELDS) == "review"
        text, start = dataset.row_text(rows[0])
        assert rows[0]["Review"] == text[start:].strip() and rows[0]["Product Title"] in text[:start]
        assert not any("<br" in row["Review"] or "&#34;" in row["Review"] + row["Product Title"] for row in rows)


def test_generated_rows_agree_with_their_source(goods, tmp_path):
    splits = build_goods(tmp_path, goods)
    source, rows = read_lines(goods["reviews"]), [row for part in splits.values() for row in part]
    for row in rows:
        line = source[row["row_id"]]
        assert row["user_id"] == user_hash(line["user_id"])
        assert (row["Rating"], row["Review"]) == (line["rating"], clean(line["text"]))
    published = Counter(tuple(row[field] for field in dataset.REVIEW_FIELDS) for row in rows)
    assert max(published.values()) == 1
    counts, put_in = run_record(tmp_path)["counts"], goods["counts"]
    assert counts["empty text"] == put_in["empty"]
    assert counts["without their product"] == put_in["missing product"]
    assert counts["duplicates"] >= put_in["duplicates"]  # templates agree by chance too
    gone = counts["empty text"] + counts["without their product"] + counts["duplicates"]
    assert len(rows) == counts["rows"] == 6000 - gone


# ---------------------------------------------------------------- the split


def test_no_user_on_two_sides_and_exact_sizes(goods, tmp_path):
    splits = build_goods(tmp_path, goods)
    users = {split: {row["user_id"] for row in part} for split, part in splits.items()}
    assert (len(splits["train"]), len(splits["test"])) == (3000, 600)
    assert not users["train"] & users["test"] and not users["validation"] & (users["train"] | users["test"])
    assert max(Counter(row["user_id"] for row in splits["train"]).values()) > 5  # people with several reviews
    recorded = run_record(tmp_path)["stratification"]
    whole = Counter(row["Rating"] for part in splits.values() for row in part)
    for split, part in splits.items():
        ratings = Counter(row["Rating"] for row in part)
        assert recorded[split]["ratings"] == {str(rating): n for rating, n in ratings.items()}
        assert (recorded[split]["rows"], recorded[split]["users"]) == (len(part), len(users[split]))
        worst = max(abs(ratings[r] / len(part) - whole[r] / whole.total()) for r in whole)
        assert recorded[split]["largest_deviation_points"] == pytest.approx(100 * worst, abs=0.006)
        assert worst < 0.08  # four standard errors of a share of 0.63 among 600 rows
    assert recorded["all"]["users"] == sum(map(len, users.values()))


def test_train_depends_on_the_seed_and_not_on_test(goods, tmp_path):
    first = build_goods(tmp_path / "first", goods)
    assert build_goods(tmp_path / "second", goods, test=100)["train"] == first["train"]
    other = build_goods(tmp_path / "third", goods, "--seed", 1)["train"]
    assert {row["row_id"] for row in other} != {row["row_id"] for row in first["train"]}


@pytest.mark.parametrize(
    ("rows", "sizes", "sides", "room"),
    [
        ([2, 9, 1, 1, 2], [3, 3], [[0, 2], [3, 4]], [0, 0]),  # user 1 fits nowhere
        ([2, 9, 1, 1, 2], [2, 1], [[0], [2]], [0, 0]),
        ([2, 9], [30, 30], [[0, 1], []], [19, 30]),
        ([2, 2, 2], [3, 3], [[0], [1]], [1, 1]),  # the second user no longer fits into train
    ],
)
def test_take_users(rows, sizes, sides, room):
    assert take_users(enumerate(rows), sizes) == (sides, room)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 40), st.integers(1, 40))
def test_take_users_keeps_users_whole(numbers, train, test):
    users = list(enumerate(numbers))
    sides, room = take_users(iter(users), [train, test])
    taken = [user for side in sides for user in side]
    assert len(taken) == len(set(taken))
    for side, size, lack in zip(sides, (train, test), room):
        assert sum(numbers[user] for user in side) == size - lack
        if lack:  # no skipped user would have fitted
            assert all(rows > lack for user, rows in users if user not in taken)


def test_sizes_that_whole_users_cannot_give_are_reported(tmp_path, capsys):
    reviews = [review(f"user {n // 2}", "P1", f"text {n}") for n in range(20)]
    files = ["--reviews", write(tmp_path / "r.jsonl", reviews), "--meta", write(tmp_path / "m.jsonl", PRODUCTS)]
    splits = build(tmp_path / "out", files, train=5, test=4)
    assert {split: len(part) for split, part in splits.items()} == {"train": 4, "test": 4, "validation": 12}
    assert "train is 1 rows short" in capsys.readouterr().out
    assert run_record(tmp_path / "out")["counts"]["lacking"] == {"train": 1, "test": 0}


def test_largest_deviation():
    # shares 1/4 and 3/4 against 1/2 and 1/2: 25 points
    assert largest_deviation({1: 1, 5: 3}, {1: 10, 5: 10}) == 25.0
    assert largest_deviation({5: 2}, {1: 1, 2: 1, 5: 8}) == 20.0
    assert largest_deviation({}, {1: 1}) == 0.0


# ---------------------------------------------------------------- determinism and files


def test_files_depend_neither_on_threads_nor_on_compression(goods, tmp_path):
    packed = {}
    for flag in ("reviews", "meta"):
        packed[flag] = tmp_path / f"{flag}.jsonl.gz"
        packed[flag].write_bytes(gzip.compress(goods[flag].read_bytes()))
    build_goods(tmp_path / "reference", goods, "--threads", 1)
    build_goods(tmp_path / "threads", goods, "--threads", 4, "--memory_limit", "400MB")
    build_goods(tmp_path / "packed", packed)
    for split in SPLITS:
        digests = {sha256(tmp_path / folder / f"{split}.jsonl") for folder in ("reference", "threads", "packed")}
        assert len(digests) == 1, split


def test_lines_keep_their_numbers_when_several_threads_read(tmp_path):
    # 40 MB: DuckDB hands a thread up to 32 MB (twice its maximum_object_size of 16 MB) at a time
    reviews = [review(f"user {n}", "P1", f"{n} " + "long " * 4000) for n in range(2000)]
    reviews[1500] = "broken"
    files = ["--reviews", write(tmp_path / "r.jsonl", reviews), "--meta", write(tmp_path / "m.jsonl", PRODUCTS)]
    splits = build(tmp_path / "out", files, "--threads", 4, train=1000, test=100)
    rows = [row for part in splits.values() for row in part]
    assert sorted(row["row_id"] for row in rows) == [n for n in range(2000) if n != 1500]
    assert all(row["Review"].startswith(f"{row['row_id']} ") for row in rows)


def test_manifests_and_files_left(goods, tmp_path):
    build_goods(tmp_path, goods)
    names = {f"{split}.jsonl{more}" for split in SPLITS for more in ("", ".meta.json")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"run_prepare.json"}
    for split in SPLITS:
        manifest = manifests.read_manifest(tmp_path / f"{split}.jsonl")
        assert manifest["tag"] == f"amazon-{split}" and manifest["script"] == "data/amazon/prepare.py"
        assert manifest["rows"] == len(read_lines(tmp_path / f"{split}.jsonl"))
        assert manifest["sha256"] == sha256(tmp_path / f"{split}.jsonl")
        assert manifest["source"] == [
            {"path": str(goods["reviews"]), "sha256": sha256(goods["reviews"]), "rows": 6000},
            {"path": str(goods["meta"]), "sha256": sha256(goods["meta"]), "rows": 300},
        ]
        assert manifest["sampling"]["seed"] == 3407
    assert run_record(tmp_path)["status"] == "ok" and "duckdb" in run_record(tmp_path)["packages"]


def test_existing_files_are_refused_or_replaced(files, tmp_path):
    first = build(tmp_path / "out", files, train=2, test=1)
    words = [*files, "--output_dir", tmp_path / "out", "--train", 2, "--test", 1]
    assert prepare.main(list(map(str, words))) == 0  # finished already
    assert [line.split(": exists")[0] for line in refused([*words, "--seed", 1])] == [
        f"--output_dir {tmp_path / 'out' / split}.jsonl" for split in SPLITS
    ]
    assert build(tmp_path / "out", files, "--overwrite", train=2, test=1) == first  # replaced, not appended to
    # a failed run keeps the existing files
    record = run_record(tmp_path / "out")
    assert any(":3: not JSON" in line for line in refused([*words, "--overwrite", "--strict"]))
    assert {split: read_lines(tmp_path / "out" / f"{split}.jsonl") for split in SPLITS} == first
    assert not list((tmp_path / "out").glob(".*"))
    assert run_record(tmp_path / "out") == record  # of the run that wrote the files


def test_strict_passes_clean_files(goods, tmp_path):
    build_goods(tmp_path, goods, "--strict")


def test_the_first_three_broken_lines_are_shown(tmp_path, capsys):
    good = [review(f"u{n}", "P1", f"text {n}") for n in range(6)]
    broken = ['{"rating": 5', "nothing", "{}", "null", "17"]
    rows = [row for pair in zip(good, broken) for row in pair] + good[5:]
    files = [
        "--reviews",
        write(tmp_path / "r.jsonl", rows),
        "--meta",
        write(tmp_path / "m.jsonl", PRODUCTS[:1] + broken),
    ]
    build(tmp_path / "out", files, train=2, test=1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "r.jsonl" in line]
    assert [line.split("r.jsonl")[1][:3] for line in lines] == [":2:", ":4:", ":6:", ": …"]
    assert "… and 2 more" in lines[3]
    assert run_record(tmp_path / "out")["counts"]["broken product lines"] == 5


@pytest.mark.parametrize("name", ["it's.jsonl", "a[1].jsonl", "star*.jsonl", "what?.jsonl", "packed, no ending"])
def test_any_file_name(name, tmp_path):
    (tmp_path / "a1.jsonl").write_text("not this one\n")
    reviews = write(tmp_path / name, REVIEWS)
    if name.startswith("packed"):
        reviews.write_bytes(gzip.compress(reviews.read_bytes()))
    files = ["--reviews", reviews, "--meta", write(tmp_path / "m.jsonl", PRODUCTS)]
    assert len(build(tmp_path / "out", files, train=2, test=1)["validation"]) == 2


# ---------------------------------------------------------------- bad input


def test_all_problems_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    words = ["--reviews", "none.jsonl", "--meta", tmp_path, "--memory_limit", "much", "--output_dir", tmp_path / "file"]
    assert [line.split(":")[0] for line in refused(words)] == [
        "--reviews none.jsonl",
        f"--meta {tmp_path}",
        "--memory_limit much",
        f"--output_dir {tmp_path / 'file'}",
    ]
    assert entry(lambda: prepare.main([str(word) for word in words])) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert (
        len(
            refused(["--reviews", "a", "--meta", "b", "--train", "0", "--threads", "-1", "--seed", "-1", "--sead", "1"])
        )
        == 5
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no line is a row"),
        (b"plain text\nmore of it\n", "no line is a row"),
        (b'{"text": [], "title": {}}\n', "no line is a row"),
        (b'{"user_id": true, "title": 5}\n', "no line is a row"),
    ],
    ids=["empty", "no JSON", "lists", "a bool"],
)
@pytest.mark.parametrize("flag", ["--reviews", "--meta"])
def test_empty_files(flag, content, words, tmp_path, files):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    problems = refused([*files, flag, bad, "--output_dir", tmp_path / "out", "--train", 1, "--test", 1])
    assert problems[0].startswith(f"{flag} {bad}: {words}") and len(problems) == 1
    assert not (tmp_path / "out").exists()


def test_damaged_gzip_files_are_refused_before_anything_is_written(tmp_path):
    """One with a wrong CRC, which DuckDB reads as if nothing were wrong, and one cut off."""
    reviews, meta = write(tmp_path / "r.jsonl.gz", REVIEWS), write(tmp_path / "meta.jsonl.gz", PRODUCTS)
    content = bytearray(reviews.read_bytes())
    content[-8] ^= 1  # the last eight bytes are CRC-32 and length
    reviews.write_bytes(content)
    meta.write_bytes(meta.read_bytes()[:-20])
    words = ["--reviews", reviews, "--meta", meta, "--output_dir", tmp_path / "out", "--train", 1, "--test", 1]
    first, second = refused(words)
    assert first.startswith(f"--reviews {reviews}: damaged (CRC check failed")
    assert second.startswith(f"--meta {meta}: damaged (Compressed file ended before")
    assert not (tmp_path / "out").exists()


def test_an_empty_training_file_is_refused(tmp_path):
    reviews = write(tmp_path / "r.jsonl", [review("ann", "P1", f"text {number}") for number in range(10)])
    meta = write(tmp_path / "m.jsonl", PRODUCTS)
    words = ["--reviews", reviews, "--meta", meta, "--output_dir", tmp_path / "out", "--train", 8, "--test", 2]
    (problem,) = refused(words)
    assert problem.startswith("--train 8: each of the 1 remaining users has more reviews than that")
    assert not (tmp_path / "out").exists()


def test_an_output_name_that_is_a_directory_is_refused(files, tmp_path):
    (tmp_path / "out" / "test.jsonl").mkdir(parents=True)
    (problem,) = refused([*files, "--output_dir", tmp_path / "out", "--overwrite", "--train", 1, "--test", 1])
    assert "test.jsonl is a directory" in problem
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.jsonl"]


def test_more_rows_asked_for_than_there_are(files, tmp_path):
    (problem,) = refused([*files, "--output_dir", tmp_path / "out", "--train", 5, "--test", 1])
    assert problem.startswith("--train 5 --test 1: only 5 of 16 reviews are left")
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_overwritten(files, tmp_path):
    reviews = write(tmp_path / "out" / "train.jsonl", REVIEWS)
    before = reviews.read_bytes()
    (problem,) = refused([*files, "--reviews", reviews, "--output_dir", tmp_path / "out", "--overwrite"])
    assert "is also an input" in problem and reviews.read_bytes() == before
    (problem,) = refused([*files, "--meta", files[1], "--output_dir", tmp_path / "new"])
    assert "the same file as --reviews" in problem


def test_too_little_memory_is_reported(goods, tmp_path):
    words = ["--reviews", goods["reviews"], "--meta", goods["meta"], "--output_dir", tmp_path / "out"]
    (problem,) = refused([*words, "--train", 10, "--test", 1, "--memory_limit", "1MB"])
    assert problem.startswith("--memory_limit 1MB: not enough")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- as a process


@pytest.mark.parametrize("sign", [".prepare.*.tmp/work.duckdb", ".train.jsonl.*.tmp", ".validation.jsonl.*.tmp"])
def test_a_killed_run_leaves_no_partial_file(sign, goods, tmp_path):
    words = ["--reviews", goods["reviews"], "--meta", goods["meta"], "--output_dir", tmp_path]
    words += ["--train", "3000", "--test", "600"]
    script = [sys.executable, ROOT / "data/amazon/prepare.py", *words]
    process = subprocess.Popen(list(map(str, script)), stdout=subprocess.DEVNULL, cwd="/")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert left == ([] if "work" in sign else ["run_prepare.json"])  # the record begins when the inputs are read
    assert len(build_goods(tmp_path, goods)["train"]) == 3000  # and the next run needs no --overwrite
    assert not list(tmp_path.glob(".*"))  # and removes what the killed one left


def test_as_a_process(files, tmp_path):
    words = ("data/amazon/prepare.py", *files, "--output_dir", tmp_path / "out", "--test", 1)
    done = run_script(*words, "--train", 2)
    assert done.returncode == 0 and "2 star" in done.stdout, done.stderr
    done = run_script(*words, "--train", 9, "--overwrite")
    assert (done.returncode, done.stderr.count("\n")) == (2, 3)  # two broken lines and the problem
    begun = time.monotonic()
    done = run_script("data/amazon/prepare.py", "--help")
    assert time.monotonic() - begun < 5 and "(default: 1.2GB)" in done.stdout


def test_help_loads_nothing_heavy():
    code = "import sys; from data.amazon import prepare; prepare.make_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"duckdb", "pyarrow", "pandas", "torch"} & set(done.stdout.split())


# ---------------------------------------------------------------- the generator


def test_generated_files_are_like_the_published_ones(goods):
    reviews, products = read_lines(goods["reviews"]), read_lines(goods["meta"])
    assert (len(reviews), len(products)) == (6000, 300)
    assert list(reviews[0]) == [
        "rating",
        "title",
        "text",
        "images",
        "asin",
        "parent_asin",
        "user_id",
        "timestamp",
        "helpful_vote",
        "verified_purchase",
    ]
    ratings = Counter(row["rating"] for row in reviews)
    for rating, share in shop.RATINGS.items():
        assert ratings[rating] / 6000 == pytest.approx(share, abs=0.03)  # over four standard errors
    assert any("<br />" in row["text"] for row in reviews) and any("&#34;" in row["title"] for row in products)
    assert any(not row["categories"] and row["main_category"] for row in products)
    assert any(not row["categories"] and not row["main_category"] for row in products)
    assert min(goods["counts"].values()) > 0


def test_generated_texts_depend_on_rating_and_product(goods):
    products = {row["parent_asin"]: int(row["parent_asin"][1:]) for row in read_lines(goods["meta"])}
    for row in read_lines(goods["reviews"])[:500]:
        if row["parent_asin"] not in products or not clean(row["text"]):
            continue
        parts = KINDS[products[row["parent_asin"]] % len(KINDS)][3]
        good, bad = (sum(part[side] in row["text"] for part in parts) for side in (1, 2))
        expected = {5: (True, False), 2: (False, True), 1: (False, True)}
        assert good + bad > 0
        assert (good > 0, bad > 0) == expected.get(row["rating"], (True, bad > 0))


def test_the_generator_is_deterministic_and_refuses_to_overwrite(tmp_path):
    words = ["--reviews", "50", "--products", "5", "--gzip"]
    for folder in ("a", "b"):
        assert make_reviews.main([*words, "--output_dir", str(tmp_path / folder)]) == 0
    assert make_reviews.main([*words, "--seed", "1", "--output_dir", str(tmp_path / "c")]) == 0
    name = "Fictional_Goods.jsonl.gz"
    assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name) != sha256(tmp_path / "c" / name)
    with pytest.raises(UserError) as error:
        make_reviews.main(["--category", "a/b", *words, "--output_dir", str(tmp_path / "a")])
    assert len(error.value.problems) == 1
    assert make_reviews.main([*words, "--output_dir", str(tmp_path / "a")]) == 0  # finished already
    with pytest.raises(UserError) as error:
        make_reviews.main([*words, "--output_dir", str(tmp_path / "a"), "--seed", "1"])
    assert len(error.value.problems) == 2
    assert manifests.read_manifest(tmp_path / "a" / name)["rows"] == 50
