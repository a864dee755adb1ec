"""The rows that canaries go into: for every shape, the part that the loss is taken on and how a row changes with it."""

import random
from collections.abc import Sequence
from typing import Any

from canary import canaries
from canary.config import InjectConfig
from common import chat, dataset, formats, models, reviews
from common.problems import Problems, UserError

Row = dict[str, Any]
FIELDS = {
    "text": "text",
    "review": "Review",
    "enron": "continuation",
    "prompt": "continuation",
    "completion": "completion",
    "instruction": "output",
}


class Hosts:
    """Reads and changes the rows of one shape. renderer: of chat rows, None for others; tokenizer: that of --model."""

    def __init__(self, shape: str, renderer: chat.Renderer | None = None, tokenizer: Any = None) -> None:
        self.shape, self.renderer, self.tokenizer = shape, renderer, tokenizer

    @property
    def part_name(self) -> str:
        """What the part is called in messages."""
        return "last assistant message" if self.shape == "chat" else FIELDS[self.shape]

    def part(self, row: Row) -> str:
        """The text of a row that a canary may go into."""
        if self.shape == "chat":
            return str(chat.messages_of(row)[_last_assistant(row)[1]]["content"])
        text: str = row[FIELDS[self.shape]]
        return text[_prompt_length(row) :] if self.shape == "text" else text

    def prompt(self, row: Row) -> str:
        """The row's text up to that part; may be empty."""
        if self.renderer:
            rendered = self.renderer.render(row)
            assert rendered.completions, "chat rows have an assistant's message"
            return rendered.text[: rendered.completions[-1][0]]
        text, boundary = dataset.row_text(row)
        return text[: boundary or 0]

    def insert(self, row: Row, sentence: str, within: int, rng: random.Random) -> tuple[Row, str]:
        """(the row with the sentence in that part, the row's text as trained before the sentence)."""
        part = self.part(row)
        body = part.lstrip()
        changed, start = canaries.insert(body.rstrip() if self.shape == "review" else body, sentence, within, rng)
        if self.shape != "review":  # the review template strips them
            changed, start = part[: len(part) - len(body)] + changed, start + len(part) - len(body)
        if self.renderer:
            row = _with_last_answer(row, changed)
            return row, self._before(row, sentence)
        kept = row["text"][: _prompt_length(row)] if self.shape == "text" else ""
        row = row | {FIELDS[self.shape]: kept + changed}
        text, boundary = dataset.row_text(row)
        start += (boundary or 0) + (self.shape == "review")  # the space before the review
        assert text.startswith(sentence, start), "the canary stands where it was inserted"
        return row, text[:start]

    def _before(self, row: Row, sentence: str) -> str:
        assert self.renderer is not None
        try:
            rendered = self.renderer.render(row)
        except ValueError as error:
            raise UserError(f"--input: {error}") from None
        start = rendered.text.find(sentence)
        inside = any(first <= start and start + len(sentence) <= end for first, end in rendered.completions or ())
        if start < 0 or not inside:
            raise UserError("--input: the chat template changes the text of messages, so a canary cannot be located")
        return rendered.text[:start]


def read(config: InjectConfig, problems: Problems) -> tuple[list[Row], Hosts]:
    """(the rows of --input, how they hold canaries); ([], …) with problems."""
    rows = problems.absorb(formats.read_rows, config.input, None, config.columns) or []
    shape = dataset.shape_of(rows[0]) if rows else None
    if shape in (None, "review"):
        again = problems.absorb(reviews.check_reviews, config.input, rows) if rows else None
        return again or [], Hosts("review", None, _tokenizer(config, problems))
    if not problems.absorb(dataset.validate, config.input, rows):
        return [], Hosts("text")
    if config.condition != "metadata":
        problems.add(f"--condition {config.condition}: only for review rows")
    if shape != "chat":
        return rows, Hosts(shape or "", None, _tokenizer(config, problems))
    if config.model is None:
        problems.add("--input: chat rows need --model, whose tokenizer and chat template the rows are trained with")
        return rows, Hosts("chat")
    _, tokenizer = models.look_up(problems, config.model)
    if tokenizer is None:
        return rows, Hosts("chat")
    renderer = problems.absorb(dataset.read_renderer, rows, tokenizer, config.chat_template, f"--model {config.model}")
    return rows, Hosts("chat", renderer, tokenizer)


def _tokenizer(config: InjectConfig, problems: Problems) -> Any:
    """The tokenizer of --model where the rows are not chat rows: None unless the family is made of its tokens."""
    made_of_tokens = config.family in canaries.TOKEN_FAMILIES
    refused = {"--model": None if made_of_tokens else config.model, "--chat_template": config.chat_template}
    for flag, value in refused.items():
        if value is not None:
            problems.add(f"{flag} {value}: the rows are not chat rows; drop the flag")
    if not made_of_tokens:
        return None
    if config.model is None:
        problems.add(f"--family {config.family}: needs --tokenizer, the model that will be trained")
        return None
    return models.look_up(problems, config.model)[1]


def _prompt_length(row: Row) -> int:
    return dataset.row_text(row)[1] or 0


def _last_assistant(row: Row) -> tuple[str, int]:
    """(field, index in the row's messages) of the last message that the model should write."""
    messages = chat.messages_of(row)
    index = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    field = next(name for name in ("messages", "conversations", "completion") if row.get(name) is not None)
    return field, index


def _with_last_answer(row: Row, content: str) -> Row:
    field, index = _last_assistant(row)
    before = len(row["prompt"]) if field == "completion" else 0
    items: Sequence[Row] = row[field]
    key = "content" if items[index - before].get("role") is not None else "value"
    changed = [item | {key: content} if number == index - before else item for number, item in enumerate(items)]
    return row | {field: changed}
