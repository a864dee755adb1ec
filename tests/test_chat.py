"""Rows of messages: what is trained and measured is what `tokenizer.apply_chat_template` gives, token for token."""

import json
import random

import pytest
from conftest import read_lines, write_rows
from transformers import AutoTokenizer

import run_peft
from common import chat, dataset, formats, trained
from common.problems import UserError
from mia import mia
from mia.signals import encode as encode_for_mia
from mia.signals import lower_case
from perplexity import perplexity
from perplexity.measure import tokenize
from training.batches import encode
from training.checkpoint import checkpoints
from training.run import run as fine_tune

TURNS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BRACKETS = (  # a start token, no system role, roles must alternate
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
REWRITES = (  # only the last answer keeps its first line
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('\n')[-1] }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {"chatml": chat.CHATML, "turns": TURNS, "brackets": BRACKETS}


def conversation(rng: random.Random, turns: int = 2, system: bool = False) -> list[dict]:
    words = ["Ada", "Quillan", "naïve", "ring", "me", "on", "Monday", "🙂", "\n", "x@y.example", "please"]

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 9)))

    start = [{"role": "system", "content": "Be brief."}] if system else []
    pairs = [[{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(turns)]
    return start + [message for pair in pairs for message in pair]


def share_gpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def chat_rows(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"messages": conversation(rng, rng.randint(1, 3))} for _ in range(n)]


def templated(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=["neox", "llama", "opt"])
def tokenizer(request, models):
    return AutoTokenizer.from_pretrained(models[request.param])


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_apply_chat_template(name, tokenizer):
    templated(tokenizer, TEMPLATES[name])
    rows = chat_rows(20)
    renderer = dataset.read_renderer(rows, tokenizer, None, "x")
    rendered = dataset.render("x", rows, range(len(rows)), renderer)
    encoded = encode(rendered, tokenizer, 4096)
    for row, item in zip(rows, encoded):
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert item.ids == ids and item.spans == ((1, len(ids)),)
    measured = encode_for_mia(tokenizer, [row.text for row in rendered], 4096, whole=True)
    assert measured.tokens == [item.ids for item in encoded]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for item, ids in zip(encoded, tokenize(tokenizer, [row.text for row in rendered])):
        assert ids == (item.ids if item.ids[0] == start else [start, *item.ids])


def test_the_assistants_tokens_are_those_that_transformers_masks(tokenizer):
    """By the template's marks, and by prefixes where it has none: against `return_assistant_tokens_mask`."""
    rows = chat_rows(20, seed=1)
    stock = [
        tokenizer.apply_chat_template(
            row["messages"], chat_template=chat.CHATML, return_dict=True, return_assistant_tokens_mask=True
        )
        for row in rows
    ]
    bare = chat.CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for template in (chat.CHATML, bare):
        rendered = dataset.render("x", rows, range(len(rows)), chat.Renderer(tokenizer, template))
        for item, wanted in zip(encode(rendered, tokenizer, 4096, "completion"), stock):
            assert item.ids == wanted["input_ids"]
            labels = [any(start <= place < end for start, end in item.spans) for place in range(len(item.ids))]
            assert labels == [bool(one) for one in wanted["assistant_masks"]]
            assert item.labels == sum(labels) > 0


def test_what_is_cut_off_is_no_label(tokenizer):
    rows = chat_rows(10, seed=2)
    rendered = dataset.render("x", rows, range(10), chat.Renderer(tokenizer, chat.CHATML))
    for whole, cut in zip(
        encode(rendered, tokenizer, 4096, "completion"), encode(rendered, tokenizer, 40, "completion")
    ):
        assert cut.ids == whole.ids[:40] and cut.n_cut == max(0, len(whole.ids) - 40)
        labels = {place for start, end in whole.spans for place in range(start, end)}
        assert {place for start, end in cut.spans for place in range(start, end)} == {p for p in labels if p < 40}


def test_every_shape_of_a_conversation_is_the_same_text(tokenizer):
    messages = conversation(random.Random(3), turns=1, system=True)
    parts = [{"type": "text", "text": messages[1]["content"]}]
    shapes = [
        {"messages": messages},
        {"conversations": share_gpt(messages)},
        {"messages": [messages[0], {"role": "user", "content": parts}, messages[2]]},
        {"messages": [message | {"name": None, "tool_calls": None} for message in messages]},  # columns of Arrow
        {"prompt": messages[:2], "completion": messages[2:]},
    ]
    renderer = chat.Renderer(tokenizer, chat.CHATML)
    rendered = [renderer.render(row) for row in shapes]
    assert all(dataset.shape_of(row) == "chat" and not list(chat.problems_of(row)) for row in shapes)
    assert set(rendered) == {rendered[0]}
    ((start, end),) = rendered[0].completions
    assert rendered[0].text[start:end] == messages[2]["content"] + "<|im_end|>\n"


def test_prompt_and_completion_as_text(tokenizer):
    row = {"prompt": "Name: Ada Quillan\nMail:", "completion": " ada@quillan.example"}
    assert dataset.shape_of(row) == "completion" and dataset.row_text(row) == (row["prompt"] + row["completion"], 23)


BROKEN = [
    ({"messages": []}, "has no message"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "has no assistant message"),
    ({"messages": [{"role": "assistant", "content": 7}]}, r"messages\[0\] has no text"),
    ({"messages": ["hi"]}, r"messages\[0\] is a str, not a message"),
    ({"conversations": [{"from": "martian", "value": "hi"}]}, r"conversations\[0\] has no known role"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}]},
        "has a part that is not text",
    ),
    ({"prompt": "text", "completion": [{"role": "assistant", "content": "x"}]}, "'prompt' must be a list of messages"),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN)
def test_rows_that_are_no_conversation(row, reason, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*chat_rows(3), row])
    with pytest.raises(UserError, match=f"row 3: .*{reason}"):
        dataset.validate(file, formats.read_rows(file))


def test_templates_that_cannot_be_used(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models["neox"])
    tokenizer.chat_template = None
    rows = chat_rows(3)
    with pytest.raises(UserError, match=r"no chat template, .* pass --chat_template"):
        dataset.read_renderer(rows, tokenizer, None, "x")
    (tmp_path / "odd.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=r"odd\.jinja: not a Jinja template"):
        dataset.read_renderer(rows, tokenizer, str(tmp_path / "odd.jinja"), "x")
    with pytest.raises(UserError, match="the rows are not chat rows"):
        dataset.read_renderer([{"text": "a"}], tokenizer, "chatml", "x")
    with_system = [{"messages": conversation(random.Random(0), system=True)}]
    with pytest.raises(UserError, match=r"rows: row 0: .*rejects its messages \(roles must alternate\)"):
        dataset.render("rows", with_system, [0], chat.Renderer(tokenizer, BRACKETS))
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "first\nlast"}]
    rewritten = [{"messages": messages + messages}]
    with pytest.raises(UserError, match="rewrites earlier messages"):
        dataset.render("rows", rewritten, [0], chat.Renderer(tokenizer, REWRITES))


def train(tmp_path, model, rows, *flags):
    file = write_rows(tmp_path / "chat.jsonl", rows)
    words = ("-m", model, "-i", file, "--output_root", tmp_path / "out", "-e", 1, "-pdbs", 4, "-gas", 1, "-lr", 1e-3)
    folder = fine_tune(run_peft.make_parser().parse_args([*map(str, words), *map(str, flags)]))
    return file, checkpoints(folder)[-1]


def test_training_and_measuring_a_chat_model(models, tmp_path, capsys):
    """run_peft.py, then mia.py and perplexity.py on its checkpoint, which carries the template it was given."""
    rows = chat_rows(14, seed=5)
    flags = ("--chat_template", "chatml", "--loss_on", "completion", "--eval_rows", 4, "--lora_r", 4)
    file, checkpoint = train(tmp_path, models["llama"], rows, *flags)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.chat_template == chat.CHATML

    seen = trained.read(checkpoint)
    assert [row.row for row in seen.rows] == list(range(4, 14))
    renderer = chat.Renderer(tokenizer, chat.CHATML)
    for row in seen.rows:
        text = renderer.render(rows[row.row]).text
        assert row in seen.find(text)
        for message in rows[row.row]["messages"]:
            start = text.index(message["content"] + "<|im_end|>")
            span = start, start + len(message["content"])
            assert row.covers(*span) == (message["role"] == "assistant")
        stock = tokenizer.apply_chat_template(
            rows[row.row]["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert row.tokens == len(stock["input_ids"]) and row.loss_tokens == sum(stock["assistant_masks"])

    heldout = write_rows(tmp_path / "heldout.jsonl", chat_rows(10, seed=6))
    out = tmp_path / "mia"
    words = ["--model", checkpoint, "--members", file, "--nonmembers", heldout, "--output_dir", out, "--bootstrap", 20]
    assert mia.main(list(map(str, words))) == 0
    line = read_lines(out / "results_mia.jsonl")[0]
    assert line["members_seen"] == {"whole": 0, "partly": 10, "never": 0}
    assert len(line["chat_template_sha256"]) == 64
    scores = read_lines(out / "scores_mia.jsonl")
    assert len(scores) == 20

    words = ["--model", checkpoint, "-d", heldout, "--output_dir", tmp_path / "ppl"]
    assert perplexity.main(list(map(str, words))) == 0
    (measured,) = read_lines(tmp_path / "ppl" / "perplexity.jsonl")
    assert measured["chat_template_sha256"] == line["chat_template_sha256"]
    sizes = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in chat_rows(10, seed=6)]
    assert measured["n_tokens"] == sum(sizes)


def test_chat_and_plain_rows_do_not_mix(models, tmp_path):
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": f"text {n}"} for n in range(8)])
    messages = write_rows(tmp_path / "chat.jsonl", chat_rows(8))
    words = ["--model", models["llama"], "--members", messages, "--nonmembers", plain, "--output_dir", tmp_path / "o"]
    with pytest.raises(UserError) as error:
        mia.main(list(map(str, [*words, "--chat_template", "chatml"])))
    assert "different kinds of rows: --members has messages, --nonmembers has no messages" in str(error.value)
    with pytest.raises(UserError, match="no chat template"):
        mia.main(list(map(str, words)))
    with pytest.raises(UserError, match="has the fields of another row type"):
        mixed = write_rows(tmp_path / "mixed.jsonl", [*chat_rows(3), {"text": "x"}])
        dataset.validate(mixed, formats.read_rows(mixed))


def test_lower_case_spares_special_tokens(tokenizer):
    special = tokenizer.eos_token
    assert lower_case(tokenizer, [f"Ada{special}QUILLAN"]) == [f"ada{special}quillan"]


def test_several_kept_spans_are_read_back(tmp_path):
    rows = (
        trained.TrainedRow(0, "ab", 9, 5, False, ((2, 5), (7, 9))),
        trained.TrainedRow(1, "cd", 3, 2, False, ((1, 4),)),
    )
    trained.write(tmp_path, trained.Header("", "completion", 64), rows)
    (tmp_path / "checkpoint-1").mkdir()
    read = trained.read(tmp_path / "checkpoint-1")
    assert read.rows == rows
    assert [read.rows[0].covers(*span) for span in ((2, 5), (3, 8), (7, 8))] == [True, False, True]
    lines = [json.loads(line) for line in (tmp_path / trained.FILE).read_text().splitlines()]
    assert [line["kept"] for line in lines[1:]] == [[[2, 5], [7, 9]], [1, 4]]
