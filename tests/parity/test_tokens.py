"""`tokenize` gives open_clip's own tokens for any text."""

import random
import time

import numpy as np
import pytest
from tests.conftest import Lazily

from clip_tokens import MERGES, RefusedText, Tokenizer
from clip_tools.accuracy.texts import texts
from clip_tools.export.export_text import merges_text
from clip_tools.oracle import OtherTokenizer, load_tokenizer

open_clip = Lazily("open_clip")

COUNT = 10_000
SCRIPTS = [
    *((0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F)),
    *((0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)),
    *((0x2000, 0x206F), (0x20A0, 0x20BF), (0x2190, 0x21FF), (0xFB00, 0xFB4F), (0xFF00, 0xFFEF), (0x10FFF0, 0x10FFFF)),
    *((0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF), (0x20000, 0x2A6DF), (0, 0x1F), (0x7F, 0x9F), (0xFE00, 0xFE0F)),
]
ENTITIES = (
    "&amp;",
    "&amp;lt;b&amp;gt;",
    "&#39;",
    "&#x1F436;",
    "&nbsp;",
    "&eacute",
    "&notanentity;",
    "&#0;",
    "&#xD800;",
)
ODD = ("'s", "'T", "'re", "'ſ", "don't", "<start_of_text>", "<END_OF_TEXT>", "</w>", "  \t\n", "İ", "ß", "ﬁ", "K", "_")


@pytest.fixture(scope="module")
def theirs():
    return load_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def ours(theirs) -> Tokenizer:
    return Tokenizer(merges_text(theirs).splitlines(), 77, max_text_bytes=65536)


def some_texts(count: int) -> list[str]:
    """Captions, every script, emoji, control characters, HTML entities, mojibake, overlong texts and the empty text."""
    chance = random.Random(0)  # noqa: S311
    captions = texts()

    def script() -> str:
        first, last = chance.choice(SCRIPTS)
        return "".join(chr(chance.randint(first, last)) for _ in range(chance.randint(1, 12)))

    def mojibake() -> str:
        text = chance.choice(captions) + chance.choice("éüñ—“”…€")
        return text.encode().decode(chance.choice(("latin-1", "cp1252", "cp437")), errors="replace")

    kinds = (
        lambda: chance.choice(captions),
        script,
        mojibake,
        lambda: chance.choice(ENTITIES),
        lambda: chance.choice(ODD),
        lambda: "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(1, 40))),
        lambda: "".join(chance.choices("ab", k=chance.randint(1, 200))),
        lambda: str(chance.randint(0, 10**12)),
    )
    glue = ("", " ", "\u00a0", ", ")
    made = [chance.choice(glue).join(chance.choice(kinds)() for _ in range(chance.randint(1, 6))) for _ in range(count)]
    return [*captions, *made[: count - len(captions)]]


def test_ten_thousand_texts_have_open_clips_tokens(ours, theirs):
    made = some_texts(COUNT)
    assert len(made) == COUNT
    got = np.stack([ours.tokens(text.encode()) for text in made])
    expected = theirs(made).numpy()
    wrong = np.flatnonzero((got != expected).any(axis=1))
    assert not len(wrong), (
        f"{len(wrong)} of {COUNT}, the first {made[wrong[0]]!r}: {got[wrong[0]]}, {expected[wrong[0]]}"
    )
    assert got.dtype == np.int64
    assert (got[:, -1] == 49407).any()  # some texts are cut


def test_the_longest_text_is_cut_and_tokenized_within_seconds(ours, theirs):
    """open_clip's own tokenizer takes minutes for such a word."""
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=65536))  # noqa: S311
    started = time.process_time()
    assert ours.tokens(word.encode())[-1] == 49407
    assert time.process_time() - started < 5  # 0.4 s on one core
    short = word[:1500]
    assert np.array_equal(ours.tokens(short.encode()), theirs([short]).numpy()[0])


@pytest.mark.parametrize(
    ("text", "code"), [(b"a" * 65537, "too_large"), (b"caf\xe9", "not_text"), (b"\xed\xa0\x80", "not_text")]
)
def test_a_text_that_is_too_long_or_not_utf_8_is_refused(ours, text, code):
    with pytest.raises(RefusedText) as caught:
        ours.tokens(text)
    assert caught.value.code == code


def test_a_list_of_merges_of_another_length_is_refused():
    with pytest.raises(ValueError, match=f"expected {MERGES} merges"):
        Tokenizer(["a b"], 77, max_text_bytes=9)


def test_a_model_with_another_tokenizer_is_refused_without_a_download():
    for model in ("ViT-B-16-SigLIP2-256", "roberta-ViT-B-32", "ViT-H-14-CLIPA"):
        with pytest.raises(OtherTokenizer, match=r"tokenizer.*export the image tower alone with --image"):
            load_tokenizer(model)
