"""Everything about the shadows that is known before a model is loaded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from common import chat, dataset, distributed, models, provenance, publication, records, shadows, tokenization
from common.problems import Problems, UserError, check_writable
from mia.config import MiaConfig
from mia.dataset import Item, Reader, read_sets
from shadowing.config import ShadowConfig
from shadowing.draw import halves, training_seed
from training import tokenised
from training.batches import encode, pack
from training.checkpoint import check_resumable
from training.config import TrainConfig
from training.optim import METRIC_SCHEDULERS, optimizer_class
from training.plan import Plan, boundaries, check_ids, longest_row, run_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEDY = "restore it"
ANOTHER = "choose another directory, or remove this one"


@dataclass(frozen=True)
class Shadow:
    """One shadow to be trained."""

    number: int
    config: TrainConfig
    plan: Plan


@dataclass(frozen=True)
class Preparation:
    """The pool and the shadows."""

    lines: list[dict[str, Any]]  # of pool.jsonl
    shadows: list[Shadow]
    members: int
    nonmembers: int
    inputs: list[str]
    target: dict[str, Any]  # its run.json

    @property
    def pool(self) -> Path:
        """The file of the pool."""
        return self.shadows[0].plan.input


def prepare(config: ShadowConfig, problems: Problems) -> Preparation:
    """Read and check everything. UserError with every problem."""
    distributed.check_environment(problems)
    check_writable(config.output_dir, problems)
    record = problems.absorb(read_target, config)
    like = problems.absorb(training_config, config, record) if record else None
    sets = MiaConfig(
        model=config.like,
        members=config.members or (record["inputs"][0]["path"] if record else ""),
        nonmembers=config.nonmembers,
        chat_template=like.chat_template if like else None,
        columns=like.columns if like else (),
        split=like.split if like else None,
        data_config=like.data_config if like else None,
    )
    reader = Reader(sets, problems) if like else None
    revision = like.revision if like else None
    ref = tokenizer = None
    if like:
        given = (problems, config.like, revision, config.base_model, "--like")
        ref, tokenizer = models.look_up(*given, quantized=like.quantization)
    members: Sequence[Item] = []
    nonmembers: Sequence[Item] = []
    if reader and record:
        reader.use(tokenizer, f"--like {config.like}")
        members, nonmembers, trained, _ = read_sets(reader)
        reader.check()
        if trained and not all(trained.values()):
            problems.add(
                f"--members {sets.members}: not the file that {config.like} was trained on, or its split has changed "
                "since; give the file of its run.json"
            )
    if ref and record and record.get("base_sha256") not in (None, sha256 := base_sha256(ref)) and sha256:
        problems.add(f"--like {config.like}: its base {ref.base} is not the one it was trained on; give --base_model")
    problems.check()
    if not (record and like and reader and ref and tokenizer):
        raise RuntimeError("the preparation is incomplete, but no check reported why")
    return plan_shadows(config, record, like, reader, ref, tokenizer, members, nonmembers)


def base_sha256(ref: models.ModelRef) -> str | None:
    """SHA-256 of the weights of a model's base; None for a hub name."""
    return provenance.weights_sha256(ref.unadapted)


def read_target(config: ShadowConfig) -> dict[str, Any]:
    """run.json of --like. UserError if shadows cannot be trained as it was."""
    folder = Path(config.like).expanduser()
    where = f"--like {config.like}"
    if not folder.is_dir():
        raise UserError(f"{where}: no such directory; give a checkpoint-* of run_peft.py")
    record = provenance.training_record(folder)
    if record is None or not folder.resolve().name.startswith("checkpoint-"):
        raise UserError(f"{where}: no run.json beside it; give a checkpoint-* of run_peft.py")
    if record["args"].get("peft_type") == "full":
        raise UserError(f"{where}: is fully fine-tuned; shadows are adapters, give an adapter")
    if record["args"].get("dp"):
        raise UserError(
            f"{where}: was trained with --dp; shadows are trained without, and would not be like it (its ε, and "
            "canary/measure.py, bound what it leaks)"
        )
    kinds = {"global_batch": int, "max_length": int, "dtype": str, "rows": dict}
    lacking = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    first = record["inputs"][0] if record.get("inputs") else None
    if not isinstance(first, dict) or not isinstance(first.get("path"), str):
        lacking.append("inputs")
    if lacking:
        file = folder.absolute().parent / "run.json"
        raise UserError(f"{file}: has no usable {', '.join(lacking)}; {REMEDY}, or train again")
    return record


def training_config(config: ShadowConfig, record: dict[str, Any]) -> TrainConfig:
    """The training of every shadow: the target's, but with all of its global batch on one process, and other rows."""
    file = Path(config.like).expanduser().absolute().parent / "run.json"
    args = {key: float(value) if value == "inf" else value for key, value in record["args"].items()}
    if unknown := sorted(args.keys() - {field.name for field in fields(TrainConfig)}):
        raise UserError(f"{file}: unknown arguments {', '.join(unknown)}; it is of another version of run_peft.py")
    try:
        target = msgspec.convert(args, TrainConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"{file}: args: {records.reason(error)}; {REMEDY}") from None
    if record["global_batch"] % target.per_device_batch_size:
        raise UserError(f"{file}: its global_batch is no multiple of per_device_batch_size; {REMEDY}")
    spread = target.distribution_type == "mp"
    like = replace(
        target,
        gradient_accumulation_steps=record["global_batch"] // target.per_device_batch_size,
        distribution_type="mp" if spread else "ddp",
        hsdp=False,
        dtype=record["dtype"],
        input=str(Path(config.output_dir) / shadows.POOL),
        output_root=config.output_dir,
        run_name=None,
        train_rows=None,
        eval_rows=0,
        allow_overlap=True,  # half of the pool is not in the training split
        report_to="none",
        resume=True,
        dry_run=False,
        suggest_max_grad_norm=None,
    )
    problems = Problems()
    if like.scheduler in METRIC_SCHEDULERS:
        problems.add(
            f"--like {config.like}: --scheduler {like.scheduler} follows held-out rows, which shadows have not"
        )
    if spread and os.environ.get("WORLD_SIZE", "1") != "1":
        problems.add(f"--like {config.like}: was trained with --distribution_type mp; start it without torchrun")
    if like.optimizer != TrainConfig.optimizer:
        problems.absorb(optimizer_class, like)
    problems.check()
    return like


def plan_shadows(
    config: ShadowConfig,
    record: dict[str, Any],
    like: TrainConfig,
    reader: Reader,
    ref: models.ModelRef,
    tokenizer: "PreTrainedTokenizerBase",
    members: Sequence[Item],
    nonmembers: Sequence[Item],
) -> Preparation:
    """The plan of every shadow, as training/ makes it for a run of its own. UserError with every problem."""
    problems = Problems()
    items = [*members, *nonmembers]
    names = [shadows.SETS[0]] * len(members) + [shadows.SETS[1]] * len(nonmembers)
    texts = [item.text for item in items]
    if min(len(members), len(nonmembers)) < 2 or len(set(texts)) < 4:
        raise UserError(f"{len(members)} members and {len(nonmembers)} non-members: at least 2 of either are needed")
    first = config.members or record["inputs"][0]["path"]
    renderer = None
    rendered: list[chat.Rendered] = []
    for file, chosen in ((first, members), (config.nonmembers or first, nonmembers)):
        rows, places = reader.files[file][0], [item.place for item in chosen]
        if like.loss_on == "completion":
            problems.absorb(boundaries, file, rows, places)
        renderer = dataset.read_renderer(rows, tokenizer, like.chat_template, f"--like {config.like}")
        rendered += dataset.render(file, rows, places, renderer)
    problems.check()
    if renderer:
        tokenizer.chat_template = renderer.template  # saved with every checkpoint
    architecture = models.read_config(ref.base, ref.revision, "--like")
    max_length = longest_row(like, architecture)
    encoded = encode(rendered, tokenizer, max_length, like.loss_on)
    check_ids([encoded], architecture, f"--like {config.like}")
    listed = list(zip(names, [item.place for item in items], texts))
    lines = shadows.pool_lines(shadows.settings_of(record), config.seed, listed)
    pool = Path(like.input)
    problems.absorb(check_pool, pool, lines)
    made = []
    for number, half in enumerate(halves(texts, config.shadows, config.seed)):
        its = replace(like, seed=training_seed(config.seed, number))
        train = [encoded[index] for index in half]
        plan = Plan(
            ref=ref.unadapted,
            input=pool,
            tag="shadow",
            folder=Path(config.output_dir) / f"shadow-{number}",
            tokenizer=tokenizer,
            indices=half,
            rendered=[rendered[index] for index in half],
            special_tokens=tokenization.special_tokens_in(
                tokenizer, (dataset.written(items[index].row) for index in half)
            ),
            bos_note=tokenization.bos_note(tokenizer, (rendered[index].text for index in half))
            if renderer is None
            else None,
            train=train,
            held=[],
            sequences=pack(tokenised.lengths(train), max_length)
            if like.packing
            else [[index] for index in range(len(train))],
            global_batch=record["global_batch"],
            max_length=max_length,
            start="new",
            world_size=1,
            privacy=None,
            n_trainable=0,
        )
        if not sum(row.labels for row in train):
            problems.add(f"shadow {number}: no tokens to train on with --max_length {max_length}")
        if pool.is_file() and not problems.lines:
            problems.absorb(check_state, its, plan)
        made.append(Shadow(number, its, plan))
    problems.check()
    inputs = list(dict.fromkeys([first, config.nonmembers or first]))
    return Preparation(lines, made, len(members), len(nonmembers), inputs, record)


def check_pool(pool: Path, lines: list[dict[str, Any]]) -> None:
    """UserError if the directory has shadows of other rows, of another target or seed."""
    if not pool.is_file():
        if any(pool.parent.glob("shadow-*")):
            raise UserError(f"--output_dir {pool.parent}: has shadow-* without {pool.name}; {ANOTHER}")
        return
    header, rows = shadows.read_pool(pool.parent)
    if (header, rows) != (lines[0], lines[1:]):
        settings, earlier = lines[0]["settings"], header["settings"]
        other = [key for key in settings if settings[key] != earlier.get(key)]
        other += ["seed"] if header["seed"] != lines[0]["seed"] else []
        other += ["members or non-members"] if rows != lines[1:] else []
        raise UserError(f"--output_dir {pool.parent}: has shadows with another {', '.join(other)}; {ANOTHER}")


def check_state(config: TrainConfig, plan: Plan) -> None:
    """Set `start` of a shadow's plan. UserError if what an earlier run left is damaged."""
    try:
        arguments = (config, plan.ref, plan.folder, plan.input, plan.global_batch, plan.world_size)
        plan.start = run_state(*arguments)
        if plan.start == "resume":
            check_resumable(plan.folder)
    except UserError as error:
        remedy = f"remove {plan.folder}"
        raise UserError(
            *(
                line.replace("start over without --resume", remedy).replace("set --run_name", remedy)
                for line in error.problems
            )
        ) from None


def write_pool(preparation: Preparation) -> None:
    """Write pool.jsonl, unless it is there (`check_pool`)."""
    if not preparation.pool.is_file():
        publication.write_jsonl(preparation.pool, preparation.lines, permissions=0o600)
