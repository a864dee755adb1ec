"""What every model is asked: secrets with decoys, verbatim windows, what samples are searched for."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.chat import Rendered, token_span
from common.tokenization import extra_start
from memorization import inventory, questions
from memorization.config import MemorizationConfig
from memorization.inventory import ENTITIES, Secret, normal
from memorization.questions import Question, Questions
from memorization.untargeted import RunIndex, ValueIndex
from memorization.verbatim import Window, window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("train", "heldout")
InLoss = Callable[[Secret], bool | None]


@dataclass
class Side:
    """One set of rows. ids: token ids, truncated at the maximum length; values: of the secrets in it."""

    rendered: list[Rendered]
    secrets: list[Secret] = field(default_factory=list)
    questions: dict[str, Questions] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    n_short: int = 0  # rows too short for a window
    ids: list[list[int]] = field(default_factory=list)

    def all_questions(self) -> list[Question]:
        return [question for found in self.questions.values() for question in found.questions]


@dataclass
class MemorizationTask:
    sides: dict[str, Side]
    start: list[int]  # tokens before an untargeted sample
    shared_values: int = 0  # distinct held-out secrets that also occur in the training rows, so are no control
    given_absent: int = 0  # given secrets that occur in no row
    single: frozenset[str] | None = None  # keys of the names that stand in one row of both sides; None: none looked for

    @property
    def controlled(self) -> bool:
        return "heldout" in self.sides

    def is_name(self, kind: str) -> bool:
        """Whether secrets of this type are names that a model found."""
        return self.single is not None and kind in ENTITIES

    def comparable(self, secret: Secret) -> bool:
        """Whether a secret counts where training and held-out rows are compared.

        Of names only those in a single row do: one that is frequent where the rows come from stands in training rows
        rather than in held-out rows alone, and is likely without having been memorised.
        """
        return not self.is_name(secret.kind) or secret.key in (self.single or ())

    def sought(self, side: str) -> list[str]:
        """The values of a side's secrets that samples are searched for."""
        return [secret.value for secret in self.sides[side].secrets if self.comparable(secret)]

    def needles(self, side: str) -> ValueIndex:
        return ValueIndex(self.sought(side))

    def runs(self, side: str) -> RunIndex:
        return RunIndex(self.sides[side].ids)


def prepare(
    train: list[Rendered],
    heldout: list[Rendered] | None,
    tokenizer: PreTrainedTokenizerBase,
    start: list[int],
    config: MemorizationConfig,
    given: Sequence[tuple[str, str, int | None]] | None = None,
    in_loss: InLoss = lambda secret: None,
    names: Mapping[str, Sequence[Sequence[tuple[int, int, str]]]] | None = None,
) -> MemorizationTask:
    """given: (type, value, row or None) of the owner's own secrets, which replace the inventory for the training rows;
    held-out rows are searched as usual. names: {side: (start, end, type) of the names in each of its rows}."""
    patterns = {name: re.compile(pattern) for name, pattern in config.patterns}
    task = MemorizationTask({"train": Side(train)}, start)
    if heldout is not None:
        task.sides["heldout"] = Side(heldout)
    for name, side in task.sides.items():
        texts = [row.text for row in side.rendered]
        if name == "train" and given is not None:
            side.secrets, task.given_absent = inventory.locate(texts, given)
        else:
            found = names[name] if names is not None else None
            side.secrets = inventory.find(texts, config.kinds, patterns, config.region, found)
    if names is not None:
        task.single = in_one_row(task.sides)
    if "heldout" in task.sides:
        trained = {secret.key for secret in task.sides["train"].secrets}
        side = task.sides["heldout"]
        task.shared_values = len({secret.key for secret in side.secrets} & trained)
        side.secrets = [secret for secret in side.secrets if secret.key not in trained]
    avoid = {secret.value for side in task.sides.values() for secret in side.secrets}
    if task.single is not None:
        avoid |= {secret.key for side in task.sides.values() for secret in side.secrets if secret.kind in ENTITIES}
    for name, side in task.sides.items():
        side.questions = questions.build(
            side.secrets,
            side.rendered,
            tokenizer,
            n_decoys=config.decoys,
            most=config.most_secrets,
            max_length=config.max_length,
            seed=config.seed,
            avoid=avoid,
            region=config.region,
            in_loss=in_loss if name == "train" else lambda secret: None,
            first_of=task.single or (),
        )
        add_windows(side, tokenizer, config)
    return task


def in_one_row(sides: Mapping[str, Side]) -> frozenset[str]:
    """The keys of the names that stand in exactly one row of all sides."""
    places = {
        (secret.key, name, secret.row)
        for name, side in sides.items()
        for secret in side.secrets
        if secret.kind in ENTITIES
    }
    counts = Counter(key for key, *_ in places)
    return frozenset(key for key, n in counts.items() if n == 1)


def add_windows(side: Side, tokenizer: PreTrainedTokenizerBase, config: MemorizationConfig) -> None:
    """Tokenise the rows and take a window from each that is long enough, at most config.most_windows, by the seed.

    For rows with a completion, the window's suffix lies within it.
    """
    whole = bool(side.rendered) and side.rendered[0].whole
    encoded = tokenizer(
        [row.text for row in side.rendered], return_offsets_mapping=True, add_special_tokens=not whole, verbose=False
    )
    windows = []
    for number, (row, ids, places) in enumerate(zip(side.rendered, encoded["input_ids"], encoded["offset_mapping"])):
        extra = extra_start(tokenizer, ids)
        ids, places = ids[extra:][: config.max_length], places[extra:][: config.max_length]
        side.ids.append(ids)
        spans = [(1, len(ids))]
        if row.completions is not None:
            spans = [token_span(places, *completion) for completion in row.completions]
        found = window(number, ids, spans, config.prefix, config.suffix)
        windows += [found] if found else []
    side.n_short = len(side.rendered) - len(windows)
    if len(windows) > config.most_windows:
        places = sorted(random.Random(config.seed).sample(range(len(windows)), config.most_windows))
        windows = [windows[place] for place in places]
    side.windows = windows


def repeats(side: Side, windows: Sequence[Window]) -> list[int]:
    """Number (≥ 1) of the side's rows that contain each window's text, ignoring white space and case."""
    counts = Counter(normal(row.text) for row in side.rendered)
    return [counts[normal(side.rendered[window.row].text)] for window in windows]
