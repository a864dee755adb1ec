#!/usr/bin/env python3
"""Synthetic reviews: a fine-tuned model writes a review for the metadata of each row.

python data/synthetic/generate.py --model run/checkpoint-276 --input data/amazon/test.jsonl --arm with_dp \\
    --training data/amazon/train.jsonl
torchrun --nproc_per_node=4 data/synthetic/generate.py --model run/checkpoint-276 --input test.jsonl --arm no_dp
python data/synthetic/generate.py --model run/checkpoint-276 --input test.jsonl --arm with_dp --num 10000 \\
    --condition sampled --metadata_epsilon 1 --training train.jsonl   # torchrun takes --num for its own: --num_rows

The prompt is dataset.review_prompt, as in training (run_peft.py --loss_on completion): product title, categories,
rating; never any part of the review. --condition title adds the review's title, which is private text too; train
the model on rows with "condition": "title". --condition sampled uses no row of --input: it draws rating, categories and
product title from a histogram of --training, released once to --histogram under its own (ε, δ); another run with the
same settings uses the same release. The manifest's `privacy` block adds both up (basic composition).

Rows: row_id (null when sampled), arm, condition, the fields of the prompt, generated_text (the continuation alone),
finish_reason ('eos' | 'length'), generated_tokens, seed, sample (0, 1, … where --num exceeds the rows). The file is the
same for any batch size and number of processes; a killed run resumes from the hidden partial file next to it. The
manifest and run_generate_<arm>.json count the rows that --filter removes, and near-copies (a common run of 50
characters or more) of rows of --input and --training; as a floor, also those of --training among the rows of --input.
"""

import sys

from common import cli
from common.process import entry
from data.synthetic.config import CONDITIONS, FIELDS, FILTERS, SyntheticConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Write synthetic reviews with a fine-tuned model, from metadata alone.",
        "python data/synthetic/generate.py --model run/checkpoint-276 --input test.jsonl --arm with_dp",
        SyntheticConfig,
    )
    add = parser.add_argument
    add("-m", "--model", required=True, help="adapter or model directory, or hub name (default: none, required)")
    add("-i", "--input", "--data", help="review rows whose metadata is used")
    add("--arm", help="name of the arm: with_dp, no_dp, …")
    add("--num", "--num_rows", type=cli.positive_int, help="rows to write; None: one per row of --input")
    add("--condition", choices=CONDITIONS, help="what the prompt is made from")
    add("--training", help="the generator's training rows, to count near-copies and for --condition sampled")
    add("--metadata_epsilon", type=cli.positive_float, help="ε of the histogram of --condition sampled")
    add("--metadata_delta", type=cli.positive_float, help="its δ; None: the model's, or 1/(10 · units)")
    add("--metadata_fields", nargs="+", choices=FIELDS, help="fields that are drawn jointly")
    add("--histogram", help="the released histogram (default: metadata_histogram.json next to --output)")
    add("--max_new_tokens", type=cli.positive_int, help="tokens per review")
    add("--temperature", type=cli.non_negative_float, help="0 is greedy")
    add("--top_k", type=cli.non_negative_int, help="sample from the k most likely tokens; 0: all")
    add("--filter", nargs="+", choices=FILTERS, help="drop empty reviews, or those truncated at the maximum length")
    add("--batch_size", type=cli.non_negative_int, help="rows decoded together; 0: as memory allows")
    add("--output", help="the .jsonl file (default: generated_sequences_<arm>.jsonl)")
    add("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_base_model(parser)
    cli.add_model_flags(parser)
    cli.add_parallel_flag(parser)
    cli.add_engine_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.synthetic.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
