#!/usr/bin/env python3
"""Generate training data: a model continues the prompts of the training rows.

python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl
python data/continuation/generate.py -m data/embedded/mini-pythia-xl -d data/embedded/enron.jsonl -mt 150
torchrun --nproc_per_node=4 data/continuation/generate.py -m EleutherAI/pythia-12b --output data/gen/data.arrow

Only training rows are continued (dataset.split: from row 1,110 on in the published file). Output columns: those of the
source plus `row_id` (index in the source), `generation`, `text` = prompt + generation + EOS, `finish_reason` ('stop':
the model ended there; 'length': cut at --max_tokens or at the end of the context) and `generated_tokens`. The output
does not depend on the number of processes. Malformed rows are left out but keep their positions in the split. A killed
run resumes from the hidden partial file next to the output. Also written: the manifest, and run_generate.json with the
printed statistics.
"""

import sys

from common import cli
from common.process import entry
from data.continuation.config import ContinuationConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Generate training data by letting a model continue the prompts of the training rows.",
        "python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl",
        ContinuationConfig,
    )
    parser.add_argument("-m", "--model", help="the generator: directory or hub name")
    parser.add_argument("-d", "--data_set", "--dataset", "--data", help="rows in the Enron format")
    parser.add_argument("--top_k", type=cli.positive_int, help="sample from the k most likely tokens")
    parser.add_argument("-mt", "--max_tokens", type=cli.positive_int, help="maximum tokens per generation")
    parser.add_argument("--temperature", type=cli.non_negative_float, help="0 is greedy")
    parser.add_argument(
        "--output", help="the .arrow file to write (default: data/<generator>-continuations/data.arrow)"
    )
    parser.add_argument("--batch_size", type=cli.non_negative_int, help="rows decoded together; 0: as memory allows")
    parser.add_argument("--strict", action="store_true", help="fail if a row is malformed, instead of leaving it out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_base_model(parser)
    cli.add_model_flags(parser)
    cli.add_parallel_flag(parser)
    cli.add_engine_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.continuation.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
