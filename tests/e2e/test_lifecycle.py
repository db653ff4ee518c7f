"""How the embedded server starts, stops and is configured, and its error messages."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.conftest import options_for

from clip_embed import EmbeddingClient
from clip_tools.errors import ToolError
from clip_tools.serving.ports import check_ports
from clip_tools.serving.serve import warning_if_untrained
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer
from clip_tools.serving.watchdog import stubs

CLIP_TOOLS = Path(sys.executable).with_name("clip-tools")
TRITONSERVER = Path(sys.executable).with_name("tritonserver")


def serve_command(options, *more: str) -> list[str]:
    ports = [f"--{name}-port={getattr(options, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
    return [str(CLIP_TOOLS), "serve", f"--models={options.models}", *ports, *more]


def refused(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def wait_for(stream, words: str) -> str:
    seen = ""
    for line in stream:
        seen += line
        if words in line:
            return line
    raise AssertionError(f"{words!r} never came:\n{seen}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_ready_stops_on_a_signal_and_leaves_nothing(light_repository, tmp_path, number):
    """A proxy in the environment, which cannot reach the local server, is not used. `serve` says how many processes
    decode, and removes its temporary folder."""
    options = options_for(light_repository, tmp_path / "log")
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    environment |= {"CLIP_PREPROCESS_INSTANCES": "3", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        serve_command(options, "--log-verbose=0"), stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert ", 3 processes for preprocess on " in wait_for(process.stderr, "ready after")
        (server,) = (one for one in psutil.Process(process.pid).children() if "tritonserver" in one.name())
        assert sum(stub.instance.startswith("preprocess") for stub in stubs(server.pid).values()) == 3
        assert list(tmp_path.glob("clip-tools-served-*"))
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("tritonserver" in child.name() for child in children)
        process.send_signal(number)
        assert process.stderr.read().endswith("\nclip-tools: the server was stopped\n")
        assert process.wait(timeout=60) == 0
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert list(Path("/dev/shm").glob(f"clip_tools_{process.pid}_*")) == []  # noqa: S108
    assert list(tmp_path.glob("clip-tools-served-*")) == []


def test_a_signal_while_the_models_load_stops_serve(repository, tmp_path):
    options = options_for(repository, tmp_path / "log")
    with subprocess.Popen(serve_command(options), stderr=subprocess.PIPE, text=True) as process:
        wait_for(process.stderr, "loading: clip_onnx")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert "ready after" not in process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def test_serve_warns_about_untrained_weights(repository, weights):
    words = warning_if_untrained(ServeOptions(models=repository))
    assert ("UNTRAINED" in words) == (weights.seed is not None)


def test_a_server_restarts_on_the_same_ports(light_repository, demo_photos, tmp_path):
    options = options_for(light_repository, tmp_path / "log")
    answers = []
    for _ in range(2):
        with EmbeddedServer(options), EmbeddingClient(options.grpc_url) as client:
            answers.append(client.embed(demo_photos[:1]))
    assert np.array_equal(*answers)


def test_when_serve_is_killed_the_server_and_its_models_processes_go_too(light_repository, tmp_path):
    """Hung processes and shared memory go too, so another `serve` can have the ports at once."""
    options = options_for(light_repository, tmp_path / "log")
    with subprocess.Popen(serve_command(options), stderr=subprocess.PIPE, text=True) as process:
        wait_for(process.stderr, "ready after")
        children = psutil.Process(process.pid).children(recursive=True)
        hung = [child for child in children if "preprocess" in " ".join(child.cmdline())]
        for child in hung:
            child.suspend()
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=20)
        process.stderr.read()
    assert hung != []
    assert alive == []
    assert list(Path("/dev/shm").glob(f"clip_tools_{process.pid}_*")) == []  # noqa: S108
    check_ports(options)


@pytest.mark.usefixtures("bf16")
def test_bf16_is_served_by_name_and_is_not_fp32(light_repository, server, demo_photos, tmp_path):
    """The requested precision runs: its vectors are close to FP32's, but not equal.

    `clip-tools verify` measures its exactness. Ten photographs with these weights may have a cosine of 0.96.
    """
    with EmbeddingClient(server.options.grpc_url) as client:
        fp32 = client.embed(demo_photos)
    options = options_for(light_repository, tmp_path / "log", config_name="cpu-bf16")
    with EmbeddedServer(options), EmbeddingClient(options.grpc_url) as client:
        bf16 = client.embed(demo_photos)
    assert "OpenVINO BF16" in options.log.read_text()
    assert 1e-6 < 1 - (fp32 * bf16).sum(axis=1).min() < 0.1


@pytest.mark.usefixtures("no_bf16")
def test_a_cpu_without_bf16_does_not_serve_fp32_under_that_name(light_repository, tmp_path):
    """OpenVINO itself would silently compute in FP32."""
    options = options_for(light_repository, tmp_path / "log", config_name="cpu-bf16")
    with pytest.raises(ToolError, match=r"OpenVINO has no BF16 on this CPU.*serve the default configuration"):
        EmbeddedServer(options).__enter__()


@pytest.mark.usefixtures("openvino")
def test_the_log_names_the_runtime_and_the_precision(server):
    assert "runs model.onnx with OpenVINO FP32 on the CPU" in server.options.log.read_text()


@pytest.mark.promise
def test_a_port_in_use_names_the_port_and_the_flag(light_repository, tmp_path, record_reliability):
    options = options_for(light_repository, tmp_path / "log")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", options.grpc_port))
        taken.listen()
        code, words = refused(*serve_command(options))
    assert code == 1
    assert f"port {options.grpc_port} (gRPC)" in words
    assert "--grpc-port" in words
    assert words.count("\n") == 1
    record_reliability("faults_port_taken", faults=1)


def test_a_missing_model_file_is_one_line_with_the_command(light_repository, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(light_repository, models)
    (models / "clip_onnx" / "1" / "model.onnx").unlink()
    code, words = refused(*serve_command(options_for(models, tmp_path / "log")))
    assert code == 1
    assert "clip-tools export-onnx" in words
    assert words.count("\n") == 1


def test_an_unknown_execution_accelerator_fails_the_load_with_the_known_one(light_repository, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(light_repository, models, symlinks=True)
    config = models / "clip_onnx" / "configs" / "cpu-fp32.pbtxt"
    config.write_text(config.read_text().replace('"openvino"', '"tensorrt"'))
    with pytest.raises(ToolError, match="cpu_execution_accelerator 'tensorrt': expected openvino"):
        EmbeddedServer(options_for(models, tmp_path / "log", config_name="cpu-fp32")).__enter__()


def test_an_unknown_configuration_name_is_refused_with_the_known_ones(light_repository, tmp_path):
    code, words = refused(*serve_command(options_for(light_repository, tmp_path / "log"), "--model-config-name=fp12"))
    assert code == 1
    assert "cpu-bf16" in words


def test_numpy_2_is_refused_before_it_stops_a_models_process(monkeypatch):
    from clip_tools.serving import tritonserver

    monkeypatch.setattr(tritonserver.importlib.metadata, "version", lambda _: "2.4.6")
    with pytest.raises(ToolError, match=r"numpy 2.4.6 .* pip install 'numpy<2'"):
        tritonserver.find_installation()


def test_the_wrapper_takes_plain_tritonserver_flags(light_repository, demo_photos, tmp_path):
    """Model Analyzer calls it in this way."""
    options = options_for(light_repository, tmp_path / "log")
    command = [
        str(TRITONSERVER),
        f"--model-repository={light_repository}",
        "--model-control-mode=explicit",
        "--load-model=clip_ensemble",
        f"--http-port={options.http_port}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-port={options.metrics_port}",
    ]
    with options.log.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            with EmbeddingClient(options.grpc_url) as client:
                deadline = time.monotonic() + 120
                while not client.is_ready() and time.monotonic() < deadline and process.poll() is None:
                    time.sleep(0.1)
                assert client.embed(demo_photos[:1]).shape == (1, 512)
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_clip_embed_reports_the_bad_file_and_keeps_the_others(server, demo_photos, tmp_path):
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"\xff\xd8\xff broken")
    done = subprocess.run(
        [
            str(CLIP_TOOLS.with_name("clip-embed")),
            *(str(path) for path in (demo_photos[0], bad, demo_photos[1])),
            "--url",
            server.options.grpc_url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [Path(line["path"]).name for line in lines] == [demo_photos[0].name, demo_photos[1].name]
    assert "broken.jpg" in done.stderr
