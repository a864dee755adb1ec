"""The training rows as tokens: in memory for small files; tokenised when asked for if the rows stay on disk."""

from array import array
from collections.abc import Callable, Iterator, Sequence

from common.chat import Rendered
from common.rows import Lazy
from training.batches import Row

BLOCK = 1000  # rows that are tokenised together

Encode = Callable[[Sequence[Rendered]], list[Row]]


class Tokenised(Lazy[Row]):
    """Rows that are rendered and tokenised each time. Held in memory: three numbers per row."""

    def __init__(self, rendered: Sequence[Rendered], encode: Encode) -> None:
        self.lengths, self.labels = array("i"), array("i")
        self.highest = -1
        for start in range(0, len(rendered), BLOCK):
            for row in encode(list(rendered[start : start + BLOCK])):
                self.lengths.append(len(row.ids))
                self.labels.append(row.labels)
                self.highest = max(self.highest, max(row.ids, default=-1))
        self.rendered, self.encode = rendered, encode
        super().__init__(lambda place: encode([rendered[place]])[0], len(rendered))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BLOCK):
            yield from self.encode(list(self.rendered[start : start + BLOCK]))


def tokenise(rendered: Sequence[Rendered], encode: Encode) -> Sequence[Row]:
    return encode(rendered) if isinstance(rendered, list) else Tokenised(rendered, encode)


def lengths(rows: Sequence[Row]) -> "array[int]":
    """The number of tokens of each row."""
    return rows.lengths if isinstance(rows, Tokenised) else array("i", [len(row.ids) for row in rows])


def labels(rows: Sequence[Row]) -> "array[int]":
    """The number of labels of each row."""
    return rows.labels if isinstance(rows, Tokenised) else array("i", [row.labels for row in rows])


def highest_id(rows: Sequence[Row]) -> int:
    """The highest token id; -1 without rows."""
    if isinstance(rows, Tokenised):
        return rows.highest
    return max((max(row.ids) for row in rows), default=-1)
