"""How `backends/onnxruntime` turns a `config.pbtxt` into an ONNX Runtime session."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format

from clip_tools.gpu import find_gpu
from clip_tools.paths import MODELS
from clip_tools.repository import read_config
from ort_session import (
    ConfigError,
    SessionSettings,
    check_contract,
    check_settings,
    computes_bf16,
    open_session,
    session_settings,
)

CPU = ("CPUExecutionProvider", {})
OPENVINO = ("OpenVINOExecutionProvider", CPU[0])  # the providers of an environment without CUDA


def as_triton_gives_it(config_name: str | None = None) -> dict:
    return json_format.MessageToDict(read_config(MODELS, "clip_onnx", config_name), preserving_proto_field_name=True)


def accelerated(kind: str, name: str, **parameters: str) -> dict:
    accelerator = {"name": name, "parameters": parameters}
    return {"optimization": {"execution_accelerators": {f"{kind}_execution_accelerator": [accelerator]}}}


def hint(settings) -> str:
    return json.loads(settings.providers[0][1]["load_config"])["CPU"]["INFERENCE_PRECISION_HINT"]


def test_the_default_on_a_cpu_is_openvino_in_fp32():
    settings = session_settings(as_triton_gives_it(), "CPU", 0, available=OPENVINO)
    assert settings.providers[0][0] == "OpenVINOExecutionProvider"
    assert hint(settings) == "f32"


@pytest.mark.parametrize("name", [None, "cpu-fp32"], ids=["by default", "by name"])
def test_without_openvino_onnx_runtimes_cpu_provider_runs_fp32_and_the_log_says_so(name):
    """So the environment of `make setup-gpu` also serves on a machine without a GPU."""
    settings = session_settings(as_triton_gives_it(name), "CPU", 0, available=["CUDAExecutionProvider", CPU[0]])
    assert settings.providers == [CPU]
    assert settings.names == ["ONNX Runtime FP32 on the CPU, as OpenVINO is not installed"]


def test_without_openvino_bf16_is_refused_with_what_to_install():
    settings = session_settings(as_triton_gives_it("cpu-bf16"), "CPU", 0, available=[CPU[0]])
    if settings.providers[0][0] in onnxruntime.get_available_providers():
        pytest.skip("this environment has OpenVINO")
    with pytest.raises(ConfigError, match=r"OpenVINOExecutionProvider is asked for.*onnxruntime-openvino"):
        open_session(Path("model.onnx"), settings)


def test_the_default_on_a_gpu_is_cuda_on_the_instances_device():
    """With CUDA graphs, in FP32, and without a search for convolution algorithms at each new batch size."""
    settings = session_settings(as_triton_gives_it(), "GPU", 1)
    name, options = settings.providers[0]
    assert (name, options.pop("cudnn_conv_algo_search")) == ("CUDAExecutionProvider", "HEURISTIC")
    assert options == {"device_id": "1", "use_tf32": "0", "enable_cuda_graph": "1"}
    assert (settings.gpu, settings.graphs, settings.max_batch) == (1, True, 64)


def test_on_a_cpu_nothing_is_bound_or_captured():
    settings = session_settings(as_triton_gives_it(), "CPU", 0)
    assert (settings.gpu, settings.graphs) == (None, False)


def test_bf16_is_a_named_configuration():
    assert hint(session_settings(as_triton_gives_it("cpu-bf16"), "CPU", 0)) == "bf16"


def test_bf16_on_a_cpu_without_it_is_refused(monkeypatch, openvino, tiny_model):
    """Even if only one of several parts is in BF16."""
    monkeypatch.setattr("ort_session.computes_bf16", lambda: False)
    mixed = accelerated("cpu", "openvino_bf16", parts="fp32 bf16")
    for config in (as_triton_gives_it("cpu-bf16"), mixed):
        with pytest.raises(ConfigError, match="OpenVINO has no BF16 on this CPU"):
            check_settings(session_settings(config, "CPU", 0))
    with pytest.raises(ConfigError, match="OpenVINO has no BF16 on this CPU"):
        open_session(tiny_model, session_settings(as_triton_gives_it("cpu-bf16"), "CPU", 0))
    check_settings(session_settings(accelerated("cpu", "openvino_bf16", parts="fp32 fp32"), "CPU", 0))


@pytest.mark.usefixtures("openvino")
def test_computes_bf16_detects_whether_the_cpu_has_bf16():
    """OpenVINO needs AVX-512 or AVX2-VNNI-2 for BF16, and Linux lists only AVX-512."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}:
        assert computes_bf16()
    elif not flags & {"avx_vnni", "avx512f"}:
        assert not computes_bf16()


def test_threads_reach_onnx_runtime_and_openvino():
    config = accelerated("cpu", "openvino") | {"parameters": {"intra_op_thread_count": {"string_value": "3"}}}
    settings = session_settings(config, "CPU", 0, available=OPENVINO)
    assert settings.intra_op_threads == 3
    device = json.loads(settings.providers[0][1]["load_config"])["CPU"]
    assert device["INFERENCE_NUM_THREADS"] == "3"
    assert device["ENABLE_CPU_PINNING"] == "NO"  # pinned, two one-thread instances shared a core: half as fast


def test_tensorrt_comes_before_cuda_and_takes_tritons_parameter_names():
    config = accelerated("gpu", "tensorrt", precision_mode="FP16", trt_engine_cache_enable="1")
    (first, options), (second, _), _ = session_settings(config, "GPU", 0).providers
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options == {"device_id": "0", "trt_fp16_enable": "1", "trt_engine_cache_enable": "1"}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("CPU", accelerated("cpu", "tensorrt")),
        ("GPU", accelerated("gpu", "openvino")),
        ("GPU", accelerated("gpu", "tensorrt", precision_mode="FP8")),
        ("GPU", accelerated("gpu", "tensorrt", precison_mode="FP16")),
        ("GPU", {"parameters": {"cudnn_conv_algo_search": {"string_value": "HEURISTIC"}}}),
        ("GPU", {"optimization": accelerated("gpu", "tensorrt")["optimization"] | {"cuda": {"graphs": True}}}),
    ],
)
def test_unknown_settings_are_refused_and_not_ignored(kind, config):
    with pytest.raises(ConfigError, match=r"expected|unknown"):
        session_settings(config, kind, 0)


def test_a_missing_provider_is_refused_with_what_to_install():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this environment has the CUDA provider")
    with pytest.raises(ConfigError, match=r"CUDAExecutionProvider is asked for.*onnxruntime-gpu"):
        open_session(Path("model.onnx"), session_settings({}, "GPU", 0))


def test_a_provider_that_cannot_be_used_fails_the_load(tiny_model, capfd):
    """ONNX Runtime itself silently falls back, for CUDA without a GPU and for OpenVINO without its device."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        if find_gpu():
            pytest.skip("CUDA can be used here")
        settings = session_settings({}, "GPU", 0)
    else:
        settings = SessionSettings([("OpenVINOExecutionProvider", {"device_type": "GPU.9"}), CPU])
    with pytest.raises(
        ConfigError, match=rf"{settings.providers[0][0]} is asked for, but ONNX Runtime fell back to CPU"
    ):
        open_session(tiny_model, settings)
    assert "Failed to create" in capfd.readouterr().err


def test_a_session_does_not_fall_back_to_the_cpu_when_a_request_fails(tiny_model):
    """By default ONNX Runtime would switch to the CPU provider, and stay on it."""
    session = open_session(tiny_model, session_settings({}, "CPU", 0))

    class Failing:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def run(self, *_):
            raise onnxruntime.capi.onnxruntime_pybind11_state.EPFail("the GPU is gone")

    session._sess = Failing(session._sess)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.EPFail, match="the GPU is gone"):
        session.run(["embedding"], {"pixels": np.zeros((1, 224, 224, 3), np.uint8)})


def test_a_missing_model_file_says_how_to_make_it(tmp_path):
    with pytest.raises(ConfigError, match="clip-tools export-onnx"):
        open_session(tmp_path / "model.onnx", session_settings({}, "CPU", 0))


def test_a_damaged_model_file_is_named_with_what_to_do(tmp_path, tiny_model):
    damaged = tmp_path / "model.fp16.onnx"
    damaged.write_bytes(tiny_model.read_bytes()[:100_000])
    with pytest.raises(
        ConfigError, match=r"cannot load .*model\.fp16\.onnx.*clip-tools export-onnx --precision fp16"
    ) as error:
        open_session(damaged, session_settings({}, "CPU", 0))
    assert "\n" not in str(error.value)
    assert "graphs" not in str(error.value)
    with pytest.raises(ConfigError, match=r"; optimization.cuda.graphs: false turns CUDA graphs off"):
        open_session(damaged, replace(session_settings({}, "CPU", 0), graphs=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": [{"name": "image", "data_type": "TYPE_UINT8", "dims": ["224", "224", "3"]}]}, "not in the graph"),
        ({"input": [{"name": "pixels", "data_type": "TYPE_FP32", "dims": ["224", "224", "3"]}]}, "TYPE_FP32"),
        ({"output": [{"name": "embedding", "data_type": "TYPE_FP32", "dims": ["768"]}]}, "768"),
    ],
)
def test_a_graph_with_other_tensors_is_refused(tiny_model, change, message):
    session = open_session(tiny_model, session_settings({}, "CPU", 0))
    config = as_triton_gives_it()
    check_contract(config, session)
    with pytest.raises(ConfigError, match=message):
        check_contract(config | change, session)
