"""Attack models and write their result files: one model, or every checkpoint below a directory."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    chat,
    dataset,
    distributed,
    formats,
    locks,
    models,
    provenance,
    publication,
    results,
    sources,
    tokenization,
)
from common import trained as trained_rows
from common.checkpoints import BaseLoader, find_checkpoints, for_each, look_up_all
from common.problems import Problems, UserError, check_writable, report_failures
from common.schema import SHADOW_ATTACKS
from mia import shadows as calibrated
from mia.attacks import AGAINST_BASE
from mia.config import MiaConfig
from mia.dataset import MembershipTask, Reader, prepare
from mia.forward import Cache, Passes
from mia.report import draw_roc, report, table
from mia.signals import Reasons, Scores, count_tokens, gather, score_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.distributed import World
    from common.models import ModelRef
    from common.problems import AnyPath

    Target = tuple[str, ModelRef, Path]  # (name, model, results folder)
    Targets = tuple[list[Target], list[PreTrainedTokenizerBase | None], dict[str, str]]  # see `find_targets`


def members_seen(ref: ModelRef, task: MembershipTask) -> dict[str, int] | None:
    """{'whole', 'partly', 'never'}: for how many members the training took the loss on all tokens after the first, on
    some, or on none; None without a trained_rows.jsonl."""
    folder = Path(ref.adapter or ref.base).expanduser()
    taken = trained_rows.read(folder) if folder.is_dir() else None
    if taken is None:
        return None
    counts = dict.fromkeys(("whole", "partly", "never"), 0)
    for text, label in zip(task.texts, task.labels):
        if label:
            rows = [row for row in taken.find(text) if row.loss_tokens]
            whole = any(not row.cut and row.loss_tokens >= row.tokens - 1 for row in rows)
            counts["whole" if whole else "partly" if rows else "never"] += 1
    return counts


def template_sha256(config: MiaConfig, tokenizer: PreTrainedTokenizerBase, ref: ModelRef) -> str:
    """SHA-256 of the chat template that rendered the texts, hexadecimal."""
    template = chat.read_template(config.chat_template, tokenizer, ref.name)
    return hashlib.sha256(template.encode()).hexdigest()


def measure(
    ref: ModelRef, task: MembershipTask, config: MiaConfig, world: World, folder: Path, passes: Passes, name: str
) -> list[dict[str, Any]]:
    """Attack one model and write its files into `folder`; returns the result lines on rank 0, [] elsewhere.

    passes: its loader may already hold the unadapted base, which is left bit for bit unchanged.
    """
    with (
        locks.output_folder(folder, key="mia") as place,
        results.Run(folder / "run_mia.json", config, task.inputs, world, place) as record,
    ):
        tokenizer = models.load_tokenizer(ref)
        record["special_tokens"] = special = tokenization.special_tokens_in(tokenizer, task.written or task.texts)
        if special and world.main:
            print(tokenization.special_tokens_note(special), file=sys.stderr)
        if world.main and not task.whole and (note := tokenization.bos_note(tokenizer, task.texts)):
            print(note, file=sys.stderr)
        before = passes.scored
        evidence = gather(passes, ref, tokenizer, task, config, gradients=True)
        alone = replace(task, attacks=[attack for attack in task.attacks if attack not in AGAINST_BASE])
        base = reference = other = None
        if ref.adapter:
            other = ref.unadapted
            known = models.vocabulary_of(other)
            base = reference = gather(passes, other, tokenizer, alone, config, gradients=False, vocabulary=known)
        if config.ref_model:
            against = list(AGAINST_BASE)
            given = (config.ref_model, None, config.base_model, "--ref_model")
            other = models.find_model(*given, quantized=config.quantization)
            its_own = models.load_tokenizer(other, "--ref_model")
            about = replace(task, attacks=against)
            reference = gather(passes, other, its_own, about, config, gradients=False, target=evidence.encoded)
        shadows = calibrated.calibrate(passes, ref, evidence.encoded, task, task.shadows) if task.shadows else None
        passes.close()
        trained = task.trained.get(Path(os.path.realpath(Path(ref.adapter or ref.base).expanduser())))
        if trained is False and world.main:
            print(f"{ref.name}: was trained on a different file than --members {config.members}", file=sys.stderr)
        seen = members_seen(ref, task)
        if seen and seen["partly"] + seen["never"] and world.main:
            print(
                f"{ref.name}: of {sum(seen.values())} members, {seen['partly']} were only partly trained on and "
                f"{seen['never']} not at all (truncated, masked, or left out)",
                file=sys.stderr,
            )
        info = {
            "model": ref.name,
            "base_model": ref.base if ref.adapter else None,
            "reference": other.name if other else None,
            "model_sha256": provenance.weights_sha256(ref) if world.main else None,
            "members": config.members,
            "members_trained": trained,
            "members_seen": seen,
            "nonmembers": config.nonmembers,
            **({"chat_template_sha256": template_sha256(config, tokenizer, ref)} if task.whole else {}),
            "max_length": config.max_length,
            "dtype": models.dtype_name(passes.dtype, ref),
            "bootstrap": config.bootstrap,
            "seed": config.seed,
        }
        record["members_trained"] = trained
        record["passes"] = {"texts_scored": passes.scored - before}

        def finish() -> list[dict[str, Any]]:
            if not world.main:
                return []
            files = record.files
            assert files is not None  # the record has an Output
            frequencies = count_tokens(tokenizer, task.corpus) if task.corpus else None
            target_scores, reasons = score_texts(task, config, evidence, reference, frequencies)
            base_scores: Scores = {}
            base_reasons: Reasons = {}
            if base:
                base_scores, base_reasons = score_texts(alone, config, base, None, frequencies)
            if shadows:
                calibrated.add_scores(task, evidence, shadows, target_scores, reasons)
                if base:
                    calibrated.add_scores(task, base, shadows, base_scores, base_reasons)
            lines, rows, kept = report(task, config, info, target_scores, reasons, evidence, base_scores, base_reasons)
            for key, value in kept.items():
                record[key] = value
            if shadows:
                calibrated.describe(shadows, lines, rows)
                files.write_jsonl(folder / calibrated.RISK, calibrated.risk(task, shadows, target_scores, reasons))
            else:
                (folder / calibrated.RISK).unlink(missing_ok=True)  # of an earlier run with shadows
            files.write_jsonl(folder / "scores_mia.jsonl", rows)
            flags = sorted({flag for line in lines for flag in line["flags"] if not flag.startswith("coarse")})
            with files.open(folder / "roc_mia.png", "wb") as file:
                draw_roc(target_scores, task, flags, name).savefig(file, format="png", dpi=120)
            files.write_jsonl(folder / "results_mia.jsonl", lines)
            world.say(f"{name}\n{table(lines)}")
            if shadows:
                world.say(calibrated.summary(shadows))
            provenance.say_if_hardly_moved(ref)
            p = {who: made["p"] for who, made in kept["dataset_inference"].items() if made and made["p"] is not None}
            world.say("dataset inference: " + ", ".join(f"{who} p = {value:.2g}" for who, value in p.items()))
            return lines

        return world.together(finish)[world.rank]


def find_targets(config: MiaConfig, problems: Problems) -> Targets:
    """([(name, ModelRef, results folder)], their tokenizers, {path: why it cannot be measured}), from files only."""
    if config.model and not config.dir:
        return _single_target(config, config.model, problems)
    if config.dir and not config.model:
        return _targets_below(config, config.dir, problems)
    problems.add("give either --model or --dir")
    return [], [], {}


def _single_target(config: MiaConfig, model: str, problems: Problems) -> Targets:
    """`find_targets` for --model; warns on stderr if results of different settings will be replaced."""
    folder = Path(config.output_dir or "./")
    ref, tokenizer = models.look_up(problems, model, config.revision, config.base_model, quantized=config.quantization)
    file = folder / "results_mia.jsonl"
    if ref and file.is_file():
        earlier = problems.absorb(formats.read_rows, file) or []
        if any(line.get("model") != ref.name for line in earlier):
            problems.add(f"{file}: has the results of another model; choose another --output_dir")
        elif earlier:
            now = {key: getattr(config, key) for key in ("members", "nonmembers", "max_length", "seed")}
            other = [f"--{key} {earlier[0].get(key)}" for key, value in now.items() if earlier[0].get(key) != value]
            if other and int(os.environ.get("RANK", 0)) == 0:
                print(f"{file}: was made with {', '.join(other)}; it will be replaced", file=sys.stderr)
    return [(model, ref, folder)] if ref else [], [tokenizer], {}


def _targets_below(config: MiaConfig, folder: str, problems: Problems) -> Targets:
    """`find_targets` for --dir."""
    if not Path(folder).is_dir():
        problems.add(f"--dir {folder}: no such directory; give one with checkpoint-* below it")
        return [], [], {}
    paths = find_checkpoints(folder)
    checkpoints_found, unusable = look_up_all(
        problems, paths, config.revision, config.base_model, "--dir", config.quantization
    )
    if not paths:
        problems.lines.append(f"--dir {folder}: no checkpoint-* directory below it")
    targets = []
    for path, ref, _ in checkpoints_found:
        inside = path.relative_to(folder)
        targets.append((inside.as_posix(), ref, Path(config.output_dir) / inside if config.output_dir else path))
    return targets, [tokenizer for _, _, tokenizer in checkpoints_found], unusable


def cache_folder(root: AnyPath) -> Path:
    """Where a run with this results root caches its forward passes."""
    return Path(root) / "mia_cache"


@dataclass(frozen=True)
class Plan:
    """A run whose arguments and files have been checked."""

    config: MiaConfig
    task: MembershipTask
    targets: list[Target]
    unusable: dict[str, str]  # model → why
    root: str  # of the results


def check(config: MiaConfig) -> Plan:
    """Read everything except the models; UserError with every problem."""
    problems = Problems()
    files = (config.members, config.nonmembers, config.prefix_file, config.freq_corpus)
    sources.load(files, config.split, config.data_config)
    config = replace(config, members=str(dataset.default_dataset(config.members)))
    distributed.check_environment(problems, config.device_map, config.model_parallel, config.quantization)
    root = config.output_dir or config.dir or "./"
    check_writable(root, problems, "--output_dir" if config.output_dir or config.model else "--dir")
    reader = Reader(config, problems)
    targets, tokenizers, failures = find_targets(config, problems)
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    reader.use(known[0] if known else None, targets[0][0] if targets else "--model")
    task = prepare(config, problems, reader)
    if config.ref_model:
        given = (problems, config.ref_model, None, config.base_model, "--ref_model")
        models.look_up(*given, quantized=config.quantization)
    if task and task.whole and not config.chat_template and len({str(each.chat_template) for each in known}) > 1:
        problems.add(f"--dir {config.dir}: its checkpoints have different chat templates; attack them one by one")
    if problems.lines or task is None:
        raise UserError(*problems.lines)
    return Plan(config, task, targets, failures, root)


def run(config: MiaConfig) -> int:
    """Attack all targets; returns 0, or 1 if a checkpoint failed. UserError before any model is loaded."""
    plan = check(config)
    config, task, targets, failures = plan.config, plan.task, plan.targets, plan.unusable
    members = sum(task.labels)
    summary = f"{members} members, {len(task.labels) - members} non-members; attacks {' '.join(task.attacks)}"
    if task.shadows:
        finished, rest = len(task.shadows.trained), task.shadows.unfinished
        summary += f" {' '.join(SHADOW_ATTACKS)} ({finished} shadows{f', {rest} unfinished left out' if rest else ''})"
    impossible = [attack for attack in AGAINST_BASE if attack in task.attacks]
    alone = [ref.name for _, ref, _ in targets if not ref.adapter]
    if impossible and alone and not config.ref_model:
        words = f"{', '.join(alone)}: no adapter, so its base is not known and {', '.join(impossible)} are impossible"
        summary = f"{words}; pass --ref_model BASE\n{summary}"
    if config.dry_run:
        print(summary)
        for _, ref, folder in targets:
            print(f"would attack {ref.name}" + (f" on {ref.base}" if ref.adapter else "") + f", results in {folder}")
        return report_failures(failures, True)

    world = distributed.start(model_parallel=config.model_parallel)
    world.say(summary)
    folders = {folder: ref for _, ref, folder in targets}
    names = {ref.name: name for name, ref, _ in targets}
    failures |= measure_all(folders, task, config, world, cache_folder(plan.root), names)
    if folders:
        shown = next(iter(folders)) if len(folders) == 1 else f"the {len(folders)} checkpoints below {plan.root}"
        world.say(f"results are in {shown}")
    world.close()
    return report_failures(failures, world.main)


def measure_all(
    refs: Mapping[Path, ModelRef],
    task: MembershipTask,
    config: MiaConfig,
    world: World,
    cache: AnyPath,
    names: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Attack every {results folder: ModelRef}; returns {model: why it failed}. With --model, a failure is raised.

    cache: folder of cached passes, kept for later runs. names: {model name: display name}.
    """
    for group in Path(cache).glob("*/"):
        publication.remove_leftovers(group)
    locks.tidy(refs, "mia")
    loader = BaseLoader(world, models.resolve_dtype(config.dtype, world.device), config.device_map)
    passes = Passes(Cache(cache), loader, config.token_budget)

    def attack(_: int, ref: ModelRef, folder: Path) -> None:
        try:
            measure(ref, task, config, world, folder, passes, (names or {}).get(ref.name, ref.name))
        finally:
            passes.close()

    jobs = [(ref, folder) for folder, ref in refs.items()]
    if config.model:
        for number, job in enumerate(jobs, 1):
            attack(number, *job)
        return {}
    return for_each(jobs, attack, loader)
