"""data/continuation/generate.py: the rows it writes, their independence of batches and ranks, killing and resuming."""

import json
import sys

import pytest
from conftest import ROOT, kill_when_written, make_rows, read_lines, run_script, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import run_peft
from common import dataset as data_files
from common import formats, manifests
from common.problems import UserError
from data import generation
from data.continuation import generate, text_statistics

QUICK = ["--max_tokens", "12", "--top_k", "20"]


def words(model, dataset, output, *more):
    return [str(word) for word in ("-m", model, "-d", dataset, "--output", output, *QUICK, *more)]


def make(model, dataset, output, *more) -> list[dict]:
    assert generate.main(words(model, dataset, output, *more)) == 0
    return formats.read_rows(output)


def tokens_of(model, prompt):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(prompt).input_ids


# ---------------------------------------------------------------- the file


def test_rows_files_and_manifest(models, dataset, tmp_path):
    source = read_lines(dataset)
    made = make(models["llama"], dataset, tmp_path / "out" / "data.arrow")
    names = ["data.arrow", "data.arrow.meta.json", "run_generate.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [row["row_id"] for row in made] == list(range(20, 60))  # the head of 60 rows is 20
    for row in made:
        assert {key: row[key] for key in source[0]} == source[row["row_id"]]
        assert row["text"] == row["prompt"] + row["generation"] + "<|endoftext|>"
        assert row["finish_reason"] == ("length" if row["generated_tokens"] == 12 else "stop")
    assert len({row["generation"] for row in made}) > 30

    from datasets import Dataset

    assert Dataset.from_file(str(tmp_path / "out" / "data.arrow")).to_list() == made
    manifest = manifests.read_manifest(tmp_path / "out" / "data.arrow")
    assert manifest["tag"] == "self-generated-tiny-llama" and manifest["split_start"] == 20 and manifest["rows"] == 40
    assert manifest["source"][0]["rows"] == 60 and manifest["generator"]["model"] == str(models["llama"])
    assert manifest["sampling"]["temperature"] == 0.75 and manifest["sampling"]["seed"] == 3407
    assert data_files.evaluated_rows(made, manifest) == []
    record = json.loads((tmp_path / "out" / "run_generate.json").read_text())
    assert record["status"] == "ok" and record["statistics"]["rows"] == 40


@pytest.mark.parametrize("arch", ("neox", "opt", "llama"))
def test_greedy_is_the_models_own_continuation(arch, models, dataset, tmp_path):
    """Against transformers' generate, one row at a time; OPT's tokenizer here adds no start token either."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = make(models[arch], dataset, tmp_path / "data.arrow", "--temperature", "0")
    model = AutoModelForCausalLM.from_pretrained(models[arch]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[arch])
    for row in made[:6]:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        whole = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=0)[0]
        new = whole[ids.input_ids.shape[1] :].tolist()
        new = new[: new.index(0)] if 0 in new else new
        assert row["generated_tokens"] == len(new)
        assert row["generation"] == tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")


def test_batches_and_ranks_change_nothing(models, dataset, tmp_path):
    """At a temperature at which some rows end by themselves, so rows leave their batch at different steps."""
    hot = ["--temperature", "3", "--top_k", "400", "--max_tokens", "60"]
    one = make(models["llama"], dataset, tmp_path / "one.arrow", *hot)
    ended = [row for row in one if row["finish_reason"] == "stop"]
    assert 0 < len(ended) < 40 and all(row["generated_tokens"] < 60 for row in ended)
    assert not any("<|endoftext|>" in row["generation"] for row in one)
    assert make(models["llama"], dataset, tmp_path / "small.arrow", *hot, "--batch_size", "3") == one
    other = make(models["llama"], dataset, tmp_path / "other.arrow", *hot, "--seed", "1")
    assert all(a["generation"] != b["generation"] for a, b in zip(one, other))
    command = words(models["llama"], dataset, tmp_path / "two.arrow", *hot, "--batch_size", "4")
    done = run_script("data/continuation/generate.py", *command, ranks=2)
    assert done.returncode == 0, done.stderr
    assert formats.read_rows(tmp_path / "two.arrow") == one
    assert not list(tmp_path.glob(".*partial*"))


def test_prompts_without_room_are_dropped_or_cut(tmp_path, models):
    """Context of 512: a prompt that leaves 16 tokens or more is continued to its end, a longer one is dropped."""
    rows = make_rows(12)
    lengths = {}
    for index, repeats in ((4, 505), (5, 490), (6, 511)):
        rows[index]["prompt"] = "\n" * repeats  # this tokenizer has no merge of line breaks
        lengths[index] = len(tokens_of(models["neox"], rows[index]["prompt"]))
    assert [lengths[4], lengths[5], lengths[6]] == [505, 490, 511]
    rows[7]["prompt"] = ""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    made = make(models["neox"], data, tmp_path / "data.arrow", "--max_tokens", "30")
    assert [row["row_id"] for row in made] == [5, 8, 9, 10, 11]
    assert made[0]["generated_tokens"] <= 512 - lengths[5] < 30
    dropped = json.loads((tmp_path / "run_generate.json").read_text())["dropped"]
    assert sorted(dropped.values()) == [1, 2] and dropped["empty prompt"] == 1


def test_trailing_space_of_a_prompt_is_kept_once(models, tmp_path):
    rows = make_rows(6)
    for row in rows:
        row["prompt"] = row["prompt"] + "\nTo:"
    plain = make(models["neox"], write_rows(tmp_path / "a.jsonl", rows), tmp_path / "a.arrow")
    for row in rows:
        row["prompt"] += " "
    spaced = make(models["neox"], write_rows(tmp_path / "b.jsonl", rows), tmp_path / "b.arrow")
    for a, b in zip(plain, spaced):
        assert b["generation"] == a["generation"].removeprefix(" ") and b["text"].startswith(b["prompt"])


def test_broken_rows_are_left_out_and_shown_or_refused(models, tmp_path, capsys):
    """Of 15 rows the head is 5, whichever are broken; the others' continuations do not change."""
    rows = make_rows(15)
    whole = make(models["neox"], write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "whole.arrow")
    data, output = tmp_path / "rows.jsonl", tmp_path / "data.arrow"
    rows[1]["gt-email"], rows[8]["prompt"], rows[11]["gt-name"] = "nobody", None, "\ud800"
    lines = [json.dumps(row) for row in rows]
    lines[13] = "{torn"
    data.write_text("\n".join(lines))
    capsys.readouterr()
    made = make(models["neox"], data, output)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith((str(data), "broken"))]
    assert err == [
        f"{data}: row 1: gt-email must look like local@domain",
        f"{data}: row 8: field 'prompt' is missing; add it or remove the row",
        f"{data}: row 11: half of a surrogate pair in its text",
        "broken rows: … and 1 more",
    ]
    assert made == [row for row in whole if row["row_id"] not in (8, 11, 13)]
    manifest = manifests.read_manifest(output)
    assert (manifest["split_start"], manifest["source"][0]["rows"], manifest["rows"]) == (5, 15, 7)
    assert json.loads((tmp_path / "run_generate.json").read_text())["dropped"] == {"broken": 4}
    with pytest.raises(UserError, match="row 1: gt-email") as error:
        make(models["neox"], data, output, "--overwrite", "--strict")
    assert error.value.problems == err


def test_split_of_the_manifest_and_files_without_one(models, tmp_path):
    rows = make_rows(12)
    for row in rows:
        row["row_id"] += 100
    data = write_rows(tmp_path / "rows.jsonl", rows)
    made = make(models["neox"], data, tmp_path / "plain.arrow")  # position decides: head of 4
    assert [row["row_id"] for row in made] == list(range(104, 112))
    assert manifests.read_manifest(tmp_path / "plain.arrow")["split_start"] == 104
    manifests.manifest_path(data).write_text(json.dumps({"split_start": 109}))
    made = make(models["neox"], data, tmp_path / "carried.arrow")
    assert [row["row_id"] for row in made] == [109, 110, 111]
    assert manifests.read_manifest(tmp_path / "carried.arrow")["split_start"] == 109


# ---------------------------------------------------------------- training on it


def test_run_peft_trains_on_it_and_on_completions_alone(models, dataset, tmp_path):
    made = make(models["neox"], dataset, tmp_path / "data.arrow")
    for loss_on in ("all", "completion"):
        flags = ["-m", models["llama"], "-i", tmp_path / "data.arrow", "--output_root", tmp_path / loss_on]
        flags += ["--lora_r", 4, "-e", 1, "-pdbs", 8, "-gas", 1, "-lr", 1e-3, "--loss_on", loss_on]
        assert run_peft.main([str(flag) for flag in flags]) == 0
        folder = tmp_path / loss_on / "tiny-llama" / "self-generated-tiny-neox-lora" / "0e+00_1e-03"
        assert (folder / "checkpoint-5" / "adapter_model.safetensors").is_file()  # 40 rows, batches of 8
    text, boundary = data_files.row_text(made[0])
    assert text[boundary:] == made[0]["generation"] + "<|endoftext|>"


# ---------------------------------------------------------------- resuming and refusing


def test_kill_and_run_again(models, dataset, tmp_path):
    """kill -9 after some batches; the next run resumes there and writes the file of an uninterrupted run."""
    whole = make(models["llama"], dataset, tmp_path / "whole.arrow", "--batch_size", "2")
    output = tmp_path / "broken" / "data.arrow"
    script = [sys.executable, str(ROOT / "data/continuation/generate.py")]
    command = script + words(models["llama"], dataset, output, "--batch_size", "2")
    partial = output.with_name(".data.arrow.partial-0.jsonl")
    kill_when_written(command, partial, 3)
    assert partial.exists() and not output.exists()
    with open(partial, "ab") as file:
        file.write(b'{"batch": 19, "rows": [{"ind')  # a line torn by a power failure
    before = partial.read_bytes()

    with pytest.raises(UserError, match="a different seed"):
        generate.main(words(models["llama"], dataset, output, "--batch_size", "2", "--seed", "5"))
    assert partial.read_bytes() == before
    assert make(models["llama"], dataset, output, "--batch_size", "2") == whole
    assert not partial.exists()


def test_finished_batches_are_not_generated_again(models, dataset, tmp_path, monkeypatch):
    from common import sampling

    calls, sweep = [], sampling.sweep

    def fails_after_three(model, prompts, *rest, **more):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise RuntimeError("the fourth batch fails")
        return sweep(model, prompts, *rest, **more)

    monkeypatch.setattr(sampling, "sweep", fails_after_three)
    with pytest.raises(RuntimeError, match="fourth"):
        make(models["neox"], dataset, tmp_path / "data.arrow", "--batch_size", "8")
    assert json.loads((tmp_path / "run_generate.json").read_text())["status"] == "failed"
    made = make(models["neox"], dataset, tmp_path / "data.arrow", "--batch_size", "8")
    assert len(made) == 40 and len(calls) == 4 + 2  # 5 batches: 3 were kept


def test_bad_input_all_at_once_and_nothing_loaded(models, dataset, tmp_path, monkeypatch):
    from common import models as common_models

    monkeypatch.setattr(common_models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError) as caught:
        generate.main(["-m", str(tmp_path / "no"), "-d", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "x")])
    assert len(caught.value.problems) == 3
    for word in ("must end in .arrow", "no.jsonl: no such file", "--model"):
        assert word in str(caught.value)
    existing = tmp_path / "data.arrow"
    existing.write_bytes(b"old")
    with pytest.raises(UserError, match="--overwrite"):
        generate.main(words(models["neox"], dataset, existing))
    generated = write_rows(tmp_path / "text.jsonl", [{**row, "text": "t"} for row in make_rows(5)])
    with pytest.raises(UserError, match="pass the rows it was generated from"):
        generate.main(words(models["neox"], generated, tmp_path / "y.arrow"))
    assert generate.main(words(models["neox"], dataset, tmp_path / "y.arrow", "--dry_run")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.arrow", "text.jsonl"]


def test_overwrite_and_exit_status(models, dataset, tmp_path):
    make(models["neox"], dataset, tmp_path / "data.arrow", "--seed", "1")
    before = (tmp_path / "data.arrow").read_bytes()
    done = run_script("data/continuation/generate.py", *words(models["neox"], dataset, tmp_path / "data.arrow"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--overwrite" in done.stderr
    assert (tmp_path / "data.arrow").read_bytes() == before
    make(models["neox"], dataset, tmp_path / "data.arrow", "--overwrite")
    assert (tmp_path / "data.arrow").read_bytes() != before
    assert manifests.read_manifest(tmp_path / "data.arrow")["sampling"]["seed"] == 3407


# ---------------------------------------------------------------- pure functions


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(0, 5), st.integers(1, 20_000), st.integers(1, 60)
)
def test_batches_hold_every_prompt_once_within_memory(lengths, batch_size, budget, max_tokens):
    rooms = [min(max_tokens, 64 - length) for length in lengths]
    cost = lambda length, room: 10 * (length + room)  # noqa: E731
    batches = generation.plan_batches(lengths, rooms, cost, budget, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len({rooms[index] for index in batch}) == 1
        longest = max(lengths[index] for index in batch)
        assert len(batch) <= (batch_size or max(1, budget // cost(longest, rooms[batch[0]])))


SENTENCE = st.lists(st.sampled_from(("a", "b", "c", "d")), min_size=0, max_size=14).map(" ".join)


@settings(max_examples=150)
@given(st.lists(SENTENCE, max_size=12), st.sampled_from((0.3, 0.5, 0.8)))
def test_near_duplicates_equals_comparing_every_pair(texts, threshold):
    distinct = list(dict.fromkeys(texts))
    sets = [text_statistics.shingles(text) for text in distinct]
    near = sum(
        any(len(one & other) >= threshold * len(one | other) for other in sets[:index])
        for index, one in enumerate(sets)
    )
    assert text_statistics.near_duplicates(texts, threshold) == (len(texts) - len(distinct), near)


def test_near_duplicates_by_hand():
    base = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    # 9 runs of 8 words; a change of the last word leaves 8 of 10 in common, of the middle ones 1 or none
    texts = [base, base.upper() + "\n", base.replace("sixteen", "end"), base.replace("eight", "x"), "short", "short "]
    assert text_statistics.near_duplicates(texts) == (2, 1)


def test_address_counts_by_hand():
    texts = [
        "write to Ann.Lee@hartwell.example, or ann.lee@hartwell.example.",
        "not xann.lee@hartwell.example nor ann.lee@hartwell.example.org",
        "<bob@norbeck.example>",
    ]
    wanted = {"ann.lee@hartwell.example", "bob@norbeck.example", "eve@norbeck.example"}
    assert text_statistics.address_counts(texts, wanted) == {"addresses": 2, "rows": 2, "occurrences": 3}
