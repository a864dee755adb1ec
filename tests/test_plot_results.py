"""plot_results.py on hand-made trees whose numbers are known, on the toolkit's own files, and in a real browser."""

import csv
import html
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
from conftest import ROOT

import plot_results
from common.problems import UserError
from reporting import caveats, figures, figures_extraction, load, responses, style, svg
from reporting.labels import fixed_models
from reporting.table import Model

HAS_BROWSER = pytest.mark.skipif(not browser.find(), reason="no Chromium here: apt-get install chromium")
RUN = {"schema": 1, "argv": ["run_peft.py"], "args": {}, "commit": "c" * 40, "dirty": False, "packages": {}, "seed": 1}
RUN |= {"start": "2026-01-02T03:04:05+00:00", "status": "ok", "seconds": 60.0, "peak_memory": {"cpu_bytes": 2**30}}


def put(path: Path, *lines, indent=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False, indent=indent) + "\n" for line in lines), "utf-8")
    return path


def extraction_line(model, temperature=0.2, exact=(20, 10), loose=(40, 30), total=100, **more) -> dict:
    """A line as measure_purified.py writes it, templates A and B; interval ends that occur nowhere else."""
    counts = {"matches": loose, "exact": exact, "local_part": exact, "domain": loose, "no_pattern": (1, 0)}
    line = {name: {"A": pair[0], "B": pair[1], "total": total} for name, pair in counts.items()}
    line["ci95"] = {name: {"A": [0.11, 0.33], "B": [0.05, 0.18], "total": [0.1, 0.21]} for name in counts}
    line["floor"] = {"rule": "first.last", "domain_guess": "norbeck.example", "matches": 15, "exact": 12}
    line["floor"] |= {"local_part": 30, "domain": 15}
    line["truth_logprob"] = {"A": -1.5, "B": -2.5}
    line["probabilistic"] = {name: {"1": {"rows": 20, "expected": 19.5}} for name in "AB"}
    line |= {"model": str(model), "base_model": "base/tiny", "model_sha256": "ab", "revision": None, "dtype": "float32"}
    line |= {"relative_change": 0.02, "privacy": None, "temperature": temperature, "headline": temperature == 0.2}
    line |= {"dataset": "data/enron.jsonl", "dataset_sha256": "d", "rows": [0, total, total], "attack": "templates"}
    line |= {"templates": "released", "trailing_space": False, "demonstrations_sha256": "e", "top_k": 100}
    line |= {"max_tokens": 15, "seed": 3407, "n_requested": 2 * total, "n_scored": 2 * total, "n_dropped": 0}
    return line | {"n_scored_by_template": {"A": total, "B": total}, "dropped": {}} | more


def perplexity_line(model, mean=7.25, **more) -> dict:
    line = {"model": str(model), "base_model": "base/tiny", "model_sha256": "ab", "dataset": "data/enron.jsonl"}
    line |= {"dataset_sha256": "d", "rows": [0, 100, 100], "dtype": "float32", "seed": 1, "mean": mean}
    line |= {"token_weighted": mean - 0.5, "median": mean - 1, "bits_per_byte": 1.0, "mean_ci": [mean - 1, mean + 1]}
    line |= {"token_weighted_ci": [mean - 1, mean + 1], "undefined": {}, "n_requested": 100, "n_scored": 100}
    return line | {"n_dropped": 0, "context": 512, "stride": 256, "relative_change": 0.02} | more


def mia_line(model, attack="ref", auc=0.625, flags=(), **more) -> dict:
    points = {"0.01": {"tpr": 0.04, "tpr_ci": [0.02, 0.07], "false_positives": 3, "undefined": None}}
    blind = {"blind_bow": {"auc": 0.61, "auc_ci99": [0.55, 0.66], "tpr_at_fpr": {"0.01": 0.03}, "undefined": None}}
    line = {"attack": attack, "headline": attack == "ref", "parameters": {}, "auc": auc}
    line |= {"auc_ci": [auc - 0.03, auc + 0.03]}
    line |= {"tpr_at_fpr": {"0.01": 0.04}, "tpr_at_fpr_ci": {"0.01": [0.02, 0.07]}, "points": points, "undefined": None}
    line |= {"n_requested": 400, "n_scored": 400, "n_dropped": 0, "dropped": {}, "n_members": 200, "n_nonmembers": 200}
    line |= {"blind": blind, "base": {"auc": None, "auc_ci": None, "undefined": "compares with the base"}}
    line |= {"near_duplicates": {"pairs": 0, "members": 0, "nonmembers": 0}, "flags": list(flags), "model": str(model)}
    line |= {"base_model": "base/tiny", "reference": "base/tiny", "model_sha256": "ab", "members": "data/enron.jsonl"}
    return line | {"nonmembers": None, "max_length": 512, "dtype": "float32", "bootstrap": 1000, "seed": 1} | more


def scores(path: Path, n: int = 400) -> Path:
    rng = random.Random(1)
    lines = [
        {
            "id": i,
            "label": i % 2,
            "ref": rng.gauss(i % 2, 1),
            "loss": rng.gauss(0.1 * (i % 2), 1),
            "blind_bow": rng.gauss(0.2 * (i % 2), 1),
        }
        for i in range(n)
    ]
    return put(path, *lines)


def run_folder(root: Path, arm="original", rate="2e-06", epochs=2, per=10, model="tiny", peft="lora", **more) -> Path:
    """A run directory with run.json, metrics.jsonl and empty checkpoint directories."""
    folder = root / model / f"{arm}-{peft}" / f"0e+00_{rate}"
    args = {"model": f"base/{model}", "learning_rate": float(rate), "weight_decay": 0, "epochs": epochs}
    run = RUN | {"args": args | {"peft_type": peft}, "data_tag": arm, "steps": epochs * per, "relative_change": 0.02}
    put(folder / "run.json", run | {"tokens_per_second": 1234.5} | more, indent=1)
    put(
        folder / "metrics.jsonl",
        *(
            {"step": s, "epoch": s / per, "loss": 3 - s / (epochs * per), "lr": 1e-6, "grad_norm": 0.1}
            for s in range(1, epochs * per + 1)
        ),
    )
    for epoch in range(1, epochs + 1):
        (folder / f"checkpoint-{epoch * per}").mkdir()
    return folder


def small_tree(root: Path) -> Path:
    """Base and one run of two epochs, measured by every script of System P."""
    run = run_folder(root)
    put(
        root / "base" / "results_purified.jsonl",
        *(extraction_line("base/tiny", t, (10, 5), (30, 25)) for t in (0.0, 0.2)),
    )
    put(root / "base" / "perplexity.jsonl", perplexity_line("base/tiny", 9.5))
    for epoch, hits in ((1, (15, 7)), (2, (20, 10))):
        checkpoint = run / f"checkpoint-{10 * epoch}"
        put(checkpoint / "results_purified.jsonl", *(extraction_line(checkpoint, t, hits) for t in (0.0, 0.2, 1.0)))
        put(checkpoint / "results_mia.jsonl", mia_line(checkpoint), mia_line(checkpoint, "loss", 0.51))
        scores(checkpoint / "scores_mia.jsonl")
    put(run / "perplexity.jsonl", *(perplexity_line(run / f"checkpoint-{10 * e}", 8.5 - e) for e in (1, 2)))
    return root


def synthetic_tree(root: Path) -> Path:
    """Fidelity, utility, importance, canaries and DP, as the scripts of System S write them."""
    for arm, epsilon in (("synthetic-dp", 8.0), ("synthetic-no_dp", None)):
        run = run_folder(root, arm)
        for epoch in (1, 2):
            put(run / f"checkpoint-{10 * epoch}" / "privacy.json", privacy_block(epsilon and epsilon * epoch / 2))
    measures = {"words a review": 50.0, "Frechet distance": 0.2, "Jensen-Shannon word frequencies (bits)": 0.13,
                "MAUVE (low, high: of 5 seeds)": 0.9, "self-BLEU": 0.5, "cut at the token limit": 0.2}  # fmt: skip
    arms = {}
    for arm, factor in (("real", 1.0), ("no_dp", 0.9), ("dp", 0.8)):
        found = {
            name: {"value": v * factor, "low": v * factor * 0.9, "high": v * factor * 1.1}
            for name, v in measures.items()
        }
        arms[arm] = {"rows": 500, "n_requested": 600, "n_dropped": 0, "n_scored": 500, "measures": found}
    content = {"schema": 1, "rows": 500, "paired_with_real": True, "settings": {"seed": 1}, "comparisons": arms}
    put(root / "fidelity" / "results_fidelity.json", content, indent=1)
    lines = []
    for arm, base in (("real", 0.76), ("no_dp", 0.74), ("dp", 0.6)):
        for seed in (1, 2):
            score = {"accuracy": base + seed / 100, "macro_f1": base - 0.2, "mae": 1 - base, "train_rows": 300}
            score |= {"accuracy_ci95": [base - 0.05, base + 0.05], "n_requested": 400, "n_scored": 400, "n_dropped": 0}
            score["mcnemar_against_real"] = {"gained": 3, "lost": 9, "p": 0.15}
            lines.append({"arm": arm, "seed": seed, **score})
        mean = {
            name: {"mean": lines[-1][name], "sd": 0.01, "low": lines[-2][name], "high": lines[-1][name]}
            for name in ("accuracy", "macro_f1", "mae")
        }
        lines.append({"arm": arm, "seed": None, "seeds": [1, 2], **mean})
    for arm, value in (("base", 0.55), ("majority", 0.63)):
        score = {"accuracy": value, "macro_f1": 0.2, "mae": 0.5, "accuracy_ci95": [value - 0.05, value + 0.05]}
        lines.append({"arm": arm, "seed": None, **score, "n_requested": 400, "n_scored": 400, "n_dropped": 0})
    put(root / "utility" / "results_utility.jsonl", *lines)
    found = {
        arm: {
            "mean": {"spearman": v, "jaccard@20": v / 2},
            "sd": {},
            "n_requested": 2,
            "n_dropped": 0,
            "seeds": [{"spearman": v - 0.05, "jaccard@20": v / 2}, {"spearman": v + 0.05, "jaccard@20": v / 2}],
        }
        for arm, v in (("real", 0.95), ("no_dp", 0.4), ("dp", 0.6), ("null", 0.01))
    }
    put(root / "utility" / "feature_importance.json", {"rows": 300, "heldout_rows": 200, "words": 50, "arms": found})
    cells = {name: {"count": n, "ci95": [n / 60, n / 40]} for name, n in (("good", 30), ("gibberish", 20))}
    sheets = {"n_requested": 50, "n_scored": 50, "n_dropped": 0, "sheets": [cells, cells]}
    human = {"schema": 1, "labels": ["good", "gibberish"], "arms": {"no_dp": sheets, "dp": sheets}}
    put(root / "human" / "human_evaluation.json", human | {"agreement": {"fleiss_kappa": 0.75, "cohen_kappa": []}})
    canaries = []
    for arm, factor in (("no_dp", 1), ("with_dp", 0.3)):
        for repetitions in (16, 4, 1, 0):
            middle = 1 + factor * repetitions / 2
            bits = {"mean": middle + 0.4, "q05": 0.1, "q25": middle * 0.7, "median": middle, "q75": middle * 1.2}
            line = {"measure": "exposure", "arm": arm, "kind": "ladder" if repetitions else "held_out"}
            line |= {"repetitions": repetitions, "n_requested": 10, "n_scored": 10, "n_dropped": 0, "references": 1000}
            canaries.append(
                line
                | {
                    "bits": bits | {"q95": 9.9},
                    "ceiling": 9.97,
                    "space_bits": 29.9,
                    "p_above_held_out": 0.01,
                    "extrapolated": None,
                }
            )
            for part in ("name", "whole"):
                rows = int(repetitions * factor)
                cell = {"rows": rows, "canaries": 1, "rate": rows / 500, "ci": [rows / 900, (rows + 4) / 500]}
                line = {"measure": "count", "arm": arm, "kind": "ladder", "repetitions": repetitions, "part": part}
                line |= {"n_canaries": 10, "n_requested": 500, "n_scored": 500, "n_dropped": 0}
                canaries.append(line | {how: cell | {"fisher_p": {}} for how in ("exact", "normalised")})
        lower = {"95": 3.25 if arm == "no_dp" else 2.5, "99.9": 0.5}
        line = {"measure": "audit", "arm": arm, "signal": "log-probability", "n_requested": 200, "n_scored": 200}
        line |= {"n_dropped": 0, "included": 99, "auc": 0.7, "lower": lower, "guesses": [], "delta": 1e-5}
        upper = None if arm == "no_dp" else 2.0
        line |= {"upper": upper, "unit": "record", "void": None, "heuristic": {"note": "", "bound": {"epsilon": 1.0}}}
        canaries.append(line | {"above_upper": {"95": upper is not None, "99.9": False}})
    put(root / "canary" / "results_canary.jsonl", *canaries)
    return root


def privacy_block(epsilon, void=None) -> dict:
    block = {"private": epsilon is not None, "epsilon": epsilon, "epsilon_rdp": epsilon and epsilon * 1.25}
    block |= {
        "void": void,
        "delta": 1e-5,
        "noise_multiplier": 0.8 if epsilon else 0.0,
        "max_grad_norm": 1.0,
        "sample_rate": 0.01,
    }
    return block | {"steps": 20, "num_units": 10000, "unit": "record", "accountant": "prv", "adjacency": "add/remove"}


def released_tree(root: Path) -> Path:
    """What the released System P tool leaves: loose matches alone, no model name, an odd file name, an empty file."""
    for epoch in (69, 138):
        folder = root / "pythia-1.4b" / "self-generated-pythia-12b-lora" / "0e+00_2e-06" / f"checkpoint-{epoch}"
        put(
            folder / "results_purified.jsonl",
            *(
                {
                    "matches": {"A": 56 + epoch, "B": 58, "C": 33, "D": 31, "total": 1000},
                    "model": None,
                    "temperature": temperature,
                    "top_k": 100,
                }
                for temperature in (0.01, 0.2, 0.5)
            ),
        )
    (folder / "results_purified1jsonl").write_text("")
    model = "./pythia-1.4b/self-generated-pythia-12b-lora/0e+00_2e-06/checkpoint-138"
    text = f"model path: {model}; mean perplexity: 12.5\n"
    (root / "pythia-1.4b" / "perplexity.txt").write_text(text)
    return root


def large_tree(root: Path, checkpoints: int = 200) -> Path:
    """5 arms × 10 learning rates × 4 epochs, 8 temperatures, perplexity and membership inference of each."""
    rng = random.Random(0)
    put(root / "base" / "results_purified.jsonl", *(extraction_line("base/tiny", t) for t in TEMPERATURES))
    put(root / "base" / "perplexity.jsonl", perplexity_line("base/tiny", 9.5))
    arms = ("original", "replaced", "self-generated-big", "self-instruct-big", "synthetic-dp")
    for index in range(checkpoints // 4):
        run = run_folder(root, arms[index % 5], f"{index // 5 + 1}e-06", epochs=4, per=69)
        lines = []
        for epoch in range(1, 5):
            checkpoint = run / f"checkpoint-{69 * epoch}"
            exact = [rng.randint(10, 40) for _ in "AB"]
            put(checkpoint / "results_purified.jsonl", *(extraction_line(checkpoint, t, exact) for t in TEMPERATURES))
            put(
                checkpoint / "results_mia.jsonl",
                *(
                    mia_line(checkpoint, a, rng.uniform(0.4, 0.7))
                    for a in ("ref", "loss", "zlib", "min_k_20", "min_k_pp_20")
                ),
            )
            lines.append(perplexity_line(checkpoint, rng.uniform(6, 12)))
        put(run / "perplexity.jsonl", *lines)
    return root


TEMPERATURES = (0.01, 0.1, 0.2, 0.5, 0.75, 1.0, 1.25, 1.5)


def report(*words) -> tuple[int, list[dict], str]:
    """(exit status, rows of results.csv, the page) of a run without image files."""
    output = Path(words[words.index("--output") + 1])
    status = plot_results.main([str(word) for word in words] + ["--no_figures"])
    with open(output / "results.csv", encoding="utf-8", newline="") as file:
        return status, list(csv.DictReader(file)), (output / "report.html").read_text(encoding="utf-8")


def rows_with(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]


def test_every_number_of_a_small_tree_is_in_the_table_with_its_line(tmp_path):
    tree = small_tree(tmp_path / "tree")
    status, rows, page = report(tree, "--output", tmp_path / "out")
    assert status == 0
    last = "tiny/original-lora/0e+00_2e-06/checkpoint-20/results_purified.jsonl"
    (row,) = rows_with(
        rows, area="extraction", metric="exact", file=last, template="A", temperature="0.2", role="target"
    )
    # 20 of 100 as in extraction_line; interval as stored; the second line of the file has temperature 0.2
    assert (row["value"], row["low"], row["high"], row["count"], row["n"]) == ("0.2", "0.11", "0.33", "20", "100")
    assert (row["line"], row["headline"], row["model"], row["epoch"]) == ("2", "True", "original · epoch 2", "2.0")
    assert (row["learning_rate"], row["peft_type"], row["step"], row["arm"]) == ("2e-06", "lora", "20", "original")
    assert row["interval"] == "Clopper–Pearson 95 %" and json.loads(row["settings"])["top_k"] == 100
    (row,) = rows_with(rows, metric="exact", file=last, template="all", temperature="0.2", role="target")
    assert (float(row["value"]), row["count"], row["n"], row["low"]) == (0.15, "30", "200", "0.1")
    (row,) = rows_with(rows, metric="mean", model="original · epoch 1")
    assert (row["value"], row["low"], row["high"], row["line"]) == ("7.5", "6.5", "8.5", "1")
    (row,) = rows_with(rows, metric="tpr", attack="ref", file=last.replace("purified", "mia"), role="target")
    assert (row["value"], row["level"], row["count"], row["headline"]) == ("0.04", "0.01", "3", "True")
    assert {row["value"] for row in rows_with(rows, metric="auc", role="blind")} == {"0.61"}
    floor = rows_with(rows, metric="exact", role="floor", temperature="0.2")
    assert {(row["value"], row["attack"]) for row in floor} == {("0.12", "first.last@norbeck.example")}
    shown = (f"{last}:2", "original · epoch 2", "15.0%", "10.0%–21.0%", "30 of 200", "0.625", "0.595–0.655", "6.50")
    assert [text for text in shown if text not in page] == []
    assert "checkpoint-20" in page and "ccccccccc" in page  # the provenance of the run
    assert 'href="figures/' not in page  # --no_figures: no link leads nowhere


def test_intervals_that_the_line_lacks_are_clopper_pearson(tmp_path):
    tree = released_tree(tmp_path / "tree")
    status, rows, page = report(tree, "--output", tmp_path / "out")
    assert status == 1  # the empty file
    (row,) = rows_with(rows, metric="matches", template="B", temperature="0.2", step="138")
    assert row["count"] == "58" and row["interval"].endswith("computed here")

    def at_most(k: int, p: float) -> float:  # the binomial's distribution, summed term by term
        return math.fsum(math.comb(1000, i) * p**i * (1 - p) ** (1000 - i) for i in range(k + 1))

    # the ends are where 58 or more, and 58 or fewer, of 1000 have probability 2.5 %
    assert 1 - at_most(57, float(row["low"])) == pytest.approx(0.025, abs=1e-9)
    assert at_most(58, float(row["high"])) == pytest.approx(0.025, abs=1e-9)
    assert (row["arm"], row["learning_rate"], row["epoch"]) == ("generated", "2e-06", "2.0")
    assert not rows_with(rows, metric="exact")
    assert rows_with(rows, metric="mean")[0]["value"] == "12.5" and rows_with(rows, metric="mean")[0]["step"] == "138"
    assert "loose matches only" in page and "results_purified1jsonl:1: empty" in page


def test_synthetic_study_in_the_table(tmp_path):
    tree = synthetic_tree(tmp_path / "tree")
    status, rows, page = report(tree, "--output", tmp_path / "out")
    assert status == 0
    (row,) = rows_with(rows, metric="Frechet distance", arm="no_dp", role="target")
    assert float(row["value"]) == pytest.approx(0.18) and row["n"] == "500"
    (row,) = rows_with(rows, area="utility", metric="accuracy", arm="dp", role="mean")
    assert (row["value"], row["low"], row["high"], row["n"]) == ("0.62", "0.61", "0.62", "2")
    (row,) = rows_with(rows, area="importance", metric="spearman", arm="dp")
    assert row["value"] == "0.6" and row["interval"] == "range over 2 draws"
    (row,) = rows_with(rows, area="human", metric="good", arm="dp", template="sheet 2")
    assert (row["value"], row["count"], row["n"], row["low"]) == ("0.6", "30", "50", "0.5")
    assert "Fleiss κ 0.75" in page
    (row,) = rows_with(rows, metric="exposure", arm="no_dp", repetitions="16")
    assert (row["value"], row["interval"]) == ("9.0", "quartiles over canaries")  # 1 + 16 / 2
    place = "tiny/synthetic-{}-lora/0e+00_2e-06/checkpoint-20/privacy.json"
    (row,) = rows_with(rows, metric="ε upper (PRV)", file=place.format("dp"))
    assert (row["value"], row["level"], row["n"]) == ("8.0", "1e-05", "10000")
    (row,) = rows_with(rows, metric="ε upper (PRV)", file=place.format("no_dp"))
    assert row["value"] == "" and row["undefined"] == "no noise: ε is infinite"
    titles = re.findall(r"<figure id=\"fig-(\w+)", page)
    assert titles == [
        "overview",
        "epsilon",
        "epsilon_utility",
        "exposure",
        "canary_counts",
        "fidelity",
        "utility",
        "importance",
        "human",
        "training",
    ]


def test_canaries_of_two_files_are_not_joined(tmp_path):
    for name in ("one", "two"):
        synthetic_tree(tmp_path / name)
    study = load.read([tmp_path])
    drawn = {figure.name: figure for figure in figures.build(study)}
    series = [part.partition(": ")[0] for part in drawn["exposure"].summary.split("; ")]
    assert series == [f"{arm} ({name}/canary)" for name in ("one", "two") for arm in ("no_dp", "with_dp")]
    assert "no_dp (one/canary)" in drawn["epsilon"].summary and "no_dp (two/canary)" in drawn["canary_counts"].summary


def test_a_run_is_one_place_however_it_is_called(tmp_path, monkeypatch):
    """Its folder given twice, by another path or a link; its checkpoint with an audit and a merge of it."""
    tree = synthetic_tree(tmp_path / "tree")
    runs = {"no_dp": "synthetic-no_dp", "with_dp": "synthetic-dp"}
    checkpoints = {arm: f"tiny/{run}-lora/0e+00_2e-06/checkpoint-20" for arm, run in runs.items()}
    put(
        tree / "canary" / "run_canary.json",
        RUN | {"args": {"models": [f"{arm}=./tree/{place}" for arm, place in checkpoints.items()]}},
    )
    file = tree / "canary" / "results_canary.jsonl"
    file.write_text(file.read_text().replace('"upper": 2.0', '"upper": 8.0'))  # as the checkpoint's privacy.json
    put(tree / "merged" / "privacy.json", privacy_block(8.0))
    put(tree / "merged" / "run_merge_peft.json", RUN | {"args": {"model": f"tree/{checkpoints['with_dp']}"}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tree)
    (tree / "canary2").mkdir()
    (tree / "canary2" / "results_canary.jsonl").symlink_to(file)
    study = load.read([Path(one) for one in ("tree", "./tree/../tree", str(tree), "link", "tree/tiny", "link/canary")])
    assert len({row.file for row in study.select("canary")}) == 1
    (figure,) = [one for one in figures.build(study) if one.name == "epsilon"]
    assert figure.caption.endswith("hence no upper bound: synthetic-no_dp · epoch 2.")
    assert figure.summary.split("; ") == [
        "with_dp: ε upper (PRV) 8",
        "with_dp: ε upper (RDP) 10",
        "no_dp: ε lower 3.25",
        "with_dp: ε lower 2.5",
    ]
    assert svg.svg(figure.panels[0], "e", "e").count(">with_dp<") == 1


def test_bounds_by_f_dp_are_drawn_and_contradict_nothing(tmp_path):
    """Above the accountant's 2 at both levels, beside a bound of Steinke's below it: drawn, in the table, no alarm."""
    tree = synthetic_tree(tmp_path / "tree")
    file = tree / "canary" / "results_canary.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["measure"] == "audit":
            line["lower"], line["above_upper"] = {"95": 1.5, "99.9": 0.5}, {"95": False, "99.9": False}
            own = {"power": {"95": 6.0, "99.9": 5.0}, "guesses": [], "lower_undefined": {"95": None, "99.9": None}}
            line["f_dp"] = {
                "epsilon_delta": own | {"delta": 1e-5, "lower": {"95": 1.625, "99.9": 0.625}},
                "gaussian": own | {"delta": 1e-5, "lower": {"95": 3.5, "99.9": 2.25}},
            }
    put(file, *lines)
    assert "contradicts the accountant" not in titles(tree, "wrong") and "lower 3.50" not in titles(tree, "wrong")
    study = load.read([tree])
    (figure,) = [one for one in figures.build(study) if one.name == "epsilon"]
    assert "with_dp: ε lower, f-DP 1.62" in figure.summary and "f-DP if Gaussian 3.5" in figure.summary
    assert "2.25" not in figure.summary and "contradicts no proof" in figure.caption
    assert {"ε lower, f-DP", "ε lower, f-DP if Gaussian"} <= {key[0] for key in figure.keys}
    at_999 = study.select("canary", "ε lower, f-DP if Gaussian at 99.9 %")
    assert {(row.value, row.level, row.settings["power"]["99.9"]) for row in at_999} == {(2.25, "99.9", 5.0)}


def test_bounds_from_text_by_a_model_trained_on_it_stand_beside_the_others(tmp_path):
    """results_auxiliary.jsonl: its headline is drawn at the model that the same key and text belong to."""
    tree = synthetic_tree(tmp_path / "tree")
    before = titles(tree)
    checkpoint = "tiny/synthetic-no_dp-lora/0e+00_2e-06/checkpoint-20"
    args = {"models": [f"no_dp=./tree/{checkpoint}"], "synthetic": ["no_dp=no_dp.jsonl"]}
    inputs = [{"path": "key.jsonl", "sha256": "aa"}, {"path": "no_dp.jsonl", "sha256": "bb"}]
    put(tree / "canary" / "run_canary.json", RUN | {"args": args, "inputs": inputs})
    put(tree / "auxiliary" / "run_auxiliary.json", RUN | {"args": {"synthetic": args["synthetic"]}, "inputs": inputs})
    lines = (tree / "canary" / "results_canary.jsonl").read_text(encoding="utf-8").splitlines()
    (audit,) = (one for one in map(json.loads, lines) if one["measure"] == "audit" and one["arm"] == "no_dp")
    point = {"level": 0.01, "tpr": 0.375, "tpr_ci": [0.28, 0.48], "false_positives": 1, "members": 96}
    whole = audit | {"measure": "audit_text", "signal": "auxiliary", "headline": True, "auc": 0.84}
    whole |= {"lower": {"95": 0.625, "99.9": 0.25}, "tpr_at_fpr": point | {"nonmembers": 104}}
    grams = whole | {"signal": "2-gram", "headline": False, "lower": {"95": 0.4375, "99.9": 0.0}, "tpr_at_fpr": None}
    ladder = {"measure": "text_auc", "arm": "no_dp", "signal": "auxiliary", "kind": "ladder", "repetitions": 4}
    ladder |= {"n_requested": 10, "n_scored": 10, "n_dropped": 0, "auc": 0.9375, "undefined": None}
    file = put(tree / "auxiliary" / "results_auxiliary.jsonl", whole, grams, ladder)
    status, rows, page = report(tree, "--output", tmp_path / "out")
    assert status == 0 and titles(tree) == before
    found = rows_with(rows, file="auxiliary/results_auxiliary.jsonl")
    values = {(row["metric"], row["attack"]): row["value"] for row in found}
    name = "ε lower, text only, auxiliary model"
    assert (values[name, "auxiliary"], values[f"{name} at 99.9 %", "auxiliary"]) == ("0.625", "0.25")
    assert values["ε lower, text only", "2-gram"] == "0.4375"
    assert values["AUC of the audit, text only, auxiliary model", "auxiliary"] == "0.84"
    assert values["AUC of text alone", "auxiliary"] == "0.9375"
    (row,) = (row for row in found if row["metric"].startswith("TPR of the audit"))
    assert (row["value"], row["low"], row["high"], row["n"], row["level"]) == ("0.375", "0.28", "0.48", "96", "0.01")
    assert f">{name}<" in page and "auxiliary/results_auxiliary.jsonl:1" in page
    study = load.read([tree])
    (figure,) = [one for one in figures.build(study) if one.name == "epsilon"]
    assert f"no_dp: {name} 0.625" in figure.summary and "0.438" not in figure.summary
    assert svg.svg(figure.panels[0], "e", "e").count(">no_dp<") == 1
    put(file, whole | {"arm": "other"})  # of which no model was measured
    (figure,) = [one for one in figures.build(load.read([tree])) if one.name == "epsilon"]
    assert f"other (auxiliary): {name} 0.625" in figure.summary


def test_a_moved_tree_keeps_its_models(tmp_path):
    tree = small_tree(tmp_path / "old")
    shutil.move(tree, tmp_path / "new")
    study = load.read([tmp_path / "new"])
    (row,) = study.select("perplexity", "mean", model=lambda model: model.step == 20)
    assert row.model.key == str(tmp_path / "new/tiny/original-lora/0e+00_2e-06/checkpoint-20")
    assert len({row.model.key for row in study.rows}) == 3 and not study.damage


def test_newer_lines_of_the_same_measurement_replace_older_ones(tmp_path):
    tree = small_tree(tmp_path / "tree")
    checkpoint = tree / "tiny/original-lora/0e+00_2e-06/checkpoint-20"
    put(checkpoint / "results_purified1.jsonl", extraction_line(checkpoint, 0.2, (33, 11)))
    study = load.read([tree])
    rows = study.select(
        "extraction", "exact", template="A", headline=True, role="target", model=lambda model: model.step == 20
    )
    assert [(row.count, row.file.rpartition("/")[2]) for row in rows] == [(33, "results_purified1.jsonl")]
    assert any("older line" in caution.title for caution in caveats.find(study))


def test_other_settings_are_kept_apart(tmp_path):
    tree = small_tree(tmp_path / "tree")
    put(tree / "other" / "results_purified.jsonl", extraction_line("base/tiny", 0.2, (50, 50), top_k=1))
    study = load.read([tree])
    groups = {row.group: row.settings["top_k"] for row in study.select("extraction", role="target")}
    assert groups == {"enron.jsonl, rows 0–99": 100, "enron.jsonl, rows 0–99 #2": 1}
    names = [figure.name for figure in figures.build(study)]
    assert "extraction_bars" in names and "extraction_bars_2" in names


def test_the_fixed_choice_ignores_results():
    def model(arm, rate, last=True, step=20):
        return Model(f"{arm}/{rate}/{step}", arm, learning_rate=rate, step=step, last=last, label=arm)

    models = [model("a", 1e-5), model("a", 2e-6), model("a", 2e-6, False, 10), model("b", 2e-6), model("c", 1e-5)]
    chosen, rate = fixed_models(models)
    # 1e-5 and 2e-6 have two runs each: the smaller; arm c has no run there
    assert [one.key for one in chosen] == ["a/2e-06/20", "b/2e-06/20", "c/1e-05/20"] and rate == 2e-6
    assert fixed_models(models[1:4])[1] is None


def measured(root: Path, arm: str, rate: str, rows=100, **more) -> None:
    checkpoint = run_folder(root, arm, rate, **more) / "checkpoint-20"
    put(checkpoint / "results_purified.jsonl", extraction_line(checkpoint, rows=[0, rows, rows]))


def test_rates_are_compared_within_what_is_shown_together(tmp_path):
    """Two arms at 0.005 are not at different rates, whatever other models, bases and unmeasured runs have."""
    root = tmp_path / "tree"
    measured(root, "no_dp", "1e-03")
    measured(root, "no_dp", "5e-03")
    measured(root, "dp", "5e-03")
    for arm in ("original", "replaced", "self-instruct-x"):  # other people are asked
        measured(root, arm, "1e-03", rows=50)
        measured(root, arm, "2e-06", model="another base")
        put(run_folder(root / "models", arm, "3e-04") / "checkpoint-20" / "adapter_config.json", {"r": 1})
    study = load.read([root])
    chosen, rule, mixed = load.choose(study)
    at = {(model.base, model.arm): model.learning_rate for model in chosen}
    assert (at["tiny", "no_dp"], at["tiny", "dp"], at["tiny", "original"]) == (0.005, 0.005, 0.001) and mixed == []
    assert len(chosen) == 8 and "learning rate 0.005 (that" in rule and "different learning rates" not in titles(root)
    measured(root, "original", "4e-03", model="third")
    measured(root, "replaced", "5e-03", model="third")
    (caution,) = [one for one in caveats.find(load.read([root])) if "different learning rates" in one.title]
    (place,) = caution.places
    assert "original" in place and "at 0.004" in place and "at 0.005" in place and "no_dp" not in place


def test_pareto_front_of_a_hand_made_set():
    #            0       1       2       3       4 (beaten by 1)  5 (equal to 1 in x, worse)
    points = [(5, 0.0), (2, 0.2), (1, 0.5), (4, 0.1), (3, 0.3), (2, 0.4)]
    assert figures_extraction.front(points) == [2, 1, 3, 0]
    assert figures_extraction.front([(1, 1), (1, 1)]) == [0]


def test_no_cell_is_a_formula(tmp_path):
    """A text that a spreadsheet would compute begins with ': folders and arms of any name; numbers stay numbers."""
    root = tmp_path / "tree"
    for start in "=+-@":
        put(root / f'{start}HYPERLINK("x")' / "m.x" / "results_purified.jsonl", extraction_line(f"{start}1+1"))
        put(root / start / "results_mia.jsonl", mia_line(f"{start}a", members=f"{start}m.jsonl"))
    line = perplexity_line("@base", 7.25)
    put(root / "perplexity.jsonl", line | {"median": -2.5})
    canary = {"measure": "text_auc", "arm": "=arm", "signal": "\tx", "n_requested": 1, "n_scored": 1, "n_dropped": 0}
    put(root / "results_canary.jsonl", canary | {"auc": 0.5})
    rows = report(root, "--output", tmp_path / "out")[1]
    cells = [cell for row in rows for cell in row.values()]
    numbers = {cell for cell in cells if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell)}
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r")) and cell not in numbers]
    assert {'\'=HYPERLINK("x")/m.x/results_purified.jsonl', "'=1+1", "'@base", "'-m.jsonl", "'=arm"} <= set(cells)
    assert "-2.5" in numbers and "7.25" in numbers


def quickstart_tree(root: Path) -> Path:
    """small_tree, and arms of which the last checkpoint alone was measured."""
    small_tree(root)
    for arm, mean in (("self-generated-big", 6.25), ("replaced", 11.5)):
        run = run_folder(root, arm)
        put(
            run / "checkpoint-20" / "results_purified.jsonl",
            *(extraction_line(run / "checkpoint-20", t, (8, 4)) for t in (0.0, 0.2, 1.0)),
        )
        put(run / "perplexity.jsonl", perplexity_line(run / "checkpoint-20", mean))
    return root


def test_an_arm_with_one_checkpoint_is_in_the_curves(tmp_path):
    drawn = {figure.name: figure for figure in figures.build(load.read([quickstart_tree(tmp_path / "tree")]))}
    for name in ("perplexity", "extraction_epoch"):
        panel = svg.svg(drawn[name].panels[0], "x", "x")
        assert all(f">{arm}<" in panel for arm in ("original", "generated", "replaced"))
    assert "generated by epoch: 2 6.25" in drawn["perplexity"].summary
    models = [Model(name, epoch=2.0, learning_rate=1e-4) for name in "ab"]
    runs = {"run": [Model("0", epoch=1.0, learning_rate=1e-6), models[0]]} | {one.key: [one] for one in models}
    for axis, ends in (("epoch", (2.025, 2.05)), ("learning_rate", (1e-4 * 100**0.025, 1e-4 * 100**0.05))):
        places = style.dodge(runs, axis)  # two that would hide each other
        value = getattr(models[0], axis)
        assert places["run"](value) == value and (places["a"](value), places["b"](value)) == pytest.approx(ends)
    assert all("Not drawn" not in figure.caption for figure in drawn.values())


def test_perplexity_of_every_set_of_texts_and_of_models_without_a_curve(tmp_path):
    root = tmp_path / "tree"
    lines = [perplexity_line(model, mean) for model, mean in (("base/tiny", 9.5), ("merged", 7.5))]
    put(root / "perplexity.jsonl", *lines)
    for number in range(4):  # other texts: of the first model alone
        put(root / f"x{number}" / "perplexity.jsonl", lines[0] | {"dataset": f"set{number}.jsonl", "context": number})
    drawn = [figure for figure in figures.build(load.read([root])) if figure.section == "perplexity"]
    assert [figure.name for figure in drawn] == ["perplexity", "perplexity_2", "perplexity_3"]
    assert "merged 7.5 (6.5–8.5)" in drawn[0].summary and ">merged<" in svg.svg(drawn[0].panels[0], "x", "x")
    assert "Without a figure, but in the table: set2.jsonl, rows 0–99, set3.jsonl, rows 0–99." in drawn[2].caption
    small_tree(root / "runs")
    drawn = [figure for figure in figures.build(load.read([root])) if figure.name == "perplexity"]
    assert "Not drawn, but in the table: merged." in drawn[0].caption


def test_what_no_figure_has_room_for_is_named(tmp_path):
    root = small_tree(tmp_path / "tree")
    for number in range(9):
        run = run_folder(root, f"arm{number}")
        put(
            run / "checkpoint-20" / "results_purified.jsonl",
            *(extraction_line(run / "checkpoint-20", t) for t in (0.0, 0.2, 1.0)),
        )
        put(run / "checkpoint-20" / "results_mia.jsonl", mia_line(run / "checkpoint-20"))
    drawn = {figure.name: figure for figure in figures.build(load.read([root]))}
    assert "Not drawn, but in the table: arm6 · epoch 2, arm7" in drawn["extraction_temperature"].caption
    assert "Not drawn, but in the table: arm0 · epoch 2" in drawn["privacy_utility"].caption  # no perplexity
    assert "and 3 more." in drawn["mia_roc"].caption  # no scores


@pytest.mark.parametrize("tree", [quickstart_tree, synthetic_tree, released_tree])
def test_a_number_is_in_a_table_or_named_as_in_none(tmp_path, tree):
    root = tree(tmp_path / "tree")
    fidelity = root / "fidelity" / "results_fidelity.json"
    if fidelity.exists():
        content = json.loads(fidelity.read_text())
        content["comparisons"]["dp"]["longest_copy"] = 321
        put(fidelity, content)
        human = root / "human" / "human_evaluation.json"
        content = json.loads(human.read_text())
        content["agreement"]["cohen_kappa"] = [{"sheets": ["anna.csv", "ben.csv"], "kappa": 0.625, "equal": 40}]
        put(human, content)
    rows, page = report(root, "--output", tmp_path / "out")[1:]
    alone = "".join(html.unescape(one) for one in re.findall("Only in results.csv: (.*?)</p>", page))
    tables = html.unescape(re.sub("<figure.*?</figure>", "", page, flags=re.S))
    areas = {"extraction": ["loose match", "exact address", "exact, no name rule", "local part", "domain"]}
    for row in rows:
        metric = row["metric"]
        inside = metric in tables or metric.replace("_", " ") in tables or metric in alone
        assert inside or row["area"] in ("extraction", "mia"), row
    if tree is quickstart_tree:
        assert [name for name in areas["extraction"] if name.capitalize() not in tables] == []
        assert "matches, all templates together (9)" in alone and "local_part of the floor" in alone
    if tree is synthetic_tree:
        assert "321" in tables and "anna.csv and ben.csv" not in alone and "0.625" in tables and alone == ""


def titles(tree, level=None) -> str:
    cautions = caveats.find(load.read([tree]))
    return "\n".join(f"{one.title}: {one.places}" for one in cautions if level in (None, one.level))


def test_a_clean_tree_has_no_grave_caution(tmp_path):
    tree = small_tree(tmp_path / "tree")
    assert titles(tree, "wrong") == "" and titles(tree, "careful") == ""


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        (lambda c: put(c / "results_mia.jsonl", mia_line(c, flags=["blind_bow"])), "careful", "regardless of the"),
        (lambda c: put(c / "results_mia.jsonl", mia_line(c, flags=["near_duplicates"])), "careful", "Near-duplicates"),
        (lambda c: put(c / "results_mia.jsonl", mia_line(c, flags=["base"])), "careful", "base model already"),
        (lambda c: put(c / "results_purified.jsonl", extraction_line(c, n_dropped=7)), "careful", "7 of 200"),
        (lambda c: put(c / "results_purified.jsonl", extraction_line(c, 1.0)), "careful", "No headline for 1 model"),
        (lambda c: put(c / "results_purified.jsonl", extraction_line(c, model_sha256="cd")), "wrong", "two states"),
        (lambda c: put(c / "results_purified.jsonl", extraction_line(c, relative_change=0.0)), "careful",
         "training left unchanged"),
        (lambda c: put(c / "results_purified.jsonl", extraction_line(c, exact=(1, 1))), "note", "name-rule floor"),
        (lambda c: put(c / "adapter_config.json", {"init_lora_weights": "pissa_niter_4"}), "wrong", "PiSSA"),
        (lambda c: put(c / "privacy.json", privacy_block(3.0, "--seed was given")), "wrong", "ε is void"),
        (lambda c: put(c / "privacy.json", privacy_block(None)), "careful", "without noise"),
        (lambda c: put(c.parent / "run.json", RUN | {"status": "failed", "error": "Boom: x"}), "wrong", "Boom: x"),
        (lambda c: put(c.parent / "run.json", RUN | {"status": "running"}), "wrong", "did not finish"),
        (lambda c: put(c.parent / "run.json", RUN | {"args": {"allow_overlap": True}}), "wrong", "may overlap"),
        (lambda c: put(c.parent / "run.json", RUN | {"dirty": True}), "note", "changed working tree"),
        (lambda c: (c / "results_purified.jsonl").write_text('{"matches": '), "wrong", "could not be read"),
        (lambda c: put(c / "results_mia.jsonl", mia_line(c) | {"auc": None, "auc_ci": None, "undefined": "none"}),
         "note", "undefined"),
    ],
)  # fmt: skip
def test_what_misleads_comes_first(tmp_path, change, level, words):
    tree = small_tree(tmp_path / "tree")
    change(tree / "tiny/original-lora/0e+00_2e-06/checkpoint-20")
    assert words in titles(tree, level)
    page = report(tree, "--output", tmp_path / "out")[2]
    place = page.index(f'caution {level}"')
    assert place < page.index('id="glance"') and page.index('id="cautions"') < page.index('id="glance"')


@pytest.mark.parametrize("kind", ["dora", "pissa", "lora-dp-eps8"])
def test_a_model_that_hardly_moved_is_flagged_next_to_its_numbers(tmp_path, kind):
    """By its run.json alone, if the lines lack it (bfloat16, membership inference, epsilon): once per run."""
    root = small_tree(tmp_path / "tree")
    run = run_folder(root, "replaced", peft=kind, relative_change=3e-6)
    for epoch in (1, 2):
        checkpoint = run / f"checkpoint-{10 * epoch}"
        put(checkpoint / "results_purified.jsonl", extraction_line(checkpoint, relative_change=None))
        put(checkpoint / "results_mia.jsonl", mia_line(checkpoint))
        put(checkpoint / "privacy.json", privacy_block(8.0))
    put(root / "merged" / "results_purified.jsonl", extraction_line(root / "merged", relative_change=None))
    put(
        root / "merged" / "run_merge_peft.json",
        RUN | {"args": {"model": str(root / "gone/checkpoint-2")}, "relative_change": 5e-6},
    )
    utility = synthetic_tree(tmp_path / "more") / "utility" / "results_utility.jsonl"
    lines = [json.loads(line) for line in utility.read_text().splitlines()]
    lines[0] |= {"relative_change": 4e-6, "checkpoint": "u/models/tiny/real-seed1-dora/0e+00_2e-06/checkpoint-9"}
    put(root / "u" / "results_utility.jsonl", *lines)
    put(root / "u/models/tiny/real-seed1-dora/0e+00_2e-06/run.json", RUN | {"relative_change": 4e-6})
    (caution,) = [one for one in caveats.find(load.read([root])) if "hardly moved" in one.title]
    assert caution.title == "3 models that training hardly moved" and "nothing was learnt" in caution.text
    assert sorted(place.rpartition(" = ")[2] for place in caution.places) == ["3e-06", "4e-06", "5e-06"]
    page = report(root, "--output", tmp_path / "out")[2]
    assert "4e-06: hardly moved, equals the base" in page  # next to the score
    glance = page[page.index('id="glance"') : page.index('id="extraction"')]
    assert glance.count("its row is that of the base") == 2 and ">3e-06<" in glance and ">5e-06<" in glance


def test_lower_bound_above_upper_is_wrong_and_maxima_are_named(tmp_path):
    listed = titles(synthetic_tree(tmp_path / "tree"), "wrong")
    assert "lower 2.50, upper 2.00" in listed and listed.count("lower 2.50") == 1
    root = tmp_path / "many"
    for rate in ("1e-06", "2e-06", "3e-06"):
        folder = run_folder(root, rate=rate)
        for epoch in (10, 20):
            checkpoint = folder / f"checkpoint-{epoch}"
            put(checkpoint / "results_purified.jsonl", *(extraction_line(checkpoint, t) for t in (0.2, 0.5)))
    text = next(c.text for c in caveats.find(load.read([root])) if c.title == "Maxima are not results")
    assert text.startswith("12 combinations") and "15.0%" in text


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["nowhere", "neither"], ["nowhere: no such directory", "neither: no such directory"]),
        (["empty", "--unredacted"], ["--unredacted: needs --include_responses"]),
        (["empty"], ["no result file below"]),
        (["tree", "--include_responses"], ["no results_purified*_rows.jsonl below"]),
        (["tree", "--output", "taken"], ["has a figures/ folder that no report wrote"]),
        (["tree", "--output", "file/below"], ["is a file, not a directory"]),
        (["tree", "--seed", "x", "--outputs=y"], ["--seed: must be a whole number", "--outputs=y: unknown argument"]),
    ],
)
def test_user_errors_name_everything_at_once(tmp_path, monkeypatch, words, problems):
    monkeypatch.chdir(tmp_path)
    small_tree(tmp_path / "tree")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken" / "figures").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        plot_results.main(words)
    assert len(caught.value.problems) == len(problems)
    for problem, line in zip(problems, caught.value.problems):
        assert problem in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_checks_all_and_writes_nothing(tmp_path, capsys):
    tree = small_tree(tmp_path / "tree")
    before = sorted(tmp_path.rglob("*"))
    words = [str(tree), "--output", str(tmp_path / "out"), "--dry_run"]
    assert plot_results.main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("would write report.html") and str(tmp_path / "out") in said and "extraction_bars" in said
    with pytest.raises(UserError, match="no such directory"):
        plot_results.main([str(tmp_path / "none"), *words])
    assert sorted(tmp_path.rglob("*")) == before
    with open(tree / "base" / "results_purified.jsonl", "a") as file:
        file.write("[1]\n")
    assert plot_results.main(words) == 1 and "not read: base/results_purified.jsonl:3" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_line_is_named_and_the_rest_is_shown(tmp_path, capsys):
    tree = small_tree(tmp_path / "tree")
    file = tree / "base" / "results_purified.jsonl"
    file.write_text(file.read_text() + '{"matches": {"A": 1}, "temp\n[1]\n{"matches": {"A": "x", "total": 3}}\n')
    with open(tree / "tiny/original-lora/0e+00_2e-06/metrics.jsonl", "a") as log:
        log.write('{"step": 21, "lo')  # a run that was killed: no damage
    status, rows, page = report(tree, "--output", tmp_path / "out")
    assert status == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"base/results_purified.jsonl:{n}" for n in (3, 4, 5)]
    assert rows_with(rows, file="base/results_purified.jsonl", metric="exact", template="A", temperature="0.2")
    assert "3 lines could not be read" in page and "incomplete last line" in page
    record = json.loads((tmp_path / "out/run_plot_results.json").read_text())
    assert record["status"] == "failed" and len(record["damaged"]) == 3


@pytest.mark.parametrize(
    ("name", "change", "place", "words"),
    [
        ("checkpoint-20/scores_mia.jsonl", lambda text: text[:-30], ":400", "not JSON"),
        ("checkpoint-20/scores_mia.jsonl", lambda text: "", ":1", "empty"),
        ("checkpoint-20/scores_mia.jsonl", lambda text: "[]\n", ":1", "a JSON list, not an object"),
        ("checkpoint-20/scores_mia.jsonl", lambda text: "".join(text.splitlines(True)[:10]), ":10",
         "scores of 10 texts, but the results are over 400"),
        ("checkpoint-20/scores_mia.jsonl", lambda text: text.replace('"ref": ', '"ref": "x", "y": ', 1), ":1",
         "TypeError('ref: a str where a float belongs')"),
        ("run.json", lambda text: json.dumps(json.loads(text) | {"args": None}), ":1", "AttributeError("),
        ("run.json", lambda text: text.replace('"epochs": 2', '"epochs": "5"'), ":1",
         "TypeError('epochs: a str where a float belongs')"),
        ("metrics.jsonl", lambda text: text.replace('"loss": 2.9,', '"loss": "2.9",', 1), ":2",
         "TypeError('loss: a str where a float belongs')"),
        ("metrics.jsonl", lambda text: text.replace('"step"', '"stop"', 1), ":1", "KeyError('step')"),
        ("checkpoint-20/results_mia.jsonl", lambda text: text.replace("400", '"400"', 1), ":1", "TypeError("),
        ("checkpoint-20/results_purified.jsonl", lambda text: text.replace("0.02", '"0.02"', 1), ":1",
         "TypeError('relative_change: a str where a float belongs')"),
        ("checkpoint-20/results_mia.jsonl", lambda text: "[" * 100_000, ":1", "not JSON (maximum recursion depth"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_next_to_the_report(tmp_path, capsys, name, change, place, words):
    tree = small_tree(tmp_path / "tree")
    file = tree / "tiny/original-lora/0e+00_2e-06" / name
    before = file.read_text()
    file.write_text(change(before))
    assert file.read_text() != before
    status, rows, page = report(tree, "--output", tmp_path / "out")
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 1 and f"{name}{place}: " in line and words in line
    assert "1 line could not be read" in page and rows_with(rows, area="perplexity", metric="mean")
    if name.endswith("scores_mia.jsonl"):
        assert "mia_roc" not in page and rows_with(rows, area="mia", metric="auc", attack="ref")


def test_what_is_no_file_or_has_no_name_to_show_is_named(tmp_path, capsys):
    """A pipe (to which nothing may ever be written), a link to itself, a folder that is not UTF-8."""
    tree = small_tree(tmp_path / "tree")
    odd = tree / os.fsdecode(b"a\xff\nb")
    shutil.copytree(tree / "base", odd)
    os.mkfifo(tree / "results_mia.jsonl")
    (tree / "perplexity.jsonl").symlink_to(tree / "perplexity.jsonl")
    status, rows, page = report(tree, "--output", tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert status == 1 and rows and "lines could not be read" in page
    assert sum("not a file" in line for line in lines) == 2
    assert sum("is not UTF-8; rename it" in line for line in lines) == len(lines) - 2 > 0


def test_text_in_place_of_a_number_of_canaries_and_answers_without_response(tmp_path, capsys):
    tree = synthetic_tree(tmp_path / "tree")
    file = tree / "canary" / "results_canary.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["bits"]["median"], lines[1]["n_scored"] = "9.0", "10"
    put(file, *lines)
    answer = {"row": 3, "template": "A", "temperature": 0.2, "response": "Ana.Lee7@norbeck.example"}
    put(tree / "base" / "results_purified_rows.jsonl", answer)
    put(tree / "more" / "results_purified_rows.jsonl", {**answer, "response": None}, {"row": 4, "temperature": 0.2})
    status, rows, page = report(tree, "--output", tmp_path / "out", "--include_responses")
    assert status == 1 and "Xxx.Xxx0@xxxxxxx.xxxxxxx" in page and rows_with(rows, metric="exposure", repetitions=1)
    places = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert places == [
        "canary/results_canary.jsonl:1",
        "canary/results_canary.jsonl:2",
        "more/results_purified_rows.jsonl:1",
    ]


class Structure(HTMLParser):
    """Counts tags, checks nesting, collects references and ids."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def audit_record(**more) -> dict:
    question = {
        "title": "Membership",
        "answer": "leaks",
        "p": 0.01,
        "p_adjusted": 0.02,
        "why": None,
        "measured": "AUC <1>",
    }
    verdict = {"answer": "leaks", "words": "models/a leaks & more.", "questions": {"membership": question}}
    return {"schema": 1, "model": {"name": "models/a"}, "verdict": verdict} | more


def test_the_verdict_of_an_audit_comes_first(tmp_path):
    put(tmp_path / "tree/audit.json", audit_record())
    assert plot_results.main([str(tmp_path / "tree"), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert '<p class="verdict">models/a leaks &amp; more.</p>' in page and "AUC &lt;1&gt;" in page
    assert page.index('id="verdict"') < page.index('id="cautions"') and 'href="#verdict"' in page


@pytest.mark.parametrize("broken", [{"verdict": {}}, {"model": None}, {"verdict": "leaks"}])
def test_a_damaged_audit_is_named(broken, tmp_path, capsys):
    put(tmp_path / "tree/audit.json", audit_record(**broken))
    assert plot_results.main([str(tmp_path / "tree"), "--output", str(tmp_path / "out")]) == 1
    assert "not read: audit.json:1: " in capsys.readouterr().err


def test_the_page_stands_alone(tmp_path):
    tree = small_tree(tmp_path / "tree")
    assert plot_results.main([str(tree), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    structure = Structure(page)
    assert len(structure.ids) == len(set(structure.ids))
    files = [one for one in structure.references if not one.startswith(("#", "data:"))]
    names = [figure.name for figure in figures.build(load.read([tree]))]
    assert files == [f"figures/{name}.{kind}" for name in names for kind in ("png", "pdf")]
    assert {
        "overview",
        "extraction_bars",
        "extraction_temperature",
        "extraction_epoch",
        "privacy_utility",
        "perplexity",
        "mia_roc",
        "mia_heatmap",
        "training",
    } == set(names)
    for name in names:
        assert (tmp_path / "out" / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    assert all(one[1:] in structure.ids for one in structure.references if one.startswith("#"))
    drawings = [attributes for tag, attributes in structure.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert drawings and all(len(one["aria-label"]) > 20 and one["role"] == "img" for one in drawings)
    assert not re.search(
        r"url\(\s*['\"]?http|@import|<script src|https?://(?!www\.w3\.org/(?:1999/xlink|2000/svg))", page
    )
    assert "prefers-color-scheme:dark" in page and "@media print" in page
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "figures",
        "report.html",
        "results.csv",
        "run_plot_results.json",
    ]
    again = plot_results.main([str(tree), str(tmp_path), "--output", str(tmp_path / "out")])  # reads none of its own
    assert again == 0 and "run_plot_results" not in (tmp_path / "out/report.html").read_text()


def test_text_of_result_files_is_escaped(tmp_path):
    tree = small_tree(tmp_path / "tree")
    nasty = "<script>alert(1)</script>&\"'"
    put(tree / "x" / "results_mia.jsonl", mia_line(f"models/{nasty}", flags=["blind_bow"], members=f"{nasty}.jsonl"))
    put(tree / "x" / "run_mia.json", RUN | {"args": {"model": nasty}, "status": "failed", "error": nasty})
    page = report(tree, "--output", tmp_path / "out")[2]
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    Structure(page)


ODD = {"mathematics": "$x$_\\frac%{", "control": "_a\nb\t\rc\x07\x1b\u202e", "no path": "\ud800\x00"}


def rename(root: Path, odd: str) -> None:
    """Put `odd` before every name of an arm, base, data set, template, label and part, in files and paths."""
    named = ("original", "no_dp", "synthetic-dp", "tiny", "enron.jsonl", "A", "good", "whole", "ref", "blind_bow")
    for path in [path for path in root.rglob("*") if path.is_file()]:
        text = path.read_text(encoding="utf-8")
        for name in named:
            text = re.sub(rf'(?<=["/]){re.escape(name)}(?=["/])', lambda f: json.dumps(odd)[1:-1] + f[0], text)
        path.write_text(text, encoding="utf-8")
    if "\x00" in odd or "\ud800" in odd:  # no file system has the one, and results hold the other alone
        return
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and path.name.startswith(("original", "tiny")):
            path.rename(path.with_name(odd.replace("/", "") + path.name))


@pytest.mark.parametrize("kind", ODD)
def test_names_are_drawn_as_they_are(tmp_path, kind):
    """Whatever a model, arm, data set or template is called: every figure comes out, and its text is the name."""
    small_tree(tmp_path / "tree" / "p")
    synthetic_tree(tmp_path / "tree" / "s")
    rename(tmp_path / "tree", ODD[kind])
    status = plot_results.main([str(tmp_path / "tree"), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    Structure(page)
    assert status == 0 and len(list((tmp_path / "out" / "figures").iterdir())) == 2 * page.count("<figure") >= 20
    drawn = [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", page)]
    name = {"control": r"_a\nb\t\rc\x07\x1b\u202e", "no path": r"\ud800\x00"}.get(kind, ODD[kind])
    for one in (f"{name}no_dp", f"Template {name}A", f"{name}A: exact", f"{name}whole"):
        assert any(text.startswith(one[:12]) for text in drawn), one
    assert not any("mathdefault" in text or "\n" in text for text in drawn)
    with open(tmp_path / "out" / "results.csv", encoding="utf-8", newline="") as file:
        assert len(file.read().splitlines()) == 1 + len(load.read([tmp_path / "tree"]).rows)  # one line per number


def test_a_legend_has_every_label():
    import matplotlib

    keys = [("_hidden", "#123456", "o", "-"), ("$a$", "#123456", "block", None)]
    panel = svg.Panel("_$t$", lambda axes: axes.loglog([0.001, 1], [0.001, 1]))
    with matplotlib.rc_context(svg.SETTINGS):
        canvas = svg.whole(svg.Figure("x", "t", "c", "s", [panel], keys))
        canvas.canvas.draw()
        (legend,) = canvas.legends
        ticks = [tick.get_text() for tick in canvas.axes[0].get_xticklabels()]
    assert [text.get_text() for text in legend.get_texts()] == ["_hidden", "$a$"]
    assert "0.01" in ticks and not any("$" in tick for tick in ticks)


def test_numbers_in_a_drawing_are_not_rounded():
    def one(axes):
        axes.text(0.5, 0.5, "0.6364")

    drawn = svg.svg(svg.Panel("AUC 0.12345", one), "name", "0.98765")
    assert ">0.6364<" in drawn and ">AUC 0.12345<" in drawn and 'aria-label="0.98765"' in drawn
    assert "var(--ink)" in drawn and not re.search(r"#1b1f24|DejaVu", drawn)


def test_answers_enter_only_when_asked_and_then_as_their_shape(tmp_path):
    tree = small_tree(tmp_path / "tree")
    line = {"row": 3, "template": "A", "temperature": 0.2, "response": "Ana.Lee7@norbeck.example, call"}
    put(tree / "base" / "results_purified_rows.jsonl", line)
    out = tmp_path / "out"
    page = report(tree, "--output", out)[2]
    assert "Ana.Lee7" not in page and "Xxx.Xxx0" not in page
    page = report(tree, "--output", out, "--include_responses")[2]
    assert "Ana.Lee7" not in page and "Xxx.Xxx0@xxxxxxx.xxxxxxx, xxxx" in page
    page = report(tree, "--output", out, "--include_responses", "--unredacted")[2]
    assert "Ana.Lee7@norbeck.example, call" in page and "personal data" in page
    assert (out / "report.html").stat().st_mode & 0o777 == 0o600
    assert "Ana.Lee7" not in (out / "results.csv").read_text(encoding="utf-8")
    assert responses.shape("Åsa Öz-9") == "Xxx Xx-0"


def test_as_a_script_from_elsewhere(tmp_path):
    tree = small_tree(tmp_path / "tree")
    words = [sys.executable, str(ROOT / "plot_results.py"), str(tree), str(tmp_path / "none"), "--output", "out"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path / 'none'}: no such directory\n"


@HAS_BROWSER
def test_in_a_browser(tmp_path):
    """No message, no request but the page; tables sort by value, undefined last; nothing is wider than a phone."""
    tree = small_tree(tmp_path / "tree")
    report(tree, "--output", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    with browser.Browser(360, 740, dark=True) as phone:
        phone.open(page)
        assert phone.run("document.documentElement.scrollWidth") == 360
        assert phone.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"  # #14171b
        text = phone.run(
            "parseFloat(getComputedStyle(document.querySelector('.panel svg text')).fontSize) * "
            "document.querySelector('.panel svg').getBoundingClientRect().width / "
            "document.querySelector('.panel svg').viewBox.baseVal.width"
        )
        assert text >= 9  # pixels, on the phone
        # rows are stacked: every number is visible, after the name of its column
        tables = "Array.from(document.querySelectorAll('.table'))"
        assert phone.run(f"{tables}.every(one => one.scrollWidth <= one.clientWidth)")
        heads = (
            "Array.from(table.tHead.rows[0].cells, c => Array.from(c.children, p => p.textContent).join(' ').trim())"
        )
        labels = "Array.from(table.tBodies[0].rows[0].cells, c => c.dataset.label || '')"
        shown, given = phone.run(f"(table => [{labels}.slice(1), {heads}.slice(1)])(document.querySelector('table'))")
        assert shown == given and len(shown) > 3
        first = "getComputedStyle(document.querySelector('tbody td'), '::before').content"
        assert phone.run(first) == f'"{shown[0]}"'
        assert phone.errors == [] and phone.requests == [f"file://{page}"]
    with browser.Browser() as desk:
        desk.open(page)
        assert desk.run("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
        column = "Array.from(document.querySelectorAll('table')[0].tBodies[0].rows, r => r.cells[{}].textContent)"
        place = desk.run(
            "Array.from(document.querySelectorAll('table')[0].tHead.rows[0].cells)"
            ".findIndex(c => c.textContent.startsWith('Membership'))"
        )
        press = "document.querySelectorAll('table')[0].tHead.rows[0].cells[{}].querySelector('button').click()"
        desk.run(press.format(1))
        up = desk.run(column.format(1))
        desk.run(press.format(1))
        down = desk.run(column.format(1))
        assert [text.split("%")[0] for text in up] == ["7.5", "11.0", "12.0", "15.0"] and down == up[::-1]
        assert desk.run("document.querySelectorAll('table')[0].tHead.rows[0].cells[1].ariaSort") == "descending"
        for _ in range(2):  # the base has no membership AUC: last in both orders
            desk.run(press.format(place))
            assert desk.run(column.format(place))[-1] == ""
        desk.print(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 10_000
        assert desk.errors == [] and desk.requests == [f"file://{page}"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(page, its text, rows of results.csv) of a tree of 200 checkpoints."""
    root = tmp_path_factory.mktemp("large")
    status, rows, page = report(large_tree(root / "tree"), "--output", root / "out")
    assert status == 0
    return root / "out" / "report.html", page, rows


@pytest.mark.slow
def test_two_hundred_checkpoints(large):
    path, page, rows = large
    assert len({row["model"] for row in rows if row["model"]}) == 201
    assert len(rows_with(rows, metric="exact", template="A", role="target")) == 201 * 8
    assert path.stat().st_size < 4_000_000
    structure = Structure(page)
    assert len(structure.tags) < 8000
    assert "201 models" in re.sub("<[^>]+>", "", page) and "All 201 models" in page
    (data,) = [
        one
        for one in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
        if json.loads(one)[0][0][0] == "base" and len(json.loads(one)) == 202  # the floor is the last row
    ]
    assert all(len(line) == len(json.loads(data)[0]) for line in json.loads(data))


@pytest.mark.slow
@HAS_BROWSER
def test_two_hundred_checkpoints_open_under_a_second(large):
    """Processor time of the page's main thread, so that other load does not matter."""
    with browser.Browser() as desk:
        desk.open(large[0])
        assert desk.cpu() < 1
        long = (
            "Array.from(document.querySelectorAll('details.long')).find(d => /202 rows/.test(d.firstChild.textContent))"
        )
        assert desk.run(f"{long}.querySelectorAll('tbody tr').length") == 0
        opened = f"new Promise(done => {{ const d = {long}; d.addEventListener('toggle', () => setTimeout(done)); "
        desk.run(opened + "for (let p = d; p; p = p.parentElement) if (p.tagName === 'DETAILS') p.open = true; })")
        assert desk.run(f"{long}.querySelectorAll('tbody tr').length") == 202
        assert desk.errors == [] and len(desk.requests) == 1
