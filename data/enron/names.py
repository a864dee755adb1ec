"""Names and e-mail addresses: which count as a person's, and how the headers From, To and Cc write them."""

import re
from collections.abc import Iterator
from functools import lru_cache

from data.enron.mail import ENCODED_WORD, decode_words

REMEMBERED = 1 << 14  # size of the caches for names and addresses, which repeat a lot
MAX_DISPLAY = 120  # characters of a name field

LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
DOMAIN = re.compile(rf"(?:{LABEL}\.)+[A-Za-z]{{2,24}}(?![\w.-])")
LOCAL = r"[A-Za-z0-9_](?:[\w.+%=&'/-]{0,62}[\w+])?"
ADDRESS = re.compile(rf"({LOCAL})@({DOMAIN.pattern})", re.A)
LAST_LOCAL = re.compile(rf"(?<![\w.@-]){LOCAL}$", re.A)


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


def addresses(text: str) -> Iterator[str]:
    """Every e-mail address in a text."""
    at = text.find("@")
    while at >= 0:
        local, domain = LAST_LOCAL.search(text, max(0, at - 80), at), DOMAIN.match(text, at + 1, at + 256)
        if local and domain:
            yield text[local.start() : domain.end()]
        at = text.find("@", at + 1)


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

# (kind, text) of a part of a header's item: see `header_items`
Piece = tuple[str, str]


def comment_ends(value: str) -> dict[int, int]:
    """{position of an opening parenthesis: position of its closing one}, ignoring unclosed ones."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    for match in BRACKET_OR_ESCAPE.finditer(value):
        if match.group() == "(":
            opened.append(match.start())
        elif match.group() == ")" and opened:
            ends[opened.pop()] = match.start()
    return ends


def header_items(value: str) -> Iterator[tuple[list[Piece], str]]:
    """(pieces, following separator or "") of each item between the commas, semicolons and colons of an address header.
    A piece is (kind, text): 'comment', 'quoted' and 'escaped' without their marks, 'address' (the content of angle or
    square brackets), 'text'."""
    pieces: list[Piece] = []
    ends, position = comment_ends(value), 0
    while position < len(value):
        if position in ends:
            pieces.append(("comment", value[position + 1 : ends[position]]))
            position = ends[position] + 1
            continue
        match = PIECE.match(value, position)
        assert match and match.lastgroup  # its last alternative is any character
        kind, position = match.lastgroup, match.end()
        if kind == "separator":
            yield pieces, match.group()
            pieces = []
        else:
            pieces.append((KINDS.get(kind, kind), match.group(kind)))
    yield pieces, ""


def clean_address(text: str) -> str:
    """The text in the position of an address, without a leading scheme or route, needless quotes and comments."""
    ends, position = comment_ends(text), 0
    kept: list[str] = []
    for start in sorted(ends):
        if start >= position:
            kept.append(text[position:start])
            position = ends[start] + 1
    text = BEFORE_ADDRESS.sub("", "".join(kept) + text[position:])
    return QUOTED_LOCAL.sub(r"\1", text).strip(" '\"")


def clean_name(pieces: list[Piece]) -> str:
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


def item_mailboxes(pieces: list[Piece]) -> list[tuple[str, str]]:
    """(name, address) of the mailboxes in an item of `header_items`: usually one, but several if a comma is missing or
    words join them, as in `NAME <ADDRESS> on behalf of NAME <ADDRESS>`. A comment is the name if there is no other."""

    def comment() -> str:
        return next((clean_name([("quoted", text)]) for kind, text in before if kind == "comment"), "")

    named: list[tuple[str, str]] = []
    before: list[Piece] = []
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
    found: list[tuple[str, str]] = []
    carried = ""
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
