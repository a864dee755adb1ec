"""data/synthetic/generate.py: prompts without the review, the rows, their independence of batches and ranks, killing,
the metadata histogram's privacy, near-copies; and that run_peft.py trains on the very same prompts."""

import json
import math
import random
import sys

import numpy as np
import pytest
from conftest import ROOT, kill_when_written, read_lines, run_script, write_rows

import run_peft
from common import dataset, manifests, results, trained
from common import models as common_models
from common.problems import UserError
from data.synthetic import generate, histogram
from data.synthetic.summary import near_copies

SYSTEM = "Write a customer's review of the product below."


def make_reviews(n: int, seed: int = 0, users: int | None = None) -> list[dict]:
    """n fictional review rows as data/amazon/prepare.py writes them."""
    from faker import Faker

    fake, rng = Faker("en_US"), random.Random(seed)
    fake.seed_instance(seed)
    rows = []
    for index in range(n):
        noun = rng.choice(("kettle", "desk lamp", "backpack"))
        rows.append(
            {
                "System prompt": SYSTEM,
                "Rating": rng.choice((1, 2, 4, 5, 5, 5)),
                "Review Title": " ".join(fake.words(3)),
                "Review": " ".join(fake.words(rng.randint(12, 30))),
                "Product Title": f"{fake.word().title()} {noun}",
                "Product Categories": f"Home > {noun.title()}s",
                "row_id": 1000 * seed + index,
                "user_id": f"u{seed}-{index % (users or n)}",
            }
        )
    return rows


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("reviews") / "test.jsonl", make_reviews(30, seed=1))


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("reviews") / "train.jsonl", make_reviews(60, seed=2, users=20))


def words(model, data, output, *more):
    return [str(w) for w in ("-m", model, "-i", data, "--output", output, "--max_new_tokens", 12, *more)]


def make(model, data, output, *more) -> list[dict]:
    assert generate.main(words(model, data, output, *more)) == 0
    return read_lines(output)


# ---------------------------------------------------------------- the prompt


def test_prompt_by_hand():
    row = make_reviews(1)[0] | {"Product Title": "Oak kettle", "Product Categories": "Home > Kettles", "Rating": 4}
    start = f"{SYSTEM}\n\nProduct: Oak kettle\nCategories: Home > Kettles\nRating: 4\n"
    assert dataset.review_prompt(row) == start + "Review:"
    row |= {"condition": "title", "Review Title": "Very good"}
    assert dataset.review_prompt(row) == start + "Title: Very good\nReview:"
    assert dataset.row_text(row | {"Review": " Nice. "}) == (start + "Title: Very good\nReview: Nice.", len(start) + 24)


@pytest.mark.parametrize("condition", ("metadata", "title", "sampled"))
def test_no_run_of_a_review_is_in_a_prompt(condition, models, held_out, training, tmp_path, monkeypatch):
    """Trap 36: no 50 characters in a row of a held-out (or training) review are in any text given to the model."""
    from data import generation

    seen, original = [], generation.continue_prompts

    def spy(model, tokenizer, prompts, *rest, **more):
        seen.extend(tokenizer.batch_decode(prompts))
        return original(model, tokenizer, prompts, *rest, **more)

    monkeypatch.setattr(generation, "continue_prompts", spy)
    more = ["--condition", condition]
    if condition == "sampled":
        more += ["--metadata_epsilon", "50", "--metadata_fields", "Rating", "Product Categories", "--training"]
        more += [training]
    made = make(models["llama"], held_out, tmp_path / "out.jsonl", *more)
    assert len(seen) == 30 and all(prompt.endswith("Review:") for prompt in seen)
    together = "\n".join(seen)
    titles = 0
    for row in read_lines(held_out) + read_lines(training):
        review = row["Review"]
        assert len(review) >= 50
        assert not any(review[start : start + 50] in together for start in range(len(review) - 49))
        titles += f"Title: {row['Review Title']}\n" in together
    assert titles == (30 if condition == "title" else 0)
    assert all(("Review Title" in row) == (condition == "title") for row in made)
    if condition == "sampled":
        assert {row["row_id"] for row in made} == {None}
        assert {row["Product Title"] for row in made} == {""}
    # the model has seen what the row says it has
    assert [dataset.review_prompt(row) for row in made] == seen


def test_training_is_on_the_review_alone_and_on_its_end(models):
    """--loss_on completion: the labels are ' ' + review + EOS; the prompt before them is generation's own tokens."""
    from training.batches import encode

    rows = make_reviews(20) + [{**row, "condition": "title"} for row in make_reviews(5, seed=3)]
    tokenizer = common_models.load_tokenizer(common_models.find_model(str(models["neox"])))
    for row, item in zip(rows, encode(dataset.render("", rows, range(len(rows)), None), tokenizer, 512, "completion")):
        assert item.ids[-1] == tokenizer.eos_token_id and item.ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(item.ids[item.spans[0][0] : -1]) == " " + row["Review"]
        assert item.ids[: item.spans[0][0]] == tokenizer(dataset.review_prompt(row)).input_ids


def test_a_model_trained_on_reviews_ends_them(models, tmp_path):
    """run_peft.py on one short review with completion loss; greedy generation for other products gives it and stops."""
    rows = [row | {"Review": "Neat and quick."} for row in make_reviews(16)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    flags = ["-m", models["llama"], "-i", data, "-e", 12, "-pdbs", 8, "-gas", 1, "-lr", 1e-2, "--lora_r", 8]
    flags += ["--loss_on", "completion", "--output_root", tmp_path / "runs"]
    assert run_peft.main([str(flag) for flag in flags]) == 0
    checkpoint = max((tmp_path / "runs").rglob("checkpoint-24"))
    test = write_rows(tmp_path / "test.jsonl", make_reviews(10, seed=1))
    made = make(checkpoint, test, tmp_path / "out.jsonl", "--temperature", 0, "--max_new_tokens", 40)
    assert {row["finish_reason"] for row in made} == {"eos"}
    assert sum(row["generated_text"] == "Neat and quick." for row in made) >= 6  # 12 epochs of a tiny model
    before = make(models["llama"], test, tmp_path / "before.jsonl", "--temperature", 0, "--max_new_tokens", 40)
    assert {row["finish_reason"] for row in before} == {"length"}


# ---------------------------------------------------------------- the file


def test_rows_manifest_and_run(models, held_out, training, tmp_path):
    source = read_lines(held_out)
    out = tmp_path / "out" / "generated_sequences_no_dp.jsonl"
    made = make(models["neox"], held_out, out, "--arm", "no_dp", "--training", training)
    names = [out.name, out.name + ".meta.json", "run_generate_no_dp.json"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    fields = ("row_id", "System prompt", "Rating", "Product Title", "Product Categories")
    for row, real in zip(made, source, strict=True):
        assert {key: row[key] for key in fields} == {key: real[key] for key in fields}
        assert (row["arm"], row["condition"], row["seed"], row["sample"]) == ("no_dp", "metadata", 3407, 0)
        assert row["finish_reason"] == ("length" if row["generated_tokens"] == 12 else "eos")
        assert "Review" not in row and "Review Title" not in row and "key" not in row
    manifest = manifests.read_manifest(out)
    assert manifest["tag"] == "synthetic-no_dp" and manifest["rows"] == 30
    assert [one["rows"] for one in manifest["source"]] == [30, 60]
    assert manifest["privacy"]["epsilon"] is None and manifest["privacy"]["private"] is False
    assert manifest["near_copies"] == {"characters": 50, "training": 0, "held_out": 0, "held_out_in_training": 0}
    record = json.loads((out.parent / "run_generate_no_dp.json").read_text())
    assert record["status"] == "ok" and record["statistics"]["n_scored"] == 30


def test_num_fewer_and_more_than_the_rows(models, held_out, tmp_path):
    whole = make(models["llama"], held_out, tmp_path / "a.jsonl")
    fewer = make(models["llama"], held_out, tmp_path / "b.jsonl", "--num", 7)
    assert len(fewer) == 7 and all(row in whole for row in fewer)
    assert [row["row_id"] for row in fewer] == sorted(row["row_id"] for row in fewer)
    more = make(models["llama"], held_out, tmp_path / "c.jsonl", "--num", 67)
    assert more[:30] == whole and [row["sample"] for row in more] == [0] * 30 + [1] * 30 + [2] * 7
    again = {row["row_id"]: row["generated_text"] for row in more[30:60]}
    assert sum(again[row["row_id"]] != row["generated_text"] for row in whole) > 25  # other noise, other text


def test_batches_and_ranks_change_nothing(models, held_out, tmp_path):
    hot = ["--temperature", "3", "--top_k", "0", "--max_new_tokens", "60"]
    one = make(models["llama"], held_out, tmp_path / "one.jsonl", *hot)
    ended = [row for row in one if row["finish_reason"] == "eos"]
    assert 0 < len(ended) < 30
    assert make(models["llama"], held_out, tmp_path / "small.jsonl", *hot, "--batch_size", "3") == one
    other = make(models["llama"], held_out, tmp_path / "other.jsonl", *hot, "--seed", "1")
    assert all(a["generated_text"] != b["generated_text"] for a, b in zip(one, other))
    command = words(models["llama"], held_out, tmp_path / "two.jsonl", *hot, "--batch_size", "4")
    done = run_script("data/synthetic/generate.py", *command, ranks=2)
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "two.jsonl") == one
    assert not list(tmp_path.glob(".*partial*"))


def test_two_ranks_release_one_histogram(models, held_out, training, tmp_path):
    """Its noise comes from the system: the ranks must draw from one release, and a second run from the same."""
    more = ["--condition", "sampled", "--metadata_epsilon", 20, "--metadata_fields", "Rating", "--training", training]
    command = words(models["llama"], held_out, tmp_path / "two.jsonl", *more, "--num_rows", 40)
    done = run_script("data/synthetic/generate.py", *command, ranks=2)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "metadata_histogram.json").read_bytes()
    one = make(models["llama"], held_out, tmp_path / "one.jsonl", *more, "--num", 40)
    assert read_lines(tmp_path / "two.jsonl") == one and len(one) == 40
    assert (tmp_path / "metadata_histogram.json").read_bytes() == before


def test_kill_and_run_again(models, held_out, tmp_path):
    """kill -9 after some batches; the next run resumes there and writes the file of an uninterrupted run."""
    whole = make(models["llama"], held_out, tmp_path / "whole.jsonl", "--batch_size", "2")
    output = tmp_path / "broken" / "out.jsonl"
    script = [sys.executable, str(ROOT / "data/synthetic/generate.py")]
    command = script + words(models["llama"], held_out, output, "--batch_size", "2")
    partial = output.with_name(".out.jsonl.partial-0.jsonl")
    kill_when_written(command, partial, 3)
    assert partial.exists() and not output.exists()
    with open(partial, "ab") as file:
        file.write(b'{"batch": 14, "rows": [{"ind')  # a line torn by a power failure
    with pytest.raises(UserError, match="a different temperature"):
        generate.main(words(models["llama"], held_out, output, "--batch_size", "2", "--temperature", "0.5"))
    assert make(models["llama"], held_out, output, "--batch_size", "2") == whole
    assert not partial.exists()


def test_filters_are_counted(models, held_out, tmp_path):
    hot = ["--temperature", "3", "--top_k", "0", "--max_new_tokens", "60"]
    whole = make(models["llama"], held_out, tmp_path / "a.jsonl", *hot)
    kept = make(models["llama"], held_out, tmp_path / "b.jsonl", *hot, "--filter", "length", "empty")
    ended = [row for row in whole if row["finish_reason"] == "eos"]
    filled = [row for row in ended if row["generated_text"].strip()]
    assert kept == filled
    manifest = manifests.read_manifest(tmp_path / "b.jsonl")
    wanted = {"length": 30 - len([r for r in whole if r["finish_reason"] == "eos"]), "empty": len(ended) - len(filled)}
    assert manifest["filtered"] == wanted and manifest["n_dropped"] == sum(wanted.values())
    assert (manifest["n_requested"], manifest["n_scored"]) == (30, len(kept))


def test_prompts_without_room_are_dropped_and_counted(models, tmp_path):
    rows = make_reviews(5)
    rows[2]["Product Title"] = "x " * 600
    made = make(models["llama"], write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl")
    assert [row["row_id"] for row in made] == [0, 1, 3, 4]
    assert list(manifests.read_manifest(tmp_path / "out.jsonl")["dropped"].values()) == [1]


def test_near_copies_by_hand():
    """Of four texts one holds 50 characters of a training row, one 49, one 50 of a held-out row; the floor: 1 of 2."""
    line = "".join(chr(97 + (7 * i * i + i) % 26) for i in range(120))
    train, held = [f"start {line} end"], ["a" * 30 + "Z" * 50 + "b" * 30, f"{line[:50]} floor"]
    texts = [f"x{line[10:60]}y", f"x{line[10:59]}#", f"{'Z' * 50}!", "none"]
    found = near_copies(texts, train, held)
    assert found == {"characters": 50, "training": 0.25, "held_out": 0.25, "held_out_in_training": 0.5}
    assert near_copies(texts, [], held)["training"] is None


# ---------------------------------------------------------------- privacy


def test_threshold_and_noise_by_exact_sums():
    """P(1 + Z ≥ t) ≤ δ < P(1 + Z ≥ t − 1), with P(Z = z) = (1 − a)/(1 + a) a^|z| summed term by term."""
    for epsilon, delta in ((0.5, 1e-5), (1.0, 1e-3), (4.0, 1e-6), (1.0, 0.3)):
        a = math.exp(-epsilon)
        t = histogram.threshold(epsilon, delta)
        mass = [(1 - a) / (1 + a) * a**z for z in range(t - 2, t + 2000)]  # from 1 + Z = t − 1 on
        assert math.fsum(mass[1:]) <= delta * (1 + 1e-9)
        assert t == 2 or math.fsum(mass) > delta
    assert histogram.threshold(math.log(2), 1e-3) == 11  # a = 1/2: 2^−z / 1.5 ≤ 0.001 first at z = 10


def test_release_by_its_distribution():
    """A cell of one unit passes with probability δ, and the noise is two-sided geometric: 20,000 draws at a = 1/2."""
    epsilon, rng = math.log(2), np.random.default_rng(0)
    cells = [(str(i),) for i in range(20_000)]
    lowest = histogram.threshold(epsilon, 0.02)  # 2^−z / 1.5 ≤ 0.02 first at z = 6: P = 1/96
    assert lowest == 7 and abs(len(histogram.release(cells, epsilon, 0.02, rng)) - 20_000 / 96) < 5 * 14.4
    many = [cell for cell in cells[:2000] for _ in range(60)]
    released = histogram.release(many, epsilon, 0.02, rng)
    assert list(released) == sorted(released)
    noise = np.array([count - 60 for count in released.values()])
    assert len(noise) == 2000
    for z in (-2, -1, 0, 1, 2):
        p = 2.0 ** -abs(z) / 3
        assert abs((noise == z).mean() - p) < 5 * math.sqrt(p * (1 - p) / 2000)


def test_a_user_adds_to_one_cell():
    rows = [{"user_id": f"u{i // 5}", "n": i} for i in range(50)]
    chosen = histogram.one_row_per_user(rows, np.random.default_rng(0))
    assert [row["user_id"] for row in chosen] == [f"u{i}" for i in range(10)]
    assert len({row["n"] % 5 for row in chosen}) > 2


def test_draws_follow_the_counts():
    drawn = histogram.draw({("a",): 30, ("b",): 10}, 8000, 1)
    assert abs(drawn.count(("a",)) / 8000 - 0.75) < 5 * math.sqrt(0.1875 / 8000)
    assert histogram.draw({("a",): 30, ("b",): 10}, 20, 1) == drawn[:20]


def test_privacy_of_model_and_metadata_are_added(models, adapters, held_out, training, tmp_path):
    """ε 3 + 20 at δ 1e-3 + 1e-4 by hand; unit user: the histogram counts 20 users, not 60 rows."""
    import shutil

    model = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(adapters["llama", "lora"], model)
    trained.write(tmp_path / "run", trained.Header("5a" * 16, "all", 64), ())
    block = {"private": True, "epsilon": 3.0, "delta": 1e-3, "unit": "user", "void": None}
    (model / "privacy.json").write_text(json.dumps(block))
    more = ["--condition", "sampled", "--metadata_epsilon", 20, "--metadata_delta", 1e-4, "--training", training]
    more += ["--metadata_fields", "Rating"]
    make(model, held_out, tmp_path / "out.jsonl", *more)
    privacy = manifests.read_manifest(tmp_path / "out.jsonl")["privacy"]
    assert privacy["epsilon"] == pytest.approx(23) and privacy["delta"] == pytest.approx(1.1e-3)
    assert (privacy["private"], privacy["unit"]) == (True, "user") and privacy["metadata"]["epsilon"] == 20
    cells = json.loads((tmp_path / "metadata_histogram.json").read_text())["cells"]
    assert abs(sum(count for *_, count in cells) - 20) <= 3
    with pytest.raises(UserError, match=r"(a different|another) epsilon"):
        make(model, held_out, tmp_path / "b.jsonl", *more, "--metadata_epsilon", 2)
    # what may be published has no plain hash of the private file, which would confirm a guessed copy of it
    digest = results.sha256(training)
    for path in ("out.jsonl.meta.json", "run_generate_with_dp.json", "metadata_histogram.json"):
        text = (tmp_path / path).read_text()
        assert digest not in text and trained.salted(digest, "5a" * 16) in text
    (tmp_path / "run" / "trained_rows.jsonl").unlink()
    make(model, held_out, tmp_path / "lost.jsonl", "--training", training)
    source = manifests.read_manifest(tmp_path / "lost.jsonl")["source"][1]
    assert (source["sha256"], source["salted"]) == (None, True)
    with pytest.raises(UserError, match="cannot tell whether it was released from --training"):
        make(model, held_out, tmp_path / "b.jsonl", *more)
    make(model, held_out, tmp_path / "plain.jsonl")
    plain = manifests.read_manifest(tmp_path / "plain.jsonl")["privacy"]
    assert (plain["epsilon"], plain["delta"], plain["metadata"]) == (3.0, 1e-3, None)
    block = {"private": False, "epsilon": None, "delta": 1e-3, "unit": "user", "void": "known seed"}
    (model / "privacy.json").write_text(json.dumps(block))
    make(model, held_out, tmp_path / "no_noise.jsonl")
    none = manifests.read_manifest(tmp_path / "no_noise.jsonl")["privacy"]  # an audit of this text is at the same δ
    assert (none["private"], none["epsilon"], none["delta"], none["void"]) == (False, None, 1e-3, "known seed")


def test_no_cell_survives(models, held_out, training, tmp_path):
    """The noise is the system's: a cell of one unit passes with probability δ, so one of 20 in 5·10⁷ runs."""
    more = ["--condition", "sampled", "--metadata_epsilon", 0.1, "--metadata_delta", 1e-9, "--training", training]
    refused = "no cell of Rating × Product Categories × Product Title"
    with pytest.raises(UserError, match=refused):
        make(models["llama"], held_out, tmp_path / "out.jsonl", *more)
    assert not (tmp_path / "out.jsonl").exists()
    released = tmp_path / "metadata_histogram.json"
    before = released.read_bytes()
    assert json.loads(before)["cells"] == []
    with pytest.raises(UserError, match=refused):  # asking again must not draw, and spend, again
        make(models["llama"], held_out, tmp_path / "out.jsonl", *more)
    assert released.read_bytes() == before


# ---------------------------------------------------------------- bad input


def test_bad_input_all_at_once_and_nothing_loaded(models, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(common_models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    command = ["-m", tmp_path / "no", "-i", tmp_path / "no.jsonl", "--output", tmp_path / "x.arrow", "--arm", "=1"]
    with pytest.raises(UserError) as caught:
        generate.main([str(word) for word in [*command, "--condition", "sampled"]])
    for word in ("end in .jsonl", "no.jsonl: no such file", "--model", "--arm =1", "--metadata_epsilon", "--training"):
        assert word in str(caught.value)
    assert len(caught.value.problems) == 6
    with pytest.raises(UserError, match="Rating must be among them"):
        generate.main(words(models["neox"], held_out, tmp_path / "y.jsonl", "--metadata_fields", "Product Title"))
    rows = make_reviews(4)
    bare = write_rows(tmp_path / "bare.jsonl", [rows[0] | {"Review Title": ""}, *rows[1:]])
    with pytest.raises(UserError, match="1 rows have no Review Title"):
        generate.main(words(models["neox"], bare, tmp_path / "y.jsonl", "--condition", "title"))
    with pytest.raises(UserError, match="4 of its rows are training rows"):
        generate.main(words(models["neox"], bare, tmp_path / "y.jsonl", "--training", bare))
    with pytest.raises(UserError, match="row 1: Rating must be 1 to 5"):
        broken = write_rows(tmp_path / "broken.jsonl", [rows[0], rows[1] | {"Rating": 9}])
        generate.main(words(models["neox"], broken, tmp_path / "y.jsonl"))
    assert generate.main(words(models["neox"], held_out, tmp_path / "y.jsonl", "--dry_run")) == 0
    assert not (tmp_path / "y.jsonl").exists()


def test_overwrite_and_exit_status(models, held_out, tmp_path):
    make(models["neox"], held_out, tmp_path / "a.jsonl", "--seed", "1")
    before = (tmp_path / "a.jsonl").read_bytes()
    done = run_script("data/synthetic/generate.py", *words(models["neox"], held_out, tmp_path / "a.jsonl"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--overwrite" in done.stderr
    assert (tmp_path / "a.jsonl").read_bytes() == before
    make(models["neox"], held_out, tmp_path / "a.jsonl", "--overwrite")
    assert (tmp_path / "a.jsonl").read_bytes() != before
