#!/usr/bin/env python3
"""Every result file below some directories → figures and one page.

python plot_results.py ./pythia-1.4b --output report                        # a tree that the other scripts wrote
python plot_results.py quickstart-out pythia-1.4b opt-1.3b --output report  # several trees on one page
python plot_results.py ./released-results --output report                   # a tree of the released System P tool

Written to --output: report.html (one file, needs no network: what would mislead first, then each number with interval,
n, settings and the line it came from), figures/*.png and *.pdf, results.csv (a number a row), run_plot_results.json.
Headlines are read at one setting fixed in advance (temperature 0.2, greedy beside it; the last checkpoint; attack ref),
never at a maximum. Settings differ: the numbers stand apart. A line that cannot be read is named on the page and on
stderr, the rest is shown, and the exit status is 1. No answer of a model enters unless --include_responses, and then
only its shape (letters as x, digits as 0) unless --unredacted.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from common import cli, results

OURS = "run_plot_results.json"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The flags of plot_results.py."""

    directories: tuple[str, ...] | None = None
    output: str = "./report"
    include_responses: bool = False
    unredacted: bool = False
    no_figures: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Figures and one page from every result file below some directories.",
        "python plot_results.py ./pythia-1.4b --output report",
        ReportConfig,
    )
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR", help="searched for result files, at any depth (default: none)")
    add("--output", "--output_dir", help="directory of the page, the figures and the table")
    add("--include_responses", action="store_true", help="show answers of --save_responses, by their shape alone")
    add("--unredacted", action="store_true", help="with --include_responses: as they are; the page gets mode 0600")
    add("--no_figures", action="store_true", help="no PNG and PDF; the page has its figures all the same")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="recorded; nothing here is random")
    return parser


def check(config: ReportConfig):
    """The Study below the directories; UserError with every problem, before anything is drawn."""
    from reporting import load

    problems = cli.Problems()
    for directory in config.directories:
        if not Path(directory).is_dir():
            problems.add(f"{directory}: no such directory")
    if config.unredacted and not config.include_responses:
        problems.add("--unredacted: only with --include_responses")
    output = Path(config.output)
    cli.check_writable(output, problems, "--output")
    if (output / "figures").exists() and not (output / OURS).exists():
        problems.add(f"--output {output}: has a folder figures/ that is not of an earlier report; name another place")
    problems.check()
    study = load.read([Path(directory) for directory in config.directories], output)
    if not study.rows and not study.curves and not study.damage:
        where = ", ".join(config.directories)
        problems.add(f"{where}: no result file below; run measure_purified.py, perplexity.py, mia.py, … first")
    if config.include_responses and not study.files["responses"]:
        problems.add("--include_responses: no results_purified*_rows.jsonl below; measure with --save_responses")
    problems.check()
    return study


def run(config: ReportConfig) -> int:
    """Write the report; 0, or 1 when a line of a result file could not be read."""
    output = Path(config.output)
    with results.output_folder(output, config.dry_run) as place:
        study = check(config)
        if config.dry_run:
            from reporting import figures

            names = ", ".join(figure.name for figure in figures.build(study))
            print(f"would write report.html, results.csv and figures in {output}: {len(study.rows):,} numbers, {names}")
        else:
            with results.Run(output / OURS, config, output=place) as record:
                write(config, study, output, record)
    broken = damage(study)
    for line in broken:
        print(cli.one_line(f"not read: {line}"), file=sys.stderr)
    if not config.dry_run:
        print(f"{len(study.rows):,} numbers, {len(record['figures'])} figures: {output / 'report.html'}")
    return 1 if broken else 0


def damage(study) -> list[str]:
    """What could not be read; the figures read more than `check` did."""
    return [f"{one.file}:{one.line}: {one.reason}" for one in study.damage if not one.torn]


def write(config: ReportConfig, study, output: Path, record: results.Run) -> None:
    from reporting import caveats, figures, html, load, responses, svg

    answers = responses.tables(study, config.unredacted) if config.include_responses else []
    drawn = figures.build(study)
    with results.atomic_folder(output / "figures") as folder:
        for figure in drawn if not config.no_figures else ():
            svg.save(figure, folder)
    with record.files.open(output / "results.csv") as file:
        csv.writer(file, lineterminator="\n").writerows(results.csv_rows(load.table(study)))
    made = {"time": results.now().replace("T", " ").replace("+00:00", " UTC"), **results.commit()}
    made["images"] = not config.no_figures
    text = html.render(study, drawn, caveats.find(study), made, answers)
    with record.files.open(output / "report.html", permissions=0o600 if config.unredacted else 0o644) as file:
        file.write(text)
    record["figures"] = [figure.name for figure in drawn]
    record["numbers"], record["damaged"] = len(study.rows), damage(study)
    if record["damaged"]:
        record["error"] = f"{len(record['damaged'])} lines could not be read"


def main(argv=None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
