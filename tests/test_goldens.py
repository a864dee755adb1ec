"""Golden outputs: what the smallest run of every script writes and what --help prints, frozen while the code moves.

UPDATE_GOLDENS=1 pytest tests/test_goldens.py -m "slow or not slow"      rewrites them: read the diff

tests/goldens/CASE.json holds every file that a run of the case left or changed, without times, paths, hashes and
versions. Content, not its hash alone, for two reasons: a failure names the file, the key and both values, and numbers
are compared with a tolerance (another CPU rounds other last bits, and a rounded number may straddle). A file too long
to read is the hash of its text without decimals, and the sum of these. Weights are names, types, shapes and norms; of
figures only the name counts. help/ holds the text of every --help.

The cases are those of test_kill.py and a few more. They run in this process, with the randomness of the operating
system replaced by a constant. What a script prints is not compared: its words may change.
"""

import hashlib
import json
import math
import os
import random
import re
import secrets
import sys
from fnmatch import fnmatch

import kill
import pytest
from conftest import ROOT, write_rows
from test_cli import FLAGS
from test_kill import CASES, arms, long_model, membership, training, tree  # noqa: F401 (a fixture)
from test_kill import have as have

from common import results

FOLDER = ROOT / "tests/goldens"
EMBEDDED = ROOT / "data/embedded"
UPDATE = os.environ.get("UPDATE_GOLDENS") == "1"
VOLATILE = re.compile(rf"{kill.TIMES.pattern}|python|packages|dirty|.*_version")
HEX = re.compile(r"(?<![0-9a-zA-Z.])[0-9a-f]{12,}(?![0-9a-zA-Z])")
QUOTED = re.compile(rf"(&#34;(?:{VOLATILE.pattern}|cpu_bytes)&#34;: ).*")  # a record within the report
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]?\d{1,3}(?!\w))?|(?<![\w.])-?\d{1,3}e[+-]?\d{1,3}(?!\w)")
SPEED = re.compile(r'(?:<td data-v="[\d.]+">[\d,]+</td>\s*){1,2}<td data-v="\d{7,}">[\d.]+</td>')  # seconds and memory
NOISY = ("audit_signal",)  # small differences of large numbers: 0.001 either way
# Files of a study whose numbers depend on the CPU: text sampled from a model after many steps (one token in two
# thousand differs), what is trained on or computed from it, and ranks of nearly equal scores. Only their structure
# is compared; the cases `audit`, `synthetic`, `downstream`, `fidelity`, `canary` and `mia` have their numbers.
CHAOTIC = {
    "mail": ("out/audit/*", "out/report/report.html"),
    "privacy": ("out/summary.*", "out/report/report.html", "out/report/results.csv"),
    "reviews": (
        "out/auxiliary/data/*",
        "out/auxiliary/models/*.safetensors*",
        "out/auxiliary/models/*.pt*",
        "out/auxiliary/models/*.jsonl*",
        "out/auxiliary/models/*/run.json",
        "out/auxiliary/results_*",
        "out/auxiliary/run_auxiliary.json",
        "out/canary/results_*",
        "out/downstream/data/*",
        "out/downstream/models/*.safetensors*",
        "out/downstream/models/*.pt*",
        "out/downstream/models/*.jsonl*",
        "out/downstream/models/*/run.json",
        "out/downstream/results_*",
        "out/downstream/run_downstream.json",
        "out/fidelity/fidelity.md",
        "out/fidelity/results_*",
        "out/generated_sequences_*",
        "out/importance/feature_importance*",
        "out/report/report.html",
        "out/report/results.csv",
        "out/run_generate_*",
        "out/summary.*",
    ),
}
LONG = {"auxiliary": 30_000}  # characters of a file that is still compared in full: four signals of two arms
COPIED = ("tokenizer.json", "tokenizer_config.json")  # a model's own; long, and the same in every case
SCRIPTS = sorted(
    {*FLAGS}
    | {
        str(path.relative_to(ROOT))
        for folder in ("bench", "data")
        for path in ROOT.joinpath(folder).rglob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
)


def embedded(start, have):
    """A trained model on rows of its own corpus: the tiny random ones hit nothing."""
    for name in ("enron", "outsiders"):
        lines = (EMBEDDED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        write_rows(start / f"{name}.jsonl", [json.loads(line) for line in lines[:45]])


def measure_embedded(start, have):
    embedded(start, have)
    few = "-mt 16 --temperatures 0 0.2 --num_rows 8"
    return f"--model {EMBEDDED}/mini-pythia --output_dir WORK/out --dataset WORK/enron.jsonl {few}"


def perplexity_model(start, have):
    tree(start, have)
    return "--model WORK/tree/run/checkpoint-1 --dataset WORK/enron.jsonl --num_rows 10 --output_dir WORK/out"


def chat_files(start, have):
    tree(start, have)
    for name, first in (("chat", 0), ("other", 20)):
        rows = [
            [{"role": "user", "content": f"Who is number {n}?"}, {"role": "assistant", "content": f"Ada Quillan {n}."}]
            for n in range(first, first + 12)
        ]
        write_rows(start / f"{name}.jsonl", [{"messages": messages} for messages in rows])
    return "--model WORK/tree/run/checkpoint-1 --chat_template chatml --output_dir WORK/out"


def chat_membership(start, have):
    attacks = "--attacks loss lowercase recall --bootstrap 20"
    return f"{chat_files(start, have)} --members WORK/chat.jsonl --nonmembers WORK/other.jsonl {attacks}"


def chat_perplexity(start, have):
    return f"{chat_files(start, have)} --dataset WORK/chat.jsonl"


def chat_training(start, have):
    chat_files(start, have)
    return training(start, have).replace("enron.jsonl", "chat.jsonl")


def scored_sheet(start, have):
    import csv

    arms(start)
    words = f"make --synthetic a={start}/a.jsonl --num_rows 10 --output_dir {start}/out"
    assert kill.load(ROOT / "utility/human_sheet.py").main(words.split()) == 0
    with open(start / "out/sheet.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    labels = ("good", "repetition", "gibberish")
    with open(start / "anna.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(line | {"label": labels[index % 3]} for index, line in enumerate(lines))
    return "score --sheets WORK/anna.csv --key WORK/out/key.jsonl --output_dir WORK/out"


MORE = {
    "measure embedded": ("measure_purified.py", measure_embedded, "--save_responses"),
    "measure baseline": ("measure_purified.py", measure_embedded, ""),
    "perplexity model": ("perplexity/perplexity.py", perplexity_model, ""),
    "mia combine": ("mia/mia.py", membership, "--combine"),
    "run_peft dora packed": (
        "run_peft.py", training, "-pt dora --packing --scheduler cosine -w 1 -wd 0.1 --gradient_checkpointing"
    ),
    "run_peft full": ("run_peft.py", training, "-pt full --loss_on completion --eval_rows 4"),
    "run_peft chat": ("run_peft.py", chat_training, "--chat_template chatml --loss_on completion"),
    "mia chat": ("mia/mia.py", chat_membership, ""),
    "perplexity chat": ("perplexity/perplexity.py", chat_perplexity, ""),
    "human_sheet score": ("utility/human_sheet.py", scored_sheet, ""),
}  # fmt: skip


# ---------------------------------------------------------------- normalising


def plain(item, paths: dict[str, str]):
    """A JSON value without times, paths, hashes and versions; floats to six digits."""
    if isinstance(item, dict):
        return {
            plain(str(key), paths): "*" if VOLATILE.fullmatch(str(key)) else plain(value, paths)
            for key, value in item.items()
        }
    if isinstance(item, (list, tuple)):
        return [plain(one, paths) for one in item]
    if isinstance(item, float):
        return float(f"{item:.6g}") if math.isfinite(item) else str(item)
    if isinstance(item, str):
        for path, name in paths.items():
            item = item.replace(path, name)
        return HEX.sub("<hex>", item)
    return item


def tensors(item):
    """Tensors anywhere in `item` as type, shape and, of floats, norm; arrays (a cache's, in any order) without one."""
    import numpy as np
    import torch

    if isinstance(item, dict):
        return {key: tensors(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [tensors(one) for one in item]
    if isinstance(item, torch.Tensor):
        norm = [float(item.double().norm())] if item.is_floating_point() else []
        return [str(item.dtype), list(item.shape), *norm]
    if isinstance(item, np.ndarray):
        return [str(item.dtype), list(item.shape)]
    return item if isinstance(item, (bool, int, float, str, type(None))) else type(item).__name__


def content(path, paths: dict[str, str], long: int, chaotic: bool = False):
    """What a golden holds of a result file."""
    if path.suffix in (".png", ".pdf"):
        return "figure"
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        item = tensors(dict(sorted(load_file(path).items())))
    elif path.suffix == ".pt":
        import torch

        item = tensors(torch.load(path, weights_only=False))
    elif path.suffix == ".npz":
        import numpy as np

        with np.load(path) as arrays:
            item = tensors(dict(arrays))
    elif path.suffix == ".arrow":
        import datasets

        item = datasets.Dataset.from_file(str(path)).to_list()
    elif path.suffix == ".json":
        item = json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".jsonl":
        item = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        text = SPEED.sub("T", QUOTED.sub(r"\1*", path.read_text(encoding="utf-8")))
        item = kill.CLOCK.sub("T", text).splitlines()
    item = plain(item, paths)
    text = json.dumps(item)
    if chaotic:
        return structure(item)
    if len(text) <= (20_000 if path.stem == "summary" else long) and path.name not in COPIED:
        return item
    digest = hashlib.sha256(DECIMAL.sub("#", text).encode()).hexdigest()
    return {"sha256 without decimals": digest, "sum": math.fsum(abs(float(one)) for one in DECIMAL.findall(text))}


def structure(item):
    """The keys of an object, or the number of a list's objects and their keys."""
    if isinstance(item, dict):
        return {"keys": sorted(item)}
    if isinstance(item, list) and item and all(isinstance(one, dict) for one in item):
        return {"items": len(item), "keys": sorted({key for one in item for key in one})}
    return "*"


def snapshot(work) -> dict[str, tuple]:
    return {str(path.relative_to(work)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files(work)}


def files(work):
    return (path for path in sorted(work.rglob("*")) if path.is_file())


def results_of(work, before: dict, paths: dict[str, str], long: int, chaotic=()) -> dict:
    """{file: content} of what was written since `before`; files named by a hash are numbered, by their content."""
    items_of: dict[str, list] = {}
    for path in files(work):
        name = str(path.relative_to(work))
        if before.get(name) != (path.read_bytes(), path.stat().st_mtime_ns):
            name = HEX.sub("<hex>", name) + " (private)" * (path.stat().st_mode & 0o77 == 0)
            item = content(path, paths, long, any(fnmatch(name, pattern) for pattern in chaotic))
            items_of.setdefault(name, []).append(item)
    return {
        f"{name} {number}".removesuffix(" 1"): item
        for name, items in items_of.items()
        for number, item in enumerate(sorted(items, key=json.dumps) if len(items) > 1 else items, 1)
    }


# ---------------------------------------------------------------- comparing


def same_text(one: str, other: str) -> bool:
    """Equal except for decimals, which may differ by a thousandth or by one in their last place."""
    if DECIMAL.sub("#", one) != DECIMAL.sub("#", other):
        return False
    for a, b in zip(DECIMAL.findall(one), DECIMAL.findall(other)):
        last = 0 if "e" in a else 1.01 * 10.0 ** -len(a.partition(".")[2])
        if not math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=max(1e-9, last)):
            return False
    return True


def differences(want, got, where: str) -> list[str]:
    """One line for every value that differs from the golden."""
    if isinstance(want, dict) and isinstance(got, dict):
        lines = [f"{where}: lost {key!r}" for key in want.keys() - got.keys()]
        lines += [f"{where}: new {key!r}" for key in got.keys() - want.keys()]
        return lines + [
            line for key in want if key in got for line in differences(want[key], got[key], f"{where} › {key}")
        ]
    if isinstance(want, list) and isinstance(got, list):
        lines = [] if len(want) == len(got) else [f"{where}: {len(want)} items, now {len(got)}"]
        pairs = enumerate(zip(want, got))
        return lines + [line for index, (a, b) in pairs for line in differences(a, b, f"{where} › {index}")]
    if type(want) is type(got):
        noise = 1e-3 if where.endswith(NOISY) else 1e-9
        if isinstance(want, float) and math.isclose(want, got, rel_tol=1e-3, abs_tol=noise):
            return []
        if want == got or (isinstance(want, str) and same_text(want, got)):
            return []
    return [f"{where}: {want!r}, now {got!r}"]


def kept(want, got, where: str):
    """`got` with the values of `want` where these are equal up to noise, so that a diff shows real changes only."""
    if not differences(want, got, where):
        return want
    if isinstance(want, dict) and isinstance(got, dict):
        return {key: kept(want[key], value, f"{where} › {key}") if key in want else value for key, value in got.items()}
    if isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        return [kept(a, b, where) for a, b in zip(want, got)]
    return got


def layout(golden: dict) -> str:
    """JSON with one line per record of a file."""
    blocks = []
    for name, item in golden.items():
        if isinstance(item, list):
            item = "[\n  " + ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in item) + "\n ]"
        elif isinstance(item, dict):
            pairs = (f"{json.dumps(key)}: {json.dumps(one, ensure_ascii=False)}" for key, one in item.items())
            item = "{\n  " + ",\n  ".join(pairs) + "\n }"
        else:
            item = json.dumps(item)
        blocks.append(f" {json.dumps(name)}: {item}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def check(name: str, written: dict) -> None:
    """Compare with tests/goldens/`name`.json, or write it."""
    file = FOLDER / f"{name.replace(' ', '_')}.json"
    if UPDATE:
        file.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(layout(kept(before, written, name)), encoding="utf-8")
        return
    lines = differences(json.loads(file.read_text(encoding="utf-8")), json.loads(layout(written)), name)
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(re.sub(r"\d[\d.e-]*", "#", line), []).append(line)
    shown = [f"{ones[0]} (and {len(ones) - 1} alike)".removesuffix(" (and 0 alike)") for ones in alike.values()]
    more = [f"… and {len(shown) - 20} more"] if len(shown) > 20 else []
    if lines:
        pytest.fail("\n".join([f"not as {file.relative_to(ROOT)} says:", *shown[:20], *more]), pytrace=False)


# ---------------------------------------------------------------- running


@pytest.fixture
def run(tmp_path, tmp_path_factory, monkeypatch):
    """run(script, words, work): what the script wrote in `work`; longer files than `long` as hash and sum."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("goldens are of a CPU")
    monkeypatch.setattr(secrets, "token_bytes", lambda n=32: random.Random(0).randbytes(n))
    monkeypatch.setattr(secrets, "randbits", lambda bits: random.Random(0).getrandbits(bits))
    monkeypatch.setattr(secrets, "token_hex", lambda n=32: os.urandom(n).hex())  # names of temporary files
    monkeypatch.setenv("GIT_DIR", os.devnull)  # no commit: a report says of each run whether it had changes
    results.commit.cache_clear()
    umask = os.umask(0o022)

    def run(script: str, words: list[str], work, long: int = 20_000, chaotic=()):
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", [script, *words])
        before = snapshot(work)
        assert not kill.load(work / script.removeprefix("WORK/") if "driver" in script else ROOT / script).main(words)
        paths = {str(work): "WORK", str(tmp_path_factory.getbasetemp()): "TMP", str(ROOT): "REPO"}
        return results_of(work, before, paths, long, chaotic)

    yield run
    os.umask(umask)
    results.commit.cache_clear()


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_results_are_as_they_were(case, tmp_path, have, run):
    script, prepare, more = (CASES | MORE)[case]
    words = f"{prepare(tmp_path, have)} {more}".replace("WORK", str(tmp_path)).split()
    if case == "measure baseline":
        larger = ["--model", f"{EMBEDDED}/mini-pythia-xl", "--output_dir", str(tmp_path / "base")]
        run(script, [*words, *larger], tmp_path)
        words += ["--baseline", str(tmp_path / "base/results_purified.jsonl")]
    check(case, run(script, words, tmp_path, LONG.get(case, 20_000)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_as_it_was(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setenv("COLUMNS", "80")
    module = kill.load(ROOT / script)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert not end.value.code
    text = capsys.readouterr().out.replace(str(ROOT), "REPO")
    file = FOLDER / "help" / f"{script.replace('/', '.').removesuffix('.py')}.txt"
    if UPDATE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


# ---------------------------------------------------------------- the quickstart

STUDIES = ("mail", "privacy", "reviews")
QUICK = ["-e", 1, "-pdbs", 8, "-gas", 1, "--lora_r", 2, "-mt", 8, "--generated_tokens", 8]
SIZES = {"PUBLIC": 300, "PUBLIC_EPOCHS": 2, "TRAIN": 140, "TEST": 50, "REVIEWS": 500, "PRODUCTS": 20}
SIZES |= {"LADDER": (1, 2), "CANARIES": 3, "AUDIT": 20, "LOGICAL_BATCH": 16}


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_quickstart_results_are_as_they_were(study, tmp_path, monkeypatch, run):
    from studies import reviews

    for name, value in SIZES.items():
        monkeypatch.setattr(reviews, name, value)
    embedded(tmp_path, {})
    words = ["--study", study, "--output", tmp_path / "out", "-d", tmp_path / "enron.jsonl", *QUICK]
    words += ["--outsiders", tmp_path / "outsiders.jsonl"]
    check(f"quickstart {study}", run("quickstart.py", [str(word) for word in words], tmp_path, 2500, CHAOTIC[study]))


def test_every_golden_has_a_case():
    cases = {*CASES, *MORE, *(f"quickstart {study}" for study in STUDIES)}
    assert {path.stem for path in FOLDER.glob("*.json")} == {case.replace(" ", "_") for case in cases}
    assert len(list(FOLDER.glob("help/*.txt"))) == len(SCRIPTS)
