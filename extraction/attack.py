"""The attack on a loaded model: every prompt at every temperature, and the log-probability of the true address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from common import chat, limits, sampling, tokenization
from common.distributed import World, progress_bar
from common.tokenization import encode_prompt
from extraction.config import AttackConfig
from extraction.task import ExtractionTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.models import Model


@dataclass(frozen=True)
class Reply:
    """The model's replies to one row × template."""

    row: int  # index among the rows asked
    template: str
    responses: list[str] | None = None  # [temperature]; None: dropped
    dropped: str | None = None  # the reason
    truth_logprob: float | None = None  # as in `sampling.Answers`, nats
    truth_logp: list[float] | None = None  # [temperature], likewise
    truth_tokens: int = 0  # of the shortest form of the true address


def attack(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    task: ExtractionTask,
    config: AttackConfig,
    temperatures: Sequence[float],
    world: World,
    sampler: sampling.Sampler | None = None,
) -> list[Reply]:
    """Ask every row with every template at every temperature; one Reply per row × template, in this order.

    sampler: draws the replies in place of the model, which then only scores the true addresses.
    """

    def ask_mine() -> list[Reply]:
        longest = limits.context_length(model)
        vocabulary = model.config.get_text_config().vocab_size
        newline = task.settings["stop"] == "newline"
        stop = sampling.stop_tokens(tokenizer, vocabulary, newline)
        encode = partial(encode_prompt, tokenizer)
        if task.settings["chat"]:
            renderer = chat_renderer(task, tokenizer)
            encode = partial(encode_turn, renderer)
            turn_end = tokenizer(renderer.frame()[1].lstrip(), add_special_tokens=False).input_ids[:1]
            stop[[token for token in turn_end if token in tokenizer.added_tokens_decoder]] = True
        mine = world.shard(list(range(len(task.people))))
        replies = []
        with progress_bar(len(mine) * len(task.labels), "prompts", world) as bar:
            for number, label in enumerate(task.labels):
                asked, tokens, keys, targets = [], [], [], []
                for row in mine:
                    prompt, truths = task.asked[row][number]
                    ids = encode(prompt)
                    if not ids or len(ids) + config.max_tokens > longest:
                        reason = "longer than the context" if ids else "empty prompt"
                        replies.append(Reply(row, label, dropped=reason))
                        bar.update(1)
                        continue
                    asked.append(row)
                    tokens.append(ids)
                    keys.append((row, number))
                    targets.append(_forms(tokenizer, encode, prompt, ids, truths, longest - len(ids)))
                answers = sampling.sweep(
                    model,
                    tokens,
                    keys,
                    temperatures,
                    top_k=config.top_k,
                    max_tokens=config.max_tokens,
                    seed=config.seed,
                    stop=stop,
                    targets=targets,
                    batch_size=config.batch_size,
                    progress=bar.update,
                    sampler=sampler,
                )
                for row, answer, target in zip(asked, answers, targets):
                    texts = tokenizer.batch_decode(answer.tokens, skip_special_tokens=True)
                    if newline:
                        texts = [text.replace("\r", "\n").split("\n")[0] for text in texts]
                    replies.append(
                        Reply(
                            row,
                            label,
                            texts,
                            truth_logprob=answer.truth_logprob,
                            truth_logp=answer.truth_logp,
                            truth_tokens=min(map(len, target), default=0),
                        )
                    )
        return replies

    everything = [reply for part in world.together(ask_mine) for reply in part]
    order = {label: number for number, label in enumerate(task.labels)}
    return sorted(everything, key=lambda reply: (reply.row, order[reply.template]))


def chat_renderer(task: ExtractionTask, tokenizer: PreTrainedTokenizerBase, model: str = "the model") -> chat.Renderer:
    """The chat template of --chat_template or the tokenizer; UserError if there is none."""
    return chat.Renderer(tokenizer, chat.read_template(task.chat_template, tokenizer, model))


def encode_turn(renderer: chat.Renderer, prompt: str) -> list[int]:
    """A prompt in chat form: the user's turn is all but its last line, which the assistant has begun to write."""
    said, _, begun = prompt.rpartition("\n")
    text = renderer.text([{"role": "user", "content": said}], add_generation_prompt=True) + begun
    return tokenization.encode_texts(renderer.tokenizer, [text], whole=True)[0]


def _forms(
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[str], list[int]],
    prompt: str,
    ids: list[int],
    truths: list[str],
    room: int,
) -> list[list[int]]:
    """The canonical tokens of each true text after the prompt, without duplicates and those that exceed the context.

    The texts differ in the space before the address, so no answer starts with two of them: their probabilities add up.
    """
    forms: list[list[int]] = []
    for truth in truths:
        joined = encode(prompt + truth)
        merged = joined[: len(ids)] != ids  # the tokenizer merges prompt and answer: tokenise the answer alone
        target = tokenizer(truth, add_special_tokens=False).input_ids if merged else joined[len(ids) :]
        if 0 < len(target) <= room and target not in forms:
            forms.append(target)
    return forms
