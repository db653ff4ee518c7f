"""The container's entry point, run as in the container, with the real tritonserver of the wheel."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from tests.small_graph import write_small_graph

from clip_embed import EmbeddingClient
from clip_tools.gpu import find_gpu
from clip_tools.measuring.services import free_ports
from clip_tools.serving.watchdog import stubs


@pytest.fixture
def start(light_model, tmp_path):
    """start(**variables) -> (process, gRPC URL, HTTP URL, log). The processes are killed after the test."""
    processes = []

    def run(**variables: str) -> tuple[subprocess.Popen, str, str, Path]:
        http, grpc, metrics = free_ports(3)
        log = tmp_path / "log"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {
            "PATH": path,
            "TMPDIR": str(tmp_path),
            "CLIP_ONNX_DIR": str(light_model.parent),
            "CLIP_CACHE_DIR": str(tmp_path / "cache"),
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRT_", "CLIP_", "SKIP_"))}
        flags = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        with log.open("w") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "clip_tools.container.entrypoint", *flags, "--http-address=127.0.0.1"],
                env={**kept, **own, **variables},
                stdout=sink,
                stderr=sink,
            )
        processes.append(process)
        return process, f"grpc://localhost:{grpc}", f"http://localhost:{http}", log

    yield run
    for process in processes:
        process.kill()
        process.wait()


def embed_when_ready(process: subprocess.Popen, url: str, images: list[bytes], log: Path) -> np.ndarray:
    deadline = time.monotonic() + 120
    with EmbeddingClient(url) as client:
        while not client.is_ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return client.embed(images)


def wait_for(log: Path, words: str) -> None:
    deadline = time.monotonic() + 120
    while words not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_onnx_only_serves_what_is_mounted_and_ends_on_sigterm(
    start, server, demo_photos, light_model, light_text_model, tmp_path
):
    """The text tower is mounted and served too."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for path in (*light_model.parent.glob("*.*"), light_text_model.parent):
        (mounted / (path.name if path.is_file() else "text")).symlink_to(path)
    images = [path.read_bytes() for path in demo_photos[:3]]
    process, grpc, http, log = start(SKIP_TRT_BUILD="1", CLIP_PREPROCESS_INSTANCES="3", CLIP_ONNX_DIR=str(mounted))
    got = embed_when_ready(process, grpc, images, log)
    with EmbeddingClient(server.options.grpc_url) as client:
        assert (client.embed(images) * got).sum(axis=1).min() >= 0.99999  # FP32 in another process
    assert httpx.get(f"{http}/v2/models/clip_ensemble/ready").status_code == 200  # the image's health check
    wait_for(log, "ready after")
    assert "clip_ensemble embeds, 3 processes for preprocess on " in log.read_text()
    assert log.read_text().count("the vectors match open_clip's") == 2  # for images and for texts
    with EmbeddingClient(grpc) as client:
        assert client.embed_text(["a dog"]).shape == (1, 512)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_the_server_is_replaced_when_a_models_process_is_killed(start, demo_photos):
    """The image's health check fails in between."""
    images = [demo_photos[0].read_bytes()]
    process, grpc, _, log = start(SKIP_TRT_BUILD="1")
    expected = embed_when_ready(process, grpc, images, log)
    wait_for(log, "ready after")
    health = [sys.executable, "-m", "clip_tools", "health", f"--url={grpc}"]
    assert subprocess.run(health, timeout=60, check=False).returncode == 0
    (server,) = (one for one in psutil.Process(process.pid).children() if one.name() == "tritonserver")
    lost = min(stubs(server.pid))
    os.kill(lost, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)  # so that no new server is ready before the check asks
    done = subprocess.run([*health, "--timeout-s=1"], timeout=60, check=False, capture_output=True, text=True)
    process.send_signal(signal.SIGCONT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert np.array_equal(embed_when_ready(process, grpc, images, log), expected)
    assert f"(process {lost}) has ended; a new server starts" in log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_a_start_for_tensorrt_without_a_gpu_exits_1_with_the_reason(start):
    process, _, _, log = start(TRT_PRECISION="fp32")
    code = process.wait(timeout=60)
    if "no GPU was found" not in log.read_text():
        pytest.skip("this machine has a GPU")
    assert code == 1
    last = log.read_text().splitlines()[-1]
    assert "no GPU was found" in last
    assert "SKIP_TRT_BUILD=1" in last


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_a_plan_is_built_and_handed_to_the_server_which_needs_a_gpu(start, tmp_path):
    """tensorrt-rtx builds it from a small graph."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'clip-embed[rtx]'")
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    write_small_graph(onnx / "model.onnx")
    process, _, _, log = start(TRT_RUNTIME="tensorrt-rtx", TRT_PRECISION="fp32", CLIP_ONNX_DIR=str(onnx))
    assert process.wait(timeout=120) == 1
    assert "TensorRT plan: building fp32" in log.read_text()
    assert "clip_trt: a plan needs an NVIDIA GPU, and this server sees none" in log.read_text()


def test_trt_fallback_serves_onnx_and_logs_it(start, demo_photos):
    variables = {"TRT_PRECISION": "fp32", "TRT_FALLBACK": "1", "CUDA_VISIBLE_DEVICES": ""}
    process, grpc, _, log = start(**variables)
    assert embed_when_ready(process, grpc, [demo_photos[0].read_bytes()], log).shape == (1, 512)
    assert "TRT_FALLBACK=1: serving the ONNX model through clip_onnx instead" in log.read_text()


def test_an_invalid_variable_exits_2_with_one_line(start):
    process, _, _, log = start(TRT_PRECISION="fp12")
    assert process.wait(timeout=60) == 2
    assert log.read_text() == "clip-embed: TRT_PRECISION=fp12: expected one of fp32, fp16, bf16, int8, fp8\n"
