"""Whether an output directory holds a run with other settings, for scripts that train a model per arm of rows."""

from pathlib import Path
from typing import Any, Protocol

from common import json_files, results, strict_json
from common.problems import Problems

ARMS = "synthetic"  # the flag with ARM=FILE words


class Arms(Protocol):
    """A configuration with rows of several arms."""

    @property
    def output_dir(self) -> str: ...


def check(
    config: Arms,
    record: str,
    result: str,
    inputs: list[str],
    problems: Problems,
    files: tuple[str, ...],
    neutral: tuple[str, ...],
) -> None:
    """Add a problem if --output_dir has a run, finished or not, with other settings: its models would be kept.

    record, result: names of the run's record and of its result file. inputs: the files of the flags `files`, then
    of each arm, compared by content. neutral: flags that do not affect results.
    """
    folder, advice = Path(config.output_dir), "choose another directory, or remove this one"
    if not (folder / record).is_file():
        if (folder / result).exists():
            problems.add(f"--output_dir {folder}: has {result} without its {record}; {advice}")
        return
    run = problems.absorb(json_files.read_json, folder / record, advice)
    if run is None:
        return

    def settings(args: dict[str, Any], hashes: list[str]) -> dict[str, object]:
        arms = [f"--{ARMS} {word.partition('=')[0]}" for word in args.get(ARMS) or []]
        flags = {f"--{key}": value for key, value in args.items() if key not in (*neutral, *files, ARMS)}
        return flags | dict(zip([*(f"--{name}" for name in files), *arms], hashes))

    earlier = settings(run.get("args", {}), [entry["sha256"] for entry in run.get("inputs", [])])
    now = settings(strict_json.plain(vars(config)), [results.sha256(path) for path in inputs])
    different = [
        f"{key} was {str(earlier.get(key))[:40]}, now {str(now.get(key))[:40]}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key)
    ]
    if different:
        problems.add(f"--output_dir {folder}: has a run with other settings ({'; '.join(different)}); {advice}")
