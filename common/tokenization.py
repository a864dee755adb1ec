"""Texts as the token ids a model reads: special tokens, one BOS, no EOS that ends a prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], whole: bool = False) -> list[list[int]]:
    """Token ids of each text as the tokenizer gives them, but with one BOS where it would give two.

    whole: the texts already contain all special tokens (a chat template wrote them).
    """
    encoded = tokenizer(texts, add_special_tokens=not whole, verbose=False).input_ids if texts else []
    return [ids[extra_start(tokenizer, ids) :] for ids in encoded]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, without the EOS that some tokenizers append, which would end the text."""
    return without_end(tokenizer, encode_texts(tokenizer, [text])[0])


def without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], least: int = 1) -> list[int]:
    """`ids` without the EOS that some tokenizers append to a text; keeps at least the first `least` of them."""
    end = len(ids)
    while end > least and ids[end - 1] == tokenizer.eos_token_id:
        end -= 1
    return ids[:end]


def extra_start(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """Leading tokens to drop: 1 if the tokenizer added BOS to a text that already starts with it, else 0."""
    start = tokenizer.bos_token_id
    if start is None or list(ids[:2]) != [start, start]:
        return 0
    own = tokenizer("a").input_ids
    return int(own[:1] == [start] and own[:2] != [start, start])


def special_tokens_in(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, int]:
    """{special token: number of texts that contain it literally}, not counting one BOS at the start of a text.

    The tokenizer turns such characters into the token itself: a typed '<|endoftext|>' ends the text for the model.
    """
    special = set(tokenizer.all_special_tokens)
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    start = tokenizer.bos_token
    counts: dict[str, int] = {}
    pattern = re.compile("|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True))) or r"(?!)")
    for text in texts:
        for token in set(pattern.findall(text.removeprefix(start) if start else text)):
            counts[token] = counts.get(token, 0) + 1
    return dict(sorted(counts.items()))


def special_tokens_note(texts_with: dict[str, int]) -> str:
    """One line summarising `special_tokens_in`."""
    counts = ", ".join(f"{token} in {n}" for token, n in texts_with.items())
    return f"special tokens typed in the texts are encoded as special tokens: {counts}"


def bos_note(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str | None:
    """One line if texts start with the BOS that the tokenizer adds itself; it is then used once (`extra_start`)."""
    start = tokenizer.bos_token
    if not start or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return None
    n = sum(text.startswith(start) for text in texts)
    return f"{n} texts start with {start}, which the tokenizer adds too: it is used once" if n else None


def sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what turns text into tokens: vocabulary, rules and special tokens; wherever the tokenizer is stored."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else {"vocabulary": tokenizer.get_vocab()}
    for changing in ("padding", "truncation"):  # set by calls
        state.pop(changing, None)
    state["special"] = tokenizer.all_special_ids
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
