"""`backends/tensorrt`: its checks before it serves a plan, and how it moves batches, on a fake device."""

import ctypes
import json
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from google.protobuf import json_format

from clip_tools.paths import MODELS
from clip_tools.repository import read_config
from trt_contract import PlanError, PlanTensor, check_contract, check_machine, find_tensorrt, plan_tensors
from trt_runner import Cuda, CudaError, PlanRunner

PIXELS = PlanTensor("pixels", "TYPE_UINT8", (-1, 224, 224, 3), (1, 64))
EMBEDDING = PlanTensor("embedding", "TYPE_FP32", (-1, 512), None)

SMALL = {
    "max_batch_size": 4,
    "input": [{"name": "pixels", "data_type": "TYPE_UINT8", "dims": ["2", "2", "3"]}],
    "output": [{"name": "embedding", "data_type": "TYPE_FP32", "dims": ["5"]}],
}


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="pip install 'clip-embed[rtx]'")


def as_triton_gives_it() -> dict:
    return json_format.MessageToDict(read_config(MODELS, "clip_trt"), preserving_proto_field_name=True)


class FakeCuda:
    """A device whose memory is host memory at other addresses."""

    def __init__(self) -> None:
        self.memory, self.log = {}, []

    def use_device(self) -> None:
        self.log.append("use")

    def new_stream(self) -> int:
        return 7

    def allocate(self, size_bytes: int) -> int:
        buffer = ctypes.create_string_buffer(size_bytes)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    allocate_pinned = allocate

    def copy_in(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        self.log.append(("in", size_bytes, stream))
        ctypes.memmove(device, host, size_bytes)

    def copy_out(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        self.log.append(("out", size_bytes, stream))
        ctypes.memmove(host, device, size_bytes)

    def wait_for(self, stream: int) -> None:
        self.log.append(("wait", stream))

    def capture(self, stream: int, enqueue):
        self.log.append(("capture", stream))
        return enqueue

    def launch(self, graph, stream: int) -> None:
        self.log.append(("launch", stream))
        graph()

    def free(self, stream: int, device: list[int], pinned: list[int]) -> None:
        for address in (*device, *pinned):
            del self.memory[address]


class FakeEngine:
    """pixels (-1, 2, 2, 3) -> embedding (-1, 5): each row is the image's first byte, five times."""

    num_io_tensors = 2

    def __init__(self, trt: ModuleType) -> None:
        self._trt, self.address, self.shape, self.shapes, self.config = trt, {}, None, [], None

    def get_tensor_name(self, index):
        return ("pixels", "embedding")[index]

    def get_tensor_mode(self, name):
        return self._trt.TensorIOMode.INPUT if name == "pixels" else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._trt.DataType.UINT8 if name == "pixels" else self._trt.DataType.FLOAT

    def get_tensor_shape(self, name):
        return (-1, 2, 2, 3) if name == "pixels" else (-1, 5)

    def get_tensor_profile_shape(self, _name, _profile):
        return [(1, 2, 2, 3), (2, 2, 2, 3), (4, 2, 2, 3)]

    def create_runtime_config(self):
        return SimpleNamespace()

    def create_execution_context(self, config=None):
        self.config = config
        return self

    def set_tensor_address(self, name, address):
        self.address[name] = address

    def set_input_shape(self, _name, shape):
        self.shape = shape
        return shape[0] <= 4

    def execute_async_v3(self, _stream):
        rows = self.shape[0]
        self.shapes.append(rows)
        pixels = np.ctypeslib.as_array((ctypes.c_uint8 * (rows * 12)).from_address(self.address["pixels"]))
        out = np.ctypeslib.as_array((ctypes.c_float * (rows * 5)).from_address(self.address["embedding"]))
        out[:] = np.repeat(pixels.reshape(rows, 12)[:, 0], 5)
        return True


def with_engine(trt: ModuleType, engine) -> SimpleNamespace:
    """TensorRT with a fake deserializer that returns `engine`; the real one needs a GPU."""
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine)
    return SimpleNamespace(
        Runtime=lambda _: runtime,
        Logger=trt.Logger,
        TensorIOMode=trt.TensorIOMode,
        __name__="tensorrt_rtx",
        __version__=trt.__version__,
    )


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(b"a plan")
    return path


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def runner(trt, plan, cuda) -> PlanRunner:
    return PlanRunner(plan, SMALL, trt=with_engine(trt, FakeEngine(trt)), cuda=cuda)


def images(*first_bytes: int) -> np.ndarray:
    array = np.zeros((len(first_bytes), 2, 2, 3), np.uint8)
    array[:, 0, 0, 0] = first_bytes
    return array


def test_the_tensors_of_an_engine_have_tritons_types(trt):
    assert plan_tensors(FakeEngine(trt), trt) == [
        PlanTensor("pixels", "TYPE_UINT8", (-1, 2, 2, 3), (1, 4)),
        PlanTensor("embedding", "TYPE_FP32", (-1, 5), None),
    ]


def test_the_committed_configuration_accepts_the_plan_it_was_written_for():
    check_contract(as_triton_gives_it(), [PIXELS, EMBEDDING])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([PlanTensor("image", "TYPE_UINT8", PIXELS.dims, (1, 64)), EMBEDDING], "input pixels, the plan image"),
        ([PlanTensor("pixels", "TYPE_FP32", PIXELS.dims, (1, 64)), EMBEDDING], "TYPE_UINT8, the plan TYPE_FP32"),
        ([PlanTensor("pixels", "TYPE_UINT8", (-1, 3, 224, 224), (1, 64)), EMBEDDING], r"\[3, 224, 224\]"),
        ([PIXELS, PlanTensor("embedding", "BF16", (-1, 512), None)], "TYPE_FP32, the plan BF16"),
        ([PIXELS, PlanTensor("embedding", "TYPE_FP32", (-1, 768), None)], r"\[512\], the plan \[768\]"),
        ([PlanTensor("pixels", "TYPE_UINT8", PIXELS.dims, (1, 32)), EMBEDDING], "accepts 1 to 32.*--max-batch 64"),
        ([PlanTensor("pixels", "TYPE_UINT8", PIXELS.dims, (8, 64)), EMBEDDING], "accepts 8 to 64"),
    ],
)
def test_a_plan_with_other_tensors_or_batches_is_refused(tensors, message):
    with pytest.raises(PlanError, match=message):
        check_contract(as_triton_gives_it(), tensors)


def test_requests_are_joined_run_once_and_come_back_in_order(runner, cuda):
    result = runner.run({"pixels": [images(1, 2), images(9)]})
    assert np.array_equal(result["embedding"], np.repeat([[1.0], [2.0], [9.0]], 5, axis=1).astype(np.float32))
    assert cuda.log == ["use", ("in", 3 * 12, 7), ("out", 3 * 5 * 4, 7), ("wait", 7)]


def test_a_smaller_batch_after_a_larger_one_has_only_its_own_rows(runner):
    runner.run({"pixels": [images(1, 2, 3, 4)]})
    assert runner.run({"pixels": [images(8)]})["embedding"].tolist() == [[8.0] * 5]


WITH_GRAPHS = SMALL | {"optimization": {"cuda": {"graphs": True, "graph_spec": [{"batch_size": 1}, {"batch_size": 4}]}}}


@pytest.mark.parametrize("captures_itself", [False, True], ids=["tensorrt", "tensorrt-rtx"])
def test_with_cuda_graphs_a_batch_is_padded_to_the_next_size_and_returns_only_its_own_rows(
    trt, plan, cuda, captures_itself
):
    """Each size has run when the plan is loaded. TensorRT for RTX captures the graphs itself."""
    engine = FakeEngine(trt)
    library = with_engine(trt, engine)
    if captures_itself:
        for name in ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy"):
            setattr(library, name, getattr(trt, name))
    runner = PlanRunner(plan, WITH_GRAPHS, trt=library, cuda=cuda)
    strategy = getattr(engine.config, "cuda_graph_strategy", None)
    assert strategy == (trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if captures_itself else None)
    assert engine.shapes == [1, 1, 4, 4]  # once before it is captured and once as it is served
    assert cuda.log.count(("capture", 7)) == (0 if captures_itself else 2)
    engine.shapes.clear()
    cuda.log.clear()
    assert runner.run({"pixels": [images(1, 2, 3, 4)]})["embedding"][:, 0].tolist() == [1, 2, 3, 4]
    assert runner.run({"pixels": [images(8), images(9)]})["embedding"].tolist() == [[8.0] * 5, [9.0] * 5]
    assert runner.run({"pixels": [images(7)]})["embedding"].tolist() == [[7.0] * 5]
    assert engine.shapes == [4, 4, 1]
    assert cuda.log.count(("launch", 7)) == (0 if captures_itself else 3)
    assert ("in", 2 * 12, 7) in cuda.log and ("out", 2 * 5 * 4, 7) in cuda.log


def test_a_graph_that_cannot_be_captured_fails_the_load_with_the_reason(trt, plan, cuda, monkeypatch):
    def fail(_stream, _enqueue):
        raise CudaError("cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated")

    monkeypatch.setattr(cuda, "capture", fail)
    with pytest.raises(PlanError, match=r"a batch of 1 cannot be captured .*Invalidated; .*graphs: false"):
        PlanRunner(plan, WITH_GRAPHS, trt=with_engine(trt, FakeEngine(trt)), cuda=cuda)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": [images(1, 2, 3), images(4, 5)]}, "1 to 4"),
        ({"pixels": []}, "1 to 4"),
        ({"pixels": [images(1).astype(np.float32)]}, "expected uint8"),
        ({"pixels": [np.zeros((1, 3, 2, 2), np.uint8)]}, r"expected uint8 \(2, 2, 3\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_the_device_sees_them(runner, cuda, columns, message):
    with pytest.raises(ValueError, match=message):
        runner.run(columns)
    assert [entry for entry in cuda.log if entry != "use"] == []


def test_close_frees_every_buffer(runner, cuda):
    runner.close()
    assert cuda.memory == {}


def test_a_plan_of_another_version_or_gpu_names_the_rebuild_command(trt, plan, cuda):
    with pytest.raises(PlanError, match=r"model.plan does not load in tensorrt_rtx .*`clip-tools build-engine`"):
        PlanRunner(plan, SMALL, trt=with_engine(trt, None), cuda=cuda)


def test_a_missing_plan_names_the_command_that_makes_it(trt, tmp_path, cuda):
    with pytest.raises(PlanError, match="`clip-tools build-engine`"):
        PlanRunner(tmp_path / "model.plan", SMALL, trt=trt, cuda=cuda)


def test_without_a_gpu_the_error_says_why_and_what_to_do():
    with pytest.raises(PlanError, match=r"needs an NVIDIA GPU.*without --model-config-name=trt"):
        check_machine("CPU")
    check_machine("GPU")


def installed(*names: str):
    def importer(name: str) -> ModuleType:
        if name not in names:
            raise ImportError(name)
        return ModuleType(name)

    return importer


def test_the_library_is_the_one_that_built_the_plan(plan):
    plan.with_name("manifest.json").write_text(json.dumps({"runtime": "tensorrt-rtx"}))
    assert find_tensorrt(plan, installed("tensorrt", "tensorrt_rtx")).__name__ == "tensorrt_rtx"
    with pytest.raises(PlanError, match=r"needs tensorrt-rtx, which is not installed here: pip install tensorrt-rtx"):
        find_tensorrt(plan, installed("tensorrt"))


def test_without_a_manifest_any_installed_tensorrt_is_used(plan):
    assert find_tensorrt(plan, installed("tensorrt_rtx")).__name__ == "tensorrt_rtx"
    with pytest.raises(PlanError, match="needs tensorrt or tensorrt-rtx"):
        find_tensorrt(plan, installed())


def test_a_manifest_of_an_unknown_runtime_is_refused(plan):
    plan.with_name("manifest.json").write_text(json.dumps({"runtime": "openvino"}))
    with pytest.raises(PlanError, match=r"'openvino': expected one of tensorrt, tensorrt-rtx"):
        find_tensorrt(plan, installed("tensorrt"))


class FakeRuntime:
    """cuda.bindings.runtime with one call, which returns `code`."""

    def __init__(self, code: int) -> None:
        self._code = code

    def cudaSetDevice(self, _device):
        return (_Code(self._code),)


class _Code(int):
    name = "cudaErrorNoDevice"


def test_a_failed_cuda_call_raises_its_name_and_error(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings", reason="pip install cuda-bindings")
    monkeypatch.setattr(bindings, "runtime", FakeRuntime(0), raising=False)
    cuda = Cuda(0)
    cuda._runtime = FakeRuntime(100)
    with pytest.raises(CudaError, match="cudaSetDevice: cudaErrorNoDevice"):
        cuda.use_device()


def test_a_gpu_that_cannot_be_used_is_an_error_that_asks_for_the_driver(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings", reason="pip install cuda-bindings")
    monkeypatch.setattr(bindings, "runtime", FakeRuntime(100), raising=False)
    with pytest.raises(PlanError, match=r"GPU 3 cannot be used: .*is the NVIDIA driver installed"):
        Cuda(3)


class Capturing:
    """cuda.bindings.runtime that records its calls. `ends` is the error code at the end of a capture."""

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")  # noqa: N815

    def __init__(self, ends: int = 0) -> None:
        self.log, self._ends = [], ends

    def __getattr__(self, name):
        def call(*arguments):
            self.log.append((name, *arguments))
            return _Code(self._ends if name == "cudaStreamEndCapture" else 0), name

        return call


def test_a_capture_is_begun_ended_and_made_ready_to_launch(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings", reason="pip install cuda-bindings")
    monkeypatch.setattr(bindings, "runtime", runtime := Capturing(), raising=False)
    cuda = Cuda(0)
    graph = cuda.capture(7, lambda: runtime.log.append("enqueue"))
    cuda.launch(graph, 7)
    assert runtime.log[1:] == [
        ("cudaStreamBeginCapture", 7, "thread"),
        "enqueue",
        ("cudaStreamEndCapture", 7),
        ("cudaGraphInstantiate", "cudaStreamEndCapture", 0),
        ("cudaGraphDestroy", "cudaStreamEndCapture"),
        ("cudaGraphLaunch", "cudaGraphInstantiate", 7),
    ]
    cuda._runtime = Capturing(ends=901)
    with pytest.raises(CudaError, match="cudaStreamEndCapture"):
        cuda.capture(7, lambda: None)


@pytest.mark.gpu
def test_a_real_plan_runs_on_a_real_gpu(tmp_path):
    """A network that computes the mean of each colour. It builds in a second."""
    try:
        cuda = Cuda(0)
    except PlanError as error:
        pytest.skip(str(error))
    trt = find_tensorrt(tmp_path / "model.plan")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    # TensorRT 11 and tensorrt_rtx accept only strongly typed networks, and 11 has no flag for that.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    pixels = network.add_input("pixels", trt.DataType.UINT8, (-1, 2, 2, 3))
    floats = network.add_cast(pixels, trt.DataType.FLOAT).get_output(0)
    embedding = network.add_reduce(floats, trt.ReduceOperation.AVG, 0b0110, False).get_output(0)
    embedding.name = "embedding"
    network.mark_output(embedding)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("pixels", (1, 2, 2, 3), (2, 2, 2, 3), (4, 2, 2, 3))
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        pytest.skip(f"{trt.__name__} {trt.__version__} does not build for this GPU")
    (tmp_path / "model.plan").write_bytes(bytes(serialized))
    declared = WITH_GRAPHS | {"output": [{"name": "embedding", "data_type": "TYPE_FP32", "dims": ["3"]}]}
    runner = PlanRunner(tmp_path / "model.plan", declared, trt=trt, cuda=cuda)
    batch = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    result = runner.run({"pixels": [batch[:1], batch[1:]]})["embedding"]
    runner.close()
    assert np.abs(result - batch.mean(axis=(1, 2))).max() < 1e-3  # FP32 resolves 2e-5 near 255
