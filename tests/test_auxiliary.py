"""canary/auxiliary.py: text that holds the placed canaries tells them apart, other text does not; a run resumes."""

import json
import shutil

import pytest
from conftest import read_lines, write_rows
from test_canary import generated, make
from test_synthetic import make_reviews

from canary import auxiliary
from canary.text_model import tpr_at

FEW = ("-e", 2, "-lr", 1e-2, "-pdbs", 4, "--lora_r", 16, "--lora_alpha", 64)


def run(models, out, key, *more) -> int:
    words = ("-m", models["llama"], "--canaries", key, "--output_dir", out, *FEW, *more)
    return auxiliary.main([str(word) for word in words])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(key, rows with every placed canary thirty times, rows with none), 40 audit canaries."""
    folder = tmp_path_factory.mktemp("texts")
    _, _, key = make(folder, make_reviews(120), "--audit", 40)
    plain = ["Zzz qqq." for _ in range(10)]
    told = [one["sentence"] for one in key if one["included"]] * 30
    telling, silent = (generated(folder / f"{name}.jsonl", rows) for name, rows in (("a", told), ("b", plain)))
    return folder / "train_canaries_key.jsonl", telling, silent


@pytest.mark.xfail(
    reason="the tiny model has not learnt the canaries: AUC 0.65 (0.46–0.80) with verbatim text", strict=False
)
def test_text_with_the_canaries_tells_them_apart_and_other_text_does_not(texts, models, tmp_path):
    """40 coins; of text without any, they are independent of the scores: AUC 0.5 ± 0.09."""
    key, telling, silent = texts
    arms = ("--synthetic", f"telling={telling}", f"silent={silent}")
    assert run(models, tmp_path / "out", key, *arms) == 0
    lines = read_lines(tmp_path / "out" / "results_auxiliary.jsonl")
    found = {(line["arm"], line["signal"]): line for line in lines if line["measure"] == "audit_text"}
    told, not_told = found["telling", "auxiliary"], found["silent", "auxiliary"]
    assert told["headline"] and told["auc"] > 0.9 and told["lower"]["95"] > 0
    assert told["f_dp"]["epsilon_delta"]["lower"]["95"] > 0 and told["tpr_at_fpr"]["tpr"] > 0.5
    assert 0.25 < not_told["auc"] < 0.75 and not_told["lower"] == {"95": 0.0, "99.9": 0.0}
    assert not_told["auc_ci"][0] < 0.5 < not_told["auc_ci"][1]
    assert found["telling", "2-gram"]["auc"] == 1
    assert not any(line["headline"] for (_, signal), line in found.items() if signal != "auxiliary")
    for line in lines:
        assert (line["n_requested"], line["n_scored"], line["n_dropped"], line["seed"]) == (40, 40, 0, 3407)
        assert line["settings"]["epochs"] == 2 and line["training"]["rows_dropped"] == 0 and line["training"]["steps"]
    rows = read_lines(tmp_path / "out" / "results_auxiliary_rows.jsonl")
    assert len(rows) == 80 and {"auxiliary", "auxiliary, secret", "2-gram"} <= set(rows[0])


def test_an_interrupted_run_resumes_and_other_settings_are_refused(texts, models, tmp_path, monkeypatch, capsys):
    """Stopped after the first of two trainings: that adapter is kept, and the results are those of one run."""
    key, telling, silent = texts
    arms = ("--synthetic", f"a={telling}", f"b={silent}")
    assert run(models, tmp_path / "whole", key, *arms) == 0
    real, calls = auxiliary.fine_tune, []

    def stops(config):
        calls.append(config)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(config)

    monkeypatch.setattr(auxiliary, "fine_tune", stops)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "out", key, *arms)
    monkeypatch.setattr(auxiliary, "fine_tune", real)
    first = next((tmp_path / "out/models").rglob("adapter_model.safetensors"))
    then = first.stat().st_mtime_ns
    assert run(models, tmp_path / "out", key, *arms) == 0
    assert first.stat().st_mtime_ns == then
    for name in ("results_auxiliary.jsonl", "results_auxiliary_rows.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(Exception, match="--lora_alpha was 64"):
        run(models, tmp_path / "out", key, *arms, "--lora_alpha", 8)


def test_a_model_that_saw_the_private_rows_and_keys_without_coins_are_refused(texts, models, adapters, tmp_path):
    key, telling, _ = texts
    with pytest.raises(Exception, match="is an adapter; give a model that has not seen"):
        run(models | {"llama": adapters["llama", "lora"]}, tmp_path / "out", key, "--synthetic", f"a={telling}")
    saw = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(models["llama"], saw)
    source = {"path": "x", "sha256": read_lines(key)[0]["training"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"args": {}, "inputs": [source]}))
    with pytest.raises(Exception, match="was trained on the file that"):
        run(models | {"llama": saw}, tmp_path / "out", key, "--synthetic", f"a={telling}")
    header, *lines = read_lines(key)
    ladder = write_rows(tmp_path / "ladder.jsonl", [header, *(line | {"kind": "ladder"} for line in lines)])
    with pytest.raises(Exception, match="has no audit canaries; inject with --audit"):
        run(models, tmp_path / "out", ladder, "--synthetic", f"a={telling}")
    blank = generated(tmp_path / "blank.jsonl", [" "] * 3)
    with pytest.raises(Exception, match="no row has text"):
        run(models, tmp_path / "out", key, "--synthetic", f"a={blank}")


def test_tpr_by_hand():
    """200 others 0 … 199: two may exceed the threshold, 197; of the members 197.5, 198.5 and 5, two do."""
    found = tpr_at([197.5, 198.5, 5], list(range(200)))
    assert (found["tpr"], found["false_positives"]) == (2 / 3, 2)
    assert tpr_at([10, 9], [9, 1])["tpr"] == 0.5  # of few, none may; a tie counts against the members
