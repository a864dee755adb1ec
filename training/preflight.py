"""How much of the canaries in the training file is really trained on, known before a model loads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.chat import Rendered, token_span
from common.inserted import Inserted
from common.tokenization import extra_start, without_end
from training.batches import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE, MASKED, CUT, LEFT_OUT = "trained", "masked", "cut", "left_out"  # from the best to the worst for a canary
REASONS = {CUT: "cut off at --max_length", MASKED: "masked by --loss_on", LEFT_OUT: "in rows that are not trained on"}


def count(
    canaries: Sequence[Inserted],
    places: dict[int, int],
    rendered: Sequence[Rendered],
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, int]:
    """Numbers of canaries and of their secrets' tokens. places: {row of the file: place in `rows`} of those trained on.

    A canary counts once, as the best of its copies: `trained` if every token of the secret is a label in one of them.
    The tokens are those of all copies in rows that are trained on.
    """
    counts = {"placed": len(canaries), WHOLE: 0, CUT: 0, MASKED: 0, LEFT_OUT: 0}
    total = trained = 0
    for canary in canaries:
        fates = [LEFT_OUT]
        for index, start in canary.copies:
            if (place := places.get(index)) is not None:
                fate, n, kept = fate_of(canary, start, rendered[place], rows[place], tokenizer)
                fates.append(fate)
                total += n
                trained += kept
        counts[min(fates, key=(WHOLE, MASKED, CUT, LEFT_OUT).index)] += 1
    return counts | {"secret_tokens": total, "secret_tokens_trained": trained}


def fate_of(
    canary: Inserted, start: int, rendered: Rendered, row: Row, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, int, int]:
    """(what becomes of one copy, the number of its secret's tokens, the number of those that are labels)."""
    text = rendered.text
    if not text.startswith(canary.sentence, start):  # another chat template than at injection
        start = text.find(canary.sentence)
    if start < 0:
        return LEFT_OUT, 0, 0
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not rendered.whole, verbose=False)
    ids = encoded["input_ids"]
    offsets = encoded["offset_mapping"][extra_start(tokenizer, ids) : len(without_end(tokenizer, ids))]
    first, end = token_span(offsets, start + canary.secret[0], start + canary.secret[1])
    kept = sum(any(left <= position < right for left, right in row.spans) for position in range(first, end))
    if kept == end - first:
        return WHOLE, kept, kept
    return (CUT if end > len(row.ids) else MASKED), end - first, kept


def describe(counts: dict[str, int]) -> str:
    """One line about the canaries."""
    words = f"the secrets of {counts[WHOLE]} of {counts['placed']} are trained on"
    words += f", {counts['secret_tokens_trained']} of {counts['secret_tokens']} tokens"
    reasons = [f"{counts[name]} {reason}" for name, reason in REASONS.items() if counts[name]]
    words += f" ({', '.join(reasons)})" if reasons else ""
    return words if counts[WHOLE] or not counts["placed"] else f"{words}: no audit is possible"
