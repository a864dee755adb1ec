"""The study of mail over several seeds: generation, training and attacks are repeated; the base stays the same.

Every run has its own folder, seed_N. A number is reported as its mean over runs with Student's 95 % interval; a change
is taken within a run, against that run's measurement of the base. A claim holds over seeds if the change has the same
sign in every run and the interval excludes 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from common import json_files, locks, publication, results, stats
from studies import mail, pretraining
from studies.config import StudyConfig
from studies.steps import TEMPERATURE, Record, table

Values = dict[str, dict[str, float]]  # model → measure → value, of one run

CHANCE = 0.5
EXACT, NO_RULE, PERPLEXITY, AUC = "exact, %", "no rule, hits", "perplexity", "AUC of the original rows"
PRETRAINING, ADDRESSES = "pre-training AUC", "evaluated addresses in the training text"
FORMATS = {EXACT: ".1f", NO_RULE: ".1f", PERPLEXITY: ".3f", AUC: ".3f", PRETRAINING: ".3f", ADDRESSES: ".1f"}
COMPARED = (EXACT, NO_RULE, PERPLEXITY, PRETRAINING)  # with the base of the run; AUC is compared with chance


def run(config: StudyConfig, out: Path, record: results.Run) -> str:
    """Run the study with each seed; return the text of summary.md. Finished steps of every run are kept."""
    seeds = list(range(config.seed, config.seed + config.seeds))
    runs = []
    for seed in seeds:
        folder = out / f"seed_{seed}"
        print(f"\nSeed {seed}, {seeds.index(seed) + 1} of {len(seeds)}: {folder}", flush=True)
        single = replace(config, seed=seed, output=str(folder))
        with (
            locks.output_folder(folder) as output,
            results.Run(folder / "run_quickstart.json", single, mail.inputs(single), output=output) as own,
        ):
            text = mail.run(single, folder, own, parent=out)
            with own.files.open(folder / "summary.md") as file:
                file.write(text + "\n")
        runs.append(json_files.read_json(folder / "summary.json", f"remove {folder} and run again"))
    record["seeds"] = seeds
    values = [values_of(summary) for summary in runs]
    made = {"temperature": TEMPERATURE, "seeds": seeds, "means": means(values), "changes": changes(values)}
    notes = [f"Seed {seed}: {note}" for seed, summary in zip(seeds, runs) for note in summary.get("notes", {}).values()]
    publication.write_json(out / "summary.json", made)
    return "\n".join([*text_of(made), *(line for note in notes for line in ("", note))])


def values_of(summary: Record) -> Values:
    """The numbers of one run, from its summary.json; of each arm those of its last checkpoint."""
    values: Values = {}
    for row in summary["rows"]:
        model = row["model"].split(",")[0]  # the last epoch of an arm comes last
        values[model] = {
            EXACT: 100 * sum(row["exact"].values()) / (len(row["exact"]) * row["rows"]),
            NO_RULE: float(row["no_pattern"]),
            PERPLEXITY: row["perplexity"],
        }
        if auc := summary["mia"].get(row["model"]):
            values[model][AUC] = auc["auc"]
    for arm, counts in summary["addresses"].items():
        values[arm][ADDRESSES] = float(counts["addresses"])
    for model, by_attack in summary.get("pretraining", {"models": {}})["models"].items():
        values[model][PRETRAINING] = by_attack[pretraining.HEADLINE]["auc"]
        for attack, measured in by_attack.items():
            if attack != pretraining.HEADLINE:
                values[model][f"{PRETRAINING}, {attack}"] = measured["auc"]
    return values


def over_runs(runs: Sequence[Values], number: Callable[[Values, str, str], float | None]) -> Record:
    """{model: {measure: {mean, low, high, n, values}}} of what `number` gives for each run; None is left out. An arm
    may be missing from a run."""
    by_model: Record = {}
    for model in dict.fromkeys(model for run in runs for model in run):
        present = [run for run in runs if model in run]
        for measure in dict.fromkeys(name for run in present for name in run[model]):
            numbers = [number(run, model, measure) for run in present if measure in run[model]]
            values = [value for value in numbers if value is not None]
            if values:
                low, high = stats.student_interval(values) or (None, None)
                summary = {"mean": stats.mean_or_none(values), "low": low, "high": high, "n": len(values)}
                by_model.setdefault(model, {})[measure] = summary | {"values": values}
    return by_model


def means(runs: Sequence[Values]) -> Record:
    """{model: {measure: {mean, low, high, n, values}}}"""
    return over_runs(runs, lambda run, model, measure: run[model][measure])


def changes(runs: Sequence[Values]) -> Record:
    """{arm: {measure: {mean, low, high, n, values, holds}}}: differences from the base of the same run, and of the AUC
    on the original rows from ½."""

    def number(run: Values, model: str, measure: str) -> float | None:
        if measure == AUC:
            return run[model][AUC] - CHANCE
        compared = measure.startswith(COMPARED) and model != "base"
        return run[model][measure] - run["base"][measure] if compared else None

    differences = over_runs(runs, number)
    for by_measure in differences.values():
        for part in by_measure.values():
            part["holds"] = holds(part["values"])
    return differences


def holds(differences: Sequence[float]) -> bool:
    """Whether a change holds over seeds: the same sign in every run, and an interval of the mean that excludes 0."""
    bounds = stats.student_interval(differences)
    if bounds is None:
        return False
    if all(value > 0 for value in differences):
        return bounds[0] > 0
    return all(value < 0 for value in differences) and bounds[1] < 0


def text_of(made: Record) -> list[str]:
    """Lines of summary.md."""
    n = len(made["seeds"])
    columns = [name for name in FORMATS if any(name in by_measure for by_measure in made["means"].values())]
    shown = [[model, *(cell(parts.get(name), name) for name in columns)] for model, parts in made["means"].items()]
    compared = [name for name in columns if any(name in parts for parts in made["changes"].values())]
    differences = [
        [arm, *(cell(parts.get(name), name, sign="+") for name in compared)] for arm, parts in made["changes"].items()
    ]
    others = list(dict.fromkeys(name for parts in made["changes"].values() for name in parts if name not in FORMATS))
    claims = {
        f"{arm}: {name} {cell(part, name, sign='+')}".removesuffix(" ✓"): part["holds"]
        for arm, parts in made["changes"].items()
        for name, part in parts.items()
        if name in FORMATS
    }
    lines = [
        f"Over {n} seeds ({made['seeds'][0]}–{made['seeds'][-1]}): generation, training and attacks are repeated, the "
        f"base and the people are the same. Mean (95 % t-interval over runs). Exact addresses at temperature "
        f"{TEMPERATURE}, as a share of all prompts; hits that no name rule derives; AUC: attack `ref`"
        + (f"; pre-training: attack `{pretraining.HEADLINE}`." if PRETRAINING in columns else "."),
        "",
        table(["", *columns], shown),
        "",
        "Change from the base of the same run (AUC of the original rows: from 0.5). ✓: holds over seeds, i.e. the same "
        f"sign in all {n} runs and an interval that excludes 0; not corrected for {len(claims)} comparisons.",
        "",
        table(["", *compared], differences),
    ]
    if others:
        by_arm = {arm: parts for arm, parts in made["changes"].items() if others[0] in parts}
        rows = [
            [arm, *(cell(parts.get(name), name, sign="+").removesuffix(" ✓") for name in others)]
            for arm, parts in by_arm.items()
        ]
        lines += ["", "Change of the pre-training AUC by the other attacks, of which none is a claim.", ""]
        lines += [table(["", *(name.removeprefix(f"{PRETRAINING}, ") for name in others)], rows)]
    for title, wanted in ((f"Holds over {n} seeds", True), ("Open", False)):
        lines += ["", f"{title}: {'; '.join(words for words, held in claims.items() if held is wanted) or 'nothing'}."]
    return lines


def cell(part: Record | None, measure: str, sign: str = "") -> str:
    """A mean with its interval; a change that holds is ticked. Without a spread, the mean alone."""
    if part is None:
        return ""
    form = "{:" + sign + FORMATS.get(measure, ".3f") + "}"
    text = form.format(part["mean"])
    if part["low"] is not None and len(set(part["values"])) > 1:
        text += f" ({form.format(part['low'])} … {form.format(part['high'])})"
    return text + (" ✓" if part.get("holds") else "")
