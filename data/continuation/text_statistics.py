"""Statistics of generated rows: length, repetition, and the addresses that occur in them. Pure functions."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from common.text import emails

SHINGLE = 8  # words
JACCARD = 0.5  # two generations with at least this similarity are near-duplicates
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def shingles(text: str) -> frozenset[int]:
    """Hashes of the 8-word runs of a text, ignoring case and white space; of the whole text if it is shorter."""
    words = text.casefold().split()
    return frozenset(
        hash(tuple(words[start : start + SHINGLE])) for start in range(max(1, len(words) - SHINGLE + 1))
    )  # hash() of strings differs between processes, but they are only compared within this one


def near_duplicates(texts: list[str], threshold: float = JACCARD) -> tuple[int, int]:
    """(texts equal to an earlier one, other near-duplicates of an earlier one), ignoring case and white space.

    Near-duplicate: Jaccard similarity of the sets of 8-word runs ≥ threshold. The count is exact, not sampled: two such
    sets share one of their rarest |A| − ⌈t·|A|⌉ + 1 members (prefix filter, Chaudhuri et al. 2006), so only pairs
    that share one are compared.
    """
    distinct = list({" ".join(text.casefold().split()): text for text in texts}.values())
    sets = [shingles(text) for text in distinct]
    frequency = Counter(shingle for members in sets for shingle in members)
    holders: dict[int, list[int]] = defaultdict(list)  # rare shingle → earlier texts
    near = 0
    for index, members in enumerate(sets):
        rare = sorted(members, key=lambda shingle: (frequency[shingle], shingle))
        rare = rare[: len(members) - math.ceil(threshold * len(members)) + 1]
        candidates = {earlier for shingle in rare for earlier in holders[shingle]}
        near += any(len(members & sets[other]) >= threshold * len(members | sets[other]) for other in candidates)
        for shingle in rare:
            holders[shingle].append(index)
    return len(texts) - len(distinct), near


def address_counts(texts: Iterable[str], wanted: set[str]) -> dict[str, int]:
    """Occurrences of the `wanted` addresses (case-folded) in the texts: distinct addresses, texts, occurrences."""
    distinct, n_texts, occurrences = set(), 0, 0
    for text in texts:
        addresses = [address.lstrip("'.").casefold() for address in emails(text)]
        addresses = [address for address in addresses if address in wanted]
        distinct.update(addresses)
        n_texts += bool(addresses)
        occurrences += len(addresses)
    return {"addresses": len(distinct), "rows": n_texts, "occurrences": occurrences}


def statistics(generated: list[dict[str, Any]], head: list[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of the rows of the output file; head: the rows of the evaluation head."""
    import numpy as np

    texts = [row["generation"] for row in generated]
    own = [address_counts([row["generation"]], {row["gt-email"].casefold()}) for row in generated]
    evaluated = {row["gt-email"].casefold() for row in head}
    tokens = [row["generated_tokens"] for row in generated]
    equal, near = near_duplicates(texts)
    return {
        "rows": len(generated),
        "truncated": sum(row["finish_reason"] == "length" for row in generated),
        "empty": sum(not text.strip() for text in texts),
        "tokens": {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(tokens, QUANTILES))},
        "tokens_total": sum(tokens),
        "equal_to_an_earlier": equal,
        "near_duplicate_of_an_earlier": near,
        "near_duplicate_measure": f"Jaccard of {SHINGLE}-word runs >= {JACCARD}, case and white space aside",
        "evaluated_addresses": len(evaluated),
        "evaluated_in_generations": address_counts(texts, evaluated),
        "evaluated_in_prompts": address_counts((row["prompt"] for row in generated), evaluated),
        "own_in_generations": {key: sum(count[key] for count in own) for key in ("rows", "occurrences")},
        "own_at_the_start": sum(
            row["generation"].lstrip().casefold().startswith(row["gt-email"].casefold()) for row in generated
        ),
    }


def report(numbers: dict[str, Any]) -> str:
    """The statistics as text, one per line."""
    evaluated, n = numbers["evaluated_addresses"], numbers["rows"]
    lines = [
        (numbers["truncated"], f"generations cut off before their end ({numbers['truncated'] / n:.1%})"),
        (numbers["empty"], "empty generations"),
        (numbers["equal_to_an_earlier"], "generations equal to an earlier one, ignoring case and white space"),
        (
            numbers["near_duplicate_of_an_earlier"],
            f"other near-duplicates of an earlier one (Jaccard of {SHINGLE}-word runs ≥ {JACCARD})",
        ),
    ]
    for where in ("generations", "prompts"):
        count = numbers[f"evaluated_in_{where}"]
        times = f"{count['occurrences']:,} times in {count['rows']:,} rows"
        lines.append((count["addresses"], f"of {evaluated:,} evaluated addresses occur in the {where} ({times})"))
    own = numbers["own_in_generations"]
    times = f"{own['occurrences']:,} times; {numbers['own_at_the_start']:,} at the very start"
    lines.append((own["rows"], f"rows whose own address was generated ({times})"))
    quantiles = ", ".join(f"{float(q):.0%} {value:.0f}" for q, value in numbers["tokens"].items())
    return "\n".join([f"{number:>9,}  {words}" for number, words in lines] + [f"tokens per generation: {quantiles}"])
