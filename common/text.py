"""Text: e-mail addresses, name rules, near-duplicates, copied passages. All linear in the length of a text."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Flat = tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]  # see `_flatten`

LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_%+'&~#$.-"
DOMAIN = re.compile(r"[A-Za-z0-9]++(?:[.-]++[A-Za-z0-9]++)*")


def emails(text: str) -> Iterator[str]:
    """The e-mail addresses in `text`, in order. The local part is read backwards from the @, so time is linear."""
    start, at = 0, text.find("@")
    while at >= 0:
        before = text[start:at]
        local = before[len(before.rstrip(LOCAL)) :]
        domain = DOMAIN.match(text, at + 1) if local else None
        if domain:
            yield f"{local}@{domain[0]}"
        start = domain.end() if domain else at + 1
        at = text.find("@", start)


def first_email(text: str) -> str | None:
    """The first e-mail address in `text`, case-folded; None if there is none."""
    address = next(emails(text), None)
    return address.lstrip("'.").casefold() if address else None


def _letters(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z]", "", plain)


def name_parts(name: str) -> list[str]:
    """The words of a name in lower-case ASCII letters ("O'Neil" → "oneil"), without empty ones."""
    return [part for part in map(_letters, name.split()) if part]


def name_rule_guesses(name: str) -> dict[str, str]:
    """Rule name → local part that the rule derives from `name` (first, last, and middle names if the rule uses them).

    A one-word name has only the rule 'first'. Rules and separators follow the appendix of Huang et al. 2022.
    """
    parts = name_parts(name)
    if not parts:
        return {}
    first, last, middle = parts[0], parts[-1], parts[1:-1]
    if len(parts) == 1:
        return {"first": first}
    f, m, initial_last = first[0], "".join(part[0] for part in middle), last[0]
    guesses = {"first": first, "last": last, "initials": f + m + initial_last, "fl": f + initial_last}
    for separator, label in (("", ""), (".", "."), ("_", "_"), ("-", "-")):
        guesses[f"first{label}last"] = first + separator + last
        guesses[f"last{label}first"] = last + separator + first
        guesses[f"f{label}last"] = f + separator + last
        guesses[f"first{label}l"] = first + separator + initial_last
        guesses[f"last{label}f"] = last + separator + f
        guesses[f"l{label}first"] = initial_last + separator + first
        if middle:
            guesses[f"first{label}m{label}last"] = separator.join([first, m, last])
            guesses[f"first{label}middle{label}last"] = separator.join([first, *middle, last])
            guesses[f"f{label}m{label}last"] = separator.join([f, m, last])
    return guesses


def follows_name_rule(name: str, local_part: str) -> bool:
    """Whether a name rule produces `local_part`, ignoring digits and case."""
    return re.sub(r"\d", "", local_part.lower()) in name_rule_guesses(name).values()


SHINGLE = 5
SIMILAR = 0.8


WORD = r"(?u)\w+|[^\w\s]"


def normalized(text: str) -> str:
    """Lower case, with each run of white space collapsed to one space."""
    return re.sub(r"\s+", " ", text.lower()).strip()


def shingles(text: str) -> frozenset[str]:
    """Runs of 5 words of the normalised text; the whole text if it has fewer."""
    words = normalized(text).split(" ")
    return frozenset(" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1)))


def near_duplicates(texts: Iterable[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """(index in texts, index in others) of pairs whose shingle sets have Jaccard similarity |A∩B| / |A∪B| ≥ 0.8."""
    sets, where = [shingles(other) for other in others], defaultdict(list)
    for index, members in enumerate(sets):
        for shingle in members:
            where[shingle].append(index)
    pairs = []
    for index, mine in enumerate(map(shingles, texts)):
        common = Counter(other for shingle in mine for other in where.get(shingle, ()))
        for other, shared in sorted(common.items()):
            if shared >= SIMILAR * (len(mine) + len(sets[other]) - shared):
                pairs.append((index, other))
    return pairs


COPY_STEPS = (20, 30, 40, 50, 75, 100, 150, 200, 300)  # characters
COPY = 50  # a common substring of at least this length counts as copied


def _flatten(texts: Sequence[str]) -> Flat:
    """(mixed code points [N], text of each [N], characters from each to the end of its text [N])."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    codes = mixed(codes)
    lengths = np.array([len(text) for text in texts], np.int64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(codes))
    return codes, owner, left


def mixed(codes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers spread over 64 bits, for `window_hashes`."""
    codes = (codes + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return codes ^ codes >> np.uint64(29)


def window_hashes(codes: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint64]:
    """Polynomial hashes mod 2^64 of all windows of `length` mixed numbers, [max(0, N − length + 1)]."""
    base, done, hashes = np.uint64(0xD1342543DE82EF95), 0, None
    power, span, piece = base, 1, codes  # hashes of windows of `span`, and base^span
    rest = length
    with np.errstate(over="ignore"):
        while rest:
            n = len(codes) - done - span + 1
            if rest & 1:
                if n <= 0:
                    return np.empty(0, np.uint64)
                tail = piece[done : done + n]
                hashes = tail.copy() if hashes is None else hashes[:n] * power + tail
                done += span
            rest >>= 1
            if rest:
                piece = piece[: len(piece) - span] * power + piece[span:] if len(piece) > span else piece[:0]
                power, span = power * power, 2 * span
    assert hashes is not None  # length ≥ 1
    return hashes


def _holds(texts: Flat, source: Flat, length: int) -> npt.NDArray[np.bool]:
    """[len(texts)] whether any `length` consecutive characters of a text occur in `source`; both from `_flatten`."""
    hashed = []
    for codes, _, left in (texts, source):
        hashes = window_hashes(codes, length)
        hashed.append((hashes, left[: len(hashes)] >= length))
    (mine, valid), (source_hashes, inside) = hashed
    source_hashes = np.sort(source_hashes[inside])
    owner = texts[1][: len(mine)][valid]
    held = np.zeros(int(texts[1].max(initial=-1)) + 1, bool)
    if len(source_hashes):
        mine = mine[valid]
        nearest = np.minimum(np.searchsorted(source_hashes, mine), len(source_hashes) - 1)
        held[owner[source_hashes[nearest] == mine]] = True
    return held


def copied_lengths(
    texts: Sequence[str], source: Sequence[str], steps: Sequence[int] = COPY_STEPS
) -> npt.NDArray[np.int64]:
    """[n] the largest of `steps` (ascending) reached by the longest common substring of a text and any source text.

    0 below the first step. Characters are compared as they are, by 64-bit hashes of all windows of a step's length (the
    probability of a false hit among 3·10⁶ × 3·10⁷ windows is 5·10⁻⁶), so time grows with n log n, not texts × source.
    """
    reached, alive, flat = np.zeros(len(texts), np.int64), np.arange(len(texts)), _flatten(source)
    for step in steps:
        held = np.zeros(len(alive), bool)
        copied = _holds(_flatten([texts[int(index)] for index in alive]), flat, step)
        held[: len(copied)] = copied
        alive = alive[held]
        reached[alive] = step
        if not len(alive):
            break
    return reached


def longest_copy(texts: Sequence[str], source: Sequence[str], at_least: int = 0) -> int:
    """Length of the longest substring shared by any text and any source text; it must be known to be ≥ `at_least`."""
    low, high = at_least, max(map(len, texts), default=0)
    mine, flat_source = _flatten(texts), _flatten(source)
    while low < high:
        middle = (low + high + 1) // 2
        if _holds(mine, flat_source, middle).any():
            low = middle
        else:
            high = middle - 1
    return low
