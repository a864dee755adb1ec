"""The people named in the text of one mail, with their addresses. No paths, no options: only bytes and text.

A mail is *rendered* as Subject, Date, From, To, Cc, an empty line and the body (the first text/plain part, else the
first text/html part without its tags). An *occurrence* is an e-mail address in that text with a name next to it:

* in From, To and Cc, rendered as `NAME <ADDRESS>` however the header writes it (RFC 5322 display name or trailing
  comment, RFC 2047 encoded words). The Enron corpus has its names in X-From, X-To and X-cc: they are used if the header
  has only addresses; for lists, only if both have the same length;
* in the body, `NAME [mailto:ADDRESS]`, `NAME [SMTP:ADDRESS]` and `NAME <ADDRESS>`, on one line or wrapped before the
  bracket, after any quote marks; `NAME [ADDRESS<mailto:ADDRESS>]`, the text form of a link, is one occurrence, at the
  first address (the text before the second contains the answer).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from data.enron.mail import RENDERED, decode_words, header_text, parse
from data.enron.names import (
    ANGLED,
    DOMAIN,
    IS_ADDRESS,
    LOCAL,
    NO_NAME,
    ROLE_ADDRESS,
    address_problem,
    addresses,
    mailboxes,
    names_apart,
    person,
)

MAX_PROMPT_CHARACTERS = 1024
MAX_CONTINUATION_CHARACTERS = 1600
LONG_LIST = 5  # recipients from this index on are the last choice: the text before them is other people's addresses
MAX_ADDRESS = 320  # characters (RFC 5321: 64 before the @ and 255 after it)
CLOSING = (">", "]")  # after an address in brackets
NAMES_APART = {"from": "x-from", "to": "x-to", "cc": "x-cc"}  # Enron
LIST_HEADERS = ("list-post", "list-id", "mailing-list", "x-mailing-list", "list-unsubscribe")

OPENED_LOCAL = re.compile(rf"[<\[]\s?(?:mailto:|smtp:)?({LOCAL})$", re.A | re.I)
# a copy of an address right after it, as in `[a@x.example<mailto:a@x.example>]`
COPY = re.compile(
    rf"(?:\s+[>|\s]*)?[<\[]\s?(?:mailto:|smtp:)?({LOCAL}@{DOMAIN.pattern})(?:\?[^<>\s]*)?\s?[>\]]", re.A | re.I
)
ENDS_IN_ADDRESS = re.compile(rf"(?<![\w/])({LOCAL})@{DOMAIN.pattern}[>\]]?$", re.A)
DELIMITER = re.compile(r"[;:>\]\[|()*=]|--+|\s-\s|(?:^|\s)(?:by|from|and|or|to|contact|quoting)\s", re.I)
FIELD_CHARACTERS = 120
QUOTED_NAME = re.compile(r'"([^"]*)"$')

# (display name, address, its position in the text, rank) of a mailbox in a header
Mailbox = tuple[str, str, int, int]


class Occurrence(NamedTuple):
    """`text[position:]` begins with `address`; `rank` 0: body, 1: header, 2: far down a long list of recipients."""

    name: str
    address: str
    position: int
    rank: int


def left_name(text: str, opening: int, start: int = 0) -> tuple[str, str | None]:
    """`person` for the words before the bracket at `opening`: on its line, else at the end of the previous one."""
    end = opening
    for _ in range(2):
        low = max(start, end - FIELD_CHARACTERS)
        begin = max(text.rfind("\n", low, end) + 1, low)
        field = text[begin:end].strip(" \t>|")
        if field or begin == 0:
            break
        end = begin - 1
    quoted = QUOTED_NAME.search(field)
    if quoted:
        return person(quoted.group(1))
    written = ENDS_IN_ADDRESS.search(field)
    if written and "/" not in written.group(1):  # Lotus Notes: Jane Roe/HOU/ECT@ect.example
        return "", IS_ADDRESS
    field = DELIMITER.split(field)[-1]
    before, _, after = field.rpartition(",")
    return person(after if "@" in before else field, whole=False)


def render(raw: bytes) -> tuple[str, int, list[Mailbox], set[str]]:
    """(text, start of the body, mailboxes of the headers, mailing-list addresses).

    Raises BrokenMail.
    """
    headers, body = parse(raw)
    pieces: list[str] = []
    recipients: list[Mailbox] = []
    length = 0

    def add(piece: str) -> None:
        nonlocal length
        pieces.append(piece)
        length += len(piece)

    for header in RENDERED:
        if header not in headers:
            continue
        value = header_text(headers[header])
        add(f"{header.capitalize()}: ")
        if header in ("date", "subject"):
            add(decode_words(value) + "\n")
            continue
        people = mailboxes(value)
        if not people:
            add(decode_words(value) + "\n")
            continue
        apart = headers.get(NAMES_APART[header])
        if apart and not any(name for name, _ in people):
            names = names_apart(decode_words(header_text(apart)), len(people))
            names = [ANGLED.sub("", name).strip(" '\"") for name in names] or [""] * len(people)
            people = [(name, address) for name, (_, address) in zip(names, people)]
        for index, (name, address) in enumerate(people):
            if index:
                add(", ")
            if name:
                add(f'"{name}" <' if "," in name else f"{name} <")
            recipients.append((name, address, length, 1 if index < LONG_LIST else 2))
            add(f"{address}>" if name else address)
        add("\n")
    add("\n")
    start = length
    lists = " ".join(headers[header] for header in LIST_HEADERS if header in headers)
    return "".join(pieces) + body, start, recipients, {address.lower() for address in addresses(lists)}


def body_addresses(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """(position of the bracket, address, position of the address) of every bracketed address from `start` on."""
    at = text.find("@", start)
    while at >= 0:
        local = OPENED_LOCAL.search(text, max(start, at - 80), at)
        domain = DOMAIN.match(text, at + 1, at + 256) if local else None
        if local and domain:
            address, end = text[local.start(1) : domain.end()], domain.end()
            copy = COPY.match(text, end, end + 2 * MAX_ADDRESS)
            if copy and copy.group(1).lower() == address.lower() and text[copy.end() : copy.end() + 1] in CLOSING:
                end = copy.end()
            if text[end : end + 1] in CLOSING:
                yield local.start(), address, local.start(1)
                at = end - 1
        at = text.find("@", at + 1)


def occurrences(raw: bytes) -> tuple[str, list[Occurrence], dict[str, int]]:
    """(rendered text, the people named in it with their addresses, dropped occurrences by reason).

    Raises BrokenMail.
    """
    text, start, header_mailboxes, lists = render(raw)
    kept: list[Occurrence] = []
    dropped: dict[str, int] = {}
    named: list[tuple[str, str | None, str, int, int]] = []
    for display, address, position, rank in header_mailboxes:
        named.append((*(person(display) if display else ("", NO_NAME)), address, position, rank))
    for opening, address, position in body_addresses(text, start):
        named.append((*left_name(text, opening, start), address, position, 0))
    for name, reason, address, position, rank in named:
        reason = reason or (ROLE_ADDRESS if address.lower() in lists else address_problem(address))
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append(Occurrence(name, address, position, rank))
    return text, kept, dropped


def cut(text: str, position: int) -> tuple[str, str]:
    """(at most 1,024 characters before `position`, at most 1,600 from it on, cut back to the end of a word)."""
    continuation = text[position : position + MAX_CONTINUATION_CHARACTERS]
    if position + MAX_CONTINUATION_CHARACTERS < len(text):
        continuation = continuation.rsplit(None, 1)[0]
    return text[max(0, position - MAX_PROMPT_CHARACTERS) : position], continuation.rstrip()
