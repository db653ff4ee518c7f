"""`clip-tools profile`: the real Model Analyzer on the ensemble, and its winner as a named configuration."""

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError, needs_extra
from clip_tools.measuring.fingerprint import ask_nvidia_smi
from clip_tools.measuring.options import PerfOptions, ProfileOptions
from clip_tools.measuring.perf import write_input
from clip_tools.measuring.results import begin
from clip_tools.paths import ROOT
from clip_tools.progress import Tell, silent
from clip_tools.repository import ENSEMBLE

MODES = ("local", "docker", "remote")
_CSV = Path("results") / "metrics-model-inference.csv"


@needs_extra("profile")
def _yaml() -> Any:
    return importlib.import_module("yaml")


def analyzer_config(options: ProfileOptions) -> dict[str, Any]:
    """The committed configuration with this run's folder, ports and mode; with a GPU the engine may use it."""
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
    if ask_nvidia_smi("name"):
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


def profile(options: ProfileOptions, *, tell: Tell = silent) -> dict[str, Any]:
    """Run Model Analyzer, or go on with an interrupted run, and give its measurements, the best first.

    Its checkpoints do not say what they measured, so those of another machine, commit or workload are removed.
    Raises ToolError with its own reason when it fails.
    """
    if options.mode not in MODES:
        raise ToolError(f"--mode {options.mode}: expected {', '.join(MODES)}", exit_code=2)
    program = Path(sys.executable).with_name("model-analyzer")
    if not program.is_file():
        raise ToolError("model-analyzer is not installed: pip install 'clip-embed[profile]'", exit_code=2)
    # Docker gets the folder as a mount of the same path, so it has to be absolute.
    folder = options.folder.resolve()
    options = replace(options, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = begin("profile")
    same = {key: result["environment"][key] for key in ("cpu", "cores", "gpu", "git_commit")}
    same |= {"images": options.images, "quick": options.quick, "mode": options.mode, "models": str(options.models)}
    begin_anew_unless_same(folder, same)
    write_input(PerfOptions(images=options.images, models=options.models), folder / "input.json")
    derived = folder / "config.yaml"
    derived.write_text(_yaml().safe_dump(analyzer_config(options), sort_keys=False))
    _run([str(program), "profile", "-f", str(derived)], folder / "model-analyzer.log", tell)
    points = read_points((folder / _CSV).read_text())
    if not points:
        raise ToolError(f"{folder / _CSV}: expected measurements, found none; its log: {folder / 'model-analyzer.log'}")
    best = {"best": points[0]["setting"], "best_variants": points[0]["variants"]}
    what = {"searched_by": "Model Analyzer", "model": ENSEMBLE, "images": options.images}
    return {**result, **what, "points": points, **best}


def begin_anew_unless_same(folder: Path, run: dict[str, Any]) -> None:
    """Remove the checkpoints of a different run, and describe this run in `run.json`."""
    note, text = folder / "run.json", json.dumps(run, indent=1)
    if not note.is_file() or note.read_text() != text:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "results", ignore_errors=True)
    note.write_text(text)


def _run(command: list[str], log: Path, tell: Tell) -> None:
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


def read_points(text: str) -> list[dict[str, Any]]:
    """The measurements in Model Analyzer's metrics-model-inference.csv, the highest throughput first.

    `variants` are its names of the configurations, the ensemble's first.
    """
    points: list[dict[str, Any]] = []
    for row in csv.DictReader(text.splitlines()):
        variants = [name.strip() for name in re.split("[:,]", row["Model Config Path"]) if name.strip()]
        points.append(
            {
                "variants": variants,
                "setting": _setting(variants, row["Instance Group"], row["Max Batch Size"]),
                "concurrency": int(row["Concurrency"]),
                "throughput": float(row["Throughput (infer/sec)"]),
                "p99_ms": float(row["p99 Latency (ms)"]),
            }
        )
    return sorted(points, key=lambda point: -point["throughput"])


def _setting(variants: list[str], instances: str, batches: str) -> str:
    """`preprocess 3 instances, batch limit 4; clip_onnx 2 instances, batch limit 4`."""
    counts = [one.split(":")[0] for one in instances.split(",")]
    models = [re.sub(r"_config_(\d+|default)$", "", variant) for variant in variants[1:]]
    parts = [
        f"{model} {count} instance{'s' if count != '1' else ''}, batch limit {batch}"
        for model, count, batch in zip(models, counts, batches.split(","), strict=False)
    ]
    return ("as committed: " if variants[0].endswith("_default") else "") + "; ".join(parts)
