"""Small files that cost a decoder much time or memory. They are the same in every run.

What each one costs Pillow without our bounds is noted beside the bounds in models/preprocess/1/clip_bounds.py.
"""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence

import pillow_heif
from PIL import Image

_MIB = 1 << 20
pillow_heif.register_heif_opener()


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Encode the image in this format."""
    buffer = io.BytesIO()
    image.copy().save(buffer, image_format, **options)  # a copy: an image remembers how it was saved before
    return buffer.getvalue()


def flat(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image of one colour, which costs few bytes however large it is."""
    return Image.new(mode, (width, height), {"RGB": (10, 200, 30), "L": 128, "P": 3}[mode])


def noise(size_bytes: int) -> bytes:
    """Bytes without a pattern."""
    return random.Random(0).randbytes(size_bytes)  # noqa: S311


# --- JPEG


def segment(marker: int, body: bytes) -> bytes:
    """A JPEG segment with its length."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def scans_of_a_progressive_jpeg(count: int, side: int = 1000) -> bytes:
    """A JPEG that repeats its last scan, of few bytes, `count` times."""
    jpeg = encoded(flat(side, side, "L"), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * count + jpeg[-2:]


def scans_of_a_sequential_jpeg(count: int, side: int = 1000) -> bytes:
    """A JPEG with many empty scans, each of one colour."""
    jpeg = encoded(flat(side, side), "JPEG", subsampling=0)
    scan = [segment(0xDA, bytes((1, colour, 0x11 if colour > 1 else 0, 0, 63, 0))) for colour in (1, 2, 3)]
    return jpeg[: jpeg.index(b"\xff\xda")] + b"".join(scan[index % 3] for index in range(count)) + b"\xff\xd9"


def jpeg_with(inside: bytes, *, at: int = 2) -> bytes:
    """A small JPEG with these bytes after its first `at`."""
    jpeg = encoded(flat(64, 48), "JPEG")
    return jpeg[:at] + inside + jpeg[at:]


def jpeg_with_profile(size_bytes: int) -> bytes:
    """A JPEG with an ICC profile of this size, correctly cut into segments."""
    return encoded(flat(64, 48), "JPEG", icc_profile=noise(size_bytes))


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    jpeg = bytearray(encoded(flat(64, 48), "JPEG"))
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, height, width)
    return bytes(jpeg)


# --- PNG


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(chunks: bytes) -> bytes:
    """A small PNG with these chunks after its header."""
    png = encoded(flat(64, 48), "PNG")
    return png[:33] + chunks + png[33:]


def png_of_size(width: int, height: int) -> bytes:
    """A small PNG whose header claims another size, with a correct checksum."""
    png = encoded(flat(64, 48), "PNG")
    return png[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def inflating(size_bytes: int, *, broken: bool = False) -> bytes:
    """Deflated zeros of this size. With `broken` the checksum is wrong."""
    return zlib.compress(bytes(size_bytes), 9)[: -4 if broken else None] + b"oops" * broken


# --- TIFF


def tiff(
    width: int,
    height: int,
    data: bytes,
    *,
    offsets: Sequence[int] = (0,),
    counts: Sequence[int] | None = None,
    rows: int | None = None,
    tile: tuple[int, int] | None = None,
    bits: int = 8,
    compression: int = 1,
    extra: Iterable[tuple[int, int, Sequence[int]]] = (),
    magic: bytes = b"II*\0",
) -> bytes:
    """A gray TIFF whose strips or tiles begin at `offsets` of `data`."""
    order = "<" if magic.startswith(b"II") else ">"
    counts = counts or [len(data)] * len(offsets)
    places = [8 + offset for offset in offsets]
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits]), (259, 3, [compression]), (262, 3, [1]), *extra]
    if tile:
        tags += [(322, 4, [tile[0]]), (323, 4, [tile[1]]), (324, 4, places), (325, 4, counts)]
    else:
        tags += [(273, 4, places), (278, 4, [rows or height]), (279, 4, counts)]
    body, directory = bytearray(magic + bytes(4) + data), b""
    for tag, kind, values in sorted(tags, key=lambda one: one[0]):
        raw = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(raw) > 4:
            body += bytes(len(body) % 2)
            place, raw = len(body), raw + bytes(len(raw) % 2)
            body += raw
            raw = struct.pack(order + "I", place)
        directory += struct.pack(order + "HHI4s", tag, kind, len(values), raw)
    body += bytes(len(body) % 2)
    struct.pack_into(order + "I", body, 4, len(body))
    return bytes(body) + struct.pack(order + "H", len(directory) // 12) + directory + bytes(4)


def tiff_of_one_huge_tile(side: int) -> bytes:
    """100 x 100 pixels in a tile of side x side, which deflate compresses a thousandfold."""
    squeeze = zlib.compressobj(9)
    data = b"".join(squeeze.compress(bytes(side)) for _ in range(side)) + squeeze.flush()
    return tiff(100, 100, data, tile=(side, side), compression=8)


def tiff_that_reads_the_same_again(strips: int, size_bytes: int) -> bytes:
    """A TIFF with strips of one row, each of which claims the whole file as its data."""
    return tiff(64, strips, zlib.compress(bytes(64)) + bytes(size_bytes), offsets=[0] * strips, rows=1, compression=8)


# --- other formats


def gif_with(blocks: bytes) -> bytes:
    """A small GIF with these blocks before its image."""
    gif = encoded(flat(64, 48, "P"), "GIF")
    first = 13 + (3 << ((gif[10] & 7) + 1) if gif[10] & 128 else 0)
    return gif[:first] + blocks + gif[first:]


def rle_bitmap(width: int, height: int, runs: bytes) -> bytes:
    """A BMP of eight bits in RLE."""
    start = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs


def webp_with(chunks: bytes) -> bytes:
    """An animated WebP with these chunks behind its first frame."""
    webp = encoded(flat(64, 48), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))], lossless=True)
    body = webp[12:] + chunks
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_frame() -> bytes:
    """One frame of an animation, as a chunk."""
    webp = encoded(flat(64, 48), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))], lossless=True)
    start = webp.index(b"ANMF")
    (size,) = struct.unpack_from("<I", webp, start + 4)
    return webp[start : start + 8 + size + size % 2]


def webp_of_size(width: int, height: int) -> bytes:
    """An animated WebP whose canvas claims another size."""
    webp = bytearray(webp_with(b""))
    webp[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(webp)


def jpeg2000_with(
    *,
    size: tuple[int, int] | None = None,
    tile: tuple[int, int] | None = None,
    block: tuple[int, int] | None = None,
    layers: int | None = None,
    image: Image.Image | None = None,
    **options: object,
) -> bytes:
    """A JPEG 2000 whose codestream header is changed as given. `options` are Pillow's."""
    data = bytearray(encoded(image or flat(256, 256, "L"), "JPEG2000", **options))
    siz, cod = data.index(b"\xff\x51"), data.index(b"\xff\x52")
    for numbers, offset in ((size, siz + 6), (tile, siz + 22)):
        if numbers:
            struct.pack_into(">II", data, offset, *numbers)
    if block:
        data[cod + 10 : cod + 12] = bytes(block)
    if layers:
        struct.pack_into(">H", data, cod + 6, layers)
    return bytes(data)


def jpeg2000_that_goes_back(parts: int, segments: int) -> bytes:
    """Empty tile-parts, one after the other. A comment leads from each to the same long rest."""
    data, part_bytes = jpeg2000_with(image=flat(64, 48, "L")), 16
    start = data.index(b"\xff\x90")
    heads = (
        segment(0x90, struct.pack(">HIBB", 0, part_bytes, 0, 1))
        + b"\xff\x64"
        + struct.pack(">H", part_bytes * left - 14)
        for left in range(parts, 0, -1)
    )
    return data[:start] + b"".join(heads) + segment(0x64, b"") * segments + b"\xff\x93\0\0"


def box(kind: bytes, body: bytes) -> bytes:
    """A box of an ISO media file."""
    return struct.pack(">I", len(body) + 8) + kind + body


def avif_of_items(count: int) -> bytes:
    """An AVIF that lists the places of `count` items but has none of them."""
    avif = encoded(flat(64, 48), "AVIF")
    start, first = avif.index(b"meta") - 4, avif.index(b"iloc") - 4
    (meta_size,), (size,) = (struct.unpack_from(">I", avif, at) for at in (start, first))
    places = b"".join(struct.pack(">IHHHII", index + 1, 0, 0, 1, 0, 1) for index in range(count))
    table = box(b"iloc", b"\2\0\0\0\x44\0" + struct.pack(">I", count) + places)
    meta = avif[start + 8 : first] + table + avif[first + size : start + meta_size]
    return avif[:start] + box(b"meta", meta) + avif[start + meta_size :]


def avif_of_size(width: int, height: int) -> bytes:
    """An AVIF that claims another size than its images have."""
    avif = bytearray(encoded(flat(64, 48), "AVIF"))
    struct.pack_into(">II", avif, avif.index(b"ispe") + 8, width, height)
    return bytes(avif)


def with_box(content: bytes, path: tuple[bytes, ...], change: Callable[[bytes], bytes]) -> bytes:
    """Change the contents of the boxes at this path of an ISO media file. Later boxes may move."""
    parts, at = [], 0
    while at < len(content):
        (size,), kind = struct.unpack_from(">I", content, at), content[at + 4 : at + 8]
        body = content[at + 8 : at + size]
        if kind == path[0]:
            skip = 4 if kind == b"meta" else 0  # its version
            body = change(body) if len(path) == 1 else body[:skip] + with_box(body[skip:], path[1:], change)
        parts.append(box(kind, body))
        at += size
    return b"".join(parts)


def heif(width: int = 64, height: int = 48, **options: object) -> bytes:
    """A HEIC of one colour."""
    return encoded(flat(width, height), "HEIF", enc_params={"preset": "ultrafast"}, quality=10, **options)


def heif_of_size(width: int, height: int) -> bytes:
    """A HEIC whose header says so."""
    return with_box(
        heif(), (b"meta", b"iprp", b"ipco", b"ispe"), lambda body: body[:4] + struct.pack(">II", width, height)
    )


def heif_of_pictures(count: int, side: int = 1000) -> bytes:
    """A HEIC whose image is coded `count` times."""
    content = heif(side, side)
    picture = content[content.rindex(b"mdat") + 4 :]
    content = with_box(content, (b"mdat",), lambda body: body * count)
    return with_box(content, (b"meta", b"iloc"), lambda body: body[:-4] + struct.pack(">I", len(picture) * count))


def deep_heif(side: int) -> bytes:
    """A HEIC of one colour in 10 bits, with alpha."""
    buffer = io.BytesIO()
    pixels = struct.pack("<4H", 1 << 12, 1 << 13, 1 << 14, 1 << 15) * side**2
    options = {"chroma": 444, "quality": 10, "enc_params": {"preset": "ultrafast"}}
    pillow_heif.encode("RGBA;16", (side, side), pixels, buffer, **options)
    return buffer.getvalue()


def heif_of_a_tile(count: int) -> bytes:
    """A HEIC of a grid that names one tile of 512 x 512 so many times."""
    references = box(b"dimg", struct.pack(">HH", 1, count) + b"\0\2" * count)
    return with_box(heif(1024, 1024, tile_size=512), (b"meta", b"iref"), lambda body: body[:4] + references)


def icon_of(picture: bytes, entries: int = 1) -> bytes:
    """An icon whose entries all show this file."""
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(picture), 6 + 16 * entries)
    return b"\0\0\1\0" + struct.pack("<H", entries) + entry * entries + picture


def zip_file() -> bytes:
    """A small archive to append to an image."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("run.sh"), "echo hello")
    return buffer.getvalue()


_TGA_HEADER = struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0)

# The expected outcome ("pixels" or the code of a refusal), and how the file is made.
Bomb = tuple[str, Callable[[], bytes]]

# Refused, or decoded at once.
BOMBS: dict[str, Bomb] = {
    "jpeg: 5,000 progressive scans": ("too_complex", lambda: scans_of_a_progressive_jpeg(5000)),
    "jpeg: 5,000 sequential scans": ("too_complex", lambda: scans_of_a_sequential_jpeg(5000)),
    "jpeg: 90 progressive scans": ("pixels", lambda: scans_of_a_progressive_jpeg(80)),
    "jpeg: EXIF in 50,000 pieces": ("too_complex", lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + b"x" * 10) * 50_000)),
    "jpeg: 50,000 empty comments": ("too_complex", lambda: jpeg_with(segment(0xFE, b"") * 50_000)),
    "jpeg: 100,000 fill bytes": ("pixels", lambda: jpeg_with(b"\xff" * 100_000, at=20)),
    "jpeg: 100,000 bytes of junk": ("pixels", lambda: jpeg_with(b"\x55" * 100_000, at=20)),
    "jpeg: a profile of 4 MB": ("pixels", lambda: jpeg_with_profile(4_000_000)),
    "jpeg: 64 KB of EXIF": ("pixels", lambda: jpeg_with(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + b"\xff" * 65_000))),
    "jpeg: EXIF that points at itself": (
        "pixels",
        lambda: jpeg_with(
            segment(
                0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)
            )
        ),
    ),
    "jpeg: claims 65500 x 65500": ("too_many_pixels", lambda: jpeg_of_size(65_500, 65_500)),
    "jpeg: claims no height": ("corrupt", lambda: jpeg_of_size(64, 0)),
    "jpeg: two frames": ("corrupt", lambda: jpeg_with(segment(0xC0, b"\x08\x7f\xff\x7f\xff\x01\x01\x11\0"))),
    "png: 1,000 profiles": ("too_complex", lambda: png_with(chunk(b"iCCP", b"a\0\0" + inflating(_MIB - 1)) * 1000)),
    "png: 1,000 broken texts": (
        "too_complex",
        lambda: png_with(chunk(b"zTXt", b"a\0\0" + inflating(_MIB - 1, broken=True)) * 1000),
    ),
    "png: a text of 64 MB": ("too_complex", lambda: png_with(chunk(b"zTXt", b"a\0\0" + inflating(64 * _MIB)))),
    "png: 50,000 empty chunks": ("pixels", lambda: png_with(chunk(b"abCd", b"") * 50_000)),
    "png: claims 2147483647 x 2147483647": ("too_many_pixels", lambda: png_of_size(0x7FFFFFFF, 0x7FFFFFFF)),
    "png: claims 10480 x 10480": ("truncated", lambda: png_of_size(10480, 10480)),
    "png: 3000 x 3000 of nothing": ("pixels", lambda: encoded(flat(3000, 3000), "PNG")),
    "gif: 50,000 blocks": ("pixels", lambda: gif_with(b"!\xfe\x01a\0" * 50_000)),
    "gif: claims 65535 x 65535": (
        "too_many_pixels",
        lambda: b"GIF89a\xff\xff\xff\xff" + encoded(flat(64, 48, "P"), "GIF")[10:],
    ),
    "bmp: 10000 x 10000 of line ends": ("too_complex", lambda: rle_bitmap(10_000, 10_000, b"\1\1\0\0" * 10_000)),
    "bmp: 50,000 moves to nowhere": ("corrupt", lambda: rle_bitmap(1000, 1000, b"\0\2\0\0" * 50_000)),
    "bmp: claims 2147483647 lines": ("too_many_pixels", lambda: rle_bitmap(64, 0x7FFFFFFF, b"")),
    "ppm: 500,000 comments": ("too_complex", lambda: b"P2 100 100 255\n" + b"#\n" * 500_000),
    "ppm: 9 MB of plain numbers": ("too_complex", lambda: b"P2 2100 2100 255\n" + b"1 " * 2100 * 2100),
    "ppm: claims 99999999 x 99999999": ("too_many_pixels", lambda: b"P6 99999999 99999999 255\n"),
    "tiff: 1,000 strips that overlap": (
        "too_complex",
        lambda: tiff(2000, 2000, bytes(500_000), offsets=[0] * 1000, rows=1001, bits=1),
    ),
    "tiff: 200,000 strips of 8 rows": ("too_complex", lambda: tiff(8, 8, bytes(64), offsets=range(200_000), rows=1)),
    "tiff: a tile of 20000 x 20000": (
        "too_complex",
        lambda: tiff(100, 100, inflating(_MIB), tile=(20_000, 20_000), compression=8),
    ),
    "tiff: 10,000 strips read the file": ("too_complex", lambda: tiff_that_reads_the_same_again(10_000, 1_000_000)),
    "tiff: 200,000 strips, big-endian": (
        "too_complex",
        lambda: tiff(8, 8, bytes(64), offsets=range(200_000), rows=1, magic=b"MM\0*"),
    ),
    "tiff: 200,000 strips, of two kinds at once": (
        "unsupported_format",
        lambda: tiff(8, 8, bytes(64), offsets=range(200_000), rows=1, magic=b"MM\0+"),
    ),
    "tiff: two widths": ("corrupt", lambda: tiff(64, 48, bytes(64 * 48), extra=[(256, 4, [65_535])])),
    "tiff: a JPEG of 5,000 scans": (
        "corrupt",
        lambda: tiff(1000, 1000, scans_of_a_progressive_jpeg(5000), compression=7),
    ),
    "webp: 20,000 frames": ("pixels", lambda: webp_with(webp_frame() * 20_000)),
    "webp: 50,000 chunks": ("pixels", lambda: webp_with(b"abcd\0\0\0\0" * 50_000)),
    "webp: claims 16777216 x 16777216": ("too_many_pixels", lambda: webp_of_size(1 << 24, 1 << 24)),
    "jpeg 2000: 65,536 tiles": ("too_complex", lambda: jpeg2000_with(tile=(1, 1))),
    "jpeg 2000: code-blocks of 4 x 4": (
        "too_complex",
        lambda: jpeg2000_with(size=(5000, 5000), tile=(5000, 5000), block=(0, 0)),
    ),
    "jpeg 2000: 65,535 layers of precincts": (
        "too_complex",
        lambda: jpeg2000_with(precinct_size=(64, 64), layers=65_535),
    ),
    "jpeg 2000: data after the last tile": ("corrupt", lambda: jpeg2000_with()[:-2] + b"\xff\x93\0\0"),
    "jpeg 2000: 4,000 ways back": ("corrupt", lambda: jpeg2000_that_goes_back(4000, 20_000)),
    "jpeg 2000: claims 60000 x 60000": (
        "too_many_pixels",
        lambda: jpeg2000_with(size=(60_000, 60_000), tile=(60_000, 60_000)),
    ),
    "avif: 50,000 items": ("too_complex", lambda: avif_of_items(50_000)),
    "avif: claims 65535 x 65535": ("corrupt", lambda: avif_of_size(65_535, 65_535)),
    "heif: 5,000 pictures in an image": ("too_complex", lambda: heif_of_pictures(5000)),
    "heif: 3 pictures in an image": ("pixels", lambda: heif_of_pictures(3)),
    "heif: a grid of one tile 4,000 times": ("too_complex", lambda: heif_of_a_tile(4000)),
    "heif: claims 65535 x 65535": ("too_many_pixels", lambda: heif_of_size(65_535, 65_535)),
    "heif: claims 8 x 8": ("corrupt", lambda: heif_of_size(8, 8)),
    "heif: 9,000 places": (
        "too_complex",
        lambda: with_box(heif(), (b"meta", b"iloc"), lambda body: body + bytes(90_000)),
    ),
    "heif: 100 KB of set-up": (
        "too_complex",
        lambda: with_box(heif(), (b"meta", b"iprp", b"ipco", b"hvcC"), lambda body: body + bytes(100_000)),
    ),
    "ico: a PNG of 3000 x 3000": ("too_many_pixels", lambda: icon_of(encoded(flat(3000, 3000), "PNG"))),
    "ico: 1,000 profiles": (
        "too_complex",
        lambda: icon_of(png_with(chunk(b"iCCP", b"a\0\0" + inflating(_MIB - 1)) * 1000)),
    ),
    "ico: 65,535 entries": ("pixels", lambda: icon_of(encoded(flat(16, 16), "PNG"), 65_535)),
    "tga: claims 65535 x 65535": ("too_many_pixels", lambda: _TGA_HEADER + b"\xff\1\2\3" * 100),
    "jpeg and zip": ("pixels", lambda: encoded(flat(64, 48), "JPEG") + zip_file()),
    "zip and jpeg": ("not_an_image", lambda: zip_file() + encoded(flat(64, 48), "JPEG")),
    "gif and script": ("pixels", lambda: b"GIF89a/*" + encoded(flat(64, 48, "P"), "GIF")[8:] + b"*/=1;alert(1)"),
    "pdf and jpeg": ("unsupported_format", lambda: b"%PDF-1.4\n" + encoded(flat(64, 48), "JPEG")),
    "jpeg and pdf": ("pixels", lambda: jpeg_with(segment(0xFE, b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF"))),
    "png and page": ("pixels", lambda: png_with(chunk(b"tEXt", b"Comment\0<script>alert(1)</script>")) + b"<html>"),
    "nothing": ("empty", lambda: b""),
    "a byte": ("not_an_image", lambda: b"\xff"),
    "zeros": ("not_an_image", lambda: bytes(10_000)),
    "text": ("not_an_image", lambda: b"<html><body>404 Not Found</body></html>\n" * 100),
    "svg": (
        "not_an_image",
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    ),
    "noise": ("not_an_image", lambda: noise(100_000)),
}

# As large as the limits allow, or dear to make and to refuse: seconds each.
LARGEST: dict[str, Bomb] = {
    "jpeg: 20 scans of 10480 x 10480": ("pixels", lambda: scans_of_a_progressive_jpeg(14, 10480)),
    "jpeg: 20 scans of 10480 x 10480 in colour": ("pixels", lambda: scans_of_a_sequential_jpeg(20, 10480)),
    "jpeg: 100 scans of 4000 x 4000": ("pixels", lambda: scans_of_a_progressive_jpeg(94, 4000)),
    "jpeg: 3,000,000 fill bytes": ("too_complex", lambda: jpeg_with(b"\xff" * 3_000_000, at=20)),
    "jpeg: EXIF in 512 whole pieces": (
        "too_complex",
        lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 512),
    ),
    "jpeg: claims 10480 x 10480": ("pixels", lambda: jpeg_of_size(10480, 10480)),
    "avif: claims 9000 x 9000": ("pixels", lambda: avif_of_size(9000, 9000)),
    "webp: claims 16000 x 6800": ("pixels", lambda: webp_of_size(16_000, 6800)),
    "png: 10480 x 10480": ("pixels", lambda: encoded(flat(10480, 10480), "PNG")),
    "png: 90,000 empty chunks": ("pixels", lambda: png_with(chunk(b"abCd", b"") * 90_000)),
    "gif: 10480 x 10480": ("pixels", lambda: encoded(flat(10480, 10480, "P"), "GIF")),
    "gif: 5,000,000 blocks": ("too_complex", lambda: gif_with(b"!\xfe\x01a\0" * 5_000_000)),
    "bmp: 4000 x 4000 of line ends": ("pixels", lambda: rle_bitmap(4000, 4000, b"\1\1\0\0" * 4000)),
    "bmp: 3,000,000 moves to nowhere": ("too_complex", lambda: rle_bitmap(1000, 1000, b"\0\2\0\0" * 3_000_000)),
    "ppm: 5000 x 5000 of another scale": ("too_complex", lambda: b"P5 5000 5000 254\n" + b"a" * 25_000_000),
    "ppm: 2000 x 2000 of plain numbers": ("pixels", lambda: b"P2 2000 2000 255\n" + b"1 " * 4_000_000),
    "tiff: 10480 x 10480": ("pixels", lambda: encoded(flat(10480, 10480), "TIFF", compression="tiff_adobe_deflate")),
    "tiff: a tile of 10480 x 10480": ("pixels", lambda: tiff_of_one_huge_tile(10_480)),
    "tiff: 100,000 strips": (
        "pixels",
        lambda: tiff(64, 100_000, bytes(6_400_000), offsets=range(0, 6_400_000, 64), counts=[64] * 100_000, rows=1),
    ),
    "webp: 16000 x 6800": ("pixels", lambda: encoded(flat(16_000, 6800), "WEBP", method=0)),
    "webp: 16000 x 6800 without loss": ("pixels", lambda: encoded(flat(16_000, 6800), "WEBP", method=0, lossless=True)),
    "jpeg 2000: 7400 x 7400": ("pixels", lambda: encoded(flat(7400, 7400), "JPEG2000")),
    "jpeg 2000: 5000 x 5000 in blocks of 16 x 16": (
        "pixels",
        lambda: encoded(flat(5000, 5000), "JPEG2000", codeblock_size=(16, 16)),
    ),
    "avif: 10480 x 10480": ("pixels", lambda: encoded(flat(10480, 10480), "AVIF", speed=10)),
    "avif: 3,000 items": ("corrupt", lambda: avif_of_items(3000)),
    "heif: 7400 x 7400": ("pixels", lambda: heif(7400, 7400)),
    "heif: 7400 x 7400 in 10 bits with alpha": ("pixels", lambda: deep_heif(7400)),
    "heif: 8 pictures of 7400 x 7400": ("pixels", lambda: heif_of_pictures(8, 7400)),
}
