"""Name → e-mail extraction attack on a model or an adapter.

python measure_purified.py --model ./pythia-1.4b/original-lora/0e+00_2e-06/checkpoint-276 --output_dir out
python measure_purified.py EleutherAI/pythia-1.4b out --dataset ./data/enron.jsonl
python measure_purified.py --model CHECKPOINT --output_dir out --baseline base/results_purified.jsonl
torchrun --nproc_per_node=4 measure_purified.py --model CHECKPOINT --output_dir out

Writes results_purified<k>.jsonl (a line a temperature), outcomes_purified<k>.jsonl (a line a row × template ×
temperature, no text) and run_measure_purified.json; with --save_responses also results_purified<k>_rows.jsonl.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import cli, dataset, distributed, models, results, stats
from data.generation import encode_prompt
from extraction import prompts

TEMPERATURES = [0.01, 0.1, 0.2, 0.5, 0.75, 1.0, 1.25, 1.5]
NUM_ROWS = 1000
GREEDY_BELOW = 0.01  # temperatures up to this one count as greedy in reports
KEY = "purified"  # of the lock: other scripts write to checkpoints too
HEADLINE_TEMPERATURE = 0.2
# What two measurements must share to be comparable, and a result file to count as this measurement's.
SETTINGS = (
    "dataset_sha256", "rows", "attack", "templates", "trailing_space", "stop", "demonstrations_sha256",
    "top_k", "max_tokens", "seed",
)  # fmt: skip


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Ask a model for e-mail addresses by name; count what it gives away.",
        "python measure_purified.py --model ./pythia-1.4b/original-lora/0e+00_2e-06/checkpoint-276 --output_dir out",
    )
    parser.add_argument("positional", nargs="*", metavar="MODEL OUTPUT_DIR", help="--model and --output_dir, in short")
    parser.add_argument("--model", help="model directory, adapter checkpoint or hub name (required)")
    parser.add_argument("--output_dir", help="where the result files go (required)")
    parser.add_argument("--base_model", help="base of an adapter, instead of the one its configuration names")
    add_measure_flags(parser)
    cli.add_model_flags(parser)
    return parser


def add_measure_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that evaluate_purified.py passes through."""
    parser.add_argument("-d", "--dataset", default="./data/enron.jsonl", help="rows with gt-name and gt-email")
    parser.add_argument("--top_k", type=cli.positive_int, default=100, help="tokens kept before sampling")
    parser.add_argument("-mt", "--max_tokens", type=cli.positive_int, default=15, help="tokens of an answer")
    parser.add_argument(
        "--num_rows",
        type=cli.positive_int,
        help=f"rows asked, from the first on (default: {NUM_ROWS}, at most a third of the file)",
    )
    parser.add_argument(
        "--temperatures", type=cli.non_negative_float, nargs="+", default=TEMPERATURES, help="0 is greedy"
    )
    parser.add_argument(
        "--attack",
        choices=("templates", "prefix"),
        default="templates",
        help="templates: four five-shot prompts from the name; prefix: the row's own text before the address",
    )
    parser.add_argument(
        "--templates",
        choices=tuple(prompts.ORIGINAL_MESSAGE),
        default="released",
        help="template D as the released tool prints it, or with plain hyphens and no stray space",
    )
    parser.add_argument(
        "--trailing_space", action="store_true", help="end prompts in a space, as the released tool did"
    )
    parser.add_argument(
        "--stop",
        choices=("released", "newline"),
        help="released: an answer runs on over line breaks and counts whole, as in the released tool; newline: it ends "
        "at the first (default: released with --templates released, else newline)",
    )
    parser.add_argument(
        "--demonstrations",
        help="jsonl of name, email; None: five rows spread over the file, outside the evaluated names",
    )
    parser.add_argument(
        "--batch_size", type=cli.non_negative_int, default=0, help="rows decoded together; 0: by memory"
    )
    parser.add_argument(
        "--save_responses", action="store_true", help="also write every response (personal data, mode 0600)"
    )
    parser.add_argument("--baseline", help="a results_purified*.jsonl to compare with, row by row (McNemar)")


@dataclass
class Study:
    """Everything about a measurement that does not depend on the model."""

    dataset: str
    people: list[tuple[str, str]]  # (name, address) of each row asked, in file order
    asked: list[list[tuple[str, list[str]]]]  # [row][template] (prompt, the true texts that could follow it)
    labels: list[str]  # template letters, or ['prefix']
    floor: dict
    settings: dict  # the SETTINGS of the result lines
    inputs: list[str]
    baseline: dict = field(default_factory=dict)  # (row, template, temperature) → outcome
    baseline_path: str | None = None


def prepare(args, problems: cli.Problems) -> Study | None:
    """Read and check every file that the measurement needs; problems are collected, None when there were any."""
    before = len(problems.lines)
    rows = problems.absorb(dataset.read_rows, args.dataset)
    manifest = problems.absorb(dataset.read_manifest, args.dataset) if rows else None
    if len(set(args.temperatures)) < len(args.temperatures):
        problems.add("--temperatures: the same temperature twice")
    demonstrations = problems.absorb(_read_demonstrations, args.demonstrations) if args.demonstrations else None
    if rows is None:
        return None
    fields = ("gt-name", "gt-email") + (("prompt",) if args.attack == "prefix" else ())
    problems.absorb(dataset.validate, args.dataset, rows, fields)
    if len(rows) < 3:
        problems.add(f"{args.dataset}: {len(rows)} rows; at least 3 are needed")
    if args.num_rows and args.num_rows > len(rows):
        problems.add(f"--num_rows {args.num_rows}: {args.dataset} has only {len(rows)} rows")
    if len(problems.lines) > before:
        return None

    evaluated = list(range(args.num_rows)) if args.num_rows else dataset.split(rows, manifest).pii
    if not evaluated:
        problems.add(f"{args.dataset}: no row belongs to the evaluation head; pass --num_rows")
        return None
    if args.attack == "templates" and demonstrations is None:
        demonstrations = prompts.spread_demonstrations(rows, evaluated)
        if len(demonstrations) < prompts.N_DEMONSTRATIONS:
            problems.add(
                f"{args.dataset}: only {len(demonstrations)} rows outside the {len(evaluated)} evaluated ones are left "
                f"for the {prompts.N_DEMONSTRATIONS} demonstrations; pass --demonstrations or a smaller --num_rows"
            )
            return None
    people = [(rows[index]["gt-name"], rows[index]["gt-email"]) for index in evaluated]
    if args.attack == "prefix":
        labels, demonstrations = ["prefix"], []
        asked = []
        for index, (_, address) in zip(evaluated, people):
            prompt = rows[index]["prompt"].rstrip(" ")
            lead = rows[index]["prompt"][len(prompt) :]
            asked.append([(prompt, [lead + address, ("" if lead else " ") + address])])
    else:
        labels = list(prompts.TEMPLATES)
        style, space = args.templates, args.trailing_space
        forms = ("", " ") if space else (" ", "")  # the demonstrations' own first
        asked = [
            [
                (prompts.build_prompt(label, demonstrations, name, style, space), [lead + address for lead in forms])
                for label in labels
            ]
            for name, address in people
        ]
    inside = set(evaluated)
    outside = [row["gt-email"] for index, row in enumerate(rows) if index not in inside]
    settings = {
        "dataset_sha256": results.sha256(args.dataset),
        "rows": [evaluated[0], evaluated[-1] + 1, len(evaluated)],
        "attack": args.attack,
        "templates": args.templates,
        "trailing_space": args.trailing_space,
        "stop": args.stop or ("released" if (args.attack, args.templates) == ("templates", "released") else "newline"),
        "demonstrations_sha256": hashlib.sha256(json.dumps(demonstrations).encode()).hexdigest(),
        "top_k": args.top_k,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
    }
    from extraction import metrics

    floor = metrics.name_rule_floor(people, outside)
    inputs = [str(args.dataset), *([args.demonstrations] if args.demonstrations else [])]
    study = Study(str(args.dataset), people, asked, labels, floor, settings, inputs)
    if args.baseline:
        study.baseline = problems.absorb(_read_baseline, args.baseline, settings, args.temperatures) or {}
        study.baseline_path = args.baseline
    return study if len(problems.lines) == before else None


def _read_demonstrations(path) -> list[tuple[str, str]]:
    rows = dataset.read_rows(path)
    dataset.validate(path, rows, ("name", "email"))
    if len(rows) != prompts.N_DEMONSTRATIONS:
        raise cli.UserError(f"{path}: {len(rows)} demonstrations; {prompts.N_DEMONSTRATIONS} are needed")
    return [(row["name"], row["email"]) for row in rows]


def outcomes_path(results_file) -> Path:
    """outcomes_purified<k>.jsonl of a results_purified<k>.jsonl."""
    path = Path(results_file)
    return path.with_name(path.name.replace("results_purified", "outcomes_purified", 1))


def responses_path(results_file) -> Path:
    """results_purified<k>_rows.jsonl of a results_purified<k>.jsonl."""
    path = Path(results_file)
    return path.with_name(path.stem + "_rows.jsonl")


def _read_baseline(path, settings: dict, temperatures: list[float]) -> dict:
    lines = dataset.read_rows(path)
    beside = outcomes_path(path)
    if not beside.is_file():
        raise cli.UserError(f"--baseline {path}: {beside.name} is not beside it; measure the baseline with this tool")
    problems = cli.Problems()
    for key in SETTINGS:
        if lines[0].get(key) != settings[key]:
            problems.add(f"--baseline {path}: measured with {key} {lines[0].get(key)}, this run has {settings[key]}")
    missing = sorted(set(temperatures) - {line.get("temperature") for line in lines})
    if missing:
        problems.add(f"--baseline {path}: has no line for temperature {', '.join(map(str, missing))}")
    problems.check()
    return {(line["row"], line["template"], line["temperature"]): line for line in dataset.read_rows(beside)}


def find_results(folder, study: Study, model_key: dict, responses: bool = False) -> list[tuple[Path, list[dict]]]:
    """(result file, its lines) of each file of this very measurement, the newest last. Those of the released tool never
    match.

    responses: only files that have their responses beside them.
    """
    found, wanted = [], {**study.settings, **model_key}
    for path in sorted(Path(folder).glob("results_purified*.jsonl"), key=lambda path: (len(path.name), path.name)):
        if path.stem.endswith("_rows"):
            continue
        try:
            lines = dataset.read_rows(path)
        except cli.UserError:
            continue
        if (
            all(line.get(key) == value for line in lines for key, value in wanted.items())
            and outcomes_path(path).is_file()
            and (not responses or responses_path(path).is_file())
        ):
            found.append((path, lines))
    return found


def newest(found: list[tuple[Path, list[dict]]]) -> list[dict]:
    """The last measured line of each temperature in what `find_results` found, by temperature."""
    last = {line["temperature"]: line for _, lines in found for line in lines}
    return [last[temperature] for temperature in sorted(last)]


def next_free(folder) -> Path:
    """results_purified.jsonl, or the first results_purified<k>.jsonl that does not exist."""
    path, k = Path(folder) / "results_purified.jsonl", 0
    while path.exists():
        k += 1
        path = Path(folder) / f"results_purified{k}.jsonl"
    return path


def model_key(ref) -> dict:
    """What identifies the measured weights in a result line."""
    return {"model_sha256": models.weights_sha256(ref), "revision": ref.revision}


def attack(model, tokenizer, study: Study, args, temperatures: list[float], world) -> list[dict]:
    """Ask every row with every template at every temperature. On rank 0: one dict a row × template, in order:

    {row, template, responses: [text per temperature] or None, dropped: reason or None, truth_logprob, truth_logp}.
    """
    from common import sampling
    from common.distributed import progress_bar

    def ask_mine() -> list[dict]:
        longest = models.context_length(model)
        vocabulary = model.config.get_text_config().vocab_size
        newline = study.settings["stop"] == "newline"
        stop = sampling.stop_tokens(tokenizer, vocabulary, newline)
        mine = world.shard(list(range(len(study.people))))
        found = []
        with progress_bar(len(mine) * len(study.labels), "prompts", world) as bar:
            for number, label in enumerate(study.labels):
                asked, tokens, keys, targets = [], [], [], []
                for row in mine:
                    prompt, truths = study.asked[row][number]
                    ids = encode_prompt(tokenizer, prompt)
                    if not ids or len(ids) + args.max_tokens > longest:
                        reason = "longer than the context" if ids else "empty prompt"
                        found.append({"row": row, "template": label, "responses": None, "dropped": reason})
                        bar.update(1)
                        continue
                    asked.append(row)
                    tokens.append(ids)
                    keys.append((row, number))
                    targets.append(_forms(tokenizer, prompt, ids, truths, longest - len(ids)))
                answers = sampling.sweep(
                    model,
                    tokens,
                    keys,
                    temperatures,
                    top_k=args.top_k,
                    max_tokens=args.max_tokens,
                    seed=args.seed,
                    stop=stop,
                    targets=targets,
                    batch_size=args.batch_size,
                    progress=bar.update,
                )
                for row, answer, target in zip(asked, answers, targets):
                    texts = tokenizer.batch_decode(answer.tokens, skip_special_tokens=True)
                    if newline:
                        texts = [text.replace("\r", "\n").split("\n")[0] for text in texts]
                    found.append(
                        {
                            "row": row,
                            "template": label,
                            "responses": texts,
                            "dropped": None,
                            "truth_logprob": answer.truth_logprob,
                            "truth_logp": answer.truth_logp,
                            "truth_tokens": min(map(len, target), default=0),
                        }
                    )
        return found

    everything = [item for part in world.together(ask_mine) for item in part]
    order = {label: number for number, label in enumerate(study.labels)}
    return sorted(everything, key=lambda item: (item["row"], order[item["template"]]))


def _forms(tokenizer, prompt: str, ids: list[int], truths: list[str], room: int) -> list[list[int]]:
    """The canonical tokens of each true text after the prompt, each once; those that do not fit the context left out.

    The texts differ in the blank before the address, so no answer begins with two of them: their probabilities add up.
    """
    forms = []
    for truth in truths:
        joined = encode_prompt(tokenizer, prompt + truth)
        merged = joined[: len(ids)] != ids  # the prompt's last token runs into the answer: take the answer alone
        target = tokenizer(truth, add_special_tokens=False).input_ids if merged else joined[len(ids) :]
        if 0 < len(target) <= room and target not in forms:
            forms.append(target)
    return forms


def summarise(study: Study, found: list[dict], temperatures: list[float], model_info: dict):
    """(result lines, outcome lines, response lines) of a finished attack."""
    import numpy as np

    from extraction import metrics

    result_lines, outcome_lines, response_lines = [], [], []
    n_rows = len(study.people)
    dropped = [item for item in found if item["responses"] is None]
    reasons = {reason: sum(item["dropped"] == reason for item in dropped) for reason in {i["dropped"] for i in dropped}}
    logp = {label: [] for label in study.labels}
    truth = {label: [] for label in study.labels}
    for item in found:
        if item["responses"] is not None and item["truth_logp"] is not None:
            logp[item["template"]].append(item["truth_logp"])
            truth[item["template"]].append(item["truth_logprob"])
    scored = {
        label: sum(item["template"] == label and item["responses"] is not None for item in found)
        for label in study.labels
    }
    # addresses of more tokens than an answer may have: their probability is 0 by definition
    limit = study.settings["max_tokens"]
    too_long = {
        label: sum(item["template"] == label and item.get("truth_tokens", 0) > limit for item in found)
        for label in study.labels
    }
    for number, temperature in enumerate(temperatures):
        hits = {measure: np.full((n_rows, len(study.labels)), np.nan) for measure in metrics.MEASURES}
        for item in found:
            where = {"row": item["row"], "template": item["template"], "temperature": temperature}
            if item["responses"] is None:
                empty = dict.fromkeys(("match", "exact", "local_part", "domain", "no_pattern"))
                outcome_lines.append({**where, **empty, "dropped": item["dropped"]})
                continue
            response = item["responses"][number]
            outcome = metrics.outcome(*study.people[item["row"]], response)
            outcome_lines.append({**where, **outcome})
            response_lines.append({**where, "response": response})
            for measure in metrics.MEASURES:
                key = "match" if measure == "matches" else measure
                hits[measure][item["row"], study.labels.index(item["template"])] = outcome[key]
        line = {}
        for measure in metrics.MEASURES:
            counts = {label: int(np.nansum(hits[measure][:, i])) for i, label in enumerate(study.labels)}
            line[measure] = {label: counts[label] if scored[label] else None for label in study.labels}
            line[measure]["total"] = n_rows
        line["ci95"] = {
            measure: {
                **{label: stats.clopper_pearson(line[measure][label], scored[label]) for label in study.labels},
                "total": stats.clustered_rate(hits[measure]),
            }
            for measure in metrics.MEASURES
        }
        line["floor"] = study.floor
        line["truth_logprob"] = {label: metrics.mean_or_none(truth[label]) for label in study.labels}
        line["probabilistic"] = {
            label: metrics.probabilistic_extraction(np.array([values[number] for values in logp[label]]))
            for label in study.labels
        }
        line["truth_too_long"] = too_long
        if study.baseline:
            line["baseline"] = _compare(study, outcome_lines[-len(found) :])
        line |= {
            **model_info,
            "temperature": temperature,
            "greedy": temperature <= GREEDY_BELOW,
            "headline": temperature == HEADLINE_TEMPERATURE,
            "dataset": study.dataset,
            **study.settings,
            "n_requested": len(found),
            "n_scored": len(found) - len(dropped),
            "n_dropped": len(dropped),
            "n_scored_by_template": scored,
            "dropped": reasons,
        }
        result_lines.append(line)
    return result_lines, outcome_lines, response_lines


def _compare(study: Study, outcome_lines: list[dict]) -> dict:
    """Per measure and template: hits gained and lost against the baseline, exact McNemar p. Never on the total."""
    from extraction import metrics

    compared = {"path": str(study.baseline_path)}
    for measure in metrics.MEASURES:
        key = "match" if measure == "matches" else measure
        compared[measure] = {}
        for label in study.labels:
            gained = lost = 0
            for now in outcome_lines:
                before = study.baseline.get((now["row"], label, now["temperature"]))
                if now["template"] != label or now[key] is None or before is None or before[key] is None:
                    continue
                gained += now[key] and not before[key]
                lost += before[key] and not now[key]
            compared[measure][label] = {"gained": gained, "lost": lost, "p": stats.mcnemar(gained, lost)}
    return compared


def write(files, path, lines, outcome_lines, response_lines, save_responses: bool, append: bool = False) -> None:
    """Write the files of one measurement to the Publication `files`."""
    earlier = [results.read_jsonl(file) if append else [] for file in (outcomes_path(path), path)]
    if save_responses:
        before = results.read_jsonl(responses_path(path)) if append and responses_path(path).is_file() else []
        before = [line for line in before if line["temperature"] not in {line["temperature"] for line in lines}]
        files.write_jsonl(responses_path(path), before + response_lines, permissions=0o600)
    new = {line["temperature"] for line in lines}
    kept = [line for line in earlier[0] if line["temperature"] not in new]
    files.write_jsonl(outcomes_path(path), kept + outcome_lines)
    files.write_jsonl(path, earlier[1] + lines)


def measure_model(model, tokenizer, study, args, model_info, world, path=None, temperatures=None) -> Path:
    """Attack a loaded model and write its files; `path` is an earlier, partial result file to add `temperatures` to."""
    todo = temperatures if temperatures is not None else args.temperatures
    found = attack(model, tokenizer, study, args, todo, world)
    target = path or next_free(args.output_dir)
    if world.main:
        lines = summarise(study, found, todo, model_info)
        with results.output_folder(target.parent, key=KEY) as place, place.publication() as files:
            write(files, target, *lines, args.save_responses, append=path is not None)
    world.barrier()
    return target


def print_table(lines: list[dict], study: Study) -> None:
    """One row a temperature: loose matches and exact hits by template."""
    heads = [f"{measure} {label}" for measure in ("match", "exact") for label in study.labels]
    print(f"{'T':>5} " + " ".join(f"{head:>9}" for head in [*heads, "no_pattern"]) + f"   of {len(study.people)} rows")
    for line in lines:
        cells = [line[measure][label] for measure in ("matches", "exact") for label in study.labels]
        cells.append(sum(line["no_pattern"][label] or 0 for label in study.labels))
        print(f"{line['temperature']:>5g} " + " ".join(f"{'-' if cell is None else cell:>9}" for cell in cells))
    floor = study.floor
    if floor["rule"]:
        guess = f"{floor['rule']}@{floor['domain_guess']}"
        print(f"name-rule floor ({guess}): {floor['matches']} match, {floor['exact']} exact")


def describe(ref, dtype, change) -> dict:
    """The model's part of a result line."""
    return {
        "model": ref.name,
        "base_model": ref.base,
        **model_key(ref),
        "dtype": str(dtype).removeprefix("torch."),
        "relative_change": change,
        "privacy": models.privacy(ref),
    }


def run(args) -> int:
    problems = cli.Problems()
    for value, flag in zip(args.positional, ("model", "output_dir")):
        if getattr(args, flag) not in (None, value):
            problems.add(f"--{flag}: given twice, as {getattr(args, flag)} and {value}")
        setattr(args, flag, value)
    for extra in args.positional[2:]:
        problems.add(f"{extra}: unknown argument (see --help)")
    for flag in ("model", "output_dir"):
        if getattr(args, flag) is None:
            problems.add(f"--{flag}: required")
    args.dataset = dataset.default_dataset(args.dataset)
    distributed.check_environment(problems, args.device_map)
    if args.output_dir:
        cli.check_writable(args.output_dir, problems)
    study = prepare(args, problems)
    ref = tokenizer = None
    if args.model:
        ref, tokenizer = models.look_up(problems, args.model, args.revision, args.base_model)
    problems.check()
    if args.dry_run:
        words = f"{len(study.people)} rows × {len(study.labels)} prompts × {len(args.temperatures)} temperatures"
        print(f"would ask {words} of {ref.name} (base {ref.base}) and write {next_free(args.output_dir)}")
        return 0

    world = distributed.start()
    dtype = models.resolve_dtype(args.dtype, world.device)
    run_file = Path(args.output_dir) / "run_measure_purified.json"
    with results.output_folder(args.output_dir, key=KEY) as place:
        known = written_before_a_kill(run_file, args, study, ref, place.after_kill) if world.main else None
        path = world.broadcast(known)
        with results.Run(run_file, args, study.inputs, world) as record:
            if path is None:
                base = models.load_base(ref, dtype, world.device, args.device_map)
                with models.adapted(base, ref.adapter) as (model, change):
                    path = measure_model(model, tokenizer, study, args, describe(ref, dtype, change), world)
            record["results"] = str(path)
    if world.main:
        lines = results.read_jsonl(path)
        print_table(lines, study)
        models.say_if_hardly_moved(ref, lines[-1]["relative_change"])
    world.say(f"wrote {path}")
    world.close()
    return 0


def written_before_a_kill(run_file: Path, args, study: Study, ref, after_kill: bool) -> Path | None:
    """The complete result of a run with these very arguments that was killed before it could say so."""
    if not run_file.is_file():
        return None
    record = results.read_json(run_file, "remove it")
    mine = {key: value for key, value in vars(args).items() if not key.startswith("_")}
    unfinished = record.get("status") == "running" or after_kill
    if not unfinished or record.get("args") != json.loads(results.dumps(mine)):
        return None
    for path, lines in reversed(find_results(args.output_dir, study, model_key(ref), args.save_responses)):
        if set(args.temperatures) <= {line["temperature"] for line in lines}:
            return path
    return None


def main(argv=None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
