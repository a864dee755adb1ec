"""data/self_instruct/generate.py: seed tasks, prompts, parsing, filters, ROUGE-L pool, the whole procedure."""

import json
import random
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, kill_when_written, make_model, read_lines, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq

import run_peft
from common import dataset, distributed, manifests
from common.problems import UserError
from data.self_instruct import filters, generate, rounds
from data.self_instruct.completion import complete
from data.self_instruct.seed_tasks import read_seed_tasks

SEEDS = ROOT / "data" / "seedTasks.json"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama whose context holds the longest prompt."""
    return make_model(tmp_path_factory.mktemp("long") / "tiny-long", "llama", positions=4096)


# ---------------------------------------------------------------- seed tasks


def test_seed_tasks_are_varied_enough_and_pass_their_own_filters():
    tasks, broken = read_seed_tasks(SEEDS, strict=True)
    assert broken == 0 and len(tasks) >= 64 and sum(len(task["examples"]) for task in tasks) >= 75
    assert all(set(task) == {"instruction", "examples"} for task in tasks)
    assert all(set(example) == {"input", "output"} for task in tasks for example in task["examples"])
    pool = filters.RougePool()
    for task in tasks:
        assert filters.instruction_fault(task["instruction"]) is None
        assert not pool.alike(task["instruction"])
        pool.add(task["instruction"])
        kept, dropped = filters.filter_instances([(one["input"], one["output"]) for one in task["examples"]])
        assert len(kept) == len(task["examples"]) and not dropped
    first_words = [task["instruction"].split()[0] for task in tasks]
    assert len(set(first_words)) >= 20 and first_words.count("Summarise") <= 3
    assert 10 <= sum(map(filters.is_classification, tasks)) <= len(tasks) // 2


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("{", "not JSON"),
        ("{}", "expected a JSON array"),
        ("[]", "0 valid tasks; at least 8 are needed"),
        (json.dumps([{"instruction": "x", "examples": [{"input": "", "output": 3}]}] * 8), "0 valid tasks"),
    ),
)
def test_bad_seed_tasks(text, words, tmp_path):
    (tmp_path / "seeds.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_seed_tasks(tmp_path / "seeds.json")


def test_broken_seed_tasks_are_left_out_and_shown_or_refused(tiny, tmp_path, capsys, monkeypatch):
    tasks = json.loads(SEEDS.read_text(encoding="utf-8"))
    tasks[2:2] = [7, {"instruction": "x", "examples": []}, {"examples": [{"input": "", "output": ""}]}, None]
    seeds = tmp_path / "seeds.json"
    seeds.write_text(json.dumps(tasks))
    monkeypatch.setattr(rounds, "complete", scripted([]))
    command = words(tiny, tmp_path / "data.jsonl", "--num_rows", 5, "--seed_tasks", seeds)
    assert generate.main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    shown = [f"--seed_tasks {seeds}: task {number}: needs an instruction and ex" for number in (2, 3, 4)]
    assert [line[: len(start)] for line, start in zip(lines, shown)] == shown
    assert lines[3] == "broken tasks: … and 1 more"
    assert manifests.read_manifest(tmp_path / "data.jsonl")["source"][0]["rows"] == len(tasks)
    assert json.loads((tmp_path / "run_generate.json").read_text())["counts"]["broken seed tasks"] == 4
    assert generate.main(words(tiny, tmp_path / "clean.jsonl", "--num_rows", 5)) == 0
    assert (tmp_path / "clean.jsonl").read_bytes() == (tmp_path / "data.jsonl").read_bytes()
    with pytest.raises(UserError, match="task 2: needs") as error:
        generate.main([*command, "--strict", "--overwrite"])
    assert error.value.problems == lines[:4]


# ---------------------------------------------------------------- parsing and filters


def test_parse_instructions_by_hand():
    text = " Who wrote  the opinion?\nTask 10: Name the court.\nTask 11: List the cl"
    assert filters.parse_instructions(text, ended=False) == (["Who wrote the opinion?", "Name the court."], 1)
    assert filters.parse_instructions(text, ended=True)[0][2] == "List the cl"
    drifted = " Who wrote it?\nThe court held otherwise.\nTask 10: Name the court.\n"
    assert filters.parse_instructions(drifted, ended=False) == (["Who wrote it?"], 0)
    assert filters.parse_instructions("", ended=False) == ([], 1)


def test_parse_instances_by_hand():
    text = " a\nb\nOutput: c\n\nExample 2\nInput: None\nOutput: d\n\nTask: another\nExample 1\nInput: x\nOutput: y"
    assert filters.parse_instances(text, False, False) == ([("a\nb", "c"), ("", "d")], {})
    cut = " a\nOutput: c\nExample 2\nInput: d\nOutput: unfin"
    assert filters.parse_instances(cut, False, False) == ([("a", "c")], {"cut": 1})
    assert filters.parse_instances(cut, True, False)[0] == [("a", "c"), ("d", "unfin")]
    assert filters.parse_instances(" chatter", True, False) == ([], {"no instance": 1})
    text = " yes\nInput: one\nLabel: no\nInput: two\n\nTask: another"
    assert filters.parse_instances(text, False, True) == ([("one", "yes"), ("two", "no")], {})
    # as a small model writes: labels repeated within an instance, an output that begins with one
    text = " a\nOutput: b: c\n\nOutput: b\n\nExample 2\nInput: d\nInput: e\nOutput: f\n\n"
    text += "Example 3\nInput: g\nOutput:\nInput: h"
    assert filters.parse_instances(text, True, False) == ([("a", "b: c"), ("g", "")], {"no instance": 1})


def test_prompts_are_parsed_as_they_are_written():
    tasks, _ = read_seed_tasks(SEEDS)
    for task in tasks:
        for output_first in (False, True):
            prompt = filters.instance_prompt([task], "Name the next one.", output_first)
            start = prompt.index("Label:" if output_first else "Example 1\nInput:")
            lead = "Label:" if output_first else "Example 1\nInput:"
            found, lost = filters.parse_instances(prompt[start + len(lead) :], False, output_first)
            assert found == [(one["input"], one["output"]) for one in task["examples"]] and not lost
    texts = [task["instruction"] for task in tasks[:8]]
    prompt = filters.instruction_prompt(texts)
    assert prompt.endswith("\nTask 9:")
    assert filters.parse_instructions(prompt[prompt.index("Task 1:") + 7 :], True)[0] == [*texts, ""]


def test_instruction_faults_by_hand():
    assert filters.instruction_fault("Name it.") == "length"
    assert filters.instruction_fault("word " * 151) == "length"
    assert filters.instruction_fault("word " * 150) is None
    assert filters.instruction_fault("Draw the floor of the court room") == "keyword"
    assert filters.instruction_fault("Explain who may file a motion") is None
    assert filters.instruction_fault("- name the judge please") == "start"
    assert filters.instruction_fault("Ärzte im Zeugenstand nennen") == "start"


def test_filter_instances_by_hand():
    given_ = [("a", "1"), ("a", "2"), ("b", ""), ("c", "C"), ("d", "x"), ("d", "x"), ("e", "y")]
    kept, dropped = filters.filter_instances(given_)
    assert kept == [("d", "x"), ("e", "y")]
    assert dropped == {"conflicting": 2, "empty output": 1, "output equals input": 1, "repeated": 1}
    assert filters.filter_instances([("It was  so.", "it was so"), ("?", "!")])[0] == [("?", "!")]


# ---------------------------------------------------------------- ROUGE-L


def rouge_l(a: list[str], b: list[str]) -> tuple[int, int]:
    """F as a fraction (2·LCS, m + n), LCS from rapidfuzz on the words."""
    return 2 * LCSseq.similarity(a, b), len(a) + len(b)


def test_rouge_threshold_by_hand():
    """Ten words against ten: LCS 7 is F = 0.7, kept; LCS 8 is 0.8, refused. Case and punctuation do not count."""
    pool = filters.RougePool()
    pool.add("one two three four five six seven eight nine ten")
    assert not pool.alike("one two three four five six seven x y z")
    assert pool.alike("One, two; three four FIVE six seven eight y z.")
    assert not pool.alike("ten nine eight seven six five four three two one")  # the same words, LCS 1
    assert not pool.alike("") and not filters.RougePool().alike("one two three")


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=12)


@settings(max_examples=200)
@given(st.lists(WORDS, max_size=15), WORDS)
def test_pool_equals_comparing_every_pair(texts, candidate):
    pool = filters.RougePool()
    for words in texts:
        pool.add(" ".join(words))
    pairs = [rouge_l(candidate, words) for words in texts]
    assert pool.alike(" ".join(candidate)) == any(10 * twice > 7 * both for twice, both in pairs)


@pytest.mark.slow
def test_candidates_a_second_against_fifty_thousand():
    """Half of the words of a seed instruction replaced: many near texts in the pool, the hard case. Run with -s to
    read the speed; it is printed, not asserted; three verdicts are checked against every pair."""
    rng = random.Random(0)
    seeds = [task["instruction"].split() for task in read_seed_tasks(SEEDS)[0]]
    words = [word for seed in seeds for word in seed]

    def variation() -> str:
        text = list(rng.choice(seeds))
        for place in rng.sample(range(len(text)), len(text) // 2):
            text[place] = rng.choice(words)
        return " ".join(text)

    pool = filters.RougePool()
    for _ in range(50_000):
        pool.add(variation())
    candidates = [variation() for _ in range(500)]
    started = time.process_time()
    alike = sum(map(pool.alike, candidates))
    speed = 500 / (time.process_time() - started)
    print(f"{speed:,.0f} candidates per CPU second against 50,000, {speed / 200:.1f} times the 200 wanted")
    assert 0 < alike < 500
    for text in candidates[:3]:
        assert pool.alike(text) == any(
            10 * LCSseq.similarity(pool._words(text), held) * 2 > 7 * (len(text.split()) + len(held))
            for held in pool.texts
        )


# ---------------------------------------------------------------- the procedure

SUBJECTS = "harbor orchard ferry quarry mill chapel meadow tannery foundry market granary lodge".split()  # noqa: SIM905
VERBS = "weigh trace contrast outline justify question restate measure defend doubt".split()  # noqa: SIM905


def scripted(calls: list):
    """Stands in for the model: new instructions, a kind, instances; with every fault that the filters detect."""

    def complete(model, tokenizer, prompts, stage, first, args, world):
        calls.append((stage, prompts))
        answers = []
        for number, prompt in enumerate(prompts, first):
            subject, verb = SUBJECTS[number % len(SUBJECTS)], VERBS[number // len(SUBJECTS) % len(VERBS)]
            if stage == "instructions":
                new = f" {verb.title()} claims about {number} {subject}s\nTask 10: Name it.\nTask 11: Draw the"
                answers.append(
                    (f"{new} old {subject}\nTask 12: Classify the case as civil or criminal.\nTask 13: Wh", False)
                )
            elif stage == "kind":
                answers.append((" Yes\n" if number % 3 == 0 else " No\n", False))
            elif prompt.endswith("Label:"):
                answers.append((f" yes\nInput: case {number}\nLabel: no\nInput: case {number}\n\nTask: x", False))
            else:
                more = f"Example 2\nInput: same\nOutput: same\nExample 3\nInput: lone\nOutput: {number}"
                answers.append((f" facts of {number}\nOutput: {subject}\n{more}\n\nTask: x", False))
        return answers

    return complete


def words(model, output, *more):
    return [str(word) for word in ("-m", model, "--seed_tasks", SEEDS, "--output", output, "--round_size", 4, *more)]


def test_procedure_rows_counts_and_resuming(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(rounds, "complete", scripted(calls))
    assert generate.main(words(tiny, tmp_path / "whole.jsonl", "--num_rows", 11)) == 0
    rows = read_lines(tmp_path / "whole.jsonl")
    assert len(rows) == 11 and [row["row_id"] for row in rows] == list(range(11))
    assert rows[0] == {
        "instruction": "Weigh claims about 1 orchards",
        "input": "facts of 1",
        "output": "orchard",
        "task": 1,
        "classification": False,
        "row_id": 0,
    }
    record = json.loads((tmp_path / "run_generate.json").read_text())
    # a round: 4 prompts of 5 lines each, and of the 4 kept tasks those numbered 0, 3, 6, … are classifications, whose
    # two labels of one input conflict; the others give 2 instances, one lost
    counts, n_rounds = record["counts"], record["rounds"]
    assert counts["instructions: candidates"] == 20 * n_rounds and counts["instructions: kept"] == 4 * n_rounds
    for fault in ("length", "keyword", "alike", "cut"):
        assert counts[f"instructions: {fault}"] == 4 * n_rounds
    n_kinds = counts["classification tasks"]
    assert n_kinds == len(range(0, 4 * n_rounds, 3)) == counts["tasks without an instance"]
    assert counts["instances: conflicting"] == 2 * n_kinds
    assert counts["instances: output equals input"] == 4 * n_rounds - n_kinds
    assert counts["instances: kept"] == 2 * (4 * n_rounds - n_kinds) >= 11
    assert record["keep_rate"]["instructions"] == 0.2
    manifest = manifests.read_manifest(tmp_path / "whole.jsonl")
    assert (
        manifest["tag"] == "self-instruct-tiny-long" and manifest["rows"] == 11 and manifest["source"][0]["rows"] == 68
    )
    kinds = [line.split("? ")[1] for line in calls[1][1][0].splitlines() if line.startswith("Is it classification? ")]
    assert kinds == ["Yes", "No"] * 6
    # the first round has only seeds to show, later ones two generated instructions among eight
    shown = [[line for line in prompt.splitlines() if "claims about" in line] for prompt in calls[0][1] + calls[3][1]]
    assert [len(lines) for lines in shown] == [0] * 4 + [2] * 4
    assert all(prompt.count("\nTask ") == 9 for prompt in calls[3][1])

    # broken in the second round, then run again: the first round is kept and the file is the same
    monkeypatch.setattr(rounds, "complete", lambda *a: 1 / 0 if len(calls) == 3 else scripted(calls)(*a))
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        generate.main(words(tiny, tmp_path / "broken.jsonl", "--num_rows", 11))
    partial = tmp_path / ".broken.jsonl.partial.jsonl"
    with open(partial, "ab") as file:
        file.write(b'{"tasks": [{"instr')  # a torn line
    monkeypatch.setattr(rounds, "complete", scripted(calls))
    with pytest.raises(UserError, match="a different seed"):
        generate.main(words(tiny, tmp_path / "broken.jsonl", "--num_rows", 11, "--seed", 5))
    assert generate.main(words(tiny, tmp_path / "broken.jsonl", "--num_rows", 11)) == 0
    assert (tmp_path / "broken.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(calls) == 3 * n_rounds and not partial.exists()


DRIVER = """
import re, sys
from common.process import entry
from data.self_instruct import generate, rounds
real = rounds.complete
def complete(model, tokenizer, prompts, stage, *rest):
    texts = [" ".join(re.findall("[a-z]+", answer[0])) for answer in real(model, tokenizer, prompts, stage, *rest)]
    forms = {{"instructions": " Explain {{}} now\\nTask 10: and", "kind": " No{{}}"}}
    form = forms.get(stage, " {{}}\\nOutput: why {{}}")
    return [(form.format(text, text), stage == "instances") for text in texts]
rounds.complete = complete
sys.exit(entry(generate.main))
"""


@pytest.fixture
def driver(tmp_path):
    """The script with a random model's output put into the form that a trained generator would write."""
    path = tmp_path / "driver.py"
    path.write_text(DRIVER.format(root=str(ROOT)))
    return path


def quick(model, output, *more):
    return words(model, output, "--round_size", 3, "-mt", 6, "--num_rows", 12, "--instance_temperature", 1, *more)


def test_two_ranks_give_the_file_of_one(tiny, driver, tmp_path):
    done = run_script(driver, *quick(tiny, tmp_path / "one.jsonl"))
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "one.jsonl")
    assert len(rows) == 12 and len({row["instruction"] for row in rows}) == 12
    done = run_script(driver, *quick(tiny, tmp_path / "two.jsonl", "--batch_size", 2), ranks=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*"))
    other = run_script(driver, *quick(tiny, tmp_path / "other.jsonl", "--seed", 1))
    assert other.returncode == 0 and (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "one.jsonl").read_bytes()


def test_kill_and_run_again(tiny, driver, tmp_path):
    """kill -9 after two rounds; the next run resumes there and writes the file of an uninterrupted run."""
    assert run_script(driver, *quick(tiny, tmp_path / "whole.jsonl")).returncode == 0
    output = tmp_path / "broken" / "data.jsonl"
    partial = output.with_name(".data.jsonl.partial.jsonl")
    command = [sys.executable, str(driver), *quick(tiny, output)]
    kill_when_written(command, partial, 2)
    assert partial.exists() and not output.exists()
    kept = partial.read_bytes().rpartition(b"\n")[0]
    with open(partial, "ab") as file:
        file.write(b'{"tasks": [{"instr')  # a line torn by a power failure
    other = run_script(driver, *quick(tiny, output, "--top_k", 7))
    assert other.returncode == 2 and "a different top_k" in other.stderr and partial.read_bytes().startswith(kept)
    assert run_script(driver, *quick(tiny, output)).returncode == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial.exists()
    assert 2 < len(kept.splitlines()) <= json.loads((output.parent / "run_generate.json").read_text())["rounds"] + 1


@pytest.mark.parametrize("style", ("instances", "alpaca", "text"))
def test_run_peft_trains_on_every_format(style, tiny, models, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "complete", scripted([]))
    data = tmp_path / "data.jsonl"
    assert generate.main(words(tiny, data, "--num_rows", 10, "--format", style)) == 0
    rows = read_lines(data)
    for row in rows:
        text, boundary = dataset.row_text(row)
        assert text[boundary - 14 : boundary] == "### Response:\n"
    assert (set(rows[0]) == {"instruction", "input", "output"}) == (style == "alpaca")
    assert rows[0].get("text", "<|endoftext|>").endswith("<|endoftext|>")
    flags = ["-m", models["llama"], "-i", data, "--output_root", tmp_path, "--loss_on", "completion"]
    flags += ["-e", 1, "-gas", 5, "-lr", 1e-3, "--lora_r", 4]
    assert run_peft.main([str(flag) for flag in flags]) == 0
    folder = tmp_path / "tiny-llama" / "self-instruct-tiny-long-lora" / "0e+00_1e-03"
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_completions_are_the_models_own(tiny):
    """Greedy: transformers' generate; sampled: independent of the batches. None where the context is too short."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    seeds, _ = read_seed_tasks(SEEDS)
    prompts = [filters.kind_prompt(seeds[:2], task["instruction"]) for task in seeds[:5]]
    args = SimpleNamespace(temperature=0.75, instance_temperature=0.0, max_tokens=8, top_k=20, seed=1, batch_size=2)
    prompts.insert(2, "x " * 5000)
    found = complete(model, tokenizer, prompts, "instances", 0, args, distributed.World())
    assert found[2] is None
    for prompt, answer in list(zip(prompts, found))[:2]:
        ids = tokenizer(prompt, return_tensors="pt")
        whole = model.generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=0)[0]
        assert answer[0] == tokenizer.decode(whole[ids.input_ids.shape[1] :], skip_special_tokens=True)
    one = complete(model, tokenizer, prompts, "instructions", 0, args, distributed.World())
    args.batch_size = 5
    assert complete(model, tokenizer, prompts, "instructions", 0, args, distributed.World()) == one
    assert complete(model, tokenizer, prompts, "instructions", 9, args, distributed.World()) != one


def test_a_generator_without_instances_is_an_error(tiny, tmp_path, monkeypatch):
    """The random model writes no instruction and no instance: status 2, what was lost, no file."""
    monkeypatch.setattr(rounds, "PATIENCE", 2)
    with pytest.raises(UserError, match="2 rounds in a row gave no instance"):
        generate.main(words(tiny, tmp_path / "data.jsonl", "--round_size", 2, "--max_tokens", 8))
    assert not (tmp_path / "data.jsonl").exists()
    assert json.loads((tmp_path / "run_generate.json").read_text())["status"] == "failed"


def test_script_refuses_all_at_once(tmp_path):
    (tmp_path / "x.jsonl").write_text("old")
    done = run_script(
        "data/self_instruct/generate.py", "-m", tmp_path / "no", "--seed_tasks", "/no", "--output", tmp_path / "x.jsonl"
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 3
    for phrase in ("--model", "--seed_tasks /no: no such file", "--overwrite"):
        assert phrase in done.stderr
    assert (tmp_path / "x.jsonl").read_text() == "old"
