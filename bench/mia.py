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
import tempfile
import time
from pathlib import Path

from common import cli
from common.schema import CORE

MOST_OVERHEAD, LEAST_GAIN, MOST_SECONDS = 1.15, 6.0, 5.0
# passes per attack of the peer: t = text, l = lower-cased text, r = text under the reference model
PASSES = {"loss": "t", "zlib": "t", "lowercase": "tl", "ref": "tr", "surp": "t", "ez": "tr", "wbc": "tr"}
SHARED = {**PASSES, "min_k": "t", "min_k_pp": "t"}
PEER = {**PASSES, **{f"{name}_{k}": "t" for name in ("min_k", "min_k_pp") for k in range(10, 101, 10)}}
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


def invented_texts(n: int, tokens: int, tokenizer) -> list[str]:
    """n texts of fictional people, 0.5 … 1.5 × `tokens` tokens."""
    import random

    from faker import Faker

    fake, rng, texts = Faker("en_US"), random.Random(0), []
    fake.seed_instance(0)
    for _ in range(n):
        ids = tokenizer(f"From: {fake.name()}\n\n{fake.paragraph(tokens // 2)}", verbose=False).input_ids
        texts.append(tokenizer.decode(ids[: rng.randint(tokens // 2, tokens * 3 // 2)]))
    return texts


def timed(work) -> dict:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def work_models(job: dict) -> dict:
    """The measurements that need the model."""
    import torch

    from common import models
    from common.checkpoints import BaseLoader
    from common.distributed import World
    from common.scoring import score
    from mia import forward, signals
    from mia.config import MiaConfig
    from mia.dataset import MembershipTask
    from mia.report import AGAINST_BASE

    torch.set_num_threads(job["threads"])
    base_ref = models.find_model(job["model"])
    tokenizer = models.load_tokenizer(base_ref)
    model = models.load_base(base_ref, torch.float32, "cpu")
    texts = invented_texts(job["texts"], job["tokens"], tokenizer)
    config = MiaConfig(model=job["model"])
    coded = signals.encode(tokenizer, texts, config.max_length)
    score(model, coded.tokens[:2])  # first calls are slower
    sizes = {"n_tokens": sum(map(len, coded.tokens))}

    if job["kind"] in ("bare", "control"):
        rounds = [coded.tokens, coded.lower, coded.tokens] if job["kind"] == "bare" else [coded.lower]

        def work():
            for sequences in rounds:
                score(model, sequences, token_budget=job["token_budget"], statistics=lambda logits, _: logits[:, 0])

        return timed(work) | sizes
    if job["kind"] in ("peer", "shared"):
        attacks = PEER if job["kind"] == "peer" else SHARED
        return timed(lambda: one_pass_an_attack(model, coded, attacks)) | sizes

    from peft import LoraConfig, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        adapter = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear", init_lora_weights=False))
        adapter.save_pretrained(folder)
        model = adapter.unload()
        ref = models.find_model(folder, base_model=job["model"])
        labels = [1] * (len(texts) // 2) + [0] * (len(texts) - len(texts) // 2)
        study = MembershipTask(texts, list(range(len(texts))), labels, list(CORE))
        needed = MembershipTask(
            texts, study.ids, labels, list(AGAINST_BASE)
        )  # the base only needs its own pass over the texts
        loader = BaseLoader(World(), torch.float32)
        loader.base(ref)
        run = forward.Passes(forward.Cache(Path(folder) / "cache"), loader, job["token_budget"])

        def work():
            target = signals.gather(run, ref, tokenizer, study, config, gradients=True)
            base = signals.gather(run, base_ref, tokenizer, needed, config, gradients=False)
            run.close()
            scores, _ = signals.score_texts(study, config, target, base, None)
            assert len(scores) == 27 and all(value is not None for value in scores["ref"])

        return timed(work) | sizes


def one_pass_an_attack(model, coded, attacks: dict[str, str]) -> None:
    """Batch 1; each attack reruns the passes it needs, with a softmax over all logits of which it keeps one value."""
    import torch

    for ids, lower in zip(coded.tokens, coded.lower):
        for attack, which in ((attack, letter) for attack, passes in attacks.items() for letter in passes):
            tokens = torch.tensor([lower if which == "l" else ids])
            with torch.no_grad():
                logits = model(tokens, labels=tokens).logits[0, :-1]
                logs = logits.log_softmax(-1)
            logs.gather(1, tokens[0, 1:, None])
            if attack.startswith(("min_k_pp", "surp")):
                weights = logits.softmax(-1)
                mean = (weights * logs).sum(-1)
                if attack != "surp":
                    ((weights * logs.square()).sum(-1) - mean.square()).sqrt()


def work_bootstrap(job: dict) -> dict:
    import numpy as np

    from mia import metrics

    rng = np.random.default_rng(0)
    scores = [(rng.normal(0.2, 1, 1000), rng.normal(0, 1, 1000)) for _ in range(25)]

    def work():
        draws = metrics.Draws(1000, 0)
        for members, nonmembers in scores:
            metrics.summarize(members, nonmembers, draws)

    return timed(work)


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
        print(json.dumps(work_bootstrap(job) if job["kind"] == "bootstrap" else work_models(job)))
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
    sys.exit(cli.entry(main))
