"""Rows to tokens, tokens to batches: the pure part of run_peft.py."""

import bisect
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.chat import Rendered, token_span
from common.rows import Lazy
from common.tokenization import extra_start

if TYPE_CHECKING:
    import torch

CALL_COST = 256  # overhead of a forward and backward call, in tokens: cut() trades it off against padding


@dataclass(frozen=True)
class Row:
    """Token ids of one row, and which of them are labels, i.e. predicted (never position 0).

    spans: [from, to) of label positions, in order; kept: [from, to) of the row text's characters covered by each span's
    labels; n_cut: number of truncated text tokens.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    kept: tuple[tuple[int, int], ...] = ()
    n_cut: int = 0

    @property
    def labels(self) -> int:
        return sum(end - start for start, end in self.spans)


def whole_row(ids: list[int]) -> Row:
    """A row in which every token except the first is predicted."""
    return Row(ids, ((1, len(ids)),) if len(ids) > 1 else ())


def encode(rendered: Sequence[Rendered], tokenizer: Any, max_length: int, loss_on: str = "all") -> list[Row]:
    """Tokenise whole texts; every row not truncated at `max_length` tokens ends with exactly one EOS.

    Except texts rendered by a chat template, which end as the template says.
    """
    if not rendered:
        return []
    whole = rendered[0].whole
    encoded = tokenizer(
        [row.text for row in rendered], return_offsets_mapping=True, add_special_tokens=not whole, verbose=False
    )
    eos, encoded_rows = tokenizer.eos_token_id, []
    for ids, places, row in zip(encoded["input_ids"], encoded["offset_mapping"], rendered):
        extra = extra_start(tokenizer, ids)
        ids, places = ids[extra:], places[extra:]
        n_text = len(ids)
        if not whole and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        spans = [(1, len(ids))]
        if loss_on == "completion":
            spans = [token_span(places, *completion) for completion in row.completions or ()]
            if not whole:  # EOS ends the completion
                spans = [(spans[0][0] if spans else len(ids), len(ids))]
        spans = [(max(1, start), min(end, max_length)) for start, end in spans]
        spans = [(start, end) for start, end in spans if start < end]
        n_cut = max(0, (n_text if whole else len(ids) - 1) - max_length)
        kept = tuple(label_span(places, start, end) for start, end in spans)
        encoded_rows.append(Row(ids[:max_length], tuple(spans), kept, n_cut))
    return encoded_rows


def label_span(spans: list[tuple[int, int]], first: int, end: int) -> tuple[int, int]:
    """[from, to) of the characters covered by tokens first … end - 1 alone, given each token's character offsets.

    A character whose bytes are split between tokens inside and outside counts as outside. (0, 0) if there is none.
    """
    inside = [span for span in spans[first:end] if span[0] < span[1]]  # special tokens have no characters
    if not inside:
        return 0, 0
    start = max(inside[0][0], max((stop for _, stop in spans[:first]), default=0))
    stop = min([inside[-1][1], *(begin for begin, stop in spans[end:] if begin < stop)])
    return (start, stop) if start < stop else (0, 0)


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows, by index, grouped into sequences of at most `max_length` tokens: best fit, longest first."""
    sequences: list[list[int]] = []
    space: list[tuple[int, int]] = []  # sorted (free tokens, sequence)
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect.bisect_left(space, (length, -1))
        if place == len(space):
            sequences.append([index])
            bisect.insort(space, (max_length - length, len(sequences) - 1))
        else:
            free, sequence = space.pop(place)
            sequences[sequence].append(index)
            bisect.insort(space, (free - length, sequence))
    return sequences


def epoch_batches(n: int, global_batch: int, seed: int, epoch: int) -> Sequence[list[int]]:
    """An epoch's steps: the order 0 … n-1 shuffled by (seed, epoch), cut into global batches; the last is short."""
    order = array("q", range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return Lazy(lambda step: order[step * global_batch : (step + 1) * global_batch].tolist(), -(-n // global_batch))


def cut(lengths: list[int], most: int) -> list[list[int]]:
    """Split items into micro-batches of at most `most`, minimising padded tokens + CALL_COST per micro-batch.

    Returns positions in `lengths`, longest first. Exact: items are sorted by length, then dynamic programming.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    cost, size_before = [0.0], [0]
    for end in range(1, len(order) + 1):
        choices = [
            (cost[end - size] + size * lengths[order[end - size]] + CALL_COST, size)
            for size in range(1, min(most, end) + 1)
        ]
        best = min(choices)
        cost.append(best[0])
        size_before.append(best[1])
    groups, end = [], len(order)
    while end:
        groups.append(order[end - size_before[end] : end])
        end -= size_before[end]
    return groups[::-1]


def deal(costs: Sequence[float], ranks: int) -> list[list[int | None]]:
    """Micro-batches (by position) for each rank: greedy assignment, most expensive first (LPT), padded with None."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        rank = load.index(min(load))
        hands[rank].append(place)
        load[rank] += costs[place]
    longest = max(map(len, hands))
    return [[*hand, *[None] * (longest - len(hand))] for hand in hands]


def micro_batches(step: list[int], lengths: Sequence[int], most: int, ranks: int) -> list[list[tuple[list[int], int]]]:
    """For each rank the same number of (sequence indices, weight); weight 0 marks a dummy that keeps ranks in step."""
    groups = [[step[place] for place in group] for group in cut([lengths[index] for index in step], most)]
    costs = [len(group) * lengths[group[0]] + CALL_COST for group in groups]
    dummy = ([min(step, key=lambda index: lengths[index])], 0)
    return [[dummy if place is None else (groups[place], 1) for place in hand] for hand in deal(costs, ranks)]


def unit_batches(
    units: list[list[int]], lengths: Sequence[int], most: int, ranks: int
) -> tuple[list[list[tuple[int, list[tuple[list[int], list[int]]]]]], int]:
    """Whole privacy units for each rank, and the number of passes that every rank makes (the rest are dummies).

    units[u] are the rows of unit u. A rank's item is (number of its units, passes); a pass is (rows, owners) with at
    most `most` rows, where row i belongs to the item's unit owners[i]. A unit is never split between items; a unit with
    more than `most` rows takes several passes in an item of its own.
    """
    if all(len(unit) == 1 for unit in units):
        groups = cut([lengths[row] for (row,) in units], most)
    else:
        groups = [[]]
        order = sorted(range(len(units)), key=lambda u: (-max((lengths[row] for row in units[u]), default=0), u))
        for unit in order:
            if groups[-1] and sum(len(units[other]) for other in groups[-1]) + len(units[unit]) > most:
                groups.append([])
            groups[-1].append(unit)
    items, costs = [], []
    for group in groups:
        rows = [(row, owner) for owner, unit in enumerate(group) for row in units[unit]]
        rows.sort(key=lambda pair: (-lengths[pair[0]], pair))
        parts = [rows[start : start + most] for start in range(0, len(rows), most)]
        if parts:
            items.append((len(group), [([row for row, _ in part], [owner for _, owner in part]) for part in parts]))
            costs.append(sum(len(part) * lengths[part[0][0]] + CALL_COST for part in parts))
    hands = [[items[place] for place in hand if place is not None] for hand in deal(costs, ranks)]
    return hands, max(sum(len(passes) for _, passes in hand) for hand in hands)


def collate(
    sequences: list[list[Row]], pad: int, packed: bool = False, additive: bool = False
) -> "dict[str, torch.Tensor]":
    """Model inputs of a micro-batch; each sequence is one row or (`packed`) several, right-padded.

    Returns input_ids (B, T), logits_to_keep (B, T) bool — the positions that predict a label — and their targets (K,),
    in row-major order. The models are causal, so no real token sees the right padding and no mask is needed; valid
    positions are known from the lengths, never from the pad id. `packed` adds position_ids that restart with every row,
    and attention_mask (B, 1, T, T) that keeps attention within a row (bool; `additive`: 0 or the lowest float, for
    eager attention).
    """
    import torch

    longest = max(sum(len(row.ids) for row in rows) for rows in sequences)
    shape = (len(sequences), longest)
    input_ids, keep = torch.full(shape, pad), torch.zeros(shape, dtype=torch.bool)
    positions, document = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    targets = []
    for line, rows in enumerate(sequences):
        start = 0
        for number, row in enumerate(rows):
            end = start + len(row.ids)
            input_ids[line, start:end] = torch.tensor(row.ids)
            positions[line, start:end] = torch.arange(len(row.ids))
            document[line, start:end] = number
            for first, last in row.spans:
                keep[line, start + first - 1 : start + last - 1] = True
                targets += row.ids[first:last]
            start = end
    batch = {"input_ids": input_ids, "logits_to_keep": keep, "targets": torch.tensor(targets, dtype=torch.long)}
    if packed:
        mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        batch |= {"position_ids": positions, "attention_mask": mask}
    return batch
