"""All scripts on many decoder families: the numbers of transformers and peft, or a one-line refusal.

For tiny random models of every family in families.py: the sweep at temperature 0 is `generate`, a score is the
log-softmax of the model's own logits, perplexity is a loop by hand, a merged adapter is the attached one, and the
first loss of a training run is that of the rows it says it trained on; one step, plain or private, is that by hand.
"""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, make_rows, read_lines, write_rows
from families import DYNAMIC, FAMILIES, REFUSED, SOME_LAYERS, SWEEP, WINDOW, make_family, table

import run_peft
from common import adapters as common_adapters
from common import models, sampling, scoring
from common.problems import UserError
from perplexity import perplexity as perplexity_script

NAMES = list(FAMILIES)
LENGTHS = {"within the window": (5, 9, 14), "over its edge": (17, 20, 22), "far beyond it": (60, 100, 130)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """name → (folder, model in float32, tokenizer), made on first use."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(name):
        if name not in made:
            folder = root / f"family-{len(made)}"
            folder.mkdir()
            make_family(folder, name)
            ref = models.find_model(str(folder))
            made[name] = folder, models.load_base(ref, torch.float32, "cpu"), models.load_tokenizer(ref)
        return made[name]

    return get


def greedy(model, prompt, steps, stop) -> list[int]:
    """`generate` on one prompt, cut after the first stop token."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, pad_token_id=0
        )
    found = out[0, len(prompt) :].tolist()
    ends = [place for place, token in enumerate(found) if stop[token]]
    return found[: ends[0] + 1] if ends else found


def own_scores(model, tokens) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].numpy()


@pytest.mark.parametrize("name", NAMES)
def test_sweep_at_temperature_0_is_generate(loaded, name):
    """With a shared beginning and without, prompts of unequal length, shorter and longer than any window."""
    _, model, _ = loaded(name)
    if name == "recurrent-gemma":
        stop = torch.zeros(400, dtype=torch.bool)
        with pytest.raises(UserError, match=REFUSED[name, SWEEP]):
            sampling.sweep(model, [[5, 6, 7]], [(0, 0)], [0.0], top_k=5, max_tokens=2, seed=0, stop=stop)
        return
    rng = np.random.default_rng(len(name))
    stop = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
    stop[0] = True
    for lengths in LENGTHS.values():
        for shared in (0, 6):
            beginning = rng.integers(2, 390, shared).tolist()
            prompts = [beginning + rng.integers(2, 390, n).tolist() for n in lengths]
            targets = [rng.integers(2, 390, 3).tolist() for _ in lengths]
            keys = [(row, 0) for row in range(len(prompts))]
            options = {
                "top_k": 20,
                "max_tokens": 8,
                "seed": 0,
                "stop": stop,
                "targets": [[target] for target in targets],
            }
            if name == DYNAMIC and max(lengths) > 64:
                with pytest.raises(UserError, match=REFUSED[name, SWEEP]):
                    sampling.sweep(model, prompts, keys, [0.0, 1.0], **options)
                continue
            answers = sampling.sweep(model, prompts, keys, [0.0, 1.0], **options)
            for prompt, target, answer in zip(prompts, targets, answers):
                assert answer.tokens[0] == greedy(model, prompt, 8, stop), (lengths, shared)
                mean = own_scores(model, prompt + target)[len(prompt) - 1 :].mean()
                assert answer.truth_logprob == pytest.approx(mean, abs=1e-4)
            alone = sampling.sweep(model, prompts[1:2], keys[1:2], [0.0, 1.0], **options | {"targets": [targets[1:2]]})
            assert alone[0].tokens == answers[1].tokens  # whatever else is in the batch


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_model_s_own(loaded, name):
    """Batches of unequal length, of which some cross a window or the limit of a rotary embedding."""
    _, model, _ = loaded(name)
    rng, longest = np.random.default_rng(1), 60 if name == DYNAMIC else 150
    sequences = [rng.integers(2, 390, n).tolist() for n in (2, 5, WINDOW, 47, 49, 50, longest)]
    found = scoring.join(sequences, [scoring.score(model, sequences, token_budget=1000)])
    for tokens, mine in zip(sequences, found):
        np.testing.assert_allclose(mine, own_scores(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_a_loop_by_hand(loaded, name, tmp_path):
    folder, model, tokenizer = loaded(name)
    texts = [row["prompt"] + row["continuation"] for row in make_rows(6, seed=3)]
    texts = [text[:60] if name == DYNAMIC else text for text in texts]
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    words = ["--model", folder, "-d", data, "--output_dir", tmp_path / "out"]
    assert perplexity_script.main([str(word) for word in words]) == 0
    line = read_lines(tmp_path / "out" / "perplexity.jsonl")[0]
    nll = [-own_scores(model, [tokenizer.bos_token_id, *tokenizer(text).input_ids]).mean() for text in texts]
    assert line["n_windowed"] == 0
    assert line["mean"] == pytest.approx(np.mean([math.exp(one) for one in nll]), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_adapter_is_the_attached_one(loaded, name, tmp_path):
    """LoRA on every linear layer, untrained but far from zero, made by stock peft."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, model, _ = loaded(name)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    made = get_peft_model(stock, LoraConfig(r=4, lora_alpha=8, target_modules=SOME_LAYERS.get(name, "all-linear")))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([np.random.default_rng(2).integers(2, 390, 40).tolist()])
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        wanted = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()(ids, use_cache=False).logits
        for merge in (True, False):
            with common_adapters.adapted(model, tmp_path / "adapter", merge=merge) as (adapted, _):
                found = adapted(ids, use_cache=False).logits
            torch.testing.assert_close(found, wanted, atol=1e-3 * wanted.abs().max().item(), rtol=0)
        assert (wanted - before).abs().max() > 1e-3
        assert torch.equal(model(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("name", NAMES)
def test_trained_rows_are_what_the_loss_saw(loaded, name, tmp_path, capsys):
    """Two steps at rate 0: the logged loss is the mean over the tokens that trained_rows.jsonl says were kept."""
    folder, model, tokenizer = loaded(name)
    texts = [row["prompt"] + row["continuation"] for row in make_rows(8, seed=5)]
    texts = [text[:60] if name == DYNAMIC else text for text in texts]
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    words = ["-m", folder, "-i", data, "--output_root", tmp_path, "--lora_r", 2, "-e", 1, "-pdbs", 4, "-gas", 2]
    words += ["--max_length", 48, "--lora_dropout", 0, "-lr", 1e-9, "-opt", "sgd"]
    words = [str(word) for word in words]
    if name in SOME_LAYERS:
        with pytest.raises(UserError, match=r"--target_modules.*(list the layers|choose others): --target_modules"):
            run_peft.main(words)
        words += ["--target_modules", *SOME_LAYERS[name]]
    with contextlib.suppress(RuntimeError):  # at such a rate the weights may not change, which is an error
        assert run_peft.main(words) == 0
    run = next(tmp_path.rglob("metrics.jsonl")).parent
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    _, *rows = read_lines(run / "trained_rows.jsonl")
    assert len(rows) == 8 and len(losses) == 1
    total = count = 0
    for row in rows:
        ids = [*tokenizer(texts[row["row"]]).input_ids, tokenizer.eos_token_id][: row["tokens"]]
        scores = own_scores(model, ids)
        total -= scores.sum()
        count += len(scores)
        assert row["loss_tokens"] == len(scores)
    assert losses[0] == pytest.approx(total / count, abs=2e-4)
    assert json.loads((run / "run.json").read_text())["trained"]["loss_tokens"] == count


def by_hand(folder, checkpoint, rows, tokenizer, texts, rate: float, bound: float, private: bool):
    """(lora_B that one SGD step from zero must give, by name; stock peft's model with the checkpoint's own weights).

    The trained A are the initial ones, since their first gradient is zero. Plain: the mean loss over all tokens, its
    gradient cut to `bound`. Private: each row's mean loss, its gradient cut to `bound`, summed, over their number.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(stock, checkpoint, is_trainable=True).eval()
    weights = {name: item for name, item in tuned.named_parameters() if "lora_" in name}
    trained = {name: item.detach().clone() for name, item in weights.items()}
    for name, item in weights.items():
        if "lora_B" in name:
            item.data.zero_()

    def losses(row) -> torch.Tensor:
        ids = torch.tensor([*tokenizer(texts[row["row"]]).input_ids, tokenizer.eos_token_id][: row["tokens"]])
        logits = tuned(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")

    names = [name for name in weights if "lora_B" in name]
    per_row = [losses(row) for row in rows]
    wholes = [loss.mean() for loss in per_row] if private else [torch.cat(per_row).mean()]
    total = [torch.zeros_like(weights[name]) for name in names]
    for whole in wholes:
        own = torch.autograd.grad(whole, [weights[name] for name in names], retain_graph=True, allow_unused=True)
        own = [torch.zeros_like(weights[name]) if one is None else one for name, one in zip(names, own)]
        norm = torch.stack([one.square().sum() for one in own]).sum().sqrt()
        for one, add in zip(total, own):
            one += add * min(1.0, bound / float(norm)) / len(wholes)
    expected = {name: -rate * one for name, one in zip(names, total)}
    with torch.no_grad():
        for name, item in weights.items():
            item.copy_(trained[name])
    return expected, trained, tuned


@pytest.mark.parametrize("private", [False, True], ids=["plain", "dp"])
@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_that_by_hand_and_reloads(loaded, name, private, tmp_path, capsys):
    """SGD from run_peft.py: lora_B is −rate × the clipped gradient through stock peft, and every loader agrees."""
    folder, model, tokenizer = loaded(name)
    texts = [row["prompt"] + row["continuation"] for row in make_rows(8, seed=5)]
    texts = [text[:60] if name == DYNAMIC else text for text in texts]
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    rate, bound = 0.5, 0.05
    words = ["-m", folder, "-i", data, "--output_root", tmp_path, "--lora_r", 2, "-e", 1, "-pdbs", 4]
    words += ["--max_length", 48, "--lora_dropout", 0, "-lr", rate, "-opt", "sgd", "-s", "constant"]
    words += ["--max_grad_norm", bound, "--target_modules", *SOME_LAYERS.get(name, ["all-linear"])]
    words += ["--dp", "--noise_multiplier", 0, "--logical_batch_size", 8] if private else ["-gas", 2]
    words = [str(word) for word in words]
    assert run_peft.main(words) == 0
    run = next(tmp_path.rglob("run.json")).parent
    checkpoint = next(run.glob("checkpoint-*"))
    _, *rows = read_lines(run / "trained_rows.jsonl")
    assert len(rows) == 8
    expected, trained, tuned = by_hand(folder, checkpoint, rows, tokenizer, texts, rate, bound, private)
    largest = max(float(one.abs().max()) for one in expected.values())
    assert largest > 1e-4
    for key, wanted in expected.items():
        assert torch.allclose(trained[key], wanted, atol=1e-3 * largest, rtol=1e-3), key
    ids = torch.tensor([np.random.default_rng(2).integers(2, 390, 40).tolist()])
    with torch.no_grad(), common_adapters.adapted(model, checkpoint) as (adapted, _):
        found, wanted = adapted(ids, use_cache=False).logits, tuned(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-3 * wanted.abs().max().item(), rtol=0)


def test_the_table_in_the_documentation_is_the_one_tested():
    assert {name for name, _ in REFUSED} | set(SOME_LAYERS) <= set(FAMILIES)
    assert "\n".join(table()) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_weight_stays_attached(tmp_path, target):
    """peft's merge would change the embeddings and the head at once: logits are those of peft's attached model."""
    from conftest import make_tokenizer
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    vocabulary = len(make_tokenizer(tmp_path / "base"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    made = get_peft_model(base(), LoraConfig(r=4, target_modules=[target]))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    made.save_pretrained(tmp_path / "adapter")
    ids, plain = torch.arange(2, 30)[None], base()
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()(ids).logits
        with common_adapters.adapted(plain, tmp_path / "adapter") as (adapted, change):
            assert change is None and torch.equal(adapted(ids).logits, wanted)
    assert not torch.allclose(plain(ids).logits, wanted)
    with (
        pytest.raises(UserError, match="tied to another module's"),
        common_adapters.adapted(plain, tmp_path / "adapter", True),
    ):
        pass


@pytest.mark.parametrize("name", ["jamba (hybrid)", "mamba"])
def test_an_adapter_on_a_weight_that_the_model_reads_itself_is_refused(loaded, name, tmp_path):
    """dt_proj: peft's merged and attached models differ there, so neither is taken for the other."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, model, _ = loaded(name)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    get_peft_model(stock, LoraConfig(r=2, target_modules=["dt_proj"])).save_pretrained(tmp_path)
    with (
        pytest.raises(UserError, match="reads the weight of dt_proj directly"),
        common_adapters.adapted(model, tmp_path),
    ):
        pass
