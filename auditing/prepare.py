"""Everything that an audit needs, read and checked before a model is loaded."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from auditing import gates
from auditing.config import PARTS, AuditConfig, Budget, budget_of
from auditing.gates import Gate
from common import chat, dataset, distributed, formats, models, results, sources, tokenization, trained, vllm_engine
from common.models import ModelRef
from common.problems import Problems, check_writable
from common.schema import HEADLINE_ATTACK
from memorization import entities
from memorization.config import MemorizationConfig
from memorization.inventory import ENTITIES, KINDS, Secret
from mia.config import MiaConfig
from mia.dataset import MembershipTask, Reader, SetFlags, read_trainings, trained_on
from mia.dataset import prepare as prepare_membership

WITHOUT_REFERENCE = "min_k_pp_20"  # the membership attack to report without a reference
FEWEST_HELDOUT = 2  # rows left out by training that serve as held-out rows


@dataclass
class Rows:
    """Rows of a data file. indices: rows used, by position in the file; rendered: those rows, as in training."""

    path: str
    n: int  # rows that may be used: of --train, without those that training is known to have left out
    sha256: str
    indices: list[int] = field(default_factory=list)
    rendered: list[chat.Rendered] = field(default_factory=list)


@dataclass
class AuditTask:
    model: ModelRef
    base: ModelRef | None  # the reference: an adapter's base, else --ref_model
    tokenizer: Any
    rows: dict[str, Rows]  # 'train', 'heldout'
    start: list[int]  # tokens before an untargeted sample
    gates: list[Gate]
    budget: Budget
    memorization: MemorizationConfig
    given: list[tuple[str, str, int | None]] | None = None  # --secrets
    in_loss: Callable[[Secret], bool | None] = lambda secret: None
    notes: list[str] = field(default_factory=list)  # caveats for the reader
    membership: tuple[MiaConfig, MembershipTask] | None = None  # None: left out, or no held-out rows
    finder: entities.Finder | None = None  # --ner

    @property
    def inputs(self) -> list[str]:
        return list(dict.fromkeys(rows.path for rows in self.rows.values()))


def prepare(config: AuditConfig) -> AuditTask:
    """UserError with every problem of the flags and files."""
    problems = Problems()
    sources.load((config.train, config.heldout), config.split, config.data_config)
    distributed.check_environment(problems, config.device_map, config.model_parallel, config.quantization)
    check_writable(config.output_dir, problems)
    budget = budget_of(config)
    parsed = [gate for text in config.fail_on if (gate := _gate(text, problems))]
    patterns = _patterns(config.pii, KINDS + (ENTITIES if config.ner else ()), problems)
    if config.ner and config.secrets:
        problems.add(
            "--ner: not with --secrets, whose list replaces what is found in the training rows; drop one of both"
        )
    for part in config.without:
        if part not in PARTS:
            problems.add(f"--without {part}: unknown; choose from {', '.join(PARTS)}")
    files = {"train": config.train} | ({"heldout": config.heldout} if config.heldout else {})
    if config.heldout and same_content(config.train, config.heldout):
        problems.add(f"--heldout {config.heldout}: the same rows as --train; give rows kept back from training")
    membership = membership_config(config, budget)
    reader = Reader(membership, problems, SetFlags("--train", "--heldout"))
    opened = {name: reader.files[path][0] for name, path in files.items() if path in reader.files}
    given = problems.absorb(read_secrets, config.secrets) if config.secrets else None
    named = {row for _, _, row in given or [] if row is not None}
    beyond = [row for row in named if "train" in opened and row >= len(opened["train"])]
    if beyond:
        words = f"row {min(beyond)} is not in {config.train}, which has {len(opened['train'])} rows"
        problems.add(f"--secrets {config.secrets}: {words} (from 0)")
    if config.canaries and not Path(config.canaries).is_file():
        problems.add(f"--canaries {config.canaries}: no such file; give the key that canary/inject.py wrote")
    package = problems.absorb(entities.find_package, config.ner) if config.ner else None
    finder = (
        problems.absorb(entities.load, config.ner, package) if config.ner and package and not problems.lines else None
    )
    ref, tokenizer = models.look_up(
        problems, config.model, config.revision, config.base_model, quantized=config.quantization
    )
    vllm_engine.check(config, problems, ref, quantization=config.quantization)
    base = _reference(ref, tokenizer, config, problems) if ref else None
    problems.check()
    assert ref is not None
    candidates: dict[str, tuple[str, Sequence[int]]]
    candidates = {name: (files[name], range(len(rows_of))) for name, rows_of in opened.items()}
    used, unused = split_by_training(membership, reader, opened["train"], problems)
    if used is not None:
        candidates["train"] = config.train, used if isinstance(used, range) else sorted(used)
        beyond = sorted(row for row in named if row not in used)
        if beyond:
            problems.add(f"--secrets {config.secrets}: row {beyond[0]} of {config.train} was not trained on (run.json)")
        if not config.heldout and len(unused) >= FEWEST_HELDOUT:
            candidates["heldout"] = config.train, unused
    problems.check()
    rows, notes = {}, []
    for name, (path, allowed) in candidates.items():
        keep = named if name == "train" else set()
        own = problems.absorb(_render, path, reader.files[path][0], allowed, tokenizer, config, budget, keep)
        if own:
            rows[name] = own
    problems.check()
    if len({row.rendered[0].whole for row in rows.values()}) > 1:
        problems.add("--heldout: one of --train and --heldout has chat rows, the other does not")
    problems.check()
    sets = None
    new_tokens = bool(base and not config.ref_model and _brings_tokens(ref, tokenizer, rows))
    if new_tokens:
        base = None
    if "heldout" in rows and "membership" not in config.without:
        if config.quick:
            membership = replace(membership, attacks=("loss", HEADLINE_ATTACK if base else WITHOUT_REFERENCE))
        reader.use(tokenizer, ref.name)
        sets = prepare_membership(membership, problems, reader)
        problems.check()
    if new_tokens:
        notes.append(
            "No reference model: the rows have tokens that the adapter brought and its base does not have, so attacks "
            "that compare with the base are impossible and the rest are weaker. Pass --ref_model MODEL."
        )
    elif base is None:
        notes.append(
            "No reference model: a merged or fully tuned model was given without --ref_model, so attacks that compare "
            "with the base are impossible and the rest are weaker. Pass --ref_model BASE."
        )
    if unused:
        count = f"{len(unused):,} rows of {config.train} were not trained on (run.json)"
        if config.heldout:
            notes.append(f"{count} and are left out.")
        else:
            few = f"too few to be held-out rows ({FEWEST_HELDOUT} are needed)"
            notes.append(f"{count}: {'they are the held-out rows.' if 'heldout' in rows else few + '.'}")
    if "heldout" not in rows:
        notes.append("No held-out rows: membership cannot be judged, and secrets have no control but the base.")
    texts = [row.text for part in rows.values() for row in part.rendered if not row.whole]
    if tokenizer and (note := tokenization.bos_note(tokenizer, texts)):
        notes.append(note[:1].upper() + note[1:] + ".")
    return AuditTask(
        ref,
        base,
        tokenizer,
        rows,
        opening(tokenizer, config, ref, rows["train"]),
        parsed,
        budget,
        MemorizationConfig(
            kinds=KINDS,
            patterns=tuple(patterns.items()),
            region=config.region,
            decoys=budget.decoys,
            most_secrets=budget.most_secrets,
            most_windows=budget.most_windows,
            samples=0 if "untargeted" in config.without else budget.samples,
            sample_tokens=budget.sample_tokens,
            max_length=config.max_length,
            token_budget=config.token_budget,
            seed=config.seed,
        ),
        place_in_sample(given, rows["train"].indices) if given else None,
        in_loss_of(ref, rows["train"]),
        notes,
        (membership, sets) if sets else None,
        finder,
    )


def _brings_tokens(ref: ModelRef, tokenizer: Any, rows: dict[str, Rows]) -> bool:
    """Whether an adapter with resized embeddings has tokens in the rows that its base knows nothing of."""
    vocabulary = models.vocabulary_of(ref)
    if len(tokenizer) <= vocabulary:
        return False
    texts = [(row.text, row.whole) for one in rows.values() for row in one.rendered]
    encoded = (ids for text, whole in texts for ids in tokenization.encode_texts(tokenizer, [text], whole))
    return any(max(ids, default=0) >= vocabulary for ids in encoded)


def membership_config(config: AuditConfig, budget: Budget) -> MiaConfig:
    return MiaConfig(
        model=config.model,
        base_model=config.base_model,
        ref_model=config.ref_model,
        members=config.train,
        nonmembers=config.heldout,
        chat_template=config.chat_template,
        columns=config.columns,
        split=config.split,
        data_config=config.data_config,
        revision=config.revision,
        dtype=config.dtype,
        device_map=config.device_map,
        model_parallel=config.model_parallel,
        quantization=config.quantization,
        seed=config.seed,
        max_samples=budget.num_rows,
        max_length=config.max_length,
        token_budget=config.token_budget,
        output_dir=str(Path(config.output_dir) / "membership"),
    )


def same_content(path: str, other: str) -> bool:
    """Whether both are one file, or two files with the same bytes."""
    if not (Path(path).is_file() and Path(other).is_file()):
        return Path(path).absolute() == Path(other).absolute()
    return Path(path).stat().st_size == Path(other).stat().st_size and results.sha256(path) == results.sha256(other)


def _gate(text: str, problems: Problems) -> Gate | None:
    try:
        return gates.parse(text)
    except ValueError as error:
        problems.add(f"--fail_on {text}: {error}")
        return None


def _patterns(given: Sequence[str], taken: Sequence[str], problems: Problems) -> dict[str, str]:
    """{type: regular expression} of --pii name=REGEX."""
    patterns = {}
    for text in given:
        name, sign, pattern = text.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in taken:
            problems.add(f"--pii {text}: give NAME=REGEX, with a name that is not taken")
            continue
        try:
            re.compile(pattern)
            patterns[name] = pattern
        except re.error as error:
            problems.add(f"--pii {name}: not a regular expression ({error})")
    return patterns


def split_by_training(
    membership: MiaConfig, reader: Reader, rows: Sequence[dict[str, Any]], problems: Problems
) -> tuple[Collection[int] | None, Sequence[int]]:
    """(rows of --train that the model was trained on, the rest), by run_peft.py's run.json beside the checkpoint;
    (None, empty) without one, or if it is of another file."""
    manifest = reader.files[membership.members][1]
    _, chosen = trained_on(read_trainings(membership, problems), membership.members, rows, manifest)
    if not chosen:
        return None, ()
    used = chosen[0]
    return used, array("q", (index for index in range(len(rows)) if index not in used))


def _render(
    path: str,
    rows: Sequence[dict[str, Any]],
    allowed: Sequence[int],
    tokenizer: Any,
    config: AuditConfig,
    budget: Budget,
    keep: set[int],
) -> Rows:
    """At most budget.num_rows of the `allowed` rows, sampled by the seed, and all in `keep`; as in training."""
    indices = allowed
    if len(allowed) > budget.num_rows:
        drawn = np.random.default_rng(config.seed).permutation(len(allowed))[: budget.num_rows]
        indices = sorted({allowed[place] for place in drawn.tolist()} | keep)
    renderer = dataset.read_renderer(rows, tokenizer, config.chat_template, config.model)
    rendered = dataset.render(path, rows, indices, renderer)
    return Rows(path, len(allowed), results.sha256(path), list(indices), rendered)


def _reference(ref: ModelRef, tokenizer: Any, config: AuditConfig, problems: Problems) -> ModelRef | None:
    if config.ref_model:
        given = (problems, config.ref_model, None, config.base_model, "--ref_model")
        other, its_own = models.look_up(*given, quantized=config.quantization)
        if its_own and tokenizer and its_own.get_vocab() != tokenizer.get_vocab():
            problems.add(
                f"--ref_model {config.ref_model}: has a different tokenizer than {ref.name}; give its own base"
            )
        return other
    return ref.unadapted if ref.adapter else None


def opening(tokenizer: Any, config: AuditConfig, ref: ModelRef, train: Rows) -> list[int]:
    """The tokens that an unprompted sample starts with: the chat template's before the user's first words, or BOS (EOS
    if there is no BOS)."""
    first = train.rendered[0]
    if first.whole:
        renderer = chat.Renderer(tokenizer, chat.read_template(config.chat_template, tokenizer, ref.name))
        ids: list[int] = tokenization.encode_texts(tokenizer, [renderer.frame()[0]], True)[0]
        if ids:
            return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [int(start)]


def in_loss_of(ref: ModelRef, train: Rows) -> Callable[[Secret], bool | None]:
    """Whether the loss was taken on a secret: from run_peft.py's trained_rows.jsonl next to the adapter, else from the
    completions of chat and prompt/completion rows, else unknown."""
    folder = Path(ref.adapter or ref.base).expanduser()
    known = trained.read(folder) if folder.is_dir() else None

    def in_loss(secret: Secret) -> bool | None:
        row = train.rendered[secret.row]
        if known is not None:
            return any(one.covers(secret.start, secret.end) for one in known.find(row.text))
        if row.completions is None:
            return None
        return any(start <= secret.start and secret.end <= end for start, end in row.completions)

    return in_loss


def place_in_sample(
    given: Sequence[tuple[str, str, int | None]], indices: Sequence[int]
) -> list[tuple[str, str, int | None]]:
    """The given secrets with the positions of their rows among the rows used."""
    positions = {index: position for position, index in enumerate(indices)}
    return [(kind, value, None if row is None else positions[row]) for kind, value, row in given]


SECRET_FIELDS = ("type", "value")


def read_secrets(path: str) -> list[tuple[str, str, int | None]]:
    """(type, value, row or None) of --secrets, a .csv or .jsonl with the columns type, value and, if known, row."""
    rows = formats.read_rows(path)
    dataset.validate(path, rows, SECRET_FIELDS)
    problems = Problems()
    given = []
    for index, row in enumerate(rows):
        number = row.get("row")
        if isinstance(number, str) and number.strip().isdigit():
            number = int(number)
        if number in ("", None):
            number = None
        elif not dataset.is_count(number):
            problems.add(f"--secrets {path}: row {index}: 'row' must be the number of a training row, from 0")
        if not row["value"].strip():
            problems.add(f"--secrets {path}: row {index}: 'value' is empty")
        given.append((row["type"], row["value"], number))
    problems.check()
    return given
