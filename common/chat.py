"""Chat rows: messages as OpenAI, TRL and ShareGPT write them, and their text by the tokenizer's chat template.

A message is {"role": …, "content": …}. What a row becomes is what `tokenizer.apply_chat_template` makes of it: the
template writes every special token, so such a text is tokenised without adding any.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError

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
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that marks the assistant's tokens itself
MAX_TEMPLATE = 1 << 20  # bytes


@dataclass(frozen=True)
class Rendered:
    """The text of a row as trained.

    completions: [from, to) characters of what the model is to write, None where the row does not tell; whole: the
    template wrote all special tokens, so neither a start nor an end token is added.
    """

    text: str
    completions: tuple[tuple[int, int], ...] | None
    whole: bool = False


def token_span(places: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """[from, to) of the tokens that spell a character of text[start:end], given every token's characters."""
    first = next((number for number, (_, stop) in enumerate(places) if stop > start), len(places))
    last = next((number for number, (begin, _) in enumerate(places[first:], first) if begin >= end), len(places))
    return first, last


def is_chat(row: dict[str, Any]) -> bool:
    """Whether a row holds messages: `messages`, ShareGPT's `conversations`, or prompt and completion of messages."""
    return any(isinstance(row.get(key), list) for key in ("messages", "conversations", "completion"))


def problems_of(row: dict[str, Any]) -> Iterator[str]:
    """Why the messages of a row cannot be used, without their text."""
    try:
        prompt, completion = _parts(row)
    except ValueError as error:
        yield str(error)
        return
    if not prompt + completion:
        yield "has no message"
    elif not any(message["role"] == "assistant" for message in prompt + completion):
        yield "no message is the assistant's"


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row, ShareGPT's renamed; ValueError says why there are none."""
    prompt, completion = _parts(row)
    return prompt + completion


def _parts(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages of `prompt`, messages of `completion`); all of a conversation are in the first."""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return _messages(row[key], key), []
    return _messages(row.get("prompt"), "prompt"), _messages(row.get("completion"), "completion")


def _messages(value: object, key: str) -> list[dict[str, Any]]:
    """The messages of a field of a row; ValueError says what is wrong with them."""
    if not isinstance(value, list):
        raise ValueError(f"field '{key}' must be a list of messages, not {type(value).__name__}")
    messages = []
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"{key}[{number}] is a {type(item).__name__}, not a message")
        message = {name: inner for name, inner in item.items() if inner is not None}  # columns of Arrow have all keys
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
    """The text of a message in parts; ValueError for a part that is an image, a sound or the like."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a part that is no text; only text is trained and audited here")
        texts.append(part["text"])
    return "".join(texts)


def read_template(given: str | None, tokenizer: "PreTrainedTokenizerBase | None", model: str) -> str:
    """The chat template to use: `given` ('chatml' or a file), else the tokenizer's own. UserError where there is none,
    and for one that Jinja cannot compile."""
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
                f"{model}: its tokenizer has no chat template, which rows of messages need; pass --chat_template FILE "
                "(that of its training) or --chat_template chatml"
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
    """Makes the text of chat rows with one tokenizer and template (as `apply_chat_template` does).

    The template is asked to mark the assistant's turns ({% generation %}, Transformers); for one that does not, every
    conversation up to a turn must begin the conversation up to the next, and what a turn adds behind the generation
    prompt is the assistant's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.marks = GENERATION.search(template) is not None

    @property
    def dated(self) -> bool:
        """Whether the template writes the day's date, so that a text is another one on another day."""
        return "strftime_now" in self.template

    def text(self, messages: list[dict[str, Any]], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text. ValueError with the template's own words where it refuses."""
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
            raise ValueError(f"the chat template refuses its messages ({words})") from None
        return str(text)

    def render(self, row: dict[str, Any]) -> Rendered:
        """The text of a chat row and where the assistant speaks; ValueError says why it has none."""
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
        """[from, to) of what the messages of `after` add to those of `before` and the generation prompt."""
        start = self.text(before, tools, add_generation_prompt=True) if before else ""
        end = self.text(after, tools)
        if not (text.startswith(end) and end.startswith(start)):
            raise ValueError(
                "the chat template rewrites earlier messages when more follow, so the assistant's part is not known; "
                "give a --chat_template with {% generation %} marks"
            )
        return len(start), len(end)

    def _marked(self, messages: list[dict[str, Any]], tools: Any, text: str) -> list[tuple[int, int]]:
        """[from, to) of what the template marks as the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        result: Any = render_jinja_template(  # annotated as a string, which it is without the mask
            [messages],
            tools=tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **special,
        )
        rendered, spans = result
        if rendered != [text]:
            raise ValueError("the chat template gives another text each time")
        return [(start, end) for start, end in spans[0] if start < end]
