"""Run the extraction attack on every checkpoint-* below a directory.

python evaluate_purified.py --model ./pythia-1.4b --dataset ./data/enron.jsonl
python evaluate_purified.py --model ./pythia-1.4b --mia                     # membership inference on each as well
python evaluate_purified.py --model ./opt-1.3b --is_opt --save_merged --temp ./tempMerged
torchrun --nproc_per_node=4 evaluate_purified.py --model ./pythia-1.4b

Each base model is loaded once; adapters are merged into it in memory and unmerged again, bit for bit. Results are
written to each checkpoint's own directory (see measure_purified.py). Checkpoints fully measured with the same settings
are skipped, partly measured ones are resumed, so rerun it after any interruption. It ends with one table per
checkpoint: the newest measurement of each temperature, including those of earlier runs.
"""

import sys

from common import cli
from common.process import entry
from extraction.config import EvaluateConfig
from extraction.flags import add_attack_flags


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Run the extraction attack on every checkpoint-* below a directory.",
        "python evaluate_purified.py --model ./pythia-1.4b --dataset ./data/enron.jsonl",
        EvaluateConfig,
    )
    add = parser.add_argument
    with parser.section("model"):
        add("-m", "--model", help="directory searched for checkpoint-*")
        add("--base_model", help="base of every adapter, instead of the one named in its configuration")
        add("--is_opt", action="store_true", help="guess a missing base model's name as facebook/opt-*")
        cli.add_model_flags(parser)
        cli.add_parallel_flag(parser)
        cli.add_engine_flag(parser)
    add_attack_flags(parser)
    with parser.section("output"):
        add("--save_merged", action="store_true", help="also write each merged model below --temp")
        add("-t", "--temp", help="where --save_merged writes merged models")
        add(
            "--mia",
            action="store_true",
            help="also run mia/mia.py's core attacks: the training rows of --dataset against its held-out head",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from studies.checkpoints import run

    return run(config)


if __name__ == "__main__":
    sys.exit(entry(main))
