"""Inputs of the benchmarks: a random model of a given size, prompts about invented people, mail-length texts."""

from pathlib import Path

TEMPERATURES = [0.01, 0.1, 0.2, 0.5, 0.75, 1.0, 1.25, 1.5]


def make_model(folder: Path, vocabulary: int, hidden_size: int, layers: int, *, positions: int, seed: int) -> int:
    """Save a random GPT-NeoX whose tokenizer has one token per word (w2, w3, …); return its number of parameters."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

    transformers.logging.disable_progress_bar()
    words = {"<|endoftext|>": 0, "<|padding|>": 1} | {f"w{index}": index for index in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<|padding|>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>", model_max_length=positions
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    return sum(item.numel() for item in model.parameters())


def fictional_people(n: int) -> list[tuple[str, str]]:
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(0)
    people = []
    for _ in range(n):
        first, last = fake.first_name(), fake.last_name()
        people.append((f"{first} {last}", f"{first}.{last}@{fake.domain_word()}.example".lower()))
    return people


def build_prompts(n: int) -> list[list[tuple[str, str]]]:
    """(prompt, address) pairs, indexed [template][name]."""
    from extraction import prompts

    people = fictional_people(n + prompts.N_DEMONSTRATIONS)
    shots, asked = people[: prompts.N_DEMONSTRATIONS], people[prompts.N_DEMONSTRATIONS :]
    return [
        [(prompts.build_prompt(label, shots, name), address) for name, address in asked] for label in prompts.TEMPLATES
    ]


def mail_lengths(n: int, median: int, sigma: float, longest: int, seed: int) -> list[int]:
    """Token counts of n mails: a quoted part of 20 … 200 plus log-normal text, truncated at `longest`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 201, size=n) + rng.lognormal(np.log(median), sigma, size=n)
    return [int(length) for length in lengths.clip(2, longest)]


def mail_rows(tokenizer, lengths: list[int], seed: int) -> list[dict]:
    """One text of about each length in tokens, made of words drawn from the vocabulary."""
    import numpy as np

    rng = np.random.default_rng(seed)
    alphabetic = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalnum())
    rows = []
    for length in lengths:
        text = " ".join(rng.choice(alphabetic, size=length - 1))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append({"text": text if len(ids) < length else tokenizer.decode(ids[: length - 1])})
    return rows
