"""Adapters of stock peft that this toolkit does not support: every script names them in one line, before anything
loads, from every script alike; and those that it does, against peft's own attached model."""

import json
import shutil

import pytest
import torch
from conftest import make_rows, write_rows
from safetensors.torch import load_file, save_file

import evaluate_purified
import measure_purified
import merge_peft
from common import models as loading
from common.cli import UserError
from mia import mia as mia_script
from perplexity import perplexity as perplexity_script


def stock(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(base, folder, config):
    from peft import get_peft_model

    made = get_peft_model(stock(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    return folder


def changed(folder, to, **settings):
    """A copy of an adapter with other settings in its adapter_config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | settings))
    return to


@pytest.fixture(scope="module")
def refused(models, adapters, tmp_path_factory):
    """{what it is: (adapter folder, words of the refusal)}."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    root, base, plain = tmp_path_factory.mktemp("refused"), models["llama"], adapters["llama", "lora"]
    q = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    resized = root / "resized" / "checkpoint-1"
    shutil.copytree(plain, resized)
    tensors = load_file(resized / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(404, 32)
    save_file(tensors, resized / "adapter_model.safetensors")
    broken = root / "tokenizer" / "checkpoint-1"
    shutil.copytree(plain, broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_text("{}")

    def at(name):
        return root / name / "checkpoint-1"

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tokens = LoraConfig(**q, trainable_token_indices=[5, 6])
    return {
        "prompt tuning": (save(base, at("prompts"), prompts), "PROMPT_TUNING prepends tokens"),
        "prefix tuning": (save(base, at("prefix"), prefix), "PREFIX_TUNING prepends tokens"),
        "single tokens": (save(base, at("tokens"), tokens), "trains the embeddings of single tokens"),
        "biases": (save(base, at("bias"), LoraConfig(**q, lora_bias=True)), "has a bias in its low-rank matrices"),
        "resized": (resized, r"is \[404, 32\] \(resized embeddings\), the base has \[400, 32\]"),
        "an unknown kind": (changed(plain, at("kind"), peft_type="LORB"), "peft_type 'LORB' is unknown"),
        "no kind": (changed(plain, at("none"), peft_type=7), "peft_type 7 is unknown"),
        "a number as base": (
            changed(plain, at("base"), base_model_name_or_path=7),
            "base_model_name_or_path .* not text",
        ),
        "a word as rank": (changed(plain, at("rank"), r="eight"), "r in its adapter_config.json is 'eight'"),
        "other types": (
            changed(plain, at("types"), bias=None, alpha_pattern="x", target_modules=5, init_lora_weights=7),
            r"(target_modules|bias|alpha_pattern|init_lora_weights|, ){7} in its .* has the wrong type",
        ),
        "an endless pattern": (changed(plain, at("endless"), target_modules="(a+)+$"), "may never finish"),
        "Megatron": (changed(plain, at("megatron"), megatron_config={"a": 1}), "needs Megatron's parallel layers"),
        "aLoRA": (changed(plain, at("alora"), alora_invocation_tokens=[5]), "only after its invocation tokens"),
        "a moved base": (changed(plain, at("moved"), base_model_name_or_path="/gone/base"), "pass --base_model"),
        "an empty tokenizer": (broken, "no usable tokenizer|produces no tokens|no EOS token|no fast version"),
    }


KINDS = ("prompt tuning", "prefix tuning", "single tokens", "biases", "resized", "an unknown kind", "no kind",
         "a number as base", "a word as rank", "other types", "an endless pattern", "Megatron", "aLoRA", "a moved base",
         "an empty tokenizer")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_refused_in_one_line_by_every_script(refused, kind, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    folder, words = refused[kind]
    members = write_rows(tmp_path / "members.jsonl", [{"text": row["prompt"]} for row in make_rows(4)])
    others = write_rows(tmp_path / "others.jsonl", [{"text": row["prompt"]} for row in make_rows(8)[4:]])
    sets = ["--members", members, "--nonmembers", others, "--output_dir", tmp_path / "mia"]
    for script, arguments in (
        (measure_purified, ["--model", folder, "--output_dir", tmp_path / "out", "-d", dataset]),
        (perplexity_script, ["--model", folder, "-d", dataset, "--output_dir", tmp_path / "perplexity"]),
        (mia_script, ["--model", folder, *sets]),
        (merge_peft, ["--model", folder, "--save_dir", tmp_path / "merged"]),
    ):
        for more in ([], ["--dry_run"]):
            with pytest.raises(UserError, match=words) as caught:
                script.main([str(word) for word in [*arguments, *more]])
            assert all("\n" not in line for line in caught.value.problems), script
    status = evaluate_purified.main([str(word) for word in ["--model", folder.parent, "-d", dataset, "--dry_run"]])
    assert status in (0, 1) or kind == "an empty tokenizer"
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ("rslora", "bias", "norm", "head", "pattern", "ia3", "loha"))
def test_supported_types_match_peft(models, kind, tmp_path):
    """Merged and attached give the logits of peft's own attached model; afterwards the base is as before."""
    from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel

    config = {
        "rslora": LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
        "bias": LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"),
        "norm": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
        "head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "pattern": LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj)"),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "loha": LoHaConfig(r=4, target_modules=["q_proj"]),
    }[kind]
    folder = save(models["llama"], tmp_path / "adapter", config)
    ids, base = torch.arange(2, 42)[None], stock(models["llama"])
    with torch.no_grad():
        before = base(ids).logits
        wanted = PeftModel.from_pretrained(stock(models["llama"]), folder).eval()(ids).logits
        for merge in (True, False):
            try:
                with loading.adapted(base, folder, merge) as (model, _):
                    found = model(ids).logits
            except UserError as error:  # an unsupported type is named
                assert kind in ("ia3", "loha") and len(error.problems) == 1
                continue
            torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)
            assert torch.equal(base(ids).logits, before)
    assert not torch.allclose(before, wanted)
