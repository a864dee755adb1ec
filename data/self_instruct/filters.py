"""Prompts, parsing and filters of self-instruct (Wang et al. 2023, arXiv:2212.10560). Pure functions on text."""

import re
from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np
from rapidfuzz.distance import LCSseq

from data.self_instruct.seed_tasks import SeedTask

MIN_WORDS, MAX_WORDS = 3, 150  # of an instruction
MAX_INSTANCES = 5  # of one instruction
# Hints at tasks that a text model cannot do. 'file' is not among them: motions are filed.
KEYWORDS = re.compile(
    r"\b(images?|pictures?|photos?|videos?|audio|music|graphs?|charts?|diagrams?|flowcharts?|maps?|draw|plot|links?"
    r"|urls?|websites?|upload|download|attached|attachment|go to)\b",
    re.I,
)
NO_INPUT = "None"
NEW_LINE = r"(?<!\s)[^\S\n]*+\n\s*+"  # a line break and the white space around it, without backtracking
LABEL = re.compile(rf"(?:^\s*+|{NEW_LINE})(?:Input|Output|Label|Task|Example)(?: \d++)?:")  # all may recur

INSTRUCTION_HEAD = "Come up with a series of tasks about court opinions:\n\n"
INPUT_FIRST_HEAD = (
    "Come up with examples for the following tasks. Give several examples where possible. "
    f"Where a task needs no input, write {NO_INPUT}.\n\n"
)
OUTPUT_FIRST_HEAD = (
    "The following tasks are classifications. For each, name possible labels and write an input that has the label.\n\n"
)
KIND_HEAD = "Can the following tasks be seen as classification tasks with a small set of output labels?\n\n"


def is_classification(task: SeedTask) -> bool:
    """Whether the instruction of a seed task names its labels: every output occurs in it."""
    instruction = task["instruction"].casefold()
    return all(
        re.search(rf"\b{re.escape(example['output'].casefold())}\b", instruction) for example in task["examples"]
    )


def instruction_prompt(instructions: list[str]) -> str:
    lines = [f"Task {number}: {' '.join(text.split())}\n" for number, text in enumerate(instructions, 1)]
    return INSTRUCTION_HEAD + "".join(lines) + f"Task {len(instructions) + 1}:"


def kind_prompt(seeds: list[SeedTask], instruction: str) -> str:
    shown = [
        f"Task: {task['instruction']}\nIs it classification? {'Yes' if is_classification(task) else 'No'}\n\n"
        for task in seeds
    ]
    return KIND_HEAD + "".join(shown) + f"Task: {instruction}\nIs it classification?"


def instance_prompt(seeds: list[SeedTask], instruction: str, output_first: bool) -> str:
    parts = [OUTPUT_FIRST_HEAD if output_first else INPUT_FIRST_HEAD]
    for task in seeds:
        parts.append(f"Task: {task['instruction']}\n")
        for number, example in enumerate(task["examples"], 1):
            given = example["input"] or NO_INPUT
            if output_first:
                parts.append(f"Label: {example['output']}\nInput: {given}\n")
            else:
                parts.append(f"Example {number}\nInput: {given}\nOutput: {example['output']}\n")
        parts.append("\n")
    parts.append(f"Task: {instruction}\n" + ("Label:" if output_first else "Example 1\nInput:"))
    return "".join(parts)


def parse_instructions(completion: str, ended: bool) -> tuple[list[str], int]:
    """(instructions, 1 if the last was cut off else 0) of a completion of instruction_prompt, up to another line.

    ended: the model stopped by itself, so the last line is complete.
    """
    lines = completion.split("\n")
    instructions, cut = [], 0
    for number, line in enumerate(lines):
        label = re.match(r"Task \d+:", line) if number else None
        if number and not label:
            break
        if number == len(lines) - 1 and not ended:
            cut = 1
            break
        instructions.append(" ".join(line[label.end() if label else 0 :].split()))
    return instructions, cut


def parse_instances(completion: str, ended: bool, output_first: bool) -> tuple[list[tuple[str, str]], Counter[str]]:
    """([(input, output)], {'cut': …, 'no instance': …}) in a completion of instance_prompt, up to the next task."""
    text, _, rest = completion.partition("\nTask:")
    first, second, separator = "Label:", "Input:", "(?=Label:)"
    if not output_first:
        first, second, separator = "Input:", "Output:", r"Example \d++\s*\n"
    pieces = re.split(f"{NEW_LINE}{separator}", f"{first}{text}")
    instances: list[tuple[str, str]] = []
    lost: Counter[str] = Counter()
    if not (ended or rest):
        pieces.pop()
        lost["cut"] = 1
    for piece in pieces[:MAX_INSTANCES]:
        former, *rests = re.split(f"{NEW_LINE}{second}", piece.lstrip(), maxsplit=1)
        if not rests or not former.startswith(first) or LABEL.search(former.removeprefix(first)):
            lost["no instance"] += 1
            continue
        former, latter = former.removeprefix(first).strip(), LABEL.split(rests[0], maxsplit=1)[0].strip()
        given, output = (latter, former) if output_first else (former, latter)
        instances.append(("" if given.casefold() == NO_INPUT.casefold() else given, output))
    return instances, lost


def instruction_fault(text: str) -> str | None:
    """Why an instruction is rejected, apart from similarity to the pool; None if it is not."""
    if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
        return "length"
    if KEYWORDS.search(text):
        return "keyword"
    if not (text[0].isascii() and text[0].isalnum()):
        return "start"  # punctuation or another script
    return None


def comparison_key(text: str) -> tuple[str, ...] | str:
    """A key that ignores case, white space and punctuation."""
    return tuple(re.findall(r"\w+", text.casefold())) or text


def filter_instances(instances: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(instances kept, number dropped by each filter) of one instruction; of several outputs
    for one input, none is kept."""
    dropped: Counter[str] = Counter()
    outputs: dict[str, list[str]] = {}
    for given, output in instances:
        if not output:
            dropped["empty output"] += 1
        elif comparison_key(given) == comparison_key(output):
            dropped["output equals input"] += 1
        elif output in outputs.setdefault(given, []):
            dropped["repeated"] += 1
        else:
            outputs[given].append(output)
    dropped["conflicting"] = sum(len(several) for several in outputs.values() if len(several) > 1)
    return [(given, only[0]) for given, only in outputs.items() if len(only) == 1], +dropped


class RougePool:
    """Texts against which a candidate's largest ROUGE-L F (Lin 2004) is compared with a threshold, exactly.

    F = 2·LCS / (m + n) over lower-case alphanumeric words. LCS is at most the number of words in common, counted with
    multiplicity from an inverted index for all texts at once; only texts for which that bound exceeds the threshold
    are compared exactly by dynamic programming (rapidfuzz, bit-parallel).
    """

    def __init__(self, threshold: float = 0.7):
        self.threshold = threshold
        self.ids: dict[str, int] = {}
        self.holders: dict[tuple[int, int], array[int]] = {}  # (word, k) → texts with the word at least k times
        self.lengths = array("i")
        self.texts: list[list[int]] = []

    def _words(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids)) for word in re.findall(r"[^\W_]+", text.lower())]

    @staticmethod
    def _keys(words: list[int]) -> Iterator[tuple[int, int]]:
        seen: Counter[int] = Counter()
        for word in words:
            seen[word] += 1
            yield word, seen[word]

    def add(self, text: str) -> None:
        words = self._words(text)
        for key in self._keys(words):
            self.holders.setdefault(key, array("i")).append(len(self.texts))
        self.lengths.append(len(words))
        self.texts.append(words)

    def alike(self, text: str) -> bool:
        """Whether a text of the pool has ROUGE-L F > threshold with this one."""
        words = self._words(text)
        held = [np.frombuffer(self.holders[key], dtype=np.intc) for key in self._keys(words) if key in self.holders]
        if not held:
            return False
        common = np.bincount(np.concatenate(held), minlength=len(self.texts))
        both = len(words) + np.frombuffer(self.lengths, dtype=np.intc)
        close = np.flatnonzero(2 * common > self.threshold * both)
        for index in close[np.argsort(-common[close] / both[close], kind="stable")]:
            if 2 * LCSseq.similarity(words, self.texts[index]) > self.threshold * both[index]:
                return True
        return False
