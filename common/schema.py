"""Single source for names used in result files, and for the names of the files."""

import re
from pathlib import Path

from common.problems import AnyPath

TEMPERATURES = (0.01, 0.1, 0.2, 0.5, 0.75, 1.0, 1.25, 1.5)
GREEDY_BELOW = 0.01  # temperatures up to this one count as greedy in reports
HEADLINE_TEMPERATURE = 0.2
# Settings that must match for two measurements to be comparable, or for a result file to belong to a measurement.
EXTRACTION_SETTINGS = (
    "dataset_sha256", "rows", "attack", "templates", "trailing_space", "stop", "demonstrations_sha256",
    "top_k", "max_tokens", "seed", "chat",
)  # fmt: skip
HEADLINE_ATTACK = "ref"  # of membership inference, at 1 % FPR, fixed in advance
# Counts in a result line of the extraction attack.
MEASURES = ("matches", "exact", "local_part", "domain", "no_pattern")
# Attacks of mia/mia.py: those that need nothing but the model and its base, and all.
CORE = ("loss", "zlib", "lowercase", "ref", "min_k", "min_k_pp", "surp", "ez", "wbc")
FAMILIES = ("loss", "zlib", "lowercase", "ref", "min_k", "min_k_pp", "surp", "recall", "con_recall", "dc_pdd",
            "neighborhood", "grad_norm", "ez", "wbc")  # fmt: skip
# Those that --shadows adds; the score of the first that has one is in risk_mia.jsonl.
SHADOW_ATTACKS = ("lira", "lira_offline", "rmia")
# Result files by the kind of content that a report reads.
KINDS = {
    "audit": re.compile(r"audit\.json$"),
    "extraction": re.compile(r"results_purified\d*\.?jsonl$"),  # the released tool writes results_purified1jsonl too
    "perplexity": re.compile(r"perplexity\.jsonl$"),
    "perplexity_text": re.compile(r"perplexity\.txt$"),
    "mia": re.compile(r"results_mia\.jsonl$"),
    "canary": re.compile(r"results_(canary|auxiliary)\.jsonl$"),
    "fidelity": re.compile(r"results_fidelity\.json$"),
    "utility": re.compile(r"results_utility\.jsonl$"),
    "sweep": re.compile(r"results_sweep\.jsonl$"),
    "importance": re.compile(r"feature_importance\.json$"),
    "human": re.compile(r"human_evaluation\.json$"),
    "summary": re.compile(r"summary\.json$"),
    "run": re.compile(r"run(_(?!plot_results)\w+)?\.json$"),
    "metrics": re.compile(r"metrics\.jsonl$"),
    "privacy": re.compile(r"privacy\.json$"),
    "adapter": re.compile(r"adapter_config\.json$"),
    "responses": re.compile(r"results_purified\d*_rows\.jsonl$"),
}


def outcomes_path(results_file: AnyPath) -> Path:
    """outcomes_purified<k>.jsonl of a results_purified<k>.jsonl."""
    path = Path(results_file)
    return path.with_name(path.name.replace("results_purified", "outcomes_purified", 1))


def responses_path(results_file: AnyPath) -> Path:
    """results_purified<k>_rows.jsonl of a results_purified<k>.jsonl."""
    path = Path(results_file)
    return path.with_name(path.stem + "_rows.jsonl")


def next_free(folder: AnyPath) -> Path:
    """results_purified.jsonl, or the first results_purified<k>.jsonl that does not exist."""
    path, k = Path(folder) / "results_purified.jsonl", 0
    while path.exists():
        k += 1
        path = Path(folder) / f"results_purified{k}.jsonl"
    return path


# Every output file: (written by, content). docs/outputs.md is generated from it.
OUTPUTS = {
    "adapter_config.json, adapter_model.safetensors": ("run_peft.py", "a PEFT adapter for the original base"),
    "metrics.jsonl": ("run_peft.py", "one line per --logging_steps, and one per held-out loss"),
    "run.json": (
        "run_peft.py",
        "configuration, versions, inputs, status, `trained` and `privacy` blocks; `relative_change`: ‖ΔW‖/‖W‖ over the "
        "adapted matrices, or all of a full model's (a line in `notes` if it is below 1e-4)",
    ),
    "trained_rows.jsonl": ("run_peft.py", "one line per training row: hash, tokens, tokens that entered the loss"),
    "privacy.json": ("run_peft.py --dp", "the ε spent up to this checkpoint"),
    "run_merge_peft.json": ("merge_peft.py", "the merged adapter and base, ‖ΔW‖/‖W‖"),
    "results_purified.jsonl": ("measure_purified.py, evaluate_purified.py", "one line per temperature"),
    "outcomes_purified.jsonl": ("the same scripts", "one line per row × template × temperature, no text"),
    "results_purified_rows.jsonl": ("the same scripts with --save_responses", "every answer (mode 0600)"),
    "perplexity.jsonl": ("perplexity/perplexity.py", "one line per model"),
    "results_mia.jsonl": ("mia/mia.py", "one line per attack"),
    "scores_mia.jsonl": ("mia/mia.py", "one line per text with all its scores"),
    "risk_mia.jsonl": ("mia/mia.py --shadows", "one line per row, most at risk first: its calibrated score and rank"),
    "pool.jsonl": ("mia/shadow.py", "the shadows' training settings, then one line per row of the pool; no text"),
    "run_shadow.json": ("mia/shadow.py", "configuration, inputs, status, and each shadow's rows and cost"),
    "run_mia.json": ("mia/mia.py", "configuration, dataset inference, near-duplicates"),
    "audit.json": ("audit.py", "the verdict and every number behind it (docs/audit.md); `schema` 1"),
    "audit.md": ("audit.py", "the verdict in words, one line per question"),
    "results_secrets.jsonl": ("audit.py", "one line per secret: row, rank among decoys, greedy hit; no text"),
    "secrets_private.jsonl": ("audit.py --save_responses", "the same with the secrets (mode 0600)"),
    "run_audit.json": ("audit.py", "configuration, versions, inputs, status"),
    "results_canary.jsonl": (
        "canary/measure.py",
        "one line per arm and measure: exposure, counts, bounds on ε (docs/differential-privacy.md)",
    ),
    "results_canary_rows.jsonl": ("canary/measure.py", "one line per canary and arm (mode 0600)"),
    "results_auxiliary.jsonl": (
        "canary/auxiliary.py",
        "one line per arm and signal: bounds on ε from generated rows alone (docs/differential-privacy.md)",
    ),
    "results_auxiliary_rows.jsonl": ("canary/auxiliary.py", "one line per canary and arm, no text (mode 0600)"),
    "run_auxiliary.json": ("canary/auxiliary.py", "configuration, versions, inputs, status"),
    "results_fidelity.json": ("fidelity/fidelity.py", "metrics of each arm with their intervals"),
    "results_utility.jsonl": ("utility/downstream.py", "one line per arm and seed"),
    "results_utility_rows.jsonl": ("utility/downstream.py", "true and predicted rating of every row, no text"),
    "results_sweep.jsonl": ("studies/sweep.py", "one line per finished cell, and one per setting: means over seeds"),
    "feature_importance.json": ("utility/feature_importance.py", "agreement of word importances"),
    "human_evaluation.json": ("utility/human_sheet.py score", "scores from the raters' sheets"),
    "results.csv": ("plot_results.py", "every number in the report, one per line"),
}
EXIT_STATUSES = {
    0: "done, or already finished",
    1: "a checkpoint failed, a leak was found, a bound was violated, or a bug (traceback)",
    2: "problems with arguments or files, or a full disk: one line each, nothing was measured",
    3: "audit.py: a condition of --fail_on holds, or its number could not be measured",
    130: "Ctrl-C",
    143: "SIGTERM: the state is saved where the script can resume",
}
