"""Every script that writes is killed before its file operations and run again: the files are those of an
uninterrupted run, and no others.

By default a few operations of each script; `pytest -m sweep` kills it before every one.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_model, make_rows, write_manifest, write_rows
from planted import text_rows
from test_enron_prepare import PEOPLE, write
from test_fidelity import generated, make_reviews
from test_self_instruct import DRIVER

import mia.shadow
import run_peft
from canary import inject
from data.amazon import make_reviews as shop

FEW = (0.5, 0.9, 1)  # shares of a run's operations


@pytest.fixture(scope="session")
def long_model(tmp_path_factory):
    """A random Llama whose context holds the longest prompt of self-instruct."""
    return make_model(tmp_path_factory.mktemp("long") / "tiny-long", "llama", positions=4096)


def mails(start, have):
    (start / "in").mkdir()
    for index, sender in enumerate(PEOPLE):
        (start / "in" / f"{index}.").write_bytes(
            write(sender, [PEOPLE[(index + step) % len(PEOPLE)] for step in (1, 2)])
        )
    return "--input WORK/in --output WORK/rows.jsonl --tokenizer none --workers 1"


def rows(start, have):
    write_rows(start / "enron.jsonl", make_rows(12))
    return "--input WORK/enron.jsonl --save_map WORK/maps/map.json"


def review_file(start, n=40, seed=1):
    return write_rows(start / "train.jsonl", make_reviews(n, seed))


def canaries(start, have):
    review_file(start)
    return "-i WORK/train.jsonl --repetitions 2 --canaries 2 --audit 6"


def shop_files(start, have):
    words = ["--output_dir", start, "--reviews", 60, "--products", 5, "--category", "Goods"]
    assert shop.main(list(map(str, words))) == 0
    return "--reviews WORK/Goods.jsonl --meta WORK/meta_Goods.jsonl --output_dir WORK/out --train 20 --test 5"


def continuation(start, have):
    write_rows(start / "enron.jsonl", make_rows(12))
    return f"-m {have['models']['neox']} -d WORK/enron.jsonl --output WORK/data.arrow -mt 6 --batch_size 3"


def self_instruct(start, have):
    driver = DRIVER.format(root=str(ROOT)).rpartition("sys.exit")[0] + "main = generate.main\n"
    (start / "driver.py").write_text(driver)
    return f"-m {have['long']} --output WORK/data.jsonl --num_rows 6 --round_size 3 -mt 6 --instance_temperature 1"


def synthetic(start, have):
    review_file(start)
    write_rows(start / "test.jsonl", make_reviews(8, 2, 1000))
    more = "--training WORK/train.jsonl --max_new_tokens 6 --batch_size 4"
    return f"-m {have['models']['neox']} -i WORK/test.jsonl --output WORK/a.jsonl {more}"


def training(start, have):
    write_manifest(write_rows(start / "enron.jsonl", make_rows(30)), tag="original", script="x", argv=[], rows=30)
    flags = "-lr 1e-2 -e 2 --lora_r 2 -pdbs 2 -gas 4"
    return f"-m {have['models']['llama']} -i WORK/enron.jsonl --output_root WORK/out {flags}"


def tree(start, have):
    write_rows(start / "enron.jsonl", make_rows(30))
    for kind, name in (("lora", "checkpoint-1"), ("dora", "checkpoint-2")):
        shutil.copytree(have["adapters"]["llama", kind], start / "tree" / "run" / name)


def measure(start, have):
    tree(start, have)
    return (
        "--model WORK/tree/run/checkpoint-1 --output_dir WORK/out --dataset WORK/enron.jsonl -mt 6 --temperatures 0 0.5"
    )


def evaluate(start, have):
    tree(start, have)
    more = "--save_merged --temp WORK/merged --save_responses"
    return f"--model WORK/tree --dataset WORK/enron.jsonl -mt 6 --temperatures 0 0.5 {more}"


def perplexity(start, have):
    tree(start, have)
    return "WORK/tree --dataset WORK/enron.jsonl --num_rows 10"


def membership(start, have):
    tree(start, have)
    write_rows(start / "other.jsonl", make_rows(50, seed=5)[30:])
    attacks = "--attacks loss zlib ref --bootstrap 20 --token_budget 600"
    return f"--dir WORK/tree --members WORK/enron.jsonl --nonmembers WORK/other.jsonl {attacks}"


def target(start, have):
    """A checkpoint with its run.json, the file it was trained on, and another."""
    write_rows(start / "enron.jsonl", make_rows(8))
    write_rows(start / "other.jsonl", make_rows(50, seed=5)[42:])
    words = f"-m {have['models']['llama']} -i {start}/enron.jsonl --output_root {start} --train_rows 8 --allow_overlap"
    assert run_peft.main([*words.split(), *["-lr", "1e-2", "-e", "2", "--lora_r", "2", "-pdbs", "2", "-gas", "2"]]) == 0
    (run,) = start.glob("tiny-llama/*/*")
    run.rename(start / "run")
    shutil.rmtree(start / "tiny-llama")
    return "--members WORK/enron.jsonl --nonmembers WORK/other.jsonl"


def shadow(start, have):
    return f"--like WORK/run/checkpoint-4 --shadows 2 --output_dir WORK/shadows {target(start, have)}"


def shadowed(start, have):
    """As `shadow`, with four of them trained."""
    words = f"--like {start}/run/checkpoint-4 --shadows 4 --output_dir {start}/shadows {target(start, have)}"
    assert mia.shadow.main(words.replace("WORK", str(start)).split()) == 0
    attacks = "--attacks loss ref --bootstrap 20 --token_budget 600 --output_dir WORK/out"
    return (
        "--model WORK/run/checkpoint-4 --members WORK/enron.jsonl --nonmembers WORK/other.jsonl --shadows WORK/shadows "
        f"{attacks}"
    )


def merge(start, have):
    tree(start, have)
    return "--model WORK/tree/run/checkpoint-1 --save_dir WORK/merged/m"


def canary_results(start, have):
    canaries(start, have)
    assert inject.main(["-i", str(start / "train.jsonl"), "--repetitions", "2", "--canaries", "2", "--audit", "6"]) == 0
    write_rows(start / "a.jsonl", generated(make_reviews(20, 3), "a"))
    adapter = have["adapters"]["llama", "lora"]
    texts = f"--models a={adapter} --synthetic a=WORK/a.jsonl --references 20"
    return f"--canaries WORK/train_canaries_key.jsonl {texts} --output_dir WORK/out"


def auxiliary(start, have):
    canaries(start, have)
    assert inject.main(["-i", str(start / "train.jsonl"), "--repetitions", "2", "--canaries", "2", "--audit", "6"]) == 0
    for name, seed in (("a", 3), ("b", 4)):
        write_rows(start / f"{name}.jsonl", generated(make_reviews(12, seed), name))
    few = "-e 1 -pdbs 4 --lora_r 2 --max_length 64"
    texts = "--synthetic a=WORK/a.jsonl b=WORK/b.jsonl"
    return f"-m {have['models']['llama']} --canaries WORK/train_canaries_key.jsonl {texts} {few} --output_dir WORK/out"


def report(start, have):
    tree(start, have)
    words = [ROOT / "perplexity/perplexity.py", start / "tree", "--dataset", start / "enron.jsonl", "--num_rows", 10]
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return "WORK/tree --output WORK/report"


def arms(start):
    review_file(start, 160)
    write_rows(start / "test.jsonl", make_reviews(60, 2, 1000))
    write_rows(start / "a.jsonl", generated(make_reviews(80, 3, 2000), "a"))


def fidelity(start, have):
    arms(start)
    return "--real WORK/train.jsonl --synthetic a=WORK/a.jsonl --without embedding --output_dir WORK/out"


def importance(start, have):
    arms(start)
    words = "--real WORK/train.jsonl --heldout WORK/test.jsonl --synthetic a=WORK/a.jsonl --num_seeds 2"
    return f"{words} --output_dir WORK/out"


def sheet(start, have):
    arms(start)
    return "make --synthetic a=WORK/a.jsonl --num_rows 10 --output_dir WORK/out"


def downstream(start, have):
    arms(start)
    words = "--real WORK/train.jsonl --heldout WORK/test.jsonl --synthetic a=WORK/a.jsonl --num_seeds 1 --num_rows 20"
    return f"-m {have['models']['llama']} {words} -e 1 -pdbs 4 -gas 2 --lora_r 2 --num_heldout 20 --output_dir WORK/out"


def audit(start, have):
    tree(start, have)
    for name, seed in (("train", 1), ("heldout", 2)):
        write_rows(start / f"{name}.jsonl", text_rows(10, seed))
    small = "--quick --decoys 20 --samples 2 --max_length 120"
    return (
        f"--model WORK/tree/run/checkpoint-1 --train WORK/train.jsonl --heldout WORK/heldout.jsonl {small} "
        "--output_dir WORK/out"
    )


CASES = {
    "enron": ("data/enron/prepare.py", mails, ""),
    "replace_pii": ("data/replace_pii.py", rows, ""),
    "inject": ("canary/inject.py", canaries, ""),
    "amazon": ("data/amazon/prepare.py", shop_files, ""),
    "make_reviews": ("data/amazon/make_reviews.py", lambda *_: "--output_dir WORK/shop --reviews 9 --products 3", ""),
    "make_corpus": (
        "data/embedded/make_corpus.py", lambda *_: "--output_dir WORK/c --people 20 --outsiders 4 --web_pages 9", ""
    ),
    "continuation": ("data/continuation/generate.py", continuation, ""),
    "self_instruct": ("WORK/driver.py", self_instruct, ""),
    "synthetic": ("data/synthetic/generate.py", synthetic, ""),
    "run_peft": ("run_peft.py", training, "--resume"),
    "run_peft from the start": ("run_peft.py", training, "-pt pissa"),
    "run_peft dp": ("run_peft.py", training, "--resume --dp --noise_multiplier 1 --logical_batch_size 8 --seed 1"),
    "measure": ("measure_purified.py", measure, "--save_responses"),
    "evaluate": ("evaluate_purified.py", evaluate, ""),
    "perplexity": ("perplexity/perplexity.py", perplexity, ""),
    "mia": ("mia/mia.py", membership, ""),
    "mia shadows": ("mia/mia.py", shadowed, ""),
    "shadow": ("mia/shadow.py", shadow, ""),
    "merge": ("merge_peft.py", merge, ""),
    "canary": ("canary/measure.py", canary_results, ""),
    "auxiliary": ("canary/auxiliary.py", auxiliary, ""),
    "report": ("plot_results.py", report, ""),
    "fidelity": ("fidelity/fidelity.py", fidelity, ""),
    "feature_importance": ("utility/feature_importance.py", importance, ""),
    "human_sheet": ("utility/human_sheet.py", sheet, ""),
    "downstream": ("utility/downstream.py", downstream, ""),
    "audit": ("audit.py", audit, "--save_responses"),
}  # fmt: skip


def sweep(case: str, root: Path, have: dict, at) -> dict:
    script, prepare, more = CASES[case]
    (root / "start").mkdir()
    words = f"{script} {prepare(root / 'start', have)} {more}".replace("WORK", str(root / "work")).split()
    job = {"root": str(root), "script": words[0], "words": words[1:], "at": at}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kill.py"], input=json.dumps(job), capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def have(models, adapters, long_model):
    return {"models": models, "adapters": adapters, "long": long_model}


@pytest.mark.parametrize("case", CASES)
def test_a_few_kills(case, tmp_path, have):
    found = sweep(case, tmp_path, have, FEW)
    assert not found["faults"], "\n\n".join(found["faults"])
    assert found["killed"] == len(FEW) and len(found["operations"]) >= 5


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
def test_a_kill_before_every_operation(case, tmp_path, have):
    found = sweep(case, tmp_path, have, None)
    assert not found["faults"], f"{len(found['faults'])} of {found['killed']}\n\n" + "\n\n".join(found["faults"])
    assert found["killed"] == len(found["operations"])
