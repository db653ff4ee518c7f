"""Reads image files with Pillow: their size in pixels, and thumbnails to embed in HTML pages."""

import base64
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

_QUALITY = 60  # WebP quality: 2 KB for 128 px, 6 KB for 256 px


@dataclass(frozen=True, slots=True)
class Preview:
    """An image's stored width and height in pixels, 0 if it is unreadable, and its thumbnail, a `data:` URL or ""."""

    width: int = 0
    height: int = 0
    thumbnail: str = ""


def require_pillow() -> Any:
    """Pillow, or ModuleNotFoundError with what to install. Registers pillow-heif, if installed, for HEIC."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("looking at images needs Pillow: pip install 'clip-embed[search]'") from error
    with suppress(ModuleNotFoundError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image


def read_previews(paths: Iterable[str], *, thumbnail_px: int | None) -> Iterator[Preview]:
    """A preview for each path in order; thumbnails are at most `thumbnail_px` and follow the EXIF orientation."""
    require_pillow()
    with ThreadPoolExecutor(4) as pool:  # Pillow decodes without the GIL
        yield from pool.map(lambda path: _read_preview(path, thumbnail_px), paths)


def _read_preview(path: str, thumbnail_px: int | None) -> Preview:
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and odd metadata
            with Image.open(path) as image:
                width, height = image.size
                if thumbnail_px is None:
                    return Preview(width, height)
                image.draft("RGB", (2 * thumbnail_px, 2 * thumbnail_px))
                upright: Any = ImageOps.exif_transpose(image)
                upright.thumbnail((thumbnail_px, thumbnail_px))
                file = BytesIO()
                upright.convert("RGB").save(file, "WEBP", quality=_QUALITY)
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return Preview()
    return Preview(width, height, f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}")
