"""Results of one model: result lines with their controls, the table, the figure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common import stats
from common.schema import HEADLINE_ATTACK, SHADOW_ATTACKS
from common.stats import roc
from mia import attacks, baselines, metrics
from mia.attacks import AGAINST_BASE
from mia.config import MiaConfig
from mia.dataset import MembershipTask
from mia.metrics import Floats
from mia.signals import Evidence, Reasons, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Lines = list[dict[str, Any]]  # of a result file

NO_BASE = "no base known: the model has no adapter"
DRAWN = ("loss", "zlib", "lowercase", "ref", "min_k_20", "min_k_pp_20", "surp", "recall", "con_recall", "dc_pdd",
         "neighborhood", "neighborhood_self", "grad_norm", "ez", "wbc", "combine", *SHADOW_ATTACKS)  # fmt: skip
FROM_LABELS = ("rmia",)  # uses the labels (its population), so no classifier of labels is fitted to it


def parameters_of(attack: str, config: MiaConfig, evidence: Evidence) -> dict[str, Any]:
    """The parameters of one attack (a key of the score file)."""
    known: dict[str, dict[str, Any]] = {
        "surp": {"k": attacks.SURP_PERCENT, "entropy": attacks.SURP_ENTROPY},
        "recall": {"shots": evidence.shots.get("recall")},
        "con_recall": {
            "shots": evidence.shots.get("recall"),
            "member_shots": evidence.shots.get("con_recall"),
            "gamma": attacks.CON_RECALL_GAMMA,
        },
        "dc_pdd": {"ceiling": attacks.DC_PDD_CEILING},
        "neighborhood": {"neighbours": attacks.N_NEIGHBOURS, "neighbor_model": config.neighbor_model},
        "neighborhood_self": {"neighbours": attacks.N_NEIGHBOURS},
        "wbc": {"windows": list(attacks.WINDOWS)},
        "combine": {"folds": metrics.FOLDS, "interval_widened": metrics.CROSS_FITTED},
    }
    if attack.startswith("min_k"):
        return {"k": int(attack.rpartition("_")[2])}
    return known.get(attack, {})


def by_class(values: Iterable[float | None], labels: Iterable[int]) -> tuple[list[float], list[float]]:
    """(scores of members, of non-members), without Nones."""
    pairs = [(value, label) for value, label in zip(values, labels) if value is not None]
    return [value for value, label in pairs if label], [value for value, label in pairs if not label]


def matrix(scores: Scores) -> Floats:
    """Scores [n, A] with NaN for None, of the attacks that do not know the labels."""
    columns = [column for name, column in scores.items() if name not in FROM_LABELS]
    return np.array([[np.nan if value is None else value for value in column] for column in columns]).T


def combined(by_attack: Scores, labels: Sequence[int], seed: int) -> list[float | None] | None:
    """Cross-fitted log-odds over all scores; None for a text without any score. None below 5 texts per class."""
    scores = metrics.usable(matrix(by_attack))
    some = [index for index in range(len(labels)) if not np.isnan(scores[index]).all()]
    odds = metrics.cross_fit(scores[some], [labels[index] for index in some], metrics.logistic, seed) if some else None
    if odds is None:
        return None
    values = dict(zip(some, odds.tolist()))
    return [values.get(index) for index in range(len(labels))]


def apart(bounds: list[float]) -> bool:
    """Whether an AUC interval excludes ½ on either side: the score separates the two sets."""
    return bounds[0] > 0.5 or bounds[1] < 0.5


def report(
    task: MembershipTask,
    config: MiaConfig,
    info: Mapping[str, Any],
    target_scores: Scores,
    reasons: Reasons,
    evidence: Evidence,
    base_scores: Scores,
    base_reasons: Reasons,
) -> tuple[Lines, Lines, dict[str, Any]]:
    """(result lines, score lines, content of run_mia.json) of one model, from its scores and those of its base (empty
    without one). --combine adds one more attack to both.

    info: keys common to every result line.
    """
    draws = metrics.Draws(config.bootstrap, config.seed)
    if not task.blind:
        task.blind = baselines.scores(task.texts, task.labels, config.seed)
        task.blind_test = baselines.dataset_inference(task.texts, task.labels, config.seed)
    blinds: dict[str, dict[str, Any]] = {}
    for name, log_odds in task.blind.items():
        if log_odds is None:
            blinds[name] = {"auc": None, "auc_ci99": None, "undefined": "fewer than 5 texts in a class"}
        else:
            made = metrics.summarize(*by_class(log_odds.tolist(), task.labels), draws, cross_fitted=True)
            blinds[name] = {key: made[key] for key in ("auc", "auc_ci99", "tpr_at_fpr", "undefined")}
    set_flags = [name for name, made in blinds.items() if made["auc"] is not None and apart(made["auc_ci99"])]
    if task.duplicates:
        set_flags.append("near_duplicates")

    test = metrics.dataset_inference
    whole = {
        "target": test(matrix(target_scores), task.labels, config.seed),
        "base": test(matrix(base_scores), task.labels, config.seed) if base_scores else None,
        "blind": task.blind_test,
    }
    if config.combine:
        for some, missing_of in ((target_scores, reasons), (base_scores, base_reasons)):
            if some:
                odds = combined(some, task.labels, config.seed)
                reason = "fewer than 5 texts in a class" if odds is None else "no score to combine"
                some["combine"] = odds or [None] * len(task.labels)
                missing_of["combine"] = {i: reason for i, value in enumerate(some["combine"]) if value is None}

    twice = {
        "pairs": len(task.duplicates),
        "members": len({member for member, _ in task.duplicates}),
        "nonmembers": len({other for _, other in task.duplicates}),
    }
    lines, n = [], len(task.texts)
    for attack, values in target_scores.items():
        made = metrics.summarize(*by_class(values, task.labels), draws, cross_fitted=attack == "combine")
        members, nonmembers = map(len, by_class(values, task.labels))
        why = list(reasons.get(attack, {}).values())
        other = base_scores.get(attack)
        if other is None or not any(value is not None for value in other):
            whys = sorted(set(base_reasons.get(attack, {}).values()))
            missing = "compares with the base" if attack in AGAINST_BASE and info["base_model"] else NO_BASE
            undefined = whys[0] if whys else missing
            base: dict[str, Any] = {"auc": None, "auc_ci": None, "auc_ci99": None, "undefined": undefined}
        else:
            summary = metrics.summarize(*by_class(other, task.labels), draws, cross_fitted=attack == "combine")
            base = {key: summary[key] for key in ("auc", "auc_ci", "auc_ci99", "tpr_at_fpr", "undefined")}
        flags = [*set_flags, *(["base"] if base["auc"] is not None and apart(base["auc_ci99"]) else [])]
        if made["auc"] is not None and made["auc_ci"][1] < 0.5:
            flags.append("reversed")
        points = made["points"]
        flags += [f"coarse_{level}" for level, point in points.items() if point and point["coarse"]]
        if made["undefined"] and len(set(why)) == 1:
            made["undefined"] = why[0]
        lines.append(
            {
                "attack": attack,
                "headline": attack == HEADLINE_ATTACK,
                "parameters": parameters_of(attack, config, evidence),
                "auc": made["auc"],
                "auc_ci": made["auc_ci"],
                "auc_ci_method": stats.AUC_METHOD,
                "direction": stats.direction(made["auc_ci"]),
                "tpr_at_fpr": made["tpr_at_fpr"],
                "tpr_at_fpr_ci": made["tpr_at_fpr_ci"],
                "points": points,
                "undefined": made["undefined"],
                "n_requested": n,
                "n_scored": members + nonmembers,
                "n_dropped": n - members - nonmembers,
                "dropped": {reason: why.count(reason) for reason in sorted(set(why))},
                "n_members": members,
                "n_nonmembers": nonmembers,
                "blind": blinds,
                "base": base,
                "near_duplicates": twice,
                "flags": flags,
                **info,
            }
        )
    rows = []
    for index in range(n):
        row: dict[str, Any] = {"id": task.ids[index], "label": task.labels[index]}
        row |= {attack: values[index] for attack, values in target_scores.items()}
        row |= {name: None if values is None else float(values[index]) for name, values in task.blind.items()}
        row["text_sha256"] = hashlib.sha256(task.texts[index].encode()).hexdigest()
        row["null"] = {attack: missing[index] for attack, missing in reasons.items() if index in missing}
        rows.append(row)
    pairs = [[task.ids[member], task.ids[other]] for member, other in task.duplicates]
    kept = {"dataset_inference": whole, "near_duplicates": pairs, **task.counts, "n_cut": evidence.encoded.cut}
    return lines, rows, kept


def draw_roc(found: Scores, task: MembershipTask, flags: list[str], title: str) -> Figure:
    """ROC curves on log–log axes with chance and the blind baselines; flags are shown in the title."""
    from matplotlib.figure import Figure

    smallest = 1 / (2 * max(1, task.labels.count(0)))
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([smallest, 1], [smallest, 1], ":", color="black", label="chance")
    blinds = {name: list(values) for name, values in task.blind.items() if values is not None}
    styles = ("-", "--", "-.", ":")
    drawn: list[tuple[str, Sequence[float | None], dict[str, Any]]] = [
        (name, blinds[name], {"color": "grey", "linestyle": style}) for name, style in zip(blinds, styles)
    ]
    drawn += [
        (name, found[name], {"linewidth": 2.5 if name == HEADLINE_ATTACK else 1}) for name in DRAWN if name in found
    ]
    for name, values, style in drawn:
        members, nonmembers = by_class(values, task.labels)
        if members and nonmembers:
            false, true = roc(np.array(members), np.array(nonmembers))
            axes.step(false.clip(smallest), true.clip(smallest), where="post", label=name, **style)
    axes.set(xscale="log", yscale="log", xlim=(smallest, 1), ylim=(smallest, 1.05))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    words = axes.set_title(title, fontsize=9, parse_math=False)  # a $ in a name is literal
    if flags:
        words.set(text=f"{title}\nFLAGGED: {', '.join(flags)}", color="darkred")
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    return figure


def table(lines: Lines) -> str:
    """The result lines as a text table, followed by the controls."""
    shown = [f"{'attack':<18} {'AUC (95 %)':<20} {'TPR at FPR 10 %':>15} {'1 % (95 %)':>20} {'0.1 %':>7}  base   flags"]

    def rate(value: float | None) -> str:
        return "—" if value is None else f"{value:.1%}"

    for line in lines:
        if line["auc"] is None:
            shown.append(f"{line['attack']:<18} — {line['undefined']}")
            continue
        low, high = line["auc_ci"]
        tpr, at_one = line["tpr_at_fpr"], line["tpr_at_fpr_ci"]["0.01"]
        at_1 = rate(tpr["0.01"]) + (f" ({at_one[0]:.1%}–{at_one[1]:.1%})" if at_one else "")
        base = "—" if line["base"]["auc"] is None else f"{line['base']['auc']:.3f}"
        words = f"{line['attack']:<18} {line['auc']:.3f} ({low:.3f}–{high:.3f})  {rate(tpr['0.1']):>15} {at_1:>20}"
        shown.append(f"{words} {rate(tpr['0.001']):>7}  {base:<5}  {' '.join(line['flags'])}".rstrip())
    first = lines[0]
    for name, made in first["blind"].items():
        said = made["undefined"]
        if made["auc"] is not None:
            said = f"{made['auc']:.3f} (99 %: {made['auc_ci99'][0]:.3f}–{made['auc_ci99'][1]:.3f})"
        flag = "  FLAG: tells the sets apart without the model" if name in first["flags"] else ""
        shown.append(f"{name:<18} {said}{flag}")
    turned = [line["attack"] for line in lines if "reversed" in line["flags"]]
    if turned:
        shown.append(
            f"FLAG: {', '.join(turned)}: distinguishable, opposite direction: non-members score higher; the sets are "
            "confounded or exchanged, or the model knew the non-members"
        )
    if first["near_duplicates"]["pairs"]:
        shown.append(f"FLAG: {first['near_duplicates']['pairs']} pairs of near-duplicates across the two sets")
    return "\n".join(shown)
