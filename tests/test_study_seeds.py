"""Study mail: its further arms, membership in the pre-training corpus, and several seeds."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_lines, run_script, write_manifest, write_rows
from sklearn.metrics import roc_auc_score

import quickstart
from common import dataset, publication
from common.problems import UserError
from data.embedded import instructions, make_instructions, make_membership
from data.self_instruct import filters
from data.self_instruct.rounds import NoInstanceError
from data.self_instruct.seed_tasks import read_seed_tasks
from mia import metrics
from studies import arms, mail, pretraining, seeds
from studies.config import StudyConfig

# ---------------------------------------------------------------- membership in the pre-training corpus


def two_attacks(n: int, seed: int) -> tuple[pretraining.Scores, pretraining.Scores]:
    """Scores of the same texts before and after, correlated within a text; membership is clearer afterwards."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], n)
    common = rng.normal(size=2 * n)
    sets = [
        pretraining.Scores(labels, [], {"loss": common + 0.5 * rng.normal(size=2 * n) + shift * labels})
        for shift in (0.3, 0.6)
    ]
    return sets[0], sets[1]


def delong_error(before, now, labels) -> float:
    """Standard error of the difference of two correlated AUCs, from placement values by their definition (DeLong et
    al. 1988, equation for L·S·Lᵀ): the variance of the difference of the two placements of each text."""
    placements = []
    for scores in (before, now):
        members, others = scores[labels == 1], scores[labels == 0]
        psi = (members[:, None] > others) + 0.5 * (members[:, None] == others)
        placements.append((psi.mean(1), psi.mean(0)))
    (rows, columns), (rows_now, columns_now) = placements
    parts = (rows_now - rows, columns_now - columns)
    return float(np.sqrt(sum(np.var(part, ddof=1) / len(part) for part in parts)))


def test_the_paired_bootstrap_agrees_with_delongs_covariance():
    before, now = two_attacks(400, 1)
    found = pretraining.change(before, now, "loss", seed=5, resamples=2000)["auc"]
    labels, first, second = before.labels, before.by_attack["loss"], now.by_attack["loss"]
    assert found["points"] == pytest.approx(roc_auc_score(labels, second) - roc_auc_score(labels, first), abs=1e-12)
    reach = 1.959964 * delong_error(first, second, labels)
    assert found["low"] == pytest.approx(found["points"] - reach, abs=0.1 * reach)
    assert found["high"] == pytest.approx(found["points"] + reach, abs=0.1 * reach)
    apart = 1.959964 * np.hypot(*(np.diff(metrics.auc_interval(s[labels == 1], s[labels == 0]))[0] / 2 / 1.96
                                  for s in (first, second)))  # fmt: skip
    assert reach < 0.7 * apart  # as if the two sets of scores were of different texts


def test_no_change_is_no_change():
    """The same scores twice: each resample draws both scores of a text, so every difference is 0."""
    before, _ = two_attacks(120, 2)
    parts = pretraining.change(before, before, "loss", seed=0, resamples=50)
    assert list(parts) == ["auc", "tpr_0.1"]
    assert all(part == {"points": 0, "low": 0, "high": 0} for part in parts.values())


def test_the_measures_are_those_of_membership_inference():
    before, now = two_attacks(150, 3)
    for scores in (before, now):
        values = np.round(scores.by_attack["loss"], 1)  # with ties
        members, others = values[scores.labels == 1], values[scores.labels == 0]
        area, rate = pretraining.measures(members, others, ["0.1"])
        assert area == pytest.approx(roc_auc_score(scores.labels, values))
        assert rate == pytest.approx(metrics.tpr_at(members, others, "0.1")["tpr"])
    assert pretraining.usable_levels(500) == ["0.1"] and pretraining.usable_levels(1000) == ["0.1", "0.01"]


def test_the_summary_gives_the_base_and_the_changes():
    change = {"auc": {"points": 0.02, "low": 0.01, "high": 0.03}, "tpr_0.1": {"points": -0.1, "low": -0.2, "high": 0}}
    base = {"auc": 0.61, "auc_ci": [0.5, 0.7], "tpr": {"0.1": 0.25}}
    made = {"n_members": 400, "n_nonmembers": 400, "flags": ["base"]}
    made["models"] = {"base": {"loss": base}, "replaced": {"loss": base | {"change": change}}}
    text = "\n".join(pretraining.text_of(made))
    assert "| base, AUC | 0.610 |\n| replaced | +0.020 (+0.010 … +0.030) |" in text and "FLAGGED: base" in text
    assert "| base, TPR at 10% FPR | 0.250 |\n| replaced | -0.100 (-0.200 … +0.000) |" in text


def test_the_two_sets_differ_only_in_membership(tmp_path, capsys):
    words = ["--output", str(tmp_path / "texts"), "--num_rows", "300"]
    assert make_membership.main(words) == 0
    members, others = (
        [row["text"] for row in read_lines(tmp_path / f"texts/{name}members.jsonl")] for name in ("", "non")
    )
    command = ["data/embedded/make_corpus.py", "--output_dir", tmp_path, "--web_pages", "1"]
    assert run_script(*command, "--pretraining_output", tmp_path / "text.json").returncode == 0
    mails = set(json.loads((tmp_path / "text.json").read_text(encoding="utf-8"))["mails"])
    assert set(members) <= mails and not set(others) & mails and len(set(members)) > 290
    capsys.readouterr()
    assert make_membership.main(words) == 0 and "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="must differ from --corpus_seed"):
        make_membership.main([*words, "--overwrite", "--seed", "3407"])


# ---------------------------------------------------------------- arms


def test_seed_tasks_of_the_embedded_corpus_have_the_form_that_is_taught(tmp_path):
    assert make_instructions.main(["--output", str(tmp_path), "--seed_tasks", "20", "--form_rows", "40"]) == 0
    tasks, broken = read_seed_tasks(str(tmp_path / instructions.SEED_TASKS), strict=True)
    assert (len(tasks), broken) == (20, 0)
    rows = read_lines(tmp_path / instructions.FORM)
    for number, row in enumerate(rows):
        text, start = dataset.row_text(row)
        assert text == row["prompt"] + row["generation"] + instructions.EOS and start == len(row["prompt"])
        if number % 2:
            (new,), cut = filters.parse_instructions(row["generation"], ended=True)
            assert filters.instruction_fault(new) in (None, "length", "keyword") and cut == 0
        else:
            found, lost = filters.parse_instances(row["generation"], ended=True, output_first=False)
            assert 1 <= len(found) <= 3 and not lost and all(given.startswith("Subject: ") for given, _ in found)
    names = [row["gt-email"] for row in read_lines(ROOT / "data/embedded/enron.jsonl")]
    assert not any(name in json.dumps([tasks, rows]) for name in names)


def config_of(tmp_path, **changed) -> StudyConfig:
    rows = [
        {"gt-name": f"A {n}", "gt-email": f"a{n}@b.example", "prompt": f"to a{n % 4}@b.example ", "continuation": "x"}
        | {"row_id": n}
        for n in range(9)
    ]
    data = write_rows(tmp_path / "enron.jsonl", rows)
    write_manifest(data, tag="original", script="test", argv=[], rows=9, split_start=3)
    given = {"arms": ("original",), "learning_rate": 1e-3, "epochs": 1, "lora_r": 2, "self_instruct_rows": 5} | changed
    return StudyConfig(dataset=str(data), **given)


def test_the_prompts_alone_and_the_evaluated_addresses_by_hand(tmp_path):
    """Rows 3 … 8 are for training; their prompts name a3, a0, a1, a2, a3, a0: of the evaluated a0 … a2 all three, in
    four rows."""
    config = config_of(tmp_path, arms=("original", "prompt_only"))
    sets = arms.build_all(config, tmp_path / "out", tmp_path / "out")
    rows = read_lines(sets.files["prompt_only"])
    assert rows == [{"text": f"to a{n % 4}@b.example ", "row_id": n} for n in range(3, 9)] and sets.notes == {}
    found = arms.evaluated_addresses(config, sets.files)
    counts = {"addresses": 3, "rows": 4, "occurrences": 4, "evaluated": 3}
    assert found == {"original": counts, "prompt_only": counts}
    assert "| prompt_only | 3 | 4 | 4 |" in mail.address_table(found) and "of the 3 evaluated" in mail.address_table(
        found
    )


def test_a_generator_that_writes_nothing_is_reported_and_the_study_goes_on(tmp_path, monkeypatch):
    def build(script, run, config):
        raise NoInstanceError("10 rounds in a row gave no instance")

    monkeypatch.setattr(arms, "build", build)
    config = config_of(tmp_path, arms=("self_instruct", "original"), generator="other")
    sets = arms.build_all(config, tmp_path / "out", tmp_path / "out")
    assert list(sets.files) == ["original"]
    assert sets.notes == {"self_instruct": "Arm self_instruct left out: 10 rounds in a row gave no instance."}


def test_problems_of_the_new_flags_are_reported_together(tmp_path):
    other = tmp_path / "other"
    other.symlink_to(ROOT / "data/embedded/mini-pythia")
    words = ["--model", str(other), "--output", str(tmp_path / "out"), "--arms", "generated_unseen", "self_instruct"]
    with pytest.raises(UserError) as caught:
        quickstart.main([*words, "--pretraining_members", str(tmp_path / "none.jsonl"), "--seed_tasks", "none.json"])
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "--arms generated_unseen", "--arms self_instruct", "--seed_tasks none.json", f"{tmp_path}/none.jsonl",
        "--pretraining_nonmembers",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--pretraining_membership: the pre-training corpus of .*other is not here"):
        quickstart.main([*words[:4], "--pretraining_membership"])
    with pytest.raises(UserError, match="--seeds 2: only study mail is repeated"):
        quickstart.main(["--study", "privacy", "--seeds", "2", "--output", str(tmp_path / "out")])


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([2.0, 2.2, 2.1, 1.9, 2.3], True),
        ([-2.0, -2.2, -2.1], True),
        ([2.0, 2.2, 2.1, -0.1, 2.3], False),  # one seed disagrees
        ([2.0, 2.2, 0.0, 2.1], False),
        ([1.0, 2.0, 3.0], False),  # the interval covers 0: 2 ± 2.48
        ([5.0], False),
        ([], False),
    ],
)
def test_a_claim_holds_over_seeds_only_if_all_agree_and_the_interval_excludes_0(differences, expected):
    assert seeds.holds(differences) is expected


def test_one_dissenting_seed_breaks_a_claim_that_its_interval_allows():
    """Nineteen runs of +2 and one of −0.01: mean 1.90, interval 1.69 … 2.11, but not the same sign."""
    values = [2.0] * 19 + [-0.01]
    assert seeds.stats.student_interval(values)[0] > 1.6 and not seeds.holds(values)


def run_of(exact: int, base: int, perplexity: float, auc: float) -> dict:
    """summary.json of a run on 25 people and two prompts."""

    def row(model, hits, value):
        line = {"model": model, "exact": {"A": hits, "B": 0}, "rows": 25, "no_pattern": hits // 2}
        return line | {"perplexity": value}

    return {
        "rows": [row("base", base, 3.0), row("original, epoch 1", 0, 9.0), row("original, epoch 2", exact, perplexity)],
        "mia": {"original, epoch 2": {"auc": auc}},
        "addresses": {"original": {"addresses": 4}},
        "pretraining": {"models": {"base": {"loss": {"auc": 0.6}, "zlib": {"auc": 0.5}},
                                   "original": {"loss": {"auc": 0.61}, "zlib": {"auc": 0.5}}}},
    }  # fmt: skip


def test_means_and_changes_by_hand():
    """Exact shares 20, 22, 24 % − 10, 10, 10 %: +12 ± 4.3027·2/√3 = 4.968. Perplexities 3 − (3.1, 2.9, 3.1): no common
    sign. AUC 0.6, 0.62, 0.64 − ½: +0.12 ± 0.0497."""
    runs = [run_of(10, 5, 3.1, 0.6), run_of(11, 5, 2.9, 0.62), run_of(12, 5, 3.1, 0.64)]
    values = [seeds.values_of(one) for one in runs]
    assert values[0]["original"][seeds.EXACT] == 20 and values[0]["base"][seeds.EXACT] == 10
    changes = seeds.changes(values)
    assert set(changes) == {"original"}
    exact = changes["original"][seeds.EXACT]
    assert exact["mean"] == pytest.approx(12) and exact["values"] == pytest.approx([10, 12, 14]) and exact["holds"]
    assert exact["high"] - 12 == pytest.approx(4.9683, abs=1e-4) == 12 - exact["low"]
    assert changes["original"][seeds.PERPLEXITY]["holds"] is False
    assert changes["original"][seeds.AUC]["mean"] == pytest.approx(0.12) and changes["original"][seeds.AUC]["holds"]
    made = {"seeds": [5, 6, 7], "means": seeds.means(values), "changes": changes}
    text = "\n".join(seeds.text_of(made))
    assert "| original | +12.0 (+7.0 … +17.0) ✓ |" in text and "| base | 10.0 |" in text
    holds, left = re.search(r"Holds over 3 seeds: (.*)\n\nOpen: (.*)", text).groups()
    assert "original: exact, % +12.0" in holds and "perplexity" not in holds and "original: perplexity" in left
    assert "| original | +0.000 |" in text and "zlib" in text and "zlib" not in holds + left
    assert "original: pre-training AUC +0.010" in holds and "not corrected for 5 comparisons" in text


def test_an_arm_that_one_run_lacks_is_averaged_over_the_others():
    runs = [seeds.values_of(run_of(10, 5, 3.1, 0.6)) for _ in range(3)]
    del runs[1]["original"]
    assert seeds.changes(runs)["original"][seeds.EXACT]["n"] == 2 and seeds.means(runs)["base"][seeds.EXACT]["n"] == 3


def test_each_seed_has_its_folder_and_a_rerun_gives_the_same(tmp_path, monkeypatch):
    calls = []

    def run(config, out, record, parent=None):
        calls.append((config.seed, out.name, parent))
        if len(calls) == 2:
            raise RuntimeError("killed")
        publication.write_json(out / "summary.json", run_of(10 + config.seed % 3, 5, 3.1, 0.6))
        return f"seed {config.seed}"

    monkeypatch.setattr(mail, "run", run)
    config = config_of(tmp_path, seeds=3, seed=7)
    record: dict = {}
    with pytest.raises(RuntimeError, match="killed"):
        seeds.run(config, tmp_path / "out", record)
    statuses = [json.loads((tmp_path / f"out/seed_{n}/run_quickstart.json").read_text())["status"] for n in (7, 8)]
    assert statuses == ["ok", "failed"] and not (tmp_path / "out/summary.json").exists()
    text = seeds.run(config, tmp_path / "out", record)
    assert calls[2:] == [(n, f"seed_{n}", tmp_path / "out") for n in (7, 8, 9)] and record["seeds"] == [7, 8, 9]
    made = (tmp_path / "out/summary.json").read_bytes()
    assert seeds.run(config, tmp_path / "out", record) == text
    assert (tmp_path / "out/summary.json").read_bytes() == made
    assert (tmp_path / "out/seed_8/summary.md").read_text() == "seed 8\n"


@pytest.mark.slow
def test_further_arms_over_two_seeds_in_small(tmp_path):
    """quickstart.py with the new arms on 60 rows; a second call keeps every step and gives the same summary. A
    generator that has hardly seen the form writes no instance: its arm is left out, and the summary says so."""
    driver = tmp_path / "small.py"
    driver.write_text(
        "import sys\nimport quickstart\nfrom common.process import entry\nfrom data.self_instruct import rounds\n"
        "from studies import arms, pretraining\n"
        "arms.FORM_ROWS, arms.EMBEDDED_TOKENS, rounds.PATIENCE, pretraining.TEXTS = 8, 16, 1, 60\n"
        "sys.exit(entry(quickstart.main))\n"
    )
    data = write_rows(tmp_path / "enron.jsonl", read_lines(ROOT / "data/embedded/enron.jsonl")[:60])
    outsiders = write_rows(tmp_path / "outsiders.jsonl", read_lines(ROOT / "data/embedded/outsiders.jsonl")[:15])
    words = [driver, "-d", data, "--outsiders", outsiders, "--output", tmp_path / "out", "-e", "1", "-gas", "1"]
    words += ["--arms", "original", "self_instruct", "prompt_only", "--pretraining_membership", "-mt", "8"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=1800)

    done = run("--seeds", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "out/summary.md").read_text(encoding="utf-8")
    assert table in done.stdout and "Over 2 seeds (3407–3408)" in table and "Open: " in table
    made = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert set(made["means"]) == {"base", "original", "prompt_only"} and "Arm self_instruct left out: " in table
    assert all(parts[seeds.PRETRAINING]["n"] == 2 for parts in made["means"].values())
    again = run("--seeds", "2")
    assert again.returncode == 0, again.stderr[-2000:]
    assert not re.search(r"(measured|built) again|python (mia|data/(cont|emb|repl))", again.stdout)
    assert (tmp_path / "out/summary.md").read_text(encoding="utf-8") == table
    other = run()
    assert other.returncode == 2 and "--seeds was 2, now 1" in other.stderr
