"""Manifests: what a data file was made from, in `<file>.meta.json` beside it."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import records
from common.json_files import read_json
from common.problems import AnyPath, UserError
from common.publication import Publication
from common.results import commit, now, sha256
from common.strict_json import plain

MANIFEST_SCHEMA = 1


def manifest_path(path: AnyPath) -> Path:
    path = Path(path)
    return path.parent / f"{path.name}.meta.json"


TAG_BYTES = 100  # tags become part of output folder names


def read_manifest(path: AnyPath) -> dict[str, Any] | None:
    """The manifest beside a data file, or None. UserError if it is broken."""
    beside = manifest_path(path)
    if not os.path.isfile(beside):
        return None
    remedy = f"remove it or build {path} again"
    manifest = read_json(beside, remedy)
    records.check(manifest, records.Manifest, beside, remedy)
    tag = manifest.get("tag") or ""
    if "/" in tag or not tag.isprintable() or tag in (".", "..") or len(tag.encode()) > TAG_BYTES:
        raise UserError(f"{beside}: tag is not a folder name (at most {TAG_BYTES} bytes, no slash); {remedy}")
    return manifest


def check_manifest(path: AnyPath, n: int) -> None:
    """UserError if the file (of n rows) does not match the manifest beside it."""
    manifest, name = read_manifest(path) or {}, manifest_path(path).name
    advice = f"build it again, or remove {name} if the file was changed on purpose"
    if manifest.get("rows", n) != n:
        raise UserError(f"{path}: has {n} rows, its manifest says {manifest['rows']}; {advice}")
    recorded = manifest.get("sha256")
    if recorded is not None and recorded != (actual := sha256(path)):
        raise UserError(f"{path}: its SHA-256 is {actual[:12]}…, its manifest says {recorded[:12]}…; {advice}")


def write_manifest(
    files: Publication,
    path: AnyPath,
    *,
    tag: str,
    script: str,
    argv: list[str],
    rows: int,
    source: Iterable[dict[str, Any] | tuple[AnyPath, int] | tuple[AnyPath, int, str | None]] = (),
    split_start: int | None = None,
    generator: object = None,
    sampling: object = None,
    settings: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Write `<path>.meta.json` for a complete data file in `files`; the two are published together.

    source: (path, row count) of each; (path, row count, sha256) of what is not a single file; or the entry itself.
    settings: see `settings_of`. more: additional keys.
    """
    files.write_json(
        manifest_path(path),
        {
            "schema": MANIFEST_SCHEMA,
            "tag": tag,
            "script": script,
            "argv": argv,
            "commit": commit()["commit"],
            "source": [entry if isinstance(entry, dict) else _source(*entry) for entry in source],
            "split_start": split_start,
            "generator": generator,
            "sampling": sampling,
            "rows": rows,
            "settings": settings,
            "sha256": sha256(files.hidden(path)),
            "created": now(),
            **(more or {}),
        },
    )


def _source(path: AnyPath, rows: int, known: str | None = None) -> dict[str, Any]:
    return {"path": str(path), "sha256": known or sha256(path), "rows": rows}


def settings_of(args: object, skip: tuple[str, ...] = ("output",), **inputs: Any) -> dict[str, Any]:
    """What determines the content of a built file: the flags except `skip`, and the SHA-256s of its inputs by flag."""
    outside = {*skip, "overwrite", "dry_run"}
    settings: dict[str, Any] = plain({k: v for k, v in vars(args).items() if k not in outside} | inputs)
    return settings


def finished(
    outputs: Sequence[tuple[str, Path]],
    settings: dict[str, Any] | None,
    overwrite: bool,
    others: Sequence[tuple[str, Path]] = (),
) -> bool:
    """Whether a run with these settings has built the `outputs` and nothing has changed since.

    outputs: (flag, path) of files with a manifest; others: of files written with them that have none; settings: as in
    their manifests, None if the inputs cannot be read. UserError for each existing file that was built differently,
    unless `overwrite`.
    """
    if overwrite:
        return False
    existing = [(flag, path) for flag, path in (*outputs, *others) if path.exists()]
    complete = len(existing) == len(outputs) + len(others)
    if existing and complete and settings is not None and all(_made_with(path, settings) for _, path in outputs):
        return True
    if existing:
        raise UserError(
            *(f"{flag} {path}: exists; give --overwrite to replace it, or another name" for flag, path in existing)
        )
    return False


def _made_with(path: Path, settings: dict[str, Any]) -> bool:
    try:
        manifest = read_manifest(path) or {}
    except UserError:
        return False
    return manifest.get("settings") == plain(settings) and manifest.get("sha256") == sha256(path)


def say_finished(*paths: Path) -> None:
    for path in paths:
        print(f"{path}: already finished with the same inputs and settings; nothing to do (--overwrite repeats it)")


def data_tag(path: AnyPath, manifest: dict[str, Any] | None) -> str:
    """The tag that identifies a data file in output directory names: the manifest's, else the file's stem."""
    tag = (manifest or {}).get("tag")
    if isinstance(tag, str) and tag:
        return tag
    stem = Path(path).name.split(".")[0]
    return stem if os.path.exists(path) else re.sub(r"[*?\[\]:]+", "", stem) or "data"  # of a pattern, or a hub name
