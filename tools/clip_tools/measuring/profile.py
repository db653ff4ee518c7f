"""`clip-tools profile`: the real Model Analyzer on the ensemble, and its winner as a named configuration."""

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clip_tools.errors import ToolError, missing_extra
from clip_tools.measuring.fingerprint import fingerprint, gpu_name
from clip_tools.measuring.perf import PerfOptions, write_input
from clip_tools.measuring.variants import limit_batches
from clip_tools.measuring.workload import VGA
from clip_tools.paths import MODELS, RESULTS, ROOT
from clip_tools.repository import ENSEMBLE, read_config, write_config

CONFIG = ROOT / "tools" / "model_analyzer" / "ensemble.yaml"
Mode = Literal["local", "docker", "remote"]
MODES = ("local", "docker", "remote")
_CSV = Path("results") / "metrics-model-inference.csv"


@dataclass(frozen=True)
class ProfileOptions:
    """How Model Analyzer is to run. Ports are those of its server; `folder` holds all it writes."""

    folder: Path = RESULTS / "model-analyzer"
    mode: Mode = "local"
    images: str = VGA
    config: Path = CONFIG
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    host: str = "localhost"
    docker_image: str | None = None
    quick: bool = False
    models: Path = MODELS


@dataclass(frozen=True)
class Point:
    """One measurement of one configuration. `variants` are Model Analyzer's names, the ensemble's first."""

    variants: tuple[str, ...]
    setting: str
    concurrency: int
    throughput: float
    p99_ms: float


def _yaml() -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise missing_extra("profile", error) from error


def analyzer_config(options: ProfileOptions) -> dict[str, Any]:
    """The committed configuration with this run's folder, ports and mode; on a GPU the engine is not kept off it."""
    yaml = _yaml()
    try:
        config: dict[str, Any] = yaml.safe_load(options.config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ToolError(f"{options.config}: expected Model Analyzer's YAML: {error}", exit_code=2) from error
    folder = options.folder
    config |= {
        "model_repository": str(options.models),
        "checkpoint_directory": str(folder / "checkpoints"),
        "output_model_repository_path": str(folder / "repository"),
        "export_path": str(folder),
        "triton_launch_mode": options.mode,
        "triton_server_path": str(Path(sys.executable).with_name("tritonserver")),
        "perf_analyzer_path": str(Path(sys.executable).with_name("perf-analyzer")),
        "triton_output_path": str(folder / "tritonserver.log"),
        "triton_http_endpoint": f"{options.host}:{options.http_port}",
        "triton_grpc_endpoint": f"{options.host}:{options.grpc_port}",
        "triton_metrics_url": f"http://{options.host}:{options.metrics_port}/metrics",
    }
    if options.docker_image:
        config["triton_docker_image"] = options.docker_image
    if gpu_name():
        config["cpu_only_composing_models"] = ["preprocess"]
    flags = config["profile_models"][ENSEMBLE]["perf_analyzer_flags"]
    flags["input-data"] = str(folder / "input.json")
    if options.quick:
        config |= {
            "run_config_search_max_instance_count": 1,
            "run_config_search_max_model_batch_size": 1,
            "run_config_search_max_concurrency": 1,
            "concurrency_sweep_disable": True,
        }
        flags |= {"measurement-request-count": 3, "stability-percentage": 999}
    return config


def profile(options: ProfileOptions, *, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run Model Analyzer, or go on with an interrupted run, and give its measurements, the best first.

    Its checkpoints do not say what they measured, so those of another machine, commit or workload are removed.
    Raises ToolError with its own reason when it fails.
    """
    program = Path(sys.executable).with_name("model-analyzer")
    if not program.is_file():
        raise ToolError("model-analyzer is not installed: pip install 'clip-embed[profile]'", exit_code=2)
    # Docker gets the folder as a mount of the same path, so it has to be absolute.
    folder = options.folder.resolve()
    options = ProfileOptions(**{**vars(options), "folder": folder})
    folder.mkdir(parents=True, exist_ok=True)
    environment = asdict(fingerprint())
    begin_anew_unless_same(
        folder,
        {key: environment[key] for key in ("cpu", "cores", "gpu", "git_commit")}
        | {"images": options.images, "quick": options.quick, "mode": options.mode, "models": str(options.models)},
    )
    write_input(PerfOptions(images=options.images, models=options.models), folder / "input.json")
    derived = folder / "config.yaml"
    derived.write_text(_yaml().safe_dump(analyzer_config(options), sort_keys=False))
    _run([str(program), "profile", "-f", str(derived)], folder / "model-analyzer.log", tell)
    points = read_points((folder / _CSV).read_text())
    if not points:
        raise ToolError(f"{folder / _CSV}: expected measurements, found none; its log: {folder / 'model-analyzer.log'}")
    best = max(points, key=lambda point: point.throughput)
    return {
        "kind": "profile",
        "environment": environment,
        "searched_by": "Model Analyzer",
        "model": ENSEMBLE,
        "images": options.images,
        "points": [asdict(point) for point in points],
        "best": best.setting,
        "best_variants": best.variants,
    }


def begin_anew_unless_same(folder: Path, run: dict[str, Any]) -> None:
    """Remove the checkpoints of a run that was of something else, and note what this one is of in `run.json`."""
    note, text = folder / "run.json", json.dumps(run, indent=1)
    if not note.is_file() or note.read_text() != text:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "results", ignore_errors=True)
    note.write_text(text)


def _run(command: list[str], log: Path, tell: Callable[[str], None]) -> None:
    lines: list[str] = []
    with (
        log.open("w") as sink,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None  # noqa: S101
        for line in process.stdout:
            sink.write(line)
            sink.flush()
            lines.append(line.strip().removeprefix("[Model Analyzer] ").strip())
            if "Profiling" in line:
                tell(lines[-1])
    if process.returncode:
        last = [line for line in lines if line][-2:]
        raise ToolError(f"model-analyzer failed ({process.returncode}): {' '.join(last)}; its log: {log}")


def read_points(text: str) -> list[Point]:
    """The measurements in Model Analyzer's metrics-model-inference.csv, the highest throughput first."""
    points = []
    for row in csv.DictReader(text.splitlines()):
        path = row["Model Config Path"]
        ensemble, _, steps = path.partition(":")
        variants = (ensemble.strip(), *(step.strip() for step in steps.split(",") if step.strip()))
        points.append(
            Point(
                variants=variants,
                setting=_setting(variants, row["Instance Group"], row["Max Batch Size"]),
                concurrency=int(row["Concurrency"]),
                throughput=float(row["Throughput (infer/sec)"]),
                p99_ms=float(row["p99 Latency (ms)"]),
            )
        )
    return sorted(points, key=lambda point: -point.throughput)


def _setting(variants: tuple[str, ...], instances: str, batches: str) -> str:
    """`preprocess 3 instances, batch limit 4; clip_onnx 2 instances, batch limit 4`."""
    counts = [one.split(":")[0] for one in instances.split(",")]
    parts = [
        f"{base_name(variant)} {count} instance{'s' if count != '1' else ''}, batch limit {batch}"
        for variant, count, batch in zip(variants[1:], counts, batches.split(","), strict=False)
    ]
    return ("as committed: " if variants[0].endswith("_default") else "") + "; ".join(parts)


def base_name(variant: str) -> str:
    """The model behind a variant's name: `clip_onnx_config_4` -> `clip_onnx`."""
    return re.sub(r"_config_(\d+|default)$", "", variant)


def apply(result: dict[str, Any], name: str, repository: Path, models: Path = MODELS) -> list[Path]:
    """Write the winner as configs/NAME.pbtxt of each model that it changes; what was written.

    The winner's instances, batching and batch sizes go into the committed configuration; the rest of it stays, and with
    it how many images a request may hold.
    Nothing is written when the committed configuration won. Raises ToolError for a name that cannot be one.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ToolError(f"--apply {name}: expected lower-case letters, digits and hyphens", exit_code=2)
    written = []
    changed = [variant for variant in result["best_variants"] if not variant.endswith("_default")]
    variants = [variant for variant in changed if base_name(variant) != ENSEMBLE]
    found = {base_name(variant): _read_variant(repository / variant / "config.pbtxt") for variant in variants}
    for model, winner in found.items():
        config = read_config(models, model)
        before = config.SerializeToString(deterministic=True)
        del config.instance_group[:]
        config.instance_group.extend(winner.instance_group)
        if winner.HasField("dynamic_batching"):
            policy = config.dynamic_batching.default_queue_policy
            winner.dynamic_batching.default_queue_policy.CopyFrom(policy)  # Model Analyzer leaves it out
            config.dynamic_batching.CopyFrom(winner.dynamic_batching)
        limit_batches(config, winner.max_batch_size)
        if config.SerializeToString(deterministic=True) != before:
            comment = f"{model} as {result['searched_by']} found it best on {result['environment']['cpu']}, "
            comment += (
                f"{result['environment']['cores']} cores, {result['environment']['date'][:10]}:\n{result['best']}.\n"
            )
            comment += "max_batch_size is what one request may hold."
            written.append(write_config(models, model, config, name, comment=comment))
    return written


def _read_variant(path: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except OSError as error:
        raise ToolError(f"{path}: expected the configuration that Model Analyzer tried: {error}") from error
