"""The blocks of the page: tables of cells, folded parts, paragraphs. Plain data, which page.html.j2 turns into HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STATIC_ROWS = 100  # longer tables are built by the page's script only when they are opened


@dataclass(frozen=True)
class Column:
    """kind: 'number', 'text' (left-aligned), 'words' (wrapped) or 'source' (paths, one per line).

    small: small print below the name.
    """

    name: str
    kind: str = "number"
    small: str = ""


@dataclass(frozen=True)
class Cell:
    """sort_key: the number to sort by, "" for an undefined one (sorted last), None to sort by the text."""

    text: str = ""
    sort_key: str | None = None
    small: tuple[str, ...] = ()

    @classmethod
    def number(cls, value: float | None, form: str = "{:.3g}", small: tuple[str, ...] = (), text: str = "") -> Cell:
        """A number as `text`, else formatted with `form`; a dash if there is none."""
        shown = text or ("–" if value is None else form.format(value))
        return cls(shown, "" if value is None else f"{value:.10g}", small)

    @classmethod
    def empty(cls) -> Cell:
        """The cell of a number that was not measured."""
        return cls("", "")

    @property
    def flat(self) -> list[str | float | None]:
        """[text with its small print] or [text, number or None], as the page's script reads a long table."""
        text = f"{self.text} ({', '.join(self.small)})" if self.small else self.text
        return [text] if self.sort_key is None else [text, float(self.sort_key) if self.sort_key else None]


@dataclass(frozen=True)
class Table:
    """rows: cells by column, the first of which is the row header; bold: indices of bold rows; whole: never built by
    the page's script, however long."""

    columns: list[Column]
    rows: list[list[Cell]]
    caption: str
    bold: frozenset[int] = frozenset()
    whole: bool = False
    block = "table"

    @property
    def long(self) -> bool:
        return len(self.rows) > STATIC_ROWS and not self.whole

    @property
    def data(self) -> list[list[list[str | float | None]]]:
        return [[cell.flat for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Fold:
    """A part that opens on click; kind 'print' also opens when the page is printed."""

    caption: str
    inner: list[Any]
    kind: str = "print"
    block = "fold"


@dataclass(frozen=True)
class Paragraph:
    text: str
    kind: str = "caption"
    block = "paragraph"


Block = Table | Fold | Paragraph


def fold(caption: str, inner: list[Any], kind: str = "print") -> list[Block]:
    """`inner` folded; nothing if it is empty."""
    return [Fold(caption, inner, kind)] if inner else []
