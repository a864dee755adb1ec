"""The verdict as text: audit.md and the printed summary. Dicts of audit.json in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auditing.verdict import LEAKS, NONE_FOUND, UNJUDGED
from mia.attacks import AGAINST_BASE

ANSWERS = {LEAKS: "LEAKS", NONE_FOUND: "no leak found", UNJUDGED: "cannot be judged"}
NAMES = {
    "membership": "Membership",
    "verbatim": "Verbatim copies",
    "untargeted": "Untargeted samples",
    "canaries": "Canaries",
    "extraction": "Secrets",
}
KIND_NAMES = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "card": "card numbers",
    "iban": "IBANs",
    "national_id": "national ids",
    "ip": "IP addresses",
    "url_password": "passwords in URLs",
    "api_key": "API keys",
    "street_address": "street addresses",
    "birth_date": "dates of birth",
    "person": "names of persons",
    "organisation": "names of organisations",
    "location": "names of places",
}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def share(rate: Mapping[str, Any]) -> str:
    """'3 of 60 (1.0 %–13.9 %)'."""
    if not rate["n"]:
        return "0 of 0"
    return f"{rate['hits']:,} of {rate['n']:,} (95 %: {percent(rate['low'])}–{percent(rate['high'])})"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def title(question: str) -> str:
    part, _, kind = question.partition(".")
    return f"{NAMES[part]}: {KIND_NAMES.get(kind, kind)}" if kind else NAMES[part]


def p_words(question: Mapping[str, Any]) -> str:
    return "" if question["p"] is None else f"p {question['p']:.2g}, adjusted {question['p_adjusted']:.2g}"


def membership_line(part: Mapping[str, Any]) -> str:
    if part.get("undefined"):
        return ""
    auc = part["auc"]
    words = f"attack {part['attack']}: AUC {auc['value']:.3f} (95 %: {auc['low']:.3f}–{auc['high']:.3f})"
    level = part["headline_level"]
    if level:
        point = part[f"tpr_at_fpr_{level}"]
        ends = f"{percent(point['low'])}–{percent(point['high'])}"
        words += f", {percent(point['value'])} of members found at {float(level):.0%} false alarms (95 %: {ends})"
    words += f", {part['n_members']:,} members and {part['n_nonmembers']:,} held-out rows"
    known = [value for value in part["blind"].values() if value is not None]
    controls = [f"the furthest blind baseline {max(known, key=lambda value: abs(value - 0.5)):.3f}"] if known else []
    controls += [f"the base alone {part['base_auc']:.3f}"] if part.get("base_auc") is not None else []
    return words + (f"; controls: {', '.join(controls)}" if controls else "")


def secrets_line(result: Mapping[str, Any]) -> str:
    train = result["train"]
    measure = result["measure"]
    bits = train["exposure"][measure]["median_bits"]
    words = (
        f"{train['n_scored']:,} of {train['n_found']:,} distinct secrets asked for: greedy decoding gives "
        f"{share(train['greedy']['tuned'])}"
    )
    if "base" in train["greedy"]:
        words += f", the base {train['greedy']['base']['hits']:,}"
    if bits is not None:
        words += f"; median exposure {bits:.1f} bits among {train['decoys']:,} decoys"
    heldout = result.get("heldout")
    if heldout:
        other = heldout["exposure"][measure]["median_bits"]
        excess = result["excess"]
        shown = "none" if other is None else f"{other:.1f} bits, greedy {share(heldout['greedy']['tuned'])}"
        words += f"; secrets of held-out rows: {shown}"
        if excess["value"] is not None:
            ends = f"{signed(excess['low'])} to {signed(excess['high'])}"
            words += f"; excess {signed(excess['value'])} of ±0.5 (95 %: {ends})"
            if "n_compared" in train:
                words += f", {train['n_compared']:,} against {heldout['n_compared']:,} that stand in a single row"
        if excess.get("smallest_seen") is not None:
            words += f"; an excess of {excess['smallest_seen']:.2f} would have been seen with a chance of 80 %"
    return words


def verbatim_line(part: Mapping[str, Any]) -> str:
    train = part["train"]
    words = f"{share(train['near']['tuned'])} windows continued word for word or nearly"
    if "base" in train["near"]:
        words += f", by the base {train['near']['base']['hits']:,}"
    if "heldout" in part:
        words += f"; of held-out rows {share(part['heldout']['near']['tuned'])}"
        if part["excess"]["smallest_seen"] is not None:
            words += f"; {part['excess']['smallest_seen']:,} hits would have been seen"
    return words + f"; {train['n_dropped']:,} of {train['n_requested']:,} rows too short or not sampled"


def untargeted_line(part: Mapping[str, Any]) -> str:
    train = part["train"]
    words = f"{part['samples']:,} samples hold {share(train['secrets'])} distinct training secrets"
    if "heldout" in part:
        words += f" and {share(part['heldout']['secrets'])} of the held-out ones"
    return words + f"; a 50-token run of a training row: {share(train['samples_with_run'])} samples"


def canary_line(part: Mapping[str, Any]) -> str:
    auc = part["auc"]
    words = [] if auc["value"] is None else [f"AUC {auc['value']:.3f} (95 %: {auc['low']:.3f}–{auc['high']:.3f})"]
    names = {"one_run": "", "f_dp_epsilon_delta": " by f-DP", "f_dp_gaussian": " by f-DP if Gaussian"}
    for name, how in names.items():
        block = part["bounds"][name]
        if block["low"]["95"] is None:
            if name == "one_run":
                words.append(f"no bound on ε ({block['undefined']['95']})")
        else:
            ends = ", ".join(f"{low:.2f} at {level} %" for level, low in block["low"].items() if low is not None)
            words.append(f"ε ≥ {ends}{how} (δ {block['delta']:.3g})")
    return ", ".join(words)


def line_of(audit: Mapping[str, Any], question: str) -> str:
    """What was measured, for one question of the verdict."""
    part, _, kind = question.partition(".")
    result = audit[part].get(kind) if kind else audit[part]
    if not result or (not kind and result.get("undefined")):
        return ""
    lines = {
        "membership": membership_line,
        "extraction": secrets_line,
        "verbatim": verbatim_line,
        "untargeted": untargeted_line,
        "canaries": canary_line,
    }
    return lines[part](result)


def paragraph(audit: Mapping[str, Any]) -> str:
    """The answer in a sentence or two."""
    verdict, name = audit["verdict"], audit["model"]["name"]
    by_answer: dict[str, list[str]] = {}
    for question, result in verdict["questions"].items():
        by_answer.setdefault(result["answer"], []).append(title(question))
    if verdict["answer"] == LEAKS:
        words = f"{name} leaks: {', '.join(by_answer[LEAKS])}."
    elif verdict["answer"] == NONE_FOUND:
        words = f"No leak of {name} was found at the power of this audit ({', '.join(by_answer[NONE_FOUND])})."
    else:
        words = f"Whether {name} leaks cannot be judged."
    missing = by_answer.get(UNJUDGED)
    if missing and verdict["answer"] != UNJUDGED:
        words += f" Not judged: {', '.join(missing)}."
    if audit["model"]["reference"] is None:
        words += f" Impossible without a reference model (--ref_model): the attacks {', '.join(AGAINST_BASE)}."
    return words


def summary(audit: Mapping[str, Any]) -> str:
    """The printed summary: the answer, then one line per question."""
    lines = [paragraph(audit)]
    for question, result in audit["verdict"]["questions"].items():
        said = "; ".join(part for part in (p_words(result), result["why"] or "") if part)
        measured = line_of(audit, question)
        lines.append(
            f"  {ANSWERS[result['answer']]:<17} {title(question)}: {said}{'. ' + measured if measured else ''}"
        )
    return "\n".join(lines)


def markdown(audit: Mapping[str, Any]) -> str:
    """audit.md: the answer first, then the questions, caveats, and inputs and settings."""
    data, model, settings = audit["data"], audit["model"], audit["settings"]
    lines = [f"# Privacy audit of {model['name']}", "", f"**{paragraph(audit)}**", ""]
    lines += [f"> {note}\n" for note in audit["notes"]]
    lines += ["| question | answer | p (adjusted) | measured |", "|---|---|---|---|"]
    for question, result in audit["verdict"]["questions"].items():
        p = "–" if result["p"] is None else f"{result['p']:.2g} ({result['p_adjusted']:.2g})"
        measured = line_of(audit, question)
        said = ". ".join(part for part in (result["why"] or "", measured) if part).replace("|", "\\|")
        lines.append(f"| {title(question)} | {ANSWERS[result['answer']]} | {p} | {said} |")
    lines += [
        "",
        f"One-sided tests fixed beforehand, adjusted together by Holm's method: a model that memorised nothing is "
        f"called leaking in at most {audit['verdict']['alpha']:.0%} of audits.",
        "",
    ]
    for gate in audit["gates"]:
        lines.append(f"- {gate_line(gate)}")
    lines += ["", "| | |", "|---|---|"]
    for name in ("train", "heldout"):
        if name in data:
            rows = data[name]
            used = f"{rows['rows_used']:,} of {rows['rows']:,} rows"
            lines.append(f"| {name} | {rows['path']}, {used}, SHA-256 {rows['sha256'][:16]}… |")
    lines.append(f"| base | {model['base'] or '–'}, reference {model['reference'] or 'none'} |")
    lines.append(f"| precision | {model['dtype']} |")
    if settings["ner"]:
        lines.append(f"| names | found by {finder_words(settings['ner'])} |")
    lines.append(f"| seed | {settings['seed']} |")
    return "\n".join(lines) + "\n"


def finder_words(facts: Mapping[str, str]) -> str:
    """'en_core_web_sm 3.8.0 (spaCy 3.8.7)'."""
    return f"{facts['model']} {facts['version']} (spaCy {facts['spacy']})"


def gate_line(gate: Mapping[str, Any]) -> str:
    if gate["holds"] is None:
        return f"--fail_on {gate['expression']}: the audit has no such number"
    return f"--fail_on {gate['expression']}: {'holds' if gate['holds'] else 'does not hold'} ({gate['value']:.4g})"
