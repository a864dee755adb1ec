"""Time all core membership attacks against the bare forward passes they need, and against one pass per attack.

python bench/mia.py --model ./SmolLM2-135M                         # 1,000 texts of about 64 tokens
python bench/mia.py --model ./SmolLM2-135M --texts 100 --peer_texts 10

ours       from texts to the scores of loss, zlib, lowercase, ref, min_k × 10, min_k_pp × 10, surp, ez and wbc: tokens,
           hashing the weights, merging a LoRA adapter, three passes, the cache files, the formulas
bare       the same three passes in the same batches, backbone and output head, without using the logits
peer       batch 1 and one pass (or two) per attack that keeps all logits: 31 passes per text for the 27 scores, because
           published tools compute one size of min_k and min_k_pp per run (github.com/computationalprivacy/
           mia_llms_benchmark: `k` in an attack's own entry; github.com/QinbinLi/LLM-PBE: 10 %); runs on --peer_texts
           texts and is extrapolated by tokens
shared     the same, but all ten sizes of min_k, and of min_k_pp, share one pass: 13 passes per text
control    the base's own pass over the lower-cased texts, which only the control column of the table needs
bootstrap  AUC and TPR of 25 attacks × 1,000 resamples × 2,000 texts

Loading the model is not timed. Each measurement is a separate process; reports medians of --runs, wall and CPU time.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bench import mia_work
from common import cli
from common.process import entry

MOST_OVERHEAD, LEAST_GAIN, MOST_SECONDS = 1.15, 6.0, 5.0
KINDS = ("bare", "ours", "peer", "shared", "control", "bootstrap")


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Time all core attacks against bare forward passes and against one pass per attack.",
        "python bench/mia.py --model ./SmolLM2-135M --texts 100 --peer_texts 10",
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--texts", type=cli.positive_int, default=1000, help="texts for ours")
    parser.add_argument("--tokens", type=cli.positive_int, default=64, help="mean tokens per text")
    parser.add_argument("--peer_texts", type=cli.positive_int, default=50, help="texts for the peer")
    parser.add_argument("--token_budget", type=cli.positive_int, default=4096, help="positions per forward pass")
    parser.add_argument("--runs", type=cli.positive_int, default=3, help="alternating runs; the median is reported")
    parser.add_argument("--threads", type=cli.positive_int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--worker", action="store_true", help="(internal) one measurement: JSON in, JSON out")
    return parser


def measure(job: dict) -> dict:
    """Run one measurement in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, __file__, "--model", job["model"], "--worker"]
    done = subprocess.run(words, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{job['kind']}: {result['wall']:.2f} s, CPU {result['processor']:.2f} s", flush=True)
    return result


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if args.worker:
        job = json.load(sys.stdin)
        print(json.dumps(mia_work.work_bootstrap(job) if job["kind"] == "bootstrap" else mia_work.work_models(job)))
        return 0

    job = {"model": args.model, "threads": args.threads, "tokens": args.tokens, "token_budget": args.token_budget}
    measurements: dict[str, list] = {}
    for _ in range(args.runs):
        for kind in KINDS:
            texts = args.peer_texts if kind in ("peer", "shared") else args.texts
            measurements.setdefault(kind, []).append(measure({**job, "kind": kind, "texts": texts}))
    n_tokens, peer_tokens = measurements["ours"][0]["n_tokens"], measurements["peer"][0]["n_tokens"]
    settings = f"{args.texts} texts, {n_tokens} tokens, float32, {args.threads} threads, median of {args.runs}"
    print(f"model {args.model}, {settings}")
    print(f"peer: {args.peer_texts} texts, extrapolated by tokens x{n_tokens / peer_tokens:.1f}")
    for clock in ("wall", "processor"):
        of = {kind: statistics.median(run[clock] for run in runs) for kind, runs in measurements.items()}
        of["peer"] *= n_tokens / peer_tokens
        of["shared"] *= n_tokens / peer_tokens
        print(f"{clock}: " + ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in of.items()))
        print(
            f"{clock}: ours / bare {of['ours'] / of['bare']:.3f} (at most {MOST_OVERHEAD}); peer / ours "
            f"{of['peer'] / of['ours']:.2f} (at least {LEAST_GAIN}), with shared sizes "
            f"{of['shared'] / of['ours']:.2f}; with the control pass ours / bare "
            f"{(of['ours'] + of['control']) / of['bare']:.3f}; bootstrap {of['bootstrap']:.2f} s "
            f"(at most {MOST_SECONDS})"
        )
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # otherwise bench/ shadows the packages fidelity and mia
    sys.exit(entry(main))
