"""Compare training throughput and peak memory with trl's SFTTrainer, on mail-length rows.

python bench/train.py                                          # a small random GPT-NeoX
python bench/train.py --peer_python /path/to/venv/bin/python   # trl in a separate virtual environment
python bench/train.py --model ./SmolLM2-135M --rows 64 --runs 1

Three settings on the same rows and model: run_peft.py; SFTTrainer with dynamic padding; SFTTrainer padding every row to
--max_length. Common to all: LoRA r 64 on every linear layer, dropout 0.05, AdamW, linear schedule, float32 on a CPU
(bfloat16 on a GPU), per-device batch 8, 4 accumulation steps, no packing, no gradient checkpointing, one process, same
number of threads. Each measurement is a separate process; the settings alternate, and the median of --runs is reported.
The rate is real tokens (without padding) over the time from the first to the last optimizer step, without loading; CPU
time is given too, for busy machines. Memory is the peak of the whole process (on a GPU: of torch's allocations). The
padded peer only runs on the first --padded_rows rows, because it is slow. Lengths are heavy-tailed like those of mail:
a quoted part of up to 200 tokens, then log-normal text; every text is invented.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import train_work
from bench.inputs import mail_lengths, mail_rows, make_model
from common import cli
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"dynamic": 1.0, "padded": 3.0}
NAMES = {"ours": "run_peft.py", "dynamic": "trl, dynamic padding", "padded": "trl, padded to {}"}


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Time run_peft.py against trl's SFTTrainer on mail-length rows.",
        "python bench/train.py --peer_python ~/venvs/trl/bin/python --rows 128",
    )
    add = parser.add_argument
    add("--model", default=None, help="model directory; None: a random GPT-NeoX of the sizes below")
    add("--hidden_size", type=cli.positive_int, default=128, help="of the random GPT-NeoX")
    add("--layers", type=cli.positive_int, default=4, help="of the random GPT-NeoX")
    add("--vocabulary", type=cli.positive_int, default=4096, help="of the random GPT-NeoX")
    add("--rows", type=cli.positive_int, default=64, help="rows to train on, one epoch")
    add("--padded_rows", type=cli.positive_int, default=32, help="rows for the peer that pads to --max_length")
    add("--median", type=cli.positive_int, default=150, help="median tokens after the quoted part")
    add("--sigma", type=cli.positive_float, default=1.0, help="standard deviation of their logarithm")
    add("--max_length", type=cli.positive_int, default=2048, help="maximum tokens per row")
    add("--per_device_batch_size", type=cli.positive_int, default=8, help="rows per micro-batch")
    add("--gradient_accumulation_steps", type=cli.positive_int, default=4, help="micro-batches per step")
    add("--threads", type=cli.positive_int, default=os.cpu_count(), help="OMP_NUM_THREADS of every process")
    add("--runs", type=cli.positive_int, default=3, help="alternating runs of each setting; the median is reported")
    add("--peer_python", default=sys.executable, help="Python that has trl (default: this one)")
    add("--seed", type=int, default=3407, help="seed of lengths, texts, weights and training")
    add("--worker", choices=("ours", "dynamic", "padded"), default=None, help="one measurement (used by this script)")
    add("--folder", default=None, help="folder with the worker's model and rows")
    return parser


def worker(args) -> int:
    """One measurement; the last line printed is {seconds, processor_seconds, peak_bytes}."""
    folder = Path(args.folder)
    with tempfile.TemporaryDirectory() as out:
        measure = train_work.measure_ours if args.worker == "ours" else train_work.measure_trl
        seconds = measure(args, folder, Path(out))
    from common.results import peak_memory

    peak = peak_memory()
    print(json.dumps(seconds | {"peak_bytes": peak.get("gpu_bytes", peak["cpu_bytes"])}), flush=True)
    return 0


def measure(args, setting: str, folder: Path) -> dict:
    """{seconds, processor_seconds, peak_bytes} of one setting, measured in a separate process."""
    python = sys.executable if setting == "ours" else args.peer_python
    words = [python, __file__, "--worker", setting, "--folder", str(folder), "--seed", str(args.seed)]
    words += ["--max_length", str(args.max_length), "--per_device_batch_size", str(args.per_device_batch_size)]
    words += ["--gradient_accumulation_steps", str(args.gradient_accumulation_steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{setting}: exit {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def count_tokens(args, folder: Path) -> int:
    """Number of tokens both sides train on: with EOS, truncated at --max_length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(folder / "rows.jsonl", encoding="utf-8") as file:
        return sum(min(args.max_length, len(tokenizer(json.loads(line)["text"])["input_ids"]) + 1) for line in file)


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if args.worker:
        return worker(args)
    import shutil

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as work:
        folders = {rows: Path(work) / str(rows) for rows in (args.rows, args.padded_rows)}
        for folder in folders.values():
            folder.mkdir()
        whole, short = folders[args.rows], folders[args.padded_rows]
        if args.model:
            shutil.copytree(args.model, whole, dirs_exist_ok=True)
        else:
            make_model(whole, args.vocabulary, args.hidden_size, args.layers, positions=args.max_length, seed=args.seed)
        lengths = mail_lengths(args.rows, args.median, args.sigma, args.max_length, args.seed)
        rows = mail_rows(AutoTokenizer.from_pretrained(whole), lengths, args.seed)
        if short != whole:
            shutil.copytree(whole, short, dirs_exist_ok=True)
        for folder, part in ((whole, rows), (short, rows[: args.padded_rows])):
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        tokens = {"ours": count_tokens(args, whole), "padded": count_tokens(args, short)}
        tokens["dynamic"] = tokens["ours"]
        print(
            f"{args.rows} rows, {tokens['ours']} tokens (median {statistics.median(lengths):.0f}, longest "
            f"{max(lengths)}); batch {args.per_device_batch_size} × {args.gradient_accumulation_steps}, "
            f"{args.threads} threads",
            flush=True,
        )
        runs = {setting: [] for setting in NAMES}
        for number in range(args.runs):
            for setting in NAMES:
                runs[setting].append(measure(args, setting, short if setting == "padded" else whole))
                rate = tokens[setting] / runs[setting][-1]["seconds"]
                print(f"run {number + 1}: {NAMES[setting].format(args.max_length):24} {rate:8.0f} tokens/s", flush=True)
    report(args, tokens, runs)
    return 0


def report(args, tokens: dict, runs: dict) -> None:
    """Print the medians and the ratios to the peer, one line each."""

    def rate(setting: str, clock: str) -> float:
        return tokens[setting] / statistics.median(run[clock] for run in runs[setting])

    for setting, name in NAMES.items():
        peak = statistics.median(run["peak_bytes"] for run in runs[setting])
        line = (
            f"{name.format(args.max_length):24} {rate(setting, 'seconds'):8.0f} tokens/s  peak {peak / 2**30:.2f} GiB"
        )
        if setting != "ours":
            wall, processor = (rate("ours", clock) / rate(setting, clock) for clock in ("seconds", "processor_seconds"))
            line += f"  ours is {wall:.2f}× (target ≥ {TARGETS[setting]}×); by CPU time {processor:.2f}×"
        print(line)


if __name__ == "__main__":
    sys.exit(entry(main))
