"""How probable a prompt's target is, as the model has it and as it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Forms = list[list[list[int]]]  # for each prompt, the token sequences that spell its target


def form_sizes(targets: Forms | None) -> list[int]:
    """Lengths of the longest first form, the longest second form, … in tokens."""
    if not targets:
        return []
    most = max(map(len, targets))
    return [max(len(forms[k]) for forms in targets if len(forms) > k) for k in range(most)]


def top_k_with_ties(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, token ids), each [n, ≥ k]: every token whose logit is at least the k-th largest in its row.

    Tokens tied with the k-th are kept, as in `generate`; rows are padded with values of -inf.
    """
    k = width = min(k, logits.shape[-1])
    while True:
        width = min(width + 8, logits.shape[-1])
        values, tokens = logits.topk(width, dim=-1)
        least = values[:, k - 1 : k]
        if width == logits.shape[-1] or not bool((values[:, -1:] >= least).any()):
            return values.masked_fill(values < least, float("-inf")), tokens
        width *= 2


def score_targets(
    predicting: list[list[torch.Tensor]],
    targets: Forms | None,
    temperatures: Sequence[float],
    top_k: int,
    max_tokens: int,
) -> list[tuple[float | None, list[float] | None]] | None:
    """For each row (log of the forms' summed unfiltered probability, divided by the tokens of the likeliest form; [log
    of their probability as sampled at each temperature]), or (None, None) without a form. predicting[row][form]: logits
    [tokens, V]. None without targets."""
    import torch

    if not targets:
        return None
    scored: list[tuple[float | None, list[float] | None]] = []
    for forms, logits_of in zip(targets, predicting):
        pairs = [(form, logits) for form, logits in zip(forms, logits_of) if form]
        if not pairs:
            scored.append((None, None))
            continue
        plain, heated = zip(*(_score_form(*pair, temperatures, top_k, max_tokens) for pair in pairs))
        longest = len(pairs[max(range(len(pairs)), key=lambda k: plain[k])][0])
        mean = torch.tensor(plain, dtype=torch.float64).logsumexp(0).item() / longest
        scored.append((mean, torch.stack(heated).logsumexp(0).tolist()))
    return scored


def _score_form(
    form: list[int], logits: torch.Tensor, temperatures: Sequence[float], top_k: int, max_tokens: int
) -> tuple[float, torch.Tensor]:
    """(unfiltered log probability, log probability as sampled, float64 [temperatures]) of a form's tokens."""
    import torch

    mine = logits.double()
    heat = torch.tensor([t if t > 0 else 1.0 for t in temperatures], dtype=torch.float64, device=mine.device)
    greedy = torch.tensor([t == 0 for t in temperatures], device=mine.device)
    index = torch.tensor(form, device=mine.device)
    picked = mine.gather(-1, index[:, None])[:, 0]
    top, _ = top_k_with_ties(mine, top_k)
    kept = picked >= top[:, min(top_k, mine.shape[-1]) - 1]
    logp = picked / heat[:, None] - (top / heat[:, None, None]).logsumexp(-1)
    logp[greedy] = 0.0
    possible = torch.where(greedy[:, None], mine.argmax(-1) == index, kept).all(-1)
    if len(form) > max_tokens:
        possible[:] = False
    sampled = logp.sum(-1).masked_fill(~possible, float("-inf"))
    return float((picked - mine.logsumexp(-1)).sum()), sampled.cpu()
