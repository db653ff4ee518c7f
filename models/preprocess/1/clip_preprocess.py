"""Turns one encoded image into exactly the pixels that open_clip's inference transform feeds to its model."""

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from PIL import Image, UnidentifiedImageError

import clip_resample
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
from clip_fit import DEFAULT, Fit
from clip_heif import NAME as HEIF
from clip_heif import check_heif, missing_opener
from clip_orientation import Turn, turn_of

# What people send by mistake: a pattern of the first bytes after white space -> what it is and what to do.
_MISTAKES = {
    rb"data:": "a data URL; decode its base64 and send the bytes themselves",
    rb"/9j/|iVBORw0KGgo|R0lGOD|UklGR|AAAA[A-Za-z0-9+/]{2}Z0eX": "base64 text; decode it and send the bytes themselves",
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file that it stands for with `git lfs pull`",
    rb"(?i:<!doctype html|<html|<.*?<html)": "an HTML page, perhaps an error page; check what was downloaded",
    rb"(?i:<svg|<.*?<svg)": "an SVG drawing; render it and send PNG",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]|FLV\x01": "a video; send one of its frames as JPEG",
    rb"[{\[]": "JSON text; send the bytes of the image themselves",
}


@dataclass(frozen=True)
class ImageLimits:
    """The limits on one image, checked before its pixels are decoded; `fit` says how it is resized."""

    max_image_bytes: int
    max_image_pixels: int
    max_jpeg_scans: int
    formats: tuple[str, ...]
    deep_gray: str = "refuse"
    fit: Fit = DEFAULT

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> "ImageLimits":
        """The limits in the parameters of `config.pbtxt`, without HEIF if its opener is missing.

        Raises ValueError for an invalid parameter.
        """
        if parameters["deep_gray"] not in ("refuse", "clip"):
            raise ValueError(f"parameter deep_gray is {parameters['deep_gray']}, not refuse or clip")
        formats = parameters["formats"].split()
        if HEIF in formats and missing_opener():
            formats.remove(HEIF)
        return cls(
            max_image_bytes=int(parameters["max_image_bytes"]),
            max_image_pixels=int(parameters["max_image_pixels"]),
            max_jpeg_scans=int(parameters["max_jpeg_scans"]),
            formats=tuple(formats),
            deep_gray=parameters["deep_gray"],
            fit=Fit.of(parameters),
        )


@dataclass
class PixelBudget:
    """The limit on the pixels of all images of one request together."""

    max_request_pixels: int
    taken: int = 0

    def take(self, image: Image.Image, fit: Fit = DEFAULT) -> None:
        """Charge this image's pixels to the request. Raises RefusedImage, and charges nothing, if too few are left."""
        pixels = max(width * height for width, height in _sizes(image, fit).values())
        if self.taken + pixels > self.max_request_pixels:
            raise RefusedImage(
                "too_many_pixels",
                f"{image.width} x {image.height} px, after {self.taken} pixels of the same request; "
                f"at most {self.max_request_pixels} are accepted in one request: send fewer images at a time",
            )
        self.taken += pixels


@cache
def find_kernel() -> clip_resample.Kernel | None:
    """The kernel that resamples in place of Pillow, to the same bytes; None if it was not built."""
    try:
        return clip_resample.kernel()
    except clip_resample.NoKernel:
        return None


def lent_memory() -> AbstractContextManager[None]:
    """The context in which to decode images, so that the kernel can read them without a copy."""
    kernel = find_kernel()
    return kernel.lends_images() if kernel else nullcontext()


def open_pixels(parameters: Mapping[str, str]) -> Callable[..., np.ndarray]:
    """`pixels_of` with the parameters of `config.pbtxt`. Raises ValueError for a mode that is unknown or cannot run."""
    limits = ImageLimits.of(parameters)
    orientation = parameters.get("orientation", "ignore")
    if orientation not in ("ignore", "exif"):
        raise ValueError(f"parameter orientation is {orientation}, not ignore or exif")
    made = partial(pixels_of, limits=limits, upright=orientation == "exif")
    match parameters["mode"]:
        case "exact":
            return made
        case "fast":
            return partial(made, fast=True)
        case "gpu":
            from clip_gpu import open_batches

            return open_batches(parameters).pixels_of  # one image at a time; model.py uses whole batches
    raise ValueError(f"parameter mode is {parameters['mode']}, not exact, fast or gpu")


def pixels_of(
    image_bytes: bytes,
    limits: ImageLimits,
    *,
    upright: bool = False,
    fast: bool = False,
    budget: PixelBudget | None = None,
) -> np.ndarray:
    """The image as (side, side, 3) uint8, RGB, height x width x channel, 0..255; by default 224 px.

    The steps and their order are open_clip's (`open_clip/transform.py`): resize and crop as `limits.fit` says (by
    default the shortest side to 224, bicubic, then the centre), both in the file's colour mode, then convert to RGB.
    Of an animation, the first frame is used. Raises RefusedImage.

    `upright` first applies the EXIF orientation: open_clip's pixels of `PIL.ImageOps.exif_transpose(image)`. Otherwise
    it is ignored, as open_clip does.

    `fast` decodes a JPEG at 1/2, 1/4 or 1/8 of its size inside the DCT, but never below twice the target, and resizes
    from there. The pixels of 121 photographs differed by at most 12 of 255. `clip-tools verify --engine fast` measures
    the effect on your own weights.

    `budget` is the pixel budget of the image's request.
    """
    image = opened(image_bytes, limits)
    if budget:
        budget.take(image, limits.fit)
    try:
        with warnings.catch_warnings(), lent_memory():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd palettes and metadata
            full_size = image.size
            # The box is the whole image in coordinates of the scaled one, whose last pixel may be partial.
            _, box = (fast and image.draft(None, (2 * limits.fit.side_px, 2 * limits.fit.side_px))) or (None, None)
            image.load()
            check_depth(image.mode, limits.deep_gray)
            _check_pixels(image, limits)  # loading an icon may change its size
            turn = turn_of(image) if upright else None
            return centre_of(image, limits.fit.resized(*full_size) if box else None, box, turn, limits.fit)
    except RefusedImage:
        raise
    except (MemoryError, clip_resample.KernelError):
        raise  # the server's fault, not the image's
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise RefusedImage(
            code_of(error), f"{image.format} data cannot be decoded: {error or type(error).__name__}"
        ) from error


def centre_of(
    image: Image.Image,
    size: tuple[int, int] | None = None,
    box: clip_resample.Box | None = None,
    turn: Turn | None = None,
    fit: Fit = DEFAULT,
) -> np.ndarray:
    """The pixels of a decoded image, turned, resized and cropped as in `pixels_of`.

    `size` and `box` are for an image decoded at a fraction of its size, and apply before the turn.
    """
    size = size or fit.resized(*image.size)
    offset = fit.offset(size[0]), fit.offset(size[1])
    if turn is None:
        return _cropped(image, size, offset, box, fit)
    if box:  # not exact anyway, so turn the small result
        ends = tuple(length - fit.side_px - start for length, start in zip(size, offset, strict=True))
        left, top = (b if is_mirrored else a for a, b, is_mirrored in zip(offset, ends, turn.mirrors, strict=True))
        return np.asarray(Image.fromarray(_cropped(image, size, (left, top), box, fit)).transpose(turn.method))
    if fit.fits_kernel and (kernel := find_kernel()) and kernel.takes(image, size):
        return kernel.crop(image, size, offset, fit.side_px, turn=turn)
    return centre_of(image.transpose(turn.method), fit=fit)


def _cropped(
    image: Image.Image, size: tuple[int, int], offset: tuple[int, int], box: clip_resample.Box | None, fit: Fit
) -> np.ndarray:
    if fit.fits_kernel and (kernel := find_kernel()) and kernel.takes(image, size, box):
        return kernel.crop(image, size, offset, fit.side_px, box)
    left, top = offset
    resized = image.resize(size, fit.filter, box)
    if fit.resize_mode == "longest":
        return np.asarray(fit.padded(resized).convert("RGB"))
    return np.asarray(resized.crop((left, top, left + fit.side_px, top + fit.side_px)).convert("RGB"))


def opened(image_bytes: bytes, limits: ImageLimits) -> Image.Image:
    """The image with only its header read. Raises RefusedImage over a limit."""
    size_bytes = len(image_bytes)
    if size_bytes == 0:
        raise RefusedImage("empty", "0 bytes")
    if size_bytes > limits.max_image_bytes:
        raise RefusedImage("too_large", f"{size_bytes} bytes; at most {limits.max_image_bytes} are accepted")
    is_icon = image_bytes.startswith(b"\0\0\1\0")
    max_pixels = min(limits.max_image_pixels, MAX_ICON_PIXELS) if is_icon else limits.max_image_pixels
    # Pillow raises above twice this figure, also for an image inside an image (ICO contains PNGs).
    Image.MAX_IMAGE_PIXELS = max(1, max_pixels // 2)
    check_structure(image_bytes, max_jpeg_scans=limits.max_jpeg_scans, max_image_pixels=limits.max_image_pixels)
    if HEIF in limits.formats and image_bytes[4:8] == b"ftyp":
        check_heif(image_bytes, limits.max_image_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(CountedReads(image_bytes), formats=limits.formats)
    except RefusedImage:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedImage("too_many_pixels", f"over {max_pixels} pixels, according to its header") from error
    except UnidentifiedImageError as error:
        raise _unidentified(image_bytes, limits) from error
    except MemoryError:
        raise
    except Exception as error:
        reason = f"the header cannot be read: {error or type(error).__name__}"
        raise RefusedImage(code_of(error), reason) from error
    _check_pixels(image, limits)
    if image.tile and image.tile[0][0] == "jpeg":
        # Pass all data at once: if a part ends inside a row of blocks, libjpeg decodes that row again.
        image.decodermaxblock = size_bytes
    if image.width * image.height > MAX_RLE_BITMAP_PIXELS and any(tile[0] == "bmp_rle" for tile in image.tile):
        raise RefusedImage("too_complex", f"over {MAX_RLE_BITMAP_PIXELS} pixels of RLE bitmap; save it again as JPEG")
    return image


def _check_pixels(image: Image.Image, limits: ImageLimits) -> None:
    """Raises RefusedImage if the image needs more pixels in memory than the limit."""
    for what, (width, height) in _sizes(image, limits.fit).items():
        if width * height > limits.max_image_pixels:
            raise RefusedImage(
                "too_many_pixels",
                f"{width} x {height} px{what}; at most {limits.max_image_pixels} pixels are accepted",
            )


def _sizes(image: Image.Image, fit: Fit) -> dict[str, tuple[int, int]]:
    """The sizes of the images in memory: the decoded one and, if Pillow resizes it, the resized one.

    Pillow resizes a strip of 40000 x 1 to 8960000 x 224. The kernel computes only the part that the crop keeps.
    """
    resized = fit.resized(*image.size)
    if fit.fits_kernel and (kernel := find_kernel()) and kernel.takes(image, resized):
        return {"": image.size}
    return {"": image.size, " when resized": resized}


def _unidentified(image_bytes: bytes, limits: ImageLimits) -> RefusedImage:
    """The refusal for bytes that no decoder accepts; a guess from their beginning."""
    if name := format_of(image_bytes):
        if name in limits.formats or (name == "HEIC" and HEIF in limits.formats):
            return RefusedImage("corrupt", f"it begins as {name}, but its header cannot be read")
        return RefusedImage("unsupported_format", f"{name} is not accepted; send JPEG")
    start = image_bytes[:2048].removeprefix(b"\xef\xbb\xbf").lstrip(b"\t\n\r ")
    for signature, mistake in _MISTAKES.items():
        if re.match(signature, start, re.DOTALL):
            return RefusedImage("not_an_image", f"{len(image_bytes)} bytes of {mistake}")
    return RefusedImage("not_an_image", f"{len(image_bytes)} bytes that no decoder knows; send JPEG")
