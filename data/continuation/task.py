"""What is to be continued: rows, prompts, model and settings, all known before the model is loaded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import arrow_files, dataset, distributed, manifests, models, results, vllm_engine
from common.problems import Problems, UserError, check_output_file, report_broken
from common.tokenization import encode_prompt
from data import generation
from data.continuation.config import ContinuationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("gt-name", "gt-email", "prompt")  # that every well-formed row has
SAMPLED = ("temperature", "top_k", "max_tokens", "seed")
MAX_PROMPT_TOKENS = 2048  # prompts are shorter than this

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """asked: indices of the rows to continue; prompts: their token ids; rooms: the most tokens to generate for each;
    head: indices of the evaluation head; settings: what a resumed run must have in common with the killed one;
    finished: the output is there already; dropped: rows that are not continued, by reason."""

    ref: models.ModelRef
    tokenizer: "PreTrainedTokenizerBase"
    rows: list[Row]
    asked: list[int]
    prompts: list[list[int]]
    rooms: list[int]
    head: Sequence[int]
    split_start: int | None
    settings: dict[str, Any]
    finished: bool
    dropped: dict[str, int]


def check(config: ContinuationConfig) -> Task:
    """Read and check all arguments and files; problems raise one UserError."""
    problems = Problems()
    distributed.check_environment(problems, config.device_map, config.model_parallel)
    output = config.output_file
    check_output_file(output, ".arrow", problems, (config.data_set,))
    rows: list[Row]
    broken: dict[int, str]
    rows, broken = problems.absorb(dataset.read_with_broken, config.data_set, FIELDS) or ([], {})
    manifest = problems.absorb(manifests.read_manifest, config.data_set) if rows else None
    if any("text" in row for row in rows[:1]):
        problems.add(
            f"{config.data_set}: already has a `text` column (generated rows); pass the rows it was generated from"
        )
    elif rows:
        lines = [f"{config.data_set}: row {index}: {reason}" for index, reason in sorted(broken.items())]
        problems.absorb(report_broken, "rows", lines, len(lines), config.strict)
        if len(rows) - len(broken) < 3:
            problems.add(
                f"{config.data_set}: {len(rows) - len(broken)} valid rows with {', '.join(FIELDS)}; "
                "at least 3 are needed"
            )
        problems.absorb(arrow_files.check_columns, config.data_set, [r for i, r in enumerate(rows) if i not in broken])
    ref, tokenizer = models.look_up(problems, config.model, config.revision, config.base_model)
    vllm_engine.check(config, problems, ref, (config.temperature,))
    settings: dict[str, Any] | None = None
    if ref and not problems.lines:
        data_set = results.sha256(config.data_set)
        settings = generation.settings_of(config, ref, (*SAMPLED, "batch_size", "strict"), data_set=data_set)
    finished = problems.absorb(manifests.finished, [("--output", output)], settings, config.overwrite)
    problems.check()
    assert ref is not None and tokenizer is not None and settings is not None
    return choose(config, ref, tokenizer, rows, broken, manifest, settings, bool(finished))


def choose(
    config: ContinuationConfig,
    ref: models.ModelRef,
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    broken: dict[int, str],
    manifest: dict[str, Any] | None,
    settings: dict[str, Any],
    finished: bool,
) -> Task:
    """The training rows whose prompt leaves the context room for a continuation."""
    rows, split, start = dataset.split_source(rows, broken, manifest)
    if not split.train:
        raise UserError(f"{config.data_set}: all rows belong to the evaluation head; there are none to continue")
    asked: list[int] = []
    prompts: list[list[int]] = []
    rooms: list[int] = []
    context = models.context_of(ref)
    least = min(generation.MIN_ROOM, config.max_tokens)
    counts = Counter({"broken": len(broken)} if broken else {})
    for index in split.train:
        # without the trailing space, which tokenizers attach to the next word: the generation starts with it
        prompt = encode_prompt(tokenizer, rows[index]["prompt"].rstrip(" "))
        room = min(config.max_tokens, context - len(prompt))
        if not prompt:
            counts["empty prompt"] += 1
        elif len(prompt) >= MAX_PROMPT_TOKENS:
            counts[f"prompt of {MAX_PROMPT_TOKENS:,} tokens or more"] += 1
        elif room < least:
            counts[f"prompt leaves fewer than {least} of the context's {context:,} tokens"] += 1
        else:
            asked.append(index)
            prompts.append(prompt)
            rooms.append(room)
    if not asked:
        raise UserError(f"{config.data_set}: no prompt is left to continue ({dict(counts)})")
    return Task(ref, tokenizer, rows, asked, prompts, rooms, split.head, start, settings, finished, dict(counts))
