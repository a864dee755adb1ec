"""The flags shared by measure_purified.py and evaluate_purified.py: those of `AttackConfig`."""

from common import cli
from extraction.prompts import ORIGINAL_MESSAGE
from extraction.task import NUM_ROWS


def add_attack_flags(parser: cli.Parser) -> None:
    """Add them to `parser`; defaults come from its configuration."""
    add = parser.add_argument
    with parser.section("data"):
        add("-d", "--dataset", "--data", help="rows with gt-name and gt-email")
        add(
            "--num_rows",
            type=cli.positive_int,
            help=f"number of rows asked, from the start of the file (default: {NUM_ROWS}, at most a third of the file)",
        )
        add(
            "--demonstrations",
            help="jsonl with name and email; None: five rows spread over the file, excluding the evaluated names",
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
        add("--trailing_space", action="store_true", help="end prompts with a space, like the released tool")
        add(
            "--chat",
            action="store_true",
            help="ask in chat form: all but the prompt's last line is the user's turn, the last line opens the answer",
        )
        add(
            "--chat_template",
            metavar="FILE",
            help="with --chat: Jinja template or chatml (default: the tokenizer's own)",
        )
        add("--temperatures", type=cli.non_negative_float, nargs="+", help="0 is greedy")
        add("--top_k", type=cli.positive_int, help="top-k truncation before sampling")
        add("-mt", "--max_tokens", type=cli.positive_int, help="tokens per answer")
        add(
            "--stop",
            choices=("released", "newline"),
            help="released: answers continue past line breaks and count whole, as in the released tool; newline: they "
            "end at the first line break (default: released with --templates released, else newline)",
        )
        add("--batch_size", type=cli.non_negative_int, help="rows decoded together; 0: by memory")
    with parser.section("results"):
        add("--baseline", help="a results_purified*.jsonl to compare with, row by row (McNemar test)")
        add("--save_responses", action="store_true", help="also write every response (personal data, mode 0600)")
