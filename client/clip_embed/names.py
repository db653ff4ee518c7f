"""Any file's name as text that can be shown and kept, and back."""

import re

# Control characters and those that turn a line's direction, which a terminal obeys; a byte that is not UTF-8, which
# Python has as a lone surrogate; and a backslash that would read as one of these.
_ESCAPED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\\(?=u[0-9a-f]{4})")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


def printable(text: str) -> str:
    """The text in one line that any terminal, JSON reader and database takes; most names are what they were.

    What they do not take becomes `\\u` and four hexadecimal digits: a newline `\\u000a`, a byte 0xE9 that is not UTF-8
    `\\udce9`. `original` gives it back.
    """
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def original(name: str) -> str:
    """The path whose `printable` form this is."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), name)
