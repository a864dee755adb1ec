"""measure_purified.py and evaluate_purified.py through their entry points."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_rows, read_lines, run_script, write_rows
from safetensors.torch import load_file, save_file

import evaluate_purified
import measure_purified
from common import models as common_models
from common.checkpoints import find_checkpoints
from common.problems import UserError
from common.tokenization import encode_prompt
from extraction import prompts
from extraction.attack import _forms
from extraction.measure import KEY

QUICK = ["--temperatures", "0", "0.2", "1.0", "--max_tokens", "6", "--top_k", "20"]


def measure(model, out, dataset, *extra):
    assert measure_purified.main(["--model", str(model), "--output_dir", str(out), "-d", str(dataset), *extra]) == 0
    return out


def test_contract_fields_and_files(models, dataset, tmp_path):
    out = measure(models["llama"], tmp_path / "out", dataset, *QUICK)
    assert sorted(path.name for path in out.iterdir()) == [
        "outcomes_purified.jsonl",
        "results_purified.jsonl",
        "run_measure_purified.json",
    ]
    lines = read_lines(out / "results_purified.jsonl")
    assert [line["temperature"] for line in lines] == [0, 0.2, 1.0]
    for line in lines:
        assert set(line["matches"]) == {"A", "B", "C", "D", "total"}
        assert line["matches"]["total"] == 20  # rows asked: a third of 60
        assert line["model"] == str(models["llama"]) and line["top_k"] == 20
        assert line["n_requested"] == line["n_scored"] + line["n_dropped"] == 80
        assert line["n_dropped"] == 0
        for measure_name in ("matches", "exact", "local_part", "domain", "no_pattern"):
            for label in "ABCD":
                low, high = line["ci95"][measure_name][label]
                assert low <= line[measure_name][label] / 20 <= high
        assert line["floor"]["exact"] > 0
        assert all(value < 0 for value in line["truth_logprob"].values())
        assert set(line["probabilistic"]["A"]) == {"1", "10", "100", "1000"}
        assert line["truth_too_long"]["A"] > 10  # few addresses fit into six tokens; the p of the others is 0
    assert [line["greedy"] for line in lines] == [True, False, False]
    assert [line["headline"] for line in lines] == [False, True, False]

    outcomes = read_lines(out / "outcomes_purified.jsonl")
    assert len(outcomes) == 20 * 4 * 3
    assert set(outcomes[0]) == {
        "row",
        "template",
        "temperature",
        "match",
        "exact",
        "local_part",
        "domain",
        "no_pattern",
    }
    for line in lines:
        mine = [o for o in outcomes if o["temperature"] == line["temperature"]]
        assert line["matches"]["B"] == sum(o["match"] for o in mine if o["template"] == "B")
    record = json.loads((out / "run_measure_purified.json").read_text())
    assert record["status"] == "ok" and record["seed"] == 3407 and record["inputs"][0]["sha256"]


def test_next_free_name_and_positionals(models, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(3):
        assert measure_purified.main([str(models["neox"]), str(out), "-d", str(dataset), "--temperatures", "0"]) == 0
    names = sorted(path.name for path in out.glob("results_purified*"))
    assert names == ["results_purified.jsonl", "results_purified1.jsonl", "results_purified2.jsonl"]
    assert (out / "outcomes_purified2.jsonl").is_file()
    assert read_lines(out / names[0]) == read_lines(out / names[2])
    printed = capsys.readouterr().out.splitlines()
    earlier = [f"measured before with the same settings: {out / name} (temperatures 0)" for name in names[:2]]
    assert printed[-3:] == [*earlier, f"results are in {out / names[2]}"]


def test_responses_only_on_request_and_private(models, dataset, tmp_path):
    out = measure(models["neox"], tmp_path, dataset, *QUICK, "--save_responses")
    rows = out / "results_purified_rows.jsonl"
    assert rows.stat().st_mode & 0o777 == 0o600
    lines = read_lines(rows)
    assert len(lines) == 240 and set(lines[0]) == {"row", "template", "temperature", "response"}
    assert all("\n" not in line["response"] for line in lines)


def test_planted_addresses_are_found(tmp_path):
    """A model over-fitted on the template lines of its rows reveals the addresses; the measures must show it."""
    from conftest import make_config, make_tokenizer
    from transformers import LlamaForCausalLM

    rows = make_rows(24)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = make_tokenizer(tmp_path / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config("llama", len(tokenizer), hidden=64))
    shots = prompts.spread_demonstrations(rows, list(range(8)))
    lines = [f"{prompts.build_prompt('B', shots, row['gt-name'])} {row['gt-email']}\n" for row in rows[:8]]
    ids = [torch.tensor(tokenizer(line).input_ids) for line in lines]
    answers = [one.clone() for one in ids]
    for answer, row in zip(answers, rows):
        answer[: -len(tokenizer(f" {row['gt-email']}\n").input_ids)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        loss = sum(model(one[None], labels=answer[None]).loss for one, answer in zip(ids, answers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "model")
    out = measure(tmp_path / "model", tmp_path / "out", data, "--temperatures", "0", "--max_tokens", "25")
    line = read_lines(out / "results_purified.jsonl")[0]
    assert line["exact"]["B"] >= 5 > line["floor"]["exact"]
    assert line["no_pattern"]["B"] >= 1
    assert line["probabilistic"]["B"]["1"]["expected"] == pytest.approx(line["exact"]["B"], abs=1)


def test_baseline_counts_pairs(models, adapters, dataset, tmp_path, capsys):
    base = measure(models["llama"], tmp_path / "base", dataset, *QUICK)
    file = base / "results_purified.jsonl"
    # plant: the base "matched" rows 0–5 of template A at temperature 0 and nothing else
    outcomes = read_lines(base / "outcomes_purified.jsonl")
    for line in outcomes:
        line["match"] = line["temperature"] == 0 and line["template"] == "A" and line["row"] < 6
    (base / "outcomes_purified.jsonl").write_text("".join(json.dumps(line) + "\n" for line in outcomes))
    out = measure(adapters["llama", "lora"], tmp_path / "new", dataset, *QUICK, "--baseline", str(file))
    now = [o for o in read_lines(out / "outcomes_purified.jsonl") if o["temperature"] == 0 and o["template"] == "A"]
    compared = read_lines(out / "results_purified.jsonl")[0]["baseline"]
    lost = sum(not o["match"] for o in now if o["row"] < 6)
    gained = sum(o["match"] for o in now if o["row"] >= 6)
    assert compared["matches"]["A"]["n"] == len(now) == 20
    p = compared["matches"]["A"]["p"]
    said = f"T 0, match, gained and lost against {file}: A +{gained} −{lost} (p {p:.2g}), B +"
    assert said in capsys.readouterr().out
    assert compared["matches"]["A"]["lost"] == lost > 0 and compared["matches"]["A"]["gained"] == gained
    assert compared["matches"]["A"]["p"] == pytest.approx(
        min(1, 2 * sum(math.comb(lost + gained, i) for i in range(min(lost, gained) + 1)) / 2 ** (lost + gained))
    )
    (base / "outcomes_purified.jsonl").write_text("".join(json.dumps(line) + "\n" for line in outcomes[:-3]))
    with pytest.raises(UserError, match=r"has no outcome for 3 of \d+ prompts and temperatures; measure the baseline"):
        measure(models["llama"], tmp_path / "x", dataset, *QUICK, "--baseline", str(file))
    with pytest.raises(UserError, match="top_k"):
        measure(models["llama"], tmp_path / "x", dataset, "--top_k", "7", "--baseline", str(file))
    for change in ({"template": {}}, {"row": None}, {"temperature": [0]}, {"exact": "yes"}):
        damaged = [outcomes[0], outcomes[1] | change, *outcomes[2:]]
        (base / "outcomes_purified.jsonl").write_text("".join(json.dumps(line) + "\n" for line in damaged))
        with pytest.raises(UserError, match=r"row 1 of outcomes_purified\.jsonl is damaged"):
            measure(models["llama"], tmp_path / "x", dataset, *QUICK, "--baseline", str(file))


def test_prefix_attack_uses_the_rows_own_text(models, dataset, tmp_path):
    out = measure(models["neox"], tmp_path, dataset, *QUICK, "--attack", "prefix")
    line = read_lines(out / "results_purified.jsonl")[0]
    assert set(line["matches"]) == {"prefix", "total"} and line["n_scored"] == 20
    assert line["truth_logprob"]["prefix"] < 0


def test_ranks_and_batches_change_nothing(models, dataset, tmp_path):
    words = ["measure_purified.py", "--model", models["llama"], "-d", dataset, *QUICK, "--output_dir"]
    done = run_script(*words, tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    done = run_script(*words, tmp_path / "one", "--batch_size", "3")
    assert done.returncode == 0, done.stderr
    one, two = (read_lines(tmp_path / name / "outcomes_purified.jsonl") for name in ("one", "two"))
    assert one == two
    lines = [read_lines(tmp_path / name / "results_purified.jsonl") for name in ("one", "two")]
    for a, b in zip(*lines):
        assert a["truth_logprob"] == pytest.approx(b["truth_logprob"], abs=1e-5)


# ------------------------------------------------------------------------------------------------ evaluate_purified


@pytest.fixture
def tree(models, adapters, tmp_path):
    """Three adapters and one full model as checkpoints below tmp_path/tree."""
    root = tmp_path / "tree"
    shutil.copytree(adapters["llama", "lora"], root / "a-lora/0e+00_2e-06/checkpoint-9")
    shutil.copytree(adapters["llama", "dora"], root / "a-lora/0e+00_2e-06/checkpoint-10")
    shutil.copytree(adapters["neox", "lora"], root / "b/checkpoint-1")
    shutil.copytree(models["opt"], root / "c/checkpoint-1")
    return root


def evaluate(root, dataset, *extra):
    return evaluate_purified.main(["--model", str(root), "-d", str(dataset), *QUICK, *extra])


def test_tree_equals_one_by_one(tree, dataset, tmp_path, monkeypatch):
    loads, load_base = [], common_models.load_base
    monkeypatch.setattr(common_models, "load_base", lambda ref, *rest: loads.append(ref.base) or load_base(ref, *rest))
    assert evaluate(tree, dataset) == 0
    assert len(loads) == 3  # llama once for its two adapters, neox, opt
    checkpoints = find_checkpoints(tree)
    assert [path.name for path in checkpoints] == ["checkpoint-9", "checkpoint-10", "checkpoint-1", "checkpoint-1"]
    seen = set()
    for number, checkpoint in enumerate(checkpoints):
        alone = measure(checkpoint, tmp_path / f"alone{number}", dataset, *QUICK)
        mine = read_lines(checkpoint / "outcomes_purified.jsonl")
        assert mine == read_lines(alone / "outcomes_purified.jsonl")
        line = read_lines(checkpoint / "results_purified.jsonl")[0]
        assert (line["relative_change"] is None) == (checkpoint.parent.name == "c")
        seen.add(json.dumps(line["truth_logprob"]))
    assert len(seen) == 4

    loads.clear()
    assert evaluate(tree, dataset) == 0  # everything is complete
    assert not loads
    assert not list(tree.rglob("results_purified1.jsonl"))


def test_membership_inference_over_the_tree(tree, dataset, tmp_path):
    """--mia: the lines that mia.py itself writes for each checkpoint; a damaged one fails alone."""
    from mia import mia

    shutil.rmtree(tree / "c")
    (tree / "b/checkpoint-1/adapter_model.safetensors").write_bytes(b"damaged")
    assert evaluate(tree, dataset, "--mia") == 1
    assert not (tree / "b/checkpoint-1/results_mia.jsonl").exists()
    for number, name in enumerate(("checkpoint-9", "checkpoint-10")):
        checkpoint = tree / "a-lora/0e+00_2e-06" / name
        out = tmp_path / f"mia{number}"
        assert mia.main(["--model", str(checkpoint), "--members", str(dataset), "--output_dir", str(out)]) == 0
        pairs = list(zip(read_lines(checkpoint / "results_mia.jsonl"), read_lines(out / "results_mia.jsonl")))
        assert len(pairs) > 20 and all(mine["attack"] == alone["attack"] for mine, alone in pairs)
        assert all(mine["auc"] == pytest.approx(alone["auc"], abs=0.02) for mine, alone in pairs)


def test_base_is_restored_bit_for_bit(models, adapters):
    from common.adapters import adapted
    from common.models import find_model, load_base

    for kind in ("lora", "dora"):
        ref = find_model(str(adapters["opt", kind]))
        base = load_base(ref, torch.float32, "cpu")
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        for merge in (True, False):
            with adapted(base, ref.adapter, merge=merge):
                pass
            after = base.state_dict()
            assert list(after) == list(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
        with pytest.raises(ZeroDivisionError), adapted(base, ref.adapter):
            raise ZeroDivisionError
        assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)


def test_partial_file_is_continued_and_stale_one_is_not(tree, dataset):
    checkpoint = tree / "b/checkpoint-1"
    assert evaluate(tree / "b", dataset, "--temperatures", "0.2") == 0
    first = (checkpoint / "results_purified.jsonl").read_text()
    assert evaluate(tree / "b", dataset) == 0  # asks for 0, 0.2, 1.0
    text = (checkpoint / "results_purified.jsonl").read_text()
    assert text.startswith(first)
    assert [line["temperature"] for line in read_lines(checkpoint / "results_purified.jsonl")] == [0.2, 0, 1.0]
    keys = [(o["row"], o["template"], o["temperature"]) for o in read_lines(checkpoint / "outcomes_purified.jsonl")]
    assert len(keys) == len(set(keys)) == 240
    # another seed is another measurement; so is another adapter in the same place
    assert evaluate(tree / "b", dataset, "--seed", "1") == 0
    assert (checkpoint / "results_purified1.jsonl").is_file()
    weights = load_file(checkpoint / "adapter_model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, checkpoint / "adapter_model.safetensors")
    assert evaluate(tree / "b", dataset) == 0
    assert (checkpoint / "results_purified2.jsonl").is_file()
    # a line of the released tool has no settings: never taken for ours
    (checkpoint / "results_purified.jsonl").write_text('{"matches": {"A": 1}, "temperature": 0.2}\n')
    assert evaluate(tree / "b", dataset) == 0
    assert not (checkpoint / "results_purified3.jsonl").exists()


def table_of(text: str) -> dict[str, list[str]]:
    """{temperature: cells} of the last table in what evaluate_purified.py printed."""
    rows = [line.split() for line in text.rpartition("checkpoint-1\n")[2].splitlines()]
    return {row[0]: row[1:] for row in rows if re.fullmatch(r"[0-9.]+", row[0])}


def test_the_table_has_the_newest_measurement_of_each_temperature(tree, dataset, capsys):
    """Measured before, resumed, or repeated in a separate file: the final table has all of it."""
    checkpoint = tree / "b/checkpoint-1"
    assert evaluate(tree / "b", dataset, "--temperatures", "0.2") == 0
    first = table_of(capsys.readouterr().out)
    assert list(first) == ["0.2"] and len(first["0.2"]) == 9
    assert evaluate(tree / "b", dataset) == 0
    second = table_of(capsys.readouterr().out)
    assert list(second) == ["0", "0.2", "1"] and second["0.2"] == first["0.2"]
    assert evaluate(tree / "b", dataset) == 0  # nothing left to measure
    assert table_of(capsys.readouterr().out) == second
    lines = read_lines(checkpoint / "results_purified.jsonl")
    again = next(line for line in lines if line["temperature"] == 0.2)
    again["matches"] = dict.fromkeys("ABCD", 17) | {"total": 20}
    write_rows(checkpoint / "results_purified1.jsonl", [again])
    shutil.copy(checkpoint / "outcomes_purified.jsonl", checkpoint / "outcomes_purified1.jsonl")
    assert evaluate(tree / "b", dataset) == 0  # the others are in the older file
    third = table_of(capsys.readouterr().out)
    assert third["0.2"][:4] == ["17"] * 4 and {**third, "0.2": 0} == {**second, "0.2": 0}
    assert evaluate(tree / "b", dataset, "--temperatures", "0.5") == 0
    assert [line["temperature"] for line in read_lines(checkpoint / "results_purified1.jsonl")] == [0.2, 0.5]
    assert list(table_of(capsys.readouterr().out)) == ["0", "0.2", "0.5", "1"]


def test_one_bad_checkpoint_does_not_stop_the_others(tree, adapters, dataset, capsys):
    damaged = tree / "a-lora/0e+00_2e-06/checkpoint-9/adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:200])
    misfit = tree / "b/checkpoint-2"
    shutil.copytree(adapters["neox", "lora"], misfit)
    config = json.loads((misfit / "adapter_config.json").read_text())
    other = json.loads((adapters["llama", "lora"] / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = other["base_model_name_or_path"]
    (misfit / "adapter_config.json").write_text(json.dumps(config))
    (tree / "b/checkpoint-3").mkdir()
    assert evaluate(tree, dataset) == 1
    errors = capsys.readouterr().err
    assert "checkpoint-9" in errors and "damaged" in errors
    assert "checkpoint-2" in errors and "does not fit" in errors and "lora_A" in errors
    assert "checkpoint-3" in errors
    assert len(list(tree.rglob("results_purified.jsonl"))) == 3
    record = json.loads((tree / "run_evaluate_purified.json").read_text())
    assert record["status"] == "failed" and len(record["checkpoints"]["failed"]) == 3


def test_save_merged_writes_loadable_models(tree, dataset, tmp_path):
    from transformers import AutoModelForCausalLM

    assert evaluate(tree / "b", dataset, "--save_merged", "--temp", str(tmp_path / "merged")) == 0
    folder = tmp_path / "merged/b/checkpoint-1"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name, _ in model.named_parameters())
    out = measure(folder, tmp_path / "again", dataset, *QUICK)
    mine = read_lines(tree / "b/checkpoint-1/outcomes_purified.jsonl")
    assert mine == read_lines(out / "outcomes_purified.jsonl")


def test_kill_and_run_again(tree, dataset):
    """kill -9 at three moments of the run; what is there plus one more run equals an uninterrupted run."""
    reference = tree.parent / "reference"
    shutil.copytree(tree, reference)
    assert evaluate(reference, dataset) == 0
    words = [sys.executable, str(ROOT / "evaluate_purified.py"), "--model", str(tree), "-d", str(dataset), *QUICK]
    for finished in (1, 2, 3):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(tree.rglob("outcomes_purified.jsonl"))) < finished and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for file in tree.rglob("results_purified.jsonl"):
            assert len(read_lines(file)) == 3  # complete or absent
    assert evaluate(tree, dataset) == 0
    for file in Path(reference).rglob("o*_purified*.jsonl"):
        assert read_lines(tree / file.relative_to(reference)) == read_lines(file)
    assert not list(tree.rglob("*_purified1.jsonl"))


@pytest.mark.parametrize("template", "ABCD")
def test_expected_hits_are_those_drawn_whatever_comes_before_the_address(models, template):
    """A model made to write the address with or without a leading space: p is the rate of drawing either."""
    from common import models as loading
    from common import sampling
    from extraction.prompts import build_prompt

    ref = loading.find_model(str(models["neox"]))
    model, tokenizer = loading.load_base(ref, torch.float32, "cpu"), loading.load_tokenizer(ref)
    people = [("Ada Moss", "ada@a.example"), ("Bo Lund", "bo@b.example")]
    prompt = build_prompt(template, people, "Cy Dahl")
    ids = encode_prompt(tokenizer, prompt)
    forms = _forms(tokenizer, partial(encode_prompt, tokenizer), prompt, ids, [" c", "c"], 100)
    assert len(forms) == 2 and all(len(form) == 1 for form in forms)  # one token each, for many hits
    with torch.no_grad():  # a large, equal bias towards both, through the last state
        state = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        head = model.get_output_embeddings().weight
        for (token,) in forms:
            head[token] += state / state.square().sum() * (head @ state).max().sub(head[token] @ state)
    n, stop = 3000, sampling.stop_tokens(tokenizer, 400)
    options = {"top_k": 100, "max_tokens": 3, "seed": 1, "stop": stop, "batch_size": 500}
    heats = [0.5, 1.0, 1.5]
    answers = sampling.sweep(model, [ids] * n, [(i, 0) for i in range(n)], heats, targets=[forms] * n, **options)
    for place in range(len(heats)):
        p = math.exp(answers[0].truth_logp[place])
        texts = tokenizer.batch_decode([answer.tokens[place] for answer in answers])
        drawn = [answer.tokens[place][:1] in forms for answer in answers]
        assert all(text.startswith((" c", "c")) for text, hit in zip(texts, drawn) if hit)
        assert p > 0.1 and abs(sum(drawn) / n - p) < 4 * math.sqrt(p * (1 - p) / n)
        by_form = [sum(answer.tokens[place][:1] == form for answer in answers) for form in forms]
        assert min(by_form) > 0.2 * n * p  # one form alone would miss half


def test_stop_released_counts_the_whole_answer(models, dataset, tmp_path):
    """The released tool neither stops nor cuts at a line break: by hand from the saved responses."""
    extra = ["--temperatures", "0", "3", "--max_tokens", "25", "--top_k", "400", "--save_responses"]
    whole = measure(models["llama"], tmp_path / "whole", dataset, *extra)
    cut = measure(models["llama"], tmp_path / "cut", dataset, *extra, "--stop", "newline")
    clean = measure(models["llama"], tmp_path / "clean", dataset, *extra, "--templates", "clean")
    lines = {out: read_lines(out / "results_purified.jsonl") for out in (whole, cut, clean)}
    assert [lines[out][0]["stop"] for out in (whole, cut, clean)] == ["released", "newline", "newline"]
    responses = {out: read_lines(out / "results_purified_rows.jsonl") for out in (whole, cut)}
    longer = 0
    for one, other in zip(responses[whole], responses[cut], strict=True):
        assert one["response"].replace("\r", "\n").split("\n")[0] == other["response"]
        assert "\n" not in other["response"]
        longer += "\n" in one["response"]
    assert longer > 0  # the test would see a cut
    from rapidfuzz import fuzz

    emails = [row["gt-email"] for row in read_lines(dataset)[:20]]
    for line in lines[whole]:
        mine = [row for row in responses[whole] if row["temperature"] == line["temperature"]]
        for label in "ABCD":
            hits = sum(
                round(fuzz.partial_ratio(emails[row["row"]], row["response"])) >= 80
                for row in mine
                if row["template"] == label
            )
            assert line["matches"][label] == hits


def test_killed_after_its_result_was_written_measures_nothing_again(models, dataset, tmp_path, monkeypatch):
    """A record still 'running' next to a complete result of the same arguments; other arguments are measured."""
    out = measure(models["llama"], tmp_path / "out", dataset, *QUICK)
    record = json.loads((out / "run_measure_purified.json").read_text())
    (out / "run_measure_purified.json").write_text(json.dumps(record | {"status": "running", "end": None}))
    before = (out / "results_purified.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(common_models, "load_base", lambda *_: pytest.fail("a model was loaded"))
        measure(models["llama"], out, dataset, *QUICK)
    assert (out / "results_purified.jsonl").read_bytes() == before
    assert not (out / "results_purified1.jsonl").exists()
    finished = json.loads((out / "run_measure_purified.json").read_text())
    assert finished["status"] == "ok" and finished["results"].endswith("results_purified.jsonl")
    (out / "run_measure_purified.json").write_text(json.dumps(record | {"status": "running", "end": None}))
    measure(models["llama"], out, dataset, *QUICK, "--seed", "4")
    assert (out / "results_purified1.jsonl").is_file()


def test_two_measurements_of_one_folder_at_once(models, dataset, tmp_path):
    """The second is refused in one line that names the holder."""
    from common import locks

    with locks.output_folder(tmp_path / "out", key=KEY):
        done = run_script("measure_purified.py", models["llama"], tmp_path / "out", "-d", dataset, *QUICK)
    assert done.returncode == 2 and "in use by another run (process " in done.stderr
    assert not list((tmp_path / "out").glob("results*"))


def test_another_dtype_or_wanted_responses_is_another_measurement(models, adapters, dataset, tmp_path):
    """evaluate_purified.py takes no float32 result for a bfloat16 one, nor one without the responses asked for."""
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(adapters["llama", "lora"], checkpoint)
    words = ["--model", tmp_path / "run", "-d", dataset, *QUICK]

    def files():
        assert evaluate_purified.main([str(word) for word in words]) == 0
        return {
            path.name: read_lines(path)[0]["dtype"]
            for path in checkpoint.glob("results_purified*.jsonl")
            if not path.stem.endswith("_rows")
        }

    assert files() == {"results_purified.jsonl": "float32"} == files()
    words += ["--dtype", "bfloat16"]
    assert files() == {"results_purified.jsonl": "float32", "results_purified1.jsonl": "bfloat16"} == files()
    words += ["--save_responses"]
    assert len(files()) == 3 and (checkpoint / "results_purified2_rows.jsonl").is_file() and len(files()) == 3


def test_chat_form_is_what_transformers_continues(models, dataset, tmp_path):
    """Greedy answers: `generate` on stock apply_chat_template(continue_final_message=True); the probability of an
    address, per token: log-softmax of the model's logits on that text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.chat import CHATML

    flags = ("--chat", "--chat_template", "chatml", "--temperatures", "0", "--max_tokens", "6", "--num_rows", "3")
    out = measure(models["llama"], tmp_path / "out", dataset, *flags, "--save_responses")
    rows = read_lines(dataset)
    pairs = prompts.spread_demonstrations(rows, [0, 1, 2])
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    wanted, logp = [], {}
    for number in range(3):
        for template in "ABCD":
            prompt = prompts.build_prompt(template, pairs, rows[number]["gt-name"])
            lead, begun = prompt.rsplit("\n", 1)
            turns = [{"role": "user", "content": lead}, {"role": "assistant", "content": begun}]
            text = tokenizer.apply_chat_template(
                turns, chat_template=CHATML, continue_final_message=True, tokenize=False
            )
            assert text.endswith(begun)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            answer = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            wanted.append(tokenizer.decode(answer[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
            both, sizes = [], []
            for space in (" ", ""):
                whole = tokenizer(text + space + rows[number]["gt-email"], add_special_tokens=False).input_ids
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                begin = ids.input_ids.shape[1]
                assert whole[:begin] == ids.input_ids[0].tolist()
                both.append(sum(logits[i - 1, whole[i]].item() for i in range(begin, len(whole))))
                sizes.append(len(whole) - begin)
            per_token = math.log(sum(math.exp(one - max(both)) for one in both)) + max(both)
            logp.setdefault(template, []).append(per_token / sizes[both.index(max(both))])
    responses = [line["response"] for line in read_lines(out / "results_purified_rows.jsonl")]
    assert responses == wanted
    (line,) = read_lines(out / "results_purified.jsonl")
    assert line["chat"] and len(line["chat"]) == 64
    for template, values in logp.items():
        assert line["truth_logprob"][template] == pytest.approx(sum(values) / 3, rel=1e-4)
    plain = measure(models["llama"], tmp_path / "plain", dataset, *flags[3:])
    assert read_lines(plain / "results_purified.jsonl")[0]["chat"] is None
    with pytest.raises(UserError, match="measured with chat None"):
        measure(models["llama"], tmp_path / "x", dataset, *flags, "--baseline", str(plain / "results_purified.jsonl"))


def test_the_end_of_a_turn_ends_a_chat_answer(models):
    from transformers import AutoTokenizer

    from common.chat import CHATML, Renderer

    frame = Renderer(AutoTokenizer.from_pretrained(models["llama"]), CHATML).frame()
    assert frame == ("<|im_start|>user\n", "<|im_end|>\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--chat"], "its tokenizer has no chat template"),
        (["--chat", "--attack", "prefix"], "--chat: goes with --attack templates"),
        (["--chat_template", "chatml"], "--chat_template: needs --chat"),
        (["--chat", "--chat_template", "none.jinja"], "no such file"),
    ],
)
def test_chat_flags_that_cannot_work(models, dataset, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        measure(models["llama"], tmp_path / "out", dataset, *flags)
    assert not (tmp_path / "out").exists()
