"""Texts on which text towers are compared: captions, and other things that people type."""

from itertools import product

_FORMS = (
    "{}",
    "a photo of a {}",
    "two {}s in the rain at night",
    "a close-up of an old {}, taken from below",
    "my favourite picture: the {} that we saw on the beach last summer, next to a red umbrella",
    "DRAWING OF A {}!!!",
    "ein Foto: {}",
    "{} {} {}",
)
_THINGS = (
    *("dog", "cat", "pagoda", "sunflower", "bicycle", "mountain lake", "kitchen", "child", "traffic light", "cake"),
    *("aeroplane", "violin", "receipt", "mushroom"),
)
_OTHERS = (
    "",
    "собака на пляже",
    "海辺の犬",
    "كلب على الشاطئ",
    "café ☕ &amp; 🐕‍🦺 schÃ¶n",
    "https://example.com/IMG_0001.JPG",
    "3.14159 + 2 = ?",
    "a very long caption of a dog " * 20,
)


def texts() -> list[str]:
    """120 different texts."""
    return [form.format(*[thing] * 3) for thing, form in product(_THINGS, _FORMS)] + list(_OTHERS)
