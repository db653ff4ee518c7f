"""How a photograph is to be turned, as its EXIF says: what `PIL.ImageOps.exif_transpose` does, by its number."""

import warnings
from dataclasses import dataclass

from PIL import ExifTags, Image


@dataclass(frozen=True)
class Turn:
    """One of the seven ways: Pillow's name for it, whether columns and rows are mirrored, and whether sides change."""

    method: Image.Transpose
    mirrors: tuple[bool, bool]
    is_sideways: bool


TURNS = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, (True, False), False),
    3: Turn(Image.Transpose.ROTATE_180, (True, True), False),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, (False, True), False),
    5: Turn(Image.Transpose.TRANSPOSE, (False, False), True),
    6: Turn(Image.Transpose.ROTATE_270, (False, True), True),
    7: Turn(Image.Transpose.TRANSVERSE, (True, True), True),
    8: Turn(Image.Transpose.ROTATE_90, (True, False), True),
}


def turn_of(image: Image.Image) -> Turn | None:
    """What the EXIF (or XMP) of this image asks for; None: nothing, or nothing that can be read.

    Some formats tell only once the image is loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # whatever is wrong with the EXIF, the pixels are there
        return None
