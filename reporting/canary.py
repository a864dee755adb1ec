"""Lines of results_canary.jsonl → rows: counts in generated text, exposure by repetition, bounds of ε."""


def rows(line: dict, study, models, path, number: int) -> list:
    """Rows of one line; `template` is the part of a canary, `attack` the canary's kind or the audit's signal."""
    from reporting.load import Row

    measure = line["measure"]
    shared = {
        "arm": line["arm"],
        "group": study.shown(path),
        "n_requested": line["n_requested"],
        "n_dropped": line["n_dropped"],
        "repetitions": line.get("repetitions"),
        "attack": line.get("signal") or line.get("kind"),
    }
    n, checkpoint = line["n_scored"], checkpoint_of(line, study, models, path)
    if measure == "count":
        made = []
        for how, metric in (("normalised", "generated rows with it"), ("exact", "generated rows with it, as written")):
            found = line[how]
            more = {"canaries": found["canaries"], "fisher_p": found["fisher_p"], "n_canaries": line["n_canaries"]}
            made.append(Row("canary", metric, found["rate"], *found["ci"], "Clopper–Pearson 95 %", count=found["rows"],
                            n=n, template=line["part"], settings=more, **shared))  # fmt: skip
        return made
    if measure == "exposure":
        bits = line["bits"]
        if bits is None:
            return [Row("canary", "exposure", None, n=n, undefined=line.get("undefined"), **shared)]
        more = {key: line.get(key) for key in ("references", "ceiling", "space_bits", "p_above_held_out")}
        made = [
            Row("canary", "exposure", bits["median"], bits["q25"], bits["q75"], "quartiles over canaries", n=n,
                settings=more, **shared),
            Row("canary", "exposure, mean", bits["mean"], bits["q05"], bits["q95"], "5–95 % of canaries", n=n,
                settings=more, **shared),
        ]  # fmt: skip
        if line.get("extrapolated"):
            far, fit = line["extrapolated"]["bits"], line["extrapolated"]["ks_p"]
            made.append(Row("canary", "exposure, extrapolated", far["median"], far["q25"], far["q75"],
                            "quartiles over canaries", n=n, settings={"ks_p": fit}, **shared))  # fmt: skip
        return made
    if measure == "text_auc":
        return [Row("canary", "AUC of text alone", line["auc"], *(line.get("auc_ci") or (None, None)),
                    line.get("auc_ci_method"), n=n, undefined=line.get("undefined"), **shared)]  # fmt: skip
    if not measure.startswith("audit"):
        raise ValueError(f"unknown measure {measure!r}")
    more = {key: line[key] for key in ("upper", "delta", "unit", "void", "guesses", "included", "above_upper")}
    more |= {key: line.get(key) for key in ("power", "placed", "placed_trained", "upper_unknown")}
    more["checkpoint"] = checkpoint
    above = [level for level, yes in line["above_upper"].items() if yes]
    if any(None in (line["lower"][level], line["upper"]) for level in above):
        raise ValueError("above_upper: without the bounds that it compares")
    more["lower_above_upper"] = above
    more["headline"] = line.get("headline")  # of several signals, the one to report
    why = line.get("undefined") or "fewer than five canaries"
    kind = "" if measure == "audit" else ", text only"
    made = [
        Row("canary", f"ε lower{kind}" + ("" if level == "95" else f" at {level} %"), value, n=n, level=level,
            undefined=None if value is not None else why, settings=more, **shared)
        for level, value in line["lower"].items()
    ]  # fmt: skip
    bound = line["heuristic"]["bound"]
    if bound:
        made.append(Row("canary", f"ε lower{kind}, heuristic", bound["epsilon"], n=n, settings=bound, **shared))
    if line["upper"] is not None:
        made.append(Row("canary", "ε upper (PRV)", line["upper"], n=n, level=f"{line['delta']:g}",
                        undefined=line["void"], settings=more, **shared))  # fmt: skip
    made.append(Row("canary", f"AUC of the audit{kind}", line["auc"], *(line.get("auc_ci") or (None, None)),
                    line.get("auc_ci_method"), n=n, settings=more | {"direction": line.get("direction")},
                    undefined=None if line["auc"] is not None else line.get("undefined"), **shared))  # fmt: skip
    return made


def checkpoint_of(line: dict, study, models, path) -> str | None:
    """The key of the model that an arm's line is of, by the run_canary.json beside it."""
    args = study.runs.get(str(path.parent / "run_canary.json"), {}).get("args", {})
    named = dict(word.split("=", 1) for word in args.get("models") or [])
    return str(models.resolve(named[line["arm"]], path)) if line["arm"] in named else None
