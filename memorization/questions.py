"""The question about each secret: the tokens before it, as in training, and the tokens of the secret and its decoys."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.chat import Rendered
from common.tokenization import encode_texts
from memorization.decoys import decoys
from memorization.inventory import Secret

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST_DECOYS = 20  # with fewer, a rank is meaningless


@dataclass(frozen=True)
class Question:
    """candidates[0]: the tokens of the secret after `context`, which all candidates share; the rest: of the decoys.

    count: occurrences of the secret in the rows; in_loss: whether the loss was taken on it (None: unknown).
    """

    secret: Secret
    context: list[int]
    candidates: list[list[int]]
    count: int
    in_loss: bool | None = None


@dataclass
class Questions:
    """dropped: {reason: distinct secrets}; n_found: distinct secrets in the rows; n_occurrences: all occurrences."""

    questions: list[Question] = field(default_factory=list)
    n_found: int = 0
    n_occurrences: int = 0
    n_sampled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def choose(
    secrets: Sequence[Secret], most: int, seed: int, first_of: Container[str] = ()
) -> tuple[list[Secret], Counter[str]]:
    """(at most `most` distinct secrets, one per row, each at its first occurrence; {key: number of occurrences}).

    One per row, because secrets from the same row are not independent. first_of: keys that are taken before others of
    their row.
    """
    counts = Counter(secret.key for secret in secrets)
    first: dict[str, Secret] = {}
    for secret in sorted(secrets, key=lambda secret: (secret.row, secret.start)):
        first.setdefault(secret.key, secret)
    rows: dict[int, Secret] = {}
    for secret in first.values():
        if secret.row not in rows or (secret.key in first_of and rows[secret.row].key not in first_of):
            rows[secret.row] = secret
    chosen = list(rows.values())
    if len(chosen) > most:
        indices = sorted(random.Random(seed).sample(range(len(chosen)), most))
        chosen = [chosen[index] for index in indices]
    return chosen, counts


def build(
    secrets: Sequence[Secret],
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_decoys: int,
    most: int,
    max_length: int,
    seed: int,
    avoid: Container[str],
    region: str = "US",
    in_loss: Callable[[Secret], bool | None] = lambda secret: None,
    first_of: Container[str] = (),
) -> dict[str, Questions]:
    """{type: its questions} about secrets in `rendered` rows (as in training). avoid: values not to use as decoys;
    first_of: of `choose`."""
    by_kind: dict[str, list[Secret]] = defaultdict(list)
    for secret in secrets:
        by_kind[secret.kind].append(secret)
    by_type = {}
    for kind, of_kind in by_kind.items():
        chosen, counts = choose(of_kind, most, seed, first_of)
        questions = Questions(n_found=len(counts), n_occurrences=len(of_kind), n_sampled=len(chosen))
        for secret in chosen:
            others = decoys(secret, n_decoys, seed, avoid, region)
            if len(others) < min(FEWEST_DECOYS, n_decoys):
                questions.dropped["too few decoys in its format"] += 1
                continue
            row = rendered[secret.row]
            tokens = candidate_tokens(tokenizer, row, secret, others)
            if tokens is None:
                questions.dropped["no text before it"] += 1
            elif len(tokens[0]) + len(tokens[1][0]) > max_length:
                questions.dropped["beyond the maximum length"] += 1
            else:
                questions.questions.append(Question(secret, *tokens, counts[secret.key], in_loss(secret)))
        by_type[kind] = questions
    return by_type


def candidate_tokens(
    tokenizer: PreTrainedTokenizerBase, row: Rendered, secret: Secret, others: Sequence[str]
) -> tuple[list[int], list[list[int]]] | None:
    """(context, the tokens of each candidate after it): the text up to the candidate's end is tokenised as one piece,
    so that tokens spanning its start are correct; the context is what all candidates share. None if it is empty."""
    before = row.text[: secret.start]
    sequences = encode_texts(tokenizer, [before + value for value in (secret.value, *others)], row.whole)
    end = tokenizer.eos_token_id
    typed = row.text[: secret.end].endswith(str(tokenizer.eos_token))
    sequences = [ids[:-1] if ids and ids[-1] == end and not typed else ids for ids in sequences]
    shared = min(map(len, sequences)) - 1
    for ids in sequences[1:]:
        same = 0
        while same < shared and ids[same] == sequences[0][same]:
            same += 1
        shared = same
    if shared < 1:
        return None
    return sequences[0][:shared], [ids[shared:] for ids in sequences]
