"""Which files a data path names: one file, a glob, a folder that `datasets.Dataset.save_to_disk` wrote, or a data set
of the hub, which `load` has fetched.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from common.problems import AnyPath, Problems, UserError

STATE, DICTIONARY = "state.json", "dataset_dict.json"  # files of `datasets` in the folder of a Dataset, a DatasetDict


def is_saved_dataset(path: AnyPath) -> bool:
    """Whether `path` is a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (STATE, DICTIONARY))


HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<split>[\w.-]+))?")
EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".arrow", ".parquet", ".gz", ".zst", ".txt", ".zip", ".xlsx")
_loaded: dict[str, list[Path]] = {}  # path as given → the files that `load` found for it


def is_hub_name(path: AnyPath) -> bool:
    """Whether `path` can only be the name of a data set of the hub, NAME, ORGANISATION/NAME or either with :SPLIT.

    Not if it exists, its folder does, it has the extension of a data file, or it starts like a path.
    """
    text = os.fspath(path)
    match = HUB_NAME.fullmatch(text)
    if not match or text.lower().endswith(EXTENSIONS) or os.path.lexists(text):
        return False
    return "/" not in text or not os.path.isdir(os.path.dirname(text))


def load(paths: Iterable[str | None], split: str | None, config: str | None) -> None:
    """Fetch each path that is the name of a data set on the hub, and choose --split of a folder with several.

    Its rows are in the Arrow files of the cache of `datasets`, which `data_files` then names. UserError, one line per
    path, before anything else is read.
    """
    problems = Problems()
    given = [path for path in dict.fromkeys(paths) if path]
    wanted = [path for path in given if is_hub_name(path) or (os.path.isdir(path) and (split or config))]
    if given and not wanted and (split or config):
        flag = f"--split {split}" if split else f"--data_config {config}"
        problems.add(f"{flag}: {given[0]} is not the name of a data set on the hub; drop the flag")
    for path in wanted:
        files = problems.absorb(_files_of, path, split, config)
        if files:
            _loaded[os.fspath(Path(path))] = files
    problems.check()


def _files_of(path: str, split: str | None, config: str | None) -> list[Path]:
    if (Path(path) / DICTIONARY).is_file() and not config:
        folder = Path(path) / (split or "")
        if not (folder / STATE).is_file():
            raise UserError(f"--split {split}: {path} has no such split; choose from {', '.join(_splits(Path(path)))}")
        return _saved(folder)
    name, inside = path, None
    if not os.path.isdir(path) and (match := HUB_NAME.fullmatch(path)):
        name, inside = match["name"], match["split"]
    chosen = inside or split or "train"
    if not re.fullmatch(r"\w+([.-]\w+)*", chosen):
        raise UserError(f"--split {chosen}: give the name of one split, such as train, without a slice or a sum")
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the reason is said in one line
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loaded = datasets.load_dataset(name, config, split=chosen)
    except Exception as error:  # of the hub's client, of the network, of a builder: no common class
        first = " ".join(str(error).strip().partition("\n")[0].split())[:200] or type(error).__name__
        what = "a data set" if os.path.isdir(path) else "a file here, and no data set that can be loaded from the hub"
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise UserError(f"{path}: not {what}{offline}: {first}") from None
    files = [Path(item["filename"]) for item in loaded.cache_files]
    if not files or sum(len(datasets.Dataset.from_file(str(entry))) for entry in files) != len(loaded):
        raise UserError(f"{path}: its rows are not files of their own; save it with save_to_disk, and give the folder")
    return files


def data_files(path: AnyPath) -> list[Path]:
    """The files with the rows of `path`, in order: itself, the files that a pattern with * ? [ matches, or the Arrow
    files of a saved data set. UserError where a pattern matches nothing, and for a DatasetDict of several splits.
    """
    text = os.fspath(path)
    if text in _loaded:
        return _loaded[text]
    if is_saved_dataset(text):
        return _saved(Path(text))
    if os.path.exists(text) or not glob.has_magic(text):
        return [Path(text)]
    files = sorted(Path(name) for name in glob.glob(text, recursive=True) if os.path.isfile(name))
    if not files:
        raise UserError(f"{path}: no file matches this pattern")
    return files


def _splits(folder: Path) -> list[str]:
    """The splits in the folder of a DatasetDict."""
    return sorted(entry.name for entry in folder.iterdir() if (entry / STATE).is_file())


def _saved(folder: Path) -> list[Path]:
    if (folder / DICTIONARY).is_file():
        splits = ", ".join(_splits(folder)) or "none"
        raise UserError(f"{folder}: has several splits; name the folder of one: {splits}")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = [folder / item["filename"] for item in state["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder}: its {STATE} is damaged ({error}); save the data set again") from None
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: rows are selected by an index; save it again after flatten_indices()")
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{folder}: {', '.join(missing) or 'its Arrow files'} missing; save the data set again")
    return files
