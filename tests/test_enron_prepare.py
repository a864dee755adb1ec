"""data/enron/prepare.py: fictional mails in every input form, through the real entry point."""

import contextlib
import gc
import io
import itertools
import json
import mailbox
import os
import random
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from email import policy
from email.header import Header
from email.message import EmailMessage
from pathlib import Path

import pytest
from conftest import make_tokenizer, read_lines, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from common import dataset, manifests
from common.problems import UserError
from common.results import sha256
from data.enron import config, inputs, mail, names, occurrences, prepare, prompts
from data.enron import run as enron_run
from data.enron.pairs import group_people, shuffled

PEOPLE = [
    ("Jane Roe", "jane.roe@hartwell.example"),
    ("Orla Quist", "oquist@norbeck.example"),
    ("Tomas van Dahl", "tvd77@quillan.example"),
    ("Mei J. Tanaka", "Mei.Tanaka@Hartwell.example"),
    ("Ruth O'Shea-Lind", "ruth@norbeck.example"),
    ("Bela Novak", "bnovak@quillan.example"),
    ("Ada Pell", "pell@hartwell.example"),
    ("Ivo Marsh", "marsh_i@norbeck.example"),
    ("Zoe Fenn", "zoe-fenn@quillan.example"),
]


def write(sender, to, body="Nothing new here.", subject="Plans", **headers) -> bytes:
    """A mail from (name, address) to a list of such pairs; keyword arguments replace or add headers (_ for -)."""
    message = EmailMessage()
    message["Date"] = "Mon, 14 May 2001 16:39:00 -0700"
    message["From"] = "{} <{}>".format(*sender)
    message["To"] = ", ".join("{} <{}>".format(*pair) for pair in to)
    message["Subject"] = subject
    for name, value in headers.items():
        del message[name.replace("_", "-")]
        message[name.replace("_", "-")] = value
    message.set_content(body)
    return message.as_bytes()


@pytest.fixture
def mails() -> list[bytes]:
    """Nine mails, each from a person to two others; the second half quotes a further one."""
    made = []
    for index, sender in enumerate(PEOPLE):
        other, third, quoted = (PEOPLE[(index + step) % len(PEOPLE)] for step in (1, 2, 4))
        body = f"Note number {index} about the harbour.\n\n"
        if index > 3:
            body += f"-----Original Message-----\nFrom: {quoted[0]} [mailto:{quoted[1]}]\nSent: today\n\nSee below.\n"
        made.append(write(sender, [other, third], body))
    return made


def as_folder(root: Path, mails, pattern) -> Path:
    """Mails spread over two subfolders, along with files that are not mails."""
    for number, raw in enumerate(mails):
        folder = root / ("inbox", "sent_items")[number % 2] / "x"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / pattern.format(number)).write_bytes(raw)
    (root / "inbox" / "labels.json").write_text("{}")
    (root / ".hidden").write_text("nothing")
    return root


def as_tar(root: Path, mails, mode="w:gz") -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "mails.tar.gz", mode) as tar:
        for number, raw in enumerate(mails):
            member = tarfile.TarInfo(f"maildir/roe-j/inbox/{number}.")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return root / "mails.tar.gz"


def as_mbox(root: Path, mails) -> Path:
    root.mkdir(exist_ok=True)
    box = mailbox.mbox(root / "letters")
    for raw in mails:
        box.add(raw)
    box.close()
    return root / "letters"


FORMS = {
    "maildir": lambda root, mails: as_folder(root, mails, "{}."),
    "eml": lambda root, mails: as_folder(root, mails, "letter {}.eml"),
    "txt": lambda root, mails: as_folder(root, mails, "{:05d}.7c53336b37003a9286aba55d2945844c.txt"),
    "numbered": lambda root, mails: as_folder(root, mails, "{:05d}.7c53336b37003a9286aba55d2945844c"),
    "no extension": lambda root, mails: as_folder(root, mails, "letter-{}"),
    "qmail": lambda root, mails: as_folder(root, mails, "10340{}.M5P6.host:2,S"),
    "tar.gz": as_tar,
    "tar": lambda root, mails: as_tar(root, mails, "w"),
    "mbox": as_mbox,
}


def build(source, output: Path, *more) -> tuple[list[dict], dict]:
    """(rows, run_prepare.json's counts) of one run with one worker, characters instead of tokens."""
    sources = source if isinstance(source, list) else [source]
    words = ["--input", *map(str, sources), "--output", str(output), "--tokenizer", "none", "--workers", "1"]
    assert prepare.main([*words, *map(str, more)]) == 0
    return read_lines(output), json.loads((output.parent / "run_prepare.json").read_text())["counts"]


def one(tmp_path, *raws) -> tuple[dict[str, dict], dict]:
    """({gt-name: row}, counts) of a few mails plus three plain ones (a file needs three rows)."""
    filler = [write(PEOPLE[i], [PEOPLE[i + 1]]) for i in (5, 6, 7)]
    rows, counts = build(as_folder(tmp_path / "in", [*raws, *filler], "{}."), tmp_path / "out.jsonl")
    return {row["gt-name"]: row for row in rows}, counts


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_file(form, mails, tmp_path):
    reference, _ = build(as_folder(tmp_path / "reference", mails, "{}."), tmp_path / "reference.jsonl")
    rows, counts = build(FORMS[form](tmp_path / "in", mails), tmp_path / "rows.jsonl")
    assert rows == reference
    assert {(row["gt-name"], row["gt-email"]) for row in rows} == set(PEOPLE)
    assert (counts["messages"], counts["broken"]) == (9, 0)
    # 9 senders, 18 recipients, 5 quoted: counted from `mails`
    assert (counts["named"], counts["duplicates"], counts["rows"]) == (32, 23, 9)


def test_rows_hold_the_text_around_the_address(mails, tmp_path):
    rows, _ = build(as_folder(tmp_path / "in", mails, "{}."), tmp_path / "rows.jsonl")
    texts = [occurrences.render(raw)[0] for raw in mails]
    for index, row in enumerate(rows):
        assert list(row) == ["gt-name", "gt-email", "prompt", "continuation", "row_id"]
        assert row["row_id"] == index
        assert row["continuation"].startswith(row["gt-email"])
        assert any(row["prompt"] + row["continuation"] in text for text in texts)
        assert row["prompt"].endswith((f"{row['gt-name']} <", f"{row['gt-name']} [mailto:"))


def test_a_mail_as_it_is_rendered(tmp_path):
    raw = write(PEOPLE[0], PEOPLE[1:3], "First line.\n", cc=f"{PEOPLE[3][0]} <{PEOPLE[3][1]}>", X_Mailer="m")
    text, people, dropped = occurrences.occurrences(raw)
    assert text == (
        "Subject: Plans\nDate: Mon, 14 May 2001 16:39:00 -0700\nFrom: Jane Roe <jane.roe@hartwell.example>\n"
        "To: Orla Quist <oquist@norbeck.example>, Tomas van Dahl <tvd77@quillan.example>\n"
        "Cc: Mei J. Tanaka <Mei.Tanaka@Hartwell.example>\n\nFirst line.\n"
    )
    assert [(person.name, person.address) for person in people] == PEOPLE[:4]
    assert all(text[person.position :].startswith(person.address) for person in people)
    assert dropped == {}


def test_gt_email_is_as_written_and_case_makes_no_second_pair(tmp_path):
    shouted = ("JANE ROE", "JANE.ROE@HARTWELL.EXAMPLE")
    rows, counts = one(tmp_path, write(PEOPLE[0], [PEOPLE[3]]), write(shouted, [PEOPLE[3]]))
    (row,) = [row for name, row in rows.items() if name.casefold() == "jane roe"]
    assert (row["gt-name"], row["gt-email"]) in (PEOPLE[0], shouted)
    assert row["continuation"].startswith(row["gt-email"])
    assert rows["Mei J. Tanaka"]["gt-email"] == "Mei.Tanaka@Hartwell.example"
    assert counts["rows"] == 6  # Roe, Tanaka, and the four people of the filler mails


def test_a_body_is_preferred_and_long_lists_come_last(tmp_path):
    crowd = [(f"Person {(chr(97 + i) * 3).title()}", f"{chr(97 + i)}@crowd.example") for i in range(8)]
    rows, _ = one(tmp_path, *(write(pair, [PEOPLE[0]]) for pair in crowd[:7]), write(PEOPLE[1], [*crowd, PEOPLE[8]]))
    assert rows["Person Ggg"]["prompt"].endswith("From: Person Ggg <")
    assert rows["Person Hhh"]["prompt"].endswith(", Person Hhh <")  # it occurs nowhere else
    quoted = write(PEOPLE[1], [PEOPLE[2]], "Hello\n> From: Person Ggg [mailto:g@crowd.example]\n> Hi\n")
    (tmp_path / "second").mkdir()
    rows, _ = one(tmp_path / "second", *(write(pair, [PEOPLE[0]]) for pair in crowd), quoted)
    assert rows["Person Ggg"]["prompt"].endswith("Hello\n> From: Person Ggg [mailto:")
    assert rows["Person Ggg"]["continuation"] == "g@crowd.example]\n> Hi"


def test_prompt_and_continuation_are_bounded(tmp_path):
    lines = [f"line {number} of a long letter" for number in range(200)]
    body = "\n".join([*lines, "Ada Pell <ada@pell.example> wrote:", *lines])
    rows, _ = one(tmp_path, write(PEOPLE[0], [PEOPLE[1]], body))
    row = rows["Ada Pell"] if rows["Ada Pell"]["gt-email"] == "ada@pell.example" else None
    if row is None:  # the filler mails contain another address of hers
        row = next(r for r in read_lines(tmp_path / "out.jsonl") if r["gt-email"] == "ada@pell.example")
    assert len(row["prompt"]) == config.PROMPT_CHARACTERS
    longest = occurrences.MAX_CONTINUATION_CHARACTERS
    assert longest - 10 < len(row["continuation"]) <= longest
    assert row["prompt"] + row["continuation"] in occurrences.render(write(PEOPLE[0], [PEOPLE[1]], body))[0]
    assert row["continuation"].split()[-1] in "\n".join(lines).split()  # no partial word


# ---------------------------------------------------------------- encodings


def raw_mail(headers: bytes, body: bytes) -> bytes:
    return b"Date: Mon, 14 May 2001 16:39:00 -0700\n" + headers + b"\n" + body


ENCODED = {
    "latin-1 undeclared": raw_mail(
        "From: Zoë Muñoz <zm@norbeck.example>\nSubject: x\n".encode("latin-1"), "Grüße\n".encode("latin-1")
    ),
    "utf-8 undeclared": raw_mail("From: Zoë Muñoz <zm@norbeck.example>\n".encode(), "Grüße\n".encode()),
    "latin-1 declared as ascii": raw_mail(
        b"From: =?iso-8859-1?Q?Zo=EB_Mu=F1oz?= <zm@norbeck.example>\nContent-Type: text/plain; charset=us-ascii\n",
        "Grüße\n".encode("latin-1"),
    ),
    "quoted-printable": raw_mail(
        b"From: =?utf-8?b?Wm/DqyBNdcOxb3o=?= <zm@norbeck.example>\nContent-Transfer-Encoding: quoted-printable\n"
        b"Content-Type: text/plain; charset=iso-8859-1\n",
        b"Gr=FC=\n=DFe\n",
    ),
    "base64": raw_mail(
        b"From: =?utf-8?q?Zo=C3=AB?= =?utf-8?q?_Mu=C3=B1oz?= <zm@norbeck.example>\n"
        b"Content-Transfer-Encoding: base64\nContent-Type: text/plain; charset=utf-8\n",
        b"R3LDvMOfZQ==\n",
    ),
    "unknown charset": raw_mail(
        "From: Zoë Muñoz <zm@norbeck.example>\nContent-Type: text/plain; charset=x-none\n".encode(), "Grüße\n".encode()
    ),
    "encoded words behind a last name first": raw_mail(
        b"From: =?iso-8859-1?Q?Mu=F1oz=2C_Zo=EB?= <zm@norbeck.example>\n", "Grüße\n".encode("cp1252")
    ),
    "carriage returns": raw_mail("From: Zoë Muñoz <zm@norbeck.example>\r\n".encode(), "Grüße\r\n".encode()).replace(
        b"-0700\n", b"-0700\r\n"
    ),
    "alternative parts": raw_mail(
        "From: Zoë Muñoz <zm@norbeck.example>\nContent-Type: multipart/alternative; boundary=b\n".encode(),
        b"--b\nContent-Type: text/html\n\n<p>x\n--b\nContent-Type: text/plain; charset=latin1\n\nGr\xfc\xdfe\n--b--\n",
    ),
    "html only": raw_mail(
        "From: Zoë Muñoz <zm@norbeck.example>\nContent-Type: text/html\n".encode(),
        b"<html><style>p {x}</style><p>Gr&uuml;&szlig;e</p></html>",
    ),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_encodings(kind):
    text, people, _ = occurrences.occurrences(ENCODED[kind])
    assert [(person.name, person.address) for person in people] == [("Zoë Muñoz", "zm@norbeck.example")]
    assert text.rstrip().endswith("\n\nGrüße")
    assert "\r" not in text


@pytest.mark.parametrize(
    "headers",
    [
        b"From: =?utf-8?b?!!?= <x@norbeck.example>\n",
        b"From: \nTo: ,,;<>\n",
        b'From: "Jane Roe <jane@norbeck.example>\nTo: <<<(("\n',
        b"From: \xff\xfe <\xff@\xff>\n",
        b"no colon here\nFrom: Jane Roe <jane@norbeck.example>\n",
        b"From: Jane Roe <jane@norbeck.example>\nContent-Type: multipart/mixed\n",
        b"From: Jane Roe <jane@norbeck.example>\nContent-Type: text/plain; charset*=a'b\n",
        b"From: Jane Roe <jane@norbeck.example>\nContent-Transfer-Encoding: base64\n",
    ],
)
def test_broken_headers_give_no_wrong_pair(headers):
    text, people, _ = occurrences.occurrences(raw_mail(headers, b"Body, not base64.\n"))
    assert {(person.name, person.address) for person in people} <= {("Jane Roe", "jane@norbeck.example")}
    text.encode("utf-8")


# ---------------------------------------------------------------- names and addresses


@pytest.mark.parametrize(
    ("display", "expected"),
    [
        ("Jane Roe", "Jane Roe"),
        ("  'Jane Roe' ", "Jane Roe"),
        ("Roe, Jane", "Jane Roe"),
        ("Roe, Jane K.", "Jane K. Roe"),
        ("Roe, Jane Kay", "Jane Kay Roe"),
        ("van Dahl, Tomas", "Tomas van Dahl"),
        ("Jane Roe, Ph.D.", "Jane Roe"),
        ("Dr. Jane Roe Jr.", "Jane Roe"),
        ("Jane Roe (E-mail)", "Jane Roe"),
        ("Jane 'Jay' Roe", "Jane Roe"),
        ("Jane Roe (a (b) [c] d)", "Jane Roe"),
        ("Jane Roe/HOU/ECT@ECT", "Jane Roe"),
        ("Roe, Jane </O=HARTWELL/OU=NA/CN=RECIPIENTS/CN=JROE>", "Jane Roe"),
        ("jane roe", "jane roe"),
        ("J.R. O'Shea-Lind", "J.R. O'Shea-Lind"),
        ("Zoë Muñoz", "Zoë Muñoz"),
        ("/O=HARTWELL/OU=NA/CN=RECIPIENTS/CN=JROE", names.X500),
        ("jane.roe@hartwell.example", names.IS_ADDRESS),
        ("", names.NO_NAME),
        ("''", names.NO_NAME),
        ("Jane", names.WORD_COUNT),
        ("Jane van der Roe", names.WORD_COUNT),
        ("Jane Roe, Hartwell Harbour", names.WORD_COUNT),
        ("Roe, Jr.", names.WORD_COUNT),
        ("Jane Roe2", names.DIGITS),
        ("Agent 007", names.DIGITS),
        ("Jane R", names.NOT_NAME),
        ("Jane & Tom", names.NOT_NAME),
        ("hartwell news.com", names.NOT_NAME),
        ("Customer Service", names.ROLE_NAME),
        ("Jane via List", names.ROLE_NAME),
        ("Mailing List", names.ROLE_NAME),
    ],
)
def test_names_in_a_field(display, expected):
    name, reason = names.person(display)
    assert (reason or name) == expected
    assert (name == "") == (reason is not None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("From: Jane Roe [", "Jane Roe"),
        ("> > From: Jane Roe [", "Jane Roe"),
        ("From: Roe, Jane [", "Jane Roe"),
        ("From:\tRoe, Jane K. [", "Jane K. Roe"),
        ('From: "Roe, Jane Kay" <', "Jane Kay Roe"),
        ("To: Ada Pell; Jane Roe <", "Jane Roe"),
        ("Cc: Ada Pell <pell@x.example>, Jane Roe <", "Jane Roe"),
        ("On Mon, 14 May 2001, Jane Roe <", "Jane Roe"),
        ("Jane Roe\n<", "Jane Roe"),
        ("> Jane Roe\n> <", "Jane Roe"),
        ("This was written by Jane Roe <", "Jane Roe"),
        (" - Jane Roe <", "Jane Roe"),
        ("Regards, Jane Roe <", "Jane Roe"),
        ("To: ada@x.example, Jane Roe <", "Jane Roe"),
        ("Jane Roe.\n<", "Jane Roe"),
        ("ask Jane Roe <", names.NOT_NAME),
        ("Dear Jane <", names.NOT_NAME),
        ("Please write Jane <", names.NOT_NAME),
        ("see Jane Roe's <", names.NOT_NAME),
        ("x@y.example <", names.IS_ADDRESS),
        ("\n\n<", names.NO_NAME),
        ("At 10:30 PM Jane <", names.DIGITS),
    ],
)
def test_names_left_of_a_bracket_in_text(line, expected):
    name, reason = occurrences.left_name(line, len(line) - 1)
    assert (reason or name) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("jane.roe@hartwell.example", None),
        ("J_Roe+work@Sub.Hartwell.example", None),
        ("o'shea@norbeck.example", None),
        ("info@hartwell.example", names.ROLE_ADDRESS),
        ("no-reply@hartwell.example", names.ROLE_ADDRESS),
        ("noreply@hartwell.example", names.ROLE_ADDRESS),
        ("list-harbour@hartwell.example", names.ROLE_ADDRESS),
        ("harbour-list@hartwell.example", names.ROLE_ADDRESS),
        ("harbour-request@hartwell.example", names.ROLE_ADDRESS),
        ("owner-harbour@hartwell.example", names.ROLE_ADDRESS),
        ("admin.hr@hartwell.example", names.ROLE_ADDRESS),
        ("Postmaster@hartwell.example", names.ROLE_ADDRESS),
        ("no.address@hartwell.example", names.ROLE_ADDRESS),
        ("bounce-jane=roe.example@hartwell.example", names.ROLE_ADDRESS),
        ("IMCEANOTES-Jane+20Roe@hartwell.example", names.BAD_ADDRESS),
        ("/O=HARTWELL/CN=JROE@hartwell.example", names.BAD_ADDRESS),
        ("jane roe@hartwell.example", names.BAD_ADDRESS),
        ("jane..roe@hartwell.example", names.BAD_ADDRESS),
        (".roe@hartwell.example", names.BAD_ADDRESS),
        ("jane@localhost", names.BAD_ADDRESS),
        ("x#jane@hartwell.example", names.BAD_ADDRESS),
        ("jane@", names.BAD_ADDRESS),
    ],
)
def test_addresses(address, expected):
    assert names.address_problem(address) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Jane Roe <jane@x.example>", [("Jane Roe", "jane@x.example")]),
        ('"Roe, Jane" <jane@x.example>, ada@y.example', [("Roe, Jane", "jane@x.example"), ("", "ada@y.example")]),
        ("Roe, Jane <jane@x.example>", [("Roe, Jane", "jane@x.example")]),
        ("jane@x.example (Jane Roe)", [("Jane Roe", "jane@x.example")]),
        ("<jane@x.example>", [("", "jane@x.example")]),
        ("undisclosed-recipients:;", []),
        ("jane@x.example <jane@x.example>", [("jane@x.example", "jane@x.example")]),
        ("Jane Roe <x#y@x.example>", [("Jane Roe", "x#y@x.example")]),  # not its end y@x.example
        ("Jane Roe<jane@x.example>;Ada Pell<ada@y.example>",
         [("Jane Roe", "jane@x.example"), ("Ada Pell", "ada@y.example")]),
    ],
)  # fmt: skip
def test_mailboxes_of_a_header(value, expected):
    assert names.mailboxes(value) == expected


# read as Python's own parser reads them
LIKE_PYTHON = """
Jane Roe <jane@x.example>
jane@x.example
<jane@x.example>
jane@x.example, ada@y.example
"Roe, Jane" <jane@x.example>, ada@y.example
"Roe; Jane" <jane@x.example>, "Pell: Ada" <ada@y.example>
"a@b" <jane@x.example>
Jane Roe <jane@x.example>, , ada@y.example,
J. R. Roe <jane@x.example>
Jane Roe<jane@x.example>
Ruth O'Shea-Lind <o'shea@norbeck.example>
Zoë Muñoz <zm@norbeck.example>
=?utf-8?q?Zo=C3=AB_Mu=C3=B1oz?= <zm@norbeck.example>
=?utf-8?q?Mu=C3=B1oz=2C_Zo=C3=AB?= <zm@norbeck.example>, ada@y.example
"=?utf-8?q?Roe=2C_Jane?=" <jane@x.example>
"Jane" "Roe" <jane@x.example>
"Jane \\"JR\\" Roe" <jane@x.example>
"Roe \\\\ Jane" <jane@x.example>, ada@y.example
"jane"@x.example
undisclosed-recipients:;
Friends: Jane Roe <jane@x.example>, ada@y.example;
Friends: jane@x.example, "Pell, Ada" <ada@y.example>;, Bela Novak <b@z.example>
Friends: ;, jane@x.example
Friends:jane@x.example;
"Friends, old": jane@x.example, Ada Pell <ada@y.example>;
"Friends @ Hartwell": jane@x.example;
Friends (of the harbour): Jane Roe <jane@x.example>;
Ada Pell <ada@y.example>, Friends: Jane Roe <jane@x.example>;
mailto:jane@x.example
Jane Roe (at home) <jane@x.example>
Jane Roe (a (b) c) <jane@x.example>
Jane Roe (a (b (c) d) (e)) <jane@x.example>, ada@y.example
(a, b) Jane Roe <jane@x.example>
Jane Roe (1\\) 2) <jane@x.example>
Jane Roe (a "quote) <jane@x.example>, "Pell, Ada" <ada@y.example>
Jane Roe <jane@x.example> (at home, today)
Jane(x)Roe <jane@x.example>
Jane Roe <jane(home)@x.example>
Jane Roe <jane@x.example (at (my) home)>
"Jane (x) Roe" <jane@x.example>
"Jane <x> Roe" <jane@x.example>
jane@x.example ()
Jane Roe <@hop.example:jane@x.example>
Jane Roe <@hop.example,@other.example:jane@x.example>, ada@y.example
Jane Roe <jane@[10.0.0.1]>
Jane Roe <jane@x.example
Jane Roe <jane@x.example<mailto:jane@x.example>>
Jane Roe <jroe>, Ada Pell <ada@y.example>
Jane Roe on behalf of Orla Quist <orla@y.example>
""".strip().splitlines()

JANE, ADA = ("Jane Roe", "jane@x.example"), ("Ada Pell", "ada@y.example")
UNLIKE_PYTHON = {  # deliberate differences: {header: how it is read}
    # a comment is the name if there is no other, as was the custom before RFC 822; the one after the address first
    "jane@x.example (Jane Roe)": [JANE],
    "jane@x.example (Jane (JR) Roe), ada@y.example (Pell, Ada)": [("Jane (JR) Roe", JANE[1]), ("Pell, Ada", ADA[1])],
    "(Jane Roe) jane@x.example, (work) ada@y.example (Ada Pell)": [JANE, ADA],
    "<jane@x.example> (Jane Roe)": [JANE],
    "(Jane Roe) <jane@x.example>": [JANE],
    # what mail programs write in violation of the standard
    "Roe, Jane <jane@x.example>": [("Roe, Jane", JANE[1])],
    "Jane Roe <jane@x.example>;Ada Pell <ada@y.example>": [JANE, ADA],
    "Jane Roe <jane@x.example> Ada Pell <ada@y.example>": [JANE, ADA],
    "Friends: Jane Roe <jane@x.example>, Others: Ada Pell <ada@y.example>;": [JANE, ADA],
    '"Jane Roe <jane@x.example>': [JANE],
    "'Jane Roe' <jane@x.example>": [JANE],
    'Jane "JR" Roe <jane@x.example>': [('Jane "JR" Roe', JANE[1])],  # its quotes show that it is not a middle name
    "Jane Roe <mailto:jane@x.example>": [JANE],
    "Jane Roe [jane@x.example]": [JANE],
    "Jane Roe [mailto:jane@x.example], Ada Pell [SMTP:ada@y.example]": [JANE, ADA],
    "Jane Roe [jane@x.example<mailto:jane@x.example>]": [JANE],
    "jane@x.example <jane@x.example>": [("jane@x.example", JANE[1])],
    "Jane @ Hartwell <jane@x.example>": [("Jane @ Hartwell", JANE[1])],
    "Jane Roe <jane@x.example> on behalf of Ada Pell <ada@y.example>": [JANE, ADA],
    '"Jane Roe" <jane@x.example> On Behalf Of "Pell, Ada" <ada@y.example>': [JANE, ("Pell, Ada", ADA[1])],
    "Jane Roe <>": [],
    # white space in an address is kept as it was written; a run of it in a name becomes one space
    "Jane Roe <jane @ x.example>": [("Jane Roe", "jane @ x.example")],
    "=?utf-8?q?Zo=C3=AB?= =?utf-8?q?_Mu=C3=B1oz?= <zm@norbeck.example>": [("Zoë Muñoz", "zm@norbeck.example")],
}


@pytest.mark.parametrize("value", LIKE_PYTHON + list(UNLIKE_PYTHON))
def test_headers_mean_what_they_mean_to_python(value):
    """An independent route: email.policy.default, which the script does not use."""
    theirs = [(box.display_name, box.addr_spec) for box in policy.default.header_factory("to", value).addresses]
    assert names.mailboxes(value) == UNLIKE_PYTHON.get(value, theirs)
    assert (theirs == names.mailboxes(value)) == (value in LIKE_PYTHON)


class Header5322:
    """A random address header that follows RFC 5322: mailboxes and groups, quoted names, routes, nested comments."""

    def __init__(self, random_source):
        self.random = random_source

    def join(self, pieces: list[str], most: int) -> str:
        return "".join(self.random.choices(pieces, k=self.random.randint(1, most)))

    def comment(self, depth: int = 0) -> str:
        inner = self.comment(depth + 1) if depth < 3 else ""
        return "(" + self.join(["a", "b c", ", ", "; ", ": ", "@ x", r"\)", r"\(", '"', "[q]", inner], 4) + ")"

    def space(self) -> str:
        return self.random.choice([" ", " ", f" {self.comment()} "])

    def phrase(self) -> str:
        if self.random.random() < 0.4:
            return '"' + self.join(["Roe", ", ", "Jane ", r"\"", r"\\", "(", ")", "<", ">", ";", ":", "@"], 5) + '"'
        words = ["Jane", "Roe", "O'Shea", "van", "J", "=?utf-8?q?Zo=C3=AB?= Ann"]
        return self.space().join(self.random.choices(words, k=self.random.randint(1, 3)))

    def mailbox(self) -> str:
        address = f"{self.random.choice(['jane', 'a.b', 'x+y'])}{self.random.randrange(1000)}@x.example"
        if self.random.random() < 0.25:
            return address
        route = self.random.choice(["", "", "@h.example:", "@h.example,@i.example:"])
        return f"{self.random.choice([self.phrase(), ''])}{self.space()}<{route}{address}{self.space()}>{self.space()}"

    def item(self) -> str:
        if self.random.random() < 0.3:
            return f"{self.phrase()}:{', '.join(self.mailbox() for _ in range(self.random.randrange(3)))};"
        return self.mailbox()


@given(st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_generated_headers_mean_what_they_mean_to_python(random_source):
    header = Header5322(random_source)
    value = " ".join(f",{header.space()}".join(header.item() for _ in range(random_source.randint(1, 4))).split())
    theirs = [(box.display_name, box.addr_spec) for box in policy.default.header_factory("to", value).addresses]
    ours = names.mailboxes(value)
    assert [address for _, address in ours] == [address for _, address in theirs]
    for (name, _), (expected, _) in zip(ours, theirs):
        expected = " ".join(expected.split()).strip("'\" ")
        assert name == expected or (not expected and "(" in value)  # a comment is the name if there is no other


def test_members_of_groups_and_senders_on_behalf_are_no_longer_lost():
    """Through `occurrences`: text, names and counts; in the text no address precedes the brackets."""
    headers = (
        "From: Jane Roe (of the (old) harbour) <jane@x.example> on behalf of Orla Quist <orla@y.example>\n"
        "To: Harbour Friends: Ada Pell <ada@y.example>, Bela Novak <bela@z.example<mailto:bela@z.example>>;\n"
        "Cc: Ivo Marsh [ivo@z.example<mailto:ivo@z.example>], mei@z.example (Mei (the elder) Tanaka)\n"
    )
    text, people, dropped = occurrences.occurrences(raw_mail(headers.encode(), b"Hello.\n"))
    assert [(person.name, person.address) for person in people] == [
        ("Jane Roe", "jane@x.example"),
        ("Orla Quist", "orla@y.example"),
        ("Ada Pell", "ada@y.example"),
        ("Bela Novak", "bela@z.example"),
        ("Ivo Marsh", "ivo@z.example"),
        ("Mei Tanaka", "mei@z.example"),
    ]
    assert dropped == {} and all(text.count(person.address) == 1 for person in people)
    assert "To: Ada Pell <ada@y.example>, Bela Novak <bela@z.example>\n" in text


COPIES = {  # a body in which each address occurs twice, as links do when rendered as text: {text: (name, prompt's end)}
    "ask [2001] Jane Roe [jane@x.example<mailto:jane@x.example>] now": ("Jane Roe", "Jane Roe ["),
    "From: Jane Roe <jane@x.example<mailto:jane@x.example>>\n": ("Jane Roe", "Jane Roe <"),
    "From: Jane Roe <jane@x.example <mailto:Jane@X.example?subject=hi>>\n": ("Jane Roe", "Jane Roe <"),
    "> From: Roe, Jane [mailto:jane@x.example\n> <mailto:jane@x.example>]\n": ("Jane Roe", "Roe, Jane [mailto:"),
    "Jane Roe <jane@x.example>, Jane Roe <jane@x.example>": ("Jane Roe", "Jane Roe <"),
    "Jane Roe/HOU/ECT@ect.example <jane@x.example>": ("Jane Roe", "ect.example <"),
    "Jane Roe jane@x.example<mailto:jane@x.example>": None,  # no bracket before the first: it has no name of its own
    "Jane Roe JRoe@x.example <mailto:jane@x.example>": None,
    "Jane Roe <jane@x.example <mailto:other@x.example>>": None,
    "Jane Roe [jane@x.example<mailto:jane@x.example>": None,
}


@pytest.mark.parametrize("body", COPIES)
def test_the_text_before_an_address_in_a_body_does_not_contain_its_copy(body):
    text, people, _ = occurrences.occurrences(raw_mail(b"From: x@y.example\n", body.encode()))
    expected = COPIES[body]
    assert {(person.name, person.address) for person in people} == (
        {(expected[0], "jane@x.example")} if expected else set()
    )
    if expected:
        prompt, continuation = occurrences.cut(text, people[0].position)
        assert prompt.endswith(expected[1]) and "jane@" not in prompt
        assert continuation.startswith("jane@x.example")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("box", [False, True])
def test_a_byte_order_mark_is_no_part_of_a_mail(box, newline, tmp_path):
    one = b"From: Jane Roe <jane@x.example>\nSubject: Plans\n\nHello.\n"
    content = b"".join(b"From a Mon May 14 10:10:00 2001\n" + one + b"\n" for _ in range(2)) if box else one
    content = content.replace(b"\n", newline)
    files = []
    for name, start in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(start + content)
        files.append(tmp_path / name)
        assert inputs.kind_of(tmp_path / name) == ("mbox" if box else "mail")
    plain, marked = ([raw for _, raw in mail.read_mails(io.BytesIO(file.read_bytes()), "x")] for file in files)
    assert marked == plain and len(plain) == 1 + box
    assert [person.name for person in occurrences.occurrences(marked[0])[1]] == ["Jane Roe"]


def enron_mail(to=1) -> bytes:
    """The headers of the CMU corpus: addresses and names in different fields."""
    names = ["Quist, Orla </O=HARTWELL/OU=NA/CN=RECIPIENTS/CN=OQUIST>", "Pell, Ada </O=HARTWELL/OU=EU/CN=APELL>"]
    addresses = ["oquist@norbeck.example", "pell@hartwell.example"]
    return (
        "Message-ID: <1.JavaMail.mail@hartwell.example>\nDate: Mon, 14 May 2001 16:39:00 -0700 (PDT)\n"
        f"From: jane.roe@hartwell.example\nTo: {', '.join(addresses[:2])}\nSubject: Plans\nMime-Version: 1.0\n"
        "Content-Type: text/plain; charset=us-ascii\nContent-Transfer-Encoding: 7bit\n"
        f"X-From: Jane K Roe\nX-To: {', '.join(names[:to])}\nX-cc: \nX-Folder: \\Roe\\Inbox\n\n"
        "See you.\n\n-----Original Message-----\nFrom: \tMarsh, Ivo \n[mailto:marsh_i@norbeck.example] \nSent: x\n"
    ).encode()


def test_enron_names_come_from_other_headers():
    text, people, dropped = occurrences.occurrences(enron_mail(2))
    assert [(person.name, person.address) for person in people] == [
        ("Jane K Roe", "jane.roe@hartwell.example"),
        ("Orla Quist", "oquist@norbeck.example"),
        ("Ada Pell", "pell@hartwell.example"),
        ("Ivo Marsh", "marsh_i@norbeck.example"),
    ]
    assert 'To: "Quist, Orla" <oquist@norbeck.example>, "Pell, Ada" <pell@hartwell.example>\n' in text
    assert "/O=" not in text
    assert dropped == {}


def test_enron_lists_of_different_length_give_no_pair():
    _, people, dropped = occurrences.occurrences(enron_mail(1))
    assert [person.name for person in people] == ["Jane K Roe", "Ivo Marsh"]
    assert dropped == {names.NO_NAME: 2}


def test_the_address_of_the_mails_own_list_is_no_person():
    raw = write(
        PEOPLE[0], [("Harbour Friends", "harbour@hartwell.example")], List_Post="<mailto:harbour@hartwell.example>"
    )
    _, people, dropped = occurrences.occurrences(raw)
    assert [person.name for person in people] == ["Jane Roe"]
    assert dropped == {names.ROLE_ADDRESS: 1}


def test_dropped_occurrences_are_counted_by_reason(tmp_path, capsys):
    others = [
        ("Jane", "a@x.example"),
        ("Help Desk", "b@x.example"),
        ("Bob R2", "c@x.example"),
        ("Al Ba", "info@x.example"),
    ]
    _, counts = one(tmp_path, write(PEOPLE[0], others))
    expected = {names.WORD_COUNT: 1, names.ROLE_NAME: 1, names.DIGITS: 1, names.ROLE_ADDRESS: 1}
    assert {key.removeprefix("dropped: "): n for key, n in counts.items() if key.startswith("dropped: ")} == expected
    assert counts["files that are no messages by their name"] == 2
    printed = capsys.readouterr().out
    assert all(f"1  dropped: {reason}" in printed for reason in expected)
    assert "x.example" not in printed  # counts, no personal data


# ---------------------------------------------------------------- people, order, split


def test_an_address_of_many_people_is_dropped(tmp_path):
    shared = [(name, "desk@quillan.example") for name in ("Ann Berg", "Ann Cole", "Ann Dunn")]
    twice = [(name, "two@quillan.example") for name in ("Eve Hall", "Eve Hall-Iles")]
    rows, counts = one(tmp_path, write(PEOPLE[0], shared + twice))
    assert {"Eve Hall", "Eve Hall-Iles"} < set(rows)
    assert not {name for name, _ in shared} & set(rows)
    assert counts["pairs of shared addresses"] == 3


def many(n: int, seed: int = 0) -> list[bytes]:
    """n mails of n people; every third has a second address, every fifth a second spelling."""
    from faker import Faker

    fake, rng, people = Faker("en_US"), random.Random(seed), []
    fake.seed_instance(seed)
    for number in range(n):
        first, last = fake.unique.first_name(), fake.last_name()
        people.append((f"{first} {last}", f"{first}{number}@norbeck.example"))
        if number % 3 == 0:
            people.append((f"{first} {last}", f"{first}{number}@quillan.example"))
        if number % 5 == 0:
            people.append((f"{first} Q. {last}", f"{first}{number}@norbeck.example"))
    return [write(pair, rng.sample(people, 2), f"Letter {number}") for number, pair in enumerate(people)]


def test_no_person_is_on_both_sides_of_the_split(tmp_path):
    rows, counts = build(as_folder(tmp_path / "in", many(90), "{}."), tmp_path / "rows.jsonl")
    manifest = manifests.read_manifest(tmp_path / "rows.jsonl")
    split = dataset.split(rows, manifest)
    assert len(split.head) == manifest["split_start"] == len(rows) // 3 > 30
    assert len(split.head) + len(split.train) == len(rows)
    for field in ("gt-name", "gt-email"):
        sides = [{rows[i][field].casefold() for i in side} for side in (split.head, split.train)]
        assert not sides[0] & sides[1]
    assert counts["people on both sides of the split"] == 0
    assert counts["people"] == 90 < counts["rows"]
    text = "\n".join(rows[i]["prompt"] + rows[i]["continuation"] for i in split.train).lower()
    assert counts["head addresses in training rows"] == sum(
        address in text for address in {rows[i]["gt-email"].lower() for i in split.head}
    )


def test_people_are_shuffled_by_the_seed(tmp_path):
    folder = as_folder(tmp_path / "in", many(90), "{:04d}.")
    first, _ = build(folder, tmp_path / "first.jsonl")
    other, _ = build(folder, tmp_path / "other.jsonl", "--seed", 1)
    pairs = [[(row["gt-name"], row["gt-email"]) for row in rows] for rows in (first, other)]
    assert pairs[0] != pairs[1]
    assert sorted(pairs[0]) == sorted(pairs[1])
    # in mail order a person's number grows with the position: the numbers of the head average to those of the rest
    numbers = [int("".join(filter(str.isdigit, address))) for _, address in pairs[0]]
    head = len(numbers) // 3
    assert abs(sum(numbers[:head]) / head - 45) < 15  # mean of 0 … 89; six standard errors of a random head


def test_groups_are_kept_together_and_placed_before_the_boundary():
    pairs = {
        bytes([number]): (name, address)
        for number, (name, address) in enumerate(
            [("A B", "1@x"), ("A C", "1@x"), ("A C", "2@x"), ("D E", "3@x"), ("F G", "4@x"), ("d e", "5@x")]
        )
    }
    groups = {frozenset(group) for group in group_people(pairs)}
    assert groups == {frozenset({b"\0", b"\1", b"\2"}), frozenset({b"\3", b"\5"}), frozenset({b"\4"})}
    for seed in range(20):
        order = shuffled([sorted(group) for group in groups], seed, 2)
        assert sorted(order) == sorted(pairs)
        for group in groups:
            sides = {order.index(key) < 2 for key in group}
            # one single person cannot fill two places: the next group straddles the boundary
            assert len(sides) == 1 or order[0] == b"\4"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_file_depends_neither_on_workers_nor_on_order(workers, tmp_path):
    mails = many(120)
    folder, archive = as_folder(tmp_path / "in", mails, "{}."), as_tar(tmp_path / "tar", mails[::-1])
    outputs = []
    for number, source in enumerate((folder, archive, folder)):
        output = tmp_path / f"{number}.jsonl"
        words = ["--input", str(source), "--output", str(output), "--tokenizer", "none", "--workers", str(workers)]
        assert prepare.main(words) == 0
        outputs.append(output.read_bytes())
    build(folder, tmp_path / "reference.jsonl")
    assert outputs[0] == outputs[1] == outputs[2] == (tmp_path / "reference.jsonl").read_bytes()
    assert (
        manifests.read_manifest(tmp_path / "0.jsonl")["source"]
        == manifests.read_manifest(tmp_path / "2.jsonl")["source"]
    )


def test_several_inputs(mails, tmp_path):
    half = as_folder(tmp_path / "a", mails[:4], "{}.")
    rest, single = as_mbox(tmp_path / "b", mails[4:8]), tmp_path / "last.eml"
    single.write_bytes(mails[8])
    rows, _ = build(half, tmp_path / "rows.jsonl", "--input", rest, "--input", single)
    whole, _ = build(as_folder(tmp_path / "all", mails, "{}."), tmp_path / "whole.jsonl")
    assert rows == whole
    assert [source["rows"] for source in manifests.read_manifest(tmp_path / "rows.jsonl")["source"]] == [4, 4, 1]


# ---------------------------------------------------------------- the mbox and the archive


def test_mbox_separators():
    text = (
        b"From a@x.example Mon May 14 16:39:00 2001\nSubject: one\n\nFrom here on it is body\n\nFrom now on too\n\n"
        b"From b@x.example  Mon May 14 16:40:00 2001 -0700\nSubject: two\n\ntext\nFrom c@x.example 10:10 2001\n"
    )
    first, second = mail.split_mbox(io.BytesIO(text))
    assert first.startswith(b"Subject: one") and first.endswith(b"From now on too\n\n")
    assert second == b"Subject: two\n\ntext\nFrom c@x.example 10:10 2001\n"  # no empty line before it


def test_mails_are_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(mail, "MAX_BYTES", 100)
    box = (
        b"From a Mon May 14 16:39:00 2001\n" + b"Subject: x\n" * 50 + b"\nFrom a Mon May 14 16:39:00 2001\nSubject: y\n"
    )
    assert [len(raw) for _, raw in mail.read_mails(io.BytesIO(box), "m")] == [100, 11]
    assert [len(raw) for _, raw in mail.read_mails(io.BytesIO(b"Subject: x\n" * 50), "m")] == [100]


def test_an_archive_is_never_unpacked(mails, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpacked")

    for method in ("extract", "extractall", "makefile"):
        monkeypatch.setattr(tarfile.TarFile, method, refuse)
    seeks = []
    seek = tarfile._Stream.seek
    monkeypatch.setattr(tarfile._Stream, "seek", lambda self, pos=0: (seeks.append(pos - self.pos), seek(self, pos))[1])
    archive = as_tar(tmp_path / "in", mails)
    rows, _ = build(archive, tmp_path / "out" / "rows.jsonl")
    assert len(rows) == 9
    assert all(step >= 0 for step in seeks)  # a stream: forward only
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "rows.jsonl",
        "rows.jsonl.meta.json",
        "run_prepare.json",
    ]


def test_a_damaged_archive_is_an_error_and_leaves_nothing(tmp_path):
    archive = as_tar(tmp_path / "in", many(300))
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"damaged after .* messages"):
        build(archive, tmp_path / "rows.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    archive.write_bytes(b"\x1f\x8b" + os.urandom(500))
    with pytest.raises(UserError, match="not a readable tar archive"):
        build(archive, tmp_path / "rows.jsonl")


def test_memory_does_not_grow_with_the_archive(tmp_path):
    """Peak of Python's allocations for 828 and for 1,656 mails of the same people."""
    mails = [raw.replace(b"Letter", b"Letter " * 500) for raw in many(60)]
    peaks = []
    for times in (9, 18):
        archive = as_tar(tmp_path / str(times), mails * times)
        if not peaks:
            build(archive, tmp_path / "warm.jsonl")  # imports and caches
        tracemalloc.start()
        build(archive, tmp_path / f"{times}.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "9.jsonl").read_bytes() == (tmp_path / "18.jsonl").read_bytes()
    assert peaks[1] < 1.25 * peaks[0]


# ---------------------------------------------------------------- broken mails, files, arguments


def test_broken_mails_are_counted_and_the_first_three_named(mails, tmp_path, capsys):
    folder = as_folder(tmp_path / "in", mails, "{}.")
    for number in range(5):
        (folder / f"{number}.txt").write_bytes(b"" if number % 2 else b"just a few words, no mail\n")
    rows, counts = build(folder, tmp_path / "rows.jsonl")
    assert (len(rows), counts["broken"], counts["messages"]) == (9, 5, 14)
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        *(f"broken message {n}.txt: has no mail header" for n in range(3)),
        "broken messages: … and 2 more",
    ]
    with pytest.raises(UserError) as error:
        build(folder, tmp_path / "strict.jsonl", "--strict")
    assert error.value.problems == shown
    assert not (tmp_path / "strict.jsonl").exists()


def test_a_mail_that_the_library_cannot_read_is_broken(monkeypatch, tmp_path, mails):
    nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(3000))
    with pytest.raises(mail.BrokenMail, match="RecursionError"):
        occurrences.occurrences(b"From: Jane Roe <jane@norbeck.example>\n" + nested)


HOSTILE = """ "|\\"|<|(|a<|a@|<a@|@|=?a?q?|=?|<!--|<title|<script>|&|[mailto:a@b.c|,"""
HOSTILE += "|a.|a-|[a@b.cc<mailto:a@b.cc>]|<a@b.cc <|From a 10:10 2001|Jane Roe <|Roe, |\n\nFrom |\n"


@pytest.mark.parametrize("unit", HOSTILE[1:].split("|"))
def test_hostile_mails_take_no_quadratic_time(unit):
    """100,000 repetitions in a header and a body: quadratic would take minutes, linear is a second or two."""
    text = unit * 100_000
    line = text.replace("\n", " ")
    raw = f"From: {line}\nTo: jane@x.example, {line}\nX-From: {line}\nX-To: {line}\nContent-Type: text/html\n\n{text}"
    begun = time.process_time()
    for data in (raw, f"From {line}\nFrom: x\n\n{text}", raw.replace("text/html", "text/plain")):
        for _, one_mail in mail.read_mails(io.BytesIO(data.encode()), "hostile"):
            with contextlib.suppress(mail.BrokenMail):
                occurrences.occurrences(one_mail)
    assert time.process_time() - begun < 15


def seconds_of(function, text: str) -> float:
    begun = time.process_time()
    function(text)
    return time.process_time() - begun


def assert_linear(function, piece, characters: int = 1 << 20) -> None:
    """`function` of `characters` takes less than three times as long as of half of them (four times if quadratic).

    piece: what the text is made of, as text or as a function of its number.
    """
    pieces = itertools.repeat(piece) if isinstance(piece, str) else map(piece, itertools.count())
    text = ""
    with io.StringIO() as whole:
        while whole.tell() < characters:
            whole.write(next(pieces))
        text = whole.getvalue()
    halves, wholes = [], []
    gc.disable()  # the garbage collector would walk through what earlier tests left
    try:
        for _ in range(4):  # again, in case another process took the core
            halves.append(seconds_of(function, text[: characters // 2]))
            wholes.append(seconds_of(function, text[:characters]))
            if min(wholes) < 3 * min(halves):
                return
    finally:
        gc.enable()
    raise AssertionError(f"{min(halves):.2f} s and {min(wholes):.2f} s")


HEADER_PIECES = [
    "Roe, ",
    "(",
    "((a) b) ",
    "(\\",
    '"a',
    '"\\"',
    "<a@",
    "<a@x.example<mailto:a@x.example>>",
    "[a",
    "@a:",
    ";",
    "=?a?q?",
]
HEADER_PIECES += ["<a@x.example> ", "<a@x.example> on behalf of ", '" , <(']
NUMBERED_PIECES = {
    "mailboxes": "Name{0} Roe{0} <a{0}@x{0}.example>, ",
    "no commas": "Name{0} <a{0}@x.example> ",
    "open comments": "(c{0} (d{0}) ",
    "names": "name{0}, ",
    "phrases": 'w{0} "q{0}" (c{0}) ',
    "groups": "g{0}: m{0}@x.example;",
    "encoded words": "=?utf-8?q?w{0}?= ",
    "copies": "n{0} [a{0}@x.example<mailto:a{0}@x.example>] ",
    "escapes": '\\\\{0}\\" ',
}


@pytest.mark.slow
@pytest.mark.parametrize("piece", HEADER_PIECES)
def test_a_megabyte_of_a_repeated_piece_of_header_is_read_in_linear_time(piece):
    assert_linear(names.mailboxes, piece)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", NUMBERED_PIECES)
def test_a_megabyte_of_distinct_pieces_of_header_is_read_in_linear_time(pieces):
    assert_linear(names.mailboxes, NUMBERED_PIECES[pieces].format)


@pytest.mark.slow
@pytest.mark.parametrize("frame", ["{}", "a@b.example ({})", "<a{}@b.example>"])
def test_half_a_megabyte_of_nested_comments_is_read_in_linear_time(frame):
    assert_linear(lambda text: names.mailboxes(frame.format(text + ")" * len(text))), "(", 1 << 19)


def test_an_unreadable_file_is_broken(mails, tmp_path, capsys):
    folder = as_folder(tmp_path / "in", mails, "{}.")
    (folder / "99.").symlink_to(folder / "gone")
    _, counts = build(folder, tmp_path / "rows.jsonl")
    assert (counts["broken"], counts["rows"]) == (1, 9)
    assert capsys.readouterr().err == "broken message 99.: No such file or directory\n"


def test_a_folder_that_cannot_be_listed_is_an_error(mails, tmp_path, monkeypatch):
    folder, scandir = as_folder(tmp_path / "in", mails, "{}."), os.scandir

    def refuse(path):
        if str(path).endswith("sent_items"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
    with pytest.raises(UserError, match="sent_items: cannot be listed"):
        build(folder, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_existing_output_is_refused_or_replaced(mails, tmp_path):
    folder, output = as_folder(tmp_path / "in", mails, "{}."), tmp_path / "rows.jsonl"
    build(folder, output)
    before = output.read_bytes()
    with pytest.raises(UserError, match="exists; give --overwrite"):
        build(folder, output, "--seed", 1)
    assert output.read_bytes() == before
    build(folder, output, "--seed", 1, "--overwrite")
    assert output.read_bytes() != before
    assert manifests.read_manifest(output)["sha256"] == sha256(output)


def test_a_run_that_fails_keeps_the_old_file(mails, tmp_path, monkeypatch):
    folder, output = as_folder(tmp_path / "in", mails, "{}."), tmp_path / "out" / "rows.jsonl"
    build(folder, output)
    before = {path.name: path.read_bytes() for path in output.parent.glob("rows*")}

    def fail(file, *_):
        file.write("half a row")
        raise OSError("disk full")

    monkeypatch.setattr(enron_run, "write_rows", fail)
    with pytest.raises(OSError, match="disk full"):
        build(folder, output, "--overwrite")
    assert {path.name: path.read_bytes() for path in output.parent.glob("[r.]*") if "run_" not in path.name} == before


def test_manifest_and_run_record(mails, tmp_path):
    archive, folder = as_tar(tmp_path / "tar", mails[:5]), as_folder(tmp_path / "in", mails[5:], "{}.")
    rows, counts = build([archive, folder], tmp_path / "rows.jsonl")
    assert dataset.validate("rows", rows) == "enron"
    manifest = manifests.read_manifest(tmp_path / "rows.jsonl")
    assert {key: manifest[key] for key in ("schema", "tag", "script", "split_start", "rows", "generator")} == {
        "schema": 1,
        "tag": "original",
        "script": "data/enron/prepare.py",
        "split_start": 3,
        "rows": 9,
        "generator": None,
    }
    assert manifest["sha256"] == sha256(tmp_path / "rows.jsonl")
    assert [(source["path"], source["rows"]) for source in manifest["source"]] == [(str(archive), 5), (str(folder), 4)]
    assert manifest["source"][0]["sha256"] == sha256(archive)
    assert manifest["sampling"]["seed"] == 3407
    assert manifest["sampling"]["prompt"] == "at most 1024 characters, then 800 characters"
    run = json.loads((tmp_path / "run_prepare.json").read_text())
    assert (run["status"], run["args"]["tokenizer"], run["counts"]) == ("ok", "none", counts)
    assert [source["messages"] for source in run["sources"]] == [5, 4]
    # the digest of a folder depends on the names and bytes of its files
    (folder / "inbox" / "x" / "0.").write_bytes(mails[5] + b"\n")
    build([archive, folder], tmp_path / "changed.jsonl")
    changed = manifests.read_manifest(tmp_path / "changed.jsonl")["source"]
    assert changed[0] == manifest["source"][0]
    assert changed[1]["sha256"] != manifest["source"][1]["sha256"]


def test_all_problems_at_once_before_anything_is_written(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "taken.txt").mkdir()
    words = [
        "--input",
        tmp_path / "gone",
        tmp_path / "picture.png",
        "--output",
        tmp_path / "taken.txt",
        "--tokenizer",
        "no/such",
    ]
    with pytest.raises(UserError) as error:
        prepare.main(list(map(str, words)))
    assert [line.split(":")[0] for line in error.value.problems] == [
        f"--input {tmp_path / 'gone'}",
        f"--input {tmp_path / 'picture.png'}",
        f"--output {tmp_path / 'taken.txt'}",
        f"--output {tmp_path / 'taken.txt'}",
        "--tokenizer no/such",
        f"--output {tmp_path / 'taken.txt'}",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "taken.txt"]


@pytest.mark.parametrize("content", ["empty folder", "no pairs"])
def test_too_little_mail(content, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    if content == "no pairs":
        (folder / "1.").write_bytes(write(PEOPLE[0], [PEOPLE[1]]))
    with pytest.raises(UserError, match="contains no messages" if content == "empty folder" else "only 2 pairs"):
        build(folder, tmp_path / "new" / "rows.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_as_a_user_runs_it(mails, tmp_path):
    archive, output = as_tar(tmp_path / "in", mails), tmp_path / "rows.jsonl"
    words = ("data/enron/prepare.py", "--input", archive, "--output", output, "--tokenizer", "none", "--workers", 2)
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert "9  rows of 9 people" in done.stdout
    assert output.stat().st_mode & 0o777 == 0o600  # rows of people
    again = run_script(*words)
    assert (again.returncode, again.stderr) == (0, "") and "already finished" in again.stdout
    again = run_script(*words, "--seed", 1)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"--output {output}: exists; give --overwrite to replace it, or another name\n"


# ---------------------------------------------------------------- the prompt's last tokens


def test_prompts_are_cut_by_a_tokenizer(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    letter = " ".join(f"word{number}" for number in range(300)) + " – “Grüße” 🦊" * 20
    raw = write(PEOPLE[0], [PEOPLE[1]], letter + "\nAda Pell <ada@pell.example>\n")
    filler = [write(PEOPLE[i], [PEOPLE[i + 1]]) for i in (2, 4)]
    folder = as_folder(tmp_path / "in", [raw, *filler], "{}.")
    rows, counts = build(folder, tmp_path / "rows.jsonl", "--tokenizer", tmp_path / "tokenizer")
    assert counts["prompt cut"] == f"200 tokens of {tmp_path / 'tokenizer'}"
    assert "200 tokens of" in manifests.read_manifest(tmp_path / "rows.jsonl")["sampling"]["prompt"]
    whole = occurrences.render(raw)[0]
    row = next(row for row in rows if row["gt-email"] == "ada@pell.example")
    ids = tokenizer.encode(whole[: whole.index("ada@pell")][-1024:])
    assert len(ids) > 200
    assert tokenizer.decode(ids[-200:]).endswith(row["prompt"])
    assert 190 < len(tokenizer.encode(row["prompt"])) <= 200
    assert row["prompt"] + row["continuation"] in whole


def test_gpt2_is_looked_for_in_the_cache_only(tmp_path, monkeypatch):
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    assert prompts.load_tokenizer("gpt2") is None
    assert prompts.load_tokenizer("none") is None
    with pytest.raises(UserError, match="download it, or use"):
        prompts.load_tokenizer("someone/else")
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "1"
    make_tokenizer(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    found = prompts.load_tokenizer("gpt2")
    assert found.get_vocab_size() == 400  # make_tokenizer's


def test_without_a_tokenizer_the_last_800_characters():
    assert prompts.last_tokens(["a" * 500 + "b" * 700], None) == ["a" * 100 + "b" * 700]


# ---------------------------------------------------------------- any text at all

FRAGMENTS = (
    """Jane|Roe|van|O'Shea|, | |<|>|[mailto:|]|"|'|(|)|@|jane@x.example|;|From: |To: |\n|> |=?utf-8?q?Zo=C3=AB?=|"""
)
FRAGMENTS += """=?x?b?!?=|/O=X/CN=Y|Jr.|7|list|\\|é|\t|Quist|<jane@x.example>|Jane Roe"""
fragments = st.sampled_from(FRAGMENTS.split("|"))
texts = st.one_of(st.text(max_size=80), st.lists(fragments, max_size=25).map("".join))


@given(texts, st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_name_is_judged_and_what_passes_meets_the_rules(display, whole):
    name, reason = names.person(display, whole)
    assert (name == "") == (reason is not None)
    if name:
        words = name.split(" ")
        assert 2 <= len(words) <= 3 and all(words)
        assert not any(character.isdigit() or character in '@/<>[]()",' for character in name)
        assert not {word.lower().strip(".") for word in words} & names.NAME_ROLES
        assert all(names.NAME_WORD.fullmatch(word) for word in words)


def test_no_address_is_made_across_empty_brackets():
    assert names.mailboxes("0<>@0.AA") == []


@given(texts)
@settings(max_examples=400, deadline=None)
def test_any_header_is_read(value):
    for name, address in names.mailboxes(" ".join(value.split())):
        assert name == name.strip()
        if names.address_problem(address) is None:
            local, _, domain = address.rpartition("@")
            assert local in value and domain in value and local and domain


headers = st.lists(
    st.tuples(st.sampled_from(["From", "To", "Cc", "Subject", "X-To", "Content-Type"]), texts), max_size=5
)


@given(headers, texts, st.sampled_from(["utf-8", "latin-1", "utf-16"]), st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_any_mail_is_read_or_broken(fields, body, charset, junk):
    raw = "".join(f"{name}: {value}\n" for name, value in fields).encode(charset, "replace")
    raw += b"\xff\x00\r\n\n"[:junk] + b"\n" + body.encode(charset, "replace")
    try:
        text, people, dropped = occurrences.occurrences(raw)
    except mail.BrokenMail:
        return
    text.encode("utf-8")
    assert all(number > 0 for number in dropped.values())
    for person in people:
        prompt, continuation = occurrences.cut(text, person.position)
        assert continuation.startswith(person.address)
        assert prompt + continuation in text
        assert names.address_problem(person.address) is None
        assert names.person(person.name) == (person.name, None)
        before = prompt.rstrip("<[ \n").removesuffix("mailto:").rstrip("<[ \n").lower()
        assert not before.endswith(person.address.lower())


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_broken(raw):
    for _, one_mail in mail.read_mails(io.BytesIO(raw), "any"):
        with contextlib.suppress(mail.BrokenMail):
            occurrences.occurrences(one_mail)[0].encode("utf-8")


@given(st.text(max_size=40), st.sampled_from(["utf-8", "iso-8859-1", None]))
def test_encoded_words_come_back(text, charset):
    words = " ".join(text.split())
    if charset == "iso-8859-1":
        words = words.encode("latin-1", "ignore").decode("latin-1")
    words = " ".join(words.encode("utf-8", "ignore").decode().replace("\0", "").split())
    if "=?" in words:
        return
    encoded = " ".join(Header(words, charset).encode().split()) if charset else words
    assert mail.decode_words(encoded) == words


def test_links_pipes_and_a_line_without_an_end(tmp_path):
    """A FIFO would hang forever, a link lead out of the folder; a line of 40 MB is cut, and reading continues."""
    folder = tmp_path / "mails"
    folder.mkdir()
    (tmp_path / "outside").write_text("From: Ada Quillan <ada@quillan.example>\n\nhello\n")
    (folder / "1.").write_text("From: Bo Norbeck <bo@norbeck.example>\n\nhello\n")
    (folder / "2.").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "3.")
    (folder / "4.").symlink_to("/dev/zero")
    skipped = Counter()
    assert [os.path.basename(path) for path in inputs.walk(folder, skipped)] == ["1."]
    assert skipped["pipes, devices and links out of the folder"] == 3

    class Endless(io.RawIOBase):
        """'From …', a line of 40 MB, and another mail."""

        def __init__(self):
            head = b"From ada@quillan.example Thu Jan  1 00:00:00 2004\nSubject: one\n\n"
            self.parts = [head, *[b"A" * (1 << 20)] * 40, b"\n\n", head.replace(b"one", b"two"), b"short\n"]

        def readable(self):
            return True

        def readinto(self, buffer):
            if not self.parts:
                return 0
            part, self.parts[0] = self.parts[0][: len(buffer)], self.parts[0][len(buffer) :]
            if not self.parts[0]:
                self.parts.pop(0)
            buffer[: len(part)] = part
            return len(part)

    tracemalloc.start()
    found = list(mail.read_mails(io.BufferedReader(Endless()), "box"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [raw.split(b"\n")[0] for _, raw in found] == [b"Subject: one", b"Subject: two"]
    assert len(found[0][1]) <= mail.MAX_BYTES and peak < 4 * mail.MAX_BYTES + (1 << 22)


def test_workers_end_when_their_run_is_killed(tmp_path):
    """The builder's own workers, waiting for work: without the check they would wait for ever."""
    code = (
        "import sys\n"
        "from data.enron import inputs\n"
        "import os, time\n"
        "def work(number):\n"
        "    return os.getpid()\n"
        "def slowly():\n"
        "    yield (1,)\n"
        "    time.sleep(3)\n"
        "    yield from ((number,) for number in range(4))\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(inputs.in_order(work, slowly(), 2))\n"
    )
    (tmp_path / "pool.py").write_text(code)
    run = subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "waiting\n"
    run.kill()
    assert run.stdout.read() == ""  # end of file: a surviving worker would hold the pipe open
    run.wait()
