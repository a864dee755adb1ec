"""Seed tasks for self-instruct in the words of the embedded corpus, and rows that teach the form of its prompts.

The embedded generator has 3 million parameters and has read nothing but mail and address lists: it continues a list of
tasks with more mail. Tuned on these rows, it writes tasks and examples. The tasks name no person of the corpus.
"""

import random
import sys
from pathlib import Path

from common import locks, manifests
from common.problems import Problems, check_writable
from data.embedded.config import InstructionsConfig
from data.embedded.phrases import Memory, Phrases
from data.self_instruct import filters
from data.self_instruct.rows import Row
from data.self_instruct.seed_tasks import SHOWN, Example, SeedTask

FIRST_NAMES = ("Dana", "Iris", "Otto", "Vera", "Hugo", "Nina", "Emil", "Lena", "Theo", "Mira")
EOS = "<|endoftext|>"
SEED_TASKS, FORM = "seed_tasks.json", "form.jsonl"


def run(config: InstructionsConfig) -> None:
    """Write both files and their manifests."""
    folder = Path(config.output)
    tasks_file, form_file = folder / SEED_TASKS, folder / FORM
    with locks.output_folder(folder, config.dry_run) as target:
        problems = Problems()
        check_writable(folder, problems, "--output")
        settings = manifests.settings_of(config)
        files = [("--output", tasks_file), ("--output", form_file)]
        finished = problems.absorb(manifests.finished, files, settings, config.overwrite)
        problems.check()
        if finished:
            manifests.say_finished(tasks_file, form_file)
            return
        if config.dry_run:
            print(f"would write {config.seed_tasks} seed tasks and {config.form_rows} rows of their form in {folder}")
            return
        rng, phrases = random.Random(f"{config.seed}-instructions"), Phrases()
        phrases.first_names = list(FIRST_NAMES)
        tasks = [make_task(phrases, rng) for _ in range(config.seed_tasks)]
        rows = [make_form(phrases, rng, number) for number in range(config.form_rows)]
        with target.publication() as out:
            out.write_json(tasks_file, tasks)
            out.write_jsonl(form_file, rows)
            for file, tag, n in ((tasks_file, "seed-tasks", len(tasks)), (form_file, "instruction-form", len(rows))):
                script = "data/embedded/make_instructions.py"
                manifests.write_manifest(out, file, tag=tag, script=script, argv=sys.argv, rows=n, settings=settings)
    print(f"{tasks_file}: {config.seed_tasks} tasks\n{form_file}: {config.form_rows} rows")


def make_task(phrases: Phrases, rng: random.Random) -> SeedTask:
    """A request of one to three sentences; its examples: the subject of a mail → an answer on the same topic."""
    topic = phrases.topics[rng.choice(list(phrases.topics))]
    memory: Memory = {}
    asked = rng.sample(topic["sentences"], rng.randint(1, 3))
    rest = [sentence for sentence in topic["sentences"] if sentence not in asked]
    instruction = " ".join(phrases.fill(sentence, rng, memory) for sentence in asked)
    answers = rng.sample(rest, rng.randint(1, 3))
    examples: list[Example] = []
    for answer in answers:
        subject = phrases.fill(rng.choice(topic["subjects"]), rng, memory)
        examples.append({"input": f"Subject: {subject}", "output": phrases.fill(answer, rng, memory)})
    return {"instruction": instruction, "examples": examples}


def make_form(phrases: Phrases, rng: random.Random, number: int) -> Row:
    """A prompt of self-instruct with its right continuation: another instruction, or the examples of one."""
    shown = [make_task(phrases, rng) for _ in range(SHOWN if number % 2 else 3)]
    new = make_task(phrases, rng)
    if number % 2:
        prompt = filters.instruction_prompt([task["instruction"] for task in shown])
        generation = f" {new['instruction']}"
    else:
        prompt = filters.instance_prompt(shown, new["instruction"], output_first=False)
        whole = filters.instance_prompt([new], "", output_first=False)
        start, end = f"Task: {new['instruction']}\nExample 1\nInput:", "\n\nTask: "
        generation = whole[whole.index(start) + len(start) : whole.rindex(end)]
    return {"prompt": prompt, "generation": generation, "text": prompt + generation + EOS}
