"""Benchmark the toolkit on one GPU in a few minutes: sweep, scoring, training, a DP step.

python bench/gpu.py                                          # a random GPT-NeoX of Pythia-1.4b's shape, no download
python bench/gpu.py --layers 6 --hidden_size 768 --runs 1    # a smaller one
python bench/gpu.py --peer_python /path/to/venv/bin/python   # trl in a separate environment; without trl, no such row

The weights are random: losses and answers are meaningless, but sizes, kernels and memory are those of the real model.
Everything runs in bfloat16 on a GPU, float32 on a CPU.
sweep   names × 4 templates × 8 temperatures, against transformers' generate on the same prompts at one temperature and
        the best of two batch sizes, extrapolated to all eight
score   texts of 512 tokens through common/scoring.py, against forward passes of the same batches that keep all logits
train   run_peft.py, LoRA r 64, mail-length rows, batch 8 × 4: against a bare PyTorch loop over the same batches, and
        against trl's SFTTrainer with dynamic padding
dp      a step of run_peft.py --dp on the same rows, against its plain step
Each is a separate process and reports the median of --runs after a warm-up run (training: all steps after the second).
Peak memory is that allocated by torch. `of peak`: 2 operations per weight and token forward and 2 backward (frozen
weights need no gradients of their own), divided by --peak_tflops.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.inputs import TEMPERATURES, build_prompts, mail_lengths, mail_rows
from common import cli

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ("sweep", "score", "run_peft", "bare", "trl", "dp")
TOKENIZER = ROOT / "data" / "embedded" / "mini-pythia"


def make_parser() -> cli.Parser:
    parser = cli.Parser("Time the toolkit on this machine's GPU.", "python bench/gpu.py --runs 3")
    add = parser.add_argument
    add("--hidden_size", type=cli.positive_int, default=2048, help="of the random GPT-NeoX")
    add("--layers", type=cli.positive_int, default=24, help="of the random GPT-NeoX")
    add("--vocabulary", type=cli.positive_int, default=50304, help="of the random GPT-NeoX")
    add("--names", type=cli.positive_int, default=200, help="names in the sweep")
    add("--peer_batches", type=cli.positive_int, nargs="+", default=[64, 256], help="batch sizes of generate")
    add("--texts", type=cli.positive_int, default=256, help="texts to score")
    add("--rows", type=cli.positive_int, default=640, help="rows to train on, one epoch")
    add("--runs", type=cli.positive_int, default=3, help="timed repetitions of sweep and score")
    add("--only", nargs="+", choices=WORKERS, default=list(WORKERS), help="what to run")
    add("--peak_tflops", type=cli.positive_float, default=989.0, help="the card's dense bf16 peak (H100, H200: 989)")
    add("--peer_python", default=sys.executable, help="Python that has trl (default: this one)")
    add("--seed", type=int, default=0, help="seed of weights and texts")
    add("--worker", choices=WORKERS, default=None, help="one measurement (used by this script)")
    add("--folder", type=Path, default=None, help="folder with the worker's model and rows")
    return parser


def device_and_dtype():
    import torch

    return ("cuda:0", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def make_inputs(folder: Path, args) -> int:
    """Write the model, its tokenizer and rows.jsonl to `folder`; return the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

    device, dtype = device_and_dtype()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden_size // 128),
        rotary_pct=0.25,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    rows = mail_rows(tokenizer, mail_lengths(args.rows, 150, 1.0, 2048, args.seed), args.seed)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sum(item.numel() for item in model.parameters())


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


def measure(args, name: str, folder: Path) -> dict | None:
    """The worker's result; if it failed, prints the reason and returns None."""
    words = [sys.executable if name != "trl" else args.peer_python, __file__, "--worker", name, "--folder", str(folder)]
    for flag in ("hidden_size", "layers", "vocabulary", "names", "texts", "rows", "runs", "seed"):
        words += [f"--{flag}", str(getattr(args, flag))]
    words += ["--peer_batches", *map(str, args.peer_batches)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        print(f"{name}: no result ({(done.stderr.strip().splitlines() or ['no message'])[-1]})", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if args.worker:
        print(json.dumps(globals()[f"work_{args.worker}"](args)), flush=True)
        return 0
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as work:
        size = make_inputs(Path(work), args)
        print(f"{card}; torch {torch.__version__}; random GPT-NeoX of {size / 1e9:.2f} B parameters", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        results = {}
        for name in args.only:
            results[name] = measure(args, name, Path(work))
            report(args, name, results, size)
    return 0


def report(args, name: str, results: dict, size: int) -> None:
    """Print one line with a worker's result and its ratio to the alternative."""
    result = results[name]
    if result is None:
        return
    rate, memory = result["tokens"] / result["seconds"], result["peak_bytes"] / 2**30
    line = f"{name:8} {result['seconds']:7.2f} s  {rate:9.0f} tokens/s  peak {memory:5.1f} GiB"
    if name == "sweep":
        best = min(result["peer_seconds"], key=result["peer_seconds"].get)
        peer = result["peer_seconds"][best] * len(TEMPERATURES)
        line += f"  {args.names} names × 4 × {len(TEMPERATURES)}; generate at batch {best}, × {len(TEMPERATURES)}: "
        line += f"{peer:.2f} s, peak {result['peer_peak_bytes'] / 2**30:.1f} GiB; "
        line += f"{peer / result['seconds']:.1f}× as fast"
    elif name == "score":
        share = rate * 2 * size / args.peak_tflops / 1e12
        line += f"  {share:.0%} of peak; bare passes {result['peer_seconds']:.2f} s, "
        line += f"peak {result['peer_peak_bytes'] / 2**30:.1f} GiB; "
        line += f"ours takes {result['seconds'] / result['peer_seconds']:.2f}×"
    else:
        share = rate * 4 * size / args.peak_tflops / 1e12
        line += f"  {share:.0%} of peak, {result['seconds'] / result['steps']:.3f} s per step"
        ours = results.get("run_peft")
        if ours and name != "run_peft":
            times, memories = ours["seconds"] / ours["tokens"] * rate, ours["peak_bytes"] / result["peak_bytes"]
            if name == "dp":
                line += f"; {1 / times:.2f}× the plain step's time per token, {1 / memories:.2f}× its memory"
            else:
                line += f"; run_peft.py takes {times:.2f}× its time per token, {memories:.2f}× its memory"
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(cli.entry(main))
