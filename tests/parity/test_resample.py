"""`clip_resample` gives Pillow's bytes in its portable and AVX2 forms, and is not used where it does not."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.resample_cases import MODES, SIDE_PX, Case, by_pillow, cases, differing, resized_size

import clip_preprocess
import clip_resample
from clip_tools import c_libraries as built
from clip_tools.paths import ROOT

try:
    KERNELS = [clip_resample.Kernel(clip_resample.library(), form) for form in clip_resample.FORMS]
except clip_resample.NoKernel as error:
    pytest.skip(str(error), allow_module_level=True)


def central(mode: str, width: int, height: int) -> Case:
    size = resized_size(width, height)
    return Case(mode, width, height, size, tuple(round((length - SIDE_PX) / 2) for length in size), None, seed=1)


def test_hundreds_of_random_images_are_byte_identical_to_pillow():
    assert differing(KERNELS, seed=1, count=250) == []


@pytest.mark.long
def test_ten_thousand_random_images_are_byte_identical_to_pillow():
    assert differing(KERNELS, seed=2, count=10_000) == []


def test_the_random_images_cover_every_mode_size_and_orientation():
    """The tests above rely on this coverage."""
    seen = list(cases(seed=1, count=250))
    assert {case.mode for case in seen} == set(MODES)
    sizes = [(case.width, case.height) for case in seen]
    assert min(map(min, sizes)) == 1
    assert max(map(max, sizes)) > 4000
    assert max(max(size) / min(size) for size in sizes) > 50
    less = [(c.height - c.size[1], c.width - c.size[0], c.orientation > 4) for c in seen]
    assert len([1 for down, across, is_sideways in less if not is_sideways and down > max(0, 2 * across)]) > 5
    assert len([1 for down, across, is_sideways in less if is_sideways and across > max(0, 2 * down)]) > 5
    assert {c.orientation for c in seen} == set(range(1, 9))
    assert {(c.size[0] - SIDE_PX) % 2 for c in seen} == {(c.size[1] - SIDE_PX) % 2 for c in seen} == {0, 1}
    assert len([c for c in seen if c.box]) > 20


@pytest.mark.parametrize("height", [1300, 1400])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_order_of_the_passes_is_that_of_pillow(mode, height):
    """652 x 1400 is resized vertically first, 652 x 1300 horizontally. Rounding between the passes shows which."""
    case = central(mode, 652, height)
    image = case.image()
    for kernel in KERNELS:
        assert np.array_equal(kernel.crop(image, case.size, case.offset, SIDE_PX), by_pillow(case, image))


@pytest.mark.parametrize(("width", "height"), [(1, 3000), (3000, 1), pytest.param(40_000, 1, marks=pytest.mark.long)])
def test_a_strip_one_pixel_wide_is_byte_identical_to_pillow(width, height):
    """Gray, because Pillow resizes the whole strip first: 40000 x 1 becomes 2 GB."""
    case = central("L", width, height)
    image = case.image()
    expected = by_pillow(case, image)
    for kernel in KERNELS:
        assert np.array_equal(kernel.crop(image, case.size, case.offset, SIDE_PX), expected)


def test_a_large_image_is_lent_in_one_block_which_shrinks_when_freed():
    """By default Pillow splits images into blocks of 16 MB, and it cannot lend an image of several blocks."""
    core = Image.core
    before = core.get_block_size(), core.get_blocks_max()
    try:
        case = central("RGB", 5000, 5000)
        with KERNELS[0].lends_images():
            image = case.image()
        assert np.array_equal(KERNELS[-1].crop(image, case.size, case.offset, SIDE_PX), by_pillow(case, image))
        assert core.get_block_size() == 64 << 20
    finally:
        core.set_block_size(before[0])
        core.set_blocks_max(before[1])


def test_unsupported_images_are_declined_and_invalid_crops_raise():
    takes = clip_resample.Kernel.takes
    for mode in ("1", "P", "PA", "I", "I;16", "F", "LAB", "HSV"):
        assert not takes(Image.new(mode, (9, 9)), (224, 224)), mode
    assert not takes(Image.new("RGB", (224, 300)), (224, 300))  # nothing to resize: Pillow copies it
    assert takes(Image.new("RGB", (224, 300)), (224, 300), (0, 0, 224, 299.5))
    assert not takes(Image.new("RGB", (1, 1)), (224, 1 << 31))
    image = Image.new("RGB", (300, 300))
    for size, offset, box in (
        ((224, 224), (1, 0), None),
        ((224, 224), (0, -1), None),
        ((200, 224), (0, 0), None),
        ((224, 224), (0, 0), (0, 0, 301, 300)),
        ((224, 224), (0, 0), (1, 0, 300, 300)),
        ((224, 224), (0, 0), (0, 0, 0, 300)),
        ((224, 224), (0, 0), (0, 0, float("nan"), 300)),
    ):
        with pytest.raises(clip_resample.KernelError):
            KERNELS[0].crop(image, size, offset, SIDE_PX, box)


@settings(max_examples=500, deadline=None)
@given(
    numbers=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 300), min_size=12, max_size=12),
    right=st.sets(st.integers(0, 13)),
    boxes=st.tuples(*[st.floats(width=32) | st.just(40.0)] * 2),
)
def test_no_arguments_make_the_library_access_other_memory(numbers, right, boxes):
    """Some arguments for a 40 x 40 image are replaced. The library rejects them or fills `out`, but nothing beyond."""
    image = Image.new("RGB", (40, 40), (7, 7, 7))
    _, lent = image.__arrow_c_array__()
    pointer = clip_resample._pointer_of(lent, b"arrow_array")
    out = np.zeros(16 * 16 * 3 + 64, np.uint8)
    true = [40, 40, 4, 40.0, 40.0, 20, 20, 2, 2, 16, 6, 3, out.nbytes - 64, 1]
    other = [*numbers[:3], *boxes, *numbers[3:]]
    values = [a if index in right else b for index, (a, b) in enumerate(zip(true, other, strict=True))]
    values.insert(12, out.ctypes.data)
    state = KERNELS[0]._crop(pointer, *values)
    assert state in (0, 1)
    assert not out[-64:].any()
    assert out[:-64].any() == (state == 0)


# Built with sanitizers, which end the process at an invalid memory access or undefined behaviour.


def sanitized(tmp_path) -> tuple[str, dict[str, str]]:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc, for ziglang has no address sanitizer")
    library = tmp_path / "sanitized.so"
    flags = ["-g", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fsanitize=address,undefined"]
    command = [compiler, *flags, "-fno-sanitize-recover=all", built.SOURCE, "-o", library, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc has no address sanitizer here: {done.stderr.strip().splitlines()[-1]}")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    options = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    return str(library), os.environ | {"LD_PRELOAD": runtime.stdout.strip(), **options}


def run_sanitized(tmp_path, *numbers: int) -> subprocess.CompletedProcess:
    library, environment = sanitized(tmp_path)
    return subprocess.run(
        [sys.executable, "-m", "tests.resample_cases", library, *map(str, numbers)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_the_sanitizers_detect_no_invalid_access_and_no_undefined_behaviour(tmp_path):
    done = run_sanitized(tmp_path, 3, 800, 800)
    assert done.returncode == 0, done.stderr[-4000:]
    count, pixels = map(int, done.stdout.split())
    assert count == 800
    assert pixels > 200


@pytest.mark.long
def test_the_sanitizers_detect_an_invalid_access(tmp_path, monkeypatch):
    source = tmp_path / built.SOURCE.name
    text = built.SOURCE.read_text()
    wrong = text.replace(
        "const size_t stride = (size_t)job->width * bands,", "const size_t stride = (size_t)job->width * bands + 4,"
    )
    assert wrong != text
    source.write_text(wrong)
    monkeypatch.setattr(built, "SOURCE", source)
    done = run_sanitized(tmp_path, 3, 5, 0)
    assert "heap-buffer-overflow" in done.stderr


# Which library is loaded.


def test_a_library_built_from_another_source_is_not_used(tmp_path, monkeypatch):
    source = tmp_path / "clip_resample.c"
    source.write_bytes(clip_resample.SOURCE.read_bytes())
    monkeypatch.setattr(clip_resample, "SOURCE", source)
    assert clip_resample.library() == built.library_path(source)
    shutil.copy(built.library_path(), clip_resample.library())
    assert clip_resample.kernel.__wrapped__().form in clip_resample.FORMS
    source.write_text(source.read_text() + "/* changed */\n")
    with pytest.raises(clip_resample.NoKernel, match="was not built; `make setup` builds it"):
        clip_resample.kernel.__wrapped__()


def test_a_library_that_cannot_be_loaded_or_differs_from_this_pillow_is_not_used(tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"none")
    with pytest.raises(clip_resample.NoKernel, match=r"broken.so cannot be loaded"):
        clip_resample.Kernel(broken)
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *_: resize(image, size, Image.Resampling.BILINEAR))
    with pytest.raises(clip_resample.NoKernel, match=r"this Pillow .* differently"):
        clip_resample.Kernel(clip_resample.library())


def test_a_failed_build_leaves_no_file_and_prints_the_reason_on_one_line(tmp_path, monkeypatch, capsys):
    source = tmp_path / "clip_resample.c"
    source.write_text("no C")
    compiler = (sys.executable, "-c", "import sys; sys.exit('Note: ...\\nclip_resample.c:1:1: error: unknown type')")
    monkeypatch.setattr(built, "WITHOUT", {source: built.WITHOUT[built.SOURCE]})
    monkeypatch.setattr(built, "build", partial(built.build, compiler=compiler))
    assert built.main() == 1
    assert re.fullmatch(r"preprocess resamples with Pillow.*error: unknown type\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [source]


def test_without_the_library_the_pixels_are_the_same(monkeypatch, limits, demo_photos):
    image_bytes = demo_photos[0].read_bytes()
    with_it = clip_preprocess.pixels_of(image_bytes, limits)
    monkeypatch.setattr(clip_preprocess, "find_kernel", lambda: None)
    monkeypatch.setattr(clip_resample.Kernel, "crop", lambda *_: pytest.fail("the library was used"))
    assert np.array_equal(clip_preprocess.pixels_of(image_bytes, limits), with_it)
