"""Measuring models: one model's answers to a task, and the comparison of the tuned model with its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from common.chat import Rendered
from common.continuations import ContinuationScorer
from common.distributed import World
from common.sampling import Sampler, stop_tokens, sweep
from common.scoring import join, log_probability, score
from common.stats import probabilistic_extraction
from memorization import exposure, verbatim
from memorization.config import MemorizationConfig
from memorization.entities import Entity, Finder
from memorization.inventory import normal
from memorization.questions import Question
from memorization.task import MemorizationTask, Side, repeats
from memorization.untargeted import SHORTEST

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")


def with_hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[log p(target), 1 if it is the likeliest token else 0] per position: logits [P, V], targets [P] → [P, 2]."""
    import torch

    hits = (logits.argmax(-1) == targets).float()
    return torch.stack([log_probability(logits, targets), hits], -1)


@dataclass
class Answers:
    """One model's answers by side: log_p [1 + decoys] and greedy per question, (log p, greedy, near) per window."""

    log_p: dict[str, list[list[float]]] = field(default_factory=dict)
    greedy: dict[str, list[bool]] = field(default_factory=dict)
    windows: dict[str, list[tuple[float, bool, bool]]] = field(default_factory=dict)
    samples: list[list[int]] = field(default_factory=list)


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: MemorizationTask,
    config: MemorizationConfig,
    world: World,
    samples: bool,
    sampler: Sampler | None = None,
) -> Answers:
    """All answers of one model in eval mode, on every rank. samples: also draw untargeted ones, with `sampler`."""
    answers = Answers()
    for name, side in task.sides.items():
        asked = side.all_questions()
        answers.log_p[name] = answer_questions(model, asked, config, world)
        answers.greedy[name] = greedy_hits(
            model, [(question.context, question.candidates[0]) for question in asked], config, world
        )
        answers.windows[name] = answer_windows(model, tokenizer, side, config, world)
    if samples and config.samples:
        answers.samples = draw(sampler or model, tokenizer, task, config, world)
    return answers


def on_ranks(world: World, n: int, work: Callable[[Sequence[int]], list[Result]]) -> list[Result]:
    """The results of n items on every rank; `work` takes this rank's indices and gives their results in order."""
    mine = world.shard(list(range(n)))
    parts = world.together(lambda: list(zip(mine, work(mine), strict=True)))
    by_index = dict(pair for part in parts for pair in part)
    return [by_index[index] for index in range(n)]


def find_names(rows: Mapping[str, Sequence[Rendered]], finder: Finder, world: World) -> dict[str, list[list[Entity]]]:
    """{side: the names in each of its rows}. Each rank searches its share of the rows; all get the same result."""
    texts = [(side, row.text) for side, own in rows.items() for row in own]

    def work(mine: Sequence[int]) -> list[list[Entity]]:
        return finder.search([texts[index][1] for index in mine])

    found: dict[str, list[list[Entity]]] = {side: [] for side in rows}
    for (side, _), names in zip(texts, on_ranks(world, len(texts), work)):
        found[side].append(names)
    return found


def answer_questions(
    model: Any, asked: Sequence[Question], config: MemorizationConfig, world: World
) -> list[list[float]]:
    scorer = ContinuationScorer(model, config.token_budget)

    def work(mine: Sequence[int]) -> list[list[float]]:
        scored = (scorer(asked[index].context, asked[index].candidates) for index in mine)
        return [[float(values.sum(dtype=np.float64)) for values in candidates] for candidates in scored]

    return on_ranks(world, len(asked), work)


def statistics(model: Any, sequences: Sequence[Sequence[int]], config: MemorizationConfig, world: World) -> list[Any]:
    """[tokens − 1, 2] `with_hits` of each sequence, on every rank."""
    if not sequences:
        return []
    longest = max(map(len, sequences))
    parts = world.together(
        lambda: score(
            model, sequences, token_budget=config.token_budget, context=longest, statistics=with_hits, world=world
        )
    )
    return join(sequences, parts)


def greedy_hits(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], config: MemorizationConfig, world: World
) -> list[bool]:
    """Whether greedy decoding from each context gives the tokens."""
    scored = statistics(model, [context + tokens for context, tokens in pairs], config, world)
    return [bool((values[len(context) - 1 :, 1] > 0).all()) for values, (context, _) in zip(scored, pairs)]


def answer_windows(
    model: Any, tokenizer: PreTrainedTokenizerBase, side: Side, config: MemorizationConfig, world: World
) -> list[tuple[float, bool, bool]]:
    """(log p of the suffix, greedy match, greedy near-match) of each window."""
    scored = statistics(model, [window.tokens for window in side.windows], config, world)
    outcomes = [verbatim.suffix_outcome(values, config.prefix) for values in scored]
    missed = [index for index, (_, hit) in enumerate(outcomes) if not hit]
    prompts = [side.windows[index].tokens[: config.prefix] for index in missed]
    continued = decode(model, tokenizer, prompts, 0.0, config.suffix, config.seed, world)
    near = [hit for _, hit in outcomes]
    for index, tokens in zip(missed, continued):
        truth = side.windows[index].tokens[config.prefix :]
        near[index] = verbatim.edit_similarity(tokens, truth) >= verbatim.NEAR
    return [(log_p, hit, close) for (log_p, hit), close in zip(outcomes, near)]


def decode(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    temperature: float,
    max_tokens: int,
    seed: int,
    world: World,
) -> list[list[int]]:
    """The tokens of one answer per prompt, on every rank; independent of batching and ranks."""
    if not prompts:
        return []
    if isinstance(model, Sampler):
        vocabulary = model.config.get_text_config().vocab_size
    else:
        vocabulary = model.get_input_embeddings().weight.shape[0]
    stop = stop_tokens(tokenizer, vocabulary, newline=False)

    def work(mine: Sequence[int]) -> list[list[int]]:
        answers = sweep(
            model,
            [prompts[index] for index in mine],
            [(index, 0) for index in mine],
            [temperature],
            top_k=vocabulary if temperature else 1,
            max_tokens=max_tokens,
            seed=seed,
            stop=stop,
        )
        return [answer.tokens[0] for answer in answers]

    return on_ranks(world, len(prompts), work)


def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: MemorizationTask,
    config: MemorizationConfig,
    world: World,
) -> list[list[int]]:
    """Untargeted samples at temperature 1, unfiltered."""
    prompts = [task.start] * config.samples
    return decode(model, tokenizer, prompts, 1.0, config.sample_tokens, config.seed, world)


# statistics of the answers


def places(log_p: Sequence[Sequence[float]], base: Sequence[Sequence[float]] | None) -> list[float]:
    """Each secret's place among its decoys, by log p or, with a base, by log p minus the base's."""
    if base is None:
        return [exposure.place_among(scores) for scores in log_p]
    return [
        exposure.place_among(np.asarray(tuned) - np.asarray(base_scores)) for tuned, base_scores in zip(log_p, base)
    ]


def median_bits(values: Sequence[float], asked: Sequence[Question]) -> float | None:
    """Median exposure of secrets by their places; None without any."""
    bits = [exposure.exposure_bits(place, len(question.candidates) - 1) for place, question in zip(values, asked)]
    return float(np.median(bits)) if bits else None


def ranks(values: Sequence[float], asked: Sequence[Question]) -> dict[str, Any]:
    """Median exposure in bits, and the number of secrets that are likelier than all their decoys."""
    first = exposure.rate(sum(place == 0 for place in values), len(values))
    return {"median_bits": median_bits(values, asked), "first": first}


COUNTS = ((1, 1), (2, 3), (4, 9), (10, None))  # occurrences of a secret in the training rows


def secrets_of_kind(
    kind: str, task: MemorizationTask, tuned: Answers, base: Answers | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the result for one type of secret, one line per secret)."""
    result: dict[str, Any] = {"type": kind, "measure": "calibrated" if base else "tuned"}
    compared: dict[str, list[tuple[float, bool]]] = {}  # (place, greedy hit) of the secrets that sides are compared by
    lines = []
    for side, rows in task.sides.items():
        everything = rows.all_questions()
        own = [index for index, question in enumerate(everything) if question.secret.kind == kind]
        asked = [everything[index] for index in own]
        log_p = [tuned.log_p[side][index] for index in own]
        base_log_p = [base.log_p[side][index] for index in own] if base else None
        by_model = {"tuned": places(log_p, None)}
        greedy = {"tuned": [tuned.greedy[side][index] for index in own]}
        if base and base_log_p is not None:
            by_model |= {"base": places(base_log_p, None), "calibrated": places(log_p, base_log_p)}
            greedy["base"] = [base.greedy[side][index] for index in own]
        headline = by_model[result["measure"]]
        compared[side] = [
            (place, hit)
            for question, place, hit in zip(asked, headline, greedy["tuned"])
            if task.comparable(question.secret)
        ]
        questions = rows.questions.get(kind)
        part: dict[str, Any] = {
            "n_found": questions.n_found if questions else 0,
            "n_occurrences": questions.n_occurrences if questions else 0,
            "n_requested": questions.n_sampled if questions else 0,
            "n_scored": len(asked),
            "n_dropped": sum(questions.dropped.values()) if questions else 0,
            "dropped": dict(questions.dropped) if questions else {},
            "decoys": int(np.median([len(question.candidates) - 1 for question in asked])) if asked else None,
            "exposure": {name: ranks(values, asked) for name, values in by_model.items()},
            "greedy": {name: exposure.rate(sum(hits), len(hits)) for name, hits in greedy.items()},
            "expected_in_samples": probabilistic_extraction([values[0] for values in log_p], "items"),
        }
        if task.is_name(kind):
            part["n_compared"] = len(compared[side])
        if base:
            part["greedy_against_base"] = exposure.gained(greedy["tuned"], greedy["base"])
        if side == "train":
            part["by_count"] = by_count(asked, headline, greedy["tuned"])
            part["by_place"] = by_place(asked, headline, greedy["tuned"])
        result[side] = part
        for number, question in enumerate(asked):
            line = {
                "set": side,
                "type": kind,
                "row": question.secret.row,
                "start": question.secret.start,
                "count": question.count,
            }
            line["value"] = question.secret.value
            line |= {"in_loss": question.in_loss, "decoys": len(question.candidates) - 1, "log_p": log_p[number][0]}
            line |= {f"place_{name}": values[number] for name, values in by_model.items()}
            line |= {f"greedy_{name}": hits[number] for name, hits in greedy.items()}
            lines.append(line)
    if task.controlled:
        pairs = [compared[side] for side in ("train", "heldout")]
        n = [len(pair) for pair in pairs]
        result["excess"] = exposure.excess(*([place for place, _ in pair] for pair in pairs))
        result["excess"]["smallest_seen"] = exposure.smallest_excess(*n)
        hits = [sum(hit for _, hit in pair) for pair in pairs]
        result["greedy_excess"] = exposure.rate_excess(hits, n)
    return result, lines


def group(
    asked: Sequence[Question], values: Sequence[float], hits: Sequence[bool], chosen: list[int]
) -> dict[str, Any]:
    return {
        "greedy": exposure.rate(sum(hits[index] for index in chosen), len(chosen)),
        "median_bits": median_bits([values[index] for index in chosen], [asked[index] for index in chosen]),
    }


def by_count(asked: Sequence[Question], values: Sequence[float], hits: Sequence[bool]) -> dict[str, Any]:
    """By number of occurrences in the training rows."""
    groups = {}
    for low, high in COUNTS:
        chosen = [index for index, question in enumerate(asked) if low <= question.count <= (high or question.count)]
        if chosen:
            groups[str(low) if low == high else f"{low}-{high}" if high else f"{low}+"] = group(
                asked, values, hits, chosen
            )
    return groups


def by_place(asked: Sequence[Question], values: Sequence[float], hits: Sequence[bool]) -> dict[str, Any]:
    """By whether the loss was taken on the secret or it was only context."""
    groups = {}
    for name, wanted in (("loss", True), ("context", False)):
        chosen = [index for index, question in enumerate(asked) if question.in_loss is wanted]
        if chosen:
            groups[name] = group(asked, values, hits, chosen)
    return groups


def verbatim_result(task: MemorizationTask, tuned: Answers, base: Answers | None) -> dict[str, Any]:
    """Greedy and near matches of the windows on each side, and their excess."""
    result: dict[str, Any] = {}
    for side, rows in task.sides.items():
        own = tuned.windows[side]
        part: dict[str, Any] = {
            "n_requested": len(rows.rendered),
            "n_scored": len(own),
            "n_dropped": len(rows.rendered) - len(own),
            "dropped": {"too short": rows.n_short, "not sampled": len(rows.rendered) - rows.n_short - len(own)},
            "greedy": {"tuned": exposure.rate(sum(hit for _, hit, _ in own), len(own))},
            "near": {"tuned": exposure.rate(sum(close for *_, close in own), len(own))},
            "expected_in_samples": probabilistic_extraction([log_p for log_p, *_ in own], "items"),
        }
        if base:
            base_windows = base.windows[side]
            part["greedy"]["base"] = exposure.rate(sum(hit for _, hit, _ in base_windows), len(base_windows))
            part["near"]["base"] = exposure.rate(sum(close for *_, close in base_windows), len(base_windows))
            part["near_against_base"] = exposure.gained([w[2] for w in own], [w[2] for w in base_windows])
        if side == "train":
            by: dict[str, list[bool]] = {}
            for count, (_, _, close) in zip(repeats(rows, rows.windows), own):
                by.setdefault("1" if count == 1 else "2+", []).append(close)
            part["near_by_repeats"] = {name: exposure.rate(sum(hits), len(hits)) for name, hits in sorted(by.items())}
        result[side] = part
    if task.controlled:
        n = [result[side]["n_scored"] for side in ("train", "heldout")]
        hits = [result[side]["near"]["tuned"]["hits"] for side in ("train", "heldout")]
        result["excess"] = exposure.rate_excess(hits, n)
    return result


def untargeted_result(task: MemorizationTask, answers: Answers, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Which secrets and 50-token runs of each side the samples contain."""
    texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in answers.samples]
    result: dict[str, Any] = {"samples": len(texts), "tokens": sum(map(len, answers.samples))}
    for side in task.sides:
        needles, runs = task.needles(side), task.runs(side)
        per_sample = [needles.find(text) for text in texts]
        values = {value for value in map(normal, set(task.sought(side))) if len(value) >= SHORTEST}
        emitted = set().union(*per_sample) if per_sample else set()
        result[side] = {
            "secrets": exposure.rate(len(emitted), len(values)),
            "samples_with_secret": exposure.rate(sum(map(bool, per_sample)), len(texts)),
            "samples_with_run": exposure.rate(sum(map(runs.holds_run_of, answers.samples)), len(texts)),
        }
    if task.controlled:
        rates = [result[side]["secrets"] for side in ("train", "heldout")]
        result["excess"] = exposure.rate_excess([rate["hits"] for rate in rates], [rate["n"] for rate in rates])
    return result
