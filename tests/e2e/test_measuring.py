"""Short runs of the verbs that measure, as commands. Their figures mean nothing."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from tests.conftest import options_for

from clip_embed import EmbeddingClient, InvalidImageError
from clip_tools.gpu import find_gpu
from clip_tools.measuring.results import read
from clip_tools.measuring.services import Service, free_ports, pytorch_service
from clip_tools.measuring.variants import Variant, write_repository
from clip_tools.serving.server import EmbeddedServer

CLIP_TOOLS = Path(sys.executable).with_name("clip-tools")
ARMS = ("ensemble-grpc", "ensemble-http", "tensor-grpc", "json-http", "pytorch")
PERF_ANALYZER = Path(sys.executable).with_name("perf-analyzer")


def run(*command: object, expected: int = 0) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pytorch(weights) -> Iterator[Service]:
    """The PyTorch service, shared by the tests that only send requests to it."""
    with pytorch_service(weights) as service:
        yield service


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("starts_all", [False, pytest.param(True, marks=pytest.mark.long)])
def test_bench_sends_the_same_photographs_through_every_arm(repository, pytorch, results, starts_all):
    """`bench` compares each answer with open_clip's and fails if one differs. An unmeasured target is not met.

    The short form has three of the five arms and uses the PyTorch service that runs already.
    """
    output, expected = results / "bench.json", ARMS if starts_all else ARMS[::2]
    options = ["--models", repository, "--output", output]
    if not starts_all:
        options += ["--pytorch-url", pytorch.url, "--arms", ",".join(expected)]
    printed = run(CLIP_TOOLS, "bench", "--quick", "--check", *options, expected=1)
    assert "| ensemble over gRPC against the PyTorch service, FP32 | >= 3.3 | not measured:" in printed
    result = read(output)
    arms = {row["arm"] for row in result["cells"]}
    assert arms == set(expected)
    assert all(row["agreement"] >= 0.99999 and row["throughput"] > 0 for row in result["cells"])
    assert {row["images"] for row in result["cells"]} == {"640x480"}
    row = next(row for row in result["cells"] if row["arm"] == "ensemble-grpc" and row["batch"] == 4)
    assert {step["model"]: step["batch"] for step in row["steps"]}["clip_onnx"] == 4
    assert any(name.startswith("nv_inference_count") for name in result["servers"]["triton"]["metrics"])


def test_bench_measures_servers_that_run_already(repository, vit_server, pytorch, tmp_path):
    """It starts no server and records on which device each one computes."""
    urls = ["--url", vit_server.options.grpc_url, "--pytorch-url", pytorch.url]
    printed = run(CLIP_TOOLS, "bench", "--quick", *urls, "--models", repository, "--output", tmp_path / "bench.json")
    result = read(tmp_path / "bench.json")
    device = "GPU" if find_gpu() else "CPU"
    assert result["devices"] == {"ensemble-grpc": device, "pytorch": device}
    assert f"| {device} |" in printed
    assert {row["arm"] for row in result["cells"]} == {"ensemble-grpc", "pytorch"}
    assert all(row["agreement"] >= 0.99999 and row["throughput"] > 0 for row in result["cells"])
    assert result["servers"] == {}
    vit_server.process.raise_if_ended()


def test_ab_compares_two_servers_and_shows_the_time_of_each_step(light_repository, server, tmp_path):
    """The second server preprocesses in mode `fast`."""
    with EmbeddedServer(options_for(light_repository, tmp_path / "log", config_name="fast")) as other:
        urls = (server.options.grpc_url, other.options.grpc_url)
        printed = run(CLIP_TOOLS, "ab", *urls, "--rounds", 2, "--seconds", 0.5, "--concurrency", 2)
        same = run(CLIP_TOOLS, "ab", urls[0], urls[0], "--rounds", 1, "--seconds", 0.3)
    for side, url in zip("AB", urls, strict=True):
        assert f"| {side} | {url} | " in printed
        for step in ("clip_ensemble", "clip_onnx", "preprocess"):
            assert re.search(rf"^\| {side} \| {step} \| [1-9]", printed, re.MULTILINE), printed
    assert re.search(r"B against A: [\d.]+ \([\d.]+ to [\d.]+, 2 rounds\) times", printed)
    assert float(re.search(r"vectors: ([\d.]+)\.", same)[1]) >= 0.99999


def test_bench_measures_preprocess_with_its_library_against_pillow(repository, results):
    output = results / "preprocess.json"
    printed = run(CLIP_TOOLS, "bench", "--preprocess", "--quick", "--models", repository, "--output", output)
    assert "| exact, 640x480, against Pillow | >= 2 | " in printed
    rows = read(output)["rows"]
    assert {(row["images"], row["mode"], row["resized_by"]) for row in rows} == set(
        itertools.product(("640x480", "phone"), ("exact", "fast"), ("library", "Pillow"))
    )
    resize = {row["resized_by"]: row["resize_s"] for row in rows if (row["images"], row["mode"]) == ("phone", "exact")}
    assert resize["library"] < resize["Pillow"]  # nine times faster, so the two were not confused


def test_an_environment_variable_moves_a_client_to_the_pytorch_service(
    vit_server, oracle, pytorch, demo_photos, monkeypatch
):
    """Both give the same vectors and name the bad image."""
    images = [path.read_bytes() for path in demo_photos[:3]]
    for url, backend in ((vit_server.options.grpc_url, "triton"), (pytorch.url, "pytorch")):
        monkeypatch.setenv("INFERENCE_SERVICE_URL", url)
        monkeypatch.setenv("INFERENCE_BACKEND", backend)
        with EmbeddingClient.from_env() as client:
            assert (client.embed(images) * oracle.embed(images)).sum(axis=1).min() >= 0.99999
            with pytest.raises(InvalidImageError) as caught:
                client.embed([images[0], b"no image"])
        assert [(failure.index, failure.code) for failure in caught.value.failures] == [(1, "not_an_image")]


def test_perf_runs_the_real_perf_analyzer(server, light_repository, results):
    address = server.options.grpc_url.removeprefix("grpc://")
    options = ["--url", address, "--models", light_repository, "--window-ms", 500, "--stability-percent", 999]
    levels = ["--concurrency", 2, "--request-rate", 4]
    printed = run(CLIP_TOOLS, "perf", *options, *levels, "--output", results / "perf.json")
    assert [level["mode"] for level in json.loads(printed)] == ["concurrency", "request-rate"]
    assert all(level["throughput"] > 0 for level in read(results / "perf.json")["levels"])
    assert (results / "perf.svg").read_text().startswith("<?xml")


@pytest.fixture(scope="module")
def perf_input(light_repository, tmp_path_factory) -> Path:
    """perf_analyzer's input file with photographs."""
    source = tmp_path_factory.mktemp("perf") / "input.json"
    run(CLIP_TOOLS, "perf", "--models", light_repository, "--write-input", source)
    return source


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_plain_perf_analyzer_needs_no_key_on_this_machine(server, perf_input, protocol):
    """The flags are those of its documentation. `clip-tools perf` wrote the photographs."""
    address = (server.options.grpc_url if protocol == "grpc" else server.options.http_url).partition("://")[2]
    photographs = ["--shape", "image_bytes:1", "--input-data", perf_input]
    printed = run(
        PERF_ANALYZER, "-m", "clip_ensemble", "-i", protocol, "-u", address, *photographs, "--request-count", 10
    )
    assert "Throughput:" in printed
    assert "Composing models" in printed  # it reads the statistics for these


@pytest.mark.long
def test_model_analyzer_measures_a_running_server(server, perf_input, tmp_path):
    """In its remote mode, with its own flags. Our wrapper adds the keys."""
    config = tmp_path / "config.yaml"
    flags = {"input-data": str(perf_input), "shape": "image_bytes:1"}
    flags |= {"measurement-request-count": 3, "stability-percentage": 999}
    config.write_text(json.dumps({"profile_models": {"clip_ensemble": {"perf_analyzer_flags": flags}}}))
    options = server.options
    command = [sys.executable, "-m", "clip_tools.measuring.model_analyzer", "profile", "-f", config]
    command += ["--triton-launch-mode=remote", "--reload-model-disable", "--client-protocol=grpc"]
    command += [f"--triton-http-endpoint={options.http_url.partition('://')[2]}"]
    command += [f"--triton-grpc-endpoint={options.grpc_url.partition('://')[2]}"]
    command += [f"--triton-metrics-url={options.metrics_url}", f"--perf-analyzer-path={PERF_ANALYZER}"]
    command += [f"--run-config-search-max-{name}=1" for name in ("concurrency", "instance-count", "model-batch-size")]
    command += ["--concurrency-sweep-disable", "--skip-detailed-reports", f"--export-path={tmp_path}"]
    command += [f"--checkpoint-directory={tmp_path}/checkpoints", f"--output-model-repository-path={tmp_path}/models"]
    run(*command)
    rows = (tmp_path / "results" / "metrics-model-inference.csv").read_text().splitlines()
    assert len(rows) >= 2 and rows[1].startswith("clip_ensemble")
    with EmbeddingClient(options.grpc_url) as client:
        assert client.is_ready()


def test_model_analyzer_profiles_the_ensemble(light_repository, tmp_path, results):
    """Two configurations. The batch limit is small, because it first sends twice as many requests at once."""
    models = write_repository(Variant(), tmp_path / "models", light_repository)
    for path in models.glob("*/config.pbtxt"):
        path.write_text(path.read_text().replace("max_batch_size: 64", "max_batch_size: 2"))
    http, grpc, metrics = free_ports(3)
    ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    folder = ["--folder", tmp_path / "analyzer", "--models", models]
    printed = run(CLIP_TOOLS, "profile", "--quick", *ports, *folder, "--output", results / "profile.json")
    assert "Model Analyzer measured 2 settings" in printed
    points = read(results / "profile.json")["points"]
    assert {point["variants"][0] for point in points} == {"clip_ensemble_config_default", "clip_ensemble_config_0"}


def test_the_sweep_continues_from_its_log(light_repository, results):
    log = results / "sweep.jsonl"
    options = ["--axes", "", "--window-ms", 500, "--stability-percent", 999, "--concurrency", 2]
    options += ["--models", light_repository, "--log", log, "--output", results / "sweep.json"]
    command = [CLIP_TOOLS, "sweep", *options]
    first = run(*command)
    assert "(as committed)" in first
    assert run(*command) == first  # nothing is measured again
    assert len(log.read_text().splitlines()) == 1


def test_onnx_profile_shows_operators_or_that_the_graph_is_fused(light_repository, results):
    output = results / "onnx-profile.json"
    options = ["--batches", "1,2", "--seconds", 0.1, "--operator-batch", 1]
    model = light_repository / "clip_onnx" / "1" / "model.onnx"
    options += ["--beside", model]  # itself
    printed = run(CLIP_TOOLS, "onnx-profile", *options, "--models", light_repository, "--output", output)
    assert f"`model.onnx` ({len(onnx.load(model).graph.node)} nodes, worst cosine" in printed
    paired = read(output)["beside"]
    assert {row["batch"] for row in paired["times"]} == {1, 2}
    assert all(graph["worst_cosine"] > 0.99999 for graph in paired["graphs"])
    served, *plain = read(output)["operators"]
    assert served["fused"] == bool(plain)  # OpenVINO fuses the whole graph
    shown = [served, *plain][-1]
    assert not shown["fused"] and shown["by_operator_ms"]["Gemm"] > 0
    assert (
        sum(shown["operators_by_provider"][shown["provider"]].values()) == shown["nodes_by_provider"][shown["provider"]]
    )


def test_serialisation_counts_the_bytes_of_each_format(results):
    run(CLIP_TOOLS, "serialisation", "--batches", "1,2", "--runs", 1, "--output", results / "serialisation.json")
    costs = {(cost["format"], cost["batch"]): cost for cost in read(results / "serialisation.json")["costs"]}
    assert costs["binary-fp32", 2]["sent_bytes"] == 2 * 3 * 224 * 224 * 4
    assert costs["binary-uint8", 2]["sent_bytes"] == 2 * 3 * 224 * 224
    assert costs["json", 1]["sent_bytes"] > 3 * costs["binary-fp32", 1]["sent_bytes"]


def test_report_renders_every_kind_of_result(results):
    """Runs last in this file, on the results of the other tests."""
    names = {"bench", "perf", "profile", "sweep", "onnx-profile", "serialisation", "preprocess"}
    if {path.stem for path in results.glob("*.json")} < names:
        pytest.skip("the other tests of this file did not run")
    run(CLIP_TOOLS, "report", results)
    words = (results / "benchmarks.md").read_text()
    assert all(f": {name}\n" in words for name in names)
    printed = run(CLIP_TOOLS, "compare", results / "bench.json", results / "bench.json")
    assert "too few rounds to tell" in printed
