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
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import gpu_work
from bench.inputs import TEMPERATURES, mail_lengths, mail_rows
from common import cli
from common.process import entry

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


def make_inputs(folder: Path, args) -> int:
    """Write the model, its tokenizer and rows.jsonl to `folder`; return the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

    device, dtype = gpu_work.device_and_dtype()
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
        print(json.dumps(getattr(gpu_work, f"work_{args.worker}")(args)), flush=True)
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
    sys.exit(entry(main))
