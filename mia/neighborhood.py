"""Neighbours of a text: near-copies with one token replaced, for the neighbourhood attack (Mattern et al. 2023)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common import limits
from common.scoring import plan_batches, score
from mia.attacks import N_NEIGHBOURS

if TYPE_CHECKING:
    import torch

    from common.models import Model

MASKED_TOKENS = 1024  # positions per pass of the masked LM, which computes logits for all of them


def places(n: int, key: object, seed: int) -> list[int]:
    """At most 25 of n positions, drawn without replacement, determined by (seed, repr of key) alone."""
    rng = np.random.default_rng(int(hashlib.sha256(repr((seed, key)).encode()).hexdigest()[:16], 16))
    return sorted(rng.permutation(n)[:N_NEIGHBOURS].tolist())


def deal(n_places: int) -> list[tuple[int, int]]:
    """25 × (place, rank of its proposal): the best proposal at every place, then the second best, …"""
    return [(number % n_places, number // n_places) for number in range(N_NEIGHBOURS)]


def own_neighbours(
    model: Model, sequences: Sequence[Sequence[int]], seed: int, token_budget: int
) -> list[list[list[int]]]:
    """25 neighbours of each sequence: one token (never the first) replaced by another that the model finds likely."""
    most = N_NEIGHBOURS + 1  # one of them may be the original token

    def proposals(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits.topk(min(most, logits.shape[-1]), -1).indices.float()  # exact below 2^24 tokens

    made: list[list[list[int]]] = [[] for _ in sequences]
    for index, _, proposed in score(
        model, sequences, token_budget=token_budget, statistics=proposals, context=max(map(len, sequences))
    ):
        ids = list(sequences[index])
        where = places(len(ids) - 1, ids, seed)
        for place, rank in deal(len(where)):
            position = where[place] + 1
            others = [token for token in proposed[position - 1].astype(np.int64).tolist() if token != ids[position]]
            if rank < len(others):
                made[index].append([*ids[:position], others[rank], *ids[position + 1 :]])
    return made


class MaskedProposer:
    """Neighbours of texts from a masked LM: one token is masked at a time and replaced by another likely one."""

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForMaskedLM.from_pretrained(folder).to(device).eval()
        positions = limits.context_length(self.model)
        self.longest = min(positions - 2, self.tokenizer.model_max_length)  # RoBERTa numbers its positions from 2

    def __call__(self, texts: list[str], seed: int) -> list[list[str]]:
        """At most 25 neighbours of each text."""
        import torch

        encoded = self.tokenizer(
            texts,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=True,
            max_length=self.longest,
            verbose=False,
        )
        jobs = []  # (text, token position, ranks of the proposals to use there)
        for index in range(len(texts)):
            marks = zip(encoded["special_tokens_mask"][index], encoded["offset_mapping"][index])
            spelled = [place for place, (special, (start, end)) in enumerate(marks) if not special and end > start]
            where = [spelled[place] for place in places(len(spelled), texts[index], seed)]
            ranks: list[list[int]] = [[] for _ in where]
            for place, rank in deal(len(where)) if where else ():
                ranks[place].append(rank)
            jobs += [(index, place, wanted) for place, wanted in zip(where, ranks) if wanted]
        made: list[list[str]] = [[] for _ in texts]
        lengths = [len(encoded["input_ids"][index]) for index, *_ in jobs]
        for batch in plan_batches(lengths, MASKED_TOKENS):
            width = max(lengths[job] for job in batch)
            ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, job in enumerate(batch):
                index, place, _ = jobs[job]
                ids[row, : lengths[job]] = torch.tensor(encoded["input_ids"][index])
                ids[row, place] = self.tokenizer.mask_token_id
                mask[row, : lengths[job]] = 1
            with torch.no_grad():
                logits = self.model(ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
            proposed = (
                logits[torch.arange(len(batch)), [jobs[job][1] for job in batch]]
                .topk(min(4 * N_NEIGHBOURS, logits.shape[-1]), -1)
                .indices
            )
            for job, proposals in zip(batch, proposed.tolist()):
                index, place, wanted = jobs[job]
                start, end = encoded["offset_mapping"][index][place]
                words = self._words(proposals, texts[index][start:end])
                made[index] += [
                    texts[index][:start] + words[rank] + texts[index][end:] for rank in wanted if rank < len(words)
                ]
        return made

    def _words(self, tokens: list[int], instead_of: str) -> list[str]:
        """The proposals as text, best first, without special tokens, blanks and the original word."""
        kept = [token for token in tokens if token not in self.tokenizer.all_special_ids]
        words = [str(self.tokenizer.decode([token])).strip().removeprefix("##") for token in kept]
        return list(dict.fromkeys(word for word in words if word and word.lower() != instead_of.strip().lower()))
