"""The text of a mail, from its bytes: charsets, encoded words, HTML, parts; the mails of an mbox. No paths, no options.

A damaged mail is read as far as it can be; what the email package cannot read at all is a `BrokenMail`.
"""

import email.message
import html
import itertools
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from email.errors import MessageError
from email.header import decode_header
from email.parser import BytesParser
from typing import IO, cast

MAX_BYTES = 1 << 20  # of one mail; the rest (attachments) is not read
RENDERED = ("subject", "date", "from", "to", "cc")  # in this order, so that text precedes the sender's address
KNOWN = {*RENDERED, "message-id", "received", "return-path", "delivered-to"}  # a mail has at least one of these

# Errors that the email package raises on damaged mail: bad charsets and parameters, too deeply nested parts.
LIBRARY_ERRORS = (MessageError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class BrokenMail(Exception):
    """Not a mail, or one that the email package cannot read. The message says why, without quoting the mail."""


def decode_text(raw: bytes, charset: str | None) -> str:
    """`raw` decoded from the declared charset, else UTF-8, else Windows-1252, else Latin-1 (which never fails).

    The result has no NUL, no carriage return and no lone surrogate.
    """
    stateful = charset is not None and charset.lower().startswith(("iso-2022", "utf-7", "utf-16", "utf-32", "hz"))
    if raw.isascii() and not stateful:
        text = raw.decode("ascii")
    else:
        for name in (charset or "utf-8", "utf-8", "cp1252", "latin-1"):
            try:
                text = raw.decode(name)
                break
            except (LookupError, ValueError):  # an unknown charset, or bytes that are invalid in it
                continue
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


ENCODED_WORD = r"=\?[^?\s]+\?[bBqQ]\?[^?]*\?="
ENCODED_RUN = re.compile(rf"{ENCODED_WORD}(?:\s+{ENCODED_WORD})*")


def decode_words(value: str) -> str:
    """Decode RFC 2047 encoded words; a run that cannot be decoded is kept as it is."""
    return ENCODED_RUN.sub(_decode_run, value) if "=?" in value else value


def _decode_run(match: re.Match[str]) -> str:
    try:
        parts = decode_header(match.group())
    except LIBRARY_ERRORS:
        return match.group()
    decoded = (decode_text(part, name) if isinstance(part, bytes) else part for part, name in parts)
    return " ".join("".join(decoded).split())


def header_text(value: str) -> str:
    """A raw header, unfolded, with undeclared 8-bit bytes decoded but encoded words not yet."""
    if not value.isascii():
        value = decode_text(value.encode("utf-8", "surrogateescape"), None)
    return " ".join(value.split())


HIDDEN_HTML = re.compile(r"<(script|style|title)\b", re.I)
BREAKING_TAG = re.compile(r"</?(?:p|br|div|tr|li|h[1-6]|blockquote|table|pre)\b[^<>]*>", re.I)
TAG = re.compile(r"</?[a-z!][^<>]*>", re.I)


def strip_html(text: str) -> str:
    """The text of an HTML part, one line per block."""
    first, *rest = text.split("<!--")
    text = first + "".join(part.partition("-->")[2] if "-->" in part else part for part in rest)
    first, *rest = HIDDEN_HTML.split(text)
    for tag, part in zip(rest[::2], rest[1::2]):
        first += part[max(0, part.lower().find(f"</{tag.lower()}")) :]
    text = html.unescape(TAG.sub("", BREAKING_TAG.sub("\n", first))).replace("\xa0", " ")
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:+-]+)", re.I)


def _part_text(part: email.message.Message, kind: str) -> str:
    match = CHARSET.search(str(part.get("content-type", "")))
    payload = part.get_payload(decode=True)
    text = decode_text(payload if isinstance(payload, bytes) else b"", match.group(1) if match else None)
    return strip_html(text) if kind == "text/html" else text


def _body(message: email.message.Message, kind: str) -> str:
    if not message.is_multipart():
        return _part_text(message, kind) if kind.startswith("text/") else ""
    leaves = [part for part in message.walk() if not part.is_multipart()]
    for wanted in ("text/plain", "text/html"):
        for part in leaves:
            if part.get_content_type() == wanted:
                return _part_text(part, wanted)
    return ""


END_OF_HEADERS = re.compile(rb"\r?\n\r?\n")


def parse(raw: bytes) -> tuple[dict[str, str], str]:
    """({lower-case header name: its first value}, body text). Unless the mail is multipart, only its headers go through
    the email package's line-by-line parser, which is slow."""
    gap = END_OF_HEADERS.search(raw)
    end = gap.end() if gap else len(raw)
    try:
        message = BytesParser().parsebytes(raw[:end])
        headers: dict[str, str] = {}
        for name, value in message.raw_items():
            headers.setdefault(name.lower(), value)
        if KNOWN.isdisjoint(headers):
            raise BrokenMail("has no mail header")
        kind = message.get_content_type()
        if kind.startswith("multipart/"):
            message = BytesParser().parsebytes(raw)
        else:  # the payload is what follows a broken header line, which the parser takes for body
            message.set_payload(cast(str, message.get_payload()) + raw[end:].decode("ascii", "surrogateescape"))
        return headers, _body(message, kind)
    except LIBRARY_ERRORS as error:
        raise BrokenMail(f"the email package cannot read it ({type(error).__name__})") from error


MBOX_SEPARATOR = re.compile(rb"From \S.*\d\d:\d\d.*\d{4}")


def split_mbox(file: Iterable[bytes]) -> Iterator[bytes]:
    """The mails in the lines of an mbox, one at a time, each truncated at MAX_BYTES.

    A separator is a line `From SENDER … TIME … YEAR` at the start or after an empty line (RFC 4155). A line may arrive
    in several pieces, all but the last without a line break.
    """
    lines: list[bytes] = []
    size, after_empty, started, begins = 0, True, False, True
    for line in file:
        after_empty, begins = after_empty and begins, line.endswith(b"\n")
        if after_empty and line.startswith(b"From ") and MBOX_SEPARATOR.match(line, 0, 200):
            if started:
                yield b"".join(lines)[:MAX_BYTES]
            lines, size, after_empty, started = [], 0, False, True
            continue
        after_empty = line in (b"\n", b"\r\n")
        started = started or not after_empty
        if size < MAX_BYTES:
            lines.append(line)
            size += len(line)
    if started:
        yield b"".join(lines)[:MAX_BYTES]


def read_mails(file: IO[bytes], label: str) -> Iterator[tuple[str, bytes]]:
    """(label, bytes) of the mails in an open file: all mails of an mbox (which begins with `From `; labels are numbered
    from the second on), else the single mail. Reads forward only; drops a UTF-8 byte order mark."""
    first = file.readline(MAX_BYTES).removeprefix(BOM_UTF8)
    if not first.startswith(b"From "):
        yield label, first + file.read(MAX_BYTES - len(first))
        return
    rest = iter(lambda: file.readline(MAX_BYTES), b"")  # an endless line must not fill memory
    for number, raw in enumerate(split_mbox(itertools.chain([first], rest)), 1):
        yield label if number == 1 else f"{label}#{number}", raw
