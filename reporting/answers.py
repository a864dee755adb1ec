"""The answers at the top of the page: one sentence per question, with its number, interval and control."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from common.schema import HEADLINE_ATTACK, HEADLINE_TEMPERATURE
from reporting.load import choose
from reporting.style import Look, groups, interval_text, names, short
from reporting.table import Row, Study

MOST_ARMS = 4  # named in a sentence; the tables have all


@dataclass(frozen=True)
class Part:
    """One arm's number in a sentence; `colour` of its dot, as in the figures."""

    name: str
    value: str
    rest: str
    colour: str


@dataclass
class Sentence:
    """`measured`: what the numbers of `parts` are; `controls`: what they are to be compared with."""

    measured: str
    parts: list[Part]
    controls: list[str] = field(default_factory=list)
    left_out: int = 0
    rows: list[Row] = field(default_factory=list)  # behind `parts`, for the picture


@dataclass
class Answer:
    """A question of the page, and the sentences that answer it; none if nothing below measured it."""

    question: str
    anchor: str
    sentences: list[Sentence]


def answers(study: Study, look: Look) -> list[Answer]:
    """The questions in their fixed order; which numbers answer them depends on no result."""
    questions: tuple[tuple[str, str, tuple[Callable[[Study, Look], Sentence | None], ...]], ...] = (
        ("Does it leak?", "extraction", (extracted, exposed)),
        ("Can members be told?", "mia", (membership, audited)),
        ("Which ε holds?", "privacy", (proven, shown)),
        ("Is it still useful?", "utility", (accuracy, perplexity)),
    )
    return [
        Answer(question, anchor, [said for sentence in sentences if (said := sentence(study, look))])
        for question, anchor, sentences in questions
    ]


def sentence(
    measured: str,
    rows: list[Row],
    look: Look,
    rate: bool = False,
    called: dict[str, str] | None = None,
    text: Callable[[Row], tuple[str, str]] | None = None,
) -> Sentence | None:
    """One sentence over `rows`, one per arm, in the order of the page's arms; None without a row."""
    order = {arm: place for place, arm in enumerate(look.arms)}
    rows = sorted(rows, key=lambda row: order.get(row.arm or "", len(order)))
    parts: list[Part] = []
    for row in rows[:MOST_ARMS]:
        name = (called or {}).get(row.model.key if row.model else "", row.arm or "")
        value, rest = (text or (lambda one: number(one, rate)))(row)
        if parts and (parts[-1].value, parts[-1].rest) == (value, rest) and row.value is None:
            parts[-1] = replace(parts[-1], value="", rest="")  # the same reason once, after the last of these arms
        parts.append(Part(short(name, 30), value, rest, look.colour(row.arm)))
    return Sentence(measured, parts, left_out=len(rows) - len(parts), rows=rows) if parts else None


def number(row: Row, rate: bool) -> tuple[str, str]:
    """(value, interval in brackets) of a row; why there is none, if so."""
    value, _, rest = interval_text(row, rate).partition(" (")
    if row.value is None:
        return value, f"({row.undefined or 'no reason given'})"
    return value, f"({rest}" if rest else "(no interval)"


def trained(study: Study, rows: list[Row]) -> tuple[list[Row], list[Row], dict[str, str]]:
    """(rows of the compared trained models, rows of the base, shortest names) within `rows`."""
    compared = {model.key for model in choose(study)[0]}
    own = [row for row in rows if row.measured.key in compared]
    called = names([row.measured for row in own])
    return [row for row in own if not row.measured.is_base], [row for row in own if row.measured.is_base], called


def extracted(study: Study, look: Look) -> Sentence | None:
    """Exact addresses at the fixed temperature over all templates, beside the base and the best name rule."""
    every = study.select("extraction", role="target", template="all", headline=True)
    metric = "exact" if any(row.metric == "exact" for row in every) else "matches"
    rows = [row for row in every if row.metric == metric]
    if not rows:
        return None
    group = groups(rows)[0]
    own, base, called = trained(study, [row for row in rows if row.group == group])
    words = "Exact addresses" if metric == "exact" else "Loose matches"
    answer = sentence(f"{words} ({group}, temperature {HEADLINE_TEMPERATURE})", own or base, look, True, called)
    if answer and own:
        answer.controls += [f"base {interval_text(row)}" for row in base[:1]]
    floor = [row for row in study.select("extraction", metric, role="floor", group=group) if row.value is not None]
    if answer:
        answer.controls += [f"name rule without a model {interval_text(row)}" for row in floor[:1]]
    return answer


def exposed(study: Study, look: Look) -> Sentence | None:
    """Exposure of the canaries placed most often, beside the held-out ones."""
    every = study.select("canary", "exposure")
    most = max((row.repetitions or 0 for row in every), default=0)
    rows = [row for row in every if row.repetitions == most and row.arm != "base"] if most else []
    canaries = f"Median exposure of canaries placed {most}× in bits (quartiles)"
    answer = sentence(canaries, first_of_each(rows), look)
    if answer:
        held = [row for row in every if not row.repetitions and row.value is not None]
        base = [row for row in every if row.repetitions == most and row.arm == "base" and row.value is not None]
        answer.controls = [f"held out, {row.arm} {interval_text(row, False)}" for row in held if row.arm != "base"][:1]
        answer.controls += [f"base {interval_text(row, False)}" for row in base[:1]] + ["chance 1"]
    return answer


def first_of_each(rows: list[Row]) -> list[Row]:
    """The first row of each arm: a second canary or text study has its own lines in the tables."""
    return list({row.arm: row for row in reversed(rows)}.values())[::-1]


def membership(study: Study, look: Look) -> Sentence | None:
    """AUC of the attack fixed in advance, beside chance and the furthest blind baseline."""
    every = study.select("mia", "auc", role="target", attack=HEADLINE_ATTACK)
    if not every:
        return None
    group = groups(every)[0]
    own, base, called = trained(study, [row for row in every if row.group == group])
    answer = sentence(f"AUC of attack {HEADLINE_ATTACK} ({group})", own or base, look, False, called)
    if answer:
        blind = [row for row in study.select("mia", "auc", role="blind", group=group) if row.value is not None]
        far = sorted(blind, key=lambda row: -abs(row.number - 0.5))
        answer.controls = ["chance 0.5"]
        answer.controls += [f"furthest blind baseline {interval_text(row, False)}" for row in far[:1]]
        answer.controls += [] if blind else ["no blind baseline measured"]
    return answer


def audited(study: Study, look: Look) -> Sentence | None:
    """AUC of the audit's canaries, each placed once by a coin, beside the model that saw none."""
    every = [row for row in study.select("canary", "AUC of the audit") if row.settings.get("headline") is not False]
    answer = sentence(
        "AUC of canaries placed once, by a coin", first_of_each([row for row in every if row.arm != "base"]), look
    )
    if answer:
        base = [row for row in every if row.arm == "base" and row.value is not None]
        answer.controls = ["chance 0.5", *(f"base, which saw none, {interval_text(row, False)}" for row in base[:1])]
    return answer


def proven(study: Study, look: Look) -> Sentence | None:
    """ε of the accountant, one per run."""
    rows = [row for row in study.select("privacy", "ε upper (PRV)") if row.model and row.model.last]
    rows = list({row.measured.origin: row for row in rows}.values())

    def text(row: Row) -> tuple[str, str]:
        if row.value is None:
            return "none", f"({row.undefined or 'no reason given'})"
        return f"≤ {row.value:.2f}", f"(δ {float(row.level or 'nan'):.2g}{', void' if row.undefined else ''})"

    shortest = names([row.measured for row in rows])
    called = {row.measured.key: study.same.get(row.measured.arm, shortest[row.measured.key]) for row in rows}
    if not rows:  # the audit has it from the run
        rows = first_of_each(study.select("canary", "ε upper (PRV)"))
    answer = sentence("ε proven by the PRV accountant", rows, look, called=called, text=text)
    if answer:
        answer.controls = ["an upper bound, without sampling error"]
    return answer


def shown(study: Study, look: Look) -> Sentence | None:
    """Lower bounds on ε from the canaries of an audit."""
    every = [row for row in study.select("canary", "ε lower") if row.settings.get("headline") is not False]

    def text(row: Row) -> tuple[str, str]:
        why = (row.undefined or "no reason given").removeprefix("no audit: ")
        return ("no audit", f"({why})") if row.value is None else (f"≥ {row.value:.2f}", "(one-sided 95 %)")

    rows = first_of_each([row for row in every if row.arm != "base"])
    answer = sentence("ε shown by canaries", rows, look, text=text)
    if answer:
        base = [row for row in every if row.arm == "base"]
        answer.controls = [f"base, which saw none, {' '.join(text(row))}" for row in base[:1]]
    return answer


def accuracy(study: Study, look: Look) -> Sentence | None:
    """Accuracy on real rows after training on each arm; of one seed, the interval over the scored rows."""
    every = study.select("utility", "accuracy")
    single = {(row.group, row.arm): row for row in every if row.role == "target"}
    means = [single.get((row.group, row.arm), row) if row.n == 1 else row for row in every if row.role == "mean"]
    seeds = "one seed, 95 %" if any(row.role == "target" for row in means) else "range over seeds"
    answer = sentence(
        f"Accuracy on real rows after training on each ({seeds})",
        first_of_each([row for row in means if row.arm != "real"]),
        look,
    )
    if answer:
        other = [row for row in means if row.arm == "real"] + [row for row in every if row.role == "baseline"]
        words = {"real": "real rows", "base": "base", "majority": "majority class"}
        answer.controls = [
            f"{words.get(row.arm or '', row.arm)} {interval_text(row, False)}" for row in first_of_each(other)
        ]
    return answer


def perplexity(study: Study, look: Look) -> Sentence | None:
    """Perplexity of held-out text, beside the base."""
    every = study.select("perplexity", "mean", role="target")
    if not every:
        return None
    group = groups(every)[0]
    own, base, called = trained(study, [row for row in every if row.group == group])
    answer = sentence(f"Perplexity of held-out text, lower is better ({group})", own or base, look, False, called)
    if answer and own:
        answer.controls = [f"base {interval_text(row, False)}" for row in base[:1]]
    return answer
