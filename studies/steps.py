"""What the studies of quickstart.py share: calling a script's own entry point, and the table of extraction results."""

import shlex
from pathlib import Path

import measure_purified
import run_peft
from common import cli, dataset, models, results, stats, trained
from common.schema import HEADLINE_TEMPERATURE, outcomes_path
from training.run import run as fine_tune

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "embedded"
TEMPERATURE = HEADLINE_TEMPERATURE


def check_rows(config, problems: cli.Problems) -> None:
    """Problems of --dataset and --model, which the studies of mail share."""
    rows = problems.absorb(dataset.read_rows, config.dataset)
    if rows:
        problems.absorb(dataset.validate, config.dataset, rows, ("gt-name", "gt-email", "prompt", "continuation"))
    models.look_up(problems, config.model, config.revision)


def device_flags(config) -> list:
    return ["--dtype", config.dtype, *(["--device_map", config.device_map] if config.device_map else [])]


def show(script, words: list[str]) -> None:
    name = Path(script.__file__).resolve().relative_to(EMBEDDED.parents[1])
    print(f"\n$ python {name} {shlex.join(words)}", flush=True)


def call(script, *words, allowed: tuple[int, ...] = (0,)) -> None:
    """Run a script's own entry point with the arguments printed; a user error or a failed step ends the study."""
    words = [str(word) for word in words]
    show(script, words)
    status = script.main(words) or 0
    if status not in allowed:
        raise RuntimeError(f"{Path(script.__file__).name} ended with status {status}")


def train(*words) -> Path:
    """run_peft.py with these arguments; its run directory. A run that is finished already is kept."""
    words = [str(word) for word in words]
    show(run_peft, words)
    return fine_tune(run_peft.make_parser().parse_args(words))


def made_from(words) -> dict[str, str]:
    """{argument: SHA-256} of the files and of the weights of local models among a script's arguments (or name=path)."""
    found = {}
    for word in map(str, words):
        for path in (Path(word), Path(word.partition("=")[2] or word)):
            if path.is_file():
                found[word] = results.sha256(path)
            elif (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
                found[word] = models.weights_sha256(models.find_model(str(path)))
    return found


def unsalted(made: dict) -> set[str]:
    """SHA-256s of the sources that a manifest tells by a salted hash, where they have not changed."""
    model, found = Path(str(made["generator"].get("model"))), set()
    rows = trained.read(model) if model.is_dir() else None
    for one in made.get("source", []) if rows and rows.salt else ():
        if one.get("salted") and Path(one["path"]).is_file():
            digest = results.sha256(one["path"])
            found |= {digest} if trained.salted(digest, rows.salt) == one["sha256"] else set()
    return found


def build(script, output: Path, *words) -> Path:
    """A data builder, unless its --output stands already, made from the same files and weights as its manifest says."""
    if output.exists() and dataset.manifest_path(output).exists():
        made = dataset.read_manifest(output)
        known = {one["sha256"] for one in made.get("source", [])}
        if isinstance(made.get("generator"), dict):
            known.add(made["generator"].get("weights"))
            known |= unsalted(made)
        if made.get("sha256") == results.sha256(output) and known.issuperset(made_from(words).values()):
            print(f"\n{output}: built before, kept")
            return output
        print(f"\n{output}: changed since, or built from other files or weights; built again")
    call(script, *words, "--output", output, *(["--overwrite"] if output.exists() else []))
    return output


def result_files(folder: Path) -> list[Path]:
    """The result files of `folder`, the newest measurement first."""
    files = [path for path in folder.glob("results_purified*.jsonl") if not path.stem.endswith("_rows")]
    return sorted(files, key=lambda path: (len(path.name), path.name), reverse=True)


def stands(file: Path | None, model, data=None) -> bool:
    """Whether a result file is there and all its lines are of the model's weights (and of the data) as they are.

    A file that is not, is removed: nothing of it may be read beside what is measured now.
    """
    if file is None or not file.is_file():
        return False
    wanted = {"model_sha256": models.weights_sha256(models.find_model(str(model)))}
    if data is not None:
        wanted["dataset_sha256"] = results.sha256(data)
    try:
        lines = dataset.read_rows(file)
    except cli.UserError:
        lines = []
    if lines and all(line.get(key) == value for line in lines for key, value in wanted.items()):
        return True
    print(f"\n{file}: damaged, or of other weights or rows; measured again")
    file.unlink()
    return False


def measured(folder: Path) -> tuple[dict, list[dict]]:
    """(result line, outcome lines) of the newest measurement at TEMPERATURE in `folder`."""
    for file in result_files(folder):
        for line in reversed(results.read_jsonl(file)):
            if line["temperature"] == TEMPERATURE:
                outcomes = results.read_jsonl(outcomes_path(file))
                return line, [one for one in outcomes if one["temperature"] == TEMPERATURE]
    raise cli.UserError(f"{folder}: nothing was measured at temperature {TEMPERATURE} there; name another --output")


def attack(model, folder: Path, data, *extra) -> None:
    """measure_purified.py, unless `folder` has its finished result of these weights and rows already."""
    if stands(next(iter(result_files(folder)), None), model, data):
        print(f"\n{folder}: measured before, kept")
        return
    call(measure_purified, "--model", model, "--output_dir", folder, "-d", data, *extra)


def row_of(name: str, folder: Path, perplexity_mean: float | None) -> dict:
    """One row of the table from the newest measurement in `folder`."""
    line, outcomes = measured(folder)
    labels = [label for label in line["matches"] if label != "total"]
    return {
        "model": name,
        "matches": {label: line["matches"][label] for label in labels},
        "exact": {label: line["exact"][label] for label in labels},
        "no_pattern": sum(line["no_pattern"][label] or 0 for label in labels),
        "no_pattern_people": len({one["row"] for one in outcomes if one["no_pattern"]}),
        "expected": {label: line["probabilistic"][label]["1"]["expected"] for label in labels},
        "exact_rate_ci95": line["ci95"]["exact"]["total"],
        "perplexity": perplexity_mean,
        "rows": line["matches"]["total"],
        "mcnemar_exact": {label: line["baseline"]["exact"][label] for label in labels} if "baseline" in line else None,
    }


def share(row: dict) -> str:
    """Exact hits as a share of all prompts, with its interval."""
    low, high = row["exact_rate_ci95"]
    return f"{sum(row['exact'].values()) / (len(row['exact']) * row['rows']):.1%} ({low:.1%}–{high:.1%})"


def table(heads: list, rows: list[list]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, heads)) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def joined(counts) -> str:
    return " / ".join(map(str, counts))


def paired(rows: list[dict]) -> list[str]:
    """Of each measurement a line: exact hits gained and lost against its baseline, by template, with McNemar's exact p,
    and that p corrected for all of these tests together (Holm)."""
    tests = [(row, label, pair) for row in rows for label, pair in (row["mcnemar_exact"] or {}).items()]
    corrected = iter(stats.holm([pair["p"] for _, _, pair in tests]))
    words: dict[str, list[str]] = {row["model"]: [] for row in rows}
    for row, label, pair in tests:
        p = f"p = {pair['p']:.2g}, corrected {next(corrected):.2g}"
        words[row["model"]].append(f"{label}: +{pair['gained']} −{pair['lost']} ({p})")
    return [f"* {model}: {'; '.join(said)}" for model, said in words.items()]
