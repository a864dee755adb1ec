"""What DP-SGD costs and prevents: ε against perplexity, extraction and membership inference. See quickstart.py.

All arms have the same sampling rate, steps, learning rate and schedule; the first has neither noise nor clipping.
The attack queries two groups of people: those in the training rows, whom ε protects, and those in the evaluation head,
whom only the base saw. The private arms use the operating system's randomness, so two runs differ slightly.
"""

from dataclasses import replace
from math import hypot
from pathlib import Path
from statistics import fmean, stdev

from common import dataset, formats, manifests, models, provenance, publication, results
from common.checkpoints import find_checkpoints
from common.problems import AnyPath, Problems
from extraction.config import AttackConfig
from mia.config import MiaConfig
from perplexity.config import PerplexityConfig
from studies.config import StudyConfig
from studies.steps import (
    TEMPERATURE,
    Record,
    attack,
    check_rows,
    device_of,
    infer_membership,
    measure_perplexity,
    measured,
    row_of,
    share,
    table,
    train,
    with_dp,
)
from training.config import TrainConfig

EPOCHS = 10
RATE = 1e-3
EPSILONS = (8, 1)
LOGICAL_BATCH = 256
RANK = 8  # a small adapter: the noise norm grows with the square root of the number of parameters


def check(config: StudyConfig) -> None:
    """Raise a UserError that lists every problem with the study's inputs."""
    problems = Problems()
    check_rows(config, problems)
    problems.check()


def inputs(config: StudyConfig) -> list[str]:
    return [config.dataset]


def run(config: StudyConfig, out: Path, record: results.Run) -> str:
    """Run all arms; return the text of summary.md."""
    trained_people = put_trained_first(config.dataset, out / "trained_people.jsonl")
    plain = TrainConfig(
        model=config.model,
        input=config.dataset,
        output_root=str(out),
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        per_device_batch_size=2 * config.per_device_batch_size,
        lora_r=config.lora_r,
        logging_steps=10,
        **device_of(config),
    )
    batch = max(1, min(LOGICAL_BATCH, len(formats.read_rows(config.dataset)) // 4))
    arms = {"no noise, no clipping": None} | {f"ε = {epsilon}": float(epsilon) for epsilon in EPSILONS}
    folders = []
    rows = [row_for("base", config.model, None, out / "base", config, trained_people)]
    for name, epsilon in arms.items():
        tree = train(with_dp(plain, epsilon, batch))
        checkpoint = find_checkpoints(tree)[-1]
        spent = provenance.privacy(models.find_model(str(checkpoint)))
        folders.append(tree / "measured")
        rows.append(row_for(name, checkpoint, spent, folders[-1], config, trained_people))
    changes = {row["model"]: change(out / "base", folder) for row, folder in zip(rows[1:], folders)}
    publication.write_json(out / "summary.json", {"temperature": TEMPERATURE, "rows": rows, "against_base": changes})
    record["epsilons"] = [row["epsilon"] for row in rows]
    heads = [
        "",
        "ε (δ)",
        "steps",
        "perplexity",
        "exact, trained people",
        "exact, others",
        "MIA AUC (ref)",
        "MIA AUC (loss)",
    ]
    lines = []
    for row in rows:
        privacy = (
            ""
            if row["steps"] is None
            else "∞"
            if row["epsilon"] is None
            else f"{row['epsilon']:.2f} ({row['delta']:g})"
        )
        aucs = ["{auc:.3f} ({ci[0]:.3f}–{ci[1]:.3f})".format(**row[key]) if row[key] else "" for key in ("ref", "loss")]
        line = [row["model"], privacy if row["steps"] else "", row["steps"] or "", f"{row['perplexity']:.3f}"]
        lines.append([*line, row["trained"], row["others"], *aucs])
    return "\n".join(
        [
            "ε from the PRV accountant (unit record, add/remove adjacency); perplexity on the evaluation head; exact "
            f"addresses at temperature {TEMPERATURE} over four prompts; AUC of membership inference, training rows "
            "against the head (95 % intervals).",
            "",
            table(heads, lines),
            "",
            "Change of the exact-address rate from the base, paired over people and prompts, in percentage points "
            "(95 %), and the difference between trained people and others.",
            "",
            table(
                ["", *next(iter(changes.values()))],
                [
                    [name, *("{points:+.1f} ({low:+.1f} … {high:+.1f})".format(**part) for part in parts.values())]
                    for name, parts in changes.items()
                ],
            ),
        ]
    )


def put_trained_first(data: str, file: Path) -> Path:
    """Write the data with its training rows first, so that the attack queries the people that were trained on."""
    rows = formats.read_rows(data)
    parts = dataset.split(rows, manifests.read_manifest(data))
    order = [*parts.train, *parts.head]
    publication.write_jsonl(file, [rows[index] for index in order])
    return file


def row_for(
    name: str, model: AnyPath, spent: Record | None, folder: Path, config: StudyConfig, trained_people: Path
) -> Record:
    """All measurements of one model."""
    shared = {"seed": config.seed, **device_of(config)}
    asked = AttackConfig(max_tokens=config.max_tokens, temperatures=(0.0, TEMPERATURE), **shared)
    attack(model, folder / "others", replace(asked, dataset=config.dataset))
    attack(model, folder / "trained", replace(asked, dataset=str(trained_people)))
    scored = PerplexityConfig(model=str(model), dataset=config.dataset, output_dir=str(folder), **shared)
    mean = measure_perplexity(scored)[-1]["mean"]
    row: Record = {"model": name, "epsilon": spent and spent["epsilon"], "delta": spent and spent["delta"]}
    row |= {"steps": spent and spent["steps"], "ref": None, "loss": None}
    if spent:
        attacked = MiaConfig(
            model=str(model), members=config.dataset, attacks=("loss", "ref"), output_dir=str(folder), **shared
        )
        for line in infer_membership(attacked):
            if line["attack"] in ("ref", "loss"):
                row[line["attack"]] = {"auc": line["auc"], "ci": line["auc_ci"]}
    row["perplexity"] = mean
    for people in ("others", "trained"):
        row[people] = share(row_of(name, folder / people, None))
    return row


def change(base: Path, folder: Path) -> dict[str, Record]:
    """{group: {points, low, high, n}}: exact rate of `folder` minus that of `base`, in percentage points, paired over
    people (normal 95 % interval of the mean over n people), and the difference between the two groups of people."""

    def rates(results_folder: Path) -> dict[int, float]:
        hits_by_row: dict[int, list[bool]] = {}
        for outcome in measured(results_folder)[1]:
            if outcome["exact"] is not None:
                hits_by_row.setdefault(outcome["row"], []).append(outcome["exact"])
        return {row: fmean(hits) for row, hits in hits_by_row.items()}

    changes = {}
    for people in ("trained", "others"):
        before, now = rates(base / people), rates(folder / people)
        gains = [100 * (now[row] - before[row]) for row in before if row in now]
        changes[people] = fmean(gains), stdev(gains) / len(gains) ** 0.5, len(gains)
    (trained_mean, trained_error, n), (others_mean, others_error, m) = changes.values()
    changes["trained − others"] = trained_mean - others_mean, hypot(trained_error, others_error), n + m
    return {
        name: {"points": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error, "n": n}
        for name, (mean, error, n) in changes.items()
    }
