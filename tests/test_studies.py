"""What the studies compute themselves: changes against the base."""

import argparse
import json
import math
import shutil
from dataclasses import dataclass, field

import pytest
from conftest import ROOT, write_manifest, write_rows

import quickstart
from canary.config import MeasureConfig as CanaryConfig
from common import cli, manifests, provenance, results
from common import models as common_models
from common.problems import UserError
from data.synthetic.config import SyntheticConfig
from extraction.config import AttackConfig
from mia.measure import cache_folder
from studies import mail, privacy, reviews, steps
from studies.steps import measured


def measurement(folder, hits: dict[int, str], temperature=0.2):
    """A measurement whose prompts A … hit as the string of 0 and 1 of each row says ('-': dropped)."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [
        {"row": row, "template": "ABCD"[place], "temperature": one, "exact": None if hit == "-" else hit == "1"}
        for one in (0.0, temperature)
        for row, prompts in hits.items()
        for place, hit in enumerate(prompts)
    ]
    write_rows(folder / "results_purified.jsonl", [{"temperature": 0.0}, {"temperature": temperature, "n": len(hits)}])
    write_rows(folder / "outcomes_purified.jsonl", outcomes)


def test_change_by_hand(tmp_path):
    """Trained: shares ½ → 1, 0 → ½, 0 → 0, a dropped prompt left out: +50, +50, 0, mean 33.3, sd 28.87, error 16.67.
    Others: 1 → 1 and 0 → ½: mean 25, sd 35.36, error 25. Difference 8.33, error √(16.67² + 25²) = 30.05."""
    measurement(tmp_path / "base/trained", {0: "10", 1: "00", 2: "00"})
    measurement(tmp_path / "now/trained", {0: "11", 1: "10", 2: "0-"})
    measurement(tmp_path / "base/others", {7: "11", 8: "00"})
    measurement(tmp_path / "now/others", {7: "11", 8: "10"})
    found = privacy.change(tmp_path / "base", tmp_path / "now")
    assert list(found) == ["trained", "others", "trained − others"]
    wanted = ((33.333, 16.667, 3), (25, 25, 2), (8.333, 30.046, 5))
    for one, (points, error, n) in zip(found.values(), wanted):
        assert one["points"] == pytest.approx(points, abs=1e-3) and one["n"] == n
        assert one["low"] == pytest.approx(points - 1.96 * error, abs=2e-3)
        assert one["high"] == pytest.approx(points + 1.96 * error, abs=2e-3)


def test_the_newest_measurement_is_read_at_one_temperature(tmp_path):
    measurement(tmp_path, {0: "1"})
    for name in ("results", "outcomes"):
        (tmp_path / f"{name}_purified.jsonl").rename(tmp_path / f"{name}_purified10.jsonl")
    measurement(tmp_path, {0: "0", 1: "0"})
    for name in ("results", "outcomes"):
        (tmp_path / f"{name}_purified.jsonl").rename(tmp_path / f"{name}_purified9.jsonl")
    (tmp_path / "results_purified10_rows.jsonl").write_text("{}\n")
    line, outcomes = measured(tmp_path)
    assert line == {"temperature": 0.2, "n": 1} and [one["exact"] for one in outcomes] == [True]
    write_rows(tmp_path / "results_purified11.jsonl", [{"temperature": 1.0}])  # newer, but at another temperature
    assert measured(tmp_path) == (line, outcomes)
    with pytest.raises(UserError, match="has no measurement at temperature"):
        measured(tmp_path / "none")


def test_against_base_by_hand():
    """Canary by canary: +1, +2, +3 bits, mean 2, sd 1, t(0.975, 2) = 4.3027: ± 2.484."""
    rows = []
    for arm, bits in (("dp", (2.0, 4.0, 6.0)), ("base", (1.0, 2.0, 3.0))):
        rows += [
            {"source": "model", "arm": arm, "kind": "ladder", "repetitions": 8, "id": id, "exposure": value}
            for id, value in enumerate(bits)
        ]
        rows.append({"source": "model", "arm": arm, "kind": "audit", "repetitions": 1, "id": 9, "audit_signal": 1.0})
        rows.append({"source": "text", "arm": arm, "kind": "ladder", "repetitions": 8, "id": 0, "2-gram": 1.0})
    (found,) = reviews.against_base(rows)
    assert (found["arm"], found["kind"], found["repetitions"], found["n_canaries"]) == ("dp", "ladder", 8, 3)
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(2.4841, abs=1e-4) == 2 - found["low"]


@pytest.mark.parametrize("content", ["[]", '{"args": []}', '{"args": {}, "inputs": [3]}', '{"args": {', None])
def test_a_damaged_record_of_an_earlier_study_is_a_user_error(tmp_path, content):
    file = tmp_path / "run_quickstart.json"
    file.mkdir() if content is None else file.write_text(content)
    with pytest.raises(UserError, match="cannot be read; choose another directory"):
        quickstart.check_same(tmp_path, argparse.Namespace(study="mail"))


def test_a_study_of_a_dataset_edited_in_place_is_refused(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    others = dict.fromkeys(("outsiders", "seed_tasks", "pretraining_members", "pretraining_nonmembers"))
    args = argparse.Namespace(study="mail", dataset=str(data), **others)
    with results.Run(tmp_path / "run_quickstart.json", args, mail.inputs(args)):
        pass
    quickstart.check_same(tmp_path, args)
    write_rows(data, [{"prompt": "another"}])
    with pytest.raises(UserError, match="has changed since"):
        quickstart.check_same(tmp_path, args)


def test_generated_without_a_generator_is_one_user_error(tmp_path):
    model = tmp_path / "other"
    model.symlink_to(ROOT / "data/embedded/mini-pythia")
    words = ["--model", str(model), "--arms", "generated", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError) as caught:
        quickstart.main(words)
    assert caught.value.problems == ["--arms generated: needs --generator, the model that writes this arm"]


def test_built_data_is_kept_for_the_files_and_weights_it_was_made_from(tmp_path, models, capsys):
    model, source, output = tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    shutil.copytree(models["neox"], model)
    write_rows(source, [{"a": 1}])
    calls = []

    def builder(config):
        weights = provenance.weights_sha256(common_models.find_model(config.model))
        settings = manifests.settings_of(config, input=results.sha256(config.input), weights=weights)
        if manifests.finished([("--output", output)], settings, config.overwrite) or config.dry_run:
            print("not shown")
            return
        calls.append(config.overwrite)
        write_rows(output, [{"b": len(calls)}])
        write_manifest(output, tag="t", script="s", argv=[], rows=1, settings=settings)

    def build(**changed) -> int:
        config = SyntheticConfig(model=str(model), input=str(source), output=str(output), **changed)
        assert steps.build("data/builder.py", builder, config) == output
        return len(calls)

    assert (build(), build(), calls[-1]) == (1, 1, False)
    out = capsys.readouterr().out
    assert out.count("$ python data/builder.py --model") == 1 and out.endswith(f"{output}: built before, kept\n")
    write_rows(source, [{"a": 2}])
    assert (build(), build(), calls[-1]) == (2, 2, True)
    assert "out.jsonl: stale (" in (out := capsys.readouterr().out) and "not shown" not in out
    retrain(model)
    assert (build(), build()) == (3, 3)
    write_rows(output, [{"b": "edited"}])
    assert (build(), build()) == (4, 4)
    manifests.manifest_path(output).write_text("{}")
    assert (build(), build()) == (5, 5)
    assert (build(top_k=7), build(top_k=7)) == (6, 6)


def retrain(model) -> None:
    """Another byte in the last weight."""
    file = model / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_measurements_are_kept_for_the_weights_and_rows_they_are_of(tmp_path, models, monkeypatch):
    model, data, folder = tmp_path / "model", write_rows(tmp_path / "d.jsonl", [{"a": 1}]), tmp_path / "base"
    shutil.copytree(models["neox"], model)
    calls = []

    def call(script, run, config):
        assert not list(folder.glob("*"))
        calls.append((script, config.model, config.output_dir))
        weights = provenance.weights_sha256(common_models.find_model(str(model)))
        line = {"model_sha256": weights, "dataset_sha256": results.sha256(data)}
        write_rows(folder / "results_purified.jsonl", [line, line])

    monkeypatch.setattr(steps, "call", call)

    def attack() -> int:
        folder.mkdir(exist_ok=True)
        steps.attack(model, folder, AttackConfig(dataset=str(data)))
        return len(calls)

    assert (attack(), attack()) == (1, 1) and calls == [("measure_purified.py", str(model), str(folder))]
    retrain(model)
    assert (attack(), attack()) == (2, 2)
    write_rows(data, [{"a": 2}])
    assert (attack(), attack()) == (3, 3)
    file = folder / "results_purified.jsonl"
    file.write_text(file.read_text()[:-9])
    assert (attack(), attack()) == (4, 4)
    assert steps.is_current(file, model) and not steps.is_current(tmp_path / "results_mia.jsonl", model)


def test_the_mark_of_a_step_covers_its_inputs_and_results(tmp_path, models):
    model, text, folder = tmp_path / "a=b" / "model", write_rows(tmp_path / "t.jsonl", [{"a": 1}]), tmp_path / "canary"
    shutil.copytree(models["neox"], model)
    folder.mkdir()
    write_rows(folder / "results_canary.jsonl", [{"b": 1}, {"b": 2}])
    arms = {"models": (f"arm={model}",), "synthetic": (f"arm={text}",)}
    config = CanaryConfig(canaries="none", **arms, references=200, output_dir=str(folder))

    def mark():
        return reviews._mark(steps.input_hashes(cli.words_of(config)), folder)

    seen = [mark()]
    assert list(json.loads(seen[0])["from"]) == [f"arm={model}", f"arm={text}"] and mark() == seen[0]
    retrain(model)
    seen.append(mark())
    write_rows(text, [{"a": 22}])
    seen.append(mark())
    write_rows(folder / "results_canary.jsonl", [{"b": 1}])  # cut at a line's end
    assert len({*seen, mark()}) == 4


@dataclass(frozen=True, kw_only=True)
class Flags:
    place: tuple[str, ...] = field(default=(), metadata={"positional": True})
    model: str
    rate: float = 1.0
    noise: float | None = None
    times: tuple[int, ...] = (1, 2)
    full: bool = False


def test_a_step_prints_the_command_line_that_it_runs(capsys):
    config = Flags(place=("a b", "c"), model="-m", rate=math.inf, noise=0.0, times=(3, 4), full=True)
    assert steps.call("room/script.py", lambda given: given, config) is config
    assert steps.call("script.py", lambda given: {"model": given.model}, Flags(model="m")) == {"model": "m"}
    first = "$ python room/script.py 'a b' c --model=-m --rate inf --noise 0.0 --times 3 4 --full"
    assert capsys.readouterr().out == f"\n{first}\n\n$ python script.py --model m\n"
    with pytest.raises(RuntimeError, match=r"script\.py ended with status 3"):
        steps.call("room/script.py", lambda _: 3, config)
    with pytest.raises(ValueError, match="--times: no word on a command line gives"):
        cli.words_of(Flags(model="m", times=()))


def test_paired_tests_are_corrected_together():
    """Holm over both arms' tests: 0.01·3, max of that and 0.02·2, 0.5."""

    def pair(p):
        return {"gained": 3, "lost": 1, "p": p}

    rows = [{"model": "a", "mcnemar_exact": {"A": pair(0.01), "B": pair(0.5)}}, {"model": "b", "mcnemar_exact": None}]
    rows.append({"model": "c", "mcnemar_exact": {"A": pair(0.02)}})
    assert steps.paired(rows) == [
        "* a: A: +3 −1 (p = 0.01, corrected 0.03); B: +3 −1 (p = 0.5, corrected 0.5)",
        "* b: ",
        "* c: A: +3 −1 (p = 0.02, corrected 0.04)",
    ]


def test_passes_are_shared_once_and_a_later_cache_is_kept(tmp_path):
    cached = cache_folder(tmp_path / "audit") / "model" / "passes.npz"
    steps.share_passes(tmp_path / "audit", tmp_path / "arm")  # nothing cached: nothing to share
    assert not (tmp_path / "arm").exists()
    cached.parent.mkdir(parents=True)
    for content, shared in ((b"first", b"first"), (b"second", b"first")):
        cached.write_bytes(content)
        steps.share_passes(tmp_path / "audit", tmp_path / "arm")
        assert (cache_folder(tmp_path / "arm") / "model" / "passes.npz").read_bytes() == shared
