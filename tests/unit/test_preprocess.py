"""`clip_preprocess` on generated images: colours, geometry, limits, and which files are refused with which code."""

import base64
import dataclasses
import io
import sys

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import clip_heif
from clip_preprocess import ImageLimits, PixelBudget, RefusedImage, open_pixels, pixels_of

LIMITS = ImageLimits(
    max_image_bytes=1 << 20,
    max_image_pixels=4_000_000,
    max_jpeg_scans=20,
    formats=("JPEG", "PNG", "GIF", "WEBP", "BMP"),
)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def refusal(image_bytes: bytes, limits: ImageLimits = LIMITS) -> RefusedImage:
    with pytest.raises(RefusedImage) as caught:
        pixels_of(image_bytes, limits)
    return caught.value


def test_a_red_jpeg_stays_red():
    pixels = pixels_of(encoded(Image.new("RGB", (300, 500), (255, 0, 0)), "JPEG", quality=95), LIMITS)
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (254, 0, 0)).max() <= 1  # JPEG's own rounding


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (224, 224), (223, 225), (640, 427), (1024, 683)])
def test_every_size_gives_the_same_shape(size):
    assert pixels_of(encoded(Image.new("RGB", size, (1, 2, 3))), LIMITS).shape == (224, 224, 3)


def test_the_centre_is_kept_and_the_sides_are_cut():
    wide = Image.new("RGB", (672, 224), (255, 255, 255))
    wide.paste((0, 0, 255), (224, 0, 448, 224))
    assert (pixels_of(encoded(wide), LIMITS) == (0, 0, 255)).all()


def test_exif_orientation_is_applied_only_if_upright_is_set():
    left_red = Image.new("RGB", (448, 448))
    left_red.paste((255, 0, 0), (0, 0, 224, 448))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    marked, plain = (encoded(left_red, "PNG", **extra) for extra in ({"exif": exif}, {}))
    assert (pixels_of(marked, LIMITS) == pixels_of(plain, LIMITS)).all()
    assert (pixels_of(plain, LIMITS, upright=True)[:, 0] == (255, 0, 0)).all()
    assert (pixels_of(marked, LIMITS, upright=True)[:, -1] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "exif",
    [
        b"II*\0\x08\0\0\0" + b"\xff" * 60_000,
        b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\xff\xff\xff\xff\0\6\0\0",  # claims 4 billion values and has none
        b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\x09\0\0\0\0\0\0",  # orientation 9 does not exist
        b"MM\0*\0\0\0\x08\0\1\x01\x12\0\2\0\0\0\2six\0\0\0\0\0",  # text in place of a number
        b"MM\0*",
        b"no EXIF",
        b"",
    ],
)
def test_a_photograph_with_broken_exif_is_not_turned(exif):
    jpeg = encoded(Image.linear_gradient("L").resize((300, 500)), "JPEG")
    length = (8 + len(exif)).to_bytes(2, "big")
    broken = jpeg[:2] + b"\xff\xe1" + length + b"Exif\0\0" + exif + jpeg[2:]
    assert (pixels_of(broken, LIMITS, upright=True) == pixels_of(jpeg, LIMITS)).all()


def test_an_animation_gives_its_first_frame():
    first, second = Image.new("RGB", (50, 50), (255, 255, 255)), Image.new("RGB", (50, 50))
    gif = encoded(first, "GIF", save_all=True, append_images=[second])
    assert (pixels_of(gif, LIMITS) == 255).all()


def test_empty_bytes_are_refused():
    assert refusal(b"").code == "empty"


def test_text_is_not_an_image():
    assert refusal(b"<html>404</html>").code == "not_an_image"


def test_a_truncated_jpeg_is_refused_and_not_half_gray():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    whole = encoded(noise, "JPEG")
    for part in (0.25, 0.5, 0.75, 0.99):
        assert refusal(whole[: int(len(whole) * part)]).code == "truncated"


def test_a_truncated_header_is_refused():
    error = refusal(encoded(Image.new("RGB", (9, 9)), "JPEG")[:15])
    assert error.code in ("corrupt", "truncated")


def test_too_many_bytes_says_how_many_are_accepted():
    error = refusal(b"x" * (LIMITS.max_image_bytes + 1))
    assert error.code == "too_large"
    assert str(LIMITS.max_image_bytes) in error.reason


@pytest.mark.parametrize("size", [(3000, 3000), (65_500, 65_500)])
def test_decompression_bombs_are_refused_by_their_header(size):
    header = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = header.index(b"\xff\xc0")
    header[frame + 5 : frame + 9] = size[1].to_bytes(2, "big") + size[0].to_bytes(2, "big")
    assert refusal(bytes(header)).code in ("too_many_pixels", "truncated")


@pytest.fixture
def without_kernel(monkeypatch):
    """As if the kernel was not built: Pillow resizes, and always the whole image."""
    monkeypatch.setattr("clip_preprocess.find_kernel", lambda: None)


@pytest.mark.parametrize("size", [(40_000, 1), (1, 3000)])
def test_only_the_centre_of_a_long_strip_is_resized(size):
    strip = Image.new("RGB", size, (255, 0, 0))
    strip.paste((0, 0, 255), (size[0] // 2 - 20, size[1] // 2 - 20, size[0] // 2 + 20, size[1] // 2 + 20))
    assert (pixels_of(encoded(strip), LIMITS) == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(65_500, 1), (1, 65_500)])
def test_a_strip_that_pillow_would_enlarge_too_much_is_refused(without_kernel, size):
    error = refusal(encoded(Image.new("RGB", size)))
    assert (error.code, "when resized" in error.reason) == ("too_many_pixels", True)


def test_a_strip_that_the_kernel_does_not_support_is_refused_too():
    assert refusal(encoded(Image.new("P", (65_500, 1)))).code == "too_many_pixels"
    assert refusal(encoded(Image.new("RGB", (1, 5_000_000)))).code == "too_many_pixels"


@pytest.mark.parametrize(("mode", "size", "cost"), [("P", (30, 20), 224 * 336), ("RGB", (400, 300), 400 * 300)])
def test_images_of_a_request_share_a_pixel_budget_and_a_refused_one_uses_none(mode, size, cost):
    """An image costs its decoded pixels, or its resized ones if Pillow resizes it and they are more."""
    image, small = encoded(Image.new(mode, size)), encoded(Image.new("RGB", (1, 1)))
    budget = PixelBudget(2 * cost + 224 * 224)
    for _ in range(2):
        pixels_of(image, LIMITS, budget=budget)
    with pytest.raises(RefusedImage, match=f"after {2 * cost} pixels of the same request") as caught:
        pixels_of(image, LIMITS, budget=budget)
    assert caught.value.code == "too_many_pixels"
    pixels_of(small, LIMITS, budget=budget)


def test_an_image_that_fails_to_decode_uses_its_pixels_of_the_budget():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    budget = PixelBudget(300 * 300)
    with pytest.raises(RefusedImage, match="truncated"):
        pixels_of(encoded(noise, "JPEG")[:-1000], LIMITS, budget=budget)
    with pytest.raises(RefusedImage, match="too_many_pixels"):
        pixels_of(encoded(noise, "JPEG"), LIMITS, budget=budget)


def test_formats_that_are_not_listed_are_not_read():
    tiff = encoded(Image.new("RGB", (9, 9)), "TIFF")
    assert refusal(tiff).code == "not_an_image"


def ftyp(major: bytes, *others: bytes) -> bytes:
    return (
        (16 + 4 * len(others)).to_bytes(4, "big") + b"ftyp" + major + b"heic" + b"".join(others)
    )  # heic here is the minor version, not a brand


@pytest.mark.parametrize(
    ("start", "name"),
    [
        *((ftyp(brand), "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")),
        (ftyp(b"mif1", b"mif1", b"heic"), "HEIC"),
        (ftyp(b"MiHB", b"mif1"), "HEIF"),
        (ftyp(b"msf1"), "HEIF"),
        (ftyp(b"mif1", b"avif"), "AVIF"),
        (ftyp(b"crx "), "Canon raw"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"II\xbc\x01", "JPEG XR"),
        (b"FUJIFILMCCD-RAW 0201", "Fujifilm raw"),
        (b"8BPS", "PSD"),
    ],
)
def test_a_known_but_unlisted_format_is_named(start, name):
    error = refusal(start + b"\0" * 50)
    assert (error.code, error.reason) == ("unsupported_format", f"{name} is not accepted; send JPEG")


@pytest.mark.parametrize("start", [ftyp(b"isom", b"mp42"), ftyp(b"qt  "), b"\0\0\0\x04ftyp", b"\xff\xff\xff\xffftyp"])
def test_a_video_is_not_an_image(start):
    assert refusal(start + b"\0" * 50).code == "not_an_image"


@pytest.mark.parametrize(
    ("mode", "image_format"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF"), ("I;16", "PPM")]
)
def test_gray_of_over_8_bits_is_refused_unless_deep_gray_is_clip(mode, image_format):
    """open_clip turns nearly all of them into the same white image, whose vector is meaningless."""
    gradient = np.linspace(300, 60_000, 300 * 300).reshape(300, 300)
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    deep = encoded(Image.fromarray(gradient.astype(dtype)), image_format)
    limits = dataclasses.replace(LIMITS, formats=("PNG", "TIFF", "PPM"))
    error = refusal(deep, limits)
    assert error.code == "too_deep"
    assert "scale it to 8 bits" in error.reason
    assert (pixels_of(deep, dataclasses.replace(limits, deep_gray="clip")) == 255).all()


def test_borderline_files_are_refused_or_read_as_by_open_clip():
    """As with open_clip, a missing end marker and a text of over a MiB are refused, and 1,100 segments are not."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    jpeg = encoded(noise, "JPEG")
    assert jpeg.endswith(b"\xff\xd9")
    assert refusal(jpeg[:-2]).code == "truncated"
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * (1 << 20) + "y", zip=True)
    assert (
        refusal(encoded(noise, "PNG", pnginfo=text), dataclasses.replace(LIMITS, max_image_bytes=9 << 20)).code
        == "too_complex"
    )
    many = jpeg[:2] + b"\xff\xfe\0\x05abc" * 1100 + jpeg[2:]
    assert np.array_equal(pixels_of(many, LIMITS), pixels_of(jpeg, LIMITS))
    assert refusal(jpeg[:2] + b"\xff\xfe\0\x05abc" * 10_001 + jpeg[2:]).code == "too_complex"


def test_a_photograph_of_108_megapixels_is_read(limits):
    """Phones take such photographs. open_clip reads up to 178 million pixels, which would need 0.7 GB."""
    assert limits.max_image_pixels >= 12_000 * 9_000
    photo = encoded(Image.new("L", (12_000, 9_000), 99), "JPEG")
    assert (pixels_of(photo, limits) == 99).all()


JPEG = encoded(Image.new("RGB", (9, 9)), "JPEG")


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        (b"data:image/jpeg;base64," + base64.b64encode(JPEG), "a data URL"),
        (base64.b64encode(JPEG), "base64 text"),
        (b"\n" + base64.encodebytes(encoded(Image.new("RGB", (9, 9)))), "base64 text"),
        (base64.b64encode(b"GIF89a" + b"x" * 60), "base64 text"),
        (base64.b64encode(b"RIFF\x10\x20\0\0WEBPVP8 "), "base64 text"),
        (base64.b64encode(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"), "base64 text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<!DOCTYPE svg PUBLIC "x">\n<svg/>', "an SVG drawing"),
        (b"\r\n<!DOCTYPE html><html><body>Not found</body></html>", "an HTML page"),
        (b"<HTML><svg></svg></HTML>", "an HTML page"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(99), "a video"),
        (b"\0\0\0\x14ftypqt  " + bytes(99), "a video"),
        (b"\x1aE\xdf\xa3\x01" + bytes(99), "a video"),
        (b"RIFF\x10\0\0\0AVI LIST" + bytes(99), "a video"),
        (b'{"image": "/9j/4AAQ"}', "JSON text"),
        (b"<p>", "no decoder knows"),
        (b"<!---->" * 9999, "no decoder knows"),
        (b"\xff" * 99, "no decoder knows"),
    ],
)
def test_common_mistakes_are_named_in_the_refusal(sent, named):
    error = refusal(sent)
    assert (error.code, named in error.reason) == ("not_an_image", True), error


PARAMETERS = {
    "max_image_bytes": "1000000",
    "max_image_pixels": "1000000",
    "max_jpeg_scans": "100",
    "formats": "JPEG PNG HEIF",
    "deep_gray": "refuse",
}


def test_without_pillow_heif_only_heif_is_refused(monkeypatch):
    heic = ftyp(b"heic") + b"\0" * 50
    with pytest.raises(RefusedImage, match="corrupt: it begins as HEIC"):
        pixels_of(heic, ImageLimits.of(PARAMETERS))
    monkeypatch.setattr("clip_preprocess.missing_opener", clip_heif.missing_opener.__wrapped__)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    limits = ImageLimits.of(PARAMETERS)
    assert limits.formats == ("JPEG", "PNG")
    with pytest.raises(RefusedImage, match="HEIC is not accepted; send JPEG"):
        pixels_of(heic, limits)


def test_an_unknown_parameter_value_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="mode is quick, not exact, fast or gpu"):
        open_pixels({**PARAMETERS, "mode": "quick"})
    with pytest.raises(ValueError, match="orientation is upright, not ignore or exif"):
        open_pixels({**PARAMETERS, "mode": "exact", "orientation": "upright"})
    with pytest.raises(ValueError, match="deep_gray is scale, not refuse or clip"):
        open_pixels({**PARAMETERS, "mode": "exact", "deep_gray": "scale"})


def test_a_progressive_jpeg_is_read_unless_it_has_too_many_scans():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    jpeg = encoded(noise, "JPEG", progressive=True)
    assert jpeg.count(b"\xff\xda") == 10
    assert pixels_of(jpeg, LIMITS).shape == (224, 224, 3)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert pixels_of(jpeg[:-2] + last * 10 + b"\xff\xd9", LIMITS).shape == (224, 224, 3)
    error = refusal(jpeg[:-2] + last * 11 + b"\xff\xd9")
    assert error.code == "too_complex"
    assert str(LIMITS.max_jpeg_scans) in error.reason


def test_scans_in_a_thumbnail_or_after_the_end_do_not_count():
    """EXIF may contain a JPEG, and a phone may append a video to a photograph."""
    many = b"\xff\xda" * 1000
    jpeg = encoded(Image.new("RGB", (300, 200)), "JPEG", progressive=True, exif=b"Exif\0\0" + many)
    assert pixels_of(jpeg + many, LIMITS).shape == (224, 224, 3)


def test_a_file_with_too_many_blocks_is_refused(monkeypatch):
    monkeypatch.setattr("clip_bounds._MAX_READS", 1000)
    blocks = b"!\xfe\x01a\0" * 1000
    gif = encoded(Image.new("P", (9, 9)), "GIF")
    start = gif.index(b",", 13)
    assert pixels_of(gif, LIMITS).shape == (224, 224, 3)
    assert refusal(gif[:start] + blocks + gif[start:]).code == "too_complex"
