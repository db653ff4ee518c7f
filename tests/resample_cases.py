"""Compares `clip_resample` with Pillow over random sizes, modes, crops and boxes.

`python -m tests.resample_cases LIBRARY SEED CASES FILES` does it in another process, for a library that was built to
detect invalid memory accesses, and runs `preprocess` on FILES odd and damaged files with it.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

MODES = ("RGB", "L", "RGBA", "LA", "CMYK", "RGBX", "YCbCr")
SIDE_PX = 224
# Pixels of the whole resized image, which only Pillow makes.
_MAX_RESIZED_PIXELS = 20_000_000


@dataclass(frozen=True)
class Case:
    """An image of noise, and how to resize and crop it."""

    mode: str
    width: int
    height: int
    size: tuple[int, int]
    offset: tuple[int, int]
    box: tuple[float, float, float, float] | None
    seed: int
    orientation: int = 1

    def image(self) -> Image.Image:
        """Noise, or noise of only black and white, which overshoots at both ends."""
        noise = np.random.default_rng(self.seed)
        bands = len(Image.new(self.mode, (1, 1)).getbands())
        pixels = noise.integers(0, 256, (self.height, self.width, bands), dtype=np.uint8)
        if self.seed % 3 == 0:
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
        image = Image.frombytes(self.mode, (self.width, self.height), pixels.tobytes())
        image.getexif()[ExifTags.Base.Orientation] = self.orientation
        return image


def cases(seed: int, count: int) -> Iterator[Case]:
    """`count` cases of this seed: 1 to 5000 px, each mode in turn, central and other crops, boxes."""
    chosen = random.Random(seed)  # noqa: S311
    number = 0
    while number < count:
        longest = chosen.choice((8, 40, 300, 300, 1000, 1000, 1000, 2500, 5000))
        shortest = longest if chosen.random() < 0.7 else min(longest, 300)
        width, height = chosen.randint(1, longest), chosen.randint(1, shortest)
        if chosen.random() < 0.5:
            width, height = height, width
        size = resized_size(width, height)
        if size == (width, height) or size[0] * size[1] > _MAX_RESIZED_PIXELS:
            continue
        offset = tuple(round((length - SIDE_PX) / 2) for length in size)
        if chosen.random() < 0.3:
            offset = tuple(chosen.randint(0, length - SIDE_PX) for length in size)
        box = None
        if chosen.random() < 0.2:  # as in mode `fast`: the last pixel may be a fraction
            box = (0, 0, *(max(1, length - chosen.choice((0, 0.125, 0.5, 0.875))) for length in (width, height)))
        orientation = 1 if box else chosen.randint(1, 8)
        mode = MODES[number % len(MODES)]
        yield Case(mode, width, height, size, offset, box, chosen.randrange(1 << 30), orientation)
        number += 1


def resized_size(width: int, height: int) -> tuple[int, int]:
    """The size that torchvision's Resize gives for the shortest side."""
    if width <= height:
        return SIDE_PX, int(SIDE_PX * height / width)
    return int(SIDE_PX * width / height), SIDE_PX


def by_pillow(case: Case, image: Image.Image) -> np.ndarray:
    """What Pillow gives: the reference."""
    size, (left, top) = case.size, case.offset
    if case.orientation > 4:  # the sides are swapped
        size, (left, top) = size[::-1], (top, left)
    resized = ImageOps.exif_transpose(image).resize(size, Image.Resampling.BICUBIC, case.box)
    return np.asarray(resized.crop((left, top, left + SIDE_PX, top + SIDE_PX)).convert("RGB"))


def differing(kernels: list, seed: int, count: int) -> list[Case]:
    """The cases in which a kernel does not give Pillow's bytes."""
    from clip_orientation import turn_of  # in the folder of the library

    found = []
    for case in cases(seed, count):
        with kernels[0].lends_images():
            image = case.image()
        expected = by_pillow(case, image)
        if any(
            not np.array_equal(kernel.crop(image, case.size, case.offset, SIDE_PX, case.box, turn_of(image)), expected)
            for kernel in kernels
        ):
            found.append(case)
    return found


def main(library: str, seed: str, count: str, files: str) -> None:
    """Raises if a byte differs. The library ends the process at an invalid access."""
    from clip_tools.paths import MODELS
    from clip_tools.repository import read_config
    from tests import fuzz_files

    sys.path.append(str(MODELS / "preprocess" / "1"))
    import clip_preprocess
    import clip_resample

    kernels = [clip_resample.Kernel(Path(library), form) for form in clip_resample.FORMS]
    if found := differing(kernels, int(seed), int(count)):
        raise AssertionError(found)
    clip_preprocess.find_kernel = lambda: kernels[-1]
    parameters = {key: one.string_value for key, one in read_config(MODELS, "preprocess").parameters.items()}
    limits, pixels = clip_preprocess.ImageLimits.of(parameters), 0
    for name in fuzz_files.names(int(seed), int(files)) if int(files) else ():
        try:
            clip_preprocess.pixels_of(fuzz_files.make(name), limits, upright=True)
            pixels += 1
        except clip_preprocess.RefusedImage:
            pass
    print(count, pixels)


if __name__ == "__main__":
    main(*sys.argv[1:])
