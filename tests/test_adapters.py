"""Adapters of every kind, trained by stock peft: measured as peft's own attached model, merged where that is the same,
or refused in one line that says what they are, before anything loads, from every script alike."""

import contextlib
import json
import math
import shutil

import pytest
import torch
from adapter_kinds import KINDS, PROMPTS, table
from conftest import ROOT, make_rows, make_tokenizer, read_lines, write_rows
from safetensors.torch import load_file, save_file

import audit as audit_script
import evaluate_purified
import measure_purified
import merge_peft
from common import adapters as common_adapters
from common import continuations, engines, limits, sampling, scoring, shared_prefix, tokenization
from common import models as loading
from common.problems import UserError
from extraction.measure import check
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
    from peft import MultitaskPromptTuningConfig, PromptTuningConfig

    root, base, plain = tmp_path_factory.mktemp("refused"), models["llama"], adapters["llama", "lora"]
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

    prompts = save(base, at("prompts"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tasks = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2)
    return {
        "several tasks": (save(base, at("tasks"), tasks), "MULTITASK_PROMPT_TUNING needs the number of a task"),
        "prompts without a task": (changed(prompts, at("no-task"), task_type=None), "leave its virtual tokens out"),
        "prompts without a number": (changed(prompts, at("number"), num_virtual_tokens="4"), "'4', not a count"),
        "more prompts than context": (changed(prompts, at("many"), num_virtual_tokens=600), "no room in a context of"),
        "a classifier": (changed(plain, at("classifier"), task_type="SEQ_CLS"), "no adapter of a language model"),
        "resized by half": (resized, r"not all of them are in it \(lm_head.weight has 400 rows, .* has 404 rows"),
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


REFUSED = ("several tasks", "prompts without a task", "prompts without a number", "more prompts than context",
           "a classifier", "resized by half", "an unknown kind", "no kind", "a number as base", "a word as rank",
           "other types", "an endless pattern", "Megatron", "aLoRA", "a moved base", "an empty tokenizer")  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
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


IDS = list(range(2, 42))
POSITIONS = 512


def make_base(folder, tied=False):
    """A tiny Llama whose output head is tied to its embeddings, or not."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    vocabulary = len(make_tokenizer(folder))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 0}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """kind → (base, adapter), trained a few steps by a plain loop with stock peft, on first use."""
    import peft

    root, made = tmp_path_factory.mktemp("trained"), {}
    bases = {tied: make_base(root / f"base-{tied}", tied) for tied in (False, True)}

    def get(name):
        if name not in made:
            kind = KINDS[name]
            base = stock(bases[kind.tied])
            if kind.rows:
                base.resize_token_embeddings(kind.rows)
            torch.manual_seed(1)
            model = peft.get_peft_model(base, kind.adapter(peft)).train()
            learnt = [one for one in model.parameters() if one.requires_grad and one.is_floating_point()]
            with torch.no_grad():  # far from where it starts, which may be no change at all
                for parameter in learnt:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            optimizer = torch.optim.SGD(learnt, lr=0.5)
            batch = torch.randint(2, 390, (4, 20))
            for _ in range(2):
                model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.save_pretrained(root / name)
            made[name] = bases[kind.tied], root / name
        return made[name]

    return get


def peft_model(name, trained):
    """Peft's own attached model, on a fresh base."""
    from peft import PeftModel

    folder, adapter = trained(name)
    base = stock(folder)
    if KINDS[name].rows:
        base.resize_token_embeddings(KINDS[name].rows)
    return PeftModel.from_pretrained(base, adapter).eval()


def own_logits(model, ids):
    """Logits [T, V] at the text's own positions; virtual tokens of prompt and p-tuning stand before them."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]


def own_scores(model, ids):
    return own_logits(model, ids)[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_measured_as_peft_has_it(trained, name, tmp_path):
    """Scores, sampled tokens, the merged model; afterwards the base is bit for bit as before."""
    kind, (folder, adapter) = KINDS[name], trained(name)
    theirs, base = peft_model(name, trained), stock(folder)
    ids = [*IDS, 401, 405] if kind.rows else IDS
    wanted, before = own_logits(theirs, ids), own_logits(base, IDS)
    assert (wanted[: len(IDS)] - before if not kind.rows else torch.ones(1)).abs().max() > 0.05
    ref = loading.find_model(str(adapter), base_model=str(folder))
    virtual = PROMPTS if ref.virtual_tokens else 0
    assert loading.context_of(ref) == POSITIONS - virtual
    prompts = [ids[:20], ids[:9], [7, 8, *ids[3:12]]]
    greedy = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(given), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        greedy.append(theirs.generate(input_ids=given, **options)[0, len(prompt) :].tolist())
    with common_adapters.adapted(base, adapter) as (model, change):
        assert (change is not None) == (kind.measured == "merged")
        assert limits.context_length(model) == POSITIONS - virtual
        close(own_logits(model, ids), wanted)
        sequences = [ids, ids[:7], ids[5:30]]
        scores = scoring.join(sequences, [scoring.score(model, sequences)])
        for sequence, mine in zip(sequences, scores):
            torch.testing.assert_close(torch.tensor(mine), own_scores(theirs, sequence), atol=1e-4, rtol=0)
        stop = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        stop[0] = True
        settings = {"top_k": 5, "max_tokens": 6, "seed": 0, "stop": stop, "targets": [[[5, 9]]] * 3}
        answers = sampling.sweep(model, prompts, [(row, 0) for row in range(3)], [0.0], **settings)
        for prompt, tokens, answer in zip(prompts, greedy, answers):
            end = tokens.index(0) + 1 if 0 in tokens else len(tokens)
            assert answer.tokens[0] == tokens[:end]
            logp = own_scores(theirs, [*prompt, 5, 9])[-2:].mean().item()
            assert answer.truth_logprob == pytest.approx(logp, abs=1e-4)
        after = continuations.ContinuationScorer(model)(ids[:12], [ids[12:20], ids[30:33]])
        for tail, mine in zip((ids[12:20], ids[30:33]), after):
            logp = own_scores(theirs, [*ids[:12], *tail])[-len(tail) :]
            torch.testing.assert_close(torch.tensor(mine), logp, atol=1e-4, rtol=0)
    assert torch.equal(own_logits(base, IDS), before) and base.config.vocab_size == 400
    words = ["--model", adapter, "--base_model", folder, "--save_dir", tmp_path / "merged"]
    parsed = [
        merge_peft.make_parser().parse_args([str(word) for word in [*words, *dry]]) for dry in ([], ["--dry_run"])
    ]
    if kind.merges:
        merge_peft.run(parsed[1])
        close(own_logits(stock(merge_peft.run(parsed[0])), ids), wanted)
    else:
        for config in parsed:
            with pytest.raises(UserError, match="measure it attached") as caught:
                merge_peft.run(config)
            assert len(caught.value.problems) == 1
        assert not (tmp_path / "merged").exists()


def test_the_engine_with_one_batch_serves_virtual_tokens(trained):
    """Not the one for models with attention of their own, which decodes prompts of one length at a time."""
    folder, adapter = trained("prefix")
    prompts = [IDS[:20], IDS[:9]]
    with (
        common_adapters.adapted(stock(folder), adapter) as (model, _),
        torch.inference_mode(),
        contextlib.ExitStack() as stack,
    ):
        engine = engines.choose_engine(model, prompts, 30, stack)
        assert isinstance(engine, shared_prefix.SharedPrefix) and engine.before == PROMPTS + 8


def by_hand(model, ids, context):
    """Mean −log p of tokens 2 … n, in windows as perplexity's."""
    total = 0.0
    for begin, end, first in scoring.windows(len(ids), context, context // 2):
        total -= float(own_scores(model, ids[begin:end])[first - begin - 1 :].double().sum())
    return total / (len(ids) - 1)


@pytest.mark.parametrize("name", ("ia3", "prompt", "prefix", "new tokens"))
def test_perplexity_as_a_user_measures_it(trained, name, tmp_path):
    """Texts longer than the context, which virtual tokens make shorter; the base is found by --base_model."""
    folder, adapter = trained(name)
    moved = changed(adapter, tmp_path / "moved", base_model_name_or_path="/gone/base")
    rows = [row["prompt"] + row["continuation"] for row in make_rows(24, seed=3)]
    texts = [rows[0], *(" ".join(rows[start : start + 8]) for start in (0, 8, 16))]
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    words = ["--model", moved, "-d", data, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match=r"/gone/base: no such directory; pass --base_model"):
        perplexity_script.main([str(word) for word in words])
    assert perplexity_script.main([str(word) for word in [*words, "--base_model", folder]]) == 0
    line = read_lines(tmp_path / "out" / "perplexity.jsonl")[0]
    theirs, tokenizer = peft_model(name, trained), loading.load_tokenizer(loading.ModelRef("", str(folder), None, None))
    context = POSITIONS - (PROMPTS if name in ("prompt", "prefix") else 0)
    nll = [by_hand(theirs, [0, *tokenizer(text).input_ids], context) for text in texts]
    assert line["n_windowed"] > 0
    assert line["mean"] == pytest.approx(sum(map(math.exp, nll)) / 4, rel=1e-4)


@pytest.mark.parametrize("name", ("ia3", "prompt", "prefix"))
def test_membership_as_a_user_measures_it(trained, name, tmp_path):
    """The losses behind the scores, and the norm of the gradient over the adapter's own parameters."""
    folder, adapter = trained(name)
    rows = [{"text": row["prompt"][:60]} for row in make_rows(8)]
    members, others = write_rows(tmp_path / "in.jsonl", rows[:4]), write_rows(tmp_path / "out.jsonl", rows[4:])
    words = ["--model", adapter, "--base_model", folder, "--members", members, "--nonmembers", others]
    words += ["--output_dir", tmp_path / "mia", "--attacks", "loss", "ref", "grad_norm", "--bootstrap", 20]
    assert mia_script.main([str(word) for word in words]) == 0
    theirs, base = peft_model(name, trained), stock(folder)
    tokenizer = loading.load_tokenizer(loading.ModelRef("", str(folder), None, None))
    parameters = list(theirs.prompt_encoder.parameters()) if name != "ia3" else []
    parameters += [one for key, one in theirs.named_parameters() if "ia3_" in key]
    for row, line in zip(rows, read_lines(tmp_path / "mia" / "scores_mia.jsonl")):
        ids = tokenizer(row["text"]).input_ids
        mine, before = own_scores(theirs, ids).mean().item(), own_scores(base, ids).mean().item()
        assert line["loss"] == pytest.approx(mine, abs=1e-4)
        assert line["ref"] == pytest.approx(mine - before, abs=1e-4)
        for one in parameters:
            one.requires_grad_(True)
        logits = theirs(input_ids=torch.tensor([ids])).logits[0, -len(ids) : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
        norm = torch.stack([one.norm() for one in torch.autograd.grad(loss, parameters)]).norm().item()
        assert abs(line["grad_norm"]) == pytest.approx(norm, rel=1e-3)


def test_tokens_that_the_base_does_not_have(trained, tmp_path, capsys):
    """A text with one is scored under the adapter, and has no score against the base, which says why."""
    from transformers import AutoTokenizer

    folder, adapter = trained("resized")
    own = shutil.copytree(adapter, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(10)])
    tokenizer.save_pretrained(own)
    rows = [{"text": row["prompt"][:60]} for row in make_rows(8)]
    rows[1]["text"] = "<new3> " + rows[1]["text"]
    members, others = write_rows(tmp_path / "in.jsonl", rows[:4]), write_rows(tmp_path / "out.jsonl", rows[4:])
    words = ["--model", own, "--base_model", folder, "--members", members, "--nonmembers", others]
    words += ["--output_dir", tmp_path / "mia", "--attacks", "loss", "ref", "--bootstrap", 20]
    assert mia_script.main([str(word) for word in words]) == 0
    lines = read_lines(tmp_path / "mia" / "scores_mia.jsonl")
    assert [line["ref"] is None for line in lines] == [place == 1 for place in range(8)]
    assert all(line["loss"] is not None for line in lines)
    against = {line["attack"]: line for line in read_lines(tmp_path / "mia" / "results_mia.jsonl")}
    assert against["ref"]["dropped"] == {"has a token that the adapter brought and its base does not have": 1}
    words = ["--model", own, "--base_model", folder, "--train", members, "--heldout", others]
    words += ["--output_dir", tmp_path / "audit", "--quick", "--without", "extraction", "verbatim", "untargeted"]
    assert audit_script.main([str(word) for word in words]) == 0
    assert "rows have tokens that the adapter brought" in capsys.readouterr().out
    audit = json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert audit["membership"]["attack"] == "min_k_pp_20" and audit["model"]["reference"] is None


def test_extraction_as_a_user_measures_it(trained, tmp_path):
    """measure_purified at temperature 0 behind a prefix: the words of peft's generate."""
    folder, adapter = trained("prefix")
    data = write_rows(tmp_path / "rows.jsonl", make_rows(12))
    words = ["--model", adapter, "--base_model", folder, "--output_dir", tmp_path / "out", "-d", data, "--num_rows", 2]
    words += ["--temperatures", 0, "--max_tokens", 6, "--save_responses"]
    words = [str(word) for word in words]
    assert measure_purified.main(words) == 0
    theirs = peft_model("prefix", trained)
    tokenizer = loading.load_tokenizer(loading.ModelRef("", str(folder), None, None))
    task = check(measure_purified.make_parser().parse_args(words)).task
    lines = read_lines(tmp_path / "out" / "results_purified_rows.jsonl")
    assert len(lines) == 8  # 2 rows × 4 templates
    for line in lines:
        prompt, _ = task.asked[line["row"]]["ABCD".index(line["template"])]
        ids = torch.tensor([tokenization.encode_prompt(tokenizer, prompt)])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found = theirs.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()
        assert line["response"] == tokenizer.decode(found, skip_special_tokens=True)


def test_where_virtual_tokens_are_not_peft_s_the_model_is_refused(tmp_path):
    """A state-space layer does not start from a cache as from its tokens: one line."""
    from families import make_family
    from peft import PromptTuningConfig

    (tmp_path / "base").mkdir()
    base = make_family(tmp_path / "base", "qwen3-next (hybrid)")
    adapter = save(base, tmp_path / "adapter", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="cannot be put before a text of Qwen3NextForCausalLM") as caught:
        with common_adapters.adapted(stock(base), adapter):
            pass
    assert len(caught.value.problems) == 1


def test_the_table_in_the_documentation_is_the_one_tested():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in text
