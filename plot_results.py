#!/usr/bin/env python3
"""Turn all result files below some directories into figures and one HTML report.

python plot_results.py ./pythia-1.4b --output report                        # a tree that the other scripts wrote
python plot_results.py quickstart-out pythia-1.4b opt-1.3b --output report  # several trees on one page
python plot_results.py ./released-results --output report                   # a tree of the released System P tool

Written to --output: report.html (self-contained, needs no network: the answers first, then what could mislead, then
each number with its interval, n, settings and source line), figures/*.png and *.pdf, results.csv (one number per row),
run_plot_results.json.
Headlines use one setting fixed in advance (temperature 0.2, with greedy next to it; the last checkpoint; attack ref),
never a maximum. Numbers with different settings are kept separate. An unreadable line is listed in the report and on
stderr, the rest is shown, and the exit status is 1. Model answers are left out unless --include_responses is given, and
then only their shape is shown (letters as x, digits as 0) unless --unredacted is given too.
"""

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, locks, publication, results
from common.problems import Problems, check_writable, one_line
from common.process import entry

if TYPE_CHECKING:
    from reporting.table import Study

OURS = "run_plot_results.json"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The flags of plot_results.py."""

    directories: tuple[str, ...] = field(default=(), metadata={"positional": True})
    output: str = "./report"
    include_responses: bool = False
    unredacted: bool = False
    no_figures: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Turn all result files below some directories into figures and one HTML report.",
        "python plot_results.py ./pythia-1.4b --output report",
        ReportConfig,
    )
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR", help="searched for result files, at any depth (default: none)")
    add("--output", "--output_dir", help="directory for the report, the figures and the table")
    add("--include_responses", action="store_true", help="show the shape of answers saved with --save_responses")
    add("--unredacted", action="store_true", help="with --include_responses: show their text; the page gets mode 0600")
    add("--no_figures", action="store_true", help="write no PNG and PDF files; the report still has its figures")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="recorded; nothing here is random")
    return parser


def check(config: ReportConfig) -> "Study":
    """Read the Study below the directories; raise a UserError with every problem before anything is drawn."""
    from reporting import load

    problems = Problems()
    for directory in config.directories:
        if not Path(directory).is_dir():
            problems.add(f"{directory}: no such directory")
    if config.unredacted and not config.include_responses:
        problems.add("--unredacted: needs --include_responses")
    output = Path(config.output)
    check_writable(output, problems, "--output")
    if (output / "figures").exists() and not (output / OURS).exists():
        problems.add(f"--output {output}: has a figures/ folder that no report wrote; choose another directory")
    problems.check()
    study = load.read([Path(directory) for directory in config.directories], output)
    if not (study.rows or study.curves or study.audits or study.damage):
        where = ", ".join(config.directories)
        problems.add(f"{where}: no result file below; run measure_purified.py, perplexity.py, mia.py, … first")
    if config.include_responses and not study.files["responses"]:
        problems.add("--include_responses: no results_purified*_rows.jsonl below; measure with --save_responses")
    problems.check()
    return study


def run(config: ReportConfig) -> int:
    """Write the report; return 0, or 1 if a line of a result file could not be read."""
    output = Path(config.output)
    with locks.output_folder(output, config.dry_run) as locked:
        study = check(config)
        if config.dry_run:
            from reporting import figures

            names = ", ".join(figure.name for figure in figures.build(study))
            print(f"would write report.html, results.csv and figures in {output}: {len(study.rows):,} numbers, {names}")
        else:
            with results.Run(output / OURS, config, output=locked) as record:
                write(config, study, output, record)
    broken = damage(study)
    for line in broken:
        print(one_line(f"not read: {line}"), file=sys.stderr)
    if not config.dry_run:
        print(f"{len(study.rows):,} numbers, {len(record['figures'])} figures\nresults are in {output / 'report.html'}")
    return 1 if broken else 0


def damage(study: "Study") -> list[str]:
    """The lines that could not be read; drawing the figures may add to those that `check` found."""
    return [f"{line.file}:{line.line}: {line.reason}" for line in study.damage if not line.torn]


def write(config: ReportConfig, study: "Study", output: Path, record: results.Run) -> None:
    from reporting import caveats, figures, html, load, responses, svg

    answers = responses.tables(study, config.unredacted) if config.include_responses else []
    drawn = figures.build(study)
    with publication.atomic_folder(output / "figures") as folder:
        for figure in drawn if not config.no_figures else ():
            svg.save(figure, folder)
    with record.files.open(output / "results.csv") as file:
        csv.writer(file, lineterminator="\n").writerows(publication.csv_rows(load.table(study)))
    footer = {"time": results.now().replace("T", " ").replace("+00:00", " UTC"), **results.commit()}
    footer["images"] = not config.no_figures
    text = html.render(study, drawn, caveats.find(study), footer, answers)
    with record.files.open(output / "report.html", permissions=0o600 if config.unredacted else 0o644) as file:
        file.write(text)
    record["figures"] = [figure.name for figure in drawn]
    record["numbers"], record["damaged"] = len(study.rows), damage(study)
    if record["damaged"]:
        record["error"] = f"{len(record['damaged'])} lines could not be read"


def main(argv: list[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(entry(main))
