"""Differential privacy: per-example gradients, sensitivity, noise, draws, accounting, runs, an audit that can fail."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ARCHITECTURES, make_rows, read_lines, write_manifest, write_rows

import run_peft
from common.models import find_model
from common.problems import UserError
from training import batches
from training.checkpoint import checkpoints
from training.dp_trainer import DPTrainer
from training.plan import make_plan, run_folder, run_state
from training.run import run as fine_tune
from training.verify import check_examples

KINDS = ("lora", "dora", "pissa")
LENGTHS = (7, 19, 12, 30)


def parse(*words):
    return run_peft.make_parser().parse_args([str(word) for word in words])


def words_of(models, arch, dataset, out, *flags) -> list:
    words = ["-m", models[arch], "-i", dataset, "--output_root", out, "--lora_r", 4, "-e", 2, "-pdbs", 4]
    return [*words, "--dp", "--logical_batch_size", 8, "--lora_dropout", 0, "--seed", 1, *flags]


def make_training(models, arch, dataset, out, *flags):
    """A Training as run() makes it, without running it."""
    import torch

    args = parse(*words_of(models, arch, dataset, out, *flags))
    if args.peft_type == "pissa":
        args = replace(args, lora_dropout=None)
    plan = make_plan(args)
    from common.distributed import World

    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    training = DPTrainer(args, plan, World(), dtype, b"a secret of the tests".ljust(32))
    move(training)
    return training


def move(training) -> None:
    """Move the adapters away from their initial values, where A's gradients are zero."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for item in training.examples.named.values():
            item.add_(0.05 * torch.randn(item.shape, generator=generator))


def random_rows(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [batches.whole_row(rng.integers(2, 390, size=length).tolist()) for length in lengths]


def one_at_a_time(training, rows) -> list[dict]:
    """The gradient of each row's own mean loss by plain autograd on peft's own layers."""
    import torch

    found = []
    for row in rows:
        with training.examples.off():
            batch = training.batch([row], [[0]])
            training.nll(batch).mean().backward()
        found.append({name: item.grad.clone() for name, item in training.examples.named.items()})
        for item in training.examples.named.values():
            item.grad = None
    assert all(torch.isfinite(item).all() for one in found for item in one.values())
    return found


def per_example(training, rows, owners=None, units=None) -> dict:
    owners = list(range(len(rows))) if owners is None else owners
    training.examples.begin(units or len(rows))
    with training.examples.of(owners):
        training.record_losses(rows).sum().backward()
    return training.examples.gradients


# ---------------------------------------------------------------------------------------------------------------------
# Per-example gradients


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_per_example_gradients_equal_the_loop(models, dataset, tmp_path, monkeypatch, arch, kind):
    """All nine combinations × attention × checkpointing, against one row at a time through peft's own layers."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained
    for attention in ("sdpa", "eager"):
        for extra in ((), ("--gradient_checkpointing",)):
            monkeypatch.setattr(
                AutoModelForCausalLM,
                "from_pretrained",
                lambda *a, attention=attention, **k: original(*a, **k, attn_implementation=attention),
            )
            training = make_training(models, arch, dataset, tmp_path, "-pt", kind, "--noise_multiplier", 1, *extra)
            assert training.model.get_base_model().config._attn_implementation == attention
            rows = random_rows()
            expected, found = one_at_a_time(training, rows), per_example(training, rows)
            assert found.keys() == training.examples.named.keys()
            sizes = [math.sqrt(sum(item.square().sum() for item in one.values())) for one in expected]
            for name, gradient in found.items():
                for place, (one, size) in enumerate(zip(expected, sizes)):  # as a share of the record's norm
                    assert (gradient[place] - one[name]).abs().max() <= 1e-6 * size, name
                assert gradient.abs().max() > 0, name


def test_dropout_is_the_plain_path_s(models, dataset, tmp_path):
    """With dropout DoRA takes another path through peft: same seed, same masks, same gradient of one row."""
    import torch

    for kind in ("lora", "dora"):
        flags = ("-pt", kind, "--noise_multiplier", 1, "--lora_dropout", 0.3)
        training = make_training(models, "neox", dataset, tmp_path / kind, *flags)
        rows = random_rows((21,))
        torch.manual_seed(3)
        expected = one_at_a_time(training, rows)[0]
        torch.manual_seed(3)
        found = per_example(training, rows)
        for name, gradient in found.items():
            assert torch.allclose(gradient[0], expected[name], atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_base(models, dataset, tmp_path, kind):
    """On a bf16 base gradients agree with the loop's to bf16's precision (8 bits) of the largest."""
    training = make_training(
        models, "llama", dataset, tmp_path, "-pt", kind, "--noise_multiplier", 1, "--dtype", "bfloat16"
    )
    rows = random_rows()
    expected, found = one_at_a_time(training, rows), per_example(training, rows)
    for name, gradient in found.items():
        assert gradient.dtype.is_floating_point and gradient.element_size() == 4
        for place, one in enumerate(expected):
            assert (gradient[place] - one[name]).abs().max() <= 0.1 * one[name].abs().max() + 1e-6, name


def test_opacus_agrees(models, dataset, tmp_path):
    """Opacus' hooks on stock peft LoRA (NeoX, Llama: where they work), as an independent route."""
    import torch
    from opacus.grad_sample import GradSampleModule

    for arch in ("neox", "llama"):
        training = make_training(models, arch, dataset, tmp_path / arch, "--noise_multiplier", 1)
        rows = random_rows((16, 16, 16))
        found = {name: item.clone() for name, item in per_example(training, rows).items()}
        for module, _ in training.examples.replaced:
            del module.forward
        hooked = GradSampleModule(training.model, loss_reduction="sum", strict=False)
        batch = training.batch(rows, [[place] for place in range(3)])
        logits = hooked(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        ).mean(1)
        losses.sum().backward()
        compared = 0
        for name, item in training.model.named_parameters():
            if item.requires_grad:
                assert torch.allclose(item.grad_sample, found[name], atol=1e-6), name
                compared += 1
        assert compared == len(found) > 0


def test_units_over_several_passes(models, dataset, tmp_path):
    """A user's gradient is the sum of the rows', whether they are in one pass or in three."""
    import torch

    training = make_training(models, "opt", dataset, tmp_path, "--noise_multiplier", 1)
    rows = random_rows()
    expected = one_at_a_time(training, rows)
    training.examples.begin(2)
    for group, owners in (([0, 2], [0, 1]), ([1], [0]), ([3], [1])):
        with training.examples.of(owners):
            training.record_losses([rows[row] for row in group]).sum().backward()
    for name, gradient in training.examples.gradients.items():
        assert torch.allclose(gradient[0], expected[0][name] + expected[1][name], atol=5e-6)
        assert torch.allclose(gradient[1], expected[2][name] + expected[3][name], atol=5e-6)


def test_a_parameter_without_a_rule_is_named(models, dataset, tmp_path):
    from training import dp

    training = make_training(models, "llama", dataset, tmp_path, "--noise_multiplier", 1)
    training.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: no per-example rule"):
        dp.PerExample(training.model)


def test_a_model_that_mixes_rows_is_refused(models, dataset, tmp_path, monkeypatch):
    """The check at the start notices a layer that permutes the rows."""
    training = make_training(models, "neox", dataset, tmp_path, "--noise_multiplier", 1)
    check_examples(training)
    before = training.examples.add
    monkeypatch.setattr(training.examples, "add", lambda name, rows: before(name, rows.flip(0)))
    with pytest.raises(RuntimeError, match="its per-example gradient is wrong on this model"):
        check_examples(training)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping and sensitivity


@pytest.mark.parametrize("kind", KINDS)
def test_removing_one_record_moves_the_sum_by_at_most_c(models, dataset, tmp_path, kind):
    """Removing a record, short or long, moves the sum of clipped gradients by at most C."""
    import torch

    training = make_training(models, "neox", dataset, tmp_path, "-pt", kind, "--noise_multiplier", 1)
    rows = random_rows((5, 9, 6, 200, 8))
    bound = 0.01

    def clipped(rows):
        total = {name: torch.zeros_like(item) for name, item in training.examples.named.items()}
        per_example(training, rows)
        norms = training.examples.clip_into(total, bound)
        return torch.cat([one.flatten() for one in total.values()]).double(), norms

    whole, norms = clipped(rows)
    assert (norms > bound).all()
    for gone in range(len(rows)):
        rest, _ = clipped(rows[:gone] + rows[gone + 1 :])
        assert (whole - rest).norm() <= bound * (1 + 1e-5)
        assert (whole - rest).norm() >= bound * 0.99
    # The batch's mean over tokens, which libraries use, breaks the bound: the other records' weights change too.


@pytest.mark.parametrize("passes", [2, 64])
def test_a_user_moves_the_sum_by_at_most_c(models, tmp_path, passes):
    """The run's own step, q = 1, σ = 0: without one user of five rows, in passes of 2 or of 64 rows."""
    import torch

    rows = [row | {"user_id": f"u{number % 4}"} for number, row in enumerate(make_rows(30))]
    gradients = []
    for name, kept in (("all", rows), ("less", [row for row in rows if row["user_id"] != "u1" or row["row_id"] < 10])):
        file = write_rows(tmp_path / f"{name}.jsonl", kept)
        write_manifest(file, tag=name, script="test", argv=[], rows=len(kept), split_start=10)
        flags = ("--noise_multiplier", 0, "--max_grad_norm", 0.01, "--privacy_unit", "user", "-pdbs", passes,
                 "--logical_batch_size", 4 if name == "all" else 3, "-opt", "sgd", "-lr", 1.0)  # fmt: skip
        training = make_training(models, "neox", file, tmp_path, *flags)
        before = [item.detach().clone() for item in training.examples.named.values()]
        training.step()
        after = training.examples.named.values()
        size = training.plan.privacy.logical_batch  # undo the division
        gradients.append(torch.cat([size * (one - two).flatten() for one, two in zip(before, after)]).double())
    moved = (gradients[0] - gradients[1]).norm().item()
    assert 0.0099 < moved <= 0.01 * (1 + 1e-4)


def test_long_norms_do_not_fall_short():
    """A million and more elements: float64 norms; a float32 sum misses by 1e-5 and more."""
    import torch

    from training import dp

    drawn = torch.rand(2, 1024, 2048, generator=torch.Generator().manual_seed(0))
    exact = drawn.double().flatten(1).norm(dim=1)
    assert torch.allclose(dp.row_norms(drawn), exact, rtol=3e-7, atol=0)
    assert torch.allclose(dp.row_norms(drawn[:, 0]), drawn[:, 0].double().norm(dim=1), rtol=1e-12)


def test_joint_norm_and_bad_gradients(models, dataset, tmp_path):
    """Worked by hand: (3, 4) over two tensors has norm 5; NaN counts as zero; a small one is left alone."""
    import torch

    training = make_training(models, "llama", dataset, tmp_path, "--noise_multiplier", 1)
    examples = training.examples
    examples.begin(3)
    examples.gradients = {
        "a": torch.tensor([[[3.0]], [[float("nan")]], [[0.3]]]),
        "b": torch.tensor([[4.0], [1.0], [0.4]]),
    }
    total = {"a": torch.zeros(1, 1), "b": torch.zeros(1)}
    norms = examples.clip_into(total, 1.0)
    assert norms[0] == pytest.approx(5) and norms[2] == pytest.approx(0.5) and not math.isfinite(norms[1])
    assert total["a"].item() == pytest.approx(3 / 5 + 0.3, abs=1e-5)
    assert total["b"].item() == pytest.approx(4 / 5 + 0.4, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Draws and noise


def test_poisson_inclusion_rate():
    """Over 400 secrets × 5 steps each of 50 units is in with probability q (chi-square); the sizes are binomial."""
    from scipy import stats

    from training import dp

    n, rate, trials = 50, 0.13, 2000
    counts, sizes = np.zeros(n), []
    for seed in range(400):
        for step in range(1, 6):
            drawn = dp.poisson_draw(f"{seed}".encode(), step, n, rate)
            counts[drawn] += 1
            sizes.append(len(drawn))
    chi2 = ((counts - trials * rate) ** 2 / (trials * rate * (1 - rate))).sum()
    assert 0.001 < stats.chi2.sf(chi2, n) < 0.999
    # the sizes are Binomial(50, q): variance 5.655; fixed-size batches would have none
    assert np.var(sizes) == pytest.approx(n * rate * (1 - rate), rel=0.15)
    # pairs are independent: joint inclusion of unit 0 and 1 is q²
    assert dp.poisson_draw(b"x", 1, 5, 1.0) == [0, 1, 2, 3, 4] and dp.poisson_draw(b"x", 1, 5, 0.0) == []


def test_draws_depend_on_secret_and_step_alone():
    from training import dp

    one = dp.poisson_draw(b"k", 7, 10_000, 0.01)
    assert one == dp.poisson_draw(b"k", 7, 10_000, 0.01) != dp.poisson_draw(b"k", 8, 10_000, 0.01)
    assert one != dp.poisson_draw(b"l", 7, 10_000, 0.01)
    # q = 2e-5 needs float64: of 10⁶ units about 20 are drawn each step, 2,000 in 100
    total = sum(len(dp.poisson_draw(b"k", step, 1_000_000, 2e-5)) for step in range(100))
    assert abs(total - 2000) < 5 * math.sqrt(2000)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_standard_normal(secure):
    from scipy import stats

    from training import dp

    one = dp.gaussian(b"k", 1, [(300, 100), (7,)], secure)
    assert [item.shape for item in one] == [(300, 100), (7,)] and one[0].dtype == np.float32
    flat = np.concatenate([item.ravel() for item in one])
    assert stats.kstest(flat, "norm").pvalue > 0.001
    assert flat.std() == pytest.approx(1, abs=0.02) and abs(flat.mean()) < 0.02
    again, other = dp.gaussian(b"k", 1, [(30007,)], secure)[0], dp.gaussian(b"k", 2, [(30007,)], secure)[0]
    assert (again == flat).all() and abs(np.corrcoef(flat, other)[0, 1]) < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Accounting


def test_epsilon_of_the_published_setting():
    """σ 0.3, q 2e-5, 50,000 steps, δ 1e-5: RDP 11.46, PRV 8.97; dp-accounting gives RDP 11.465 and PLD 8.96."""
    from training import dp

    assert dp.epsilon(0.3, 2e-5, 50_000, 1e-5, "rdp") == pytest.approx(11.465, abs=0.002)
    assert dp.epsilon(0.3, 2e-5, 200_000, 1e-5, "rdp") == pytest.approx(14.68, abs=0.01)
    # the coarse PRV is an upper bound of the exact 8.97, at most 0.1 above it
    assert 8.96 <= dp.epsilon(0.3, 2e-5, 50_000, 1e-5, "prv", 0.1) <= 8.97 + 0.1


@pytest.mark.slow
def test_epsilon_of_the_published_setting_by_prv():
    from training import dp

    assert dp.epsilon(0.3, 2e-5, 50_000, 1e-5, "prv") == pytest.approx(8.97, abs=0.01)


def test_epsilon_where_prv_fails():
    """σ 0.01, q 1: exact 5,425 (Balle and Wang), where Opacus' PRV says 712; a tiny δ; never below 0."""
    from training import dp

    for sigma, exact in ((0.03, 696.8), (0.01, 5425), (0.001, 504264)):
        assert dp.epsilon(sigma, 1.0, 1, 1e-5, "prv") >= exact
    assert dp.epsilon(1.0, 1.0, 100, 1e-15, "prv") == dp.epsilon(1.0, 1.0, 100, 1e-15, "rdp") > 0
    assert dp.epsilon(50.0, 0.1, 1, 0.09, "prv") >= 0 and dp.epsilon(50.0, 0.1, 1, 0.09, "rdp") == 0
    assert dp.epsilon(dp.noise_multiplier(1e4, 0.1, 10, 1e-3), 0.1, 10, 1e-3) <= 1e4


def test_epsilon_of_one_gaussian_mechanism():
    """q = 1, one step: δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ) (Balle and Wang 2018), solved here."""
    from scipy import optimize, stats

    from training import dp

    for sigma, delta in ((1.0, 1e-5), (4.0, 1e-6)):
        exact = optimize.brentq(
            lambda e, s=sigma, d=delta: (
                stats.norm.cdf(1 / (2 * s) - e * s) - math.exp(e) * stats.norm.cdf(-1 / (2 * s) - e * s) - d
            ),
            0,
            50,
        )
        assert exact <= dp.epsilon(sigma, 1.0, 1, delta, "prv") <= exact + 0.02
        assert dp.epsilon(sigma, 1.0, 1, delta, "rdp") >= exact
    assert dp.epsilon(0.0, 0.1, 5, 1e-5) == math.inf and dp.epsilon(1.0, 0.1, 0, 1e-5) == 0.0


@pytest.mark.parametrize("target", [0.5, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_noise_for_a_target_lies_just_below_it(target, accountant):
    from training import dp

    sigma = dp.noise_multiplier(target, 256 / 2220, 36, 1 / 22200, accountant)
    spent = dp.epsilon(sigma, 256 / 2220, 36, 1 / 22200, accountant)
    assert spent <= target and dp.epsilon(sigma * 0.99, 256 / 2220, 36, 1 / 22200, accountant) > target


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def adapter(folder, which=-1) -> dict:
    from safetensors.torch import load_file

    return load_file(checkpoints(folder)[which] / "adapter_model.safetensors")


def furthest(one: dict, other: dict) -> float:
    assert one.keys() == other.keys() and one
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_no_noise_and_no_bound_is_a_plain_step(models, dataset, tmp_path):
    """One step with σ = 0, C = ∞ and SGD: W − lr · Σ over the draw of ∇(mean loss of the record) / expected batch."""
    import torch

    from training import dp

    flags = ("--noise_multiplier", 0, "--max_grad_norm", "inf", "-opt", "sgd", "-lr", 0.5)
    training = make_training(models, "neox", dataset, tmp_path, *flags)
    before = {name: item.detach().clone() for name, item in training.examples.named.items()}
    rows = training.plan.train
    drawn = dp.poisson_draw(training.secret, 1, len(rows), 8 / 40)
    assert drawn and len(drawn) != 8  # the draw is not the expected size: the division below can tell them apart
    gradients = one_at_a_time(training, [rows[row] for row in drawn])
    training.step()
    for name, item in training.examples.named.items():
        expected = before[name] - 0.5 * torch.stack([one[name] for one in gradients]).sum(0) / 8
        assert torch.allclose(item, expected, atol=2e-6), name


def test_noise_is_added_once_a_step_with_deviation_sigma_c(models, dataset, tmp_path):
    """lr 1, SGD, C so small that the signal is negligible: the weights move by N(0, (σC/8)²)."""
    flags = ("--noise_multiplier", 2, "--max_grad_norm", 1e-3, "-opt", "sgd", "-lr", 1.0, "-s", "constant")
    training = make_training(models, "neox", dataset, tmp_path, *flags)
    before = {name: item.detach().clone() for name, item in training.examples.named.items()}
    training.step()
    moved = np.concatenate(
        [(item.detach() - before[name]).numpy().ravel() for name, item in training.examples.named.items()]
    )
    assert len(moved) > 3000
    # the signal adds at most 20 · C / 8 in norm: 0.0025 against a noise norm of 2.5e-4 · √P = 0.015
    assert moved.std() == pytest.approx(2 * 1e-3 / 8, rel=0.05)


def test_every_step_has_its_own_noise(models, dataset, tmp_path):
    flags = ("--noise_multiplier", 1, "--max_grad_norm", 1e-6, "-opt", "sgd", "-lr", 1e4, "-s", "constant")
    training = make_training(models, "neox", dataset, tmp_path, *flags)
    moves = []
    for _ in range(3):
        before = [item.detach().clone() for item in training.examples.named.values()]
        training.step()
        after = training.examples.named.values()
        moves.append(np.concatenate([(two.detach() - one).numpy().ravel() for one, two in zip(before, after)]))
    assert (np.abs(np.corrcoef(moves)[np.triu_indices(3, 1)]) < 0.2).all()


def test_seeds_have_purposes(models, dataset, tmp_path):
    """The initial weights are published; their seed must not reveal the dropout masks."""
    training = make_training(models, "neox", dataset, tmp_path, "--noise_multiplier", 1)
    seeds = [training.private_seed("initial weights", 0), *(training.private_seed("dropout 0", n) for n in (1, 2))]
    assert len({seed & 0xFFFFFFFF for seed in (*seeds, training.private_seed("dropout 1", 1))}) == 4
    assert training.seed == seeds[0]


def test_unseeded_runs_differ(models, dataset, tmp_path):
    words = words_of(models, "neox", dataset, "OUT", "--noise_multiplier", 1, "-e", 1)
    words = [*words[: words.index("--seed")], *words[words.index("--seed") + 2 :]]
    folders = [fine_tune(parse(*(tmp_path / out if w == "OUT" else w for w in words))) for out in ("one", "two")]
    assert furthest(adapter(folders[0]), adapter(folders[1])) > 0.01  # A is initialised differently: another secret


def test_a_run_and_what_it_leaves(models, dataset, tmp_path, capsys):
    """ε and its settings in run.json and in every checkpoint, no secret left, the adapter loads in stock peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = words_of(models, "neox", dataset, tmp_path, "--target_epsilon", 8)
    words = [*words[: words.index("--seed")], *words[words.index("--seed") + 2 :]]
    args = parse(*words)
    folder = fine_tune(args)
    assert folder.relative_to(tmp_path).parts == ("tiny-neox", "enron-lora-dp-eps8", "0e+00_2e-06")
    record = json.loads((folder / "run.json").read_text())
    block = record["privacy"]
    assert record["seed"] == "os" and block["private"] is True and block["void"] is None
    assert 7.5 < block["epsilon"] <= 8 and block["epsilon_rdp"] > block["epsilon"]
    known = {"num_records": 40, "logical_batch_size": 8, "sample_rate": 0.2, "steps": 10, "delta": 1 / 400}
    known |= {"adjacency": "add/remove", "unit": "record", "sampler": "poisson", "accountant": "prv"}
    assert {key: block[key] for key in known} == known and block["secure_rng"] is False
    spent = [json.loads((one / "privacy.json").read_text()) for one in checkpoints(folder)]
    assert [one["steps"] for one in spent] == [5, 10] and spent[0]["epsilon"] < spent[1]["epsilon"] == block["epsilon"]
    left = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert not [name for name in left if "private" in name or "training_state" in name or "secret" in name]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["neox"]), checkpoints(folder)[-1])
    lines = [line for line in read_lines(folder / "metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"batch", "clipped", "dropped", "signal_to_noise", "epsilon_rdp"} <= lines[0].keys()
    assert lines[-1]["epsilon_rdp"] == pytest.approx(block["epsilon_rdp"])
    sizes = [line["batch"] for line in lines]
    assert len(set(sizes)) > 1  # a fixed-size batch would be 8 each time
    capsys.readouterr()

    # later scripts propagate it
    import measure_purified
    import merge_peft
    from perplexity import perplexity

    newest = checkpoints(folder)[-1]
    merge_peft.main(["--model", str(newest), "--save_dir", str(tmp_path / "merged")])
    for model in (newest, tmp_path / "merged"):
        out = tmp_path / f"measured-{model.name}"
        words = [model, out, "-d", dataset, "--num_rows", 2, "--temperatures", 0.2, "-mt", 3]
        assert measure_purified.main([str(word) for word in words]) == 0
        assert read_lines(out / "results_purified.jsonl")[0]["privacy"] == block
        words = ["--model", model, "-d", dataset, "--num_rows", 2, "--output_dir", out]
        assert perplexity.main([str(word) for word in words]) == 0
        assert read_lines(out / "perplexity.jsonl")[0]["privacy"] == block


def test_a_given_seed_voids_epsilon_and_repeats(models, dataset, tmp_path, capsys):
    folders = []
    for out in ("one", "two"):
        words = words_of(models, "llama", dataset, tmp_path / out, "--noise_multiplier", 1, "-lr", 0.01)
        folders.append(fine_tune(parse(*words)))
    assert "ε is void" in capsys.readouterr().out
    assert furthest(adapter(folders[0]), adapter(folders[1])) == 0
    block = json.loads((folders[0] / "run.json").read_text())["privacy"]
    assert block["private"] is False and "seed was given" in block["void"]
    other = [*words_of(models, "llama", dataset, tmp_path / "three", "--noise_multiplier", 1, "-lr", 0.01)]
    other[other.index("--seed") + 1] = 2
    assert furthest(adapter(folders[0]), adapter(fine_tune(parse(*other)))) > 0


def test_the_matched_arm_without_noise(models, dataset, tmp_path):
    """σ 0, C ∞: same draws, steps and schedule as the private arm; ε null, not private."""
    folders = []
    for sigma, bound in ((0, "inf"), (1, 1)):
        flags = ("--noise_multiplier", sigma, "--max_grad_norm", bound)
        folders.append(fine_tune(parse(*words_of(models, "neox", dataset, tmp_path, *flags))))
    assert folders[0].parent.name == "enron-lora-dp-sigma0" and folders[1].parent.name == "enron-lora-dp-sigma1"
    block = json.loads((folders[0] / "run.json").read_text())["privacy"]
    assert block["epsilon"] is None and block["private"] is False and block["max_grad_norm"] == "inf"
    lines = [read_lines(folder / "metrics.jsonl") for folder in folders]
    for key in ("step", "batch", "lr", "tokens"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    assert all(line["clipped"] == 0 for line in lines[0]) and "signal_to_noise" not in lines[0][0]


def test_empty_draws_are_steps(models, dataset, tmp_path):
    """Expected batch 1 of 40: a third of the draws is empty; they move the weights (noise) and are accounted."""
    flags = ("--noise_multiplier", 1, "--logical_batch_size", 1, "-e", 1)
    folder = fine_tune(parse(*words_of(models, "opt", dataset, tmp_path, *flags)))
    lines = read_lines(folder / "metrics.jsonl")
    assert len(lines) == 40 and 5 <= sum(line["batch"] == 0 for line in lines) <= 26
    empty = [line for line in lines if line["batch"] == 0]
    assert all(line["loss"] is None and line["grad_norm"] > 0 and line["signal_to_noise"] == 0 for line in empty)
    assert json.loads((folder / "run.json").read_text())["privacy"]["steps"] == 40


def test_users_are_the_unit(models, tmp_path):
    """40 training rows of 10 users, at most 3 rows each: δ, q and the accountant count users."""
    rows = [row | {"user_id": f"u{number % 10}"} for number, row in enumerate(make_rows(60))]
    file = write_rows(tmp_path / "users.jsonl", rows)
    flags = ("--noise_multiplier", 1, "--privacy_unit", "user", "--max_rows_per_user", 3, "--logical_batch_size", 4,
             "-pdbs", 2)  # fmt: skip
    folder = fine_tune(parse(*words_of(models, "neox", file, tmp_path, *flags)))
    block = json.loads((folder / "run.json").read_text())["privacy"]
    known = {"unit": "user", "num_units": 10, "num_records": 30, "rows_left_out": 10, "delta": 0.01, "sample_rate": 0.4}
    assert {key: block[key] for key in known} == known and block["steps"] == 6
    with pytest.raises(UserError, match=r"row 20 \(and 39 more\) has no user_id"):
        plain = write_rows(tmp_path / "plain.jsonl", make_rows(60))
        make_plan(parse(*words_of(models, "neox", plain, tmp_path, *flags)))


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_the_uninterrupted_run(models, dataset, tmp_path, kind):
    """kill -9 in epoch 2 of 3 (after a checkpoint), resume: bit for bit the uninterrupted run, dropout on; ε once."""
    flags = ("--noise_multiplier", 1, "-e", 3, "-lr", 0.01, "-pt", kind, "--seed", 7)
    flags += () if kind == "pissa" else ("--lora_dropout", 0.1)
    words = words_of(models, "neox", dataset, "OUT", *flags)
    if kind == "pissa":
        words[words.index("--lora_dropout") : words.index("--lora_dropout") + 2] = []
    script = tmp_path / "killed.py"
    script.write_text(
        """
import os, signal, sys
import run_peft
from training.trainer import Trainer
step = Trainer.step
def killed(self):
    if self.count["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.step = killed
run_peft.main(sys.argv[1:])
"""
    )

    def at(out):
        return [str(tmp_path / out) if word == "OUT" else str(word) for word in words]

    done = subprocess.run([sys.executable, script, *at("broken")], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = run_folder(parse(*at("broken")), "enron")
    private = folder / "private"
    assert private.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o777 for file in private.iterdir()} == {
        "secret": 0o600,
        "training_state.pt": 0o600,
    }
    with pytest.raises(UserError, match=r"--noise_multiplier 1\.0 there, 2\.0 here"):
        changed = at("broken")
        changed[changed.index("--noise_multiplier") + 1] = "2"
        changed += ["--resume"]
        args = parse(*changed)
        run_state(args, find_model(args.model), folder, dataset, 8, 1)
    fine_tune(parse(*at("broken"), "--resume"))
    whole = fine_tune(parse(*at("whole")))
    for which in range(3):
        assert furthest(adapter(folder, which), adapter(whole, which)) == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["resumed_from"] == 5 and record["privacy"]["steps"] == 15
    assert record["privacy"] == json.loads((whole / "run.json").read_text())["privacy"]
    keys = [{key: line[key] for key in line if key != "time"} for line in read_lines(folder / "metrics.jsonl")]
    assert keys == [{k: line[k] for k in line if k != "time"} for line in read_lines(whole / "metrics.jsonl")]
    assert not private.exists()


def test_two_ranks_equal_one_process(models, dataset, tmp_path):
    """Draws, clipping and noise on two ranks (ddp and fsdp) give one process's adapter; σ = 0 and σ > 0, SGD."""
    from test_distributed_training import check_same_as_one_process

    common = ("--dp", "--logical_batch_size", 8, "--seed", 1, "-opt", "sgd", "-lr", 0.1, "--lora_dropout", 0)
    cases = [("neox", (*common, "--noise_multiplier", sigma), 2e-6) for sigma in (0, 1)]
    check_same_as_one_process(models, dataset, tmp_path, cases)


@pytest.mark.slow
def test_two_ranks_equal_one_process_for_every_type(models, dataset, tmp_path):
    from test_distributed_training import check_same_as_one_process

    common = ("--dp", "--logical_batch_size", 8, "--seed", 1, "-opt", "sgd", "--noise_multiplier", 0.5)
    cases = []
    for arch in ARCHITECTURES:
        for kind in KINDS:
            rate = "0.003" if kind == "pissa" else "0.1"  # pissa: large weights amplify the last bits
            cases.append((arch, (*common, "-pt", kind, "-lr", rate, "--lora_dropout", 0), 5e-6))
    cases += [
        ("llama", (*common, "-lr", "0.1", "--lora_dropout", 0, "--gradient_checkpointing", "--run_name", "c"), 5e-6)
    ]
    check_same_as_one_process(models, dataset, tmp_path, cases)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_bf16_base(models, dataset, tmp_path, kind):
    """The whole run with its own checks; the adapter stays float32, its matrices near the float32 run's."""
    folders = []
    for dtype in ("float32", "bfloat16"):
        flags = ("--noise_multiplier", 1, "-pt", kind, "--dtype", dtype, "-opt", "sgd", "-lr", 0.003, "-e", 1)
        folders.append(fine_tune(parse(*words_of(models, "llama", dataset, tmp_path / dtype, *flags))))
    exact, rough = adapter(folders[0]), adapter(folders[1])
    assert all(str(tensor.dtype) == "torch.float32" for tensor in rough.values())
    if kind != "pissa":  # whose SVD is of rounded weights: another start
        matrices = [name for name in exact if ".lora_" in name and "magnitude" not in name]
        apart = max((exact[name] - rough[name]).abs().max().item() for name in matrices)
        assert 0 < apart < 0.1 * 0.003 * 5  # five steps of clipped norm ≤ 1


def test_mp_is_the_same_run(models, dataset, tmp_path):
    folders = []
    for mode in ("ddp", "mp"):
        flags = ("--noise_multiplier", 1, "-lr", 0.01, "-dt", mode)
        folders.append(fine_tune(parse(*words_of(models, "neox", dataset, tmp_path / mode, *flags))))
    assert furthest(adapter(folders[0]), adapter(folders[1])) == 0


def test_dry_run_prints_the_plan_without_a_model(models, dataset, tmp_path, capsys, monkeypatch):
    from common import models as common_models

    monkeypatch.setattr(common_models, "load_base", lambda *a, **k: pytest.fail("loaded the model"))
    words = words_of(
        models, "neox", dataset, tmp_path, "--target_epsilon", 8, "--dry_run", "--report_to", "tensorboard"
    )
    fine_tune(parse(*words, "-pt", "dora"))
    shown = capsys.readouterr().out
    for words in (
        "σ ",
        "q = 8/40 = 0.2, 5 steps per epoch",
        "after epoch 1",
        "after epoch 2: 7.9",
        "signal/noise at most",
        "tensorboard: the per-step losses and counts sent there are not covered by ε",
    ):
        assert words in shown, words
    # NeoX of width 32, 2 layers, r 4: A and B of 32→96, 32→32, 32→64, 64→32 and DoRA's 96 + 32 + 64 + 32, by hand
    assert f"P = {2 * (4 * (128 + 64 + 96 + 96) + 224)} parameters" in shown
    assert list(tmp_path.iterdir()) == []


def test_suggestion_from_public_rows(models, dataset, tmp_path, capsys):
    public = write_rows(tmp_path / "public.jsonl", [{"text": row["prompt"]} for row in make_rows(20, seed=3)])
    words = words_of(models, "neox", dataset, tmp_path / "out", "--noise_multiplier", 1)
    fine_tune(parse(*words, "--suggest_max_grad_norm", public))
    shown = capsys.readouterr().out
    assert "gradient norms of 20 public rows" in shown and "suggestion: --max_grad_norm" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "exactly one of --target_epsilon and --noise_multiplier"),
        (("--target_epsilon", 1, "--noise_multiplier", 1), "exactly one of"),
        (("--noise_multiplier", 1, "-pt", "full"), "--peft_type full"),
        (("--noise_multiplier", 1, "--packing"), "--packing"),
        (("--noise_multiplier", 1, "--max_grad_norm", "inf"), "--max_grad_norm inf"),
        (("--noise_multiplier", 1, "--logical_batch_size", 41), "only 40 privacy units"),
        (("--noise_multiplier", 1, "--target_delta", 0.025), "must be below 1/40"),
        (("--noise_multiplier", 1, "--dtype", "float16"), "--dtype float16"),
        (("--noise_multiplier", 1, "-s", "reduce_lr_on_plateau", "--eval_rows", 2), "not supported with --dp"),
    ],
)
def test_bad_flags(models, dataset, tmp_path, flags, words):
    line = ["-m", models["neox"], "-i", dataset, "--output_root", tmp_path / "out", "--dp", *flags]
    with pytest.raises(UserError) as found:
        fine_tune(parse(*line))
    assert words in str(found.value) and not (tmp_path / "out").exists()


def test_dp_flags_without_dp(models, dataset, tmp_path):
    with pytest.raises(UserError, match="--noise_multiplier, --secure_rng: only with --dp"):
        make_plan(parse("-m", models["neox"], "-i", dataset, "--noise_multiplier", 1, "--secure_rng"))


# ---------------------------------------------------------------------------------------------------------------------
# The audit


def planted(models, tmp_path, bound_holds: bool, monkeypatch) -> tuple[dict, float]:
    """(one-run audit, the accountant's ε): 200 canaries of random tokens, each inserted once with probability ½;
    the score is the decrease of the canary's loss."""
    import torch

    from canary import audit
    from training import dp

    if not bound_holds:
        original = dp.PerExample.clip_into
        monkeypatch.setattr(dp.PerExample, "clip_into", lambda self, total, bound: original(self, total, math.inf))
    rng = np.random.default_rng(11)
    texts = [" ".join(rng.permutation(["amber", "birch", "cedar", "dune", "ember", "flint"])) for _ in range(200)]
    texts = [f"{rng.integers(10**6, 10**7)} {text}" for text in texts]
    included = rng.random(200) < 0.5
    rows = [{"text": text} for text, chosen in zip(texts, included) if chosen]
    file = write_rows(tmp_path / "planted.jsonl", rows)
    words = ["-m", models["llama"], "-i", file, "--output_root", tmp_path, "-e", 120, "-pdbs", 64, "--lora_r", 32,
             "-lr", 0.01, "--lora_dropout", 0, "--dp", "--target_epsilon", 1, "--target_delta", 1e-5, "--seed", 2,
             "--logical_batch_size", 50, "--max_grad_norm", 0.0001, "-l", 1000]  # fmt: skip
    folder = fine_tune(parse(*words))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models["llama"]), checkpoints(folder)[-1]
    ).eval()

    def loss(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        return tuned(input_ids=ids, labels=ids).loss.item()

    with torch.no_grad():
        after = [loss(text) for text in texts]
        with tuned.disable_adapter():
            before = [loss(text) for text in texts]
    block = json.loads((folder / "run.json").read_text())["privacy"]
    return audit.one_run(np.subtract(before, after), included, block["delta"]), block["epsilon"]


@pytest.mark.slow
def test_the_audit_stays_below_epsilon(models, tmp_path, monkeypatch):
    found, epsilon = planted(models, tmp_path, True, monkeypatch)
    assert 0.9 < epsilon <= 1 and found["epsilon"] <= epsilon


@pytest.mark.slow
def test_the_audit_catches_training_that_does_not_clip(models, tmp_path, monkeypatch):
    found, epsilon = planted(models, tmp_path, False, monkeypatch)
    assert 0.9 < epsilon <= 1 and found["epsilon"] > epsilon
