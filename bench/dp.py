"""Compare a step of run_peft.py --dp with the same step without --dp and with Opacus hooks.

python bench/dp.py                          # a GPT-NeoX of 30 million parameters, LoRA and DoRA
python bench/dp.py --types lora --runs 5

All use the same --batch rows of --length tokens in one micro-batch, LoRA r 64 on every linear layer, AdamW, dropout
0.05, float32 on a CPU (bfloat16 on a GPU). plain: the gradient of the mean token loss, clipped, one step. dp: every
row drawn (q = 1), per-example gradients, clipping, noise, one step. opacus: GradSampleModule's hooks on the stock peft
model, with the same clipping and noise written out (DoRA raises an error, which is reported). Each measurement is a
separate process, and the variants alternate; the time of a process is the median of its steps after the first, and the
median of --runs is reported. Memory is the peak of the whole process (on a GPU: of torch's allocations).
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

from bench.inputs import make_model
from common import cli
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("plain", "dp", "opacus")
TARGET = 1.15


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Compare time and memory of a DP step with a plain one.", "python bench/dp.py --types lora dora"
    )
    add = parser.add_argument
    add("--types", nargs="+", choices=("lora", "dora", "pissa"), default=["lora", "dora"], help="adapter types")
    add("--hidden_size", type=cli.positive_int, default=384, help="of the random GPT-NeoX")
    add("--layers", type=cli.positive_int, default=6, help="of the random GPT-NeoX")
    add("--vocabulary", type=cli.positive_int, default=25_000, help="of the random GPT-NeoX")
    add("--batch", type=cli.positive_int, default=16, help="rows per step")
    add("--length", type=cli.positive_int, default=128, help="tokens per row")
    add("--steps", type=cli.positive_int, default=8, help="timed steps per process, after one warm-up step")
    add("--threads", type=cli.positive_int, default=os.cpu_count(), help="OMP_NUM_THREADS of every process")
    add("--runs", type=cli.positive_int, default=3, help="processes per variant, alternating; the median is reported")
    add("--seed", type=int, default=3407, help="seed of weights and texts")
    add("--worker", choices=WAYS, default=None, help="one measurement (used by this script)")
    add("--folder", default=None, help="folder with the worker's model and rows")
    return parser


def make_inputs(folder: Path, args) -> int:
    """Write a random GPT-NeoX and rows of exactly --length tokens (with EOS); return the number of parameters."""
    import numpy as np

    size = make_model(folder, args.vocabulary, args.hidden_size, args.layers, positions=args.length, seed=args.seed)
    drawn = np.random.default_rng(args.seed).integers(2, args.vocabulary, size=(args.batch, args.length - 1))
    rows = [{"text": " ".join(f"w{word}" for word in row)} for row in drawn]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return size


def make_training(args, folder: Path, out: Path):
    """run_peft.py's own trainer on the rows, set up as by its command line."""
    import run_peft
    from common import distributed, models
    from training.dp_trainer import DPTrainer
    from training.plan import make_plan
    from training.trainer import Trainer

    words = ["-m", str(folder), "-i", str(folder / "rows.jsonl"), "--output_root", str(out), "-pt", args.types[0]]
    words += ["-pdbs", str(args.batch), "-gas", "1", "-e", str(args.steps + 1), "-lr", "1e-4"]
    if args.worker == "dp":
        words += ["--dp", "--noise_multiplier", "1", "--logical_batch_size", str(args.batch)]
    parsed = run_peft.make_parser().parse_args(words)
    if args.worker != "dp":
        parsed = replace(parsed, seed=args.seed)
    plan, world = make_plan(parsed), distributed.start()
    dtype = models.resolve_dtype("auto", world.device)
    if args.worker == "dp":
        return DPTrainer(parsed, plan, world, dtype, bytes(range(32)))
    return Trainer(parsed, plan, world, dtype)


def opacus_step(training, rows: int):
    """A step with Opacus' per-sample gradients on the same model, rows, loss, clipping, noise and optimizer."""
    import torch
    import torch.nn.functional as F
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(training.model, loss_reduction="sum")

    def step():
        batch = training.batch(training.plan.train, [[row] for row in range(rows)])
        with training.autocast():
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.float().transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        nll.mean(1).sum().backward()
        squares = sum(item.grad_sample.flatten(1).square().sum(1) for item in training.trainable)
        factor = (1.0 / squares.sqrt()).clamp(max=1.0)
        for item in training.trainable:
            total = torch.einsum("n,n...->...", factor, item.grad_sample)
            item.grad = (total + torch.randn_like(total)) / rows
            item.grad_sample = None
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    return step


def worker(args) -> int:
    """One measurement; the last line printed is {seconds, peak_bytes}."""
    import torch

    from common.results import peak_memory

    with tempfile.TemporaryDirectory() as out:
        training = make_training(args, Path(args.folder), Path(out))
        step = opacus_step(training, args.batch) if args.worker == "opacus" else training.step
        times = []
        for _ in range(args.steps + 1):
            begun = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    peak = peak_memory()
    result = {"seconds": statistics.median(times[1:]), "peak_bytes": peak.get("gpu_bytes", peak["cpu_bytes"])}
    print(json.dumps(result), flush=True)
    return 0


def measure(args, way: str, kind: str, folder: Path) -> dict | str:
    """{seconds, peak_bytes} of one process, or the last line of its error."""
    words = [sys.executable, __file__, "--worker", way, "--folder", str(folder), "--types", kind]
    words += [f"--{name}={getattr(args, name)}" for name in ("batch", "steps", "seed")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if args.worker:
        return worker(args)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        size = make_inputs(folder, args)
        print(
            f"GPT-NeoX of {size / 1e6:.1f} M parameters, batch {args.batch} × {args.length}, {args.threads} threads",
            flush=True,
        )
        for kind in args.types:
            runs = {way: [] for way in WAYS}
            for _ in range(args.runs):
                for way, measurements in runs.items():
                    measurements.append(measure(args, way, kind, folder))
            report(kind, runs)
    return 0


def report(kind: str, runs: dict) -> None:
    """Print the medians and the ratios to the plain step, one line each. RuntimeError if plain or dp failed."""
    base = None
    for way, measurements in runs.items():
        failed = [error for error in measurements if isinstance(error, str)]
        if failed and way != "opacus":
            raise RuntimeError(f"{kind}, {way}: {failed[0]}")
        if failed:
            print(f"{kind:6} {way:7} failed: {failed[0]}", flush=True)
            continue
        seconds, peak = (statistics.median(run[key] for run in measurements) for key in ("seconds", "peak_bytes"))
        base = base or (seconds, peak)
        line = f"{kind:6} {way:7} {seconds:7.3f} s per step, peak {peak / 2**20:6.0f} MiB"
        if way != "plain":
            line += f"   {seconds / base[0]:.2f}× the time, {peak / base[1]:.2f}× the memory of plain"
        print(line + (f" (target ≤ {TARGET}×)" if way == "dp" else ""), flush=True)


if __name__ == "__main__":
    sys.exit(entry(main))
