"""--model_parallel: a model spread over the ranks of a group is the whole model, bit for bit, for every family; every
script gives what one process gives; a rank that fails ends its group.

Scripts run on four gloo ranks as two groups of two, several commands in one launch (a launch costs seconds).
"""

import importlib
import json
import subprocess

import pytest
import torch
from conftest import ARCHITECTURES, ROOT, make_rows, read_lines, run_script, write_rows
from families import FAMILIES, make_family
from test_auditing import SMALL
from test_auditing import rows as planted_rows
from test_canary import learned
from test_mia import same_scores
from test_self_instruct import DRIVER, quick, tiny
from test_synthetic import held_out

from common import adapters as common_adapters
from common import distributed, formats, sampling, sharding
from common import models as common_models
from common.problems import Problems, UserError

__all__ = ["held_out", "learned", "planted_rows", "tiny"]  # fixtures


# ---------------------------------------------------------------- refused in one line


@pytest.mark.parametrize(
    ("processes", "words"),
    (
        (1, "--model_parallel 3: there is only one process; start with torchrun --nproc_per_node=3"),
        (4, "--model_parallel 3: does not divide the 4 processes; start a multiple of it"),
    ),
)
def test_groups_that_do_not_come_out_are_refused(monkeypatch, models, tmp_path, processes, words):
    place = {"RANK": "0", "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    problems = Problems()
    distributed.check_environment(problems, None, 3)
    assert len(problems.lines) == 1 and problems.lines[0].startswith(words)
    with pytest.raises(UserError, match=words.partition(";")[0]):
        main_of("measure_purified")(
            ["--model", str(models["llama"]), "--output_dir", str(tmp_path / "x"), "--model_parallel", "3"]
        )
    assert not (tmp_path / "x").exists()


def test_a_merged_model_cannot_be_saved_from_its_parts(monkeypatch, adapters, dataset, tmp_path):
    with pytest.raises(UserError, match="--save_merged: no process holds the whole model"):
        main_of("evaluate_purified")(
            ["--model", str(adapters["llama", "lora"]), "-d", str(dataset), "--save_merged", "--model_parallel", "2"]
        )


# ---------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def group():
    """A group of one rank, in this process: its layers are dropped and gathered like those of several."""
    import torch.distributed as dist

    world = distributed.start(group_of_one=True)
    yield sharding.Group(0, 1, "cpu", dist.new_group([0]), dist.new_group([0], backend="gloo"))
    world.close()


def load(folder):
    return common_models.load_base(common_models.find_model(str(folder)), torch.float32, "cpu")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_is_bit_for_bit_the_whole_model(group, tmp_path, name):
    model = load(make_family(tmp_path, name))
    ids = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    n = sum(item.numel() for item in model.parameters())
    sharding.spread(model, group)
    layers = sharding.layers_of(model)
    spread = [item for layer in layers for item in layer.parameters]
    assert all(item.isnan().all() and item.untyped_storage().nbytes() <= 4 for item in spread)
    assert sum(item.numel() for item in spread) > 0.3 * n  # of these tiny models, the rest is embeddings
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)  # the buffers have been used before
    assert all(item.isnan().all() for item in spread)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sampler_and_gradients_of_a_spread_model(group, adapters, models, arch):
    """Answers, and the gradient of every adapter matrix with the base's layers dropped between forward and backward."""
    found = []
    for spread in (False, True):
        model = load(models[arch])
        if spread:
            sharding.spread(model, group)
        stop = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        prompts = [[5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 11, 12]]
        options = {"top_k": 50, "max_tokens": 8, "seed": 3, "stop": stop}
        keys = [(0, 0), (1, 0), (2, 0)]
        answers = [one.tokens for one in sampling.sweep(model, prompts, keys, [0.0, 1.0], **options)]
        with common_adapters.adapted(model, adapters[arch, "lora"], merge=False) as (attached, _):
            parameters = [item.requires_grad_(True) for name, item in attached.named_parameters() if "lora_" in name]
            with torch.enable_grad():
                logits = attached(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
                gradients = torch.autograd.grad(logits.log_softmax(-1)[0, :, 9].sum(), parameters)
        found.append((answers, gradients))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("kind", ("lora", "dora"))
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("merge", (True, False))
def test_adapters_on_a_spread_model(group, adapters, models, arch, kind, merge):
    """Merged (layer by layer) or attached: the logits and ‖ΔW‖/‖W‖ of the whole model; afterwards the base is back."""
    ids, found = torch.tensor([[5, 6, 7, 8, 9, 10]]), []
    for spread in (False, True):
        model = load(models[arch])
        if spread:
            sharding.spread(model, group)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            with common_adapters.adapted(model, adapters[arch, kind], merge) as (adapted, change):
                logits = adapted(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, before) and not torch.equal(logits, before)
        found.append((logits, change))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_an_adapter_with_whole_modules_inside_the_layers(group, models, tmp_path):
    """peft copies such a module from the base, where it is NaN, and fills it from the adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["post_attention_layernorm", "lm_head"])
    made = get_peft_model(load(models["llama"]), config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    made.save_pretrained(tmp_path)
    ids, found = torch.tensor([[5, 6, 7, 8]]), []
    for merge in (True, False):
        for spread in (False, True):
            model = load(models["llama"])
            if spread:
                sharding.spread(model, group)
            with torch.no_grad():
                before = model(input_ids=ids).logits
                with common_adapters.adapted(model, tmp_path, merge) as (adapted, _):
                    found.append(adapted(input_ids=ids).logits)
                assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


def test_a_model_whose_layers_are_read_from_outside_is_refused(group, models):
    model = load(models["llama"])
    forward = type(model).forward

    class Peeking(type(model)):
        def forward(self, *args, **options):
            out = forward(self, *args, **options)
            out.logits = out.logits + self.model.layers[0].mlp.down_proj.weight.sum()
            return out

    model.__class__ = Peeking
    with pytest.raises(UserError, match="reads weights of a layer outside of it"):
        sharding.spread(model, group)


# ---------------------------------------------------------------- four ranks, two groups

SAMPLED = ("--num_rows", 5, "--temperatures", 0.2, 1)

SEVERAL = """
import importlib, json, sys
from common import distributed
from common.process import leave

close, distributed.World.close = distributed.World.close, lambda self: None  # one process group for all commands
for name, words in json.load(open(sys.argv[1])):
    status = importlib.import_module(name).main(words)
    if status:
        sys.exit(f"status {{status}}: {{name}} {{words}}")
"""
LEAVING = """
close(distributed.start())
leave(0)
"""
FAILING = """
import torch
from common import checkpoints, models, sharding

world = distributed.start(model_parallel=2)
model = checkpoints.load_base(models.find_model(sys.argv[2]), torch.float32, world)
held = sum(layer.share.numel() for layer in sharding.layers_of(model))
whole = sum(item.numel() * 4 for layer in sharding.layers_of(model) for item in layer.parameters)
ids = torch.tensor([[5, 6, 7]])

def passes(n):
    def work():
        with torch.no_grad():
            for number in range(n):
                if world.rank == 3 and number == 2:
                    layer = model.model.layers[1].mlp  # within the second layer: the first has been gathered
                    layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
                last = model(input_ids=ids).logits.sum().item()
        return last
    return work

unequal = world.together(passes(1 + world.rank % 2))  # 1, 2, 1, 2 passes
assert len(set(unequal)) == 1, unequal
try:
    world.together(passes(5))
    found = "nothing"
except Exception as error:
    found = f"{{type(error).__name__}}: {{error}}"
for line in world.gather((world.rank, found, held / whole)):
    world.say("RANK", *line)
if world.rank == 2:
    raise RuntimeError("one rank alone")
with torch.no_grad():
    while world.rank == 3:
        model(input_ids=ids)  # waits for rank 2, which is gone
world.barrier()
"""


def main_of(name):
    return importlib.import_module(name).main


def launch(script, *words, ranks=4, timeout=500) -> subprocess.CompletedProcess:
    return run_script(script, *words, ranks=ranks, timeout=timeout)


def run_all(tmp_path, commands, *failing) -> subprocess.CompletedProcess:
    """Each (script, words, output flag, name) once here and once on 2 × 2 ranks, below tmp_path/one and tmp_path/four.

    failing: a model on which ranks fail afterwards.
    """
    listed = []
    for number, (name, words, flag, output) in enumerate(commands):
        words = [str(word) for word in words]
        one, four = (tmp_path / side / str(number) / output for side in ("one", "four"))
        one.parent.mkdir(parents=True), four.parent.mkdir(parents=True)
        assert not main_of(name)([*words, flag, str(one)])
        listed.append((name, [*words, flag, str(four), "--model_parallel", "2"]))
    (tmp_path / "several.py").write_text((SEVERAL + (FAILING if failing else LEAVING)).format())
    (tmp_path / "commands.json").write_text(json.dumps(listed))
    done = launch(tmp_path / "several.py", tmp_path / "commands.json", *failing)
    assert failing or done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_groups_of_two_are_one_process(adapters, models, dataset, tmp_path):
    """An adapter merged into the spread layers and attached to them (grad_norm). Afterwards one rank's error reaches
    all, though the others had more passes to run, and a rank that dies ends the run."""
    rows = make_rows(12, seed=7)
    members = write_rows(tmp_path / "members.jsonl", rows[:6])
    others = write_rows(tmp_path / "nonmembers.jsonl", rows[6:])
    sets = ["--members", members, "--nonmembers", others, "--bootstrap", 20, "--token_budget", 300]
    attacks = ["--attacks", "loss", "ref", "recall", "grad_norm"]
    commands = [
        ("measure_purified", ["--model", adapters["llama", "lora"], *SAMPLED, "-d", dataset], "--output_dir", "out"),
        ("mia.mia", ["--model", adapters["neox", "lora"], *sets, *attacks], "--output_dir", "out"),
    ]
    done = run_all(tmp_path, commands, models["llama"])
    one, four = ([tmp_path / side / str(number) / "out" for number in range(2)] for side in ("one", "four"))
    name = "outcomes_purified.jsonl"
    assert read_lines(four[0] / name) == read_lines(one[0] / name)
    for line, other in zip(*(read_lines(out[0] / "results_purified.jsonl") for out in (four, one))):
        assert line["truth_logprob"] == pytest.approx(other["truth_logprob"], abs=1e-5)
        assert line["relative_change"] == pytest.approx(other["relative_change"], rel=1e-12)
    same_scores(*(read_lines(out[1] / "scores_mia.jsonl") for out in (four, one)))
    record = json.loads((four[0] / "run_measure_purified.json").read_text())
    assert record["world_size"] == 4 and record["args"]["model_parallel"] == 2

    lines = [line.removeprefix("RANK ") for line in done.stdout.splitlines() if line.startswith("RANK ")]
    assert [line.rpartition(" ")[0] for line in lines] == [
        "0 RuntimeError: rank 3: MemoryError: no room",
        "1 RuntimeError: rank 3: MemoryError: no room",
        "2 RuntimeError: rank 3: MemoryError: no room",
        "3 MemoryError: no room",
    ], done.stderr
    assert all(float(line.rpartition(" ")[2]) == pytest.approx(0.5, abs=0.01) for line in lines)
    assert done.returncode != 0 and "one rank alone" in done.stderr  # and torchrun ended the others


@pytest.mark.slow
def test_every_other_script_on_two_groups(adapters, models, dataset, held_out, learned, planted_rows, tiny, tmp_path):
    key, checkpoint = learned
    tree = tmp_path / "tree"
    for number, kind in ((9, "lora"), (10, "dora")):
        (tree / f"checkpoint-{number}").parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", adapters["llama", kind], tree / f"checkpoint-{number}"], check=True)
    hot = ["--temperature", 3]
    rows = ["--train", planted_rows["train"], "--heldout", planted_rows["heldout"]]
    rows_of_mia = make_rows(24, seed=7)
    members = write_rows(tmp_path / "members.jsonl", rows_of_mia[:12])
    others = write_rows(tmp_path / "nonmembers.jsonl", rows_of_mia[12:])
    sets = ["--members", members, "--nonmembers", others, "--bootstrap", 20, "--token_budget", 300]
    commands = [
        ("data.continuation.generate", ["-m", adapters["llama", "lora"], "-d", dataset, *hot, "--max_tokens", 20],
         "--output", "data.arrow"),
        ("data.synthetic.generate", ["--model", models["llama"], "--input", held_out, *hot, "--max_new_tokens", 20],
         "--output", "data.jsonl"),
        ("canary.measure", ["--canaries", key, "--models", f"lora={checkpoint}", "--references", 40],
         "--output_dir", "out"),
        ("audit", ["--model", adapters["llama", "lora"], *rows, *SMALL], "--output_dir", "out"),
        ("audit", ["--model", checkpoint, "--train", key.parent / "train_canaries.jsonl", "--canaries", key,
                   *SMALL, "--without", "extraction", "untargeted"], "--output_dir", "out"),
        ("perplexity.perplexity", ["--model", adapters["opt", "dora"], "-d", dataset], "--output_dir", "out"),
        ("mia.mia", ["--model", adapters["opt", "dora"], *sets, "--attacks", "core", "recall", "neighborhood"],
         "--output_dir", "out"),
    ]  # fmt: skip
    run_all(tmp_path, commands)
    one, four = ([tmp_path / side / str(number) for number in range(len(commands))] for side in ("one", "four"))
    assert formats.read_rows(four[0] / "data.arrow") == formats.read_rows(one[0] / "data.arrow")
    assert read_lines(four[1] / "data.jsonl") == read_lines(one[1] / "data.jsonl")
    same_scores(*(read_lines(side[2] / "out" / "results_canary_rows.jsonl") for side in (four, one)), rel=1e-4)
    for number in (3, 4):
        verdicts = [json.loads((side[number] / "out" / "audit.json").read_text())["verdict"] for side in (four, one)]
        answers = [{name: item["answer"] for name, item in one["questions"].items()} for one in verdicts]
        assert answers[0] == answers[1] and verdicts[0]["answer"] == verdicts[1]["answer"]

    (line,), (other,) = (read_lines(side[5] / "out" / "perplexity.jsonl") for side in (four, one))
    assert line["mean"] == pytest.approx(other["mean"], rel=1e-6)
    same_scores(*(read_lines(side[6] / "out" / "scores_mia.jsonl") for side in (four, one)))

    sampled = ["-d", dataset, *SAMPLED]
    done = launch("evaluate_purified.py", "--model", tree, *sampled, "--model_parallel", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, kind in ((9, "lora"), (10, "dora")):
        words = ["--model", adapters["llama", kind], *sampled, "--output_dir", tmp_path / kind]
        assert main_of("measure_purified")([str(word) for word in words]) == 0
        name = "outcomes_purified.jsonl"
        assert read_lines(tree / f"checkpoint-{number}" / name) == read_lines(tmp_path / kind / name)

    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    for side, ranks, more in (("one", 1, ()), ("four", 4, ("--model_parallel", 2))):
        words = quick(tiny, tmp_path / f"{side}.jsonl")
        done = launch(tmp_path / "driver.py", *words, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "four.jsonl").read_bytes()
