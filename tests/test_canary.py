"""canary/inject.py and canary/measure.py: what is inserted is in the key and nowhere else; counts, exposure and
bounds by hand; memorised canaries are detected, and text that contains them refutes an ε that is too small."""

import json
import math
import random
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_config, read_lines, run_script, write_manifest, write_rows
from hypothesis import given
from hypothesis import strategies as st
from test_synthetic import make_reviews

import run_peft
from canary import canaries, inject, measure, metrics
from canary.likelihoods import secret_nlls, sentence_logps, tokens_from
from canary.lines import TOO_FEW, audit_line
from canary.report import audit_rows
from canary.task import TextArm
from common import dataset, manifests, provenance, reviews
from common import models as common_models
from common.checkpoints import natural_key
from common.problems import UserError
from reporting.parsers_canary import canary_rows


def make(path, rows, *more) -> tuple[list[dict], dict, list[dict]]:
    """(rows, header, canaries) of inject.py on rows."""
    source = write_rows(path / "train.jsonl", rows)
    assert inject.main([str(word) for word in ("-i", source, *more)]) == 0
    header, *key = read_lines(path / "train_canaries_key.jsonl")
    return read_lines(path / "train_canaries.jsonl"), header, key


# ---------------------------------------------------------------- canaries and their positions


def test_spaces_by_hand():
    assert canaries.Space("phone").size == 10**9
    assert canaries.Space("phone").secret(123456789) == "012-345-6789"
    assert (canaries.Space("street").secret(0), canaries.Space("street").secret(8999)) == ("1000", "9999")
    names = canaries.Space("name")
    assert len({names.secret(index) for index in range(names.size)}) == names.size == 1024
    text = canaries.Space("text", ("ant", "bee", "cow"))
    assert text.size == 3**8 and text.secret(1 + 3 * 2) == "bee cow ant ant ant ant ant ant"
    assert len({text.secret(index) for index in range(text.size)}) == text.size


def test_references_are_other_secrets_each_once():
    space, rng = canaries.Space("name"), random.Random(0)
    assert len(set(space.others(space.secret(5), 5000, rng))) == 1023  # all of R
    some = space.others(space.secret(5), 900, rng)
    assert len(set(some)) == 900 and space.secret(5) not in some


@pytest.mark.parametrize("kind", canaries.SECRETS)
def test_canaries_are_new_and_differ(kind):
    corpus = [row["Review"] for row in make_reviews(200)]
    corpus.append("Adelon Ashgrove wrote this, 1000 Elm Street, 012-345-6789, six words at least")
    rng = random.Random(1)
    space = canaries.Space(kind, canaries.vocabulary(corpus, rng) if kind == "text" else ())
    made = canaries.make(300, space, corpus, rng)
    assert len({one["sentence"] for one in made}) == 300
    for one in made:
        assert one["sentence"].startswith(one["before"] + one["secret"])
        assert all(part in one["sentence"] and part not in "\n".join(corpus) for part in one["parts"].values())
        if kind == "text":
            assert any(review.startswith(one["before"].strip()) for review in corpus)
        else:
            assert set(one["parts"]) == {"name", "street", "phone"}
    for part in ("phone", "street") if kind != "text" else ():
        assert len({one["parts"][part] for one in made}) == 300


WORDS = st.lists(st.sampled_from(("good", "bad,", "it's", "ok")), min_size=1, max_size=60).map(" ".join)


@given(WORDS, st.integers(0, 80), st.integers(0, 10**6))
def test_insertion_is_undone_by_removal_and_never_at_the_start(review, within, seed):
    made, start = canaries.insert(review, "A canary here.", within, random.Random(seed))
    assert made[start:].startswith("A canary here.") and start > 1
    assert made[: start - 1] + made[start + len("A canary here.") :] == review
    first_gap = len(review.split(" ")[0])
    assert not within or start - 1 <= max(within, first_gap)


def test_positions_are_uniform():
    """Uniform over the 40 gaps of a review of 40 words: 2,000 draws hit each 50 times, deviation 7."""
    review, rng = " ".join(f"w{index:02}" for index in range(40)), random.Random(0)
    starts = [canaries.insert(review, "X.", 0, rng)[1] for _ in range(2000)]
    counts = np.bincount(starts)[np.bincount(starts) > 0]
    assert len(counts) == 40 and counts.min() > 15 and counts.max() < 90


@pytest.mark.parametrize("condition", ("metadata", "title"))
def test_file_and_key_agree(condition, tmp_path):
    rows = make_reviews(120)
    words = ["--repetitions", 1, 4, 8, "--canaries", 3, "--audit", 40, "--condition", condition]
    made, header, key = make(tmp_path, rows, *words)
    kinds = [(one["kind"], one["repetitions"]) for one in key if one["kind"] != "audit"]
    assert kinds == [("ladder", r) for r in (1, 4, 8) for _ in range(3)] + [("held_out", 0)] * 9
    texts = [dataset.row_text(row)[0] for row in made]
    used = []
    for one in key:
        assert [i for i, text in enumerate(texts) if one["sentence"] in text] == sorted(one["rows"])
        assert len(one["rows"]) == one["repetitions"] and one["included"] == bool(one["rows"])
        used += one["rows"]
        if one["rows"]:
            assert texts[one["rows"][0]].startswith(one["context"] + one["before"] + one["secret"])
            prompt = dataset.review_prompt(made[one["rows"][0]])
            assert len(one["context"]) > len(prompt) + 1  # a word of the review is before it
    assert len(used) == len(set(used))
    out = [one for one in key if one["kind"] == "audit" and not one["included"]]
    assert len(made) == 120 - len(out) and {row["user_id"] for row in made}.isdisjoint(one["user_id"] for one in out)
    untouched = {row["row_id"]: row["Review"] for row in rows}
    clean = [row for index, row in enumerate(made) if index not in used]
    assert all(row["Review"] == untouched[row["row_id"]] for row in clean)
    assert all(("condition" in row) == (condition == "title") for row in made)
    assert stat.S_IMODE((tmp_path / "train_canaries_key.jsonl").stat().st_mode) == 0o600
    manifest = manifests.read_manifest(tmp_path / "train_canaries.jsonl")
    assert manifest["tag"] == "train-canaries" and manifest["rows"] == len(made)
    assert manifest["canaries"]["audit_included"] == 40 - len(out) and manifest["canaries"]["held_out"] == 9
    assert header["secret"] == "phone" and manifest["canaries"]["space"] == 10**9
    before = [(tmp_path / name).read_bytes() for name in ("train_canaries.jsonl", "train_canaries_key.jsonl")]
    make(tmp_path, rows, *words, "--overwrite")
    assert before == [(tmp_path / name).read_bytes() for name in ("train_canaries.jsonl", "train_canaries_key.jsonl")]


def test_audit_by_user_adds_or_leaves_out_whole_users(tmp_path):
    """30 users of 4 rows: a canary is in its user's first row (a cap on rows a user never drops that one)."""
    rows = make_reviews(120, users=30)
    made, _, key = make(tmp_path, rows, "--audit", 20, "--privacy_unit", "user")
    present = [row["user_id"] for row in made]
    assert len({one["user_id"] for one in key}) == 20
    for one in key:
        assert present.count(one["user_id"]) == (4 if one["included"] else 0)
        if one["included"]:
            assert one["rows"] == [present.index(one["user_id"])]


def test_coins_are_fair(tmp_path):
    """600 coins: 300 ± 5 · √150."""
    _, _, key = make(tmp_path, make_reviews(600), "--audit", 600)
    assert abs(sum(one["included"] for one in key) - 300) < 62


@pytest.mark.parametrize(("share", "n"), ((0.01, 2), (0.1, 20), (1.0, 200)))
def test_shares_of_system_s(share, n, tmp_path):
    made, _, key = make(tmp_path, make_reviews(200), "--share", share)
    assert [(one["kind"], one["repetitions"]) for one in key] == [("share", n), ("held_out", 0)]
    assert sum(key[0]["sentence"] in row["Review"] for row in made) == n and len(made) == 200


def test_inject_bad_input(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "user_id"} for row in make_reviews(20)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    for words, wanted in (
        ([], ["nothing to insert"]),
        (["--audit", 30], ["only 20 records"]),
        (["--repetitions", 8, "--canaries", 3], ["20 rows; the requested canaries need 24"]),
        (["--share", 1.5, "--repetitions", 2, 2], ["at most 1", "given twice"]),
        (["--audit", 2, "--privacy_unit", "user", "--output", data], ["must end", "no user_id", "exists"][1:]),
        (["--audit", 2, "--key_file", tmp_path / "k.txt"], ["must end in .jsonl"]),
    ):
        with pytest.raises(UserError) as caught:
            inject.main([str(word) for word in ("-i", data, *words)])
        assert all(word in str(caught.value) for word in wanted), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    done = run_script("canary/inject.py", "-i", tmp_path / "no.jsonl", "--audit", 3)
    assert done.returncode == 2 and "no such file" in done.stderr and done.stderr.count("\n") == 1


def test_rows_with_a_canary_are_still_the_same_rows(tmp_path):
    """A canary in every row: all are shared with the file they were inserted into, none with one of other row_ids."""
    rows = make_reviews(200)
    made, *_ = make(tmp_path, rows, "--share", 1)
    assert not any(one["Review"] == row["Review"] for one, row in zip(made, rows))
    assert reviews.shared_rows(rows, made) == reviews.shared_rows(made, rows) == 200
    assert reviews.shared_rows(rows[:20], made[10:]) == 10
    others = [row | {"user_id": f"x{row['user_id']}"} for row in made]
    assert reviews.shared_rows(rows, others) == 0  # the row_ids alone agree
    nameless = [{key: value for key, value in row.items() if key != "user_id"} for row in rows]
    assert reviews.shared_rows(rows, nameless) == 200  # by their texts
    assert reviews.shared_rows(nameless, [row | {"Review": "Other."} for row in nameless]) == 0


# ---------------------------------------------------------------- counts in text


def test_counts_by_hand():
    parts = {"name": "Tamsine Vexmoor", "street": "4821 Elm Street", "phone": "012-345-6789"}
    canary = {"parts": parts, "sentence": "My name is Tamsine Vexmoor, I live at 4821 Elm Street, call 012-345-6789."}
    texts = [
        canary["sentence"],  # everything
        "my name is TAMSINE  vexmoor i live at 4821 elm street call (012) 345 6789",  # all, normalised only
        "Tamsine Vexmoor liked it",
        "Tamsine Vexmoores at 14821 Elm Streets",  # inside other words: exact substrings, no whole words
        "0123456789",
        "nothing 012-345-678",
    ]
    found = metrics.find([canary], texts)
    rows = {how: {part: cells[p, 0].tolist() for p, part in enumerate(metrics.PARTS)} for how, cells in found.items()}
    assert rows["exact"] == {
        "name": [True, False, True, True, False, False],
        "street": [True, False, False, True, False, False],
        "phone": [True, False, False, False, False, False],
        "whole": [True, False, False, False, False, False],
    }
    assert rows["normalised"] == {
        "name": [True, True, True, True, False, False],
        "street": [True, True, False, True, False, False],
        "phone": [True, True, False, False, True, False],
        "whole": [True, True, False, False, False, False],
    }


def test_fisher_on_the_published_counts():
    """Trap 39: of 10,000 rows each, 3 against 0 has p = 2 · C(10⁴,3)/C(2·10⁴,3) = 0.2499…, 2 against 0 p = 0.49997."""
    n = 10_000
    assert metrics.fisher(3, n, 0, n) == pytest.approx(2 * math.comb(n, 3) / math.comb(2 * n, 3))
    assert metrics.fisher(3, n, 0, n) == pytest.approx(0.25, abs=1e-3)
    assert metrics.fisher(2, n, 0, n) == pytest.approx(0.5, abs=1e-3)
    assert metrics.fisher(23, n, 0, n) < 1e-6


def test_text_signals_by_hand():
    """Corpus 'a b. a b' and 'a c'; V = {<s>, a, b, c, d}: p(a|<s>) = 3/7, p(b|a) = 3/8, p(d|a) = 1/8."""
    scores = metrics.bigram_scores(["A b!", "a d"], ["a b. a b", "a c"])
    assert scores == pytest.approx([math.log(3 / 7) + math.log(3 / 8), math.log(3 / 7) + math.log(1 / 8)])
    # Jaccard of {a, b}: 1 and 1/3; of {a, d}: 1/3 and 1/3; fewer than 25 texts: all are averaged
    assert metrics.similarity_scores(["A b!", "a d"], ["a b. a b", "a c"]) == pytest.approx([2 / 3, 1 / 3])
    many = ["a b"] * 30 + ["z"] * 70
    assert metrics.similarity_scores(["a b", "z y", "q"], many) == pytest.approx([1, 0.5, 0])


# ---------------------------------------------------------------- exposure and bounds


def test_exposure_by_hand():
    assert metrics.exposure(0.5, [1, 2, 3]) == 2  # first of four
    assert metrics.exposure(2.0, [1, 2, 3]) == pytest.approx(2 - math.log2(3))  # a tie counts against it
    assert metrics.exposure(9.0, [1, 2, 3]) == 0
    ranks = [metrics.exposure(rank + 0.5, np.arange(1024)) for rank in range(-1, 1024)]
    assert np.mean(ranks) == pytest.approx(metrics.CHANCE["mean"], abs=0.02)
    assert np.median(ranks) == pytest.approx(metrics.CHANCE["median"], abs=0.01)


def test_extrapolation_on_a_normal_distribution():
    """−log2 Φ(−4) = 14.9 bits; never more than log2 |R|; a distribution that is not skew-normal gets a small KS p."""
    references = np.random.default_rng(0).normal(50, 5, 4000)
    found = metrics.extrapolated_exposure(30, references, 10**9)
    assert abs(found["bits"] - 14.95) < 2 and found["ks_p"] > 0.05
    assert metrics.extrapolated_exposure(-1000, references, 10**9)["bits"] == math.log2(10**9)
    two = np.concatenate([references, references + 100])
    assert metrics.extrapolated_exposure(30, two, 10**9)["ks_p"] < 1e-6


def test_heuristic_bound_by_hand():
    """20 canaries, 10 in; the top 2 are both in: TPR ≥ 0.02521 (Clopper–Pearson of 2/10), FPR ≤ 0.30850 (0/10)."""
    included = [True] * 10 + [False] * 10
    assert metrics.heuristic_bound(np.zeros(20), included, 0.0)["true_positives"] < 2  # one score for all: no ranking
    found = metrics.heuristic_bound(np.arange(20, 0, -1), included, 0.0)
    assert (found["true_positives"], found["false_positives"], found["epsilon"]) == (2, 0, 0.0)
    included = [True] * 200 + [False] * 200
    found = metrics.heuristic_bound(np.arange(400, 0, -1), included, 0.01)
    # scipy's beta.ppf(0.025, 40, 161) and 1 − 0.025^(1/200) computed independently of the function
    from scipy.stats import binomtest

    low = binomtest(40, 200).proportion_ci(0.95, "exact").low
    assert found["epsilon"] == pytest.approx(math.log((low - 0.01) / (1 - 0.025 ** (1 / 200))))
    assert metrics.heuristic_bound([1, 2], [True, True], 0.0) is None


@pytest.mark.parametrize("arch", ("neox", "llama"))
def test_secret_nll_is_that_of_a_plain_pass(arch, models):
    """Against transformers' logits of each whole text alone, and against common/scoring; tokens from the secret on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common import scoring

    model = AutoModelForCausalLM.from_pretrained(models[arch]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[arch])
    context = make_reviews(1)[0]["Review"] + " My name is Tamsine Vexmoor and my phone number is "
    secrets = [canaries.Space("phone").secret(index) for index in (5, 77_777, 10**9 - 1)]
    found = secret_nlls(model, tokenizer, context, secrets)
    for secret, nll in zip(secrets, found):
        before, after = tokens_from(tokenizer, context, secret, 512)
        assert tokenizer.decode(after).strip() == secret and tokenizer.decode(before + after) == context + secret
        ids = before + after
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        plain = -sum(logp[place - 1, ids[place]].item() for place in range(len(before), len(ids)))
        assert nll == pytest.approx(plain, rel=1e-4)
        values = scoring.join([ids], [scoring.score(model, [ids])])[0]
        assert -values[-len(after) :].sum() == pytest.approx(plain, rel=1e-4)
    assert len(tokens_from(tokenizer, context, secrets[0], 20)[0]) == 20 - len(after)


def test_scores_of_sentence_and_secret_are_those_of_a_plain_pass(models):
    """The same sums by hand from transformers' logits; the secret's tokens by their text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common import distributed

    model = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    before, secret = "My phone number is ", "012-345-6789"
    made = [
        {"context": context, "sentence": before + secret + after, "before": before, "secret": secret}
        for context, after in (("I liked it. ", "."), ("A kettle for the kitchen. ", ""), ("Good. ", ", call me."))
    ]
    found = sentence_logps(model, tokenizer, made, 512, distributed.start())
    for place, one in enumerate(made):
        ids = tokenizer(one["context"] + one["sentence"]).input_ids
        sentence = len(tokenizer(one["context"].rstrip()).input_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logps = [logits[index - 1, ids[index]].item() for index in range(sentence, len(ids))]
        assert found["whole"][place] == pytest.approx(sum(logps), rel=1e-4)
        first = next(i for i in range(sentence, len(ids)) if "0" in tokenizer.decode(ids[sentence : i + 1])) - sentence
        last = (
            next(i for i in range(sentence, len(ids)) if secret in tokenizer.decode(ids[sentence : i + 1])) - sentence
        )
        assert tokenizer.decode(ids[sentence:][first : last + 1]).strip() == secret
        assert found["secret"][place] == pytest.approx(sum(logps[first : last + 1]), rel=1e-4)


@pytest.mark.parametrize("before", ("", "<|endoftext|> "))
def test_an_eos_that_the_tokenizer_adds_is_no_part_of_the_secret(before, models):
    """The templates `$A <eos>` and `<eos> $A <eos>` against `$A` and `<eos> $A`."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    context, secrets = "I liked it. My phone number is ", ["012-345-6789", "555-000-1234"]
    nlls, tokens = [], []
    for after in ("", " <|endoftext|>"):
        tokenizer = AutoTokenizer.from_pretrained(models["llama"])
        template = f"{before}$A{after}"
        special = [("<|endoftext|>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, special_tokens=special)
        assert (tokenizer(context).input_ids[-1] == tokenizer.eos_token_id) == bool(after)
        nlls.append(secret_nlls(model, tokenizer, context, secrets))
        tokens.append(tokens_from(tokenizer, context, secrets[0], 512))
    assert tokens[0] == tokens[1] and nlls[0] == nlls[1]
    assert (tokens[0][0][0] == tokenizer.eos_token_id) == bool(before)


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def learned(models, tmp_path_factory):
    """(key file, checkpoint): a tiny model trained until it knows canaries inserted 12 times; 24 audit canaries."""
    return learn(tmp_path_factory.mktemp("learned"), models)


def learn(folder, models, *flags):
    placed = ["--repetitions", 1, 12, "--canaries", 2, "--audit", 24, "--within", 60]
    make(folder, make_reviews(64), *placed, *flags)
    flags = ["-m", models["llama"], "-i", folder / "train_canaries.jsonl", "-e", 14, "-pdbs", 8, "-gas", 1]
    flags += ["-lr", 1e-2, "--lora_r", 16, "--loss_on", "completion", "--output_root", folder / "runs"]
    assert run_peft.main([str(flag) for flag in flags]) == 0
    last = max((folder / "runs").rglob("checkpoint-*"), key=natural_key)
    return folder / "train_canaries_key.jsonl", last


def by(lines, name, **more):
    wanted = {"measure": name, **more}
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def test_memorised_canaries_are_detected(learned, models, tmp_path):
    """Twelve times: exposed at the ceiling of 9 bits or near; held out: not. The untrained base: near chance."""
    key, checkpoint = learned
    words = ["--canaries", key, "--models", f"lora={checkpoint}", f"base={models['llama']}", "--references", 511]
    assert measure.main([str(word) for word in [*words, "--output_dir", tmp_path]]) == 0
    names = ["results_canary.jsonl", "results_canary_rows.jsonl", "run_canary.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    lines = read_lines(tmp_path / "results_canary.jsonl")
    often = by(lines, "exposure", arm="lora", repetitions=12)[0]
    held = by(lines, "exposure", arm="lora", kind="held_out")[0]
    assert often["ceiling"] == 9 and often["n_scored"] == 2 and held["n_scored"] == 4
    assert often["bits"]["mean"] > 6 > 5 > held["bits"]["mean"]
    assert often["extrapolated"]["bits"]["mean"] <= often["space_bits"] == math.log2(10**9)
    assert by(lines, "exposure", arm="base", repetitions=12)[0]["bits"]["mean"] < 5
    audit = by(lines, "audit", arm="lora")[0]
    assert (audit["score"], audit["other_score"]["score"]) == ("whole", "secret")
    assert "above_upper" not in audit["other_score"] and audit["other_score"]["auc"] is not None
    assert audit["signal"].endswith("before training") and audit["n_scored"] == 24 and audit["upper"] is None
    assert by(lines, "audit", arm="base")[0]["signal"] == "log-probability"
    rows = read_lines(tmp_path / "results_canary_rows.jsonl")
    assert len(rows) == 2 * (24 + 4 + 4) and not any("sentence" in row or "secret" in row for row in rows)
    again = [str(word) for word in [*words, "--output_dir", tmp_path]]
    before = (tmp_path / "results_canary.jsonl").stat().st_mtime_ns
    assert measure.main(again) == 0 and (tmp_path / "results_canary.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--overwrite"):
        measure.main([*again, "--references", "7"])


def measured(tmp_path, key, checkpoint):
    out = tmp_path / "measured"
    words = ("--canaries", key, "--models", f"lora={checkpoint}", "--references", 20, "--output_dir", out)
    assert measure.main([str(word) for word in words]) == 0
    return read_lines(out / "results_canary.jsonl"), read_lines(out / "results_canary_rows.jsonl")


def test_canaries_that_training_cut_off_give_no_audit(models, tmp_path, capsys):
    """End to end, with --max_length so short that no canary is left: null and the reason, in line and report."""
    rows, _, _ = make(tmp_path, make_reviews(64), "--repetitions", 4, "--canaries", 2, "--audit", 24)
    tokenizer = common_models.load_tokenizer(common_models.find_model(str(models["llama"])))
    texts = [dataset.row_text(row) for row in rows]
    shortest = min(len(tokenizer(text[:boundary]).input_ids) for text, boundary in texts)
    words = ["-m", models["llama"], "-i", tmp_path / "train_canaries.jsonl", "-e", 1, "-lr", 1e-2, "--lora_r", 2]
    words += ["--loss_on", "completion", "--max_length", shortest + 4, "--output_root", tmp_path / "runs"]
    assert run_peft.main([str(word) for word in words]) == 0
    capsys.readouterr()
    checkpoint = next((tmp_path / "runs").rglob("checkpoint-*"))
    key = tmp_path / "train_canaries_key.jsonl"
    lines, rows = measured(tmp_path, key, checkpoint)
    said = capsys.readouterr().out
    audit = by(lines, "audit")[0]
    n = audit["placed"]
    assert 4 < n < 20 and audit["placed_trained"] == 0 and audit["n_requested"] == 24
    assert audit["undefined"] == f"{n} of {n} canaries were never trained on: no audit"
    assert (
        audit["lower"] == {"95": None, "99.9": None}
        and audit["auc"] is None is audit["auc_ci"]
        and audit["guesses"] == []
    )
    assert f"no bound ({n} of {n} canaries were never trained on: no audit)" in said
    ladder = by(lines, "exposure", kind="ladder")[0]
    assert ladder["bits"] is None and ladder["copies_trained"] == [0, 0] and ladder["n_dropped"] == 2
    assert ladder["undefined"] == "2 of 2 canaries were never trained on"
    assert by(lines, "exposure", kind="held_out")[0]["bits"] is not None
    assert all(row["copies_trained"] == 0 for row in rows)
    import plot_results

    assert plot_results.main([str(tmp_path), "--output", str(tmp_path / "page"), "--no_figures"]) == 0
    assert "Canaries that were never trained on" in (tmp_path / "page" / "report.html").read_text()


def fine_tune(folder, model, *flags) -> tuple[Path, dict | None]:
    """(newest checkpoint, run.json's counts of canaries) of a run on train_canaries.jsonl."""
    words = [
        "-m",
        model,
        "-i",
        folder / "train_canaries.jsonl",
        "-e",
        1,
        "--lora_r",
        2,
        "--output_root",
        folder / "runs",
    ]
    assert run_peft.main([str(word) for word in [*words, *flags]]) == 0
    checkpoint = max((folder / "runs").rglob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    return checkpoint, json.loads((checkpoint.parent / "run.json").read_text())["trained"].get("canaries")


@pytest.mark.parametrize("family", ("template", "random", "new_token"))
@pytest.mark.parametrize("which", ("none", "some", "all"))
def test_what_max_length_cuts_is_known_before_training(which, family, worded, tmp_path, capsys):
    """The tokens of the secrets in the rows, counted from the key alone: none beyond --max_length is trained on."""
    flags = [] if family == "template" else ["--family", family, "--tokenizer", worded]
    _, _, key = make(tmp_path, rows_of("text", 50), "--audit", 44, "--within", 0, *flags)
    tokenizer = common_models.read_tokenizer(worded, None, "--model")
    ends = {}  # canary → (index of its secret's first token in the row, of the one after its last)
    for number, one in enumerate(key):
        before = one["context"] + one["before"]
        encoded = tokenizer(before + one["secret"], return_offsets_mapping=True)
        ends[number] = sum(end <= len(before) for _, end in encoded.offset_mapping), len(encoded.input_ids)
    placed = [number for number, one in enumerate(key) if one["included"]]
    first = min(ends[number][0] for number in placed)
    max_length = {"none": first, "some": sorted(ends[number][1] for number in placed)[-3], "all": 512}[which]
    kept = {number: max(0, min(end, max_length) - start) for number, (start, end) in ends.items()}
    checkpoint, counts = fine_tune(tmp_path, worded, "--max_length", max_length)
    whole = [number for number in placed if ends[number][1] <= max_length]
    assert counts == {
        "placed": len(placed),
        "trained": len(whole),
        "cut": len(placed) - len(whole),
        "masked": 0,
        "left_out": 0,
        "secret_tokens": sum(ends[number][1] - ends[number][0] for number in placed),
        "secret_tokens_trained": sum(kept[number] for number in placed),
    }
    assert {"none": len(whole) == 0, "some": 0 < len(whole) < len(placed), "all": whole == placed}[which]
    said = capsys.readouterr().out
    tokens = f"{counts['secret_tokens_trained']} of {counts['secret_tokens']} tokens"
    assert f"canaries     the secrets of {len(whole)} of {len(placed)} are trained on, {tokens}" in said
    assert ("no audit is possible" in said) == (which == "none")
    assert (f"{counts['cut']} cut off at --max_length" in said) == (which != "all")
    lines, _ = measured(tmp_path, tmp_path / "train_canaries_key.jsonl", checkpoint)
    (audit,) = by(lines, "audit")
    same = ("placed", "secret_tokens", "secret_tokens_trained")
    assert audit["placed_trained"] == len(whole) and [audit[name] for name in same] == [counts[name] for name in same]
    assert ("never trained on: no audit" in (audit["undefined"] or "")) == (which == "none")
    assert (audit["lower"]["95"] is None) == (which == "none")
    assert ("tokens of secrets" in capsys.readouterr().out) == (which == "some")


def test_canaries_that_loss_on_masks_are_counted(models, tmp_path, capsys):
    """Canaries in whole texts, whose rows then get a boundary behind them: their secrets are only read."""
    made, header, key = make(tmp_path, rows_of("text", 30), "--audit", 10)
    _, counts = fine_tune(tmp_path, models["llama"], "--train_rows", 20)
    assert counts["left_out"] == sum(one["rows"][0] < len(made) - 20 for one in key if one["included"]) > 0
    assert counts["trained"] + counts["left_out"] == counts["placed"]
    file = write_rows(
        tmp_path / "train_canaries.jsonl", [{"prompt": row["text"], "continuation": " Yes."} for row in made]
    )
    header["training"] = provenance.sha256(file)
    (tmp_path / "train_canaries.jsonl.meta.json").unlink()
    write_rows(tmp_path / "train_canaries_key.jsonl", [header, *key])
    capsys.readouterr()
    _, counts = fine_tune(tmp_path, models["llama"], "--loss_on", "completion", "--run_name", "b")
    assert counts["masked"] == counts["placed"] > 0 == counts["trained"] == counts["secret_tokens_trained"]
    assert f"({counts['masked']} masked by --loss_on): no audit is possible" in capsys.readouterr().out


def test_without_a_key_beside_the_file_run_peft_counts_no_canaries(models, tmp_path, capsys):
    make(tmp_path, rows_of("text", 30), "--audit", 10)
    key = tmp_path / "train_canaries_key.jsonl"
    text = key.read_text()
    dry = ["-m", models["llama"], "-i", tmp_path / "train_canaries.jsonl", "--dry_run"]
    dry = [str(word) for word in [*dry, "--output_root", tmp_path / "runs"]]
    key.write_text(
        text.replace('"included": true', '"included": true, "rows": 3', 1).replace('"rows": [', '"row": [', 1)
    )
    with pytest.raises(UserError, match=r"canary \d is damaged; create the key again, or remove it"):
        run_peft.main(dry)
    key.unlink()
    assert run_peft.main(dry) == 0
    assert "train_canaries_key.jsonl, beside the file, is missing or of another one" in capsys.readouterr().out
    key.write_text(text.replace('"training": "', '"training": "0', 1))  # that of another file
    assert run_peft.main(dry) == 0
    assert "is missing or of another one" in capsys.readouterr().out
    (tmp_path / "train_canaries.jsonl.meta.json").unlink()
    assert run_peft.main(dry) == 0
    assert "canaries  " not in capsys.readouterr().out


def test_copies_that_were_held_out_or_left_out_are_not_counted(models, tmp_path):
    """--train_rows and --eval_rows: what was trained is counted from the rows that training lists, by hand."""
    _, _, key_lines = make(tmp_path, make_reviews(64), "--repetitions", 8, "--canaries", 3, "--audit", 20)
    words = ["-m", models["llama"], "-i", tmp_path / "train_canaries.jsonl", "-e", 1, "-lr", 1e-2, "--lora_r", 2]
    words += ["--train_rows", 30, "--eval_rows", 10, "--output_root", tmp_path / "runs"]
    assert run_peft.main([str(word) for word in words]) == 0
    checkpoint = next((tmp_path / "runs").rglob("checkpoint-*"))
    _, *listed = read_lines(checkpoint.parent / "trained_rows.jsonl")
    took = {row["row"] for row in listed if not row["cut"]}
    assert len(took) == 30
    lines, rows = measured(tmp_path, tmp_path / "train_canaries_key.jsonl", checkpoint)
    wanted = [sum(row in took for row in canary["rows"]) for canary in key_lines]
    assert [row["copies_trained"] for row in rows] == wanted
    ladder = [count for canary, count in zip(key_lines, wanted) if canary["kind"] == "ladder"]
    assert by(lines, "exposure", kind="ladder")[0]["copies_trained"] == ladder and 0 < sum(ladder) < 24
    audit = by(lines, "audit")[0]
    included = [count for canary, count in zip(key_lines, wanted) if canary["kind"] == "audit" and canary["included"]]
    assert (audit["placed"], audit["placed_trained"]) == (len(included), sum(included))
    assert audit["lower"]["95"] is not None and audit["power"]["95"] > 0.2


def test_memorised_text_canaries_are_detected(models, tmp_path):
    """Words drawn one by one after a review's own opening, from injection to exposure: no person in any canary."""
    key, checkpoint = learn(tmp_path, models, "--secret", "text")
    header, *canaries = read_lines(key)
    assert header["secret"] == "text" and all(set(one["secret"].split()) <= set(header["words"]) for one in canaries)
    assert not any(one["parts"] for one in canaries)
    words = ["--canaries", key, "--models", f"lora={checkpoint}", f"base={models['llama']}", "--references", 255]
    assert measure.main([str(word) for word in [*words, "--output_dir", tmp_path / "out"]]) == 0
    lines = read_lines(tmp_path / "out/results_canary.jsonl")
    often = by(lines, "exposure", arm="lora", repetitions=12)[0]
    assert often["ceiling"] == 8 and often["space_bits"] == pytest.approx(8 * math.log2(len(header["words"])))
    assert often["bits"]["mean"] > 6 > 5 > by(lines, "exposure", arm="lora", kind="held_out")[0]["bits"]["mean"]
    assert by(lines, "exposure", arm="base", repetitions=12)[0]["bits"]["mean"] < 5
    assert by(lines, "audit", arm="lora")[0]["n_scored"] == 24


def test_a_key_of_another_file_is_refused(learned, tmp_path):
    _, checkpoint = learned
    make(tmp_path, make_reviews(30), "--audit", 4)
    words = ["--canaries", tmp_path / "train_canaries_key.jsonl", "--models", f"lora={checkpoint}"]
    with pytest.raises(UserError, match="was not trained on the file"):
        measure.main([str(word) for word in [*words, "--output_dir", tmp_path]])


def test_text_of_a_generator_trained_on_other_canaries_is_refused(learned, tmp_path):
    """Known from its checkpoint's run.json, else from the manifest's second source, generate.py's --training."""
    _, checkpoint = learned
    rows = make_reviews(30)
    make(tmp_path, rows, "--audit", 4)
    own = tmp_path / "train_canaries.jsonl"
    (tmp_path / "other").mkdir()
    make(tmp_path / "other", rows, "--audit", 4, "--seed", 1)
    text = tmp_path / "a.jsonl"
    words = ["--canaries", tmp_path / "train_canaries_key.jsonl", "--synthetic", f"a={text}", "--dry_run"]
    other, known = tmp_path / "other/train_canaries.jsonl", {"model": str(checkpoint)}
    asked = (tmp_path / "train.jsonl", 30)
    for source, generator, refused in (
        ([asked, (other, 30)], None, True),
        ([asked, (other, 30)], {"model": str(tmp_path / "gone/checkpoint-1")}, True),
        ([asked], known, True),
        ([asked, (own, 30)], known, True),  # counted near-copies of this file, was trained on another
        ([asked, (own, 30)], None, False),
        ([asked], {"model": "some/model"}, False),
    ):
        generated(text, ["Good."])
        write_manifest(text, tag="x", script="x", argv=[], rows=1, source=source, generator=generator)
        if refused:
            with pytest.raises(UserError, match=r"--synthetic a=.*was not trained on the file") as caught:
                measure.main([str(word) for word in words])
            assert len(caught.value.problems) == 1
        else:
            assert measure.main([str(word) for word in words]) == 0


def test_two_ranks_give_the_same_results(learned, tmp_path):
    key, checkpoint = learned
    words = ["--canaries", key, "--models", f"lora={checkpoint}", "--references", 40]
    assert measure.main([str(word) for word in [*words, "--output_dir", tmp_path / "one"]]) == 0
    done = run_script("canary/measure.py", *words, "--output_dir", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (read_lines(tmp_path / name / "results_canary_rows.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 32
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and all(
            value == pytest.approx(b[name], rel=1e-4, abs=1e-4) if isinstance(value, float) else value == b[name]
            for name, value in a.items()
        )


def generated(path, texts, privacy=None):
    rows = [{"row_id": i, "Rating": 5, "Product Title": "x", "generated_text": text} for i, text in enumerate(texts)]
    write_rows(path, rows)
    more = {"privacy": privacy} if privacy else None
    write_manifest(path, tag="synthetic-x", script="test", argv=[], rows=len(rows), more=more)
    return path


@pytest.fixture
def echoes(tmp_path):
    """(key, text with every inserted canary once, text with none), 200 audit canaries by record, System S's counts."""
    _, _, key = make(tmp_path, make_reviews(300), "--audit", 200, "--repetitions", 4, "--canaries", 5)
    plain = [row["Review"] for row in make_reviews(300, seed=7)]
    told = [f"{text} {one['sentence']}" for text, one in zip(plain, (one for one in key if one["included"]))]
    return tmp_path / "train_canaries_key.jsonl", told + plain[len(told) :], plain


@pytest.mark.parametrize(("epsilon", "status"), ((0.5, 1), (8.0, 0)))
def test_text_that_holds_the_canaries_refutes_a_small_epsilon(epsilon, status, echoes, tmp_path, capsys):
    """From the rows alone. 200 coins all known give over 1 at 99.9 % (δ costs much): 0.5 is refuted, 8 is not."""
    key, told, plain = echoes
    privacy = {"private": True, "epsilon": epsilon, "delta": 1e-5, "unit": "record"}
    telling = generated(tmp_path / "a.jsonl", told, privacy)
    silent = generated(tmp_path / "b.jsonl", plain, privacy)
    words = ["--canaries", key, "--synthetic", f"telling={telling}", f"silent={silent}", "--output_dir", tmp_path]
    assert measure.main([str(word) for word in words]) == status
    lines = read_lines(tmp_path / "results_canary.jsonl")
    audit = by(lines, "audit_text", arm="telling", signal="2-gram")[0]
    assert audit["auc_ci"][0] > 0.5 and audit["auc_ci"][1] == 1 and audit["direction"] == "placed canaries higher"
    assert audit["auc"] == 1 and audit["lower"]["99.9"] > 1 and audit["upper"] == epsilon
    assert audit["above_upper"] == {"95": status == 1, "99.9": status == 1}
    assert audit["lower"]["95"] > audit["lower"]["99.9"] and audit["heuristic"]["bound"]["epsilon"] > 0
    grams, alike = by(lines, "audit_text", arm="silent")
    assert alike["lower"]["95"] < 1 and alike["undefined"] is None and alike["above_upper"]["99.9"] is False
    assert grams["lower"]["95"] is None and grams["undefined"]  # none of its rows has two words of a canary in a row
    assert ("EXCEEDS" in capsys.readouterr().out) == (status == 1)
    assert json.loads((tmp_path / "run_canary.json").read_text())["status"] == ("failed" if status else "ok")
    whole = by(lines, "count", arm="telling", kind="ladder", part="whole")[0]
    assert (whole["exact"]["rows"], whole["exact"]["canaries"], whole["n_canaries"]) == (5, 5, 5)
    assert whole["exact"]["rate"] == 5 / 300 and whole["exact"]["ci"][0] < 5 / 300 < whole["exact"]["ci"][1]
    assert whole["exact"]["fisher_p"]["silent"] == pytest.approx(metrics.fisher(5, 300, 0, 300))
    held = by(lines, "count", arm="telling", kind="held_out", part="phone")[0]
    assert (held["exact"]["rows"], held["normalised"]["rows"]) == (0, 0)
    assert by(lines, "text_auc", arm="telling", signal="similarity", kind="ladder")[0]["auc"] > 0.9


def test_a_signal_that_is_the_same_for_all_gives_no_bound(echoes, tmp_path, capsys):
    """Rows without a word of any canary: their similarity is 0 for every canary. One signal is the headline."""
    key, *_ = echoes
    privacy = {"private": True, "epsilon": 0.5, "delta": 1e-5, "unit": "record"}
    text = generated(tmp_path / "a.jsonl", ["Zzz qqq."] * 30, privacy)
    out = tmp_path / "out"
    assert measure.main([str(w) for w in ("--canaries", key, "--synthetic", f"a={text}", "--output_dir", out)]) == 0
    first, second = by(read_lines(out / "results_canary.jsonl"), "audit_text")
    assert (first["signal"], first["headline"], second["headline"]) == ("2-gram", True, False)
    assert second["undefined"] == "the signal is the same for all canaries"
    assert second["lower"] == {"95": None, "99.9": None} and second["auc"] is None and second["guesses"] == []
    assert second["heuristic"]["bound"] is None and not any(second["above_upper"].values())
    assert (second["n_requested"], second["n_scored"], second["upper"]) == (200, 200, 0.5)
    assert "similarity): no bound (the signal is the same for all canaries)" in capsys.readouterr().out
    study = SimpleNamespace(shown=str, runs={})
    made = [row for row in canary_rows(second, study, {}, Path("x"), 1) if row.value is None]
    assert [row.metric for row in made] == [
        "ε lower, text only",
        "ε lower, text only at 99.9 %",
        "ε lower, text only, f-DP",
        "ε lower, text only, f-DP at 99.9 %",
        "ε lower, text only, f-DP if Gaussian",
        "ε lower, text only, f-DP if Gaussian at 99.9 %",
        "AUC of the audit, text only",
    ]
    assert {row.undefined for row in made} == {second["undefined"]}
    audited = [{"kind": "audit", "included": included} for included in (True, False)]
    unknown = TextArm([], None, None)
    few = audit_line(unknown, audited, [2.0, 1.0], "record", measure="audit_text", arm="a", signal="2-gram")
    assert (few["lower"]["95"], few["undefined"], few["auc"]) == (None, "fewer than five canaries", 1)


def audited_line(m: int, epsilon: float | None = None) -> dict:
    """The audit line of m canaries whose scores tell every coin."""
    included = [index % 2 == 0 for index in range(m)]
    audited = [{"kind": "audit", "included": one} for one in included]
    privacy = None if epsilon is None else {"epsilon": epsilon, "delta": 1e-6, "unit": "record"}
    scores = [one + 0.0 for one in included]
    arm = TextArm([], privacy, None)
    return audit_line(arm, audited, scores, "record", measure="audit", arm="a", signal="s")


def test_bounds_by_f_dp_stand_beside_steinkes():
    """200 coins all known, at the accountant's δ; the Gaussian bound has a δ of its own where there is none."""
    line = audited_line(200, epsilon=1.0)
    for block in (line, *line["f_dp"].values()):
        assert block["delta"] == 1e-6 and block["lower_undefined"] == {"95": None, "99.9": None}
        assert block["lower"] == block["power"] and block["lower"]["95"] > block["lower"]["99.9"] > 1
        assert [test["guesses"] for test in block["guesses"]] == [4, 10, 20, 40, 80]
    assert line["f_dp"]["gaussian"]["lower"]["95"] > line["f_dp"]["epsilon_delta"]["lower"]["95"] + 1
    assert line["above_upper"] == {"95": True, "99.9": True}
    assert audited_line(200, epsilon=2.9)["above_upper"] == {"95": False, "99.9": False}  # Steinke's alone decides
    assert audited_line(200, epsilon=2.9)["f_dp"]["gaussian"]["lower"]["95"] > 2.9
    without = audited_line(200)
    assert (without["delta"], without["f_dp"]["epsilon_delta"]["delta"]) == (0.0, 0.0)
    assert without["f_dp"]["gaussian"]["delta"] == 1e-5
    assert without["lower"]["95"] == pytest.approx(without["f_dp"]["epsilon_delta"]["lower"]["95"], abs=2e-4)
    words = audit_rows(line)
    assert words[1].strip().startswith("Steinke: ε ≥ 2.")
    assert "f-DP: ε ≥ " in words[2] and "(δ 1e-06)" in words[2] and "Gaussian mechanism: ε ≥ " in words[3]
    rows = canary_rows(line | {"arm": "a"}, SimpleNamespace(shown=str, runs={}), {}, Path("x"), 1)
    above = {row.metric: row.settings.get("lower_above_upper") for row in rows}
    assert above["ε lower"] == above["ε lower at 99.9 %"] == ["95", "99.9"]
    assert above["ε lower, f-DP"] == above["ε lower, f-DP if Gaussian at 99.9 %"] == []
    old = {key: value for key, value in line.items() if key not in ("f_dp", "lower_undefined")}  # an earlier version's
    assert [row.metric for row in canary_rows(old, SimpleNamespace(shown=str, runs={}), {}, Path("x"), 1)][:2] == [
        "ε lower",
        "ε lower at 99.9 %",
    ]


@pytest.mark.parametrize(("m", "at_95", "at_999"), ((4, None, None), (19, None, None), (20, 0.25, None), (35, 1, 0.15)))
def test_too_few_canaries_give_no_audit(m, at_95, at_999):
    """A level of 1 % for each share asks for 7 right guesses of 7 (2⁻⁷ < 0.01), so 20 canaries; 0.02 %: 13, so 35."""
    line = audited_line(m)
    for block in (line, *line["f_dp"].values()):
        for level, wanted in (("95", at_95), ("99.9", at_999)):
            low, why = block["lower"][level], block["lower_undefined"][level]
            assert (low is None) == (wanted is None) == (why is not None)
            assert low is None or low > wanted - 0.1
            assert low is not None or block["power"][level] == (None if m < 5 else 0)
            assert why in (None, "fewer than five canaries" if m < 5 else TOO_FEW)
    assert line["undefined"] == line["lower_undefined"]["95"]
    words = audit_rows(line)
    if at_95 is None:
        assert "no bound" in words[0] and ("at most 0.000 could be shown" in words[0]) == (m == 19)
    elif at_999 is None:
        assert "no bound at 99.9 %" in words[1]


def test_measure_bad_input(echoes, models, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(common_models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    key, told, _ = echoes
    text = generated(tmp_path / "a.jsonl", told)
    user = tmp_path / "checkpoint-1"
    shutil.copytree(adapters["llama", "lora"], user)
    (user / "privacy.json").write_text(json.dumps({"epsilon": 2.0, "delta": 1e-3, "unit": "user"}))
    for words, wanted in (
        (["--canaries", key], ["nothing to measure"]),
        (
            ["--canaries", text, "--synthetic", "a=b", "--models", "x"],
            ["not a header", "no such file", "--models x: give"],
        ),
        (["--canaries", key, "--models", f"dp={user}"], ["its audit adds or removes a record", "dp is the user"]),
        (["--canaries", key, "--models", f"dp={tmp_path / 'no'}"], ["--models dp="]),
    ):
        with pytest.raises(UserError) as caught:
            measure.main([str(word) for word in [*words, "--output_dir", tmp_path]])
        assert all(word in str(caught.value) for word in wanted), caught.value
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:100]))
    with pytest.raises(UserError, match="has 100 rows, its manifest says 300"):
        measure.main([str(w) for w in ("--canaries", key, "--synthetic", f"a={text}", "--output_dir", tmp_path)])
    generated(text, told)
    dry = ["--canaries", key, "--synthetic", f"a={text}", "--output_dir", tmp_path / "new", "--dry_run"]
    assert measure.main([str(word) for word in dry]) == 0 and not (tmp_path / "new").exists()
    done = run_script("canary/measure.py", "--canaries", key, "--output_dir", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- rows of every shape


CHAT_TEMPLATES = {
    "chatml": "chatml",
    "marked": "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}|{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


def rows_of(shape, n=24):
    """n rows of a shape, and the words of the part that the loss is taken on, by hand."""
    answers = [f"The answer of row {number}\nis a long one, with {number + 5} words." for number in range(n)]
    questions = [f"Question number {number}?" for number in range(n)]
    make_row = {
        "text": lambda q, a: {"text": a},
        "generated": lambda q, a: {"text": q + a, "prompt": q, "generation": a},
        "completion": lambda q, a: {"prompt": q, "completion": " " + a},
        "prompt": lambda q, a: {"prompt": q, "continuation": a},
        "enron": lambda q, a: {"gt-name": "Ada Quillan", "gt-email": "ada@q.example", "prompt": q, "continuation": a},
        "instruction": lambda q, a: {"instruction": q, "input": "", "output": a},
        "messages": lambda q, a: {"messages": [said("user", q), said("assistant", a)]},
        "two turns": lambda q, a: {
            "messages": [said("user", q), said("assistant", "No."), said("user", q), said("assistant", a)]
        },
        "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        "lists": lambda q, a: {"prompt": [said("user", q)], "completion": [said("assistant", a)]},
    }[shape]
    return [make_row(question, answer) for question, answer in zip(questions, answers)]


def said(role, content):
    return {"role": role, "content": content}


CHATS = ("messages", "two turns", "sharegpt", "lists")


OTHERS = ("text", "generated", "completion", "prompt", "enron", "instruction")


@pytest.mark.parametrize(
    ("shape", "template"),
    [*((shape, None) for shape in OTHERS), *((shape, template) for shape in CHATS for template in CHAT_TEMPLATES)],
)
def test_a_canary_stands_where_the_loss_is_taken(shape, template, models, tmp_path):
    """As run_peft.py --loss_on completion renders the row: the sentence is at the key's place, within a completion."""
    rows, chat_flags = rows_of(shape), []
    if shape in CHATS:
        file = tmp_path / "template.jinja"
        file.write_text(CHAT_TEMPLATES[template])
        chat_flags = ["--model", models["llama"], "--chat_template", template if template == "chatml" else file]
    more = ["--repetitions", 1, 3, "--canaries", 2, "--audit", 6, *chat_flags]
    written, header, key = make(tmp_path, rows, *more)
    renderer = None
    if shape in CHATS:
        tokenizer = common_models.read_tokenizer(models["llama"], None, "--model")
        renderer = dataset.read_renderer(written, tokenizer, str(chat_flags[-1]), "--model")
    assert header.get("whole", False) is (shape in CHATS)
    assert dataset.validate(tmp_path / "train_canaries.jsonl", written) == dataset.shape_of(rows[0])
    rendered = dataset.render("rows", written, range(len(written)), renderer)
    placed = 0
    for canary in key:
        for index, start in zip(canary["rows"], canary["starts"], strict=True):
            sentence, text = canary["sentence"], rendered[index].text
            assert text.count(sentence) == 1 and text[start : start + len(sentence)] == sentence
            spans = rendered[index].completions or ((0, len(text)),)
            assert any(first < start and start + len(sentence) <= end for first, end in spans)
            assert text.replace(f" {sentence}", "", 1) in {
                row.text for row in dataset.render("rows", rows, range(len(rows)), renderer)
            }
            placed += 1
        if canary["rows"]:
            assert rendered[canary["rows"][0]].text.startswith(canary["context"])
    assert placed == 2 * (1 + 3) + sum(line["included"] for line in key if line["kind"] == "audit")
    without = [row for row in rows if row in written]
    assert len(without) == len(written) - placed


def test_canaries_in_chats_are_learned_and_measured(models, tmp_path):
    """The whole way: inject, train on completions, measure; every copy counts as trained on."""
    flags = ["--model", models["llama"], "--chat_template", "chatml"]
    make(tmp_path, rows_of("messages"), "--repetitions", 2, "--canaries", 2, "--audit", 6, *flags)
    words = ["-m", models["llama"], "-i", tmp_path / "train_canaries.jsonl", "--output_root", tmp_path / "out", "-e", 1]
    words += ["--loss_on", "completion", "--chat_template", "chatml", "-lr", "1e-3", "--lora_r", 2]
    assert run_peft.main([str(word) for word in words]) == 0
    checkpoint = max((tmp_path / "out").rglob("checkpoint-*"), key=natural_key)
    out = tmp_path / "measured"
    argv = ["--canaries", tmp_path / "train_canaries_key.jsonl", "--models", f"a={checkpoint}", "--references", 20]
    assert measure.main([str(word) for word in [*argv, "--output_dir", out]]) == 0
    lines = read_lines(out / "results_canary.jsonl")
    (ladder,) = [line for line in lines if line["measure"] == "exposure" and line["kind"] == "ladder"]
    assert ladder["copies_trained"] == [2, 2] and ladder["n_scored"] == 2


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A tiny Llama whose tokenizer has about 1,000 common words as tokens."""
    import torch
    from faker import Faker
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("worded")
    fake = Faker("en_US")
    fake.seed_instance(1)
    trainer = ByteLevelBPETokenizer()
    texts = [" ".join(["A", *fake.words(200)]) for _ in range(200)]
    trainer.train_from_iterator(texts, vocab_size=2500, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config("llama", len(tokenizer))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", (*OTHERS, *CHATS, "review"))
@pytest.mark.parametrize("family", ("random", "new_token"))
def test_families_of_tokens(family, shape, worded, tmp_path):
    """In the row as it is trained on, each secret has the key's tokens: one per word, and new_token's in no other
    row."""
    rows = make_reviews(24) if shape == "review" else rows_of(shape)
    flags = ["--model", worded, *(["--chat_template", "chatml"] if shape in CHATS else [])]
    written, header, key = make(
        tmp_path, rows, "--repetitions", 2, "--canaries", 1, "--audit", 4, "--family", family, *flags
    )
    assert (header["family"], header["secret"], header["tokenizer"]) == (family, family, str(worded))
    tokenizer = common_models.read_tokenizer(worded, None, "--model")
    renderer = dataset.read_renderer(written, tokenizer, "chatml", "--model") if shape in CHATS else None
    texts = [row.text for row in dataset.render("rows", written, range(len(written)), renderer)]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert len({one["secret"] for one in key}) == len(key) == 6
    for one in key:
        words = one["secret"].split()
        assert len(one["tokens"]) == len(words) == (8 if family == "random" else 1)
        assert [tokenizer.decode([token]) for token in one["tokens"]] == [f" {word}" for word in words]
        assert len(one["before"].split()) == 6 or family == "new_token"
        for row, start in zip(one["rows"], one["starts"], strict=True):
            assert texts[row].startswith(one["sentence"], start)
            assert any(ids[row][i : i + len(words)] == one["tokens"] for i in range(len(ids[row])))
        if family == "new_token":
            assert [row for row, found in enumerate(ids) if one["tokens"][0] in found] == sorted(one["rows"])
    space = canaries.Space(header["secret"], tuple(header["words"]))
    if family == "random":
        assert space.size == len(header["words"]) ** 8
        assert all(set(one["sentence"][:-1].split()) <= set(header["words"]) for one in key)
    else:
        assert space.size == len(header["words"]) + 1 > 2 and not {one["secret"] for one in key} & set(header["words"])
        others = space.others(key[0]["secret"], 2, random.Random(0))
        assert len(set(others)) == 2 and set(others) <= set(header["words"])
    manifest = manifests.read_manifest(tmp_path / "train_canaries.jsonl")
    assert manifest["canaries"]["space"] == space.size and manifest["canaries"]["secret"] == family


@pytest.mark.parametrize("family", ("random", "new_token"))
def test_canaries_of_tokens_are_learned_and_measured(family, worded, tmp_path, capsys):
    """From injection to the bounds, on an adapter: the headline is the family's; no secret is its own reference."""
    flags = ["--repetitions", 12, "--canaries", 2, "--audit", 24, "--family", family, "--tokenizer", worded]
    _, header, key = make(tmp_path, rows_of("completion", 60), *flags)
    words = ["-m", worded, "-i", tmp_path / "train_canaries.jsonl", "-e", 6, "-lr", 2e-2, "--lora_r", 8]
    words += ["--loss_on", "completion", "-pdbs", 4, "-gas", 1, "--output_root", tmp_path / "runs"]
    assert run_peft.main([str(word) for word in words]) == 0
    checkpoint = max((tmp_path / "runs").rglob("checkpoint-*"), key=natural_key)
    capsys.readouterr()
    lines, rows = measured(tmp_path, tmp_path / "train_canaries_key.jsonl", checkpoint)
    (audit,) = by(lines, "audit")
    headline, other = ("secret", "whole") if family == "new_token" else ("whole", "secret")
    assert (audit["score"], audit["other_score"]["score"], audit["n_scored"]) == (headline, other, 24)
    assert audit["placed_trained"] == audit["placed"] > 0
    audited = [row for row in rows if row["kind"] == "audit"]
    assert all(row["audit_signal"] == row[f"audit_{headline}"] for row in audited)
    (ladder,) = by(lines, "exposure", kind="ladder")
    assert ladder["copies_trained"] == [12, 12]
    assert ladder["references"] == min(20, len(header["words"])) and ladder["bits"]["mean"] > 2
    assert ("secret alone" in capsys.readouterr().out) and len(key) == 28


@pytest.mark.parametrize("shape", (*OTHERS, *CHATS, "review"))
def test_sampled_canaries(shape, worded, models, tmp_path):
    """Sampled from another model than the one that is trained: distinct, spares and canaries apart."""
    rows = make_reviews(24) if shape == "review" else rows_of(shape)
    flags = ["--model", models["llama"], "--chat_template", "chatml"] if shape in CHATS else []
    flags += ["--family", "model", "--generator", worded, "--temperature", 1.2]
    written, header, key = make(tmp_path, rows, "--repetitions", 2, "--canaries", 1, "--audit", 4, *flags)
    names = ("family", "secret", "generator", "temperature")
    assert [header[name] for name in names] == ["model", "model", str(worded), 1.2]
    assert header["generator_weights"] == provenance.weights_sha256(common_models.find_model(str(worded)))
    assert len(header["words"]) == len(key) == 6 and not {one["secret"] for one in key} & set(header["words"])
    tokenizer = common_models.read_tokenizer(models["llama"], None, "--model")
    renderer = dataset.read_renderer(written, tokenizer, "chatml", "--model") if shape in CHATS else None
    texts = [row.text for row in dataset.render("rows", written, range(len(written)), renderer)]
    for one in key:
        assert len(one["before"].split()) == 6 and len(one["secret"].split()) >= 4
        assert one["sentence"] == one["before"] + one["secret"] and "tokens" not in one
        assert [i for i, text in enumerate(texts) if one["sentence"] in text] == sorted(one["rows"])
        for row, start in zip(one["rows"], one["starts"], strict=True):
            assert texts[row].startswith(one["sentence"], start)
    assert canaries.Space("model", tuple(header["words"])).size == 7
    files = [tmp_path / name for name in ("train_canaries.jsonl", "train_canaries_key.jsonl")]
    before = [file.read_bytes() for file in files]
    make(tmp_path, rows, "--repetitions", 2, "--canaries", 1, "--audit", 4, *flags, "--overwrite")
    assert before == [file.read_bytes() for file in files]


def test_a_dry_run_samples_nothing(worded, tmp_path, monkeypatch):
    monkeypatch.setattr(common_models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    source = write_rows(tmp_path / "train.jsonl", rows_of("text"))
    flags = ("--audit", 4, "--family", "model", "--generator", worded, "--dry_run")
    assert inject.main([str(word) for word in ("-i", source, *flags)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_families_bad_input(worded, models, tmp_path):
    source = write_rows(tmp_path / "train.jsonl", rows_of("text"))
    for words, wanted in (
        (["--family", "random"], "needs --tokenizer"),
        (["--family", "model"], "needs --generator"),
        (["--family", "model", "--generator", worded, "--temperature", 0.7], "at least 0.8"),
        (["--family", "model", "--generator", tmp_path / "no"], "--generator .*no such directory"),
        (["--generator", worded], "only for --family model"),
        (["--family", "random", "--tokenizer", worded, "--temperature", 2], "only for --family model"),
        (["--family", "random", "--secret", "name"], "only for --family template"),
        (["--family", "new_token", "--tokenizer", tmp_path / "no"], "--model"),
        (["--family", "random", "--tokenizer", worded, "--chat_template", "chatml"], "not chat rows"),
    ):
        with pytest.raises(UserError, match=wanted):
            inject.main([str(word) for word in ("-i", source, "--audit", 3, *words)])
    rows = write_rows(tmp_path / "many.jsonl", rows_of("text", 400))
    words = ("-i", rows, "--audit", 400, "--family", "new_token", "--tokenizer", models["llama"])
    with pytest.raises(UserError, match=r"^--family new_token: 4 whole words .* occur in no row; 400 are needed"):
        inject.main([str(word) for word in words])
    with pytest.raises(UserError, match=r"has 4 whole words; 16 are needed"):
        inject.main([str(word) for word in (*words, "--family", "random")])


def test_a_tokenizer_with_other_tokens_is_refused(worded, tmp_path):
    """A copy of the tokenizer in which the tokens of two words have changed places."""
    _, header, key = make(tmp_path, rows_of("text"), "--audit", 6, "--family", "random", "--tokenizer", worded)
    other = shutil.copytree(worded, tmp_path / "other")
    state = json.loads((other / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    first, second = (f"\u0120{word}" for word in key[0]["secret"].split()[:2])
    second = (
        second if second != first else next(f"\u0120{word}" for word in header["words"] if f"\u0120{word}" != first)
    )
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(state))
    argv = ["--canaries", tmp_path / "train_canaries_key.jsonl", "--output_dir", tmp_path / "out", "--dry_run"]
    assert measure.main([str(word) for word in [*argv, "--models", f"a={worded}"]]) == 0
    for flags in (["--models", f"a={other}"], ["--models", f"a={worded}", "--ref_model", other]):
        with pytest.raises(UserError, match="gives other tokens for the secrets"):
            measure.main([str(word) for word in [*argv, *flags]])


@pytest.mark.parametrize("family", ("random", "new_token", "model"))
def test_canaries_of_another_tokenizer_are_not_the_same(family, worded, tmp_path, capsys):
    """A copy of the tokenizer changes nothing; other tokens behind the same name are other settings."""
    folder = shutil.copytree(worded, tmp_path / "model")
    source = write_rows(tmp_path / "train.jsonl", rows_of("text"))
    flag = "--generator" if family == "model" else "--tokenizer"
    words = [str(word) for word in ("-i", source, "--audit", 4, "--family", family, flag, folder)]
    assert inject.main(words) == 0
    settings = manifests.read_manifest(tmp_path / "train_canaries.jsonl")["settings"]
    assert len(settings["tokenizer_sha256"]) == 64
    capsys.readouterr()
    assert inject.main(words) == 0
    assert capsys.readouterr().out.count("already finished") == 2
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    one, other = (next(token for token in vocabulary if vocabulary[token] == number) for number in (400, 401))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="exists; give --overwrite"):
        inject.main(words)


def test_inject_reads_renamed_fields(tmp_path):
    rows = [{"body": row["text"]} for row in rows_of("text")]
    written, _, key = make(tmp_path, rows, "--repetitions", 1, "--columns", "text=body")
    assert all(set(row) == {"text"} for row in written) and len(key) == 20


def test_chat_rows_need_a_template(models, tmp_path):
    source = write_rows(tmp_path / "train.jsonl", rows_of("messages"))
    with pytest.raises(UserError, match="chat rows need --model"):
        inject.main(["-i", str(source), "--repetitions", "1"])
    with pytest.raises(UserError, match="no chat template"):
        inject.main(["-i", str(source), "--repetitions", "1", "--model", str(models["llama"])])
    plain = write_rows(tmp_path / "plain.jsonl", rows_of("text"))
    with pytest.raises(UserError, match="the rows are not chat rows"):
        inject.main(["-i", str(plain), "--repetitions", "1", "--model", str(models["llama"])])
    with pytest.raises(UserError, match="only for review rows"):
        inject.main(["-i", str(plain), "--repetitions", "1", "--condition", "title"])
