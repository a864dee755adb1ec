"""Names that stand in result files, and the files' own names: each has one owner, this one."""

from pathlib import Path

TEMPERATURES = (0.01, 0.1, 0.2, 0.5, 0.75, 1.0, 1.25, 1.5)
GREEDY_BELOW = 0.01  # temperatures up to this one count as greedy in reports
HEADLINE_TEMPERATURE = 0.2
# What two measurements must share to be comparable, and a result file to count as this measurement's.
EXTRACTION_SETTINGS = (
    "dataset_sha256", "rows", "attack", "templates", "trailing_space", "stop", "demonstrations_sha256",
    "top_k", "max_tokens", "seed",
)  # fmt: skip
HEADLINE_ATTACK = "ref"  # of membership inference, at 1 % FPR, fixed in advance
# Counts of a result line of the extraction attack.
MEASURES = ("matches", "exact", "local_part", "domain", "no_pattern")
# Attacks of mia/mia.py: those that need nothing but the model and its base, and all.
CORE = ("loss", "zlib", "lowercase", "ref", "min_k", "min_k_pp", "surp", "ez", "wbc")
FAMILIES = ("loss", "zlib", "lowercase", "ref", "min_k", "min_k_pp", "surp", "recall", "con_recall", "dc_pdd",
            "neighborhood", "grad_norm", "ez", "wbc")  # fmt: skip


def outcomes_path(results_file) -> Path:
    """outcomes_purified<k>.jsonl of a results_purified<k>.jsonl."""
    path = Path(results_file)
    return path.with_name(path.name.replace("results_purified", "outcomes_purified", 1))


def responses_path(results_file) -> Path:
    """results_purified<k>_rows.jsonl of a results_purified<k>.jsonl."""
    path = Path(results_file)
    return path.with_name(path.stem + "_rows.jsonl")


def next_free(folder) -> Path:
    """results_purified.jsonl, or the first results_purified<k>.jsonl that does not exist."""
    path, k = Path(folder) / "results_purified.jsonl", 0
    while path.exists():
        k += 1
        path = Path(folder) / f"results_purified{k}.jsonl"
    return path
