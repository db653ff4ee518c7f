"""Escapes any file name as printable text, and back."""

import re

# Control characters and those that change the text's direction, which a terminal obeys; bytes that are not UTF-8, which
# Python represents as lone surrogates; and backslashes that would read as an escape.
_ESCAPED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\\(?=u[0-9a-f]{4})")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


def printable(text: str) -> str:
    """The text as one line that every terminal, JSON reader and database accepts. Most names do not change.

    Other characters become `\\u` and four hexadecimal digits: a newline `\\u000a`, a byte 0xE9 that is not UTF-8
    `\\udce9`. `original` reverses it.
    """
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def original(name: str) -> str:
    """The path with this `printable` form."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), name)
