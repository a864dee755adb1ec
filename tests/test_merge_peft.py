"""merge_peft.py: merged = attached for every peft type and architecture; what it refuses and what it leaves."""

import json
import shutil

import pytest
from conftest import ARCHITECTURES, read_lines, run_script, write_rows

import merge_peft
import run_peft
from common.problems import UserError
from training.run import run as fine_tune

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def trained(models, dataset, tmp_path_factory):
    """{(architecture, peft type, learning rate): checkpoint} made by run_peft.py, on first use."""
    root, made = tmp_path_factory.mktemp("trained"), {}

    def get(arch, kind, rate="1e-2"):
        if (arch, kind, rate) not in made:
            words = ["-m", models[arch], "-i", dataset, "--output_root", root, "-pt", kind, "-lr", rate, "-e", 1]
            words += ["--lora_r", 4, "-pdbs", 4, "-gas", 2]
            folder = fine_tune(run_peft.make_parser().parse_args([str(word) for word in words]))
            made[arch, kind, rate] = folder / "checkpoint-5"
        return made[arch, kind, rate]

    return get


def merge(model, target, *flags):
    words = ["--model", model, "--save_dir", target, *flags]
    return merge_peft.run(merge_peft.make_parser().parse_args([str(word) for word in words]))


def logits(folder, adapter=None):
    """(4, 12, vocabulary) float32 logits of a model directory, an adapter attached or not."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    tokens = torch.randint(5, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ("lora", "dora", "pissa"))
def test_merged_is_attached(kind, arch, trained, models, tmp_path, capsys):
    """After training and after zero steps (lr 0): the merged model against stock PEFT, and against the base."""
    import torch

    merged = merge(trained(arch, kind), tmp_path / "merged")
    attached, base = logits(models[arch], trained(arch, kind)), logits(models[arch])
    torch.testing.assert_close(logits(merged), attached, atol=1e-4, rtol=0)  # logits of size 10, float32
    assert (attached - base).abs().max() > 0.1
    assert {path.name for path in merged.iterdir()} == FILES | {"run_merge_peft.json"}
    record = json.loads((merged / "run_merge_peft.json").read_text())
    assert record["status"] == "ok" and record["base"] == str(models[arch])
    assert f"‖ΔW‖/‖W‖ {record['relative_change']:.4g}" in capsys.readouterr().out

    still = merge(trained(arch, kind, "0"), tmp_path / "still")
    # LoRA adds 0; DoRA's magnitude / norm and PiSSA's W + BA − BA round
    torch.testing.assert_close(logits(still), base, atol=0 if kind == "lora" else 1e-4, rtol=0)


def test_relative_change_is_that_of_the_weights(trained, models, tmp_path):
    """‖W′ − W‖ / ‖W‖ worked out from the two models' files, over the matrices that differ."""
    from safetensors.torch import load_file

    merged = merge(trained("llama", "lora"), tmp_path / "merged")
    before, after = load_file(models["llama"] / "model.safetensors"), load_file(merged / "model.safetensors")
    names = [name for name in before if "proj" in name]
    change = sum((after[name] - before[name]).double().square().sum() for name in names)
    total = sum(before[name].double().square().sum() for name in names)
    recorded = json.loads((merged / "run_merge_peft.json").read_text())["relative_change"]
    assert recorded == pytest.approx(float((change / total).sqrt()), rel=1e-6)
    assert all((after[name] == before[name]).all() for name in before if name not in names)
    # the same number that run_peft.py recorded at the end of training
    assert recorded == pytest.approx(
        json.loads((trained("llama", "lora").parent / "run.json").read_text())["relative_change"], rel=1e-4
    )


def test_half_precision_is_warned_about(trained, tmp_path, capsys):
    """bfloat16 keeps 8 bits: rounding moves a weight by about 0.1–0.2 %, far more than an update at lr 2e-6."""
    import torch
    from safetensors.torch import load_file

    merged = merge(trained("neox", "lora", "2e-6"), tmp_path / "merged", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(merged / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    record = json.loads((merged / "run_merge_peft.json").read_text())
    assert record["rounding"] > 1
    assert f"rounded by {record['rounding']:.2g} times the update" in capsys.readouterr().err


def test_rounding_by_hand():
    """W′ = 1.004 in bfloat16 is 1.0 (spacing 2⁻⁷): an update of 0.004 is lost whole, so the ratio is 1."""
    import torch

    layer = torch.nn.Sequential(torch.nn.Linear(1, 1))
    layer[0].weight.data.fill_(1.0035)
    assert pytest.approx(0.0035) == 0.0035 / 1.0
    assert merge_peft.rounding(layer, ["0"], torch.bfloat16, 0.0035 / 1.0035) == pytest.approx(1.0, rel=1e-3)
    assert merge_peft.rounding(layer, ["0"], torch.bfloat16, 0.0) is None


def test_base_that_does_not_fit(trained, models, tmp_path):
    """Exit 2: by the weights that run.json names, else naming the first tensor; nothing is left in --save_dir."""
    from conftest import make_model

    with pytest.raises(UserError, match=r"--base_model .*: not the weights that .* was trained on"):
        merge(trained("neox", "lora"), tmp_path / "merged", "--base_model", models["llama"])
    alone = shutil.copytree(trained("neox", "lora"), tmp_path / "alone")  # without its run.json
    with pytest.raises(UserError, match=r"does not fit this base model: it has no module for base_model\.model\."):
        merge(alone, tmp_path / "merged", "--base_model", models["llama"])
    wide = make_model(tmp_path / "wide", "neox", hidden=64)
    with pytest.raises(UserError, match=r"lora_A\.weight is \[4, 32\], the base needs \[4, 64\]"):
        merge(alone, tmp_path / "merged", "--base_model", wide)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "wide"]


def test_save_dir(trained, models, tmp_path, capsys):
    """An earlier merge is replaced, anything else is not touched; --dry_run writes nothing."""
    merge(trained("neox", "lora"), tmp_path / "merged", "--dry_run")
    assert "save to" in capsys.readouterr().out and not (tmp_path / "merged").exists()
    merge(trained("neox", "lora"), tmp_path / "merged")
    first = (tmp_path / "merged" / "model.safetensors").read_bytes()
    merge(trained("neox", "dora"), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() != first
    other = write_rows(tmp_path / "thesis.jsonl", [{"text": "mine"}])
    with pytest.raises(UserError, match="contains something other than an earlier merge"):
        merge(trained("neox", "lora"), tmp_path)
    assert read_lines(other) == [{"text": "mine"}]
    with pytest.raises(UserError) as error:
        merge(models["neox"], tmp_path)
    assert len(error.value.problems) == 2 and "it is already a full model" in error.value.problems[1]


def test_base_guessed_from_the_path(trained, tmp_path, monkeypatch):
    """An adapter whose config names no base: --is_opt and the path give a hub name (asked for, not here: exit 2)."""
    import shutil

    for name, flags, wanted in (
        ("pythia-1.4b", [], "EleutherAI/pythia-1.4b"),
        ("opt-1.3b", ["--is_opt"], "facebook/opt-1.3b"),
    ):
        folder = tmp_path / name / "checkpoint-5"
        shutil.copytree(trained("neox", "lora"), folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
        with pytest.raises(UserError, match=f"base model {wanted}: not found locally or on the hub"):
            merge(folder, tmp_path / "merged", *flags)


def test_as_a_user_runs_it(trained, tmp_path):
    done = run_script("merge_peft.py", "--model", trained("opt", "pissa"), "--save_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "‖ΔW‖/‖W‖" in done.stdout
    done = run_script("merge_peft.py", "--model", tmp_path / "none", "--save_dir", tmp_path / "x", "--dtype", "int8")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--dtype" in done.stderr
