"""The templates and values of phrases.json, which the corpus is written from."""

import json
import random
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "phrases.json"

Memory = dict[str, list[str]]  # slot → values used in a mail


class Phrases:
    """The templates of phrases.json, and the values of their {slots}."""

    def __init__(self, path: Path = FILE):
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.topics: dict[str, dict[str, list[str]]] = self.data["topics"]
        self.first_names: list[str] = []  # both are set by make_people
        self.unused_names: list[tuple[str, str]] = []

    def value(self, slot: str, rng: random.Random) -> str:
        """A random value of a slot."""
        if slot == "num":
            return str(
                rng.choice([rng.randint(2, 99), rng.randint(100, 999), 50 * rng.randint(2, 60), rng.randint(1, 9)])
            )
        if slot == "nnn":
            return f"{rng.randint(0, 999):03d}"
        if slot == "dd":
            return str(rng.randint(2, 28))
        if slot == "pct":
            return f"{rng.randint(0, 12)}.{rng.randint(0, 99):02d}"
        if slot == "price":
            return f"${rng.randint(2, 48)}.{rng.randint(0, 99):02d}"
        if slot == "deal":
            return f"{rng.randint(1, 9)}{rng.randint(0, 99999):05d}"
        if slot == "time":
            return f"{rng.randint(1, 12)}:{rng.choice(['00', '15', '30', '45'])} {rng.choice(['am', 'pm'])}"
        if slot == "year":
            return str(rng.randint(1840, 2002))
        if slot == "phone":
            return f"{rng.randint(2, 9)}{rng.randint(0, 99):02d}-555-01{rng.randint(0, 99):02d}"
        if slot == "first":
            return rng.choice(self.first_names)
        values: list[str] = self.data["slots"].get(slot) or self.data["web_slots"][slot]
        return rng.choice(values)

    def fill(self, sentence: str, rng: random.Random, memory: Memory) -> str:
        """The sentence with every {slot} replaced by a random value, often one used before in this mail."""

        def replacement(match: re.Match[str]) -> str:
            seen = memory.setdefault(match[1], [])
            fresh = [value for value in seen if value not in used]
            value = rng.choice(fresh) if fresh and rng.random() < 0.5 else self.value(match[1], rng)
            used.append(value)
            seen.append(value)
            return value

        used: list[str] = []
        text = re.sub(r"\{(\w+)\}", replacement, sentence)
        return text[0].upper() + text[1:] if text else text
