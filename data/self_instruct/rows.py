"""The rows of the output, in each --format."""

from typing import Any

from common import dataset
from data.self_instruct.rounds import Round

Row = dict[str, Any]


def rows_of(rounds: list[Round]) -> list[Row]:
    """One row per instance, in the order of generation."""
    rows: list[Row] = []
    tasks = [task for finished in rounds for task in finished["tasks"]]
    for number, task in enumerate(tasks):
        for given, output in task["instances"]:
            rows.append(
                {
                    "instruction": task["instruction"],
                    "input": given,
                    "output": output,
                    "task": number,
                    "classification": task["classification"],
                    "row_id": len(rows),
                }
            )
    return rows


def formatted(rows: list[Row], style: str, eos: str) -> list[Row]:
    """Rows of `rows_of` in one of the --format styles; in each, run_peft.py knows where the completion begins."""
    if style == "instances":
        return rows
    if style == "alpaca":
        return [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]
    prompts = [dataset.instruction_prompt(row) for row in rows]
    return [
        {"prompt": prompt, "generation": row["output"], "text": prompt + row["output"] + eos}
        for prompt, row in zip(prompts, rows)
    ]
