"""perplexity/perplexity.py: numbers against independent routes, files, resuming, failures, bad input."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ARCHITECTURES, ROOT, make_rows, read_lines, run_script, write_rows

from common import models as models_module
from common.problems import UserError
from perplexity import measure as room
from perplexity import perplexity as script
from perplexity.metrics import describe, summarize

LINE = re.compile(r"^model path: (.+); mean perplexity: (\d+(?:\.\d+)?(?:e[+-]\d+)?)$")
FIELDS = {
    "model", "checkpoint", "base_model", "model_sha256", "revision", "dataset", "dataset_sha256", "rows", "dtype",
    "seed", "mean", "token_weighted", "median", "bits_per_byte", "mean_ci", "token_weighted_ci", "undefined",
    "n_requested", "n_scored", "n_dropped", "dropped", "n_tokens", "n_bytes", "n_windowed", "context", "stride",
    "privacy", "relative_change",
}  # fmt: skip


def measure(*words) -> int:
    return script.main([str(word) for word in words])


def plain_perplexities(folder, adapter, texts) -> tuple[list[float], list[int]]:
    """([NLL], [T]) by the plain route: one document at a time, start token, stock peft, whole logits in float64."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    nll, n_tokens = [], []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item())
        n_tokens.append(len(ids) - 1)
    return nll, n_tokens


def texts_of(dataset, n: int = 20) -> list[str]:
    return [row["prompt"] + row["continuation"] for row in read_lines(dataset)[:n]]


def tree(folder: Path, adapters, arch: str = "llama") -> Path:
    """run/checkpoint-10 (lora), run/checkpoint-9 (dora) and other/checkpoint-100 (lora): adapters of one base."""
    shutil.copytree(adapters[arch, "lora"], folder / "run" / "checkpoint-10")
    shutil.copytree(adapters[arch, "dora"], folder / "run" / "checkpoint-9")
    shutil.copytree(adapters[arch, "lora"], folder / "other" / "checkpoint-100")
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", (None, "lora", "dora"))
def test_numbers_equal_the_plain_route(models, adapters, dataset, tmp_path, arch, kind):
    adapter = adapters[arch, kind] if kind else None
    assert measure("--model", adapter or models[arch], "-d", dataset, "--output_dir", tmp_path) == 0
    (line,) = read_lines(tmp_path / "perplexity.jsonl")
    texts = texts_of(dataset)
    nll, n_tokens = map(np.array, plain_perplexities(models[arch], adapter, texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    assert line["mean"] == pytest.approx(np.mean(np.exp(nll / n_tokens)), rel=1e-5)
    assert line["token_weighted"] == pytest.approx(math.exp(nll.sum() / n_tokens.sum()), rel=1e-5)
    assert line["median"] == pytest.approx(np.median(np.exp(nll / n_tokens)), rel=1e-5)
    assert line["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / n_bytes, rel=1e-5)
    assert (line["n_tokens"], line["n_bytes"]) == (n_tokens.sum(), n_bytes)
    assert (line["n_requested"], line["n_scored"], line["n_dropped"], line["n_windowed"]) == (20, 20, 0, 0)
    assert line["rows"] == [0, 20, 20] and line["dtype"] == "float32" and set(line) == FIELDS
    assert (line["relative_change"] is None) == (kind is None)
    for figure in ("mean", "token_weighted"):
        low, high = line[f"{figure}_ci"]
        assert low < line[figure] < high


def test_summary_by_hand():
    """Two documents: NLL 2·ln 4 over 2 tokens and 1·ln 16 over 1 token; 4 and 2 bytes."""
    made = summarize([2 * math.log(4), math.log(16)], [2, 1], [4, 2], seed=0)
    assert made["mean"] == pytest.approx((4 + 16) / 2)
    assert made["token_weighted"] == pytest.approx(256 ** (1 / 3))  # not a mean over documents but a ratio of sums
    assert made["median"] == pytest.approx(10)
    assert made["bits_per_byte"] == pytest.approx(8 / 6)  # 256 = 8 bits over 6 bytes
    # a resample of two documents is (4, 4), (16, 16) or mixed, with probability 1/4, 1/4, 1/2
    assert made["mean_ci"] == pytest.approx([4, 16]) and made["token_weighted_ci"] == pytest.approx([4, 16])
    assert made["undefined"] == {}


def test_summary_of_nothing_and_of_one():
    nothing = summarize([], [], [], seed=0)
    assert nothing["mean"] is None and nothing["undefined"]["mean"] == "no document could be scored"
    one = summarize([math.log(3)], [1], [1], seed=0)
    assert (
        one["mean"] == pytest.approx(3)
        and one["mean_ci"] is None
        and set(one["undefined"])
        == {
            "mean_ci",
            "token_weighted_ci",
        }
    )


def test_interval_covers_and_follows_the_seed():
    """Documents of perplexity exp(N(2, 0.3)): the bootstrap interval against mean ± 1.96 standard errors."""
    rng = np.random.default_rng(0)
    logs = rng.normal(2, 0.3, 500)
    made = summarize(list(logs), [1] * 500, [1] * 500, seed=1)
    values = np.exp(logs)
    half = 1.96 * values.std() / 500**0.5
    assert made["mean_ci"] == pytest.approx([values.mean() - half, values.mean() + half], rel=0.01)
    assert made["mean_ci"] == summarize(list(logs), [1] * 500, [1] * 500, seed=1)["mean_ci"]
    assert made["mean_ci"] != summarize(list(logs), [1] * 500, [1] * 500, seed=2)["mean_ci"]


def test_empty_and_non_finite_documents_are_dropped_and_counted():
    logps = [np.array([-1.0, -2.0]), np.array([]), np.array([]), np.array([np.nan]), np.array([-3.0])]
    texts = ["ab", "", "\x00", "c", "dé"]
    made = describe(texts, [[0, 1, 2], [0], [0], [0, 1], [0, 3]], logps, context=2, seed=0)
    assert made["dropped"] == {"empty document": 1, "no tokens": 1, "log-probability not finite": 1}
    assert (made["n_requested"], made["n_scored"], made["n_dropped"]) == (5, 2, 3)
    assert made["mean"] == pytest.approx((math.exp(1.5) + math.exp(3)) / 2)
    assert (made["n_tokens"], made["n_bytes"], made["n_windowed"]) == (3, 5, 1)


def test_every_checkpoint_gets_one_line_in_order(models, adapters, dataset, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = tree(tmp_path / "tree", adapters)
    shutil.copytree(models["opt"], folder / "run" / "checkpoint-11")  # a full model among adapters
    hidden = folder / ".checkpoint-12.x.tmp" / "checkpoint-12"  # what a killed training run leaves
    shutil.copytree(adapters["llama", "lora"], hidden)
    loads, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a[0]) or load(*a, **k))
    assert measure(folder, "-d", dataset) == 0
    names = ["other/checkpoint-100", "run/checkpoint-9", "run/checkpoint-10", "run/checkpoint-11"]
    found = [LINE.match(line) for line in (folder / "perplexity.txt").read_text().splitlines()]
    assert [match[1] for match in found] == [str(folder / name) for name in names]
    lines = {line["checkpoint"]: line for line in read_lines(folder / "perplexity.jsonl")}
    assert sorted(lines) == sorted(names)
    assert [float(match[2]) for match in found] == [lines[name]["mean"] for name in names]
    assert len(loads) == 2  # the Llama base once, for three adapters
    # adapters are removed bit for bit: the same adapter first and last gives the same numbers
    assert lines["other/checkpoint-100"]["mean"] == lines["run/checkpoint-10"]["mean"]
    assert lines["run/checkpoint-9"]["mean"] != lines["run/checkpoint-10"]["mean"]
    record = json.loads((folder / "run_perplexity.json").read_text())
    assert record["status"] == "ok" and record["failed"] == {}
    assert record["n_tokens"] == sum(line["n_tokens"] for line in lines.values())
    assert f"model path: {folder / names[0]}; mean perplexity: " in capsys.readouterr().out


def test_batching_changes_nothing(models, dataset, tmp_path):
    means = []
    for budget in (1, 500, 10_000):
        assert (
            measure(
                "--model",
                models["neox"],
                "-d",
                dataset,
                "--output_dir",
                tmp_path / str(budget),
                "--token_budget",
                budget,
            )
            == 0
        )
        means.append(read_lines(tmp_path / str(budget) / "perplexity.jsonl")[0]["mean"])
    assert means[1:] == pytest.approx(means[:1] * 2, rel=1e-5)


def test_a_document_longer_than_the_context(models, tmp_path):
    """The fixture's models hold 512 tokens; windows begin every 256. Against a loop over whole windows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = make_rows(9)
    rows[1]["continuation"] += " ".join(row["prompt"] for row in make_rows(25, seed=5))
    dataset = write_rows(tmp_path / "long.jsonl", rows)
    assert measure("--model", models["opt"], "-d", dataset, "--output_dir", tmp_path) == 0
    (line,) = read_lines(tmp_path / "perplexity.jsonl")
    assert (line["n_windowed"], line["context"], line["stride"], line["n_requested"]) == (1, 512, 256, 3)

    tokenizer = AutoTokenizer.from_pretrained(models["opt"])
    model = AutoModelForCausalLM.from_pretrained(models["opt"], dtype=torch.float32).eval()
    text = rows[1]["prompt"] + rows[1]["continuation"]
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    assert len(ids) > 1024
    total, done = 0.0, 1
    for begin in range(0, len(ids), 256):
        window = ids[begin : begin + 512]
        with torch.no_grad():
            logp = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for position in range(done, begin + len(window)):
            total -= logp[position - begin - 1, ids[position]].item()
        done = max(done, begin + len(window))
    assert done == len(ids)
    short = texts_of(dataset, 3)
    nll, n_tokens = plain_perplexities(models["opt"], None, [short[0], short[2]])
    nll, n_tokens = [nll[0], total, nll[1]], [n_tokens[0], len(ids) - 1, n_tokens[1]]
    assert line["token_weighted"] == pytest.approx(math.exp(sum(nll) / sum(n_tokens)), rel=1e-5)
    assert line["mean"] == pytest.approx(np.mean(np.exp(np.array(nll) / n_tokens)), rel=1e-5)


def test_rows_default_to_the_head_and_num_rows_is_explicit(models, dataset, tmp_path):
    model = models["llama"]
    for name, words, rows in (("head", [], 20), ("few", ["--num_rows", 4], 4), ("more", ["--num_rows", 45], 45)):
        assert measure("--model", model, "-d", dataset, "--output_dir", tmp_path / name, *words) == 0
        (line,) = read_lines(tmp_path / name / "perplexity.jsonl")
        assert line["rows"] == [0, rows, rows] and line["n_requested"] == rows
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "one two three"}, {"text": ""}, {"text": "four five"}])
    assert measure("--model", model, "-d", texts, "--output_dir", tmp_path / "whole") == 0
    (line,) = read_lines(tmp_path / "whole" / "perplexity.jsonl")
    assert (line["n_requested"], line["n_scored"], line["dropped"]) == (3, 2, {"empty document": 1})


def test_rerun_skips_and_duplicates_nothing(adapters, dataset, tmp_path, capsys, monkeypatch):
    folder = tree(tmp_path / "tree", adapters)
    assert measure(folder, "-d", dataset) == 0
    files = {name: (folder / name).read_text() for name in ("perplexity.txt", "perplexity.jsonl")}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(models_module, "load_base", lambda *_: pytest.fail("a model was loaded"))
        assert measure("--dir", folder, "-d", dataset) == 0
    assert "3 measured before, 0 to measure" in capsys.readouterr().out
    assert files == {name: (folder / name).read_text() for name in files}
    # other settings are another measurement: new lines in .jsonl, still one line per checkpoint in .txt
    assert measure(folder, "-d", dataset, "--num_rows", 5) == 0
    assert len(read_lines(folder / "perplexity.jsonl")) == 6
    assert len((folder / "perplexity.txt").read_text().splitlines()) == 3
    assert (folder / "perplexity.txt").read_text() != files["perplexity.txt"]
    # the first settings again: nothing measured, and .txt shows them
    assert measure(folder, "-d", dataset) == 0
    assert (folder / "perplexity.txt").read_text() == files["perplexity.txt"]
    assert len(read_lines(folder / "perplexity.jsonl")) == 6
    # a moved tree is not measured again, and its lines name the new place
    moved = folder.rename(tmp_path / "moved")
    assert measure(moved, "-d", dataset) == 0
    lines = read_lines(moved / "perplexity.jsonl")
    assert len(lines) == 6 and all(line["model"] == str(moved / line["checkpoint"]) for line in lines)
    assert len((moved / "perplexity.txt").read_text().splitlines()) == 3
    folder = moved.rename(folder)
    assert measure(folder, "-d", dataset) == 0
    # a checkpoint retrained in place replaces its line
    weights = "adapter_model.safetensors"
    shutil.copy(folder / "run" / "checkpoint-9" / weights, folder / "other" / "checkpoint-100" / weights)
    shutil.copy(folder / "run" / "checkpoint-9" / "adapter_config.json", folder / "other" / "checkpoint-100")
    assert measure(folder, "-d", dataset) == 0
    lines = [line for line in read_lines(folder / "perplexity.jsonl") if line["n_requested"] == 20]
    assert sorted(line["checkpoint"] for line in lines) == [
        "other/checkpoint-100",
        "run/checkpoint-10",
        "run/checkpoint-9",
    ]
    means = {line["checkpoint"]: line["mean"] for line in lines}
    assert means["other/checkpoint-100"] == means["run/checkpoint-9"]


def test_a_damaged_checkpoint_among_good_ones(adapters, dataset, tmp_path, capsys):
    folder = tree(tmp_path / "tree", adapters)
    weights = folder / "run" / "checkpoint-9" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert measure(folder, "-d", dataset) == 1
    assert len(read_lines(folder / "perplexity.jsonl")) == 2
    assert f"failed: {folder}/run/checkpoint-9: " in capsys.readouterr().err
    record = json.loads((folder / "run_perplexity.json").read_text())
    assert record["status"] == "failed" and record["error"] == "1 of 3 models failed"
    shutil.copy(adapters["llama", "dora"] / "adapter_model.safetensors", weights)
    assert measure(folder, "-d", dataset) == 0
    assert len(read_lines(folder / "perplexity.jsonl")) == 3


def test_a_checkpoint_that_fails_while_measured(adapters, dataset, tmp_path, capsys):
    """An adapter of another base passes the checks of its files and fails when it is attached."""
    folder = tree(tmp_path / "tree", adapters)
    config = json.loads((folder / "run" / "checkpoint-9" / "adapter_config.json").read_text())
    shutil.rmtree(folder / "run" / "checkpoint-9")
    shutil.copytree(adapters["opt", "lora"], folder / "run" / "checkpoint-9")
    (folder / "run" / "checkpoint-9" / "adapter_config.json").write_text(json.dumps(config))
    assert measure(folder, "-d", dataset) == 1
    assert "does not fit this base model" in capsys.readouterr().err
    good = {line["checkpoint"]: line["mean"] for line in read_lines(folder / "perplexity.jsonl")}
    assert good["run/checkpoint-10"] == good["other/checkpoint-100"]  # measured before and after the failure


def test_a_bug_in_one_checkpoint_is_a_traceback_and_spares_the_others(adapters, dataset, tmp_path, capsys, monkeypatch):
    folder, scored = tree(tmp_path / "tree", adapters), room.score

    def second_time_lucky(*words, calls=[], **options):  # noqa: B006
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")
        return scored(*words, **options)

    monkeypatch.setattr(room, "score", second_time_lucky)
    assert measure(folder, "-d", dataset) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors and f"failed: {folder}/other/checkpoint-100: ZeroDivisionError: a bug" in errors
    assert len(read_lines(folder / "perplexity.jsonl")) == 2


def test_killed_between_checkpoints_loses_nothing(adapters, dataset, tmp_path):
    """kill -9 as soon as the first line is written; the next run measures the rest and equals an uninterrupted one."""
    whole, broken = tree(tmp_path / "whole", adapters), tree(tmp_path / "broken", adapters)
    assert measure(whole, "-d", dataset) == 0
    command = [sys.executable, ROOT / "perplexity" / "perplexity.py", broken, "-d", dataset]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (broken / "perplexity.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = read_lines(broken / "perplexity.jsonl")
    assert 1 <= len(before) <= 3
    assert measure(broken, "-d", dataset) == 0
    after = read_lines(broken / "perplexity.jsonl")
    assert after[: len(before)] == before
    uninterrupted = {line["checkpoint"]: line["mean"] for line in read_lines(whole / "perplexity.jsonl")}
    assert {line["checkpoint"]: line["mean"] for line in after} == uninterrupted and len(after) == 3


def test_two_ranks_equal_one_process(adapters, dataset, tmp_path):
    folder = tree(tmp_path / "tree", adapters)
    shutil.copytree(folder, tmp_path / "alone")
    options = ["-d", dataset, "--token_budget", 300]
    done = run_script("perplexity/perplexity.py", folder, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert measure(tmp_path / "alone", *options) == 0
    lines, wanted = read_lines(folder / "perplexity.jsonl"), read_lines(tmp_path / "alone" / "perplexity.jsonl")
    assert len(lines) == 3
    for line, other in zip(lines, wanted):
        for field in FIELDS - {"model"}:  # rel: a process with two threads sums in another order
            close = isinstance(other[field], float) or field.endswith("_ci")
            assert line[field] == (pytest.approx(other[field], rel=1e-6) if close else other[field])
    assert done.stdout.count("mean perplexity") == 3  # only rank 0 prints
    assert json.loads((folder / "run_perplexity.json").read_text())["world_size"] == 2


def test_bfloat16_keeps_the_adapter_apart(adapters, dataset, tmp_path):
    model = ["--model", adapters["llama", "lora"], "-d", dataset, "--output_dir", tmp_path]
    for dtype in ("float32", "bfloat16"):
        assert measure(*model, "--dtype", dtype) == 0
    full, half = read_lines(tmp_path / "perplexity.jsonl")
    assert (full["dtype"], half["dtype"], half["relative_change"]) == ("float32", "bfloat16", None)
    assert half["bits_per_byte"] != full["bits_per_byte"]
    assert half["bits_per_byte"] == pytest.approx(full["bits_per_byte"], rel=0.02)  # 8 bits: 0.4 % per number


def problems_of(*words) -> list[str]:
    with pytest.raises(UserError) as caught:
        measure(*words)
    return caught.value.problems


def test_all_problems_at_once_and_nothing_written(models, adapters, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(models_module, "load_base", lambda *_: pytest.fail("a model was loaded"))
    orphan = tmp_path / "orphan"
    shutil.copytree(adapters["opt", "lora"], orphan)
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    out = tmp_path / "out"
    found = problems_of("--model", orphan, "-d", broken, "--output_dir", out)
    assert len(found) == 2 and f"{broken}:2: not JSON" in found[0] and f"{tmp_path}/gone: no such directory" in found[1]
    assert not out.exists()


def test_bad_input_lines(models, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(models_module, "load_base", lambda *_: pytest.fail("a model was loaded"))
    model, empty = ["--model", models["llama"], "--output_dir", tmp_path / "out"], tmp_path / "empty"
    empty.mkdir()
    two = write_rows(tmp_path / "two.jsonl", make_rows(2))
    half = write_rows(tmp_path / "half.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "\ud83d"}])
    missing = write_rows(tmp_path / "missing.jsonl", [*make_rows(3), {"gt-name": "Ada Quillan", "prompt": "x"}])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "perplexity.jsonl").write_text('{"ppl": 3}\n')
    for words, wanted in (
        ([*model, "-d", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        ([*model, "-d", two], "two.jsonl: 2 rows; at least 3 are needed"),
        ([*model, "-d", half], "half.jsonl:3: half of a surrogate pair"),
        ([*model, "-d", missing], "row 3: field 'gt-email' is missing"),
        ([*model, "-d", dataset, "--num_rows", 61], "--num_rows 61: "),
        ([*model, "-d", dataset, "--num_rows", 0], "--num_rows: must be 1 or more"),
        ([*model, "-d", dataset, "--dtype", "int3"], "--dtype: invalid choice"),
        ([*model, "-d", dataset, "--dir", empty], f"cannot be combined with the directory {empty}"),
        ([empty, "-d", dataset, "--dir", tmp_path], "differs from"),
        ([empty, "-d", dataset], "no checkpoint-* directory below it"),
        (["--dir", tmp_path / "gone", "-d", dataset], "gone: no such directory"),
        (["--model", tmp_path / "gone", "-d", dataset, "--output_dir", tmp_path / "out"], "gone: no such directory"),
        (["--model", models["llama"], "-d", dataset, "--output_dir", two], "is a file, not a directory"),
        (["--model", models["llama"], "-d", dataset, "--output_dir", foreign], "not written by this script"),
    ):
        found = problems_of(*words)
        assert any(wanted in line for line in found), (wanted, found)
        assert all("\n" not in line for line in found) and len(found) <= 2
    assert not (tmp_path / "out").exists()


def test_checkpoints_none_of_which_can_be_measured_are_bad_input(adapters, dataset, tmp_path):
    folder = tree(tmp_path / "tree", adapters)
    for weights in folder.rglob("adapter_model.safetensors"):
        weights.unlink()
    found = problems_of(folder, "-d", dataset)
    assert len(found) == 3 and all("without adapter_model.safetensors" in line for line in found)
    assert not (folder / "perplexity.txt").exists()


def test_dry_run_writes_nothing_and_loads_nothing(adapters, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models_module, "load_base", lambda *_: pytest.fail("a model was loaded"))
    folder = tree(tmp_path / "tree", adapters)
    before = sorted(folder.rglob("*"))
    assert measure(folder, "-d", dataset, "--dry_run") == 0
    assert sorted(folder.rglob("*")) == before
    assert "20 documents; 0 measured before, 3 to measure, 0 unusable" in capsys.readouterr().out


def test_exit_status_and_quick_help(tmp_path):
    done = run_script("perplexity/perplexity.py", tmp_path, "-d", tmp_path / "none.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 2 and "usage" not in done.stderr
    started = time.monotonic()
    done = run_script("perplexity/perplexity.py", "--help")
    assert time.monotonic() - started < 2  # 0.2 s on an idle machine; torch alone takes longer than this limit
    assert done.returncode == 0 and "(default: ./pythia-1.4b)" in done.stdout


def test_both_routes_of_the_benchmark_agree():
    """bench/perplexity.py at its smallest: both routes give the same mean perplexity, and a ratio is printed."""
    done = run_script(
        "bench/perplexity.py",
        "--documents",
        20,
        "--longest",
        64,
        "--hidden_size",
        32,
        "--layers",
        1,
        "--vocabulary",
        500,
        "--runs",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"ratio +\d+\.\d+", done.stdout)
