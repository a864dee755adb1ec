"""Entry point: check everything, and import torch only once the plan is complete."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from common import locks
from training.config import SEED, TrainConfig
from training.plan import describe, make_plan


def run(config: TrainConfig) -> Path:
    """Fine-tune as `config` says; returns the run directory. Raises UserError, Interrupted, or a bug."""
    if config.seed is None and not config.dp:
        config = replace(config, seed=SEED)
    plan = make_plan(config)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(describe(config, plan)), flush=True)
    if plan.start == "finished":
        print(f"{plan.folder}: this run is finished; nothing to do (remove it to run again)", flush=True)
        if not config.dry_run:
            shutil.rmtree(plan.private, ignore_errors=True)
            locks.tidy([plan.folder])
        return plan.folder
    if config.dry_run:
        return plan.folder
    if config.suggest_max_grad_norm:
        from training.dp_trainer import suggest

        suggest(config, plan)
        return plan.folder
    with locks.output_folder(plan.folder):
        from training.loop import run_plan

        return run_plan(config, plan)
