"""mia/mia.py: scores against stock transformers and peft in float64, controls, files, cache, ranks, bad input."""

import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import ARCHITECTURES, ROOT, make_rows, read_lines, run_script, write_rows

from common.problems import UserError
from mia import attacks, forward, neighborhood, signals
from mia import dataset as mia_dataset
from mia import mia as script
from mia import report as reporting
from training.plan import choose_rows
from training.run import run as fine_tune

SIZES = [f"{family}_{k}" for family in ("min_k", "min_k_pp") for k in range(10, 101, 10)]
CORE = ["loss", "zlib", "lowercase", "ref", *SIZES, "surp", "ez", "wbc"]
BLIND = ["blind_length", "blind_zlib", "blind_bow", "blind_tfidf"]
FIELDS = {
    "attack", "headline", "parameters", "auc", "auc_ci", "auc_ci_method", "direction",
    "tpr_at_fpr", "tpr_at_fpr_ci", "points", "undefined",
    "n_requested", "n_scored", "n_dropped", "dropped", "n_members", "n_nonmembers", "blind", "base", "near_duplicates",
    "flags", "model", "base_model", "reference", "model_sha256", "members", "members_trained", "members_seen",
    "nonmembers",
    "max_length", "dtype", "bootstrap", "seed",
}  # fmt: skip


def attack(*words) -> int:
    return script.main([str(word) for word in words])


def texts_of(path) -> list[str]:
    return [row["prompt"] + row["continuation"] for row in read_lines(path)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(members, non-members): 12 + 12 fictional rows; ids 0 … 23."""
    folder, rows = tmp_path_factory.mktemp("sets"), make_rows(24, seed=7)
    return write_rows(folder / "members.jsonl", rows[:12]), write_rows(folder / "nonmembers.jsonl", rows[12:])


@pytest.fixture
def corpus(tmp_path):
    rows = make_rows(10, seed=40)
    return write_rows(tmp_path / "corpus.jsonl", rows)


def run_on(folder, model, sets, *words, bootstrap=20) -> tuple[list[dict], list[dict]]:
    """(result lines, score lines) of one run."""
    status = attack(
        "--model",
        model,
        "--members",
        sets[0],
        "--nonmembers",
        sets[1],
        "--output_dir",
        folder,
        "--bootstrap",
        bootstrap,
        *words,
    )
    assert status == 0
    return read_lines(folder / "results_mia.jsonl"), read_lines(folder / "scores_mia.jsonl")


def same_scores(rows, others, rel=1e-5, but=()):
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        assert list(row) == list(other)
        for key in set(row) - set(but):
            close = isinstance(other[key], float)
            assert row[key] == (pytest.approx(other[key], rel=rel, abs=1e-6) if close else other[key]), key


# ---- the numbers


class Plain:
    """The plain route: one text at a time, stock peft with the adapter switched on or off, whole float64 logits."""

    def __init__(self, base, adapter):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, adapter).eval()

    def logs(self, ids, before=()):
        """[T − 1, V] log-probabilities for tokens 2 … T, after `before`."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([[*before, *ids]])).logits[0].double()
        return logits[len(before) : -1].log_softmax(-1).numpy()

    def logp(self, ids, before=()):
        logs = self.logs(ids, before)
        return logs[np.arange(len(logs)), ids[1:]]

    def gradient(self, ids) -> float:
        import torch

        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        loss = self.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        self.model.zero_grad()
        loss.backward()
        return math.sqrt(
            sum(p.grad.double().square().sum().item() for p in self.model.parameters() if p.grad is not None)
        )


@pytest.mark.parametrize("arch, kind", [(arch, "lora") for arch in ARCHITECTURES] + [("llama", "dora")])
def test_scores_equal_the_plain_route(models, adapters, sets, corpus, tmp_path, arch, kind):
    short = [
        {"text": text[:40], "label": int(index > 2)} for index, text in enumerate(map(_text, make_rows(5, seed=60)))
    ]
    shots = write_rows(tmp_path / "shots.jsonl", short)
    lines, rows = run_on(
        tmp_path / "out",
        adapters[arch, kind],
        sets,
        "--attacks",
        "core",
        "recall",
        "con_recall",
        "grad_norm",
        "dc_pdd",
        "--prefix_file",
        shots,
        "--freq_corpus",
        corpus,
    )
    by_attack = {line["attack"]: line for line in lines}
    used = by_attack["con_recall"]["parameters"]
    assert (used["shots"], used["member_shots"]) == (3, 2)
    plain = Plain(models[arch], adapters[arch, kind])
    tokenize = lambda text: plain.tokenizer(text).input_ids  # noqa: E731
    shown = [tokenize(text) + tokenize("\n") for text in (row["text"] for row in short)]
    prefix = [[token for ids in part for token in ids] for part in (shown[:3], shown[3:])]
    counts = np.bincount(
        [token for text in texts_of(corpus) for token in tokenize(text)], minlength=len(plain.tokenizer)
    )
    for row, text in list(zip(rows, texts_of(sets[0]) + texts_of(sets[1])))[::5]:
        ids = tokenize(text)
        logs, logp = plain.logs(ids), plain.logp(ids)
        with plain.model.disable_adapter():
            base = plain.logp(ids)
        mean = (np.exp(logs) * logs).sum(1)
        deviation = np.sqrt((np.exp(logs) * (logs - mean[:, None]) ** 2).sum(1))
        after, after_members = (plain.logp(ids, before).mean() for before in prefix)
        low = sorted((logp - mean) / deviation)[: max(1, len(logp) * 20 // 100)]
        change = (logp - base)[logs.argmax(1) != np.array(ids[1:])]
        first = [place for place, token in enumerate(ids[1:]) if token not in ids[1 : place + 1]]
        rarity = np.log((counts.sum() + len(counts)) / (counts[np.array(ids[1:])] + 1))
        wanted = {
            "loss": logp.mean(),
            "zlib": logp.mean() / len(zlib.compress(text.encode())),
            "lowercase": logp.mean() - plain.logp(tokenize(text.lower())).mean(),
            "ref": logp.mean() - base.mean(),
            "min_k_20": np.mean(sorted(logp)[: max(1, len(logp) * 20 // 100)]),
            "min_k_100": logp.mean(),
            "min_k_pp_20": np.mean(low),
            "recall": after / logp.mean(),
            "con_recall": (after - 0.5 * after_members) / logp.mean(),
            "dc_pdd": np.mean([min(math.exp(logp[place]) * rarity[place], 0.01) for place in first]),
            "grad_norm": -plain.gradient(ids),
            "ez": change[change > 0].sum() / np.abs(change).sum(),
        }
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=2e-4, abs=2e-5)
        assert {key: row[key] for key in ("surp", "wbc")} == pytest.approx(
            {"surp": attacks.surp(logp, -mean), "wbc": attacks.wbc(logp, base)}, rel=2e-4, abs=2e-5
        )


def test_files_lines_and_fields(adapters, sets, tmp_path):
    lines, rows = run_on(tmp_path, adapters["llama", "lora"], sets, "--combine")
    names = ["mia_cache", "results_mia.jsonl", "roc_mia.png", "run_mia.json", "scores_mia.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [line["attack"] for line in lines] == [*CORE, "combine"]
    for line in lines:
        assert set(line) == FIELDS
        assert (line["n_requested"], line["n_scored"] + line["n_dropped"]) == (24, 24)
        assert list(line["tpr_at_fpr"]) == ["0.1", "0.01", "0.001"]
        assert line["tpr_at_fpr"]["0.1"] is not None and line["tpr_at_fpr"]["0.01"] is None
        assert list(line["blind"]) == BLIND
        assert (line["base"]["auc"] is None) == (line["attack"] in ("ref", "ez", "wbc"))
    assert [line["attack"] for line in lines if line["headline"]] == ["ref"]
    wanted = ["id", "label", *CORE, "combine", *BLIND, "text_sha256", "null"]
    assert all(list(row) == wanted for row in rows)
    assert [row["label"] for row in rows] == [1] * 12 + [0] * 12
    assert [row["id"] for row in rows] == list(range(24))
    for line in lines:  # the lines agree with the scores
        kept = [(row[line["attack"]], row["label"]) for row in rows if row[line["attack"]] is not None]
        pairs = [(m > n) + 0.5 * (m == n) for m, one in kept if one for n, other in kept if not other]
        assert line["auc"] == pytest.approx(np.mean(pairs))
    record = json.loads((tmp_path / "run_mia.json").read_text())
    assert record["members_trained"] is None  # no run.json beside the adapter
    assert record["status"] == "ok" and set(record["dataset_inference"]) == {"target", "base", "blind"}
    written = "".join(path.read_text() for path in tmp_path.glob("*.json*"))
    assert not any(row["gt-email"] in written or row["gt-name"] in written for row in read_lines(sets[0]))


def test_base_auc_is_that_of_the_base_itself(models, adapters, sets, tmp_path):
    lines, _ = run_on(tmp_path / "adapter", adapters["neox", "lora"], sets, "--attacks", "core", "neighborhood")
    alone, _ = run_on(tmp_path / "base", models["neox"], sets, "--attacks", "core", "neighborhood")
    alone = {line["attack"]: line for line in alone}
    for line in lines:
        if line["attack"] in ("ref", "ez", "wbc"):
            assert line["base"]["auc"] is None and line["base"]["undefined"] == "compares with the base"
            assert alone[line["attack"]]["auc"] is None
            assert alone[line["attack"]]["dropped"] == {"no reference model; give --ref_model": 24}
        else:
            assert line["base"]["auc"] == alone[line["attack"]]["auc"]


def test_a_reference_model_is_not_the_base(models, adapters, sets, tmp_path):
    """`base` is the model before fine-tuning, whatever --ref_model is; for a full model it is unknown."""
    words = ("--attacks", "core", "--ref_model", models["llama"])
    own, _ = run_on(tmp_path / "own", adapters["neox", "lora"], sets)
    other, _ = run_on(tmp_path / "other", adapters["neox", "lora"], sets, *words)
    assert [line["base"] for line in other] == [line["base"] for line in own]
    assert other[0]["reference"] == str(models["llama"]) != own[0]["reference"]
    found = [{line["attack"]: line["auc"] for line in lines} for lines in (own, other)]
    assert found[0]["loss"] == found[1]["loss"] and found[0]["ref"] != found[1]["ref"]
    whole, _ = run_on(tmp_path / "whole", models["neox"], sets, *words)
    for line in whole:
        assert line["auc"] is not None and line["base"]["auc"] is None
        assert line["base"]["undefined"] == "no base known: the model has no adapter"
    assert json.loads((tmp_path / "whole" / "run_mia.json").read_text())["dataset_inference"]["base"] is None


@pytest.mark.parametrize("before, after", ((1, 0), (1, 1), (0, 1), (2, 0)))
def test_recall_where_special_tokens_stand_around_a_text(models, sets, tmp_path, before, after):
    """ℓ(x|P) by whole float64 logits: the tokens of ℓ(x), after shots without the EOS that ends a text."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(models["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos, mark = tokenizer.eos_token, [tokenizer.eos_token_id]
    template = " ".join([eos] * before + ["$A"] + [eos] * after)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[(eos, *mark)])
    tokenizer.save_pretrained(folder)
    short = [{"text": text[:40]} for text in map(_text, make_rows(3, seed=60))]
    shots = write_rows(tmp_path / "shots.jsonl", short)
    _, rows = run_on(tmp_path / "out", folder, sets, "--attacks", "recall", "loss", "--prefix_file", shots)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def bare(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def mean(ids, n):
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logs.gather(1, torch.tensor(ids[1:])[:, None])[-n:].mean().item()

    prefix = mark * before + [token for row in short for token in bare(row["text"]) + bare("\n")]
    for row, text in list(zip(rows, texts_of(sets[0]) + texts_of(sets[1])))[::7]:
        ids = mark * before + bare(text) + mark * after
        assert tokenizer(text).input_ids == ids
        loss = mean(ids, len(ids) - 1)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        given = mean(prefix + ids[min(1, before) :], len(ids) - 1)
        assert row["recall"] == pytest.approx(given / loss, rel=1e-5)


def test_a_reference_model_of_other_tokens(models, sets, tmp_path):
    """ref compares means over each model's own tokens; ez and wbc need the same tokens."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    lines, _ = run_on(tmp_path / "same", models["llama"], sets, "--ref_model", models["neox"])
    assert all(line["n_scored"] == 24 for line in lines)
    other = shutil.copytree(models["neox"], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    bytewise = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(_without_merges(tokenizer)),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    bytewise.save_pretrained(other)
    lines, _ = run_on(tmp_path / "out", models["llama"], sets, "--ref_model", other, "--max_length", 60)
    found = {line["attack"]: line for line in lines}
    assert found["ref"]["n_scored"] == 24
    for name in ("ez", "wbc"):
        assert found[name]["dropped"] == {"the reference model has other tokens": 24}


def test_a_reference_model_sees_the_text_that_the_target_saw(models, sets, tmp_path):
    """Texts cut at 12 tokens of the target: ref against the bytes of the same characters, by hand in float64. A text
    that is longer than the reference's context is null, never compared by its beginning."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = shutil.copytree(models["neox"], tmp_path / "other")
    known = AutoTokenizer.from_pretrained(other)
    bytewise = type(known)(tokenizer_object=Tokenizer.from_str(_without_merges(known)), eos_token="<|endoftext|>")
    bytewise.save_pretrained(other)
    words = ("--attacks", "loss", "ref", "--max_length", 12, "--ref_model", other)
    _, rows = run_on(tmp_path / "out", models["llama"], sets, *words)
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    target, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval() for folder in (models["llama"], other)
    )

    def mean(model, ids):
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logs.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()

    for row, text in list(zip(rows, texts_of(sets[0]) + texts_of(sets[1])))[::7]:
        coded = tokenizer(text, return_offsets_mapping=True)
        cut = text[: coded.offset_mapping[11][1]]
        assert len(coded.input_ids) > 12 and cut != text
        wanted = mean(target, coded.input_ids[:12]) - mean(reference, bytewise(cut).input_ids)
        assert row["ref"] == pytest.approx(wanted, rel=1e-4)

    config = json.loads((models["llama"] / "config.json").read_text())
    short = shutil.copytree(models["llama"], tmp_path / "short")
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))
    lines, rows = run_on(tmp_path / "shorter", models["llama"], sets, "--attacks", "ref", "ez", "--ref_model", short)
    reason = "longer than the reference model's context"
    long = [len(tokenizer(text).input_ids) > 30 for text in texts_of(sets[0]) + texts_of(sets[1])]
    assert all(line["dropped"] == {reason: sum(long)} for line in lines) and sum(long)
    assert [row["ref"] is None for row in rows] == long


def _without_merges(tokenizer) -> str:
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made["model"]["merges"] = []
    return json.dumps(made)


def test_any_batching_and_any_round_gives_the_same_scores(adapters, sets, tmp_path, monkeypatch):
    words = ("--attacks", "core", "recall", "neighborhood")
    _, whole = run_on(tmp_path / "whole", adapters["neox", "lora"], sets, *words, "--token_budget", 100_000)
    _, single = run_on(tmp_path / "single", adapters["neox", "lora"], sets, *words, "--token_budget", 1)
    same_scores(single, whole)
    monkeypatch.setattr(forward, "ROUND_TOKENS", 300)
    _, rounds = run_on(tmp_path / "rounds", adapters["neox", "lora"], sets, *words, "--token_budget", 500)
    same_scores(rounds, whole)
    assert len(list((tmp_path / "rounds" / "mia_cache").rglob("*.npz"))) > len(
        list((tmp_path / "whole" / "mia_cache").rglob("*.npz"))
    )


def test_two_ranks_equal_one_process(adapters, sets, tmp_path):
    words = ["--attacks", "core", "recall", "grad_norm", "neighborhood", "--token_budget", "300"]
    done = run_script(
        "mia/mia.py",
        "--model",
        adapters["opt", "lora"],
        "--members",
        sets[0],
        "--nonmembers",
        sets[1],
        "--output_dir",
        tmp_path / "two",
        "--bootstrap",
        20,
        *words,
        ranks=2,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines, rows = run_on(tmp_path / "one", adapters["opt", "lora"], sets, *words)
    same_scores(read_lines(tmp_path / "two" / "scores_mia.jsonl"), rows)
    for line, other in zip(read_lines(tmp_path / "two" / "results_mia.jsonl"), lines):
        assert (line["attack"], line["auc"], line["auc_ci"]) == (other["attack"], other["auc"], other["auc_ci"])
    assert done.stdout.count("dataset inference") == 1


# ---- the cache


def test_a_second_run_or_attack_costs_nothing(adapters, sets, tmp_path, monkeypatch, capsys):
    _, rows = run_on(tmp_path, adapters["neox", "lora"], sets, "--attacks", "loss", "ref")
    content = {path.name: path.read_bytes() for path in tmp_path.glob("*_mia.jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr(forward.models, "load_base", lambda *_: pytest.fail("a model was loaded"))
        run_on(tmp_path, adapters["neox", "lora"], sets, "--attacks", "loss", "ref")
        assert content == {path.name: path.read_bytes() for path in tmp_path.glob("*_mia.jsonl")}
        assert json.loads((tmp_path / "run_mia.json").read_text())["passes"] == {"texts_scored": 0}
        # other attacks on the same pass, and a part of the texts
        _, more = run_on(
            tmp_path,
            adapters["neox", "lora"],
            sets,
            "--attacks",
            "min_k_pp",
            "surp",
            "ez",
            "wbc",
            "loss",
            "--max_samples",
            5,
        )
        assert len(more) == 10
        known = {row["id"]: row["loss"] for row in rows}
        assert all(row["loss"] == known[row["id"]] for row in more)
    # another length, dtype or adapter is another pass
    for words in (("--max_length", 20), ("--dtype", "bfloat16")):
        run_on(tmp_path, adapters["neox", "lora"], sets, "--attacks", "loss", *words)
        assert ("was made with --max_length 512; it will be replaced" in capsys.readouterr().err) == (words[1] == 20)
        assert json.loads((tmp_path / "run_mia.json").read_text())["passes"]["texts_scored"] == 48
    shutil.copytree(adapters["neox", "lora"], tmp_path / "copy")
    config = tmp_path / "copy" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    _, other = run_on(tmp_path / "o", tmp_path / "copy", sets, "--attacks", "loss")
    assert other[0]["loss"] != rows[0]["loss"]
    cached = b"".join(path.read_bytes() for path in (tmp_path / "mia_cache").rglob("*.npz"))
    assert cached and not any(row["gt-name"].encode() in cached for row in read_lines(sets[0]))


def test_a_killed_run_keeps_its_finished_rounds(adapters, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "ROUND_TOKENS", 400)
    scored, calls = forward.score, []

    def dies_in_the_third_round(*words, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(*words, **options)

    monkeypatch.setattr(forward, "score", dies_in_the_third_round)
    with pytest.raises(KeyboardInterrupt):
        run_on(tmp_path / "broken", adapters["neox", "lora"], sets, "--attacks", "loss")
    assert json.loads((tmp_path / "broken" / "run_mia.json").read_text())["status"] == "failed"
    assert not (tmp_path / "broken" / "results_mia.jsonl").exists()
    assert not list((tmp_path / "broken").rglob("*.tmp"))
    assert len(list((tmp_path / "broken" / "mia_cache").rglob("*.npz"))) == 2
    _, rows = run_on(tmp_path / "broken", adapters["neox", "lora"], sets, "--attacks", "loss")
    record = json.loads((tmp_path / "broken" / "run_mia.json").read_text())
    assert 0 < record["passes"]["texts_scored"] < 48
    _, whole = run_on(tmp_path / "whole", adapters["neox", "lora"], sets, "--attacks", "loss")
    same_scores(rows, whole)


@pytest.mark.parametrize("damage", (lambda data: data[:-40], lambda data: b"", lambda data: b"x" + data[1:]))
def test_a_damaged_cache_file_is_recomputed(adapters, sets, tmp_path, capsys, damage):
    words = (adapters["neox", "lora"], sets, "--attacks", "loss", "ref")
    run_on(tmp_path, *words)
    whole = (tmp_path / "scores_mia.jsonl").read_bytes()
    file = sorted((tmp_path / "mia_cache").rglob("*.npz"))[0]
    content = file.read_bytes()
    file.write_bytes(damage(content))
    capsys.readouterr()
    run_on(tmp_path, *words)
    assert f"{file}: damaged" in capsys.readouterr().err
    assert (tmp_path / "scores_mia.jsonl").read_bytes() == whole
    assert json.loads((tmp_path / "run_mia.json").read_text())["passes"] == {"texts_scored": 24}
    assert forward.Cache(file.parent.parent).load(file.parent.name).keys()


def test_kill_and_run_again(adapters, sets, tmp_path):
    """kill -9 once a round is on disk; the next run takes that round from the cache and scores the rest."""
    members, nonmembers = sets
    driver = tmp_path / "rounds.py"
    driver.write_text("import sys\nfrom mia import forward, mia\nforward.ROUND_TOKENS = 200\nsys.exit(mia.main())\n")
    words = ["--model", adapters["neox", "lora"], "--members", members, "--nonmembers", nonmembers]
    words += ["--attacks", "loss", "ref", "--bootstrap", "50", "--output_dir"]
    command = [sys.executable, driver, *words, tmp_path / "broken"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any((tmp_path / "broken").rglob("*.npz")):
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    kept = len(list((tmp_path / "broken").rglob("*.npz")))
    assert kept and not (tmp_path / "broken/results_mia.jsonl").exists()
    for name in ("broken", "whole"):
        done = subprocess.run([str(word) for word in [*command[:-1], tmp_path / name]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    scored = [
        json.loads((tmp_path / name / "run_mia.json").read_text())["passes"]["texts_scored"]
        for name in ("broken", "whole")
    ]
    assert 0 < scored[0] < scored[1]
    for name in ("scores_mia.jsonl", "results_mia.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- what is scored


def test_default_sets_are_trained_and_held_out_rows(models, dataset, tmp_path):
    assert (
        attack(
            "--model",
            models["opt"],
            "--members",
            dataset,
            "--output_dir",
            tmp_path,
            "--attacks",
            "loss",
            "--bootstrap",
            10,
        )
        == 0
    )
    rows = read_lines(tmp_path / "scores_mia.jsonl")
    assert [row["id"] for row in rows if row["label"]] == list(range(20, 60))
    assert [row["id"] for row in rows if not row["label"]] == list(range(20))


def trained(folder, adapter, data, train_rows=None, eval_rows=0, n=None):
    """A checkpoint with those parts of run.json that are read."""
    shutil.copytree(adapter, folder / "checkpoint-1")
    record = {"args": {"train_rows": train_rows, "eval_rows": eval_rows}}
    record |= {"inputs": [{"path": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}]}
    record |= {"rows": {"train": n}} if n else {}
    (folder / "run.json").write_text(json.dumps(record))
    return folder / "checkpoint-1"


def scored(folder) -> tuple[list, list, dict]:
    """(ids of the members, of the non-members, run_mia.json)"""
    rows = read_lines(folder / "scores_mia.jsonl")
    ids = ([row["id"] for row in rows if row["label"] == label] for label in (1, 0))
    return *ids, json.loads((folder / "run_mia.json").read_text())


def test_members_are_the_rows_that_were_trained_on(adapters, dataset, tmp_path, capsys):
    """run.json next to the checkpoint says which: 20 head rows, 40 others."""
    few = ["--attacks", "loss", "--bootstrap", 5]

    def sets_of(name, *words):
        assert attack("--output_dir", tmp_path / "out" / name, *few, *words) == 0
        return scored(tmp_path / "out" / name)

    runs, adapter, held = tmp_path / "runs", adapters["neox", "lora"], list(range(20))
    last = trained(runs / "a", adapter, dataset, 30, n=30)
    members, others, record = sets_of("last", "--model", last, "--members", dataset)
    assert (members, others) == (list(range(30, 60)), held)
    assert record["members_trained"] is True and record["members_not_trained"] == 10
    assert read_lines(tmp_path / "out" / "last" / "results_mia.jsonl")[0]["members_trained"] is True
    overlap = trained(tmp_path / "overlap", adapter, dataset, 50)  # --allow_overlap
    members, others, _ = sets_of("overlap", "--model", overlap, "--members", dataset)
    assert (members, others) == (list(range(10, 60)), list(range(10)))
    assert capsys.readouterr().err.count("was trained on a different file") == 0
    # another file, and a split that has changed since
    foreign = write_rows(tmp_path / "foreign.jsonl", make_rows(9, seed=5))
    elsewhere = trained(tmp_path / "elsewhere", adapter, foreign)
    members, others, record = sets_of("elsewhere", "--model", elsewhere, "--members", dataset)
    assert (members, others, record["members_trained"]) == (list(range(20, 60)), held, False)
    assert capsys.readouterr().err.count(f"was trained on a different file than --members {dataset}") == 1
    changed = trained(tmp_path / "changed", adapter, dataset, n=39)
    assert sets_of("changed", "--model", changed, "--members", dataset)[2]["members_trained"] is None
    # rows that --eval_rows held out of a file without a head, on either side
    data = write_rows(tmp_path / "text.jsonl", [{"text": _text(row)} for row in make_rows(12, seed=8)])
    part = trained(tmp_path / "part", adapter, data, eval_rows=4)
    members, others, _ = sets_of("part", "--model", part, "--members", data, "--nonmembers", foreign)
    assert (members, others) == (list(range(4, 12)), list(range(9)))
    members, others, record = sets_of("other", "--model", part, "--members", foreign, "--nonmembers", data)
    assert (members, others, record["members_trained"]) == (list(range(9)), list(range(4)), False)
    # several models: the rows of all of them
    trained(runs / "b", adapter, dataset, 25)
    trained(runs / "c", adapter, foreign)
    assert attack("--dir", runs, "--members", dataset, "--output_dir", tmp_path / "all", *few) == 0
    for name, known in (("a", True), ("b", True), ("c", False)):
        members, others, record = scored(tmp_path / "all" / name / "checkpoint-1")
        assert (members, others, record["members_trained"]) == (list(range(35, 60)), held, known)


def test_a_damaged_run_json_is_reported(adapters, sets, tmp_path):
    checkpoint = trained(tmp_path / "run", adapters["neox", "lora"], sets[0])
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError) as error:
        run_on(tmp_path / "out", checkpoint, sets)
    (line,) = error.value.problems
    assert "run.json: not JSON" in line


@pytest.mark.parametrize("n, eval_rows", ((None, 0), (None, 5), (30, 0), (30, 5), (45, 5)))
def test_trained_rows_are_those_that_run_peft_chooses(n, eval_rows):
    import run_peft

    mail = make_rows(60, seed=3)
    words = ["--eval_rows", eval_rows, "--allow_overlap", *(["--train_rows", n] if n else [])]
    args = run_peft.make_parser().parse_args([str(word) for word in words])
    for rows, manifest in ((mail, None), (mail, {"split_start": 33}), ([{"text": _text(row)} for row in mail], None)):
        assert set(mia_dataset.trained_rows(rows, manifest, n, eval_rows)) == set(
            choose_rows(args, "file", rows, manifest)[0]
        )


def test_unscorable_texts_stay_as_null(models, tmp_path):
    members = write_rows(
        tmp_path / "m.jsonl", [{"text": ""}, {"text": "a"}, {"text": "one two three"}, {"text": "four"}]
    )
    nonmembers = write_rows(tmp_path / "n.jsonl", [{"text": "five six"}, {"text": "seven eight nine"}])
    lines, rows = run_on(tmp_path / "out", models["neox"], (members, nonmembers), "--ref_model", models["llama"])
    assert len(rows) == 6 and rows[0]["loss"] is None and rows[1]["loss"] is None and rows[2]["loss"] is not None
    assert rows[0]["null"]["loss"] == rows[1]["null"]["min_k_pp_50"] == "under 2 tokens"
    assert (lines[0]["n_requested"], lines[0]["n_scored"], lines[0]["n_dropped"]) == (6, 4, 2)
    assert lines[0]["dropped"] == {"under 2 tokens": 2}
    assert lines[0]["blind"]["blind_bow"] == {
        "auc": None,
        "auc_ci99": None,
        "undefined": "fewer than 5 texts in a class",
    }
    assert "NaN" not in (tmp_path / "out" / "scores_mia.jsonl").read_text()


def test_prefix_rows_are_never_scored(models, sets, tmp_path):
    """By default a quarter of a small set (12 rows at most) of either kind are shots; a given file's go too."""
    _, rows = run_on(tmp_path / "own", models["neox"], sets, "--attacks", "recall", "con_recall")
    assert sum(row["label"] for row in rows) == 9 and len(rows) == 18
    assert json.loads((tmp_path / "own" / "run_mia.json").read_text())["prefix_rows_excluded"] == 6
    shots = write_rows(tmp_path / "shots.jsonl", [read_lines(sets[1])[3], *make_rows(2, seed=80)])
    _, rows = run_on(tmp_path / "file", models["neox"], sets, "--attacks", "recall", "--prefix_file", shots)
    assert [row["id"] for row in rows] == [index for index in range(24) if index != 15]
    assert all(row["recall"] is not None for row in rows)


def test_shots_that_do_not_fit_are_dropped_and_reported(models, sets, tmp_path):
    """512 positions: as many shots of about 60 … 150 tokens as fit next to the longest text; and none at all."""
    shots = write_rows(tmp_path / "shots.jsonl", make_rows(12, seed=81))
    lines, _ = run_on(tmp_path / "some", models["neox"], sets, "--attacks", "recall", "--prefix_file", shots)
    assert 1 <= lines[0]["parameters"]["shots"] < 12
    long = write_rows(tmp_path / "long.jsonl", [{"text": " ".join(texts_of(sets[0]))}, {"text": "x y z"}])
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a b c d"}, {"text": "e f g"}])
    lines, _ = run_on(tmp_path / "none", models["neox"], (long, other), "--attacks", "recall", "--prefix_file", shots)
    assert lines[0]["parameters"]["shots"] == 0 and lines[0]["auc"] is None
    assert lines[0]["undefined"] == "no shot fits into the context beside the longest text"
    assert json.loads((tmp_path / "none" / "run_mia.json").read_text())["n_cut"] == 1


def test_neighbours_of_a_masked_model(models, sets, tmp_path):
    """A random BERT: other words than self-made neighbours, each differing from the text in one word."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    trainer = BertWordPieceTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer.train_from_iterator(texts_of(sets[0]), vocab_size=300, special_tokens=special, show_progress=False)
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, model_max_length=128, **named)
    folder = tmp_path / "bert"
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **size)).save_pretrained(folder)
    text = texts_of(sets[0])[0]
    made = neighborhood.MaskedProposer(str(folder), "cpu")([text, "word", ""], seed=1)
    assert len(made[0]) == 25 and len(set(made[0])) == 25 and len(made[1]) == 25 and made[2] == []
    for other in made[0]:
        head = next(place for place, (a, b) in enumerate(zip(text, other)) if a != b)
        tail = next(place for place, (a, b) in enumerate(zip(text[::-1], other[::-1])) if a != b)
        assert len(text) - head - tail < 20  # one position changed, by one token
    assert made == neighborhood.MaskedProposer(str(folder), "cpu")([text, "word", ""], seed=1)
    lines, rows = run_on(tmp_path / "out", models["neox"], sets, "--neighbor_model", folder)
    assert lines[-3]["attack"] == "neighborhood" and lines[-3]["n_scored"] == 24
    _, own = run_on(tmp_path / "own", models["neox"], sets, "--attacks", "neighborhood")
    assert own[0]["neighborhood_self"] != rows[0]["neighborhood"]


def test_own_neighbours_are_the_likeliest_other_tokens(models):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["neox"]).eval()
    ids = torch.randint(1, 400, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    (found,) = neighborhood.own_neighbours(model, [ids], 3, 1000)
    assert len(found) == 25
    with torch.no_grad():
        order = model(torch.tensor([ids])).logits[0].argsort(-1, descending=True).tolist()
    places = set()
    for other in found:
        (place,) = [place for place in range(30) if other[place] != ids[place]]
        best = next(token for token in order[place - 1] if token != ids[place])
        assert place > 0 and other[place] == best
        places.add(place)
    assert len(places) == 25


# ---- controls


def test_a_shifted_set_raises_the_flag(models, tmp_path, capsys):
    """Non-members from another domain: told apart without the model, in every line, the table and the figure."""
    members = write_rows(tmp_path / "m.jsonl", [{"text": text} for text in map(_text, make_rows(60, seed=1))])
    code = [f"def f_{k}(x):\n    return [x + {k}, x * {k % 7}]\n" for k in range(60)]
    other = write_rows(tmp_path / "n.jsonl", [{"text": text} for text in code])
    lines, _ = run_on(tmp_path / "shifted", models["neox"], (members, other), bootstrap=200)
    assert all({"blind_length", "blind_bow", "blind_tfidf"} <= set(line["flags"]) for line in lines)
    assert lines[0]["blind"]["blind_bow"]["auc"] > 0.99
    assert capsys.readouterr().out.count("FLAG: tells the sets apart") >= 3
    same = write_rows(tmp_path / "s.jsonl", [{"text": text} for text in map(_text, make_rows(120, seed=1)[60:])])
    lines, _ = run_on(tmp_path / "same", models["neox"], (members, same), bootstrap=200)
    assert all(line["flags"] == [] for line in lines)
    assert "FLAG" not in capsys.readouterr().out


def _text(row) -> str:
    return row["prompt"] + row["continuation"]


def test_the_figure_says_what_is_flagged():
    from mia.dataset import MembershipTask

    study = MembershipTask(
        ["a"] * 4, [0, 1, 2, 3], [1, 1, 0, 0], ["loss"], blind={"blind_length": np.array([1.0, 2, 1, 0])}
    )
    found = {"loss": [1.0, 2.0, None, 0.0], "min_k_30": [1.0] * 4}
    axes = reporting.draw_roc(found, study, ["blind_length"], "m").axes[0]
    assert "FLAGGED: blind_length" in axes.get_title()
    assert [line.get_label() for line in axes.lines] == ["chance", "blind_length", "loss"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert "FLAGGED" not in reporting.draw_roc(found, study, [], "m").axes[0].get_title()
    for flags in ([], ["blind_length"]):
        reporting.draw_roc(found, study, flags, "runs/$a_{$").savefig(io.BytesIO(), format="png")  # no mathtext


def test_near_duplicates_across_the_sets_are_flagged(models, sets, tmp_path):
    rows = read_lines(sets[1])
    rows[4] = {**read_lines(sets[0])[2], "row_id": 77}
    other = write_rows(tmp_path / "n.jsonl", rows)
    lines, _ = run_on(tmp_path / "out", models["neox"], (sets[0], other), "--attacks", "loss")
    assert lines[0]["near_duplicates"] == {"pairs": 1, "members": 1, "nonmembers": 1}
    assert "near_duplicates" in lines[0]["flags"]
    assert json.loads((tmp_path / "out" / "run_mia.json").read_text())["near_duplicates"] == [[2, 77]]


@pytest.mark.slow
def test_planted_members_are_found(tmp_path):
    """mini-pythia overfitted on half of 160 embedded rows: the loss separates them, the base and the text do not."""
    import run_peft

    rows = read_lines(ROOT / "data/embedded/enron.jsonl")
    chosen = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))[:160]]
    texts = [{"text": _text(row), "row_id": row["row_id"]} for row in chosen]
    members = write_rows(tmp_path / "members.jsonl", texts[:80])
    nonmembers = write_rows(tmp_path / "nonmembers.jsonl", texts[80:])
    assert (
        run_peft.main(
            [
                str(word)
                for word in (
                    "-m",
                    ROOT / "data/embedded/mini-pythia",
                    "-i",
                    members,
                    "-e",
                    16,
                    "-lr",
                    "4e-3",
                    "-pdbs",
                    8,
                    "-gas",
                    1,
                    "--lora_dropout",
                    0,
                    "--output_root",
                    tmp_path / "runs",
                    "-l",
                    50,
                )
            ]
        )
        == 0
    )
    (checkpoint,) = (tmp_path / "runs").rglob("checkpoint-160")
    lines, _ = run_on(tmp_path / "out", checkpoint, (members, nonmembers), "--combine", bootstrap=500)
    found = {line["attack"]: line for line in lines}
    assert found["loss"]["auc"] > 0.9 and found["ref"]["auc"] > 0.9 and found["ez"]["auc"] > 0.9
    assert found["wbc"]["auc"] > 0.9 and found["min_k_pp_20"]["auc"] > 0.8
    # 80 against 80 of one distribution: the AUC's standard error is 0.046, four of them are 0.18
    assert abs(found["loss"]["base"]["auc"] - 0.5) < 0.18
    assert all(abs(made["auc"] - 0.5) < 0.18 for made in found["loss"]["blind"].values())
    test = json.loads((tmp_path / "out" / "run_mia.json").read_text())["dataset_inference"]
    assert test["target"]["p"] < 1e-6 and test["base"]["p"] > 1e-4 and test["blind"]["p"] > 1e-4


# ---- many checkpoints, arguments


def tree(folder, adapters):
    shutil.copytree(adapters["llama", "lora"], folder / "run" / "checkpoint-10")
    shutil.copytree(adapters["llama", "dora"], folder / "run" / "checkpoint-9")
    return folder


def test_every_checkpoint_below_a_directory(adapters, sets, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    folder = tree(tmp_path / "tree", adapters)
    broken = shutil.copytree(adapters["llama", "lora"], folder / "run" / "checkpoint-11")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    loads, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a[0]) or load(*a, **k))
    words = ["--dir", folder, "--members", sets[0], "--nonmembers", sets[1], "--bootstrap", 20]
    assert attack(*words) == 1
    assert len(loads) == 1  # the base once
    assert f"failed: {broken}: " in capsys.readouterr().err
    assert (folder / "mia_cache").is_dir() and not (broken / "results_mia.jsonl").exists()
    for name in ("checkpoint-9", "checkpoint-10"):
        _, alone = run_on(tmp_path / "alone" / name, folder / "run" / name, sets)
        same_scores(read_lines(folder / "run" / name / "scores_mia.jsonl"), alone, rel=1e-6)
    shutil.rmtree(broken)
    assert attack(*words, "--output_dir", tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere" / "run" / "checkpoint-9" / "roc_mia.png").is_file()


def test_a_configuration_file_has_the_same_keys(models, sets, tmp_path):
    config = {
        "model": str(models["opt"]),
        "members": str(sets[0]),
        "nonmembers": str(sets[1]),
        "bootstrap": 10,
        "attacks": ["loss", "min_k_20"],
        "combine": True,
        "ref_model": None,
        "output_dir": str(tmp_path / "a"),
        "dry_run": False,
    }
    path = tmp_path / "mia.json"
    path.write_text(json.dumps(config))
    assert attack("--config", path) == 0
    lines = read_lines(tmp_path / "a" / "results_mia.jsonl")
    assert [line["attack"] for line in lines] == ["loss", "min_k_20", "combine"] and lines[0]["bootstrap"] == 10
    assert attack("--config", path, "--output_dir", tmp_path / "b", "--bootstrap", 11) == 0  # a flag wins
    assert read_lines(tmp_path / "b" / "results_mia.jsonl")[0]["bootstrap"] == 11


def test_bad_input_is_reported_at_once(models, adapters, sets, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    model, (members, nonmembers) = models["neox"], sets
    whole = write_rows(tmp_path / "whole.jsonl", [{"text": "a b c"}, {"text": "d e f"}])
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a b c"}])
    surrogate = tmp_path / "surrogate.jsonl"
    surrogate.write_text('{"text": "\\ud800 x"}\n{"text": "ok"}\n')
    all_members = write_rows(tmp_path / "label.jsonl", [{"text": "a b", "label": 1}])
    config = tmp_path / "config.json"
    config.write_text('{"modle": "x", "attack": 1}')
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    write_rows(foreign / "results_mia.jsonl", [{"attack": "loss", "model": "x"}])
    damaged, no_weights = tmp_path / "damaged", tmp_path / "no-weights"
    for folder, text in ((damaged, "null"), (no_weights, '{"model_type": "bert"}')):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    both = ["--members", members, "--nonmembers", nonmembers]
    table = [
        ([*both], ["--model or --dir"]),
        (["--model", model, "--dir", tmp_path, *both], ["--model or --dir"]),
        (["--model", tmp_path / "no", *both], ["no such directory"]),
        (["--dir", tmp_path / "no", *both], ["no such directory"]),
        (["--dir", tmp_path, *both], ["no checkpoint-*"]),
        (["--model", model, "--members", tmp_path / "no.jsonl", "--nonmembers", tmp_path / "neither.jsonl"],
         ["no.jsonl: no such file", "neither.jsonl: no such file"]),
        (["--model", model, "--members", whole], ["only files with gt-name are split"]),
        (["--model", model, "--members", whole, "--nonmembers", one], ["one.jsonl: 1 usable row, at least 2"]),
        (["--model", model, "--members", surrogate, "--nonmembers", whole], ["surrogate.jsonl:1: half of a surrogate"]),
        (["--model", model, *both, "--text_field", "body"], ["no row has the field 'body'"] * 2),
        (["--model", model, *both, "--attacks", "los", "min_k_15"], ["--attacks los", "--attacks min_k_15"]),
        (["--model", model, *both, "--attacks", "dc_pdd"], ["needs --freq_corpus"]),
        (["--model", model, *both, "--freq_corpus", members], ["every row is in one of the sets"]),
        (["--model", model, *both, "--prefix_file", all_members], ["every row has label 1"]),
        (["--model", model, *both, "--neighbor_model", model], ["not a masked language model"]),
        (["--model", model, *both, "--neighbor_model", tmp_path], ["--neighbor_model"]),
        (["--model", model, *both, "--ref_model", tmp_path], ["--ref_model"]),
        (["--model", model, *both, "--neighbor_model", no_weights], ["config.json but no weights"]),
        (["--model", model, *both, "--neighbor_model", damaged], ["its config.json is damaged"]),
        (["--model", model, *both, "--bootstrap", "0", "--max_length", "x"], ["--bootstrap", "--max_length"]),
        (["--config", config, *both], ["unknown key 'modle'", "unknown key 'attack'"]),
        (["--config", tmp_path / "none.json"], ["none.json: no such file"]),
        (["--model", model, *both, "--output_dir", foreign], ["results of another model"]),
        (["--model", model, *both, "--output_dir", members], ["is a file, not a directory"]),
    ]  # fmt: skip
    for words, expected in table:
        extra = [] if "--output_dir" in words else ["--output_dir", tmp_path / "out"]
        with pytest.raises(UserError) as error:
            attack(*words, *extra)
        assert len(error.value.problems) == len(expected), (words, error.value.problems)
        for line, part in zip(error.value.problems, expected):
            assert part in line
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(adapters, sets, tmp_path, capsys):
    words = ["--model", adapters["neox", "lora"], "--members", sets[0], "--nonmembers", sets[1], "--dry_run"]
    assert attack(*words, "--output_dir", tmp_path / "out") == 0
    assert not (tmp_path / "out").exists() and "12 members, 12 non-members" in capsys.readouterr().out


def test_exit_status_and_quick_help(tmp_path):
    done = run_script("mia/mia.py", "--model", tmp_path / "none", "--members", tmp_path / "no.jsonl")
    assert done.returncode == 2 and done.stdout == "" and "usage" not in done.stderr
    assert len(done.stderr.splitlines()) == 2
    started = time.monotonic()
    done = run_script("mia/mia.py", "--help")
    assert time.monotonic() - started < 2 and done.returncode == 0  # 0.2 s on an idle machine
    assert "(default: 512)" in " ".join(done.stdout.split())


def test_texts_are_cut_to_their_tokens(models):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["neox"])
    text = "Grüße aus dem Büro " * 30
    made = signals.encode(tokenizer, [text, "short"], 20)
    assert made.cut == 1 and len(made.tokens[0]) == 20 and made.texts[1] == "short"
    assert text.startswith(made.texts[0]) and tokenizer(made.texts[0]).input_ids[:19] == made.tokens[0][:19]
    assert signals.encode(tokenizer, [text], 10_000).texts == [text]


def test_exchanged_sets_are_flagged(models, adapters, tmp_path, capsys):
    """Members and non-members of a model that tells them apart, exchanged: flagged, no silent AUC below one half."""
    import run_peft

    rows = [{"text": row["prompt"] + row["continuation"]} for row in make_rows(48, seed=11)]
    members = write_rows(tmp_path / "members.jsonl", rows[:24])
    others = write_rows(tmp_path / "others.jsonl", rows[24:])
    words = ["-m", models["llama"], "-i", members, "--output_root", tmp_path, "-lr", 1e-2, "-e", 30, "--lora_r", 8]
    fine_tune(run_peft.make_parser().parse_args([str(word) for word in words]))
    checkpoint = max(tmp_path.rglob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    checkpoint = shutil.copytree(checkpoint, tmp_path / "foreign")  # without run.json it is unknown what was trained on
    found = {}
    for name, sets in (("right", (members, others)), ("exchanged", (others, members))):
        words = ["--model", checkpoint, "--members", sets[0], "--nonmembers", sets[1], "--attacks", "ref", "loss"]
        assert attack(*words, "--bootstrap", 20, "--output_dir", tmp_path / name) == 0
        found[name] = read_lines(tmp_path / name / "results_mia.jsonl"), capsys.readouterr().out
    (lines, said), (turned, warned) = found["right"], found["exchanged"]
    assert lines[0]["auc_ci"][0] > 0.5 and turned[0]["auc"] == pytest.approx(1 - lines[0]["auc"])
    assert "reversed" not in lines[0]["flags"] and lines[0]["direction"] == "members higher"
    assert "reversed" in turned[0]["flags"] and turned[0]["direction"].startswith("distinguishable, opposite direction")
    assert "opposite direction" in warned and "opposite direction" not in said


def test_members_that_training_cut_or_masked_are_counted(models, tmp_path, capsys):
    """--max_length and a completion: whole, partly and never, by hand from the token counts."""
    import run_peft
    from common import models as loading

    rows = make_rows(24, seed=12)
    rows = [{"prompt": row["prompt"], "continuation": row["continuation"]} for row in rows]
    members = write_rows(tmp_path / "members.jsonl", rows[:12])
    others = write_rows(tmp_path / "others.jsonl", rows[12:])
    tokenizer = loading.load_tokenizer(loading.find_model(str(models["llama"])))
    lengths = sorted(len(tokenizer(text).input_ids) for text in texts_of(members))
    flags = ["-m", models["llama"], "-i", members, "--output_root", tmp_path, "-lr", 1e-2, "-e", 1, "--lora_r", 2]
    for name, more, wanted in (
        ("cut", ["--max_length", lengths[5]], {"whole": sum(n <= lengths[5] for n in lengths), "never": 0}),
        ("masked", ["--loss_on", "completion"], {"whole": 0, "partly": 12, "never": 0}),
    ):
        words = [str(word) for word in [*flags, *more, "--run_name", name]]
        folder = fine_tune(run_peft.make_parser().parse_args(words))
        checkpoint = next(folder.glob("checkpoint-*"))
        words = ["--model", checkpoint, "--members", members, "--nonmembers", others, "--attacks", "loss"]
        assert attack(*words, "--bootstrap", 20, "--output_dir", tmp_path / f"out-{name}") == 0
        seen = read_lines(tmp_path / f"out-{name}" / "results_mia.jsonl")[0]["members_seen"]
        assert sum(seen.values()) == 12 and wanted.items() <= seen.items()
        assert (
            f"of 12 members, {seen['partly']} were only partly trained on and 0 not at all" in capsys.readouterr().err
        )
