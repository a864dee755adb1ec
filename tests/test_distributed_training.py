"""ddp and fsdp with two gloo ranks give the adapter of one process at the same global batch.

A launch of two ranks costs seconds, so each runs several run_peft.py commands one after another.
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ARCHITECTURES, ROOT, read_lines, run_script

import run_peft
from training.checkpoint import checkpoints
from training.plan import run_folder
from training.run import run as fine_tune

SCRIPT = """
import json, os, signal, sys
import run_peft
from common import distributed
from common.process import entry, leave
from training import model as training_model
from training.trainer import Trainer

shard, step = training_model.shard, Trainer.step


def watched_shard(model, replicated, world, hsdp):
    from torch.distributed.tensor import DTensor

    shard(model, replicated, world, hsdp)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    here = sum(parameter.to_local().numel() for parameter in sharded)
    world.say("SHARDED", json.dumps({{
        "frozen": len(frozen),
        "frozen sharded": sum(isinstance(parameter, DTensor) for parameter in frozen),
        "sharded": len(sharded),
        "share here": here / sum(parameter.numel() for parameter in sharded),
    }}))


def watched_step(self):
    if command["sigterm"] == self.count["step"] + 1 and self.world.rank == 1:  # one rank alone is told to stop
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)


training_model.shard, Trainer.step = watched_shard, watched_step
close, distributed.World.close = distributed.World.close, lambda self: None  # one process group for all commands
for command in json.load(open(sys.argv[1])):
    status = entry(lambda: run_peft.main(command["words"]))
    if status != (143 if command["sigterm"] else 0):
        sys.exit(f"status {{status}}: {{command}}")
close(distributed.start())
leave(0)
"""
SGD = ("-opt", "sgd", "-lr", "0.1")
ADAMW = ("-lr", "1e-2")


def words_of(model, dataset, out, mode, ranks, *flags) -> list[str]:
    """37 rows, global batch 8, two epochs of 5 steps; the last step of each has 5 rows, so ranks get unequal loads."""
    words = ["-m", model, "-i", dataset, "--output_root", out, "--lora_r", 4, "-e", 2, "-dt", mode]
    words += ["--train_rows", 37, "--eval_rows", 3, "-pdbs", 2, "-gas", 4 // ranks, *flags]
    return [str(word) for word in words]


def folder_of(words):
    return run_folder(run_peft.make_parser().parse_args(words), "enron")


def alone(words):
    """The run directory of `words`, run here in one process, once."""
    folder = folder_of(words)
    return folder if checkpoints(folder) else fine_tune(run_peft.make_parser().parse_args(words))


def launch(tmp_path, commands: list[list[str]], sigterm=()) -> subprocess.CompletedProcess:
    """The commands, one after another, in one torchrun of two gloo ranks; `sigterm`: {command: step}."""
    (tmp_path / "several.py").write_text(SCRIPT.format(root=str(ROOT)))
    listed = [{"words": words, "sigterm": dict(sigterm).get(number)} for number, words in enumerate(commands)]
    (tmp_path / "commands.json").write_text(json.dumps(listed))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, tmp_path / "several.py", tmp_path / "commands.json"],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def furthest(one, other) -> float:
    """Largest difference between the newest checkpoints of two run directories."""
    from safetensors.torch import load_file

    left, right = (
        {
            name: tensor
            for file in checkpoints(folder)[-1].glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in (one, other)
    )
    assert left.keys() == right.keys() and left
    return max((left[name] - right[name]).abs().max().item() for name in left)


def check_metrics(one, other) -> None:
    left, right = read_lines(one / "metrics.jsonl"), read_lines(other / "metrics.jsonl")
    steps = [line["step"] for line in left]
    assert steps == [line["step"] for line in right]
    assert one.name.endswith("packed") or steps == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]  # held-out loss: 0, 5, 10
    for key in ("loss", "eval_loss", "tokens", "eval_tokens", "lr"):
        values = [[line[key] for line in lines if key in line] for lines in (left, right)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-4), key


def check_same_as_one_process(models, dataset, tmp_path, cases, modes=("ddp", "fsdp")):
    """`cases`: [(architecture, flags, bound)]; returns what the two ranks printed."""
    runs = []
    for arch, flags, bound in cases:
        for mode in modes:
            two = words_of(models[arch], dataset, tmp_path / "two" / mode, mode, 2, *flags)
            one = words_of(models[arch], dataset, tmp_path / "one", "ddp", 1, *flags)
            runs.append((two, one, bound))
    done = launch(tmp_path, [two for two, _, _ in runs])
    for two, one, bound in runs:
        record = json.loads((folder_of(two) / "run.json").read_text())
        assert (record["world_size"], record["global_batch"], record["status"]) == (2, 8, "ok")
        moved = json.loads((alone(one) / "run.json").read_text())["relative_change"]
        assert moved and record["relative_change"] == pytest.approx(moved, rel=0.01)
        assert furthest(folder_of(two), alone(one)) < bound, two
        check_metrics(folder_of(two), alone(one))
    sharded = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("SHARDED")]
    assert len(sharded) == (len(cases) if "fsdp" in modes else 0)
    return sharded


def plain(*flags) -> tuple:
    return (*flags, "--lora_dropout", "0")


def test_two_ranks_equal_one_process(models, dataset, tmp_path):
    """LoRA on GPT-NeoX; SGD to 1e-6, AdamW (which divides tiny gradients by their size) to 5e-3."""
    cases = [("neox", plain(*SGD), 1e-6), ("neox", plain(*ADAMW), 5e-3)]
    for sharded in check_same_as_one_process(models, dataset, tmp_path, cases):
        assert sharded["frozen"] == sharded["frozen sharded"] == sharded["sharded"] > 0
        assert sharded["share here"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_two_ranks_equal_one_process_for_every_type(models, dataset, tmp_path):
    kinds = ("lora", "dora", "pissa")
    # PiSSA and whole models start with large weights and gradients: ten steps at 0.1 amplify the last bits
    rates = {"lora": "0.1", "dora": "0.1", "pissa": "0.003"}
    cases = [(arch, (*plain(*SGD), "-pt", kind, "-lr", rates[kind]), 1e-6) for arch in ARCHITECTURES for kind in kinds]
    cases += [(arch, (*SGD, "-pt", "full", "-lr", "0.01"), 1e-6) for arch in ("neox", "opt")]
    cases += [("llama", (*plain(*SGD), "--packing", "--gradient_checkpointing", "--run_name", "packed"), 1e-6)]
    everything = check_same_as_one_process(models, dataset, tmp_path, cases)
    for (_, flags, _), sharded in zip(cases, everything):
        assert sharded["frozen"] == sharded["frozen sharded"]
        assert (sharded["frozen"] == 0) == ("full" in flags) and sharded["sharded"] > 0


@pytest.mark.slow
def test_two_ranks_stop_together_and_resume(models, dataset, tmp_path):
    """SIGTERM to one rank at step 7: both save, and the resumed run is the uninterrupted one (dropout on)."""
    commands, sigterm, pairs = [], {}, []
    for mode, kind in (("ddp", "dora"), ("fsdp", "pissa"), ("fsdp", "full")):
        flags = ("-pt", kind, "-lr", "1e-3")
        whole = words_of(models["neox"], dataset, tmp_path / "whole" / mode, mode, 2, *flags)
        broken = words_of(models["neox"], dataset, tmp_path / "broken" / mode, mode, 2, *flags)
        sigterm[len(commands) + 1] = 7
        commands += [whole, broken, [*broken, "--resume"]]
        pairs.append((whole, broken))
    launch(tmp_path, commands, sigterm)
    for whole, broken in pairs:
        assert json.loads((folder_of(broken) / "run.json").read_text())["resumed_from"] == 7
        assert furthest(folder_of(whole), folder_of(broken)) < 1e-6
        check_metrics(folder_of(whole), folder_of(broken))


# ---------------------------------------------------------------- the end of a run

ENDING = """
import atexit, os, pathlib, sys
from common import distributed
from common.process import entry
class Aborts:  # as a thread of gloo does that needs the GIL while the interpreter is finalized
    def __del__(self, abort=os.abort):
        abort()
held = Aborts()
def main():
    world = distributed.start()
    atexit.register(pathlib.Path(sys.argv[1], f"rank{world.rank}").touch)
    world.say(len(world.gather(world.rank)), "ranks")
    sys.stdout.write("printed last")
    world.close()
    return int(sys.argv[2])
sys.exit(entry(main))
"""


@pytest.mark.parametrize("status", (0, 3))
def test_no_rank_is_finalized_after_it_left_the_group(tmp_path, status):
    """A finished run ended with -6, once in about a hundred: exit handlers run, output is flushed, the status stays."""
    (tmp_path / "ending.py").write_text(ENDING)
    buffered = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # else nothing is left to be flushed at the end
    done = run_script(tmp_path / "ending.py", tmp_path, status, ranks=2, env=buffered)
    assert "2 ranks" in done.stdout and done.stdout.count("printed last") == 2
    assert (done.returncode != 0) == (status != 0) and "exitcode: -6" not in done.stderr
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]


# ---------------------------------------------------------------- missing and orphaned processes

ALONE = """
import sys
from datetime import timedelta
from common import distributed
from common.process import entry
distributed.MEETING = timedelta(seconds={seconds})
def main():
    print("started", flush=True)
    distributed.start()
sys.exit(entry(main))
"""


def rank_alone(tmp_path, seconds: float, **more) -> tuple[list[str], dict]:
    """(command, environment) of rank 0 of two; the other one never starts."""
    (tmp_path / "alone.py").write_text(ALONE.format(root=str(ROOT), seconds=seconds))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [sys.executable, str(tmp_path / "alone.py")], os.environ | place | more


def test_missing_processes_are_not_waited_for_for_hours(tmp_path):
    command, environment = rank_alone(tmp_path, 2)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("WORLD_SIZE=2: not all processes joined at 127.0.0.1:")


def test_a_worker_whose_torchrun_was_killed_ends(tmp_path):
    """Before the group has formed, whose own time-out is hours."""
    command, environment = rank_alone(tmp_path, 3600, TORCHELASTIC_RUN_ID="none")
    agent = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    parent = subprocess.Popen(
        [sys.executable, "-c", agent, *command], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "started\n"
    time.sleep(2)
    assert parent.poll() is None  # they wait
    parent.kill()
    assert parent.stdout.read() == ""  # end of file: the worker held the pipe open until it ended
    parent.wait()
