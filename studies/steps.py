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
    """Check --dataset and --model, for the two studies on mail."""
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
    """Print a script's command line and run its entry point; a user error or a failed step ends the study."""
    words = [str(word) for word in words]
    show(script, words)
    status = script.main(words) or 0
    if status not in allowed:
        raise RuntimeError(f"{Path(script.__file__).name} ended with status {status}")


def train(*words) -> Path:
    """Run run_peft.py with these arguments and return its run directory. A finished run is kept."""
    words = [str(word) for word in words]
    show(run_peft, words)
    return fine_tune(run_peft.make_parser().parse_args(words))


def input_hashes(words) -> dict[str, str]:
    """{argument: SHA-256} of the files and local model weights among a script's arguments (path or name=path)."""
    hashes = {}
    for word in map(str, words):
        for path in (Path(word), Path(word.partition("=")[2] or word)):
            if path.is_file():
                hashes[word] = results.sha256(path)
            elif (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
                hashes[word] = models.weights_sha256(models.find_model(str(path)))
    return hashes


def unsalted(manifest: dict) -> set[str]:
    """Plain SHA-256s of the unchanged sources for which the manifest records only a salted hash."""
    model, hashes = Path(str(manifest["generator"].get("model"))), set()
    rows = trained.read(model) if model.is_dir() else None
    for source in manifest.get("source", []) if rows and rows.salt else ():
        if source.get("salted") and Path(source["path"]).is_file():
            digest = results.sha256(source["path"])
            hashes |= {digest} if trained.salted(digest, rows.salt) == source["sha256"] else set()
    return hashes


def build(script, output: Path, *words) -> Path:
    """Run a data builder, unless --output exists and its manifest shows that it is from the same files and weights."""
    if output.exists() and dataset.manifest_path(output).exists():
        manifest = dataset.read_manifest(output)
        known = {source["sha256"] for source in manifest.get("source", [])}
        if isinstance(manifest.get("generator"), dict):
            known.add(manifest["generator"].get("weights"))
            known |= unsalted(manifest)
        if manifest.get("sha256") == results.sha256(output) and known.issuperset(input_hashes(words).values()):
            print(f"\n{output}: built before, kept")
            return output
        print(f"\n{output}: stale (it, its source files or weights changed); built again")
    call(script, *words, "--output", output, *(["--overwrite"] if output.exists() else []))
    return output


def result_files(folder: Path) -> list[Path]:
    """The result files of `folder`, the newest measurement first."""
    files = [path for path in folder.glob("results_purified*.jsonl") if not path.stem.endswith("_rows")]
    return sorted(files, key=lambda path: (len(path.name), path.name), reverse=True)


def is_current(file: Path | None, model, data=None) -> bool:
    """Whether a result file exists and all its lines match the model's current weights (and the current data).

    A stale file is removed, so that its numbers cannot mix with new ones.
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
    print(f"\n{file}: damaged or stale (weights or dataset changed); measured again")
    file.unlink()
    return False


def measured(folder: Path) -> tuple[dict, list[dict]]:
    """(result line, outcome lines) of the newest measurement at TEMPERATURE in `folder`."""
    for file in result_files(folder):
        for line in reversed(results.read_jsonl(file)):
            if line["temperature"] == TEMPERATURE:
                outcomes = results.read_jsonl(outcomes_path(file))
                return line, [outcome for outcome in outcomes if outcome["temperature"] == TEMPERATURE]
    raise cli.UserError(f"{folder}: has no measurement at temperature {TEMPERATURE}; choose another --output")


def attack(model, folder: Path, data, *extra) -> None:
    """Run measure_purified.py, unless `folder` already has a finished result for these weights and rows."""
    if is_current(next(iter(result_files(folder)), None), model, data):
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
        "no_pattern_people": len({outcome["row"] for outcome in outcomes if outcome["no_pattern"]}),
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
    """One line per measurement: exact hits gained and lost against its baseline, by template, with McNemar's exact p
    and that p Holm-corrected over all of these tests."""
    tests = [(row, label, pair) for row in rows for label, pair in (row["mcnemar_exact"] or {}).items()]
    corrected = iter(stats.holm([pair["p"] for _, _, pair in tests]))
    entries: dict[str, list[str]] = {row["model"]: [] for row in rows}
    for row, label, pair in tests:
        p = f"p = {pair['p']:.2g}, corrected {next(corrected):.2g}"
        entries[row["model"]].append(f"{label}: +{pair['gained']} −{pair['lost']} ({p})")
    return [f"* {model}: {'; '.join(parts)}" for model, parts in entries.items()]
