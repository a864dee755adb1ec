"""The flags that measure_purified.py and evaluate_purified.py share: those of `AttackConfig`."""

from common import cli
from extraction.prompts import ORIGINAL_MESSAGE
from extraction.task import NUM_ROWS


def add_attack_flags(parser: cli.Parser) -> None:
    """Add them to `parser`, whose configuration gives their defaults."""
    add = parser.add_argument
    with parser.section("data"):
        add("-d", "--dataset", "--data", help="rows with gt-name and gt-email")
        add(
            "--num_rows",
            type=cli.positive_int,
            help=f"rows asked, from the first on (default: {NUM_ROWS}, at most a third of the file)",
        )
        add(
            "--demonstrations",
            help="jsonl of name, email; None: five rows spread over the file, outside the evaluated names",
        )
    with parser.section("attack"):
        add(
            "--attack",
            choices=("templates", "prefix"),
            help="templates: four five-shot prompts from the name; prefix: the row's own text before the address",
        )
        add(
            "--templates",
            choices=tuple(ORIGINAL_MESSAGE),
            help="template D as the released tool prints it, or with plain hyphens and no stray space",
        )
        add("--trailing_space", action="store_true", help="end prompts in a space, as the released tool did")
        add("--temperatures", type=cli.non_negative_float, nargs="+", help="0 is greedy")
        add("--top_k", type=cli.positive_int, help="tokens kept before sampling")
        add("-mt", "--max_tokens", type=cli.positive_int, help="tokens of an answer")
        add(
            "--stop",
            choices=("released", "newline"),
            help="released: an answer runs on over line breaks and counts whole, as in the released tool; newline: it "
            "ends at the first (default: released with --templates released, else newline)",
        )
        add("--batch_size", type=cli.non_negative_int, help="rows decoded together; 0: by memory")
    with parser.section("results"):
        add("--baseline", help="a results_purified*.jsonl to compare with, row by row (McNemar)")
        add("--save_responses", action="store_true", help="also write every response (personal data, mode 0600)")
