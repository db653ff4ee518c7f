"""Each resize mode and interpolation of open_clip gives the same pixels here."""

import itertools

import numpy as np
import pytest
from PIL import Image
from tests.conftest import Lazily

from clip_fit import Fit
from clip_orientation import TURNS
from clip_preprocess import ImageLimits, centre_of, lent_memory

open_clip = Lazily("open_clip")

MODES = ("RGB", "L", "CMYK", "RGBA", "LA", "P", "1", "I;16")
SIZES = ((640, 427), (427, 640), (300, 300), (224, 224), (3, 5))


def image_of(mode: str, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    return Image.fromarray(noise).convert("RGB").quantize(64) if mode == "P" else Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize(
    ("resize_mode", "interpolation"),
    list(itertools.product(("shortest", "squash", "longest"), ("bicubic", "bilinear"))),
)
@pytest.mark.parametrize(("side_px", "fill_color"), [(256, 0), (224, 7)])
def test_every_fit_gives_open_clips_pixels(resize_mode, interpolation, side_px, fill_color):
    fit = Fit(side_px, resize_mode, interpolation, fill_color)
    transform = open_clip.image_transform(
        side_px, is_train=False, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill_color
    )
    steps = list(itertools.takewhile(lambda step: "ToTensor" not in type(step).__name__, transform.transforms))
    for mode, size in itertools.product(MODES, SIZES):
        image = expected = image_of(mode, size)
        for step in steps:
            expected = step(expected)
        assert np.array_equal(centre_of(image, fit=fit), np.asarray(expected)), (mode, size)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_turning_while_fitting_equals_fitting_the_turned_image(resize_mode):
    """The library turns while it resizes. For `longest`, Pillow turns first."""
    for number, turn in TURNS.items():
        with lent_memory():
            image = Image.effect_noise((640, 427), 90).convert("RGB")
        turned = image.transpose(turn.method)
        fit = Fit(256, resize_mode)
        assert np.array_equal(centre_of(image, turn=turn, fit=fit), centre_of(turned, fit=fit)), number


def test_an_unknown_interpolation_or_resize_mode_is_refused(limits):
    with pytest.raises(ValueError, match="interpolation is nearest, not one of bicubic, bilinear"):
        Fit.of({"interpolation": "nearest"})
    with pytest.raises(ValueError, match="resize_mode is fit, not one of shortest, squash, longest"):
        Fit.of({"resize_mode": "fit"})
    assert limits.fit == Fit()
    assert isinstance(limits, ImageLimits)
