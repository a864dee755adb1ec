"""Canaries of each --family: sentences from templates, words of the tokenizer's vocabulary, samples of a
model, or an unseen token."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from canary import canaries
from canary.canaries import FEWEST_WORDS, PREFIX_WORDS, Canary, Space
from canary.config import InjectConfig
from canary.hosts import Hosts, Row
from common import adapters, chat, checkpoints, dataset, distributed, limits, models, sampling, tokenization
from common.problems import UserError

SPARES = 1000  # secrets kept to rank the inserted ones against
AT_ONCE = 1000  # texts tokenised together
SAMPLE_TOKENS = 48
FEWEST_SAMPLED = 4  # words in a sampled secret
ATTEMPTS = 10


@dataclass(frozen=True)
class Source:
    """Where canaries come from. make(n, corpus, rng): n of them; check(context, canary): UserError unless the canary is
    in its row what it should be."""

    space: Space
    make: Callable[[int, list[str], random.Random], list[Canary]]
    check: Callable[[str, Canary], None]


def total(config: InjectConfig) -> int:
    """Number of canaries, held-out ones included."""
    return ranked(config) + config.audit


def ranked(config: InjectConfig) -> int:
    """Number of canaries that have an exposure: those of --repetitions and --share, and as many held out."""
    return 2 * (config.canaries * len(config.repetitions) + bool(config.share))


def source_of(config: InjectConfig, rows: list[Row], hosts: Hosts, texts: list[str], rng: random.Random) -> Source:
    """texts: the part of each row that canaries go into."""
    if config.family == "random":
        return random_words(config, hosts, rng)
    if config.family == "model":
        return samples(config, rows, hosts, texts, rng)
    if config.family == "new_token":
        return new_tokens(config, rows, hosts, texts, rng)
    space = Space(config.secret, canaries.vocabulary(texts, rng) if config.secret == "text" else ())
    if config.secret == "text" and len(space.words) < 2:
        raise UserError(f"{config.input}: too few words for --secret text")
    if (2 * config.canaries * len(config.repetitions) + 2 + config.audit) * 2 > space.size:
        raise UserError(f"--secret {config.secret}: only {space.size} secrets; ask for fewer canaries, or for phone")
    return Source(space, lambda n, corpus, rng: canaries.make(n, space, corpus, rng), lambda context, canary: None)


def random_words(config: InjectConfig, hosts: Hosts, rng: random.Random) -> Source:
    """Words drawn independently from those that are one token each: nothing but training makes them likely."""
    ids = whole_words(hosts.tokenizer)
    words = sorted(ids)
    if len(words) < FEWEST_WORDS:
        raise UserError(
            f"--family random: the tokenizer of {config.model} has {len(words)} whole words; {FEWEST_WORDS} are needed"
        )
    if len(words) > canaries.MOST_WORDS:
        words = sorted(rng.sample(words, canaries.MOST_WORDS))
    space = Space("random", tuple(words))

    def make(n: int, corpus: list[str], rng: random.Random) -> list[Canary]:
        known, made = "\n".join(corpus), dict[str, Canary]()
        while len(made) < n:
            before = " ".join(rng.choice(words) for _ in range(PREFIX_WORDS)) + " "
            secret = space.secret(rng.randrange(space.size))
            if secret not in made and secret not in known:
                made[secret] = made_of(before, secret, [ids[word] for word in secret.split()])
        return list(made.values())

    return Source(space, make, token_check(config, hosts))


def new_tokens(config: InjectConfig, rows: list[Row], hosts: Hosts, texts: list[str], rng: random.Random) -> Source:
    """The opening words of some row, then one token that occurs in no row, another for each canary."""
    openings = sorted({" ".join(text.split()[:PREFIX_WORDS]).rstrip(".!?,;:") for text in texts})
    used = tokens_in(rows, hosts)
    for some in chunks([f"a {opening} a" for opening in openings]):  # their spaces may have been line breaks in a row
        used.update(*tokenization.encode_texts(hosts.tokenizer, list(some)))
    ids = {word: token for word, token in whole_words(hosts.tokenizer).items() if token not in used}
    words = rng.sample(sorted(ids), len(ids))
    needed = total(config) + ranked(config)
    if len(words) < needed:
        raise UserError(
            f"--family new_token: {len(words)} whole words of the tokenizer of {config.model} occur in no row; "
            f"{needed} are needed, so ask for fewer canaries"
        )
    n_canaries = total(config)
    space = Space("new_token", tuple(words[n_canaries : n_canaries + SPARES]))

    def make(n: int, corpus: list[str], rng: random.Random) -> list[Canary]:
        befores = [rng.choice(openings) + " " for _ in range(n)]
        return [made_of(before, word, [ids[word]]) for before, word in zip(befores, words[:n], strict=True)]

    return Source(space, make, token_check(config, hosts))


def samples(config: InjectConfig, rows: list[Row], hosts: Hosts, texts: list[str], rng: random.Random) -> Source:
    """What a model writes where the rows' own words would be: in distribution, and known to nobody else."""
    n_canaries = total(config)
    if config.dry_run:
        sampled = [["a"] * PREFIX_WORDS + ["sample", str(number)] for number in range(2 * n_canaries)]
    else:
        sampled = sample(config, rows, hosts, texts, 2 * n_canaries, rng)
    pairs = [(" ".join(words[:PREFIX_WORDS]) + " ", " ".join(words[PREFIX_WORDS:])) for words in sampled]
    space = Space("model", tuple(secret for _, secret in pairs[n_canaries:]))

    def make(n: int, corpus: list[str], rng: random.Random) -> list[Canary]:
        return [
            {"sentence": before + secret, "before": before, "secret": secret, "parts": {}}
            for before, secret in pairs[:n]
        ]

    return Source(space, make, lambda context, canary: None)


def sample(
    config: InjectConfig, rows: list[Row], hosts: Hosts, texts: list[str], n: int, rng: random.Random
) -> list[list[str]]:
    """The words of n samples from --generator, no secret twice or in the rows."""
    import torch

    assert config.generator
    ref = models.find_model(config.generator, flag="--generator")
    tokenizer = models.load_tokenizer(ref, "--generator")
    world = distributed.start()
    dtype = models.resolve_dtype("auto", "cuda" if torch.cuda.is_available() else "cpu")
    known, end = "\n".join(texts), hosts.renderer.frame()[1].strip() if hosts.renderer else ""
    found: dict[str, list[str]] = {}
    with adapters.adapted(checkpoints.load_base(ref, dtype, world), ref.adapter) as (model, _):
        vocabulary = model.config.get_text_config().vocab_size
        stop = sampling.stop_tokens(tokenizer, vocabulary, newline=False)
        stop[[token for token in tokenizer.all_special_ids if token < vocabulary]] = True
        most = limits.context_length(model) - SAMPLE_TOKENS
        for attempt in range(ATTEMPTS):
            chosen = [rng.randrange(len(rows)) for _ in range(n - len(found))]
            answers = sampling.sweep(
                model,
                [prompt_ids(tokenizer, rows[index], texts[index], hosts)[-most:] for index in chosen],
                [(number, attempt) for number in range(len(chosen))],
                [config.temperature],
                top_k=vocabulary,
                max_tokens=SAMPLE_TOKENS,
                seed=config.seed,
                stop=stop,
            )
            for answer in answers:
                text = str(tokenizer.decode(answer.tokens[0], skip_special_tokens=True))
                words = words_of(text.partition(end)[0] if end else text)
                secret = " ".join(words[PREFIX_WORDS:])
                if len(words) >= PREFIX_WORDS + FEWEST_SAMPLED and secret not in found and secret not in known:
                    found[secret] = words
            if len(found) == n:
                break
    world.close()
    if len(found) < n:
        raise UserError(
            f"--generator {config.generator}: gave only {len(found)} of {n} different samples of "
            f"{PREFIX_WORDS + FEWEST_SAMPLED} words or more; ask for fewer canaries, or raise --temperature"
        )
    return list(found.values())


def prompt_ids(tokenizer: Any, row: Row, text: str, hosts: Hosts) -> list[int]:
    """What the generator continues: the row's prompt, or the first words of a row without one."""
    prompt, whole = hosts.prompt(row), hosts.renderer is not None
    if not prompt.strip():
        prompt, whole = " ".join(text.split()[:PREFIX_WORDS]), False
    (ids,) = tokenization.encode_texts(tokenizer, [prompt], whole)
    return ids if whole else tokenization.without_end(tokenizer, ids)


def words_of(text: str) -> list[str]:
    """The words of a sample, without characters that cannot be printed or are no text."""
    kept = (character for character in " ".join(text.split()) if character.isprintable() and character != "\ufffd")
    return "".join(kept).split()


def made_of(before: str, secret: str, tokens: list[int]) -> Canary:
    return {"sentence": f"{before}{secret}.", "before": before, "secret": secret, "parts": {}, "tokens": tokens}


def chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]


def tokens_in(rows: list[Row], hosts: Hosts) -> set[int]:
    """The tokens that occur in the rows as they are trained on."""
    used: set[int] = set()
    for indices in chunks(range(len(rows))):
        rendered = dataset.render("--input", rows, indices, hosts.renderer)
        for ids in tokenization.encode_texts(
            hosts.tokenizer, [row.text for row in rendered], hosts.renderer is not None
        ):
            used.update(ids)
    return used


def whole_words(tokenizer: Any) -> dict[str, int]:
    """{word: its token} of the vocabulary's lower-case words of 3 letters or more, which are one token in a text."""
    start = tokenizer("a", add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    texts = tokenizer.batch_decode([[*start, token] for token in tokens], clean_up_tokenization_spaces=False)
    found = {}
    for token, text in zip(tokens, texts, strict=True):
        word = text.strip().removeprefix("a ")
        if word != text.strip() and len(word) > 2 and word.isalpha() and word == word.lower():
            found[word] = token
    for end in (".", " a"):
        alone: set[str] = set()
        for words in chunks(list(found)):
            encoded = tokenizer(
                [f"a {word}{end}" for word in words], return_offsets_mapping=True, add_special_tokens=False
            )
            for word, ids, offsets in zip(words, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                first, last = chat.token_span(offsets, 2, 2 + len(word))
                if ids[first:last] == [found[word]]:
                    alone.add(word)
        found = {word: token for word, token in found.items() if word in alone}
    return found


def secret_tokens(tokenizer: Any, context: str, canary: Canary, whole: bool) -> list[int]:
    """The tokens that the canary's secret has in its row, behind `context`."""
    encoded = tokenizer(
        context + canary["sentence"], return_offsets_mapping=True, add_special_tokens=not whole, verbose=False
    )
    start = len(context) + len(canary["before"])
    first, last = chat.token_span(encoded["offset_mapping"], start, start + len(canary["secret"]))
    ids: list[int] = encoded["input_ids"][first:last]
    return ids


def token_check(config: InjectConfig, hosts: Hosts) -> Callable[[str, Canary], None]:
    """UserError unless a canary's secret has, in its row, the tokens that it was made of."""

    def check(context: str, canary: Canary) -> None:
        if secret_tokens(hosts.tokenizer, context, canary, hosts.renderer is not None) != canary["tokens"]:
            raise UserError(
                f"--family {config.family}: in a row, the tokenizer of {config.model} joins words of a canary with "
                "what is around them; choose another family"
            )

    return check
