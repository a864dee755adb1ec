#!/usr/bin/env python3
"""What leaked of the canaries that inject.py placed: into generated rows, into the model, and against its ε.

python canary/measure.py --canaries train_canaries_key.jsonl --output_dir canary-out \\
    --models no_dp=run/checkpoint-276 with_dp=run-dp/checkpoint-276 \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl with_dp=generated_sequences_with_dp.jsonl
python canary/measure.py --canaries key.jsonl --synthetic dp=generated_sequences_with_dp.jsonl     # the text alone
torchrun --nproc_per_node=4 canary/measure.py --canaries key.jsonl --models dp=run-dp/checkpoint-276

Every line of results_canary.jsonl has a `measure`:
count        generated rows that hold a name, street, phone or a whole canary, as written and normalised, by how often
             the canary was placed, with 95 % Clopper–Pearson intervals and Fisher's p against the other arms.
exposure     bits, from the total NLL of the secret's tokens in the canary's own context against other secrets in the
             same context; by how often it was placed, held-out canaries beside. Chance: mean 1.44, median 1 bit.
audit        lower bound of ε from one run (Steinke et al. 2023), over the audit canaries, signal: by how much training
             raised the log-probability of the canary's sentence in its row. Beside the accountant's ε (privacy.json)
             and the bound that only right guesses would have given (`power`).
audit_text   the same bound without the model: the signal is a 2-gram model of the generated rows, or their similarity.
             `headline`: the signal to report, fixed beforehand, so that nobody need take the larger of the two.
text_auc     how well that signal tells placed from held-out canaries, by how often they were placed.
A signal that is the same for all audit canaries gives no bound: null, and `undefined` says so. So do canaries that
training never saw: run_peft.py's trained_rows.jsonl tells which rows it took, and what it cut off or masked. Canaries
that --max_length would cut are left out of the audit whether they were placed or not, which a coin cannot tell.
A lower bound above the accountant's ε is flagged at 95 %; at 99.9 % the exit status is 1: the ε is not true.

results_canary_rows.jsonl has a line a canary and arm (no text), run_canary.json the run.
"""

import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from canary.canaries import SECRETS, Space
from common import cli, dataset, distributed, models, results, reviews, stats, trained
from common.distributed import progress_bar
from common.stats import clopper_pearson

FILE, ROWS_FILE = "results_canary.jsonl", "results_canary_rows.jsonl"
HEADER = {"schema": int, "secret": str, "words": list, "privacy_unit": str}
FIELDS = {
    "id": int,
    "kind": str,
    "repetitions": int,
    "included": bool,
    "context": str,
    "sentence": str,
    "before": str,
    "secret": str,
    "parts": dict,
    "rows": list,
}
NOT_OURS = "is not what canary/inject.py writes; make the key again"
KINDS = ("audit", "ladder", "share", "held_out")
LEVELS = {"95": 0.05, "99.9": 0.001}
SIGNALS = ("2-gram", "similarity")
HEADLINE = "2-gram"  # the text signal whose bound is reported: the larger of two 95 % bounds would be no 95 % bound


@dataclass(frozen=True, kw_only=True)
class CanaryConfig(cli.ModelConfig):
    """The flags of canary/measure.py."""

    canaries: str
    models: tuple[str, ...] | None = None
    synthetic: tuple[str, ...] | None = None
    ref_model: str | None = None
    references: int = 1000
    output_dir: str = "./"
    overwrite: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Leakage and exposure of canaries, and lower bounds of ε.",
        "python canary/measure.py --canaries key.jsonl --models dp=run/checkpoint-276 --synthetic dp=dp.jsonl",
        CanaryConfig,
    )
    add = parser.add_argument
    add("--canaries", required=True, metavar="KEY", help="key file of canary/inject.py (default: none, required)")
    add("--models", nargs="+", action="extend", metavar="ARM=MODEL", help="adapter or model of each arm")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows of each arm")
    add("--ref_model", help="the model before training (default: the base of an adapter)")
    add("--references", type=cli.positive_int, help="other secrets; all of them when there are no more")
    add("--output_dir", help="where the results are written")
    add("--overwrite", action="store_true", help="replace existing results")
    cli.add_model_flags(parser)
    return parser


# ---------------------------------------------------------------- before a model is loaded


def read_key(path) -> tuple[dict, list[dict]]:
    """(header, canaries) of a key file; UserError when it is none."""
    lines = dataset.read_rows(path)
    header, canaries = lines[0], lines[1:]
    if not set(HEADER) <= set(header):
        raise cli.UserError(f"{path}: its first line is no header; name the key file that canary/inject.py wrote")
    wrong = [name for name, kind in HEADER.items() if type(header[name]) is not kind]
    wrong += ["training"] if not isinstance(header.get("training"), str | None) else []
    wrong += ["secret"] if not wrong and header["secret"] not in SECRETS else []
    words = header["words"]
    if not wrong and not (all(isinstance(word, str) for word in words) and len(set(words)) == len(words)):
        wrong = ["words"]
    if wrong or (header["secret"] == "text" and not words):
        raise cli.UserError(f"{path}: the {', '.join(wrong or ['words'])} of its first line {NOT_OURS}")
    for number, canary in enumerate(canaries):
        if missing := [field for field in FIELDS if canary.get(field) is None]:
            raise cli.UserError(f"{path}: canary {number}: no {', '.join(missing)}; make the key again")
        wrong = [field for field, kind in FIELDS.items() if type(canary[field]) is not kind] or _odd(canary)
        if wrong:
            raise cli.UserError(f"{path}: canary {number}: its {', '.join(wrong)} {NOT_OURS}")
    if len(canaries) != header.get("canaries", len(canaries)) or not canaries:
        raise cli.UserError(f"{path}: {len(canaries)} of {header.get('canaries', 'its')} canaries; the file was cut")
    return header, canaries


def _odd(canary: dict) -> list[str]:
    """Fields of the right type that canary/inject.py never writes so."""
    rows, starts = canary["rows"], canary.get("starts") or []
    places = (starts or rows) if isinstance(starts, list) else [None]
    odd = {
        "kind": canary["kind"] not in KINDS,
        "repetitions": canary["repetitions"] < 0,
        "rows": not all(map(dataset.is_count, rows)),
        "starts": len(places) != len(rows) or not all(map(dataset.is_count, places)),
        "parts": not all(isinstance(part, str) for part in canary["parts"].values()),
        "secret": not canary["sentence"].startswith(canary["before"] + canary["secret"]),
    }
    return [field for field, is_odd in odd.items() if is_odd]


def check(config: CanaryConfig) -> SimpleNamespace:
    """Everything that is known before a model is loaded; UserError with all problems."""
    problems = cli.Problems()
    distributed.check_environment(problems, config.device_map)
    cli.check_writable(config.output_dir, problems)
    if not (config.models or config.synthetic):
        problems.add("nothing to measure: give --models, --synthetic or both")
    header, canaries = problems.absorb(read_key, config.canaries) or ({}, [])
    given = cli.Problems()
    named = reviews.split_arms(config.models or [], (), given)
    for line in given.lines:
        problems.add(line.replace("--synthetic", "--models"))
    files = reviews.split_arms(config.synthetic or [], (), problems)
    generated = {arm: problems.absorb(reviews.read_reviews, file, reviews.GENERATED) for arm, file in files.items()}
    refs, tokenizers = {}, {}
    for arm, name in named.items():
        refs[arm], tokenizers[arm] = models.look_up(problems, name, config.revision, None, f"--models {arm}=")
    ref_model = models.look_up(problems, config.ref_model, flag="--ref_model")[0] if config.ref_model else None
    taken_by_text = {}
    texts, spent = {}, {arm: models.privacy(ref) for arm, ref in refs.items() if ref}
    for arm, file in files.items():
        rows = generated[arm]
        texts[arm] = [row[reviews.GENERATED] for row in rows or []]
        manifest = (dataset.read_manifest(file) or {}) if rows else {}
        spent[arm, "text"] = manifest.get("privacy") or spent.get(arm)
        if not manifest and rows and spent[arm, "text"] is None:
            spent[arm, "text"] = {"unknown": f"{file} has no manifest: what its generator spent is unknown"}
        if model := (manifest.get("generator") or {}).get("model"):
            taken_by_text[arm] = None if problems.lines else problems.absorb(Taken.of, model, None)
        if header and problems.absorb(text_trained_on, manifest, header.get("training") or "") is False:
            problems.add(
                f"--synthetic {arm}={file}: its generator was trained on another file than {config.canaries} belongs to"
            )
    taken = {}
    for arm, ref in refs.items():
        if not ref or not header:
            continue
        taken[arm] = None if problems.lines else problems.absorb(Taken.of, ref.adapter or ref.base, tokenizers[arm])
        if problems.absorb(trained.trained_on, ref.adapter or ref.base, header.get("training") or "") is False:
            problems.add(f"--models {arm}={ref.name}: was trained on another file than {config.canaries} belongs to")
    audited = any(canary["kind"] == "audit" for canary in canaries)
    for name, block in spent.items():
        unit, arm = (block or {}).get("unit"), name if isinstance(name, str) else name[0]
        if audited and unit and unit != header.get("privacy_unit"):
            problems.add(
                f"--canaries {config.canaries}: its audit adds or leaves out a {header['privacy_unit']}, the privacy "
                f"unit of {arm} is the {unit}; inject with --privacy_unit {unit}"
            )
    folder = Path(config.output_dir)
    inputs = [config.canaries, *files.values()] if not problems.lines else []
    weights = {arm: models.weights_sha256(ref) for arm, ref in refs.items() if ref}
    if ref_model:
        weights["--ref_model"] = models.weights_sha256(ref_model)
    outputs = [folder / FILE, folder / ROWS_FILE]
    finished = problems.absorb(
        results.finished, folder / "run_canary.json", outputs, config, inputs, config.overwrite, weights=weights
    )
    problems.check()
    return SimpleNamespace(
        inputs=inputs,
        weights=weights,
        finished=finished,
        header=header,
        canaries=canaries,
        space=Space(header["secret"], tuple(header["words"])),
        refs=refs,
        tokenizers=tokenizers,
        ref_model=ref_model,
        files=files,
        texts=texts,
        spent=spent,
        taken=taken | {(arm, "text"): taken_by_text.get(arm) or taken.get(arm) for arm in texts},
    )


class Taken:
    """What the training of a model took of each canary."""

    def __init__(self, rows: trained.TrainedRows, tokenizer):
        self.rows, self.tokenizer = rows, tokenizer
        self.by_row = {row.row: row for row in rows.rows}

    @classmethod
    def of(cls, checkpoint, tokenizer) -> "Taken | None":
        """None where nothing tells: a model of another tool, a merged one, an older run."""
        if not Path(checkpoint).is_dir() or (rows := trained.read(checkpoint)) is None:
            return None
        if tokenizer is None and (Path(checkpoint) / "tokenizer_config.json").is_file():
            tokenizer = models.load_tokenizer(models.ModelRef(str(checkpoint), str(checkpoint), None, None))
        return cls(rows, tokenizer)

    def copies(self, canary: dict) -> int:
        """In how many rows the loss was taken on every character of the canary's secret."""
        offset = canary["sentence"].index(canary["secret"], len(canary["before"]) if canary["before"] else 0)
        starts = canary.get("starts") or [len(canary["context"])] * len(canary["rows"])
        spans = [(start + offset, start + offset + len(canary["secret"])) for start in starts]
        hosts = zip(canary["rows"], spans, strict=True)
        return sum(row in self.by_row and self.by_row[row].covers(*span) for row, span in hosts)

    def fits(self, canary: dict) -> bool:
        """Whether --max_length would leave the canary whole in its row: told of left-out canaries as of placed ones."""
        if self.tokenizer is None:
            return True
        ids = models.encode_texts(self.tokenizer, [canary["context"] + canary["sentence"]])[0]
        return len(models.without_end(self.tokenizer, ids)) < self.rows.max_length


def text_trained_on(manifest: dict, sha256: str) -> bool | None:
    """Was the generator of a text trained on the file with this SHA-256? None where nothing tells.

    Its checkpoint's run.json knows; where that is gone, data/synthetic/generate.py's --training, the second source.
    """
    model = (manifest.get("generator") or {}).get("model")
    known = trained.trained_on(model, sha256) if model else None
    told = next(iter((manifest.get("source") or [])[1:]), {})
    if known is None and told.get("sha256") and not told.get("salted"):  # the salt went with the model's run
        return told["sha256"] == sha256
    return known


def group_of(canary: dict) -> tuple[str, int]:
    return canary["kind"], canary["repetitions"]


def grouped(canaries: list[dict]) -> dict[tuple[str, int], list[int]]:
    """{(kind, repetitions): indices}, most repeated first, held-out last."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, canary in enumerate(canaries):
        groups.setdefault(group_of(canary), []).append(index)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][1], item[0][0])))


# ---------------------------------------------------------------- the model's side


def tokens_from(tokenizer, context: str, text: str, most: int) -> tuple[list[int], list[int]]:
    """(tokens before, tokens of `text`): `text` begins with the first token that has a character of it.

    At most `most` tokens in all; earlier context is left out, and so is the EOS that some tokenizers add.
    """
    encoded = tokenizer(context + text, return_offsets_mapping=True, verbose=False)
    first = next(place for place, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(context))
    ids, extra = encoded["input_ids"], models.extra_start(tokenizer, encoded["input_ids"])
    ids, first = models.without_end(tokenizer, ids[extra:], first - extra + 1), first - extra
    return ids[max(0, len(ids) - most) : first], ids[first:]


def secret_nlls(model, tokenizer, context: str, secrets: list[str]) -> list[float]:
    """Total NLL in nats of each secret's tokens after the same context, whose tokens are encoded once."""
    import torch

    from common import sampling

    most = models.context_length(model)
    split = [tokens_from(tokenizer, context, secret, most) for secret in secrets]
    together: dict[tuple, list[int]] = {}
    for index, (before, _) in enumerate(split):
        together.setdefault(tuple(before), []).append(index)
    nlls = [0.0] * len(secrets)
    never = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
    for before, indices in together.items():
        targets = [split[index][1] for index in indices]
        answers = sampling.sweep(
            model,
            [list(before)] * len(indices),
            [(0, 0)] * len(indices),
            [0.0],
            top_k=1,
            max_tokens=1,
            seed=0,
            stop=never,
            targets=[[target] for target in targets],
        )
        for index, target, answer in zip(indices, targets, answers):
            nlls[index] = -answer.truth_logprob * len(target)
    return nlls


def sentence_logps(model, tokenizer, canaries: list[dict], world) -> list[float]:
    """Log-probability in nats of each canary's sentence in its row, on every rank."""
    from common import scoring

    most = models.context_length(model)
    split = [tokens_from(tokenizer, canary["context"], canary["sentence"], most) for canary in canaries]
    sequences = [[*before, *after] for before, after in split]
    parts = world.together(lambda: scoring.score(model, sequences, world=world))
    values = scoring.join(sequences, parts)
    return [math.fsum(value[-len(after) :]) for value, (_, after) in zip(values, split)]


def exposures(model, tokenizer, task, n: int, seed: int, world) -> dict[int, dict]:
    """{canary: {nll, exposure, extrapolated, ks_p}} of all canaries but those of the audit, on every rank."""
    from canary import metrics

    chosen = [index for index, canary in enumerate(task.canaries) if canary["kind"] != "audit"]
    sampled = n < task.space.size - 1

    def mine() -> list:
        found = []
        with progress_bar(len(chosen), "canaries", world) as bar:
            for index in world.shard(chosen):
                canary = task.canaries[index]
                others = task.space.others(canary["secret"], n, random.Random(f"{seed} {canary['id']}"))
                context = canary["context"] + canary["before"]
                nll, *rest = secret_nlls(model, tokenizer, context, [canary["secret"], *others])
                fitted = metrics.extrapolated_exposure(nll, rest, task.space.size) if sampled else {}
                found.append((index, {"nll": nll, "exposure": metrics.exposure(nll, rest)} | fitted))
                bar.update(world.size)
        return found

    return dict(sorted(item for part in world.together(mine) for item in part))


def measure_model(config: CanaryConfig, task, arm: str, dtype, world) -> tuple[dict[int, dict], list[float], str]:
    """(exposures, signal of each audit canary, name of the signal)."""
    ref, tokenizer = task.refs[arm], task.tokenizers[arm]
    audit = [canary for canary in task.canaries if canary["kind"] == "audit"]
    before = None
    base = models.load_base(ref, dtype, world.device, config.device_map)
    if audit and task.ref_model:
        other = models.load_base(task.ref_model, dtype, world.device, config.device_map)
        own = models.load_tokenizer(task.ref_model, "--ref_model")
        with models.adapted(other, task.ref_model.adapter) as (model, _):
            before = sentence_logps(model, own, audit, world)
        del other
    elif audit and ref.adapter:
        before = sentence_logps(base, tokenizer, audit, world)
    with models.adapted(base, ref.adapter) as (model, _):
        bits = exposures(model, tokenizer, task, config.references, config.seed, world)
        after = sentence_logps(model, tokenizer, audit, world) if audit else []
    if before is None:
        return bits, after, "log-probability"
    return bits, [a - b for a, b in zip(after, before)], "log-probability over the model before training"


# ---------------------------------------------------------------- lines


def count_lines(task) -> list[dict]:
    from canary import metrics

    groups, lines, hits = grouped(task.canaries), [], {}
    for arm, texts in task.texts.items():
        found = metrics.find(task.canaries, texts)
        for group, members in groups.items():
            for p, part in enumerate(metrics.PARTS):
                if part == "whole" or task.canaries[members[0]]["parts"]:
                    hits[arm, group, part] = {how: cells[p, members] for how, cells in found.items()}
    for (arm, (kind, repetitions), part), cells in hits.items():
        n = len(task.texts[arm])
        line = {"measure": "count", "arm": arm, "kind": kind, "repetitions": repetitions, "part": part}
        line |= {"n_canaries": len(cells["exact"]), "n_requested": n, "n_scored": n, "n_dropped": 0}
        for how, cell in cells.items():
            rows = int(cell.any(0).sum())
            against = {}
            for other in task.texts:
                if other != arm:
                    theirs = int(hits[other, (kind, repetitions), part][how].any(0).sum())
                    against[other] = metrics.fisher(rows, n, theirs, len(task.texts[other]))
            line[how] = {
                "rows": rows,
                "canaries": int(cell.any(1).sum()),
                "rate": rows / n,
                "ci": clopper_pearson(rows, n),
                "fisher_p": against,
            }
        lines.append(line | {"fisher": "compares these two models, one training each"})
    return lines


def exposure_lines(task, arm: str, bits: dict[int, dict], references: int) -> list[dict]:
    from canary import metrics

    groups = {group: members for group, members in grouped(task.canaries).items() if group[0] != "audit"}
    taken = task.taken.get(arm)
    held = [bits[index]["exposure"] for index in groups.get(("held_out", 0), [])]
    n = min(references, task.space.size - 1)
    lines = []
    for (kind, repetitions), members in groups.items():
        copies = [taken.copies(task.canaries[index]) for index in members] if taken and kind != "held_out" else None
        asked = len(members)
        if copies:  # one that training never saw has no exposure to measure
            members = [index for index, count in zip(members, copies) if count]
        values = [bits[index]["exposure"] for index in members]
        fits = [bits[index] for index in members if "ks_p" in bits[index]]
        lines.append(
            {
                "measure": "exposure",
                "arm": arm,
                "kind": kind,
                "repetitions": repetitions,
                "n_requested": asked,
                "n_scored": len(values),
                "n_dropped": asked - len(values),
                "dropped": {NEVER: asked - len(values)} if asked > len(values) else {},
                "copies_trained": copies,
                "undefined": None if values else f"{asked} of {asked} canaries were {NEVER}",
                "bits": metrics.quantiles(values) if values else None,
                "chance": metrics.CHANCE,
                "references": n,
                "ceiling": math.log2(n + 1),
                "space_bits": math.log2(task.space.size),
                "p_above_held_out": None if kind == "held_out" or not values else metrics.p_above(values, held),
                "extrapolated": {
                    "note": "skew-normal extrapolation, capped at space_bits; void where ks_p is small",
                    "bits": metrics.quantiles([fit["bits"] for fit in fits]),
                    "ks_p": metrics.quantiles([fit["ks_p"] for fit in fits]),
                }
                if fits
                else None,
            }
        )
    return lines


def audit_line(
    task, arm: str, measure: str, signal: str, scores, block: dict | None, taken: Taken | None = None
) -> dict:
    """The lower bounds of one arm beside its accountant's ε. δ without an accountant: 0 (only pure ε is refuted).

    Bounds and AUC are null where they are undefined: fewer than five canaries, one signal for all of them, or none that
    training saw. A canary that --max_length cuts is left out by its text alone, placed or not, so the coins of the
    others stay fair; one that was placed and not trained on for another reason stays, which can only lower the bound.
    """
    from canary import audit, metrics

    audited = [canary for canary in task.canaries if canary["kind"] == "audit"]
    asked, placed = len(audited), sum(canary["included"] for canary in audited)
    copies = sum(taken.copies(canary) > 0 for canary in audited if canary["included"]) if taken else None
    if taken:
        whole = [taken.fits(canary) for canary in audited]
        audited = [canary for canary, fits in zip(audited, whole) if fits]
        scores = [score for score, fits in zip(scores, whole) if fits]
    included, never = [canary["included"] for canary in audited], copies == 0 and placed > 0
    block, unknown = (None, block["unknown"]) if block and "unknown" in block else (block, None)
    upper, delta = (block or {}).get("epsilon"), (block or {}).get("delta") or 0.0
    bounds = {level: audit.one_run(scores, included, delta, alpha) for level, alpha in LEVELS.items()}
    undefined = "fewer than five canaries" if bounds["95"]["epsilon"] is None else None
    constant = is_constant(scores)
    if constant or never:
        undefined = f"{placed} of {placed} canaries were {NEVER}: no audit" if never else CONSTANT
        bounds = {level: found | {"epsilon": None, "guesses": []} for level, found in bounds.items()}
    above = {level: upper is not None and (found["epsilon"] or 0) > upper for level, found in bounds.items()}
    return {
        "measure": measure,
        "arm": arm,
        "signal": signal,
        "n_requested": asked,
        "n_scored": len(scores),
        "n_dropped": asked - len(scores),
        "dropped": {"cut off at --max_length": asked - len(scores)} if asked > len(scores) else {},
        "placed": placed,
        "placed_trained": copies,
        "included": sum(included),
        **_auc([] if constant or never else scores, included),
        "power": {level: found["most"] for level, found in bounds.items()},
        "lower": {level: found["epsilon"] for level, found in bounds.items()},
        "guesses": bounds["95"]["guesses"],
        "upper": upper,
        "upper_unknown": unknown,
        "delta": delta,
        "unit": task.header["privacy_unit"],
        "void": (block or {}).get("void"),
        "undefined": undefined,
        "above_upper": above,
        "heuristic": {
            "note": "TPR/FPR bound, heuristic: canaries of one run are not independent",
            "bound": None if constant or never else metrics.heuristic_bound(scores, included, delta),
        },
    }


CONSTANT = "the signal is the same for all canaries"
NEVER = "never trained on"


def is_constant(scores) -> bool:
    return len(scores) > 1 and min(scores) == max(scores)


def _auc(scores, included) -> dict:
    """How well the scores tell the placed canaries from the others; None with no scores, or none of one kind."""
    from common.stats import auc

    members = [score for score, one in zip(scores, included) if one]
    others = [score for score, one in zip(scores, included) if not one]
    if not members or not others:
        return {"auc": None, "auc_ci": None, "auc_ci_method": stats.AUC_METHOD, "direction": None}
    bounds = stats.auc_interval(members, others)
    return {
        "auc": auc(members, others),
        "auc_ci": bounds,
        "auc_ci_method": stats.AUC_METHOD,
        "direction": stats.direction(bounds, "placed canaries"),
    }


def text_signals(task, arm: str) -> dict[str, list[float]]:
    """{signal: value of every canary} from the generated rows alone."""
    from canary import metrics

    sentences = [canary["sentence"] for canary in task.canaries]
    found = metrics.bigram_scores(sentences, task.texts[arm]), metrics.similarity_scores(sentences, task.texts[arm])
    return {signal: values.tolist() for signal, values in zip(SIGNALS, found)}


def text_lines(task, arm: str, signals: dict[str, list[float]]) -> list[dict]:
    """A bound for the audit canaries, and the AUC of every other group against the held-out ones."""
    groups, lines = grouped(task.canaries), []
    audited = [index for index, canary in enumerate(task.canaries) if canary["kind"] == "audit"]
    for signal, values in signals.items():
        if audited:
            scores = [values[index] for index in audited]
            spent, taken = task.spent[arm, "text"], task.taken.get((arm, "text"))
            line = audit_line(task, arm, "audit_text", signal, scores, spent, taken)
            lines.append(line | {"headline": signal == HEADLINE})
        held = [values[index] for index in groups.get(("held_out", 0), [])]
        for (kind, repetitions), members in groups.items():
            if kind in ("ladder", "share") and held:
                mine = [values[index] for index in members]
                constant = is_constant([*mine, *held])
                told = _auc([] if constant else [*mine, *held], [True] * len(mine) + [False] * len(held))
                line = {"measure": "text_auc", "arm": arm, "signal": signal, "kind": kind, "repetitions": repetitions}
                line |= {"n_requested": len(mine), "n_scored": len(mine), "n_dropped": 0}
                lines.append(line | told | {"undefined": CONSTANT if constant else None})
    return lines


# ---------------------------------------------------------------- the run


def run(config: CanaryConfig) -> dict:
    """Write the results; {'lines': all result lines, 'violations': lines whose lower bound exceeds ε at 99.9 %}."""
    with results.output_folder(config.output_dir, config.dry_run, "canary") as place:
        task = check(config)
        if task.finished:
            return {"lines": results.read_jsonl(Path(config.output_dir) / FILE), "violations": []}
        if config.dry_run:
            words = f"{len(task.canaries)} canaries in models {list(task.refs)} and files {list(task.files)}"
            print(f"would measure {words}")
            return {"lines": [], "violations": []}
        return measure(config, task, place)


def measure(config: CanaryConfig, task, place: results.Output) -> dict:
    import torch

    world = distributed.start()
    dtype = models.resolve_dtype(config.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(config.output_dir)
    for arm in task.refs:
        if task.taken.get(arm) is None and world.main:
            print(
                f"{arm}: no trained_rows.jsonl beside it: which canaries it was trained on is unknown", file=sys.stderr
            )
    lines, per_canary = [], []
    audited = [index for index, canary in enumerate(task.canaries) if canary["kind"] == "audit"]
    with results.Run(folder / "run_canary.json", config, task.inputs, world, place, weights=task.weights) as record:
        for arm in task.refs:
            bits, signal, name = measure_model(config, task, arm, dtype, world)
            lines += exposure_lines(task, arm, bits, config.references)
            scores = dict(zip(audited, signal))
            if audited:
                lines.append(audit_line(task, arm, "audit", name, signal, task.spent[arm], task.taken.get(arm)))
            for index, canary in enumerate(task.canaries):
                facts = {key: canary[key] for key in ("id", "kind", "repetitions", "included")}
                taken = task.taken.get(arm)
                facts["copies_trained"] = taken.copies(canary) if taken else None
                more = bits.get(index) or {"audit_signal": scores.get(index)}
                per_canary.append({"arm": arm, "source": "model", **facts, **more})
        if world.main:
            lines += count_lines(task)
            for arm in task.texts:
                signals = text_signals(task, arm)
                lines += text_lines(task, arm, signals)
                for index, canary in enumerate(task.canaries):
                    facts = {key: canary[key] for key in ("id", "kind", "repetitions", "included")}
                    values = {signal: values[index] for signal, values in signals.items()}
                    per_canary.append({"arm": arm, "source": "text", **facts, **values})
            record.files.write_jsonl(folder / ROWS_FILE, per_canary)
            record.files.write_jsonl(folder / FILE, [{"schema": results.SCHEMA, **line} for line in lines])
        lines = world.broadcast(lines)
        violations = [line for line in lines if line.get("above_upper", {}).get("99.9")]
        if violations:
            record["error"] = f"{len(violations)} lower bounds of ε exceed the accountant's at 99.9 %"
    if world.main:
        report(lines)
        for ref in task.refs.values():
            models.say_if_hardly_moved(ref)
        print(f"{len(lines)} lines in {folder / FILE}")
    world.close()
    return {"lines": lines, "violations": violations}


def report(lines: list[dict]) -> None:
    """The results as a table a measure."""
    for line in lines:
        place = f"{line['arm']:<10} {line.get('kind', '')} {line.get('repetitions', '')}".rstrip()
        if line["measure"] == "count" and line["part"] == "whole":
            rows = f"{line['exact']['rows']} rows exact, {line['normalised']['rows']} normalised"
            p = ", ".join(f"p {p:.3g} against {other}" for other, p in line["exact"]["fisher_p"].items())
            print(f"whole      {place}: {rows} of {line['n_scored']:,}{p and f' ({p})'}")
        elif line["measure"] == "exposure":
            trained_on = line["copies_trained"]
            seen = f", trained on {', '.join(map(str, trained_on))} times" if trained_on else ""
            if line["undefined"]:
                print(f"exposure   {place}: none ({line['undefined']})")
                continue
            mean, median = line["bits"]["mean"], line["bits"]["median"]
            print(f"exposure   {place}: mean {mean:.2f}, median {median:.2f} of {line['ceiling']:.2f} bits{seen}")
        elif line["measure"].startswith("audit"):
            upper = "none" if line["upper"] is None else f"{line['upper']:.3f}"
            upper = "unknown" if line["upper_unknown"] else upper
            low, auc = ("none" if value is None else f"{value:.3f}" for value in (line["lower"]["95"], line["auc"]))
            if line["auc_ci"]:
                auc += " ({:.3f}–{:.3f}, {})".format(*line["auc_ci"], line["direction"])
            signal = line["signal"] + (", headline" if line.get("headline") else "")
            where = f"{line['measure']:<10} {line['arm']} ({signal})"
            if line["undefined"]:
                print(f"{where}: no bound ({line['undefined']}), accountant {upper}")
            else:
                counts = f"{line['n_scored']} canaries, {line['included']} placed"
                if line["placed_trained"] is not None:
                    counts += f", {line['placed_trained']} of {line['placed']} trained on"
                most = f"at most {line['power']['95']:.3f} could be shown"
                print(f"{where}: ε ≥ {low} at 95 % ({most}), accountant {upper}, AUC {auc}; {counts}")
            for level, above in line["above_upper"].items():
                if above:
                    print(f"           {line['arm']}: the lower bound EXCEEDS the accountant's ε at {level} %")


def main(argv: list[str] | None = None) -> int:
    return 1 if run(make_parser().parse_args(argv))["violations"] else 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
