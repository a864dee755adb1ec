"""Several nodes: two torchrun agents on this machine, two gloo ranks each, with static and c10d rendezvous. Training
(ddp, fsdp, --hsdp) and measuring give what one process gives; a run is resumed after one agent was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_lines
from test_distributed_training import SGD, alone, check_metrics, folder_of, furthest, plain, words_of

import measure_purified
import run_peft
from common.problems import UserError
from training.checkpoint import checkpoints

SEVERAL = """
import importlib, json, sys
from common import distributed
from common.process import leave

close, distributed.World.close = distributed.World.close, lambda self: None  # one process group for all commands
from training import model as training_model

shard = training_model.shard


def watched_shard(model, replicated, world, hsdp):
    from torch.distributed.tensor import DTensor

    shard(model, replicated, world, hsdp)
    mesh = next(parameter for parameter in model.parameters() if isinstance(parameter, DTensor)).device_mesh
    world.say("MESH", list(mesh.shape))


training_model.shard = watched_shard
for name, words in json.load(open(sys.argv[1])):
    if status := importlib.import_module(name).main(words):
        sys.exit(f"status {{status}}: {{name}} {{words}}")
close(distributed.start())
leave(0)
"""


def agents(rendezvous: str, *words) -> list[subprocess.Popen]:
    """The two agents of a launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
        if rendezvous == "static":
            command += [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        else:
            command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=here"]
            command += ["--local_addr=127.0.0.1"]
        process = subprocess.Popen(
            [*command, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
    return started


def launch(tmp_path, rendezvous, commands) -> str:
    """What the first node's ranks printed."""
    (tmp_path / "several.py").write_text(SEVERAL.format())
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    printed = []
    for process in agents(rendezvous, tmp_path / "several.py", tmp_path / "commands.json"):
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-3000:]
        printed.append(out)
    return "".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ("static", "c10d"))
def test_two_nodes_are_one_process(models, adapters, dataset, tmp_path, rendezvous):
    """ddp, fsdp over all ranks, and inside each node; a whole model under --hsdp; measuring, also a spread model."""
    flags = plain(*SGD)
    full = (*SGD, "-pt", "full", "-lr", "0.01")
    cases = [("ddp", flags), ("fsdp", flags), ("fsdp", (*flags, "--hsdp", "--run_name", "hsdp"))]
    cases += [("fsdp", (*full, "--hsdp", "--run_name", "hsdp"))]
    four = [words_of(models["neox"], dataset, tmp_path / "four" / mode, mode, 4, *more) for mode, more in cases]
    asked = ["--model", adapters["llama", "lora"], "-d", dataset, "--num_rows", 5, "--temperatures", 0.2, 1]
    asked = [str(word) for word in [*asked, "--output_dir"]]
    commands = [("run_peft", words) for words in four]
    commands += [("measure_purified", [*asked, str(tmp_path / "asked")])]
    commands += [("measure_purified", [*asked, str(tmp_path / "spread"), "--model_parallel", "2"])]
    printed = launch(tmp_path, rendezvous, commands)
    meshes = [line for line in printed.splitlines() if line.startswith("MESH")]
    assert meshes == ["MESH [4]", "MESH [2, 2]", "MESH [2, 2]"]
    for (_, more), words in zip(cases, four):
        one = words_of(models["neox"], dataset, tmp_path / "one", "ddp", 1, *(w for w in more if w != "--hsdp"))
        record = json.loads((folder_of(words) / "run.json").read_text())
        assert (record["world_size"], record["global_batch"], record["status"]) == (4, 8, "ok")
        assert furthest(folder_of(words), alone(one)) < 1e-6, words
        check_metrics(folder_of(words), alone(one))
    assert measure_purified.main([*asked, str(tmp_path / "one")]) == 0
    wanted = read_lines(tmp_path / "one" / "outcomes_purified.jsonl")
    for name in ("asked", "spread"):
        assert read_lines(tmp_path / name / "outcomes_purified.jsonl") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("lora", "full"))
def test_resume_after_a_node_was_lost(models, dataset, tmp_path, kind):
    """kill -9 of one agent after the first checkpoint: the other one ends, and --resume goes on to the same weights."""
    flags = ("-pt", kind, "-lr", "1e-3", "--hsdp", "-e", "12")
    whole, broken = (
        words_of(models["neox"], dataset, tmp_path / name, "fsdp", 4, *flags) for name in ("whole", "broken")
    )
    launch(tmp_path, "static", [("run_peft", whole)])
    first, second = agents("static", ROOT / "run_peft.py", *broken)
    deadline = time.monotonic() + 200
    while not checkpoints(folder_of(broken)) and time.monotonic() < deadline:
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    out, err = first.communicate(timeout=200)
    second.communicate(timeout=200)
    assert first.returncode != 0, (out, err[-2000:])
    launch(tmp_path, "static", [("run_peft", [*broken, "--resume"])])
    record = json.loads((folder_of(broken) / "run.json").read_text())
    assert record["status"] == "ok" and 5 <= record["resumed_from"] < 60
    assert furthest(folder_of(whole), folder_of(broken)) < 1e-6


@pytest.mark.slow
def test_a_sharded_run_writes_the_model_in_parts(models, dataset, tmp_path):
    """The files of four ranks load as one model, with the names and values of a single process's."""
    from transformers import AutoModelForCausalLM

    full = (*SGD, "-pt", "full", "-lr", "0.01")
    four = words_of(models["opt"], dataset, tmp_path / "four", "fsdp", 4, *full)
    launch(tmp_path, "static", [("run_peft", four)])
    last = checkpoints(folder_of(four))[-1]
    files = sorted(file.name for file in last.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
    assert len(list((last / "training_state").glob("*.distcp"))) == 4
    assert not (checkpoints(folder_of(four))[0] / "training_state").exists()  # only the newest can be resumed
    one = alone(words_of(models["opt"], dataset, tmp_path / "one", "ddp", 1, *full))
    made, wanted = (AutoModelForCausalLM.from_pretrained(folder) for folder in (last, checkpoints(one)[-1]))
    for (name, tensor), (other, value) in zip(made.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert name == other and torch.allclose(tensor, value, atol=1e-6), name


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        ((), "--hsdp: only with --distribution_type fsdp"),
        (("-dt", "fsdp"), "--hsdp: 4 processes are not a multiple of this node's 3"),
    ),
)
def test_nodes_that_do_not_come_out_are_refused(monkeypatch, models, dataset, tmp_path, flags, words):
    place = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    given = ["-m", models["neox"], "-i", dataset, "--output_root", tmp_path, "--hsdp", *flags]
    with pytest.raises(UserError, match=words):
        run_peft.main([str(word) for word in given])
