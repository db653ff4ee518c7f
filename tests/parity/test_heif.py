"""HEIC and HEIF give the pixels of open_clip's transform when Pillow has the opener of pillow-heif."""

import dataclasses
import io

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from clip_preprocess import RefusedImage, pixels_of
from clip_tools.serving.provenance import suffixes_of


@pytest.fixture(scope="module")
def photo(demo_photos):
    with Image.open(demo_photos[0]) as image:
        return image.convert("RGB").resize((413, 300))


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", enc_params={"preset": "ultrafast"}, **options)
    return buffer.getvalue()


def assert_same(content: bytes, oracle, limits) -> np.ndarray:
    """The pixels, after comparing them with open_clip's, upright or not.

    `upright` makes no difference: pillow-heif turns an image by its HEIF properties and ignores EXIF.
    """
    pixels = oracle.pixels(content)
    upright = dataclasses.replace(oracle, orientation="exif").pixels(content)
    assert np.array_equal(pixels_of(content, limits), pixels)
    assert np.array_equal(pixels_of(content, limits, upright=True), upright)
    assert np.array_equal(pixels, upright)
    return pixels


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
@pytest.mark.parametrize("options", [{}, {"tile_size": 128, "quality": 90}, {"chroma": 444}], ids=str)
def test_colour_modes_and_grids_give_open_clips_pixels(oracle, limits, photo, mode, options):
    image = photo.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert_same(encoded(image, **options), oracle, limits)


@pytest.mark.parametrize("mode", ["RGB;16", "RGBA;16"])
def test_ten_bit_images_give_open_clips_pixels(oracle, limits, photo, mode):
    bands = np.asarray(photo.convert(mode.removesuffix(";16")))
    buffer = io.BytesIO()
    pillow_heif.encode(mode, photo.size, (bands.astype(np.uint16) * 257).tobytes(), buffer)
    assert_same(buffer.getvalue(), oracle, limits)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_is_turned_by_its_heif_properties_whatever_the_orientation_option(oracle, limits, photo, orientation):
    plain, marked = pixels_of(encoded(photo), limits), photo.copy()
    marked.getexif()[0x0112] = orientation
    assert not np.array_equal(assert_same(encoded(marked), oracle, limits), plain)
    # A file with the orientation only in its EXIF is not turned.
    assert np.array_equal(assert_same(encoded(photo, exif=marked.getexif()), oracle, limits), plain)


@pytest.mark.parametrize("primary", [0, 1])
def test_the_primary_image_of_a_burst_is_used(oracle, limits, photo, primary):
    other = Image.new("RGB", photo.size, (255, 0, 0))
    pixels = assert_same(encoded(photo, save_all=True, append_images=[other], primary_index=primary), oracle, limits)
    assert (np.abs(pixels.astype(int) - (255, 0, 0)).max() < 9) == (primary == 1)


def test_gray_of_over_8_bits_is_refused_as_in_other_formats(limits, photo):
    buffer = io.BytesIO()
    gray = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    pillow_heif.encode("L;16", photo.size, gray.tobytes(), buffer)
    with pytest.raises(RefusedImage, match="too_deep"):
        pixels_of(buffer.getvalue(), limits)


def test_a_server_that_decodes_heif_reports_its_file_suffixes():
    assert {".heic", ".heif"} <= set(suffixes_of(["JPEG", "HEIF"]))
    assert not {".heic", ".heif"} & set(suffixes_of(["JPEG", "AVIF"]))
