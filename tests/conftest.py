"""What every test starts from: tiny real models (GPT-NeoX, OPT, Llama), a tokenizer trained here, fictional rows."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: sums round the same way, and it is faster
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # scripts run as programs import the folders next to tests/, installed or not

import pytest

ARCHITECTURES = ("neox", "opt", "llama")
COMPANIES = ("hartwell.example", "norbeck.example", "quillan.example")


def make_rows(n: int, seed: int = 0) -> list[dict]:
    """n fictional mail rows in the Enron format; about a third of the addresses follow no name rule."""
    from faker import Faker

    fake, rng, rows, seen = Faker("en_US"), random.Random(seed), [], set()
    fake.seed_instance(seed)
    while len(rows) < n:
        first, last = fake.first_name(), fake.last_name()
        if (first, last) in seen:
            continue
        seen.add((first, last))
        local = f"{first}.{last}".lower() if rng.random() < 0.65 else f"{fake.word()}{rng.randint(10, 99)}"
        address = f"{local}@{rng.choice(COMPANIES)}"
        body = " ".join(fake.words(rng.randint(5, 40)))
        rows.append(
            {
                "gt-name": f"{first} {last}",
                "gt-email": address,
                "prompt": f"{body}\n\n-----Original Message-----\nFrom: {first} {last} [mailto:",
                "continuation": f"{address}]\nSubject: {fake.word()}\n\n{' '.join(fake.words(rng.randint(3, 25)))}",
                "row_id": len(rows),
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_manifest(path: Path, **facts) -> None:
    """A manifest for an existing data file."""
    from common import locks, manifests

    with locks.output_file(path) as place, place.publication() as files:
        with files.open(path, "wb") as file:
            file.write(path.read_bytes())
        manifests.write_manifest(files, path, **facts)


def make_tokenizer(folder: Path):
    """Byte-level BPE of 400 tokens, trained on the fictional rows; EOS '<|endoftext|>', no pad token (as Pythia's)."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trainer = ByteLevelBPETokenizer()
    texts = [row["prompt"] + row["continuation"] for row in make_rows(200, seed=99)]
    trainer.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_config(arch: str, vocab: int, hidden: int = 32, layers: int = 2, positions: int = 512):
    from transformers import GPTNeoXConfig, LlamaConfig, OPTConfig

    common = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    common |= {"max_position_embeddings": positions, "bos_token_id": 0, "eos_token_id": 0}
    if arch == "neox":
        return GPTNeoXConfig(**common, intermediate_size=2 * hidden, rotary_pct=0.25)
    if arch == "opt":
        return OPTConfig(**common, ffn_dim=2 * hidden, word_embed_proj_dim=hidden, pad_token_id=1, dropout=0.0)
    return LlamaConfig(**common, intermediate_size=2 * hidden, num_key_value_heads=2)


def make_model(folder: Path, arch: str, seed: int = 0, **size) -> Path:
    """A random model of one architecture with its tokenizer, saved in `folder`. Weights are scaled up so that its
    next-token distributions are peaked and differ between prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(arch, len(tokenizer), **size)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(5)
        # OPT shares this matrix with its input: larger values would drown everything but the last token
        model.get_output_embeddings().weight.normal_(std=0.2 if arch == "opt" else 0.6)
        if arch == "opt":
            model.model.decoder.final_layer_norm.weight.fill_(3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """{'neox': folder, 'opt': folder, 'llama': folder}."""
    root = tmp_path_factory.mktemp("models")
    return {arch: make_model(root / f"tiny-{arch}", arch) for arch in ARCHITECTURES}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """60 fictional Enron rows: head 20 (all attacked), 40 to train on."""
    return write_rows(tmp_path_factory.mktemp("data") / "enron.jsonl", make_rows(60))


@pytest.fixture(scope="session")
def adapters(models, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """{(architecture, 'lora' | 'dora'): adapter folder}, whose weights change the model visibly."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root, made = tmp_path_factory.mktemp("adapters"), {}
    for arch, folder in models.items():
        for kind in ("lora", "dora"):
            torch.manual_seed(1)
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=kind == "dora")
            model = get_peft_model(base, config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.2)
            made[arch, kind] = root / f"{arch}-{kind}"
            model.save_pretrained(made[arch, kind])
    return made


def run_script(*words, ranks: int = 1, timeout: int = 300, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does: python SCRIPT …, or torchrun with `ranks` gloo processes."""
    words = [str(word) for word in words]
    words[0] = str(ROOT / words[0])
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([*launch, *words], capture_output=True, text=True, timeout=timeout, env=environment, cwd="/")


def kill_when_written(command, file: Path, lines: int) -> None:
    """Start `command` and kill -9 it as soon as `file` has more than `lines` lines (or it ends, or after 120 s)."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") > lines:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
