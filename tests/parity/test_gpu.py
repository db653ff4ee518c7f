"""`mode: "gpu"` without a GPU: its kernel is compiled for the CPU, and Pillow takes the decoder's place."""

import dataclasses
import gc
import importlib
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.host_gpu import HostGpu, build
from tests.resample_cases import cases

import clip_batch
import clip_dlpack
import clip_gpu
import clip_resample
from clip_fit import Fit
from clip_preprocess import PixelBudget, RefusedImage, open_pixels, pixels_of
from clip_tools.in_process import open_batches
from clip_tools.measuring import preprocess as measuring
from clip_tools.paths import MODELS
from clip_tools.repository import read_config

try:
    clip_resample.kernel()
except clip_resample.NoKernel as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def gpu(library):
    return HostGpu(library)


def parameters(**changes: str) -> dict[str, str]:
    served = {key: one.string_value for key, one in read_config(MODELS, "preprocess", "gpu").parameters.items()}
    return {**served, **changes}


def pixels_by(gpu, images, **changes):
    """The pixels of a batch, and its errors by image index."""
    batches = clip_gpu.Batches(parameters(**changes), gpu)
    batch = batches([(image, PixelBudget(10**9)) for image in images], batches.on_cpu)
    return np.from_dlpack(batches.lent(batch, 0, len(images))), batch.failed


def encoded(image, image_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_kernel_compiles_for_every_gpu(architecture):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed: pip install 'clip-embed[gpu]'")
    assert b"resample" in clip_gpu.compiled(architecture).code


def test_the_kernel_is_byte_identical_to_exact_mode_on_random_images(gpu, limits):
    """Size, order of the passes and EXIF orientation vary."""
    images, orientations = [], []
    for case in cases(seed=7, count=300):
        if case.mode == "RGB" and not case.box:
            images.append(case.image())
    for index, image in enumerate(images):
        exif = Image.Exif()
        exif[0x0112] = index % 8 + 1
        orientations.append(encoded(image.copy(), quality=90, exif=exif))
    assert len(images) > 25
    for orientation in ("ignore", "exif"):
        made, failed = pixels_by(gpu, orientations, orientation=orientation)
        assert failed == {}
        for pixels, one in zip(made, orientations, strict=True):
            assert np.array_equal(pixels, pixels_of(one, limits, upright=orientation == "exif"))


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_pixels_equal_exact_mode_at_336_px(gpu, limits, demo_photos, resize_mode):
    changes = {"side_px": "336", "resize_mode": resize_mode}
    made, failed = pixels_by(gpu, [demo_photos[0].read_bytes()], **changes)
    assert (failed, made.shape) == ({}, (1, 336, 336, 3))
    fitted = dataclasses.replace(limits, fit=Fit.of(changes))
    assert np.array_equal(made[0], pixels_of(demo_photos[0].read_bytes(), fitted))


def test_photographs_of_all_requests_are_decoded_in_one_call(gpu, limits, demo_photos):
    photos = [path.read_bytes() for path in demo_photos]
    made, failed = pixels_by(gpu, photos)
    assert (failed, gpu.calls) == ({}, [len(photos)])
    for pixels, photo in zip(made, photos, strict=True):
        assert np.array_equal(pixels, pixels_of(photo, limits))


def test_a_single_image_gets_the_pixels_of_exact_mode(gpu, limits, monkeypatch, demo_photos):
    monkeypatch.setattr("clip_gpu.CudaGpu", lambda _: gpu)
    alone, photo = open_pixels(parameters()), demo_photos[0].read_bytes()
    assert np.array_equal(alone(photo), pixels_of(photo, limits))
    with pytest.raises(RefusedImage, match="empty"):
        alone(b"")


def test_the_bench_measures_whole_batches_beside_the_other_modes(gpu, monkeypatch):
    monkeypatch.setattr("clip_gpu.CudaGpu", lambda _: gpu)
    photo = encoded(Image.linear_gradient("L").convert("RGB"))
    times = measuring.mean_of_batches(open_batches(), [photo] * 3, 0.01)
    assert set(gpu.calls) == {64}
    row = {"images": "640x480", "mode": "gpu", "resized_by": "GPU", "round": 0, **times}
    cpu = {**row, "mode": "exact", "preprocess_s": 0.01, "resize_s": 0.001}
    result = {"avx2": True, "rounds": 1, "seconds": 0.01}
    result["rows"] = [{**cpu, "resized_by": "library"}, {**cpu, "resized_by": "Pillow"}, row]
    text = measuring.preprocess_section("here", result).text
    assert f"one process made {1 / times['passed_s']:.0f} of 640x480 a second" in text
    assert "| 640x480 | gpu | GPU |" in text


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same_pixels(limits, demo_photos):
    try:
        alone = open_pixels(parameters())
    except ValueError as error:
        pytest.skip(str(error))
    for path in demo_photos:
        difference = np.abs(alone(path.read_bytes()).astype(int) - pixels_of(path.read_bytes(), limits))
        assert difference.max() <= 24, path.name  # as for mode `fast`
        assert difference.mean() < 1, path.name


def test_a_batch_over_the_pixel_limit_is_decoded_in_several_calls(gpu, monkeypatch):
    monkeypatch.setattr(clip_batch, "_MAX_PIXELS_AT_ONCE", 300_000)
    photos = [encoded(Image.new("RGB", (400, 300), (50 * index, 0, 0))) for index in range(5)]
    made, _ = pixels_by(gpu, photos)
    assert gpu.calls == [2, 2, 1]
    assert [round(float(pixels[..., 0].mean()) / 50) for pixels in made] == [0, 1, 2, 3, 4]


def test_pillow_decodes_what_the_gpu_cannot(gpu, limits):
    image = Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    unknown, gray, png, cut = encoded(image), encoded(image.convert("L")), encoded(image, "PNG"), encoded(image)[:-2]
    gpu.fails.append(unknown)
    made, failed = pixels_by(gpu, [png, unknown, cut, gray, b""])
    for index, one in ((0, png), (1, unknown), (3, gray)):
        assert np.array_equal(made[index], pixels_of(one, limits))
    assert {index: error.code for index, error in failed.items()} == {2: "truncated", 4: "empty"}
    assert gpu.calls == [1]


def test_a_decoded_picture_whose_size_differs_from_its_header_is_discarded(gpu, limits, monkeypatch):
    photo = encoded(Image.new("RGB", (400, 300), (200, 0, 0)))
    monkeypatch.setattr(gpu, "_decoded", lambda _: clip_batch.Picture(0, 9, 3, 3, None))
    made, failed = pixels_by(gpu, [photo])
    assert failed == {}
    assert np.array_equal(made[0], pixels_of(photo, limits))


def test_lent_memory_is_freed_when_its_last_dlpack_consumer_is_gone():
    array, gone = np.arange(24, dtype=np.uint8), []

    class Owner:
        def __del__(self):
            gone.append(True)

    lent = clip_dlpack.Lent(array.ctypes.data, (2, 3, 4), (clip_dlpack.CPU, 0), Owner())
    taken = np.from_dlpack(lent)
    unused = lent.__dlpack__()
    del lent
    gc.collect()
    assert np.array_equal(taken, array.reshape(2, 3, 4))
    assert not gone
    del taken
    gc.collect()
    assert not gone
    del unused
    gc.collect()
    assert gone


class Utils:
    """The part of triton_python_backend_utils that model.py uses."""

    class TritonError:
        INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"

        def __init__(self, message, code):
            self.message, self.code = message, code

    class Tensor:
        from_dlpack = staticmethod(lambda name, lent: (name, np.from_dlpack(lent)))

    class InferenceResponse:
        def __init__(self, tensors=(), error=None):
            self.tensors, self.error = tensors, error

    @staticmethod
    def get_input_tensor_by_name(request, name):
        assert name == "image_bytes"
        return SimpleNamespace(as_numpy=lambda: request)


@pytest.fixture
def model(monkeypatch, gpu):
    """model.py in mode gpu, in a process without Triton."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Utils)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    monkeypatch.syspath_prepend(str(clip_gpu.SOURCE.parent))
    made = importlib.import_module("model").TritonPythonModel()
    made._batches = clip_gpu.Batches(parameters(), gpu)
    made._pixels_of, made._max_request_pixels = made._batches.on_cpu, 10_000_000
    made._counters = SimpleNamespace(add=lambda *_: None)
    yield made
    sys.modules.pop("model")


def test_a_bad_image_fails_its_request_and_no_other(model, gpu, limits):
    good, other = (encoded(Image.linear_gradient("L").rotate(angle).convert("RGB")) for angle in (0, 90))
    requests = [[good], [other, good[:500], b""], [encoded(Image.new("RGB", (4000, 3000)))], [other, good]]
    tensors = [np.array(images, dtype=object).reshape(-1, 1) for images in requests]
    first, second, third, fourth, none = model.execute([*tensors, np.array([good], dtype=object)])
    assert "got a batch size of 0" in none.error.message
    for response, images in ((first, requests[0]), (fourth, requests[3])):
        assert response.error is None, response.error.message
        ((name, pixels),) = response.tensors
        assert (name, response.error) == ("pixels", None)
        assert np.array_equal(pixels, [pixels_of(one, limits) for one in images])
    assert second.error.code == third.error.code == "INVALID_ARG"
    assert "2 of 3 images refused. [1] truncated" in second.error.message
    assert "[2] empty" in second.error.message
    assert "[0] too_many_pixels" in third.error.message
    assert gpu.calls == [4]


def test_out_of_memory_is_internal_for_the_affected_requests_only(model, gpu):
    good = encoded(Image.linear_gradient("L").convert("RGB"))
    gray = encoded(Image.linear_gradient("L"))

    def out_of_memory(*_args, **_options):
        raise MemoryError

    model._pixels_of = out_of_memory
    tensors = [np.array([[image]], dtype=object) for image in (good, gray)]
    first, second = model.execute(tensors)
    assert (first.error, second.error.code) == (None, "INTERNAL")
    gpu.decode = out_of_memory
    assert [one.error.code for one in model.execute(tensors)] == ["INTERNAL", "INTERNAL"]


def test_mode_gpu_is_refused_with_the_reason_when_it_cannot_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(ValueError, match=r"needs the packages .*nvidia-nvimgcodec-cu13.*use mode exact or fast"):
        clip_gpu.open_batches(parameters())
    with pytest.raises(ValueError, match="not bicubic, longest: use mode exact"):
        clip_gpu.open_batches(parameters(resize_mode="longest"))
    monkeypatch.setattr("clip_gpu.find_kernel", lambda: None)
    with pytest.raises(ValueError, match=r"needs the library of clip_resample\.c"):
        clip_gpu.open_batches(parameters())
