"""Parse the bytes of one mail into its text and the people named in it. No paths, no options: only bytes and text.

A mail is *rendered* as Subject, Date, From, To, Cc, an empty line and the body (the first text/plain part, else the
first text/html part without its tags). An *occurrence* is an e-mail address in that text with a name next to it:

* in From, To and Cc, rendered as `NAME <ADDRESS>` however the header writes it (RFC 5322 display name or trailing
  comment, RFC 2047 encoded words). The Enron corpus has its names in X-From, X-To and X-cc: they are used if the header
  has only addresses; for lists, only if both have the same length;
* in the body, `NAME [mailto:ADDRESS]`, `NAME [SMTP:ADDRESS]` and `NAME <ADDRESS>`, on one line or wrapped before the
  bracket, after any quote marks; `NAME [ADDRESS<mailto:ADDRESS>]`, the text form of a link, is one occurrence, at the
  first address (the text before the second contains the answer).
"""

import email.message
import hashlib
import html
import itertools
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from email.errors import MessageError
from email.header import decode_header
from email.parser import BytesParser
from functools import lru_cache
from typing import BinaryIO, NamedTuple

MAX_BYTES = 1 << 20  # of one mail; the rest (attachments) is not read
MAX_PROMPT_CHARACTERS = 1024
MAX_CONTINUATION_CHARACTERS = 1600
REMEMBERED = 1 << 14  # size of the caches for names and addresses, which repeat a lot
MAX_DISPLAY = 120  # characters of a name field
LONG_LIST = 5  # recipients from this index on are the last choice: the text before them is other people's addresses

RENDERED = ("subject", "date", "from", "to", "cc")  # in this order, so that text precedes the sender's address
NAMES_APART = {"from": "x-from", "to": "x-to", "cc": "x-cc"}  # Enron
LIST_HEADERS = ("list-post", "list-id", "mailing-list", "x-mailing-list", "list-unsubscribe")
KNOWN = {*RENDERED, "message-id", "received", "return-path", "delivered-to"}  # a mail has at least one of these

# Errors that the email package raises on damaged mail: bad charsets and parameters, too deeply nested parts.
LIBRARY_ERRORS = (MessageError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class BrokenMail(Exception):
    """Not a mail, or one that the email package cannot read. The message says why, without quoting the mail."""


class Occurrence(NamedTuple):
    """`text[position:]` begins with `address`; `rank` 0: body, 1: header, 2: far down a long list of recipients."""

    name: str
    address: str
    position: int
    rank: int


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


def _decode_run(match: re.Match) -> str:
    try:
        parts = decode_header(match.group())
    except LIBRARY_ERRORS:
        return match.group()
    decoded = (decode_text(part, name) if isinstance(part, bytes) else part for part, name in parts)
    return " ".join("".join(decoded).split())


def _header_text(value: str) -> str:
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
    text = decode_text(part.get_payload(decode=True) or b"", match.group(1) if match else None)
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


def _parse(raw: bytes) -> tuple[dict[str, str], str]:
    """({lower-case header name: its first value}, body text). Unless the mail is multipart, only its headers go through
    the email package's line-by-line parser, which is slow."""
    gap = END_OF_HEADERS.search(raw)
    end = gap.end() if gap else len(raw)
    try:
        message = BytesParser().parsebytes(raw[:end])
        headers = {}
        for name, value in message.raw_items():
            headers.setdefault(name.lower(), value)
        if KNOWN.isdisjoint(headers):
            raise BrokenMail("has no mail header")
        kind = message.get_content_type()
        if kind.startswith("multipart/"):
            message = BytesParser().parsebytes(raw)
        else:  # the payload is what follows a broken header line, which the parser takes for body
            message.set_payload(message.get_payload() + raw[end:].decode("ascii", "surrogateescape"))
        return headers, _body(message, kind)
    except LIBRARY_ERRORS as error:
        raise BrokenMail(f"the email package cannot read it ({type(error).__name__})") from error


MBOX_SEPARATOR = re.compile(rb"From \S.*\d\d:\d\d.*\d{4}")


def split_mbox(file: Iterable[bytes]) -> Iterator[bytes]:
    """The mails in the lines of an mbox, one at a time, each truncated at MAX_BYTES.

    A separator is a line `From SENDER … TIME … YEAR` at the start or after an empty line (RFC 4155). A line may arrive
    in several pieces, all but the last without a line break.
    """
    lines, size, after_empty, started, begins = [], 0, True, False, True
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


def read_mails(file: BinaryIO, label: str) -> Iterator[tuple[str, bytes]]:
    """(label, bytes) of the mails in an open file: all mails of an mbox (which begins with `From `; labels are numbered
    from the second on), else the single mail. Reads forward only; drops a UTF-8 byte order mark."""
    first = file.readline(MAX_BYTES).removeprefix(BOM_UTF8)
    if not first.startswith(b"From "):
        yield label, first + file.read(MAX_BYTES - len(first))
        return
    lines = itertools.chain(
        [first], iter(lambda: file.readline(MAX_BYTES), b"")
    )  # an endless line must not fill memory
    for number, raw in enumerate(split_mbox(lines), 1):
        yield label if number == 1 else f"{label}#{number}", raw


LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
DOMAIN = re.compile(rf"(?:{LABEL}\.)+[A-Za-z]{{2,24}}(?![\w.-])")
LOCAL = r"[A-Za-z0-9_](?:[\w.+%=&'/-]{0,62}[\w+])?"
ADDRESS = re.compile(rf"({LOCAL})@({DOMAIN.pattern})", re.A)
MAX_ADDRESS = 320  # characters (RFC 5321: 64 before the @ and 255 after it)
CLOSING = (">", "]")  # after an address in brackets
LAST_LOCAL = re.compile(rf"(?<![\w.@-]){LOCAL}$", re.A)
OPENED_LOCAL = re.compile(rf"[<\[]\s?(?:mailto:|smtp:)?({LOCAL})$", re.A | re.I)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROLES = _words(
    "abuse account accounts admin administration administrator administrators alert alerts all announce announcement "
    "announcements anonymous billing bounce bounces careers central contact contacts customer customers "
    "customerservice customersupport cvs daemon dev devel digest discuss donotreply editor editors email enquiries "
    "errors everyone faq feedback ftp help helpdesk hostmaster hr info information inquiries jobs list listadmin "
    "listmaster listproc lists listserv mail mailer mailerdaemon mailinglist mailman majordomo marketing media "
    "members moderator moderators news newsletter newsletters noaddress nobody noreply notification notifications "
    "notify office orders owner postmaster press privacy promotions pubs receptionist recipients registration reply "
    "request returns root sales security server service services staff subscribe subscribers subscription "
    "subscriptions support survey sysadmin system team tech techsupport test undisclosedrecipients unsubscribe update "
    "updates user users webmaster webteam welcome www"
)
LIST_TOKENS = _words(
    "admin administrator announce announcement announcements bounce bounces daemon digest discuss list lists listserv "
    "mailer majordomo newsletter newsletters noreply notification notifications owner request sentto subscribe "
    "subscribers unsubscribe users"
)
NAME_ROLES = _words(
    "account accounts admin administration administrator alert alerts and announce announcement announcements "
    "anonymous associates at behalf boards by client clients committee company computing conference contact corp "
    "corporation council customer customers daemon department dept desk digest discussion dispatch distribution "
    "division editor editors email energy financial for forum from gazette group groups help helpdesk inc info "
    "information institute international investor journal list lists llc ltd magazine mail mailer mailing mailman "
    "manager members moderator network networks news newsletter newsletters no noreply notification notifications of "
    "office on online operator owner postmaster press program project recipient recipients registration reply request "
    "research root sales security server service services site software solutions staff store subscription subsystem "
    "support system systems team tech technical technician the trading undisclosed university unknown update updates "
    "user users via webmaster weekly wrote www your"
)
NOT_A_FIRST_WORD = _words(
    "attn author bcc by call cc contact copyright dear e-mail email fax forwarded from fw fwd hello hi mail "
    "maintainer message original phone please posted re regards reply sender sent signed sincerely subject tel thanks "
    "to write yours"
)
TITLES = _words("dr mr mrs ms miss prof sir")
SUFFIXES = _words("cfa cpa esq ii iii iv jd jr mba md phd ph.d p.e pe sr")
PARTICLES = _words("al bin da de del della den der di do dos du el la le los mac san st ten ter van vande von")

# matches O'Shea-Lindqvist, Jr., J. and J.R., but not news.com or the possessive Roe's
NAME_WORD = re.compile(r"(?:[^\W\d_]\.){1,3}|[^\W\d_]+(?:['’-](?!s$)[^\W\d_]+)*\.?")
BRACKETED = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|(?<=\s)(['\"])\w+\1(?=\s)")
ANGLED = re.compile(r"<[^<>]*>?")

# Reasons for dropping an occurrence, under which they are counted and printed.
NO_NAME = "address without a name"
IS_ADDRESS = "name is an address"
X500 = "X.500 name alone"
DIGITS = "digits in the name"
WORD_COUNT = "name not of two or three words"
NOT_NAME = "not a person's name"
ROLE_NAME = "role or list name"
ROLE_ADDRESS = "role or list address"
BAD_ADDRESS = "malformed or encapsulated address"


@lru_cache(REMEMBERED)
def address_problem(address: str) -> str | None:
    """Why `address` does not count as a person's (one of the reasons above), or None."""
    match = ADDRESS.fullmatch(address)
    if match is None or ".." in address:
        return BAD_ADDRESS
    local = match.group(1).lower()
    if local.startswith(("imceanotes", "imceaex", "imceainvalid")) or "/" in local or "%" in local:
        return BAD_ADDRESS
    if "=" in local or re.sub(r"[^a-z]", "", local) in ROLES:
        return ROLE_ADDRESS
    if not LIST_TOKENS.isdisjoint(re.split(r"[-_+]", local)) or local.split(".")[0] in ROLES:
        return ROLE_ADDRESS
    return None


@lru_cache(REMEMBERED)
def person(display: str, whole: bool = True) -> tuple[str, str | None]:
    """(name as `First [Middle] Last`, None), or ("", reason) if `display` is not a person's name.

    whole: `display` is exactly a name field, so 'Last, First' is reordered. Otherwise it is the end of a line of text:
    every word must be capitalised, and the part before a comma only counts if it is a surname followed by one given
    name.
    """
    if len(display) > MAX_DISPLAY:
        return "", NOT_NAME
    text = display.strip(" \t\n'\"`’‘“”,;:*-=_").lstrip(".")
    upper = text.upper()
    if "/O=" in upper or "/CN=" in upper or "/OU=" in upper:
        text = re.split(r"<|/(?:OU?|CN)=", text, maxsplit=1, flags=re.I)[0].strip(" '\",")
        if not text:
            return "", X500
    text = ANGLED.sub(" ", text)
    while (outside := BRACKETED.sub(" ", text)) != text:  # brackets nest
        text = outside
    text = text.strip(" '\",;")
    if "@" in text or "/" in text:  # accept 'Jane Roe/HOU/ECT@ECT' (Lotus Notes), but not 'jane.roe@x.example'
        text = re.split(r"[/@]", text, maxsplit=1)[0].strip()
        if " " not in text:
            return "", IS_ADDRESS
    if not text:
        return "", NO_NAME
    parts = [part.strip() for part in text.split(",")]
    parts = [part for part in parts if part and part.lower().strip(".") not in SUFFIXES]
    words = _in_order(parts, whole) if len(parts) > 1 else " ".join(parts).split()
    if words and words[0].lower().strip(".") in TITLES:
        words = words[1:]
    if len(words) > 2 and words[-1].lower().strip(".") in SUFFIXES:
        words = words[:-1]
    if words and len(words[-1]) > 3:
        words[-1] = words[-1].rstrip(".")  # the end of a sentence
    if any(character.isdigit() for word in words for character in word):
        return "", DIGITS
    if not 2 <= len(words) <= 3:
        return "", WORD_COUNT
    if not NAME_ROLES.isdisjoint(word.lower().strip(".") for word in words):
        return "", ROLE_NAME
    if not all(NAME_WORD.fullmatch(word) for word in words) or len(words[-1].strip(".")) < 2:
        return "", NOT_NAME
    if not whole and not _capitalised(words):
        return "", NOT_NAME
    return " ".join(words), None


def _in_order(parts: list[str], whole: bool) -> list[str]:
    """The words of 'Last, First' as First Last; of other comma lists, all parts in a name field, the last in text."""
    surname, given = parts[-2].split(), parts[-1].split()
    is_surname = len(surname) == 1 or (len(surname) == 2 and surname[0].lower() in PARTICLES)
    is_surname = is_surname and all(NAME_WORD.fullmatch(word) for word in surname) and len(parts) == 2
    initial = len(given) == 2 and len(given[1].strip(".")) == 1
    if is_surname and (whole or ((len(given) == 1 or initial) and surname[-1][0].isupper())):
        return given + surname
    return " ".join(parts).split() if whole else given


def _capitalised(words: list[str]) -> bool:
    if words[0].lower().strip(".") in NOT_A_FIRST_WORD:
        return False
    return all(word[0].isupper() or word.lower() in PARTICLES for word in words) and words[-1][0].isupper()


# a piece of an address header (RFC 5322); nested comments are handled by `comment_ends`
PIECE = re.compile(
    r'(?P<text>[^"\\(<\[,;:=]+)|(?P<separator>[,;:])|<(?P<closed>[^<>]*)>|<(?P<open>[^<>,;]*)'
    rf'|"(?P<quoted>(?:[^"\\]|\\.)*+)"|\[(?P<square>[^][<>,;]*@[^][<>,;]*)|(?P<word>{ENCODED_WORD})'
    r"|\\(?P<escaped>.)|(?P<other>.)",
    re.S,
)
KINDS = {"closed": "address", "open": "address", "square": "address", "word": "text", "other": "text"}
BRACKET_OR_ESCAPE = re.compile(r"\\.|[()]", re.S)
ESCAPE = re.compile(r"\\(.)", re.S)
BEFORE_ADDRESS = re.compile(r"\A\s*(?:(?:mailto|smtp):|@[^:]*:)", re.I)  # a scheme, or the route of RFC 822
QUOTED_LOCAL = re.compile(r'\A\s*"([\w.+-]+)"(?=@)')
ON_BEHALF = re.compile(r"\A\s*on\s+behalf\s+of\s+", re.I)


def comment_ends(value: str) -> dict[int, int]:
    """{position of an opening parenthesis: position of its closing one}, ignoring unclosed ones."""
    ends, opened = {}, []
    for match in BRACKET_OR_ESCAPE.finditer(value):
        if match.group() == "(":
            opened.append(match.start())
        elif match.group() == ")" and opened:
            ends[opened.pop()] = match.start()
    return ends


def header_items(value: str) -> Iterator[tuple[list[tuple[str, str]], str]]:
    """(pieces, following separator or "") of each item between the commas, semicolons and colons of an address header.
    A piece is (kind, text): 'comment', 'quoted' and 'escaped' without their marks, 'address' (the content of angle or
    square brackets), 'text'."""
    ends, pieces, position = comment_ends(value), [], 0
    while position < len(value):
        if position in ends:
            pieces.append(("comment", value[position + 1 : ends[position]]))
            position = ends[position] + 1
            continue
        match = PIECE.match(value, position)
        kind, position = match.lastgroup, match.end()
        if kind == "separator":
            yield pieces, match.group()
            pieces = []
        else:
            pieces.append((KINDS.get(kind, kind), match.group(kind)))
    yield pieces, ""


def clean_address(text: str) -> str:
    """The text in the position of an address, without a leading scheme or route, needless quotes and comments."""
    ends, kept, position = comment_ends(text), [], 0
    for start in sorted(ends):
        if start >= position:
            kept.append(text[position:start])
            position = ends[start] + 1
    text = BEFORE_ADDRESS.sub("", "".join(kept) + text[position:])
    return QUOTED_LOCAL.sub(r"\1", text).strip(" '\"")


def clean_name(pieces: list[tuple[str, str]]) -> str:
    """The decoded display name in some pieces. The JR of `Jane "JR" Roe` keeps its quotes, for `person` to drop."""
    filled = [index for index, (kind, text) in enumerate(pieces) if kind != "comment" and text.strip()]
    words = []
    for index, (kind, text) in enumerate(pieces):
        if kind == "quoted":
            text = ESCAPE.sub(r"\1", text)
            if filled and filled[0] < index < filled[-1] and " " not in text:
                text = f'"{text}"'
        words.append(" " if kind == "comment" else text)
    name = " ".join(decode_words("".join(words)).split())
    return ON_BEHALF.sub("", name.strip("'\" "))


def item_mailboxes(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, address) of the mailboxes in an item of `header_items`: usually one, but several if a comma is missing or
    words join them, as in `NAME <ADDRESS> on behalf of NAME <ADDRESS>`. A comment is the name if there is no other."""

    def comment() -> str:
        return next((clean_name([("quoted", text)]) for kind, text in before if kind == "comment"), "")

    named, before = [], []
    for kind, text in pieces:
        if kind != "address":
            before.append((kind, text))
        elif address := clean_address(text):
            name = clean_name(before)
            if name or not named or named[-1][1].lower() != address.lower():  # skip the copy in `<a<mailto:a>>`
                named.append((name or comment(), address))
            before = []
    if named:
        name, address = named[-1]
        return [*named[:-1], (name or comment(), address)]
    if any(kind == "address" for kind, _ in pieces):  # empty brackets: the text around them is not an address
        return []
    marks = {"quoted": '"{}"', "escaped": "\\{}", "comment": "", "text": "{}"}
    address = clean_address("".join(marks[kind].format(text) for kind, text in before))
    if "@" not in address:
        return []
    at = next(index for index, (_, text) in enumerate(before) if "@" in text)
    before = before[at:] + before[:at]  # prefer a comment after the address
    return [(comment(), address)]


def mailboxes(value: str) -> list[tuple[str, str]]:
    """(decoded display name or "", address) of every mailbox in an unfolded From, To or Cc header, including those in
    groups.

    The text in the position of an address is returned unchecked (see `address_problem`).
    """
    found, carried = [], ""
    for pieces, separator in header_items(value):
        group = separator == ":" and not any("@" in text for kind, text in pieces if kind in ("text", "address"))
        named = [] if group or not pieces else item_mailboxes(pieces)
        if named and carried and any(kind == "address" for kind, _ in pieces):
            named[0] = ((carried + named[0][0]).strip(", "), named[0][1])
        found += named
        if named or separator != ",":
            carried = ""
        elif name := clean_name(pieces):  # e.g. the 'Roe' of an unquoted 'Roe, Jane <…>'
            carried = f"{carried}{name}, "[-2 * MAX_DISPLAY :]
    return found


def names_apart(value: str, n: int) -> list[str]:
    """The n names of an Enron X-From, X-To or X-cc header, or [] if it does not have exactly n."""
    if n == 1:
        return [value]
    names = value.split(",")
    if "<" in value:
        names = [part.partition("<")[0] for part in value.split(">") if "<" in part]
    return [name.strip(" ,") for name in names] if len(names) == n else []


# a copy of an address right after it, as in `[a@x.example<mailto:a@x.example>]`
COPY = re.compile(
    rf"(?:\s+[>|\s]*)?[<\[]\s?(?:mailto:|smtp:)?({LOCAL}@{DOMAIN.pattern})(?:\?[^<>\s]*)?\s?[>\]]", re.A | re.I
)
ENDS_IN_ADDRESS = re.compile(rf"(?<![\w/])({LOCAL})@{DOMAIN.pattern}[>\]]?$", re.A)
DELIMITER = re.compile(r"[;:>\]\[|()*=]|--+|\s-\s|(?:^|\s)(?:by|from|and|or|to|contact|quoting)\s", re.I)
FIELD_CHARACTERS = 120
QUOTED_NAME = re.compile(r'"([^"]*)"$')


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


def render(raw: bytes) -> tuple[str, int, list[tuple[str, str, int, int]], set[str]]:
    """(text, start of the body, header mailboxes as (display, address, position, rank), mailing-list addresses).

    Raises BrokenMail.
    """
    headers, body = _parse(raw)
    pieces, length, recipients = [], 0, []

    def add(piece: str) -> None:
        nonlocal length
        pieces.append(piece)
        length += len(piece)

    for header in RENDERED:
        if header not in headers:
            continue
        value = _header_text(headers[header])
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
            names = names_apart(decode_words(_header_text(apart)), len(people))
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
    return (
        "".join(pieces) + body,
        start,
        recipients,
        {address.lower() for address in addresses(lists)},
    )


def addresses(text: str) -> Iterator[str]:
    """Every e-mail address in a text."""
    at = text.find("@")
    while at >= 0:
        local, domain = LAST_LOCAL.search(text, max(0, at - 80), at), DOMAIN.match(text, at + 1, at + 256)
        if local and domain:
            yield text[local.start() : domain.end()]
        at = text.find("@", at + 1)


def body_addresses(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """(position of the bracket, address, position of the address) of every bracketed address from `start` on."""
    at = text.find("@", start)
    while at >= 0:
        local = OPENED_LOCAL.search(text, max(start, at - 80), at)
        domain = DOMAIN.match(text, at + 1, at + 256) if local else None
        if domain:
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
    kept, dropped = [], {}
    named = [
        (*person(display), *located) if display else ("", NO_NAME, *located) for display, *located in header_mailboxes
    ]
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


def pair_key(name: str, address: str) -> bytes:
    """A 16-byte key that ignores the case of a pair."""
    return hashlib.blake2b(f"{name.casefold()}\0{address.lower()}".encode(), digest_size=16).digest()


def choice(seed: int, occurrence: Occurrence, prompt: str, continuation: str) -> bytes:
    """Sort key for a pair's occurrences; the smallest one is kept.

    The rank, then a seeded hash of the text: a random choice that does not depend on the order of files, batches or
    workers.
    """
    material = f"{seed}\0{prompt}\0{continuation}".encode()
    return bytes([occurrence.rank]) + hashlib.blake2b(material, digest_size=15).digest()


def best_pairs(mails, seed: int) -> tuple[dict[bytes, tuple], dict[str, int], list[tuple[str, str]]]:
    """The best occurrence of every pair in many mails.

    mails: (label, bytes or an OSError) of each mail. Returns ({pair key: (choice, name, address, prompt,
    continuation)}, counts, [(name, reason)] of broken mails). Counts: 'messages', 'broken', 'named' (occurrences
    kept), 'without' (mails without any) and 'dropped: REASON'.
    """
    best, counts, broken = {}, {"messages": 0, "broken": 0, "named": 0, "without": 0}, []
    for label, raw in mails:
        counts["messages"] += 1
        try:
            if isinstance(raw, OSError):
                raise BrokenMail(raw.strerror or type(raw).__name__)
            text, people, dropped = occurrences(raw)
        except BrokenMail as error:
            counts["broken"] += 1
            broken.append((label, str(error)))
            continue
        for reason, number in dropped.items():
            counts[f"dropped: {reason}"] = counts.get(f"dropped: {reason}", 0) + number
        counts["named"] += len(people)
        counts["without"] += not people
        for occurrence in people:
            key = pair_key(occurrence.name, occurrence.address)
            held = best.get(key)
            if held is not None and held[0][0] < occurrence.rank:
                continue
            prompt, continuation = cut(text, occurrence.position)
            rank = choice(seed, occurrence, prompt, continuation)
            if held is None or rank < held[0]:
                best[key] = (rank, occurrence.name, occurrence.address, prompt, continuation)
    return best, counts, broken
