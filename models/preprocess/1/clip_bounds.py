"""Checks a file's structure against bounds before Pillow decodes it.

Limits on pixels and bytes alone bound neither time nor memory: every scan of a progressive JPEG passes over the whole
image, so a file of 0.1 MB can take minutes. Each bound lies between what 121 real photographs need and what hurt on one
core at 2 GHz, measured with files that were made to hurt (tests/fuzz_files.py).
"""

import io
import itertools
import re
import struct
from collections.abc import Iterator

# Pillow reads headers, PNG chunks, GIF blocks, RLE bitmaps and odd PPM files piece by piece in Python: 1 to 2 us each.
_MAX_READS = 2_000_000
# A photograph has under 60 segments; one with much metadata had 1,100. 10,000 took Pillow 0.5 s at most. At each EXIF
# segment it copies all EXIF so far.
_MAX_JPEG_SEGMENTS, _MAX_EXIF_SEGMENTS = 10_000, 64
# This many scans of an image of max_image_pixels take 2 s; a progressive photograph has 10.
_MAX_SCANS_OF_THE_LARGEST = 20
# Each may inflate to 1 MiB, in 4 ms. Pillow bounds the sum of their sizes only if they inflate without an error.
_MAX_COMPRESSED_TEXTS = 64
_MAX_PNG_CHUNKS = 100_000  # 32 MiB in libpng's 8 KiB chunks are 4096
# Enough for strips of one row, and for 256 x 256 tiles with room to spare.
_MAX_TIFF_SEGMENTS = 100_000
# libavif searches its items linearly: 100,000 items in 1.8 MB took 22 s. 64 KiB hold about 3,000.
_MAX_AVIF_TABLE_BYTES, _MAX_AVIF_MOVIE_BYTES, _MAX_AVIF_PROPERTIES = 64 << 10, 256 << 10, 4096
# OpenJPEG allocates every tile, precinct and code-block before it decodes. An RGB image of 100 megapixels has 100,000
# code-blocks of the usual 64 x 64; 2,000,000 took 750 MB. OpenJPEG needs 18 bytes a pixel, other decoders up to 10, so
# the limit on pixels is halved.
_MAX_J2K_TILES, _MAX_J2K_PARTS, _J2K_PIXEL_COST = 16_384, 1_000_000, 2
# Pillow decodes these in Python, pixel by pixel.
MAX_ICON_PIXELS, MAX_RLE_BITMAP_PIXELS = 4_000_000, 16_000_000
_MAX_PLAIN_PPM_BYTES, _MAX_PLAIN_PPM_COMMENTS = 8 << 20, 1000


class RefusedImage(ValueError):
    """The image cannot be accepted: fix or drop it. Retrying does not help.

    `code` is for programs: empty, too_large, too_many_pixels, too_complex, too_deep, unsupported_format, not_an_image,
    truncated or corrupt. `reason` is one line for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = " ".join(reason.split())


# Signatures of formats that people send: (offset, bytes) -> name.
_SIGNATURES = {
    (0, b"\xff\xd8\xff"): "JPEG",
    (0, b"\x89PNG\r\n\x1a\n"): "PNG",
    (0, b"GIF8"): "GIF",
    (8, b"WEBP"): "WEBP",
    (0, b"%PDF"): "PDF",
    (0, b"%!PS"): "EPS",
    (0, b"8BPS"): "PSD",
    (0, b"\xff\x0a"): "JPEG XL",
    (0, b"\0\0\0\x0cJXL \r\n\x87\n"): "JPEG XL",
    (0, b"II\xbc\x01"): "JPEG XR",
    (8, b"CR\x02\0"): "Canon raw",
    (0, b"FUJIFILMCCD-RAW"): "Fujifilm raw",
    (0, b"IIRO"): "Olympus raw",
    (0, b"IIRS"): "Olympus raw",
    (0, b"MMOR"): "Olympus raw",
    (0, b"IIU\0"): "Panasonic raw",
    (0, b"FOVb"): "Sigma raw",
    (0, b"v/1\x01"): "OpenEXR",
    (0, b"#?RADIANCE"): "Radiance HDR",
    (0, b"qoif"): "QOI",
    (0, b"BPG\xfb"): "BPG",
}
# Brands of ISO media files. A file lists several.
_BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIC": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"},
    "Canon raw": {b"crx "},
    "HEIF": {b"mif1", b"mif2", b"mif3", b"msf1", b"miaf", b"jpeg", b"j2ki", b"avci"},
}


def format_of(image_bytes: bytes) -> str | None:
    """The name of the format that the first bytes identify; None if unknown."""
    if image_bytes[4:8] == b"ftyp":
        # Skip the minor version at 12.
        ends = [8, *range(16, min(int.from_bytes(image_bytes[:4], "big"), 256), 4)]
        brands = {image_bytes[at : at + 4] for at in ends}
        return next((name for name, known in _BRANDS.items() if known & brands), None)
    return next((name for (at, start), name in _SIGNATURES.items() if image_bytes.startswith(start, at)), None)


def check_depth(mode: str, deep_gray: str) -> None:
    """Raises RefusedImage for gray with over 8 bits, unless `deep_gray` is clip."""
    if mode.startswith(("I", "F")) and deep_gray != "clip":
        raise RefusedImage(
            "too_deep",
            "gray with over 8 bits, which open_clip clips to white above 255; scale it to 8 bits, or set the parameter "
            "deep_gray of preprocess to clip",
        )


def code_of(error: Exception) -> str:
    """The refusal code for a decoder's error."""
    message = str(error)
    if "MAX_TEXT" in message:  # Pillow's limits on PNG texts, which apply in open_clip too
        return "too_complex"
    return "truncated" if "truncated" in message.lower() else "corrupt"


class CountedReads(io.BytesIO):
    """An in-memory file that raises RefusedImage after too many reads."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise RefusedImage("too_complex", f"over {_MAX_READS} reads to decode it; save it again as JPEG")
        return super().read(size)


def check_structure(image_bytes: bytes, *, max_jpeg_scans: int, max_image_pixels: int) -> None:
    """Raises RefusedImage for a file whose structure makes decoding expensive. A file that is merely broken passes."""
    if image_bytes.startswith(b"\xff\xd8\xff"):
        _check_jpeg(image_bytes, max_jpeg_scans, max_image_pixels)
    elif image_bytes.startswith(b"\x89PNG"):
        _check_png(image_bytes)
    elif image_bytes.startswith(b"\0\0\1\0"):
        refuse_over(len(_COMPRESSED_TEXT.findall(image_bytes)), _MAX_COMPRESSED_TEXTS, "compressed texts in an icon")
    elif image_bytes[:2] in (b"II", b"MM"):
        _check_tiff(image_bytes, max_image_pixels)
    elif image_bytes[:2] in (b"P1", b"P2", b"P3"):
        refuse_over(len(image_bytes), _MAX_PLAIN_PPM_BYTES, "bytes of plain PPM")
        refuse_over(image_bytes.count(b"#"), _MAX_PLAIN_PPM_COMMENTS, "comments")
    elif image_bytes[4:8] == b"ftyp":
        _check_avif(image_bytes)
    elif image_bytes.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        _check_jpeg2000(image_bytes, max_image_pixels // _J2K_PIXEL_COST)


def refuse_over(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise RefusedImage("too_complex", f"over {limit} {what}; save it again as JPEG")


# A marker, for libjpeg and Pillow alike: not a stuffed zero, a restart or a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_HAS_LENGTH = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xF0), 0xFE))
_FRAMES, _PROGRESSIVE = frozenset((*range(0xC0, 0xD0),)) - {0xC4, 0xC8, 0xCC}, {0xC2, 0xC6, 0xCA, 0xCE}
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1


def _check_jpeg(data: bytes, max_scans: int, max_pixels: int) -> None:
    """Bounds the header's segments and the scans. Stops at the first scan if there can be no other."""
    position, segments, exifs, scans = 2, 0, 0, 0
    components, is_progressive = 0, False
    while found := _JPEG_MARKER.search(data, position):
        marker, position = data[found.end() - 1], found.end()
        if marker == _EOI and scans:
            return
        if marker not in _HAS_LENGTH:
            continue
        body = data[position + 2 : position + 8]
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
        if marker == _SOS:
            scans += 1
            refuse_over(scans, max_scans, "JPEG scans, each of which passes over the whole image")
            if not is_progressive and body[:1] >= bytes((components,)):
                return  # libjpeg reads no second scan of such a file
        else:
            segments += 1
            exifs += marker == _APP1 and body == b"Exif\0\0"
            if marker in _FRAMES and len(body) == 6:
                height, width, components = struct.unpack_from(">HHB", body, 1)
                is_progressive = marker in _PROGRESSIVE
                images_of_this_size = max(1, max_pixels // max(1, width * height))
                max_scans = min(max_scans, _MAX_SCANS_OF_THE_LARGEST * images_of_this_size)
            refuse_over(segments, _MAX_JPEG_SEGMENTS, "JPEG segments")
            refuse_over(exifs, _MAX_EXIF_SEGMENTS, "EXIF segments")


_COMPRESSED_TEXT = re.compile(rb"iCCP|zTXt|iTXt")


def _check_png(data: bytes) -> None:
    position, texts, chunks = 8, 0, 0
    while len(kind := data[position + 4 : position + 8]) == 4 and kind != b"IEND":
        texts += _COMPRESSED_TEXT.match(kind) is not None
        chunks += 1
        refuse_over(texts, _MAX_COMPRESSED_TEXTS, "compressed texts and profiles")
        refuse_over(chunks, _MAX_PNG_CHUNKS, "PNG chunks")
        position += 12 + int.from_bytes(data[position : position + 4], "big")


_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q"}
_WIDTH, _HEIGHT, _SAMPLES, _PLANAR = 256, 257, 277, 284
_STRIP_OFFSETS, _STRIP_ROWS, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_TIFF_TAGS = {_WIDTH, _HEIGHT, _SAMPLES, _PLANAR, _STRIP_OFFSETS, _STRIP_ROWS, _STRIP_BYTES} | {
    *range(_TILE_WIDTH, _TILE_BYTES + 1)
}


def _check_tiff(data: bytes, max_pixels: int) -> None:
    """Bounds the first image's strips or tiles: their number, their unpacked size and the bytes that they read."""
    if data.startswith(b"MM\0+"):  # Pillow reads it as classic TIFF, libtiff as BigTIFF
        raise RefusedImage("unsupported_format", "big-endian BigTIFF is not accepted; send JPEG")
    tags = _tiff_tags(data)

    def first(tag: int, default: int) -> int:
        return next(iter(tags[tag][1]), default) if tag in tags else default

    width, height = first(_WIDTH, 0), first(_HEIGHT, 0)
    planes = first(_SAMPLES, 1) if first(_PLANAR, 1) == 2 else 1
    for offsets, sizes, part_width, part_height in (
        (_STRIP_OFFSETS, _STRIP_BYTES, width, min(first(_STRIP_ROWS, height), height)),
        (_TILE_OFFSETS, _TILE_BYTES, first(_TILE_WIDTH, width), first(_TILE_HEIGHT, height)),
    ):
        if offsets not in tags or min(width, height, part_width, part_height, planes) <= 0:
            continue
        across, down = -(-width // part_width), -(-height // part_height)
        parts = across * down * planes
        refuse_over(parts, _MAX_TIFF_SEGMENTS, "TIFF strips or tiles")
        refuse_over(tags[offsets][0], 2 * parts + 64, f"offsets where {parts} strips or tiles were expected")
        refuse_over(across * part_width * down * part_height, 2 * max_pixels, "pixels in TIFF tiles")
        if sizes in tags:
            read_bytes = sum(min(size, len(data)) for size in tags[sizes][1])
            refuse_over(read_bytes, 8 * len(data), "bytes in TIFF strips or tiles, more than the file has")


def _tiff_tags(data: bytes) -> dict[int, tuple[int, tuple[int, ...]]]:
    """The first directory's tags of the pixel layout: the number of values, and at most the first 100,001 of them."""
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+"
    start, number, entry = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    tags: dict[int, tuple[int, tuple[int, ...]]] = {}
    try:
        (position,) = struct.unpack_from(order + start, data, 8 if is_big else 4)
        (entries,) = struct.unpack_from(order + number, data, position)
        position += struct.calcsize(order + number)
        for _ in range(min(entries, len(data))):
            tag, kind, count, inline = struct.unpack_from(order + entry, data, position)
            position += struct.calcsize(order + entry)
            if tag not in _TIFF_TAGS or kind not in _TIFF_TYPES:
                continue
            if tag in tags:
                raise RefusedImage("corrupt", f"TIFF tag {tag} occurs twice in its directory")
            values = f"{order}{min(count, _MAX_TIFF_SEGMENTS + 1)}{_TIFF_TYPES[kind]}"
            inside = struct.calcsize(values) <= len(inline)
            (place,) = struct.unpack(order + start, inline)
            tags[tag] = count, struct.unpack_from(values, inline if inside else data, 0 if inside else place)
    except (struct.error, OverflowError):
        pass  # the decoder reports it
    return tags


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The (kind, start, end) of each box's contents in an ISO media file."""
    while end - start >= 8:
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        header = 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        stop = end if size == 0 else min(start + max(size, header), end)
        yield kind, start + header, stop
        start = stop


def _check_avif(data: bytes) -> None:
    """Refuse an AVIF, HEIC or HEIF whose tables would take long to read."""
    for kind, start, end in boxes(data, 0, len(data)):
        if kind == b"moov":
            refuse_over(end - start, _MAX_AVIF_MOVIE_BYTES, "bytes that describe an AVIF or HEIF sequence")
        if kind != b"meta":
            continue
        for table, first, last in boxes(data, start + 4, end):
            if table == b"iprp":
                for inner, begin, stop in boxes(data, first, last):
                    if inner == b"ipco":
                        properties = itertools.islice(boxes(data, begin, stop), _MAX_AVIF_PROPERTIES + 1)
                        refuse_over(sum(1 for _ in properties), _MAX_AVIF_PROPERTIES, "AVIF or HEIF properties")
                    else:
                        refuse_over(stop - begin, _MAX_AVIF_TABLE_BYTES, "bytes in an AVIF or HEIF table")
            elif table != b"idat":
                refuse_over(last - first, _MAX_AVIF_TABLE_BYTES, "bytes in an AVIF or HEIF table")


_COD, _COC, _SOT, _SOD = 0x52, 0x53, 0x90, 0x93


def _check_jpeg2000(data: bytes, max_pixels: int) -> None:
    """Bounds tiles, precincts, code-blocks and packets, in the main header and the tile-part headers."""
    stream = (
        0 if data[:1] == b"\xff" else next((at for kind, at, _ in boxes(data, 0, len(data)) if kind == b"jp2c"), -1)
    )
    position = stream + 2
    if stream < 0 or len(data) < position + 40:
        return
    x1, y1, x0, y0, tile_w, tile_h, tile_x, tile_y, components = struct.unpack_from(">8IH", data, position + 6)
    width, height = x1 - x0, y1 - y0
    if min(width, height, tile_w, tile_h) <= 0 or min(x1 - tile_x, y1 - tile_y) <= 0:
        return
    if width * height > max_pixels:  # the enclosing box may claim fewer
        raise RefusedImage("too_many_pixels", f"{width} x {height} px; at most {max_pixels} pixels are accepted")
    tiles = -(-(x1 - tile_x) // tile_w) * -(-(y1 - tile_y) // tile_h)
    refuse_over(tiles, _MAX_J2K_TILES, "JPEG 2000 tiles")
    layers, part_start, part_bytes = 1, 0, 0
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker == _SOT and len(body) >= 8:
            part_start, part_bytes = position, int.from_bytes(body[2:6], "big")
        if marker == _SOD:
            if part_bytes < 14:  # the last one extends to the end
                return
            if part_start + part_bytes <= position:  # the loop would not advance
                raise RefusedImage("corrupt", "a JPEG 2000 tile-part ends within its own header")
            position, part_bytes = part_start + part_bytes, 0
            continue
        style, levels_at = body[:1], 5 if marker == _COD else 1 + (1 if components < 257 else 2)
        if marker == _COC:
            style = body[levels_at - 1 : levels_at]
        if marker in (_COD, _COC) and len(body) >= levels_at + 5:
            layers = max(layers, int.from_bytes(body[2:4], "big")) if marker == _COD else layers
            sizes = (min(width, tile_w), min(height, tile_h))
            blocks, precincts = _parts_of_a_tile(sizes, body[levels_at:], has_precincts=bool(style[0] & 1))
            scale = min(tiles, 1 + width * height // (sizes[0] * sizes[1])) * components
            refuse_over(scale * blocks, _MAX_J2K_PARTS, "JPEG 2000 code-blocks")
            refuse_over(scale * precincts * layers, _MAX_J2K_PARTS, "JPEG 2000 packets")
        position += 2 + max(2, length)


def _parts_of_a_tile(size: tuple[int, int], coding: bytes, *, has_precincts: bool) -> tuple[int, int]:
    """The most code-blocks and precincts that one component of one tile can have."""
    levels, block_width, block_height = coding[0], coding[1] + 2, coding[2] + 2
    blocks = precincts = 0
    for level in range(min(levels, 32) + 1):
        precinct = coding[5 + level] if has_precincts and len(coding) > 5 + level else 0xFF
        # Each resolution but the lowest has three bands of half its size.
        width, height = (max(1, side >> (levels - level)) for side in size)
        precinct_width, precinct_height = precinct & 15, precinct >> 4
        half = 1 if level else 0
        across = 1 + (width >> min(block_width, max(0, precinct_width - half)))
        down = 1 + (height >> min(block_height, max(0, precinct_height - half)))
        blocks += across * down
        precincts += (1 + (width >> precinct_width)) * (1 + (height >> precinct_height))
    return blocks, precincts
