"""Shadow models: what each sees, how it is trained, the scores that they calibrate."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_rows, read_lines, run_script, write_rows
from scipy.stats import norm
from test_cli import HEAVY

from common import shadows, trained
from common.problems import UserError
from common.stats import auc_interval
from mia import calibration
from mia.attacks import Undefined
from mia.dataset import MembershipTask
from mia.shadows import Calibration, add_scores, describe, risk
from mia.signals import Evidence
from shadowing.draw import halves, training_seed

# ---------------------------------------------------------------- formulas


def test_logit_of_the_geometric_mean_probability():
    assert calibration.logit(math.log(0.5)) == pytest.approx(0)
    assert calibration.logit(math.log(0.8)) == pytest.approx(math.log(4))  # 0.8 / 0.2
    assert calibration.logit(-30.0) == pytest.approx(-30.0)
    with pytest.raises(Undefined, match="infinite"):
        calibration.logit(0.0)


def test_pooled_deviation_by_hand():
    # means 2 and 12: squares 1 + 1 + 4 + 4, one degree of freedom each; a single value has none
    assert calibration.pooled_deviation([[1, 3], [10, 14], [7]]) == pytest.approx(math.sqrt(10 / 2))
    assert calibration.pooled_deviation([[1], []]) is None


def test_lira_offline_by_hand():
    assert calibration.lira_offline(4, [1, 2, 3]) == pytest.approx(2)  # mean 2, deviation 1
    assert calibration.lira_offline(4, [1, 3], 4) == pytest.approx(0.5)
    # orders as Φ of Carlini et al. 2022, equation 4, and does not saturate
    signals = [-1.0, 0.5, 2.0, 3.7]
    z = [calibration.lira_offline(signal, [0, 1, 2]) for signal in signals]
    assert norm.cdf(z).tolist() == pytest.approx([1 - norm.sf(signal, 1, 1) for signal in signals])
    assert calibration.lira_offline(30, [0, 1, 2]) > calibration.lira_offline(29, [0, 1, 2])


def test_lira_by_hand_and_as_a_difference_of_log_densities():
    # signal 1; IN N(1, 1), OUT N(0, 2): (0 − log 1) − (−1/8 − log 2)
    assert calibration.lira(1, [0, 2], [-1, 1], 1, 2) == pytest.approx(0.125 + math.log(2))
    rng = np.random.default_rng(0)
    inside, out, signal = rng.normal(1, 1, 5), rng.normal(0, 2, 7), 0.3  # PrivacyGuard's formula, online
    density = norm.logpdf(signal, inside.mean(), inside.std(ddof=1)) - norm.logpdf(signal, out.mean(), out.std(ddof=1))
    assert calibration.lira(signal, inside, out) == pytest.approx(density)


def privacy_meter(target, out, target_z, out_z, a):
    """RMIA as privacy-meter has it: probabilities [n] of the target, [n, K] of OUT models, and of the population."""
    ratio_x = target / ((1 + a) / 2 * out.mean(1) + (1 - a) / 2)
    ratio_z = target_z / ((1 + a) / 2 * out_z.mean(1) + (1 - a) / 2)
    return np.average(ratio_x[:, None] / ratio_z > 1.0, axis=1)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_rmia_is_privacy_meters(a):
    rng = np.random.default_rng(1)
    target, out, target_z, out_z = (rng.uniform(0.05, 0.6, size) for size in (20, (20, 4), 30, (30, 4)))
    own = [calibration.ratio(math.log(p), list(row), a) for p, row in zip(target, out)]
    others = [calibration.ratio(math.log(p), list(row), a) for p, row in zip(target_z, out_z)]
    found = [calibration.rmia(value, others) for value in own]
    assert found == pytest.approx(privacy_meter(target, out, target_z, out_z, a).tolist())


def test_rmia_by_hand():
    # Pr(x) = ½ (1.3 · 0.2 + 0.7) = 0.48
    assert calibration.ratio(math.log(0.24), [0.1, 0.3], 0.3) == pytest.approx(0.5)
    assert calibration.ratio(math.log(0.3), [0.1, 0.3]) == pytest.approx(1.5)  # a = 1: the mean of OUT alone
    assert calibration.rmia(1.0, [0.5, 1.0, 2.0, 0.9]) == 0.5  # 1 / 1 does not exceed γ = 1
    assert calibration.rmia(1.0, [0.5, 1.0, 2.0, 0.9], gamma=1.5) == 0.25


def test_too_few_shadows_are_a_reason():
    for score, words in (
        (lambda: calibration.lira_offline(0, [1]), "shadows that did not see it: 1; 2 needed"),
        (lambda: calibration.lira(0, [1], [1, 2]), "shadows that saw it: 1; 2 needed"),
        (lambda: calibration.lira(0, [1, 2], []), "shadows that did not see it: 0; 2 needed"),
        (lambda: calibration.ratio(-1, [0.1]), "shadows that did not see it: 1; 2 needed"),
        (lambda: calibration.rmia(1, [1.0]), "1 non-members to compare with; 2 needed"),
        (lambda: calibration.lira_offline(0, [1, 1]), "its scores under the shadows do not vary"),
    ):
        with pytest.raises(Undefined, match=words):
            score()


# ---------------------------------------------------------------- the draw


def test_halves_are_complementary_and_copies_stay_together():
    texts = [f"text {n % 37}" for n in range(41)]  # four texts twice
    drawn = halves(texts, 5, 7)
    for first, second in zip(drawn[::2], drawn[1::2]):
        assert sorted(first + second) == list(range(41))
        assert not {texts[index] for index in first} & {texts[index] for index in second}
    assert [len({texts[index] for index in half}) for half in drawn] == [18, 19, 18, 19, 18]
    assert halves(texts, 2, 7) == drawn[:2] and halves(texts, 2, 8) != drawn[:2] and drawn[0] != drawn[2]


def test_a_half_is_a_fair_draw():
    """Each of 10 texts is in the first half of 400 seeds 200 times, give or take 4 deviations of 10."""
    counts = np.zeros(10)
    for seed in range(400):
        counts[halves([str(n) for n in range(10)], 1, seed)[0]] += 1
    assert counts.sum() == 2000 and np.abs(counts - 200).max() < 40


def test_training_seeds_differ():
    assert len({training_seed(seed, number) for seed in (1, 2) for number in range(50)}) == 100


# ---------------------------------------------------------------- scores of sets


def simulated(rng, n, k, effect, shift):
    """(task, evidence of a target, its calibration): n members and n non-members under k shadows.

    ℓ of a text is its own level plus noise, plus `shift` under a shadow that saw it; plus `effect` under the target for
    members.
    """
    texts = [f"text {index}" for index in range(2 * n)]
    labels = [1] * n + [0] * n
    level = rng.normal(-3, 0.5, 2 * n)
    target = level + rng.normal(0, 0.05, 2 * n) + effect * np.array(labels)
    made = Calibration(k, None, {}, {})
    for half in halves(texts, k, int(rng.integers(1 << 30))):
        seen = np.isin(np.arange(2 * n), half)
        for index, value in enumerate(level + rng.normal(0, 0.05, 2 * n) + shift * seen):
            (made.inside if seen[index] else made.out).setdefault(index, []).append(float(value))
    task = MembershipTask(texts, list(range(2 * n)), labels, [], indices=[*range(n), *range(n)])
    tokens = {index: np.full((1, 4), value, np.float64) for index, value in enumerate(target)}
    return task, Evidence(None, tokens), made


def split(column, n):
    return np.array(column[:n]), np.array(column[n:])


def test_without_a_signal_the_intervals_cover_one_half():
    """The target is one of the shadows' distribution and its half says nothing: in 100 draws, the 95 % interval of each
    attack's AUC has 0.5 in 88 or more (fewer in 1 of 300 series by the binomial law)."""
    rng, hits = np.random.default_rng(3), dict.fromkeys(("lira", "lira_offline", "rmia"), 0)
    for _ in range(100):
        task, evidence, made = simulated(rng, 60, 6, 0.0, 0.1)
        found, reasons = {}, {}
        add_scores(task, evidence, made, found, reasons)
        assert not reasons
        for name, column in found.items():
            low, high = auc_interval(*split(column, 60), 0.95)
            hits[name] += low <= 0.5 <= high
    assert min(hits.values()) >= 88, hits


def test_with_a_signal_calibration_beats_the_loss():
    task, evidence, made = simulated(np.random.default_rng(4), 100, 8, 0.15, 0.15)
    found, reasons = {}, {}
    add_scores(task, evidence, made, found, reasons)
    loss = [values[0, 0] for values in evidence.tokens.values()]
    low_of = {name: auc_interval(*split(column, 100), 0.95)[0] for name, column in found.items()}
    assert min(low_of.values()) > 0.9 > auc_interval(*split(loss, 100), 0.95)[1]


def test_scores_of_a_set_are_the_formulas_on_its_texts():
    task, evidence, made = simulated(np.random.default_rng(5), 10, 6, 0.1, 0.1)
    found, reasons = {}, {}
    add_scores(task, evidence, made, found, reasons)
    phi = {kind: {i: [math.log(math.exp(v) / (1 - math.exp(v))) for v in values] for i, values in group.items()}
           for kind, group in (("in", made.inside), ("out", made.out))}  # fmt: skip
    # pooled within texts: every text has 3 shadows of either kind, so the mean of their variances
    s_in, s_out = (math.sqrt(np.mean([np.var(v, ddof=1) for v in phi[kind].values()])) for kind in ("in", "out"))
    for index in range(20):
        p = math.exp(evidence.tokens[index][0, 0])
        signal, inside, out = math.log(p / (1 - p)), phi["in"][index], phi["out"][index]
        density = norm.logpdf(signal, np.mean(inside), s_in) - norm.logpdf(signal, np.mean(out), s_out)
        assert found["lira"][index] == pytest.approx(density)
        assert found["lira_offline"][index] == pytest.approx((signal - np.mean(out)) / s_out)
    ratios = {i: math.exp(evidence.tokens[i][0, 0]) / np.mean(np.exp(made.out[i])) for i in range(20)}
    for index in range(20):
        below = sum(ratios[z] < ratios[index] for z in range(10, 20) if z != index)
        assert found["rmia"][index] == pytest.approx(below / 10)


def test_each_text_has_its_own_deviation_from_64_shadows_on():
    task, evidence, made = simulated(np.random.default_rng(6), 4, 64, 0.1, 0.1)
    found = {}
    add_scores(task, evidence, made, found, {})
    p, out = math.exp(evidence.tokens[0][0, 0]), [math.log(math.exp(v) / (1 - math.exp(v))) for v in made.out[0]]
    z = (math.log(p / (1 - p)) - np.mean(out)) / np.std(out, ddof=1)
    assert made.per_row and found["lira_offline"][0] == pytest.approx(z)


def test_risk_ranks_rows_and_says_what_stood_behind_them():
    task, evidence, made = simulated(np.random.default_rng(7), 5, 4, 0.3, 0.3)
    del made.inside[2], made.out[2]  # not in the pool
    found, reasons = {}, {}
    add_scores(task, evidence, made, found, reasons)
    lines = risk(task, made, found, reasons)
    assert [line["rank"] for line in lines] == [*range(1, 10), None] and {line["attack"] for line in lines} == {"lira"}
    scores = [line["score"] for line in lines[:-1]]
    assert scores == sorted(scores, reverse=True)
    last = lines[-1]
    assert (last["set"], last["row"], last["shadows_in"], last["undefined"]) == (
        "members", 2, 0, "not a row of the shadows' pool"
    )  # fmt: skip
    others = [value for value in found["lira"][5:]]
    for line in lines[:-1]:
        member = line["set"] == "members"
        index = line["row"] + (0 if member else 5)
        assert line["score"] == found["lira"][index] and line["text_sha256"] == trained.text_sha256(task.texts[index])
        above = sum(value >= line["score"] for value in others) - (not member)
        assert line["nonmembers_above"] == pytest.approx(above / (5 - (not member)))
    assert not {"text", "id"} & lines[0].keys()
    results, rows = [{"attack": "lira"}, {"attack": "ref"}], [{} for _ in task.texts]
    describe(made, results, rows)
    assert rows[2] == {"shadows_in": 0, "shadows_out": 0} and rows[3] == {"shadows_in": 2, "shadows_out": 2}
    assert [line["n_shadows"] for line in results] == [4, 0]
    assert results[0]["shadows_in"] == [2, 2] and results[1]["shadows_in"] is None


# ---------------------------------------------------------------- trained ones


def train(*words):
    import run_peft

    return run_peft.main([str(word) for word in words])


def shadow(*words):
    import mia.shadow

    return mia.shadow.main([str(word) for word in words])


def attack(*words):
    import mia.mia

    return mia.mia.main([str(word) for word in words])


TRAINING = ["-e", "2", "--lora_r", "2", "-pdbs", "2", "-gas", "2", "-lr", "1e-2", "--allow_overlap"]


@pytest.fixture(scope="module")
def target(models, tmp_path_factory):
    """(folder with enron.jsonl and other.jsonl, checkpoint-<last> trained on the first with dropout, its base)."""
    root = tmp_path_factory.mktemp("shadows")
    write_rows(root / "enron.jsonl", make_rows(10))
    write_rows(root / "other.jsonl", make_rows(50, seed=5)[40:])
    train("-m", models["llama"], "-i", root / "enron.jsonl", "--output_root", root, "--train_rows", 10, *TRAINING)
    (run,) = root.glob("tiny-llama/*/*")
    return root, run / "checkpoint-6", models["llama"]


def flags(root):
    return "--members", root / "enron.jsonl", "--nonmembers", root / "other.jsonl"


@pytest.fixture(scope="module")
def four(target):
    root, checkpoint, _ = target
    shadow("--like", checkpoint, "--shadows", 4, "--output_dir", root / "four", *flags(root))
    return root / "four"


def texts_of(root):
    from common.dataset import row_text

    return [row_text(row)[0] for name in ("enron", "other") for row in read_lines(root / f"{name}.jsonl")]


def test_what_shadows_leave(target, four):
    root, checkpoint, _ = target
    texts = texts_of(root)
    header, *rows = read_lines(four / shadows.POOL)
    assert [row["sha256"] for row in rows] == [trained.text_sha256(text) for text in texts]
    assert [(row["set"], row["row"]) for row in rows] == [(name, n) for name in shadows.SETS for n in range(10)]
    assert header["settings"] == shadows.settings_of(json.loads((checkpoint.parent / "run.json").read_text()))
    for number, half in enumerate(halves(texts, 4, 3407)):
        saw = trained.read_folder(four / f"shadow-{number}").rows
        assert [row.row for row in saw] == half and len(half) == 10
    for path in four.rglob("*"):
        if path.is_file():
            assert not any(text[:40].encode() in path.read_bytes() for text in texts), path
    found = shadows.read(four)
    assert len(found.trained) == 4 and not found.unfinished
    assert [path.name for path in found.trained[0].checkpoints] == ["checkpoint-3", "checkpoint-6"]
    record = json.loads((four / shadows.RECORD).read_text())
    assert [line["steps"] for line in record["shadows"]] == [6] * 4 and record["target_seconds"] > 0


@pytest.mark.parametrize("number", [0, 3])
def test_a_shadow_is_what_run_peft_trains_on_its_rows(target, four, number, tmp_path):
    """The same file of rows and seed, on a base of its own: bit for bit the adapter that the shared base gave."""
    from safetensors.torch import load_file

    root, _, base = target
    rows = read_lines(root / "enron.jsonl") + read_lines(root / "other.jsonl")
    half = halves(texts_of(root), 4, 3407)[number]
    write_rows(tmp_path / "half.jsonl", [rows[index] for index in half])
    seed = training_seed(3407, number)
    words = ["-m", base, "-i", tmp_path / "half.jsonl", "--output_root", tmp_path, "--train_rows", 10, "--seed", seed]
    train(*words, *TRAINING)
    for step in (3, 6):
        (alone,) = tmp_path.glob(f"tiny-llama/*/*/checkpoint-{step}/adapter_model.safetensors")
        ours = load_file(four / f"shadow-{number}/checkpoint-{step}/adapter_model.safetensors")
        its = load_file(alone)
        assert ours.keys() == its.keys() and all((ours[name] == its[name]).all() for name in ours)


def test_again_and_more(target, four, capsys):
    root, checkpoint, _ = target
    before = {path: path.stat().st_mtime_ns for path in four.glob("shadow-*/**/*") if path.is_file()}
    words = ["--like", checkpoint, "--output_dir", four, *flags(root)]
    shadow(*words, "--shadows", 4)
    assert "4 finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in four.glob("shadow-*/**/*") if path.is_file()}
    shadow(*words, "--shadows", 5, "--dry_run")
    assert "4 finished" in capsys.readouterr().out and not (four / "shadow-4").exists()
    for more in (["--seed", 1], ["--nonmembers", root / "enron.jsonl"]):
        with pytest.raises(UserError) as error:
            shadow(*words, *more)
        assert "choose another directory" in str(error.value) or "0 non-members" in str(error.value)


def test_membership_with_shadows(target, four, tmp_path):
    """lira of two rows again, from transformers and peft alone and scipy's densities."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, checkpoint, base = target
    attack("--model", checkpoint, *flags(root), "--attacks", "loss", "ref", "--shadows", four, "--output_dir", tmp_path)
    lines = {line["attack"]: line for line in read_lines(tmp_path / "results_mia.jsonl")}
    assert list(lines) == ["loss", "ref", "lira", "lira_offline", "rmia"]
    assert [line["n_shadows"] for line in lines.values()] == [0, 0, 4, 4, 4]
    assert lines["lira"]["shadows_in"] == lines["rmia"]["shadows_out"] == [2, 2]
    assert lines["rmia"]["parameters"]["gamma"] == 1 and lines["lira"]["parameters"]["variance"] == "pooled"
    for name in ("lira", "lira_offline", "rmia"):  # the base has no signal, and the sets are alike
        low, high = lines[name]["base"]["auc_ci"]
        assert low <= 0.5 <= high and lines[name]["members_trained"] is True
    scores = read_lines(tmp_path / "scores_mia.jsonl")
    texts = texts_of(root)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def phi(folder):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        values = []
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids])
            with torch.no_grad():
                loss = float(model(ids, labels=ids).loss)
            values.append(math.log(math.exp(-loss) / (1 - math.exp(-loss))))
        return values

    table = np.array([phi(four / f"shadow-{number}/checkpoint-6") for number in range(4)])
    own = phi(checkpoint)
    seen = np.zeros((4, 20), bool)
    for number, half in enumerate(halves(texts, 4, 3407)):
        seen[number, half] = True
    inside = np.array([table[seen[:, i], i] for i in range(20)])
    out = np.array([table[~seen[:, i], i] for i in range(20)])
    s_in, s_out = (np.sqrt(group.var(1, ddof=1).mean()) for group in (inside, out))
    want = norm.logpdf(own, inside.mean(1), s_in) - norm.logpdf(own, out.mean(1), s_out)
    assert [row["lira"] for row in scores] == pytest.approx(want.tolist(), rel=1e-3, abs=1e-3)
    assert {row["shadows_in"] for row in scores} == {2}
    at_risk = read_lines(tmp_path / "risk_mia.jsonl")
    assert len(at_risk) == 20 and at_risk[0]["score"] == pytest.approx(max(want), rel=1e-3)
    # without shadows, an earlier file of theirs goes
    attack("--model", checkpoint, *flags(root), "--attacks", "loss", "--output_dir", tmp_path)
    assert not (tmp_path / "risk_mia.jsonl").exists()
    assert "n_shadows" not in read_lines(tmp_path / "results_mia.jsonl")[0]


def test_the_report_shows_them(target, four, tmp_path):
    """Also where they are null; two models, as of two shadows each and four."""
    import plot_results

    root, checkpoint, _ = target
    two = shutil.copytree(four, tmp_path / "shadows")
    for number in (2, 3):
        shutil.rmtree(two / f"shadow-{number}")
    for name, folder, model in (("a", four, checkpoint), ("b", two, checkpoint.with_name("checkpoint-3"))):
        words = ("--attacks", "loss", "ref", "--bootstrap", 20, "--output_dir", tmp_path / "results" / name)
        attack("--model", model, *flags(root), "--shadows", folder, *words)
    assert plot_results.main([str(tmp_path / "results"), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report/report.html").read_text()
    assert "lira (4 shadows)" in page and "rmia (4 shadows)" in page
    assert "shadows that saw it: 1; 2 needed" in (tmp_path / "report/results.csv").read_text()


def test_an_earlier_epoch_is_compared_with_the_same_epoch(target, four, tmp_path):
    root, checkpoint, _ = target
    first = checkpoint.with_name("checkpoint-3")
    attack("--model", first, *flags(root), "--attacks", "loss", "--shadows", four, "--output_dir", tmp_path / "a")
    alone = shutil.copytree(four, tmp_path / "shadows")
    for folder in alone.glob("shadow-*/checkpoint-6"):
        shutil.rmtree(folder)
    attack("--model", first, *flags(root), "--attacks", "loss", "--shadows", alone, "--output_dir", tmp_path / "b")
    assert [row["lira"] for row in read_lines(tmp_path / "a/scores_mia.jsonl")] == [
        row["lira"] for row in read_lines(tmp_path / "b/scores_mia.jsonl")
    ]
    attack("--model", checkpoint, *flags(root), "--attacks", "loss", "--shadows", alone, "--output_dir", tmp_path / "c")
    lines = read_lines(tmp_path / "c/results_mia.jsonl")
    assert {line["undefined"] for line in lines[1:]} == {"the shadows have no checkpoint of the target's epoch"}


def test_null_with_a_reason(target, four, tmp_path):
    """Two shadows; a target of other settings; texts that are not those of the pool; a model without a run.json."""
    root, checkpoint, base = target

    def undefined(model, folder, *more):
        out = tmp_path / "out"
        attack("--model", model, *flags(root), "--attacks", "loss", "--shadows", folder, "--output_dir", out, *more)
        lines = read_lines(out / "results_mia.jsonl")
        assert lines[0]["auc"] is not None and all(line["auc"] is None for line in lines[1:])
        assert all(line["rank"] is None and line["undefined"] for line in read_lines(out / "risk_mia.jsonl"))
        shutil.rmtree(out)
        return {line["attack"]: line["undefined"] for line in lines[1:]}

    two = shutil.copytree(four, tmp_path / "two")
    for number in (2, 3):
        shutil.rmtree(two / f"shadow-{number}")
    words = "shadows that did not see it: 1; 2 needed"
    assert undefined(checkpoint, two) == {
        "lira": "shadows that saw it: 1; 2 needed", "lira_offline": words, "rmia": words
    }  # fmt: skip
    other = shutil.copytree(checkpoint.parent, tmp_path / "other")
    record = json.loads((other / "run.json").read_text())
    record["args"]["learning_rate"] = 0.5
    (other / "run.json").write_text(json.dumps(record))
    found = undefined(other / checkpoint.name, four)
    assert set(found.values()) == {"the shadows were trained with another learning_rate"}
    found = undefined(checkpoint, four, "--text_field", "prompt")
    assert set(found.values()) == {"not a row of the shadows' pool"}
    found = undefined(base, four)
    assert set(found.values()) == {"no run.json beside the model: it is unknown whether the shadows were trained alike"}


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call(*words)
    return "\n".join(error.value.problems)


def test_refusals(target, four, tmp_path):
    root, checkpoint, base = target
    place = ("--output_dir", tmp_path / "s")
    assert "no such directory" in refused(shadow, "--like", tmp_path / "none", *place)
    assert "no run.json beside it" in refused(shadow, "--like", base, *place)
    for key, value, words in (
        ("dp", True, "was trained with --dp"),
        ("peft_type", "full", "is fully fine-tuned"),
        ("newest", 1, "unknown arguments newest"),
        ("scheduler", "reduce_lr_on_plateau", "follows held-out rows"),
        ("epochs", "two", "epochs: expected int, got str"),
    ):
        run = shutil.copytree(checkpoint.parent, tmp_path / "run", dirs_exist_ok=True)
        record = json.loads((checkpoint.parent / "run.json").read_text())
        record["args"][key] = value
        (run / "run.json").write_text(json.dumps(record))
        assert words in refused(shadow, "--like", run / checkpoint.name, *flags(root), *place)
    wrong = refused(shadow, "--like", checkpoint, "--members", root / "other.jsonl",
                    "--nonmembers", root / "enron.jsonl", *place)  # fmt: skip
    assert "trained on" in wrong
    wrong = refused(shadow, "--like", checkpoint, *place, "--shadows", 0, "--members", tmp_path / "none.jsonl")
    assert "--shadows: must be 1 or more" in wrong
    wrong = refused(shadow, "--like", checkpoint, *place, "--members", tmp_path / "x.jsonl", "--nonmembers", "y.jsonl")
    assert "x.jsonl" in wrong and "y.jsonl" in wrong
    assert not (tmp_path / "s").exists()
    words = ("--model", checkpoint, *flags(root), "--output_dir", tmp_path / "r")
    assert "no pool.jsonl in it" in refused(attack, *words, "--shadows", tmp_path)
    assert "needs --shadows" in refused(attack, *words, "--attacks", "lira")
    broken = shutil.copytree(four, tmp_path / "broken")
    lines = read_lines(broken / shadows.POOL)
    write_rows(broken / shadows.POOL, [lines[0], *reversed(lines[1:])])
    assert "is not that of pool.jsonl" in refused(attack, *words, "--shadows", broken)
    assert "another members or non-members" in refused(
        shadow, "--like", checkpoint, *flags(root), "--output_dir", broken
    )
    write_rows(broken / shadows.POOL, lines)
    adapter = broken / "shadow-1/checkpoint-3/adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:100])
    assert str(adapter) in refused(attack, *words, "--shadows", broken)
    for file in broken.glob("shadow-*/run.json"):
        file.unlink()
    assert "none of its shadows is finished" in refused(attack, *words, "--shadows", broken)


def test_a_missing_file_is_told_without_importing_torch(target, tmp_path):
    _, checkpoint, _ = target
    words = ["x", "--like", checkpoint, "--members", tmp_path / "none.jsonl", "--output_dir", tmp_path / "s"]
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY[:4]!r}))\n"
        f"sys.argv = {[str(word) for word in words]!r}\n"
        f"runpy.run_path({str(ROOT / 'mia/shadow.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and str(tmp_path / "none.jsonl") in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_other_adapters(models, kind, tmp_path):
    """The last of two shadows is what run_peft.py trains: the first left the base as it was, or had one of its own."""
    from safetensors.torch import load_file

    write_rows(tmp_path / "enron.jsonl", make_rows(6))
    write_rows(tmp_path / "other.jsonl", make_rows(50, seed=5)[44:])
    rest = ["-pt", kind, *TRAINING, "-e", 1, "--packing"]
    words = ["-m", models["llama"], "-i", tmp_path / "enron.jsonl", "--output_root", tmp_path, "--train_rows", 6]
    train(*words, *rest)
    (checkpoint,) = tmp_path.glob("tiny-llama/*/*/checkpoint-*")
    shadow("--like", checkpoint, "--shadows", 2, "--output_dir", tmp_path / "two", *flags(tmp_path))
    rows = read_lines(tmp_path / "enron.jsonl") + read_lines(tmp_path / "other.jsonl")
    half = halves(texts_of(tmp_path), 2, 3407)[1]
    write_rows(tmp_path / "half.jsonl", [rows[index] for index in half])
    words = ["-m", models["llama"], "-i", tmp_path / "half.jsonl", "--output_root", tmp_path / "again"]
    train(*words, "--train_rows", 6, "--seed", training_seed(3407, 1), *rest)
    (alone,) = (tmp_path / "again").glob("tiny-llama/*/*/checkpoint-*/adapter_model.safetensors")
    (ours,) = (tmp_path / "two/shadow-1").glob("checkpoint-*/adapter_model.safetensors")
    ours, its = load_file(ours), load_file(alone)
    assert ours.keys() == its.keys() and all((ours[name] == its[name]).all() for name in ours)


def test_two_ranks_train_the_shadows_of_one(target, four, tmp_path):
    from safetensors.torch import load_file

    root, checkpoint, _ = target
    words = ["--like", checkpoint, "--shadows", 3, "--output_dir", tmp_path / "s", *flags(root)]
    done = run_script("mia/shadow.py", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    for number in range(3):
        file = Path(f"shadow-{number}/checkpoint-6/adapter_model.safetensors")
        ours, its = load_file(tmp_path / "s" / file), load_file(four / file)
        assert all((ours[name] == its[name]).all() for name in ours)
    assert len(json.loads((tmp_path / "s" / shadows.RECORD).read_text())["shadows"]) == 3
