"""The plan of a run_peft.py call, made before a model is loaded."""

import math
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from common import (
    dataset,
    distributed,
    formats,
    inserted,
    json_files,
    limits,
    manifests,
    models,
    provenance,
    quantization,
    results,
    sources,
    strict_json,
    tokenization,
    trained,
)
from common.chat import Rendered
from common.distributed import World
from common.problems import Problems, UserError, check_writable
from common.rows import Lazy
from common.rows import Row as DataRow
from training import dp_plan, preflight, tokenised
from training.batches import Row, encode, pack
from training.checkpoint import checkpoints
from training.config import TrainConfig
from training.model import check_targets, count_trainable
from training.optim import METRIC_SCHEDULERS, check_scheduler, optimizer_class
from training.trackers import tracker_classes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PUBLIC_ROWS = 256  # rows used by --suggest_max_grad_norm
# These affect only where a run goes and how it is monitored, not its result: a finished run matches with other values.
FREE_ARGUMENTS = ("input", "output_root", "resume", "dry_run", "logging_steps", "report_to", "allow_overlap",
                  "suggest_max_grad_norm")  # fmt: skip


def rate_name(value: float) -> str:
    """2e-6 → '2e-06': `%.0e` if exact, else with as many digits as needed to be exact (2.5e-6 → '2.5e-06')."""
    for digits in range(18):
        text = f"{value:.{digits}e}"
        if float(text) == value:
            return text
    raise ValueError(f"{value} has no exact form")


def run_folder(config: TrainConfig, tag: str) -> Path:
    """<output_root>/<model basename>/<data tag>-<peft type>/<weight decay>_<learning rate>[-<run name>]"""
    name = Path(config.model).expanduser()
    basename = name.resolve().name if name.is_dir() else config.model.rstrip("/").split("/")[-1]
    rates = f"{rate_name(config.weight_decay)}_{rate_name(config.learning_rate)}"
    last = f"{rates}-{config.run_name}" if config.run_name else rates
    kind = config.peft_type
    if config.dp and config.target_epsilon is not None:
        kind += f"-dp-eps{config.target_epsilon:g}"
    elif config.dp and config.noise_multiplier is not None:
        kind += f"-dp-sigma{config.noise_multiplier:g}"
    return Path(config.output_root).expanduser() / basename / f"{tag.replace('/', '-')}-{kind}" / last


def choose_rows(
    config: TrainConfig, path: Path, rows: Sequence[DataRow], manifest: dict[str, Any] | None
) -> tuple[Sequence[int], Sequence[int]]:
    """(training row indices, held-out row indices). UserError for an overlap or too few rows."""
    n, problems = len(rows), Problems()
    parts, evaluated = dataset.split(rows, manifest), dataset.evaluated_rows(rows, manifest)
    has_head = dataset.shape_of(rows[0]) == "enron"
    held = (parts.head if has_head else range(n))[: config.eval_rows]
    train = parts.train
    if config.train_rows is not None:
        if config.train_rows > n:
            raise UserError(f"--train_rows {config.train_rows}: {path} has only {n} rows")
        train = range(n - config.train_rows, n)
    if len(held) < config.eval_rows:
        problems.add(f"--eval_rows {config.eval_rows}: only {len(held)} rows of {path} are held out of training")
    if not has_head:
        if config.train_rows is None:
            train = range(len(held), n)  # of such a file, `parts.train` is the whole
        elif len(held) > n - config.train_rows:
            problems.add(
                f"--eval_rows {config.eval_rows} and --train_rows {config.train_rows} share rows of {path} ({n} rows)"
            )
    if not train:
        problems.add(f"{path}: no rows left to train on")
    head = set(evaluated)
    overlap = [index for index in train if index in head] if head else []
    if overlap and not config.allow_overlap:
        problems.add(
            f"{path}: {len(overlap)} of the {len(train)} training rows (first: row {overlap[0]}) are evaluated "
            "elsewhere; use fewer --train_rows, or pass --allow_overlap"
        )
    problems.check()
    return train, held


def boundaries(path: Path | str, rows: Sequence[DataRow], indices: Iterable[int]) -> None:
    """UserError naming the first row without a prompt (--loss_on completion needs one)."""
    bare = array("q", (index for index in indices if not dataset.has_completion(rows[index])))
    if bare:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise UserError(
            f"--loss_on completion: {path}: row {bare[0]}{more} has no prompt; use --loss_on all, or rows with prompts"
        )


@dataclass
class Plan:
    """Everything determined by the arguments and files alone. `start`: 'new', 'resume' or 'finished'."""

    ref: models.ModelRef
    input: Path
    tag: str
    folder: Path
    tokenizer: "PreTrainedTokenizerBase"
    indices: Sequence[int]  # of the training rows in the input file
    rendered: Sequence[Rendered]  # they
    special_tokens: dict[str, int]  # {special token: number of training rows that contain it literally}
    bos_note: str | None  # about rows that start with the tokenizer's BOS
    train: Sequence[Row]
    held: Sequence[Row]
    sequences: Sequence[list[int]]  # places in `train`
    global_batch: int
    max_length: int
    start: str
    world_size: int
    privacy: dp_plan.Privacy | None
    n_trainable: int
    placed: list[inserted.Inserted] | None = None  # the canaries in the file; None if no key is beside it
    has_canaries: bool = False  # says the file's manifest

    @property
    def steps_per_epoch(self) -> int:
        return self.privacy.steps_per_epoch if self.privacy else math.ceil(len(self.sequences) / self.global_batch)

    @cached_property
    def labels(self) -> "array[int]":
        """The number of labels of each training row."""
        return tokenised.labels(self.train)

    @cached_property
    def lengths(self) -> "array[int]":
        """The number of tokens of each sequence."""
        tokens = tokenised.lengths(self.train)
        packed = isinstance(self.sequences, list)  # otherwise each row is a sequence
        return (
            array("i", [sum(tokens[place] for place in sequence) for sequence in self.sequences]) if packed else tokens
        )

    @cached_property
    def left_out(self) -> set[int]:
        """The places in `train` that are in no privacy unit: they are not trained on."""
        if not (self.privacy and self.privacy.rows_left_out):
            return set()
        return set(range(len(self.train))) - {place for unit in self.privacy.units for place in unit}

    @cached_property
    def canary_counts(self) -> dict[str, int] | None:
        """How much of the canaries is trained on; None if there are none, or unknown ones."""
        if not self.placed:
            return None
        wanted = {row for canary in self.placed for row, _ in canary.copies}
        places = {
            index: place for place, index in enumerate(self.indices) if index in wanted and place not in self.left_out
        }
        return preflight.count(self.placed, places, self.rendered, self.train, self.tokenizer)

    @property
    def private(self) -> Path:
        """Where a running DP run keeps its secret, which would undo the noise."""
        return self.folder / "private"


def make_plan(config: TrainConfig) -> Plan:
    """Check every argument and file, tokenise the rows, inspect the run directory. UserError with all problems."""
    problems = Problems()
    sources.load([config.input, config.suggest_max_grad_norm], config.split, config.data_config)
    distributed.check_environment(problems)
    if (
        config.optimizer != TrainConfig.optimizer
    ):  # skip the default: checking it would import torch before a missing file is reported
        problems.absorb(optimizer_class, config)
    problems.absorb(tracker_classes, config.report_to)
    if config.peft_type == "pissa" and config.lora_dropout:
        problems.add(f"--lora_dropout {config.lora_dropout}: PiSSA is trained without dropout; drop the flag")
    if config.device_map and config.distribution_type != "mp":
        problems.add(f"--device_map {config.device_map}: only with --distribution_type mp")
    if config.run_name and not re.fullmatch(r"\w[\w.+=-]*", config.run_name):
        problems.add(
            f"--run_name {config.run_name!r}: use only letters, digits and . + = _ -, not starting with a sign"
        )
    size = os.environ.get("WORLD_SIZE", "1")
    world_size = int(size) if size.isdigit() else 1
    if config.distribution_type == "mp" and world_size > 1:
        problems.add(f"--distribution_type mp: runs as a single process, not {world_size}; start it without torchrun")
    if config.hsdp and config.distribution_type != "fsdp":
        problems.add("--hsdp: only with --distribution_type fsdp")
    elif config.hsdp and world_size % distributed.node_size():
        problems.add(
            f"--hsdp: {world_size} processes are not a multiple of this node's {distributed.node_size()}; "
            "start equally many on every node"
        )
    clean_flags = dp_plan.check_flags(config, METRIC_SCHEDULERS, problems)
    if config.suggest_max_grad_norm and not config.dp:
        problems.add("--suggest_max_grad_norm: only with --dp")
    if config.distribution_type == "fsdp" and config.peft_type == "full" and config.dtype == "float16":
        problems.add("--dtype float16: full fine-tuning under fsdp has no loss scaling; use bfloat16 or float32")

    path = dataset.default_dataset(config.input)
    chosen, folder, tag = None, None, ""
    rows = problems.absorb(formats.open_rows, path, config.columns)
    manifest = problems.absorb(manifests.read_manifest, path)
    canaries = problems.absorb(inserted.read, path)
    if rows:
        if problems.absorb(dataset.validate, path, rows):
            chosen = problems.absorb(choose_rows, config, path, rows, manifest)
        tag = manifests.data_tag(path, manifest)
        folder = run_folder(config, tag)
        check_writable(folder, problems, "--output_root")
    if rows and chosen and config.loss_on == "completion":
        problems.absorb(boundaries, path, rows, chain(*chosen))
    global_batch = config.per_device_batch_size * config.gradient_accumulation_steps * world_size
    spending = None
    if config.dp and rows and chosen and clean_flags:
        spending = problems.absorb(dp_plan.make_privacy, config, path, rows, chosen[0])
    if spending:
        global_batch = spending.logical_batch
    steps = math.ceil(len(chosen[0]) / global_batch) * config.epochs if chosen else 1
    if (config.scheduler, config.scheduler_kwargs) != (TrainConfig.scheduler, TrainConfig.scheduler_kwargs):
        problems.absorb(check_scheduler, config, steps)
    public_path = config.suggest_max_grad_norm
    public = problems.absorb(formats.open_rows, public_path, config.columns) if public_path else None
    whole = bool(public and problems.absorb(dataset.validate, str(public_path), public))
    if public and whole and config.loss_on == "completion":
        problems.absorb(boundaries, str(public_path), public, range(len(public))[:PUBLIC_ROWS])
    if public and rows and results.sha256(str(public_path)) == results.sha256(path):
        problems.add(
            f"--suggest_max_grad_norm {config.suggest_max_grad_norm}: is the private --input; give a public file"
        )
    ref = tokenizer = None
    if not models.is_adapter(config.model):
        ref, tokenizer = models.look_up(problems, config.model, config.revision, quantized=config.quantization)
    else:
        problems.add(f"--model {config.model}: is an adapter; merge it into its base first (merge_peft.py)")
    start = None
    if ref and folder and (spending or not config.dp):
        start = problems.absorb(run_state, config, ref, folder, path, global_batch, world_size, spending)
    architecture = models.read_config(ref.base, ref.revision, "--model") if ref and tokenizer else None
    renderer = None
    if tokenizer and rows and chosen:
        given = (public or rows, tokenizer, config.chat_template, f"--model {config.model}")
        renderer = problems.absorb(dataset.read_renderer, *given)
    stored = quantization.method(architecture) if architecture else ""
    if stored and "bitsandbytes" not in stored:
        problems.add(
            f"--model {config.model}: is quantised ({stored}), which is not trained on; give the unquantised model"
        )
    elif config.quantization or stored:
        check_quantized(config, f"--quantization {config.quantization}" if config.quantization else stored, problems)
    if architecture and config.peft_type != "full":
        problems.absorb(check_targets, config.target_modules, architecture)
    problems.check()
    if not (rows and chosen and folder and ref and tokenizer and architecture and start):
        raise RuntimeError("the plan is incomplete, but no check reported why")
    source = path
    if public and config.suggest_max_grad_norm:
        source = Path(config.suggest_max_grad_norm)
        rows, chosen = public, (range(len(public))[:PUBLIC_ROWS], range(0))

    max_length = longest_row(config, architecture)
    if renderer:
        tokenizer.chat_template = renderer.template  # saved with every checkpoint
    rendered, held_out = (dataset.rendering(source, rows, indices, renderer) for indices in chosen)
    to_rows = partial(encode, tokenizer=tokenizer, max_length=max_length, loss_on=config.loss_on)
    train, held = (tokenised.tokenise(part, to_rows) for part in (rendered, held_out))
    if not any(tokenised.labels(train)):
        raise UserError(f"{path}: no tokens left to train on with --max_length {max_length}; increase it")
    check_ids((train, held), architecture, f"--model {config.model}")
    sequences: Sequence[list[int]] = Lazy(lambda place: [place], len(train))
    if config.packing:
        sequences = pack(tokenised.lengths(train), max_length)
    n_trainable = count_trainable(config, architecture) if config.dp else 0
    return Plan(
        ref=ref,
        input=path,
        tag=tag,
        folder=folder,
        tokenizer=tokenizer,
        indices=chosen[0],
        rendered=rendered,
        special_tokens=tokenization.special_tokens_in(tokenizer, (dataset.written(rows[index]) for index in chosen[0])),
        bos_note=tokenization.bos_note(tokenizer, (row.text for row in rendered)) if renderer is None else None,
        train=train,
        held=held,
        sequences=sequences,
        global_batch=global_batch,
        max_length=max_length,
        start=start,
        world_size=world_size,
        privacy=spending,
        n_trainable=n_trainable,
        placed=None if public else canaries,
        has_canaries=bool((manifest or {}).get("canaries")) and not public,
    )


def longest_row(config: TrainConfig, architecture: "PreTrainedConfig") -> int:
    """Tokens per row: --max_length, limited to the model's context. UserError if its rotary embedding forbids it."""
    max_length = min(config.max_length, limits.context_length(SimpleNamespace(config=architecture)))
    limit = limits.rope_limit(architecture)
    if limit and max_length > limit:
        raise UserError(
            f"--max_length {max_length}: {architecture.model_type} changes its rotary embedding beyond {limit} tokens, "
            f"also for shorter rows in the same batch; use --max_length {limit}"
        )
    limits.check_rope(architecture, max_length)
    return max_length


def check_ids(parts: Iterable[Sequence[Row]], architecture: "PreTrainedConfig", whose: str) -> None:
    """UserError, starting with `whose`, for a token id that the model has no embedding for."""
    highest = max(map(tokenised.highest_id, parts))
    vocabulary = architecture.get_text_config().vocab_size
    if highest >= vocabulary:
        raise UserError(f"{whose}: its tokenizer gives id {highest}, but the model has only {vocabulary} embeddings")


def check_quantized(config: TrainConfig, how: str, problems: Problems) -> None:
    """Add problems for what a base in fewer bits cannot be used for. how: the base is quantised, in words."""
    if config.peft_type == "full":
        problems.add(f"--peft_type full: quantised weights ({how}) cannot be trained; train an adapter")
    if config.peft_type == "pissa":
        problems.add(f"--peft_type pissa: changes the base's weights, which are quantised ({how}); use lora or dora")
    if config.peft_type == "dora" and "int8" in how:
        problems.add(f"--peft_type dora: not behind int8 layers ({how}); use --quantization nf4, or lora")
    if config.dp:
        problems.add(f"--dp: has no per-example gradients behind quantised layers ({how}); train without one of them")
    if config.distribution_type == "fsdp":
        problems.add(f"--distribution_type fsdp: cannot shard quantised weights ({how}); use ddp or mp")


def run_state(
    config: TrainConfig,
    ref: models.ModelRef,
    folder: Path,
    path: Path,
    global_batch: int,
    world_size: int,
    spending: dp_plan.Privacy | None = None,
) -> str:
    """'new', 'resume' or 'finished', from run.json in the run directory. UserError if its arguments, input or base
    weights differ.

    `spending`, the privacy plan of a DP run, must match the one that its steps were sampled and accounted with.
    """
    file = folder / "run.json"
    if not file.is_file():
        return "new"
    record = json_files.read_json(file, f"remove {folder}")
    check_record(file, record)
    finished = record["status"] == "ok"
    if not finished and not config.resume:
        return "new"
    now = strict_json.plain(vars(config)) | {"global_batch": global_batch, "input's content": results.sha256(path)}
    then = (
        {"hsdp": False}
        | record["args"]
        | {"global_batch": record["global_batch"], "input's content": record["inputs"][0]["sha256"]}
    )
    same_input = trained.input_is(folder, record, results.sha256(path))
    if same_input is None:
        raise UserError(
            f"{folder}: its {trained.FILE} is missing, so --input cannot be compared with what the run read; "
            "restore it, or set --run_name"
        )
    if same_input:
        now["input's content"] = then["input's content"]
    if record.get("base_sha256"):
        now["base's weights"], then["base's weights"] = provenance.weights_sha256(ref), record["base_sha256"]
    keys = sorted((set(now) | set(then)) - set(FREE_ARGUMENTS))
    different = [f"--{key} {then.get(key)} there, {now.get(key)} here" for key in keys if now.get(key) != then.get(key)]
    if spending and not finished:
        different += spending.differences(record["privacy"])
        if record["world_size"] != world_size:
            different.append(f"processes {record['world_size']} there, {world_size} here")
        if checkpoints(folder) and not (folder / "private" / "training_state.pt").is_file():
            raise UserError(
                f"{folder}: has checkpoints but no state to resume from; start over without --resume, and add the ε of "
                "these checkpoints to the new run's if anyone has seen them"
            )
    if different:
        kind = "a finished run" if finished else "an unfinished run (--resume)"
        raise UserError(f"{folder}: has {kind} with different arguments ({'; '.join(different)}); set --run_name")
    return "finished" if finished else "resume"


def check_record(file: Path, record: dict[str, Any]) -> None:
    """UserError unless a run.json has the fields that run_state reads, with the right types."""
    kinds = {"status": str, "args": dict, "global_batch": int, "inputs": list, "world_size": int}
    if isinstance(record.get("args"), dict) and record["args"].get("dp"):
        kinds["privacy"] = dict
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    inputs = record.get("inputs")
    if isinstance(inputs, list) and not (inputs and isinstance(inputs[0], dict) and inputs[0].get("sha256")):
        wrong.append("inputs")
    if wrong:
        raise UserError(f"{file}: damaged (no usable {', '.join(wrong)}); remove {file.parent}")


def describe(config: TrainConfig, plan: Plan) -> list[str]:
    """The plan as lines of text."""
    tokens, labels = sum(plan.lengths), sum(plan.labels)
    kind = f"{config.peft_type}, {config.distribution_type}"
    epochs = f"steps        {plan.steps_per_epoch} per epoch × {config.epochs} epochs"
    lines = [
        f"model        {plan.ref.base}, {kind} on {plan.world_size} process(es)",
        f"data         {plan.input} ({plan.tag}): {len(plan.train)} training rows, {len(plan.held)} held out",
        f"tokens       {tokens} per epoch, {labels} of them predicted; at most {plan.max_length} per row",
        f"{epochs}, global batch {plan.global_batch}",
        f"directory    {plan.folder}",
    ]
    if plan.privacy:
        lines[3:4] = [
            f"{epochs}, {plan.global_batch} units expected",
            *dp_plan.describe(plan.privacy, config.epochs, plan.n_trainable),
        ]
        if tracker_classes(config.report_to):
            lines.append(
                f"trackers     {config.report_to}: the per-step losses and counts sent there are not covered by ε"
            )
    if config.packing:
        lines.insert(3, f"packing      {len(plan.train)} rows in {len(plan.sequences)} sequences")
    if plan.special_tokens:
        lines.insert(3, f"             {tokenization.special_tokens_note(plan.special_tokens)}")
    if plan.bos_note:
        lines.insert(3, f"             {plan.bos_note}")
    if plan.canary_counts:
        lines.insert(3, f"canaries     {preflight.describe(plan.canary_counts)}")
    elif plan.has_canaries and plan.placed is None:
        name = inserted.key_beside(plan.input).name
        lines.insert(3, f"canaries     {name}, beside the file, is missing or of another one: not counted here")
    empty = plan.labels.count(0)
    if empty:
        lines.insert(
            3, f"             {empty} rows have nothing to predict (truncated before their completion, or empty)"
        )
    return lines


def unfinished(plan: Plan) -> dict[str, Any]:
    """The run.json of the unfinished run to resume; {} for a new run."""
    if plan.start != "resume":
        return {}
    record: dict[str, Any] = json_files.read_json(plan.folder / "run.json", f"remove {plan.folder}")
    return record


def chosen_dtype(config: TrainConfig, plan: Plan, world: World, earlier: dict[str, Any]) -> "torch.dtype":
    """The torch dtype of --dtype on this machine; UserError if the run cannot resume, or be private, with it."""
    dtype: torch.dtype = models.resolve_dtype(config.dtype, world.device)
    name = str(dtype).removeprefix("torch.")
    if plan.privacy and name == "float16":
        raise UserError("--dtype auto: this GPU has no bfloat16; --dp needs --dtype float32 there")
    if earlier.get("dtype", name) != name:
        raise UserError(
            f"--dtype {config.dtype}: is {name} on this machine, but the unfinished run uses {earlier['dtype']}"
        )
    return dtype
