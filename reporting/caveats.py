"""Find what could mislead a reader of the numbers in a Study; the report starts with it."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path

from common.problems import AnyPath
from common.provenance import HARDLY
from common.schema import HEADLINE_TEMPERATURE
from reporting.load import choose
from reporting.table import Record, Study

LEVELS = ("wrong", "careful", "note")  # a number is not what it claims to be | keep this in mind | good to know
MUCH_CUT = 0.05  # share of generated rows that hit the token limit
MOVED = 1e-6  # ‖ΔW‖/‖W‖ below which any change is lost in float32 rounding


@dataclass
class Caution:
    """A warning. `places`: the affected lines or files."""

    level: str
    title: str
    text: str
    places: list[str] = field(default_factory=list)


def find(study: Study) -> list[Caution]:
    """All cautions, the most serious first; those of one kind are one Caution that lists all places."""
    cautions = [caution for check in CHECKS for caution in check(study)]
    cautions[:0] = damaged(study)  # last, because the checks may find more damage
    return sorted(cautions, key=lambda caution: LEVELS.index(caution.level))


def damaged(study: Study) -> Iterator[Caution]:
    broken = [line for line in study.damage if not line.torn]
    if broken:
        places = [f"{line.file}:{line.line}: {line.reason}" for line in broken]
        yield Caution("wrong", f"{_n(broken, 'line')} could not be read", "Their numbers are missing here.", places)
    torn = [line for line in study.damage if line.torn]
    if torn:
        text = "The last line of a training log is incomplete: its run was killed or is still writing."
        places = [f"{line.file}:{line.line}" for line in torn]
        yield Caution("note", f"{_n(torn, 'log')} with an incomplete last line", text, places)


def runs(study: Study) -> Iterator[Caution]:
    for status, title, text in (
        ("failed", "failed", "Their results may be incomplete."),
        ("running", "did not finish", "They were killed or are still running: their results are incomplete."),
    ):
        bad = {path: run for path, run in study.runs.items() if run.get("status") == status}
        if bad:
            places = [
                f"{study.shown(path)} ({run.get('error') or 'started ' + str(run.get('start'))})"
                for path, run in bad.items()
            ]
            yield Caution("wrong", f"{_n(bad, 'run')} {title}", text, places)
    overlap = [study.shown(path) for path, run in study.runs.items() if run.get("args", {}).get("allow_overlap")]
    if overlap:
        text = "--allow_overlap was given: training rows may be among the evaluated ones."
        yield Caution("wrong", "Training and evaluation may overlap", text, overlap)
    dirty = [study.shown(path) for path, run in study.runs.items() if run.get("dirty")]
    commits = {run["commit"] for run in study.runs.values() if run.get("commit")}
    if len(commits) > 1:
        yield Caution(
            "note",
            f"{len(commits)} commits",
            "Runs come from different versions of the code.",
            sorted(commit[:12] for commit in commits),
        )
    if dirty:
        text = "The code had uncommitted changes: the commit alone does not identify it."
        yield Caution("note", f"{_n(dirty, 'run')} from a changed working tree", text, dirty)


def membership(study: Study) -> Iterator[Caution]:
    lines = study.lines.get("mia", [])
    kinds = {
        "blind": (
            "careful",
            "Members and non-members differ regardless of the model",
            "A blind baseline tells the sets apart (its 99 % interval excludes 0.5), and attacks may do so for "
            "the same reason: their AUC is no evidence of memorisation.",
        ),
        "reversed": (
            "wrong",
            "Non-members score higher than members",
            "The 95 % interval of the AUC lies below 0.5: the sets are swapped or confounded, or the model "
            "knew the non-members. This does not mean that nothing leaks.",
        ),
        "near": (
            "careful",
            "Near-duplicates across members and non-members",
            "Some texts are in both sets with hardly any change, which pulls every attack towards chance.",
        ),
        "base": (
            "careful",
            "The base model already tells members from non-members",
            "It was not fine-tuned on them: the sets differ, or it had already seen the members. Look at the "
            "difference from the base, or at `ref`.",
        ),
        "coarse": (
            "note",
            "True positive rates that depend on a handful of non-members",
            "At this level very few non-members set the threshold.",
        ),
    }
    for prefix, (level, title, text) in kinds.items():
        places: dict[str, set[str]] = {}
        for file, number, line in lines:
            for flag in line.get("flags", []):
                if flag == prefix or flag.startswith((f"{prefix}_", f"{prefix}-")):
                    with study.guard(file, number):
                        cause = line["attack"] if prefix in ("base", "coarse", "reversed") else _blind(line, flag)
                        places.setdefault(f"{file}", set()).add(cause)
        if places:
            listed = [f"{file}: {', '.join(sorted(causes))}" for file, causes in places.items()]
            yield Caution(level, title, text, listed)


def _blind(line: Record, flag: str) -> str:
    baseline = line.get("blind", {}).get(flag)
    if baseline and baseline.get("auc") is not None:
        low, high = baseline["auc_ci99"]
        return f"{flag} AUC {baseline['auc']:.3f} (99 %: {low:.3f}–{high:.3f})"
    return f"{line['near_duplicates']['pairs']} pairs" if flag == "near_duplicates" else flag


def dropped(study: Study) -> Iterator[Caution]:
    places: dict[str, str] = {}
    for area in ("extraction", "perplexity", "mia", "fidelity", "utility", "importance", "human", "canary"):
        for row in study.select(area, n_dropped=lambda n: bool(n)):
            if area == "mia" and (row.role != "target" or (row.value is None and row.n_dropped == row.n_requested)):
                continue  # an attack that does not apply has dropped no text; `undefined` says why
            places.setdefault(row.source, f"{row.source}: {row.n_dropped:,} of {row.n_requested or 0:,}")
    if places:
        text = "These rows could not be queried or scored; rates leave them out."
        yield Caution("careful", f"Rows were dropped in {_n(places, 'result line')}", text, list(places.values()))


def privacy(study: Study) -> Iterator[Caution]:
    rows = study.select("privacy", "ε upper (PRV)")
    void = [f"{row.source}: {row.settings['void']}" for row in rows if row.settings.get("void")]
    if void:
        yield Caution("wrong", "ε is void", "The bound does not hold for these checkpoints.", void)
    noiseless = [row.source for row in rows if row.value is None]
    if noiseless:
        text = "No noise was added: ε is infinite, and there is no protection."
        yield Caution("careful", "DP training without noise", text, noiseless)
    above = [
        row
        for row in study.select("canary")
        if row.metric.startswith("ε lower") and row.level in row.settings.get("lower_above_upper", ())
    ]
    if above:
        text = "The audit contradicts the accountant: training was less private than claimed."
        places = [
            f"{row.source}: {row.arm}: at {row.level} % lower {row.value:.2f}, upper {row.settings['upper']:.2f}"
            for row in above
        ]
        yield Caution("wrong", "ε: the lower bound is above the upper bound", text, places)


def settings(study: Study) -> Iterator[Caution]:
    rows = study.select("extraction", role="target")
    measured = {row.measured.key: row for row in rows}
    fixed = {row.measured.key for row in rows if row.headline}
    without = [row for key, row in measured.items() if key not in fixed]
    if without:
        text = (
            f"The headline temperature is {HEADLINE_TEMPERATURE}, fixed in advance. These models have no line at it, "
            "and no other setting, least of all their best one, replaces it."
        )
        yield Caution("careful", f"No headline for {_n(without, 'model')}", text, [row.file for row in without])
    trials = {(r.measured.key, r.temperature) for r in rows if r.metric == "matches" and not r.measured.is_base}
    if len(trials) > 8:
        metric = "exact" if any(row.metric == "exact" for row in rows) else "matches"
        best = max(r.value for r in rows if r.template == "all" and r.metric == metric and r.value is not None)
        text = (
            f"{len(trials):,} combinations of checkpoint and temperature were measured. The largest rate among them "
            f"({metric}, {best:.1%}) is a maximum over that many draws and is not compared with anything here: even "
            "under pure noise, a maximum grows with their number."
        )
        yield Caution("note", "Maxima are not results", text)
    mixed = choose(study)[2]
    if mixed:
        text = "They have no run at a common rate: differences may be due to the rate, not the arm."
        yield Caution("careful", "Arms compared at different learning rates", text, mixed)
    for area, words in (("extraction", "sets of people or settings"), ("mia", "sets of texts or settings")):
        groups = study.groups.get(area, {})
        if len(groups) > 1:
            text = "Numbers are only comparable within one of them; each has its own figures and rows."
            yield Caution("note", f"{words.capitalize()}: {len(groups)} different ones", text, list(groups))


def released(study: Study) -> Iterator[Caution]:
    files = {file for file, _, line in study.lines.get("extraction", []) if "exact" not in line}
    if files:
        text = (
            "Written by the released tool: it has only the loose rule (partial ratio ≥ 80, which a one-letter answer "
            "or the bare domain passes), no exact addresses, no floor and no record of its settings. The intervals "
            "are computed here."
        )
        yield Caution("careful", f"{_n(files, 'file')} with loose matches only", text, sorted(files))
    below = []
    for group in study.groups.get("extraction", {}):
        floors = [r for r in study.select("extraction", "exact", role="floor", group=group) if r.headline]
        for row in study.select("extraction", "exact", role="target", group=group, headline=True, template="all"):
            if floors and row.value is not None and row.value <= floors[0].number:
                label, floor = row.measured.label, floors[0].number
                below.append(f"{label}: {row.value:.1%} exact, floor {floor:.1%} ({row.source})")
    if below:
        text = "A rule that derives the address from the name, without a model, guesses as many or more."
        yield Caution("note", f"{_n(below, 'measurement')} at or below the name-rule floor", text, below)


def models(study: Study) -> Iterator[Caution]:
    residual = [
        file
        for file, _, config in study.lines.get("adapter", [])
        if str(config.get("init_lora_weights", "")).lower().startswith("pissa")
    ]
    if residual:
        text = (
            "The adapter belongs to PiSSA's residual base. On the original base its principal components count "
            "twice: anything measured that way is about a different model."
        )
        yield Caution("wrong", "Unconverted PiSSA adapters", text, residual)
    seen: dict[str, set[str]] = {}
    for area in ("extraction", "perplexity", "mia"):
        for row in study.select(area, role="target"):
            if row.model and row.settings.get("model_sha256"):
                seen.setdefault(row.measured.key, set()).add(row.settings["model_sha256"])
    changed = [study.models[key].label for key, hashes in seen.items() if len(hashes) > 1]
    if changed:
        text = "The weights differ between measurements (SHA-256): the model was retrained in between."
        yield Caution("wrong", f"{_n(changed, 'model')} measured in two states", text, changed)
    places: dict[tuple[str, ...], tuple[float, str]] = {}  # by path of the run, or of a checkpoint that is not its last
    for row in study.rows:
        if row.model and row.model.change is not None and row.role == "target":
            key = row.model.run if row.model.last else row.measured.key
            places.setdefault(_tail(key), (row.model.change, f"{row.model.label} ({row.source})"))
    for file, number, line in study.lines.get("utility", []):
        if line.get("relative_change") is not None:
            tail = _tail(Path(str(line.get("checkpoint") or f"{file}:{number}")).parent)
            places.setdefault(tail, (line["relative_change"], f"{line['arm']}, seed {line['seed']} ({file}:{number})"))
    for path, run in study.runs.items():
        if Path(path).name == "run.json" and run.get("relative_change") is not None:
            places.setdefault(_tail(Path(path).parent), (run["relative_change"], study.shown(path)))
    small = [(change, f"{place}: ‖ΔW‖/‖W‖ = {change:.1g}") for change, place in places.values() if change < HARDLY]
    still, slow = ([place for change, place in small if (change < MOVED) == same] for same in (True, False))
    if still:
        text = "Training left the weights unchanged; the measurements are of the base."
        yield Caution("careful", f"{_n(still, 'model')} that training left unchanged", text, still)
    if slow:
        text = "Arms may look alike because nothing was learnt: raise the learning rate or train longer."
        yield Caution("careful", f"{_n(slow, 'model')} that training hardly moved", text, slow)
    older = study.lines.get("superseded", [])
    if older:
        text = "The same model was measured again with the same settings; only the newest lines are shown."
        yield Caution("note", f"{_n(older, 'older line')} left out", text, [f"{file}:{n}" for file, n, _ in older])


def _tail(path: AnyPath) -> tuple[str, ...]:
    """The part of a run's path that does not change when its tree is moved."""
    return Path(path).parts[-3:]


def synthetic(study: Study) -> Iterator[Caution]:
    cut = [
        f"{row.source}: {row.arm} {row.value:.1%}"
        for row in study.select("fidelity", "cut at the token limit")
        if row.role == "target" and (row.value or 0) > MUCH_CUT
    ]
    if cut:
        text = "Many rows stop at the token limit: lengths, endings and all that depends on them are of truncated text."
        yield Caution("careful", "Generated rows are truncated", text, cut)
    majority = {row.group: row.number for row in study.select("utility", "accuracy", arm="majority")}
    low = [
        f"{row.source}: {row.arm} {row.value:.3f}, majority {majority[row.group]:.3f}"
        for row in study.select("utility", "accuracy", role="mean")
        if row.group in majority and row.number <= majority[row.group]
    ]
    if low:
        text = "Always answering the most common rating is right at least as often."
        yield Caution("careful", "Accuracy at or below the majority class", text, low)
    means = study.select("utility", "accuracy", role="mean")
    few = [f"{row.source}: {row.arm}, {row.n}" for row in means if row.n is not None and row.n < 3]
    if few:
        yield Caution("note", "Fewer than three seeds", "The spread over seeds is unknown.", few)


def undefined(study: Study) -> Iterator[Caution]:
    rows = [
        row
        for row in study.rows
        if row.value is None
        and row.role == "target"
        and row.metric not in ("tpr",)
        and not row.metric.startswith("ε upper")
    ]
    if rows:
        places = list(dict.fromkeys(f"{r.source}: {r.attack or r.metric}: {r.undefined}" for r in rows))
        yield Caution("note", f"{_n(places, 'number')} undefined", "With the reasons that the scripts gave.", places)


def canaries(study: Study) -> Iterator[Caution]:
    never, some, unknown = [], [], []
    for file, number, line in study.lines.get("canary", []):
        with study.guard(file, number):
            place = f"{file}:{number}: {line['arm']}"
            placed, seen = line.get("placed"), line.get("placed_trained")
            if line.get("undefined") and "never trained on" in line["undefined"]:
                never.append(f"{place}: {line['measure']}: {line['undefined']}")
            elif seen is not None and seen < placed:
                some.append(f"{place}: {seen} of {placed} inserted canaries were trained on")
            if line.get("upper_unknown"):
                unknown.append(f"{place}: {line['upper_unknown']}")
    if never:
        text = "Training truncated or masked them or left out their rows: these numbers say nothing about leakage."
        yield Caution("wrong", "Canaries that were never trained on", text, never)
    if some:
        text = "The others were truncated, masked or in rows left out: the audit is weaker than it seems."
        yield Caution("careful", "Not every inserted canary was trained on", text, some)
    if unknown:
        text = "Without an upper bound, no lower bound can contradict it."
        yield Caution("careful", "Text with unknown privacy", text, unknown)


CHECKS = (runs, privacy, models, settings, membership, dropped, released, synthetic, canaries, undefined)


def _n(things: Sized, word: str) -> str:
    return f"{len(things):,} {word}{'' if len(things) == 1 else 's'}"


def script_of(run: Record, path: str) -> str:
    """The script that wrote a run file."""
    name = Path(path).stem
    return "run_peft.py" if name == "run" else name.removeprefix("run_") + ".py"
