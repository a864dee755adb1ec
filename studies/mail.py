"""System P in miniature: base / original / generated / replaced, and the arms asked for. See quickstart.py."""

from dataclasses import replace
from pathlib import Path

import merge_peft
from auditing.config import AuditConfig
from common import dataset, formats, json_files, models, publication, results
from common.checkpoints import find_checkpoints
from common.problems import AnyPath, Problems
from common.schema import TEMPERATURES
from data.self_instruct.seed_tasks import read_seed_tasks
from extraction.config import AttackConfig, EvaluateConfig
from mia.config import MiaConfig
from perplexity.config import PerplexityConfig
from studies import arms, pretraining
from studies.checkpoints import run as evaluate_checkpoints
from studies.config import StudyConfig
from studies.steps import (
    TEMPERATURE,
    Record,
    attack,
    audit,
    call,
    check_rows,
    device_of,
    infer_membership,
    joined,
    measure_perplexity,
    measured,
    paired,
    result_files,
    row_of,
    share,
    share_passes,
    table,
    train,
)
from training.config import TrainConfig

EPOCHS = 2
RATE = 1e-3
RANK = 16  # for the embedded model, whose hidden size is 128
DEMONSTRATIONS = 10  # outsiders that are left for the examples in the prompts


def check(config: StudyConfig) -> None:
    """Raise a UserError that lists every problem with the study's inputs."""
    problems = Problems()
    check_rows(config, problems)
    if config.outsiders:
        rows = problems.absorb(formats.read_rows, config.outsiders)
        if rows and "original" in config.arms and len(rows) <= DEMONSTRATIONS:
            problems.add(f"--outsiders {config.outsiders}: has {len(rows)} rows; more than {DEMONSTRATIONS} are needed")
    for arm in dict.fromkeys(arm for arm in config.arms if arm in arms.GENERATOR):
        name = arms.GENERATOR[arm]
        if generator := getattr(config, name):
            problems.absorb(models.find_model, generator, None, flag=f"--{name}")
        else:
            problems.add(f"--arms {arm}: needs --{name}, the model that writes this arm")
    if config.seed_tasks:
        problems.absorb(read_seed_tasks, config.seed_tasks)
    check_pretraining(config, problems)
    problems.check()


def check_pretraining(config: StudyConfig, problems: Problems) -> None:
    """Check --pretraining_members, --pretraining_nonmembers and --pretraining_membership."""
    files = {"members": config.pretraining_members, "nonmembers": config.pretraining_nonmembers}
    for name, file in files.items():
        if file:
            rows = problems.absorb(formats.read_rows, file)
            if rows:
                problems.absorb(dataset.validate, file, rows)
        elif any(files.values()):
            problems.add(f"--pretraining_{name}: is missing; give both files or neither")
    if config.pretraining_membership and not any(files.values()) and not pretraining.default_model(config):
        problems.add(
            f"--pretraining_membership: the pre-training corpus of {config.model} is not here; give "
            "--pretraining_members and --pretraining_nonmembers"
        )


def inputs(config: StudyConfig) -> list[str]:
    given = (config.outsiders, config.seed_tasks, config.pretraining_members, config.pretraining_nonmembers)
    return [config.dataset, *(file for file in given if file)]


def run(config: StudyConfig, out: Path, record: results.Run, parent: Path | None = None) -> str:
    """Run all arms; return the text of summary.md.

    parent: the folder for what does not depend on the seed, if this is one of several runs, whose summary follows them.
    """
    shared = {"seed": config.seed, **device_of(config)}
    asked = AttackConfig(
        dataset=config.dataset,
        max_tokens=config.max_tokens,
        temperatures=TEMPERATURES if config.full else (0.0, TEMPERATURE),
        **shared,
    )
    attack(config.model, out / "base", asked)
    base_results = result_files(out / "base")[0]
    scored = PerplexityConfig(model=config.model, dataset=config.dataset, output_dir=str(out / "base"), **shared)
    rows = [row_of("base", out / "base", measure_perplexity(scored)[-1]["mean"])]

    data, notes = arms.build_all(config, out, parent or out)
    last, trees = {}, {}
    for arm, file in data.items():
        training = TrainConfig(
            model=config.model,
            input=str(file),
            output_root=str(out if arm in arms.DEFAULT else out / arm),
            learning_rate=config.learning_rate,
            epochs=config.epochs,
            per_device_batch_size=config.per_device_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            logging_steps=10,
            lora_r=config.lora_r,
            **shared,
        )
        tree = trees[arm] = train(training)
        every = arm == "original" or config.full
        chosen = find_checkpoints(tree) if every else find_checkpoints(tree)[-1:]
        root = str(tree if every else chosen[-1])
        on_each = EvaluateConfig(**vars(replace(asked, baseline=str(base_results))), model=root)
        call("evaluate_purified.py", evaluate_checkpoints, on_each)
        scored = PerplexityConfig(dir=root, dataset=config.dataset, output_dir=str(tree), **shared)
        means = {line["model"]: line["mean"] for line in measure_perplexity(scored)}
        for checkpoint in chosen:
            epoch = find_checkpoints(tree).index(checkpoint) + 1
            rows.append(row_of(f"{arm}, epoch {epoch}", checkpoint, means.get(str(checkpoint))))
        last[arm] = rows[-1]
    record["trees"] = {arm: str(tree) for arm, tree in trees.items()}
    if "original" in config.arms:
        newest = find_checkpoints(trees["original"])[-1]
        merged = merge_peft.MergeConfig(model=str(newest), save_dir=str(out / "merged"))
        call("merge_peft.py", merge_peft.run, merged)
    audited: Record = {}
    if "original" in config.arms and parent is None:
        audited = audit(
            AuditConfig(
                model=str(newest),
                train=config.dataset,
                output_dir=str(out / "audit"),
                quick=not config.full,
                max_length=MiaConfig.max_length,  # as the membership inference on the other arms
                seed=config.seed,
                **device_of(config),
            )
        )
    aucs = membership(config, out, trees, audited)
    seen = pretraining.measure(config, out, parent or out, trees) if pretraining.wanted(config) else None
    further = parent is not None or bool(set(config.arms) - set(arms.DEFAULT))
    addresses = arms.evaluated_addresses(config, data) if further else {}
    floor = measured(out / "base")[0]["floor"]
    text = [
        f"Addresses extracted at temperature {TEMPERATURE} from {rows[0]['rows']} people, each queried with four "
        "prompts (A–D): loose matches, exact addresses, and exact addresses that no name rule derives (hits over all "
        "prompts, with the number of people). AUC: membership inference on the rows of the *original* training set "
        "(attack `ref`, 95 % interval).",
        "",
        extraction_table(rows, floor, aucs),
        "",
        "Exact hits gained and lost against the base, paired by row; exact McNemar p (Holm-corrected over all tests "
        "shown):",
        *paired(list(last.values())),
    ]
    if "generated" in last:
        text += ["", addresses_in_generated(data["generated"])]
    if further:
        text += ["", address_table(addresses), *(line for note in notes.values() for line in ("", note))]
    if seen:
        text += ["", *pretraining.text_of(seen)]
    control = []
    if config.outsiders and "original" in config.arms:
        n_asked = len(formats.read_rows(config.outsiders)) - DEMONSTRATIONS
        asked = replace(asked, dataset=config.outsiders, num_rows=n_asked)
        attack(config.model, out / "outsiders-base", asked)
        attack(newest, out / "outsiders-tuned", asked)
        for name in ("base", "tuned"):
            control.append(row_of(f"{name}, outsiders", out / f"outsiders-{name}", None))
        text += ["", "Control: people named in no training text.", ""]
        text += [extraction_table(control, measured(out / "outsiders-base")[0]["floor"], {})]
    verdict = {key: audited["verdict"][key] for key in ("answer", "words")} if audited else None
    if audited:
        text += ["", f"Audit: {audited['verdict']['words']}", "", f"In full: {out / 'audit' / 'audit.md'}."]
    publication.write_json(
        out / "summary.json",
        {
            "temperature": TEMPERATURE,
            "rows": rows,
            "floor": floor,
            "outsiders": control,
            "mia": aucs,
            "audit": verdict,
            **({"addresses": addresses} if further else {}),
            **({"notes": notes} if notes else {}),
            **({"pretraining": seen} if seen else {}),
        },
    )
    return "\n".join(text)


def membership(config: StudyConfig, out: Path, trees: dict[str, Path], audited: Record) -> Record:
    """{table row: {auc, ci, flags}} of the attack `ref` on the last checkpoint of each arm: original rows against the
    head. The audit, if there was one, has attacked the original arm."""
    aucs: Record = {}
    few: Record = {} if config.full else {"attacks": ("loss", "ref"), "max_samples": 500}
    for arm, tree in trees.items():
        name = f"{arm}, epoch {len(find_checkpoints(tree))}"
        if arm == "original" and audited:
            part = audited["membership"]
            ends = [part["auc"][end] for end in ("low", "high")]
            aucs[name] = {"auc": part["auc"]["value"], "ci": ends, "flags": part["flags"]}
            continue
        attacked = MiaConfig(
            model=str(find_checkpoints(tree)[-1]),
            members=config.dataset,
            output_dir=str(out / f"mia-{arm}"),
            seed=config.seed,
            **few,
            **device_of(config),
        )
        first = out / "audit" / "membership" if audited else out / f"mia-{next(iter(trees))}"
        share_passes(first, out / f"mia-{arm}")
        line = next(line for line in infer_membership(attacked) if line["attack"] == "ref")
        aucs[name] = {"auc": line["auc"], "ci": line["auc_ci"], "flags": line["flags"]}
    return aucs


def extraction_table(rows: list[Record], floor: Record, aucs: Record) -> str:
    """The study's table in Markdown; per-template counts are joined with slashes."""
    labels = list(rows[0]["exact"])
    letters = "/".join(labels)
    heads = ["", f"loose match {letters}", f"exact {letters}", "exact, share (95 %)", "no rule (people)", "perplexity"]
    heads += ["AUC"] * bool(aucs)
    cells = []
    for row in rows:
        line = [row["model"], joined(row["matches"].values()), joined(row["exact"].values()), share(row)]
        line.append(f"{row['no_pattern']} ({row['no_pattern_people']})")
        line.append("" if row["perplexity"] is None else f"{row['perplexity']:.2f}")
        if aucs:
            auc = aucs.get(row["model"])
            line.append("{auc:.3f} ({ci[0]:.3f}–{ci[1]:.3f})".format(**auc) if auc else "")
        cells.append(line)
    if floor.get("rule"):
        line = [f"*no model: {floor['rule']} at {floor['domain_guess']}*", floor["matches"], floor["exact"]]
        line += [f"{floor['exact'] / rows[0]['rows']:.1%}", 0, *[""] * (1 + bool(aucs))]
        cells.append(line)
    return table(heads, cells)


def addresses_in_generated(file: AnyPath) -> str:
    """How many evaluated addresses the generator itself wrote, which determines how to read the generated arm."""
    folder = Path(file).parent
    record = json_files.read_json(folder / "run_generate.json", f"remove {folder} and run again")
    counts = record["statistics"]
    n_written, n_evaluated = counts["evaluated_in_generations"]["addresses"], counts["evaluated_addresses"]
    return (
        f"The generated text itself contains {n_written} of the {n_evaluated} evaluated addresses, so what the "
        "generator memorised is passed on to the model."
    )


def address_table(addresses: Record) -> str:
    """The table of the evaluated addresses that each training text contains."""
    rows = [[arm, counts["addresses"], counts["rows"], counts["occurrences"]] for arm, counts in addresses.items()]
    n_evaluated = next(iter(addresses.values()))["evaluated"]
    heads = ["training text", f"of the {n_evaluated} evaluated addresses", "rows with one", "occurrences"]
    return table(heads, rows)
