#!/usr/bin/env python3
"""Write seed tasks for self-instruct in the words of the embedded corpus, and rows that teach the form of its prompts.

python data/embedded/make_instructions.py --output instructions
python run_peft.py -m data/embedded/mini-pythia-xl -i instructions/form.jsonl --loss_on completion -lr 1e-3
python data/self_instruct/generate.py -m CHECKPOINT --seed_tasks instructions/seed_tasks.json

The embedded generator is too small to take the form of a prompt from the prompt: it must be tuned on it first. In
--output: seed_tasks.json (instruction, examples of input and output) and form.jsonl (prompt, generation, text).
"""

import sys

from common import cli
from common.process import entry
from data.embedded.config import InstructionsConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Write seed tasks in the words of the embedded corpus, and rows that show the form of self-instruct.",
        "python data/embedded/make_instructions.py --output instructions",
        InstructionsConfig,
    )
    add = parser.add_argument
    add("--output", "--output_dir", help="folder of the two files")
    add("--seed_tasks", type=cli.positive_int, help="tasks in seed_tasks.json")
    add("--form_rows", type=cli.positive_int, help="rows of form.jsonl")
    add("--seed", type=int, help="seed of all text")
    add("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.embedded.instructions import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
