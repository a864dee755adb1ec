"""The audit: each part is measured by its own package, then the verdict and the gates."""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from auditing import report, verdict
from auditing.config import PARTS, AuditConfig
from auditing.prepare import WITHOUT_REFERENCE, AuditTask, Rows, prepare
from canary import measurement as canaries
from canary.config import MeasureConfig
from canary.task import RESULTS, ROWS
from common import distributed, json_files, locks, models, provenance, results, vllm_engine
from common.checkpoints import BaseLoader
from common.distributed import World
from common.problems import UserError
from common.schema import HEADLINE_ATTACK
from memorization import measure as memorization
from memorization import task as questions
from memorization.exposure import mann_whitney
from mia.measure import cache_folder, measure_all

SCHEMA = 1
GATE_HELD = 3  # exit status
LEVELS = ("0.1", "0.01", "0.001")  # false positive rates
LEFT_OUT = "left out by --without"


def run(config: AuditConfig) -> int:
    """Audit, write audit.json, audit.md and report.html; 0, or 3 if a --fail_on gate holds or its number is missing."""
    with locks.output_folder(config.output_dir, config.dry_run, "audit") as output:
        task = prepare(config)
        if config.dry_run:
            print(*task.notes, plan(config, task), sep="\n")
            return 0
        return measure(config, task, output)


def plan(config: AuditConfig, task: AuditTask) -> str:
    rows = ", ".join(f"{len(one.indices):,} of {one.n:,} rows of {one.path}" for one in task.rows.values())
    parts = ", ".join(chosen_parts(config, task))
    against = f" against {task.base.name}" if task.base else ""
    names = f"; names by {report.finder_words(task.finder.facts)}" if task.finder else ""
    return f"would audit {task.model.name}{against} on {rows}: {parts}{names}; results in {config.output_dir}"


def chosen_parts(config: AuditConfig, task: AuditTask) -> list[str]:
    able = {"membership": "heldout" in task.rows, "canaries": bool(config.canaries)}
    return [part for part in PARTS if part not in config.without and able.get(part, True)]


def measure(config: AuditConfig, task: AuditTask, output: locks.Output) -> int:
    world = distributed.start(model_parallel=config.model_parallel)
    folder = Path(config.output_dir)
    for note in task.notes:
        world.say(note)
    dtype = models.resolve_dtype(config.dtype, world.device)
    with results.Run(folder / "run_audit.json", config, task.inputs, world, output) as record:
        audit: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": None,
            "model": describe(task, dtype),
            "data": {name: data_facts(rows) for name, rows in task.rows.items()},
            "notes": task.notes,
        }
        audit["membership"] = membership_part(config, task, world)
        lines = memorization_parts(config, task, audit, dtype, world)
        audit["canaries"] = canary_part(config, task, world)
        if caveat := hardly_moved(task, audit["model"].get("relative_change")):
            audit["notes"] = [*task.notes, caveat]
            world.say(caveat)
        audit["verdict"] = verdict.judge(audit)
        add_words(audit)
        audit["gates"] = [gate.result(audit) for gate in task.gates]
        audit["settings"] = settings(config, task)
        if world.main:
            record.files.write_json(folder / "audit.json", audit)
            if config.save_responses:
                record.files.write_jsonl(folder / "secrets_private.jsonl", lines, permissions=0o600)
            told = [{key: value for key, value in line.items() if key != "value"} for line in lines]
            record.files.write_jsonl(folder / "results_secrets.jsonl", told)
            with record.files.open(folder / "audit.md") as file:
                file.write(report.markdown(audit))
        record["verdict"] = audit["verdict"]["answer"]
    if world.main:
        draw_page(folder)
    world.say(report.summary(audit))
    world.say(f"results are in {folder / 'audit.json'}, {folder / 'audit.md'}, {folder / 'report' / 'report.html'}")
    held = [gate for gate in audit["gates"] if gate["holds"] is not False]
    for gate in held if world.main else ():
        print(report.gate_line(gate))
    world.close()
    return GATE_HELD if held else 0


def hardly_moved(task: AuditTask, change: float | None) -> str | None:
    """The caveat about a model that training hardly moved. change: ‖ΔW‖/‖W‖ as measured; None: as its run.json says."""
    place = task.model.adapter or task.model.base
    if change is None and Path(place).is_dir():
        with contextlib.suppress(UserError):  # a broken run.json is no obstacle to an audit
            change = (provenance.training_record(place) or {}).get("relative_change")
    note = provenance.hardly_moved(change)
    return f"{note[0].upper()}{note[1:]}: what is measured is as good as its base." if note else None


def draw_page(folder: Path) -> None:
    """report/report.html in the output directory, which opens with the verdict."""
    import plot_results

    with contextlib.redirect_stdout(io.StringIO()):
        plot_results.run(plot_results.ReportConfig(directories=(str(folder),), output=str(folder / "report")))


def add_words(audit: dict[str, Any]) -> None:
    """Say the verdict and each of its questions in words, for the page."""
    verdict_of = audit["verdict"]
    verdict_of["words"] = report.paragraph(audit)
    for name, question in verdict_of["questions"].items():
        question["title"], question["measured"] = report.title(name), report.line_of(audit, name)


def settings(config: AuditConfig, task: AuditTask) -> dict[str, Any]:
    flags = {key: value for key, value in vars(config).items() if key not in ("output_dir", "dry_run")}
    if task.finder:
        flags["ner"] = task.finder.facts
    return {**flags, "budget": asdict(task.budget)}


def describe(task: AuditTask, dtype: Any) -> dict[str, Any]:
    return {
        "name": task.model.name,
        "base": task.model.base if task.model.adapter else None,
        "reference": task.base.name if task.base else None,
        "weights_sha256": provenance.weights_sha256(task.model),
        "revision": task.model.revision,
        "dtype": models.dtype_name(dtype, task.model),
        "privacy": provenance.privacy(task.model),
    }


def data_facts(rows: Rows) -> dict[str, Any]:
    return {"path": rows.path, "sha256": rows.sha256, "rows": rows.n, "rows_used": len(rows.indices)}


def membership_part(config: AuditConfig, task: AuditTask, world: World) -> dict[str, Any]:
    """AUC and TPR of the pre-chosen attack, with its controls."""
    if task.membership is None:
        return {"undefined": LEFT_OUT if "membership" in config.without else "no held-out rows (--heldout FILE)"}
    membership, sets = task.membership
    folder = Path(str(membership.output_dir))
    world.say(f"attacking {task.model.name}")
    with contextlib.redirect_stdout(io.StringIO()):  # hide its tables: they are in the files
        measure_all({folder: task.model}, sets, membership, world, cache_folder(folder))
    part: dict[str, Any] = world.broadcast(membership_summary(task, folder) if world.main else {})
    return part


def membership_summary(task: AuditTask, folder: Path) -> dict[str, Any]:
    """The summary of mia's result files in `folder`."""
    lines = {line["attack"]: line for line in json_files.read_jsonl(folder / "results_mia.jsonl")}
    wanted = HEADLINE_ATTACK if task.base else WITHOUT_REFERENCE
    line = lines[wanted]
    scores = json_files.read_jsonl(folder / "scores_mia.jsonl")
    sides = [
        np.array([row[wanted] for row in scores if row["label"] == label and row.get(wanted) is not None])
        for label in (1, 0)
    ]
    part: dict[str, Any] = {
        "attack": wanted,
        "auc": bounds(line["auc"], line["auc_ci"]),
        "p": mann_whitney(*sides) if all(map(len, sides)) else None,
        "n_members": line["n_members"],
        "n_nonmembers": line["n_nonmembers"],
        "n_requested": line["n_requested"],
        "n_scored": line["n_scored"],
        "n_dropped": line["n_dropped"],
        "members_seen": line.get("members_seen"),
        "flags": line["flags"],
        "blind": {name: blind["auc"] for name, blind in line["blind"].items()},
        "base_auc": (line.get("base") or {}).get("auc"),
        "results": "membership/results_mia.jsonl",
    }
    if line["auc"] is None:
        part["undefined"] = line["undefined"] or "the attack has no score"
    for level in LEVELS:
        point = line["points"][level] or {}
        part[f"tpr_at_fpr_{level}"] = bounds(point.get("tpr"), point.get("tpr_ci")) | {
            "undefined": point.get("undefined")
        }
    usable = [level for level in LEVELS[:2] if part[f"tpr_at_fpr_{level}"]["value"] is not None]
    part["headline_level"] = usable[-1] if usable else None
    return part


def bounds(value: float | None, interval: list[float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high}


def memorization_parts(
    config: AuditConfig, task: AuditTask, audit: dict[str, Any], dtype: Any, world: World
) -> list[dict[str, Any]]:
    """Fill in extraction, verbatim and untargeted; returns one line per secret, for the data owner."""
    wanted = [part for part in ("extraction", "verbatim", "untargeted") if part not in config.without]
    for part in ("extraction", "verbatim", "untargeted"):
        audit[part] = {"undefined": LEFT_OUT}
    if not wanted:
        return []
    heldout = task.rows.get("heldout")
    names = None
    if task.finder and {"extraction", "untargeted"} & set(wanted):
        world.say(f"looking for names with {report.finder_words(task.finder.facts)}")
        names = memorization.find_names({side: rows.rendered for side, rows in task.rows.items()}, task.finder, world)
    asked = questions.prepare(
        task.rows["train"].rendered,
        heldout.rendered if heldout else None,
        task.tokenizer,
        task.start,
        task.memorization if "verbatim" in wanted else replace(task.memorization, most_windows=0),
        task.given,
        task.in_loss,
        names,
    )
    if "extraction" not in wanted:
        for side in asked.sides.values():
            side.questions = {}
    loader = BaseLoader(world, dtype, config.device_map)
    answers = {}
    for name, ref in (("base", task.base), ("tuned", task.model)):
        if ref is not None:
            world.say(f"asking {ref.name}")
            samples = name == "tuned"
            with contextlib.ExitStack() as stack:
                model, change = stack.enter_context(loader.adapted(ref))
                sampler = None
                if samples and task.memorization.samples:
                    sampler = stack.enter_context(vllm_engine.beside(config, ref, dtype))
                answers[name] = memorization.ask(
                    model, task.tokenizer, asked, task.memorization, world, samples, sampler
                )
                if name == "tuned":
                    audit["model"]["relative_change"] = change
    loader.clear()
    tuned, base = answers["tuned"], answers.get("base")
    lines: list[dict[str, Any]] = []
    if "extraction" in wanted:
        audit["extraction"] = {}
        for kind in dict.fromkeys(kind for side in asked.sides.values() for kind in side.questions):
            if kind not in asked.sides["train"].questions:
                continue  # only in held-out rows: nothing can leak
            audit["extraction"][kind], own = memorization.secrets_of_kind(kind, asked, tuned, base)
            lines += own
        if not audit["extraction"]:
            audit["extraction"] = {
                "undefined": "no secret of a known type in the training rows (--secrets, --pii, --ner)"
            }
    if "verbatim" in wanted:
        audit["verbatim"] = memorization.verbatim_result(asked, tuned, base)
    if "untargeted" in wanted:
        audit["untargeted"] = memorization.untargeted_result(asked, tuned, task.tokenizer)
        if config.engine != "transformers":
            audit["untargeted"]["engine"] = config.engine
    audit["data"]["secrets_on_both_sides"] = asked.shared_values
    audit["data"]["given_secrets_absent"] = asked.given_absent
    for line in lines:
        line["row"] = task.rows[line["set"]].indices[line["row"]]
    return lines


def canary_part(config: AuditConfig, task: AuditTask, world: World) -> dict[str, Any]:
    if not config.canaries:
        return {"undefined": "no canaries were inserted (canary/inject.py, --canaries KEY)"}
    if "canaries" in config.without:
        return {"undefined": LEFT_OUT}
    folder = Path(config.output_dir) / "canaries"
    measured = canaries.run(
        MeasureConfig(
            canaries=config.canaries,
            models=(f"audited={config.model}",),
            ref_model=config.ref_model,
            base_model=config.base_model,
            quantization=config.quantization,
            output_dir=str(folder),
            overwrite=True,
            dtype=config.dtype,
            device_map=config.device_map,
            model_parallel=config.model_parallel,
            revision=config.revision,
            seed=config.seed,
        )
    )
    line = next((line for line in measured["lines"] if line["measure"] == "audit"), None)
    if line is None:
        return {"undefined": "the key has no audit canaries"}
    part: dict[str, Any] = world.broadcast(canary_summary(line, folder) if world.main else {})
    return part


def canary_summary(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Audit canaries that were inserted against those that were not."""
    rows = [row for row in json_files.read_jsonl(folder / ROWS) if row.get("audit_signal") is not None]
    sides = [np.array([row["audit_signal"] for row in rows if row["included"] is wanted]) for wanted in (True, False)]
    whole = line["auc"] is not None and line["power"]["95"] is not None  # otherwise there is nothing to compare
    judged = whole and all(map(len, sides))
    return {
        "auc": bounds(line.get("auc"), line.get("auc_ci")),
        "epsilon": {"low": line["lower"]["95"], "upper": line.get("upper")},
        "bounds": {
            "one_run": epsilon_block(line, line["delta"]),
            **{f"f_dp_{name}": epsilon_block(block, block["delta"]) for name, block in line["f_dp"].items()},
        },
        "p": mann_whitney(*sides) if judged else None,
        "n_requested": line["n_requested"],
        "n_scored": line["n_scored"],
        "undefined": None if whole else line["undefined"],
        "results": f"canaries/{RESULTS}",
    }


def epsilon_block(block: dict[str, Any], delta: float) -> dict[str, Any]:
    """{low, most, undefined: by level in percent; delta}: a bound on ε, the most it could have been, why it is null."""
    return {"low": block["lower"], "most": block["power"], "undefined": block["lower_undefined"], "delta": delta}
