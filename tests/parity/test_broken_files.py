"""Broken photographs give pixels or a refusal with a known code, and nothing else."""

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
    """What to do to a file: places and lengths as fractions of its size."""
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


# The dearest of them is decoded in half a second on a core that others use too.
BOMB_LIMIT_S = 10


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_made_to_cost_much_costs_little(limits, name):
    expected, make = BOMBS[name]
    content, came = make(), "pixels"
    started = time.monotonic()
    try:
        pixels_of(content, limits, upright=True)
    except RefusedImage as error:
        came = error.code
    assert time.monotonic() - started < BOMB_LIMIT_S
    assert came == expected


def test_no_photograph_is_too_complex(limits):
    for path in photos.gate_photos():
        image_bytes = path.read_bytes()
        check_structure(
            image_bytes, max_jpeg_scans=limits.max_jpeg_scans // 5, max_image_pixels=limits.max_image_pixels // 5
        )


def assert_each_gives_pixels_or_a_refusal(names, record_reliability) -> None:
    """In a process of its own, so that a decoder that crashes is told by the name of its case."""
    outcomes = fuzz(names)
    assert (outcomes.errors, outcomes.crashed, outcomes.hung) == ({}, {}, [])
    assert outcomes.cases == len(names)
    assert outcomes.came["pixels"] > 0.1 * len(names)
    assert outcomes.refused > 0.1 * len(names)
    # What one image took is given back; 46 MB stayed after 21,000 cases, most of it since the first hundred.
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
