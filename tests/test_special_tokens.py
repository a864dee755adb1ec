"""One start token before a text, and a note if a text spells a special token: training, scoring, attacks."""

import json

import pytest
from conftest import make_model, make_rows, read_lines, write_rows

import run_peft
from common import models, tokenization
from common.chat import Rendered
from common.tokenization import encode_prompt
from mia import mia as mia_script
from mia import signals
from perplexity import perplexity as perplexity_script
from perplexity.measure import tokenize
from training import batches

BOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose tokenizer puts its own start token '<s>' (id 1) before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = make_model(tmp_path_factory.mktemp("bos"), "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # the 400 ids are taken: '<s>' is the text of the token with id 1
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    spelled = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.add_special_tokens({"bos_token": spelled})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{spelled} $A", pair=f"{spelled} $A {spelled} $B", special_tokens=[(spelled, BOS)]
    )
    assert state["model"]["vocab"][spelled] == BOS
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    made = models.load_tokenizer(models.find_model(str(folder)))
    assert made("Ada").input_ids[0] == BOS and made(made.bos_token + "Ada").input_ids[:2] == [BOS, BOS]
    return made


def test_a_text_that_begins_with_the_start_token_has_one(tokenizer):
    plain, marked = "From: Ada Quillan", tokenizer.bos_token + "From: Ada Quillan"
    wanted = tokenizer(plain).input_ids
    assert wanted.count(BOS) == 1
    (row,) = batches.encode([Rendered(marked, None)], tokenizer, 64)
    (bare,) = batches.encode([Rendered(plain, None)], tokenizer, 64)
    assert row.ids == bare.ids == [*wanted, tokenizer.eos_token_id]
    start = len(tokenizer.bos_token)
    assert row.kept == (tuple(start + place for place in bare.kept[0]),)
    assert signals.encode(tokenizer, [marked], 64).tokens == [wanted]
    assert tokenize(tokenizer, [marked, plain]) == [wanted, wanted]
    assert encode_prompt(tokenizer, marked) == wanted
    assert tokenization.encode_texts(tokenizer, [marked, plain]) == [wanted, wanted]


def test_a_doubled_start_token_is_said(folder, tokenizer, models, tmp_path, capsys):
    """By run_peft, perplexity, mia and audit, and the numbers are those of the texts without it."""
    import audit
    from common import models as loading
    from common import tokenization

    rows = [{"text": row["prompt"] + row["continuation"]} for row in make_rows(16, seed=2)]
    marked = [{"text": tokenizer.bos_token + row["text"]} for row in rows[:3]] + rows[3:]
    note = f"3 texts start with {tokenizer.bos_token}, which the tokenizer adds too: it is used once"
    assert tokenization.bos_note(tokenizer, [row["text"] for row in marked]) == note
    assert tokenization.bos_note(tokenizer, [row["text"] for row in rows]) is None
    plain = loading.load_tokenizer(loading.find_model(str(models["neox"])))  # adds none
    assert tokenization.bos_note(plain, [plain.bos_token + "Ada"]) is None
    other = write_rows(tmp_path / "other.jsonl", [{"text": row["prompt"]} for row in make_rows(16, seed=3)])
    means = []
    for name, content in (("plain", rows), ("marked", marked)):
        data, out = write_rows(tmp_path / f"{name}.jsonl", content), tmp_path / name
        said = []
        for main, words in (
            (run_peft.main, ["-m", folder, "-i", data, "--output_root", out, "--dry_run"]),
            (perplexity_script.main, ["--model", folder, "-d", data, "--output_dir", out, "--num_rows", 16]),
            (mia_script.main, ["--model", folder, "--members", data, "--nonmembers", other, "--attacks", "loss"]),
            (audit.main, ["--model", folder, "--train", data, "--output_dir", out / "audit"]),
        ):
            more = ["--bootstrap", 20, "--output_dir", out / "mia"] if main is mia_script.main else []
            more = ["--quick", "--samples", 2, "--decoys", 20] if main is audit.main else more
            assert main([str(word) for word in [*words, *more]]) == 0
            both = capsys.readouterr()
            said.append(note in both.out + both.err)
        assert said == [name == "marked"] * 4
        scores = [row["loss"] for row in read_lines(out / "mia" / "scores_mia.jsonl")]
        means.append((read_lines(out / "perplexity.jsonl")[0]["mean"], scores))
    assert means[0] == means[1]


def test_a_start_token_typed_twice_stays_where_the_tokenizer_adds_none(models, tmp_path):
    """GPT-NeoX' tokenizer adds nothing: what is typed is what the model reads."""
    from common import models as loading
    from common import tokenization

    plain = loading.load_tokenizer(loading.find_model(str(models["neox"])))
    assert tokenization.encode_texts(plain, ["<|endoftext|><|endoftext|>Ada"])[0][:2] == [0, 0]


def test_special_tokens_in_texts_are_counted_and_reported(models, tmp_path, capsys):
    from common import models as loading
    from common import tokenization

    tokenizer = loading.load_tokenizer(loading.find_model(str(models["llama"])))
    rows = [{"text": row["prompt"] + row["continuation"]} for row in make_rows(8, seed=2)]
    rows[2]["text"] = "one <|endoftext|> two"
    rows[5]["text"] = "<|endoftext|>the start token is no surprise"
    rows[6]["text"] = "<|endoftext|>but <|endoftext|> a second one is"
    texts = [row["text"] for row in rows]
    assert tokenization.special_tokens_in(tokenizer, texts) == {"<|endoftext|>": 2}
    data = write_rows(tmp_path / "rows.jsonl", rows)
    note = "special tokens typed in the texts are encoded as special tokens: <|endoftext|> in 2"

    words = ["-m", models["llama"], "-i", data, "--output_root", tmp_path, "--lora_r", 2, "-e", 1, "-lr", "1e-2"]
    assert run_peft.main([str(word) for word in words]) == 0
    assert note in capsys.readouterr().out
    assert json.loads(next(tmp_path.rglob("run.json")).read_text())["special_tokens"] == {"<|endoftext|>": 2}

    words = ["--model", models["llama"], "-d", data, "--output_dir", tmp_path / "perplexity"]
    assert perplexity_script.main([str(word) for word in words]) == 0
    assert note in capsys.readouterr().err
    record = json.loads((tmp_path / "perplexity" / "run_perplexity.json").read_text())
    assert record["special_tokens"] == {"<|endoftext|>": 2}

    other = write_rows(tmp_path / "other.jsonl", make_rows(8, seed=3))
    words = ["--model", models["llama"], "--members", data, "--nonmembers", other, "--bootstrap", 20]
    assert mia_script.main([str(word) for word in [*words, "--attacks", "loss", "--output_dir", tmp_path / "mia"]]) == 0
    assert note in capsys.readouterr().err
    assert read_lines(tmp_path / "mia" / "results_mia.jsonl")[0]["n_members"] == 8


def test_packing_is_refused_where_rows_see_each_other(tmp_path):
    """The mask that keeps rows apart hides a sliding window, or is not seen: neither is trained silently."""
    from families import make_family

    from common.problems import UserError

    data = write_rows(tmp_path / "rows.jsonl", [{"text": row["prompt"]} for row in make_rows(8)])
    for number, name in enumerate(("mistral (window)", "bloom (ALiBi)", "mamba2")):
        (tmp_path / f"model{number}").mkdir()
        folder = make_family(tmp_path / f"model{number}", name)
        words = ["-m", folder, "-i", data, "--output_root", tmp_path, "--packing", "--max_length", 96, "--lora_r", 2]
        words += ["--target_modules", "in_proj"] if name == "mamba2" else []
        with pytest.raises(UserError, match="--packing: this model does not keep the rows of a sequence apart"):
            run_peft.main([str(word) for word in words])
