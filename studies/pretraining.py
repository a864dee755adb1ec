"""Does fine-tuning make membership in the *pre-training* corpus more visible? The attacks on the base and on every arm.

The same texts are attacked each time, so a change is paired: every resample draws texts, with their scores under both
models. Attacks that compare with the base have no score for the base itself and are left out.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common import json_files
from common.checkpoints import find_checkpoints
from common.problems import AnyPath
from data.embedded.config import MembershipConfig
from mia.config import MiaConfig
from studies.config import EMBEDDED, StudyConfig
from studies.steps import Record, build, device_of, infer_membership, share_passes, table

# The core attacks without ref, ez and wbc; of min_k and min_k_pp the size of the papers that proposed them.
ATTACKS = ("loss", "zlib", "lowercase", "min_k_20", "min_k_pp_20", "surp")
HEADLINE = "loss"  # fixed in advance
LEVELS = ("0.1", "0.01")
TEXTS = 500  # per set, without --full
RESAMPLES = 1000
Floats = npt.NDArray[np.float64]


class Scores(NamedTuple):
    """labels [n] (1: member), texts [n] (their hashes), by_attack {attack: scores [n]}."""

    labels: npt.NDArray[np.int64]
    texts: list[str]
    by_attack: dict[str, Floats]


def wanted(config: StudyConfig) -> bool:
    """Whether this part of the study is asked for."""
    return bool(config.pretraining_membership or config.pretraining_members)


def texts(config: StudyConfig, shared: Path) -> tuple[str, str]:
    """(members, non-members): the files given, or those of the embedded model's corpus."""
    if config.pretraining_members and config.pretraining_nonmembers:
        return config.pretraining_members, config.pretraining_nonmembers
    from data.embedded.membership import MEMBERS, NONMEMBERS, run

    folder = shared / "pretraining-texts"
    build("data/embedded/make_membership.py", run, MembershipConfig(output=str(folder)))
    return str(folder / MEMBERS), str(folder / NONMEMBERS)


def measure(config: StudyConfig, out: Path, shared: Path, trees: dict[str, Path]) -> Record:
    """{model: {attack: {auc, auc_ci, tpr, change}}}, base first, and the base's flags."""
    members, nonmembers = texts(config, shared)
    models = {"base": config.model} | {arm: str(find_checkpoints(tree)[-1]) for arm, tree in trees.items()}
    by_model: Record = {}
    base: Scores | None = None
    flags: list[str] = []
    for name, model in models.items():
        folder = out / f"pretraining-{name}"
        share_passes(out / "pretraining-base", folder)
        attacked = MiaConfig(
            model=model,
            members=members,
            nonmembers=nonmembers,
            attacks=ATTACKS,
            max_samples=None if config.full else TEXTS,
            output_dir=str(folder),
            seed=config.seed,
            **device_of(config),
        )
        lines = {line["attack"]: line for line in infer_membership(attacked)}
        scores = read_scores(folder / "scores_mia.jsonl", list(lines))
        flags = flags or sorted({flag for line in lines.values() for flag in line["flags"] if name == "base"})
        base = base or scores
        if scores.texts != base.texts:
            raise RuntimeError(f"{folder}: its texts are not those of the base; choose another --output")
        by_model[name] = {
            attack: {"auc": line["auc"], "auc_ci": line["auc_ci"], "tpr": line["tpr_at_fpr"]}
            | ({} if name == "base" else {"change": change(base, scores, attack, config.seed)})
            for attack, line in lines.items()
            if attack in base.by_attack
        }
    assert base is not None
    n_members = int(base.labels.sum())
    sizes = {"n_members": n_members, "n_nonmembers": len(base.labels) - n_members}
    return {"members": members, "nonmembers": nonmembers, **sizes, "flags": flags, "models": by_model}


def read_scores(file: AnyPath, attacks: list[str]) -> Scores:
    """The scores of a run of mia/mia.py; attacks without a score for some text are left out."""
    rows = json_files.read_jsonl(file)
    columns = {attack: [row[attack] for row in rows] for attack in attacks}
    known = {attack: np.array(column, float) for attack, column in columns.items() if None not in column}
    return Scores(np.array([row["label"] for row in rows]), [row["text_sha256"] for row in rows], known)


def change(before: Scores, now: Scores, attack: str, seed: int, resamples: int = RESAMPLES) -> Record:
    """{measure: {points, low, high}} of one attack: AUC and TPR after fine-tuning minus those before, with the 95 %
    interval of a paired bootstrap: members and non-members are drawn separately, the two scores of a text together."""
    from scipy import stats

    member, other = now.labels == 1, now.labels == 0
    sets = [scores.by_attack[attack] for scores in (before, now)]
    pairs = [(values[member], values[other]) for values in sets]
    levels = usable_levels(int(other.sum()))

    def differences(members: Any, nonmembers: Any, axis: int = -1) -> Floats:
        """[measures, resamples] of drawn positions [resamples, M], [resamples, N]."""
        first, second = (measures(own[members], others[nonmembers], levels) for own, others in pairs)
        return second - first

    places = (np.arange(int(member.sum())), np.arange(int(other.sum())))
    drawn = stats.bootstrap(
        places, differences, n_resamples=resamples, batch=100, vectorized=True, method="percentile", rng=seed
    )
    observed = differences(*places)
    low, high = drawn.confidence_interval
    names = ("auc", *(f"tpr_{level}" for level in levels))
    return {
        name: {"points": float(observed[at]), "low": float(low[at]), "high": float(high[at])}
        for at, name in enumerate(names)
    }


def usable_levels(n_nonmembers: int) -> list[str]:
    """The FPRs at which resampling is meaningful: enough non-members may be above the threshold."""
    from mia import metrics

    return [level for level in LEVELS if metrics.allowed(level, n_nonmembers) >= metrics.BOOTSTRAP_FROM]


def measures(members: Floats, nonmembers: Floats, levels: list[str]) -> Floats:
    """[1 + levels, …]: AUC, and TPR at each FPR, of scores […, M] and […, N]."""
    from scipy.stats import rankdata

    from mia import metrics

    m, n = members.shape[-1], nonmembers.shape[-1]
    ranks = rankdata(np.concatenate([members, nonmembers], axis=-1), axis=-1)
    rows = [(ranks[..., :m].sum(-1) - m * (m + 1) / 2) / (m * n)]  # Mann–Whitney
    ordered = np.sort(nonmembers, axis=-1)
    for level in levels:
        cut = ordered[..., n - 1 - metrics.allowed(level, n)]
        rows.append((members > cut[..., None]).mean(-1))
    return np.stack(rows)


def text_of(measured: Record) -> list[str]:
    """Lines of summary.md."""
    models, n, m = measured["models"], measured["n_nonmembers"], measured["n_members"]
    attacks = list(models["base"])
    measures_shown = {"auc": "AUC"} | {f"tpr_{level}": f"TPR at {float(level):.0%} FPR" for level in usable_levels(n)}
    lines = [
        f"Membership in the *pre-training* corpus: {m} of its texts against {n} that the base never saw. The base's "
        "value, and each arm's change from it (95 % interval of a paired bootstrap over the same texts, not corrected "
        f"for the number of comparisons). Fixed in advance as the headline: {HEADLINE}, AUC.",
    ]
    if measured["flags"]:
        lines += ["", f"FLAGGED: {', '.join(measured['flags'])}"]
    for key, title in measures_shown.items():
        rows = [[f"base, {title}", *(number(models["base"][attack], key) for attack in attacks)]]
        rows += [
            [arm, *(difference(by_attack[attack]["change"][key]) for attack in attacks)]
            for arm, by_attack in models.items()
            if arm != "base"
        ]
        lines += ["", table(["", *attacks], rows)]
    return lines


def number(measured: Record, key: str) -> str:
    value = measured["auc"] if key == "auc" else measured["tpr"][key.removeprefix("tpr_")]
    return f"{value:.3f}"


def difference(part: Record) -> str:
    return "{points:+.3f} ({low:+.3f} … {high:+.3f})".format(**part)


def default_model(config: StudyConfig) -> bool:
    """Whether the study is about the model whose pre-training corpus is known here."""
    return config.model == str(EMBEDDED / "mini-pythia")
