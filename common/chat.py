"""Chat rows: messages in OpenAI, TRL or ShareGPT format, rendered with the tokenizer's chat template.

A message is {"role": …, "content": …}. Rows are rendered with `tokenizer.apply_chat_template`; the template writes all
special tokens, so the text is tokenised without adding any.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.problems import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ShareGPT's `from` → role
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # templates that mark the assistant's tokens themselves
MAX_TEMPLATE = 1 << 20  # bytes


@dataclass(frozen=True)
class Rendered:
    """The text of a row, as used in training.

    completions: [from, to) character spans that the model should generate, None if the row does not say; whole: the
    template wrote all special tokens, so neither BOS nor EOS is added.
    """

    text: str
    completions: tuple[tuple[int, int], ...] | None
    whole: bool = False


def token_span(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """[from, to) of the tokens that overlap text[start:end], given each token's character offsets."""
    first = next((number for number, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
    last = next((number for number, (begin, _) in enumerate(offsets[first:], first) if begin >= end), len(offsets))
    return first, last


def is_chat(row: dict[str, Any]) -> bool:
    """Whether a row holds messages: `messages`, ShareGPT's `conversations`, or `prompt` and `completion` as lists."""
    return any(isinstance(row.get(key), list) for key in ("messages", "conversations", "completion"))


def problems_of(row: dict[str, Any]) -> Iterator[str]:
    """Why a row's messages cannot be used, without quoting them."""
    try:
        prompt, completion = _parts(row)
    except ValueError as error:
        yield str(error)
        return
    if not prompt + completion:
        yield "has no messages"
    elif not any(message["role"] == "assistant" for message in prompt + completion):
        yield "has no assistant message"


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's messages, ShareGPT keys converted; ValueError says why there are none."""
    prompt, completion = _parts(row)
    return prompt + completion


def _parts(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages of `prompt`, messages of `completion`); a whole conversation goes into the first."""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return _messages(row[key], key), []
    return _messages(row.get("prompt"), "prompt"), _messages(row.get("completion"), "completion")


def _messages(value: object, key: str) -> list[dict[str, Any]]:
    """The messages in one field of a row; ValueError says what is wrong with them."""
    if not isinstance(value, list):
        raise ValueError(f"field '{key}' must be a list of messages, not {type(value).__name__}")
    messages = []
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"{key}[{number}] is a {type(item).__name__}, not a message")
        message = {name: inner for name, inner in item.items() if inner is not None}  # Arrow fills in missing keys
        role, content = message.pop("role", None), message.pop("content", None)
        if role is None and isinstance(message.get("from"), str):
            role, content = ROLES.get(message.pop("from").lower()), message.pop("value", None)
        if not isinstance(role, str) or not role:
            raise ValueError(f"{key}[{number}] has no known role (role, or from: {', '.join(ROLES)})")
        if isinstance(content, list):
            content = _join(content, f"{key}[{number}]")
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise ValueError(f"{key}[{number}] has no text (content, or value)")
        messages.append({"role": role, "content": content, **message})
    return messages


def _join(parts: list[Any], where: str) -> str:
    """The text of a multi-part message; ValueError for a part that is not text (image, audio, …)."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a part that is not text; only text is supported")
        texts.append(part["text"])
    return "".join(texts)


def read_template(given: str | None, tokenizer: "PreTrainedTokenizerBase | None", model: str) -> str:
    """The chat template to use: `given` ('chatml' or a file), else the tokenizer's own. UserError if there is none or
    Jinja cannot compile it."""
    if given == "chatml":
        return CHATML
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file() or path.stat().st_size > MAX_TEMPLATE:
            raise UserError(f"--chat_template {given}: no such file (a Jinja template, or the word chatml)")
        try:
            template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--chat_template {given}: not UTF-8 text") from None
    else:
        own = getattr(tokenizer, "chat_template", None)
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
            raise UserError(
                f"{model}: its tokenizer has no chat template, which chat rows need; pass --chat_template FILE "
                "(the one used in training) or --chat_template chatml"
            )
        template = str(own)
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except TemplateError as error:
        name = f"--chat_template {given}" if given else f"{model}: its chat template"
        raise UserError(f"{name}: not a Jinja template ({str(error).strip().splitlines()[0]})") from None
    return template


class Renderer:
    """Renders chat rows with one tokenizer and template (as `apply_chat_template` does).

    Assistant turns are located by the template's {% generation %} marks. For a template without marks, the rendering of
    each conversation prefix must be a prefix of the next one's; what a turn adds after the generation prompt is the
    assistant's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.marks = GENERATION.search(template) is not None

    @property
    def dated(self) -> bool:
        """Whether the template writes the current date, so that the text differs from day to day."""
        return "strftime_now" in self.template

    def text(self, messages: list[dict[str, Any]], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text. ValueError with the template's own message if it rejects the conversation."""
        from jinja2 import TemplateError

        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError, KeyError) as error:
            words = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"the chat template rejects its messages ({words})") from None
        return str(text)

    def frame(self) -> tuple[str, str]:
        """What the template writes before a conversation's first user message and behind its last answer."""
        mark = "\x02"
        text = self.text([{"role": "user", "content": mark}, {"role": "assistant", "content": mark}])
        return text.partition(mark)[0], text.rpartition(mark)[2]

    def render(self, row: dict[str, Any]) -> Rendered:
        """The text of a chat row and the assistant's spans; ValueError says why it cannot be rendered."""
        prompt, completion = _parts(row)
        messages, tools = prompt + completion, row.get("tools") or None
        text = self.text(messages, tools)
        if completion:
            return Rendered(text, (self._turn(prompt, messages, tools, text),), True)
        if self.marks:
            return Rendered(text, tuple(self._marked(messages, tools, text)), True)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._turn(messages[:number], messages[: number + 1], tools, text) for number in turns]
        return Rendered(text, tuple(spans), True)

    def _turn(
        self, before: list[dict[str, Any]], after: list[dict[str, Any]], tools: Any, text: str
    ) -> tuple[int, int]:
        """[from, to) of what `after` adds to `before` plus the generation prompt."""
        start = self.text(before, tools, add_generation_prompt=True) if before else ""
        end = self.text(after, tools)
        if not (text.startswith(end) and end.startswith(start)):
            raise ValueError(
                "the chat template rewrites earlier messages when more follow, so the assistant's part is unknown; "
                "pass a --chat_template with {% generation %} marks"
            )
        return len(start), len(end)

    def _marked(self, messages: list[dict[str, Any]], tools: Any, text: str) -> list[tuple[int, int]]:
        """[from, to) of the spans that the template marks as the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        result: Any = render_jinja_template(  # annotated as str, which is true only without the mask
            [messages],
            tools=tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **special,
        )
        rendered, spans = result
        if rendered != [text]:
            raise ValueError("the chat template gives a different text each time")
        return [(start, end) for start, end in spans[0] if start < end]
