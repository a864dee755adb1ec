"""Membership scores of one text calibrated by shadow models: numbers in, one number out, HIGHER = MORE LIKELY A MEMBER.

A shadow is IN for a text that it was trained on, else OUT. Two signals, both from ℓ, the mean log p of its tokens:

    logit  φ = log(p̄ / (1 − p̄)) with p̄ = exp ℓ, the geometric mean probability of a token. LiRA models φ as Gaussian:
           Carlini et al. 2022 (section V.B) scale a confidence in (0, 1) by its logit for that purpose; p̄ is the
           confidence of a language model that does not depend on the text's length. For small p̄, φ is close to ℓ.
    ratio  p̄ under the target / Pr(x), for RMIA (Zarifzadeh et al. 2024).

A score that is not defined raises `Undefined`. None of the functions sees a membership label of the target.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mia.attacks import Undefined, Values

LEAST = 2  # shadows, of either kind that a score needs
PER_ROW_FROM = 64  # shadows; with fewer, the deviation is pooled over all texts (Carlini et al. 2022, section VI.B)
RMIA_A = 1.0  # offline interpolation: Pr(x) = ½ ((1 + a) · mean OUT + 1 − a)
RMIA_GAMMA = 1.0  # a population text z counts if ratio(x) / ratio(z) exceeds it


def logit(mean_logp: float) -> float:
    """φ of a text with mean token log-probability ℓ."""
    if not mean_logp < 0:
        raise Undefined("log-probability 0: its logit is infinite")
    return mean_logp - math.log(-math.expm1(mean_logp))


def pooled_deviation(groups: Iterable[Sequence[float]]) -> float | None:
    """√(Σ squared distances from each group's own mean / Σ (n − 1)); None if no group has two values.

    A group holds the φ of one text under its IN (or OUT) shadows. The spread between texts does not enter.
    """
    squares, freedom = 0.0, 0
    for group in groups:
        if len(group) > 1:
            values = np.asarray(group, np.float64)
            squares += float(np.square(values - values.mean()).sum())
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else None


def lira_offline(signal: float, out: Sequence[float], deviation: float | None = None) -> float:
    """z = (φ − mean OUT) / σ. Carlini et al. 2022, equation 4, score with Φ(z), which is 1 in floats from z = 8.3 on; z
    orders texts alike and does not saturate. deviation: σ, None: of `out`."""
    enough(out=out)
    return (signal - float(np.mean(out))) / spread(out, deviation)


def lira(
    signal: float,
    inside: Sequence[float],
    out: Sequence[float],
    deviation_in: float | None = None,
    deviation_out: float | None = None,
) -> float:
    """log N(φ; mean IN, σ IN) − log N(φ; mean OUT, σ OUT): the likelihood ratio (Carlini et al. 2022, algorithm 1)."""
    enough(inside, out)
    s_in, s_out = spread(inside, deviation_in), spread(out, deviation_out)
    z_in, z_out = (signal - float(np.mean(inside))) / s_in, (signal - float(np.mean(out))) / s_out
    return 0.5 * (z_out**2 - z_in**2) + math.log(s_out / s_in)


def ratio(mean_logp: float, out: Sequence[float], a: float = RMIA_A) -> float:
    """p̄ / Pr(x) with Pr(x) from p̄ under the OUT shadows, `out`: ½ ((1 + a) · mean + 1 − a), which takes a text's IN
    probability to be a · OUT + 1 − a (Zarifzadeh et al. 2024, offline)."""
    enough(out=out)
    return math.exp(mean_logp) / (0.5 * ((1 + a) * float(np.mean(out)) + 1 - a))


def rmia(own: float, population: Values, gamma: float = RMIA_GAMMA) -> float:
    """The share of population texts z with ratio(x) / ratio(z) > γ. own: ratio(x); population: ratio(z) of each z.

    Where x is one of the z, ratio(x) / ratio(x) = 1 does not exceed γ = 1: no text counts for itself. All have the same
    denominator, so a member and a non-member of equal ratio score alike.
    """
    if len(population) < LEAST:
        raise Undefined(f"{len(population)} non-members to compare with; {LEAST} needed")
    return float(np.mean(own / np.asarray(population, np.float64) > gamma))


def enough(inside: Sequence[float] | None = None, out: Sequence[float] | None = None) -> None:
    """Undefined with the reason if fewer than `LEAST` shadows saw the text, or did not see it."""
    for values, words in ((inside, "saw it"), (out, "did not see it")):
        if values is not None and len(values) < LEAST:
            raise Undefined(f"shadows that {words}: {len(values)}; {LEAST} needed")


def spread(values: Sequence[float], deviation: float | None) -> float:
    """`deviation`, or if None that of the values (n − 1); undefined if it is 0."""
    deviation_used = float(np.std(np.asarray(values, np.float64), ddof=1)) if deviation is None else deviation
    if not deviation_used > 0:
        raise Undefined("its scores under the shadows do not vary")
    return deviation_used
