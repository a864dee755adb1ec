"""The sweep sampler: exact distributions, answers that do not depend on batching, and bounded memory."""

import math

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_rows
from scipy import stats

from common import models, sampling, shared_prefix, target_scores

TEMPERATURES = [0.0, 0.01, 0.2, 0.5, 1.0, 1.5]


def load(folder, **extra):
    ref = models.find_model(str(folder))
    return models.load_base(ref, torch.float32, "cpu", **extra), models.load_tokenizer(ref)


def ask(model, tokenizer, n=12, **options):
    rows = make_rows(40)
    head = "Infer\n" + "".join(f"name: {row['gt-name']}, email: {row['gt-email']}\n" for row in rows[:2])
    prompts = [tokenizer(f"{head}name: {row['gt-name']}, email:").input_ids for row in rows[5 : 5 + n]]
    targets = [tokenizer(" " + row["gt-email"]).input_ids[:6] for row in rows[5 : 5 + n]]
    stop = sampling.stop_tokens(tokenizer, model.config.vocab_size)
    options = {
        "top_k": 20,
        "max_tokens": 8,
        "seed": 1,
        "stop": stop,
        "targets": [[target] for target in targets],
    } | options
    temperatures = options.pop("temperatures", TEMPERATURES)
    keys = options.pop("keys", [(i, 0) for i in range(n)])
    return sampling.sweep(model, prompts, keys, temperatures, **options), prompts, targets, stop


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_is_generate_and_targets_are_teacher_forced(models, arch):
    model, tokenizer = load(models[arch])
    answers, prompts, targets, stop = ask(model, tokenizer)
    for prompt, answer, target in zip(prompts, answers, targets):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        expected = expected[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(expected) if stop[token]]
        assert answer.tokens[0] == expected[: ends[0] + 1 if ends else None]

        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].double()
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(target)[:, None])
        assert answer.truth_logprob == pytest.approx(logp.mean().item(), abs=1e-5)
        # filtered and scaled by hand: softmax over the 20 largest logits / T
        for temperature, found in zip(TEMPERATURES[2:], answer.truth_logp[2:]):
            total = 0.0
            for position, token in zip(logits, target):
                top = sorted(position.tolist(), reverse=True)[:20]
                if position[token] < top[-1]:
                    total = -math.inf
                    break
                total += position[token].item() / temperature - math.log(sum(math.exp(x / temperature) for x in top))
            assert found == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_answers_do_not_depend_on_the_batch(models, arch):
    model, tokenizer = load(models[arch])
    together, prompts, targets, stop = ask(model, tokenizer)
    assert len({tuple(branch) for answer in together for branch in answer.tokens}) > 12  # the test would see a mix-up
    in_threes = ask(model, tokenizer, batch_size=3)[0]
    hot_only = ask(model, tokenizer, temperatures=[1.5])[0]
    draws = [(a, b) for x, y in zip(together, in_threes) for a, b in zip(x.tokens, y.tokens)]
    draws += [(x.tokens[-1], y.tokens[0]) for x, y in zip(together, hot_only)]
    for i in (0, 7):
        alone = sampling.sweep(
            model,
            [prompts[i]],
            [(i, 0)],
            TEMPERATURES,
            top_k=20,
            max_tokens=8,
            seed=1,
            stop=stop,
            targets=[[targets[i]]],
        )[0]
        draws += zip(together[i].tokens, alone.tokens)
        assert together[i].truth_logp == pytest.approx(alone.truth_logp, abs=1e-4)
    assert all(a == b for a, b in draws)
    assert ask(model, tokenizer, seed=2)[0] != together


def test_one_step_follows_the_exact_distribution(models):
    """Chi-square of 4,000 first tokens against softmax(top-5 logits / T); rows differ only in their noise key."""
    model, tokenizer = load(models["llama"])
    ids = tokenizer("Infer the name: Ada Moss, email:").input_ids
    n, heat = 4000, 2.0
    stop = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    options = {"top_k": 5, "max_tokens": 1, "seed": 11, "stop": stop, "batch_size": 500}
    answers = sampling.sweep(model, [ids] * n, [(i, 3) for i in range(n)], [heat], **options)
    with torch.no_grad():
        top = model(torch.tensor([ids])).logits[0, -1].double().topk(5)
    expected = (top.values / heat).softmax(-1).numpy()
    drawn = np.array([answer.tokens[0][0] for answer in answers])
    counts = np.array([(drawn == token).sum() for token in top.indices.tolist()])
    assert counts.sum() == n
    assert expected.max() < 0.9  # a peaked distribution would test nothing
    assert stats.chisquare(counts, expected * n).pvalue > 1e-4


def test_probability_of_the_target_is_the_rate_of_drawing_it(models):
    """p from one teacher-forced pass against 6,000 samples of the same two-token answer, within 4 standard errors."""
    model, tokenizer = load(models["neox"])
    ids = tokenizer("name: Ada Moss, email:").input_ids
    stop = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    options = {"top_k": 10, "max_tokens": 2, "seed": 5, "stop": stop, "batch_size": 600}
    n, heat = 6000, 1.5
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].topk(2).indices[1].item()
        second = model(torch.tensor([[*ids, first]])).logits[0, -1].topk(2).indices[1].item()
    answers = sampling.sweep(
        model, [ids] * n, [(i, 0) for i in range(n)], [heat], targets=[[[first, second]]] * n, **options
    )
    p = math.exp(answers[0].truth_logp[0])
    assert 0.001 < p < 0.9
    rate = sum(answer.tokens[0] == [first, second] for answer in answers) / n
    assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_too_long_or_impossible_targets_have_probability_zero(models):
    model, tokenizer = load(models["llama"])
    answers, *_ = ask(model, tokenizer, max_tokens=2)
    assert all(value == -math.inf for answer in answers for value in answer.truth_logp)
    answers, *_ = ask(model, tokenizer, top_k=1)
    assert {value for answer in answers for value in answer.truth_logp} <= {0.0, -math.inf}


def test_noise_is_gumbel_and_differs_in_every_key():
    rows, tokens = torch.arange(200), torch.arange(500).expand(200, 500)
    noise = sampling.gumbel(7, rows, torch.zeros_like(rows), 0, tokens)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-4
    for other in (
        sampling.gumbel(8, rows, torch.zeros_like(rows), 0, tokens),
        sampling.gumbel(7, rows + 1, torch.zeros_like(rows), 0, tokens),
        sampling.gumbel(7, rows, torch.ones_like(rows), 0, tokens),
        sampling.gumbel(7, rows, torch.zeros_like(rows), 1, tokens),
        sampling.gumbel(7, rows, torch.zeros_like(rows), 0, tokens + 1),
    ):
        assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 0.02
    # the same key gives the same noise in any batch
    assert sampling.gumbel(7, rows[3:4], rows[:1] * 0, 0, tokens[:1, 9:10]).item() == noise[3, 9].item()


def test_stops_at_line_break_and_eos(models):
    model, tokenizer = load(models["neox"])
    stop = sampling.stop_tokens(tokenizer, model.config.vocab_size)
    stopping = [tokenizer.decode([i]) for i in torch.nonzero(stop).flatten().tolist()]
    assert tokenizer.eos_token in stopping
    assert all("\n" in text or "\r" in text or text == tokenizer.eos_token for text in stopping)
    answers, *_ = ask(model, tokenizer)
    for answer in answers:
        for branch in answer.tokens:
            assert all(not stop[token] for token in branch[:-1])
            assert stop[branch[-1]] or len(branch) == 8


def test_an_attached_adapter_is_sampled_like_the_merged_model(models, adapters):
    from common.adapters import adapted
    from common.models import find_model, load_base, load_tokenizer

    for kind in ("lora", "dora"):
        ref = find_model(str(adapters["llama", kind]))
        base, tokenizer = load_base(ref, torch.float32, "cpu"), load_tokenizer(ref)
        plain = ask(base, tokenizer)[0]
        with adapted(base, ref.adapter, merge=True) as (model, change):
            merged = ask(model, tokenizer)[0]
        with adapted(base, ref.adapter, merge=False) as (model, _):
            attached = ask(model, tokenizer)[0]
        assert change > 0.01
        same = [a == b for x, y in zip(merged, attached) for a, b in zip(x.tokens, y.tokens)]
        assert sum(same) >= 0.99 * len(same)
        assert [answer.tokens for answer in merged] != [answer.tokens for answer in plain]


def test_chunks_keep_memory_flat():
    """Rows of a chunk follow the budget, not the number of prompts."""
    assert sampling.memory_budget("cpu") <= 2 << 30
    prompts = [[1, 2, 3, i] for i in range(5)]
    assert shared_prefix.common_prefix(prompts) == 3
    assert shared_prefix.common_prefix([[1, 2], [1, 2]]) == 1  # each keeps a token of its own
    assert shared_prefix.common_prefix([[1, 2], [3]]) == 0


def test_probability_of_two_forms_is_the_rate_of_drawing_either(models):
    """Two disjoint answers of one and two tokens: their probabilities add up, at every temperature; T = 0 takes one."""
    model, tokenizer = load(models["llama"])
    ids = tokenizer("name: Ada Moss, email:").input_ids
    stop = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    with torch.no_grad():
        top = model(torch.tensor([ids])).logits[0, -1].topk(3).indices.tolist()
        second = model(torch.tensor([[*ids, top[1]]])).logits[0, -1].argmax().item()
    forms, n, heats = [[top[1], second], [top[0]]], 4000, [0.0, 0.7, 1.5]
    options = {"top_k": 10, "max_tokens": 2, "seed": 5, "stop": stop, "batch_size": 500}
    keys = [(i, 0) for i in range(n)]
    answers = sampling.sweep(model, [ids] * n, keys, heats, targets=[forms] * n, **options)
    each = [sampling.sweep(model, [ids], [(0, 0)], heats, targets=[[form]], **options)[0] for form in forms]
    for place in range(3):
        p = math.exp(answers[0].truth_logp[place])
        assert p == pytest.approx(sum(math.exp(one.truth_logp[place]) for one in each), abs=1e-6)
        rate = sum(a.tokens[place] == forms[0] or a.tokens[place][:1] == forms[1] for a in answers) / n
        assert abs(rate - p) <= 4 * math.sqrt(max(p * (1 - p), 1e-9) / n)
    totals = [one.truth_logprob * len(form) for one, form in zip(each, forms)]
    likeliest = forms[totals.index(max(totals))]
    assert answers[0].truth_logprob == pytest.approx(math.log(sum(map(math.exp, totals))) / len(likeliest), abs=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_tied_tokens_share_one_probability(dtype):
    """Ties at the top, at the edge of the top k and everywhere: probabilities over all tokens sum to 1."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0, 0.0]), torch.zeros(40), torch.tensor([3.0] + [1.0] * 8 + [0.0] * 3)]
    rows += [torch.randint(0, 4, (60,), generator=generator).to(dtype).float() for _ in range(5)]
    heats = [0.0, 0.5, 1.0]
    for row in rows:
        row = row.to(dtype).float()
        for k in (1, 3, 5, len(row)):
            sums = torch.zeros(len(heats), dtype=torch.float64)
            for token in range(len(row)):
                _, sampled = target_scores._score_form([token], row[None], heats, k, 1)
                sums += sampled.exp()
            assert sums.tolist() == pytest.approx([1.0] * len(heats), abs=1e-9)
            kept = (row >= row.sort(descending=True).values[k - 1]).nonzero().flatten().tolist()  # as TopKLogitsWarper
            values, tokens = target_scores.top_k_with_ties(row[None], k)
            assert sorted(tokens[0][values[0] > -math.inf].tolist()) == kept
            _, sampled = target_scores._score_form([int(row.argmax())], row[None], heats, k, 1)
            assert sampled[0] == 0  # the token that `generate` takes, and no other


def test_tied_tokens_are_drawn_alike(models):
    """A head of zeros: every logit is tied, the top k are all tokens; 2,000 draws are uniform, T = 0 is argmax."""
    model, tokenizer = load(models["neox"])
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    stop, n = torch.zeros(model.config.vocab_size, dtype=torch.bool), 2000
    ids = tokenizer("Ada").input_ids
    options = {"top_k": 5, "max_tokens": 1, "seed": 3, "stop": stop, "batch_size": 500}
    answers = sampling.sweep(model, [[*ids, *ids]] * n, [(i, 0) for i in range(n)], [0.0, 1.0], **options)
    assert {tuple(answer.tokens[0]) for answer in answers} == {(0,)}
    drawn = np.bincount([answer.tokens[1][0] for answer in answers], minlength=400)
    assert stats.chisquare(drawn).pvalue > 1e-4 and (drawn > 0).sum() > 350


def test_greedy_branches_change_no_draw(models):
    """At temperatures 0 and 1.5 together, each answer is the one at that temperature alone; untrained, they differ."""
    model, tokenizer = load(models["neox"])
    stop = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    prompts = [tokenizer(text).input_ids for text in ("Ada", "Grace wrote", "Emmy")]
    keys = [(row, 0) for row in range(len(prompts))]
    options = {"top_k": 20, "max_tokens": 8, "seed": 5, "stop": stop}
    both = [answer.tokens for answer in sampling.sweep(model, prompts, keys, [0.0, 1.5], **options)]
    alone = [sampling.sweep(model, prompts, keys, [heat], **options) for heat in (0.0, 1.5)]
    assert both == [[cold.tokens[0], hot.tokens[0]] for cold, hot in zip(*alone)]
    assert all(cold != hot for cold, hot in both)
