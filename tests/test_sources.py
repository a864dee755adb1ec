"""Data paths that are not one file: patterns and folders of `datasets`; the same rows, and hashes of their content."""

import datasets
import pytest
from conftest import make_rows, read_lines, write_rows
from planted import text_rows

from common import dataset, formats, manifests, results, sources
from common.problems import UserError
from common.sources import data_files

ROWS = make_rows(30)


@pytest.fixture
def saved(tmp_path):
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    whole.save_to_disk(tmp_path / "three", num_shards=3)
    datasets.DatasetDict(train=whole, test=whole.select(range(3))).save_to_disk(tmp_path / "dictionary")
    whole.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    return tmp_path


def test_saved_data_sets_have_their_rows(saved):
    for name in ("one", "three", "dictionary/train"):
        assert formats.read_rows(saved / name) == ROWS
        assert dataset.validate(saved / name, formats.read_rows(saved / name)) == "enron"
    assert formats.read_rows(saved / "dictionary/test") == ROWS[:3]
    shuffled = formats.read_rows(saved / "shuffled")
    assert shuffled == datasets.load_from_disk(str(saved / "shuffled")).to_list() != ROWS


def test_a_dictionary_of_splits_is_refused_by_name(saved):
    with pytest.raises(UserError, match=r"several splits; name the folder of one: test, train"):
        formats.read_rows(saved / "dictionary")


@pytest.mark.parametrize("damage", ["state", "missing", "indices"])
def test_a_damaged_folder_is_one_line(damage, saved):
    state = saved / "one" / "state.json"
    if damage == "state":
        state.write_text("{")
    elif damage == "missing":
        next((saved / "one").glob("*.arrow")).unlink()
    else:
        state.write_text(state.read_text().replace("{", '{"_indices_data_files": [{"filename": "x.arrow"}],', 1))
    with pytest.raises(UserError) as error:
        formats.read_rows(saved / "one")
    (line,) = error.value.problems
    assert str(saved / "one") in line and "\n" not in line


def test_a_pattern_reads_its_files_in_order(tmp_path):
    for number in (2, 0, 1):
        write_rows(tmp_path / f"part-{number}.jsonl", ROWS[10 * number : 10 * number + 10])
    pattern = tmp_path / "part-*.jsonl"
    assert [path.name for path in data_files(pattern)] == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
    assert formats.read_rows(pattern) == ROWS
    with pytest.raises(UserError, match="no file matches this pattern"):
        formats.read_rows(tmp_path / "none-*.jsonl")
    write_rows(tmp_path / "part-3.jsonl", text_rows(2, 1))
    with pytest.raises(UserError, match="another row type"):
        dataset.validate(pattern, formats.read_rows(pattern))


def test_a_file_with_a_magic_name_is_itself(tmp_path):
    file = write_rows(tmp_path / "a[1].jsonl", ROWS)
    assert formats.read_rows(file) == ROWS and data_files(file) == [file]


def test_broken_lines_are_numbered_over_all_files(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "b.jsonl").write_text("{\n", encoding="utf-8")
    broken: dict[int, str] = {}
    assert formats.read_rows(tmp_path / "*.jsonl", broken) == [*ROWS[:2], {}]
    assert list(broken) == [2]
    with pytest.raises(UserError, match=r"b\.jsonl:1: not JSON"):
        formats.read_rows(tmp_path / "*.jsonl")


def test_the_hash_follows_content_and_order(saved):
    assert results.sha256(saved / "one") == results.sha256(next((saved / "one").glob("*.arrow")))
    three = results.sha256(saved / "three")
    assert three != results.sha256(saved / "one") and len(three) == 64
    datasets.Dataset.from_list(ROWS[::-1]).save_to_disk(saved / "reversed", num_shards=3)
    assert results.sha256(saved / "reversed") != three
    assert results.sha256(saved / "three") == three


def test_fields_are_renamed(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"body": "x", "title": "t"}, {"body": "y", "title": "u"}])
    assert formats.read_rows(file, None, ["text=body"]) == [{"text": "x", "title": "t"}, {"text": "y", "title": "u"}]
    exchanged = formats.read_rows(file, None, ["title=body", "body=title"])
    assert exchanged == [{"title": "x", "body": "t"}, {"title": "y", "body": "u"}]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["text"], "give NEW=OLD"),
        (["text=body", "text=title"], "each name once"),
        (["text=words"], "no row of .* has the field 'words'"),
        (["title=body"], "have a field 'title' already"),
    ],
)
def test_fields_that_cannot_be_renamed(columns, said, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"body": "x", "title": "t"}])
    with pytest.raises(UserError, match=said):
        formats.read_rows(file, None, columns)


def test_training_attacks_and_perplexity_read_renamed_fields(models, tmp_path):
    """The same numbers as with the fields named as they should be."""
    import run_peft
    from mia import mia
    from perplexity import perplexity
    from training.checkpoint import checkpoints
    from training.run import run as fine_tune

    plain = {name: write_rows(tmp_path / f"{name}.jsonl", text_rows(12, seed)) for name, seed in (("a", 1), ("b", 2))}
    (tmp_path / "odd").mkdir()
    odd = {
        name: write_rows(tmp_path / "odd" / file.name, [{"body": row["text"]} for row in formats.read_rows(file)])
        for name, file in plain.items()
    }
    found = []
    for files, more, out in ((plain, [], tmp_path / "one"), (odd, ["--columns", "text=body"], tmp_path / "two")):
        words = ["-m", models["llama"], "-i", files["a"], "--output_root", out, "-lr", "1e-3", "-e", 1, "--lora_r", 2]
        config = run_peft.make_parser().parse_args([str(word) for word in [*words, *more]])
        checkpoint = checkpoints(fine_tune(config))[-1]
        attack = ["--model", checkpoint, "--members", files["a"], "--nonmembers", files["b"], "--attacks", "loss"]
        assert mia.main([str(word) for word in [*attack, "--output_dir", out / "mia", *more]]) == 0
        score = ["--model", checkpoint, "--dataset", files["a"], "--output_dir", out / "ppl", *more]
        assert perplexity.main([str(word) for word in score]) == 0
        found.append(
            [read_lines(out / "mia/results_mia.jsonl")[0]["auc"], read_lines(out / "ppl/perplexity.jsonl")[0]["mean"]]
        )
    assert found[0] == found[1]


@pytest.fixture
def no_names(monkeypatch):
    monkeypatch.setattr(sources, "_loaded", {})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", True),
        ("org/name:test", True),
        ("imdb", True),
        ("./org/name", False),
        ("/org/name", False),
        ("../name", False),
        ("org/name.jsonl", False),
        ("name.parquet", False),
        ("part-*", False),
        ("a/b/c", False),
        ("inside/name", False),  # its folder exists
        ("inside", False),
    ],
)
def test_what_can_only_be_a_name(path, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    assert sources.is_hub_name(path) is expected


def hub(folder, asked):
    """A load_dataset that serves the names of a hub from `folder`."""
    real = datasets.load_dataset

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        return real(str(folder / name), config, split=split)

    return load_dataset


def test_a_name_is_loaded_and_read_by_its_split(tmp_path, monkeypatch, no_names):
    """The library's own loader on a folder of data files, in place of the hub: rows, hash, tag."""
    asked: list[tuple] = []
    folder = tmp_path / "org" / "some-name"
    folder.mkdir(parents=True)
    for split, n in (("train", 20), ("test", 7)):
        write_rows(folder / f"{split}.jsonl", text_rows(n, n))
    monkeypatch.chdir(tmp_path / "org")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", hub(tmp_path, asked))
    sources.load(["org/some-name", "org/some-name:test", None], None, None)
    assert asked == [("org/some-name", None, "train"), ("org/some-name", None, "test")]
    for path, n in (("org/some-name", 20), ("org/some-name:test", 7)):
        rows = formats.open_rows(path)
        assert [row["text"] for row in rows] == [row["text"] for row in text_rows(n, n)]
        assert len(results.sha256(path)) == 64 and dataset.validate(path, rows) == "text"
    assert manifests.data_tag("org/some-name:test", None) == "some-nametest"
    sources.load(["org/some-name"], "test", None)
    assert len(formats.read_rows("org/some-name")) == 7
    with pytest.raises(UserError, match=r'Unknown split "none"'):
        sources.load(["org/some-name"], "none", None)
    with pytest.raises(UserError, match="give the name of one split"):
        sources.load(["org/some-name"], "train[:3]", None)


def test_a_folder_with_splits(saved, no_names):
    path = str(saved / "dictionary")
    sources.load([path], "test", None)
    assert formats.read_rows(path) == ROWS[:3]
    with pytest.raises(UserError, match="no such split; choose from test, train"):
        sources.load([path], "validation", None)
    files = saved / "files"
    files.mkdir()
    write_rows(files / "train.jsonl", text_rows(5, 1))
    with pytest.raises(UserError, match="is a directory"):
        formats.read_rows(files)
    sources.load([str(files)], "train", None)
    assert [row["text"] for row in formats.read_rows(files)] == [row["text"] for row in text_rows(5, 1)]


@pytest.mark.parametrize("script", ["run_peft", "mia", "perplexity", "audit"])
def test_a_name_without_a_network_is_one_line(script, models, tmp_path, monkeypatch, capsys, no_names):
    import audit
    import run_peft
    from common.process import entry
    from mia import mia
    from perplexity import perplexity

    monkeypatch.chdir(tmp_path)
    model, name, out = str(models["llama"]), "some-org/never-cached", ["--output_dir", str(tmp_path / "out")]
    mains = {
        "run_peft": (run_peft, ["-m", model, "--data", name, *out]),
        "mia": (mia, ["--model", model, "--data", name, *out]),
        "perplexity": (perplexity, ["--model", model, "--data", name, *out]),
        "audit": (audit, ["--model", model, "--data", name, *out]),
    }
    module, argv = mains[script]
    monkeypatch.setattr("sys.argv", [script, *argv])
    assert entry(module.main) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{name}: not a file here") and "offline" in line and not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", [script, *argv, "--split", "train"])
    argv[argv.index(name)] = "absent.jsonl"
    monkeypatch.setattr("sys.argv", [script, *argv])
    assert entry(module.main) == 2
    assert "absent.jsonl: no such file" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [script, *argv, "--split", "test"])
    assert entry(module.main) == 2
    assert "--split test: absent.jsonl is not the name of a data set" in capsys.readouterr().err
