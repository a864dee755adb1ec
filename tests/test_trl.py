"""Adapters trained by TRL's SFTTrainer, in an environment of its own, through the scripts as they are.

TRL_PYTHON names the Python of an environment with trl and peft: python -m venv trl && trl/bin/pip install trl peft
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, make_model, read_lines, run_script, write_rows
from planted import chat_rows

from common import chat, models, tokenization

PYTHON = os.environ.get("TRL_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TRL_PYTHON names no Python of an environment with trl and peft"),
]
N = 40
# CHATML without its {% generation %} marks, as most tokenizers carry it
PLAIN = chat.CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama whose tokenizer has a chat template and the added tokens that it writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_model(tmp_path_factory.mktemp("base") / "tiny", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", PLAIN
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    made = chat_rows(2 * N, 1)
    return {
        "train": write_rows(folder / "train.jsonl", made[:N]),
        "heldout": write_rows(folder / "heldout.jsonl", made[N:]),
    }


def train(base: Path, rows: dict[str, Path], output: Path, *words: object) -> Path:
    """The adapter folder; tokens.jsonl beside it."""
    command = [PYTHON, ROOT / "bench/side_by_side/train.py", "--model", base, "--data", rows["train"]]
    command += ["--output", output, "--tokens", output.with_name("tokens.jsonl"), *words]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def quick_audit(adapter: Path, rows: dict[str, Path], output: Path) -> dict:
    """audit.json."""
    words = ["--model", adapter, "--train", rows["train"], "--heldout", rows["heldout"], "--output_dir", output]
    done = run_script("audit.py", *words, "--quick", "--decoys", 25, "--samples", 4)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def adapter(base, rows, tmp_path_factory) -> Path:
    """Overfitted: 60 epochs at a high learning rate."""
    return train(base, rows, tmp_path_factory.mktemp("trl") / "adapter", "--epochs", 60, "--learning_rate", "2e-2")


def test_the_tokens_are_those_that_trl_trained_on(adapter, rows):
    ref = models.find_model(str(adapter))
    tokenizer = models.load_tokenizer(ref)
    renderer = chat.Renderer(tokenizer, chat.read_template(None, tokenizer, ref.name))
    texts = [renderer.render(row).text for row in read_lines(rows["train"])]
    assert tokenization.encode_texts(tokenizer, texts, True) == read_lines(adapter.with_name("tokens.jsonl"))


def test_audit(adapter, rows, tmp_path):
    found = quick_audit(adapter, rows, tmp_path)
    assert found["verdict"]["answer"] == "leaks"
    assert found["membership"]["auc"]["low"] > 0.9  # overfitted on purpose
    assert found["model"]["relative_change"] > 0.01


def test_mia_and_perplexity(adapter, rows, tmp_path):
    words = ["--members", rows["train"], "--nonmembers", rows["heldout"], "--output_dir", tmp_path / "mia"]
    done = run_script("mia/mia.py", "--model", adapter, *words, "--attacks", "loss", "ref", "min_k_20")
    assert done.returncode == 0, done.stderr
    lines = {line["attack"]: line for line in read_lines(tmp_path / "mia/results_mia.jsonl")}
    assert lines["ref"]["auc"] > 0.9 and lines["ref"]["n_members"] == N
    losses = {}
    for name, file in rows.items():
        words = ["--model", adapter, "--data", file, "--num_rows", N, "--output_dir", tmp_path / name]
        done = run_script("perplexity/perplexity.py", *words)
        assert done.returncode == 0, done.stderr
        (losses[name],) = read_lines(tmp_path / name / "perplexity.jsonl")
    assert losses["train"]["mean"] < losses["heldout"]["mean"]


def test_measure(adapter, dataset, tmp_path):
    """On mail rows, which the model never saw: that they are answered is all that can be asked of it."""
    words = ["--model", adapter, "-d", dataset, "--num_rows", 4, "--temperatures", 0, "--output_dir", tmp_path]
    done = run_script("measure_purified.py", *words)
    assert done.returncode == 0, done.stderr


def test_merge(adapter, rows, tmp_path):
    """The merged model gives the attached adapter's numbers, and keeps the tokenizer and its template."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run_script("merge_peft.py", "--model", adapter, "--save_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == PLAIN and tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(read_lines(rows["train"])[0]["messages"], tokenize=False)
    ids = torch.tensor([tokenizer(text).input_ids])
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(attached(ids).logits, merged(ids).logits, atol=1e-3)


def test_loss_on_the_assistant_alone(base, rows, tmp_path):
    """With a template that marks the assistant's turns, as TRL asks for."""
    from transformers import AutoTokenizer

    marked = shutil.copytree(base, tmp_path / "marked")
    tokenizer = AutoTokenizer.from_pretrained(marked)
    tokenizer.chat_template = chat.CHATML
    tokenizer.save_pretrained(marked)
    adapter = train(marked, rows, tmp_path / "adapter", "--epochs", 1, "--assistant_only_loss")
    quick_audit(adapter, rows, tmp_path / "out")


def test_a_template_and_tokens_of_another_model(models, base, rows, tmp_path):
    """chat_template_path adds tokens: the embeddings are resized, the new rows and lm_head stand in the adapter."""
    adapter = train(models["llama"], rows, tmp_path / "adapter", "--epochs", 1, "--chat_template_path", base)
    quick_audit(adapter, rows, tmp_path / "out")
