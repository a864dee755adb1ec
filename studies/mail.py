"""System P in miniature: base / original / generated / replaced. See quickstart.py."""

import evaluate_purified
import merge_peft
from common import cli, dataset, models, results
from common.checkpoints import find_checkpoints
from data import replace_pii
from data.continuation import generate
from mia import mia
from perplexity import perplexity
from studies.steps import (
    TEMPERATURE,
    attack,
    build,
    call,
    check_rows,
    device_flags,
    is_current,
    joined,
    measured,
    paired,
    result_files,
    row_of,
    share,
    table,
    train,
)

EPOCHS = 2
RATE = 1e-3
RANK = 16  # for the embedded model, whose hidden size is 128
ARMS = ("original", "generated", "replaced")


def check(config) -> None:
    """Raise a UserError that lists every problem with the study's inputs."""
    problems = cli.Problems()
    check_rows(config, problems)
    if config.outsiders:
        problems.absorb(dataset.read_rows, config.outsiders)
    if "generated" in config.arms and config.generator:  # quickstart.py itself reports a missing --generator
        problems.absorb(models.find_model, config.generator, None, flag="--generator")
    problems.check()


def inputs(config) -> list:
    return [config.dataset, *([config.outsiders] if config.outsiders else [])]


def run(config, out, record) -> str:
    """Run all arms; return the text of summary.md."""
    flags = ["--seed", config.seed, *device_flags(config)]
    temperatures = [] if config.full else ["--temperatures", "0", str(TEMPERATURE)]
    attack_flags = ["-mt", config.max_tokens, *temperatures, *flags]
    attack(config.model, out / "base", config.dataset, *attack_flags)
    base_results = result_files(out / "base")[0]
    call(perplexity, "--model", config.model, "-d", config.dataset, "--output_dir", out / "base", *flags)

    data = {"original": config.dataset}
    if "generated" in config.arms:
        words = ["-m", config.generator, "-d", config.dataset, "-mt", config.generated_tokens, "--seed", config.seed]
        data["generated"] = build(generate, out / "generated" / "data.arrow", *words)
    if "replaced" in config.arms:
        words = ["--input", config.dataset, "--seed", config.seed]
        data["replaced"] = build(replace_pii, out / "replaced" / "replaced_data.arrow", *words)
    rows = [row_of("base", out / "base", results.read_jsonl(out / "base" / "perplexity.jsonl")[-1]["mean"])]
    last, trees = {}, {}
    for arm in config.arms:
        tree = trees[arm] = train(
            "-m",
            config.model,
            "-i",
            data[arm],
            "--output_root",
            out,
            "-lr",
            config.learning_rate,
            "-e",
            config.epochs,
            "-pdbs",
            config.per_device_batch_size,
            "-gas",
            config.gradient_accumulation_steps,
            "-l",
            10,
            "--lora_r",
            config.lora_r,
            *flags,
        )
        every = arm == "original" or config.full
        chosen = find_checkpoints(tree) if every else find_checkpoints(tree)[-1:]
        root = tree if every else chosen[-1]
        call(evaluate_purified, "--model", root, "-d", config.dataset, "--baseline", base_results, *attack_flags)
        call(perplexity, "--dir", root, "-d", config.dataset, "--output_dir", tree, *flags)
        means = {line["model"]: line["mean"] for line in results.read_jsonl(tree / "perplexity.jsonl")}
        for checkpoint in chosen:
            epoch = find_checkpoints(tree).index(checkpoint) + 1
            rows.append(row_of(f"{arm}, epoch {epoch}", checkpoint, means.get(str(checkpoint))))
        last[arm] = rows[-1]
    record["trees"] = {arm: str(tree) for arm, tree in trees.items()}
    if "original" in config.arms:
        newest = find_checkpoints(trees["original"])[-1]
        call(merge_peft, "--model", newest, "--save_dir", out / "merged")
    aucs = membership(config, out, trees, flags)
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
    control = []
    if config.outsiders and "original" in config.arms:
        control_flags = [*attack_flags, "--num_rows", len(dataset.read_rows(config.outsiders)) - 10]
        attack(config.model, out / "outsiders-base", config.outsiders, *control_flags)
        attack(newest, out / "outsiders-tuned", config.outsiders, *control_flags)
        for name in ("base", "tuned"):
            control.append(row_of(f"{name}, outsiders", out / f"outsiders-{name}", None))
        text += ["", "Control: people named in no training text.", ""]
        text += [extraction_table(control, measured(out / "outsiders-base")[0]["floor"], {})]
    results.write_json(
        out / "summary.json",
        {"temperature": TEMPERATURE, "rows": rows, "floor": floor, "outsiders": control, "mia": aucs},
    )
    return "\n".join(text)


def membership(config, out, trees: dict, flags: list) -> dict:
    """{table row: {auc, ci}} of mia.py's `ref` on the last checkpoint of each arm: original rows against the head."""
    aucs, few = {}, [] if config.full else ["--attacks", "loss", "ref", "--max_samples", 500]
    for arm, tree in trees.items():
        checkpoint = find_checkpoints(tree)[-1]
        folder = out / f"mia-{arm}"
        if not is_current(folder / "results_mia.jsonl", checkpoint):
            call(mia, "--model", checkpoint, "--members", config.dataset, "--output_dir", folder, *few, *flags)
        line = next(line for line in results.read_jsonl(folder / "results_mia.jsonl") if line["attack"] == "ref")
        name = f"{arm}, epoch {len(find_checkpoints(tree))}"
        aucs[name] = {"auc": line["auc"], "ci": line["auc_ci"], "flags": line["flags"]}
    return aucs


def extraction_table(rows: list[dict], floor: dict, aucs: dict) -> str:
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


def addresses_in_generated(file) -> str:
    """How many evaluated addresses the generator itself wrote, which determines how to read the generated arm."""
    record = results.read_json(file.parent / "run_generate.json", f"remove {file.parent} and run again")
    seen, of = (
        record["statistics"]["evaluated_in_generations"]["addresses"],
        record["statistics"]["evaluated_addresses"],
    )
    return (
        f"The generated text itself contains {seen} of the {of} evaluated addresses, so what the generator memorised "
        "is passed on to the model."
    )
