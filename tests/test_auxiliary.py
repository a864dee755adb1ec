"""canary/auxiliary.py: text that holds the placed canaries tells them apart, other text does not; a run resumes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_lines, write_rows
from test_canary import generated, make
from test_synthetic import make_reviews

from canary import auxiliary
from canary.likelihoods import sentence_logps
from canary.text_model import tpr_at
from common import adapters as common_adapters
from common import distributed, stats
from common import models as common_models

FEW = ("-e", 2, "-lr", 1e-2, "-pdbs", 4, "--lora_r", 16, "--lora_alpha", 64)


def run(models, out, key, *more) -> int:
    words = ("-m", models["llama"], "--canaries", key, "--output_dir", out, *FEW, *more)
    return auxiliary.main([str(word) for word in words])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(key, rows with every placed canary five times, rows with none), 80 audit canaries."""
    folder = tmp_path_factory.mktemp("texts")
    _, _, key = make(folder, make_reviews(120), "--audit", 80)
    plain = ["Zzz qqq." for _ in range(10)]
    told = [one["sentence"] for one in key if one["included"]] * 5
    telling, silent = (generated(folder / f"{name}.jsonl", rows) for name, rows in (("a", told), ("b", plain)))
    return folder / "train_canaries_key.jsonl", telling, silent


@pytest.fixture(scope="module")
def whole(texts, models, tmp_path_factory):
    """Output directory of a short run on the tiny model: arm a is the telling text, b the silent one."""
    key, telling, silent = texts
    folder = tmp_path_factory.mktemp("whole")
    assert run(models, folder, key, "--synthetic", f"a={telling}", f"b={silent}") == 0
    return folder


def adapter_of(folder: Path, arm: str) -> Path:
    """The last checkpoint of an arm in an output directory."""
    found = (folder / "models").rglob(f"{arm}-lora/*/checkpoint-*")
    return max(found, key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.slow
def test_text_with_the_canaries_tells_them_apart_and_other_text_does_not(texts, tmp_path):
    """80 coins all known would show ε ≥ 1.87; of text without any, they are independent: AUC 0.5 ± 0.065.

    The embedded model, trained until it has learnt the 38 sentences (0.5 nats a token): AUC 0.99. Two epochs of the
    tiny random model (1.6 nats a token) gave 0.62; 20 epochs gave 1.00 after the prompt of the rows trained on and 0.71
    in the canaries' own rows: random weights carry nothing from one context over to another.
    """
    key, telling, silent = texts
    arms = ("--synthetic", f"telling={telling}", f"silent={silent}")
    learnt = ("-e", 8, "-pdbs", 8, "--lora_r", 32, "--lora_alpha", 32)
    assert run({"llama": ROOT / "data/embedded/mini-pythia"}, tmp_path / "out", key, *arms, *learnt) == 0
    lines = read_lines(tmp_path / "out" / "results_auxiliary.jsonl")
    found = {(line["arm"], line["signal"]): line for line in lines if line["measure"] == "audit_text"}
    told, not_told = found["telling", "auxiliary"], found["silent", "auxiliary"]
    assert told["headline"] and told["auc"] > 0.95 and told["lower"]["95"] > 1
    assert told["f_dp"]["epsilon_delta"]["lower"]["95"] > 1 and told["tpr_at_fpr"]["tpr"] > 0.3
    assert found["telling", "auxiliary, secret"]["auc"] > 0.95 and found["telling", "2-gram"]["auc"] == 1
    assert 0.3 < not_told["auc"] < 0.7 and not_told["lower"] == {"95": 0.0, "99.9": 0.0}
    assert not any(line["headline"] for (_, signal), line in found.items() if signal != "auxiliary")
    for line in lines:
        assert (line["n_requested"], line["n_scored"], line["n_dropped"], line["seed"]) == (80, 80, 0, 3407)
        assert line["settings"]["epochs"] == 8 and line["training"]["rows_dropped"] == 0 and line["training"]["steps"]
    rows = read_lines(tmp_path / "out" / "results_auxiliary_rows.jsonl")
    assert len(rows) == 160 and {"auxiliary", "auxiliary, secret", "2-gram"} <= set(rows[0])


def test_scores_are_those_of_transformers_and_peft(texts, models, whole):
    """Independent route: the log-softmax of the tokens of the sentence and of the secret, one forward pass each."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    canaries = read_lines(texts[0])[1:]

    def logp(model, before: str, text: str) -> float:
        encoded = tokenizer(before + text, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        with torch.no_grad():
            logps = model(ids[None]).logits[0].log_softmax(-1)
        starts = [index for index, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(before)]
        return sum(logps[index - 1, ids[index]].item() for index in starts)

    def scores(model) -> list[list[float]]:
        parts = [
            [(one["context"], one["sentence"]), (one["context"] + one["before"], one["secret"])] for one in canaries
        ]
        return [[logp(model, *part) for part in both] for both in parts]

    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32).eval()
    before = np.array(scores(model))
    after = np.array(scores(PeftModel.from_pretrained(model, adapter_of(whole, "a")).eval()))
    rows = [row for row in read_lines(whole / "results_auxiliary_rows.jsonl") if row["arm"] == "a"]
    assert [(row["id"], row["included"]) for row in rows] == [(one["id"], one["included"]) for one in canaries]
    found = np.array([[row["auxiliary"], row["auxiliary, secret"]] for row in rows])
    assert np.abs(found - (after - before)).max() < 2e-3  # nats, of changes of 100 and more; 8e-5 was seen


def test_without_canaries_in_the_text_heads_and_tails_score_alike(models, whole, tmp_path):
    """One model trained on silent text, ten keys of 80 canaries: each AUC is 0.5 ± 0.065, so their mean 0.5 ± 0.021."""
    keys = []
    for seed in range(10):
        (tmp_path / str(seed)).mkdir()
        keys.append(make(tmp_path / str(seed), make_reviews(120, seed), "--audit", 80, "--seed", 1000 + seed)[2])
    canaries = [one for key in keys for one in key]
    ref = common_models.find_model(str(models["llama"]))
    tokenizer = common_models.load_tokenizer(ref)
    base = common_models.load_base(ref, common_models.resolve_dtype("float32", "cpu"), "cpu", None)

    def score(model) -> np.ndarray:
        return np.array(sentence_logps(model, tokenizer, canaries, 512, distributed.start())["whole"])

    before = score(base)
    with common_adapters.adapted(base, str(adapter_of(whole, "b"))) as (model, _):
        change = (score(model) - before).reshape(10, 80)
    placed = np.array([[one["included"] for one in key] for key in keys])
    found = [stats.auc(list(row[inside]), list(row[~inside])) for row, inside in zip(change, placed)]
    assert change.std() > 1  # the training did something
    assert abs(np.mean(found) - 0.5) < 3 * 0.0206  # 0.495 of twenty such keys
    assert 0.02 < np.std(found, ddof=1) < 0.13  # 0.066 of twenty such keys


def test_an_interrupted_run_resumes_and_other_settings_are_refused(texts, models, whole, tmp_path, monkeypatch):
    """Stopped after the first of two trainings: that adapter is kept, and the results are those of one run."""
    key, telling, silent = texts
    arms = ("--synthetic", f"a={telling}", f"b={silent}")
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
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
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
