"""utility/: measures against scikit-learn, loops and values worked out by hand; the three commands in small."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import read_lines, run_script, write_rows
from scipy import sparse

from common import dataset, reviews
from common.dataset import instruction_prompt
from common.problems import UserError
from utility import downstream, feature_importance, human_sheet, rating
from utility import metrics as m
from utility.importance import cell
from utility.rating import LABELS, instruction_rows, label_log_probabilities
from utility.sheet import COLUMNS
from utility.words import compare

TONES = {
    1: ("awful", "useless"),
    2: ("poor", "weak"),
    3: ("okay", "average"),
    4: ("good", "nice"),
    5: ("great", "fine"),
}


def make_reviews(n: int, seed: int, first_id: int = 0) -> list[dict]:
    """n fictional reviews whose words depend on the rating, two per user."""
    rng, rows = random.Random(seed), []
    for number in range(n):
        stars = rng.choice((1, 2, 3, 4, 5, 5, 5))
        words = [rng.choice(("kettle", "lamp", "mat")), *rng.choices(TONES[stars], k=3), rng.choice(("so", "it", "we"))]
        rng.shuffle(words)
        rows.append(
            {
                "System prompt": "Write.",
                "Rating": stars,
                "Review Title": "So",
                "Review": " ".join(words),
                "Product Title": "Lamp",
                "Product Categories": "",
                "row_id": first_id + number,
                "user_id": f"u{(first_id + number) // 2}",
            }
        )
    return rows


def generated(rows: list[dict], arm: str) -> list[dict]:
    more = {"arm": arm, "finish_reason": "eos", "seed": 1}
    kept = [{key: value for key, value in row.items() if key not in ("Review", "user_id")} for row in rows]
    return [one | more | {"generated_text": " " + row["Review"]} for one, row in zip(kept, rows)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("utility")
    real, heldout, other = make_reviews(160, 1), make_reviews(60, 2, 1000), make_reviews(80, 3, 2000)
    ratings = [row["Rating"] for row in other]
    random.Random(4).shuffle(ratings)
    wrong = [row | {"Rating": rating} for row, rating in zip(other, ratings)]
    return {
        "real": write_rows(root / "real.jsonl", real),
        "heldout": write_rows(root / "heldout.jsonl", heldout),
        "good": write_rows(root / "good.jsonl", generated(other, "good")),
        "wrong": write_rows(root / "wrong.jsonl", generated(wrong, "wrong")),
        "leaky": write_rows(root / "leaky.jsonl", generated(heldout, "leaky")),
    }


# ---------------------------------------------------------------- measures


def test_rating_scores_against_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

    # by hand: truth 5 5 1, predicted 5 4 1: 2/3 right; F1 of 5 is 2/3 and of 1 is 1; error (0 + 1 + 0)/3
    by_hand = {"accuracy": 2 / 3, "macro_f1": (2 / 3 + 1) / 2, "mae": 1 / 3}
    assert m.rating_scores([5, 5, 1], [5, 4, 1]) == pytest.approx(by_hand)
    truth, predicted = np.random.default_rng(0).integers(1, 6, (2, 200))
    found = m.rating_scores(truth, predicted)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, predicted))
    assert m.majority([5, 1, 5, 2]) == 5 and m.majority([2, 1, 2, 1]) == 1


def test_expected_permutation_importance_against_a_loop():
    rng = np.random.default_rng(1)
    features = sparse.random(12, 6, density=0.4, format="csc", rng=rng)
    weights, bias, truth = rng.normal(size=(6, 3)), rng.normal(size=3), rng.integers(0, 3, 12)

    def loss(values, label):
        logits = values @ weights + bias
        return np.log(np.exp(logits).sum()) - logits[label]

    rows = features.toarray()
    naive = np.zeros(6)
    for column in range(6):
        for row, label in zip(rows, truth):
            for donor in rows:
                changed = row.copy()
                changed[column] = donor[column]
                naive[column] += (loss(changed, label) - loss(row, label)) / 144
    assert np.allclose(m.expected_permutation_importance(features, weights, bias, truth), naive)


def test_expected_permutation_importance_is_the_limit_of_scikit_learns():
    from sklearn.inspection import permutation_importance
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(2)
    features = rng.normal(size=(60, 4)) * (rng.random((60, 4)) < 0.5)
    truth = (features[:, 0] + 0.3 * rng.normal(size=60) > 0).astype(int) + (features[:, 1] > 0.8)
    model = LogisticRegression().fit(features, truth)
    found = m.expected_permutation_importance(sparse.csc_matrix(features), model.coef_.T, model.intercept_, truth)
    theirs = permutation_importance(model, features, truth, scoring="neg_log_loss", n_repeats=400, random_state=0)
    assert np.all(np.abs(found - theirs.importances_mean) < 4 * theirs.importances_std / 20 + 1e-9)


def test_top_jaccard():
    assert m.top_jaccard([5, 4, 3, 0], [0, 4, 3, 5], 2) == 1 / 3  # {0, 1} and {3, 1}
    assert m.top_jaccard([1, 2], [1, 2], 2) == 1


def test_fleiss_kappa_by_hand_and_cohen_against_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    # 3 items, 3 raters, 2 categories. P per item: 1, (4+1−3)/6 = 1/3, 1/3; mean 5/9. Shares 6/9, 3/9: chance 5/9. κ = 0
    assert m.fleiss_kappa([[3, 0], [2, 1], [1, 2]]) == pytest.approx(0)
    # 2 items, 2 raters, one agreed item of each category: observed 1, chance 1/2: κ = 1
    assert m.fleiss_kappa([[2, 0], [0, 2]]) == 1
    # every pair apart: observed 0, chance 1/2: κ = −1
    assert m.fleiss_kappa([[1, 1], [1, 1]]) == -1
    assert m.fleiss_kappa([[2, 0], [2, 0]]) is None
    with pytest.raises(ValueError, match="same number"):
        m.fleiss_kappa([[2, 0], [1, 0]])
    first, second = np.random.default_rng(5).integers(0, 3, (2, 50))
    second[:30] = first[:30]
    assert m.cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert m.cohen_kappa(["a"], ["a"]) is None


# ---------------------------------------------------------------- downstream.py


def call_downstream(files, models, output, *more, arms=("good", "wrong")):
    words = ["-m", models["neox"], "--real", files["real"], "--heldout", files["heldout"], "--output_dir", output]
    words += ["--synthetic", *(f"{arm}={files[arm]}" for arm in arms)] if arms else []
    settings = ["--num_rows", 32, "-e", 2, "-pdbs", 8, "-gas", 1, "-lr", 0.01, "--lora_r", 4, "--max_length", 200]
    return downstream.main([str(word) for word in [*words, *settings, *more]])


def test_downstream_end_to_end_and_again(files, models, tmp_path, capsys):
    assert call_downstream(files, models, tmp_path, "--num_seeds", "2") == 0
    content = (tmp_path / "results_utility.jsonl").read_text()
    lines = read_lines(tmp_path / "results_utility.jsonl")
    assert [(line["arm"], line["seed"]) for line in lines] == [
        *((arm, seed) for seed in (3407, 3408) for arm in ("real", "good", "wrong")),
        ("real", None),
        ("good", None),
        ("wrong", None),
        ("base", None),
        ("majority", None),
    ]
    trained = lines[:6]
    assert {line["steps"] for line in trained} == {8}  # 32 rows in batches of 8, twice
    assert {line["train_rows"] for line in trained} == {32}
    by_row = read_lines(tmp_path / "results_utility_rows.jsonl")
    assert len(by_row) == 8 * 60 and all("text" not in row for row in by_row)
    for line in trained:
        own = [row for row in by_row if (row["arm"], row["seed"]) == (line["arm"], line["seed"])]
        assert line["accuracy"] == pytest.approx(np.mean([row["truth"] == row["rating"] for row in own]))
        assert line["accuracy_ci95"][0] <= line["accuracy"] <= line["accuracy_ci95"][1]
        if line["arm"] != "real":
            real = [row for row in by_row if (row["arm"], row["seed"]) == ("real", line["seed"])]
            right = [(a["truth"] == a["rating"], b["truth"] == b["rating"]) for a, b in zip(real, own)]
            assert line["mcnemar_against_real"]["gained"] == right.count((False, True))
            assert line["mcnemar_against_real"]["lost"] == right.count((True, False))
    mean = lines[6]["accuracy"]
    assert mean["mean"] == pytest.approx((lines[0]["accuracy"] + lines[3]["accuracy"]) / 2)
    truth = [row["Rating"] for row in read_lines(files["heldout"])]
    assert lines[-1]["accuracy"] == pytest.approx(truth.count(5) / 60)  # five stars are the most common in real.jsonl
    assert json.loads((tmp_path / "run_downstream.json").read_text())["status"] == "ok"
    capsys.readouterr()
    assert call_downstream(files, models, tmp_path, "--num_seeds", "2") == 0  # trained runs are kept
    assert capsys.readouterr().out.count("nothing to do") == 6
    assert (tmp_path / "results_utility.jsonl").read_text() == content


def test_downstream_says_where_a_model_has_hardly_moved(files, models, tmp_path, capsys):
    """At a rate too small to learn at: next to the score, and in its line; of PiSSA too."""
    assert call_downstream(files, models, tmp_path, "-pt", "pissa", "-lr", 1e-9, "--num_seeds", 1, arms=("good",)) == 0
    said = capsys.readouterr().out
    for line in read_lines(tmp_path / "results_utility.jsonl")[:2]:
        assert line["relative_change"] < 1e-4 and line["notes"]
        assert f"{line['arm']}, seed {line['seed']}: {line['notes'][0]}; its scores are those of the base" in said


def test_downstream_with_other_settings_is_refused_and_touches_nothing(files, models, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "copy.jsonl"
    settings = ("--num_seeds", 1, "--num_heldout", 20, "-e", 1)
    assert call_downstream(files, models, out, *settings, arms=("good",)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = files | {"good": files["wrong"]}
    for source, arms, more, told in (
        (files, ("good",), ("--num_heldout", 30, "-lr", 0.02), "_rate was 0.01, now 0.02; --num_heldout was 20"),
        (files, ("good", "wrong"), (), "--synthetic wrong was None, "),
        (other, ("good",), (), "--synthetic good "),
        (files, (), (), ", now None"),
    ):
        with pytest.raises(UserError, match=told) as error:
            call_downstream(source, models, out, *settings, *more, arms=arms)
        assert len(error.value.problems) == 1 and error.value.problems[0].startswith(f"--output_dir {out}: ")
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    copy.write_bytes(files["good"].read_bytes())  # another name, the same rows
    assert call_downstream(files | {"good": copy}, models, out, *settings, arms=("good",)) == 0
    (out / "run_downstream.json").unlink()
    with pytest.raises(UserError, match=r"without its run_downstream\.json"):
        call_downstream(files, models, out, *settings, arms=("good",))


def test_labels_are_scored_as_the_whole_model_does(models):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models["neox"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["neox"])
    rows = instruction_rows(make_reviews(5, 1), tokenizer, 400)[0]
    prompts = [instruction_prompt(row) for row in rows]
    scored = label_log_probabilities(model, tokenizer, prompts, lambda n: None)
    for prompt, values in zip(prompts, scored):
        for label, value in zip(LABELS, values):
            ids = torch.tensor([tokenizer(prompt + label).input_ids])
            with torch.no_grad():
                logp = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
            assert value == pytest.approx(float(logp), abs=1e-4)


def test_labels_of_several_tokens_are_scored_whole(models, monkeypatch):
    """One label of two tokens: every label counts from the first token that tells them apart."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    labels = ("1", "2 and", "3", "4", "5")
    monkeypatch.setattr(rating, "LABELS", labels)
    model = AutoModelForCausalLM.from_pretrained(models["neox"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["neox"])
    prompts = ["the lamp is: ", "a mat? "]
    scored = label_log_probabilities(model, tokenizer, prompts, lambda n: None)
    for prompt, values in zip(prompts, scored):
        encoded = [tokenizer(prompt + label).input_ids for label in labels]
        assert len({len(ids) for ids in encoded}) == 2
        start = next(k for k, column in enumerate(zip(*encoded)) if len(set(column)) > 1)
        for ids, value in zip(encoded, values):
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert value == pytest.approx(sum(float(logp[k - 1, ids[k]]) for k in range(start, len(ids))), abs=1e-4)


def test_long_reviews_are_cut_so_that_the_label_stays(models):
    from transformers import AutoTokenizer

    from common.dataset import row_text
    from training.batches import encode

    tokenizer = AutoTokenizer.from_pretrained(models["neox"])
    rows = make_reviews(2, 1)
    rows[1]["Review"] = "the kettle leaks " * 200
    instructions, n_cut = instruction_rows(rows, tokenizer, 180)
    assert n_cut == 1 and instructions[0]["input"] == rows[0]["Review"]
    for row in instructions:
        (one,) = encode(dataset.render("", [row], [0], None), tokenizer, 180, "completion")
        assert one.ids[-1] == tokenizer.eos_token_id and one.labels >= 2  # label and EOS are learned
        assert tokenizer.decode(one.ids[:-1]) == row_text(row)[0]


def test_downstream_bad_input(files, models, tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "fine_tune", lambda *_: pytest.fail("trained before the input was checked"))
    out = tmp_path / "out"
    cases = (
        (("leaky",), (), "60 rows have the product and rating of held-out rows"),
        (("good",), ("--real", files["heldout"]), "60 of its rows are held-out rows"),
        (("good",), ("--num_rows", 81), "good has only 80 rows with text"),
        (("good",), ("--heldout", tmp_path / "none.jsonl"), "no such file"),
        (("good",), ("--synthetic", "base=x.jsonl"), "the name base is taken"),
        (("good",), ("--max_length", 20), "--max_length 20: no token is left for the review"),
        (("good",), ("--seed", (1 << 32) - 1), "--num_seeds 3: from --seed 4294967295 on"),
        ((), ("-m", tmp_path / "none"), "no such directory"),
    )
    for arms, more, words in cases:
        with pytest.raises(UserError) as error:
            call_downstream(files, models, out, *more, arms=arms)
        assert any(words in line for line in error.value.problems), error.value.problems
    assert not out.exists()


# ---------------------------------------------------------------- feature_importance.py


def call_importance(files, output, *more):
    words = ["--real", files["real"], "--heldout", files["heldout"], "--output_dir", output, "--num_seeds", 2]
    words += ["--synthetic", f"good={files['good']}", f"wrong={files['wrong']}"]
    return feature_importance.main([str(word) for word in [*words, *more]])


def test_feature_importance_twice_the_same_and_in_the_right_order(files, tmp_path):
    for name in ("one", "two"):
        assert call_importance(files, tmp_path / name) == 0
    first, second = ((tmp_path / name / "feature_importance.json").read_text() for name in ("one", "two"))
    assert first == second
    content = json.loads(first)
    arms = {arm: one["mean"] for arm, one in content["arms"].items()}
    assert list(arms) == ["real", "good", "wrong", "null"]
    assert min(arms["real"]["spearman"], arms["good"]["spearman"]) > 0.6
    assert max(arms["wrong"]["spearman"], arms["null"]["spearman"]) < 0.6
    tones = {word for pair in TONES.values() for word in pair}
    assert set(content["top_words"]) == tones  # the ten words that depend on the rating
    assert content["arms"]["null"]["n_scored"] == 2
    assert call_importance(files, tmp_path / "one") == 0  # finished already
    with pytest.raises(UserError, match="exists; give --overwrite"):
        call_importance(files, tmp_path / "one", "--min_rows", 4)
    with pytest.raises(UserError, match="there are only 80 rows"):
        call_importance(files, tmp_path / "three", "--num_rows", 81)


def test_jaccard_says_nothing_where_every_word_is_in_the_top():
    falling, rising = np.arange(20.0)[::-1], np.arange(20.0)
    agreement = compare(falling, rising)
    assert agreement["jaccard@10"] == 0 and agreement["jaccard@20"] is None and agreement["jaccard@50"] is None
    assert compare(np.arange(21.0), rising_and_one := np.arange(21.0) ** 2)["jaccard@20"] == 1
    assert set(compare(rising_and_one, np.ones(21)).values()) == {None}  # one is constant
    assert cell(None) == "–"


def test_a_dry_run_of_feature_importance(files, tmp_path, capsys):
    assert call_importance(files, tmp_path / "out", "--dry_run") == 0
    said = capsys.readouterr().out
    assert said.startswith("would compare 2 draws of ") and "feature_importance.json" in said
    with pytest.raises(UserError, match="no word is in that many"):
        call_importance(files, tmp_path / "out", "--dry_run", "--min_rows", 61)
    assert not (tmp_path / "out").exists()


def test_feature_importance_bad_input(files, tmp_path):
    out = tmp_path / "out"
    flat = write_rows(tmp_path / "flat.jsonl", [row | {"Rating": 5} for row in read_lines(files["good"])])
    with pytest.raises(UserError) as error:
        call_importance(files, out, "--synthetic", f"flat={flat}", "--min_rows", 61)
    assert [line.partition(":")[0] for line in error.value.problems] == ["--synthetic flat", "--min_rows 61"]
    same = write_rows(tmp_path / "same.jsonl", [row | {"Rating": 4} for row in read_lines(files["real"])])
    cases = (
        (("--real", same), "--real: all 80 rows drawn with seed 3407 have the same rating (reference)"),
        (("--num_heldout", 19), "19 held-out rows (with text, at most --num_heldout); at least 20 are needed"),
        (("--seed", -1), "must be 0 to 4294967295"),
        (("--seed", (1 << 32) - 1), "--num_seeds 2: from --seed 4294967295 on"),
    )
    for more, words in cases:
        with pytest.raises(UserError) as error:
            call_importance(files, out, *more)
        assert any(words in line for line in error.value.problems), error.value.problems
    assert not out.exists()


# ---------------------------------------------------------------- human_sheet.py


def make_sheet(files, output, *more):
    words = ["make", "--synthetic", f"good={files['good']}", f"wrong={files['wrong']}", "--output_dir", output]
    return human_sheet.main([str(word) for word in [*words, "--num_rows", 25, *more]])


def key_of(folder: Path) -> list[dict]:
    return read_lines(folder / "key.jsonl")


def fill(sheet: Path, target: Path, label) -> Path:
    with open(sheet, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        line["label"] = label(int(line["number"]))
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    return target


def test_sheet_is_blind_balanced_and_reproducible(files, tmp_path):
    for name in ("one", "two"):
        assert make_sheet(files, tmp_path / name) == 0
    sheet = (tmp_path / "one/sheet.csv").read_text()
    assert sheet == (tmp_path / "two/sheet.csv").read_text()
    assert "wrong" not in sheet and "eos" not in sheet and "row_id" not in sheet
    key = read_lines(tmp_path / "one/key.jsonl")
    assert (tmp_path / "one/key.jsonl").stat().st_mode & 0o777 == 0o600
    arms = [line["arm"] for line in key]
    assert sorted((arms.count("good"), arms.count("wrong"))) == [12, 13] and arms != sorted(arms)
    rows = {arm: {row["row_id"]: row for row in read_lines(files[arm])} for arm in ("good", "wrong")}
    with open(tmp_path / "one/sheet.csv", encoding="utf-8", newline="") as file:
        for line, secret in zip(csv.DictReader(file), key, strict=True):
            row = rows[secret["arm"]][secret["row_id"]]
            assert line["text"] == reviews.text_of(row) and int(line["number"]) == secret["number"]
            assert line["label"] == ""
    assert "gibberish" in (tmp_path / "one/rubric.md").read_text()


def test_no_cell_of_a_sheet_is_a_formula(files, tmp_path):
    lines = read_lines(files["good"])
    for line, start in zip(lines, "=+-@"):
        line["Product Title"] = f"{start}1+1"
        line[reviews.GENERATED] = f"{start}cmd|x"
    put = write_rows(tmp_path / "odd.jsonl", lines[:4])
    words = ["make", "--synthetic", f"odd={put}", "--output_dir", tmp_path / "out", "--num_rows", 4]
    assert human_sheet.main([str(word) for word in words]) == 0
    with open(tmp_path / "out/sheet.csv", encoding="utf-8", newline="") as file:
        shown = list(csv.DictReader(file))
    assert {line["product"] for line in shown} == {f"'{start}1+1" for start in "=+-@"}
    assert {line["text"][0] for line in shown} == {"'"} and all(line["rating"].isdigit() for line in shown)
    filled = fill(tmp_path / "out/sheet.csv", tmp_path / "filled.csv", lambda _: "good")
    words = ["score", "--sheets", filled, "--key", tmp_path / "out/key.jsonl", "--output_dir", tmp_path / "out"]
    assert human_sheet.main([str(word) for word in words]) == 0


def test_a_dry_run_of_the_sheet_and_of_its_scores(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert make_sheet(files, out, "--dry_run") == 0
    assert "would write sheet.csv of 25 rows (13 of good, 12 of wrong)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--num_rows 9000"):
        make_sheet(files, out, "--dry_run", "--num_rows", 9000)
    assert not out.exists()
    make_sheet(files, out)
    filled = fill(out / "sheet.csv", tmp_path / "filled.csv", lambda _: "good")
    before = sorted(tmp_path.rglob("*"))
    words = ["score", "--sheets", filled, "--key", out / "key.jsonl", "--output_dir", out, "--dry_run"]
    assert human_sheet.main([str(word) for word in words]) == 0
    assert "would score 1 sheets of 25 rows and write" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        human_sheet.main([str(word) for word in [*words[:2], tmp_path / "none.csv", *words[2:]]])
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_of_two_sheets(files, tmp_path):
    make_sheet(files, tmp_path)
    key = read_lines(tmp_path / "key.jsonl")
    arm = {line["number"]: line["arm"] for line in key}
    anna = fill(tmp_path / "sheet.csv", tmp_path / "anna.csv", lambda n: "good" if arm[n] == "good" else "Repetition ")
    ben = fill(tmp_path / "sheet.csv", tmp_path / "ben.csv", lambda n: "good" if n != 1 else "gibberish")
    words = ["score", "--sheets", anna, ben, "--key", tmp_path / "key.jsonl", "--output_dir", tmp_path]
    assert human_sheet.main([str(word) for word in words]) == 0
    content = json.loads((tmp_path / "human_evaluation.json").read_text())
    first = content["arms"]["wrong"]["sheets"][0]
    total = content["arms"]["wrong"]["n_scored"]
    assert first["repetition"]["count"] == total and first["good"]["count"] == 0
    assert sum(one["count"] for one in first.values()) == total
    labels = [
        ["good" if arm[n] == "good" else "repetition" for n in arm],
        ["good" if n != 1 else "gibberish" for n in arm],
    ]
    from sklearn.metrics import cohen_kappa_score

    pair = content["agreement"]["cohen_kappa"][0]
    assert pair["kappa"] == pytest.approx(cohen_kappa_score(*labels))
    assert pair["equal"] == sum(a == b for a, b in zip(*labels))


def test_sheets_with_faults_are_refused(files, tmp_path):
    make_sheet(files, tmp_path)
    bad = fill(tmp_path / "sheet.csv", tmp_path / "bad.csv", lambda n: {1: "", 2: "fine"}.get(n, "good"))
    short = tmp_path / "short.csv"
    own = key_of(tmp_path)[0]["sheet"]
    short.write_text(f"sheet,number,label\n{own},1,good\n{own},1,good\n{own},99,good\n{own},²,good\n")
    words = ["score", "--sheets", bad, short, "--key", tmp_path / "key.jsonl", "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError) as error:
        human_sheet.main([str(word) for word in words])
    told = "\n".join(error.value.problems)
    for words in (
        "row 1: label ''",
        "row 2: label 'fine'",
        "row 1 occurs more than once",
        "'99' is not in the key",
        "'²' is not",
    ):
        assert words in told
    assert "24 of 25 rows of the key are missing" in told
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="80 rows"):
        make_sheet(files, tmp_path / "more", "--num_rows", 200)


def score_words(folder: Path, *sheets, key=None) -> list[str]:
    words = ["score", "--sheets", *sheets, "--key", key or folder / "key.jsonl", "--output_dir", folder / "scored"]
    return [str(word) for word in words]


def test_the_key_of_another_sheet_is_refused(files, tmp_path):
    """Another seed, and the same texts under arms that changed their names: the numbers fit, the arms do not."""
    make_sheet(files, tmp_path / "one")
    make_sheet(files, tmp_path / "other", "--seed", 1)
    swapped = files | {"good": files["wrong"], "wrong": files["good"]}
    make_sheet(swapped, tmp_path / "swapped")
    filled = fill(tmp_path / "one/sheet.csv", tmp_path / "filled.csv", lambda _: "good")
    for name in ("other", "swapped"):
        with pytest.raises(UserError, match=r"pass the key\.jsonl of the same sheet"):
            human_sheet.main(score_words(tmp_path / name, filled))
    # as a spreadsheet may return it: byte-order mark, CRLF, other case and spaces
    own = key_of(tmp_path / "one")[0]["sheet"]
    text = filled.read_text(encoding="utf-8").replace(own, f" {own.upper()} ").replace(",good", ", Good ")
    filled.write_bytes(b"\xef\xbb\xbf" + text.replace("\r\n", "\n").replace("\n", "\r\n").encode())
    assert human_sheet.main(score_words(tmp_path / "one", filled)) == 0


def test_a_sheet_given_twice_and_a_damaged_key_are_refused(files, tmp_path):
    make_sheet(files, tmp_path)
    filled = fill(tmp_path / "sheet.csv", tmp_path / "filled.csv", lambda _: "good")
    copy = tmp_path / "copy.csv"
    copy.write_bytes(filled.read_bytes())
    with pytest.raises(UserError) as error:
        human_sheet.main(score_words(tmp_path, filled, filled, copy, tmp_path / "none.csv"))
    assert [line.partition(": ")[2].partition(";")[0] for line in error.value.problems] == [
        f"identical to {filled}",
        f"identical to {filled}",
        "no such file",
    ]
    lines, key = key_of(tmp_path), tmp_path / "damaged.jsonl"
    for change, told in (
        ({"number": 2}, "number 2 occurs more than once"),
        ({"number": [1]}, "not a key of this script"),
        ({"number": "1"}, "not a key of this script"),
        ({"arm": None}, "not a key of this script"),
        ({"sheet": "s1"}, "lines of more than one sheet"),
    ):
        write_rows(key, [lines[0] | change, *lines[1:]])
        with pytest.raises(UserError, match=told):
            human_sheet.main(score_words(tmp_path, filled, key=key))
    assert not (tmp_path / "scored").exists()


@pytest.mark.parametrize("script", ["downstream", "feature_importance"])
def test_as_programs(files, tmp_path, script):
    done = run_script(f"utility/{script}.py", "--real", files["real"], "--heldout", tmp_path / "none.jsonl")
    assert done.returncode == 2 and "none.jsonl: no such file" in done.stderr and done.stdout == ""


def test_sheet_as_a_program(files, tmp_path):
    words = ["utility/human_sheet.py", "make", "--synthetic", f"a={files['good']}", "--num_rows", "5"]
    done = run_script(*words, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_lines(tmp_path / "key.jsonl")) == 5
