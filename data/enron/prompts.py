"""The prompts of the rows: the end of the text before an address, by tokens or by characters."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from common.problems import UserError
from data.enron.config import PROMPT_CHARACTERS, PROMPT_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(name: str) -> "Tokenizer | None":
    """A `tokenizers.Tokenizer` from a folder or the local hub cache (never the network); None to cut by characters."""
    if name == "none":
        return None
    from tokenizers import Tokenizer

    local_file = Path(name) / "tokenizer.json"
    file = str(local_file) if local_file.is_file() else cached_file(name)
    if file is None and name == "gpt2":
        return None
    if file is None:
        raise UserError(
            f"--tokenizer {name}: no tokenizer.json there or in the local hub cache; download it, or use 'none'"
        )
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"--tokenizer {name}: {file} cannot be read ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def cached_file(name: str) -> str | None:
    """A tokenizer.json in the local hub cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    names = ("gpt2", "openai-community/gpt2") if name == "gpt2" else (name,)
    with contextlib.suppress(HFValidationError):
        cached = (try_to_load_from_cache(repository, "tokenizer.json") for repository in names)
        return next((path for path in cached if isinstance(path, str)), None)
    return None


def last_tokens(prompts: list[str], tokenizer: "Tokenizer | None") -> list[str]:
    """The end of each prompt: its last 200 tokens, or its last 800 characters without a tokenizer."""
    if tokenizer is None:
        return [prompt[-PROMPT_CHARACTERS:] for prompt in prompts]
    ends = []
    for prompt, encoding in zip(prompts, tokenizer.encode_batch(prompts, add_special_tokens=False)):
        starts = [start for start, _ in encoding.offsets]
        first = max(0, len(starts) - PROMPT_TOKENS)
        while 0 < first < len(starts) - 1 and starts[first] == starts[first - 1]:  # inside a multi-byte character
            first += 1
        ends.append(prompt[starts[first] :] if first else prompt)
    return ends
