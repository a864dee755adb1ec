"""What only a GPU can show: pytest -m gpu. Skipped, with that reason, if torch sees none.

Scores and answers equal the CPU's in fp32; bf16 training with and without DP; nccl with one rank; device maps; every
script's own command on the GPU against the same command on the CPU.
"""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_rows, make_tokenizer, read_lines, run_script, write_rows

import run_peft
from common import models as common_models
from common import sampling, scoring
from common.process import entry
from training.checkpoint import checkpoints
from training.dp_trainer import DPTrainer
from training.run import run as fine_tune
from training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

KINDS = ("lora", "dora", "pissa")
TEMPERATURES = [0.0, 0.2, 1.0, 1.5]
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random Llama of SmolLM2-135M's width (576, 9 heads, 3 of keys) with 6 layers, saved in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("small")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder, device, dtype=torch.float32):
    ref = common_models.find_model(str(folder))
    return common_models.load_base(ref, dtype, device), common_models.load_tokenizer(ref)


def sweep(model, tokenizer, n=12):
    rows = make_rows(40)
    head = "Infer\n" + "".join(f"name: {row['gt-name']}, email: {row['gt-email']}\n" for row in rows[:2])
    prompts = [tokenizer(f"{head}name: {row['gt-name']}, email:").input_ids for row in rows[5 : 5 + n]]
    targets = [tokenizer(" " + row["gt-email"]).input_ids[:6] for row in rows[5 : 5 + n]]
    stop = sampling.stop_tokens(tokenizer, model.config.vocab_size)
    options = {"top_k": 20, "max_tokens": 8, "seed": 1, "stop": stop, "targets": [[target] for target in targets]}
    return prompts, stop, sampling.sweep(model, prompts, [(i, 0) for i in range(n)], TEMPERATURES, **options)


def peft_run(out, model, data, *flags):
    words = ["-m", model, "-i", data, "--output_root", out, "--lora_r", 8, "-e", 2, "-pdbs", 4, "-gas", 2, *flags]
    return fine_tune(run_peft.make_parser().parse_args([str(word) for word in words]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float32_answers_and_scores_equal_the_cpus(models, arch):
    (there, tokenizer), (here, _) = load(models[arch], "cuda:0"), load(models[arch], "cpu")
    (_, _, mine), (_, _, theirs) = sweep(there, tokenizer), sweep(here, tokenizer)
    same = [a == b for x, y in zip(mine, theirs) for a, b in zip(x.tokens, y.tokens)]
    assert sum(same) >= 0.98 * len(same)  # a draw between two tokens that round alike may fall either way
    for x, y in zip(mine, theirs):
        assert x.truth_logprob == pytest.approx(y.truth_logprob, abs=1e-4)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(390, size=int(n)).tolist() for n in rng.integers(2, 300, size=20)]
    for one, other in zip(*(scoring.join(sequences, [scoring.score(m, sequences)]) for m in (there, here))):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_greedy_is_generate(small, dtype):
    """In bf16 a different order of sums may flip a near tie: most answers, not all, are the same there."""
    model, tokenizer = load(small, "cuda:0", getattr(torch, dtype))
    prompts, stop, answers = sweep(model, tokenizer)
    same = 0
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt], device="cuda:0")
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found = found[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(found) if stop[token]]
        same += answer.tokens[0] == found[: ends[0] + 1 if ends else None]
    assert same == len(prompts) if dtype == "float32" else same >= 0.5 * len(prompts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("private", (False, True))
def test_bf16_training(small, dataset, tmp_path, kind, private):
    """--dtype auto takes bf16 on a GPU; the run finishes, the loss falls, stock PEFT loads what it wrote."""
    from peft import PeftModel

    flags = ["-pt", kind, "-lr", "3e-3"]
    if private:
        flags += ["--dp", "--noise_multiplier", "0.1", "--logical_batch_size", "16", "-e", "6"]
    folder = peft_run(tmp_path, small, dataset, *flags)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "ok" and record["device"].startswith("cuda")
    assert record["peak_memory"]["gpu_bytes"] > 0
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert all(map(math.isfinite, losses))
    if not private:
        assert losses[-1] < losses[0] - 0.1
    base, _ = load(small, "cuda:0", torch.bfloat16)
    ids = torch.randint(2, 390, (2, 40), device="cuda:0")
    with torch.no_grad():
        bare = base(ids).logits
        adapted = PeftModel.from_pretrained(base, checkpoints(folder)[-1]).eval()(ids).logits
    assert torch.isfinite(adapted).all() and (adapted - bare).abs().max() > 0


@pytest.mark.parametrize("seed", range(6))
def test_dp_starts_on_a_bf16_base_at_every_seed(small, dataset, tmp_path, seed):
    """The self-check of per-example gradients is not a matter of luck in bf16."""
    flags = ["--lora_r", "64", "--dp", "--noise_multiplier", "1", "--logical_batch_size", "16", "-e", "1"]
    folder = peft_run(tmp_path, small, dataset, *flags, "--seed", str(seed))
    assert json.loads((folder / "run.json").read_text())["status"] == "ok"


@pytest.mark.parametrize("mode", ("ddp", "fsdp"))
def test_one_nccl_rank_is_the_run_without_torchrun(small, dataset, tmp_path, mode):
    from safetensors.torch import load_file

    words = ["-m", small, "-i", dataset, "--lora_r", 8, "-e", 1, "-pdbs", 4, "-lr", "1e-3", "--lora_dropout", 0]
    words += ["--dtype", "float32", "-opt", "sgd"]
    plain = fine_tune(run_peft.make_parser().parse_args(list(map(str, [*words, "--output_root", tmp_path / "one"]))))
    port = str(29500 + os.getpid() % 400)
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = run_script("run_peft.py", *words, "-dt", mode, "--output_root", tmp_path / "nccl", env=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    written = checkpoints(next((tmp_path / "nccl").rglob("run.json")).parent)[-1]
    one, other = (load_file(path / "adapter_model.safetensors") for path in (checkpoints(plain)[-1], written))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_scripts_give_the_numbers_of_the_cpu(models, adapters, dataset, tmp_path):
    """measure, perplexity, mia and merge in fp32, each as a command, on the GPU and with the GPU hidden."""
    members = write_rows(tmp_path / "members.jsonl", make_rows(20, seed=7))
    others = write_rows(tmp_path / "others.jsonl", make_rows(40, seed=8)[20:])
    model, found = adapters["llama", "lora"], {}
    for place, environment in (("gpu", None), ("cpu", ON_CPU)):
        out = tmp_path / place
        for words in (
            ["measure_purified.py", model, out / "measure", "-d", dataset, "--temperatures", 0, 1, "--max_tokens", 6],
            ["perplexity/perplexity.py", "--model", model, "-d", dataset, "--output_dir", out / "perplexity"],
            [
                "mia/mia.py",
                "--model",
                model,
                "--members",
                members,
                "--nonmembers",
                others,
                "--output_dir",
                out / "mia",
                "--bootstrap",
                20,
            ],
            ["merge_peft.py", "--model", model, "--save_dir", out / "merged"],
        ):
            extra = ["--dtype", "float32"]
            done = run_script(*words, *extra, env=environment)
            assert done.returncode == 0, (place, words[0], done.stderr[-2000:])
        found[place] = {
            "measure": read_lines(out / "measure" / "results_purified.jsonl"),
            "perplexity": read_lines(out / "perplexity" / "perplexity.jsonl"),
            "mia": read_lines(out / "mia" / "results_mia.jsonl"),
        }
    one, other = found["gpu"], found["cpu"]
    for mine, theirs in zip(one["measure"], other["measure"], strict=True):
        assert abs(mine["matches"]["A"] - theirs["matches"]["A"]) <= 1
        assert mine["truth_logprob"] == pytest.approx(theirs["truth_logprob"], abs=1e-4)
    assert one["perplexity"][0]["mean"] == pytest.approx(other["perplexity"][0]["mean"], rel=1e-4)
    aucs = [{line["attack"]: line["auc"] for line in lines} for lines in (one["mia"], other["mia"])]
    assert aucs[0].keys() == aucs[1].keys()
    for attack, auc in aucs[0].items():
        assert auc == pytest.approx(aucs[1][attack], abs=0.03), attack  # one pair of 400 that changes places: 0.0025


def test_device_map_is_one_device(small, dataset, tmp_path):
    for place, flags in (("one", []), ("map", ["--device_map", "auto"])):
        words = ["perplexity/perplexity.py", "--model", small, "-d", dataset, "--output_dir", tmp_path / place]
        done = run_script(*words, "--dtype", "bfloat16", *flags)
        assert done.returncode == 0, done.stderr[-2000:]
    one, other = (read_lines(tmp_path / place / "perplexity.jsonl")[0]["mean"] for place in ("one", "map"))
    assert one == pytest.approx(other, rel=1e-6)


def test_mp_trains_over_the_gpus_there_are(small, dataset, tmp_path):
    folder = peft_run(tmp_path, small, dataset, "-dt", "mp", "-lr", "1e-3")
    assert json.loads((folder / "run.json").read_text())["status"] == "ok"


def test_resume_on_a_gpu_is_the_uninterrupted_run(small, dataset, tmp_path):
    """Stopped after the first epoch by a SIGTERM to itself, then run again: equal adapters, bit for bit."""
    import signal

    from safetensors.torch import load_file

    flags = ["-lr", "1e-3", "--seed", "3"]
    whole = peft_run(tmp_path / "whole", small, dataset, *flags)
    step = Trainer.step

    def stopped(self):
        if self.count["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    Trainer.step = stopped
    try:
        words = ["-m", small, "-i", dataset, "--output_root", tmp_path / "cut", "--lora_r", 8, "-e", 2, "-pdbs", 4]
        assert entry(lambda: run_peft.main([str(word) for word in [*words, "-gas", 2, *flags]])) == 143
    finally:
        Trainer.step = step
    cut = peft_run(tmp_path / "cut", small, dataset, *flags)
    one, other = (load_file(checkpoints(path)[-1] / "adapter_model.safetensors") for path in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_per_example_gradients_of_bf16_on_a_gpu(models, dataset, tmp_path, arch):
    """Against one row at a time through peft's own layers: the whole row's gradient within 10 % in L2."""
    from test_dp import make_training, one_at_a_time, per_example, random_rows

    training = make_training(models, arch, dataset, tmp_path, "--noise_multiplier", 1, "--dtype", "bfloat16")
    if training.world.device == "cpu":
        from common.distributed import World

        training = DPTrainer(training.config, training.plan, World(device="cuda:0"), torch.bfloat16, bytes(32))
    rows = random_rows()
    expected, found = one_at_a_time(training, rows), per_example(training, rows)
    for place, one in enumerate(expected):
        gap = sum((found[name][place].float() - one[name].float()).square().sum() for name in one).sqrt()
        size = sum(one[name].float().square().sum() for name in one).sqrt()
        assert gap <= 0.1 * size
