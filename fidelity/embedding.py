"""Embed reviews as vectors."""

import random
import sys

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from common import models, reviews
from common.distributed import progress_bar
from fidelity.comparison import Pools, Sample, Vectors
from fidelity.config import FidelityConfig
from fidelity.embedder import embedder_source
from fidelity.metrics import deal
from fidelity.samples import Row

TOKENS_PER_BATCH = 8192


def longest_first(texts: list[str]) -> list[str]:
    """The distinct texts, longest first, ties sorted, so that every run has the same batches and bitwise results."""
    return sorted(set(texts), key=lambda text: (-len(text), text))


def embed(texts: list[str], config: FidelityConfig, device: str) -> np.ndarray:
    """[n, d] float32 vectors of unit length: the mean of the last hidden states over a text's tokens."""
    name = embedder_source(config)
    dtype = models.resolve_dtype(config.dtype, device)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model = AutoModel.from_pretrained(name, revision=config.revision, dtype=dtype, device_map=config.device_map).eval()
    model = model if config.device_map else model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    distinct = longest_first(texts)
    vectors: dict[str, np.ndarray] = {}
    with torch.no_grad(), progress_bar(len(distinct), "texts embedded") as bar:
        while len(vectors) < len(distinct):
            start = len(vectors)
            tokens = max(16, min(config.max_tokens, len(distinct[start]) // 3))  # rough estimate for the longest text
            batch = distinct[start : start + max(1, TOKENS_PER_BATCH // tokens)]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=config.max_tokens, return_tensors="pt")
            inputs = inputs.to(model.device)
            states = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.update(zip(batch, torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()))
            bar.update(len(batch))
    return np.stack([vectors[text] for text in texts])


def embed_all(
    config: FidelityConfig,
    samples: dict[str, Sample],
    held_out: list[Row],
    train: list[Row] | None,
    groups: np.ndarray,
    device: str,
) -> tuple[Vectors, Pools]:
    """Embed the samples, and the pools for their nearest-neighbour search, in one pass of the encoder.

    The pools have equally many rows. `held_out` begins with the sample 'against', whose rows keep their groups [n].
    """
    size = min(config.pool_rows, len(held_out), len(train or held_out))
    training = random.Random(f"{config.seed} train").sample(train, size) if train else []
    texts = [sample.texts for sample in samples.values()]
    texts += [[reviews.text_of(row) for row in rows] for rows in (held_out[:size], training)]
    flat = embed([text for part in texts for text in part], config, device)
    *own, held_out_vectors, training_vectors = np.split(flat, np.cumsum([len(part) for part in texts[:-1]]))
    pools = {"held-out": (held_out_vectors, np.append(groups, deal(size, config.seed + 1))[:size])}
    if training:
        pools["training"] = training_vectors, deal(size, config.seed + 2)
    return dict(zip(samples, own)), pools
