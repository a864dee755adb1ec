"""The layers: scripts → rooms → common, checked from the source."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = (
    "canary", "data", "extraction", "fidelity", "memorization", "mia", "perplexity", "reporting", "training", "utility",
)  # fmt: skip
ORCHESTRATORS = {  # what may import another room, or a script
    "audit.py": {"auditing"},
    "evaluate_purified.py": {"extraction", "studies"},
    "quickstart.py": {"studies", "plot_results"},
    "canary/auxiliary.py": {"training"},
    "mia/shadow.py": {"shadowing"},
    "utility/downstream.py": {"training"},
}
SCRIPTS = sorted(
    path
    for path in ROOT.rglob("*.py")
    if "entry(main))" in path.read_text(encoding="utf-8") and "tests" not in path.parts
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for place in (*ROOMS, "common", "auditing", "shadowing", "studies", ".")
    for path in (ROOT.glob("*.py") if place == "." else (ROOT / place).rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """Dotted names of this repository's modules that a file imports, also inside functions, but not for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & set(MODULES) or {node.module}
    return names & set(MODULES)


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_down(module):
    """common imports common alone; a room imports itself and common; a script imports one room, and no script."""
    path = MODULES[module]
    name = path.relative_to(ROOT).as_posix()
    scripts = {".".join(script.relative_to(ROOT).with_suffix("").parts) for script in SCRIPTS} - {module}
    if name.startswith(("auditing/", "shadowing/", "studies/")):
        called = [MODULES[script].read_text(encoding="utf-8") for script in imported(path) & scripts]
        assert all("\ndef run(config" in text for text in called), "of a script only its own run is called"
        return
    room = room_of(module)
    allowed = {"common"} | ORCHESTRATORS.get(name, set())
    if room != "common":
        allowed |= {room} if room in ROOMS else set(ROOMS)
    beyond = {other for other in imported(path) if room_of(other) not in allowed}
    assert beyond == set()
    if room not in ROOMS and room != "common" and name not in ORCHESTRATORS:
        assert len({room_of(other) for other in imported(path)} - {"common"}) <= 1, "a script calls one room"
    if name not in ORCHESTRATORS:
        assert imported(path) & scripts == set()


def test_no_import_circle():
    """At the top of files or inside functions."""
    arrows = {module: imported(path) - {module} for module, path in MODULES.items()}
    left = dict(arrows)
    while left:
        free = [module for module, others in left.items() if not others & set(left)]
        assert free, f"in a circle: {sorted(left)}"
        for module in free:
            del left[module]


def test_sys_path_changes_only_where_a_folder_shares_its_scripts_name():
    changing = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "sys.path" in path.read_text(encoding="utf-8") and "tests" not in path.parts
    }
    shadowed = {
        "bench/auxiliary.py",
        "bench/canaries.py",
        "bench/coverage.py",
        "bench/mia.py",
    }  # bench/ has scripts named like the packages that these import
    assert changing == {"mia/mia.py", "mia/shadow.py", "perplexity/perplexity.py", "fidelity/fidelity.py"} | shadowed
