"""The lines of results_canary.jsonl."""

import math
from collections.abc import Sequence
from typing import Any

from canary import audit, fdp, metrics
from canary.key import KeyLine
from canary.likelihoods import SCORES, Bits, Scores
from canary.task import ModelArm, Task, TextArm
from common import stats

LEVELS = {"95": 0.05, "99.9": 0.001}
SIGNALS = ("2-gram", "similarity")  # from the text alone
HEADLINE = "2-gram"  # the signal whose bound is reported: the larger of two 95 % bounds would not be a 95 % bound
CONSTANT = "the signal is the same for all canaries"
NEVER = "never trained on"
FEW = "fewer than five canaries"
TOO_FEW = "no audit: were every guess right, the bound would be 0; more canaries are needed"
GAUSSIAN_DELTA = 1e-5  # where no accountant names a δ: without one, no Gaussian mechanism has an ε
# f-DP bounds (fdp.py) beside Steinke's: of any training, and of one that is a Gaussian mechanism
F_DP: dict[str, audit.Method] = {"epsilon_delta": fdp.epsilon_delta_bounds, "gaussian": fdp.gaussian_bounds}

# of an audit line: what depends on the score
BY_SCORE = ("score", "auc", "auc_ci", "direction", "power", "lower", "lower_undefined", "guesses", "f_dp", "undefined")

Line = dict[str, Any]


def grouped(canaries: Sequence[KeyLine]) -> dict[tuple[str, int], list[int]]:
    """{(kind, repetitions): indices}, most repeated first, held-out last."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, canary in enumerate(canaries):
        groups.setdefault((canary["kind"], canary["repetitions"]), []).append(index)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][1], item[0][0])))


def count_lines(task: Task) -> list[Line]:
    """Number of generated rows that contain part of a canary: one line per arm, group and part."""
    hits: dict[tuple[str, tuple[str, int], str], dict[str, Any]] = {}  # how → bool [canaries of the group, texts]
    for arm, generated in task.texts.items():
        matches = metrics.find(task.canaries, generated.texts)
        for group, members in grouped(task.canaries).items():
            for number, part in enumerate(metrics.PARTS):
                if part == "whole" or task.canaries[members[0]]["parts"]:
                    hits[arm, group, part] = {how: cells[number, members] for how, cells in matches.items()}
    sizes = {arm: len(generated.texts) for arm, generated in task.texts.items()}
    lines: list[Line] = []
    for (arm, group, part), by_how in hits.items():
        n = sizes[arm]
        line: Line = {"measure": "count", "arm": arm, "kind": group[0], "repetitions": group[1], "part": part}
        line |= {"n_canaries": len(by_how["exact"]), "n_requested": n, "n_scored": n, "n_dropped": 0}
        for how, cells in by_how.items():
            rows = int(cells.any(0).sum())
            others = {other: int(hits[other, group, part][how].any(0).sum()) for other in task.texts if other != arm}
            line[how] = {
                "rows": rows,
                "canaries": int(cells.any(1).sum()),
                "rate": rows / n,
                "ci": stats.clopper_pearson(rows, n),
                "fisher_p": {other: metrics.fisher(rows, n, theirs, sizes[other]) for other, theirs in others.items()},
            }
        lines.append(line | {"fisher": "compares these two models, one training each"})
    return lines


def exposure_lines(task: Task, arm: str, bits: Bits, references: int) -> list[Line]:
    """Exposure under one arm's model: one line per group of canaries."""
    groups = {group: members for group, members in grouped(task.canaries).items() if group[0] != "audit"}
    seen, space = task.models[arm].seen, task.space
    held_out = [bits[index]["exposure"] for index in groups.get(("held_out", 0), [])]
    n = min(references, space.size - 1)
    lines = []
    for (kind, repetitions), members in groups.items():
        copies = [seen.copies(task.canaries[index]) for index in members] if seen and kind != "held_out" else None
        requested = len(members)
        if copies:  # a canary never trained on has no exposure to measure
            members = [index for index, count in zip(members, copies) if count]
        values = [bits[index]["exposure"] for index in members]
        fits = [bits[index] for index in members if "ks_p" in bits[index]]
        extrapolated = {
            "note": "skew-normal extrapolation, capped at space_bits; void where ks_p is small",
            **{name: metrics.quantiles([fit[name] for fit in fits]) for name in ("bits", "ks_p") if fits},
        }
        lines.append(
            {
                "measure": "exposure",
                "arm": arm,
                "kind": kind,
                "repetitions": repetitions,
                "n_requested": requested,
                "n_scored": len(values),
                "n_dropped": requested - len(values),
                "dropped": {NEVER: requested - len(values)} if requested > len(values) else {},
                "copies_trained": copies,
                "undefined": None if values else f"{requested} of {requested} canaries were {NEVER}",
                "bits": metrics.quantiles(values) if values else None,
                "chance": metrics.CHANCE,
                "references": n,
                "ceiling": math.log2(n + 1),
                "space_bits": math.log2(space.size),
                "p_above_held_out": metrics.p_above(values, held_out) if values and kind != "held_out" else None,
                "extrapolated": extrapolated if fits else None,
            }
        )
    return lines


def audit_line_of_model(task: Task, arm: str, scores: Scores, signal: str) -> Line:
    """The audit of one arm's model by the headline's score; what the other gives, which decides nothing, is inside."""

    def line(of: str) -> Line:
        unit = task.header["privacy_unit"]
        made = audit_line(task.models[arm], task.audited, scores[of], unit, measure="audit", arm=arm, signal=signal)
        return made | {"score": of}

    (other,) = (line(of) for of in SCORES if of != task.headline)
    return line(task.headline) | {"other_score": {name: other[name] for name in BY_SCORE}}


def audit_line(
    source: ModelArm | TextArm,
    audited: Sequence[KeyLine],
    scores: Sequence[float],
    unit: str,
    *,
    measure: str,
    arm: str,
    signal: str,
) -> Line:
    """The lower bounds of one arm next to its accountant's ε. unit: what the audit adds or removes.

    Without an accountant δ is 0: only pure ε is refuted then (for Gaussian mechanisms it is GAUSSIAN_DELTA). Bounds are
    null, and `undefined` or `lower_undefined` says why, where there is no audit: too few canaries for any bound above
    0, a constant signal, or no canary was trained on. `above_upper` compares Steinke's bound with the accountant's ε
    and no other: fixed in advance, so that there is one chance of a false alarm. Canaries truncated by --max_length are
    dropped because of their text alone, inserted or not, so the coin flips of the others stay fair; a canary that was
    inserted but not trained on for another reason is kept, which can only lower the bound.
    """
    seen, spent = source.seen, source.privacy or {}
    requested, placed = len(audited), sum(canary["included"] for canary in audited)
    copies = sum(seen.copies(canary) > 0 for canary in audited if canary["included"]) if seen else None
    tokens = [seen.secret_tokens(canary) for canary in audited if canary["included"]] if seen else []
    known = [pair for pair in tokens if pair is not None]
    if seen:
        whole = [seen.fits(canary) for canary in audited]
        audited = [canary for canary, fits in zip(audited, whole) if fits]
        scores = [score for score, fits in zip(scores, whole) if fits]
    included, never = [canary["included"] for canary in audited], copies == 0 and placed > 0
    unknown = spent.get("unknown")
    upper, delta = (None, 0.0) if unknown else (spent.get("epsilon"), spent.get("delta") or 0.0)
    why = None
    if never or is_constant(scores):
        why = f"{placed} of {placed} canaries were {NEVER}: no audit" if never else CONSTANT
    void = why is not None
    own = bound_block(scores, included, delta, audit.lower_bounds, why)
    deltas = {name: (delta or GAUSSIAN_DELTA) if name == "gaussian" else delta for name in F_DP}
    others = {
        name: {"delta": deltas[name], **bound_block(scores, included, deltas[name], method, why)}
        for name, method in F_DP.items()
    }
    return {
        "measure": measure,
        "arm": arm,
        "signal": signal,
        "n_requested": requested,
        "n_scored": len(scores),
        "n_dropped": requested - len(scores),
        "dropped": {"cut off at --max_length": requested - len(scores)} if requested > len(scores) else {},
        "placed": placed,
        "placed_trained": copies,
        "secret_tokens": sum(n for n, _ in known) if known else None,
        "secret_tokens_trained": sum(n for _, n in known) if known else None,
        "included": sum(included),
        **auc([] if void else scores, included),
        **own,
        "f_dp": others,
        "upper": upper,
        "upper_unknown": unknown,
        "delta": delta,
        "unit": unit,
        "void": None if unknown else spent.get("void"),
        "undefined": why or own["lower_undefined"]["95"],
        "above_upper": {level: upper is not None and (bound or 0) > upper for level, bound in own["lower"].items()},
        "heuristic": {
            "note": "TPR/FPR bound, heuristic: canaries of one run are not independent",
            "bound": None if void else metrics.heuristic_bound(scores, included, delta),
        },
    }


def bound_block(
    scores: Sequence[float], included: Sequence[bool], delta: float, method: audit.Method, why: str | None
) -> Line:
    """power, lower and lower_undefined (why lower is null) by level, and the guesses. why: there is no audit at all."""
    bounds = {level: audit.one_run(scores, included, delta, alpha, method=method) for level, alpha in LEVELS.items()}
    few = FEW if bounds["95"]["most"] is None else TOO_FEW
    return {
        "power": {level: bound["most"] for level, bound in bounds.items()},
        "lower": {level: None if why else bound["epsilon"] for level, bound in bounds.items()},
        "lower_undefined": {
            level: why or (few if bound["epsilon"] is None else None) for level, bound in bounds.items()
        },
        "guesses": [] if why else bounds["95"]["guesses"],
    }


def is_constant(scores: Sequence[float]) -> bool:
    return len(scores) > 1 and min(scores) == max(scores)


def auc(scores: Sequence[float], included: Sequence[bool]) -> Line:
    """AUC of the scores for included canaries against the others; None unless there are both."""
    members = [score for score, inside in zip(scores, included) if inside]
    others = [score for score, inside in zip(scores, included) if not inside]
    if not members or not others:
        return {"auc": None, "auc_ci": None, "auc_ci_method": stats.AUC_METHOD, "direction": None}
    bounds = stats.auc_interval(members, others)
    return {
        "auc": stats.auc(members, others),
        "auc_ci": bounds,
        "auc_ci_method": stats.AUC_METHOD,
        "direction": stats.direction(bounds, "placed canaries"),
    }


def text_signals(canaries: Sequence[KeyLine], texts: list[str]) -> dict[str, list[float]]:
    """{signal: values of all canaries} from the generated rows alone."""
    sentences = [canary["sentence"] for canary in canaries]
    values = metrics.bigram_scores(sentences, texts), metrics.similarity_scores(sentences, texts)
    return {signal: scores.tolist() for signal, scores in zip(SIGNALS, values)}


def text_lines(task: Task, arm: str, signals: dict[str, list[float]]) -> list[Line]:
    """A bound from the audit canaries, and the AUC of every other group against the held-out ones."""
    groups, generated, unit = grouped(task.canaries), task.texts[arm], task.header["privacy_unit"]
    lines: list[Line] = []
    for signal, values in signals.items():
        if task.audited:
            scores = [value for value, canary in zip(values, task.canaries) if canary["kind"] == "audit"]
            line = audit_line(generated, task.audited, scores, unit, measure="audit_text", arm=arm, signal=signal)
            lines.append(line | {"headline": signal == HEADLINE})
        held_out = [values[index] for index in groups.get(("held_out", 0), [])]
        for (kind, repetitions), members in groups.items():
            if kind in ("ladder", "share") and held_out:
                inserted = [values[index] for index in members]
                scores, n = [*inserted, *held_out], len(inserted)
                constant = is_constant(scores)
                line = {"measure": "text_auc", "arm": arm, "signal": signal, "kind": kind, "repetitions": repetitions}
                line |= {"n_requested": n, "n_scored": n, "n_dropped": 0}
                line |= auc([] if constant else scores, [True] * n + [False] * len(held_out))
                lines.append(line | {"undefined": CONSTANT if constant else None})
    return lines
