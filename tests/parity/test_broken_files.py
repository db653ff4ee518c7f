"""A damaged or hostile file is decoded or refused with a known code. It never crashes or hangs the decoder."""

import io
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests import fuzz_files
from tests.fuzz_bombs import BOMBS
from tests.fuzz_preprocess import CODES, fuzz

from clip_bounds import check_structure
from clip_preprocess import RefusedImage, pixels_of
from clip_tools import photos


@st.composite
def damages(draw) -> list[tuple[str, float, float, int]]:
    """(kind, position, length, value): position as a fraction of the file's size, length as a fraction of 200 bytes."""
    fraction = st.floats(0, 1)
    kind = st.sampled_from(["flip", "cut", "drop", "swap", "repeat"])
    return draw(st.lists(st.tuples(kind, fraction, fraction, st.integers(1, 255)), min_size=1, max_size=6))


def damaged(content: bytes, plan: list[tuple[str, float, float, int]]) -> bytes:
    data = bytearray(content)
    for kind, where, length, value in plan:
        if not data:
            break
        start = min(int(where * len(data)), len(data) - 1)
        end = min(start + 1 + int(length * 200), len(data))
        if kind == "flip":
            data[start] ^= value
        elif kind == "cut":
            del data[start:]
        elif kind == "drop":
            del data[start:end]
        elif kind == "swap":
            data[start:end] = data[start:end][::-1]
        else:
            data[start:start] = data[start:end]
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(plan=damages(), image_format=st.sampled_from(fuzz_files.FORMATS))
def test_a_damaged_photograph_gives_pixels_or_a_known_refusal(limits, demo_photos, plan, image_format):
    buffer = io.BytesIO()
    with Image.open(demo_photos[0]) as photo:
        photo.resize((96, 64)).save(buffer, image_format)
    try:
        pixels = pixels_of(damaged(buffer.getvalue(), plan), limits, upright=True)
    except RefusedImage as error:
        assert error.code in CODES
        assert "\n" not in error.reason
    else:
        assert pixels.shape == (224, 224, 3)


# The slowest bomb takes half a second on a shared core.
BOMB_LIMIT_S = 10


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_decoded_or_refused_within_the_time_limit(limits, name):
    expected, make = BOMBS[name]
    content, came = make(), "pixels"
    started = time.monotonic()
    try:
        pixels_of(content, limits, upright=True)
    except RefusedImage as error:
        came = error.code
    assert time.monotonic() - started < BOMB_LIMIT_S
    assert came == expected


def test_no_ordinary_photograph_is_too_complex(limits):
    """Photographs pass even at a fifth of the limits."""
    for path in photos.gate_photos():
        image_bytes = path.read_bytes()
        check_structure(
            image_bytes, max_jpeg_scans=limits.max_jpeg_scans // 5, max_image_pixels=limits.max_image_pixels // 5
        )


def assert_each_gives_pixels_or_a_refusal(names, record_reliability) -> None:
    """Decode the cases in another process, so that a crash can be attributed to its case."""
    outcomes = fuzz(names)
    assert (outcomes.errors, outcomes.crashed, outcomes.hung) == ({}, {}, [])
    assert outcomes.cases == len(names)
    assert outcomes.came["pixels"] > 0.1 * len(names)
    assert outcomes.refused > 0.1 * len(names)
    # Memory is freed after each image: 46 MB remained after 21,000 cases, most of it since the first hundred.
    assert outcomes.memory_mb[-1] - outcomes.memory_mb[0] < 150
    record_reliability(
        "fuzz_preprocess",
        cases=outcomes.cases,
        vectors=outcomes.came["pixels"],
        refused=outcomes.refused,
        internal_errors=len(outcomes.errors) + len(outcomes.crashed),
        hung=len(outcomes.hung),
        slowest_s=outcomes.slowest_s,
        slowest=outcomes.slowest,
        memory_before_mb=outcomes.memory_mb[0],
        memory_after_mb=outcomes.memory_mb[-1],
    )


def test_hundreds_of_odd_and_damaged_files(record_reliability):
    assert_each_gives_pixels_or_a_refusal(fuzz_files.names(1, 250, every_odd=10), record_reliability)


@pytest.mark.long
def test_thousands_of_odd_and_damaged_files(record_reliability):
    assert_each_gives_pixels_or_a_refusal(fuzz_files.names(2, 15_000, largest=True), record_reliability)
