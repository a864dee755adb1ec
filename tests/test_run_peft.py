"""run_peft.py: the adapters it trains, what a step is, resuming, refusing; on tiny real models."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ARCHITECTURES, ROOT, make_rows, read_lines, run_script, write_manifest, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import run_peft
from common import dataset as data_files
from common import formats
from common.models import find_model
from common.problems import UserError
from common.process import entry
from training import batches, checkpoint, verify
from training.checkpoint import checkpoints
from training.plan import choose_rows, rate_name, run_folder
from training.run import run as fine_tune
from training.trainer import Trainer
from training.verify import PROBE_ROWS, PROBE_TOKENS

SGD = ("-opt", "sgd", "--lora_dropout", "0", "--max_grad_norm", "inf")


def train(out, model, data, *flags):
    """Run run_peft.py in process; 40 rows, global batch 8 unless flags say otherwise. Returns the run directory."""
    words = ["-m", model, "-i", data, "--output_root", out, "--lora_r", 4, "-e", 1, "-pdbs", 4, "-gas", 2, *flags]
    return fine_tune(run_peft.make_parser().parse_args([str(word) for word in words]))


def adapter(folder):
    """{name: tensor} of the newest checkpoint of a run directory."""
    from safetensors.torch import load_file

    return load_file(checkpoints(folder)[-1] / "adapter_model.safetensors")


def furthest(one: dict, other: dict) -> float:
    assert one.keys() == other.keys() and one
    return max((one[name] - other[name]).abs().max().item() for name in one)


def base_of(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def metrics(folder):
    """metrics.jsonl without the time."""
    return [{key: item for key, item in line.items() if key != "time"} for line in read_lines(folder / "metrics.jsonl")]


# --- peft types × architectures


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ("lora", "dora", "pissa"))
def test_trained_adapter_loads_on_the_original_base(kind, arch, models, dataset, tmp_path, monkeypatch):
    """Loss falls; stock PEFT on the original base gives the logits of the model in memory; adapter off = base."""
    import torch
    from peft import PeftModel

    from training import loop

    seen, original = {}, loop.train

    def watched(training, *rest):
        seen["start"] = verify.probe(training)
        original(training, *rest)
        seen["end"] = verify.probe(training)
        rows = [row.ids[:PROBE_TOKENS] for row in training.plan.train[:PROBE_ROWS]]
        width = max(map(len, rows))
        seen["input_ids"] = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])

    monkeypatch.setattr(loop, "train", watched)
    folder = train(tmp_path, models[arch], dataset, "-pt", kind, "-lr", "1e-2", "-e", 2)
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-5", "checkpoint-10"]
    wanted = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (folder / "checkpoint-5").iterdir()} == wanted
    assert {path.name for path in (folder / "checkpoint-10").iterdir()} == wanted | {"training_state.pt"}
    config = json.loads((folder / "checkpoint-10" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models[arch])
    assert (config["r"], config["lora_alpha"]) == ((8, 32.0) if kind == "pissa" else (4, 16.0))

    base = base_of(models[arch])
    keep = torch.tensor(
        [[token != 0 for token in row] for row in seen["input_ids"].tolist()]
    )  # id 0 is EOS and padding
    with torch.no_grad():
        bare = base(seen["input_ids"]).logits
        peft_model = PeftModel.from_pretrained(base, folder / "checkpoint-10").eval()
        attached = peft_model(seen["input_ids"]).logits
        with peft_model.disable_adapter():
            off = peft_model(seen["input_ids"]).logits
    assert torch.equal(off, bare)
    # The untrained model is the base (PiSSA: up to the rounding of W − BA + BA); logits are of size 10
    torch.testing.assert_close(seen["start"][keep], bare[keep], atol=2e-4, rtol=0)
    torch.testing.assert_close(seen["end"][keep], attached[keep], atol=2e-4, rtol=0)
    assert (attached - bare)[keep].abs().max() > 0.1


def test_run_json_and_checks(models, dataset, tmp_path):
    folder = train(tmp_path, models["neox"], dataset, "-lr", "1e-3", "--eval_rows", 5, "-l", 2)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "ok" and record["steps"] == record["updates"] == 5
    assert record["inputs"][0]["sha256"] and record["tokens_per_second"] > 0 and record["global_batch"] == 8
    assert 0 < record["relative_change"] < 0.1
    lines = read_lines(folder / "metrics.jsonl")
    held = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held] == [0, 5] and held[1]["eval_loss"] < held[0]["eval_loss"]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 5]
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "time"}
    assert steps[-1]["tokens"] == record["tokens"]


def test_held_out_loss_is_the_mean_over_tokens(models, dataset, tmp_path):
    """Against Hugging Face's own loss, row by row, on the untrained model (lr 0)."""
    import torch

    folder = train(tmp_path, models["llama"], dataset, "-lr", "0", "--eval_rows", 7)
    base, tokenizer = base_of(models["llama"]), _tokenizer(models["llama"])
    total = count = 0
    for row in formats.read_rows(dataset)[:7]:
        ids = torch.tensor([tokenizer(data_files.row_text(row)[0])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            total += base(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    line = read_lines(folder / "metrics.jsonl")[0]
    assert line["eval_tokens"] == count
    assert line["eval_loss"] == pytest.approx(total / count, abs=1e-4)


def as_trained(rows):
    return data_files.render("rows", rows, range(len(rows)), None)


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# --- what a step is


def test_one_step_is_the_mean_over_all_label_tokens(models, tmp_path):
    """One SGD step equals a plain loop: each row alone, Hugging Face's loss, tokens weighted over the global batch."""
    import torch
    from peft import PeftModel

    data = write_rows(tmp_path / "rows.jsonl", [{"text": row["prompt"]} for row in make_rows(6, seed=5)])
    start = train(tmp_path / "zero", models["neox"], data, "-lr", "0", *SGD)
    folder = train(tmp_path / "one", models["neox"], data, "-lr", "0.1", *SGD)
    assert read_lines(folder / "metrics.jsonl")[-1]["step"] == 1
    model = PeftModel.from_pretrained(base_of(models["neox"]), start / "checkpoint-1", is_trainable=True)
    tokenizer = _tokenizer(models["neox"])
    rows = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in formats.read_rows(data)]
    labels = sum(len(ids) - 1 for ids in rows)
    for ids in rows:
        batch = torch.tensor([ids])
        (model(batch, labels=batch).loss * (len(ids) - 1) / labels).backward()
    after = adapter(folder)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = parameter.detach() - 0.1 * parameter.grad
            torch.testing.assert_close(after[name.replace(".default", "")], wanted, atol=1e-6, rtol=1e-5)


def test_micro_batches_do_not_change_the_update(models, dataset, tmp_path):
    """pdbs 1 × gas 8 = pdbs 8 × gas 1 = checkpointed, with 37 rows (the last step has 5). SGD: 1e-6."""
    one = train(tmp_path / "a", models["opt"], dataset, "-lr", "0.1", "--train_rows", 37, "-pdbs", 1, "-gas", 8, *SGD)
    eight = train(tmp_path / "b", models["opt"], dataset, "-lr", "0.1", "--train_rows", 37, "-pdbs", 8, "-gas", 1, *SGD)
    assert furthest(adapter(one), adapter(eight)) < 1e-6
    again = train(
        tmp_path / "c", models["opt"], dataset, "-lr", "0.1", "--train_rows", 37, "--gradient_checkpointing", *SGD
    )
    assert furthest(adapter(one), adapter(again)) < 1e-6
    assert [line["step"] for line in metrics(one)] == [1, 2, 3, 4, 5]
    for left, right in zip(metrics(one), metrics(eight)):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5) and left["tokens"] == right["tokens"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_rows_do_not_see_each_other(arch, models, dataset, tmp_path):
    """One step over all rows: packed and unpacked give the same adapter (SGD, 1e-6) and the same loss."""
    flags = ("-lr", "0.1", "-gas", 10, *SGD)
    plain = train(tmp_path / "plain", models[arch], dataset, *flags)
    packed = train(tmp_path / "packed", models[arch], dataset, "--packing", *flags)
    sequences = json.loads((packed / "run.json").read_text())["rows"]["sequences"]
    assert sequences < 40 and len(metrics(packed)) == 1
    assert furthest(adapter(plain), adapter(packed)) < 1e-6
    assert metrics(plain)[0]["loss"] == pytest.approx(metrics(packed)[0]["loss"], abs=1e-5)


def test_packing_with_eager_attention(models, tmp_path, dataset):
    """The additive mask of eager attention gives what the boolean mask of SDPA gives."""
    import torch

    rows = batches.encode(as_trained(formats.read_rows(dataset)[:4]), _tokenizer(models["neox"]), 256)
    logits = {}
    for attention in ("sdpa", "eager"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(models["neox"], attn_implementation=attention).eval()
        batch = batches.collate([rows[:2], rows[2:]], 0, packed=True, additive=attention == "eager")
        batch.pop("targets")
        with torch.no_grad():
            logits[attention] = model(**batch).logits
    torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=1e-4, rtol=0)


def test_eos_is_learned_once_per_row_and_padding_never(models):
    """pad = EOS here: the targets still hold exactly one EOS per row and no padding."""
    tokenizer = _tokenizer(models["neox"])
    texts = ["Dear Ann, thank you.", "Yes.", "See you at noon, then.<|endoftext|>"]
    rows = batches.encode(as_trained([{"text": text} for text in texts]), tokenizer, 64)
    batch = batches.collate([[row] for row in rows], tokenizer.eos_token_id)
    eos = tokenizer.eos_token_id
    assert (batch["targets"] == eos).sum() == 3
    assert len(batch["targets"]) == sum(len(row.ids) - 1 for row in rows) == batch["logits_to_keep"].sum()
    width = batch["input_ids"].shape[1]
    for line, row in enumerate(rows):
        assert batch["logits_to_keep"][line].tolist() == [place < len(row.ids) - 1 for place in range(width)]
    # a row that is cut off has not ended: no EOS
    cut_off = batches.encode(as_trained([{"text": texts[0]}]), tokenizer, 4)[0]
    assert len(cut_off.ids) == 4 and eos not in cut_off.ids


def test_loss_on_completion(models, dataset, tmp_path):
    tokenizer = _tokenizer(models["neox"])
    for row in formats.read_rows(dataset)[:20]:
        encoded = batches.encode(as_trained([row]), tokenizer, 1000, "completion")[0]
        learned = tokenizer.decode(encoded.ids[encoded.spans[0][0] :])
        # the token that holds the boundary is learned whole, so up to its length more than the continuation
        assert learned.endswith(row["continuation"] + "<|endoftext|>")
        shorter = tokenizer.decode(encoded.ids[encoded.spans[0][0] + 1 :])
        assert not shorter.endswith(row["continuation"] + "<|endoftext|>")
    folder = train(tmp_path, models["neox"], dataset, "--loss_on", "completion", "-lr", "1e-3")
    assert checkpoints(folder)
    bare = write_rows(tmp_path / "bare.jsonl", [{"text": "no prompt part"}] * 5)
    with pytest.raises(UserError, match=r"bare.jsonl: row 0 \(and 4 more\) has no prompt"):
        train(tmp_path, models["neox"], bare, "--loss_on", "completion")


# --- plan (pure functions)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 3))
def test_micro_batches_cover_the_step_at_least_cost(lengths, most, ranks):
    groups = batches.cut(lengths, most)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert max(map(len, groups)) <= most

    def cost(parts):
        return sum(len(part) * max(lengths[place] for place in part) + batches.CALL_COST for part in parts)

    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    best = min(  # every way to cut the sorted rows
        (cost(parts) for mask in range(1 << (len(order) - 1)) if max(map(len, parts := _parts(order, mask))) <= most),
    )
    assert cost(groups) == best
    step = list(range(len(lengths)))
    hands = batches.micro_batches(step, lengths, most, ranks)
    assert len(hands) == ranks and len({len(hand) for hand in hands}) == 1
    assert sorted(index for hand in hands for group, weight in hand if weight for index in group) == step


def _parts(order, mask):
    parts = [[order[0]]]
    for place, item in enumerate(order[1:]):
        if mask >> place & 1:
            parts.append([item])
        else:
            parts[-1].append(item)
    return parts


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_epoch_batches(n, global_batch, seed, epoch):
    steps = list(batches.epoch_batches(n, global_batch, seed, epoch))
    assert sorted(index for step in steps for index in step) == list(range(n))
    assert len(steps) == -(-n // global_batch) and all(len(step) == global_batch for step in steps[:-1])
    assert steps == list(batches.epoch_batches(n, global_batch, seed, epoch))
    if n > 20:
        assert steps != list(batches.epoch_batches(n, global_batch, seed, epoch + 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=40))
def test_pack(lengths):
    sequences = batches.pack(lengths, 64)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    fill = [sum(lengths[index] for index in sequence) for sequence in sequences]
    assert max(fill) <= 64
    assert sum(one <= 32 for one in fill) <= 1  # two half-empty sequences would have been one


# --- ranks, targets, full, mp


def test_rank_above_a_layers_side(models, dataset, tmp_path):
    """r 64 in a model of width 32: rank_pattern, and stock PEFT reloads it."""
    import torch
    from peft import PeftModel

    folder = train(tmp_path, models["neox"], dataset, "-lr", "1e-3", "-pt", "pissa", "--lora_r", 64)
    config = json.loads((folder / "checkpoint-5" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {64}  # twice the side of 32, as every PiSSA rank
    model = PeftModel.from_pretrained(base_of(models["neox"]), folder / "checkpoint-5")
    assert not torch.equal(
        model(torch.tensor([[5, 6, 7]])).logits, base_of(models["neox"])(torch.tensor([[5, 6, 7]])).logits
    )


def test_target_modules(models, dataset, tmp_path):
    folder = train(tmp_path, models["llama"], dataset, "-lr", "1e-3", "--target_modules", "q_proj", "v_proj")
    assert {name.split(".")[-3] for name in adapter(folder)} == {"q_proj", "v_proj"}
    everything = train(tmp_path / "all", models["llama"], dataset, "-lr", "1e-3")
    names = {name.split(".")[-3] for name in adapter(everything)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # no lm_head
    with pytest.raises(UserError, match="--target_modules qproj: no such linear layer; choose from down_proj"):
        train(tmp_path, models["llama"], dataset, "--target_modules", "qproj", "v_proj")


@pytest.mark.parametrize("arch", ("neox", "opt"))
def test_full_fine_tuning(arch, models, dataset, tmp_path):
    """The checkpoint is a model that transformers loads and whose loss fell (OPT's head is tied to its embedding)."""
    folder = train(tmp_path, models[arch], dataset, "-pt", "full", "-lr", "1e-3", "--eval_rows", 5, "-e", 2)
    held = [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line]
    assert held[-1] < held[0] - 0.5
    assert {path.name for path in (folder / "checkpoint-5").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    again = train(tmp_path / "again", folder / "checkpoint-10", dataset, "-pt", "lora", "-lr", "0", "--eval_rows", 5)
    assert metrics(again)[0]["eval_loss"] == pytest.approx(held[-1], abs=1e-5)


def test_mp_equals_one_process(models, dataset, tmp_path, monkeypatch, capsys):
    plain = train(tmp_path / "ddp", models["neox"], dataset, "-lr", "0.1", *SGD)
    spread = train(tmp_path / "mp", models["neox"], dataset, "-lr", "0.1", "-dt", "mp", *SGD)
    assert furthest(adapter(plain), adapter(spread)) == 0
    assert "mp: one device here" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="runs as a single process, not 2"):
        train(tmp_path, models["neox"], dataset, "-dt", "mp")


def test_half_precision_keeps_the_adapter_in_float32(models, dataset, tmp_path):
    import torch

    folder = train(tmp_path, models["llama"], dataset, "-lr", "1e-3", "--dtype", "bfloat16", "--train_rows", 8)
    assert {tensor.dtype for tensor in adapter(folder).values()} == {torch.float32}
    assert json.loads((folder / "run.json").read_text())["dtype"] == "bfloat16"


# --- resuming

FLAGS = ("-lr", "1e-3", "-e", 3, "-l", 3, "--eval_rows", 3)  # 15 steps, dropout 0.05

KILLED = """
import os, signal, sys
import run_peft
from training.trainer import Trainer
original = Trainer.step
def step(self):
    done = original(self)
    if self.count["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
Trainer.step = step
run_peft.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def uninterrupted(models, dataset, tmp_path_factory):
    """{'lora': run directory, 'pissa': …} of runs with FLAGS that nothing interrupted."""
    root = tmp_path_factory.mktemp("uninterrupted")
    return {kind: train(root, models["neox"], dataset, "-pt", kind, *FLAGS) for kind in ("lora", "pissa")}


def check_same_run(one, other):
    """Every checkpoint and metrics.jsonl are equal, bit for bit."""
    from safetensors.torch import load_file

    assert [path.name for path in checkpoints(one)] == [path.name for path in checkpoints(other)]
    for left, right in zip(checkpoints(one), checkpoints(other)):
        file = "adapter_model.safetensors"
        assert furthest(load_file(left / file), load_file(right / file)) == 0
    assert metrics(one) == metrics(other)
    assert json.loads((other / "run.json").read_text())["status"] == "ok"
    assert not (other / "interrupted").exists() and not list(other.glob(".*"))


def test_killed_run_resumes_bit_exactly(models, dataset, tmp_path, uninterrupted):
    """kill -9 after step 7 of 15 (the last checkpoint is at 5), then --resume."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    words = [
        "-m",
        models["neox"],
        "-i",
        dataset,
        "--output_root",
        tmp_path,
        "--lora_r",
        4,
        "-pdbs",
        4,
        "-gas",
        2,
        *FLAGS,
    ]
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = run_folder(run_peft.make_parser().parse_args([str(word) for word in words]), "enron")
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-5"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a write may have been cut
    with pytest.raises(
        UserError, match=r"an unfinished run \(--resume\) with different arguments \(--epochs 3 there, 4 here\)"
    ):
        train(tmp_path, models["neox"], dataset, *FLAGS, "-e", 4, "--resume")
    begun = (folder / "run.json").read_text()
    elsewhere = json.dumps(json.loads(begun) | {"dtype": "bfloat16"})
    (folder / "run.json").write_text(elsewhere)
    with pytest.raises(
        UserError, match="--dtype auto: is float32 on this machine, but the unfinished run uses bfloat16"
    ):
        train(tmp_path, models["neox"], dataset, *FLAGS, "--resume")
    assert (folder / "run.json").read_text() == elsewhere
    (folder / "run.json").write_text(begun)
    assert train(tmp_path, models["neox"], dataset, *FLAGS, "--resume") == folder
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == 5
    check_same_run(uninterrupted["lora"], folder)


@pytest.mark.parametrize("at", (7, 10))
def test_sigterm_saves_and_resumes(at, models, dataset, tmp_path, uninterrupted, monkeypatch):
    """SIGTERM in the middle of an epoch (7 of 5 + 5 + 5) and at its last step (10): exit 143, then bit-exact."""
    original = Trainer.step

    def step(self):
        if self.count["step"] + 1 == at and self.plan.start != "resume":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    words = ["-m", models["neox"], "-i", dataset, "--output_root", tmp_path, "--lora_r", 4, "-pdbs", 4, "-gas", 2]
    words = [str(word) for word in [*words, *FLAGS, "-pt", "pissa"]]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert entry(lambda: run_peft.main(words)) == 143
    folder = run_folder(run_peft.make_parser().parse_args(words), "enron")
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed" and record["error"].startswith("Interrupted")
    assert (folder / "interrupted" / "adapter_model.safetensors").is_file() == (at == 7)
    assert run_peft.main([*words, "--resume"]) == 0
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == at
    check_same_run(uninterrupted["pissa"], folder)


def test_run_killed_while_saving_resumes(models, dataset, tmp_path, uninterrupted, monkeypatch):
    """Whatever part of a checkpoint was written when the run died, it is not taken for a checkpoint."""
    original = checkpoint.publish

    def publish(trainer, folder, weights):
        original(trainer, folder, weights)
        if trainer.count["step"] == 10:
            (folder.parent / ".checkpoint-10.x.tmp").mkdir()  # what a kill -9 leaves
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", publish)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, models["neox"], dataset, *FLAGS)
    folder = train(tmp_path, models["neox"], dataset, *FLAGS, "--resume")
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == 5
    check_same_run(uninterrupted["lora"], folder)


def test_unfinished_run_starts_over_without_resume(models, dataset, tmp_path, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda self: 1 / 0 if self.count["step"] == 10 else (1.0, 1))
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, models["neox"], dataset, *FLAGS)
    folder = train(tmp_path, models["neox"], dataset, *FLAGS)
    assert "resumed_from" not in json.loads((folder / "run.json").read_text())
    check_same_run(uninterrupted["lora"], folder)


def test_nan_loss_stops_the_run(models, dataset, tmp_path):
    """A learning rate that explodes: the step is named, the checkpoint before stays, run.json says failed."""
    words = ("-lr", "1e30", "-opt", "sgd", "-gas", 10, "-e", 3)
    with pytest.raises(
        FloatingPointError, match=r"^step 2: the loss is nan; the last good checkpoint is .*checkpoint-1$"
    ):
        train(tmp_path, models["neox"], dataset, *words)
    folder = tmp_path / "tiny-neox" / "enron-lora" / "0e+00_1e+30"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed" and "step 2" in record["error"]
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1"]
    assert len(metrics(folder)) == 1


def test_adapter_that_did_not_move_is_an_error(models, dataset, tmp_path, monkeypatch):
    """Trap 6: the loss was taken and the optimizer stepped, but what is saved is the initial adapter."""
    monkeypatch.setattr("torch.optim.SGD.step", lambda self, closure=None: None)
    with pytest.raises(RuntimeError, match="the adapter is unchanged after 1 steps"):
        train(tmp_path, models["neox"], dataset, "-lr", "0.1", "-gas", 10, *SGD)


@pytest.mark.parametrize("kind", ("lora", "pissa"))
def test_damaged_checkpoint_is_an_error(kind, models, dataset, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    original = verify.check_saved

    def check(trainer, folder):
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
        original(trainer, folder)

    monkeypatch.setattr(verify, "check_saved", check)
    with pytest.raises(RuntimeError, match="reloaded, its logits differ from the model in memory"):
        train(tmp_path, models["neox"], dataset, "-lr", "1e-2", "-pt", kind)


# --- names, finished runs, dry runs, trackers


@pytest.mark.parametrize(
    ("value", "name"),
    ((2e-6, "2e-06"), (0.0, "0e+00"), (1e-4, "1e-04"), (2.5e-6, "2.5e-06"), (0.00123, "1.23e-03"), (1.0, "1e+00")),
)
def test_rate_name(value, name):
    assert rate_name(value) == name and float(name) == value


def test_run_folder(models, tmp_path):
    """The example of the contract, and what a manifest, a hub name and --run_name change."""

    def folder(*words):
        return run_folder(run_peft.make_parser().parse_args([str(word) for word in words]), "self-generated-pythia-12b")

    assert str(folder()) == "pythia-1.4b/self-generated-pythia-12b-lora/0e+00_2e-06"
    named = folder(
        "-m", models["opt"], "-wd", "0.1", "-lr", "2.5e-4", "-pt", "dora", "--run_name", "s1", "--output_root", "/o"
    )
    assert str(named) == "/o/tiny-opt/self-generated-pythia-12b-dora/1e-01_2.5e-04-s1"


def test_manifest_names_the_data(models, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", make_rows(12))
    write_manifest(data, tag="replaced", script="x", argv=[], rows=12)
    folder = train(tmp_path, models["neox"], data, "-lr", "1e-3")
    assert folder == tmp_path / "tiny-neox" / "replaced-lora" / "0e+00_1e-03"


def test_finished_run(models, dataset, tmp_path, capsys):
    folder = train(tmp_path, models["neox"], dataset, "-lr", "1e-3")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train(tmp_path, models["neox"], dataset, "-lr", "1e-3", "-l", 5) == folder  # logging is not the result
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        train(tmp_path, models["neox"], dataset, "-lr", "1e-3", "-e", 2, "--lora_alpha", 8)
    assert error.value.problems == [
        f"{folder}: has a finished run with different arguments (--epochs 1 there, 2 here; "
        "--lora_alpha 16 there, 8.0 here); set --run_name"
    ]
    changed = write_rows(tmp_path / "enron.jsonl", make_rows(60, seed=1))
    with pytest.raises(UserError, match="input's content"):
        train(tmp_path, models["neox"], changed, "-lr", "1e-3")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_dry_run(models, dataset, tmp_path, capsys):
    train(tmp_path / "out", models["neox"], dataset, "--dry_run", "-e", 3, "--eval_rows", 4)
    said = capsys.readouterr().out
    assert "40 training rows, 4 held out" in said and "5 per epoch × 3 epochs, global batch 8" in said
    assert str(tmp_path / "out" / "tiny-neox" / "enron-lora" / "0e+00_2e-06") in said
    assert not (tmp_path / "out").exists()


def test_rows_and_overlap(models, dataset, tmp_path):
    rows = formats.read_rows(dataset)

    def choose(rows, manifest, *words):
        args = run_peft.make_parser().parse_args([str(word) for word in words])
        return tuple(map(list, choose_rows(args, "f", rows, manifest)))

    assert choose(rows, None) == (list(range(20, 60)), [])
    assert choose(rows, None, "--train_rows", 10, "--eval_rows", 2) == (list(range(50, 60)), [0, 1])
    with pytest.raises(UserError, match=r"f: 10 of the 50 training rows \(first: row 10\) are evaluated"):
        choose(rows, None, "--train_rows", 50)
    assert choose(rows, None, "--train_rows", 50, "--allow_overlap")[0] == list(range(10, 60))
    generated = [{"text": "x", "row_id": index} for index in range(30)]
    assert choose(generated, None, "--eval_rows", 5) == (list(range(5, 30)), [0, 1, 2, 3, 4])
    with pytest.raises(UserError, match=r"f: 20 of the 30 training rows \(first: row 0\) are evaluated"):
        choose(generated, {"split_start": 20})
    assert choose(generated, {"split_start": 20}, "--train_rows", 10)[0] == list(range(20, 30))
    with pytest.raises(UserError, match="share rows"):
        choose(generated, None, "--train_rows", 28, "--eval_rows", 5)


def test_tensorboard(models, dataset, tmp_path):
    folder = train(tmp_path, models["neox"], dataset, "-lr", "1e-3", "--report_to", "tensorboard")
    assert list(folder.rglob("events.out.tfevents.*"))


def test_every_problem_at_once(models, dataset, tmp_path, capsys):
    """Exit 2, one line per problem, nothing written, no model loaded."""
    words = ["-m", tmp_path / "absent", "-i", tmp_path / "none.jsonl", "-opt", "adam", "-s", "linar", "-pt", "pissa"]
    words += ["--lora_dropout", "0.1", "--report_to", "tensorboard,wanb", "--device_map", "auto", "--run_name", "a/b"]
    words += ["--output_root", tmp_path / "out"]
    with pytest.raises(UserError) as error:
        run_peft.main([str(word) for word in words])
    starts = [line.split(":")[0] for line in error.value.problems]
    assert sorted(starts) == sorted(
        [
            f"--model {tmp_path / 'absent'}",
            f"{tmp_path / 'none.jsonl'}",
            "--optimizer adam",
            "--scheduler linar",
            "--lora_dropout 0.1",
            "--report_to wanb",
            "--device_map auto",
            "--run_name 'a/b'",
        ]
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    (
        (["-opt", "adamw_bnb_8bit"], "--optimizer adamw_bnb_8bit: You need to install `bitsandbytes`"),
        (["-opt", "galore_adamw"], "--optimizer galore_adamw: replaces the training loop"),
        (["-s", "cosine_with_min_lr"], "--scheduler cosine_with_min_lr: One of min_lr"),
        (["-s", "reduce_lr_on_plateau"], "--scheduler reduce_lr_on_plateau: depends on the held-out loss"),
        (["--scheduler_kwargs", "[1]"], "--scheduler_kwargs [1]: must be a JSON object"),
        (
            ["--run_name", "=1+1"],
            "--run_name '=1+1': use only letters, digits and . + = _ -, not starting with a sign",
        ),
        (["--run_name", "a\n"], r"--run_name 'a\n': use only letters"),
        (["--run_name=-x"], "--run_name '-x': use only letters"),
        (["--train_rows", "61"], "--train_rows 61:"),
        (["--eval_rows", "21"], "--eval_rows 21: only 20 rows"),
        (["--max_length", "1"], "no tokens left to train on"),
        (["-dt", "fsdp", "-pt", "full", "--dtype", "float16"], "--dtype float16: full fine-tuning under fsdp"),
    ),
)
def test_refused(words, line, models, dataset, tmp_path):
    with pytest.raises(UserError) as error:
        train(tmp_path / "out", models["neox"], dataset, *words)
    assert len(error.value.problems) == 1 and line in error.value.problems[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    (
        ["-opt", "adafactor"],
        ["-opt", "rmsprop", "-s", "cosine", "-w", 2],
        ["-s", "reduce_lr_on_plateau", "--eval_rows", 3],
        ["-s", "cosine_with_min_lr", "--scheduler_kwargs", '{"min_lr": 1e-5}'],
        ["-s", "warmup_stable_decay", "-w", 1, "--scheduler_kwargs", '{"num_decay_steps": 2}'],
    ),
)
def test_optimizers_and_schedules_of_transformers(words, models, dataset, tmp_path):
    folder = train(tmp_path, models["neox"], dataset, "-lr", "1e-3", "--train_rows", 16, *words)
    rates = [line["lr"] for line in metrics(folder) if "lr" in line]
    assert len(rates) == 2 and (rates[0] == 0) == ("-w" in words)


def test_an_adapter_is_no_base(adapters, dataset, tmp_path):
    with pytest.raises(UserError, match="is an adapter; merge it into its base first"):
        train(tmp_path, adapters["neox", "lora"], dataset)


def test_as_a_user_runs_it(models, dataset, tmp_path):
    """By path from another directory; then again with a wrong file: exit 2, one line, no usage text, no traceback."""
    words = ["-m", models["neox"], "-i", dataset, "--output_root", tmp_path, "--lora_r", 4, "-lr", "1e-3", "-e", 1]
    done = run_script("run_peft.py", *words)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-5" in done.stdout
    words[3] = tmp_path / "none.jsonl"
    done = run_script("run_peft.py", *words)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}/none.jsonl: no such file; give a {formats.FORMATS} file\n"


def test_a_finished_run_of_a_base_that_has_changed_is_refused(models, dataset, tmp_path):
    """The name of the base is the same, its weights are not: the adapter belongs to the old ones."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(models["llama"], tmp_path / "base")
    folder = train(tmp_path, base, dataset, "-e", 1)
    assert train(tmp_path, base, dataset, "-e", 1) == folder
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "embed" in name)
    save_file(weights | {name: weights[name] + 1}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"a finished run with different arguments.*base's weights"):
        train(tmp_path, base, dataset, "-e", 1)
    checkpoint = str(checkpoints(folder)[-1])
    assert find_model(checkpoint, base_model=str(models["llama"]))  # the old weights, elsewhere
    with pytest.raises(UserError, match=r"not the weights that .* was trained on"):
        find_model(checkpoint, base_model=str(base))
