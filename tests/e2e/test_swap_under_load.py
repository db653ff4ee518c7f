"""A real server changes its engine under load, and keeps the old one if the new one does not load."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.conftest import options_for, with_second_model
from tests.small_graph import write_small_graph

from clip_embed import EmbeddingClient
from clip_tools.errors import ToolError
from clip_tools.measuring.services import free_ports
from clip_tools.repository import read_config
from clip_tools.serving.model_control import GrpcModelControl
from clip_tools.serving.server import EmbeddedServer
from clip_tools.serving.swap import check_deployment, swap
from clip_tools.serving.swap_steps import SwapOptions
from clip_tools.tensorrt.build_engine import PlanOptions, build_engine

CLIP_TOOLS = Path(sys.executable).with_name("clip-tools")

CLIENTS = 4
# The same FP32 arithmetic in another process: docs/precision.md.
MIN_COSINE_FP32 = 0.99999
# BF16 vectors among FP32 ones during a change in place; `clip-tools verify` measures BF16 (test_lifecycle.py).
MIN_COSINE_BF16 = 0.9


@pytest.fixture(scope="module")
def models(light_repository, tmp_path_factory) -> Path:
    """The repository with a second ONNX model, `clip_copy`, which the configuration `copy` routes to."""
    folder = with_second_model(light_repository, tmp_path_factory.mktemp("swap") / "models", "copy")
    # A real plan, which needs a GPU to run; of a small graph, because no test embeds with it.
    pytest.importorskip("tensorrt_rtx", reason="pip install 'clip-embed[rtx]'")
    plan = folder / "clip_trt" / "1" / "model.plan"
    graph = write_small_graph(tmp_path_factory.mktemp("small") / "small.onnx")
    build_engine(graph, plan, PlanOptions(runtime="tensorrt-rtx", precision="fp32"))
    return folder


@pytest.fixture(scope="module")
def swapping(models, tmp_path_factory):
    """A server for this file alone, because its models change. It must stop at once, whatever failed to load.

    Triton 24.10 by itself takes 30 s to stop after a model failed to reload in place.
    """
    with EmbeddedServer(options_for(models, tmp_path_factory.mktemp("swap") / "log")) as running:
        yield running
        began = time.monotonic()
        running.stop()
    assert time.monotonic() - began < 20  # 6 s on two cores


@pytest.fixture
def control(swapping):
    with GrpcModelControl(swapping.options.grpc_url) as one:
        yield one


class Load:
    """Clients that embed one photograph after another until the block ends, and keep every answer and error."""

    def __init__(self, url: str, images: list[bytes]) -> None:
        self._url, self._images, self._stop = url, images, threading.Event()
        self.answers: list[tuple[int, np.ndarray]] = []
        self.errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with EmbeddingClient(self._url, retry=None) as client:  # a lost request must be seen
            turn = number
            while not self._stop.is_set():
                which = turn % len(self._images)
                try:
                    self.answers.append((which, client.embed([self._images[which]])[0]))
                except Exception as error:
                    self.errors.append(error)
                turn += 1

    def worst_cosine(self, expected: np.ndarray) -> float:
        return min(float(answer @ expected[which]) for which, answer in self.answers)


def is_ready(server) -> bool:
    """Whether /v2/health/ready, which a load balancer may ask, answers 200."""
    return httpx.get(f"{server.options.http_url}/v2/health/ready").status_code == 200


def embeddings(server, images) -> np.ndarray:
    with EmbeddingClient(server.options.grpc_url) as client:
        return client.embed(images)


def test_under_load_the_engine_changes_there_and_back_and_no_request_is_lost(swapping, control, models, demo_photos):
    images = [path.read_bytes() for path in demo_photos]
    before = embeddings(swapping, images)
    said = []
    with Load(swapping.options.grpc_url, images) as load:
        swap(control, SwapOptions("copy", models=models), said.append)
        between = embeddings(swapping, images)
        assert sorted(control.ready_models()) == ["clip_copy", "clip_ensemble", "preprocess"]
        swap(control, SwapOptions("onnx", models=models), said.append)
    assert load.errors == []
    assert len(load.answers) > 50
    assert load.worst_cosine(before) >= MIN_COSINE_FP32
    assert (between * before).sum(axis=1).min() >= MIN_COSINE_FP32
    assert said[-1].startswith("5/5 clip_copy unloaded")
    assert sorted(control.ready_models()) == ["clip_ensemble", "clip_onnx", "preprocess"]
    assert np.array_equal(embeddings(swapping, images), before)


@pytest.mark.usefixtures("bf16")
def test_under_load_a_precision_changes_in_place_and_no_request_is_lost(swapping, control, models, demo_photos):
    images = [path.read_bytes() for path in demo_photos]
    before = embeddings(swapping, images)
    with Load(swapping.options.grpc_url, images) as load:
        swap(control, SwapOptions("cpu-bf16", models=models), lambda _: None)
        bf16 = embeddings(swapping, images)
        swap(control, SwapOptions("cpu-fp32", models=models), lambda _: None)
    assert load.errors == []
    assert load.worst_cosine(before) >= MIN_COSINE_BF16
    assert (before * bf16).sum(axis=1).min() < 1 - 1e-6
    assert np.array_equal(embeddings(swapping, images), before)


@pytest.mark.usefixtures("no_bf16")
def test_a_precision_that_the_cpu_lacks_leaves_everything_as_before(swapping, control, models, demo_photos):
    images = [path.read_bytes() for path in demo_photos]
    before = embeddings(swapping, images)
    with Load(swapping.options.grpc_url, images) as load:
        with pytest.raises(ToolError, match="OpenVINO has no BF16 on this CPU"):
            swap(control, SwapOptions("cpu-bf16", models=models), lambda _: None)
        after = embeddings(swapping, images)
    assert load.errors == []
    assert np.array_equal(after, before)


def test_an_engine_that_does_not_load_leaves_everything_as_before(swapping, control, models, demo_photos):
    """clip_trt does not load on a machine without a GPU."""
    images = [path.read_bytes() for path in demo_photos]
    before, routes = embeddings(swapping, images), control.configuration("clip_ensemble")
    with Load(swapping.options.grpc_url, images) as load:
        done = subprocess.run(
            [str(CLIP_TOOLS), "swap", "trt", f"--models={models}", f"--url={swapping.options.grpc_url}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    if done.returncode == 0:
        pytest.skip("this machine has a GPU and runs the plan")
    assert done.returncode == 1
    assert "failed at step 1 of 7 (clip_trt loaded): clip_trt: a plan needs an NVIDIA GPU" in done.stderr
    assert done.stderr.rstrip().endswith("everything is as before")
    assert load.errors == []
    assert is_ready(swapping)
    assert sorted(control.ready_models()) == ["clip_ensemble", "clip_onnx", "preprocess"]
    assert control.configuration("clip_ensemble") == routes
    assert np.array_equal(embeddings(swapping, images), before)


def no_plan(folder: Path) -> None:
    (folder / "model.plan").unlink()


def another_versions_plan(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"runtime_version": "', '"runtime_version": "0.'))


def no_version_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.fixture(params=[no_plan, another_versions_plan, no_version_folder])
def damage(request, models, tmp_path):
    """Damages clip_trt's files during the test."""
    folder = models / "clip_trt" / "1"
    shutil.copytree(folder, tmp_path / "kept")
    request.param(folder)
    yield request.param
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folder)


def test_a_missing_or_incompatible_plan_is_refused_before_the_server_loads_anything(swapping, control, models, damage):
    """`serve` makes the same check."""
    with pytest.raises(ToolError, match="clip-tools build-engine"):
        check_deployment(swapping.options.grpc_url, SwapOptions("trt", models=models))
    # Another machine's files cannot be checked, so there the load fails.
    with pytest.raises(ToolError, match=r"step 1 of 5 \(clip_trt loaded\).*everything is as before"):
        swap(control, SwapOptions("trt", models=models), lambda _: None)
    assert is_ready(swapping)


def test_a_change_in_place_that_does_not_load_leaves_the_server_ready(swapping, control, models):
    config = read_config(models, "clip_onnx")
    config.optimization.execution_accelerators.cpu_execution_accelerator.add(name="none")
    with pytest.raises(ToolError, match="expected openvino"):
        control.load("clip_onnx", config)
    swap(control, SwapOptions("onnx", models=models), lambda _: None)
    assert is_ready(swapping)


def test_a_swap_makes_a_server_ready_again_after_another_failed_load(swapping, control, models):
    """Triton 24.10 itself stays not ready after a failed load."""
    with pytest.raises(ToolError, match="a plan needs an NVIDIA GPU"):
        control.load("clip_trt", read_config(models, "clip_trt"))
    assert not is_ready(swapping)
    said = []
    swap(control, SwapOptions("onnx", models=models), said.append)
    assert said == ["the server runs onnx already"]
    assert is_ready(swapping)
    # The model can still be loaded afterwards, as it is in the repository.
    with pytest.raises(ToolError, match="a plan needs an NVIDIA GPU"):
        swap(control, SwapOptions("trt", models=models), lambda _: None)


def test_serving_trt_without_a_gpu_says_what_to_do(models, tmp_path):
    with pytest.raises(ToolError, match=r"clip_trt: a plan needs an NVIDIA GPU.*without --model-config-name=trt"):
        EmbeddedServer(options_for(models, tmp_path / "log", config_name="trt")).__enter__()


def test_swap_names_the_flag_when_the_server_does_not_allow_loading(swapping, models):
    """The embedded server does allow it, so the test raises what Triton 24.10 answers otherwise."""
    message = "explicit model load / unload is not allowed if polling is enabled"
    with GrpcModelControl(swapping.options.grpc_url) as one, pytest.raises(ToolError, match="--model-control-mode"):
        from tritonclient.utils import InferenceServerException

        with one._our_errors():
            raise InferenceServerException(message, status="StatusCode.UNAVAILABLE")


def test_no_server_at_the_url_is_exit_code_3(models):
    (port,) = free_ports(1)
    done = subprocess.run(
        [str(CLIP_TOOLS), "swap", "trt", f"--models={models}", f"--url=grpc://localhost:{port}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr == f"clip-tools: nothing listens at grpc://localhost:{port}: start the server\n"
