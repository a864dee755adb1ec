"""Answers to the attack, for --include_responses: their shape, or with --unredacted their text."""

import re
from html import escape

from common.schema import HEADLINE_TEMPERATURE
from reporting.load import parse
from reporting.table import Study

MOST_ROWS = 200  # per file


def shape(text: str) -> str:
    """Letters → x or X, digits → 0, everything else kept: 'Ann.Lee7@a.example' → 'Xxx.Xxx0@x.xxxxxxx'."""
    text = re.sub(r"[^\W\d_]", lambda match: "X" if match[0].isupper() else "x", text)
    return re.sub(r"\d", "0", text)


def html(study: Study, unredacted: bool) -> str:
    """One table per file: row, template and answer at the headline temperature, the first MOST_ROWS."""
    tables = []
    for path in study.files["responses"]:
        with study.guard(study.shown(path)):
            tables.append(_table(path, study, unredacted))
    warning = "<p><strong>Contains personal data: do not share.</strong></p>" if unredacted else ""
    return warning + "".join(tables) if tables else ""


def _table(path, study: Study, unredacted: bool) -> str:
    lines = [line for _, line in parse(path, study) if line.get("temperature") == HEADLINE_TEMPERATURE]
    shown = "".join(
        f"<tr><th scope=row>{escape(str(line['row']))}</th><td class=l>{escape(str(line['template']))}</td><td class=l>"
        f"{escape(line['response'] if unredacted else shape(line['response']))}</td></tr>"
        for line in lines[:MOST_ROWS]
    )
    caption = f"{study.shown(path)}: the first {min(MOST_ROWS, len(lines)):,} of {len(lines):,} answers"
    heads = "".join(
        f'<th scope="col" class="l"><button type="button">{head}</button></th>'
        for head in ("Row", "Template", "Answer" if unredacted else "Shape of the answer")
    )
    return (
        f"<details><summary>{escape(caption)}</summary><div class=table><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{shown}</tbody></table></div></details>"
    )
