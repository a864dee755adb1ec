"""Compare the sweep sampler with transformers' generate (or vLLM) on the same prompts.

python bench/sweep.py --model DIR --names 200 --peer_names 25
python bench/sweep.py --model DIR --engine vllm --peer_python /path/to/vllm-venv/bin/python

Ours: every name × 4 templates × 8 temperatures, including the exact probabilities of the true addresses. Peer
transformers: the same prompts left-padded, one temperature and --peer_names names at each batch size of --peer_batches,
stopping at the same tokens as ours; the best is extrapolated to all temperatures and names (as the output says). Peer
vllm caches prefixes, so it gets all temperatures of --peer_names names in one call and is extrapolated only over names.
Each measurement is a separate process; the median of --runs is printed, with the peak memory of each.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

from bench.inputs import TEMPERATURES, build_prompts
from common import cli
from common.process import entry

TOP_K, MAX_TOKENS = 100, 15


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Time the temperature sweep against transformers' generate or vLLM.",
        "python bench/sweep.py --model ./SmolLM2-135M --names 200 --peer_names 25",
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--names", type=cli.positive_int, default=200, help="names for ours")
    parser.add_argument("--peer_names", type=cli.positive_int, default=25, help="names for the peer; extrapolated")
    parser.add_argument(
        "--peer_batches",
        type=cli.positive_int,
        nargs="+",
        default=[16, 32, 64],
        help="batch sizes for the peer; the best is used",
    )
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="the peer")
    parser.add_argument("--peer_python", default=sys.executable, help="Python that has the peer (default: this one)")
    parser.add_argument("--runs", type=cli.positive_int, default=3, help="runs of each; the median is reported")
    parser.add_argument("--threads", type=cli.positive_int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument(
        "--memory_names",
        type=cli.positive_int,
        nargs="*",
        default=[50],
        help="more numbers of names for ours, to compare memory",
    )
    parser.add_argument("--worker", help="(internal) run one measurement, described in JSON, and print it as JSON")
    return parser


def work_ours(job: dict) -> dict:
    import torch

    from common import models, sampling

    torch.set_num_threads(job["threads"])
    ref = models.find_model(job["model"])
    tokenizer = models.load_tokenizer(ref)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = models.load_base(ref, models.resolve_dtype("auto", device), device)
    stop = sampling.stop_tokens(tokenizer, model.config.vocab_size)
    start, tokens = time.perf_counter(), 0
    for number, cells in enumerate(job["prompts"]):
        answers = sampling.sweep(
            model,
            [tokenizer(prompt).input_ids for prompt, _ in cells],
            [(row, number) for row in range(len(cells))],
            TEMPERATURES,
            top_k=TOP_K,
            max_tokens=MAX_TOKENS,
            seed=0,
            stop=stop,
            targets=[[tokenizer(" " + address, add_special_tokens=False).input_ids] for _, address in cells],
        )
        tokens += sum(len(branch) for answer in answers for branch in answer.tokens)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def work_transformers(job: dict) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(device).eval()
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    stop = [i for i, text in enumerate(texts) if "\n" in text or i == tokenizer.eos_token_id]
    flat = [prompt for cells in job["prompts"] for prompt, _ in cells]
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(flat), job["batch"]):
        batch = tokenizer(flat[first : first + job["batch"]], return_tensors="pt", padding=True).to(device)
        out = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=TOP_K,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens += (out[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum().item()
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def work_vllm(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    engine = LLM(
        job["model"],
        dtype="float32" if job.get("cpu", True) else "bfloat16",
        enable_prefix_caching=True,
        max_model_len=2048,
    )
    flat = [prompt for cells in job["prompts"] for prompt, _ in cells]
    engine.generate(["warm up"], SamplingParams(max_tokens=MAX_TOKENS), use_tqdm=False)
    queries = [(prompt, temperature) for prompt in flat for temperature in TEMPERATURES]
    settings = [
        SamplingParams(temperature=temperature, top_k=TOP_K, max_tokens=MAX_TOKENS, stop=["\n"])
        for _, temperature in queries
    ]
    start = time.perf_counter()
    answers = engine.generate([prompt for prompt, _ in queries], settings, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - start,
        "tokens": sum(len(answer.outputs[0].token_ids) for answer in answers),
    }


def measure(python: str, job: dict) -> dict:
    """Run one measurement in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    words = [python, __file__, "--model", job["model"], "--worker", "-"]
    done = subprocess.run(words, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    # the last line that is JSON: an engine may print more while it shuts down
    result = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    prompts = sum(map(len, job["prompts"]))
    print(f"{job['kind']} batch {job.get('batch', '-')}, {prompts} prompts: {result['seconds']:.1f} s", flush=True)
    return result


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    if args.worker:
        job = json.load(sys.stdin)
        result = {"ours": work_ours, "transformers": work_transformers, "vllm": work_vllm}[job["kind"]](job)
        processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # vLLM's engine is a separate process
        result["peak_mb"] = max(resource.getrusage(process).ru_maxrss for process in processes) // 1024
        print(json.dumps(result))
        return 0

    job = {"model": args.model, "threads": args.threads}
    everyone, few = build_prompts(args.names), build_prompts(args.peer_names)
    ours, peers = [], {batch: [] for batch in (args.peer_batches if args.engine == "transformers" else [0])}
    for _ in range(args.runs):
        ours.append(measure(sys.executable, {**job, "kind": "ours", "prompts": everyone}))
        for batch, measurements in peers.items():
            measurements.append(measure(args.peer_python, {**job, "kind": args.engine, "prompts": few, "batch": batch}))
    mine = statistics.median(run["seconds"] for run in ours)
    best = min(peers, key=lambda batch: statistics.median(run["seconds"] for run in peers[batch]))
    part = statistics.median(run["seconds"] for run in peers[best])
    n_temperatures = 1 if args.engine == "transformers" else len(TEMPERATURES)  # of the peer
    scale = len(TEMPERATURES) / n_temperatures * args.names / args.peer_names
    print(f"model {args.model}, {args.threads} threads, median of {args.runs}")
    print(
        f"ours: {args.names} names x 4 templates x {len(TEMPERATURES)} temperatures in {mine:.1f} s, "
        f"{ours[0]['tokens']} tokens, peak {max(run['peak_mb'] for run in ours)} MB"
    )
    for batch, measurements in peers.items():
        seconds = statistics.median(run["seconds"] for run in measurements)
        print(
            f"{args.engine} batch {batch or 'automatic'}: {args.peer_names} names x 4 templates x {n_temperatures} "
            f"temperatures in {seconds:.1f} s, peak {max(run['peak_mb'] for run in measurements)} MB"
        )
    print(f"{args.engine} at its best, extrapolated x{scale:g} to the same sweep: {part * scale:.1f} s")
    print(f"ratio: {part * scale / mine:.1f}x")
    for names in args.memory_names:
        result = measure(sys.executable, {**job, "kind": "ours", "prompts": build_prompts(names)})
        print(f"ours with {names} names: {result['seconds']:.1f} s, peak {result['peak_mb']} MB")
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
