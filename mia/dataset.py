"""The two sets of texts: reading, sampling, choosing shots, excluding what must not be scored."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from common import dataset, formats, manifests, models, provenance, results
from common.checkpoints import find_checkpoints
from common.problems import Problems, UserError
from common.rows import Lazy, Row, select
from common.schema import CORE, FAMILIES, SHADOW_ATTACKS
from common.shadows import read as read_shadows
from common.text import near_duplicates
from common.trained import input_is
from mia.attacks import PERCENTS
from mia.config import MiaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.shadows import Shadows
    from mia.metrics import Floats

SHOTS = 12
Trained = dict[Path, bool | None]  # model folder → whether it was trained on a file; None: unknown
T = TypeVar("T")
WithText = TypeVar("WithText", bound=tuple[Any, ...])  # (id, text, …)


class Item(NamedTuple):
    """A row of one of the two sets."""

    key: Any  # its row_id, else its index
    text: str
    row: Row
    place: int  # its index in the file


class SetFlags(NamedTuple):
    """The flags that named the two sets, as messages give them."""

    members: str = "--members"
    nonmembers: str = "--nonmembers"


@dataclass
class MembershipTask:
    """Everything about the two sets and the attacks that does not depend on a model."""

    texts: list[str]  # members first, each set in the order of its file
    ids: list[Any]  # of each text: its row_id, else its index in the file
    labels: list[int]
    attacks: list[str]  # families, or single sizes as min_k_20
    written: list[str] | None = None  # the human-written part of each text; None: all of it
    whole: bool = False  # a chat template wrote the special tokens of every text
    shots: list[str] = field(default_factory=list)  # non-members
    member_shots: list[str] = field(default_factory=list)
    corpus: Sequence[str] | None = None  # of dc_pdd
    inputs: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # rows excluded, by reason
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # (member, non-member), indices into texts
    trained: Trained = field(default_factory=dict)  # whether each model was trained on --members
    blind: dict[str, Floats | None] = field(default_factory=dict)  # baseline → [n]; set by the first measurement
    blind_test: dict[str, Any] | None = None  # set-level test of the baselines; set by the first measurement
    indices: list[int] = field(default_factory=list)  # of each text: its row in its file
    shadows: Shadows | None = None  # of --shadows


class Reader:
    """Reads data files as in training: chat rows are rendered with the chat template of the attacked model.

    The constructor runs before any model is looked up: it reads and validates every file of `config` and adds to
    `problems`.
    """

    def __init__(self, config: MiaConfig, problems: Problems, flags: SetFlags | None = None) -> None:
        self.config, self.problems, self.flags = config, problems, flags or SetFlags()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.model = ""
        self.chat: dict[str, bool] = {}  # flag → whether its file has chat rows
        self.files: dict[str, tuple[Sequence[Row], dict[str, Any] | None]] = {}  # path → rows, manifest; both usable
        before = len(problems.lines)
        for path in dict.fromkeys((config.members, config.nonmembers, config.prefix_file, config.freq_corpus)):
            if path:
                self._open(path)
        self.readable = len(problems.lines) == before

    def _open(self, path: str) -> None:
        problems, field = self.problems, self.config.text_field
        rows = problems.absorb(formats.open_rows, path, self.config.columns)
        if rows is None:
            return
        manifest = problems.absorb(manifests.read_manifest, path)
        before = len(problems.lines)
        problems.absorb(dataset.validate, path, rows, (field,) if field else None)
        if len(problems.lines) == before:
            self.files[path] = rows, manifest

    def use(self, tokenizer: PreTrainedTokenizerBase | None, model: str) -> None:
        """Render chat rows with the tokenizer of `model` (None if none was found, which is reported elsewhere)."""
        self.tokenizer, self.model = tokenizer, model

    def read(self, path: str, flag: str) -> tuple[Sequence[Row], Sequence[str], dict[str, Any] | None]:
        """(rows, their texts, manifest) of one of the files; all empty if it has problems.

        Texts of rows that stay on disk are rendered when asked for."""
        if path not in self.files:
            return [], [], None
        problems, field = self.problems, self.config.text_field
        rows, manifest = self.files[path]
        self.chat[flag] = not field and dataset.shape_of(rows[0]) == "chat"
        if field:
            return rows, _texts(rows, lambda row: str(row[field])), manifest
        renderer = None
        if self.chat[flag]:
            if self.tokenizer is None:
                if not problems.lines:
                    problems.add(f"{flag} {path}: chat rows need a model's chat template; give a single --model")
                return [], [], None
            template = self.config.chat_template
            renderer = problems.absorb(dataset.read_renderer, rows, self.tokenizer, template, self.model)
            if renderer is None:
                return [], [], None
        rendered = problems.absorb(dataset.rendering, path, rows, range(len(rows)), renderer)
        return (rows, _texts(rendered, lambda row: row.text), manifest) if rendered else ([], [], None)

    def check(self) -> bool:
        """Whether the files have chat rows; adds a problem if only some do, or if --chat_template has no use."""
        if len(set(self.chat.values())) > 1:
            kinds = ", ".join(f"{flag} {'has' if chat else 'has no'} messages" for flag, chat in self.chat.items())
            self.problems.add(f"the files have different kinds of rows: {kinds}")
        elif self.chat and not any(self.chat.values()) and self.config.chat_template:
            self.problems.add(f"--chat_template {self.config.chat_template}: the rows are not chat rows; drop the flag")
        return any(self.chat.values())


def read_trainings(config: MiaConfig, problems: Problems) -> dict[Path, dict[str, Any] | None]:
    """{folder: run_peft.py's run.json beside it, or None} for --model, or for every checkpoint-* in --dir."""
    trainings: dict[Path, dict[str, Any] | None] = {}
    for target in [config.model] if config.model else find_checkpoints(config.dir) if config.dir else []:
        folder = Path(os.path.realpath(Path(target).expanduser()))
        is_checkpoint = folder.name.startswith("checkpoint-")
        record = (problems.absorb(provenance.training_record, folder) if is_checkpoint else None) or {}
        trainings[folder] = record if "train_rows" in record.get("args", {}) and record.get("inputs") else None
    return trainings


def trained_rows(
    rows: Sequence[Row], manifest: dict[str, Any] | None, train_rows: int | None, eval_rows: int
) -> Collection[int]:
    """Indices of the rows that run_peft.py trains on, given --train_rows and --eval_rows."""
    if train_rows is not None:
        return range(len(rows) - train_rows, len(rows))
    chosen = dataset.split(rows, manifest).train
    if dataset.shape_of(rows[0]) == "enron":
        return chosen if isinstance(chosen, range) else set(chosen)
    return range(min(eval_rows, len(rows)), len(rows))  # in other files the first rows are held out


def trained_on(
    trainings: dict[Path, dict[str, Any] | None], path: str, rows: Sequence[Row], manifest: dict[str, Any] | None
) -> tuple[Trained, list[Collection[int]]]:
    """({folder: whether its model was trained on this file, None: unknown}, the row sets of the models that were).

    trainings: from `read_trainings`. Files are identified by SHA-256. Also unknown: a model whose run used a different
    number of rows than --train_rows and --eval_rows now select, because the manifest's split has changed since.
    """
    known: Trained = dict.fromkeys(trainings)
    row_sets: list[Collection[int]] = []
    for folder, record in trainings.items():
        if record is None:
            continue
        same = input_is(folder.parent, record, results.sha256(path))
        if same is False:
            known[folder] = False
        elif same:
            used = trained_rows(rows, manifest, record["args"]["train_rows"], record["args"].get("eval_rows") or 0)
            if record.get("rows", {}).get("train", len(used)) == len(used):
                known[folder] = True
                row_sets.append(used)
    return known, row_sets


def items_of(rows: Sequence[Row], texts: Sequence[str]) -> Sequence[Item]:
    """The items of a file's rows."""

    def item(index: int) -> Item:
        row = rows[index]
        return Item(row.get("row_id", index), texts[index], row, index)

    return [item(index) for index in range(len(rows))] if isinstance(rows, list) else Lazy(item, len(rows))


def read_sets(reader: Reader) -> tuple[Sequence[Item], Sequence[Item], Trained, int]:
    """(the members, the non-members, `trained_on` of --members, number of rows excluded because they were not trained
    on).

    If run.json records the training rows, members are rows that every such model was trained on, and non-members are
    rows that none of them was.
    """
    config, problems, flags = reader.config, reader.problems, reader.flags
    rows, texts, manifest = reader.read(config.members, flags.members)
    known = items_of(rows, texts)
    trainings = read_trainings(config, problems) if rows else {}
    trained, chosen = trained_on(trainings, config.members, rows, manifest) if rows else ({}, [])

    def members(indices: Sequence[int]) -> tuple[Sequence[Item], int]:
        kept = _filtered(indices, (lambda index: all(index in used for used in chosen)) if chosen else None)
        return select(known, kept), len(indices) - len(kept)

    if config.nonmembers and Path(config.nonmembers).absolute() != Path(config.members).absolute():
        others, texts, manifest = reader.read(config.nonmembers, flags.nonmembers)
        _, seen = trained_on(trainings, config.nonmembers, others, manifest) if others else ({}, [])
        rest = select(items_of(others, texts), _outside(seen, range(len(others))))
        if len(rest) < 2 and len(rest) < len(others):
            overlap = f"{len(others) - len(rest)} of its {len(others)} rows were trained on"
            problems.add(f"{flags.nonmembers} {config.nonmembers}: {overlap} (run.json); give rows that were not")
        kept, left_out = members(range(len(known)))
        return kept, rest, trained, left_out
    if not rows:
        return [], [], {}, 0
    if dataset.shape_of(rows[0]) != "enron" and chosen:
        kept, left_out = members(range(len(known)))
        unused = select(known, _outside(chosen, range(len(known))))
        return kept, unused, trained, left_out - len(unused)
    if dataset.shape_of(rows[0]) != "enron":
        problems.add(
            f"{config.members}: only files with gt-name are split into training and held-out rows; "
            f"pass a second file as {flags.nonmembers}"
        )
        return [], [], {}, 0
    split = dataset.split(rows, manifest)
    head = select(known, _outside(chosen, split.head))
    kept, left_out = members(sorted({*split.train, *set.intersection(*map(set, chosen))}) if chosen else split.train)
    return kept, head, trained, left_out


def _filtered(indices: Sequence[int], wanted: Callable[[int], bool] | None) -> Sequence[int]:
    return indices if wanted is None else array("q", filter(wanted, indices))


def _outside(row_sets: Sequence[Collection[int]], indices: Sequence[int]) -> Sequence[int]:
    """The indices that are in none of the sets."""
    return _filtered(indices, (lambda index: not any(index in rows for rows in row_sets)) if row_sets else None)


def _texts(items: Sequence[T], text: Callable[[T], str]) -> Sequence[str]:
    """The text of each item; of items that stay on disk, when asked for."""
    return [text(item) for item in items] if isinstance(items, list) else Lazy(lambda at: text(items[at]), len(items))


def sample(items: Sequence[T], n: int | None, seed: int) -> list[T]:
    """n items drawn by the seed, in their original order; all of them if n is None or larger."""
    if n is None or n >= len(items):
        return list(items)
    return [items[index] for index in sorted(np.random.default_rng(seed).permutation(len(items))[:n])]


def without(items: Sequence[WithText], unwanted: Sequence[str]) -> Sequence[WithText]:
    """Items (id, text, …) whose text is not a near-duplicate of an unwanted one."""
    if not unwanted:
        return items
    excluded = {index for index, _ in near_duplicates((text for _, text, *_ in items), unwanted)}
    return select(items, array("q", (index for index in range(len(items)) if index not in excluded)))


def choose_shots(
    reader: Reader, attacks: Collection[str], members: Sequence[Item], nonmembers: Sequence[Item]
) -> tuple[list[str], list[str]]:
    """(non-member shots, member shots) for recall and con_recall."""
    config, problems = reader.config, reader.problems
    if not {"recall", "con_recall"} & set(attacks):
        return [], []
    shots: list[str] = []
    member_shots: list[str] = []
    if config.prefix_file:
        rows, texts, _ = reader.read(config.prefix_file, "--prefix_file")
        shots, member_shots = (
            [texts[at] for at in islice((at for at, row in enumerate(rows) if (row.get("label") == 1) is own), SHOTS)]
            for own in (False, True)
        )
        if rows and not shots:
            problems.add(f"--prefix_file {config.prefix_file}: every row has label 1; recall needs non-members")
    else:  # at most a quarter of a small set
        shots = [item.text for item in sample(nonmembers, min(SHOTS, len(nonmembers) // 4), config.seed)]
    if "con_recall" in attacks and not member_shots:
        member_shots = [item.text for item in sample(members, min(SHOTS, len(members) // 4), config.seed)]
    return shots, member_shots


def choose_attacks(config: MiaConfig, problems: Problems) -> list[str]:
    """The requested attacks, in the order of FAMILIES; --shadows adds its own to them."""
    asked: Sequence[str]
    if config.attacks is None:
        extra = (
            (config.prefix_file, ("recall", "con_recall")),
            (config.freq_corpus, ("dc_pdd",)),
            (config.neighbor_model, ("neighborhood",)),
        )
        asked = ["core", *(name for given, names in extra if given for name in names)]
    else:
        asked = config.attacks
    sizes = {f"{family}_{k}": family for family in ("min_k", "min_k_pp") for k in PERCENTS}
    for name in asked:
        if name in SHADOW_ATTACKS:
            if not config.shadows:
                problems.add(f"--attacks {name}: needs --shadows, the --output_dir of mia/shadow.py")
        elif name not in (*FAMILIES, *sizes, "core", "all"):
            problems.add(
                f"--attacks {name}: unknown; choose from {' '.join(FAMILIES)}, min_k_10 … min_k_pp_100, core, all"
            )
    wanted = set(asked) | (set(CORE) if "core" in asked else set()) | (set(FAMILIES) if "all" in asked else set())
    if "dc_pdd" in wanted and not config.freq_corpus:
        problems.add("--attacks dc_pdd: needs --freq_corpus, a data file whose rows are in neither set")
    order = [name for family in FAMILIES for name in (family, *(size for size in sizes if sizes[size] == family))]
    return [name for name in order if name in wanted]


def prepare(config: MiaConfig, problems: Problems, reader: Reader) -> MembershipTask | None:
    """Read and check everything that the attacks need, before any model is loaded; None if something is wrong."""
    before = len(problems.lines)
    attacks = choose_attacks(config, problems)
    shadows = problems.absorb(read_shadows, config.shadows) if config.shadows else None
    members, nonmembers, trained, not_trained = read_sets(reader)
    shots, member_shots = choose_shots(reader, attacks, members, nonmembers)
    corpus = None
    if config.freq_corpus:
        _, corpus, _ = reader.read(config.freq_corpus, "--freq_corpus")
    whole = reader.check()
    if config.neighbor_model:
        problems.absorb(check_masked, config.neighbor_model, bool(problems.lines))
    paths = config.members, config.nonmembers or config.members
    for flag, path, items in zip(reader.flags, paths, (members, nonmembers)):
        if len(items) < 2 and len(problems.lines) == before and reader.readable:
            count = "1 usable row" if items else "no usable row"
            problems.add(f"{flag} {path}: {count}, at least 2 are needed")
    if len(problems.lines) > before or not reader.readable:
        return None

    counts = {"members_in_files": len(members), "nonmembers_in_files": len(nonmembers)}
    both = [*shots, *member_shots]
    members, nonmembers = without(members, both), without(nonmembers, both)
    counts["prefix_rows_excluded"] = sum(counts.values()) - len(members) - len(nonmembers)
    counts["members_not_trained"] = not_trained
    members, nonmembers = (sample(items, config.max_samples, config.seed) for items in (members, nonmembers))
    if min(len(members), len(nonmembers)) < 2:
        problems.add(f"{len(members)} members and {len(nonmembers)} non-members are left besides the shots: too few")
        return None
    both_sets = [*members, *nonmembers]
    texts = [item.text for item in both_sets]
    if corpus is not None:
        excluded = {index for index, _ in near_duplicates(corpus, texts)}
        counts["freq_corpus_rows_excluded"] = len(excluded)
        if excluded:
            corpus = select(corpus, array("q", (at for at in range(len(corpus)) if at not in excluded)))
        if not corpus:
            problems.add(f"--freq_corpus {config.freq_corpus}: every row is in one of the sets; give another file")
            return None

    pairs = near_duplicates(texts[: len(members)], texts[len(members) :])
    inputs = [config.members, config.nonmembers, config.prefix_file, config.freq_corpus]
    inputs += map(str, shadows.inputs) if shadows else []
    return MembershipTask(
        texts=texts,
        ids=[item.key for item in both_sets],
        written=[dataset.written(item.row) for item in both_sets] if whole else None,
        whole=whole,
        labels=[1] * len(members) + [0] * len(nonmembers),
        attacks=attacks,
        shots=shots,
        member_shots=member_shots,
        corpus=corpus,
        inputs=[str(path) for path in dict.fromkeys(inputs) if path],
        counts=counts,
        trained=trained,
        duplicates=[(member, len(members) + other) for member, other in pairs],
        indices=[item.place for item in both_sets],
        shadows=shadows,
    )


def check_masked(folder: str, files_only: bool) -> None:
    """UserError unless `folder` is the directory of a masked LM with a fast tokenizer.

    files_only: only check that it exists, without transformers.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"--neighbor_model {folder}: not a directory with a config.json; give a local masked LM")
    if files_only:
        return
    from transformers import AutoModelForMaskedLM

    config = models.read_config(folder, None, "--neighbor_model")
    models.check_weights(Path(folder), "--neighbor_model")
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise UserError(f"--neighbor_model {folder}: not a masked language model")
    tokenizer = models.read_tokenizer(folder, None, f"--neighbor_model {folder}")
    if not tokenizer.is_fast or tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"--neighbor_model {folder}: needs a fast tokenizer with a mask and a pad token")
