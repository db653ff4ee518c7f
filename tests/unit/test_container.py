"""What the container decides before it serves, and the files of its image. Docker itself is not run."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tests.small_graph import write_small_graph

from clip_tools.container import build as container_build
from clip_tools.container import entrypoint
from clip_tools.container.build import export, plan_path, served_tensorrt_version
from clip_tools.container.container_repository import set_max_batch, write_container_repository
from clip_tools.container.server import READY_TIMEOUT_S, options_in
from clip_tools.container.settings import Settings
from clip_tools.container.start import Available, Start, decide_start, find_available
from clip_tools.errors import ToolError
from clip_tools.paths import MODELS, ROOT
from clip_tools.repository import config_names, deployment, read_config
from clip_tools.serving.machine import Machine
from clip_tools.serving.vector_check import WrongVectors

GRAPHS = {"model.onnx": Path("/onnx/model.onnx"), "model.fp16.onnx": Path("/onnx/model.fp16.onnx")}
FOUND = Available(onnx=GRAPHS, can_export=False, gpu="NVIDIA L4, 8.9", onnx_engine_file="model.onnx")


class Recorder(Mapping):
    """An environment that records which variables are read."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getitem__(self, name):
        self.asked.add(name)
        raise KeyError(name)

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


def variables() -> set[str]:
    recorder = Recorder()
    Settings.from_environment(recorder)
    return recorder.asked


CPU = Machine(cores=2, has_gpu=False)


def test_the_default_start_is_an_fp16_plan_of_the_mounted_graph():
    assert decide_start(Settings.from_environment({}), FOUND) == Start(
        exports=(), graph="model.fp16.onnx", config_name="trt"
    )


def test_each_variable_reaches_its_setting():
    settings = Settings.from_environment(
        {
            "TRT_PRECISION": "int8",
            "TRT_OPT_BATCH": "8",
            "TRT_MAX_BATCH": "32",
            "TRT_FALLBACK": "1",
            "SKIP_TRT_BUILD": "0",
            "CLIP_PREPROCESS_INSTANCES": "12",
        }
    )
    assert (settings.preprocess_instances, Settings.from_environment({}).preprocess_instances) == (12, None)
    assert (settings.precision, settings.opt_batch, settings.max_batch) == ("int8", 8, 32)
    assert (settings.fallback, settings.skip_build) == (True, False)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TRT_PRECISION": "fp12"}, "TRT_PRECISION=fp12: expected one of fp32, fp16"),
        ({"TRT_FP16": "yes"}, "TRT_FP16=yes: expected 1 or 0"),
        (
            {"TRT_FP16": "0", "TRT_PRECISION": "fp16"},
            "TRT_FP16=0 means TRT_PRECISION=fp32, but TRT_PRECISION=fp16",
        ),
        ({"TRT_FP16": "1", "TRT_PRECISION": "int8"}, "TRT_FP16=1 means TRT_PRECISION=fp16, but TRT_PRECISION=int8"),
        ({"TRT_MAX_BATCH": "many"}, "TRT_MAX_BATCH=many: expected a whole number from 1"),
        ({"TRT_MAX_BATCH": "0"}, "TRT_MAX_BATCH=0"),
        ({"CLIP_PREPROCESS_INSTANCES": "all"}, "CLIP_PREPROCESS_INSTANCES=all: expected a whole number from 1"),
        ({"TRT_MAX_BATCH": "8", "TRT_OPT_BATCH": "16"}, "TRT_OPT_BATCH=16: expected at most TRT_MAX_BATCH, 8"),
        ({"SKIP_TRT_BUILD": "yes"}, "SKIP_TRT_BUILD=yes: expected 1"),
        ({"TRT_RUNTIME": "openvino"}, "TRT_RUNTIME=openvino: expected one of tensorrt, tensorrt-rtx"),
        ({"CLIP_CONFIG_NAME": "ort-trt"}, "CLIP_CONFIG_NAME=ort-trt.*requires SKIP_TRT_BUILD=1"),
    ],
)
def test_an_invalid_variable_is_named_with_what_was_expected(environment, message):
    with pytest.raises(ToolError, match=message) as caught:
        Settings.from_environment(environment)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("value", "precision"), [("0", "fp32"), ("1", "fp16"), ("", "fp16")])
def test_trt_fp16_sets_the_precision(value, precision):
    """Other containers have this variable. Compose passes unset variables as empty."""
    assert Settings.from_environment({"TRT_FP16": value, "TRT_PRECISION": ""}).precision == precision
    assert Settings.from_environment({"TRT_FP16": value, "TRT_PRECISION": precision}).precision == precision


def test_onnx_only_builds_nothing_and_needs_no_gpu():
    start = decide_start(Settings(skip_build=True), replace(FOUND, gpu=None))
    assert start == Start(exports=(), graph=None, config_name=None)


def test_a_named_onnx_engine_needs_its_own_graph():
    settings = Settings(skip_build=True, config_name="ort-trt")
    found = replace(FOUND, onnx={"model.onnx": GRAPHS["model.onnx"]}, onnx_engine_file="model.fp16.onnx")
    with pytest.raises(ToolError, match=r"model.fp16.onnx is missing.*--precision fp16"):
        decide_start(settings, found)
    assert decide_start(settings, FOUND).config_name == "ort-trt"


def test_the_error_for_a_missing_graph_says_how_to_export_and_where_to_mount_it():
    with pytest.raises(ToolError, match=r"model.int8.onnx.*export-onnx --precision int8.*mount.*WITH_EXPORT=1"):
        decide_start(Settings(precision="int8"), FOUND)


def test_a_missing_graph_is_exported_where_torch_is_installed():
    assert decide_start(Settings(), replace(FOUND, onnx={}, can_export=True)).exports == ("fp16",)


def test_a_missing_gpu_is_an_error_before_anything_is_built():
    with pytest.raises(ToolError, match=r"no GPU was found.*--gpus all.*SKIP_TRT_BUILD=1"):
        decide_start(Settings(), replace(FOUND, gpu=None))


def test_the_mounted_graph_takes_precedence_over_the_exported_one(tmp_path):
    settings = Settings(onnx_dir=tmp_path / "onnx", cache_dir=tmp_path / "cache")
    for folder in (settings.onnx_dir, container_build.exported_dir(settings)):
        folder.mkdir(parents=True)
        (folder / "model.onnx").touch()
    assert find_available(settings).onnx == {"model.onnx": settings.onnx_dir / "model.onnx"}


@pytest.mark.parametrize(("name", "message"), [("fp12", "expected one of .*ort-trt"), ("trt", "remove SKIP_TRT_BUILD")])
def test_without_a_plan_only_an_onnx_engine_is_accepted(name, message, tmp_path):
    with pytest.raises(ToolError, match=message):
        find_available(Settings(skip_build=True, config_name=name, onnx_dir=tmp_path, cache_dir=tmp_path))


def test_the_volume_has_one_plan_for_each_graph_gpu_version_and_option(tmp_path):
    graphs = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for graph in graphs:
        graph.write_text(graph.name)
    plain = Settings(cache_dir=tmp_path)
    paths = {
        plan_path(plain, graphs[0], "L4", "10.1"),
        plan_path(plain, graphs[1], "L4", "10.1"),
        plan_path(plain, graphs[0], "A10", "10.1"),
        plan_path(plain, graphs[0], "L4", "10.2"),
        plan_path(replace(plain, max_batch=32), graphs[0], "L4", "10.1"),
        plan_path(replace(plain, opt_batch=32), graphs[0], "L4", "10.1"),
        plan_path(replace(plain, runtime="tensorrt-rtx"), graphs[0], "L4", "10.1"),
    }
    assert len(paths) == 7
    assert plan_path(plain, graphs[0], "L4", "10.1") in paths


def engines(build=None, stale=lambda _plan, **_: None) -> SimpleNamespace:
    """A fake clip_tools.tensorrt.build_engine. It runs in another process; `built` has the options of each call."""
    manager = multiprocessing.get_context("fork").Manager()
    built = manager.list()

    def build_engine(graph, plan, options):
        built.append(options)
        if build:
            build()
        plan.write_bytes(b"plan")
        plan.with_name("manifest.json").write_text("{}")

    return SimpleNamespace(
        build_engine=build_engine,
        stale_reason=stale,
        PlanOptions=lambda **options: options,
        built=built,
        manager=manager,
    )


@pytest.fixture
def container(tmp_path, monkeypatch):
    """The start of a container with a fake GPU: `install` a builder, `start` it, read its `log`."""
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    for name in GRAPHS:
        (onnx / name).write_text(name)
    settings = Settings(onnx_dir=onnx, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("clip_tools.container.start.gpu_name", lambda: "NVIDIA L4, 8.9")
    monkeypatch.setattr(container_build, "_runtime_version", lambda _: "10.13.3.9")
    log: list[str] = []
    starts = iter(range(9))

    def install(module) -> None:
        monkeypatch.setitem(sys.modules, "clip_tools.tensorrt.build_engine", module)

    def start(*, with_plan=True, **changes) -> tuple[list[str], Path]:
        folder = tmp_path / f"served{next(starts)}"
        return entrypoint.prepare(replace(settings, **changes), folder, log.append, with_plan=with_plan), folder

    return SimpleNamespace(start=start, log=log, install=install)


def test_the_first_start_builds_the_plan_and_the_second_reuses_it(container):
    module = engines()
    container.install(module)
    for _ in range(2):
        command, folder = container.start()
        assert command[-1] == "--model-config-name=trt"
        assert (folder / "clip_trt" / "1" / "model.plan").read_bytes() == b"plan"
        assert (folder / "clip_trt" / "1" / "manifest.json").is_file()
        assert (folder / "clip_onnx" / "1" / "model.onnx").is_file()
    assert len(module.built) == 1
    assert module.built[0] == {
        "runtime": "tensorrt",
        "precision": "fp16",
        "min_batch": 1,
        "opt_batch": 16,
        "max_batch": 64,
    }
    assert "TensorRT plan: using" in container.log[-1]


@pytest.mark.parametrize(("precision", "of"), [("fp32", "onnx"), ("fp16", "exported")])
def test_each_graph_has_its_own_manifest_and_the_served_one_its_sample(container, tmp_path, precision, of):
    """One graph is mounted, the other was exported earlier."""
    container.install(engines())
    exported = container_build.exported_dir(Settings(cache_dir=tmp_path / "cache"))
    exported.mkdir(parents=True)
    (tmp_path / "onnx" / "model.fp16.onnx").rename(exported / "model.fp16.onnx")
    for folder in (exported, tmp_path / "onnx"):
        for name, graph in (("manifest.json", "model.onnx"), ("manifest.fp16.json", "model.fp16.onnx")):
            (folder / name).write_text(json.dumps({"sha256": sha256_of_text(graph), "folder": str(folder)}))
        (folder / "sample.npz").write_text(str(folder))
    _, served = container.start(precision=precision)
    beside = {path.name: path.resolve().parent for path in (served / "clip_onnx" / "1").iterdir() if path.is_symlink()}
    onnx = tmp_path / "onnx"
    assert beside == {
        "model.onnx": onnx,
        "manifest.json": onnx,
        "model.fp16.onnx": exported,
        "manifest.fp16.json": exported,
        "sample.npz": {"onnx": onnx, "exported": exported}[of],
    }


def test_trt_max_batch_applies_without_the_plan_too(container):
    """TRT_MAX_BATCH also limits requests if the plan cannot be built or has wrong vectors."""
    command, folder = container.start(max_batch=8, with_plan=False)
    assert "--model-config-name=trt" not in command
    assert read_config(folder, "clip_ensemble").max_batch_size == 8


def test_a_stale_plan_is_rebuilt_and_the_reason_is_logged(container):
    module = engines(stale=lambda _plan, **_: "it was built for driver 1")
    container.install(module)
    container.start()
    container.start()
    assert len(module.built) == 2
    assert any("it was built for driver 1" in line for line in container.log)


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fail() -> None:
    raise ToolError("layer 7 has no implementation")


def crash() -> None:
    raise RuntimeError("CUDA error 700")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (fail, "layer 7 has no implementation"),
        (crash, "RuntimeError: CUDA error 700"),
        (be_killed, r"ended by SIGKILL: too little memory\?"),
    ],
)
def test_a_failed_build_stops_the_container_with_the_reason(container, failure, reason):
    container.install(engines(failure))
    with pytest.raises(ToolError, match=reason):
        container.start()


@pytest.mark.parametrize("failure", [fail, crash, be_killed])
def test_a_failed_build_falls_back_to_onnx_with_trt_fallback_and_logs_it(container, failure):
    container.install(engines(failure))
    command, folder = container.start(fallback=True)
    assert not any(flag.startswith("--model-config-name") for flag in command)
    assert not (folder / "clip_trt" / "1" / "model.plan").exists()
    assert container.log[-1] == "TRT_FALLBACK=1: serving the ONNX model through clip_onnx instead"


def test_a_second_container_waits_for_the_first_ones_build(tmp_path):
    log, order = [], []
    held, release = threading.Event(), threading.Event()

    def first() -> None:
        with container_build._lock(tmp_path / "plan.lock", log.append):
            held.set()
            release.wait(10)
            order.append("first")

    def say(line: str) -> None:
        log.append(line)
        release.set()

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(10)
    with container_build._lock(tmp_path / "plan.lock", say):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert log == ["TensorRT plan: waiting for another container that builds it"]


def test_a_volume_that_cannot_be_written_names_the_user(container, monkeypatch):
    container.install(engines())
    for error, words in (
        (PermissionError(13, "read-only"), r"cannot be written .*read-only.*make it writable for user"),
        (OSError(28, "No space left"), r"cannot be written .*No space left.*make room"),
    ):
        monkeypatch.setattr(Path, "mkdir", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(ToolError, match=words):
            container.start()


def test_tensorrts_version_is_compared_with_the_servers_down_to_the_fourth_number(monkeypatch):
    monkeypatch.setattr(container_build.importlib.metadata, "version", lambda _: "10.13.3.9")
    for served, refused in (
        (None, False),
        ("10.13.3.9", False),
        ("10.13.3.4", True),
        ("10.13.2", True),
        ("10.13.3", False),
    ):
        monkeypatch.setattr(container_build, "served_tensorrt_version", lambda served=served: served)
        if refused:
            with pytest.raises(ToolError, match=f"--build-arg TENSORRT_VERSION={served}"):
                container_build._runtime_version("tensorrt")
        else:
            assert container_build._runtime_version("tensorrt") == "10.13.3.9"


def test_the_tensorrt_version_is_read_from_the_library(monkeypatch):
    library = SimpleNamespace(getInferLibVersion=lambda: 101303, getInferLibBuildVersion=lambda: 9)
    monkeypatch.setattr(container_build.ctypes.util, "find_library", lambda _: "libnvinfer.so.10")
    monkeypatch.setattr(container_build.ctypes, "CDLL", lambda _: library)
    assert served_tensorrt_version() == "10.13.3.9"


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
    def missing(_):
        raise container_build.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(container_build.importlib.metadata, "version", missing)
    with pytest.raises(ToolError, match="package tensorrt, which builds the plan, is not in this image"):
        container_build._runtime_version("tensorrt")


def test_a_failed_export_is_an_error_and_gets_the_model_and_the_weights(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(container_build.subprocess, "run", run)
    settings = Settings(cache_dir=tmp_path, model="ViT-B-32-quickgelu", checkpoint="/weights/x.safetensors")
    with pytest.raises(ToolError, match=r"exporting model.fp16.onnx failed"):
        export(settings, "fp16", lambda _: None)
    assert {"--precision=fp16", "--model=ViT-B-32-quickgelu", "--pretrained=/weights/x.safetensors"} <= set(asked[0])


@pytest.mark.parametrize("max_batch", [1, 2, 20, 32, 64, 100])
def test_max_batch_reaches_every_configuration_and_cuda_graphs_cover_every_batch(tmp_path, max_batch):
    write_container_repository(MODELS, tmp_path / "models", files={}, max_batch=max_batch, machine=CPU)
    for name in (None, *config_names(MODELS)):
        for model in deployment(tmp_path / "models", name):
            expected = max_batch if model.name == "clip_trt" else min(64, max_batch)
            assert model.config.max_batch_size == expected
    plan = read_config(tmp_path / "models", "clip_trt")
    covered = []
    for spec in plan.optimization.cuda.graph_spec:
        covered += range(spec.graph_lower_bound.batch_size or spec.batch_size, spec.batch_size + 1)
        assert list(spec.graph_lower_bound.input) == (["pixels"] if spec.graph_lower_bound.batch_size else [])
    assert covered == list(range(1, max_batch + 1))
    assert [warmup.batch_size for warmup in plan.model_warmup] == [
        spec.batch_size for spec in plan.optimization.cuda.graph_spec
    ]
    assert plan.model_warmup[-1].name == f"batch {max_batch}"
    assert plan.dynamic_batching.preferred_batch_size[-1] == max_batch
    preprocess = read_config(tmp_path / "models", "preprocess")
    assert list(preprocess.dynamic_batching.preferred_batch_size) == [1]


def test_with_the_committed_max_batch_the_configurations_are_unchanged(tmp_path):
    write_container_repository(MODELS, tmp_path / "models", files={}, max_batch=64, machine=CPU)
    for path in MODELS.glob("*/config.pbtxt"):
        assert (tmp_path / "models" / path.relative_to(MODELS)).read_text() == path.read_text()
    assert not set_max_batch(read_config(MODELS, "preprocess"), 100)


@pytest.mark.parametrize("max_batch", [None, 8])
def test_with_a_gpu_preprocess_gets_the_cores_and_the_engine_is_warmed_up_to_its_max_batch(tmp_path, max_batch):
    machine = Machine(cores=16, has_gpu=True)
    write_container_repository(MODELS, tmp_path / "models", files={}, max_batch=max_batch, machine=machine)
    for name in (None, "fast", "upright"):
        assert read_config(tmp_path / "models", "preprocess", name).instance_group[0].count == 14
    warmed = [one.batch_size for one in read_config(tmp_path / "models", "clip_onnx").model_warmup]
    assert warmed == [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= (max_batch or 64)]


@pytest.fixture
def small_graph(tmp_path) -> Path:
    path = tmp_path / "small" / "model.onnx"
    path.parent.mkdir()
    return write_small_graph(path)


def test_a_real_plan_is_built_once_without_a_gpu_and_then_reused(container, small_graph, monkeypatch):
    """With tensorrt-rtx, so by NVIDIA's own parser and builder."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'clip-embed[rtx]'")
    monkeypatch.undo()  # no fake GPU, no fake builder
    changes = {"runtime": "tensorrt-rtx", "precision": "fp32", "max_batch": 4, "opt_batch": 2}
    folders = [container.start(onnx_dir=small_graph.parent, **changes)[1] for _ in range(2)]
    plans = [(folder / "clip_trt" / "1" / "model.plan").resolve() for folder in folders]
    assert plans[0] == plans[1]
    assert [" ".join(line.split()[:3]) for line in container.log] == [
        "TensorRT plan: building",
        "TensorRT plan: using",
    ]
    manifest = json.loads((folders[1] / "clip_trt" / "1" / "manifest.json").read_text())
    assert (manifest["runtime"], manifest["precision"], manifest["max_batch"]) == ("tensorrt-rtx", "fp32", 4)
    assert read_config(folders[1], "clip_trt").max_batch_size == 4


def test_a_plan_of_another_precision_than_the_graphs_stops_the_container(container, small_graph, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'clip-embed[rtx]'")
    monkeypatch.undo()
    small_graph.rename(small_graph.with_name("model.fp16.onnx"))  # which holds FP32
    with pytest.raises(ToolError, match="fp16"):
        container.start(onnx_dir=small_graph.parent, runtime="tensorrt-rtx")


# The files of the image.

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["triton"]
PROXY = yaml.safe_load((ROOT / "deploy" / "compose.tls.yaml").read_text())["services"]["proxy"]


def test_every_path_that_the_dockerfile_copies_exists_and_is_not_ignored():
    copied = [path for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for path in line.split()[:-1]]
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied
    assert set(copied) == let_through
    for path in copied:
        assert (ROOT / path).exists(), path


def test_hadolint_accepts_the_dockerfile_and_rejects_a_bad_one(tmp_path):
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed: make setup")
    assert subprocess.run([hadolint, ROOT / "Dockerfile"], check=False).returncode == 0
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && pip install numpy\n")
    assert subprocess.run([hadolint, tmp_path / "Dockerfile"], check=False, capture_output=True).returncode == 1


def test_the_image_runs_without_root_and_has_the_ports_and_time_for_the_first_build():
    assert re.search(r"^USER 1000", DOCKERFILE, re.MULTILINE)
    assert "EXPOSE 8000 8001 8002" in DOCKERFILE
    assert "--start-period=600s" in DOCKERFILE
    assert re.search(
        r"^HEALTHCHECK .*\\\n +CMD \[\"python3\", \"-m\", \"clip_tools\", \"health\", .*\]$", DOCKERFILE, re.MULTILINE
    )
    tag = re.search(r"^ARG TRITON_TAG=(\d+)\.(\d+)-py3$", DOCKERFILE, re.MULTILINE)
    assert (int(tag[1]), int(tag[2])) >= (26, 8)


def test_swap_in_the_image_reads_the_repository_that_is_served(monkeypatch):
    monkeypatch.setattr(entrypoint.tempfile, "gettempdir", lambda: "/tmp")  # noqa: S108
    assert f"CLIP_MODELS={entrypoint.served_folder()} " in DOCKERFILE


def test_compose_passes_every_variable_and_only_declared_build_arguments():
    assert set(COMPOSE["environment"]) == variables() - {"CLIP_ONNX_DIR", "CLIP_CACHE_DIR"}  # paths of the volumes
    assert set(COMPOSE["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    defaults = {name: re.search(r":-(.*)}", value)[1] for name, value in COMPOSE["environment"].items()}
    assert Settings.from_environment(defaults) == Settings.from_environment({})


def test_compose_asks_for_a_gpu_shared_memory_and_a_volume():
    (device,) = COMPOSE["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert COMPOSE["shm_size"] == "1gb"
    assert any(volume.endswith(":/var/cache/clip-embed") for volume in COMPOSE["volumes"])
    assert (ROOT / "deploy" / COMPOSE["build"]["context"]).resolve() == ROOT


@pytest.mark.parametrize("service", [COMPOSE, PROXY], ids=["triton", "proxy"])
def test_compose_restricts_the_privileges_of_its_containers(service):
    """They have no capabilities, cannot gain privileges, and write only to volumes and tmpfs."""
    assert service["read_only"] is True
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])  # noqa: S108
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service and "cap_add" not in service and "network_mode" not in service
    writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
    assert writable == (["cache:/var/cache/clip-embed"] if service is COMPOSE else [])


def test_compose_publishes_only_the_proxy_to_other_machines():
    assert [port.rpartition(":")[0] for port in COMPOSE["ports"]] == [f"127.0.0.1:800{i}" for i in range(3)]
    assert PROXY["ports"] == ["8443:8443"]


def test_the_proxy_gets_every_variable_of_its_template():
    template = (ROOT / "deploy" / "nginx" / "default.conf.template").read_text()
    assert set(re.findall(r"\$\{(\w+)}", template)) == set(PROXY["environment"])
    assert PROXY["environment"]["TRITON_HTTP"] == "triton:8000"
    assert PROXY["environment"]["TRITON_GRPC"] == "triton:8001"


def test_the_proxy_waits_for_as_long_as_a_start_may_take():
    assert PROXY["depends_on"]["triton"]["condition"] == "service_healthy"
    assert COMPOSE["healthcheck"] == {"start_period": f"{READY_TIMEOUT_S:.0f}s"}


def test_the_containers_keys_restrict_its_server_and_are_not_shown():
    keys = {"CLIP_ADMIN_KEY": "an-admin-key-of-some-length", "CLIP_API_KEY": "an-api-key-of-some-length"}
    settings = Settings.from_environment(keys)
    access = options_in(["tritonserver"], settings.keys).access
    assert (access.admin_key, access.api_key) == tuple(keys.values())
    assert not any(key in repr(settings) for key in keys.values())
    assert options_in(["tritonserver"]).access.admin_key  # generated


@pytest.mark.parametrize("flag", ["--grpc-use-ssl=true", "--grpc-use-ssl-mutual=true"])
def test_tls_of_tritonserver_itself_is_refused_before_anything_is_built(flag, monkeypatch, capsys):
    monkeypatch.setattr(entrypoint, "prepare", lambda *_, **__: pytest.fail("the build was reached"))
    monkeypatch.setattr(entrypoint.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        entrypoint.main([flag, "--grpc-server-cert=c"])
    assert ended.value.code == 2
    assert "deploy/compose.tls.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("fallback", [False, True])
def test_a_plan_with_wrong_vectors_stops_the_container_or_falls_back_to_onnx(fallback, monkeypatch, capsys):
    """As with a plan that cannot be built."""
    starts = []

    class PlanIsWrong:
        def __init__(self, new_server, say, _ready_line):
            self.options = new_server().options

        def stopping_on_signals(self):
            return contextlib.nullcontext()

        def run(self):
            starts.append(self.options)
            if self.options.config_name == "trt":
                raise WrongVectors("worst cosine 0.5 is under 0.999")

    def prepare(_settings, _folder, _say, *, with_plan):
        return ["tritonserver", *(["--model-config-name=trt"] if with_plan else [])]

    monkeypatch.setattr(entrypoint, "prepare", prepare)
    monkeypatch.setattr(entrypoint, "Supervisor", PlanIsWrong)
    monkeypatch.setattr(entrypoint, "warning_if_untrained", lambda _: "")
    monkeypatch.setattr(entrypoint, "write_provenance", lambda *_: None)
    monkeypatch.setattr(entrypoint.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TRT_FALLBACK", str(int(fallback)))
    monkeypatch.setenv("CLIP_OPEN_METADATA", str(int(fallback)))
    with contextlib.nullcontext() if fallback else pytest.raises(SystemExit):
        entrypoint.main([])
    assert [one.config_name for one in starts] == (["trt", None] if fallback else ["trt"])
    assert all(one.check_vectors and one.models == entrypoint.served_folder() for one in starts)
    assert all(one.open_metadata is fallback for one in starts)
    log = capsys.readouterr().err
    assert "worst cosine 0.5 is under 0.999" in log
    assert ("serving the ONNX model" in log) == fallback


@pytest.mark.parametrize("changes", [{}, {"skip_build": True}, {"fallback": True}])
def test_a_graph_that_does_not_match_its_manifest_is_neither_served_nor_built_from(container, tmp_path, changes):
    module = engines()
    container.install(module)
    (tmp_path / "onnx" / "manifest.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ToolError, match=r"model.onnx is not the file that manifest.json describes.*export it again"):
        container.start(**changes)
    assert not module.built


def test_container_md_names_every_variable():
    text = (ROOT / "docs" / "container.md").read_text()
    assert set(re.findall(r"`((?:TRT|CLIP|SKIP)_[A-Z0-9_]+)`", text.split("## What it needs")[0])) == variables()


IN_THE_IMAGE = """
import sys
allowed = set(sys.argv[1].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)

sys.meta_path.insert(0, Refuse())
from pathlib import Path
from clip_tools import cli
from clip_tools.tensorrt import build_engine
from clip_tools.container import entrypoint
from clip_tools.container import server as container_server
from clip_tools.serving import health
from clip_tools.serving import model_control
from clip_tools.serving import swap
from clip_tools.container.settings import Settings
folder = Path(sys.argv[2])
settings = Settings(skip_build=True, onnx_dir=folder, cache_dir=folder)
print(entrypoint.prepare(settings, folder / "served", print)[0])
model_control.GrpcModelControl("grpc://localhost:1")
server = container_server.ContainerServer(container_server.options_in(["tritonserver", "--grpc-port=1"]))
assert not server.client(timeout_s=1).is_ready()
try:
    health.check_health("grpc://localhost:1", 1)
except health.ToolError:
    pass
"""


def test_what_the_dockerfile_copies_is_enough_to_start(tmp_path):
    """With the image's folders in another place, and a fake tritonserver that prints its arguments."""
    image, onnx, binaries = tmp_path / "opt" / "clip", tmp_path / "onnx", tmp_path / "bin"
    ignore = shutil.ignore_patterns("*.onnx", "*.plan", "*.json", "sample.npz", "__pycache__")  # as .dockerignore
    for source, target in re.findall(r"^COPY (models|tools/\S+|client/\S+) /opt/clip/(\S+)$", DOCKERFILE, re.MULTILINE):
        shutil.copytree(ROOT / source, image / target, ignore=ignore)
    for folder in (onnx, binaries):
        folder.mkdir()
    (onnx / "model.onnx").write_text("a graph")
    server = binaries / "tritonserver"
    server.write_text(
        '#!/bin/sh\nfor flag; do echo "$flag"; done\nls -d "$CLIP_MODELS"/*/ "$CLIP_MODELS"/clip_onnx/1/*\n'
    )
    server.chmod(0o755)
    served = tmp_path / "clip-embed-served"
    done = subprocess.run(
        [sys.executable, "-m", "clip_tools.container.entrypoint", "--log-verbose=1"],
        env={
            "PATH": f"{binaries}{os.pathsep}{os.defpath}",
            "PYTHONPATH": os.pathsep.join([str(image / "tools"), str(image / "client")]),
            "TMPDIR": str(tmp_path),
            "CLIP_MODELS": str(served),
            "CLIP_ONNX_DIR": str(onnx),
            "CLIP_CACHE_DIR": str(tmp_path),
            "SKIP_TRT_BUILD": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    log = [line for line in done.stderr.splitlines() if "shm-region-prefix-name" not in line]
    closed = [log.pop(8).partition(":clip-admin-key=") for _ in range(2)]
    assert [flag.partition("=")[0] for flag, _, _ in closed] == ["--grpc-restricted-protocol", "--http-restricted-api"]
    assert all(len(key) >= 32 for _, _, key in closed)
    assert done.returncode == 1, done.stderr
    assert log[0].startswith("clip-embed: starting tritonserver ")
    assert log[-1].startswith("clip-embed: tritonserver ended with exit code 0")
    assert log[1:-1] == [
        f"--model-repository={served}",
        "--model-control-mode=explicit",
        "--load-model=clip_ensemble",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=30",
        "--metrics-config=summary_latencies=true",
        "--log-verbose=1",
        f"{served}/clip_ensemble/",
        f"{served}/clip_onnx/",
        f"{served}/clip_onnx/1/model.onnx",
        f"{served}/clip_text_ensemble/",
        f"{served}/clip_text_onnx/",
        f"{served}/clip_trt/",
        f"{served}/preprocess/",
        f"{served}/tokenize/",
    ]
    assert (tmp_path / ".cache" / "ort-trt").is_dir()


def test_the_entry_point_and_swap_need_only_what_the_image_has(tmp_path):
    """Only the packages of container.txt and this project's two can be imported."""
    (tmp_path / "model.onnx").touch()
    pinned = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements" / "container.txt").read_text(), re.MULTILINE)
    import_names = {"pillow": "PIL", "grpcio": "grpc", "protobuf": "google", "python-rapidjson": "rapidjson"}
    allowed = {import_names.get(name, name.replace("-", "_")) for name in pinned} | {"clip_tools", "clip_embed"}
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_IMAGE, ",".join(sorted(allowed)), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tritonserver\n"


def test_the_servers_addresses_are_read_from_its_flags():
    options = options_in(["tritonserver", "--grpc-port=1", "--http-port", "2", "--grpc-port=3", "--log-verbose=1"])
    assert (options.grpc_url, options.http_url) == ("grpc://localhost:3", "http://localhost:2")
    assert options.metrics_url == "http://localhost:8002/metrics"
    assert options_in(["tritonserver", "--grpc-address=[::1]"]).grpc_url == "grpc://[::1]:8001"
    assert options_in([]).grpc_port == 8001  # the container usually has no arguments


FAKE_DRIVER = """
#include <string.h>
#include <unistd.h>
static pid_t who = 0;  /* as CUDA's: in a child of the process that called cuInit it is not initialised (3) */
static int state(void) { return who == getpid() ? 0 : 3; }
int cuInit(unsigned flags) { if (!who) who = getpid(); return state(); }
int cuDeviceGetCount(int *count) { *count = 1; return state(); }
int cuDeviceGet(int *device, int index) { *device = index; return state(); }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA L4", size); return state(); }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : 9; return state(); }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
"""
DETECT_GPU_IN_A_FORK = """
from clip_tools.container.build import _in_subprocess
from clip_tools.gpu import find_gpu
print(find_gpu(), flush=True)
_in_subprocess(lambda: print(find_gpu(), flush=True))
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, for a fake driver")
def test_the_forked_build_still_detects_the_gpu(tmp_path):
    """The entry point looks for it before the fork, and CUDA does not survive a fork."""
    (tmp_path / "cuda.c").write_text(FAKE_DRIVER)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "cuda.c")], check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", DETECT_GPU_IN_A_FORK],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["Gpu(name='NVIDIA L4', compute_capability='8.9', cuda='13.2')"] * 2


@pytest.mark.parametrize("flags", [["--http-port=abc"], ["--http-port"], ["--grpc-port=-1"]])
def test_an_invalid_port_is_a_usage_error(flags):
    with pytest.raises(ToolError, match=r"-port: expected a whole number, got '") as caught:
        options_in(flags)
    assert caught.value.exit_code == 2


def test_an_unreadable_file_exits_1_with_one_line_that_names_the_user(monkeypatch, capsys):
    def prepare(*_, **__):
        raise PermissionError(13, "Permission denied", "/onnx/model.onnx")

    monkeypatch.setattr(entrypoint, "prepare", prepare)
    monkeypatch.setattr(entrypoint.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        entrypoint.main([])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Permission denied: '/onnx/model.onnx': user " in line


def test_the_default_opt_batch_is_at_most_the_max_batch():
    assert Settings.from_environment({"TRT_MAX_BATCH": "4"}).opt_batch == 4
    assert Settings.from_environment({"TRT_MAX_BATCH": "32"}).opt_batch == 16
