"""From texts to scores for one model: tokenisation, the forward passes that the attacks need, the scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from common import models, tokenization
from mia import attacks
from mia.config import MiaConfig
from mia.dataset import MembershipTask
from mia.forward import DEVIATION, HIT, LOGP, MEAN, Array, Passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.models import ModelRef

Scores = dict[str, list[float | None]]  # attack → score of each text
Reasons = dict[str, dict[int, str]]  # attack → {index of a text without a score: why}
T = TypeVar("T")
CORPUS_BLOCK = 1000  # texts of the frequency corpus that are tokenised together


@dataclass
class Encoded:
    """A model's tokens of every text."""

    texts: list[str]  # truncated to match the tokens
    tokens: list[list[int]]
    lower: list[list[int]]
    specials: list[int]  # the special tokens that the tokenizer puts before every text
    cut: int  # number of truncated texts


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, whole: bool = False) -> Encoded:
    """Tokens as the tokenizer gives them (no BOS is added here), at most `limit`; texts are truncated to match.

    whole: the texts already contain all special tokens.
    """
    coded = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=not whole, verbose=False)
    tokens: list[list[int]] = []
    shown: list[str] = []
    cut = 0
    for text, ids, offsets in zip(texts, coded.input_ids, coded.offset_mapping):
        extra = tokenization.extra_start(tokenizer, ids)
        ids, offsets = ids[extra:], offsets[extra:]
        if len(ids) > limit:
            text, cut = text[: max(end for _, end in offsets[:limit])], cut + 1
        tokens.append(ids[:limit])
        shown.append(text)
    lowered = lower_case(tokenizer, shown) if whole else [text.lower() for text in shown]
    lower = [ids[:limit] for ids in tokenization.encode_texts(tokenizer, lowered, whole)]
    specials = common_start(tokenizer, tokens) if whole else leading_specials(tokenizer)
    return Encoded(shown, tokens, lower, specials, cut)


def lower_case(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """The texts in lower case, except for the special tokens in them."""
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
    pattern = re.compile("(" + "|".join(sorted(special, key=len, reverse=True)) + ")") if special else None
    if pattern is None:
        return [text.lower() for text in texts]
    pieces = [pattern.split(text) for text in texts]
    return ["".join(piece if number % 2 else piece.lower() for number, piece in enumerate(text)) for text in pieces]


def common_start(tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]) -> list[int]:
    """[BOS] if every text starts with it, else []."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and all(ids[:1] == [start] for ids in tokens) else []


def encode_same(tokenizer: PreTrainedTokenizerBase, texts: list[str], target: Encoded, whole: bool = False) -> Encoded:
    """A reference model's tokens of the part of each text that the target saw: the target's tokens if its tokenizer
    encodes the whole text alike, else its own tokens of the truncated text, however many."""
    all_tokens = tokenization.encode_texts(tokenizer, texts, whole)
    others = [index for index, mine in enumerate(target.tokens) if all_tokens[index][: len(mine)] != mine]
    coded = tokenization.encode_texts(tokenizer, [target.texts[index] for index in others], whole)
    anew = dict(zip(others, coded))
    tokens = [anew.get(index, mine) for index, mine in enumerate(target.tokens)]
    specials = common_start(tokenizer, tokens) if whole else leading_specials(tokenizer)
    return Encoded(target.texts, tokens, [], specials, target.cut)


def leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text (not those after it, such as EOS)."""
    coded = tokenizer("a", return_special_tokens_mask=True)
    leading: list[int] = coded.input_ids[: coded.special_tokens_mask.index(0)]
    return leading


def make_prefix(
    tokenizer: PreTrainedTokenizerBase, shots: list[str], specials: list[int], limit: int, room: int
) -> tuple[list[int], int]:
    """(tokens of as many shots as fit into `room`, each at most `limit` tokens plus a newline; how many shots).

    The prefix starts with `specials`, like a text; special tokens that the tokenizer puts after a text are omitted.
    """
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    prefix, used = list(specials), 0
    for shot in shots:
        ids = tokenizer(shot, add_special_tokens=False, verbose=False).input_ids[:limit]
        if specials and ids[: len(specials)] == specials:  # written by a chat template
            ids = ids[len(specials) :]
        if len(prefix) + len(ids) + len(newline) > room:
            break
        prefix, used = [*prefix, *ids, *newline], used + 1
    return (prefix, used) if used else ([], 0)


NEW_TOKEN = "has a token that the adapter brought and its base does not have"


def scorable(encoded: Encoded, context: int) -> list[int]:
    """Indices of the texts that a model with this context can score: 2 tokens or more, and not too many."""
    return [index for index, ids in enumerate(encoded.tokens) if 1 < len(ids) <= context]


@dataclass
class Evidence:
    """Results of the passes over one model, on rank 0: arrays by text index, without entries for texts that have none.
    On other ranks there are no arrays."""

    encoded: Encoded
    tokens: dict[int, Array]  # token statistics [n, 4]
    lower: dict[int, Array] = field(default_factory=dict)  # log p [n] of the lower-cased text
    after: dict[str, dict[int, Array]] = field(default_factory=dict)  # 'recall', 'con_recall' → log p [n]
    neighbours: dict[int, Array] = field(default_factory=dict)  # [25] ℓ of each neighbour
    gradient: dict[int, Array] = field(default_factory=dict)  # [1] ‖∇ ℓ‖₂
    shots: dict[str, int] = field(default_factory=dict)  # 'recall', 'con_recall' → how many fit
    vocabulary: int = 1 << 30  # tokens from here on are not the model's


def gather(
    passes: Passes,
    ref: ModelRef,
    tokenizer: PreTrainedTokenizerBase,
    task: MembershipTask,
    config: MiaConfig,
    gradients: bool,
    target: Encoded | None = None,
    vocabulary: int | None = None,
) -> Evidence:
    """Run every pass over one model that the task's attacks need (gradients: including grad_norm's).

    target: for a reference model, the target's encoding; its texts are truncated where the target's were.
    vocabulary: of a base whose adapter may have brought tokens; texts with other tokens are left out.
    """
    context = models.context_of(ref)
    if target:
        encoded = encode_same(tokenizer, task.texts, target, task.whole)
    else:
        encoded = encode(tokenizer, task.texts, min(config.max_length, context), task.whole)
    wanted = set(task.attacks)

    def known(ids: Sequence[int]) -> bool:
        return vocabulary is None or max(ids, default=0) < vocabulary

    scored = [index for index in scorable(encoded, context) if known(encoded.tokens[index])]
    sequences = [encoded.tokens[index] for index in scored]

    def over(indices: Iterable[int], arrays: list[Array]) -> dict[int, Array]:
        return dict(zip(indices, arrays)) if arrays else {}

    evidence = Evidence(encoded, over(scored, passes.statistics(ref, sequences)))
    evidence.vocabulary = vocabulary or evidence.vocabulary
    if "lowercase" in wanted:
        low = [index for index in scored if len(encoded.lower[index]) > 1 and known(encoded.lower[index])]
        evidence.lower = over(low, passes.statistics(ref, [encoded.lower[index] for index in low], "logp"))
    longest = max(map(len, sequences), default=0)
    for name, shots in (("recall", task.shots), ("con_recall", task.member_shots)):
        if name in wanted or (name == "recall" and "con_recall" in wanted):
            room = context - longest
            prefix, used = make_prefix(tokenizer, shots, encoded.specials, config.max_length, room)
            evidence.shots[name] = used if known(prefix) else 0
            if evidence.shots[name]:
                skip = min(1, len(encoded.specials))  # a second one is scored, so it stays before the text
                evidence.after[name] = over(scored, passes.after_prefix(ref, sequences, prefix, skip))
    if "neighborhood" in wanted:
        chosen = [encoded.texts[index] for index in scored]
        neighbours = passes.neighbours(
            ref,
            sequences,
            chosen,
            tokenizer,
            min(config.max_length, context),
            config.seed,
            config.neighbor_model,
            task.whole,
        )
        evidence.neighbours = over(scored, neighbours)
    if "grad_norm" in wanted and gradients and ref.adapter:
        evidence.gradient = over(scored, passes.gradient_norms(ref, sequences))
    return evidence


def score_texts(
    task: MembershipTask,
    config: MiaConfig,
    evidence: Evidence,
    reference: Evidence | None,
    frequencies: npt.NDArray[np.int64] | None,
) -> tuple[Scores, Reasons]:
    """({attack: [score or None, …]}, {attack: {index: reason for a None}}), one score per text of the task.

    frequencies: from `count_tokens`; None if dc_pdd is not among the attacks.
    """
    scores: Scores = {}
    reasons: Reasons = {}

    def apply(keys: list[str], function: Callable[[int], float | list[float]]) -> None:
        """function(index) → a float, or one per key in `keys`; it may raise Undefined."""
        columns: list[list[float | None]] = [[] for _ in keys]
        for index in range(len(task.texts)):
            try:
                if index not in evidence.tokens:
                    short = len(evidence.encoded.tokens[index]) < 2
                    raise attacks.Undefined("under 2 tokens" if short else NEW_TOKEN)
                made = function(index)
                numbers = [made] if isinstance(made, float) else made
                if not all(abs(number) < float("inf") for number in numbers):
                    raise attacks.Undefined("not a finite number")
                values: Sequence[float | None] = numbers
            except attacks.Undefined as reason:
                values = [None] * len(keys)
                for key in keys:
                    reasons.setdefault(key, {})[index] = str(reason)
            for column, value in zip(columns, values):
                column.append(value)
        scores.update(zip(keys, columns))

    def logp(index: int) -> Array:
        return evidence.tokens[index][:, LOGP]

    def need(values: Mapping[int, T], index: int, otherwise: str) -> T:
        if index not in values:
            raise attacks.Undefined(otherwise)
        return values[index]

    def base(index: int, tokenwise: bool = True) -> Array:
        if reference is None:
            raise attacks.Undefined("no reference model; give --ref_model")
        if tokenwise and reference.encoded.tokens[index] != evidence.encoded.tokens[index]:
            raise attacks.Undefined("the reference model has other tokens")
        ids = reference.encoded.tokens[index]
        if ids and index not in reference.tokens and max(ids) >= reference.vocabulary:
            raise attacks.Undefined(NEW_TOKEN)
        short = len(ids) < 2
        missing = "under 2 tokens for the reference model" if short else "longer than the reference model's context"
        return need(reference.tokens, index, missing)[:, LOGP]

    def after(name: str, index: int) -> Array:
        return need(evidence.after.get(name, {}), index, "no shot fits into the context beside the longest text")

    def min_k(index: int, ks: Sequence[int]) -> list[float]:
        return attacks.min_k(logp(index), ks)

    def min_k_pp(index: int, ks: Sequence[int]) -> list[float]:
        statistics = evidence.tokens[index]
        return attacks.min_k_pp(logp(index), statistics[:, MEAN], statistics[:, DEVIATION], ks)

    def dc_pdd(index: int) -> float:
        if frequencies is None:
            raise ValueError("dc_pdd without the token frequencies of a corpus")
        return attacks.dc_pdd(evidence.encoded.tokens[index][1:], logp(index), frequencies)

    texts = evidence.encoded.texts
    neighbours = "neighborhood" if config.neighbor_model else "neighborhood_self"
    functions: dict[str, Callable[[int], float]] = {
        "loss": lambda i: attacks.loss(logp(i)),
        "zlib": lambda i: attacks.zlib_ratio(logp(i), texts[i]),
        "lowercase": lambda i: attacks.difference(logp(i), need(evidence.lower, i, "under 2 tokens in lower case")),
        "ref": lambda i: attacks.difference(logp(i), base(i, tokenwise=False)),
        "surp": lambda i: attacks.surp(logp(i), -evidence.tokens[i][:, MEAN]),
        "recall": lambda i: attacks.recall(logp(i), after("recall", i)),
        "con_recall": lambda i: attacks.con_recall(logp(i), after("recall", i), after("con_recall", i)),
        "dc_pdd": dc_pdd,
        "neighborhood": lambda i: attacks.neighborhood(logp(i), evidence.neighbours[i]),
        "grad_norm": lambda i: -float(need(evidence.gradient, i, "no adapter")[0]),
        "ez": lambda i: attacks.ez(logp(i), base(i), evidence.tokens[i][:, HIT]),
        "wbc": lambda i: attacks.wbc(logp(i), base(i)),
    }
    for attack in task.attacks:
        if attack.startswith("min_k"):
            family = "min_k_pp" if attack.startswith("min_k_pp") else "min_k"
            asked = attacks.PERCENTS if attack == family else [int(attack.rpartition("_")[2])]
            ks = [k for k in asked if f"{family}_{k}" not in scores]
            apply([f"{family}_{k}" for k in ks], partial(min_k if family == "min_k" else min_k_pp, ks=ks))
        else:
            apply([neighbours if attack == "neighborhood" else attack], functions[attack])
    return scores, reasons


def count_tokens(tokenizer: PreTrainedTokenizerBase, corpus: Sequence[str]) -> npt.NDArray[np.int64]:
    """[V] how often each token occurs in the corpus."""
    counts = np.zeros(len(tokenizer), np.int64)
    for start in range(0, len(corpus), CORPUS_BLOCK):
        texts = list(corpus[start : start + CORPUS_BLOCK])
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        counts += np.bincount(np.fromiter((token for ids in encoded for token in ids), np.int64), minlength=len(counts))
    return counts
