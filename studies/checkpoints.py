"""The extraction attack, and membership inference if asked for, on every checkpoint below a directory.

See evaluate_purified.py.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common import (
    adapters,
    checkpoints,
    dataset,
    distributed,
    locks,
    models,
    provenance,
    publication,
    results,
    vllm_engine,
)
from common.problems import Problems, UserError, check_writable, report_failures
from extraction import measure, task
from extraction.attack import chat_renderer
from extraction.config import EvaluateConfig
from mia.config import MiaConfig
from mia.dataset import Reader, prepare

if TYPE_CHECKING:
    from common.checkpoints import BaseLoader
    from common.locks import Output
    from common.models import ModelRef
    from extraction.task import ExtractionTask
    from mia.dataset import MembershipTask

Job = tuple["ModelRef", Path, Path | None, list[float]]  # model, checkpoint, partial result file, missing temperatures


@dataclass
class Jobs:
    """The checkpoints below the directory and what is left to measure."""

    refs: dict[Path, "ModelRef"] = field(default_factory=dict)  # by checkpoint
    todo: list["Job"] = field(default_factory=list)
    n_complete: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # checkpoint → why it cannot be measured


def run(config: EvaluateConfig) -> int:
    """Measure every checkpoint; return 0, or 1 if one failed. Problems raise one UserError before a model is loaded."""
    problems = Problems()
    config = replace(config, dataset=str(dataset.default_dataset(config.dataset)))
    distributed.check_environment(problems, config.device_map, config.model_parallel, config.quantization)
    vllm_engine.check(config, problems, None, config.temperatures, quantization=config.quantization)
    tree: list[Path] = []
    if not Path(config.model).is_dir():
        problems.add(f"--model {config.model}: no such directory")
    else:
        tree = checkpoints.find_checkpoints(config.model)
        if not tree:
            problems.add(f"--model {config.model}: no checkpoint-* directory below it")
        check_writable(config.model, problems, "--model")
    if config.save_merged:
        if config.model_parallel > 1:
            problems.add("--save_merged: no process holds the whole model with --model_parallel; use merge_peft.py")
        check_writable(config.temp, problems, "--temp")
        if config.quantization:
            problems.add(f"--save_merged: not with --quantization {config.quantization}; use merge_peft.py")
        if config.dtype not in ("auto", "float32"):
            problems.add("--save_merged: merging needs --dtype float32; in half precision small updates round to zero")
        elif config.dtype == "auto":
            config = replace(config, dtype="float32")
    attack = task.prepare(config, problems)
    membership: MiaConfig | None = None
    sets: MembershipTask | None = None
    if config.mia:
        membership = MiaConfig(
            dir=config.model,
            members=config.dataset,
            seed=config.seed,
            dtype=config.dtype,
            model_parallel=config.model_parallel,
        )
        sets = prepare(membership, problems, Reader(membership, problems))
    problems.check()
    assert attack
    with locks.output_folder(config.model, config.dry_run, measure.KEY) as output:
        return evaluate(config, attack, tree, membership, sets, output)


def evaluate(
    config: EvaluateConfig,
    attack: "ExtractionTask",
    tree: list[Path],
    membership: MiaConfig | None,
    sets: "MembershipTask | None",
    output: "Output",
) -> int:
    if not config.dry_run:
        locks.tidy(tree, measure.KEY)
        for folder in {merged_folder(config, checkpoint).parent for checkpoint in tree} if config.save_merged else ():
            publication.remove_leftovers(folder)
    jobs = find_jobs(config, attack, tree)
    counts = f"{jobs.n_complete} complete, {len(jobs.todo)} to measure, {len(jobs.failures)} unusable"
    counts = f"{len(tree)} checkpoints: {counts}"
    if config.dry_run:
        print(counts)
        for ref, checkpoint, path, missing in jobs.todo:
            print(f"  {checkpoint} on {ref.base}: temperatures {missing}{f', resuming {path.name}' if path else ''}")
        return report_failures(jobs.failures, True)

    world = distributed.start(model_parallel=config.model_parallel)
    loader = checkpoints.BaseLoader(world, models.resolve_dtype(config.dtype, world.device), config.device_map)
    world.say(counts)
    failures = jobs.failures
    with results.Run(Path(config.model) / "run_evaluate_purified.json", config, attack.inputs, world, output) as record:
        work = partial(measure_checkpoint, config, attack, loader, len(jobs.todo))
        failures |= checkpoints.for_each(jobs.todo, work, loader)
        for checkpoint, ref in jobs.refs.items() if world.main else ():
            key = measure.model_key(ref) | {"dtype": str(loader.dtype).removeprefix("torch.")}
            matching = measure.find_results(checkpoint, attack, key)
            lines = measure.newest(matching)
            if lines:
                print(f"\n{checkpoint}")
                measure.print_table(lines, attack)
                measure.print_comparison(lines)
                for words in measure.described(matching):
                    print(f"from {words}")
                provenance.say_if_hardly_moved(ref, lines[-1]["relative_change"])
        loader.clear()
        if sets and membership:
            from mia.measure import cache_folder, measure_all

            usable = {checkpoint: ref for checkpoint, ref in jobs.refs.items() if str(checkpoint) not in failures}
            failures |= measure_all(usable, sets, membership, world, cache_folder(config.model))
        n_failed = len(failures)
        record["checkpoints"] = {"found": len(tree), "measured": len(tree) - n_failed, "failed": failures}
        if failures:
            record["error"] = f"{n_failed} of {len(tree)} checkpoints failed"
    world.say(f"results are in the checkpoints below {config.model}, results_purified*.jsonl")
    world.close()
    return report_failures(failures, world.main)


def find_jobs(config: EvaluateConfig, attack: "ExtractionTask", tree: list[Path]) -> Jobs:
    """Sort the checkpoints by their files: complete, to measure (some or all temperatures), or unusable."""
    import torch

    jobs = Jobs()
    dtype = models.resolve_dtype(config.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    for checkpoint in tree:
        try:
            ref = models.find_model(
                str(checkpoint), config.revision, config.base_model, is_opt=config.is_opt, quantized=config.quantization
            )
            if config.save_merged and ref.adapter:
                adapters.check_mergeable(ref)
            if config.engine == "vllm":
                vllm_engine.check_model(ref)
            key = measure.model_key(ref) | {"dtype": models.dtype_name(dtype, ref)}
            earlier = measure.find_results(checkpoint, attack, key, config.save_responses)
            if config.chat and not config.chat_template:  # a given one was read before
                chat_renderer(attack, models.load_tokenizer(ref), str(checkpoint))
        except UserError as error:
            jobs.failures[str(checkpoint)] = "; ".join(error.problems)
            continue
        jobs.refs[checkpoint] = ref
        done = {line["temperature"] for line in measure.newest(earlier)}
        missing = [temperature for temperature in config.temperatures if temperature not in done]
        if missing:
            jobs.todo.append((ref, checkpoint, earlier[-1][0] if earlier else None, missing))
        else:
            jobs.n_complete += 1
    return jobs


def measure_checkpoint(
    config: EvaluateConfig,
    attack: "ExtractionTask",
    loader: "BaseLoader",
    total: int,
    number: int,
    ref: "ModelRef",
    checkpoint: Path,
    path: Path | None,
    missing: list[float],
) -> None:
    """Measure the missing temperatures of one checkpoint."""
    loader.world.say(f"[{number}/{total}] {checkpoint}")
    tokenizer = models.load_tokenizer(ref)
    merge = True if config.save_merged else None  # which needs float32
    with loader.adapted(ref, merge) as (model, change):
        if config.save_merged and ref.adapter and loader.world.main:
            with publication.atomic_folder(merged_folder(config, checkpoint)) as folder:
                model.save_pretrained(str(folder))
                tokenizer.save_pretrained(folder)
        info = measure.describe(ref, loader.dtype, change)
        with vllm_engine.beside(config, ref, loader.dtype) as sampler:
            measure.measure_model(
                model, tokenizer, attack, config, info, loader.world, checkpoint, path, missing, sampler
            )


def merged_folder(config: EvaluateConfig, checkpoint: Path) -> Path:
    return Path(config.temp) / checkpoint.relative_to(Path(config.model).parent)
