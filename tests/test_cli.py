"""The command line is a contract: frozen flags, --help without heavy imports, and the README's commands as written."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, kill_when_written, make_rows, read_lines, run_script, write_manifest, write_rows

from common import cli

MODEL = {"--dtype", "--device_map", "--revision", "--dry_run", "--seed"}
MEASURING = MODEL | {"--model_parallel"}
MEASURE = {
    "-d", "--dataset", "--data", "--top_k", "-mt", "--max_tokens", "--num_rows", "--temperatures", "--attack",
    "--templates", "--trailing_space", "--stop", "--demonstrations", "--batch_size", "--save_responses", "--baseline",
    "--chat", "--chat_template",
}  # fmt: skip
QUANTIZED = {"--quantization"}
ENGINE = {"--engine"}
FLAGS = {
    "run_peft.py": MODEL | QUANTIZED | {
        "-m", "--model", "-i", "--input", "--data", "--num_rows", "--output_dir", "-pdbs", "--per_device_batch_size",
        "-gas", "--gradient_accumulation_steps",
        "-w", "--warmup_steps", "-e", "--epochs", "-lr", "--learning_rate", "-l", "--logging_steps", "-opt",
        "--optimizer", "-wd", "--weight_decay", "-s", "--scheduler", "--scheduler_kwargs", "-dt",
        "--distribution_type", "-pt", "--peft_type", "--output_root", "--run_name", "--train_rows", "--eval_rows",
        "--allow_overlap", "--lora_r", "--lora_alpha", "--lora_dropout", "--target_modules", "--max_length",
        "--chat_template", "--columns", "--split", "--data_config", "--loss_on", "--max_grad_norm",
        "--hsdp", "--gradient_checkpointing", "--packing", "--resume", "--report_to",
        "--dp", "--target_epsilon", "--noise_multiplier", "--target_delta", "--logical_batch_size", "--accountant",
        "--privacy_unit", "--max_rows_per_user", "--secure_rng", "--suggest_max_grad_norm",
    },
    "merge_peft.py": MODEL | QUANTIZED | {"--model", "--save_dir", "--output_dir", "--base_model", "--is_opt"},
    "measure_purified.py": MEASURING | ENGINE | QUANTIZED | MEASURE | {"--model", "--output_dir", "--base_model"},
    "evaluate_purified.py": MEASURING | ENGINE | QUANTIZED | MEASURE | {
        "-m", "--model", "-t", "--temp", "--is_opt", "--base_model", "--save_merged", "--mia",
    },
    "perplexity/perplexity.py": MEASURING | QUANTIZED | {
        "--dir", "-d", "--dataset", "--data", "--model", "--base_model", "--output_dir", "--num_rows", "--token_budget",
        "--chat_template", "--columns", "--split", "--data_config",
    },
    "mia/mia.py": MEASURING | QUANTIZED | {
        "--model", "--dir", "--base_model", "--members", "--data", "--num_rows", "--nonmembers",
        "--text_field", "--chat_template", "--columns", "--split", "--data_config", "--attacks", "--ref_model",
        "--prefix_file", "--neighbor_model", "--freq_corpus", "--max_length", "--max_samples", "--token_budget",
        "--bootstrap", "--combine", "--shadows", "--output_dir",
    },
    "mia/shadow.py": {
        "--like", "--shadows", "--members", "--data", "--nonmembers", "--base_model", "--output_dir", "--dry_run",
        "--seed",
    },
    "quickstart.py": MODEL | {
        "-m", "--model", "-d", "--dataset", "--data", "--outsiders", "--output", "--output_dir", "-lr",
        "--learning_rate", "-e", "--epochs",
        "-pdbs", "--per_device_batch_size", "-gas", "--gradient_accumulation_steps", "-mt", "--max_tokens", "--full",
        "--study", "--generator", "--generated_tokens", "--arms", "--lora_r", "--unseen_generator", "--seed_tasks",
        "--self_instruct_rows", "--pretraining_membership", "--pretraining_members", "--pretraining_nonmembers",
        "--seeds",
    },
    "studies/sweep.py": {
        "--sweep", "--output", "--output_dir", "--executor", "--jobs", "--slurm", "--cell", "--seed", "--dry_run",
    },
    "data/enron/prepare.py": {
        "--input", "--output", "--tokenizer", "--workers", "--strict", "--overwrite", "--dry_run", "--seed",
    },
    "data/replace_pii.py": {"--input", "--data", "--output", "--save_map", "--strict", "--overwrite",
        "--dry_run", "--seed"},
    "data/leak_check.py": {"--input", "--data", "--replaced", "--dry_run", "--seed"},
    "data/amazon/prepare.py": {
        "--reviews", "--meta", "--output_dir", "--train", "--test", "--memory_limit", "--threads", "--strict",
        "--overwrite", "--dry_run", "--seed",
    },
    "data/continuation/generate.py": MEASURING | ENGINE | {
        "-m", "--model", "--base_model", "-d", "--data_set", "--dataset", "--data", "--top_k", "-mt", "--max_tokens",
        "--temperature", "--output",
        "--batch_size", "--strict", "--overwrite",
    },
    "data/synthetic/generate.py": MEASURING | ENGINE | {
        "-m", "--model", "--base_model", "-i", "--input", "--data", "--arm", "--num", "--num_rows", "--condition",
        "--training",
        "--metadata_epsilon", "--metadata_delta", "--metadata_fields", "--histogram", "--max_new_tokens",
        "--temperature", "--top_k", "--filter", "--batch_size", "--output", "--overwrite",
    },
    "canary/inject.py": {
        "--model", "--tokenizer", "--family", "--generator", "--temperature", "--chat_template", "--columns",
        "-i", "--input", "--data", "--output", "--key_file", "--share", "--repetitions", "--canaries", "--audit",
        "--privacy_unit", "--secret", "--within", "--condition", "--overwrite", "--dry_run", "--seed",
    },
    "canary/measure.py": MEASURING | QUANTIZED | {
        "--base_model", "--canaries", "--models", "--synthetic", "--ref_model", "--references", "--output_dir",
        "--overwrite",
    },
    "canary/auxiliary.py": MODEL | {
        "-m", "--model", "--canaries", "--synthetic", "--output_dir", "-e", "--epochs", "-lr", "--learning_rate",
        "-pdbs", "--per_device_batch_size", "-gas", "--gradient_accumulation_steps", "-pt", "--peft_type", "--lora_r",
        "--lora_alpha", "--max_length",
    },
    "data/self_instruct/generate.py": MEASURING | ENGINE | {
        "-m", "--model", "--base_model", "--seed_tasks", "--num_rows", "--top_k", "-mt", "--max_tokens",
        "--temperature",
        "--instance_temperature", "--format", "--round_size", "--output", "--batch_size", "--strict",
        "--overwrite",
    },
    "fidelity/fidelity.py": MODEL | {"--columns",
        "--real", "--synthetic", "--train", "--output_dir", "--num_rows", "--pool_rows", "--embedder", "--max_tokens",
        "--without", "--overwrite",
    },
    "utility/downstream.py": MODEL | {"--columns",
        "-m", "--model", "--real", "--heldout", "--synthetic", "--num_rows", "--num_heldout", "--num_seeds",
        "--allow_overlap", "--output_dir", "-e", "--epochs", "-lr", "--learning_rate", "-pdbs",
        "--per_device_batch_size", "-gas", "--gradient_accumulation_steps", "-w", "--warmup_steps", "-pt",
        "--peft_type", "--lora_r", "--lora_alpha", "--max_length",
    },
    "utility/feature_importance.py": {"--columns",
        "--real", "--heldout", "--synthetic", "--num_rows", "--num_heldout", "--min_rows", "--num_seeds",
        "--output_dir", "--overwrite", "--dry_run", "--seed",
    },
    "plot_results.py": {
        "--output", "--output_dir", "--include_responses", "--unredacted", "--no_figures", "--dry_run", "--seed",
    },
    "utility/human_sheet.py": {"--columns",
        "--synthetic", "--real", "--num_rows", "--sheets", "--key", "--output_dir", "--overwrite", "--dry_run",
        "--seed",
    },
    "audit.py": MEASURING | ENGINE | QUANTIZED | {"--model", "--base_model", "--ref_model", "--train", "--data",
                         "--heldout",
                         "--chat_template", "--columns", "--split", "--data_config", "--num_rows", "--secrets", "--pii",
                         "--region", "--ner", "--canaries",
                         "--decoys",
                         "--samples", "--without", "--quick", "--max_length", "--token_budget", "--output_dir",
                         "--fail_on", "--save_responses"},
}  # fmt: skip
HEAVY = ("torch", "transformers", "peft", "datasets", "sklearn", "scipy", "pandas", "matplotlib")


@pytest.mark.parametrize("script", FLAGS)
def test_help_shows_the_frozen_flags_and_loads_nothing_heavy(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip().endswith("LOADED []")
    help_text = done.stdout
    flags = set(re.findall(r"(?:^|[\s,])(--?[a-z][a-z_]*)", help_text.split("options:")[1].split("example:")[0]))
    listed = {flag for flag in flags if re.search(rf"^  (?:.*, )?{flag}\b", help_text, re.M)} - {"-h", "--help"}
    assert listed == FLAGS[script] | {"--config", "--version"}
    assert "example:\n" in help_text
    options = re.split(r"\n  (?=-)", help_text.split("options:")[1].split("\nexample:")[0])[3:]
    silent = [option.split()[0] for option in options if "(default:" not in option]
    assert silent == []


@pytest.mark.parametrize("words", (["run_peft.py", "-i"], ["measure_purified.py", "model", "out", "-d"]))
def test_a_missing_enron_file_is_met_with_how_to_build_it(words, tmp_path):
    done = run_script(*words, tmp_path / "enron.jsonl")
    assert done.returncode == 2 and "or build it from raw mail with data/enron/prepare.py" in done.stderr


def test_every_script_has_a_dry_run_as_the_readme_says():
    assert [script for script, flags in FLAGS.items() if "--dry_run" not in flags] == []


def test_dry_runs_of_the_builders_write_nothing(dataset, tmp_path):
    mails = tmp_path / "maildir"
    mails.mkdir()
    (mails / "1.").write_text("From: a@a.example\n\nx\n")
    review = {"rating": 5.0, "title": "t", "text": "x", "asin": "B1", "user_id": "u"}
    reviews = write_rows(tmp_path / "reviews.jsonl", [review])
    meta = write_rows(tmp_path / "meta.jsonl", [{"parent_asin": "B1", "title": "p"}])
    rows = write_rows(tmp_path / "train.jsonl", [{"Review": "good", "Rating": 5, "row_id": n} for n in range(4)])
    before, out = sorted(tmp_path.rglob("*")), tmp_path / "out"
    for words in (
        ["data/enron/prepare.py", "--input", mails, "--output", out / "enron.jsonl"],
        ["data/replace_pii.py", "--input", dataset, "--output", out / "r.arrow"],
        ["data/amazon/prepare.py", "--reviews", reviews, "--meta", meta, "--output_dir", out],
        ["canary/inject.py", "--input", rows, "--output", out / "c.jsonl", "--key_file", out / "k.jsonl", "--audit", 2],
    ):
        done = run_script(*words, "--dry_run")
        assert (done.returncode, done.stderr) == (0, "") and "would " in done.stdout and str(out) in done.stdout
        words[2] = tmp_path / "none"
        assert run_script(*words, "--dry_run").returncode == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_defaults_of_the_contract():
    import measure_purified
    import run_peft

    args = run_peft.make_parser().parse_args([])
    contract = {
        "model": "EleutherAI/pythia-1.4b", "input": "./data/enron.jsonl", "per_device_batch_size": 1,
        "gradient_accumulation_steps": 8, "warmup_steps": 0, "epochs": 4, "learning_rate": 2e-6, "logging_steps": 1,
        "optimizer": "adamw_torch", "weight_decay": 0, "scheduler": "linear", "distribution_type": "ddp",
        "peft_type": "lora", "lora_r": 64, "lora_alpha": 16, "max_length": 2048,
        "max_grad_norm": 1.0, "seed": None,  # 3407, and with --dp the system's entropy
    }  # fmt: skip
    assert "(default: 3407; with --dp" in " ".join(run_peft.make_parser().format_help().split())
    assert {key: getattr(args, key) for key in contract} == contract
    args = measure_purified.make_parser().parse_args(["m", "o"])
    assert (args.top_k, args.max_tokens, args.dataset, args.seed) == (100, 15, "./data/enron.jsonl", 3407)
    assert args.temperatures == (0.01, 0.1, 0.2, 0.5, 0.75, 1.0, 1.25, 1.5)


def readme_blocks() -> list[list[str]]:
    """The command lines of each sh block of the README and the documents."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    blocks = re.findall(r"```sh\n(.*?)```", "\n".join(texts), re.S)
    return [[line.split("   #")[0].strip() for line in block.splitlines() if line.strip()] for block in blocks]


WITHOUT_DATA = {  # a missing file of each script that loads a model, next to an existing model
    "run_peft.py": "-m MODEL -i NONE --output_root OUT",
    "measure_purified.py": "--model MODEL -d NONE --output_dir OUT",
    "evaluate_purified.py": "-m TREE -d NONE",
    "perplexity/perplexity.py": "--model MODEL -d NONE --output_dir OUT",
    "mia/mia.py": "--model MODEL --members NONE --nonmembers NONE --output_dir OUT",
    "canary/measure.py": "--canaries NONE --models a=MODEL --output_dir OUT",
    "canary/auxiliary.py": "-m MODEL --canaries NONE --synthetic a=NONE --output_dir OUT",
    "data/continuation/generate.py": "-m MODEL -d NONE --output OUT/a.arrow",
    "data/synthetic/generate.py": "-m MODEL -i NONE --arm a --output OUT/a.jsonl",
    "data/self_instruct/generate.py": "-m MODEL --seed_tasks NONE --output OUT/a.jsonl",
    "fidelity/fidelity.py": "--real NONE --synthetic a=NONE --output_dir OUT",
    "utility/downstream.py": "-m MODEL --real NONE --heldout NONE --synthetic a=NONE --output_dir OUT",
    "utility/feature_importance.py": "--real NONE --heldout NONE --synthetic a=NONE --output_dir OUT",
    "quickstart.py": "-m MODEL -d NONE --output OUT",
}


@pytest.mark.parametrize("script", WITHOUT_DATA)
def test_a_missing_file_is_reported_without_importing_torch(script, models, adapters, tmp_path):
    shutil.copytree(adapters["llama", "lora"], tmp_path / "tree" / "checkpoint-1")
    places = {"MODEL": models["llama"], "NONE": tmp_path / "none.jsonl", "OUT": tmp_path / "out", "TREE": tmp_path}
    words = re.sub("|".join(places), lambda match: str(places[match[0]]), WITHOUT_DATA[script]).split()
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY[:4]!r}))\n"  # None: importing it is an ImportError
        f"sys.argv = {['x', *words]!r}\n"
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert all(str(tmp_path / "none.jsonl") in line for line in done.stderr.splitlines()), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_readme_study_runs_as_written(models, tmp_path):
    """The blocks that name pythia-1.4b, on a tiny model of that name and 60 rows, two processes instead of four.
    Without docs/reproduce-paper.md, whose runs need several models and data sets."""
    shutil.copytree(models["neox"], tmp_path / "EleutherAI" / "pythia-1.4b")
    (tmp_path / "data").mkdir()
    data = write_rows(tmp_path / "data" / "enron.jsonl", make_rows(60))
    write_manifest(data, tag="original", script="test", argv=[], rows=60, split_start=20)  # as prepare.py's
    blocks = [block for block in readme_blocks() if any("pythia-1.4b" in line for line in block)]
    blocks = [block for block in blocks if not any("paper/" in line for line in block)]
    assert sorted(len(block) for block in blocks) == [3, 3, 5]  # differential privacy, membership inference, the study
    for line in [line for block in sorted(blocks, key=len, reverse=True) for line in block]:  # the study first
        # 40 rows in global batches of 1 × 8 × 2 are 3 steps per epoch: checkpoint-12 replaces checkpoint-276
        line = line.replace("--nproc_per_node=4", "--nproc_per_node=2").replace("checkpoint-276", "checkpoint-12")
        words = shlex.split(line)
        start = [sys.executable]
        if words[0] == "torchrun":
            start += ["-m", "torch.distributed.run", "--standalone", words.pop(1)]
        words[1] = str(ROOT / words[1])
        done = subprocess.run([*start, *words[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    tree = tmp_path / "pythia-1.4b/original-lora/0e+00_2e-06"
    lines = read_lines(tree / "checkpoint-12/results_purified.jsonl")
    assert len(lines) == 8 and "baseline" in lines[0]
    assert len(read_lines(tree.parents[1] / "perplexity.jsonl")) == 4
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert (tree / "checkpoint-12/results_mia.jsonl").is_file() and (tmp_path / "results/roc_mia.png").is_file()
    private = json.loads((tree.parents[1] / "original-lora-dp-eps8/0e+00_2e-06/run.json").read_text())["privacy"]
    assert private["private"] and private["epsilon"] <= 8


def check_pasted(printed: str) -> None:
    """Every printed command line is accepted by its script and parses to the configuration of the step."""
    lines = re.findall(r"^\$ python (\S+\.py) (.*)$", printed, re.M)
    assert len(lines) > 9
    for script, words in lines:
        parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).make_parser()
        assert cli.words_of(parser.parse_args(shlex.split(words))) == shlex.split(words), script


@pytest.mark.slow
def test_quickstart_in_small(tmp_path):
    """quickstart.py on the embedded model with 90 of its rows: every step runs, a second call keeps all results."""
    rows = read_lines(ROOT / "data/embedded/enron.jsonl")[:90]
    data = write_rows(tmp_path / "enron.jsonl", rows)
    outsiders = write_rows(tmp_path / "outsiders.jsonl", read_lines(ROOT / "data/embedded/outsiders.jsonl")[:30])
    words = ["quickstart.py", "-d", data, "--outsiders", outsiders, "--output", tmp_path / "out", "-e", "2"]
    done = run_script(*words, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "out/summary.md").read_text(encoding="utf-8")
    assert table in done.stdout and "epoch 2" in table and "McNemar" in table and "no model:" in table
    check_pasted(done.stdout)
    again = run_script(*words, timeout=600)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "measured before, kept" in again.stdout and "nothing to do" in again.stdout
    assert not re.search(r"(measured|built) again|python (mia|data)/", again.stdout)
    assert (tmp_path / "out/summary.md").read_text(encoding="utf-8") == table


@pytest.mark.slow
def test_quickstart_study_privacy_in_small(tmp_path):
    rows = read_lines(ROOT / "data/embedded/enron.jsonl")[:60]
    data = write_rows(tmp_path / "enron.jsonl", rows)
    done = run_script("quickstart.py", "--study", "privacy", "-d", data, "--output", tmp_path / "out", "-e", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "out/summary.md").read_text(encoding="utf-8")
    assert table in done.stdout
    check_pasted(done.stdout)
    arms = ["no noise, no clipping", "ε = 8", "ε = 1"]
    firsts = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert firsts == ["", "---", "base", *arms, "", "---", *arms]


@pytest.mark.slow
def test_quickstart_study_reviews_in_small(tmp_path):
    """Every step of System S on 100 training rows; killed and rerun, it keeps finished steps; the table is complete."""
    driver = tmp_path / "small.py"
    driver.write_text(
        "import sys\n"
        "import quickstart\nfrom common.process import entry\nfrom studies import reviews\n"
        "reviews.PUBLIC, reviews.PUBLIC_EPOCHS, reviews.REVIEWS, reviews.PRODUCTS = 60, 1, 500, 30\n"
        "reviews.TRAIN, reviews.TEST, reviews.LADDER, reviews.CANARIES, reviews.AUDIT = 100, 45, (1, 4), 2, 20\n"
        "sys.exit(entry(quickstart.main))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, str(driver), "--study", "reviews", "--output", str(out), "-e", "1"]
    (out / "reviews_raw").mkdir(parents=True)  # as left by a run that was killed when a builder had just started
    (out / "reviews").mkdir()
    kill_when_written(command, out / "generated_sequences_no_dp.jsonl", 10)
    assert (out / "generated_sequences_no_dp.jsonl").exists() and not (out / "summary.md").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing to do" in done.stdout and "built before, kept" in done.stdout
    check_pasted(done.stdout)
    table = (out / "summary.md").read_text(encoding="utf-8")
    assert table in done.stdout
    firsts = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert firsts[2:6] == ["no_dp", "dp_8", "dp_1", "base"] and "trained_on" in table
    assert firsts[-6:] == ["real", "no_dp", "dp_8", "dp_1", "base", "majority"]
    assert "Frechet distance" in firsts and "MAUVE (low, high: of 5 seeds)" in firsts
    rows = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    epsilons = [rows["arms"][arm]["epsilon"] for arm in ("no_dp", "dp_8", "dp_1")]
    assert epsilons[0] is None and 7.9 < epsilons[1] <= 8 and 0.97 < epsilons[2] <= 1
    made = sorted(path.parent.parent.name for path in out.glob("public-base/*-dp-*/*/checkpoint-*"))
    other = subprocess.run([*command, "-lr", "1e-5"], capture_output=True, text=True, timeout=100)
    assert other.returncode == 2 and "--learning_rate was 0.003, now 1e-05" in other.stderr
    (out / "canary/done").unlink()  # killed between the results and the mark: measured again, with the same table
    likeness = out / "fidelity/results_fidelity.json"
    likeness.write_text(likeness.read_text(encoding="utf-8")[:999], encoding="utf-8")  # so is a damaged result
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    kept = [line.split("/")[-1] for line in again.stdout.splitlines() if "measured" in line and "out/" in line]
    assert kept == [
        "auxiliary: measured before, kept",
        "fidelity: damaged or stale (weights or files changed); measured again",
        *(f"{name}: measured before, kept" for name in ("importance", "downstream")),
    ]
    assert "built again" not in again.stdout
    assert again.returncode == 0 and (out / "summary.md").read_text(encoding="utf-8") == table, again.stderr[-2000:]
    assert len(made) == 3 and len({path.name for path in out.glob("public-base/*-dp-*/*/checkpoint-*")}) == 1, made


@pytest.mark.parametrize("script", ["run_peft.py", "mia/mia.py", "data/enron/prepare.py"])
def test_version_and_a_hint_for_a_mistyped_flag(script):
    import common

    done = run_script(script, "--version")
    assert (done.returncode, done.stdout) == (0, f"{script.split('/')[-1]} {common.__version__}\n")
    done = run_script(script, "--sed", "3")
    assert done.returncode == 2 and "--sed: unknown argument (did you mean --seed?)" in done.stderr


def test_configuration_files(tmp_path):
    """The same keys as the flags, in YAML or JSON; flags win; problems of both are reported; it is frozen."""
    import run_peft
    from training.config import TrainConfig

    file = tmp_path / "lora.yaml"
    file.write_text("epochs: 2\nlearning_rate: 1e-4\ntarget_modules: [q_proj, v_proj]\npacking: true\nresume: false\n")
    found = run_peft.make_parser().parse_args(["--config", str(file), "-e", "3"])
    wanted = TrainConfig(epochs=3, learning_rate=1e-4, target_modules=("q_proj", "v_proj"), packing=True)
    assert found == wanted
    with pytest.raises(AttributeError):
        found.epochs = 1
    (tmp_path / "lora.json").write_text('{"epochs": 2, "max_grad_norm": "inf"}')
    found = run_peft.make_parser().parse_args(["--config", str(tmp_path / "lora.json")])
    assert found == TrainConfig(epochs=2, max_grad_norm=float("inf"))
    file.write_text("epoch: 2\nlora_r: none\nmodel: {a: 1}\n")
    done = run_script("run_peft.py", "--config", file, "--epochs", "0")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        f"--config {file}: unknown key 'epoch' (did you mean epochs?)",
        f"--config {file}: model: expected a value or a list",
        "--lora_r: must be a whole number, got 'none'",
        "--epochs: must be 1 or more, got 0",
    ]
    for text, words in (("- a\n", "expected a mapping"), ("a: [\n", "not YAML")):
        file.write_text(text)
        done = run_script("run_peft.py", "--config", file)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", FLAGS)
def test_flags_fill_a_frozen_configuration(script):
    """Each field is a flag, with the default of the dataclass; rooms never see argparse's namespace."""
    import dataclasses
    import importlib

    parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).make_parser()
    fields = {field.name for field in dataclasses.fields(parser.configuration)}
    assert parser.configuration.__dataclass_params__.frozen
    positional = {"plot_results.py": {"directories"}, "utility/human_sheet.py": {"action"}}.get(script, set())
    assert {f"--{name}" for name in fields - positional} <= FLAGS[script]
