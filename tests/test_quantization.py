"""--quantization: what it is used with, and, where bitsandbytes is installed, its numbers against transformers' own."""

import importlib
import importlib.util
import json

import pytest
import torch
from conftest import make_model, make_rows, read_lines, run_script, write_rows

import measure_purified
import merge_peft
import run_peft
from common import adapters as common_adapters
from common import models as loading
from common import quantization
from common.problems import UserError
from mia import mia as mia_script
from perplexity import perplexity as perplexity_script

HAS = importlib.util.find_spec("bitsandbytes") is not None
needs = pytest.mark.skipif(not HAS, reason="bitsandbytes is not installed (the extra `quantization`)")
NOT_INSTALLED = r"^--quantization nf4: bitsandbytes is not installed; pip install"
IDS = torch.arange(2, 42)[None]


def words_of(*words):
    return [str(word) for word in words]


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.skipif(HAS, reason="bitsandbytes is installed")
def test_without_bitsandbytes_one_line(models, dataset, adapters, tmp_path, nothing_loads):
    base, adapter = models["llama"], adapters["llama", "lora"]
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["prompt"]} for row in make_rows(8)])
    for script, words in (
        (run_peft, ["-m", base, "-i", dataset, "--output_root", tmp_path]),
        (measure_purified, ["--model", adapter, "--output_dir", tmp_path / "out", "-d", dataset]),
        (mia_script, ["--model", adapter, "--members", dataset, "--output_dir", tmp_path / "mia"]),
        (perplexity_script, ["--model", base, "-d", texts, "--output_dir", tmp_path / "perplexity"]),
        (merge_peft, ["--model", adapter, "--save_dir", tmp_path / "merged"]),
    ):
        for dry in ([], ["--dry_run"]):
            with pytest.raises(UserError, match=NOT_INSTALLED) as why:
                script.main(words_of(*words, "--quantization", "nf4", *dry))
            assert len(why.value.problems) == 1, script
    done = run_script("audit.py", "--model", adapter, "--train", texts, "--quantization", "int8", "--dry_run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install bitsandbytes" in done.stderr


def quantised_copy(folder, to, **settings):
    """A model whose config.json says that its weights are quantised."""
    import shutil

    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return to


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "dataset": None},
            "quantised .gptq. and cannot",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "quantised .awq. and cannot be loaded"),
        ({"quant_method": "new"}, "quantised .new. and cannot be loaded here: Unknown quantization type"),
    ],
)
def test_a_quantised_base_that_cannot_be_loaded_is_refused(models, dataset, tmp_path, settings, words, nothing_loads):
    base = quantised_copy(models["llama"], tmp_path / "base", **settings)
    given = ["--model", base, "--output_dir", tmp_path / "out", "-d", dataset]
    for more in ([], ["--dry_run"]):
        with pytest.raises(UserError, match=words) as why:
            measure_purified.main(words_of(*given, *more))
        assert len(why.value.problems) == 1 and "\n" not in why.value.problems[0]


def test_what_cannot_be_trained_on_a_quantised_base(monkeypatch, models, dataset, tmp_path, nothing_loads):
    monkeypatch.setattr(quantization, "check", lambda *_: None)  # as if bitsandbytes were installed
    start = ["-m", models["llama"], "-i", dataset, "--output_root", tmp_path, "--dry_run", "--quantization"]
    for more, words in (
        (["nf4", "-pt", "full"], "--peft_type full: quantised weights"),
        (["nf4", "-pt", "pissa"], "--peft_type pissa: changes the base's weights"),
        (["int8", "-pt", "dora"], "--peft_type dora: not behind int8 layers"),
        (["nf4", "--distribution_type", "fsdp"], "--distribution_type fsdp: cannot shard"),
        (["nf4", "--dp", "--target_epsilon", 8], "--dp: has no per-example gradients behind quantised layers"),
    ):
        with pytest.raises(UserError, match=words):
            run_peft.main(words_of(*start, *more))
    gptq = quantised_copy(models["llama"], tmp_path / "gptq", quant_method="gptq", bits=4)
    with pytest.raises(UserError, match=r"is quantised \(gptq\), which is not trained on"):
        run_peft.main(words_of("-m", gptq, "-i", dataset, "--output_root", tmp_path, "--dry_run"))


@pytest.mark.parametrize("dry", ([], ["--dry_run"]))
def test_a_quantised_base_is_not_spread_over_ranks(
    monkeypatch, models, adapters, dataset, tmp_path, nothing_loads, dry
):
    """Every script that has both flags says so before anything is loaded."""
    monkeypatch.setattr(quantization, "check", lambda *_: None)  # as if bitsandbytes were installed
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    base, adapter = models["llama"], adapters["llama", "lora"]
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["prompt"]} for row in make_rows(8)])
    out, key = tmp_path / "out", tmp_path / "key.jsonl"
    for name, words in (
        ("audit", ["--model", adapter, "--train", texts, "--output_dir", out]),
        ("measure_purified", ["--model", adapter, "--output_dir", out, "-d", dataset]),
        ("evaluate_purified", ["--model", adapter, "-d", dataset]),
        ("mia.mia", ["--model", adapter, "--members", dataset, "--output_dir", out]),
        ("perplexity.perplexity", ["--model", base, "-d", texts, "--output_dir", out]),
        ("canary.measure", ["--canaries", key, "--models", f"a={adapter}", "--output_dir", out]),
    ):
        main = importlib.import_module(name).main
        with pytest.raises(UserError) as why:
            main(words_of(*words, "--quantization", "nf4", "--model_parallel", 2, *dry))
        told = [line for line in why.value.problems if line.startswith("--quantization")]
        assert told == [
            "--quantization nf4: the layers of a quantised model cannot be spread; drop --model_parallel"
        ], name
        assert not out.exists()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama of 64 dimensions: a block of nf4 has 64 weights."""
    return make_model(tmp_path_factory.mktemp("wide") / "llama", "llama", hidden=64)


@needs
@pytest.mark.parametrize("kind", ("nf4", "int8"))
def test_trained_measured_and_merged(wide, dataset, tmp_path, kind, capsys):
    """run_peft's adapter, attached as transformers and peft attach it, and merged into the dequantised weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    words = ["-m", wide, "-i", dataset, "--output_root", tmp_path, "-lr", "1e-2", "-e", 1, "--lora_r", 4, "-pdbs", 4]
    assert run_peft.main(words_of(*words, "-gas", 2, "--quantization", kind)) == 0
    adapter = next(tmp_path.rglob("checkpoint-5"))
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    own = BitsAndBytesConfig(load_in_4bit=True, **four) if kind == "nf4" else BitsAndBytesConfig(load_in_8bit=True)

    def stock():
        options = {"dtype": torch.float32, "quantization_config": own, "device_map": {"": "cpu"}}
        return AutoModelForCausalLM.from_pretrained(wide, **options).eval()

    ref = loading.find_model(str(adapter), quantized=kind)
    with torch.no_grad():
        before, wanted = stock()(IDS).logits, PeftModel.from_pretrained(stock(), adapter).eval()(IDS).logits
        base = loading.load_base(ref, torch.float32, "cpu")
        with common_adapters.adapted(base, adapter) as (model, change):
            assert change is None and torch.equal(model(IDS).logits, wanted)
        assert torch.equal(base(IDS).logits, before) and (wanted - before).abs().max() > 0.1
    capsys.readouterr()
    words = ["--model", adapter, "--save_dir", tmp_path / "merged", "--quantization", kind, "--dtype", "bfloat16"]
    assert merge_peft.main(words_of(*words)) == 0
    assert f"dequantised to float32: 14 quantised matrices (bitsandbytes {kind})" in capsys.readouterr().out
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    record = json.loads((tmp_path / "merged" / "run_merge_peft.json").read_text())
    trained = json.loads((adapter.parent / "run.json").read_text())
    assert record["relative_change"] == pytest.approx(trained["relative_change"], rel=1e-3)
    words[3:] = [tmp_path / "exact", "--quantization", kind]
    assert merge_peft.main(words_of(*words)) == 0
    with torch.no_grad():
        plain = stock().dequantize().float()
        wanted = PeftModel.from_pretrained(plain, adapter).eval()(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


@needs
def test_a_base_that_is_quantised_already(wide, tmp_path):
    """Loaded as it is; --quantization on top is refused; results say what the base was loaded in."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from common.distributed import World

    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    made = AutoModelForCausalLM.from_pretrained(wide, quantization_config=own, device_map={"": "cpu"})
    made.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((wide / name).read_bytes())
    ref = loading.find_model(str(tmp_path / "packed"))
    base = loading.load_base(ref, torch.float32, World().device)
    assert quantization.is_quantised(base) and quantization.method(base.config) == "bitsandbytes nf4"
    with pytest.raises(UserError, match=r"is quantised already \(bitsandbytes nf4\); drop --quantization int8"):
        loading.find_model(str(tmp_path / "packed"), quantized="int8")
    data = write_rows(tmp_path / "texts.jsonl", [{"text": row["prompt"]} for row in make_rows(4)])
    words = ["--model", wide, "-d", data, "--output_dir", tmp_path / "out"]
    assert perplexity_script.main(words_of(*words, "--quantization", "nf4")) == 0
    assert perplexity_script.main(words_of(*words)) == 0  # another precision is another result
    lines = read_lines(tmp_path / "out" / "perplexity.jsonl")
    assert {line["dtype"] for line in lines} == {"float32", "float32, base in nf4"}
