"""A whole run, from the plan to the last checkpoint; resumes an interrupted run."""

import contextlib
import ctypes
import dataclasses
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from common import distributed, json_files, provenance, publication, results, trained
from common.distributed import World
from common.process import Interrupted
from training import dp_plan, verify
from training.checkpoint import (
    check_resumable,
    checkpoints,
    clean,
    keep_metrics,
    remove_state,
    restore,
    save,
    saved_states,
)
from training.config import TrainConfig
from training.dp_trainer import DPTrainer, find_secret, hash_salt
from training.model import detach, save_adapter
from training.optim import METRIC_SCHEDULERS
from training.plan import Plan, chosen_dtype, run_state, unfinished
from training.trackers import start_trackers
from training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers import PreTrainedModel

LOG_SECONDS = 30
TRIM_STEPS = 16  # steps between calls of trim_memory


def trim_memory() -> None:
    """Return freed memory to the system: rows of many lengths fragment glibc's heap by 20 MB per step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


@contextlib.contextmanager
def on_sigterm(training: Trainer) -> Iterator[None]:
    """SIGTERM asks the run to stop after its current step."""

    def ask(*_: object) -> None:
        training.stopping = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train(training: Trainer, run: results.Run, trackers: "list[GeneralTracker]") -> None:
    """All remaining epochs: steps, metrics.jsonl, held-out loss, checkpoints. Raises Interrupted on SIGTERM."""
    config, plan, world, count = training.config, training.plan, training.world, training.count
    seconds, tokens_before, said = 0.0, count["tokens"], time.monotonic()
    terminal = sys.stderr.isatty()
    started, first = said, count["step"]

    def log(record: dict[str, Any]) -> None:
        if world.main:
            with publication.naming(file.name):
                file.write(json_files.dumps(record | {"time": results.now()}) + "\n")
                file.flush()
            for tracker in trackers:
                tracker.log({key: item for key, item in record.items() if key != "step"}, step=record["step"])

    def held_out_loss() -> None:
        loss, labels = training.evaluate()
        count["eval_losses"].append(loss)
        epoch = count["step"] / plan.steps_per_epoch
        log({"step": count["step"], "epoch": epoch, "eval_loss": loss, "eval_tokens": labels})
        world.say(f"epoch {epoch:g}  held-out loss {loss:.4f} over {labels} tokens")
        if config.scheduler in METRIC_SCHEDULERS and count["step"]:
            cast("ReduceLROnPlateau", training.scheduler).step(loss)

    def record_spent() -> None:
        """Keep run.json's ε at least as large as that of the checkpoints beside it."""
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
            if step % config.logging_steps == 0 or step == training.total:
                weight = count["window_weight"]
                loss = count["window_loss"] / weight if weight else None  # None: no unit was sampled
                count["window_loss"], count["window_weight"] = 0.0, 0
                progress = {"step": step, "epoch": step / plan.steps_per_epoch, "loss": loss}
                log(progress | done | {"tokens": count["tokens"]})
                words = "loss -" if loss is None else f"loss {loss:.4f}"
                bar.set_postfix_str(words)
                if not terminal and time.monotonic() - said > LOG_SECONDS:
                    said = time.monotonic()
                    left = timedelta(seconds=round((said - started) / (step - first) * (training.total - step)))
                    world.say(f"step {step}/{training.total}  {words}  lr {done['lr']:.2g}  {left} left")
            bar.update()
            if step % TRIM_STEPS == 0 and training.device_type == "cpu":
                trim_memory()
            if stop and step % plan.steps_per_epoch:
                record_spent()
                save(training, plan.folder / "interrupted")
                raise Interrupted(f"SIGTERM after step {step}; --resume continues from there")
            if step % plan.steps_per_epoch:
                continue
            if plan.held:
                held_out_loss()
            record_spent()
            save(training, plan.folder / f"checkpoint-{count['step']}")
            run["tokens_per_second"] = (count["tokens"] - tokens_before) / seconds
            epoch = f"{step // plan.steps_per_epoch}/{config.epochs}"
            world.say(
                f"epoch {epoch}  step {step}/{training.total}  "
                f"{run['tokens_per_second']:.0f} tokens/s  {plan.folder / f'checkpoint-{step}'}"
            )
            if stop and count["step"] < training.total:
                raise Interrupted(f"SIGTERM after step {count['step']}; --resume continues from there")


def run_plan(
    config: TrainConfig, plan: Plan, joined: World | None = None, base: "PreTrainedModel | None" = None
) -> Path:
    """Run a plan in its run directory, which must be locked; returns the directory.

    joined: the processes that share this run, if they have met already (they stay together); base: the loaded base for
    an adapter, which is as before afterwards.
    """
    world = joined or distributed.start(group_of_one=config.distribution_type == "fsdp")
    try:
        if not world.main or not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        if world.main:  # another run may have finished while this one waited or read its rows
            state = (config, plan.ref, plan.folder, plan.input, plan.global_batch, plan.world_size, plan.privacy)
            plan.start = run_state(*state)
            if plan.start == "resume":
                check_resumable(plan.folder)
        plan.start = world.broadcast(plan.start if world.main else None)
        if plan.start == "finished":
            world.say(f"{plan.folder}: this run is finished; nothing to do (remove it to run again)")
            return plan.folder
        earlier = unfinished(plan)
        dtype = chosen_dtype(config, plan, world, earlier)
        if world.main:
            plan.folder.mkdir(parents=True, exist_ok=True)
            old = checkpoints(plan.folder)
            if plan.start == "new" and old:
                print(f"starting over: {len(old)} checkpoint(s) of an unfinished run are removed (--resume keeps them)")
                if plan.privacy:
                    print("if anyone has seen them, their ε adds to the new run's")
            clean(plan.folder, everything=plan.start == "new")
        secret = None
        if plan.privacy:
            # σ too: another machine's libraries might find a slightly different one
            sigma, secret = plan.privacy.noise_multiplier, find_secret(config, plan) if world.main else None
            sigma, secret = world.broadcast((sigma, secret) if world.main else None)
            plan.privacy = dataclasses.replace(plan.privacy, noise_multiplier=sigma)
        world.barrier()
        salt = hash_salt(secret) if secret else ""
        block = write_trained(plan, config.loss_on, salt) if world.main else None
        more: dict[str, Any] = {
            "global_batch": plan.global_batch,
            "data_tag": plan.tag,
            "dtype": str(dtype).removeprefix("torch."),
        }
        more["base_sha256"] = provenance.weights_sha256(plan.ref) if world.main else None
        if plan.privacy:
            spent = earlier.get("privacy") or plan.privacy.block(0)
            more |= {"seed": "os" if config.seed is None else config.seed, "privacy": spent}
        record = results.Run(plan.folder / "run.json", config, inputs=[plan.input], world=world, **more)
        record["trained"] = block
        if salt:
            digest = trained.salted(results.sha256(plan.input), salt)
            record["inputs"] = [{"path": str(plan.input), "sha256": digest, "salted": True}]
        with record:
            fit(config, plan, world, dtype, record, secret, base)
        if world.main and plan.private.is_dir():
            shutil.rmtree(plan.private)  # only once run.json says ok: a run killed earlier is resumed, not repeated
    finally:
        if joined is None:
            world.close()
    return plan.folder


def write_trained(plan: Plan, loss_on: str, salt: str) -> dict[str, Any]:
    """Write trained_rows.jsonl; returns run.json's `trained` block. Rows in no privacy unit are not trained on."""
    n_cut = masked = 0

    def rows() -> Iterator[trained.TrainedRow]:
        nonlocal n_cut, masked
        for place, (index, row, rendered) in enumerate(zip(plan.indices, plan.train, plan.rendered)):
            if place not in plan.left_out:
                n_cut += row.n_cut
                masked += len(row.ids) - row.labels - 1
                digest = trained.text_sha256(rendered.text, salt)
                yield trained.TrainedRow(index, digest, len(row.ids), row.labels, row.n_cut > 0, row.kept)

    block = trained.write(plan.folder, trained.Header(salt, loss_on, plan.max_length), rows())
    block |= {"tokens_cut": n_cut, "tokens_masked": masked}
    return block | ({"canaries": plan.canary_counts} if plan.canary_counts else {})


def fit(
    config: TrainConfig,
    plan: Plan,
    world: World,
    dtype: torch.dtype,
    record: results.Run,
    secret: bytes | None,
    base: "PreTrainedModel | None" = None,
) -> None:
    """Build the model, restore an interrupted run's state, train to the end, verify what was saved."""
    training = DPTrainer(config, plan, world, dtype, secret) if secret else Trainer(config, plan, world, dtype, base)
    record["base_commit"] = getattr(training.model.config, "_commit_hash", None)
    record["max_length"] = plan.max_length
    record["rows"] = {"train": len(plan.train), "held_out": len(plan.held), "sequences": len(plan.sequences)}
    record["parameters"] = {
        "trainable": sum(parameter.numel() for parameter in training.trainable),
        "all": sum(parameter.numel() for parameter in training.model.parameters()),
    }
    record["notes"] = []
    record["special_tokens"] = plan.special_tokens if not plan.privacy else None
    if isinstance(training, DPTrainer):
        record["clip_slack"] = training.clip_slack
    if config.peft_type == "pissa" and world.main and not (plan.folder / "initial_adapter").is_dir():
        with publication.atomic_folder(plan.folder / "initial_adapter") as folder:
            save_adapter(folder, training.initial, training.lora_config)
    states = saved_states(plan.folder) if plan.start == "resume" else []  # a new run ignores other states
    if states:
        newest = states[-1]
        restore(training, newest)
        for older in states[:-1] if world.main else ():  # left by a run that was killed before removing them
            remove_state(older)
        record["resumed_from"] = training.count["step"]
        world.say(f"resuming from {newest}, step {training.count['step']} of {training.total}")
    elif config.resume:
        world.say("nothing to resume from: starting at the first step")
    if world.main:
        keep_metrics(plan.folder / "metrics.jsonl", training.count["step"] if states else -1)
    world.barrier()
    trackers = start_trackers(config, plan.folder) if world.main else []
    with on_sigterm(training):
        train(training, record, trackers)
    last = checkpoints(plan.folder)[-1]
    verify.check_saved(training, last)
    world.say("verified: the saved weights changed, and reloading them reproduces the logits of the model in memory")
    record["steps"], record["updates"] = training.count["step"], training.count["updates"]
    record["tokens"], record["eval_losses"] = training.count["tokens"], training.count["eval_losses"]
    record["relative_change"] = verify.relative_change(training)
    if plan.privacy:
        record["privacy"] = plan.privacy.block(training.count["step"])
        world.say(dp_plan.summary(record["privacy"]))
    if record["relative_change"] is not None:
        world.say(f"‖ΔW‖/‖W‖ {record['relative_change']:.3g}")
        if note := provenance.hardly_moved(record["relative_change"]):
            record["notes"] = [note]
            world.say(f"{note}; raise --learning_rate or train longer")
    world.say(f"results are in {plan.folder}")
    for tracker in trackers:
        tracker.finish()
    if world.main:
        shutil.rmtree(plan.folder / "interrupted", ignore_errors=True)
    if base is not None:
        detach(training.peft_model)
