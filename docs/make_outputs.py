#!/usr/bin/env python3
"""Print docs/outputs.md: every output file, its keys and the exit statuses.

python docs/make_outputs.py > docs/outputs.md

What a file is for stands in common/schema.py; its keys are those that the smallest runs of all scripts left
(tests/goldens), so a key that a script stops writing, or begins to write, changes this document.
"""

import json
from pathlib import Path

from common.schema import EXIT_STATUSES, OUTPUTS

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"


def keys_by_file() -> dict[str, set[str]]:
    """{file name: top-level keys of its object, or of its lines} over all golden outputs."""
    keys: dict[str, set[str]] = {}
    for golden in sorted(GOLDENS.glob("*.json")):
        for path, content in json.loads(golden.read_text(encoding="utf-8")).items():
            name = path.split("/")[-1].split(" ")[0]
            lines = [content] if isinstance(content, dict) else content if isinstance(content, list) else []
            found = set().union(*(line for line in lines if isinstance(line, dict)))
            if isinstance(content, dict) and content.keys() <= {"items", "keys"}:  # kept as its structure
                found = set(content["keys"])
            if not any(key.startswith("sha256 without") for key in found):  # a long file is kept as its hash
                keys.setdefault(name, set()).update(found)
    return keys


def page() -> str:
    keys = keys_by_file()
    lines = ["# Output files", "", "Made by `python docs/make_outputs.py`; do not edit.", ""]
    lines += ["## Exit statuses", "", "| status | meaning |", "|---|---|"]
    lines += [f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items()]
    for names, (script, meaning) in OUTPUTS.items():
        lines += ["", f"## {names}", "", f"Written by {script}: {meaning}.", ""]
        found = sorted(set().union(*(keys.get(name, set()) for name in names.split(", "))))
        if found and not names.startswith("adapter_config"):  # whose keys are peft's
            lines.append("Keys: " + ", ".join(f"`{key}`" for key in found) + ".")
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
