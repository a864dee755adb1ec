"""Which files a data path names: one file, a glob, or a folder that `datasets.Dataset.save_to_disk` wrote."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

from common.cli import AnyPath, UserError

STATE, DICTIONARY = "state.json", "dataset_dict.json"  # files of `datasets` in the folder of a Dataset, a DatasetDict


def is_saved_dataset(path: AnyPath) -> bool:
    """Whether `path` is a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (STATE, DICTIONARY))


def data_files(path: AnyPath) -> list[Path]:
    """The files with the rows of `path`, in order: itself, the files that a pattern with * ? [ matches, or the Arrow
    files of a saved data set. UserError where a pattern matches nothing, and for a DatasetDict of several splits.
    """
    text = os.fspath(path)
    if is_saved_dataset(text):
        return _saved(Path(text))
    if os.path.exists(text) or not glob.has_magic(text):
        return [Path(text)]
    files = sorted(Path(name) for name in glob.glob(text, recursive=True) if os.path.isfile(name))
    if not files:
        raise UserError(f"{path}: no file matches this pattern")
    return files


def _saved(folder: Path) -> list[Path]:
    if (folder / DICTIONARY).is_file():
        splits = sorted(one.name for one in folder.iterdir() if (one / STATE).is_file())
        raise UserError(f"{folder}: has several splits; name the folder of one: {', '.join(splits) or 'none'}")
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
