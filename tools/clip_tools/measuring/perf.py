"""`clip-tools perf`: the real perf_analyzer on the ensemble or a step, fed with many different photographs."""

import base64
import contextlib
import csv
import json
import os
import re
import shlex
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from clip_tools.errors import ToolError
from clip_tools.measuring.options import PerfOptions
from clip_tools.measuring.perf_analyzer import find_perf_analyzer
from clip_tools.measuring.results import begin
from clip_tools.measuring.services import triton_service
from clip_tools.measuring.variants import Variant
from clip_tools.measuring.workload import load_images
from clip_tools.paths import MODELS, ROOT
from clip_tools.progress import Tell, silent
from clip_tools.repository import read_config
from clip_tools.serving.key_files import access_of
from clip_tools.serving.secret_arguments import popen_with_secrets

Mode = Literal["concurrency", "request-rate"]
# A window in which no request ended has an error in the place of its throughput.
_WINDOW = re.compile(
    r"Pass \[\d+\] (?:throughput: ([\d.]+) infer/sec\. Avg latency: (\d+) usec|cb::Error: (No valid requests) recorded)"
)


def perf(options: PerfOptions, folder: Path, *, tell: Tell = silent) -> dict[str, Any]:
    """Every level once; perf_analyzer's input stays in the folder, so that a level can be repeated."""
    result, input_file = begin("perf"), folder / f"perf-input-{options.model}.json"
    count = write_input(options, input_file)
    steps: list[tuple[Mode, float]] = [("concurrency", float(c)) for c in options.concurrency]
    steps += [("request-rate", float(rate)) for rate in options.request_rate]
    levels: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        if options.serve:
            server = stack.enter_context(triton_service(Variant(options.config_name), options.models))
            url = server.url if options.protocol == "grpc" else server.http_url
            options = replace(options, url=url.split("://")[1])
        for mode, level in steps:
            tell(f"perf_analyzer: {mode} {level:g}", len(levels), len(steps))
            levels.append(run_level(options, mode, level, input_file))
    images = {"name": options.images, "count": count}
    return result | {"model": options.model, "images": images, "levels": levels}


def write_input(options: PerfOptions, path: Path) -> int:
    """Write the input JSON; returns the number of images in it."""
    images = load_images(options.images)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(perf_input(images, options.model, options.models))
    return len(images)


def perf_input(images: Sequence[bytes], model: str, models: Path = MODELS) -> str:
    """perf_analyzer's input JSON: one entry an image, each sent in turn.

    For `image_bytes` the base64 holds a BYTES element as Triton stores it, so a 4-byte little-endian length comes
    before the file's bytes. For `pixels` it holds the raw (224, 224, 3) uint8 of `preprocess`.
    """
    if not images:
        raise ToolError("perf_analyzer's input needs at least one image")
    names = [entry.name for entry in read_config(models, model).input]
    if names == ["image_bytes"]:
        contents, shape = [struct.pack("<I", len(image)) + image for image in images], [1]
    elif names == ["pixels"]:
        from clip_tools.in_process import open_preprocess

        preprocess = open_preprocess(models)
        contents, shape = [preprocess(image).tobytes() for image in images], [224, 224, 3]
    else:
        raise ToolError(f"{model} takes {', '.join(names)}: expected a model that takes image_bytes or pixels")
    data = [{names[0]: {"b64": base64.b64encode(content).decode(), "shape": shape}} for content in contents]
    return json.dumps({"data": data})


def arguments(options: PerfOptions, mode: Mode, level: float, input_file: Path, csv_file: Path) -> list[str]:
    """perf_analyzer's flags for one level."""
    takes_bytes = any(entry.name == "image_bytes" for entry in read_config(options.models, options.model).input)
    return [
        *("-m", options.model, "-i", options.protocol, "-u", options.url, "-b", str(options.batch), "--async"),
        *("--input-data", str(input_file), *(("--shape", "image_bytes:1") if takes_bytes else ())),
        *(f"--{mode}-range", f"{level:g}"),
        *("--measurement-interval", str(options.window_ms), "--max-trials", str(options.max_trials)),
        *("--stability-percentage", str(options.stability_percent), "--verbose-csv", "-f", str(csv_file)),
    ]


def headers(options: PerfOptions) -> dict[str, str]:
    """perf_analyzer's flags with the server's keys, which it needs to read the model's configuration and statistics.

    What may be shown of each -> the flag. They are its HTTP headers by name, and gRPC's too.
    """
    access = access_of(options.url, os.environ)
    if access is None:
        return {}
    found = access.http_headers() if options.protocol == "http" else access.grpc_headers()
    return {f"-H{name}:***": f"-H{name}:{key}" for name, key in found.items()}


def run_level(options: PerfOptions, mode: Mode, level: float, input_file: Path) -> dict[str, Any]:
    """What perf_analyzer says of one level: latencies in ms at the client, steps in ms a request on the server.

    `throughput` is images a second: inferences times nothing, for perf_analyzer counts a batch of n as n. `windows` are
    those of each window in turn. No three of them agreed where it has not `settled`; it then tells no percentile, and
    `throughput` and the mean latency are those of the last three. A window in which no request ended is 0.
    Raises ToolError with its last words when it fails.
    """
    binary, environment = find_perf_analyzer()
    with tempfile.TemporaryDirectory() as folder:
        csv_file = Path(folder) / "perf.csv"
        flags = arguments(options, mode, level, input_file, csv_file)
        process = popen_with_secrets(
            [str(binary), *flags, "-v"],  # or it does not tell the windows
            headers(options),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:
            said, _ = process.communicate()
        # Below an empty line it puts tables of its own.
        table = csv_file.read_text().split("\n\n", 1)[0] if csv_file.is_file() else ""
    windows = [(float(rate or 0), int(latency_us or 0) / 1000) for rate, latency_us, _ in _WINDOW.findall(said)]
    rates = tuple(rate for rate, _ in windows)
    rows = list(csv.DictReader(table.strip().splitlines()))
    settled = bool(rows) and not process.returncode
    if settled:
        figures = figures_of(rows[0])
    elif any(rates) and ("stable measurement" in said or "No valid requests" in said):
        mean_ms = [latency_ms for rate, latency_ms in windows[-3:] if rate]
        latency = {"mean": statistics.mean(mean_ms)} if mean_ms else {}
        figures = {"throughput": statistics.mean(rates[-3:]), "latency_ms": latency, "server_ms": {}}
    else:
        raise ToolError(f"perf_analyzer failed ({process.returncode}): {_reason(said)}")
    figures |= {"command": plain_command(flags), "windows": rates, "settled": settled}
    return {"mode": mode, "level": level, "batch": options.batch, **figures}


def figures_of(row: dict[str, str]) -> dict[str, Any]:
    """One row of perf_analyzer's CSV, its microseconds as ms."""
    ms = {key: float(value) / 1000 for key, value in row.items() if value and ("latency" in key or "Server" in key)}
    latency = {key.split()[0].replace("Avg", "mean"): value for key, value in ms.items() if key.endswith("latency")}
    server = {key.removeprefix("Server ").lower(): value for key, value in ms.items() if key.startswith("Server ")}
    return {"throughput": float(row["Inferences/Second"]), "latency_ms": latency, "server_ms": server}


def plain_command(flags: Sequence[str]) -> str:
    """The command to repeat the measurement from the checkout."""
    shown = ["perf.csv" if flag.endswith("perf.csv") else flag.replace(f"{ROOT}/", "") for flag in flags]
    return shlex.join([".venv/bin/perf-analyzer", *shown])


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join((errors or lines)[-2:]) or "it said nothing"
