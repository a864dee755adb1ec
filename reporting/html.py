"""Render report.html, a self-contained page. Strings in, a string out; every text from a result file is escaped."""

import json
import shlex
from html import escape
from pathlib import Path

from common import models
from common.schema import GREEDY_BELOW, HEADLINE_ATTACK, HEADLINE_TEMPERATURE
from reporting import svg
from reporting.caveats import LEVELS, Caution, script_of
from reporting.load import choose
from reporting.style import Look
from reporting.table import Row, Study, literal

HERE = Path(__file__).resolve().parent
STATIC_ROWS = 100  # a longer detail table is built only when it is opened
MOST_MODELS = 24  # in the first table; if there are more, it has only the compared ones, and the rest is folded below
EXTRA = {  # colours of the page in addition to those of the figures: (light, dark)
    "page": ("#fafaf8", "#14171b"),
    "card": ("#ffffff", "#1b1f25"),
    "line": ("#e3e6e9", "#2d343c"),
    "hover": ("#f3f5f7", "#242a32"),
    "link": ("#00578f", "#7cc0f4"),
    "bad": ("#b3261e", "#ff8a80"),
    "warn": ("#8a5a00", "#f0bd4c"),
}
MOST_RUNS = 25  # provenance blocks shown; if there are more, only those of runs that did not succeed
SECTIONS = {
    "extraction": "Extraction of addresses",
    "perplexity": "Perplexity",
    "mia": "Membership inference",
    "privacy": "Differential privacy and canaries",
    "fidelity": "Fidelity of synthetic text",
    "utility": "Utility of synthetic text",
    "training": "Training",
}
TAGS = {"wrong": "Wrong", "careful": "Careful", "note": "Note"}
SYNONYMS = {
    "matches": "loose match",
    "exact": "exact address",
    "no_pattern": "exact, no name rule",
    "local_part": "local part",
    "domain": "domain",
}


def number(value, form: str = "{:.3g}") -> str:
    return "–" if value is None else form.format(value)


def cell(row: Row | None, form: str = "{:.1%}", count: bool = False, exact: bool = False) -> tuple:
    """(text, sort value, small print): the value, with interval and n below it."""
    if row is None:
        return "", None, ""
    row.shown = True
    if row.value is None:
        return "–", None, row.undefined or "undefined"
    ends = f"{form.format(row.low)}–{form.format(row.high)}" if row.low is not None else "" if exact else "no interval"
    hits = f"{row.count:,} of {row.n:,}" if count and row.count is not None else f"n {row.n:,}" if row.n else ""
    return form.format(row.value), row.value, "\n".join(part for part in (ends, hits) if part)


def td(item, kind: str) -> str:
    """A table cell from a string or (text, sort value[, small print])."""
    if kind == "src" and isinstance(item, str) and "\n" in item:
        lines = item.split("\n")
        listed = "<br>".join(map(escape, lines))
        return f'<td class="src"><details><summary>{len(lines)} lines</summary>{listed}</details></td>'
    text, value, small = (item, ..., "") if isinstance(item, str) else (*item, "")[:3]
    data = "" if value is ... else f' data-v="{"" if value is None else f"{value:.10g}"}"'
    more = "".join(f"<small>{escape(part)}</small>" for part in small.split("\n") if part)
    return f"<td{f' class={kind}' if kind else ''}{data}>{escape(text)}{more}</td>"


def table(heads: list[str], rows: list[list], caption: str, strong=frozenset()) -> str:
    """A sortable table. A head that begins with '<' is left-aligned, one with '@' is a path; small print follows '|'.

    The first cell of a row is its row header.
    """
    kinds = [{"<": "l", "@": "src"}.get(head[0], "") for head in heads]
    names = [head.lstrip("<@") for head in heads]
    head = "".join(
        f'<th scope="col" class="{"l" if kind else ""}"><button type="button">{escape(name.partition("|")[0])}</button>'
        f"<small>{escape(name.partition('|')[2])}</small></th>"
        for name, kind in zip(names, kinds)
    )
    caption_html = f'<p class="caption">{escape(caption)}</p>'
    start = f'<div class="table"><table aria-label="{escape(caption[:120])}"><thead><tr>{head}</tr></thead>'
    if len(rows) > STATIC_ROWS:
        plain = [[_flat(item) for item in row] for row in rows]
        data = json.dumps(plain, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        script = f'<script type="application/json">{data}</script>'
        return (
            f'<details class="long"><summary>{escape(caption)}: {len(rows):,} rows (also in results.csv)</summary>'
            f"{start}<tbody></tbody></table></div>{script}</details>"
        )
    body = []
    for index, row in enumerate(rows):
        first = escape(row[0] if isinstance(row[0], str) else row[0][0])
        mark = ' class="fixed"' if index in strong else ""
        cells = "".join(td(item, kind) for item, kind in zip(row[1:], kinds[1:]))
        body.append(f'<tr{mark}><th scope="row">{first}</th>{cells}</tr>')
    return f"{caption_html}{start}<tbody>{''.join(body)}</tbody></table></div>"


def _flat(item) -> list:
    if isinstance(item, str):
        return [item]
    text, value, small = (*item, "")[:3]
    return [f"{text} ({small.replace(chr(10), ', ')})" if small else text, value]


def folded(caption: str, inner: str, kind: str = "print") -> str:
    return f'<details class="{kind}"><summary>{escape(caption)}</summary>{inner}</details>' if inner else ""


def figure_html(figure: svg.Figure, linked: bool) -> str:
    """Title, legend, panels as SVG, and links to the files. The text alternative lists the numbers drawn."""
    keys = "".join(
        f"<li>{svg.key_svg(colour, marker, style)}{escape(label)}</li>" for label, colour, marker, style in figure.keys
    )
    pieces = []
    for index, panel in enumerate(figure.panels):
        drawn = svg.svg(
            panel,
            f"{figure.name}-{index}",
            f"{figure.title}, {panel.title}. {figure.summary}" if index == 0 else f"{figure.title}, {panel.title}",
        )
        width = 96 * panel.size[0]
        wide = " wide" if panel.size[0] > 6 else ""
        style = f"max-width:{round(width * 1.15)}px;--least:{round(width * 0.8)}px"
        pieces.append(f'<div class="panel{wide}" style="{style}">{drawn}</div>')
    in_words = folded("What it shows, in words", f'<p class="caption">{escape(figure.summary)}</p>', "more")
    files = (
        f'<a href="figures/{figure.name}.png">PNG</a>, <a href="figures/{figure.name}.pdf">PDF</a>' if linked else ""
    )
    return (
        f'<figure id="fig-{figure.name}"><h3>{escape(figure.title)}</h3>'
        f'<p class="caption">{escape(figure.caption)}</p>{f"<ul class=keys>{keys}</ul>" if keys else ""}'
        f'<div class="panels" style="--columns:{min(figure.columns, len(pieces))}">{"".join(pieces)}</div>'
        f'<div class="below">{in_words}<span class="files">{files}</span></div></figure>'
    )


def cautions_html(cautions: list[Caution]) -> str:
    if not cautions:
        return '<p class="lead">No warnings.</p>'
    blocks = []
    if all(caution.level == "note" for caution in cautions):
        blocks.append('<p class="lead">No warnings that make a number here wrong or doubtful.</p>')
    for level in LEVELS:
        same = [caution for caution in cautions if caution.level == level]
        pieces = []
        for caution in same:
            listed = "".join(f"<li>{escape(place)}</li>" for place in caution.places)
            few = len(caution.places) <= 2 and level != "note"
            places = f'<ul class="mono">{listed}</ul>' if listed else ""
            if not few and listed:
                places = folded(f"{len(caution.places):,} place{'s' * (len(caution.places) != 1)}", places, "more")
            tag = f'<span class="tag">{TAGS[level]}</span>'
            text = f"<p>{escape(caution.text)}</p>"
            pieces.append(
                f'<div class="caution {level}">{tag}<strong>{escape(caution.title)}</strong>{text}{places}</div>'
            )
        many = level == "note" and len(pieces) > 3
        blocks.append(folded(f"{len(pieces)} notes", "".join(pieces)) if many else "".join(pieces))
    return "".join(blocks)


def glance(study: Study, look: Look) -> str:
    """One row per model, each number at its fixed setting."""
    columns: list[tuple[str, dict, dict]] = []

    def add(head: str, rows: list[Row], form="{:.1%}", count=False, exact=False):
        by_model = {row.model.key: row for row in rows}
        if by_model:
            columns.append((head, {key: cell(row, form, count, exact) for key, row in by_model.items()}, by_model))

    every = study.select("extraction", role="target", template="all")
    by_group: dict[str, set] = {}
    for row in every:
        by_group.setdefault(row.group, set()).add(row.model.key)
    order = sorted(by_group, key=lambda group: -len(by_group[group]))
    for index, group in enumerate(order[:3]):
        of = f"|{group}" if len(order) > 1 else ""
        rows = [row for row in every if row.group == group]
        fixed = [row for row in rows if row.headline]
        add(f"Exact addresses{of}", [row for row in fixed if row.metric == "exact"], count=True)
        if index == 0:
            greedy = [row for row in rows if row.temperature <= GREEDY_BELOW and row.metric == "exact"]
            greedy.sort(key=lambda row: -row.temperature)
            add("Exact, greedy", greedy, count=True)
            add("Exact, no name rule", [row for row in fixed if row.metric == "no_pattern"], count=True)
            add("Loose match", [row for row in fixed if row.metric == "matches"], count=True)
    perplexity = study.select("perplexity", "mean", role="target")
    sizes = [row.group for row in perplexity]
    main = max(set(sizes), key=lambda group: (sizes.count(group), group)) if sizes else None
    add("Perplexity", [row for row in perplexity if row.group == main], "{:.2f}")
    attack = f"|attack {HEADLINE_ATTACK}"
    aucs = study.select("mia", "auc", role="target", attack=HEADLINE_ATTACK)
    add(f"Membership AUC{attack}", aucs, "{:.3f}")
    add(f"TPR at 1 % FPR{attack}", study.select("mia", "tpr", role="target", attack=HEADLINE_ATTACK, level="0.01"))
    add("ε|upper bound, PRV", study.select("privacy", "ε upper (PRV)"), "{:.2f}", exact=True)
    hardly = {model.key: model.change for model in study.models.values() if models.hardly_moved(model.change)}
    if any(key in by_model for key in hardly for _, _, by_model in columns):
        note = "the model has hardly moved: its row is that of the base"
        cells = {key: (f"{change:.1g}", change, note) for key, change in hardly.items()}
        columns.append(("‖ΔW‖/‖W‖|if small", cells, {}))
    if not columns:
        return ""
    chosen, rule, _ = choose(study)
    keys = {key for head, _, by_model in columns for key in by_model if not head.startswith("ε|")}
    keys |= {model.key for model in chosen if any(model.key in by_model for _, _, by_model in columns)}
    measured = [model for model in look.sort(study.models.values()) if model.key in keys]
    rows = []
    for model in measured:
        sources = dict.fromkeys(by_model[model.key].source for _, _, by_model in columns if model.key in by_model)
        items = [cells.get(model.key, ("", None)) for _, cells, _ in columns]
        rows.append([model.label, *items, "\n".join(sources)])
    strong = {index for index, model in enumerate(measured) if model in chosen and len(measured) > len(chosen)}
    caption = (
        f"Each number at one setting fixed in advance: extraction at temperature {HEADLINE_TEMPERATURE} over all "
        f"templates (with greedy next to it), membership inference with {HEADLINE_ATTACK}. 95 % intervals. Figures "
        f"compare {rule}{', in bold here' if strong else ''}."
    )
    heads = ["<Model", *[head for head, _, _ in columns], "@Lines"]
    if len(measured) <= MOST_MODELS:
        return table(heads, rows, caption, strong)
    few = [row for index, row in enumerate(rows) if index in strong]
    every = folded(f"All {len(measured):,} models", table(heads, rows, "All measured checkpoints"), "all")
    return table(heads, few, caption.replace(", in bold here", ", the only ones here")) + every


def extraction_table(study: Study, headline: bool) -> str:
    """One row per line × template: counts, intervals, comparison with the baseline, source."""
    rows = study.select("extraction", role="target", template=lambda name: name != "all")
    rows = [row for row in rows if (row.headline or row.temperature <= GREEDY_BELOW) == headline]
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.source, row.template), {})[row.metric] = row
    paired = {
        (row.source, row.template): row
        for row in study.select("extraction", role="baseline")
        if row.metric.startswith("exact")
    }
    measures = [name for name in SYNONYMS if any(name in by_metric for by_metric in lines.values())]
    extra = [
        name
        for name in ("expected exact in 1 draws", "truth log-probability (nats)")
        if any(name in by_metric for by_metric in lines.values())
    ]
    table_rows = []
    for key, by_metric in lines.items():
        first = next(iter(by_metric.values()))
        items = [cell(by_metric.get(name), count=True) for name in measures]
        items += [
            (number(by_metric[name].value, "{:.2%}" if "draws" in name else "{:.2f}"), by_metric[name].value)
            if name in by_metric
            else ("", None)
            for name in extra
        ]
        pair = paired.get(key)
        for row in [*(by_metric[name] for name in extra if name in by_metric), *([pair] if pair else [])]:
            row.shown = True
        if paired:
            items.append(
                ("", None)
                if pair is None
                else (
                    f"+{pair.settings['gained']} −{pair.settings['lost']}",
                    pair.value,
                    f"p {number(pair.value, '{:.2g}')}",
                )
            )
        table_rows.append(
            [
                first.model.label,
                first.group,
                (f"{first.temperature:g}", first.temperature),
                first.template,
                *items,
                first.source,
            ]
        )
    heads = ["<Model", "<People", "Temperature", "<Template", *(SYNONYMS[name].capitalize() for name in measures)]
    heads += [{"e": "Expected exact, one draw", "t": "log p(truth), nats"}[name[0]] for name in extra]
    heads += (["Exact against baseline (McNemar)"] if paired else []) + ["@Line"]
    caption = f"Temperature {HEADLINE_TEMPERATURE} and greedy" if headline else "All other temperatures"
    return table(heads, table_rows, caption) if table_rows else ""


def plain_table(rows: list[Row], caption: str, heads: dict, form="{:.4g}") -> str:
    """One table row per Row: the columns `heads` {head: function of the row}, then value, interval, n, source."""
    table_rows = []
    for row in rows:
        row.shown = True
        ends = f"{form.format(row.low)}–{form.format(row.high)}" if row.low is not None else ""
        table_rows.append(
            [
                *(function(row) for function in heads.values()),
                (number(row.value, form) if row.value is not None else f"– {row.undefined or ''}", row.value),
                ends,
                row.interval or "",
                (f"{row.n:,}" if row.n else "", row.n),
                row.source,
            ]
        )
    names = [*heads, "Value", "<Interval", "<Kind", "n", "@Line"]
    return table(names, table_rows, caption) if table_rows else ""


def _who(row: Row) -> str:
    return row.model.label if row.model else row.arm or ""


AREAS = {"extraction": ["extraction"], "perplexity": ["perplexity"], "mia": ["mia"], "privacy": ["privacy", "canary"],
         "fidelity": ["fidelity"], "utility": ["utility", "importance", "human"]}  # fmt: skip


def unshown(study: Study, section: str) -> str:
    """The numbers of a section that no table here has, counted by measure and role."""
    counts: dict[str, int] = {}
    for row in (row for area in AREAS.get(section, ()) for row in study.select(area) if not row.shown):
        of = "" if row.role in ("target", "mean") else f" of the {row.role}"
        name = f"{row.metric}{of}{', all templates together' if row.template == 'all' else ''}"
        counts[name] = counts.get(name, 0) + 1
    listed = "; ".join(f"{name} ({count:,})" for name, count in counts.items())
    return f'<p class="caption">Only in results.csv: {escape(listed)}.</p>' if counts else ""


def section_tables(study: Study, section: str) -> str:
    pick = study.select
    if section == "extraction":
        floor = {row.group: row for row in pick("extraction", "exact", role="floor")}
        heads = {"<People": lambda row: row.group, "<Rule": lambda row: row.attack}
        for row in pick("extraction", "exact", role="floor"):
            row.shown = row.value == floor[row.group].value  # the same for all models and temperatures
        rule = plain_table(list(floor.values()), "Name-rule floor: exact addresses without a model", heads, "{:.1%}")
        few = folded("Every line at the fixed settings", extraction_table(study, True))
        return few + folded("Other temperatures", extraction_table(study, False), "more") + folded("Floor", rule)
    if section == "perplexity":
        heads = {"<Model": _who, "<Measure": lambda row: row.metric.replace("_", " "), "<Texts": lambda row: row.group}
        return folded("All figures", plain_table(pick("perplexity"), "Perplexity and bits per byte", heads))
    if section == "mia":
        heads = {
            "<Model": _who,
            "<Attack": lambda row: row.attack,
            "<Of": lambda row: row.role,
            "<Texts": lambda row: row.group,
        }
        auc = plain_table(
            pick("mia", "auc"), "ROC-AUC of every attack, with blind baselines and the base", heads, "{:.3f}"
        )
        heads |= {
            "Level": lambda row: (f"{float(row.level):.1%}", float(row.level)),
            "False positives": lambda row: (number(row.count, "{:,}"), row.count),
        }
        tpr = plain_table(pick("mia", "tpr"), "True positive rate at a fixed false positive rate", heads, "{:.2%}")
        return folded("AUC", auc) + folded("TPR at low FPR", tpr) + inference_table(study)
    if section == "privacy":
        heads = {
            "<Model": _who,
            "<Bound": lambda row: row.metric,
            "δ": lambda row: row.level or "",
            "<Unit": lambda row: str(row.settings.get("unit", "")),
            "σ": lambda row: str(row.settings.get("noise_multiplier", "")),
            "Sampling rate": lambda row: number(row.settings.get("sample_rate"), "{:.4g}"),
            "Steps": lambda row: str(row.settings.get("steps", "")),
        }
        upper = plain_table(pick("privacy"), "ε from the accountants, add/remove adjacency", heads)
        heads = {
            "<Arm": _who,
            "<Measure": lambda row: row.metric,
            "<Part": lambda row: row.template or "",
            "<Canaries": lambda row: row.attack or "",
            "Inserted": lambda row: (number(row.repetitions, "{}×"), row.repetitions),
            "Rows": lambda row: (number(row.count, "{:,}"), row.count),
        }
        return folded("ε", upper) + folded("Canaries", plain_table(pick("canary"), "Canaries", heads))
    if section == "fidelity":
        heads = {"<Measure": lambda row: row.metric, "<Arm": _who, "<File": lambda row: row.group}
        return folded("Every measure", plain_table(pick("fidelity"), "Fidelity, and its excess over real", heads))
    if section == "utility":
        heads = {
            "<Measure": lambda row: row.metric,
            "<Arm": _who,
            "Seed": lambda row: number(row.seed, "{}"),
            "<Against real": lambda row: _mcnemar(row),
            "<‖ΔW‖/‖W‖": _change,
        }
        first = plain_table(pick("utility"), "Train on synthetic, test on real", heads)
        heads = {"<Measure": lambda row: row.metric, "<Arm": _who}
        second = plain_table(pick("importance"), "Feature importance consistency", heads)
        heads = {"<Label": lambda row: row.metric, "<Arm": _who, "<Rater": lambda row: row.template or "all"}
        third = plain_table(pick("human"), "Human evaluation of blinded rows", heads)
        return folded("Every score", first) + folded("Feature importance", second) + folded("Human evaluation", third)
    return ""


def _change(row: Row) -> str:
    change = row.settings.get("relative_change")
    note = ": hardly moved, equals the base" if models.hardly_moved(change) else ""
    return "" if change is None else f"{change:.1g}{note}"


def _mcnemar(row: Row) -> str:
    pair = row.settings.get("mcnemar_against_real")
    return f"+{pair['gained']} −{pair['lost']}, p {pair['p']:.2g}" if pair else ""


def inference_table(study: Study) -> str:
    """Dataset inference (Maini et al. 2024), from run_mia.json."""
    rows = []
    for path, run in study.runs.items():
        for who, test in (run.get("dataset_inference") or {}).items():
            if test:
                rows.append(
                    [
                        str(run.get("args", {}).get("model") or Path(path).parent.name),
                        who,
                        (number(test["p"], "{:.2g}"), test["p"]),
                        (number(test["t"], "{:.2f}"), test["t"]),
                        (f"{test['n_members']:,}", test["n_members"]),
                        study.shown(path),
                    ]
                )
    heads = ["<Model", "<Scores of", "p", "t", "Members", "@File"]
    return folded("Dataset inference", table(heads, rows, "Set-level test; blind: without the model") if rows else "")


def training_table(study: Study) -> str:
    rows = []
    for path, run in study.runs.items():
        if Path(path).name == "run.json":
            speed, change = run.get("tokens_per_second"), run.get("relative_change")
            peak = run.get("peak_memory") or {}
            memory = peak.get("gpu_bytes") or peak.get("cpu_bytes")
            steps = run.get("steps")
            rows.append(
                [
                    study.shown(Path(path).parent),
                    str(run.get("status")),
                    (number(steps, "{:,}"), steps),
                    (number(speed, "{:,.0f}"), speed),
                    (number(run.get("seconds"), "{:,.0f}"), run.get("seconds")),
                    (number(memory and memory / 2**30, "{:.1f}"), memory),
                    (number(change, "{:.2g}"), change),
                    str(run.get("seed")),
                    study.shown(path),
                ]
            )
    heads = ["<Run", "<Status", "Steps", "Tokens/s", "Seconds", "Peak GiB", "‖ΔW‖/‖W‖", "Seed", "@File"]
    return folded("Runs", table(heads, rows, "Training runs") if rows else "")


def groups_html(study: Study) -> str:
    lists = []
    for area, groups in study.groups.items():
        items = "".join(
            f"<dt><b>{escape(label)}</b> ({escape(SECTIONS[area].lower())})</dt>"
            f'<dd class="mono">{escape(", ".join(f"{key} {value}" for key, value in settings.items()))}</dd>'
            for label, settings in groups.items()
        )
        lists.append(f"<dl>{items}</dl>")
    return "".join(lists)


def run_html(study: Study, path: str, run: dict) -> str:
    """The provenance block of one run."""
    status, start = str(run.get("status")), str(run.get("start", "")).replace("T", " ").replace("+00:00", " UTC")
    commit = (run.get("commit") or "unknown commit")[:12] + (" (changed)" if run.get("dirty") else "")
    seconds = f"{run['seconds']:,.0f} s" if run.get("seconds") is not None else "no end"
    line = f"{script_of(run, path)} · {start} · {seconds} · {commit}"
    kept = {key: value for key, value in run.items() if key not in ("argv", "packages", "args", "near_duplicates")}
    packages = ", ".join(f"{name} {version}" for name, version in (run.get("packages") or {}).items())
    args = " ".join(f"--{key}={value}" for key, value in (run.get("args") or {}).items() if value not in (None, False))
    words = shlex.join(map(str, run.get("argv") or []))
    text = json.dumps(kept, ensure_ascii=False, indent=1, default=str)
    return (
        f'<details class="run"><summary><span class="status {escape(status)}">{escape(status)}</span> '
        f'{escape(line)} <span class="mono">{escape(study.shown(path))}</span></summary>'
        f"<pre>$ {escape(words)}\n\n{escape(args)}\n\n{escape(packages)}\n\n{escape(text)}</pre></details>"
    )


def render(study: Study, figures: list[svg.Figure], cautions: list[Caution], made: dict, responses: str = "") -> str:
    """The whole page. `made`: time, commit and dirty flag of this report, and whether there are images to link to."""
    look = Look(study)
    parts = {"glance": "At a glance"} if study.rows else {}
    body = []
    top = glance(study, look)
    if top:
        body.append(f'<h2 id="glance">{parts["glance"]}</h2>{top}')
    else:
        parts = {}
    for section, title in SECTIONS.items():
        drawn = "".join(figure_html(figure, made["images"]) for figure in figures if figure.section == section)
        below = training_table(study) if section == "training" else section_tables(study, section)
        if drawn or below:
            parts[section] = title
            body.append(f'<h2 id="{section}">{title}</h2>{drawn}{below}{unshown(study, section)}')
    if responses:
        parts["responses"] = "Answers"
        body.append(f'<h2 id="responses">Answers</h2>{responses}')
    if study.groups:
        parts["settings"] = "Settings"
        body.append(
            '<h2 id="settings">Settings</h2><p class="lead">Numbers are comparable if these agree.</p>'
            + groups_html(study)
        )
    if study.runs:
        parts["runs"] = "Runs"
        lead = '<p class="lead">The provenance of these numbers, as recorded by each run.</p>'
        blocks = "".join(run_html(study, path, run) for path, run in study.runs.items())
        bad = {path: run for path, run in study.runs.items() if run.get("status") != "ok"}
        if len(study.runs) > MOST_RUNS:
            first = "".join(run_html(study, path, run) for path, run in bad.items())
            blocks = first + folded(f"All {len(study.runs):,} runs", blocks, "all")
        body.append(f'<h2 id="runs">Runs</h2>{lead}{blocks}')
    bad = sum(caution.level == "wrong" for caution in cautions)
    careful = sum(caution.level == "careful" for caution in cautions)
    files = sum(len(paths) for kind, paths in study.files.items() if kind not in ("adapter", "responses"))
    measured = len({row.model.key for row in study.rows if row.model})
    facts = {"models": measured, "result files": files, "numbers": len(study.rows), "runs": len(study.runs)}
    shown = "".join(f"<li><b>{value:,}</b> {name}</li>" for name, value in facts.items())
    first = {"cautions": f"Read first ({bad + careful})" if bad + careful else "Read first"}
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in {**first, **parts}.items())
    theme = [svg.css_variables(dark) + "".join(f"--{k}:{pair[dark]};" for k, pair in EXTRA.items()) for dark in (0, 1)]
    font = '--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;'
    css = (
        f":root{{color-scheme:light dark;{font}{theme[0]}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{theme[1]}}}}}"
        + (HERE / "page.css").read_text(encoding="utf-8")
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    commit = (made.get("commit") or "an unknown commit")[:12] + (" with changes" if made.get("dirty") else "")
    images = "; the figures, as PNG and PDF, in figures/" if made["images"] else ""
    name, root = (escape(literal(str(text))) for text in (study.root.name, study.root))
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Results: {name}</title><style>{css}</style></head><body>"
        f'<header><h1>Results: {name}</h1><p class="lead">All results below '
        f'<span class="mono">{root}</span>; paths on this page are relative to it.</p>'
        f'<ul class="facts">{shown}</ul></header><nav aria-label="Sections"><div>{links}</div></nav><main>'
        f'<h2 id="cautions" style="border:0;margin-top:1rem">Read first</h2>{cautions_html(cautions)}'
        f"{''.join(body)}</main><footer>Generated {escape(made['time'])} by plot_results.py at {escape(commit)}. All "
        f"numbers, with settings and source lines, are in results.csv{images}.</footer>"
        f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )
    return text.encode("utf-8", "backslashreplace").decode()  # escapes lone surrogates from result files
