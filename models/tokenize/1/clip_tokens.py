"""Turns one text into exactly the tokens of open_clip's byte-pair tokenizer, without PyTorch."""

import heapq
import html
from collections.abc import Iterable
from functools import lru_cache

import ftfy
import numpy as np
import regex

_SPECIAL = ("<start_of_text>", "<end_of_text>")
_WORDS = regex.compile(
    "|".join((*_SPECIAL, r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")), regex.IGNORECASE
)
_WORD_END = "</w>"
# The part of OpenAI's list that open_clip uses. The vocabulary: 256 bytes, the same at a word's end, these, _SPECIAL.
MERGES = 48894
# This cache should hold nearly all words of a photo library's captions (not measured). Long words are not cached.
_KEPT_WORDS, _LONGEST_KEPT = 1 << 16, 64


class RefusedText(Exception):
    """This text cannot be embedded: `code` is for programs, `reason` for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


class Tokenizer:
    """`merges` are lines `first second`, by priority. Raises ValueError unless there are MERGES of them."""

    def __init__(self, merges: Iterable[str], context_length: int, *, max_text_bytes: int) -> None:
        pairs = [tuple(line.split()) for line in merges]
        if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"expected {MERGES} merges of two parts each, got {len(pairs)}")
        self._context_length, self._max_text_bytes = context_length, max_text_bytes
        self._letter = _letters()
        alphabet = list(self._letter.values())
        names = [*alphabet, *(letter + _WORD_END for letter in alphabet), *map("".join, pairs), *_SPECIAL]
        self._id = {name: number for number, name in enumerate(names)}  # the later of two equal names wins
        self._rank = {pair: rank for rank, pair in enumerate(pairs)}
        self._start, self._end = (self._id[name] for name in _SPECIAL)
        self._known_word = lru_cache(_KEPT_WORDS)(self._word)

    def tokens(self, text_bytes: bytes) -> np.ndarray:
        """The text as (context,) int64: start, as many of its tokens as fit, end, then zeros. Raises RefusedText."""
        if len(text_bytes) > self._max_text_bytes:
            raise RefusedText("too_large", f"{len(text_bytes)} bytes; at most {self._max_text_bytes} are accepted")
        try:
            text = text_bytes.decode()
        except UnicodeDecodeError as error:
            raise RefusedText("not_text", f"not UTF-8: {error.reason} at byte {error.start}") from error
        room = self._context_length - 2
        found: list[int] = []
        for word in _WORDS.finditer(_cleaned(text)):
            one = word[0]
            found += self._known_word(one) if len(one) <= _LONGEST_KEPT else self._word(one)
            if len(found) >= room:
                break
        row = np.zeros(self._context_length, np.int64)
        kept = [self._start, *found[:room], self._end]
        row[: len(kept)] = kept
        return row

    def _word(self, word: str) -> tuple[int, ...]:
        """The tokens of one word: merges the pair of the lowest rank everywhere, from the left, until none is left."""
        if word in _SPECIAL:
            return (self._id[word],)
        parts: list[str | None] = [self._letter[byte] for byte in word.encode()]
        parts[-1] += _WORD_END
        count = len(parts)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        waiting = [
            (self._rank[pair], at) for at in range(count - 1) if (pair := (parts[at], parts[at + 1])) in self._rank
        ]
        heapq.heapify(waiting)
        while waiting:
            rank = waiting[0][0]
            made = []  # positions merged in this pass; new pairs wait for the next, as their rank may be lower
            while waiting and waiting[0][0] == rank:
                _, at = heapq.heappop(waiting)
                if parts[at] is None or after[at] >= count:
                    continue
                second = after[at]
                if self._rank.get((parts[at], parts[second])) != rank:
                    continue
                parts[at] += parts[second]
                parts[second] = None
                after[at] = after[second]
                if after[at] < count:
                    before[after[at]] = at
                made.append(at)
            for at in made:
                for left, right in ((before[at], at), (at, after[at])):
                    if (
                        left >= 0
                        and right < count
                        and (next_rank := self._rank.get((parts[left], parts[right]))) is not None
                    ):
                        heapq.heappush(waiting, (next_rank, left))
        return tuple(self._id[part] for part in parts if part is not None)


def _letters() -> dict[int, str]:
    """A printable letter for each byte, in the vocabulary's order: the byte's own if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def _cleaned(text: str) -> str:
    """The text as open_clip cleans it: mojibake fixed, HTML entities resolved twice, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
