"""Summary of the generated rows: near-copies, the privacy budget spent, and the printed report."""

import math
from typing import Any

from common.text import copied_lengths
from data.synthetic.config import SyntheticConfig

COPY = 50  # characters: a common run of this length is a near-copy

Summary = dict[str, Any]


def near_copies(texts: list[str], training: list[str], held_out: list[str]) -> Summary:
    """Shares of texts with a run of COPY characters from --training or --input; None without training rows.

    `held_out_in_training` is the floor: what the real reviews of --input, written by others, share with --training.
    """

    def share(of: list[str], source: list[str]) -> float | None:
        return float((copied_lengths(of, source, (COPY,)) >= COPY).mean()) if of and source else None

    return {
        "characters": COPY,
        "training": share(texts, training),
        "held_out": share(texts, held_out),
        "held_out_in_training": share(held_out, training),
    }


def privacy_block(model: dict[str, Any] | None, released: dict[str, Any] | None) -> Summary:
    """The manifest's `privacy`: what the model spent, what the metadata spent, and their sum (basic composition).

    epsilon is None where the model's training, and hence the whole, has no bound; δ is None if it states none.
    """
    spent = model or {}
    epsilon, delta = spent.get("epsilon"), spent.get("delta")
    more = released or {"epsilon": 0.0, "delta": 0.0}
    return {
        "private": bool(spent.get("private")),
        "epsilon": None if epsilon is None else math.fsum((epsilon, more["epsilon"])),
        "delta": None if delta is None else math.fsum((delta, more["delta"])),
        "unit": (model or released or {}).get("unit"),
        "void": spent.get("void"),
        "composition": "basic: sum over model and metadata",
        "model": model and {key: model.get(key) for key in ("private", "epsilon", "delta", "unit", "void")},
        "metadata": released and {key: value for key, value in released.items() if key not in ("cells", "training")},
        "outside_epsilon": "counts of near-copies and, unless sampled, the metadata of the rows of --input",
    }


def report(config: SyntheticConfig, summary: Summary) -> None:
    """Print what was written, left out and copied, and what privacy it cost."""
    print(f"{summary['n_scored']:>9,}  reviews of arm {config.arm}")
    left_out = summary["dropped"] | {f"--filter {name}": count for name, count in summary["filtered"].items()}
    for reason, count in left_out.items():
        print(f"{count:>9,}  left out: {reason}")
    print(f"{summary['ended']:>9,}  ended by themselves, {summary['empty']:,} empty")
    copies = summary["near_copies"]
    words = {"training": "training rows", "held_out": "rows of --input", "held_out_in_training": "(real, floor)"}
    for key, name in words.items():
        if copies[key] is not None:
            print(f"{copies[key]:>9.2%}  share a run of {COPY} characters with {name}")
    spent = summary["privacy"]
    if spent["epsilon"] is None:
        print("          privacy: none, the model was trained without DP")
    else:
        note = "" if spent["private"] else " (void: see the model's privacy.json)"
        print(f"          privacy: ε {spent['epsilon']:.3f} at δ {spent['delta']:.3g}, unit {spent['unit']}{note}")
    print(f"rows are in {config.output_file}")
