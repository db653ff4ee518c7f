"""The rotation or mirroring for each EXIF orientation, as in `PIL.ImageOps.exif_transpose`."""

import warnings
from dataclasses import dataclass

from PIL import ExifTags, Image


@dataclass(frozen=True)
class Turn:
    """One of the seven orientations: Pillow's name, whether columns and rows are mirrored, and whether sides swap."""

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
    """The turn that the image's EXIF (or XMP) asks for; None if it asks for none or cannot be read.

    Some formats tell only after the image is loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # broken EXIF is no reason to refuse the image
        return None
