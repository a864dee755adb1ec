"""What bench/mia.py times, each in a process of its own."""

import tempfile
import time
from pathlib import Path

from common.schema import CORE

# passes per attack of the peer: t = text, l = lower-cased text, r = text under the reference model
PASSES = {"loss": "t", "zlib": "t", "lowercase": "tl", "ref": "tr", "surp": "t", "ez": "tr", "wbc": "tr"}
SHARED = {**PASSES, "min_k": "t", "min_k_pp": "t"}
PEER = {**PASSES, **{f"{name}_{k}": "t" for name in ("min_k", "min_k_pp") for k in range(10, 101, 10)}}


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
