"""What bench/gpu.py times, one function per --worker."""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.inputs import TEMPERATURES, build_prompts


def device_and_dtype():
    import torch

    return ("cuda:0", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work, runs: int) -> float:
    """Median seconds of `runs` calls after one warm-up call."""
    times = []
    for _ in range(runs + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def load(folder: Path):
    from common import models

    ref = models.find_model(str(folder))
    device, dtype = device_and_dtype()
    return models.load_base(ref, dtype, device), models.load_tokenizer(ref)


def peak_bytes(reset: bool = False) -> int:
    import torch

    from common.results import peak_memory

    peak = peak_memory()
    if reset and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return peak.get("gpu_bytes", peak["cpu_bytes"])


def work_sweep(args) -> dict:
    import torch

    from common import sampling

    model, tokenizer = load(args.folder)
    cells = build_prompts(args.names)
    stop = sampling.stop_tokens(tokenizer, model.config.vocab_size)
    device, tokens = device_and_dtype()[0], 0

    def ours():
        nonlocal tokens
        tokens = 0
        for number, pairs in enumerate(cells):
            prompts = [tokenizer(prompt).input_ids for prompt, _ in pairs]
            targets = [[tokenizer(" " + address).input_ids] for _, address in pairs]
            keys = [(row, number) for row in range(len(pairs))]
            options = {"top_k": 100, "max_tokens": 15, "seed": 0, "stop": stop, "targets": targets}
            answers = sampling.sweep(model, prompts, keys, TEMPERATURES, **options)
            tokens += sum(len(branch) for answer in answers for branch in answer.tokens)

    result = {"seconds": timed(ours, args.runs), "tokens": tokens, "peak_bytes": peak_bytes(reset=True)}
    flat = [prompt for pairs in cells for prompt, _ in pairs]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    ends = stop.nonzero().flatten().tolist()

    def peer(size: int):
        for first in range(0, len(flat), size):
            batch = tokenizer(flat[first : first + size], return_tensors="pt", padding=True).to(device)
            with torch.inference_mode():
                model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    do_sample=True,
                    temperature=1.0,
                    top_k=100,
                    max_new_tokens=15,
                    eos_token_id=ends,
                    pad_token_id=tokenizer.pad_token_id,
                )

    result["peer_seconds"] = {size: timed(lambda size=size: peer(size), 1) for size in args.peer_batches}
    return result | {"peer_peak_bytes": peak_bytes()}


def work_score(args) -> dict:
    import numpy as np
    import torch

    from common import scoring

    model, _ = load(args.folder)
    rng = np.random.default_rng(args.seed)
    texts = [rng.integers(2, 4000, size=512).tolist() for _ in range(args.texts)]
    budget = 16384
    seconds = timed(lambda: scoring.score(model, texts, token_budget=budget), args.runs)
    result = {"seconds": seconds, "tokens": sum(map(len, texts)), "peak_bytes": peak_bytes(reset=True)}
    size = budget // 512

    def bare():
        with torch.no_grad():
            for first in range(0, len(texts), size):
                ids = torch.tensor(texts[first : first + size], device=device_and_dtype()[0])
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").cpu()

    return result | {"peer_seconds": timed(bare, args.runs), "peer_peak_bytes": peak_bytes()}


def make_training(args, out: Path, *flags):
    """run_peft.py's own trainer, set up as by its command line."""
    import run_peft
    from common import distributed, models
    from training.dp_trainer import DPTrainer
    from training.plan import make_plan
    from training.trainer import Trainer

    words = ["-m", args.folder, "-i", args.folder / "rows.jsonl", "--output_root", out, "-e", 1, "-pdbs", 8, "-gas", 4]
    parsed = run_peft.make_parser().parse_args([str(word) for word in [*words, "-lr", "1e-4", *flags]])
    private = "--dp" in flags
    if not private:
        parsed = replace(parsed, seed=args.seed)
    plan, world = make_plan(parsed), distributed.start()
    dtype = models.resolve_dtype("auto", world.device)
    if private:
        return DPTrainer(parsed, plan, world, dtype, bytes(range(32)))
    return Trainer(parsed, plan, world, dtype)


def run_steps(step, total: int, tokens) -> dict:
    """{seconds, tokens, steps} of all steps after the first two. tokens(): number trained on so far."""
    for _ in range(2):
        step()
    synchronize()
    start, before = time.perf_counter(), tokens()
    for _ in range(total - 2):
        step()
    synchronize()
    return {"seconds": time.perf_counter() - start, "tokens": tokens() - before, "steps": total - 2}


def work_run_peft(args) -> dict:
    with tempfile.TemporaryDirectory() as out:
        training = make_training(args, Path(out))
        return run_steps(training.step, training.total, lambda: training.count["tokens"]) | {"peak_bytes": peak_bytes()}


def work_bare(args) -> dict:
    """A plain loop over run_peft.py's micro-batches, padded by its collate function."""
    import torch
    import torch.nn.functional as F

    from training.batches import micro_batches

    with tempfile.TemporaryDirectory() as out:
        training = make_training(args, Path(out))
        plan, model, device = training.plan, training.model, training.world.device
        number = trained = 0

        def step():
            nonlocal number, trained
            number += 1
            members = training.members(number)
            labels = sum(plan.train[index].labels for member in members for index in plan.sequences[member])
            for group, _ in micro_batches(members, training.lengths, 8, 1)[0]:
                batch = training.batch(plan.train, [plan.sequences[member] for member in group])
                targets, keep = batch.pop("targets"), batch.pop("logits_to_keep")
                with torch.autocast(device.split(":")[0], training.dtype, enabled=training.dtype != torch.float32):
                    logits = model(**batch, use_cache=False, logits_to_keep=keep).logits
                (F.cross_entropy(logits.float(), targets, reduction="sum") / labels).backward()
            torch.nn.utils.clip_grad_norm_(training.trainable, 1.0)
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=True)
            trained += sum(training.lengths[member] for member in members)

        return run_steps(step, training.total, lambda: trained) | {"peak_bytes": peak_bytes()}


def work_dp(args) -> dict:
    with tempfile.TemporaryDirectory() as out:
        flags = ["--dp", "--noise_multiplier", "1", "--logical_batch_size", "32"]
        training = make_training(args, Path(out), *flags)
        return run_steps(training.step, training.total, lambda: training.count["tokens"]) | {"peak_bytes": peak_bytes()}


def work_trl(args) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronize()
            times.append(time.perf_counter())

    _, dtype = device_and_dtype()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [json.loads(line) for line in (args.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            learning_rate=1e-4,
            max_length=2048,
            packing=False,
            gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16,
            use_cpu=dtype == torch.float32,
            seed=args.seed,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        lora = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype)
        data = Dataset.from_list(rows)
        SFTTrainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Watch()],
        ).train()
    lengths = [min(2048, len(tokenizer(row["text"]).input_ids) + 1) for row in rows]
    share = (len(times) - 2) / len(times)  # of the rows, drawn at random
    return {
        "seconds": times[-1] - times[1],
        "tokens": sum(lengths) * share,
        "steps": len(times) - 2,
        "peak_bytes": peak_bytes(),
    }
