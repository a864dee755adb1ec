"""common/scoring.py: log-probabilities against the plain route, one sequence and model(...).logits at a time."""

import math

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, ROOT, make_model
from hypothesis import given
from hypothesis import strategies as st

from common import scoring
from common.distributed import World
from common.scoring import join, log_probability, plan_batches, score, split_head, windows

TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}  # fp32; atol because a log-probability near 0 has no relative precision


@pytest.fixture(scope="module")
def loaded(models):
    from transformers import AutoModelForCausalLM

    return {arch: AutoModelForCausalLM.from_pretrained(folder).float().eval() for arch, folder in models.items()}


def sequences_of(count: int, longest: int, seed: int = 0, vocabulary: int = 400) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(vocabulary, size=int(n)).tolist() for n in rng.integers(2, longest, size=count)]


def plain_scores(model, sequences) -> list[np.ndarray]:
    """One sequence at a time, whole logits, float64 log-softmax."""
    scores = []
    for tokens in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1].double()
        scores.append(logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].numpy())
    return scores


def all_scores(model, sequences, **options):
    return join(sequences, [score(model, sequences, **options)])


def assert_same(scores, wanted):
    assert len(scores) == len(wanted)
    for mine, reference in zip(scores, wanted):
        np.testing.assert_allclose(mine, reference, **TOLERANCE)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_plain_route(loaded, arch):
    sequences = sequences_of(12, 60)
    assert split_head(loaded[arch], sequences[0])[1] is not None  # the chunked path, not the fallback
    assert_same(all_scores(loaded[arch], sequences, token_budget=128), plain_scores(loaded[arch], sequences))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ("lora", "dora"))
def test_peft_model_attached_and_switched_off(models, adapters, arch, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sequences = sequences_of(6, 40)
    base = AutoModelForCausalLM.from_pretrained(models[arch]).float().eval()
    without = plain_scores(base, sequences)
    model = PeftModel.from_pretrained(base, adapters[arch, kind]).eval()
    with_adapter = plain_scores(model, sequences)
    assert np.abs(np.concatenate(with_adapter) - np.concatenate(without)).max() > 0.01  # the adapter does something
    assert split_head(model, sequences[0])[1] is not None
    assert_same(all_scores(model, sequences), with_adapter)
    with model.disable_adapter():
        assert_same(all_scores(model, sequences), without)


def test_any_batching_gives_the_same_scores(loaded, monkeypatch):
    sequences = sequences_of(20, 90, seed=1)
    wanted = all_scores(loaded["llama"], sequences, token_budget=1)  # one sequence per pass
    for budget in (64, 200, 10_000):
        assert_same(all_scores(loaded["llama"], sequences, token_budget=budget), wanted)
    monkeypatch.setattr(scoring, "LOGIT_VALUES", 7 * 400)
    monkeypatch.setattr(scoring, "SMALLEST_CHUNK", 1)
    assert_same(all_scores(loaded["llama"], sequences, token_budget=200), wanted)
    backwards = all_scores(loaded["llama"], sequences[::-1], token_budget=200)
    assert_same(backwards[::-1], wanted)


@pytest.mark.parametrize("size", (2, 3))
def test_ranks_share_the_same_batches(loaded, size):
    sequences = sequences_of(20, 90, seed=2)
    options = {"token_budget": 150, "context": 32, "stride": 16}
    wanted = all_scores(loaded["neox"], sequences, **options)
    parts = [score(loaded["neox"], sequences, world=World(rank, size), **options) for rank in range(size)]
    assert all(parts)  # every rank had work
    for mine, reference in zip(join(sequences, parts), wanted):
        assert np.array_equal(mine, reference)  # not one bit differs
    with pytest.raises(ValueError, match="a rank's part is missing"):
        join(sequences, parts[:-1])


@pytest.mark.parametrize(("context", "stride"), ((32, 16), (32, 31), (32, 1), (50, 20)))
def test_windows_against_a_hand_written_loop(loaded, context, stride):
    tokens = sequences_of(1, 3, seed=3)[0] + list(range(1, 120))
    wanted, done, begin = [], 1, 0
    while done < len(tokens):
        window = tokens[begin : begin + context]
        with torch.no_grad():
            logp = loaded["opt"](torch.tensor([window])).logits[0].double().log_softmax(-1)
        for position in range(done, begin + len(window)):
            wanted.append(logp[position - begin - 1, tokens[position]].item())
        done, begin = begin + len(window), begin + stride
    scores = all_scores(loaded["opt"], [tokens, tokens[:10]], context=context, stride=stride, token_budget=100)
    np.testing.assert_allclose(scores[0], wanted, **TOLERANCE)
    assert len(wanted) == len(tokens) - 1


def test_no_pass_exceeds_the_context_of_the_model(loaded):
    """OPT raises beyond its position table (512 in the fixture); a document of 700 tokens is scored all the same."""
    tokens = [i % 300 for i in range(700)]
    with pytest.raises((IndexError, RuntimeError)):
        loaded["opt"](torch.tensor([tokens]))
    assert len(all_scores(loaded["opt"], [tokens])[0]) == 699


@given(n=st.integers(0, 300), context=st.integers(2, 60), stride=st.integers(1, 59))
def test_windows_score_every_token_once(n, context, stride):
    if stride >= context:
        with pytest.raises(ValueError, match="stride"):
            windows(n, context, stride)
        return
    made = windows(n, context, stride)
    assert [token for _, end, first in made for token in range(first, end)] == list(range(1, n))
    for number, (begin, end, first) in enumerate(made):
        assert begin == number * stride and end - begin <= context and begin < first
        assert number == 0 or first - begin >= context - stride  # left context


@given(lengths=st.lists(st.integers(1, 100), max_size=60), budget=st.integers(1, 400))
def test_batches_hold_every_item_once_within_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
    widths = [lengths[index] for batch in batches for index in batch]
    assert widths == sorted(widths, reverse=True)


def test_log_probability_by_hand():
    """softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8); adding 1000 changes nothing and must not overflow."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)], [1000.0, 1000 + math.log(2), 1000 + math.log(5)]])
    scores = log_probability(logits, torch.tensor([2, 0]))
    assert scores.tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)], rel=1e-4)


def test_known_logits_come_out(tmp_path):
    """A head without weights, only biases, gives the same distribution everywhere: its log-softmax, by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, "llama")).eval()
    head = torch.nn.Linear(32, model.config.vocab_size)
    biases = torch.arange(model.config.vocab_size) / 100
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(biases)
    model.lm_head = head
    total = math.log(math.fsum(math.exp(i / 100) for i in range(model.config.vocab_size)))
    (scores,) = all_scores(model, [[9, 3, 350, 7]])
    assert scores.tolist() == pytest.approx([0.03 - total, 3.5 - total, 0.07 - total], rel=1e-5)


@pytest.mark.parametrize("kind", ("capped", "scaled", "divided"))
def test_altered_logits_are_noticed(capsys, kind):
    """After the head Gemma-2 caps its logits, Cohere multiplies and Granite divides them."""
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "capped":
        model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, final_logit_softcapping=2.0))
    elif kind == "scaled":
        model = AutoModelForCausalLM.from_config(CohereConfig(**sizes, logit_scale=0.25))
    else:
        model = AutoModelForCausalLM.from_config(GraniteConfig(**sizes, logits_scaling=3.0))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    model.eval()
    sequences = sequences_of(6, 40, vocabulary=300)
    assert split_head(model, sequences[0])[1] is None
    assert_same(all_scores(model, sequences, token_budget=64), plain_scores(model, sequences))
    assert "small batches" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_precision_takes_the_chunked_path(models, arch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[arch], dtype=torch.bfloat16).eval()
    sequences = sequences_of(4, 40)
    assert split_head(model, sequences[0])[1] is not None
    scores, wanted = all_scores(model, sequences), plain_scores(model, sequences)
    # bf16 keeps 8 bits: logits of up to 10 are off by up to 0.04 between batch shapes
    assert np.abs(np.concatenate(scores) - np.concatenate(wanted)).max() < 0.2


def test_a_custom_statistic(loaded):
    """What membership inference needs: several columns per token from the same chunk of logits."""

    def both(logits, targets):
        return torch.stack([log_probability(logits, targets), (logits.argmax(-1) == targets).float()], 1)

    sequences = sequences_of(5, 40)
    scores = all_scores(loaded["llama"], sequences, statistics=both)
    for tokens, values, logp in zip(sequences, scores, all_scores(loaded["llama"], sequences)):
        assert values.shape == (len(tokens) - 1, 2)
        np.testing.assert_allclose(values[:, 0], logp, **TOLERANCE)
        with torch.no_grad():
            top = loaded["llama"](torch.tensor([tokens])).logits[0, :-1].argmax(-1)
        assert values[:, 1].tolist() == [float(a == b) for a, b in zip(top.tolist(), tokens[1:])]


def test_only_a_chunk_of_logits_exists_at_once(loaded, monkeypatch):
    """No call of the head sees more than LOGIT_VALUES / V positions; only positions that are scored reach it."""
    model, seen = loaded["llama"], []
    monkeypatch.setattr(scoring, "LOGIT_VALUES", 50 * model.config.vocab_size)
    monkeypatch.setattr(scoring, "SMALLEST_CHUNK", 1)
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    sequences = sequences_of(30, 100)
    try:
        all_scores(model, sequences, token_budget=1000)
    finally:
        hook.remove()
    probe = min(len(sequences[0]), scoring.PROBE_TOKENS)
    assert seen[:2] == [probe, probe] and max(seen[2:]) == 50
    assert sum(seen[2:]) == sum(len(tokens) - 1 for tokens in sequences)  # no padding position


def test_empty_and_one_token_sequences(loaded):
    scores = all_scores(loaded["opt"], [[], [5], [5, 6]])
    assert [len(values) for values in scores] == [0, 0, 1]
    assert join([[]], [score(loaded["opt"], [[]])])[0].shape == (0,)


def test_training_mode_is_refused(loaded):
    model = loaded["opt"].train()
    try:
        with pytest.raises(ValueError, match="eval mode"):
            score(model, [[1, 2, 3]])
    finally:
        model.eval()


def test_progress_counts_every_scored_token(loaded):
    sequences, seen = sequences_of(9, 50), []
    score(loaded["neox"], sequences, token_budget=64, progress=seen.append)
    assert sum(seen) == sum(len(tokens) - 1 for tokens in sequences) and len(seen) > 1


def test_module_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, common.scoring; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
