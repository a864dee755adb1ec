"""Render report.html, a self-contained page. page.html.j2 escapes every text from a result file."""

import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reporting import svg, tables
from reporting.answers import Answer, answers
from reporting.blocks import Block
from reporting.caveats import LEVELS, Caution, script_of
from reporting.glance import glance_table
from reporting.style import Look
from reporting.table import Study, literal

HERE = Path(__file__).resolve().parent
PAGE_COLOURS = {  # in addition to those of the figures: (light, dark)
    "page": ("#fafaf8", "#14171b"),
    "card": ("#ffffff", "#1b1f25"),
    "line": ("#e3e6e9", "#2d343c"),
    "hover": ("#f3f5f7", "#242a32"),
    "link": ("#00578f", "#7cc0f4"),
    "bad": ("#b3261e", "#ff8a80"),
    "warn": ("#8a5a00", "#f0bd4c"),
}
UNSHOWN = ("argv", "packages", "args", "near_duplicates", "passes")  # of a run record; passes depend on the cache
MOST_RUNS = 25  # provenance blocks shown; if there are more, only those of runs that did not succeed
TAGS = {"wrong": "Wrong", "careful": "Careful", "note": "Note"}
PIXELS = 96  # per inch of a figure


def figure(drawn: svg.Figure) -> dict[str, Any]:
    """Title, legend and panels as SVG. The text alternative lists the numbers drawn."""
    panels = []
    for number, panel in enumerate(drawn.panels):
        label = f"{drawn.title}, {panel.title}" + ("" if number else f". {drawn.summary}")
        width = PIXELS * panel.size[0]
        panels.append(
            {
                "svg": Markup(svg.svg(panel, f"{drawn.name}-{number}", label)),
                "wide": panel.size[0] > 6,
                "widest": round(width * 1.35),
                "least": round(width * 0.8),
            }
        )
    return {
        "name": drawn.name,
        "title": drawn.title,
        "caption": drawn.caption,
        "summary": drawn.summary,
        "legend": [{"sample": Markup(svg.key_svg(*key[1:])), "label": key[0]} for key in drawn.keys],
        "columns": min(drawn.columns, len(panels)),
        "panels": panels,
    }


def provenance(study: Study, path: str, run: dict[str, Any]) -> dict[str, str]:
    """The provenance block of a run: status, summary line, and the whole record as text."""
    start = str(run.get("start", "")).replace("T", " ").replace("+00:00", " UTC")
    commit = (run.get("commit") or "unknown commit")[:12] + (" (changed)" if run.get("dirty") else "")
    seconds = f"{run['seconds']:,.0f} s" if run.get("seconds") is not None else "no end"
    rest = {key: value for key, value in run.items() if key not in UNSHOWN}
    packages = ", ".join(f"{name} {version}" for name, version in (run.get("packages") or {}).items())
    args = " ".join(f"--{key}={value}" for key, value in (run.get("args") or {}).items() if value not in (None, False))
    words = shlex.join(map(str, run.get("argv") or []))
    record = json.dumps(rest, ensure_ascii=False, indent=1, default=str)
    return {
        "status": str(run.get("status")),
        "line": f"{script_of(run, path)} · {start} · {seconds} · {commit}",
        "path": study.shown(path),
        "text": f"$ {words}\n\n{args}\n\n{packages}\n\n{record}",
    }


def sections(study: Study, figures: list[svg.Figure], answers: list[Block]) -> list[dict[str, Any]]:
    """The sections of the page that are not empty."""
    parts: list[dict[str, Any]] = []
    glance = glance_table(study, Look(study))
    if glance:
        parts.append({"anchor": "glance", "title": "At a glance", "figures": [], "inner": glance})
    for anchor, (title, tables_of) in tables.SECTIONS.items():
        drawn = [figure(item) for item in figures if item.section == anchor]
        below = tables_of(study)
        if drawn or below:
            inner = below + tables.only_in_csv(study, anchor)
            parts.append({"anchor": anchor, "title": title, "figures": pairs(drawn), "inner": inner})
    if answers:
        parts.append({"anchor": "responses", "title": "Answers", "figures": [], "inner": answers})
    return parts


def questions(study: Study) -> list[Answer]:
    """The answers of the page, without those that an audit's verdict has already given."""
    found = answers(study, Look(study))
    if study.audits:
        found = [one for one in found if one.anchor not in ("extraction", "mia")]
    return found


def pairs(figures: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Figures by line of the page: two of one panel share a line, so that no half of it is empty."""
    lines: list[list[dict[str, Any]]] = []
    for one in figures:
        small = len(one["panels"]) == 1 and not one["panels"][0]["wide"]
        if small and lines and len(lines[-1]) == 1 and lines[-1][0]["small"]:
            lines[-1].append(one | {"small": small})
        else:
            lines.append([one | {"small": small}])
    return lines


def settings(study: Study) -> list[list[dict[str, str]]]:
    """The settings of each group of numbers, by area."""
    return [
        [
            {
                "label": label,
                "area": tables.SECTIONS[area][0].lower(),
                "settings": ", ".join(f"{key} {value}" for key, value in group.items()),
            }
            for label, group in groups.items()
        ]
        for area, groups in study.groups.items()
    ]


def render(
    study: Study, figures: list[svg.Figure], cautions: list[Caution], made: dict[str, Any], answers: list[Block]
) -> str:
    """The whole page. `made`: time, commit and dirty flag of this report, and whether there are images to link to."""
    parts = sections(study, figures, answers)
    runs = [provenance(study, path, run) for path, run in study.runs.items()]
    by_level = {level: [caution for caution in cautions if caution.level == level] for level in LEVELS}
    grave = len(by_level["wrong"]) + len(by_level["careful"])
    verdicts = [
        {"words": audit["verdict"]["words"], "table": tables.audit_table(audit, file)} for file, audit in study.audits
    ]
    links = [("verdict", "Verdict")] * bool(verdicts) + [("answers", "Answers")]
    links += [("cautions", f"Read first ({grave})" if grave else "Read first")]
    links += [(part["anchor"], part["title"]) for part in parts]
    links += [("settings", "Settings")] * bool(study.groups) + [("runs", "Runs")] * bool(runs)
    commit = (made.get("commit") or "an unknown commit")[:12] + (" with changes" if made.get("dirty") else "")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    text = environment.get_template("page.html.j2").render(
        name=literal(study.root.name),
        root=literal(str(study.root)),
        colours=[*svg.COLOURS.items(), *PAGE_COLOURS.items()],
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        facts={
            "models": len({row.model.key for row in study.rows if row.model}),
            "result files": sum(len(at) for kind, at in study.files.items() if kind not in ("adapter", "responses")),
            "numbers": len(study.rows),
            "runs": len(runs),
        },
        links=links,
        verdicts=verdicts,
        questions=questions(study),
        overview=[figure(item) for item in figures if item.section == "answers"],
        cautions={level: items for level, items in by_level.items() if items},
        tags=TAGS,
        colours_of=svg.VARIABLES,
        sections=parts,
        groups=settings(study),
        runs=runs,
        many_runs=len(runs) > MOST_RUNS,
        made={"time": made["time"], "commit": commit},
        images=made["images"],
    )
    return text.strip().encode("utf-8", "backslashreplace").decode() + "\n"  # escapes lone surrogates from result files
