"""What the tests share: photographs, weights, the oracle, a model repository and the real server."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clip_tools import photos, proxy, reliability
from clip_tools.accuracy.sample import FILE as SAMPLE
from clip_tools.accuracy.sample import Sample
from clip_tools.demo import weights_from_environment
from clip_tools.digest import files_of
from clip_tools.export.export_onnx import export_onnx, write_graph
from clip_tools.export.export_text import MERGES, export_text
from clip_tools.export.manifest import is_exported, manifest_path
from clip_tools.measuring.services import free_ports
from clip_tools.oracle import Oracle, Weights, load_oracle
from clip_tools.paths import BACKENDS, CACHE, MODELS, RESULTS
from clip_tools.repository import parameters_of, read_config
from clip_tools.serving import process
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer

# What the server's own Python finds beside a model.
sys.path += [
    str(MODELS / "preprocess" / "1"),
    str(MODELS / "tokenize" / "1"),
    str(BACKENDS / "onnxruntime"),
    str(BACKENDS / "tensorrt"),
]
import clip_preprocess
from ort_session import computes_bf16

ARCHITECTURES = Path(__file__).with_name("architectures")
EXPORTS = {
    "oracle",
    "onnx_model",
    "text_model",
    "gpu_model",
    "light_model",
    "light_text_model",
    "tiny_oracle",
    "tiny_model",
}
TINY = Weights("tiny-vit", "random:0")
WITH_VIT_SERVER = ("test_embeddings.py", "test_measuring.py", "test_overload.py", "test_soak.py", "test_text.py")

# PyTorch's threads sleep when they wait; spinning, they would take the cores from the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
proxy.bypass_for_localhost()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs an export, as every server does, is slow."""
    for item in items:
        if EXPORTS & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives the tests out by file, but those that share `vit_server` together, so that one process alone starts it."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "vit_server" if Path(file).name in WITH_VIT_SERVER else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _servers_end_at_once(request: pytest.FixtureRequest) -> None:
    """Once nothing is in flight: a server takes 3 s to unload its models. Those of `clip-tools serve` still do."""
    if is_short_run(request.config):
        process.UNLOAD_S = 0.2


@pytest.fixture(scope="session")
def weights() -> Weights:
    """CLIP_CHECKPOINT's weights where it is set; else the real architecture with seeded ones."""
    given = weights_from_environment()
    return given if "CLIP_CHECKPOINT" in os.environ else Weights(given.model, "random:0")


@pytest.fixture(scope="session")
def trained(weights: Weights) -> Weights:
    """The weights, for tests that mean nothing without training."""
    if weights.seed is not None:
        pytest.skip("needs trained weights: set CLIP_CHECKPOINT to an open_clip checkpoint (and CLIP_MODEL)")
    return weights


@pytest.fixture(scope="session")
def openvino() -> None:
    """For tests of what OpenVINO alone runs, which the environment of a GPU host does not have."""
    import onnxruntime

    if "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs OpenVINO: make setup-cpu")


@pytest.fixture(scope="session")
def bf16(openvino: None) -> None:
    """For tests of what OpenVINO computes in BF16."""
    if not computes_bf16():
        pytest.skip("needs a CPU on which OpenVINO has BF16: AVX-512 or AVX2-VNNI-2")


@pytest.fixture(scope="session")
def no_bf16(openvino: None) -> None:
    """For tests of how BF16 is refused."""
    if computes_bf16():
        pytest.skip("OpenVINO has BF16 on this CPU")


@pytest.fixture(scope="session")
def oracle(weights: Weights) -> Oracle:
    """open_clip itself."""
    return oracle_of(weights)


@functools.lru_cache(maxsize=1)  # two of the largest would not fit
def oracle_of(weights: Weights) -> Oracle:
    """open_clip with these weights, for the exports and the comparison after them."""
    know_our_architectures()
    return load_oracle(weights)


@pytest.fixture(scope="session")
def demo_photos() -> list[Path]:
    """The demo's photographs."""
    return photos.demo_photos()


@pytest.fixture(scope="session")
def odd_images() -> Path:
    """The folder of odd image files: Pillow's own test images."""
    return photos.odd_images()


@pytest.fixture(scope="session")
def limits() -> clip_preprocess.ImageLimits:
    """The limits that are served."""
    return clip_preprocess.ImageLimits.of(parameters_of(read_config(MODELS, "preprocess")))


class Lazily:
    """A module that is imported as it is first used, so that naming the tests does not take PyTorch's seconds.

    Where it is not installed, the test that uses it is skipped.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        if attribute.startswith("_"):  # pytest looks for its own on whatever a module names
            raise AttributeError(attribute)
        reason = f"{self._name} is not installed: pip install 'clip-embed[export]'"
        return getattr(pytest.importorskip(self._name, reason=reason), attribute)


def is_short_run(config: pytest.Config) -> bool:
    """Whether the long forms are left out."""
    return "not long" in config.getoption("markexpr")


def is_long_run(config: pytest.Config) -> bool:
    """Whether this is `make test-long`."""
    return config.getoption("markexpr") == reliability.LONG_RUN


def kept_model(weights: Weights, name: str) -> Path:
    """Where what is exported of these weights is kept between runs."""
    own = ARCHITECTURES / f"{weights.model}.json"
    which = f"{weights} {weights.checkpoint_sha256}{own.read_text() if own.is_file() else ''}"
    return CACHE / "models" / hashlib.sha256(which.encode()).hexdigest()[:12] / name


def know_our_architectures() -> None:
    """Register `tests/architectures` with open_clip: its own towers, so small that a server loads them at once."""
    import open_clip

    open_clip.add_model_config(ARCHITECTURES)


@pytest.fixture(scope="session")
def onnx_model(weights: Weights, demo_photos: list[Path]) -> Path:
    """model.onnx of the weights, exported once and kept; never the one in models/, which is the user's."""
    return exported(weights, demo_photos)


@contextlib.contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """The processes of `make test` share what they export."""
    folder = path.relative_to(CACHE / "models").parts[0]
    (CACHE / "models").mkdir(parents=True, exist_ok=True)
    with (CACHE / "models" / f"{folder}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def exported(weights: Weights, photographs: list[Path]) -> Path:
    """The image tower of these weights, kept between runs."""
    path = kept_model(weights, "model.onnx")
    with one_process_at_a_time(path):
        kept = Sample.read(path)
        if not is_exported(path, weights) or kept is None or kept.upright_embeddings is None:
            export_onnx(weights, [photo.read_bytes() for photo in photographs], path, oracle=oracle_of(weights))
    return path


@pytest.fixture(scope="session")
def text_model(weights: Weights) -> Path:
    """The text tower of the same weights, with its merges beside it."""
    return exported_text(weights)


def exported_text(weights: Weights) -> Path:
    """The text tower of these weights, kept between runs."""
    path = kept_model(weights, "text_tower/model.onnx")
    with one_process_at_a_time(path):
        if not is_exported(path, weights) or Sample.read(path) is None:
            export_text(weights, path, oracle=oracle_of(weights))
    return path


@pytest.fixture(scope="session")
def gpu_model(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tower in the form for GPUs, FP32, of which the lower precisions are made."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.onnx"
    write_graph(oracle, path, "gpu")
    return path


@pytest.fixture(scope="session")
def repository(onnx_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model repository as it is committed, with the tests' model in it."""
    return with_image(tmp_path_factory.mktemp("repository") / "models", onnx_model)


@pytest.fixture(scope="session")
def tiny_oracle() -> Oracle:
    """open_clip itself, as `tiny-vit`."""
    return oracle_of(TINY)


@pytest.fixture(scope="session")
def tiny_model(demo_photos: list[Path]) -> Path:
    """model.onnx of `tiny-vit`, exported once and kept."""
    return exported(TINY, demo_photos)


@pytest.fixture(scope="session")
def light_model(request: pytest.FixtureRequest) -> Path:
    """The model of `light_repository`."""
    return request.getfixturevalue("tiny_model" if is_short_run(request.config) else "onnx_model")


@pytest.fixture(scope="session")
def light_repository(light_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `tiny-vit`, which starts with a third of the CPU time, for tests that any model serves.

    In the long forms, whose figures are published, it has the full model.
    """
    return with_image(tmp_path_factory.mktemp("light") / "models", light_model)


@pytest.fixture(scope="session")
def light_text_model(request: pytest.FixtureRequest) -> Path:
    """The text tower that belongs to `light_model`."""
    return exported_text(TINY) if is_short_run(request.config) else request.getfixturevalue("text_model")


@pytest.fixture(scope="session")
def light_text_repository(
    light_repository: Path, light_text_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`light_repository` with both towers."""
    return with_text(light_repository, tmp_path_factory.mktemp("light_text") / "models", light_text_model)


def with_image(folder: Path, onnx_model: Path) -> Path:
    """The repository as it is committed, at `folder`, with this image tower in it."""
    built = shutil.ignore_patterns("*.onnx", "*.onnx.data", "*.plan", "manifest*.json", SAMPLE, MERGES, "__pycache__")
    shutil.copytree(MODELS, folder, ignore=built)
    for path in (*files_of(onnx_model), manifest_path(onnx_model), onnx_model.with_name(SAMPLE)):
        (folder / "clip_onnx" / "1" / path.name).symlink_to(path)
    return folder


def with_text(repository: Path, models: Path, text_model: Path) -> Path:
    """The repository at `models`, with the text tower in it."""
    shutil.copytree(repository, models, symlinks=True)
    for path in (*files_of(text_model), manifest_path(text_model), text_model.with_name(SAMPLE)):
        (models / "clip_text_onnx" / "1" / path.name).symlink_to(path)
    (models / "tokenize" / "1" / MERGES).symlink_to(text_model.with_name(MERGES))
    return models


def with_second_model(repository: Path, models: Path, name: str) -> Path:
    """The repository at `models`, with `clip_onnx` again as `clip_NAME`, to which the configuration NAME leads."""
    shutil.copytree(repository, models, symlinks=True)
    shutil.copytree(models / "clip_onnx", models / f"clip_{name}", symlinks=True)
    shutil.rmtree(models / f"clip_{name}" / "configs")
    route = (models / "clip_ensemble" / "config.pbtxt").read_text()
    named = models / "clip_ensemble" / "configs" / f"{name}.pbtxt"
    named.write_text(route.replace('"clip_onnx"', f'"clip_{name}"'))
    return models


def options_for(models: Path, log: Path, **changes: object) -> ServeOptions:
    """Options for a server of its own, on free ports."""
    http, grpc, metrics = free_ports(3)
    fields = {"models": models, "log": log, "http_port": http, "grpc_port": grpc, "metrics_port": metrics, **changes}
    return ServeOptions(**fields)


@pytest.fixture(scope="session")
def vit_server(
    repository: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedServer]:
    """The real tritonserver with both towers of the tests' weights, started once for tests that only ask it things."""
    folder = tmp_path_factory.mktemp("vit")
    models = with_text(repository, folder / "models", text_model)
    with EmbeddedServer(options_for(models, folder / "log", check_vectors=True)) as running:
        yield running


@pytest.fixture(scope="session")
def server(light_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The real tritonserver with `light_repository`, started once for all tests that only ask it things."""
    with EmbeddedServer(options_for(light_repository, tmp_path_factory.mktemp("server") / "log")) as running:
        yield running


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT stops what the test starts, also where it is ignored here: under nohup, in a script's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def record_reliability(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep the figures a test has seen, for docs/reliability.md: `record_reliability("fuzz", cases=10_000, lost=0)`.

    They go to results/reliability.json from `make test-long`, from any other run to another file beside it.
    """
    path = RESULTS / ("reliability.json" if is_long_run(request.config) else "reliability-short.json")

    def record(name: str, **figures: object) -> None:
        if name not in reliability.names():
            raise KeyError(f"{name}: docs/reliability.md has no such promise; add it to clip_tools.reliability")
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[name] = {"test": request.node.nodeid, **reliability.where_and_when(), **figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")

    return record
