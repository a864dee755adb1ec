#!/usr/bin/env python3
"""Self-instruct (Wang et al. 2023): a model writes instructions and instances, given data/seedTasks.json.

python data/self_instruct/generate.py --model EleutherAI/pythia-12b --output data/self-instruct.jsonl
python data/self_instruct/generate.py -m EleutherAI/pythia-12b --output data/alpaca.jsonl --format alpaca --num_rows 500
python run_peft.py -i data/self-instruct.jsonl --loss_on completion

A round: prompts with 6 seed and 2 generated instructions (seeds only at first) → new instructions → filters
(length, keywords, start, ROUGE-L F ≤ 0.7 against every seed and every instruction kept so far) → is it a
classification? → instances, output first if it is, input first if not → filters (empty output, output equal to input,
repeated, conflicting). Rounds continue until there are --num_rows instances; a killed run resumes with the
round it was in.
Rows: `instruction`, `input`, `output` (alpaca); also `task`, `classification`, `row_id` (instances); or `prompt`,
`generation`, `text` = prompt + generation + EOS (text). Also written: manifest, run_generate.json.
"""

import sys

from common import cli
from common.process import entry
from data.self_instruct.config import FORMATS, SelfInstructConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Let a model write instructions with inputs and outputs, given seed tasks (self-instruct).",
        "python data/self_instruct/generate.py --model EleutherAI/pythia-12b --output data/self-instruct.jsonl",
        SelfInstructConfig,
    )
    add = parser.add_argument
    add("-m", "--model", help="the generator: directory or hub name")
    add("--seed_tasks", help="JSON array of instruction and examples")
    add("--output", help="the .jsonl file to write (default: data/self-instruct-<generator>.jsonl)")
    add(
        "--format",
        choices=FORMATS,
        help="instances: all fields; alpaca: instruction, input and output only; text: complete training texts",
    )
    add("--num_rows", type=cli.positive_int, help="instances wanted")
    add("--top_k", type=cli.positive_int, help="sample from the k most likely tokens")
    add("-mt", "--max_tokens", type=cli.positive_int, help="tokens per completion")
    add("--temperature", type=cli.non_negative_float, help="temperature for new instructions")
    add("--instance_temperature", type=cli.non_negative_float, help="temperature for instances; 0 is greedy")
    add("--round_size", type=cli.positive_int, help="prompts per round")
    add("--batch_size", type=cli.positive_int, help="prompts decoded together")
    add("--strict", action="store_true", help="fail if a seed task is broken instead of skipping it")
    add("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_base_model(parser)
    cli.add_model_flags(parser)
    cli.add_parallel_flag(parser)
    cli.add_engine_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.self_instruct.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
