"""`BoundSession`: batches in preallocated tensors. ONNX Runtime's I/O binding is real, and the device is the CPU."""

import functools
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from tests.small_graph import write_small_graph, write_small_transformer

import ort_session
from clip_tools.gpu import find_gpu
from clip_tools.paths import BACKENDS
from ort_bound import BoundSession, ConfigError, bucket_sizes

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)


def open_session(path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> onnxruntime.InferenceSession:
    return open_session(write_small_transformer(tmp_path_factory.mktemp("graph") / "model.onnx"))


@pytest.fixture(scope="module")
def bound(session) -> BoundSession:
    return BoundSession(session, 6, device="cpu", graphs=True)


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_the_buckets_end_with_the_largest_batch(max_batch, sizes):
    assert bucket_sizes(max_batch) == sizes


def test_a_padded_batch_gives_the_same_rows_as_an_unpadded_one(session, bound):
    """The sizes are mixed, so that the padding holds rows of earlier batches. FP32 sums may be in another order."""
    for rows in (6, 1, 5, 2, 3, 4, 1):
        pixels = PIXELS[rows : rows + rows] if 2 * rows <= 8 else PIXELS[:rows]
        (expected,) = session.run(["embedding"], {"pixels": pixels})
        (got,) = bound.run(["embedding"], {"pixels": pixels})
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() < 1e-5


def test_requests_are_joined_in_order_and_the_next_run_does_not_change_an_answer(bound):
    (whole,) = bound.run(["embedding"], {"pixels": PIXELS[:5]})
    kept = whole.copy()
    (parts,) = bound.run(["embedding"], {"pixels": [PIXELS[:1], PIXELS[1:4], PIXELS[4:5]]})
    assert np.array_equal(parts, whole)
    bound.run(["embedding"], {"pixels": PIXELS[3:8]})
    assert np.array_equal(whole, kept)


class Counting:
    """A session that records the batch size and the graph of each run."""

    def __init__(self, session) -> None:
        self._session, self.runs = session, []

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run_with_iobinding(self, binding, options):
        outputs = binding.get_outputs()
        self.runs.append((outputs[0].shape()[0], options.get_run_config_entry("gpu_graph_id")))
        self._session.run_with_iobinding(binding, options)

    def io_binding(self):
        return onnxruntime.IOBinding(self._session)


def test_the_constructor_runs_every_size_twice_the_largest_first_each_as_its_own_graph(session):
    counting = Counting(session)
    bound = BoundSession(counting, 4, device="cpu", graphs=True)
    assert counting.runs == [(4, "4"), (4, "4"), (2, "2"), (2, "2"), (1, "1"), (1, "1")]
    counting.runs.clear()
    for rows in (3, 1, 4, 2):
        bound.run(["embedding"], {"pixels": PIXELS[:rows]})
    assert [size for size, _ in counting.runs] == [4, 1, 4, 2]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"pixels": PIXELS[:7]}, "1 to 6, of pixels; got {'pixels': 7}"),
        ({"pixels": []}, "got {'pixels': 0}"),
        ({}, "got {}"),
        ({"image": PIXELS[:1]}, "got {'image': 1}"),
        ({"pixels": PIXELS[:1].astype(np.float32)}, "expected uint8"),
        ({"pixels": PIXELS[:1, :7]}, r"expected uint8 .*224, 224, 3"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(bound, feeds, message):
    with pytest.raises(ValueError, match=message):
        bound.run(["embedding"], feeds)


def test_a_batch_size_that_does_not_run_fails_the_load_with_its_number(tmp_path):
    """So does a size that cannot be captured as a CUDA graph."""
    path = write_small_graph(tmp_path / "model.onnx")
    model = onnx.load(path)
    fixed = onnx.numpy_helper.from_array(np.array([1, 512]), "one_row")
    model.graph.initializer.append(fixed)
    model.graph.node[-1].output[0] = "vectors"
    model.graph.node.append(onnx.helper.make_node("Reshape", ["vectors", "one_row"], ["embedding"]))
    onnx.save(model, path)
    session = open_session(path)
    with pytest.raises(
        ConfigError, match=r"a batch of 2 does not run on the CPU, or cannot be captured .*graphs: false"
    ):
        BoundSession(session, 2, device="cpu", graphs=True)
    with pytest.raises(ConfigError, match=r"a batch of 2 does not run on the CPU: .*invalid dimensions"):
        BoundSession(session, 2, device="cpu")


def test_memory_that_cannot_be_allocated_fails_the_load(session, monkeypatch):
    """Here on a device that this ONNX Runtime cannot allocate on."""
    monkeypatch.setattr("ort_bound._page_locked", lambda shape, dtype, _: np.zeros(shape, dtype))
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime may have a GPU")
    with pytest.raises(ConfigError, match=r"GPU 3 has no room for the tensors of batches of 1 to 6: Can't allocate"):
        BoundSession(session, 6, device_id=3)


def test_page_locked_memory_needs_a_driver(session):
    pytest.importorskip("cuda.bindings", reason="pip install cuda-bindings")
    try:
        BoundSession(session, 6)
    except ConfigError as error:
        assert "GPU 0 has no room for the tensors of batches of 1 to 6: cudaError" in str(error)
    else:
        pytest.skip("this machine has a GPU")


def test_only_the_batch_dimension_may_be_dynamic(tmp_path):
    model = onnx.load(write_small_graph(tmp_path / "model.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"'pixels' is tensor\(uint8\) \['batch', 'height', 224, 3\]: on a GPU only"):
        BoundSession(open_session(tmp_path / "model.onnx"), 4, device="cpu")


def test_a_session_for_a_gpu_is_bound(tmp_path, monkeypatch):
    """With the CPU in place of the GPU. An unbound session with CUDA graphs would replay its first batch."""
    monkeypatch.setattr(ort_session, "BoundSession", functools.partial(BoundSession, device="cpu"))
    path = write_small_graph(tmp_path / "model.onnx")
    settings = ort_session.SessionSettings([("CPUExecutionProvider", {})], gpu=0, graphs=True, max_batch=3)
    opened = ort_session.open_session(path, settings)
    assert opened.run(["embedding"], {"pixels": [PIXELS[:1], PIXELS[1:3]]})[0].shape == (3, 512)
    with pytest.raises(ValueError, match="1 to 3"):
        opened.run(["embedding"], {"pixels": PIXELS[:4]})


@pytest.mark.gpu
def test_on_a_real_gpu_bound_and_unbound_sessions_give_the_same_vectors(tmp_path):
    """With CUDA graphs, in FP32. A padded batch may use another kernel, so the bits may differ."""
    if find_gpu() is None or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")
    path = write_small_transformer(tmp_path / "model.onnx")
    cuda = {"name": "cuda", "parameters": {"use_tf32": "0"}}
    config = {"max_batch_size": 6, "optimization": {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}}
    plain = ort_session.session_settings(config, "GPU", 0)
    unbound = onnxruntime.InferenceSession(str(path), providers=plain.providers)
    config["optimization"]["cuda"] = {"graphs": True}
    bound = ort_session.open_session(path, ort_session.session_settings(config, "GPU", 0))
    for rows in (6, 1, 5, 2, 3, 4, 1):
        pixels = PIXELS[-rows:]
        got, expected = (one.run(["embedding"], {"pixels": pixels})[0] for one in (bound, unbound))
        assert np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize("max_batch", [0, -1])
def test_a_model_without_batches_is_refused(session, max_batch):
    with pytest.raises(ConfigError, match=f"max_batch_size: expected 1 or more.*; got {max_batch}"):
        BoundSession(session, max_batch, device="cpu")


class Tensor:
    """Stands in for pb_utils.Tensor: a name and an array."""

    def __init__(self, name, array) -> None:
        self.name, self._array = name, array

    def as_numpy(self):
        return self._array


def test_the_backend_gives_each_request_its_own_rows(bound, monkeypatch):
    """Three requests in a bucket that they do not fill."""
    pb_utils = ModuleType("triton_python_backend_utils")
    pb_utils.Tensor = Tensor
    pb_utils.get_input_tensor_by_name = lambda request, name: request[name]
    pb_utils.InferenceResponse = lambda tensors=None, error=None: SimpleNamespace(tensors=tensors, error=error)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", BACKENDS / "onnxruntime" / "model.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    model = backend.TritonPythonModel()
    model._session, model._inputs, model._outputs = bound, ["pixels"], ["embedding"]
    requests = [{"pixels": Tensor("pixels", part)} for part in (PIXELS[:2], PIXELS[2:3], PIXELS[3:5])]
    responses = model.execute(requests)
    got = [response.tensors[0].as_numpy() for response in responses]
    assert [len(rows) for rows in got] == [2, 1, 2]
    assert np.array_equal(np.concatenate(got), bound.run(["embedding"], {"pixels": PIXELS[:5]})[0])
