"""System S in miniature: reviews → fine-tuning with and without DP → synthetic reviews → privacy, fidelity, utility.

The embedded model has never seen a review, so all of its weights are first trained on public ones, to stand in for the
reviews that a large model saw in pre-training: other users and products, mostly from departments that the private
reviews do not cover. Then canaries are inserted into the private reviews (a ladder of repetitions, and once-only ones
for the audit). Three arms are trained with the same hyperparameters and steps (no noise, ε = 8, ε = 1), and each of
them, like the base, writes a review for the metadata of every held-out row. See quickstart.py.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from canary import auxiliary
from canary.config import InjectConfig
from canary.config import MeasureConfig as CanaryConfig
from common import cli, formats, json_files, manifests, models, provenance, publication, results, reviews
from common.checkpoints import find_checkpoints
from common.problems import AnyPath, Problems
from data.amazon import run as prepare
from data.amazon import shop
from data.amazon.config import MakeReviewsConfig, PrepareConfig
from data.amazon.phrases import DEPARTMENTS
from data.synthetic.config import SyntheticConfig
from fidelity.config import FidelityConfig
from studies.config import EMBEDDED, StudyConfig
from studies.steps import Record, build, call, device_of, input_hashes, table, train, with_dp
from training.config import TrainConfig
from utility import downstream
from utility.config import ImportanceConfig
from utility.metrics import SCORES

EPOCHS = 5
RATE = 3e-3
RANK = 8
ARMS = {"no_dp": None, "dp_8": 8.0, "dp_1": 1.0}  # ε; None: neither noise nor clipping
PRIVATE = ("Electronics", "Garden", "Kitchen")  # departments
COMMON = 16  # public products of each other department per product of a private department
PUBLIC, PUBLIC_EPOCHS, PUBLIC_RATE = 3000, 2, 3e-3  # training on public reviews: rows, epochs, learning rate
TRAIN, TEST, REVIEWS, PRODUCTS = 1600, 300, 6000, 200
LADDER, CANARIES, AUDIT = (1, 8, 32), 5, 200
LOGICAL_BATCH = 64
TEXT_EPOCHS = 4  # of the models trained on the generated reviews


def check(config: StudyConfig) -> None:
    """Raise a UserError that lists every problem with the study's inputs."""
    problems = Problems()
    problems.absorb(models.find_model, config.model, config.revision)
    problems.check()


def inputs(config: StudyConfig) -> list[str]:
    return []


def run(config: StudyConfig, out: Path, record: results.Run) -> str:
    """Run all arms; return the text of summary.md."""
    from canary.injection import run as inject
    from data.synthetic.run import run as generate

    model = config.model
    if model == str(EMBEDDED / "mini-pythia"):
        model = str(public_base(config, out))
    real = make_split(out / "reviews", REVIEWS, TRAIN, TEST, PRIVATE, config.seed)
    injected = InjectConfig(
        input=str(real / "train.jsonl"),
        output=str(out / "train_canaries.jsonl"),
        repetitions=LADDER,
        canaries=CANARIES,
        audit=AUDIT,
        seed=config.seed,
    )
    with_canaries = build("canary/inject.py", inject, injected)

    def write(arm: str, checkpoint: AnyPath) -> Path:
        written = SyntheticConfig(
            model=str(checkpoint),
            input=str(real / "test.jsonl"),
            arm=arm,
            training=str(with_canaries),
            max_new_tokens=128,
            output=str(out / f"generated_sequences_{arm}.jsonl"),
            seed=config.seed,
            **device_of(config),
        )
        return build("data/synthetic/generate.py", generate, written)

    plain = TrainConfig(
        model=model,
        input=str(with_canaries),
        output_root=str(out),
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        per_device_batch_size=2 * config.per_device_batch_size,
        lora_r=config.lora_r,
        lora_dropout=0.0,
        logging_steps=20,
        loss_on="completion",
        **device_of(config),
    )
    checkpoints, written = {}, {}
    for arm, epsilon in ARMS.items():
        checkpoints[arm] = find_checkpoints(train(with_dp(plain, epsilon, LOGICAL_BATCH)))[-1]
        written[arm] = write(arm, checkpoints[arm])
    write("base", model)
    perfect = out / "generated_sequences_trained_on.jsonl"  # output of a generator that reproduces its training rows
    learnt = [row | {reviews.GENERATED: row[reviews.REAL]} for row in formats.read_rows(with_canaries)]
    publication.write_jsonl(perfect, learnt)
    measure(config, out, model, checkpoints, written)
    rows = summary(out, checkpoints)
    publication.write_json(out / "summary.json", rows)
    record["epsilons"] = {arm: row["epsilon"] for arm, row in rows["arms"].items()}
    return report(rows)


def measure(config: StudyConfig, out: Path, model: str, checkpoints: dict[str, Path], written: dict[str, Path]) -> None:
    """Privacy, fidelity and utility of all arms; what was measured before on the same files and weights is kept."""
    from canary.measurement import run as measure_canaries
    from canary.text_model import run as measure_text
    from fidelity.run import run as compare
    from utility.importance import run as weigh_words

    def score_canaries(asked: auxiliary.Config) -> object:
        return measure_text(asked, partial(auxiliary.train, asked))

    real, with_canaries = out / "reviews", out / "train_canaries.jsonl"
    held_out, clean = str(real / "validation.jsonl"), str(real / "train.jsonl")
    untrained = {"base": model}  # the reference: exposure and text before any private review
    arms, texts = (
        tuple(f"{arm}={path}" for arm, path in paths.items()) for paths in (checkpoints | untrained, written)
    )
    unlearnt = tuple(f"{arm}={out / f'generated_sequences_{arm}.jsonl'}" for arm in ("base", "trained_on"))
    # a step that was killed starts again (overwrite); downstream.py resumes
    canaries = CanaryConfig(
        canaries=str(with_canaries.with_name("train_canaries_key.jsonl")),
        models=arms,
        synthetic=texts,
        references=200,
        output_dir=str(out / "canary"),
        overwrite=True,
        seed=config.seed,
    )
    likeness = FidelityConfig(
        real=held_out,
        train=str(with_canaries),
        synthetic=texts + unlearnt,
        num_rows=TEST,
        output_dir=str(out / "fidelity"),
        overwrite=True,
        seed=config.seed,
    )
    importance = ImportanceConfig(
        real=clean,
        heldout=held_out,
        synthetic=texts,
        num_rows=TEST,
        num_heldout=500,
        output_dir=str(out / "importance"),
        overwrite=True,
        seed=config.seed,
    )
    usefulness = downstream.Config(
        model=model,
        real=clean,
        heldout=held_out,
        synthetic=texts,
        num_rows=TEST,
        num_heldout=500,
        num_seeds=1,
        epochs=6,
        learning_rate=config.learning_rate,
        per_device_batch_size=4,
        gradient_accumulation_steps=1,
        lora_r=16,
        output_dir=str(out / "downstream"),
        seed=config.seed,
    )
    text_models = auxiliary.Config(
        model=model,
        canaries=canaries.canaries,
        synthetic=texts,
        epochs=TEXT_EPOCHS,
        learning_rate=config.learning_rate,
        per_device_batch_size=2 * config.per_device_batch_size,
        lora_r=16,
        output_dir=str(out / "auxiliary"),
        seed=config.seed,
        **device_of(config),
    )
    # a lower bound that contradicts the accountant, for which these two exit with 1, is a result here: the table shows
    # it
    step("canary/measure.py", measure_canaries, canaries)
    step("canary/auxiliary.py", score_canaries, text_models)
    step("fidelity/fidelity.py", compare, likeness)
    step("utility/feature_importance.py", weigh_words, importance)
    step("utility/downstream.py", downstream.run, usefulness)


def step(script: str, run: Callable[[Any], object], config: Any) -> None:
    """Measure into config.output_dir, unless its mark says that this was done with the same files and weights."""
    folder, inputs_before = Path(config.output_dir), input_hashes(cli.words_of(config))
    mark = folder / "done"  # hashes of the step's inputs and outputs
    if mark.exists():
        if mark.read_bytes() == _mark(inputs_before, folder):
            print(f"\n{folder}: measured before, kept")
            return
        print(f"\n{folder}: damaged or stale (weights or files changed); measured again")
        shutil.rmtree(folder)
    call(script, run, config)
    with publication.atomic(mark, "wb") as file:
        file.write(_mark(inputs_before, folder))


def _mark(inputs: dict[str, str | None], folder: Path) -> bytes:
    return json.dumps({"from": inputs, "left": input_hashes(sorted(folder.glob("*.json*")))}, indent=1).encode()


def make_split(folder: Path, n: int, train_rows: int, test_rows: int, departments: tuple[str, ...], seed: int) -> Path:
    """Write fictional reviews as train, test and validation.jsonl in `folder`."""
    raw = folder.with_name(folder.name + "_raw")
    source = raw / "Shop.jsonl"
    if not manifests.manifest_path(source).exists():  # the last file that make_reviews.py writes
        fictional = MakeReviewsConfig(
            output_dir=str(raw),
            category="Shop",
            reviews=n,
            products=PRODUCTS,
            departments=departments,
            overwrite=True,
            seed=seed,
        )
        call("data/amazon/make_reviews.py", shop.run, fictional)
    if not manifests.manifest_path(folder / "validation.jsonl").exists():  # the last file that prepare.py writes
        split = PrepareConfig(
            reviews=str(source),
            meta=str(raw / "meta_Shop.jsonl"),
            output_dir=str(folder),
            train=train_rows,
            test=test_rows,
            overwrite=True,
            seed=seed,
        )
        call("data/amazon/prepare.py", prepare.run, split)
    return folder


def public_base(config: StudyConfig, out: Path) -> Path:
    """The embedded model after PUBLIC_EPOCHS epochs on public reviews."""
    departments = tuple(name for name in DEPARTMENTS for _ in range(1 if name in PRIVATE else COMMON))
    public = make_split(out / "public", 2 * PUBLIC, PUBLIC, 10, departments, config.seed + 1)
    training = TrainConfig(
        model=config.model,
        input=str(public / "train.jsonl"),
        output_root=str(out),
        peft_type="full",
        epochs=PUBLIC_EPOCHS,
        learning_rate=PUBLIC_RATE,
        per_device_batch_size=8,
        gradient_accumulation_steps=1,
        logging_steps=50,
        loss_on="completion",
        seed=config.seed,
        **device_of(config),
    )
    tree = train(training)
    base, newest = out / "public-base", find_checkpoints(tree)[-1]
    new, old = (
        provenance.weights_sha256(models.find_model(str(folder))) if folder.is_dir() else None
        for folder in (newest, base)
    )
    if old and old != new:
        print(f"\n{base}: stale (weights differ from {newest}); replaced, and everything trained on it runs again")
    if old != new:
        with publication.atomic_folder(base) as folder:
            for file in newest.iterdir():
                if file.name != "training_state.pt":
                    shutil.copy(file, folder)
    return base


def summary(out: Path, checkpoints: dict[str, Path]) -> Record:
    """Collect what the table needs from the result files."""
    canaries = json_files.read_jsonl(out / "canary" / "results_canary.jsonl")
    likeness = json.loads((out / "fidelity" / "results_fidelity.json").read_text(encoding="utf-8"))
    text_models = json_files.read_jsonl(out / "auxiliary" / "results_auxiliary.jsonl")
    words = json.loads((out / "importance" / "feature_importance.json").read_text(encoding="utf-8"))
    ratings = json_files.read_jsonl(out / "downstream" / "results_utility.jsonl")
    spent = {arm: provenance.privacy(models.find_model(str(folder))) or {} for arm, folder in checkpoints.items()}
    return {
        "canary": canaries,
        "auxiliary": text_models,
        "fidelity": likeness,
        "importance": words,
        "utility": ratings,
        "arms": {arm: {key: block[key] for key in ("epsilon", "delta", "unit")} for arm, block in spent.items()},
        "against_base": against_base(json_files.read_jsonl(out / "canary" / "results_canary_rows.jsonl")),
    }


def against_base(rows: list[Record]) -> list[Record]:
    """Exposure of each group of canaries, arm minus base, paired by canary: mean and 95 % t-interval, in bits."""
    from scipy import stats

    bits: dict[tuple[str, int], dict[tuple[str, int], float]] = {}
    for row in rows:
        if row["source"] == "model" and row["kind"] in ("ladder", "held_out"):
            bits.setdefault((row["kind"], row["repetitions"]), {})[row["arm"], row["id"]] = row["exposure"]
    changes = []
    for arm in dict.fromkeys(row["arm"] for row in rows if row["source"] == "model" and row["arm"] != "base"):
        for (kind, times), exposures in bits.items():
            gains = [value - exposures["base", id_] for (other, id_), value in exposures.items() if other == arm]
            half = stats.t.ppf(0.975, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
            interval = {"mean": fmean(gains), "low": fmean(gains) - half, "high": fmean(gains) + half}
            changes.append({"arm": arm, "kind": kind, "repetitions": times, **interval, "n_canaries": len(gains)})
    return changes


AGREEMENT = ("spearman", "pearson", "jaccard@20")
MEASURES = (
    "Wasserstein-1 words a review",
    "Jensen-Shannon word frequencies (bits)",
    "Frechet distance",
    "coverage",
    "MAUVE (low, high: of 5 seeds)",
    "attribute correlations, mean shift",
    "copies >= 100 characters",
)


def bound_text(value: float | None) -> str:
    return "no audit" if value is None else f"{value:.2f}"


def exposure_text(bits: Record | None) -> str:
    return "never trained on" if bits is None else f"{bits['median']:.1f}"


def p_text(p: float | None) -> str:
    return "" if p is None else f" (p {p:.2g})"


def report(rows: Record) -> str:
    """The study's tables in Markdown: privacy, fidelity, utility."""
    arms = list(rows["arms"])
    privacy = []
    for arm in (*arms, "base"):
        mine = [line for line in rows["canary"] if line["arm"] == arm]
        exposed = {(line["kind"], line["repetitions"]): line for line in mine if line["measure"] == "exposure"}
        exposure = {group: line["bits"] for group, line in exposed.items()}
        above = {group: line["p_above_held_out"] for group, line in exposed.items()}
        bits = [exposure_text(exposure["ladder", times]) + p_text(above["ladder", times]) for times in LADDER]
        bits.append(exposure_text(exposure["held_out", 0]))
        if arm == "base":  # it saw none of these reviews, so an audit would have nothing to detect
            privacy.append([arm, 0, *bits, "", "", "", "", ""])
            continue
        bound = next(line for line in mine if line["measure"] == "audit")
        lower = next(line for line in mine if line["measure"] == "audit_text" and line["headline"])["lower"]["95"]
        by_model = next(line for line in rows["auxiliary"] if line["arm"] == arm and line.get("headline"))
        whole = sum(
            line["exact"]["rows"]
            for line in mine
            if line["measure"] == "count" and line["part"] == "whole" and line["kind"] in ("ladder", "share")
        )
        epsilon = rows["arms"][arm]["epsilon"]
        privacy.append(
            [
                arm,
                "∞" if epsilon is None else f"{epsilon:.2f}",
                *bits,
                bound_text(bound["lower"]["95"]),
                "no signal" if lower is None else f"{lower:.2f}",
                bound_text(by_model["lower"]["95"])
                + ("" if by_model["auc"] is None else f" (AUC {by_model['auc']:.2f})"),
                bound_text(bound["auc"]),
                whole,
            ]
        )
    gains = []
    for arm in arms:
        changes = {
            (group["kind"], group["repetitions"]): group for group in rows["against_base"] if group["arm"] == arm
        }
        chosen = [changes["ladder", times] for times in LADDER] + [changes["held_out", 0]]
        gains.append([arm, *("{mean:+.1f} ({low:+.1f} … {high:+.1f})".format(**group) for group in chosen)])
    n_held = next(group["n_canaries"] for group in rows["against_base"] if group["kind"] == "held_out")
    spent = rows["arms"][arms[0]]
    compared = rows["fidelity"]["comparisons"]
    likeness = []
    for measure in MEASURES:
        cells = [compared[arm]["measures"].get(measure) for arm in ("real", *arms, "base", "trained_on")]
        if all(cells):
            likeness.append(
                [measure, *(f"{cell['value']:.3f} ({cell['low']:.3f}–{cell['high']:.3f})" for cell in cells)]
            )
    ratings = {line["arm"]: line for line in rows["utility"] if line["seed"] is None}
    utility = []
    for arm in ("real", *arms, "base", "majority"):
        line = ratings[arm]
        cells = [line[name]["mean"] if isinstance(line[name], dict) else line[name] for name in SCORES]
        words = rows["importance"]["arms"].get(arm)
        means = [words["mean"][name] for name in AGREEMENT] if words else []
        agree = ["–" if mean is None else f"{mean:.3f}" for mean in means] or [""] * len(AGREEMENT)
        utility.append([arm, *(f"{cell:.3f}" for cell in cells), *agree])
    heads = [
        "",
        "ε (PRV)",
        *(f"inserted {times}×" for times in LADDER),
        "held out",
        "ε ≥ (model)",
        "ε ≥ (text)",
        "ε ≥ (text, auxiliary model)",
        "audit AUC",
        "generated rows with a whole canary",
    ]
    return "\n".join(
        [
            f"Privacy (unit {spent['unit']}, add/remove, δ = {spent['delta']:.3g}). Canary exposure in bits (median; "
            "chance: 1; p: one-sided Mann–Whitney against the held-out canaries); lower bounds on ε at 95 % from "
            f"{AUDIT} canaries inserted once with probability ½, from the model and from the generated text alone: by "
            "its 2-grams, and by a model trained on it.",
            "",
            table(heads, privacy),
            "",
            f"Exposure of the same canaries, arm minus base: mean bits (95 % t-interval over {CANARIES} canaries; "
            f"{n_held} held out).",
            "",
            table(["", *(f"inserted {times}×" for times in LADDER), "held out"], gains),
            "",
            f"Fidelity: {rows['fidelity']['rows']} generated reviews against as many real ones. `real`: a second real "
            "sample; `base`: the model before it saw any private review; `trained_on`: the training rows themselves, "
            "canaries included, i.e. the output of a generator that reproduces them perfectly (95 % jackknife "
            "intervals, not clipped to the metric's range; for MAUVE, the range over five clustering seeds, which is "
            "not a confidence interval).",
            "",
            table(["", "real", *arms, "base", "trained_on"], likeness),
            "",
            "Utility: the base fine-tuned on each arm's rows rates held-out real reviews (`real`: without canaries); "
            "agreement of word importance with `real`.",
            "",
            table(["", *SCORES, *AGREEMENT], utility),
        ]
    )
