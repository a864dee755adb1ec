"""Rate reviews with a causal language model: the most probable of the labels "1" … "5" after a prompt."""

from collections.abc import Callable, Sequence
from typing import Any

from common import adapters, dataset, reviews, tokenization
from common.distributed import progress_bar
from common.scoring import join, score
from utility.arms import Row

INSTRUCTION = "Rate the customer's review below with 1 to 5 stars. Answer with the number alone."
LABELS = ("1", "2", "3", "4", "5")
MARGIN = 4  # tokens that truncating a review may add, and the EOS


def review_room(tokenizer: Any, max_length: int) -> int:
    """How many tokens of a review fit into max_length with the prompt, the label and EOS; may be below 1."""
    frame = dataset.instruction_prompt({"instruction": INSTRUCTION, "input": "x"}) + LABELS[0]
    return max_length - len(tokenizer(frame).input_ids) - MARGIN


def instruction_rows(rows: Sequence[Row], tokenizer: Any, max_length: int) -> tuple[list[Row], int]:
    """(rows of instruction, review and label, each at most max_length tokens; number of truncated reviews)."""
    room = review_room(tokenizer, max_length)
    texts = [reviews.text_of(row) for row in rows]
    offsets = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False, verbose=False).offset_mapping
    instructions, n_cut = [], 0
    for row, text, spans in zip(rows, texts, offsets):
        if len(spans) > room:
            text, n_cut = text[: spans[room - 1][1]].rstrip(), n_cut + 1
        instructions.append({"instruction": INSTRUCTION, "input": text, "output": str(reviews.rating(row))})
    return instructions, n_cut


def label_log_probabilities(
    model: Any, tokenizer: Any, prompts: Sequence[str], progress: Callable[[int], object]
) -> list[list[float]]:
    """[n][5] log p(label | prompt) in nats; prompt and label are tokenized as one text, as in training.

    If the labels differ only in their last token, one sequence per prompt gives all five; else each label is scored.
    progress: called with the number of tokens scored since the last call.
    """
    encoded = tokenization.encode_texts(tokenizer, [prompt + label for prompt in prompts for label in LABELS])
    encoded = [tokenization.without_end(tokenizer, ids) for ids in encoded]
    groups = [encoded[start : start + len(LABELS)] for start in range(0, len(encoded), len(LABELS))]
    labels = [[ids[-1] for ids in group] for group in groups]
    same_start = all(len({tuple(ids[:-1]) for ids in group}) == 1 for group in groups)
    if same_start and all(each == labels[0] for each in labels):
        sequences = [group[0] for group in groups]

        def of_labels(logits: Any, targets: Any) -> Any:
            return logits.log_softmax(-1)[:, labels[0]]

        scored = join(sequences, [score(model, sequences, statistics=of_labels, progress=progress)])
        return [values[-1].tolist() for values in scored]
    each_label = iter(join(encoded, [score(model, encoded, progress=progress)]))
    totals = []
    for group in groups:
        shared = next((k for k, column in enumerate(zip(*group)) if len(set(column)) > 1), min(map(len, group)))
        totals.append([float(next(each_label)[max(0, shared - 1) :].sum()) for _ in group])
    return totals


def rate(base: Any, adapter: str | None, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """[n] ratings 1 … 5 by the base with `adapter` (None: the base itself)."""
    with adapters.adapted(base, adapter) as (model, _), progress_bar(None, "tokens") as bar:
        values = label_log_probabilities(model, tokenizer, prompts, bar.update)
    return [1 + max(range(len(LABELS)), key=each.__getitem__) for each in values]
