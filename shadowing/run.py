"""Train the shadows: every rank its own, one after the other, on one loaded base."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import distributed, json_files, locks, models, publication, results, shadows
from common.distributed import World
from common.problems import Problems
from shadowing.config import ShadowConfig
from shadowing.prepare import Preparation, Shadow, check_state, prepare, write_pool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "shadow"  # of locks and journals


def run(config: ShadowConfig) -> int:
    """Train what is not yet trained; returns 0. UserError before a model is loaded."""
    folder = Path(config.output_dir)
    with locks.output_folder(folder, config.dry_run, KEY) as output:
        made = prepare(config, Problems())
        if int(os.environ.get("RANK", 0)) == 0:
            print("\n".join(describe(config, made)), flush=True)
        if config.dry_run:
            return 0
        world = distributed.start()
        with results.Run(folder / shadows.RECORD, config, made.inputs, world, output) as record:
            world.together(lambda: write_pool(made) if world.main else None)
            world.together(lambda: train(made, world))
            record["target_seconds"] = made.target.get("seconds")
            record["shadows"] = [outcome(shadow) for shadow in made.shadows] if world.main else None
        world.close()
        more = f" --nonmembers {config.nonmembers}" if config.nonmembers else ""
        world.say(f"python mia/mia.py --model {config.like} --members {made.inputs[0]}{more} --shadows {folder}")
    return 0


def describe(config: ShadowConfig, made: Preparation) -> list[str]:
    """The plan as lines of text."""
    one = made.shadows[0].plan
    trained = made.target["rows"].get("train")
    finished = sum(shadow.plan.start == "finished" for shadow in made.shadows)
    lines = [
        f"target       {config.like}: {trained} training rows, {made.target.get('seconds') or '?'} s",
        f"pool         {made.members} members and {made.nonmembers} non-members",
        f"shadows      {len(made.shadows)}, each on {len(one.train)} rows for {one.steps_per_epoch} steps per epoch × "
        f"{made.shadows[0].config.epochs} epochs; {finished} finished",
        f"directory    {config.output_dir}",
    ]
    if isinstance(trained, int) and not 0.8 <= len(one.train) / max(1, trained) <= 1.25:
        lines.append(
            f"note         a shadow has {len(one.train)} rows, the target {trained}; "
            "with as many non-members as members the two would be alike"
        )
    return lines


def train(made: Preparation, world: World) -> None:
    """Train this rank's shadows; the base is loaded for the first that is not finished."""
    base: PreTrainedModel | None = None
    alone = World(device=world.device)  # each shadow is a run of one process
    quiet = contextlib.nullcontext() if world.main else contextlib.redirect_stdout(None)
    with quiet:
        for shadow in world.shard(made.shadows):
            publication.remove_leftovers(shadow.plan.folder)
            check_state(shadow.config, shadow.plan)
            if shadow.plan.start == "finished":
                continue
            from training.loop import run_plan
            from training.model import load_base

            print(f"\nshadow {shadow.number + 1} of {len(made.shadows)}", flush=True)
            if shadow.config.peft_type == "pissa":  # it is trained on a base that it changes
                run_plan(shadow.config, shadow.plan, alone)
                continue
            if base is None:
                dtype = models.resolve_dtype(shadow.config.dtype, world.device)
                base = load_base(shadow.config, shadow.plan, world, dtype)
            run_plan(shadow.config, shadow.plan, alone, base)


def outcome(shadow: Shadow) -> dict[str, Any]:
    """What the record says of a trained shadow."""
    record = json_files.read_json(shadow.plan.folder / "run.json", f"remove {shadow.plan.folder}")
    kept = {key: record.get(key) for key in ("steps", "relative_change", "notes", "seconds")}
    return {"folder": shadow.plan.folder.name, "seed": shadow.config.seed, "rows": len(shadow.plan.train)} | kept
