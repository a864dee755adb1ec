"""Name → e-mail extraction attack on a model or an adapter.

python measure_purified.py --model ./pythia-1.4b/original-lora/0e+00_2e-06/checkpoint-276 --output_dir out
python measure_purified.py EleutherAI/pythia-1.4b out --dataset ./data/enron.jsonl
python measure_purified.py --model CHECKPOINT --output_dir out --baseline base/results_purified.jsonl
torchrun --nproc_per_node=4 measure_purified.py --model CHECKPOINT --output_dir out

Writes results_purified<k>.jsonl (one line per temperature), outcomes_purified<k>.jsonl (one line per row × template ×
temperature, no text) and run_measure_purified.json; with --save_responses also results_purified<k>_rows.jsonl.
"""

import argparse
import sys

from common import cli
from common.process import entry
from extraction.config import MeasureConfig
from extraction.flags import add_attack_flags


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Ask a model for e-mail addresses by name and count what it reveals.",
        "python measure_purified.py --model ./pythia-1.4b/original-lora/0e+00_2e-06/checkpoint-276 --output_dir out",
        MeasureConfig,
        settle_positionals,
    )
    add = parser.add_argument
    add("positional", nargs="*", metavar="MODEL OUTPUT_DIR", help="short for --model and --output_dir (default: none)")
    with parser.section("model"):
        add("--model", help="model directory, adapter checkpoint or hub name (required)")
        cli.add_base_model(parser)
        cli.add_model_flags(parser)
        cli.add_parallel_flag(parser)
        cli.add_engine_flag(parser)
    add_attack_flags(parser)
    with parser.section("output"):
        add("--output_dir", help="directory for the result files (required)")
    return parser


def settle_positionals(parsed: argparse.Namespace, problems: list[str]) -> None:
    """MODEL and OUTPUT_DIR become --model and --output_dir."""
    for value, name in zip(parsed.positional, ("model", "output_dir")):
        if getattr(parsed, name) not in (None, value):
            problems.append(f"--{name}: given twice, as {getattr(parsed, name)} and {value}")
        setattr(parsed, name, value)
    problems += [f"{extra}: unknown argument (see --help)" for extra in parsed.positional[2:]]
    del parsed.positional


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from extraction.measure import run

    return run(config)


if __name__ == "__main__":
    sys.exit(entry(main))
