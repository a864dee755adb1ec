"""The seed tasks of seedTasks.json."""

from pathlib import Path
from typing import Any, TypedDict

from common import json_files
from common.problems import UserError, report_broken

SHOWN = 8  # instructions in a prompt for new ones, and thus the fewest seed tasks needed


class Example(TypedDict):
    input: str
    output: str


class SeedTask(TypedDict):
    instruction: str
    examples: list[Example]


def read_seed_tasks(file: str, strict: bool = False) -> tuple[list[SeedTask], int]:
    """(valid tasks, number of broken ones, which are reported on stderr). UserError when `strict` and one is
    broken, or when too few are left."""
    path = Path(file)
    try:
        tasks = json_files.read_json(path, "give an array of tasks", list)
    except UserError as error:
        raise UserError(*(f"--seed_tasks {line}" for line in error.problems)) from None
    valid = [task for task in tasks if is_valid(task)]
    lines = [
        f"--seed_tasks {path}: task {number}: needs an instruction and examples of input and output, all text"
        for number, task in enumerate(tasks)
        if not is_valid(task)
    ]
    report_broken("tasks", lines, len(lines), strict)
    if len(valid) < SHOWN:
        raise UserError(f"--seed_tasks {path}: {len(valid)} valid tasks; at least {SHOWN} are needed")
    return valid, len(lines)


def is_valid(task: Any) -> bool:
    """Whether an item of seedTasks.json is {instruction, examples: [{input, output}, …]}, all text."""
    examples = task.get("examples") if isinstance(task, dict) else None
    if not isinstance(examples, list) or not examples or not isinstance(task.get("instruction"), str):
        return False
    return all(
        isinstance(example, dict) and all(isinstance(example.get(side), str) for side in ("input", "output"))
        for example in examples
    )
