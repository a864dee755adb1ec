"""The fields of a review or product as they are published: texts cleaned, users told apart."""

import html
import json
import re
from functools import lru_cache

from common import dataset

WHITESPACE = " \t\n\r\v\f\u00a0\u2003\u2028\u2029\u200b\u3000\ufeff"
LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
REFERENCE = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")
# {field: (macro that reads it, its kind)}; a line is broken if such a field is neither null nor of its kind
READ_BY = {
    "title": ("text_of", "text"),
    "text": ("text_of", "text"),
    "parent_asin": ("text_of", "text"),
    "user_id": ("user_of", "text or a whole number"),
}


@lru_cache(1 << 12)
def decoded(reference: str) -> str:
    """The character of an HTML reference (cached, because few occur)."""
    return html.unescape(reference)


def clean(text: str) -> str:
    """Turn <br> into line breaks, decode complete HTML references (once), remove NULs and outer white space."""
    if "<" in text:
        text = LINE_BREAK.sub("\n", text)
    if "&" in text:
        text = REFERENCE.sub(lambda match: decoded(match[0]), text)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip(WHITESPACE)


def user_key(user_id: str) -> str | None:
    """The user of a JSON-encoded user_id (see `dataset.user_of`): "" for blank text, None if it is invalid."""
    try:
        value = json.loads(user_id)
    except ValueError:  # an integer of thousands of digits
        return None
    return dataset.user_of({"user_id": value}) or ("" if isinstance(value, str) else None)
