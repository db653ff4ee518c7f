"""One encoded image -> the very pixels that open_clip's inference transform feeds to its model."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, UnidentifiedImageError

from clip_bounds import (
    MAX_ICON_PIXELS,
    MAX_RLE_BITMAP_PIXELS,
    CountedReads,
    RefusedImage,
    check_depth,
    check_structure,
    code_of,
    format_of,
)

SIDE_PX = 224


@dataclass(frozen=True)
class Limits:
    """What one image may be. Over it, the image is refused before its pixels are decoded."""

    max_image_bytes: int
    max_image_pixels: int
    max_jpeg_scans: int
    formats: tuple[str, ...]
    deep_gray: str = "refuse"

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> "Limits":
        """As the parameters of `config.pbtxt` say. Raises ValueError for one that says nothing."""
        if parameters["deep_gray"] not in ("refuse", "clip"):
            raise ValueError(f"parameter deep_gray is {parameters['deep_gray']}, not refuse or clip")
        return cls(
            max_image_bytes=int(parameters["max_image_bytes"]),
            max_image_pixels=int(parameters["max_image_pixels"]),
            max_jpeg_scans=int(parameters["max_jpeg_scans"]),
            formats=tuple(parameters["formats"].split()),
            deep_gray=parameters["deep_gray"],
        )


@dataclass
class PixelBudget:
    """How many pixels the images of one request may have together, whatever each may have alone."""

    max_request_pixels: int
    taken: int = 0

    def take(self, size: tuple[int, int]) -> None:
        """For an image of this size, or of the one it is resized to; RefusedImage, and none, where too few are left."""
        pixels = max(width * height for width, height in (size, _resized_size(*size)))
        if self.taken + pixels > self.max_request_pixels:
            raise RefusedImage(
                "too_many_pixels",
                f"{size[0]} x {size[1]} px, after {self.taken} pixels of the same request; "
                f"at most {self.max_request_pixels} are accepted in one: send fewer images at a time",
            )
        self.taken += pixels


def open_pixels(parameters: Mapping[str, str], device_id: int = 0) -> Callable[[bytes], np.ndarray]:
    """`pixels_of` as the parameters of `config.pbtxt` say. Raises ValueError for a mode that cannot be had."""
    limits = Limits.of(parameters)
    match parameters["mode"]:
        case "exact":
            return partial(pixels_of, limits=limits)
        case "fast":
            return partial(pixels_of, limits=limits, fast=True)
        case "nvimgcodec":
            from clip_gpu_decode import open_decoder

            return partial(pixels_of, limits=limits, decode=open_decoder(device_id))
    raise ValueError(f"parameter mode is {parameters['mode']}, not exact, fast or nvimgcodec")


def pixels_of(
    image_bytes: bytes,
    limits: Limits,
    *,
    fast: bool = False,
    decode: Callable[[bytes], np.ndarray | None] | None = None,
    budget: PixelBudget | None = None,
) -> np.ndarray:
    """The image as (224, 224, 3) uint8, RGB, height x width x channel, 0..255.

    The order is open_clip's (`open_clip/transform.py`): resize the shortest side to 224 bicubic, crop the
    centre, convert to RGB, in the file's own colour mode until then. No EXIF rotation; the first frame of an
    animation. Raises RefusedImage.

    `fast` decodes a JPEG at 1/2, 1/4 or 1/8 of its size inside the DCT, but never below twice the target, and resizes
    from there: other bytes, of 121 photographs at most 12 of 255 away. What that costs, `clip-tools verify --engine
    fast` says of your own weights.

    `decode` is asked first for the (height, width, 3) uint8 RGB of an RGB JPEG; what it gives None for, Pillow decodes
    or refuses. `budget` is what the image's request has left.
    """
    image = _opened(image_bytes, limits)
    if budget:
        budget.take(image.size)
    try:
        with warnings.catch_warnings():  # what Pillow has to say about odd palettes and metadata
            warnings.simplefilter("ignore")
            if (
                decode
                and (image.format, image.mode) == ("JPEG", "RGB")
                and (decoded := decode(image_bytes)) is not None
            ):
                image = Image.fromarray(decoded)
            full_size = image.size
            # The box is the whole image in the scaled one's coordinates, where its last pixel may be a part.
            _, box = (fast and image.draft(None, (2 * SIDE_PX, 2 * SIDE_PX))) or (None, None)
            image.load()
            check_depth(image.mode, limits.deep_gray)
            size = _resized_size(*(full_size if box else image.size))
            _check_pixels(image.size, limits)  # loading an icon may show another size
            left, top = _crop_offset(size[0]), _crop_offset(size[1])
            resized = image.resize(size, Image.Resampling.BICUBIC, box)
            cropped = resized.crop((left, top, left + SIDE_PX, top + SIDE_PX))
            return np.asarray(cropped.convert("RGB"))
    except RefusedImage:
        raise
    except MemoryError:
        raise  # the server's trouble, not the image's
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise RefusedImage(
            code_of(error), f"{image.format} data cannot be decoded: {error or type(error).__name__}"
        ) from error


def _opened(image_bytes: bytes, limits: Limits) -> Image.Image:
    """The image with its header read, within the limits, and no pixel decoded yet."""
    size_bytes = len(image_bytes)
    if size_bytes == 0:
        raise RefusedImage("empty", "0 bytes came")
    if size_bytes > limits.max_image_bytes:
        raise RefusedImage("too_large", f"{size_bytes} bytes; at most {limits.max_image_bytes} are accepted")
    is_icon = image_bytes.startswith(b"\0\0\1\0")
    max_pixels = min(limits.max_image_pixels, MAX_ICON_PIXELS) if is_icon else limits.max_image_pixels
    # Pillow raises above twice this figure, also for an image inside an image (ICO holds PNGs).
    Image.MAX_IMAGE_PIXELS = max(1, max_pixels // 2)
    check_structure(image_bytes, max_jpeg_scans=limits.max_jpeg_scans, max_image_pixels=limits.max_image_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(CountedReads(image_bytes), formats=limits.formats)
    except RefusedImage:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedImage("too_many_pixels", f"over {max_pixels} pixels by its header") from error
    except UnidentifiedImageError as error:
        raise _unidentified(image_bytes, limits) from error
    except MemoryError:
        raise
    except Exception as error:
        reason = f"the header cannot be read: {error or type(error).__name__}"
        raise RefusedImage(code_of(error), reason) from error
    _check_pixels(image.size, limits)
    if image.width * image.height > MAX_RLE_BITMAP_PIXELS and any(tile[0] == "bmp_rle" for tile in image.tile):
        raise RefusedImage("too_complex", f"over {MAX_RLE_BITMAP_PIXELS} pixels of RLE bitmap; save it anew, as JPEG")
    return image


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    """Raises RefusedImage for too many pixels, as they are or resized: 65500 x 1 would become 14672000 x 224."""
    for what, (width, height) in (("", size), (" when resized", _resized_size(*size))):
        if width * height > limits.max_image_pixels:
            raise RefusedImage(
                "too_many_pixels",
                f"{width} x {height} px{what}; at most {limits.max_image_pixels} pixels are accepted",
            )


def _unidentified(image_bytes: bytes, limits: Limits) -> RefusedImage:
    """Why no decoder took these bytes, as well as their first few tell."""
    if name := format_of(image_bytes):
        if name in limits.formats:
            return RefusedImage("corrupt", f"it begins as {name}, but its header cannot be read")
        return RefusedImage("unsupported_format", f"{name} is not accepted; send JPEG")
    return RefusedImage("not_an_image", f"{len(image_bytes)} bytes that no decoder knows; send JPEG")


def _resized_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) with the shortest side at 224, the other rounded down, as torchvision's Resize does."""
    if width <= height:
        return SIDE_PX, int(SIDE_PX * height / width)
    return int(SIDE_PX * width / height), SIDE_PX


def _crop_offset(length: int) -> int:
    """Where the centre crop begins: torchvision's CenterCrop rounds half to even; flooring is off by one pixel."""
    return round((length - SIDE_PX) / 2)
