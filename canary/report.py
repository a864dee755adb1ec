"""Printing the results."""

from collections.abc import Sequence

from canary.lines import Line


def report(lines: Sequence[Line]) -> None:
    """Print the lines that matter most, one row each."""
    for line in lines:
        if line["measure"] == "count" and line["part"] == "whole":
            print(count_row(line))
        elif line["measure"] == "exposure":
            print(exposure_row(line))
        elif line["measure"].startswith("audit"):
            print("\n".join(audit_rows(line)))


def group_of(line: Line) -> str:
    return f"{line['arm']:<10} {line['kind']} {line['repetitions']}"


def count_row(line: Line) -> str:
    """Generated rows that contain a whole canary."""
    rows = f"{line['exact']['rows']} rows exact, {line['normalised']['rows']} normalised"
    p = ", ".join(f"p {p:.3g} against {other}" for other, p in line["exact"]["fisher_p"].items())
    return f"whole      {group_of(line)}: {rows} of {line['n_scored']:,}{p and f' ({p})'}"


def exposure_row(line: Line) -> str:
    """Mean and median exposure of a group."""
    if line["undefined"]:
        return f"exposure   {group_of(line)}: none ({line['undefined']})"
    copies = line["copies_trained"]
    seen = f", trained on {', '.join(map(str, copies))} times" if copies else ""
    bits = f"mean {line['bits']['mean']:.2f}, median {line['bits']['median']:.2f} of {line['ceiling']:.2f} bits"
    return f"exposure   {group_of(line)}: {bits}{seen}"


def audit_rows(line: Line) -> list[str]:
    """Steinke's bound next to the accountant's ε, those by f-DP, and one row per level at which the first is larger."""
    upper = "none" if line["upper"] is None else f"{line['upper']:.3f}"
    upper = "unknown" if line["upper_unknown"] else upper
    signal = line["signal"] + (", headline" if line.get("headline") else "")
    signal += {"secret": ", secret alone"}.get(line.get("score", ""), "")
    arm = f"{line['measure']:<10} {line['arm']} ({signal})"
    if line["undefined"]:
        most = "" if line["power"]["95"] is None else f", at most {line['power']['95']:.3f} could be shown"
        rows = [f"{arm}: no bound ({line['undefined']}){most}, accountant {upper}"]
    else:
        low, auc = ("none" if value is None else f"{value:.3f}" for value in (line["lower"]["95"], line["auc"]))
        if line["auc_ci"]:
            auc += " ({:.3f}–{:.3f}, {})".format(*line["auc_ci"], line["direction"])
        counts = f"{line['n_scored']} canaries, {line['included']} placed"
        if line["placed_trained"] is not None:
            counts += f", {line['placed_trained']} of {line['placed']} trained on"
        if line["secret_tokens_trained"] != line["secret_tokens"]:
            counts += f" ({line['secret_tokens_trained']} of {line['secret_tokens']} tokens of secrets)"
        most = f"at most {line['power']['95']:.3f} could be shown"
        rows = [f"{arm}: ε ≥ {low} at 95 % ({most}), accountant {upper}, AUC {auc}; {counts}"]
        rows += [f"           {words}" for words in f_dp_rows(line)]
        if other := line.get("other_score"):
            taken = {"secret": "the secret alone", "whole": "the whole sentence"}[other["score"]]
            auc = "none" if other["auc"] is None else f"{other['auc']:.3f}"
            rows.append(f"           {taken}, not the headline: {bound_words(other, '95')}, AUC {auc}")
    return rows + [
        f"           {line['arm']}: the lower bound EXCEEDS the accountant's ε at {level} %"
        for level, above in line["above_upper"].items()
        if above
    ]


def f_dp_rows(line: Line) -> list[str]:
    """Steinke's bound at 99.9 %, and the bounds by f-DP at both levels."""
    rows = [f"Steinke: {bound_words(line, '99.9')}"]
    names = {"epsilon_delta": "f-DP", "gaussian": "f-DP, if the training is a Gaussian mechanism"}
    for name, words in names.items():
        block = line["f_dp"][name]
        bounds = "; ".join(bound_words(block, level) for level in block["lower"])
        rows.append(f"{words}: {bounds} (δ {block['delta']:.3g})")
    return rows


def bound_words(block: Line, level: str) -> str:
    """ε ≥ … at … %, or that there is no bound, and the most that could have been."""
    low, most = block["lower"][level], block["power"][level]
    return f"no bound at {level} %" if low is None else f"ε ≥ {low:.3f} at {level} % (at most {most:.3f})"
