"""Common edits of photographs, which produce near-duplicates; each returns the bytes of a JPEG."""

from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def _jpeg(image: "Image", quality: int = 92) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _scaled(image: "Image", share: float) -> "Image":
    return image.resize((max(1, round(image.width * share)), max(1, round(image.height * share))))


def _cropped(image: "Image", share: float) -> "Image":
    """The centre of the image, with this share of each side's length."""
    across, down = (round(side * (1 - share) / 2) for side in image.size)
    return image.crop((across, down, image.width - across, image.height - down))


def edits() -> dict[str, "Callable[[Image], bytes]"]:
    """The edits of an RGB image, by their names in docs/search.md."""
    from PIL import ImageEnhance, ImageOps

    return {
        "JPEG, quality 75": lambda image: _jpeg(image, 75),
        "JPEG, quality 30": lambda image: _jpeg(image, 30),
        "half the size": lambda image: _jpeg(_scaled(image, 0.5)),
        "a quarter of the size": lambda image: _jpeg(_scaled(image, 0.25)),
        "cropped to 95%": lambda image: _jpeg(_cropped(image, 0.95)),
        "cropped to 90%": lambda image: _jpeg(_cropped(image, 0.9)),
        "cropped to 75%": lambda image: _jpeg(_cropped(image, 0.75)),
        "brighter by 20%": lambda image: _jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
        "half the colour": lambda image: _jpeg(ImageEnhance.Color(image).enhance(0.5)),
        "gray": lambda image: _jpeg(ImageOps.grayscale(image)),
        "mirrored": lambda image: _jpeg(ImageOps.mirror(image)),
    }
