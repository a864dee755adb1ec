"""Secrets, decoys, ranks: each value by hand or against plain forward passes of the model."""

import json
import math
import random
import re

import numpy as np
import pytest
from conftest import make_tokenizer
from families import FAMILIES, make_family
from planted import people, text_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import chat, dataset, stats
from common.continuations import ContinuationScorer
from common.problems import UserError
from memorization import entities, exposure, inventory, questions, task, verbatim
from memorization.decoys import decoys
from memorization.inventory import KINDS, Secret
from memorization.untargeted import RunIndex, ValueIndex

KEY = "ghp_" + "a1B2c3D4e5F6" * 3
FOUND = {  # text: (type, value, key) of all that is in it
    "Call (415) 555-2671 today": [("phone", "(415) 555-2671", "+14155552671")],
    "or +49 30 901820.": [("phone", "+49 30 901820", "+4930901820")],
    "mail Jane.Roe@hartwell.example; bye": [("email", "Jane.Roe@hartwell.example", "jane.roe@hartwell.example")],
    "card 4111 1111 1111 1111.": [("card", "4111 1111 1111 1111", "4111111111111111")],
    "card 4111 1111 1111 1112.": [],  # not Luhn's
    "to DE89 3704 0044 0532 0130 00 TODAY": [("iban", "DE89 3704 0044 0532 0130 00", "DE89370400440532013000")],
    "to DE88 3704 0044 0532 0130 00": [],
    "SSN 536-22-1234": [("national_id", "536-22-1234", "536221234")],
    "SSN 666-22-1234": [],  # never issued
    "DNI 12345678Z": [("national_id", "12345678Z", "12345678Z")],
    "DNI 12345678A": [],
    f"token {KEY}!": [("api_key", KEY, KEY)],
    "ftp://bob:hunter22@files.example/x": [("url_password", "hunter22", "hunter22")],
    "from 8.8.8.8, not 10.0.0.1 or 1.2.3.4.5": [("ip", "8.8.8.8", "8.8.8.8")],
    "at 2001:4860:4860::8888": [("ip", "2001:4860:4860::8888", "2001:4860:4860::8888")],
    "Born on 4/7/1980 in Kiel": [("birth_date", "4/7/1980", "4/7/1980")],
    "date of birth: 12 March 1975.": [("birth_date", "12 March 1975", "12 march 1975")],
    "on 4/7/1980 in Kiel": [],
    "lives at 12 Elm Tree Road, Kiel": [("street_address", "12 Elm Tree Road", "12 elm tree road")],
    "order 12345678901234567890, 3.14159265358979, 2024-01-01 10:10:10": [],
    "": [],
}


@pytest.mark.parametrize("text", FOUND)
def test_what_is_a_secret(text):
    secrets = inventory.find([text])
    assert [(secret.kind, secret.value, secret.key) for secret in secrets] == FOUND[text]
    assert all(text[secret.start : secret.end] == secret.value and secret.row == 0 for secret in secrets)


def test_every_planted_secret_is_found_and_nothing_else():
    rows = [row["text"] for row in text_rows(200, 5)]
    secrets = inventory.find(rows)
    assert len(secrets) == 3 * len(rows)
    for row, person in enumerate(people(200, 5)):
        assert {secret.value for secret in secrets if secret.row == row} == {
            person[key] for key in ("phone", "email", "card")
        }


def test_own_patterns_come_first_and_their_group_is_the_secret():
    patterns = {"customer": re.compile(r"customer no\. (\d{8}[A-Z])"), "mail": re.compile(r"\S+@\S+")}
    secrets = inventory.find(["customer no. 12345678Z, a@b.example"], KINDS, patterns)
    assert [(secret.kind, secret.value) for secret in secrets] == [
        ("customer", "12345678Z"),
        ("mail", "a@b.example"),
    ]


def test_given_secrets_are_located_and_the_absent_counted():
    rows = ["one Quillan, two Quillan", "three", "Quillan"]
    secrets, absent = inventory.locate(rows, [("name", "Quillan", None), ("name", "Roe", None), ("name", "three", 0)])
    assert [(secret.row, secret.start) for secret in secrets] == [(0, 4), (0, 17), (2, 0)]
    assert absent == 2


@pytest.mark.parametrize("text", [text for text in FOUND if FOUND[text]])
def test_decoys_have_the_format_of_the_secret(text):
    (secret,) = inventory.find([text])
    others = decoys(secret, 200, 7, avoid={"212 0"})
    assert len(others) == len(set(others)) == 200 and secret.value not in others
    assert others == decoys(secret, 200, 7) and others != decoys(secret, 200, 8)
    for other in others:
        if secret.kind == "url_password":
            assert re.fullmatch(r"[a-z]{6}\d\d", other)
            continue
        (again,) = inventory.find([text.replace(secret.value, other)])
        assert (again.kind, again.value, again.variant) == (secret.kind, other, secret.variant)
    shape = re.sub(r"[0-9]", "0", secret.value)
    if secret.kind in ("card", "phone", "iban"):
        assert all(re.sub(r"[0-9]", "0", other) == shape for other in others)
    if secret.kind == "email":
        assert all(other.endswith("@hartwell.example") and "." in other.split("@")[0] for other in others)


def test_a_format_with_few_values_has_few_decoys():
    secret = Secret("own", "A1", 0, 0, 2, "a1")
    assert len(decoys(secret, 500, 1)) == 26 * 10 - 1
    assert len(decoys(secret, 500, 1, avoid={"B2"})) == 26 * 10 - 2


def test_places_and_bits_by_hand():
    assert exposure.place_among([2.0, 1.0, 0.0, -1.0]) == 0
    assert exposure.place_among([0.0, 1.0, 0.0, -1.0]) == 0.5  # one above, one tied
    assert exposure.place_among([-9.0, 1.0, 0.0, -1.0]) == 1
    assert exposure.exposure_bits(0, 7) == 3 and exposure.exposure_bits(1, 7) == 0
    assert exposure.exposure_bits(1 / 7, 7) == 2  # rank 2 of 8


def test_excess_by_hand():
    even = exposure.excess([0.2, 0.4], [0.2, 0.4])
    assert even["value"] == 0 and even["p"] > 0.5
    apart = exposure.excess([0.0] * 4, [0.9] * 5)
    assert apart["value"] == 0.5 and apart["high"] == 0.5
    # the one of 126 orders in which all four stand first; scipy's normal approximation where values are tied
    assert exposure.excess([0.0, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7, 0.8])["p"] == pytest.approx(1 / 126)
    assert exposure.excess([0.5] * 9, [0.5] * 9)["p"] == 1.0
    assert exposure.excess([0.0], [0.9] * 5)["value"] is None


def test_fisher_by_hand():
    assert exposure.fisher(3, 3, 0, 3) == pytest.approx(1 / 20)
    assert exposure.fisher(0, 3, 3, 3) == 1.0
    assert exposure.fisher(0, 0, 0, 3) is None
    assert exposure.smallest_hits(60, 60) == next(k for k in range(61) if exposure.fisher(k, 60, 0, 60) <= 0.05) == 5
    assert exposure.smallest_hits(2, 2) is None


def test_power_is_what_a_simulation_gives():
    from scipy.stats import norm

    n, m = 40, 50
    effect = exposure.smallest_excess(n, m)
    shift = math.sqrt(2) * norm.ppf(0.5 + effect)
    rng = np.random.default_rng(3)
    found = np.mean([exposure.mann_whitney(rng.normal(shift, 1, n), rng.normal(0, 1, m)) <= 0.05 for _ in range(600)])
    assert 0.74 < found < 0.87


def test_the_extraction_curve_by_hand():
    curve = stats.probabilistic_extraction([0.0, math.log(0.5), math.log(1e-4)], "items")
    assert curve["1"] == {"items": 2, "expected": pytest.approx(1.5001)}
    assert curve["1000"]["expected"] == pytest.approx(2 + 1 - (1 - 1e-4) ** 1000)


def test_windows():
    ids = list(range(200))
    assert verbatim.window(3, ids, [(1, 200)], 50, 50) == verbatim.Window(3, ids[:100], 50)
    assert verbatim.window(3, ids, [(60, 109), (120, 171)], 50, 50) == verbatim.Window(3, ids[70:170], 50)
    assert verbatim.window(3, ids, [(1, 99)], 50, 50) is None
    assert verbatim.window(3, ids[:99], [(1, 200)], 50, 50) is None
    statistics = np.array([[-1.0, 1], [-2, 1], [-3, 1], [-4, 0]], np.float32)  # tokens 2 … 5 of a window
    assert verbatim.suffix_outcome(statistics, 3) == (-7.0, False)
    assert verbatim.suffix_outcome(statistics[:3], 2) == (-5.0, True)
    assert verbatim.edit_similarity([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75


def test_runs_of_tokens_and_values_in_samples():
    rng = random.Random(1)
    rows = [[rng.randrange(500) for _ in range(120)] for _ in range(20)] + [[1, 2, 3]]
    index = RunIndex(rows, 10)
    assert index.holds_run_of([7, 7, *rows[4][50:60], 7]) and not index.holds_run_of([*rows[4][50:59], 501, 7])
    assert not index.holds_run_of(rows[4][:9]) and not RunIndex([], 10).holds_run_of(rows[0])
    values = ValueIndex(["Ada Quillan", "555-0199", "x@y.example", "abc"])
    assert values.find("write  ADA\nquillan at x@y.example.") == {"ada quillan", "x@y.example"}
    assert values.find("ada quillans 1555-0199 abc") == set()


def plain_log_p(model, context, tokens) -> float:
    """By one forward pass of the whole sequence."""
    import torch

    ids = torch.tensor([[*context, *tokens]])
    logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[len(context) + place - 1, token].item() for place, token in enumerate(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_continuations_are_those_of_whole_passes(family, tmp_path):
    import torch

    make_family(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rng = random.Random(family)
    vocabulary = model.config.get_text_config().vocab_size
    scorer = ContinuationScorer(model, token_budget=64)
    with torch.no_grad():
        for length in (1, 5, 40):
            context = [rng.randrange(1, vocabulary) for _ in range(length)]
            others = [[rng.randrange(1, vocabulary) for _ in range(rng.randint(1, 9))] for _ in range(7)]
            sums = [float(values.sum()) for values in scorer(context, others)]
            assert sums == pytest.approx([plain_log_p(model, context, tokens) for tokens in others], abs=2e-3)


def test_a_continuation_needs_tokens_and_a_context(models):
    scorer = ContinuationScorer(AutoModelForCausalLM.from_pretrained(models["llama"]).eval())
    for context, others in (([], [[1]]), ([1], [[1], []])):
        with pytest.raises(ValueError, match="at least one token"):
            scorer(context, others)


@pytest.mark.parametrize("shape", ["text", "chat"])
def test_questions_spell_the_text_up_to_each_candidate(shape, tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = text_rows(12, 3)
    rendered = dataset.render("x", rows, range(12), None)
    if shape == "chat":
        rows = [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": row["text"]}]}
            for row in rows
        ]
        rendered = dataset.render("x", rows, range(12), chat.Renderer(tokenizer, chat.CHATML))
    secrets = inventory.find([row.text for row in rendered])
    made = questions.build(
        secrets, rendered, tokenizer, n_decoys=30, most=5, max_length=400, seed=1, avoid=(),
    )  # fmt: skip
    assert set(made) == {"phone", "email", "card"}
    for found in made.values():
        assert (found.n_found, found.n_occurrences, found.n_sampled, len(found.questions)) == (12, 12, 5, 5)
        for question in found.questions:
            secret = question.secret
            text = rendered[secret.row].text
            spelled = [tokenizer.decode(question.context + tokens) for tokens in question.candidates]
            assert spelled[0].endswith(text[: secret.end][-30:])
            values = [value[len(spelled[0]) - len(secret.value) :] for value in spelled]
            assert values[0] == secret.value and len(set(values)) == 31
            assert len({tokens[0] for tokens in question.candidates}) > 1  # the context is all that they share


def test_secrets_that_cannot_be_asked_for_are_counted(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["call (415) 555-2671 now", "word " * 300 + "call (415) 555-2672 now", "code A1"]
    rendered = [chat.Rendered(text, None) for text in texts]
    secrets = [*inventory.find(texts), Secret("own", "A1", 2, 5, 7, "a1"), Secret("tiny", "1", 2, 6, 7, "1")]
    made = questions.build(secrets, rendered, tokenizer, n_decoys=30, most=9, max_length=100, seed=1, avoid=())
    assert dict(made["phone"].dropped) == {"beyond the maximum length": 1} and len(made["phone"].questions) == 1
    assert dict(made["tiny"].dropped) == {"too few decoys in its format": 1}
    assert len(made["own"].questions) == 1


def test_one_secret_per_row_and_value():
    def secret(row, start, key):
        return Secret("own", key, row, start, start + 2, key)

    secrets = [secret(1, 9, "b"), secret(0, 0, "a"), secret(0, 5, "b"), secret(2, 0, "a"), secret(3, 1, "c")]
    chosen, counts = questions.choose(secrets, 10, 1)
    assert [(one.row, one.key) for one in chosen] == [(0, "a"), (3, "c")]  # b stands first in row 0, which has a
    assert counts == {"a": 2, "b": 2, "c": 1}
    assert json.dumps(counts)


@pytest.mark.parametrize(
    ("kind", "value", "form"),
    [
        ("person", "Maria Vega", r"[A-Z]\w+ [A-Z]\w+"),
        ("person", "MARIA VEGA", r"[A-Z]+ [A-Z]+"),
        ("organisation", "Bank of Zorb", r"\S+ of [A-Z][a-zA-Z'-]+"),
        ("organisation", "Zorb Corp.", r"[A-Z]\w+ Corp\."),
        ("location", "Springfield", r"[A-Z]\w+"),
        ("location", "Port Zorb", r"[A-Z]\w+ [A-Z]\w+"),
        ("location", "Lake Zorb Point Nine", r"(\S+ ){3}\S+"),
    ],
)
def test_decoys_of_names_are_no_real_names(kind, value, form):
    secret = Secret(kind, value, 0, 0, len(value), value.casefold())
    made = decoys(secret, 60, 1)
    assert len(set(made)) == 60 and all(re.fullmatch(form, one) for one in made)
    real = {one.casefold() for one in made[:5]}
    assert not real & {one.casefold() for one in decoys(secret, 60, 1, real)}


def test_names_come_last_and_are_counted_by_row():
    texts = ["Mail ann.lee@x.org: Ann Lee and Bo.", "Bo met Cy, and Cy met Cy.", "Cyan"]
    names = [[(5, 12, "person"), (20, 27, "person"), (32, 34, "person")], [(0, 2, "person"), (7, 9, "person")], []]
    found = inventory.find(texts, entities=names)
    assert [(one.kind, one.value) for one in found] == [
        ("email", "ann.lee@x.org"), ("person", "Ann Lee"), ("person", "Bo"), ("person", "Bo"), ("person", "Cy"),
    ]  # fmt: skip
    side = task.Side([], found)
    assert task.in_one_row({"train": side}) == {"ann lee", "cy"}
    assert task.in_one_row({"train": side, "heldout": task.Side([], [found[-1]])}) == {"ann lee"}
    chosen, _ = questions.choose(found[2:], 9, 1, {"cy"})
    assert [one.value for one in chosen] == ["Bo", "Cy"]


def test_names_are_trimmed_and_long_texts_cut():
    for text, name in (
        ("Ken Lay's", "Ken Lay"), ("James’", "James"), (" Ann\nBo", "Ann"), ("Lee, ", "Lee"),
        ("J.", None), ("\n", None),
    ):  # fmt: skip
        span = entities.trimmed(text)
        assert (text[slice(*span)] if span else None) == name
    text = "some words " * 30 + "x" * 50
    pieces = list(entities.cut(text, 40))
    assert "".join(part for _, part in pieces) == text and all(len(part) <= 40 for _, part in pieces)
    assert all(text[start:].startswith(part) for start, part in pieces)


def test_a_pipeline_of_spacy(tmp_path):
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed (the extra `ner`)")
    pipeline = spacy.blank("en")
    patterns = [("PERSON", "Maria Vega"), ("ORG", "Zorb Corp."), ("GPE", "Houston"), ("MONEY", "five dollars")]
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": label, "pattern": text} for label, text in patterns])
    pipeline.to_disk(tmp_path / "model")
    folder = str(tmp_path / "model")
    finder = entities.load(folder, entities.find_package(folder))
    assert finder.facts == {"model": folder, "version": "0.0.0", "spacy": spacy.__version__}
    texts = ["", "In Houston, Maria Vega's boss paid five dollars to Zorb Corp.", "x " * 50_001 + "Maria Vega"]
    found = finder.search(texts)
    told = [[(text[start:end], kind) for start, end, kind in own] for text, own in zip(texts, found)]
    assert told == [
        [],
        [("Houston", "location"), ("Maria Vega", "person"), ("Zorb Corp.", "organisation")],
        [("Maria Vega", "person")],
    ]
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="finds none of PERSON"):
        entities.load("blank", str(tmp_path / "blank"))
    (tmp_path / "broken").mkdir()
    with pytest.raises(UserError, match="not a spaCy model that can be loaded"):
        entities.load("broken", str(tmp_path / "broken"))
