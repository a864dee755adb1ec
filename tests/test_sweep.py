"""studies/sweep.py: the grid, a line per finished cell, means over seeds with their interval, resuming, submitit."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_lines, write_rows

import plot_results
import run_peft
from common import cli, stats
from common.problems import UserError
from studies import grid, sweep

SUBMITIT = importlib.util.find_spec("submitit") is not None


def plan(tmp_path, data, **more) -> Path:
    content = {
        "models": ["some/model"],
        "data": [str(data)],
        "peft_types": ["lora", "dora"],
        "learning_rates": [0.001],
        "seeds": [1, 2, 3],
        **more,
    }
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(content))
    return file


def run(file, output, *more) -> int:
    return sweep.main([str(word) for word in ("--sweep", file, "--output", output, *more)])


# ---------------------------------------------------------------- the grid


def test_student_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, standard error 1/√3; the 97.5 % point of t with 2 degrees is 4.3027 (tables)."""
    assert stats.student_interval([1, 2, 3]) == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-4)
    assert stats.student_interval([1]) is None and stats.student_interval([]) is None


def test_every_combination_is_a_cell(tmp_path, dataset):
    made = grid.read(str(plan(tmp_path, dataset, learning_rates=[1e-3, 2e-6], run_peft={"epochs": 2}, mia=False)))
    assert len(made.cells) == 2 * 2 * 3 and len({cell.name for cell in made.cells}) == 12
    assert made.cells[0].name == "model-enron-lora-0.001-seed1"
    assert list(made.options) == ["run_peft", "evaluate", "perplexity"]
    assert grid.words_of({"epochs": 2, "packing": True, "attacks": ["loss", "ref"], "dp": False}) == [
        "--epochs=2", "--packing", "--attacks", "loss", "ref",
    ]  # fmt: skip


def test_every_problem_is_told_at_once(tmp_path, dataset):
    file = plan(
        tmp_path,
        dataset,
        models=[],
        learning_rates=["1e-3"],
        seeds=[1, 1],
        run_peft={"epoch": 2, "seed": 4},
        evaluate=3,
        other=1,
    )
    with pytest.raises(UserError) as caught:
        run(file, tmp_path / "out")
    told = "\n".join(caught.value.problems)
    for words in (
        "unknown key 'other'",
        "models: expected a list of words",
        "learning_rates: expected a list of numbers (write 1.0e-3, not 1e-3)",
        "seeds: a value occurs twice",
        "run_peft: 'epoch' is no flag of run_peft.py",
        "run_peft: 'seed' is set by the sweep",
        "evaluate: expected flags of evaluate_purified.py, or false",
    ):
        assert words in told, words
    with pytest.raises(UserError, match=r"^--sweep .*: no such file"):
        run(plan(tmp_path, tmp_path / "missing.jsonl"), tmp_path / "out")
    with pytest.raises(UserError, match=r"^--sweep .*none.yaml: no such file$"):
        run(tmp_path / "none.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(SUBMITIT, reason="submitit is installed")
def test_executors_need_submitit(tmp_path, dataset):
    with pytest.raises(UserError, match="--executor local: needs submitit; pip install submitit"):
        run(plan(tmp_path, dataset), tmp_path / "out", "--executor", "local")


# ---------------------------------------------------------------- its cells, with steps that only write


@pytest.fixture
def steps(monkeypatch):
    """Calls of steps that write what the real ones would: AUC 0.5 + seed / 10, exact 1 of 4 × 10."""
    calls, broken = [], set()

    def call(plan, step, own):
        calls.append((step, own))
        if step in broken:
            raise RuntimeError(f"{step} ended with status 1")
        if step == "run_peft":
            assert own["resume"] is True
            (own["output_root"] / "model" / "enron-lora" / "0" / "checkpoint-5").mkdir(parents=True, exist_ok=True)
            (own["output_root"] / "seed").write_text(str(own["seed"]))
            return
        last = Path(own.get("dir") or own["model"])
        seed = int(next(parent for parent in last.parents if (parent / "seed").exists()).joinpath("seed").read_text())
        if step == "evaluate":
            hits = {label: int(label == "A") for label in "ABCD"} | {"total": 10}
            lines = [{"temperature": t, "exact": hits, "matches": hits} for t in (0.01, 0.2)]
            write_rows(last / "results_purified.jsonl", lines)
        elif step == "perplexity":
            write_rows(Path(own["output_dir"]) / "perplexity.jsonl", [{"mean": 10.0 + seed}])
        else:
            lines = [{"attack": name, "auc": 0.5 + seed / 10, "points": {}} for name in ("loss", "ref")]
            write_rows(last / "results_mia.jsonl", lines)

    monkeypatch.setattr(grid, "call", call)
    return calls, broken


def test_lines_means_and_resuming(tmp_path, dataset, steps, capsys):
    calls, broken = steps
    file, out = plan(tmp_path, dataset), tmp_path / "out"
    broken.add("mia")
    assert run(file, out) == 1
    assert not read_lines(out / "results_sweep.jsonl") and "mia ended with status 1" in capsys.readouterr().err
    broken.clear()
    assert run(file, out) == 0
    printed = capsys.readouterr().out
    assert "[1/6] model, enron, lora, lr 0.001, seed 1: exact 2.5%, matches 2.5%, perplexity 11, auc 0.600" in printed
    lines = read_lines(out / "results_sweep.jsonl")
    assert len(lines) == 6 + 2
    assert [line["seed"] for line in lines] == [1, 2, 3] * 2 + [None] * 2
    # AUCs 0.6, 0.7, 0.8: mean 0.7, deviation 0.1, 0.1 / √3 × 4.3027 = 0.2484
    assert lines[6]["auc"] == {"mean": pytest.approx(0.7), "low": pytest.approx(0.7 - 0.2484, abs=1e-4),
                               "high": pytest.approx(0.7 + 0.2484, abs=1e-4), "n": 3}  # fmt: skip
    assert lines[6]["tpr_at_1"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert lines[6]["exact"] == {"mean": pytest.approx(1 / 40), "low": None, "high": None, "n": 3}  # no spread
    assert stats.student_interval([0.63, 0.79]) == pytest.approx([-0.3065, 1.7265], abs=1e-4)  # t: 12.706
    clipped = grid.means([lines[0] | {"auc": 0.63}, lines[0] | {"auc": 0.79}])[0]["auc"]
    assert (clipped["low"], clipped["high"]) == (0, 1)
    assert lines[6]["exact"]["mean"] == pytest.approx(1 / 40) and lines[6]["seeds"] == [1, 2, 3]

    calls.clear()
    assert run(file, out) == 0
    assert not calls and "6 finished, 0 to run" in capsys.readouterr().out
    assert run(plan(tmp_path, dataset, seeds=[1, 4]), out, "--dry_run") == 0  # a larger grid keeps what stands
    assert capsys.readouterr().out.splitlines() == [
        "4 cells: 2 finished, 2 to run", "model-enron-lora-0.001-seed4", "model-enron-dora-0.001-seed4",
    ]  # fmt: skip
    assert run(plan(tmp_path, dataset, mia={"attacks": ["loss"]}), out, "--dry_run") == 0
    assert "0 finished, 6 to run" in capsys.readouterr().out  # other settings


def test_the_report_shows_means_with_their_intervals(tmp_path, dataset, steps):
    assert run(plan(tmp_path, dataset), tmp_path / "out") == 0
    for file in (tmp_path / "out").rglob("*.jsonl"):
        if file.name != "results_sweep.jsonl":
            file.unlink()  # the stand-ins are no result files of the other scripts
    assert plot_results.main([str(tmp_path / "out"), "--output", str(tmp_path / "report"), "--no_figures"]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Sweep of settings" in page and "Student 95 % over 3 seeds" in page and "0.4516–0.9484" in page
    numbers = (tmp_path / "report" / "results.csv").read_text().splitlines()
    assert sum(line.startswith("sweep,") for line in numbers) == 2 * 4


# ---------------------------------------------------------------- the real steps


@pytest.mark.slow
@pytest.mark.parametrize("executor", ("here", "local"))
def test_a_small_sweep(models, dataset, tmp_path, executor):
    """Two seeds of one setting; with submitit both at once. Killed cells would resume as their scripts do."""
    if executor == "local" and not SUBMITIT:
        pytest.skip("needs submitit")
    file = plan(
        tmp_path,
        dataset,
        models=[str(models["neox"])],
        peft_types=["lora"],
        seeds=[1, 2],
        run_peft={"epochs": 1, "lora_r": 4},
        evaluate={"temperatures": [0.2], "num_rows": 5},
        mia={"attacks": ["loss", "ref"], "bootstrap": 20, "max_samples": 10},
    )
    words = ["--sweep", file, "--output", tmp_path / "out", "--executor", executor, "--jobs", 2]
    command = [sys.executable, ROOT / "studies" / "sweep.py", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = read_lines(tmp_path / "out" / "results_sweep.jsonl")
    assert [line["seed"] for line in lines] == [1, 2, None] and lines[2]["perplexity"]["low"] is not None
    assert lines[0]["perplexity"] != lines[1]["perplexity"] and lines[0]["auc"] is not None
    assert run(file, tmp_path / "out") == 0  # nothing is left


@pytest.mark.parametrize(("name", "cells"), [("system-p", 12), ("system-p-generated", 12), ("system-s", 1)])
def test_the_sweeps_of_the_papers_expand(name, cells, tmp_path, monkeypatch, capsys):
    """4 bases × 3 adapters; 4 bases × 3 training files; one model."""
    file = ROOT / "studies" / f"{name}.yaml"
    for data in cli.read_config(str(file), "--sweep")["data"]:
        (tmp_path / data).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / data).write_text("")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(file, tmp_path / "out", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{cells} cells: 0 finished, {cells} to run" and len(lines) == cells + 1
    assert sorted(tmp_path.rglob("*")) == before
    made = grid.read(str(file))
    words = grid.words_of(made.options["run_peft"])
    run_peft.make_parser().parse_args(words)  # every flag has a value of its kind
