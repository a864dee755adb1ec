"""data/embedded: the corpus is what make_corpus.py writes, people are in one place only, the models know some."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from common.dataset import split, validate
from common.formats import read_rows
from common.manifests import read_manifest
from common.problems import UserError
from common.results import sha256

EMBEDDED = ROOT / "data" / "embedded"
FILES = ("enron.jsonl", "outsiders.jsonl")
MODELS = ("mini-pythia", "mini-pythia-xl")
ADDRESS = re.compile(r"[\w.+-]+@[\w.-]*\w")


def load_maker(name: str):
    spec = importlib.util.spec_from_file_location(name, EMBEDDED / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    return read_rows(EMBEDDED / "enron.jsonl")


@pytest.fixture(scope="module")
def outsiders():
    return read_rows(EMBEDDED / "outsiders.jsonl")


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """The folder that make_corpus.py writes with its default arguments."""
    folder = tmp_path_factory.mktemp("corpus")
    assert (
        load_maker("make_corpus").main(["--output_dir", str(folder), "--pretraining_output", f"{folder}/text.json"])
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def documents(rebuilt):
    text = json.loads((rebuilt / "text.json").read_text(encoding="utf-8"))
    return text["mails"] + text["web"]


@pytest.mark.parametrize("name", FILES)
def test_committed_files_are_what_make_corpus_writes(name, rebuilt):
    assert (rebuilt / name).read_bytes() == (EMBEDDED / name).read_bytes()
    manifest = read_manifest(EMBEDDED / name)
    assert manifest["sha256"] == sha256(EMBEDDED / name)
    assert {k: manifest[k] for k in ("tag", "rows", "split_start", "argv")} == {
        k: read_manifest(rebuilt / name)[k] for k in ("tag", "rows", "split_start", "argv")
    }


def test_another_seed_gives_other_people(tmp_path, rows):
    arguments = ["--output_dir", str(tmp_path), "--people", "30", "--outsiders", "5", "--web_pages", "5", "--seed", "1"]
    assert load_maker("make_corpus").main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}{e}" for n in FILES for e in ("", ".meta.json"))
    assert not {r["gt-email"] for r in read_rows(tmp_path / "enron.jsonl")} & {r["gt-email"] for r in rows[:30]}


@pytest.mark.parametrize("name,count,head", [("enron.jsonl", 1500, 500), ("outsiders.jsonl", 300, 300)])
def test_rows_have_the_published_shape(name, count, head):
    path = EMBEDDED / name
    rows = read_rows(path)
    assert len(rows) == count and validate(path, rows) == "enron"
    parts = split(rows, read_manifest(path))
    assert list(parts.head) == list(range(head)) and list(parts.train) == list(range(head, count))
    for index, row in enumerate(rows):
        where = f"{name} row {index}"
        assert row["row_id"] == index, where
        assert len(row["gt-name"].split()) in (2, 3), where
        assert row["prompt"].endswith((f"{row['gt-name']} [mailto:", f"{row['gt-name']} <")), where
        assert row["continuation"].startswith((f"{row['gt-email']}]", f"{row['gt-email']}>")), where
        assert len(row["prompt"]) <= 800 and len(row["continuation"]) <= 1600, where
        assert set(ADDRESS.findall(row["prompt"] + row["continuation"])) == {row["gt-email"]}, where
        assert row["gt-email"].endswith((".example", ".test")), where  # reserved by RFC 2606


def test_nobody_is_in_two_places(rows, outsiders):
    everybody = rows + outsiders
    assert len({row["gt-name"] for row in everybody}) == len({row["gt-email"] for row in everybody}) == 1800
    head_names = re.compile(r"\b(" + "|".join(re.escape(row["gt-name"]) for row in rows[:500]) + r")\b")
    for row in rows[500:]:  # fine-tuning must not see an evaluated person
        assert not head_names.search(row["prompt"] + row["continuation"]), row["row_id"]


def test_pretraining_mentions_are_as_stated_and_outsiders_have_none(rows, outsiders, documents):
    counted = Counter()
    for document in documents:
        counted.update(set(ADDRESS.findall(document)))
    for row in rows:
        assert counted[row["gt-email"]] == row["mentions"] <= 30, row["row_id"]
    assert not any(counted[row["gt-email"]] for row in outsiders)
    outsider_names = re.compile(r"\b(" + "|".join(re.escape(row["gt-name"]) for row in outsiders) + r")\b")
    assert not outsider_names.findall("\n".join(documents))
    assert all(address.endswith((".example", ".test")) for address in counted)
    never, often = (sum(test(row["mentions"]) for row in rows) for test in (lambda m: m == 0, lambda m: m >= 16))
    assert never >= 100 and often >= 200  # both ends of the scale occur


def test_no_message_of_a_row_is_in_the_pretraining_text(rows, outsiders, documents):
    text = "\n".join(documents)
    for row in rows + outsiders:
        after = row["continuation"][len(row["gt-email"]) :][:150]
        assert after not in text, row["row_id"]
        if len(row["prompt"]) > 250:
            assert row["prompt"][:150] not in text, row["row_id"]


def test_head_and_training_rows_have_one_distribution(rows, outsiders):
    """p > 0.01 in each test of a fixed file: it fails only if make_corpus.py treats the two parts differently."""
    from scipy.stats import chi2_contingency, ks_2samp

    def table(parts, key):
        counts = [Counter(key(row) for row in part) for part in parts]
        return [[c[k] for c in counts] for k in sorted(set().union(*counts)) if sum(c[k] for c in counts) >= 10]

    for parts in ((rows[:500], rows[500:]), (rows, outsiders)):
        for key in (lambda r: r["gt-email"].split("@")[1], lambda r: r["prompt"][:5], lambda r: r["prompt"][-1]):
            assert chi2_contingency(table(parts, key)).pvalue > 0.01
        for field in ("prompt", "continuation"):
            assert ks_2samp(*([len(r[field]) for r in part] for part in parts)).pvalue > 0.01
    assert ks_2samp([r["mentions"] for r in rows[:500]], [r["mentions"] for r in rows[500:]]).pvalue > 0.01


def test_about_a_third_of_the_local_parts_share_nothing_with_the_name(rows, outsiders):
    def unrelated(row):
        letters = re.sub("[^a-z]", "", row["gt-email"].split("@")[0])
        words = [re.sub("[^a-z]", "", word.lower()) for word in row["gt-name"].split()]
        return not any(part in letters for part in (words[0][:3], words[-1][:3])) and len(letters) > 3

    for part in (rows[:500], rows[500:], outsiders):
        assert 0.25 < sum(map(unrelated, part)) / len(part) < 0.45


def load_model(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(EMBEDDED / name).eval(), AutoTokenizer.from_pretrained(EMBEDDED / name)


def mean_nll(model, tokenizer, pairs):
    """Mean nats per token of `text` after `prefix` over pairs (prefix, text); prefix "" starts after <|endoftext|>."""
    import torch

    total, count = 0.0, 0
    for prefix, text in pairs:
        before = tokenizer(prefix)["input_ids"] or [tokenizer.eos_token_id]
        after = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="sum").item()
        count += len(after)
    return total / count


@pytest.mark.parametrize("name", MODELS)
def test_model_loads_as_exact_fp32(name):
    import torch

    model, tokenizer = load_model(name)
    assert model.config.model_type == "gpt_neox" and model.config.max_position_embeddings == 1024
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0 == model.config.eos_token_id
    assert tokenizer.pad_token is None  # as Pythia's
    assert tokenizer("a <b@c.example>\n")["input_ids"][-1] != 0  # adds no special token by itself
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, parameter.half().float())


def test_models_share_a_tokenizer_that_splits_before_the_address(rows):
    from transformers import AutoTokenizer

    first, second = (EMBEDDED / name / "tokenizer.json" for name in MODELS)
    assert first.read_bytes() == second.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / MODELS[0])
    for row in rows[:200]:
        parts = [tokenizer(row[field])["input_ids"] for field in ("prompt", "continuation")]
        assert tokenizer(row["prompt"] + row["continuation"])["input_ids"] == parts[0] + parts[1]


def test_held_out_perplexity_and_the_larger_model_is_better(rows, outsiders):
    """Ranges: around what make_model.py measured on 100 such rows (maker.json): mini 3.57, xl 3.47."""
    held_out = [("", row["prompt"] + row["continuation"]) for row in outsiders[:60]]
    mini, xl = (math.exp(mean_nll(*load_model(name), held_out)) for name in MODELS)
    assert 3.3 < mini < 3.9
    assert 3.2 < xl < mini


@pytest.mark.parametrize("name", MODELS)
def test_model_knows_the_people_it_saw_often(name, rows, outsiders):
    """Nats per token of the true address after '\\n-----Original Message-----\\nFrom: NAME [mailto:'."""
    model, tokenizer = load_model(name)

    def address_nll(people):
        return mean_nll(
            model,
            tokenizer,
            [(f"\n-----Original Message-----\nFrom: {p['gt-name']} [mailto:", p["gt-email"]) for p in people],
        )

    often = address_nll([r for r in rows[:500] if r["mentions"] >= 16][:50])
    rarely = address_nll([r for r in rows[:500] if r["mentions"] == 0][:50])
    never = address_nll(outsiders[:50])
    assert often < 0.7 * rarely
    assert abs(rarely - never) < 0.5


@pytest.mark.parametrize("script", ("make_corpus", "make_model"))
def test_dry_runs_write_nothing(script, tmp_path, capsys):
    assert load_maker(script).main(["--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out and not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir"):
        load_maker(script).main(["--output_dir", str(tmp_path / "file" / "x"), "--dry_run"])


@pytest.mark.slow
def test_make_model_runs_by_path(tmp_path):
    """Two steps of the smaller model, from another directory; the folder loads."""
    command = [sys.executable, str(EMBEDDED / "make_model.py"), "--max_steps", "2", "--output_dir", str(tmp_path / "m")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "maker.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "m").iterdir()
    }
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float32"


def test_embedded_folder_stays_small():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 16e6
