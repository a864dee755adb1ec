"""trained_rows.jsonl and run.json's `trained` agree with what the loss saw."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_rows, read_lines, write_rows
from safetensors.torch import load_file

import run_peft
from common import dataset as data_files
from common import formats, publication, results, trained
from common.checkpoints import find_checkpoints
from common.models import find_model, load_tokenizer
from common.problems import UserError
from training import batches
from training.checkpoint import checkpoints
from training.dp_trainer import DPTrainer
from training.plan import make_plan, run_state
from training.run import run as fine_tune
from training.trainer import Trainer
from training.verify import check_examples


def parse(*words):
    return run_peft.make_parser().parse_args([str(word) for word in words])


def train(out, model, data, *flags):
    return fine_tune(
        parse("-m", model, "-i", data, "--output_root", out, "--lora_r", 2, "-e", 1, "-pdbs", 4, "-lr", "1e-3", *flags)
    )


@pytest.fixture
def seen(monkeypatch):
    """[(a row's token ids up to its end in the batch, its labels)] of every loss that training takes."""
    losses, original = [], Trainer.nll

    def nll(self, batch):
        if self.model.training:
            targets = iter(batch["targets"].tolist())
            starts = batch.get("position_ids")
            for line, (ids, keep) in enumerate(zip(batch["input_ids"].tolist(), batch["logits_to_keep"].tolist())):
                row = []
                for place, counts in enumerate(keep):
                    if starts is not None and starts[line, place] == 0 and row:
                        losses.append(tuple(row))
                        row = []
                    if counts:
                        row.append(next(targets))
                        assert ids[place + 1] == row[-1]
                if row:
                    losses.append(tuple(row))
        return original(self, batch)

    monkeypatch.setattr(Trainer, "nll", nll)
    return losses


def random_rows(rng: random.Random, n: int) -> list[dict]:
    """Rows with a prompt part, some too long, with characters of several bytes and repeated rows."""
    words = ["mail", "naïve", "Ω", "🙂🙃", "x", "Zoë,", "\n\n", "  two", "日本語", "end."]

    def text(least: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(least, 25)))

    rows = [{"prompt": text(0), "continuation": text(1), "user_id": f"u{rng.randint(0, 5)}"} for _ in range(n)]
    return [*rows, dict(rows[0])]


CASES = [
    ("--max_length", 24),
    ("--max_length", 40, "--loss_on", "completion"),
    ("--max_length", 64, "--packing"),
    ("--max_length", 48, "--loss_on", "completion", "--packing", "--train_rows", 9),
    ("--max_length", 500, "--eval_rows", 4),
    ("--max_length", 30, "--dp", "--noise_multiplier", 0, "--logical_batch_size", 21, "--loss_on", "completion"),
    ("--max_length", 60, "--dp", "--noise_multiplier", 1, "--logical_batch_size", 6, "--privacy_unit", "user",
     "--max_rows_per_user", 2),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_list_is_what_the_loss_saw(case, models, tmp_path, seen):
    """Labels read from the batches against the file: row, numbers, characters; no row more or less."""
    rng = random.Random(case)
    rows = random_rows(rng, 20)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = CASES[case]
    if "user" in flags:  # every user is drawn
        users = len({row["user_id"] for row in rows})
        flags = [users if flag == 6 else flag for flag in flags]
    folder = train(tmp_path, models[rng.choice(["neox", "opt", "llama"])], data, *flags)
    listed = trained.read(checkpoints(folder)[-1])
    tokenizer = load_tokenizer(find_model(str(checkpoints(folder)[-1])))
    assert listed.loss_on == ("completion" if "completion" in flags else "all")
    expected, totals = [], dict.fromkeys(("tokens", "loss_tokens", "rows_cut", "tokens_cut", "rows_without_loss"), 0)
    for row in listed.rows:
        text = data_files.row_text(rows[row.row])[0]
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        kept = ids[: listed.max_length]
        labels = kept[len(kept) - row.loss_tokens :]
        assert row in listed.find(text) and row.tokens == len(kept)
        assert row.cut == (len(ids) - 1 > listed.max_length)
        spelled = tokenizer.decode([one for one in labels if one != tokenizer.eos_token_id])
        (span,) = row.kept
        assert text[slice(*span)] == spelled.strip("�"), row  # half a character is not counted
        if labels:
            expected.append(tuple(labels))
            assert row.covers(*span) and not row.covers(span[0], span[1] + 1)
        totals["tokens"] += len(kept)
        totals["loss_tokens"] += len(labels)
        totals["rows_cut"] += row.cut
        totals["tokens_cut"] += max(0, len(ids) - 1 - listed.max_length)
        totals["rows_without_loss"] += not labels
    assert sorted(seen) == sorted(expected)
    block = json.loads((folder / "run.json").read_text())["trained"]
    assert {key: block[key] for key in totals} == totals and block["rows"] == len(listed.rows)
    assert block["tokens"] == block["loss_tokens"] + block["tokens_masked"] + block["rows"]  # the first of each row
    assert (folder / trained.FILE).stat().st_mode & 0o777 == 0o600
    left_out = {0, 1, 2, 3} if "--eval_rows" in flags else set(range(12)) if "--train_rows" in flags else set()
    if "user" in flags:
        left_out = set(range(21)) - {row.row for row in listed.rows}
        assert len(left_out) == json.loads((folder / "run.json").read_text())["privacy"]["rows_left_out"] > 0
    assert [row.row for row in listed.rows] == [index for index in range(21) if index not in left_out]
    copies = len(listed.find(data_files.row_text(rows[0])[0]))
    assert copies == 2 - (0 in left_out) - (20 in left_out)  # row 20 repeats row 0


def test_label_span_by_hand():
    """'é🙂b' in tokens é | 🙂₁ | 🙂₂ | b | EOS: a character of two tokens counts where both are inside."""
    spans = [(0, 1), (1, 2), (1, 2), (2, 3), (0, 0)]
    assert batches.label_span(spans, 1, 5) == (1, 3)
    assert batches.label_span(spans, 2, 5) == (2, 3)
    assert batches.label_span(spans, 1, 2) == (0, 0)  # half of 🙂 alone
    assert batches.label_span(spans, 0, 2) == (0, 1)
    assert batches.label_span(spans, 4, 5) == batches.label_span(spans, 5, 5) == (0, 0)
    trimmed = [(0, 3), (4, 7), (8, 9)]  # tokenizers that exclude the space from a token's characters
    assert batches.label_span(trimmed, 1, 2) == (4, 7)


def test_hashes_are_plain_without_dp_and_salted_with_it(models, dataset, tmp_path):
    rows, digest = formats.read_rows(dataset), results.sha256(dataset)
    other = write_rows(tmp_path / "other.jsonl", make_rows(60, seed=4))
    folder = train(tmp_path, models["neox"], dataset)
    record, listed = json.loads((folder / "run.json").read_text()), trained.read(folder / "checkpoint-5")
    text = data_files.row_text(rows[30])[0]
    assert record["inputs"][0]["sha256"] == digest and listed.salt == ""
    assert listed.find(text)[0].sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert listed.find(text)[0].row == 30 and listed.find(data_files.row_text(rows[0])[0]) == []  # the head is held out
    dp = ("--dp", "--noise_multiplier", 1, "--logical_batch_size", 8, "-e", 1)
    folders = [train(tmp_path / out, models["neox"], dataset, *dp) for out in ("one", "two")]
    texts = [path.read_text() for folder in folders for path in folder.rglob("*.json*") if path.name != trained.FILE]
    assert not any(digest in content or listed.find(text)[0].sha256 in content for content in texts)
    told = [json.loads((folder / "run.json").read_text())["inputs"][0]["sha256"] for folder in folders]
    assert told[0] != told[1]  # salts are random
    for folder in folders:
        checkpoint = folder / "checkpoint-5"
        assert trained.read(checkpoint).find(text)[0].row == 30
        assert trained.trained_on(checkpoint, digest) is True
        assert trained.trained_on(checkpoint, results.sha256(other)) is False
        assert run_state(*state_of(folder, models, dataset, tmp_path, *dp)) == "finished"
    (folders[1] / trained.FILE).unlink()  # as it is where the folder was published
    assert trained.read(folders[1] / "checkpoint-5") is None
    assert trained.trained_on(folders[1] / "checkpoint-5", digest) is None
    with pytest.raises(UserError, match=r"its trained_rows\.jsonl is missing"):
        train(tmp_path / "two", models["neox"], dataset, *dp)


def state_of(folder, models, dataset, tmp_path, *flags):
    args = parse(
        "-m",
        models["neox"],
        "-i",
        dataset,
        "--output_root",
        folder.parents[2],
        "--lora_r",
        2,
        "-pdbs",
        4,
        "-lr",
        "1e-3",
        *flags,
    )
    return args, find_model(args.model), folder, dataset, 8, 1


@pytest.mark.parametrize(("damage", "said"), [
    (lambda text: text[:-20], "does not match run.json"),
    (lambda text: "", "damaged"), (lambda text: "[]\n", "damaged"), (lambda text: "{}\n", "no field 'schema'"),
    (lambda text: text.replace('"cut": false', '"cut": 0', 1), "row 0: cut: expected bool, got int"),
    (lambda text: text.replace('"kept": [', '"kept": [0, ', 1), "kept is neither"),
    (lambda text: text.replace('"salt": ""', '"salt": "x"', 1), "damaged"),
    (lambda text: text.replace('"tokens"', '"token"', 1), "damaged"),
    (lambda text: text + '{"row', "damaged"), (lambda text: text + "[" * 100_000, "damaged"),
])  # fmt: skip
def test_a_damaged_list_is_one_line(damage, said, tmp_path):
    row = trained.TrainedRow(3, "ab", 5, 4, False, ((0, 9),))
    block = trained.write(tmp_path, trained.Header("", "all", 64), [row])
    checkpoint = tmp_path / "checkpoint-1"
    assert trained.read(checkpoint).rows == (row,)
    if "does not match" in said:
        publication.write_json(tmp_path / "run.json", {"trained": block, "inputs": [], "args": {}})
        assert trained.read(checkpoint).rows == (row,)
    file = tmp_path / trained.FILE
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=said) as error:
        trained.read(checkpoint)
    assert len(error.value.problems) == 1 and str(file) in str(error.value)


def test_row_numbers_survive_an_interruption(models, dataset, tmp_path, monkeypatch):
    """A resumed DP run keeps its salt: the file is what the uninterrupted run of the same seed writes."""
    flags = ("--dp", "--noise_multiplier", 1, "--logical_batch_size", 8, "-e", 2, "--seed", 3)
    whole = train(tmp_path / "whole", models["neox"], dataset, *flags)
    original = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self: 1 / 0 if self.count["step"] == 7 else original(self))
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "broken", models["neox"], dataset, *flags)
    broken = train(tmp_path / "broken", models["neox"], dataset, *flags, "--resume")
    assert (broken / trained.FILE).read_bytes() == (whole / trained.FILE).read_bytes()
    assert read_lines(broken / trained.FILE)[0]["salt"]


# ---------------------------------------------------------------- the run's directory


def test_two_runs_at_once_are_one(models, dataset, tmp_path):
    """The same --dp command started twice in a second: one trains, the other is refused and changes nothing."""
    words = ["-m", models["neox"], "-i", dataset, "--output_root", tmp_path, "--lora_r", 2, "-pdbs", 4, "-e", 4,
             "--dp", "--noise_multiplier", 1, "--logical_batch_size", 2]  # fmt: skip
    command = [sys.executable, str(ROOT / "run_peft.py"), *map(str, words)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=300)[1] for run in runs]
    codes = [run.returncode for run in runs]
    if codes == [0, 0]:  # the second came after the first's end and found it finished
        assert sum("resuming" in text for text in said) == 0
    else:
        assert sorted(codes) == [0, 2], said
        assert said[codes.index(2)].count("\n") == 1 and "in use by another run" in said[codes.index(2)]
    folder = next(tmp_path.rglob("run.json")).parent
    assert json.loads((folder / "run.json").read_text())["status"] == "ok"
    assert len(checkpoints(folder)) == 4 and not list(folder.glob(".*"))


def test_a_new_run_reads_no_saved_state(models, dataset, tmp_path, monkeypatch):
    """A state that appears after "starting over" (another run's) is not resumed from."""
    whole = train(tmp_path / "whole", models["neox"], dataset)
    original = Trainer.__init__

    def init(self, args, plan, *rest):
        original(self, args, plan, *rest)
        (plan.folder / "interrupted").mkdir()
        (plan.folder / "interrupted" / "training_state.pt").write_bytes(b"another run's")

    monkeypatch.setattr(Trainer, "__init__", init)
    folder = train(tmp_path / "again", models["neox"], dataset)
    files = [checkpoints(run)[-1] / "adapter_model.safetensors" for run in (folder, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "resumed_from" not in json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def stopped(models, dataset, tmp_path_factory):
    """The directory of a run that stopped in its second epoch."""
    original, out = Trainer.step, tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self: 1 / 0 if self.count["step"] == 7 else original(self))
        with pytest.raises(ZeroDivisionError):
            train(out, models["neox"], dataset, "-gas", 2, "-e", 2)
    return out


def changed(key, value):
    def damage(content: bytes) -> bytes:
        record = json.loads(content)
        record.pop(key) if value is None else record.update({key: value})
        return json.dumps(record).encode()

    return damage


def saved(item):
    def damage(_: bytes) -> bytes:
        import io

        import torch

        file = io.BytesIO()
        torch.save(item, file)
        return file.getvalue()

    return damage


@pytest.mark.parametrize(("name", "damage"), [
    *[("run.json", damage) for damage in (
        lambda content: content[:50], lambda content: b"", lambda content: b"[]", lambda content: b"\xff",
        *[changed(key, value) for key in ("status", "args", "global_batch", "inputs", "world_size")
          for value in (None, 1.5, [3])],
    )],
    *[("metrics.jsonl", damage) for damage in (
        lambda content: b"{}\n", lambda content: b"[1]\n", lambda content: b'{"step": "1"}\n',
        lambda content: b"{\n" + content, lambda content: b"\xff\n", lambda content: b"[" * 100_000 + b"\n",
    )],
    *[("checkpoint-5/training_state.pt", damage) for damage in (
        lambda content: b"", lambda content: content[:-100], lambda content: content[:200], lambda content: b"x" * 99,
        saved([1]), saved({}), saved({"count": {"step": 5}, "weights": {}, "optimizer": {}, "scheduler": {}}),
        saved({"count": 1, "weights": {}, "optimizer": {}, "scheduler": {}, "scaler": {}}),
    )],
])  # fmt: skip
def test_damaged_files_of_an_unfinished_run(name, damage, stopped, models, dataset):
    folder = next(stopped.rglob("run.json")).parent
    before, file = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, folder / name
    content = damage(before[file])
    file.write_bytes(content)
    try:
        with pytest.raises(UserError) as error:
            train(stopped, models["neox"], dataset, "-gas", 2, "-e", 2, "--resume")
        assert len(error.value.problems) == 1 and "\n" not in str(error.value) and str(folder) in str(error.value)
    finally:
        for path, was in before.items():
            path.write_bytes(was)


def test_equal_runs_have_equal_bytes(models, dataset, tmp_path):
    """target_modules is a set in peft: its order depended on the hash seed of the process."""
    files = []
    for seed in ("1", "2"):
        words = ["-m", models["llama"], "-i", dataset, "--output_root", tmp_path / seed, "--lora_r", 2, "-e", 1]
        command = [sys.executable, str(ROOT / "run_peft.py"), *map(str, words)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        files.append(next((tmp_path / seed).rglob("adapter_config.json")).read_text())
    modules = json.loads(files[0])["target_modules"]
    assert files[0] == files[1] and modules == sorted(modules) and len(modules) == 14


def check_change_of_a_full_model(folder, last, base):
    """run.json's relative_change is that of the saved matrices, read from the files."""
    before, after = (load_file(path / "model.safetensors") for path in (Path(base), last))
    matrices = [name for name in after if after[name].dim() > 1]
    change = sum((after[name].double() - before[name].double()).square().sum() for name in matrices)
    total = sum(before[name].double().square().sum() for name in matrices)
    value = json.loads((folder / "run.json").read_text())["relative_change"]
    assert value == pytest.approx(float((change / total) ** 0.5), rel=1e-4)


@pytest.mark.parametrize("kind", ("lora", "dora", "pissa", "full", "dp"))
def test_a_model_that_has_hardly_moved_is_reported(kind, models, dataset, tmp_path, capsys):
    """And its value in run.json is ‖W′ − W‖ / ‖W‖ of the merged weights, whatever the adapter."""
    from common import adapters as common_adapters
    from common import models as common_models

    flags = ["-pt", kind] if kind != "dp" else ["--dp", "--noise_multiplier", 0, "--max_grad_norm", "inf"]
    still, moved = (train(tmp_path / rate, models["neox"], dataset, "-lr", rate, *flags) for rate in ("2e-6", "1e-2"))
    record = json.loads((still / "run.json").read_text())
    assert record["relative_change"] < 1e-4 and record["notes"][0].startswith("the model has hardly moved")
    assert json.loads((moved / "run.json").read_text())["notes"] == []
    assert capsys.readouterr().out.count("the model has hardly moved") == 1
    for folder in (still, moved):
        last = find_checkpoints(folder)[-1]
        if kind == "full":
            check_change_of_a_full_model(folder, last, models["neox"])
            continue
        base = common_models.load_base(common_models.find_model(str(last)), torch.float32, "cpu")
        with common_adapters.adapted(base, last) as (_, change):
            assert json.loads((folder / "run.json").read_text())["relative_change"] == pytest.approx(change, rel=0.02)


@pytest.mark.parametrize("flags", (["-pt", "pissa"], ["--dp", "--noise_multiplier", 1]), ids=["pissa", "dp"])
def test_a_model_that_has_hardly_moved_is_reported_where_it_is_measured(flags, models, dataset, tmp_path, capsys):
    """At the default learning rate, by every script that prints a number of the checkpoint."""
    import evaluate_purified
    import measure_purified
    from mia import mia
    from perplexity import perplexity

    for rate, told in ((run_peft.make_parser().get_default("learning_rate"), 1), (0.01, 0)):
        folder = train(tmp_path / str(rate), models["neox"], dataset, *flags, "-lr", rate)
        last, out, quick = checkpoints(folder)[-1], tmp_path / f"out {rate}", ["--temperatures", 0.2]
        for script, words in (
            (measure_purified, ["--model", last, "--output_dir", out / "m", "-d", dataset, *quick]),
            (evaluate_purified, ["--model", folder, "-d", dataset, *quick]),
            (perplexity, ["--dir", folder, "-d", dataset, "--output_dir", out / "p", "--dtype", "bfloat16"]),
            (mia, ["--model", last, "--members", dataset, "--output_dir", out / "i", "--attacks", "loss"]),
        ):
            capsys.readouterr()
            assert script.main([str(word) for word in words]) == 0
            assert capsys.readouterr().out.count("is below 0.0001; its results are those of the base") == told, script


@pytest.mark.parametrize("rank", [4, 16])
def test_dp_on_a_bf16_base_passes_its_check(rank, models, dataset, tmp_path):
    """Twelve initialisations, as on a GPU by default; what is wrong is still noticed (test_dp.py)."""
    import torch

    from common.distributed import World

    for seed in range(6):
        args = parse(
            "-m",
            models["llama" if seed % 2 else "neox"],
            "-i",
            dataset,
            "--output_root",
            tmp_path,
            "--dp",
            "--lora_r",
            rank,
            "--noise_multiplier",
            1,
            "--dtype",
            "bfloat16",
        )
        plan = make_plan(args)
        training = DPTrainer(args, plan, World(), torch.bfloat16, bytes([seed]) * 32)
        assert training.clip_slack == pytest.approx((1 + 1e-4 * 40) ** 0.5)
        training.examples.add = lambda name, rows, add=training.examples.add: add(name, rows.flip(0))
        with pytest.raises(RuntimeError, match="per-example gradient is wrong"):
            check_examples(training)
