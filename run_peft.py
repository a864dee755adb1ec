"""Fine-tune a causal language model with LoRA, DoRA or PiSSA adapters, or whole.

    python run_peft.py -m EleutherAI/pythia-1.4b -i data/enron.jsonl -e 4 -lr 2e-6
    torchrun --nproc_per_node=4 run_peft.py -m EleutherAI/pythia-1.4b -i data/enron.jsonl -dt ddp
    torchrun --nproc_per_node=4 run_peft.py -m EleutherAI/pythia-12b -dt fsdp -pt dora --gradient_checkpointing
    python run_peft.py -m facebook/opt-1.3b -dt mp -pt pissa --resume
    python run_peft.py -m EleutherAI/pythia-1.4b -pdbs 16 --dp --target_epsilon 8 --logical_batch_size 512

Writes <output_root>/<model>/<data tag>-<peft type>/<weight decay>_<learning rate>[-<run name>]/ with

    checkpoint-<step>/   one an epoch: a plain PEFT adapter that loads on the ORIGINAL base (--peft_type full: a model),
                         the tokenizer, and in the newest one training_state.pt for --resume
    metrics.jsonl        {step, epoch, loss, lr, grad_norm, tokens, time} every --logging_steps: loss is the mean over
                         the label tokens since the last line, tokens counts all trained tokens so far (no padding);
                         with --eval_rows also {step, epoch, eval_loss, eval_tokens, time}, before training and an epoch
    run.json             arguments, versions, input, status; relative_change (‖ΔW‖/‖W‖), `notes` (a model that has
                         hardly moved), clip_slack (--dp: the bound is divided by it, 1 in float32); `trained`: rows,
                         tokens kept, loss_tokens, rows_cut and tokens_cut (by --max_length), rows_without_loss,
                         tokens_masked (by --loss_on)
    trained_rows.jsonl   one line per training row: its hash, its tokens, which characters the loss saw (common/trained)

One loop serves every mode. A step is one global batch of per_device_batch_size × gradient_accumulation_steps ×
processes rows, drawn by (seed, epoch) alone; its loss is the sum over all its label tokens divided by their number, so
neither the number of processes nor the way the rows are cut into micro-batches changes the update. ddp: every process
holds the model. fsdp: the frozen base is sharded over the processes (FSDP2), the adapters are replicated. In both the
adapters' gradients are summed over the processes once a step. mp: one process spreads the layers over its GPUs (on a
CPU machine they all stay on the one device).

--dp (DP-SGD) changes the batches (a Poisson draw of privacy units a step, in micro-batches of at most
--per_device_batch_size rows), the loss (the mean over each record's own tokens), the clipping (each unit's gradient
alone) and adds noise: nothing else. run.json has a `privacy` block, and every checkpoint a privacy.json with the ε
spent up to it. The state for --resume lies in private/, which is removed at the end: its random secret would undo the
noise. metrics.jsonl's loss, batch, clipped, dropped and signal_to_noise (of the sum of clipped gradients) are computed
from the data and are not covered by ε; do not publish them with the model.
"""

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import cli, dataset, distributed, models, results, trained
from common.cli import Problems, UserError
from training import dp_plan
from training.batches import Row, collate, converted, encode, epoch_batches, micro_batches, pack, unit_batches

PROBE_ROWS, PROBE_TOKENS = 4, 128
PUBLIC_ROWS = 256  # of --suggest_max_grad_norm
LOG_SECONDS = 30
TRIM_STEPS = 16  # steps between calls of trim_memory
# These change where or how a run is watched, not what it computes: a finished run may be asked for with others.
FREE_ARGUMENTS = ("input", "output_root", "resume", "dry_run", "logging_steps", "report_to", "allow_overlap",
                  "suggest_max_grad_norm")  # fmt: skip
SEED = 3407  # without --dp
# A bf16 pass rounds a row's gradient by its neighbours: a removed record was seen to move the others of 32 by up to
# 0.055 of the clipping norm C, across its own gradient and growing with √units: 0.01·C·√units.
ROUNDING = 0.01
METRIC_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Fine-tune a causal language model with LoRA, DoRA or PiSSA, or whole.",
        "torchrun --nproc_per_node=4 run_peft.py -m EleutherAI/pythia-1.4b -i data/enron.jsonl -pt lora -e 4 -lr 2e-6",
    )
    add = parser.add_argument
    add("-m", "--model", default="EleutherAI/pythia-1.4b", help="hub name or directory of a causal LM")
    add("-i", "--input", default="./data/enron.jsonl", help="training data: .jsonl, .arrow or .parquet")
    add("-pdbs", "--per_device_batch_size", type=cli.positive_int, default=1, help="rows a process holds at once")
    add(
        "-gas",
        "--gradient_accumulation_steps",
        type=cli.positive_int,
        default=8,
        help="global batch = per_device_batch_size × this × processes",
    )
    add("-w", "--warmup_steps", type=cli.non_negative_int, default=0, help="steps until the full learning rate")
    add("-e", "--epochs", type=cli.positive_int, default=4, help="passes over the rows; one checkpoint each")
    add("-lr", "--learning_rate", type=cli.non_negative_float, default=2e-6, help="peak learning rate")
    add("-l", "--logging_steps", type=cli.positive_int, default=1, help="steps between lines of metrics.jsonl")
    add("-opt", "--optimizer", default="adamw_torch", help="an optimizer name of transformers")
    add("-wd", "--weight_decay", type=cli.non_negative_float, default=0, help="on matrices; not on vectors")
    add("-s", "--scheduler", default="linear", help="a learning-rate schedule name of transformers")
    add("--scheduler_kwargs", default="{}", help='JSON object, for schedules that need more, e.g. {"min_lr": 1e-7}')
    add(
        "-dt",
        "--distribution_type",
        choices=("ddp", "mp", "fsdp"),
        default="ddp",
        help="ddp: a model a process; fsdp: the base sharded over the processes; mp: layers over one process's GPUs",
    )
    add(
        "-pt",
        "--peft_type",
        choices=("lora", "dora", "pissa", "full"),
        default="lora",
        help="full: every parameter is trained, no adapter",
    )
    add("--output_root", default="./", help="where <model>/<data>-<type>/<decay>_<rate>/ is made")
    add("--run_name", default=None, help="appended to the run directory's name")
    add("--train_rows", type=cli.positive_int, default=None, help="train on the last N rows; None: the published split")
    add("--eval_rows", type=cli.non_negative_int, default=0, help="held-out rows whose loss is taken every epoch")
    add("--allow_overlap", action="store_true", help="allow training on rows that are evaluated elsewhere")
    add("--lora_r", type=cli.positive_int, default=64, help="rank (a layer with a smaller side gets that side)")
    add("--lora_alpha", type=cli.positive_float, default=16, help="the update is scaled by alpha / r")
    add("--lora_dropout", type=cli.share, default=None, help="None: 0.05, and 0 for pissa")
    add(
        "--target_modules",
        nargs="+",
        default=["all-linear"],
        help="module names, or all-linear: every linear layer but the output head",
    )
    add("--max_length", type=cli.positive_int, default=2048, help="tokens of a row; the rest is cut off")
    add(
        "--loss_on",
        choices=("all", "completion"),
        default="all",
        help="completion: only tokens after the row's prompt part (and the EOS)",
    )
    add(
        "--max_grad_norm",
        type=cli.positive_float,
        default=1.0,
        help="clip the gradient's norm (--dp: of each unit); inf: off",
    )
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--packing", action="store_true", help="fill sequences of max_length with several rows each")
    add("--resume", action="store_true", help="continue an unfinished run from its newest saved state")
    add("--report_to", default="none", help="trackers of accelerate, comma-separated: tensorboard,wandb,…")
    dp_plan.add_flags(parser)
    add(
        "--suggest_max_grad_norm",
        default=None,
        metavar="PUBLIC",
        help="with --dp: print the norms of per-record gradients on this public file (never the private one) and stop",
    )
    seed = f"seed of everything random (default: {SEED}; with --dp the operating system's entropy)"
    cli.add_model_flags(parser, default_seed=None, seed_help=seed)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Names and arguments


def rate_name(value: float) -> str:
    """2e-6 → '2e-06': `%.0e` where that is exact, else with as many digits as make it exact (2.5e-6 → '2.5e-06')."""
    for digits in range(18):
        text = f"{value:.{digits}e}"
        if float(text) == value:
            return text
    raise ValueError(f"{value} has no exact form")


def run_folder(args, tag: str) -> Path:
    """<output_root>/<model basename>/<data tag>-<peft type>/<weight decay>_<learning rate>[-<run name>]"""
    name = Path(args.model).expanduser()
    basename = name.resolve().name if name.is_dir() else args.model.rstrip("/").split("/")[-1]
    rates = f"{rate_name(args.weight_decay)}_{rate_name(args.learning_rate)}"
    last = f"{rates}-{args.run_name}" if args.run_name else rates
    kind = args.peft_type
    if args.dp and args.target_epsilon is not None:
        kind += f"-dp-eps{args.target_epsilon:g}"
    elif args.dp and args.noise_multiplier is not None:
        kind += f"-dp-sigma{args.noise_multiplier:g}"
    return Path(args.output_root).expanduser() / basename / f"{tag.replace('/', '-')}-{kind}" / last


def optimizer_class(args) -> tuple[type, dict]:
    """(class, keyword arguments) for --optimizer, as transformers' Trainer resolves it. UserError when it cannot."""
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    names = [item.value for item in OptimizerNames]
    if args.optimizer not in names:
        raise UserError(f"--optimizer {args.optimizer}: unknown; transformers knows {', '.join(names)}")
    if args.optimizer.startswith(("lomo", "adalomo", "schedule_free", "galore", "apollo")):
        raise UserError(f"--optimizer {args.optimizer}: replaces the training loop or averages weights; not supported")
    wanted = SimpleNamespace(
        optim=OptimizerNames(args.optimizer),
        learning_rate=args.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        optim_args=None,
        optim_target_modules=None,
    )
    try:
        return Trainer.get_optimizer_cls_and_kwargs(wanted)
    except (ImportError, ValueError) as error:
        raise UserError(f"--optimizer {args.optimizer}: {str(error).splitlines()[0]}") from None


def make_scheduler(args, optimizer, total: int):
    from transformers import get_scheduler

    extra = json.loads(args.scheduler_kwargs)
    return get_scheduler(args.scheduler, optimizer, args.warmup_steps, total, scheduler_specific_kwargs=extra)


def check_scheduler(args, total: int) -> None:
    """UserError unless --scheduler is a name of transformers that works with the other arguments."""
    import torch
    from transformers import SchedulerType

    names = [item.value for item in SchedulerType]
    if args.scheduler not in names:
        raise UserError(f"--scheduler {args.scheduler}: unknown; transformers knows {', '.join(names)}")
    try:
        if not isinstance(json.loads(args.scheduler_kwargs), dict):
            raise UserError(f"--scheduler_kwargs {args.scheduler_kwargs}: must be a JSON object")
        make_scheduler(args, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate), total)
    except json.JSONDecodeError as error:
        raise UserError(f"--scheduler_kwargs {args.scheduler_kwargs}: not JSON ({error})") from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--scheduler {args.scheduler}: {str(error).splitlines()[0]} (see --scheduler_kwargs)"
        ) from None
    if args.scheduler in METRIC_SCHEDULERS and not args.eval_rows:
        raise UserError(f"--scheduler {args.scheduler}: follows the held-out loss; set --eval_rows")


def tracker_classes(names: str) -> list[type]:
    """The accelerate tracker classes of a comma-separated --report_to. UserError for an unknown or missing one."""
    wanted = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    if not wanted:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    problems, installed = Problems(), [str(name) for name in get_available_trackers()]
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            problems.add(f"--report_to {name}: unknown; accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        elif name not in installed:
            problems.add(f"--report_to {name}: not installed; pip install it or leave it out")
    problems.check()
    return [LOGGER_TYPE_TO_CLASS[name] for name in wanted]


def choose_rows(args, path, rows: list[dict], manifest: dict | None) -> tuple[list[int], list[int]]:
    """(indices to train on, indices of the held-out rows). UserError for an overlap or too few rows."""
    n, problems = len(rows), Problems()
    parts, evaluated = dataset.split(rows, manifest), dataset.evaluated_rows(rows, manifest)
    has_head = dataset.shape_of(rows[0]) == "enron"
    held = (parts.head if has_head else list(range(n)))[: args.eval_rows]
    train = parts.train
    if args.train_rows is not None:
        if args.train_rows > n:
            raise UserError(f"--train_rows {args.train_rows}: {path} has only {n} rows")
        train = list(range(n - args.train_rows, n))
    if len(held) < args.eval_rows:
        problems.add(f"--eval_rows {args.eval_rows}: only {len(held)} rows of {path} are held out of training")
    if not has_head:
        if args.train_rows is None:
            train = [index for index in train if index >= len(held)]
        elif set(train) & set(held):
            problems.add(
                f"--eval_rows {args.eval_rows} and --train_rows {args.train_rows} share rows of {path} ({n} rows)"
            )
    if not train:
        problems.add(f"{path}: no row is left to train on")
    overlap = sorted(set(train) & set(evaluated))
    if overlap and not args.allow_overlap:
        problems.add(
            f"{path}: {len(overlap)} of the {len(train)} training rows (first: row {overlap[0]}) are evaluated "
            "elsewhere; choose fewer --train_rows, or pass --allow_overlap"
        )
    problems.check()
    return train, held


def boundaries(path, rows: list[dict], indices: list[int]) -> None:
    """UserError naming the first rows without a prompt part (--loss_on completion needs one)."""
    bare = [index for index in indices if dataset.row_text(rows[index])[1] is None]
    if bare:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise UserError(
            f"--loss_on completion: {path}: row {bare[0]}{more} has no prompt part; train on all, or give rows with one"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What a call is to do, known before a model is loaded


@dataclass
class Plan:
    """Everything decided from the arguments and files alone. `start`: 'new', 'resume' or 'finished'."""

    ref: models.ModelRef
    input: Path
    tag: str
    folder: Path
    tokenizer: object
    indices: list[int]  # of the training rows in the input file
    texts: list[str]  # theirs
    train: list[Row]
    held: list[Row]
    sequences: list[list[int]]
    global_batch: int
    max_length: int
    start: str
    world_size: int
    privacy: dp_plan.Privacy | None
    n_trainable: int

    @property
    def steps_per_epoch(self) -> int:
        return self.privacy.steps_per_epoch if self.privacy else math.ceil(len(self.sequences) / self.global_batch)

    @property
    def private(self) -> Path:
        """Where a DP run keeps what would undo its noise, while it runs."""
        return self.folder / "private"


def make_plan(args) -> Plan:
    """Check every argument and file, tokenise the rows, look at the run directory. UserError with all problems."""
    problems = Problems()
    distributed.check_environment(problems)
    default = make_parser().get_default
    if args.optimizer != default("optimizer"):  # checking a default would import torch before a missing file is told
        problems.absorb(optimizer_class, args)
    problems.absorb(tracker_classes, args.report_to)
    if args.peft_type == "pissa" and args.lora_dropout:
        problems.add(f"--lora_dropout {args.lora_dropout}: PiSSA is trained without dropout; leave the flag out")
    if args.device_map and args.distribution_type != "mp":
        problems.add(f"--device_map {args.device_map}: only with --distribution_type mp")
    if args.run_name and not re.fullmatch(r"\w[\w.+=-]*", args.run_name):
        problems.add(f"--run_name {args.run_name!r}: letters, digits and . + = _ - only, no sign first")
    size = os.environ.get("WORLD_SIZE", "1")
    world_size = int(size) if size.isdigit() else 1
    if args.distribution_type == "mp" and world_size > 1:
        problems.add(f"--distribution_type mp: runs as one process, not {world_size}; start it without torchrun")
    clean_flags = dp_plan.check_flags(args, METRIC_SCHEDULERS, problems)
    if args.suggest_max_grad_norm and not args.dp:
        problems.add("--suggest_max_grad_norm: only with --dp")
    if args.distribution_type == "fsdp" and args.peft_type == "full" and args.dtype == "float16":
        problems.add("--dtype float16: full fine-tuning under fsdp has no loss scaling here; use bfloat16 or float32")

    path, chosen, folder, tag = dataset.default_dataset(args.input), None, None, None
    rows = problems.absorb(dataset.read_rows, path)
    manifest = problems.absorb(dataset.read_manifest, path)
    if rows:
        if problems.absorb(dataset.validate, path, rows):
            chosen = problems.absorb(choose_rows, args, path, rows, manifest)
        tag = dataset.data_tag(path, manifest)
        folder = run_folder(args, tag)
        cli.check_writable(folder, problems, "--output_root")
    if chosen and args.loss_on == "completion":
        problems.absorb(boundaries, path, rows, chosen[0] + chosen[1])
    global_batch = args.per_device_batch_size * args.gradient_accumulation_steps * world_size
    spending = None
    if args.dp and chosen and clean_flags:
        spending = problems.absorb(dp_plan.make_privacy, args, path, rows, chosen[0])
    if spending:
        global_batch = spending.logical_batch
    steps = math.ceil(len(chosen[0]) / global_batch) * args.epochs if chosen else 1
    if any(getattr(args, key) != default(key) for key in ("scheduler", "scheduler_kwargs")):
        problems.absorb(check_scheduler, args, steps)
    public = problems.absorb(dataset.read_rows, args.suggest_max_grad_norm) if args.suggest_max_grad_norm else None
    if public and rows and results.sha256(args.suggest_max_grad_norm) == results.sha256(path):
        problems.add(
            f"--suggest_max_grad_norm {args.suggest_max_grad_norm}: is the private --input; name a public file"
        )
    ref, tokenizer = models.look_up(problems, args.model, args.revision)
    if ref and ref.adapter:
        problems.add(f"--model {args.model}: is an adapter; merge it into its base first (merge_peft.py)")
    state = (args, ref, folder, path, global_batch, world_size, spending)
    start = problems.absorb(run_state, *state) if ref and folder and (spending or not args.dp) else None
    config = None
    if tokenizer:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(ref.base, revision=ref.revision)
    if config and args.peft_type != "full":
        problems.absorb(check_targets, args.target_modules, config)
    problems.check()
    if public:
        rows, chosen = public, (list(range(len(public)))[:PUBLIC_ROWS], [])

    max_length = min(args.max_length, models.context_length(SimpleNamespace(config=config)))
    limit = models.rope_limit(config)
    if limit and max_length > limit:
        raise UserError(
            f"--max_length {max_length}: {config.model_type} changes its rotary embedding beyond {limit} tokens, for "
            f"shorter rows of the same batch too; give --max_length {limit}"
        )
    models.check_rope(config, max_length)
    train = encode([rows[index] for index in chosen[0]], tokenizer, max_length, args.loss_on)
    held = encode([rows[index] for index in chosen[1]], tokenizer, max_length, args.loss_on)
    if not sum(row.labels for row in train):
        raise UserError(f"{path}: no token is left to learn from at --max_length {max_length}; raise it")
    highest = max(max(row.ids) for row in train + held)
    vocabulary = config.get_text_config().vocab_size
    if highest >= vocabulary:
        raise UserError(
            f"--model {args.model}: its tokenizer gives id {highest}, the model knows ids below {vocabulary}"
        )
    sequences = pack(train, max_length) if args.packing else [[index] for index in range(len(train))]
    n_trainable = count_trainable(args, config) if args.dp else 0
    return Plan(
        ref, path, tag, folder, tokenizer, chosen[0], [dataset.row_text(rows[index])[0] for index in chosen[0]], train,
        held, sequences, global_batch, max_length, start, world_size, spending, n_trainable,
    )  # fmt: skip


def count_trainable(args, config) -> int:
    """Parameters of the adapter (from the model's shapes alone, without its weights)."""
    chosen = chosen_layers(args, meta_model(config))
    ranks = {name: min(args.lora_r, *sides) for name, sides in chosen.items()}
    n = sum(ranks[name] * sum(sides) for name, sides in chosen.items())
    return n + (sum(n_out for n_out, _ in chosen.values()) if args.peft_type == "dora" else 0)


def run_state(args, ref, folder: Path, path: Path, global_batch: int, world_size: int, spending=None) -> str:
    """'new', 'resume' or 'finished', from run.json in the run directory. UserError when its arguments, its input or the
    base's weights differ.

    `spending`, the plan of a DP run, must be the one that its steps were drawn and accounted with.
    """
    file = folder / "run.json"
    if not file.is_file():
        return "new"
    record = results.read_json(file, f"remove {folder}")
    check_record(file, record)
    finished = record["status"] == "ok"
    if not finished and not args.resume:
        return "new"
    now = cli.plain(vars(args)) | {"global_batch": global_batch, "input's content": results.sha256(path)}
    then = record["args"] | {"global_batch": record["global_batch"], "input's content": record["inputs"][0]["sha256"]}
    same_input = trained.input_is(folder, record, results.sha256(path))
    if same_input is None:
        raise UserError(
            f"{folder}: has lost its {trained.FILE}, without which --input cannot be compared with what the run read; "
            "put it back, or set --run_name"
        )
    if same_input:
        now["input's content"] = then["input's content"]
    if record.get("base_sha256"):
        now["base's weights"], then["base's weights"] = models.weights_sha256(ref), record["base_sha256"]
    keys = sorted((set(now) | set(then)) - set(FREE_ARGUMENTS))
    different = [f"--{key} {then.get(key)} there, {now.get(key)} here" for key in keys if now.get(key) != then.get(key)]
    if spending and not finished:
        different += spending.differences(record["privacy"])
        if record["world_size"] != world_size:
            different.append(f"processes {record['world_size']} there, {world_size} here")
        if checkpoints(folder) and not (folder / "private" / "training_state.pt").is_file():
            raise UserError(
                f"{folder}: has checkpoints but no longer the state to resume from; start over without --resume, and "
                "add the ε of these checkpoints to the new run's if anyone has seen them"
            )
    if different:
        kind = "a finished run" if finished else "an unfinished run (--resume)"
        raise UserError(f"{folder}: holds {kind} with other arguments ({'; '.join(different)}); set --run_name")
    return "finished" if finished else "resume"


def check_record(file: Path, record: dict) -> None:
    """UserError unless a run.json has what run_state reads, in its types."""
    kinds = {"status": str, "args": dict, "global_batch": int, "inputs": list, "world_size": int}
    if isinstance(record.get("args"), dict) and record["args"].get("dp"):
        kinds["privacy"] = dict
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    inputs = record.get("inputs")
    if isinstance(inputs, list) and not (inputs and isinstance(inputs[0], dict) and inputs[0].get("sha256")):
        wrong.append("inputs")
    if wrong:
        raise UserError(f"{file}: damaged, no usable {', '.join(wrong)} in it; remove {file.parent}")


def describe(args, plan: Plan) -> list[str]:
    """The plan in words, a line each."""
    tokens = sum(len(row.ids) for row in plan.train)
    labels = sum(row.labels for row in plan.train)
    lines = [
        f"model        {plan.ref.base}, {args.peft_type}, {args.distribution_type} on {plan.world_size} process(es)",
        f"data         {plan.input} ({plan.tag}): {len(plan.train)} rows to train on, {len(plan.held)} held out",
        f"tokens       {tokens} an epoch, {labels} of them predicted; at most {plan.max_length} a row",
        f"steps        {plan.steps_per_epoch} an epoch × {args.epochs} epochs, global batch {plan.global_batch}",
        f"directory    {plan.folder}",
    ]
    if plan.privacy:
        lines[3:4] = [
            f"steps        {plan.steps_per_epoch} an epoch × {args.epochs} epochs, {plan.global_batch} units expected",
            *dp_plan.describe(plan.privacy, args.epochs, plan.n_trainable),
        ]
        if tracker_classes(args.report_to):
            lines.append(
                f"trackers     {args.report_to}: the losses and counts of single steps sent there are outside ε"
            )
    if args.packing:
        lines.insert(3, f"packing      {len(plan.train)} rows in {len(plan.sequences)} sequences")
    if special := models.special_tokens_in(plan.tokenizer, plan.texts):
        lines.insert(3, f"             {models.special_tokens_note(special)}")
    empty = sum(row.labels == 0 for row in plan.train)
    if empty:
        lines.insert(
            3, f"             {empty} rows have nothing to predict (cut off before their completion, or empty)"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The model and its trainable part


def build(args, plan: Plan, world, dtype, seed: int):
    """(model in training mode, its initial adapter's tensors on the CPU or None)."""
    import torch

    full, fsdp = args.peft_type == "full", args.distribution_type == "fsdp"
    device_map = (args.device_map or "auto") if args.distribution_type == "mp" else None
    # A model trained whole keeps float32 weights: half precision would round most of an update away.
    loaded = torch.float32 if full else dtype
    model = models.load_base(plan.ref, loaded, "cpu" if fsdp else world.device, device_map)
    if device_map and len({parameter.device for parameter in model.parameters()}) == 1:
        world.say(f"mp: one device here, all layers on {next(model.parameters()).device}")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    initial = None
    if not full:
        model, initial = add_adapter(args, plan, world, model, seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if fsdp:
        shard(model, set() if full else set(trainable), world)
    return model.train(), initial


def add_adapter(args, plan: Plan, world, model, seed: int):
    """(PEFT model, initial adapter tensors), the same on every rank; for PiSSA the base becomes the residual."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    chosen = chosen_layers(args, model)
    kept = plan.folder / "initial_adapter"
    saved = plan.start == "resume" and args.peft_type == "pissa" and kept.is_dir()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0 if args.peft_type == "pissa" else 0.05 if args.lora_dropout is None else args.lora_dropout,
        bias="none",
        target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
        use_dora=args.peft_type == "dora",
        init_lora_weights="pissa" if args.peft_type == "pissa" and not saved else True,
        rank_pattern={name: min(sides) for name, sides in chosen.items() if min(sides) < args.lora_r},
        revision=args.revision,
    )
    torch.manual_seed(seed)
    with models.without_peft_warning():
        model = get_peft_model(model, config)
    base = Path(plan.ref.base).expanduser()
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(base.resolve()) if base.is_dir() else plan.ref.base
    if saved:
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(kept / "adapter_model.safetensors"))
        subtract_adapter(model)
    config.init_lora_weights = True  # the published adapter is read as it stands
    set_peft_model_state_dict(model, world.broadcast(adapter_state(model) if world.main else None))
    return model, adapter_state(model)


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def chosen_layers(args, model) -> dict[str, tuple[int, int]]:
    """Name → shape of the weight of every linear layer that --target_modules names."""
    return {
        name: sides
        for name, sides in linear_layers(model).items()
        if args.target_modules == ["all-linear"] or any(_is_named(name, target) for target in args.target_modules)
    }


STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # as peft's own check lists them
NEVER = {"out_proj", "conv1d"}


def meta_model(config):
    """The model without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_targets(targets: list[str], config) -> None:
    """UserError when a name of --target_modules is no linear layer of the model, or one that peft refuses."""
    model = meta_model(config)
    linear = linear_layers(model)
    never = {*models.READ_DIRECTLY, *(NEVER if config.model_type in STATE_SPACE else ())}
    kinds = " ".join(sorted({name.split(".")[-1] for name in linear} - never))
    if targets == ["all-linear"]:
        stacked = {
            name.split(".")[-1]
            for name, module in model.named_modules()
            if "expert" in name.split(".")[-1] and any(item.dim() == 3 for item in module.parameters(recurse=False))
        }
        if stacked:
            raise UserError(
                f"--target_modules all-linear: the {' and '.join(sorted(stacked))} of {config.model_type} are one "
                f"parameter for all experts, which is not trained here; name layers: --target_modules {kinds}"
            )
        targets = []
    refused = {name.split(".")[-1] for name in linear if not targets or any(_is_named(name, one) for one in targets)}
    if refused & never:
        raise UserError(
            f"--target_modules: LoRA does not work on {' and '.join(sorted(refused & never))} of {config.model_type}; "
            f"name others: --target_modules {kinds}"
        )
    unknown = [target for target in targets if not any(_is_named(name, target) for name in linear)]
    if unknown:
        raise UserError(f"--target_modules {' '.join(unknown)}: no such linear layer; there are {kinds}")


def linear_layers(model) -> dict[str, tuple[int, int]]:
    """Name → shape of the weight of every linear layer but the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def lora_layers(model) -> dict:
    """Name → PEFT layer, for every adapted layer."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def subtract_adapter(model) -> None:
    """W ← W − s·B A in every adapted layer (in float32): from an original base to PiSSA's residual."""
    import torch
    from peft.utils.other import transpose

    with torch.no_grad():
        for layer in lora_layers(model).values():
            base, flipped = layer.get_base_layer(), layer.fan_in_fan_out
            product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            residual = transpose(base.weight.float(), flipped) - product
            base.weight.data = transpose(residual.to(base.weight.dtype), flipped)


def adapter_state(model) -> dict:
    """The adapter's tensors under the names PEFT saves them by, on the CPU."""
    from peft import get_peft_model_state_dict

    # Not model.state_dict(): under FSDP it re-shards the rank that calls it, and the ranks fall out of step.
    named = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    state = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def shard(model, replicated: set, world) -> None:
    """FSDP2 over all processes: each decoder layer, then the rest; `replicated` parameters stay whole everywhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for parameter in replicated:
        parameter.data = parameter.data.to(world.device)
    mesh = init_device_mesh(world.device.split(":")[0], (world.size,))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        raise RuntimeError(f"{type(base).__name__} names no decoder layers to shard by (_no_split_modules)")
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=replicated)
    fully_shard(model, mesh=mesh, ignored_params=replicated)
    whole = {id(parameter) for parameter in replicated}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) == (id(parameter) in whole):
            raise RuntimeError(f"fsdp: {name} is {'' if isinstance(parameter, DTensor) else 'not '}sharded")


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Weight decay on matrices; none on biases, norms and DoRA magnitudes."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------------------------------------------------------------
# One run


class Interrupted(Exception):
    """SIGTERM arrived; the state is saved."""


class Training:
    """The state of one run: what a checkpoint saves and --resume restores."""

    def __init__(self, args, plan: Plan, world, dtype, secret: bytes | None = None):
        import torch

        self.args, self.plan, self.world, self.dtype, self.secret = args, plan, world, dtype, secret
        self.seed = args.seed if secret is None else self.private_seed("initial weights", 0)
        self.full = args.peft_type == "full"
        self.sharded = self.full and args.distribution_type == "fsdp"
        self.model, self.initial = build(args, plan, world, dtype, self.seed)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        kind, keywords = optimizer_class(args)
        if self.full:
            self.initial = self.fingerprint()
        self.optimizer = kind(parameter_groups(self.model, args.weight_decay), **keywords)
        self.scheduler = make_scheduler(args, self.optimizer, self.total)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        base = self.model if self.full else self.model.get_base_model()
        self.additive = base.config._attn_implementation == "eager"
        self.spread = len({parameter.device for parameter in base.parameters()}) > 1
        self.lengths = [sum(len(plan.train[index].ids) for index in sequence) for sequence in plan.sequences]
        self.stopping, self.order = False, (None, [])
        if plan.privacy:
            from training import dp

            try:
                self.examples = dp.PerExample(self.model)
            except ValueError as error:
                raise UserError(f"--dp: {error}") from None
            if sum(item.numel() for item in self.trainable) != plan.n_trainable:
                raise RuntimeError(
                    f"--dp: the plan counted {plan.n_trainable} trainable parameters, the model has others"
                )
            self.check_examples()
        if args.packing:
            self.check_packing()
        # step: steps done; updates: steps that could change a weight; window: loss and labels since the last log line
        self.count = {"step": 0, "updates": 0, "tokens": 0, "window_loss": 0.0, "window_weight": 0, "eval_losses": []}

    @property
    def device_type(self) -> str:
        return self.world.device.split(":")[0]

    @property
    def clip_slack(self) -> float:
        """What the clipping norm is divided by, so that rounding keeps what one unit moves within it."""
        import torch

        return 1.0 if self.dtype == torch.float32 else math.sqrt(1 + ROUNDING**2 * self.plan.privacy.logical_batch)

    @property
    def total(self) -> int:
        return self.plan.steps_per_epoch * self.args.epochs

    # -- one micro-batch

    def batch(self, rows: list[Row], sequences: list[list[int]], packed: bool | None = None) -> dict:
        made = collate(
            [[rows[index] for index in sequence] for sequence in sequences],
            self.plan.tokenizer.pad_token_id,
            packed=self.args.packing if packed is None else packed,
            additive=self.additive,
        )
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in made.items()}

    def autocast(self):
        import torch

        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32)

    def nll(self, batch: dict):
        """−log p of each of a micro-batch's K labels, float32 (K,)."""
        import torch.nn.functional as F

        targets = batch.pop("targets")
        keep = batch.pop("logits_to_keep")
        with self.autocast():
            if self.spread:  # the hidden states may lie on another GPU than the mask
                logits = self.model(**batch, use_cache=False).logits
                logits = logits[keep.to(logits.device)]
            else:
                logits = self.model(**batch, use_cache=False, logits_to_keep=keep).logits
        return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")

    # -- one step

    def step(self) -> dict:
        """One optimizer step (over all ranks). Returns what it adds to metrics.jsonl, and `stop`."""
        import torch

        args, count = self.args, self.count
        number = count["step"] + 1
        # Dropout depends on nothing but seed, step and rank, so a resumed run draws what an unbroken one does.
        if self.secret is None:
            torch.manual_seed((self.seed * 1_000_003 + number) * 1_009 + self.world.rank)
        else:
            torch.manual_seed(self.private_seed(f"dropout {self.world.rank}", number))
        found = self.private_gradient(number) if self.plan.privacy else self.gradient(number)
        self.scaler.unscale_(self.optimizer)
        bound = math.inf if self.plan.privacy else args.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, bound)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise FloatingPointError(f"step {number}: the gradient's norm is {norm}; {self.last_good()}")
        rate, scale = self.optimizer.param_groups[0]["lr"], self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        self.optimizer.zero_grad(set_to_none=True)
        if not skipped and args.scheduler not in METRIC_SCHEDULERS:
            self.scheduler.step()
        count["step"] = number
        count["updates"] += not skipped and rate > 0
        return {"lr": rate, "grad_norm": norm if math.isfinite(norm) else None} | found

    def private_seed(self, purpose: str, number: int) -> int:
        """A seed of its own for every purpose and step: the published weights show the initial ones, and clipping
        bounds what a record does only as long as nobody knows the dropout masks."""
        from training import dp

        return int.from_bytes(dp.stream(self.secret, purpose, number, 8)) >> 1

    def members(self, number: int) -> list[int]:
        """The sequences of step `number` (from 1)."""
        epoch, place = divmod(number - 1, self.plan.steps_per_epoch)
        if self.order[0] != epoch:
            batches = epoch_batches(len(self.plan.sequences), self.plan.global_batch, self.seed, epoch)
            self.order = (epoch, batches)
        return self.order[1][place]

    def gradient(self, number: int) -> dict:
        """Leave in .grad the gradient of the mean loss over all label tokens of step `number`'s global batch."""
        import torch

        plan, world, count = self.plan, self.world, self.count
        members = self.members(number)
        labels = sum(plan.train[index].labels for member in members for index in plan.sequences[member])
        hands = micro_batches(members, self.lengths, self.args.per_device_batch_size, world.size)
        total = torch.zeros((), device=world.device)
        for group, weight in hands[world.rank]:
            nll = self.nll(self.batch(plan.train, [plan.sequences[member] for member in group])).sum()
            loss = nll * (weight / max(1, labels))
            # FSDP averages the gradients it reduces; ours are parts of one sum.
            self.scaler.scale(loss * world.size if self.sharded else loss).backward()
            total += loss.detach().to(total.device)
        loss, stop = self.reduce([] if self.sharded else [one.grad for one in self.trainable], [total, self.stopping])
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {number}: the loss is {loss}; {self.last_good()}")
        count["tokens"] += sum(self.lengths[member] for member in members)
        count["window_loss"] += loss * labels
        count["window_weight"] += labels
        return {"stop": stop > 0}

    def private_gradient(self, number: int) -> dict:
        """Leave in .grad (Σ clipped gradients of the drawn units + noise) / expected units.

        Nothing here may stop the run or change a weight by looking at one record: a loss or gradient that is not
        finite counts as zero.
        """
        import torch

        from training import dp

        plan, world, count, rows = self.plan, self.world, self.count, self.plan.train
        spending = plan.privacy
        drawn = dp.poisson_draw(self.secret, number, len(spending.units), spending.sample_rate)
        units = [[row for row in spending.units[unit] if rows[row].labels] for unit in drawn]
        units = [unit for unit in units if unit]  # nothing to predict: a zero gradient
        hands, passes = unit_batches(units, self.lengths, self.args.per_device_batch_size, world.size)
        total = {name: torch.zeros_like(item, dtype=torch.float32) for name, item in self.examples.named.items()}
        losses, norms = [], []
        for n_units, item in hands[world.rank]:
            self.examples.begin(n_units)
            for group, owners in item:
                record_losses = self.record_losses([rows[row] for row in group])
                with self.examples.of(owners):
                    record_losses.sum().backward()
                losses.append(record_losses.detach().double().cpu())
            norms.append(self.examples.clip_into(total, spending.max_grad_norm / self.clip_slack))
        for _ in range(passes - len(losses)):  # ranks make equally many passes, or fsdp waits for ever
            shortest = min((row for unit in units for row in unit), key=lambda row: self.lengths[row])
            self.record_losses([rows[shortest]]).sum().backward()
        losses, norms = torch.cat([torch.zeros(0), *losses]), torch.cat([torch.zeros(0), *norms])
        finite = losses.isfinite()
        signals = [
            losses[finite].sum(), finite.sum(), (norms > spending.max_grad_norm).sum(), (~norms.isfinite()).sum(),
            self.stopping,
        ]  # fmt: skip
        sums = list(total.values())
        loss, weight, clipped, dropped, stop = self.reduce(sums, signals)
        deviation = spending.noise_multiplier * spending.max_grad_norm if spending.noise_multiplier else 0.0
        found = {"batch": len(drawn), "clipped": clipped / max(1, len(drawn)), "dropped": int(dropped)}
        if deviation:
            size = math.sqrt(sum(float(one.double().square().sum()) for one in sums))
            found["signal_to_noise"] = size / (deviation * math.sqrt(plan.n_trainable))
            noise = dp.gaussian(self.secret, number, [one.shape for one in sums], spending.secure_rng)
            for one, add in zip(sums, noise):  # the same on every rank: the sums are, and so is the stream
                one.add_(torch.from_numpy(add).to(one.device), alpha=deviation)
        for name, one in total.items():
            self.examples.named[name].grad = one.div_(spending.logical_batch).to(self.examples.named[name].dtype)
        count["tokens"] += sum(self.lengths[row] for unit in units for row in unit)
        count["window_loss"] += loss
        count["window_weight"] += int(weight)
        return found | {"epsilon_rdp": self.spent(number), "stop": stop > 0}

    def record_losses(self, rows: list[Row]):
        """Mean −log p over each row's own labels, float32 (rows,)."""
        import torch

        nll = self.nll(self.batch(rows, [[place] for place in range(len(rows))]))
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([row.labels for row in rows]))
        means = torch.tensor([1 / row.labels for row in rows], device=nll.device)[owner.to(nll.device)]
        return torch.zeros(len(rows), device=nll.device).index_add_(0, owner.to(nll.device), nll * means)

    def spent(self, steps: int) -> float | None:
        epsilon = self.plan.privacy.epsilon(steps, "rdp")
        return epsilon if math.isfinite(epsilon) else None

    def reduce(self, shared: list, signals: list) -> list[float]:
        """Sum `shared` (tensors, in place) and `signals` (numbers, returned) over the ranks in one collective."""
        import torch

        signals = torch.stack([torch.as_tensor(one, dtype=torch.float64).cpu() for one in signals])
        if not self.world.backend:
            return signals.tolist()
        shared = [one for one in shared if one is not None]
        # float32 holds what is summed here; a loss is rounded as on one rank
        flat = [*(one.flatten().float() for one in shared), signals.float().to(self.world.device)]
        flat = self.world.sum_(torch.cat(flat))
        start = 0
        for one in shared:
            one.copy_(flat[start : start + one.numel()].view_as(one))
            start += one.numel()
        return flat[start:].tolist()

    def last_good(self) -> str:
        saved = checkpoints(self.plan.folder)
        return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"

    # -- held-out loss

    def evaluate(self) -> tuple[float, int]:
        """(mean loss, number) of the held-out rows' label tokens."""
        import torch

        rows, world = self.plan.held, self.world
        lengths = [len(row.ids) for row in rows]
        hands = micro_batches(list(range(len(rows))), lengths, self.args.per_device_batch_size, world.size)
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        self.model.eval()
        with torch.no_grad():
            for group, weight in hands[world.rank]:
                batch = self.batch(rows, [[index] for index in group])
                labels = len(batch["targets"])
                sums += weight * torch.tensor(
                    [float(self.nll(batch).sum()), labels], dtype=torch.float64, device=world.device
                )
        self.model.train()
        loss, labels = world.sum_(sums).tolist()
        return loss / max(1.0, labels), int(labels)

    # -- saving and restoring

    def weights(self) -> dict:
        """The trainable parameters, whole, on the CPU, by name (empty on other ranks than 0 where they are sharded)."""
        if self.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        named = self.model.state_dict() if self.full else dict(self.model.named_parameters())
        chosen = named if self.full else {name: item for name, item in named.items() if item.requires_grad}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in chosen.items()}

    def optimizer_state(self) -> dict:
        if self.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return self.optimizer.state_dict()

    def save(self, folder: Path) -> None:
        """Write a checkpoint with the training state: complete or not at all; older training states are dropped."""
        import torch

        weights, optimizer = self.weights(), self.optimizer_state()
        if self.world.main:
            state = {
                "count": self.count,
                "weights": weights,
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            if self.plan.privacy:
                # The state first: nothing is ever published that a resumed run could make again a little differently,
                # with the same noise.
                with results.atomic(self.plan.private / "training_state.pt", "wb", 0o600) as file:
                    torch.save(state, file)
                if folder.name != "interrupted":
                    self.publish_private(folder, weights)
            else:
                with results.atomic_folder(folder) as new:
                    self.publish(new, weights)
                    torch.save(state, new / "training_state.pt")
                for other in saved_states(self.plan.folder):
                    if other != folder:
                        (other / "training_state.pt").unlink()
        self.world.barrier()

    def publish(self, folder: Path, weights: dict) -> None:
        """What others load: a PEFT adapter for the original base, or a whole model; the tokenizer beside it."""
        self.plan.tokenizer.save_pretrained(folder)
        if self.full:
            self.model.save_pretrained(folder, state_dict=weights)
            return
        config, state = copy.deepcopy(self.model.peft_config["default"]), adapter_state(self.model)
        if self.args.peft_type == "pissa":
            state = converted(state, self.initial)
            config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
            config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        save_adapter(folder, state, config)

    def publish_private(self, folder: Path, weights: dict) -> None:
        with results.atomic_folder(folder) as new:
            self.publish(new, weights)
            results.write_json(new / models.PRIVACY_FILE, self.plan.privacy.block(self.count["step"]))

    def restore(self, folder: Path) -> None:
        """Continue from the training state in `folder`. UserError when it is damaged or of another run."""
        state = read_state(folder)
        try:
            self.load_state(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise UserError(
                f"{folder / 'training_state.pt'}: is not this run's ({reason}); start over without --resume"
            ) from None
        self.count = state["count"]
        if self.plan.privacy:
            step = self.count["step"]
            missing = self.plan.folder / f"checkpoint-{step}"
            if self.world.main and step % self.plan.steps_per_epoch == 0 and not missing.is_dir():
                self.publish_private(missing, state["weights"])

    def load_state(self, state: dict) -> None:
        if self.sharded:
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                set_model_state_dict,
                set_optimizer_state_dict,
            )

            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self.model, state["weights"], options=options)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        else:
            named = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            if not self.full and named != set(state["weights"]):
                raise ValueError("another adapter's tensors")
            self.model.load_state_dict(state["weights"], strict=self.full)
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if set(state["count"]) != set(self.count) or not 0 <= state["count"]["step"] <= self.total:
            raise ValueError(f"counters {state['count']}, this run has {self.total} steps")

    # -- checks

    def check_examples(self) -> None:
        """RuntimeError unless per-example gradients of random tokens are those of one row at a time by plain autograd.

        Reads no data. B matrices that start at zero are moved for the occasion, else A's gradients would all be zero.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(len(self.plan.tokenizer), (n,), generator=generator).tolist() for n in (7, 12, 9)]
        rows, examples = [Row(one, 1) for one in ids], self.examples
        kept = {name: item.detach().clone() for name, item in examples.named.items() if ".lora_B." in name}
        self.model.eval()
        with torch.no_grad():
            for name in kept:
                item = examples.named[name]
                item.add_(0.02 * torch.randn(item.shape, generator=generator).to(item.device))
        examples.begin(len(rows))
        with examples.of(list(range(len(rows)))):
            self.record_losses(rows).sum().backward()
        found, exact = examples.gradients, self.dtype == torch.float32
        for place, row in enumerate(rows):
            with examples.off():
                self.record_losses([row]).sum().backward()
            missed = size = 0.0
            for name, item in examples.named.items():
                alone = torch.zeros_like(item) if item.grad is None else item.grad
                here = found[name][place] if name in found else torch.zeros_like(item)
                if exact and not (here - alone).abs().max() <= 1e-3 * max(float(alone.abs().max()), 1e-8):
                    raise RuntimeError(f"--dp: {name}: its per-example gradient is wrong on this model; not supported")
                missed += float((here - alone).double().square().sum())
                size += float(alone.double().square().sum())
                item.grad = None
            # in half precision a small matrix may differ by half of its gradient: only the whole one is compared
            if not missed**0.5 <= 0.1 * max(size**0.5, 1e-8):
                raise RuntimeError("--dp: its per-example gradient is wrong on this model; not supported")
        with torch.no_grad():
            for name, before in kept.items():
                examples.named[name].copy_(before)
        examples.begin(0)
        self.model.train()

    def check_packing(self) -> None:
        """UserError unless two rows of random tokens in one sequence lose what each loses alone: a model that has its
        own idea of what a position sees (windows, ALiBi, a state) does not keep them apart."""
        import torch

        generator, length = torch.Generator().manual_seed(0), self.plan.max_length
        sizes = (max(2, 2 * length // 3), max(2, length - 2 * length // 3))
        ids = [torch.randint(len(self.plan.tokenizer), (n,), generator=generator).tolist() for n in sizes]
        rows, tolerance = [Row(one, 1) for one in ids], 1e-3 if self.dtype == torch.float32 else 0.1
        refused = UserError("--packing: this model does not keep the rows of a sequence apart; leave it out")
        self.model.eval()
        with torch.no_grad():
            alone = torch.cat([self.nll(self.batch([row], [[0]], packed=False)) for row in rows])
            try:
                together = self.nll(self.batch(rows, [[0, 1]]))
            except (TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise refused from None
        self.model.train()
        if not (together - alone).abs().mean() <= tolerance * alone.abs().mean():
            raise refused

    def record_norms(self):
        """(rows,) norms of the per-record gradients of the training rows, at the weights as they are."""
        import torch

        most, rows = self.args.per_device_batch_size, [row for row in self.plan.train if row.labels]
        norms = []
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            self.examples.begin(len(part))
            with self.examples.of(list(range(len(part)))):
                self.record_losses(part).sum().backward()
            none = {name: torch.zeros_like(item) for name, item in self.examples.named.items()}
            norms.append(self.examples.clip_into(none, math.inf))
        return torch.cat(norms)

    def probe(self):
        """Logits (float32, on the CPU) of a few training rows, dropout off."""
        import torch

        rows = [Row(row.ids[:PROBE_TOKENS], 1) for row in self.plan.train[:PROBE_ROWS]]
        batch = self.batch(rows, [[index] for index in range(len(rows))])
        self.model.eval()
        with torch.no_grad(), self.autocast():
            logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits.float().cpu()
        self.model.train()
        return logits

    def check_saved(self, folder: Path) -> None:
        """RuntimeError unless the weights saved in `folder` moved and give the logits of the model in memory.

        LoRA and DoRA: the live adapter is zeroed and filled again from the file. PiSSA: the file, which fits the
        original base, is attached beside the initial adapter on the residual base. Whole models: tensors are compared.
        """
        import torch

        if self.full:
            self.check_saved_model(folder)
            return
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        trained, before = adapter_state(self.model), self.probe()
        moved = any(not torch.equal(trained[name], self.initial[name]) for name in trained)
        if self.count["updates"] and not moved:
            raise RuntimeError(
                f"{folder}: the adapter is what it was before training, after {self.count['updates']} steps"
            )
        if self.args.peft_type == "pissa":
            after = self.probe_converted(folder)
        else:
            zeros = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
            set_peft_model_state_dict(self.model, zeros)
            set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            after = self.probe()
        worst, scale = (after - before).abs().max().item(), before.abs().max().item()
        bound = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[self.dtype]
        if not worst <= bound * max(scale, 1.0):
            raise RuntimeError(f"{folder}: reloaded, its logits differ from the model in memory by {worst:.2g}")

    def probe_converted(self, folder: Path):
        """Logits of residual base + initial adapter + the saved, converted adapter."""
        self.model.load_adapter(folder, adapter_name="reloaded")
        self.model.load_adapter(self.plan.folder / "initial_adapter", adapter_name="initial")
        self.model.base_model.set_adapter(["initial", "reloaded"])
        after = self.probe()
        self.model.base_model.set_adapter("default")
        self.model.delete_adapter("reloaded")
        self.model.delete_adapter("initial")
        return after

    def check_saved_model(self, folder: Path) -> None:
        import torch
        from safetensors import safe_open

        if self.count["updates"] and self.fingerprint() == self.initial:
            raise RuntimeError(
                f"{folder}: the model is what it was before training, after {self.count['updates']} steps"
            )
        live, compared = self.weights(), 0
        for file in folder.glob("*.safetensors") if self.world.main else ():
            with safe_open(file, "pt") as saved:
                for name in set(saved.keys()) & set(live):
                    compared += 1
                    if not torch.equal(saved.get_tensor(name), live[name]):
                        raise RuntimeError(f"{folder}: {name} differs from the model in memory")
        if self.world.main and not compared:
            raise RuntimeError(f"{folder}: none of the model's weights are in it")

    def fingerprint(self) -> list[float]:
        """Sum of squares of every trainable parameter (over all ranks, where it is sharded)."""
        sums = [parameter.detach().double().square().sum() for parameter in self.trainable]
        return [float(item.full_tensor() if self.sharded else item) for item in sums]

    def relative_change(self) -> float | None:
        """‖ΔW‖ / ‖W‖ (Frobenius, all adapted matrices together): trained against untrained. None for whole models."""
        if self.full:
            return None
        trained, change, total = adapter_state(self.model), 0.0, 0.0
        for name, layer in lora_layers(self.model).items():
            before, after = (effective_weight(layer, name, state) for state in (self.initial, trained))
            change += (after - before).square().sum().item()
            total += before.square().sum().item()
        return (change / total) ** 0.5


def effective_weight(layer, name: str, state: dict):
    """The weight (float64) of an adapted layer with its tensors in `state`: W + s·B A, of DoRA with its magnitudes."""
    import torch
    from peft.utils.other import transpose

    with torch.no_grad():
        weight = layer.get_base_layer().weight.detach()
        if hasattr(weight, "full_tensor"):  # fsdp: whole, here alone
            weight = weight.full_tensor()
        weight = weight.double()
        a, b, m = (
            state[key].to(weight) if (key := f"{name}.{kind}") in state else None
            for kind in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        weight = transpose(weight, layer.fan_in_fan_out) + layer.scaling["default"] * b @ a
        return weight if m is None else weight * (m.view(-1) / weight.norm(dim=1))[:, None]


def save_adapter(folder: Path, state: dict, config) -> None:
    """A PEFT adapter directory: adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file

    config = copy.deepcopy(config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # in another order each time
        config.target_modules = sorted(config.target_modules)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint-<step> directories of a run, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def saved_states(folder: Path) -> list[Path]:
    """Directories of a run that hold a training state, the newest last."""
    found = [*checkpoints(folder), folder / "interrupted", folder / "private"]
    return [path for path in found if (path / "training_state.pt").is_file()]


def read_state(folder: Path) -> dict:
    """The training state in `folder`; UserError when it is damaged or another thing."""
    import torch

    file, kinds = folder / "training_state.pt", dict.fromkeys(("count", "weights", "optimizer", "scheduler"), dict)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises has no common class
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"{file}: damaged ({reason}); start over without --resume") from None
    usable = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in kinds.items())
    if not usable or type(state["count"].get("step")) is not int:
        raise UserError(f"{file}: damaged (not a training state); start over without --resume")
    return state


def clean(folder: Path, everything: bool) -> None:
    """Remove what a killed run left half-written; with `everything` the whole unfinished run."""
    for rest in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    if everything:
        (folder / "run.json").unlink(missing_ok=True)  # first: what is left of a run without it is never resumed
        for old in [*checkpoints(folder), folder / "interrupted", folder / "private", folder / "initial_adapter"]:
            shutil.rmtree(old, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def keep_metrics(file: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, and a line that a killed run left half-written."""
    if not file.is_file():
        return
    whole, newline, _ = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    results.write_jsonl(file, [line for line in metrics_lines(file, whole + newline) if line["step"] <= step])


def metrics_lines(file: Path, text: str) -> list[dict]:
    """The whole lines of a metrics.jsonl; UserError for a damaged one."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            if not isinstance(lines[-1], dict) or type(lines[-1].get("step")) is not int:
                raise ValueError("no object with a step")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: damaged ({error}); start over without --resume") from None
    return lines


def check_resumable(folder: Path) -> None:
    """UserError when the files that --resume reads are damaged; before a model is loaded or anything is written."""
    problems, file = Problems(), folder / "metrics.jsonl"
    if file.is_file():
        text = file.read_bytes().rpartition(b"\n")[0]  # the last line may have been cut by a kill
        try:
            problems.absorb(metrics_lines, file, text.decode())
        except UnicodeDecodeError as error:
            problems.add(f"{file}: damaged ({error}); start over without --resume")
    for states in saved_states(folder)[-1:]:
        problems.absorb(read_state, states)
    secret = folder / "private" / "secret"
    if secret.is_file() and not re.fullmatch(rb"[0-9a-f]{64}", secret.read_bytes()):
        problems.add(f"{secret}: damaged; start over without --resume")
    problems.check()


def trim_memory() -> None:
    """Give freed memory back to the system: rows of many lengths leave glibc's heap in pieces, 20 MB a step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def on_sigterm(training: Training):
    """SIGTERM asks the run to stop after its current step."""

    def ask(*_):
        training.stopping = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train(training: Training, run: results.Run, trackers: list) -> None:
    """All remaining epochs: steps, metrics.jsonl, held-out loss, a checkpoint each. Raises Interrupted on SIGTERM."""
    from tqdm import tqdm

    args, plan, world, count = training.args, training.plan, training.world, training.count
    seconds, tokens_before, said = 0.0, count["tokens"], time.monotonic()
    terminal = sys.stderr.isatty()

    def log(record: dict) -> None:
        if world.main:
            file.write(results.dumps(record | {"time": results.now()}) + "\n")
            file.flush()
            for tracker in trackers:
                tracker.log({key: item for key, item in record.items() if key != "step"}, step=record["step"])

    def held_out_loss() -> None:
        loss, labels = training.evaluate()
        count["eval_losses"].append(loss)
        epoch = count["step"] / plan.steps_per_epoch
        log({"step": count["step"], "epoch": epoch, "eval_loss": loss, "eval_tokens": labels})
        world.say(f"epoch {epoch:g}  held-out loss {loss:.4f} over {labels} tokens")
        if args.scheduler in METRIC_SCHEDULERS and count["step"]:
            training.scheduler.step(loss)

    def record_spent() -> None:
        """run.json never says less than what the checkpoints beside it have spent."""
        if plan.privacy:
            run["privacy"] = plan.privacy.block(count["step"])
            run.write()

    with contextlib.ExitStack() as stack:
        if world.main:
            file = stack.enter_context(open(plan.folder / "metrics.jsonl", "a", encoding="utf-8"))
        hidden = not (world.main and terminal)
        bar = stack.enter_context(tqdm(total=training.total, initial=count["step"], disable=hidden, unit="step"))
        if plan.held and not count["step"] and not count["eval_losses"]:
            held_out_loss()
        while count["step"] < training.total:
            begun = time.monotonic()
            done = training.step()
            seconds += time.monotonic() - begun
            step, stop = count["step"], done.pop("stop")
            if step % args.logging_steps == 0 or step == training.total:
                weight = count["window_weight"]
                loss = count["window_loss"] / weight if weight else None  # None: nothing was drawn
                count["window_loss"], count["window_weight"] = 0.0, 0
                progress = {"step": step, "epoch": step / plan.steps_per_epoch, "loss": loss}
                log(progress | done | {"tokens": count["tokens"]})
                words = "loss -" if loss is None else f"loss {loss:.4f}"
                bar.set_postfix_str(words)
                if not terminal and time.monotonic() - said > LOG_SECONDS:
                    said = time.monotonic()
                    world.say(f"step {step}/{training.total}  {words}  lr {done['lr']:.2g}")
            bar.update()
            if step % TRIM_STEPS == 0 and training.device_type == "cpu":
                trim_memory()
            if stop and step % plan.steps_per_epoch:
                record_spent()
                training.save(plan.folder / "interrupted")
                raise Interrupted(f"SIGTERM after step {step}; --resume continues from there")
            if step % plan.steps_per_epoch:
                continue
            if plan.held:
                held_out_loss()
            record_spent()
            training.save(plan.folder / f"checkpoint-{count['step']}")
            run["tokens_per_second"] = (count["tokens"] - tokens_before) / seconds
            world.say(
                f"epoch {count['step'] // plan.steps_per_epoch}/{args.epochs}  step {count['step']}/{training.total}  "
                f"{run['tokens_per_second']:.0f} tokens/s  {plan.folder / ('checkpoint-' + str(count['step']))}"
            )
            if stop and count["step"] < training.total:
                raise Interrupted(f"SIGTERM after step {count['step']}; --resume continues from there")


def run(args) -> Path:
    """Fine-tune as `args` (make_parser) says; returns the run directory. Raises UserError, Interrupted, or a bug."""
    if args.seed is None and not args.dp:
        args.seed = SEED
    plan = make_plan(args)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(describe(args, plan)), flush=True)
    if plan.start == "finished":
        print(f"{plan.folder}: this run is finished; nothing to do (remove it to run again)", flush=True)
        if not args.dry_run:
            shutil.rmtree(plan.private, ignore_errors=True)
            results.tidy([plan.folder])
        return plan.folder
    if args.dry_run:
        return plan.folder
    if args.suggest_max_grad_norm:
        suggest(args, plan)
        return plan.folder
    with results.output_folder(plan.folder):
        return run_locked(args, plan)


def run_locked(args, plan: Plan) -> Path:
    """`run`, once nobody else writes to the directory."""
    from transformers.utils import logging as transformers_logging

    world = distributed.start(group_of_one=args.distribution_type == "fsdp")
    try:
        if not world.main or not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        if world.main:  # another run may have ended while this one waited or read its rows
            state = (args, plan.ref, plan.folder, plan.input, plan.global_batch, plan.world_size, plan.privacy)
            plan.start = run_state(*state)
            if plan.start == "resume":
                check_resumable(plan.folder)
        plan.start = world.broadcast(plan.start if world.main else None)
        if plan.start == "finished":
            world.say(f"{plan.folder}: this run is finished; nothing to do (remove it to run again)")
            return plan.folder
        earlier = unfinished(plan)
        dtype = chosen_dtype(args, plan, world, earlier)
        if world.main:
            plan.folder.mkdir(parents=True, exist_ok=True)
            old = checkpoints(plan.folder)
            if plan.start == "new" and old:
                print(f"starting over: {len(old)} checkpoint(s) of an unfinished run go (--resume would keep them)")
                if plan.privacy:
                    print("their ε adds up with the new run's if anyone has seen them")
            clean(plan.folder, everything=plan.start == "new")
        secret = None
        if plan.privacy:
            # σ too: another host's libraries might search it a little differently
            sigma, secret = plan.privacy.noise_multiplier, find_secret(args, plan) if world.main else None
            sigma, secret = world.broadcast((sigma, secret) if world.main else None)
            plan.privacy = dataclasses.replace(plan.privacy, noise_multiplier=sigma)
        world.barrier()
        salt = hash_salt(secret) if secret else ""
        block = write_trained(plan, args.loss_on, salt) if world.main else None
        more = {"global_batch": plan.global_batch, "data_tag": plan.tag, "dtype": str(dtype).removeprefix("torch.")}
        more["base_sha256"] = models.weights_sha256(plan.ref) if world.main else None
        if plan.privacy:
            spent = earlier.get("privacy") or plan.privacy.block(0)
            more |= {"seed": "os" if args.seed is None else args.seed, "privacy": spent}
        record = results.Run(plan.folder / "run.json", args, inputs=[plan.input], world=world, **more)
        record["trained"] = block
        if salt:
            digest = trained.salted(results.sha256(plan.input), salt)
            record["inputs"] = [{"path": str(plan.input), "sha256": digest, "salted": True}]
        with record:
            _run(args, plan, world, dtype, record, secret)
        if world.main and plan.private.is_dir():
            shutil.rmtree(plan.private)  # only now that run.json says ok: a run killed before is resumed, not repeated
    finally:
        world.close()
    return plan.folder


def unfinished(plan: Plan) -> dict:
    """The run.json of the unfinished run that is resumed; {} of a new run."""
    return results.read_json(plan.folder / "run.json", f"remove {plan.folder}") if plan.start == "resume" else {}


def chosen_dtype(args, plan: Plan, world, earlier: dict):
    """The torch dtype of --dtype on this machine; UserError when the run cannot go on, or be private, in it."""
    dtype = models.resolve_dtype(args.dtype, world.device)
    name = str(dtype).removeprefix("torch.")
    if plan.privacy and name == "float16":
        raise UserError("--dtype auto: this GPU has no bfloat16; --dp needs --dtype float32 there")
    if earlier.get("dtype", name) != name:
        raise UserError(f"--dtype {args.dtype}: is {name} on this machine; the unfinished run is in {earlier['dtype']}")
    return dtype


def find_secret(args, plan: Plan) -> bytes:
    """The 32 bytes that draws, noise, dropout and initial weights of a DP run hang on; an unfinished run's own."""
    file = plan.private / "secret"
    if not file.is_file():
        plan.private.mkdir(parents=True, exist_ok=True)
        plan.private.chmod(0o700)
        given = args.seed is not None
        secret = hashlib.sha256(f"seed {args.seed}".encode()).digest() if given else secrets.token_bytes(32)
        with results.atomic(file, permissions=0o600) as out:
            out.write(secret.hex())
    return bytes.fromhex(file.read_text())


def hash_salt(secret: bytes) -> str:
    """The salt of the hashes that a DP run writes down, hexadecimal. It outlives the secret and does not tell it."""
    from training import dp

    return dp.stream(secret, "salt of hashes", 0, 16).hex()


def write_trained(plan: Plan, loss_on: str, salt: str) -> dict:
    """Write trained_rows.jsonl; returns run.json's `trained` block. Rows in no privacy unit are not trained on."""
    places = sorted(place for unit in plan.privacy.units for place in unit) if plan.privacy else range(len(plan.train))
    rows = []
    for place in places:
        row, digest = plan.train[place], trained.text_sha256(plan.texts[place], salt)
        rows.append(trained.TrainedRow(plan.indices[place], digest, len(row.ids), row.labels, row.n_cut > 0, row.kept))
    chosen = [plan.train[place] for place in places]
    n_cut = sum(row.n_cut for row in chosen)
    masked = sum(len(row.ids) - row.labels - 1 for row in chosen)
    return trained.write(plan.folder, trained.TrainedRows(salt, loss_on, plan.max_length, tuple(rows)), n_cut, masked)


def suggest(args, plan: Plan) -> None:
    """Print quantiles of per-record gradient norms on public rows."""
    import torch

    world = distributed.start(group_of_one=args.distribution_type == "fsdp")
    try:
        training = Training(args, plan, world, models.resolve_dtype(args.dtype, world.device), bytes(32))
        norms = training.record_norms()
        shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
        found = "  ".join(f"{share:.0%} {item:.3g}" for share, item in zip(shares, norms.quantile(shares)))
        world.say(f"per-record gradient norms of {len(norms)} public rows at the initial weights: {found}")
        world.say(f"suggestion: --max_grad_norm {norms.median():.2g} (the median; about half the records are clipped)")
    finally:
        world.close()


def _run(args, plan: Plan, world, dtype, record: results.Run, secret: bytes | None) -> None:
    training = Training(args, plan, world, dtype, secret)
    record["base_commit"] = getattr(training.model.config, "_commit_hash", None)
    record["max_length"] = plan.max_length
    record["rows"] = {"train": len(plan.train), "held_out": len(plan.held), "sequences": len(plan.sequences)}
    record["parameters"] = {
        "trainable": sum(parameter.numel() for parameter in training.trainable),
        "all": sum(parameter.numel() for parameter in training.model.parameters()),
    }
    record["notes"] = []
    record["special_tokens"] = models.special_tokens_in(plan.tokenizer, plan.texts) if not plan.privacy else None
    if plan.privacy:
        record["clip_slack"] = training.clip_slack
    if args.peft_type == "pissa" and world.main and not (plan.folder / "initial_adapter").is_dir():
        with results.atomic_folder(plan.folder / "initial_adapter") as folder:
            save_adapter(folder, training.initial, training.model.peft_config["default"])
    states = saved_states(plan.folder) if plan.start == "resume" else []  # a new run reads no other's
    if states:
        newest = states[-1]
        training.restore(newest)
        for older in states[:-1] if world.main else ():  # of a run killed before it removed them
            (older / "training_state.pt").unlink()
        record["resumed_from"] = training.count["step"]
        world.say(f"resuming from {newest}, step {training.count['step']} of {training.total}")
    elif args.resume:
        world.say("nothing to resume from: starting at the first step")
    if world.main:
        keep_metrics(plan.folder / "metrics.jsonl", training.count["step"] if states else -1)
    world.barrier()
    trackers = start_trackers(args, plan) if world.main else []
    with on_sigterm(training):
        train(training, record, trackers)
    last = checkpoints(plan.folder)[-1]
    training.check_saved(last)
    world.say("checked: the saved weights moved, and reloaded they give the logits of the model in memory")
    record["steps"], record["updates"] = training.count["step"], training.count["updates"]
    record["tokens"], record["eval_losses"] = training.count["tokens"], training.count["eval_losses"]
    record["relative_change"] = training.relative_change()
    if plan.privacy:
        record["privacy"] = plan.privacy.block(training.count["step"])
        world.say(dp_plan.summary(record["privacy"]))
    if record["relative_change"] is not None:
        world.say(f"‖ΔW‖/‖W‖ {record['relative_change']:.3g}")
        if note := models.hardly_moved(record["relative_change"]):
            record["notes"] = [note]
            world.say(f"{note}; raise --learning_rate or train longer")
    for tracker in trackers:
        tracker.finish()
    if world.main:
        shutil.rmtree(plan.folder / "interrupted", ignore_errors=True)


def start_trackers(args, plan: Plan) -> list:
    """The accelerate trackers of --report_to, logging below the run directory where they keep files."""
    trackers = []
    for kind in tracker_classes(args.report_to):
        places = [plan.folder] if kind.requires_logging_directory else []
        tracker = kind("run_peft", *places)
        tracker.start()
        values = cli.plain(vars(args))
        tracker.store_init_configuration(
            {key: item if isinstance(item, (int, float, str, bool)) else str(item) for key, item in values.items()}
        )
        trackers.append(tracker)
    return trackers


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
