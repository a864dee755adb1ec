"""The two sets of texts and what goes with them: reading, sampling, shots, what must not be scored."""

from dataclasses import dataclass, field
from pathlib import Path

from common import cli, dataset, models, results
from common.trained import input_is

SHOTS = 12


@dataclass
class Study:
    """Everything about the two sets and the attacks that does not depend on a model."""

    texts: list[str]  # members first, each set in the order of its file
    ids: list
    labels: list[int]
    attacks: list[str]  # families, or single sizes as min_k_20
    shots: list[str] = field(default_factory=list)  # non-members
    member_shots: list[str] = field(default_factory=list)
    corpus: list[str] | None = None  # of dc_pdd
    inputs: list[str] = field(default_factory=list)
    counts: dict = field(default_factory=dict)  # what was left out, and why
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # (member, non-member), indices into texts
    trained: dict = field(default_factory=dict)  # folder of a model → was it trained on --members? None: unknown
    blind: dict = field(default_factory=dict)  # baseline → [n] or None, made by the first measurement
    blind_test: dict | None = None  # of the baselines together, likewise


def read_texts(path, text_field, problems: cli.Problems, flag: str) -> tuple[list[dict], list[str], dict | None]:
    """(rows, their texts, manifest) of a data file; what is wrong with it goes to `problems`."""
    rows = problems.absorb(dataset.read_rows, path)
    if rows is None:
        return [], [], None
    manifest = problems.absorb(dataset.read_manifest, path)
    before = len(problems.lines)
    problems.absorb(dataset.validate, path, rows, (text_field,) if text_field else None)
    if len(problems.lines) > before:
        return [], [], None
    texts = [row[text_field] if text_field else dataset.row_text(row)[0] for row in rows]
    return rows, texts, manifest


def read_trainings(args, problems: cli.Problems) -> dict[Path, dict | None]:
    """{folder: the run.json that run_peft.py left beside it, or None} of --model, or of every checkpoint-* in --dir."""
    found = {}
    for target in [args.model] if args.model else models.find_checkpoints(args.dir) if args.dir else []:
        folder = Path(target).expanduser().resolve()
        is_checkpoint = folder.name.startswith("checkpoint-")
        record = (problems.absorb(models.training_record, folder) if is_checkpoint else None) or {}
        found[folder] = record if "train_rows" in record.get("args", {}) and record.get("inputs") else None
    return found


def trained_rows(rows: list[dict], manifest: dict | None, train_rows: int | None, eval_rows: int) -> set[int]:
    """Indices of the rows that run_peft.py trains on with --train_rows and --eval_rows."""
    if train_rows is not None:
        return set(range(len(rows) - train_rows, len(rows)))
    held = 0 if dataset.shape_of(rows[0]) == "enron" else eval_rows  # of other files the first rows are held out
    return {index for index in dataset.split(rows, manifest).train if index >= held}


def trained_on(trainings: dict[Path, dict | None], path, rows, manifest) -> tuple[dict, list[set[int]]]:
    """({folder: was its model trained on this file? None: unknown}, the rows of each model that was).

    trainings: of `read_trainings`. A file is told by its SHA-256. Unknown too: a model whose run counted other rows
    than --train_rows and --eval_rows now choose, because the manifest's split has changed since.
    """
    known, chosen = dict.fromkeys(trainings), []
    for folder, record in trainings.items():
        same = input_is(folder.parent, record, results.sha256(path)) if record else None
        if same is False:
            known[folder] = False
        elif same:
            found = trained_rows(rows, manifest, record["args"]["train_rows"], record["args"].get("eval_rows") or 0)
            if record.get("rows", {}).get("train", len(found)) == len(found):
                known[folder] = True
                chosen.append(found)
    return known, chosen


def read_sets(args, problems: cli.Problems) -> tuple[list[tuple], list[tuple], dict, int]:
    """([(id, text)] of the members, of the non-members, `trained_on` of --members, rows left out as not trained on).

    Where run.json tells what was trained on, members are rows that every such model was trained on, and non-members
    rows that none was.
    """
    rows, texts, manifest = read_texts(args.members, args.text_field, problems, "--members")
    known = [(row.get("row_id", index), text) for index, (row, text) in enumerate(zip(rows, texts))]
    trainings = read_trainings(args, problems) if rows else {}
    trained, chosen = trained_on(trainings, args.members, rows, manifest) if rows else ({}, [])

    def members(indices) -> tuple[list[tuple], int]:
        kept = [index for index in indices if all(index in one for one in chosen)]
        return [known[index] for index in kept], len(indices) - len(kept)

    if args.nonmembers and Path(args.nonmembers).absolute() != Path(args.members).absolute():
        others, texts, manifest = read_texts(args.nonmembers, args.text_field, problems, "--nonmembers")
        _, seen = trained_on(trainings, args.nonmembers, others, manifest) if others else ({}, [])
        rest = [(row.get("row_id", index), text) for index, (row, text) in enumerate(zip(others, texts))
                if not any(index in one for one in seen)]  # fmt: skip
        kept, left_out = members(range(len(known)))
        return kept, rest, trained, left_out
    if not rows:
        return [], [], {}, 0
    if dataset.shape_of(rows[0]) != "enron":
        problems.add(f"{args.members}: only files with gt-name are split into trained and held-out rows; "
                     "pass another file as --nonmembers")  # fmt: skip
        return [], [], {}, 0
    split = dataset.split(rows, manifest)
    head = [known[index] for index in split.head if not any(index in one for one in chosen)]
    kept, left_out = members(sorted({*split.train, *(set.intersection(*chosen) if chosen else ())}))
    return kept, head, trained, left_out


def sample(items: list, n: int | None, seed: int) -> list:
    """n of the items drawn by the seed, in their order; all of them when n is None or larger."""
    import numpy as np

    if n is None or n >= len(items):
        return list(items)
    return [items[index] for index in sorted(np.random.default_rng(seed).permutation(len(items))[:n])]


def without(items: list[tuple], unwanted: list[str]) -> list[tuple]:
    """Items (id, text) whose text is no near-duplicate of an unwanted one."""
    from mia import baselines

    found = {index for index, _ in baselines.near_duplicates([text for _, text in items], unwanted)}
    return [item for index, item in enumerate(items) if index not in found]


def choose_shots(args, attacks, members, nonmembers, problems) -> tuple[list[str], list[str]]:
    """(non-member shots, member shots) of recall and con_recall."""
    if not {"recall", "con_recall"} & set(attacks):
        return [], []
    shots = member_shots = []
    if args.prefix_file:
        rows, texts, _ = read_texts(args.prefix_file, args.text_field, problems, "--prefix_file")
        shots = [text for row, text in zip(rows, texts) if row.get("label") != 1][:SHOTS]
        member_shots = [text for row, text in zip(rows, texts) if row.get("label") == 1][:SHOTS]
        if rows and not shots:
            problems.add(f"--prefix_file {args.prefix_file}: every row has label 1; recall needs non-members")
    else:  # at most a quarter of a small set
        shots = [text for _, text in sample(nonmembers, min(SHOTS, len(nonmembers) // 4), args.seed)]
    if "con_recall" in attacks and not member_shots:
        member_shots = [text for _, text in sample(members, min(SHOTS, len(members) // 4), args.seed)]
    return shots, member_shots
