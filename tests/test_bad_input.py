"""Bad input to every script: status 2, one line that says what to do, no model loaded, nothing written."""

import errno
import json
import os
import shutil

import pytest
from conftest import make_rows, write_manifest, write_rows

import evaluate_purified
import measure_purified
import merge_peft
import run_peft
from common import arrow_files, cli, dataset, formats, locks, manifests, publication
from common.problems import Problems, UserError, check_output_file
from common.process import entry, leave_after_main
from data import replace_pii
from data.continuation import generate as continuation
from data.self_instruct import generate as self_instruct
from mia import mia
from perplexity import perplexity


@pytest.fixture
def no_models(monkeypatch):
    """Any attempt to load weights fails the test."""
    from transformers import AutoModelForCausalLM

    def refuse(*_, **__):
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture
def files(tmp_path, models, adapters):
    """Name → path of everything that can be wrong."""
    rows = make_rows(12)
    paths = {"good": write_rows(tmp_path / "good.jsonl", rows)}
    broken = write_rows(tmp_path / "broken.jsonl", rows)
    broken.write_text(broken.read_text().replace('"row_id": 3}', '"row_id": 3'))
    paths["broken"] = broken
    paths["no_field"] = write_rows(
        tmp_path / "no_field.jsonl", [{k: v for k, v in row.items() if k != "gt-email"} for row in rows]
    )
    paths["one_without"] = write_rows(tmp_path / "one.jsonl", [*rows[:7], {"gt-name": "A B"}, *rows[8:]])
    paths["empty"] = write_rows(tmp_path / "empty.jsonl", [])
    paths["types"] = write_rows(tmp_path / "types.jsonl", [*rows[:5], {**rows[5], "gt-email": 7}, *rows[6:]])
    paths["not_address"] = write_rows(tmp_path / "na.jsonl", [*rows[:5], {**rows[5], "gt-email": "nobody"}, *rows[6:]])
    paths["two"] = write_rows(tmp_path / "two.jsonl", rows[:2])
    paths["list"] = tmp_path / "list.jsonl"
    paths["list"].write_text("[1, 2]\n")
    paths["csv"] = tmp_path / "rows.csv"
    paths["csv"].write_text("a,b\n")
    paths["xls"] = tmp_path / "rows.xls"
    paths["xls"].write_text("a,b\n")
    paths["arrow"] = tmp_path / "rows.arrow"
    paths["arrow"].write_bytes(b"not arrow at all, but long enough to be read")

    orphan = tmp_path / "orphan"
    shutil.copytree(adapters["llama", "lora"], orphan)
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/base"}))
    paths["orphan"] = orphan
    paths["half_adapter"] = tmp_path / "half"
    shutil.copytree(adapters["llama", "lora"], paths["half_adapter"])
    (paths["half_adapter"] / "adapter_model.safetensors").unlink()
    paths["cut_weights"] = shutil.copytree(models["llama"], tmp_path / "cut-weights")
    whole = (models["llama"] / "model.safetensors").read_bytes()
    (paths["cut_weights"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    paths["no_tokenizer"] = shutil.copytree(models["llama"], tmp_path / "no-tokenizer")
    (paths["no_tokenizer"] / "tokenizer.json").unlink()
    paths["cut_arrow"] = tmp_path / "cut.arrow"
    arrow_files.write_arrow(paths["cut_arrow"], rows)
    paths["cut_arrow"].write_bytes(paths["cut_arrow"].read_bytes()[:-8])
    paths["short"] = write_rows(tmp_path / "short.jsonl", rows[:11])
    (tmp_path / "short.jsonl.meta.json").write_text(json.dumps({"rows": 12}))
    for name, file, text in (("cut_config", "adapter_config.json", '{"peft'), ("cut_privacy", "privacy.json", "[]")):
        paths[name] = tmp_path / name
        shutil.copytree(adapters["llama", "lora"], paths[name])
        (paths[name] / file).write_text(text)

    plain = tmp_path / "no-eos"
    shutil.copytree(models["llama"], plain)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (plain / name).is_file():
            settings = json.loads((plain / name).read_text())
            for key in ("eos_token", "bos_token", "pad_token", "unk_token"):
                settings.pop(key, None)
            (plain / name).write_text(json.dumps(settings))
    paths["no_eos"] = plain
    paths["read_only"] = tmp_path / "read-only"
    paths["read_only"].mkdir(mode=0o555)
    paths["a_file"] = paths["good"]
    paths["model"] = models["llama"]
    paths["adapter"] = adapters["llama", "lora"]
    paths["out"] = tmp_path / "out"
    tokenizer = (models["llama"] / "tokenizer.json").read_text()
    deep_config = '{"a": ' + "[" * 5000 + "]" * 5000 + "}"
    config = json.loads((models["llama"] / "config.json").read_text())
    for name, file, text in (
        ("null_config", "config.json", "null"),
        ("deep_config", "config.json", deep_config),
        ("dropout_config", "config.json", json.dumps(config | {"attention_dropout": 7})),
        ("act_config", "config.json", json.dumps(config | {"hidden_act": "no such function"})),
        ("null_generation", "generation_config.json", "null"),
        ("odd_generation", "generation_config.json", '{"eos_token_id": [0, "x"]}'),
        ("odd_tokenizer", "tokenizer.json", tokenizer.replace('"padding": null', '"padding": 7')),
        ("deep_tokenizer", "tokenizer_config.json", deep_config),
    ):
        paths[name] = shutil.copytree(models["llama"], tmp_path / name)
        assert (paths[name] / file).read_text() != text
        (paths[name] / file).write_text(text)
    paths["nothing"] = tmp_path / "nothing-there"
    paths["text"] = write_rows(tmp_path / "text.jsonl", [{"text": "words"}] * 3)
    paths["nowhere"], paths["loop"], paths["link"] = (tmp_path / name for name in ("nowhere", "loop", "link.arrow"))
    for name, target in (("nowhere", tmp_path / "gone"), ("loop", paths["loop"]), ("link", tmp_path / "data.arrow")):
        paths[name].symlink_to(target)
    paths["pipe"] = tmp_path / "pipe.jsonl"
    os.mkfifo(paths["pipe"])
    paths["deep"] = tmp_path / "deep.json"
    paths["deep"].write_text("[" * 100_000)
    paths["nul"] = tmp_path / "nul.json"
    paths["nul"].write_text('{"members": "a\\u0000b"}')
    return paths


MEASURE = ["--model", "{model}", "--output_dir", "{out}"]
TRAIN = ["-m", "{model}", "--output_root", "{out}"]
PUBLIC = [*TRAIN, "-i", "{good}", "--train_rows", "8", "--dp", "--noise_multiplier", "1", "--logical_batch_size", "2",
          "--suggest_max_grad_norm"]  # fmt: skip
TABLE = [
    # script, arguments, what the (only) line says
    (measure_purified, [*MEASURE, "-d", "{nothing}.jsonl"], "nothing-there.jsonl: no such file"),
    (measure_purified, [*MEASURE, "-d", "{broken}"], "broken.jsonl:4: not JSON"),
    (measure_purified, [*MEASURE, "-d", "{no_field}"], "no row has the field 'gt-email'"),
    (measure_purified, [*MEASURE, "-d", "{one_without}"], "row 7: field 'gt-email' is missing"),
    (measure_purified, [*MEASURE, "-d", "{empty}"], "empty.jsonl: the file has no rows"),
    (measure_purified, [*MEASURE, "-d", "{types}"], "row 5: field 'gt-email' must be text, not int"),
    (measure_purified, [*MEASURE, "-d", "{not_address}"], "row 5: gt-email must look like local@domain"),
    (measure_purified, [*MEASURE, "-d", "{list}"], "list.jsonl:1: expected a JSON object"),
    (measure_purified, [*MEASURE, "-d", "{xls}"], "unknown extension"),
    (measure_purified, [*MEASURE, "-d", "{csv}"], "rows.csv: the file has no rows"),
    (measure_purified, [*MEASURE, "-d", "{arrow}"], "not an Arrow file"),
    (measure_purified, [*MEASURE, "-d", "{two}"], "2 rows; at least 3 are needed"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--num_rows", "13"], "--num_rows 13"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--num_rows", "10"], "pass --demonstrations"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--top_k", "0"], "--top_k: must be 1 or more, got 0"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--temperatures", "0.2", "-1"], "--temperatures: must be 0 or more"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--temperatures", "nan"], "--temperatures: must be 0 or more"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--temperatures", "0.2", "0.2"], "twice"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--max_tokens", "x"], "--max_tokens: must be a whole number"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--baseline", "{nothing}.jsonl"], "no such file"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--demonstrations", "{good}"], "no row has the field 'name'"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--no_such_flag"], "--no_such_flag: unknown argument"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--temp", "1"], "--temp: unknown argument"),
    (measure_purified, ["--output_dir", "{out}", "-d", "{good}"], "--model: required"),
    (measure_purified, ["--model", "{model}", "--output_dir", "{read_only}/x", "-d", "{good}"], "is not writable"),
    (measure_purified, ["--model", "{model}", "--output_dir", "{a_file}", "-d", "{good}"], "is a file"),
    (measure_purified, ["--model", "{nothing}", "--output_dir", "{out}", "-d", "{good}"], "no such directory"),
    (
        measure_purified,
        ["--model", "some-model-nobody-has", "--output_dir", "{out}", "-d", "{good}"],
        "not found locally",
    ),
    (measure_purified, ["--model", "{orphan}", "--output_dir", "{out}", "-d", "{good}"], "/no/such/base"),
    (measure_purified, ["--model", "{half_adapter}", "--output_dir", "{out}", "-d", "{good}"], "incomplete"),
    (measure_purified, ["--model", "{cut_config}", "--output_dir", "{out}", "-d", "{good}"], "json: not JSON"),
    (measure_purified, ["--model", "{cut_privacy}", "--output_dir", "{out}", "-d", "{good}"], "expected a JSON object"),
    (measure_purified, ["--model", "{cut_weights}", "--output_dir", "{out}", "-d", "{good}"], "cannot be read"),
    (measure_purified, ["--model", "{no_tokenizer}", "--output_dir", "{out}", "-d", "{good}"], "tokenizer"),
    (measure_purified, [*MEASURE, "-d", "{cut_arrow}"], "the file is truncated"),
    (measure_purified, [*MEASURE, "-d", "{short}"], "has 11 rows, its manifest says 12"),
    (run_peft, [*TRAIN, "-i", "{short}"], "has 11 rows, its manifest says 12"),
    (replace_pii, ["--input", "{short}", "--output", "{out}.arrow"], "has 11 rows, its manifest says 12"),
    (continuation, ["-m", "{model}", "-d", "{short}", "--output", "{out}.arrow"], "has 11 rows, its manifest says 12"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--seed", "-1"], "--seed: must be 0 to 4294967295"),
    (measure_purified, [*MEASURE, "-d", "{good}", "--device_map", "none"], "--device_map: auto, balanced"),
    (measure_purified, ["--model", "{no_eos}", "--output_dir", "{out}", "-d", "{good}"], "no EOS token"),
    (evaluate_purified, ["--model", "{nothing}", "-d", "{good}"], "no such directory"),
    (evaluate_purified, ["--model", "{model}", "-d", "{good}"], "no checkpoint-* directory"),
    (merge_peft, ["--model", "{orphan}", "--save_dir", "{out}"], "/no/such/base"),
    (merge_peft, ["--model", "{model}", "--save_dir", "{out}"], "already a full model"),
    (merge_peft, ["--model", "{half_adapter}", "--save_dir", "{out}"], "incomplete"),
    (merge_peft, ["--model", "{adapter}", "--save_dir", "{read_only}/x"], "is not writable"),
    (run_peft, [*TRAIN, "-i", "{nothing}.jsonl"], "no such file"),
    (run_peft, [*TRAIN, "-i", "{broken}"], "broken.jsonl:4: not JSON"),
    (run_peft, [*TRAIN, "-i", "{types}"], "must be text"),
    (run_peft, [*TRAIN, "-i", "{empty}"], "no rows"),
    (run_peft, [*TRAIN, "-i", "{good}", "-opt", "adamw_imaginary"], "adamw_imaginary"),
    (run_peft, [*TRAIN, "-i", "{good}", "-s", "imaginary"], "imaginary"),
    (run_peft, [*TRAIN, "-i", "{good}", "-e", "0"], "epochs"),
    (run_peft, [*TRAIN, "-i", "{good}", "--train_rows", "12"], "--allow_overlap"),
    (run_peft, [*TRAIN, "-i", "{good}", "--train_rows", "99"], "99"),
    (run_peft, [*PUBLIC, "{types}"], "types.jsonl: row 5: field 'gt-email' must be text, not int"),
    (run_peft, [*PUBLIC, "{text}", "--loss_on", "completion"], "text.jsonl: row 0 (and 2 more) has no prompt"),
    (run_peft, ["-m", "{model}", "-i", "{good}", "--output_root", "{nowhere}"], "is a dangling symbolic link"),
    (run_peft, ["-m", "{model}", "-i", "{good}", "--output_root", "{loop}"], "Too many levels of symbolic links"),
    (merge_peft, ["--model", "{adapter}", "--save_dir", "{out}/" + 230 * "n"], "is longer than 200 bytes"),
    (run_peft, ["-m", "{null_config}", "-i", "{good}", "--output_root", "{out}"], "its config.json is damaged"),
    (measure_purified, ["--model", "{deep_config}", "--output_dir", "{out}", "-d", "{good}"], "config.json is damaged"),
    (run_peft, ["-m", "{dropout_config}", "-i", "{good}", "--output_root", "{out}"], "is 7, not between 0 and 1"),
    (merge_peft, ["--model", "{act_config}", "--save_dir", "{out}"], "config.json is not a valid model (KeyError:"),
    (perplexity, ["--model", "{odd_tokenizer}", "-d", "{good}", "--output_dir", "{out}"], "no usable tokenizer"),
    (
        run_peft,
        ["-m", "{null_generation}", "-i", "{good}", "--output_root", "{out}"],
        "generation_config.json: expected a JSON",
    ),
    (
        perplexity,
        ["--model", "{odd_generation}", "-d", "{good}", "--output_dir", "{out}"],
        "eos_token_id is not a token id",
    ),
    (run_peft, ["-m", "{deep_tokenizer}", "-i", "{good}", "--output_root", "{out}"], "no usable tokenizer"),
    (measure_purified, [*MEASURE, "-d", "/"], "/: is a directory, not a file"),
    (measure_purified, [*MEASURE, "-d", "{pipe}"], "pipe.jsonl: not a file"),
    (mia, ["--config", "{pipe}"], "pipe.jsonl: not a file"),
    (mia, ["--config", "{deep}"], "deep.json: not JSON (nested more than 100 deep"),
    (mia, ["--config", "{list}"], "expected a mapping of keys to values"),
    (mia, ["--config", "{nul}"], "contains a NUL character"),
    (self_instruct, ["-m", "{model}", "--seed_tasks", "{deep}", "--output", "{out}.jsonl"], "nested more than 100"),
    (self_instruct, ["-m", "{model}", "--seed_tasks", "{pipe}", "--output", "{out}.jsonl"], "not a file"),
    (replace_pii, ["--input", "{good}", "--output", "{link}"], "link.arrow: is a symbolic link; give its target"),
    (run_peft, ["-m", "{no_eos}", "--output_root", "{out}", "-i", "{good}"], "no EOS token"),
    (run_peft, ["-m", "{model}", "--output_root", "{read_only}", "-i", "{good}"], "is not writable"),
    (perplexity, ["--model", "{model}", "-d", "{broken}", "--output_dir", "{out}"], "broken.jsonl:4: not JSON"),
    (perplexity, ["--dir", "{nothing}", "-d", "{good}"], "no such directory"),
    (perplexity, ["--model", "{model}", "-d", "{good}", "--num_rows", "13", "--output_dir", "{out}"], "13"),
]


@pytest.mark.parametrize(("script", "words", "expected"), TABLE, ids=lambda value: getattr(value, "__name__", None))
def test_one_line_exit_2_nothing_written(script, words, expected, files, no_models, tmp_path, capsys):
    before = sorted(path for path in tmp_path.rglob("*"))
    words = [word.format(**files) for word in words]
    status = entry(lambda: script.main(words))
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert "usage:" not in captured.err and "Traceback" not in captured.err
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_all_problems_at_once(files, capsys):
    words = ["--output_dir", str(files["read_only"]), "-d", str(files["nothing"]), "--baseline", "x", "--seed", "y"]
    with pytest.raises(UserError) as caught:
        measure_purified.main([*words, "--top_k", "0", "--made_up"])
    assert len(caught.value.problems) == 3  # the command line itself: --seed, --top_k, --made_up
    with pytest.raises(UserError) as caught:
        measure_purified.main([*words[:4], "--temperatures", "1", "1"])
    text = "\n".join(caught.value.problems)
    assert all(part in text for part in ("--model: required", "is not writable", "nothing-there", "twice"))


def test_a_broken_launch_is_reported_before_anything_else(files, monkeypatch, no_models):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--model", str(files["model"]), "--output_dir", str(files["out"]), "-d", str(files["good"])]
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT not set"):
        measure_purified.main(words)
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="each of the 2 processes"):
        measure_purified.main([*words, "--device_map", "auto"])


def test_exit_status_of_the_process(files):
    from conftest import run_script

    done = run_script(
        "measure_purified.py", "--model", files["model"], "--output_dir", files["out"], "-d", files["broken"]
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().endswith("fix or remove the line") and len(done.stderr.strip().splitlines()) == 1


def test_reading_names_every_broken_line_once(tmp_path):
    from common import formats, rows

    path = tmp_path / "many.jsonl"
    path.write_text("".join(f"{{broken {i}\n" for i in range(40)))
    with pytest.raises(UserError) as caught:
        formats.read_rows(path)
    assert len(caught.value.problems) == rows.SHOWN + 1
    assert "35 more" in caught.value.problems[-1]


def test_an_adapter_of_fewer_layers_does_not_fit(models, adapters, tmp_path):
    """Same widths, one layer more, modules matched by suffix: its matrices would keep their initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.adapters import attach

    config = AutoConfig.from_pretrained(models["llama"])
    config.num_hidden_layers += 1
    copy = shutil.copytree(adapters["llama", "lora"], tmp_path / "copy")
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in settings["target_modules"]})
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"does not fit this base model: it has nothing for model\.layers\.2"):
        attach(AutoModelForCausalLM.from_config(config), copy)
    assert attach(AutoModelForCausalLM.from_pretrained(models["llama"]), copy)


@pytest.mark.parametrize("text", ["{}", '{"epsilon": "8", "delta": 1e-5, "unit": "record"}'])
def test_a_privacy_file_without_its_numbers(text, adapters, tmp_path):
    from common.models import find_model

    copy = shutil.copytree(adapters["llama", "lora"], tmp_path / "copy")
    (copy / "privacy.json").write_text(text)
    with pytest.raises(UserError, match=r"has no field 'epsilon'|epsilon: expected float, got str"):
        find_model(str(copy))


def test_control_c_is_one_line(capsys):
    def stopped():
        raise KeyboardInterrupt

    assert entry(stopped) == 130 and capsys.readouterr().err == "interrupted\n"


def test_an_output_is_no_input(tmp_path):
    (tmp_path / "sub").mkdir()
    data = write_rows(tmp_path / "rows.jsonl", make_rows(3))
    (tmp_path / "link.jsonl").symlink_to(data)
    for output in (data, tmp_path / "sub/../rows.jsonl", tmp_path / "link.jsonl"):
        problems = Problems()
        check_output_file(output, ".jsonl", problems, (None, data))
        assert problems.lines == [f"--output {output}: is also an input; choose another file"]


@pytest.mark.parametrize(("manifest", "said"), [
    ({"privacy": "none"}, "privacy: expected object, got str"),
    ({"split_start": "20"}, "split_start: expected int, got str"),
    ({"sha256": 5}, "sha256: expected str, got int"), ({"source": ["x"]}, r"source\[0\]: expected object, got str"),
])  # fmt: skip
def test_a_manifest_of_other_types(manifest, said, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", make_rows(3))
    (tmp_path / "rows.jsonl.meta.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        manifests.read_manifest(data)


@pytest.mark.parametrize("record", [{"args": None}, {"inputs": ["x"]}, {"inputs": None}])
def test_a_run_record_of_other_types(record, tmp_path):
    from common.provenance import training_record

    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=r"(args: expected object|inputs\[0\]: expected object|inputs: expected array), got"
    ):
        training_record(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("text", ['{"settings": {"a": 1}}\n{"batch"\n{}\n', "[]\n", '{"batch": 1}\n'])
def test_a_damaged_unfinished_run(text, tmp_path):
    from common.json_files import read_partial

    (tmp_path / "partial").write_text(text)
    with pytest.raises(UserError, match=r"is damaged .* give --overwrite"):
        read_partial(tmp_path / "partial", {"a": 1}, overwrite=False)
    assert read_partial(tmp_path / "partial", {"a": 1}, overwrite=True) == []


@pytest.mark.parametrize(("field", "value", "said"), [
    ("user_id", ["u"], "user_id must be text or a number"), ("user_id", True, "user_id must be text or a number"),
    ("Rating", "five", "field 'Rating' must be a number, not str"), ("Rating", 6, "Rating must be 1 to 5"),
    ("Rating", 10**400, "must be a number, not one with hundreds of digits"),
    ("Review", "half \ud800", "half of a surrogate pair"),
])  # fmt: skip
def test_reviews_of_other_types(field, value, said, tmp_path):
    from common.reviews import read_reviews

    row = {"Review": "Good.", "Rating": 5, "Product Title": "Lamp", "user_id": "u", "generated_text": "Not real."}
    write_rows(tmp_path / "good.jsonl", [row])
    assert "generated_text" not in read_reviews(tmp_path / "good.jsonl")[0]
    assert read_reviews(tmp_path / "good.jsonl", "generated_text")[0]["generated_text"] == "Not real."
    (tmp_path / "odd.jsonl").write_text(json.dumps(row | {field: value}) + "\n")
    with pytest.raises(UserError, match=said):
        read_reviews(tmp_path / "odd.jsonl")


def test_rows_that_lost_their_manifest_are_reported(tmp_path, capsys):
    """A replaced file without its broken rows: by position, row_ids 4, 5, … would be taken for the first rows."""
    moved = write_rows(tmp_path / "moved.jsonl", [row for row in make_rows(9) if row["row_id"] != 3])
    written = write_rows(tmp_path / "made.jsonl", [{"Rating": 5, "generated_text": "Good.", "Product Title": "x"}])
    mine = write_rows(tmp_path / "mine.jsonl", make_rows(9))
    for path, words in (
        (moved, "the set of evaluation rows is unknown"),
        (written, "the privacy budget its generator spent is unknown"),
        (mine, ""),
    ):
        fields = ("generated_text", "Rating") if path == written else None
        dataset.validate(path, formats.read_rows(path), fields)
        said = capsys.readouterr().err
        assert said.count("\n") == bool(words) and words in said
        assert not words or said.startswith(f"{path}: derived from other rows, but {path.name}.meta.json is missing")
    write_manifest(moved, tag="replaced", script="x", argv=[], rows=8, split_start=3)
    dataset.validate(moved, formats.read_rows(moved))
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- names, links, full disks


@pytest.mark.parametrize(("word", "said"), [
    (os.fsdecode(b"a\xff.jsonl"), "not UTF-8; rename the file or folder"), ("x" * 300, "longer than a file name"),
    ("a/" + "x" * 256 + "/b", "longer than a file name"), ("a\0b", "contains a NUL character"),
])  # fmt: skip
def test_words_that_name_no_file(word, said):
    parser = cli.Parser("x", "x")
    parser.add_argument("--input", default="x")
    with pytest.raises(UserError, match=said):
        parser.parse_args(["--input", word])
    assert parser.parse_args(["--input", "ä?*[1]'%\n"]).input == "ä?*[1]'%\n"


def test_a_working_directory_that_is_not_utf8(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"a\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="working directory's name is not UTF-8"):
        cli.Parser("x", "x").parse_args([])


def test_a_problem_is_one_line_whatever_the_name(tmp_path, capsys):
    assert entry(lambda: formats.read_rows(tmp_path / "a\nb\x1b[31m.jsonl")) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["a?b*[1]", "it's %s", "a\nb", "ä😀"])
def test_a_merge_is_written_to_its_destination(name, adapters, tmp_path):
    """Through a symbolic link, which is kept, and into folders with odd names."""
    target, link = tmp_path / name, tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    for _ in range(2):
        assert merge_peft.main(["--model", str(adapters["llama", "lora"]), "--save_dir", str(link)]) == 0
        assert link.is_symlink() and (target / "model.safetensors").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "link"])


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", ["json", "line", "folder", "lock"])
def test_a_full_disk_is_one_line_that_names_the_file(write, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out" / "x.json"
    file.parent.mkdir()

    def main():
        if write == "json":
            publication.write_json(file, {})
        elif write == "line":
            with open(file, "w") as opened:
                publication.append_line(opened, {})
        elif write == "folder":
            with publication.atomic_folder(file):
                raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        else:
            with locks.output_file(file):
                pass

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "pwrite", full)
    assert entry(main) == 2
    name = file.with_name(".x.json.lock") if write == "lock" else file
    assert capsys.readouterr().err == f"{name}: No space left on device; free some space and start again\n"
    assert [path.name for path in file.parent.iterdir()] == (["x.json"] if write == "line" else [])


def test_other_errors_pass_through(tmp_path):
    def main():
        with publication.atomic_folder(tmp_path / "x"):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        entry(main)


def test_checkpoints_of_odd_names(tmp_path):
    from common.checkpoints import find_checkpoints

    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-1²3", "a\nb/checkpoint-2"):
        (tmp_path / name).mkdir(parents=True)
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert sorted(names) == ["checkpoint-10", "checkpoint-1²3", "checkpoint-2", "checkpoint-9"]
    assert names.index("checkpoint-9") < names.index("checkpoint-10")
    (tmp_path / os.fsdecode(b"a\xff") / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="not UTF-8; rename the folder"):
        find_checkpoints(tmp_path)


# ---------------------------------------------------------------- users


@pytest.mark.parametrize(("given", "user"), [
    ("u", "u"), (" u\n", "u"), (5, "5"), (5.0, "5"), ("5", "5"), (0, "0"), ("", None), ("  ", None), (None, None),
    (True, None), (2.5, None), (["u"], None),
])  # fmt: skip
def test_users_are_identified_by_one_rule(given, user):
    assert dataset.user_of({"user_id": given}) == user


def test_a_user_written_in_two_ways_is_one_unit():
    """Else the true ε would be that of half the noise: a user adds to one cell, by one."""
    import numpy as np

    from common.reviews import halve
    from data.synthetic.histogram import one_row_per_user

    rows = [{"user_id": one, "Review": "a"} for one in ("5", 5, " 5", 5.0)]
    assert len(one_row_per_user(rows, np.random.default_rng(0))) == 1
    assert sorted(map(len, halve([*rows, *({"Review": "b"} for _ in range(4))], 0))) == [4, 4]


def test_entry_returns_though_an_earlier_run_left_a_group():
    leave_after_main()
    assert entry(lambda: 3) == 3
