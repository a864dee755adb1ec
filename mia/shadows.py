"""The attacks that --shadows adds: passes over the shadows, their scores, and the rows at risk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import models, provenance
from common.schema import SHADOW_ATTACKS
from common.shadows import SETS, Shadow, Shadows, epoch_of, settings_of
from common.trained import text_sha256
from mia import attacks
from mia.attacks import Undefined
from mia.calibration import (
    LEAST,
    PER_ROW_FROM,
    RMIA_A,
    RMIA_GAMMA,
    enough,
    lira,
    lira_offline,
    logit,
    pooled_deviation,
    ratio,
    rmia,
)
from mia.dataset import MembershipTask
from mia.forward import LOGP
from mia.signals import Encoded, Evidence, Reasons, Scores, scorable

if TYPE_CHECKING:
    from common.models import ModelRef
    from mia.forward import Passes

    Lines = list[dict[str, Any]]
    Groups = dict[int, list[float]]  # index of a text → a value for each shadow

RISK = "risk_mia.jsonl"


@dataclass
class Calibration:
    """What the shadows give each text, on rank 0. reason: why they do not fit this target; then nothing else is set.

    inside, out: ℓ of each text under the shadows that were, or were not, trained on it. Texts outside the pool have
    neither.
    """

    n_shadows: int
    reason: str | None
    inside: Groups
    out: Groups

    @property
    def groups(self) -> tuple[Groups, Groups]:
        """(inside, out)"""
        return self.inside, self.out

    @property
    def per_row(self) -> bool:
        """Whether each text has its own deviation."""
        return self.n_shadows >= PER_ROW_FROM

    def counts(self, index: int) -> tuple[int, int]:
        """(IN, OUT) shadows of a text."""
        return len(self.inside.get(index, ())), len(self.out.get(index, ()))

    def ranges(self) -> dict[str, list[int]]:
        """The least and the most IN, and OUT, shadows of a text of the pool."""
        known = [self.counts(index) for index in {*self.inside, *self.out}] or [(0, 0)]
        return {name: [min(values), max(values)] for name, values in zip(("shadows_in", "shadows_out"), zip(*known))}


def fitting(ref: ModelRef, shadows: Shadows) -> tuple[list[tuple[Shadow, Path]], str | None]:
    """([(shadow, its checkpoint at the target's epoch)], None), or ([], why they do not fit this target).

    A target that is itself one of the shadows is not among them.
    """
    record = provenance.training_record(ref.adapter) if ref.adapter else None
    if record is None or not ref.adapter:
        return [], "no run.json beside the model: it is unknown whether the shadows were trained alike"
    own, theirs = settings_of(record), shadows.settings
    if other := sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key)):
        return [], f"the shadows were trained with another {', '.join(other)}"
    epoch = epoch_of(ref.adapter, record)
    run = os.path.realpath(Path(ref.adapter).expanduser().absolute().parent)
    others = [shadow for shadow in shadows.trained if os.path.realpath(shadow.folder) != run]
    if epoch is None or any(len(shadow.checkpoints) < epoch for shadow in others):
        return [], "the shadows have no checkpoint of the target's epoch"
    if not others:
        return [], "the only shadow is the model itself"
    return [(shadow, shadow.checkpoints[epoch - 1]) for shadow in others], None


def logits(values: Sequence[float]) -> list[float]:
    """φ of each ℓ."""
    return [logit(value) for value in values]


def usable(group: Groups) -> list[list[float]]:
    """The values of every text whose φ are all finite."""
    return [values for values in group.values() if max(values) < 0]


def calibrate(passes: Passes, ref: ModelRef, encoded: Encoded, task: MembershipTask, shadows: Shadows) -> Calibration:
    """Run the target's tokens through every shadow that fits the target, on its base."""
    chosen, reason = fitting(ref, shadows)
    calibration = Calibration(len(chosen), reason, {}, {})
    scored = scorable(encoded, models.context_of(ref))
    digests = [text_sha256(task.texts[index]) for index in scored]
    for shadow, checkpoint in chosen:
        given = (str(checkpoint), ref.revision, ref.base, "--shadows")
        model = models.find_model(*given, quantized=ref.quantization)
        values = passes.statistics(model, [encoded.tokens[index] for index in scored], "logp")
        for index, digest, logp in zip(scored, digests, values):
            if digest in shadows.pool:
                group = calibration.inside if digest in shadow.seen else calibration.out
                group.setdefault(index, []).append(attacks.loss(logp))
    return calibration


def add_scores(task: MembershipTask, evidence: Evidence, made: Calibration, scores: Scores, reasons: Reasons) -> None:
    """Add lira, lira_offline and rmia of every text to `scores`, and the reason for each None to `reasons`.

    evidence: of the target, or of the base as a control. The population of rmia are the non-members; nothing else
    depends on a label.
    """
    own = {index: attacks.loss(values[:, LOGP]) for index, values in evidence.tokens.items()}
    s_in, s_out = (None if made.per_row else pooled_deviation(map(logits, usable(group))) for group in made.groups)
    ratios: dict[int, float] = {}
    for index, values in made.out.items():
        if index in own and len(values) >= LEAST:
            ratios[index] = ratio(own[index], list(map(math.exp, values)))
    population = np.array([value for index, value in ratios.items() if not task.labels[index]])

    def of_lira(index: int) -> float:
        inside, out = (logits(group.get(index, [])) for group in made.groups)
        return lira(logit(own[index]), inside, out, s_in, s_out)

    def of_rmia(index: int) -> float:
        enough(out=made.out.get(index, []))
        return rmia(ratios[index], population)

    functions: dict[str, Callable[[int], float]] = {
        "lira": of_lira,
        "lira_offline": lambda i: lira_offline(logit(own[i]), logits(made.out.get(i, [])), s_out),
        "rmia": of_rmia,
    }
    for name in SHADOW_ATTACKS:
        column: list[float | None] = []
        for index in range(len(task.texts)):
            try:
                if made.reason:
                    raise Undefined(made.reason)
                if index not in own:
                    raise Undefined("under 2 tokens")
                if made.counts(index) == (0, 0):
                    raise Undefined("not a row of the shadows' pool")
                column.append(functions[name](index))
            except Undefined as reason:
                column.append(None)
                reasons.setdefault(name, {})[index] = str(reason)
        scores[name] = column


def describe(made: Calibration, lines: Lines, rows: Lines) -> None:
    """Add to every result line how many shadows stood behind it, and to every score line how many saw its text.

    Counts of a line: the least and the most over the texts of the pool.
    """
    variance = "per row" if made.per_row else "pooled"
    parameters: dict[str, dict[str, Any]] = {
        "lira": {"signal": "logit", "variance": variance},
        "lira_offline": {"signal": "logit", "variance": variance},
        "rmia": {"signal": "probability", "a": RMIA_A, "gamma": RMIA_GAMMA, "population": "non-members"},
    }
    ranges = made.ranges()
    for line in lines:
        name = line["attack"]
        used = name in SHADOW_ATTACKS
        line |= {"n_shadows": made.n_shadows if used else 0} | (ranges if used else dict.fromkeys(ranges))
        if used:
            line["parameters"] = parameters[name]
    for index, row in enumerate(rows):
        row["shadows_in"], row["shadows_out"] = made.counts(index)


def risk(task: MembershipTask, made: Calibration, found: Scores, reasons: Reasons) -> Lines:
    """The lines of risk_mia.jsonl: all rows by the score of one attack, most at risk first, then those without a score.

    The attack is the first of SHADOW_ATTACKS that has any score. rank: 1 + the number of rows with a higher score.
    nonmembers_above: share of the other non-members with at least this score, the false positive rate of a threshold
    that finds the row.
    """
    name = next((name for name in SHADOW_ATTACKS if any(value is not None for value in found[name])), SHADOW_ATTACKS[0])
    scores = found[name]
    known = np.sort([value for value in scores if value is not None])
    others = np.sort([value for value, label in zip(scores, task.labels) if value is not None and not label])
    lines: Lines = []
    for index, value in enumerate(scores):
        member = task.labels[index]
        rank = above = None
        if value is not None:
            rank = 1 + len(known) - int(np.searchsorted(known, value, "right"))
            n, itself = len(others), int(not member)
            if n > itself:
                above = (n - int(np.searchsorted(others, value, "left")) - itself) / (n - itself)
        n_in, n_out = made.counts(index)
        lines.append(
            {
                "rank": rank,
                "set": SETS[0] if member else SETS[1],
                "row": task.indices[index],
                "text_sha256": text_sha256(task.texts[index]),
                "attack": name,
                "score": value,
                "nonmembers_above": above,
                "n_shadows": made.n_shadows,
                "shadows_in": n_in,
                "shadows_out": n_out,
                "undefined": reasons.get(name, {}).get(index),
            }
        )
    return sorted(lines, key=lambda line: (line["rank"] is None, line["rank"] or 0))


def summary(made: Calibration) -> str:
    """One line of text about the shadows, for below the table."""
    if made.reason:
        return f"shadows: none used ({made.reason})"
    inside, out = ("–".join(map(str, sorted(set(ends)))) for ends in made.ranges().values())
    return f"shadows: {made.n_shadows}, of which {inside} saw a text of the pool, and {out} did not"
