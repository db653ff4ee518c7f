"""Pillow's bicubic resize and a crop in one step, to the same bytes, by the library of clip_resample.c."""

import ctypes
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, __version__

from clip_orientation import Turn

SOURCE = Path(__file__).resolve().with_name("clip_resample.c")
# PORTABLE and AVX2 of clip_resample.c.
FORMS = (0, 1)

# By image mode: bytes a pixel in Pillow's memory, and how many of them are kept.
_BYTES = {
    "L": (1, 1),
    "RGB": (4, 3),
    "YCbCr": (4, 3),
    "CMYK": (4, 4),
    "RGBX": (4, 4),
    "RGBA": (4, 4),
    "LA": (4, 4),
}
# Pillow multiplies the colours of these by alpha before it resizes them.
_PREMULTIPLIED = {"RGBA": "RGBa", "LA": "La"}
# Pillow exports only an image in a single block of memory, which has at most this size.
_LARGEST_BLOCK_BYTES = (1 << 31) - 4096
# Freed blocks up to this size are reused. A fresh one for 12 megapixels costs 20 ms of page faults, of 80 ms in all.
_KEPT_BLOCK_BYTES = 64 << 20
# Sides of resized images are 32-bit numbers, here and in Pillow.
_MAX_RESIZED_SIDE_PX = (1 << 31) - 1

_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_NO_MEMORY = 2  # clip_resample.c

Box = tuple[float, float, float, float]


class Axis(NamedTuple):
    """The windows of an axis: window i is `taps[i]` pixels from `first[i]` on, with 22-bit coefficients `whole[i]`."""

    first: np.ndarray
    taps: np.ndarray
    whole: np.ndarray


class NoKernel(RuntimeError):
    """The library cannot be used; the message says why, in one line."""


class KernelError(RuntimeError):
    """The library rejected its arguments: a mistake in this program, not in the image."""


def library() -> Path:
    """The path of the library built from this source; its name contains the source's digest."""
    return SOURCE.with_name(f"clip_resample.{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so")


@cache
def kernel() -> "Kernel":
    """The kernel built from this source. Raises NoKernel."""
    path = library()
    if not path.is_file():
        raise NoKernel(f"{path.name} was not built; `make setup` builds it")
    return Kernel(path)


class Kernel:
    """The library at `path`, in its best form for this processor unless `form` names one. Raises NoKernel."""

    def __init__(self, path: Path, form: int | None = None) -> None:
        if not hasattr(Image.Image, "__arrow_c_array__"):
            raise NoKernel(f"Pillow {__version__} does not lend its pixels; 11.3 or later does")
        try:
            loaded = ctypes.CDLL(str(path))
            self._crop, self._axis = loaded.clip_resample, loaded.clip_resample_axis
            best_form = loaded.clip_resample_best_form()
        except (OSError, AttributeError) as error:
            raise NoKernel(f"{path.name} cannot be loaded ({error}); remove it and run `make setup`") from error
        number, pointer, size = ctypes.c_int32, ctypes.c_void_p, ctypes.c_float
        image, resized, crop = [pointer, *[number] * 3, size, size], [number] * 2, [number] * 4
        self._crop.argtypes = [*image, *resized, *crop, number, pointer, ctypes.c_int64, number]
        self._axis.argtypes = [*[number] * 6, *[pointer] * 3]
        self.form = best_form if form is None else form
        self._compare_with_pillow()

    def _compare_with_pillow(self) -> None:
        """Raises NoKernel if this Pillow resizes differently. Tries both orders of the passes, smaller and larger."""
        noise = np.random.default_rng(0)
        for width, height, resized in ((90, 40, (36, 16)), (40, 300, (16, 120)), (9, 6, (24, 16)), (3, 20, (16, 106))):
            pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            left, top = (resized[0] - 16) // 2, (resized[1] - 16) // 2
            expected = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 16, top + 16))
            if not np.array_equal(self.crop(image, resized, (left, top), 16), np.asarray(expected)):
                raise NoKernel(f"it resizes as Pillow 13.0 does, but this Pillow {__version__} resizes differently")

    @staticmethod
    @contextmanager
    def lends_images() -> Iterator[None]:
        """A context in which Pillow (process-wide) decodes each image into one block of memory, as `crop` needs."""
        Image.core.set_blocks_max(1)
        Image.core.set_block_size(_LARGEST_BLOCK_BYTES)
        try:
            yield
        finally:
            Image.core.set_block_size(_KEPT_BLOCK_BYTES)  # a larger block shrinks to this when it is freed

    @staticmethod
    def takes(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> bool:
        """Whether it can resize this image, decoded or not: its mode, its size, and that it must be resized at all."""
        width, height = image.size
        pixel_bytes, _ = _BYTES.get(image.mode, (0, 0))
        is_lent = 0 < width * height * pixel_bytes <= _LARGEST_BLOCK_BYTES
        is_resized = (image.size, box or (0, 0, width, height)) != (size, (0, 0, *size))
        return is_lent and is_resized and max(size) <= _MAX_RESIZED_SIDE_PX

    def axis(self, length: int, resized: int, kept: int, count: int, is_mirrored: bool) -> Axis:
        """The windows of the pixels kept..kept + count of an axis that is resized from `length` to `resized`.

        For a mirrored axis the pixels count from its far end, and the windows are in memory order.
        """
        stride = -(-(math.ceil(2 * max(1, length / resized)) * 2 + 1) // 16) * 16
        axis = Axis(np.empty(count, np.int32), np.empty(count, np.int32), np.empty((count, stride), np.int32))
        pointers = (table.ctypes.data for table in (axis.first, axis.taps, axis.whole))
        if state := self._axis(length, resized, kept, count, is_mirrored, stride, *pointers):
            if state == _NO_MEMORY:
                raise MemoryError
            raise KernelError(f"pixels {kept} to {kept + count} of {length} px resized to {resized}")
        return axis

    def crop(
        self,
        image: Image.Image,
        size: tuple[int, int],
        offset: tuple[int, int],
        side_px: int,
        box: Box | None = None,
        turn: Turn | None = None,
    ) -> np.ndarray:
        """`image.resize(size, BICUBIC, box)`, cropped to side_px from `offset` on: (side_px, side_px, 3) uint8 RGB.

        With a `turn`, the result is that of the turned image, but no pixel is moved: `size` and `offset` are along the
        axes of the image before the turn, and `offset` counts from the corner of the turned image.

        Raises KernelError for an image that it does not take (`takes`) or that was decoded outside `lends_images`, for
        a crop outside the image, and for a box that does not begin at (0, 0).
        """
        box = box or (0, 0, *image.size)
        if not self.takes(image, size, box) or box[:2] != (0, 0):
            raise KernelError(f"{image.mode} {image.size}, box {box}, to {size}: only Pillow can do that")
        mode, (pixel_bytes, kept_bytes) = image.mode, _BYTES[image.mode]
        if mode in _PREMULTIPLIED:
            with self.lends_images():
                image = image.convert(_PREMULTIPLIED[mode])
            mode = "RGBa"  # Pillow stores La as its one colour three times, and alpha
        try:
            _, lent = image.__arrow_c_array__()
        except ValueError as error:
            raise KernelError(f"{mode} {image.size}: {error}") from error
        kept = np.empty((side_px, side_px, kept_bytes), np.uint8)
        source = (_pointer_of(lent, b"arrow_array"), *image.size, pixel_bytes, *box[2:])
        flags = turn.mirrors[0] + 2 * turn.mirrors[1] + 4 * turn.is_sideways if turn else 0
        target = (flags, kept_bytes, kept.ctypes.data, kept.nbytes)
        if state := self._crop(*source, *size, *offset, side_px, *target, self.form):
            if state == _NO_MEMORY:
                raise MemoryError
            raise KernelError(f"{mode} {image.size}, box {box}, to {size}, of which {side_px} px from {offset} on")
        if mode == "RGB" and not turn:
            return kept
        made = Image.frombuffer(mode, (side_px, side_px), kept, "raw", mode, 0, 1).convert("RGB")
        return np.asarray(made.transpose(turn.method) if turn else made)
