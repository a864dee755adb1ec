"""Answers to the attack, for --include_responses: their shape, or with --unredacted their text."""

import re
from pathlib import Path

from common.schema import HEADLINE_TEMPERATURE
from reporting.blocks import Block, Cell, Column, Fold, Paragraph, Table
from reporting.load import parse
from reporting.table import Study

MOST_ROWS = 200  # per file


def shape(text: str) -> str:
    """Letters → x or X, digits → 0, everything else kept: 'Ann.Lee7@a.example' → 'Xxx.Xxx0@x.xxxxxxx'."""
    text = re.sub(r"[^\W\d_]", lambda letter: "X" if letter[0].isupper() else "x", text)
    return re.sub(r"\d", "0", text)


def tables(study: Study, unredacted: bool) -> list[Block]:
    """One table per file: row, template and answer at the headline temperature, the first MOST_ROWS."""
    folds: list[Block] = []
    for path in study.files["responses"]:
        with study.guard(study.shown(path)):
            folds.append(_table(path, study, unredacted))
    warning: list[Block] = [Paragraph("Contains personal data: do not share.", "warning")] if unredacted else []
    return warning + folds if folds else []


def _table(path: Path, study: Study, unredacted: bool) -> Fold:
    lines = [line for _, line in parse(path, study) if line.get("temperature") == HEADLINE_TEMPERATURE]
    rows = []
    for line in lines[:MOST_ROWS]:
        answer = line["response"] if unredacted else shape(line["response"])
        rows.append([Cell(str(line["row"])), Cell(str(line["template"])), Cell(answer)])
    columns = [Column(name, "text") for name in ("Row", "Template", "Answer" if unredacted else "Shape of the answer")]
    caption = f"{study.shown(path)}: the first {len(rows):,} of {len(lines):,} answers"
    return Fold(caption, [Table(columns, rows, "", whole=True)], "")
