"""The GPU host's environment: one CUDA version, and the server's Python finds the CUDA provider's libraries."""

import json
import mmap
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from clip_tools.gpu import find_gpu
from clip_tools.paths import BACKENDS, ROOT

REQUIREMENTS = ROOT / "requirements"
LATER = ["libcudnn.so.9", "libcufft.so.12", "libnvrtc.so.13"]  # opened when an operator needs them
DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}  # part of the driver: no wheel has them

SERVER = """
import json
from clip_tools.serving.tritonserver import find_installation
print(json.dumps(find_installation().environment))
"""
# Run by the Python of the server's models, in the server's environment. Prints which libraries are missing, and whether
# a CUDA session opens.
PROBE = """
import ctypes, json, sys
sys.path.append(sys.argv[1])
import onnxruntime, ort_session
ort_session._load_libraries("CUDAExecutionProvider")
missing = {}
for name in json.loads(sys.argv[3]):
    try:
        ctypes.CDLL(name)
    except OSError as error:
        missing[name] = str(error)
try:
    from pathlib import Path
    ort_session.open_session(Path(sys.argv[2]), ort_session.session_settings({}, "GPU", 0))
    said = "opened"
except ort_session.ConfigError as error:
    said = str(error)
print(json.dumps({"missing": missing, "said": said}))
"""


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^ ]+)", (REQUIREMENTS / name).read_text(), re.MULTILINE))


def needed(library: Path) -> list[str]:
    """The names of the libraries that a 64-bit ELF file links to."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        (table,), (size, count) = struct.unpack_from("<Q", elf, 32), struct.unpack_from("<HH", elf, 54)
        headers = [
            struct.unpack_from("<IIQQQQ", elf, table + size * i) for i in range(count)
        ]  # type, flags, offset, ...
        loaded = [(address, offset, length) for kind, _, offset, address, _, length in headers if kind == 1]
        begin, length = next((header[2], header[5]) for header in headers if header[0] == 2)
        entries = [struct.unpack_from("<QQ", elf, begin + 16 * i) for i in range(length // 16)]
        strings = next(value for tag, value in entries if tag == 5)
        at = next(offset + strings - address for address, offset, size in loaded if address <= strings < address + size)
        return [elf[at + value : elf.find(b"\0", at + value)].decode() for tag, value in entries if tag == 1]


def check(python: Path, model: Path) -> None:
    """Assert that the server's Python finds every library of the CUDA provider, except those of the driver."""
    tools = {**os.environ, "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT / 'client'}"}
    environment = json.loads(subprocess.run([python, "-c", SERVER], env=tools, check=True, capture_output=True).stdout)
    (provider,) = python.parents[1].glob("lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so")
    names = [name for name in needed(provider) if name not in DRIVER]
    assert {"libcublasLt.so.13", "libcudart.so.13"} <= set(names)
    done = subprocess.run(
        [python, "-c", PROBE, BACKENDS / "onnxruntime", model, json.dumps(names + LATER)],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["missing"] == {}
    if find_gpu() is None:  # then ONNX Runtime lacks only the driver, and the load fails
        assert "CUDAExecutionProvider is asked for, but ONNX Runtime fell back to CPUExecutionProvider" in found["said"]
        assert set(re.findall(r"error: (\S+): cannot open shared object", done.stderr)) <= DRIVER
    else:
        assert found["said"] == "opened"


def test_both_environments_have_the_same_versions():
    cpu, gpu = pins("all.txt"), pins("gpu.txt")
    assert {name: (cpu[name], gpu[name]) for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {}
    assert cpu.keys() - gpu.keys() == {"onnxruntime-openvino"}  # it has the import name of onnxruntime-gpu
    assert "onnxruntime-gpu" in gpu and "torch" in gpu


def test_all_packages_of_the_gpu_environment_are_for_one_cuda_version():
    """The version of PyTorch's CUDA toolkit. The others have its major version in their name or as their version."""
    gpu = pins("gpu.txt")
    major = gpu["cuda-toolkit"].split(".")[0]
    of_cuda = {name: match[1] for name in [*gpu, *pins("tensorrt.txt")] if (match := re.search(r"-cu(\d+)", name))}
    assert {"nvidia-cudnn-cu13", "nvidia-nvimgcodec-cu13", "tensorrt-cu13"} <= of_cuda.keys()
    assert set(of_cuda.values()) == {major}
    parts = ("nvidia-cublas", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc", "nvidia-nvjpeg", "cuda-bindings")
    assert {gpu[name].split(".")[0] for name in parts} == {major}


@pytest.mark.parametrize("name", ["gpu.txt", "tensorrt.txt"])
def test_the_pins_have_hashes_and_name_no_index(name):
    text = (REQUIREMENTS / name).read_text()
    assert "://" not in text and "index-url" not in text
    assert len(re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:", text, re.MULTILINE)) == len(pins(name))


def test_the_pinned_tensorrt_is_the_version_that_the_tensorrt_provider_links_to():
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not provider.is_file():
        pytest.skip("this environment's onnxruntime has no TensorRT provider: make setup-gpu")
    major = pins("tensorrt.txt")["tensorrt-cu13"].split(".")[0]
    assert f"libnvinfer.so.{major}" in needed(provider)


def test_the_servers_python_finds_the_cuda_providers_libraries(onnx_model):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this environment's onnxruntime has no CUDA provider: make setup-gpu, or make test-long")
    check(Path(sys.executable), onnx_model)


@pytest.mark.long
def test_the_libraries_are_found_in_a_fresh_environment_from_the_pins(onnx_model, tmp_path):
    """Downloads some GB, or takes them from uv's cache."""
    uv, python = Path(sys.executable).with_name("uv"), tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    sync = [uv, "pip", "sync", "-q", "--python", python, "--require-hashes", REQUIREMENTS / "gpu.txt"]
    subprocess.run(sync, check=True, capture_output=True)
    check(python, onnx_model)
