"""The documents: links resolve, commands use flags that exist, numbers of lines and generated pages are as promised."""

import importlib.util
import re
import shlex

import pytest
from conftest import ROOT
from test_cli import FLAGS

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCUMENTS = [*(ROOT / name for name in PAGES), *sorted((ROOT / "docs").glob("*.md"))]
COMMON = {"--config", "--version", "--help"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document):
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def anchors(document) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_picture_of_the_report_is_small():
    picture = (ROOT / "docs" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 200_000


def test_the_readme_is_short_and_lists_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    table = text.split("## Files")[1]
    for path in re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)?", table, re.M):
        assert all((ROOT / one).exists() for one in path if one), path


def commands():
    """(document, words) of every call of a script in the documents and the examples."""
    for document in [*DOCUMENTS, *sorted((ROOT / "examples").iterdir())]:
        text = document.read_text(encoding="utf-8")
        blocks = re.findall(r"```sh\n(.*?)```", text, re.S) if document.suffix == ".md" else [text]
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line.split(" #")[0], comments=True) if ".py" in line else []
            for script in FLAGS:
                if script in words:
                    yield document.name, script, words[words.index(script) + 1 :]


def test_flags_of_documented_commands_exist():
    calls = list(commands())
    assert len(calls) >= 25
    for document, script, words in calls:
        flags = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z_]*(=.*)?", word)}
        assert flags <= FLAGS[script] | COMMON, (document, script, flags - FLAGS[script])


def test_outputs_are_those_of_the_schema():
    spec = importlib.util.spec_from_file_location("make_outputs", ROOT / "docs" / "make_outputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8") == module.page()
