"""data/replace_pii.py: fictional rows through the real entry point; the leak check against planted failures."""

import json
import stat

import pytest
from conftest import make_rows, read_lines, run_script, write_manifest, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import run_peft
from common import arrow_files, formats, manifests
from common import dataset as data_files
from common.problems import UserError
from common.process import entry
from common.results import sha256
from common.text import follows_name_rule, name_rule_guesses
from data import leaks, replace_pii, replacement, scanner
from data.enron.names import ROLE_ADDRESS, address_problem
from data.people import People
from data.replacing import run as replacing_run
from data.replacing.run import replace

PEOPLE = [
    ("Joe Moss", "jmoss@hartwell.example"),
    ("Karen T. Olsen", "Karen.Olsen@Hartwell.example"),
    ("Ruth O'Shea-Lind", "ruth@norbeck.example"),
    ("Tomas van Dahl", "tvd77@mail.quillan.example"),
    ("Will Price", "tornado_captain@quillan.example"),
    ("May Roe", "roe.may@norbeck.example"),
]


def make_row(index: int, text: str = "", name: str | None = None, email: str | None = None) -> dict:
    known, address = PEOPLE[index % len(PEOPLE)]
    name, email = name or known, email or address
    continuation = f"{email}]\nSubject: plans\n\n{text}"
    return {"gt-name": name, "gt-email": email, "prompt": f"From: {name} [mailto:", "continuation": continuation}


def build(tmp_path, rows, *more, name="rows.jsonl") -> list[dict]:
    """The replaced rows of one successful run."""
    tmp_path.mkdir(exist_ok=True)
    source, output = write_rows(tmp_path / name, rows), tmp_path / "replaced_data.arrow"
    assert replace_pii.main(["--input", str(source), "--output", str(output), *map(str, more)]) == 0
    return formats.read_rows(output)


def texts_of(tmp_path, *texts: str) -> tuple[list[str], dict[str, str]]:
    """(what becomes of each text, in a row of PEOPLE in turn; {old name or address: new}); everybody is in the file."""
    rows = [make_row(index) for index in range(len(PEOPLE))]
    rows += [make_row(index, text) for index, text in enumerate(texts)]
    replaced = build(tmp_path, rows)
    new = {}
    for old, row in zip(rows, replaced):
        new |= {old["gt-name"]: row["gt-name"], old["gt-email"]: row["gt-email"]}
    return [row["continuation"].split("\n\n", 1)[1] for row in replaced[len(PEOPLE) :]], new


def one_text(tmp_path, index: int, text: str) -> tuple[str, dict[str, str]]:
    """As texts_of, `text` in a row of person `index`."""
    result, new = texts_of(tmp_path, *["."] * index, text)
    return result[-1], new


# ---------------------------------------------------------------- forms, by hand

# {F} {L}: new first and last name of the row's person, {I} its initial, {M} middle initial, {E} address
FORMS = [
    (0, "Joe Moss", "{F} {L}"),
    (0, "JOE MOSS and joe moss", "{FU} {LU} and {f} {l}"),
    (0, "Moss, Joe", "{L}, {F}"),
    (0, "Moss Joe", "{L} {F}"),
    (0, "MOSS, JOE Q. wrote", "{LU}, {FU} {Q}. wrote"),
    (0, "Joe Q. Moss", "{F} {Q}. {L}"),
    (0, "> Joe\n> Moss", "> {F}\n> {L}"),
    (0, "J. Moss", "{I}. {L}"),
    (0, "Hi Joe,", "Hi {F},"),
    (0, "hi joe,", "hi {f},"),
    (0, "Thanks\n\nJoe", "Thanks\n\n{F}"),
    (0, "ask Joe's office", "ask {F}'s office"),
    (0, "Mr. Moss will call", "Mr. {L} will call"),
    (0, "the file jmoss.txt", "the file {u}.txt"),
    (0, "user joe.moss, joe_moss, mossj and joemoss2", "user {f}.{l}, {f}_{l}, {l}{i} and {f}{l}2"),
    (0, "JMOSS@HARTWELL.EXAMPLE", "{EU}"),
    (0, "<jmoss@hartwell.example>, mailto:jmoss@hartwell.example.", "<{E}>, mailto:{E}."),
    (0, "'jmoss@hartwell.example' [mailto:jmoss@hartwell.example]", "'{E}' [mailto:{E}]"),
    (0, "jmoss (at) hartwell (dot) example", "{u} (at) {d1} (dot) example"),
    (0, "jmoss at hartwell dot example", "{u} at {d1} dot example"),
    (0, "jmoss@hartwell", "{u}@hartwell"),  # an address cut at the end of the text: no domain known
    (1, "Karen T. Olsen", "{F} {M}. {L}"),
    (1, "Karen Olsen", "{F} {L}"),
    (1, "Olsen, Karen T.", "{L}, {F} {M}."),
    (1, "Karen T. Olsen/HOU/ECT@ECT", "{F} {M}. {L}/HOU/ECT@ECT"),
    (1, "karen.olsen@hartwell.example", "{e}"),
    (2, "Ruth O'Shea-Lind", "{F} {L}"),
    (2, "O’Shea-Lind, Ruth", "{L’}, {F}"),
    (3, "van Dahl, Tomas", "{L}, {F}"),
    (3, "Dahl, Tomas", "{L1}, {F}"),
    (3, "tomas dahl", "{f} {l1}"),
    (3, "Tomas van Dahl", "{F} {L}"),
]


@pytest.mark.parametrize(("index", "text", "expected"), FORMS, ids=[text[:30] for _, text, _ in FORMS])
def test_quoted_forms(index, text, expected, tmp_path):
    result, new = one_text(tmp_path, index, text)
    name, email = PEOPLE[index]
    words, address = new[name].split(" "), new[email]
    first, last = words[0], " ".join(words[2:] if index == 1 else words[1:])
    letters = People([PEOPLE[0]])
    letters.settle(3407)
    wanted = {"F": first, "L": last, "f": first.lower(), "l": last.lower(), "FU": first.upper(), "LU": last.upper()}
    wanted |= {"I": letters.letter["j"].upper(), "Q": letters.letter["q"].upper(), "i": first[0].lower()}
    wanted |= {
        "M": words[1][0],
        "E": address,
        "e": address.lower(),
        "EU": address.upper(),
        "L’": last.replace("'", "’"),
    }
    wanted |= {"L1": words[-1], "l1": words[-1].lower()}
    wanted |= {"u": address.partition("@")[0], "d1": address.partition("@")[2].split(".")[0]}
    assert result == expected.format(**wanted)


ORDINARY = [
    "will you mark the price in may, please",
    "Will you come? May I ask? Price is up. The price: 3",
    "the deadline is May 5\nMay 2001",
    "Prices will rise in May.",
]


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("index", (0, 4, 5))
def test_ordinary_words_are_left_alone(index, text, tmp_path):
    """Also in rows that mention Will Price (4) and May Roe (5)."""
    assert one_text(tmp_path, index, text)[0] == text


def test_names_that_are_ordinary_words_are_replaced_in_name_positions(tmp_path):
    """In a row that mentions Will Price, and (first names) in one that does not."""
    text = "Hi Will,\n\nyou will ask Will Price, as Will knows; Mr. Price will too.\n\nWill"
    result, new = one_text(tmp_path, 4, text)
    first, last = new["Will Price"].split()
    assert result == f"Hi {first},\n\nyou will ask {first} {last}, as {first} knows; Mr. {last} will too.\n\n{first}"
    elsewhere, _ = one_text(tmp_path / "x", 0, "Hi Will,\n\nI will.\n\nWill")
    greeting, middle, signature = elsewhere.split("\n\n")
    assert middle == "I will." and signature != "Will" and greeting == f"Hi {signature},"


def test_first_names_alone_everywhere_last_names_alone_only_in_rows_that_mention_them(tmp_path):
    text = "Karen met Moss Energy; Olsen stayed. Talk to Bob.\n\nBob"  # nobody in the file is called Bob
    result, _ = one_text(tmp_path, 0, text)
    joe = one_text(tmp_path / "x", 0, "Joe Moss")[0].split()
    assert "Karen" not in result and " met " in result and f"{joe[1]} Energy; Olsen stayed. Talk to Bob." in result
    assert not result.endswith("Bob")


def test_consistent_across_rows_and_columns(tmp_path):
    rows = [make_row(index, f"{name} <{email.upper()}>") for index, (name, email) in enumerate(PEOPLE)]
    rows += [make_row(index + 1, f"ask {name}, {email}") for index, (name, email) in enumerate(PEOPLE)]
    for row in rows:
        row["note"] = ["about Joe Moss"]
        row["more"] = {"who": "jmoss@hartwell.example"}
        row["number"] = 5
    replaced = build(tmp_path, rows)
    new = {old["gt-name"]: row["gt-name"] for old, row in zip(rows, replaced)}
    mails = {old["gt-email"]: row["gt-email"] for old, row in zip(rows, replaced)}
    assert len(set(new.values())) == len(set(mails.values())) == len(PEOPLE)
    for index, (name, email) in enumerate(PEOPLE):
        first, second = replaced[index], replaced[len(PEOPLE) + index]
        assert first["prompt"] == f"From: {new[name]} [mailto:"
        assert first["continuation"].startswith(f"{mails[email]}]\n")
        assert first["continuation"].endswith(f"{new[name]} <{mails[email].upper()}>")
        assert second["continuation"].endswith(f"ask {new[name]}, {mails[email]}")
        assert second["note"] == [f"about {new['Joe Moss']}"]
        assert second["more"] == {"who": mails["jmoss@hartwell.example"]}
        assert second["number"] == 5
    domains = {old.partition("@")[2].lower(): email.partition("@")[2].lower() for old, email in mails.items()}
    assert len(domains) == len(set(domains.values())) == 4
    assert all(old.count(".") == new.count(".") and new.endswith(".example") for old, new in domains.items())


def test_people_found_in_the_text_only(tmp_path):
    """Next to an address, in header lines, in a forwarding line, by an address that spells a name; never in gt-*."""
    text = (
        "Dana Kell <dk@norbeck.example> said\nTo: Nils Ode; Quinn, Abel\n"
        "----- Forwarded by Olga Brandt on 01/02/2001 -----\nMona Sund/HOU/ECT@ECT\nwrite peter.zorn@quillan.example"
    )
    later = "Dana Kell, Nils Ode, Abel Quinn, Olga Brandt, Mona Sund, Peter Zorn, dk@norbeck.example, peter.zorn"
    result, _ = texts_of(tmp_path, text, later)
    old = {*scanner.TOKEN.findall(later)} - {"example"}
    for word in old:
        assert word not in scanner.TOKEN.findall(" ".join(result)), word
    names = result[1].split(", ")
    assert len(set(names)) == 8
    assert result[0].startswith(f"{names[0]} <{names[6]}> said\nTo: {names[1]}; ")
    assert f"Forwarded by {names[3]} on" in result[0]
    assert names[7] == ".".join(names[5].lower().split()) and names[7] in result[0]


def test_unusual_forms(tmp_path):
    """Addresses without a dot, with a blank, with two @; names of one word, of letters no rule knows, Last, First."""
    odd = [
        ("Zoë", "zoe@host"),
        ("王伟", "w w@x.example"),
        ("Roe, Jane M.", "a@b@c.example"),
        ("J. R. Oak", "jro@x.example"),
        ("Kim Rye/HOU/ECT", "krye@x.example"),
    ]
    rows = [make_row(0, f"Zoë, 王伟 and {email} (Jane Roe)", name, email) for name, email in odd]
    replaced = build(tmp_path, rows)
    new = [(row["gt-name"], row["gt-email"]) for row in replaced]
    assert [len(name.split()) for name, _ in new] == [1, 1, 3, 3, 2] and new[2][0].split()[0].endswith(",")
    last, first, _ = new[2][0].split()
    for row, (_, email) in zip(replaced, new):
        assert row["continuation"].startswith(f"{email}]\n")
        assert row["continuation"].endswith(f"and {email} ({first} {last.rstrip(',')})")
    assert [email.count("@") for _, email in new] == [1, 1, 2, 1, 1]


# ---------------------------------------------------------------- stand-ins

RULES = sorted(name_rule_guesses("Anna Maria Roe"))


@pytest.mark.parametrize("name", ("Anna Maria Roe", "Anna M. Roe", "Joe Moss", "Ruth O'Shea-Lind"))
def test_every_name_rule_is_kept(name):
    """One address per rule, with and without digits; expected: what the rule derives from the new name."""
    rules = name_rule_guesses(name)
    people = People([(name, f"{local}@x{n}.example") for n, local in enumerate(rules.values())])
    people.add(name, "7{firstlast}@y.example".format(**rules))
    people.add(name, "{firstlast}42@z.example".format(**rules))
    people.settle(3407)
    (person,) = people.of_name.values()
    new_name = person.rename(name)
    assert new_name != name and len(new_name.split()) == len(name.split())
    new = name_rule_guesses(new_name)
    local = {old.partition("@")[2]: made.partition("@")[0] for old, made in people.new_address.items()}
    for n, (rule, guess) in enumerate(rules.items()):
        same = [label for label, other in rules.items() if other == guess]  # 'fl' and 'initials' may coincide
        assert local[f"x{n}.example"] in {new[label] for label in same}, rule
    assert (local["y.example"], local["z.example"]) == ("7" + new["firstlast"], new["firstlast"] + "42")


def test_all_rules_are_covered():
    assert len(RULES) == 4 + 4 * 9  # first, last, initials, fl; nine with each of four separators


def test_a_local_part_without_a_rule_gets_one_of_the_same_shape(tmp_path):
    replaced = build(tmp_path, [make_row(index) for index in range(6)])
    local = replaced[4]["gt-email"].partition("@")[0]
    kinds = str.maketrans("aeioubcdfghjklmnpqrstvwxyz", "v" * 5 + "c" * 21)
    assert local.translate(kinds) == "tornado_captain".translate(kinds) and local != "tornado_captain"
    assert not follows_name_rule(replaced[4]["gt-name"], local)


def test_many_people_stay_distinct_and_no_old_name_word_is_used(tmp_path):
    rows = make_rows(600)
    replaced = build(tmp_path, rows)
    pairs = {(row["gt-name"], row["gt-email"]) for row in replaced}
    assert len({name for name, _ in pairs}) == len({row["gt-name"] for row in rows}) == 600
    assert len({email for _, email in pairs}) == len({row["gt-email"] for row in rows})
    old = {word for row in rows for word in row["gt-name"].split()}
    assert old.isdisjoint(word for name, _ in pairs for word in name.split())
    for row, new in zip(rows, replaced):
        rule = follows_name_rule(row["gt-name"], row["gt-email"].partition("@")[0])
        assert rule == follows_name_rule(new["gt-name"], new["gt-email"].partition("@")[0])


def test_role_addresses_keep_their_local_part_unless_they_are_asked_for(tmp_path):
    rows = [make_row(index, "write to info@norbeck.example or sales@norbeck.example") for index in range(5)]
    rows.append(make_row(5, "", "Abel Quinn", "sales@norbeck.example"))
    text = build(tmp_path, rows)[0]["continuation"].split()
    assert text[-3].startswith("info@") and text[-3] != "info@norbeck.example"
    assert not text[-1].startswith("sales@")


@pytest.mark.parametrize("local", ["joe-moss-request", "moss.joe-admin", "jmoss-owner"])
def test_a_role_address_that_holds_the_name_of_somebody_is_no_exception(local, tmp_path):
    """A list may be named after a person; 'Talk Admin' of spamassassin-talk-admin@ is such a person too."""
    assert address_problem(f"{local}@lists.example") == ROLE_ADDRESS
    text, _ = one_text(tmp_path, 3, f"write to {local}@lists.example or plain-request@lists.example today")
    assert "moss" not in text and "plain-request@" in text


def test_single_letters_that_are_words(tmp_path):
    """Names whose parts are one letter outside a–z or one digit: replaced as words are."""
    names = ["Ó Broin", "Ciarán Ó Broin", "李 明", "Unit 7", "J R"]
    rows = [make_row(index, f"ask {name} soon", name) for index, name in enumerate(names)]
    replaced = build(tmp_path, [*rows, make_row(5)])
    for name, row in zip(names[:4], replaced):
        assert name not in row["continuation"] and row["gt-name"] != name
        assert row["gt-name"] in row["continuation"] and len(row["gt-name"].split()) == len(name.split())


def test_deterministic_for_a_seed(tmp_path):
    rows = make_rows(40)
    build(tmp_path, rows)
    output = tmp_path / "replaced_data.arrow"
    first = output.read_bytes()
    build(tmp_path, rows, "--overwrite")
    assert output.read_bytes() == first
    build(tmp_path, rows, "--overwrite", "--seed", 1)
    assert output.read_bytes() != first


# ---------------------------------------------------------------- the file


def test_manifest_record_and_readers(tmp_path, dataset):
    import datasets

    rows = build(tmp_path, read_lines(dataset))
    output = tmp_path / "replaced_data.arrow"
    table = datasets.Dataset.from_file(str(output))
    assert table.column_names == ["gt-name", "gt-email", "prompt", "continuation", "row_id"]
    assert table.to_list() == rows and table["row_id"][:3] == [0, 1, 2]
    manifest = manifests.read_manifest(output)
    assert (manifest["tag"], manifest["split_start"], manifest["rows"]) == ("replaced", 20, 60)  # 60 // 3
    assert manifest["script"] == "data/replace_pii.py" and manifest["sha256"] == sha256(output)
    assert manifest["source"][0]["sha256"] == sha256(tmp_path / "rows.jsonl") and manifest["source"][0]["rows"] == 60
    record = json.loads((tmp_path / "run_replace_pii.json").read_text())
    assert (record["status"], record["leaks"]) == ("ok", {"full names": 0, "addresses": 0, "pairs": 0})
    assert (record["counts"]["rows"], record["counts"]["rows changed"]) == (60, 60)
    assert not any(row["gt-name"] in json.dumps(record) for row in read_lines(dataset))


def test_split_start_of_the_source_is_kept_and_missing_row_ids_are_given(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "row_id"} for row in make_rows(12)]
    source = tmp_path / "rows.jsonl"
    write_rows(source, rows)
    write_manifest(source, tag="original", script="x", argv=[], rows=12, split_start=7)
    replaced = build(tmp_path, rows)
    assert [row["row_id"] for row in replaced] == list(range(12))
    parts = data_files.split(replaced, manifests.read_manifest(tmp_path / "replaced_data.arrow"))
    assert (list(parts.head), list(parts.train)) == (list(range(7)), list(range(7, 12)))


def test_lines_that_are_no_rows_keep_their_positions(tmp_path, capsys):
    """Rows numbered from 100: the head of 13 lines is 4 of them, whichever are broken; their row_ids stay."""
    rows = [row | {"row_id": row["row_id"] + 100} for row in make_rows(12)]
    source, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "r.arrow"
    lines = source.read_text().splitlines()
    lines[0], lines[2], lines[4], lines[9] = "{torn", "[1]", json.dumps({"row_id": 104, "gt-email": "x@y"}), "\xff"
    lines.insert(12, json.dumps({"row_id": "x"}))
    source.write_text("\n".join(lines), encoding="latin-1")
    assert replace_pii.main(["--input", str(source), "--output", str(output)]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith(f"{source}: row 0: not JSON (") and err[1].startswith(
        f"{source}: row 2: expected a JSON object"
    )
    assert (len(err), err[3]) == (4, "broken rows: … and 2 more")
    replaced, manifest = formats.read_rows(output), manifests.read_manifest(output)
    assert [row["row_id"] for row in replaced] == [101, 103, 105, 106, 107, 108, 110, 111]
    assert (manifest["split_start"], manifest["source"][0]["rows"]) == (104, 13)
    assert list(data_files.split(replaced, manifest).head) == [0, 1]
    with pytest.raises(UserError, match="row 0: not JSON"):
        replace_pii.main(["--input", str(source), "--output", str(output), "--strict", "--overwrite"])


def test_columns_that_only_some_rows_have(tmp_path):
    rows = make_rows(6)
    rows[4]["note"] = f"ask {rows[0]['gt-name']}"
    replaced = build(tmp_path, rows)
    assert [row["note"] for row in replaced] == [None] * 4 + [f"ask {replaced[0]['gt-name']}", None]


def test_run_peft_trains_on_it(models, dataset, tmp_path):
    build(tmp_path, read_lines(dataset))
    words = ["-m", models["neox"], "-i", tmp_path / "replaced_data.arrow", "--output_root", tmp_path, "--lora_r", 4]
    words += ["-e", 1, "-pdbs", 4, "-gas", 5]
    run_peft.main([str(word) for word in words])
    (folder,) = (tmp_path / "tiny-neox" / "replaced-lora").iterdir()
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()  # 40 training rows of 60, batches of 20
    assert json.loads((folder / "run.json").read_text())["status"] == "ok"


def test_map_only_on_request_and_for_the_owner_only(tmp_path):
    rows = [make_row(index) for index in range(6)]
    replaced = build(tmp_path, rows)
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.jsonl",
        "replaced_data.arrow",
        "replaced_data.arrow.meta.json",
        "run_replace_pii.json",
    }
    build(tmp_path, rows, "--overwrite", "--save_map", tmp_path / "map.json")
    assert stat.S_IMODE((tmp_path / "map.json").stat().st_mode) == 0o600
    result = json.loads((tmp_path / "map.json").read_text())
    assert result["people"]["Joe Moss"] == replaced[0]["gt-name"]
    assert result["addresses"]["karen.olsen@hartwell.example"] == replaced[1]["gt-email"].lower()


# ---------------------------------------------------------------- the leak check


@pytest.mark.parametrize(
    ("leak", "kinds"),
    [
        ("", {}),
        ("ask JOE\n> MOSS today", {"full names": [2]}),
        ("Moss ,  Joe", {"full names": [2]}),
        ("Joe Q. Moss", {"full names": [2]}),
        ("xJMOSS@hartwell.EXAMPLEx", {"addresses": [2]}),
        ("Joe Moss <ruth@norbeck.example>", {"full names": [2], "addresses": [2]}),
        ("moss, joe [jmoss@hartwell.example]", {"full names": [2], "addresses": [2], "pairs": [2]}),
        ("Joe. Moss; joe\n\nmoss; Joey Moss; jmoss@hartwell.exam", {}),
    ],
)
def test_leaks(leak, kinds, tmp_path):
    rows = [make_row(index) | {"row_id": index} for index in range(6)]
    people, scan = replacement.meet(rows, 3407)
    replaced = replace(rows, people, scan)
    replaced[2]["continuation"] += f" {leak}"
    assert leaks.leaks(replaced, people) == {"full names": [], "addresses": [], "pairs": []} | kinds


def test_the_check_reads_every_text_of_the_written_file(tmp_path, monkeypatch, capsys):
    """A name introduced while the file is written, in a list and in a key within a column."""
    write = arrow_files.write_arrow
    rows = [row | {"notes": [{"by": "nobody"}]} for row in make_rows(12)]
    for spoil in (lambda name: [{"by": name}], lambda name: [{name: "x"}]):
        notes = {"notes": spoil(rows[2]["gt-name"])}
        monkeypatch.setattr(
            arrow_files, "write_arrow", lambda path, new, n=notes: write(path, [*new[:-1], new[-1] | n])
        )
        source = write_rows(tmp_path / "rows.jsonl", rows)
        assert replace_pii.main(["--input", str(source), "--output", str(tmp_path / "r.arrow")]) == 1
        err = capsys.readouterr().err.splitlines()
        assert err[0].startswith("leak check: old full names in ") and "11" in err[0].split()
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run_replace_pii.json"}


@pytest.mark.parametrize("before", (False, True))
def test_a_leak_ends_the_run_without_a_file(before, tmp_path, monkeypatch, capsys):
    source, output = write_rows(tmp_path / "rows.jsonl", make_rows(30)), tmp_path / "replaced_data.arrow"
    words = ["--input", str(source), "--output", str(output), "--save_map", str(tmp_path / "map.json"), "--overwrite"]
    if before:
        assert replace_pii.main(words) == 0
        (tmp_path / "map.json").unlink()
        old = output.read_bytes()
    original = replace
    handle = next(row["gt-email"] for row in make_rows(30) if "." not in row["gt-email"].partition("@")[0])

    def forgetful(rows, *rest):
        replaced = original(rows, *rest)
        replaced[7]["prompt"] += handle
        replaced[9]["prompt"] += " " + rows[3]["gt-name"].upper()
        return replaced

    monkeypatch.setattr(replacing_run, "replace", forgetful)
    capsys.readouterr()
    assert entry(lambda: replace_pii.main(words)) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "leak check: old full names in 1 rows: 9",
        "leak check: old addresses in 1 rows: 7",
        f"leak check failed: {output} was not written",
    ]
    if before:  # an earlier good file is unchanged
        assert output.read_bytes() == old
    else:
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run_replace_pii.json"}
    record = json.loads((tmp_path / "run_replace_pii.json").read_text())
    assert (record["status"], record["leaks"]["addresses"]) == ("failed", 1)


# ---------------------------------------------------------------- any surroundings

ROWS = [make_row(index) | {"row_id": index} for index in range(6)]
around = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="aZ0 .@_-<>'’\"[](),;:/\n>+%=éıſ", max_size=12),
    st.sampled_from(["mailto:", "a@b.", "x.y-", " at ", "@", ".", "_", "'", "jane at x dot "]),
)
written = st.sampled_from([str, str.upper, str.title, str.lower])


@given(around, st.integers(0, 5), written, around)
@settings(max_examples=150, deadline=None)
def test_no_address_survives_any_surroundings(before, index, case, after):
    rows = [dict(row) for row in ROWS]
    rows[(index + 1) % 6]["prompt"] = before + case(PEOPLE[index][1]) + after
    people, scan = replacement.meet(rows, 3407)
    replaced = replace(rows, people, scan)
    everything = "\0".join(text for row in replaced for text in scanner.strings(row)).casefold()
    assert not [address for _, address in PEOPLE if address.casefold() in everything]
    assert not any(leaks.leaks(replaced, people).values())


name_forms = st.sampled_from(
    ["{0} {1}", "{1}, {0}", "{0} Q. {1}", "{0}\n> {1}", "{0}.{1}", "{0}_{1}", "{0}  {1}'s", "{1},{0}", "{0} q {1}"]
)


@given(around, st.sampled_from([("Joe", "Moss"), ("Will", "Price"), ("May", "Roe")]), name_forms, written, around)
@settings(max_examples=150, deadline=None)
def test_no_full_name_survives_any_surroundings(before, name, form, case, after):
    rows = [dict(row) for row in ROWS]
    rows[1]["prompt"] = f"{before} {case(form.format(*name))} {after}"
    people, scan = replacement.meet(rows, 3407)
    assert not any(leaks.leaks(replace(rows, people, scan), people).values())


@given(
    st.lists(
        st.sampled_from(["Joe", "joe", "Moss", "Price", "will", "May", "Q.", ",", ".", "\n", ">", "_", "'s", "Hi"])
    )
)
@settings(max_examples=150, deadline=None)
def test_no_full_name_survives_any_mixture(words):
    for glue in (" ", ""):
        rows = [dict(row) for row in ROWS]
        rows[2]["prompt"] = glue.join(words)
        people, scan = replacement.meet(rows, 3407)
        assert not any(leaks.leaks(replace(rows, people, scan), people).values())


# ---------------------------------------------------------------- bad input


def test_all_problems_at_once(tmp_path):
    (tmp_path / "map.json").write_text("{}")
    words = ["--input", tmp_path / "gone.jsonl", "--output", tmp_path / "x.jsonl", "--save_map", tmp_path / "map.json"]
    with pytest.raises(UserError) as error:
        replace_pii.main(list(map(str, words)))
    assert [line.split(": ", 1)[1][:12] for line in error.value.problems] == [
        "no such file",
        "the name mus",
        "exists; give",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_an_existing_output_is_refused(tmp_path):
    build(tmp_path, make_rows(6))
    before = (tmp_path / "replaced_data.arrow").read_bytes()
    with pytest.raises(UserError, match="exists; give --overwrite"):
        build(tmp_path, make_rows(7))
    assert (tmp_path / "replaced_data.arrow").read_bytes() == before


BROKEN = [
    ({"gt-name": 5}, "field 'gt-name' must be text, not int"),
    ({"continuation": None}, "field 'continuation' is missing; add it or remove the row"),
    ({"gt-email": "nobody"}, "gt-email must look like local@domain"),
    ({"gt-name": "?!"}, "gt-name has no letters"),
    ({"gt-name": "Jane " * 50}, "gt-name or gt-email is too long (at most 200 and 320 characters)"),
    ({"gt-email": "j" * 320 + "@x.example"}, "gt-name or gt-email is too long (at most 200 and 320 characters)"),
    ({"prompt": "\ud800"}, "half of a surrogate pair in its text"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN)
def test_broken_rows_are_left_out_and_shown_or_refused(change, reason, tmp_path, capsys):
    rows = [row | (change if row["row_id"] in (1, 2, 3, 4) else {}) for row in make_rows(12)]
    replaced = build(tmp_path, rows)
    assert [row["row_id"] for row in replaced] == [0, *range(5, 12)]
    assert manifests.read_manifest(tmp_path / "replaced_data.arrow")["split_start"] == 4  # 12 // 3 of the source
    lines = capsys.readouterr().err.splitlines()
    shown = [f"{tmp_path / 'rows.jsonl'}: row {row}: {reason}" for row in (1, 2, 3)]
    assert lines == [*shown, "broken rows: … and 1 more"]
    with pytest.raises(UserError) as error:
        build(tmp_path, rows, "--strict", "--overwrite")
    assert error.value.problems == lines


def test_mixed_columns(tmp_path):
    rows = [row | {"note": [5, "Jane Roe"][row["row_id"] % 2]} for row in make_rows(6)]
    with pytest.raises(UserError, match="values of different types") as error:
        build(tmp_path, rows)
    assert "Jane" not in str(error.value)


def test_too_few_rows(tmp_path):
    with pytest.raises(UserError, match="2 valid rows"):
        build(tmp_path, make_rows(2))
    assert not (tmp_path / "replaced_data.arrow").exists()


def test_as_a_user_runs_it(tmp_path):
    source = write_rows(tmp_path / "enron.jsonl", make_rows(30))
    done = run_script("data/replace_pii.py", "--input", source)
    assert done.returncode == 0, done.stderr
    assert "leak check: no old full name, address or pair" in done.stdout
    assert len(formats.read_rows(tmp_path / "replaced_data.arrow")) == 30
    again = run_script("data/replace_pii.py", "--input", source)
    assert (again.returncode, again.stderr) == (0, "") and "already finished" in again.stdout
    again = run_script("data/replace_pii.py", "--input", source, "--seed", 1)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith(f"--output {tmp_path / 'replaced_data.arrow'}: exists; give --overwrite")


def test_leak_check_by_path(tmp_path):
    """The replaced rows pass; one of them with an old name put back is named; a missing file is one line."""
    rows = make_rows(12)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert replace_pii.main(["--input", str(source), "--output", str(tmp_path / "r.arrow")]) == 0
    words = ["data/leak_check.py", "--input", source, "--replaced"]
    done = run_script(*words, tmp_path / "r.arrow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"old {kind} in 0 of 12 rows" for kind in ("full names", "addresses", "pairs")]
    replaced = [dict(row) for row in formats.read_rows(tmp_path / "r.arrow")]
    replaced[3]["prompt"] += f" {rows[5]['gt-name']}"
    replaced[7]["prompt"] += f" {rows[5]['gt-name']} <{rows[5]['gt-email']}>"
    result = run_script(*words, write_rows(tmp_path / "edited.jsonl", replaced))
    assert result.returncode == 1 and rows[5]["gt-name"] not in result.stdout + result.stderr
    assert result.stdout.splitlines() == [
        "old full names in 2 of 12 rows: 3, 7",
        "old addresses in 1 of 12 rows: 7",
        "old pairs in 1 of 12 rows: 7",
    ]
    missing = run_script(*words, tmp_path / "none.jsonl")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "none.jsonl" in missing.stderr
