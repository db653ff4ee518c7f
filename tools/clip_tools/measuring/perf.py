"""`clip-tools perf`: the real perf_analyzer on the ensemble or a step, fed with many different photographs."""

import base64
import csv
import json
import os
import re
import shlex
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clip_tools.errors import ToolError
from clip_tools.measuring.fingerprint import fingerprint
from clip_tools.measuring.perf_analyzer import find_perf_analyzer
from clip_tools.measuring.results import write
from clip_tools.measuring.sections import PERF_COLUMNS, not_settled, perf_row
from clip_tools.measuring.workload import VGA, load_images
from clip_tools.paths import MODELS, ROOT
from clip_tools.repository import ENSEMBLE, read_config
from clip_tools.serving.key_files import access_of
from clip_tools.serving.secret_arguments import popen_with_secrets

Mode = Literal["concurrency", "request-rate"]
# A window in which no request ended has an error in the place of its throughput.
_WINDOW = re.compile(
    r"Pass \[\d+\] (?:throughput: ([\d.]+) infer/sec\. Avg latency: (\d+) usec|cb::Error: (No valid requests) recorded)"
)


@dataclass(frozen=True)
class PerfOptions:
    """What to ask and how hard. Times in ms; a level is requests in flight, or requests a second."""

    model: str = ENSEMBLE
    images: str = VGA
    url: str = "localhost:8001"
    protocol: str = "grpc"
    concurrency: tuple[int, ...] = (1, 4, 16)
    request_rate: tuple[float, ...] = ()
    batch: int = 1
    window_ms: int = 5000
    max_trials: int = 10
    stability_percent: int = 10
    models: Path = MODELS


@dataclass(frozen=True)
class Level:
    """What perf_analyzer said of one level. Latencies in ms at the client, steps in ms a request on the server.

    `throughput` is images a second: inferences times nothing, for perf_analyzer counts a batch of n as n. `windows` are
    those of each window in turn. No three of them agreed where it has not `settled`; it then tells no percentile, and
    `throughput` and the mean latency are those of the last three. A window in which no request ended is 0.
    """

    mode: Mode
    level: float
    batch: int
    throughput: float
    latency_ms: dict[str, float]
    server_ms: dict[str, float]
    command: str
    windows: tuple[float, ...] = ()
    settled: bool = True


def perf_input(images: Sequence[bytes], model: str, models: Path = MODELS) -> str:
    """perf_analyzer's input JSON: one entry an image, each sent in turn.

    For `image_bytes` the base64 holds a BYTES element as Triton stores it, so a 4-byte little-endian length comes
    before the file's bytes. For `pixels` it holds the raw (224, 224, 3) uint8 of `preprocess`.
    """
    if not images:
        raise ToolError("perf_analyzer's input needs at least one image")
    names = [entry.name for entry in read_config(models, model).input]
    if names == ["image_bytes"]:
        contents = [struct.pack("<I", len(image)) + image for image in images]
        shape = [1]
    elif names == ["pixels"]:
        contents, shape = [_pixels(image, models) for image in images], [224, 224, 3]
    else:
        raise ToolError(f"{model} takes {', '.join(names)}: expected a model that takes image_bytes or pixels")
    data = [{names[0]: {"b64": base64.b64encode(content).decode(), "shape": shape}} for content in contents]
    return json.dumps({"data": data})


def _pixels(image: bytes, models: Path) -> bytes:
    from clip_tools.measuring.bare import open_preprocess

    pixels: bytes = open_preprocess(models)(image).tobytes()
    return pixels


def write_input(options: PerfOptions, path: Path) -> int:
    """Write the input JSON; how many images are in it."""
    images = load_images(options.images)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(perf_input(images, options.model, options.models))
    return len(images)


def arguments(options: PerfOptions, mode: Mode, level: float, input_file: Path, csv_file: Path) -> list[str]:
    """perf_analyzer's flags for one level."""
    load = ["--concurrency-range", f"{level:g}"] if mode == "concurrency" else ["--request-rate-range", f"{level:g}"]
    shape = ["--shape", "image_bytes:1"] if _takes_image_bytes(options) else []
    return [
        *("-m", options.model, "-i", options.protocol, "-u", options.url, "-b", str(options.batch), "--async"),
        *("--input-data", str(input_file), *shape, *load),
        *("--measurement-interval", str(options.window_ms), "--max-trials", str(options.max_trials)),
        *("--stability-percentage", str(options.stability_percent), "--verbose-csv", "-f", str(csv_file)),
    ]


def headers(options: PerfOptions) -> dict[str, str]:
    """perf_analyzer's flags with the server's keys, which it needs to read the model's configuration and statistics.

    Of each what may be shown, and what it is. They are its HTTP headers by name, and gRPC's too.
    """
    access = access_of(options.url, os.environ)
    if access is None:
        return {}
    found = access.http_headers() if options.protocol == "http" else access.grpc_headers()
    return {f"-H{name}:***": f"-H{name}:{key}" for name, key in found.items()}


def _takes_image_bytes(options: PerfOptions) -> bool:
    return any(entry.name == "image_bytes" for entry in read_config(options.models, options.model).input)


def run_level(options: PerfOptions, mode: Mode, level: float, input_file: Path) -> Level:
    """Run perf_analyzer once and read its CSV, or its windows when it did not settle.

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
        rows = read_csv(csv_file) if csv_file.is_file() else []
    windows = [(float(rate or 0), int(latency_us or 0) / 1000) for rate, latency_us, _ in _WINDOW.findall(said)]
    rates = tuple(rate for rate, _ in windows)
    if rows and not process.returncode:
        return replace(level_of(rows[0], mode, level, options.batch, plain_command(flags)), windows=rates)
    if not any(rates) or not ("stable measurement" in said or "No valid requests" in said):
        raise ToolError(f"perf_analyzer failed ({process.returncode}): {_reason(said)}")
    mean_ms = {"mean": statistics.mean(latency for rate, latency in windows[-3:] if rate)} if any(rates[-3:]) else {}
    throughput = statistics.mean(rates[-3:])
    return Level(mode, level, options.batch, throughput, mean_ms, {}, plain_command(flags), rates, settled=False)


def plain_command(flags: Sequence[str]) -> str:
    """The command as a person would repeat it from the checkout."""
    shown = ["perf.csv" if flag.endswith("perf.csv") else flag.replace(f"{ROOT}/", "") for flag in flags]
    return shlex.join([".venv/bin/perf-analyzer", *shown])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of perf_analyzer's CSV; below an empty line it puts tables of its own, which are left out."""
    table = path.read_text().split("\n\n", 1)[0]
    return list(csv.DictReader(table.strip().splitlines()))


def level_of(row: dict[str, str], mode: Mode, level: float, batch: int, command: str) -> Level:
    """One row of perf_analyzer's CSV, its microseconds as ms."""
    percentiles = {
        key.split()[0]: float(value) / 1000 for key, value in row.items() if key.endswith("latency") and value
    }
    server = {
        key.removeprefix("Server ").lower(): float(value) / 1000
        for key, value in row.items()
        if key.startswith("Server ") and value
    }
    if "Avg latency" in row:
        percentiles["mean"] = percentiles.pop("Avg")
    return Level(mode, level, batch, float(row["Inferences/Second"]), percentiles, server, command)


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join((errors or lines)[-2:]) or "it said nothing"


def perf(options: PerfOptions, output: Path, *, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Every level once, as the JSON that is also written to `output`, with a picture beside it."""
    input_file = output.parent / f"perf-input-{options.model}.json"
    count = write_input(options, input_file)
    levels = []
    steps: list[tuple[Mode, float]] = [("concurrency", float(c)) for c in options.concurrency]
    steps += [("request-rate", rate) for rate in options.request_rate]
    for mode, level in steps:
        tell(f"{mode} {level:g}")
        levels.append(run_level(options, mode, level, input_file))
    result = {
        "kind": "perf",
        "environment": asdict(fingerprint()),
        "model": options.model,
        "images": {"name": options.images, "count": count},
        "levels": [asdict(level) for level in levels],
    }
    write(result, output)
    from clip_tools.measuring.plots import latency_against_throughput

    output.with_suffix(".svg").write_text(latency_against_throughput(result))
    return result


def table(result: dict[str, Any]) -> Any:
    """The levels as a rich table."""
    from rich.table import Table

    shown = Table(title=f"perf_analyzer: {result['model']}, {result['images']['name']}", title_justify="left")
    for name in PERF_COLUMNS:
        shown.add_column(name, justify="right")
    for level in result["levels"]:
        shown.add_row(*perf_row(level))
    return shown


def explain(result: dict[str, Any]) -> None:
    """On stderr: the windows of each level that did not settle, and the plain command behind each."""
    for line in not_settled(result["levels"]):
        sys.stderr.write(f"  {line}\n")
    for level in result["levels"]:
        sys.stderr.write(f"  {level['command']}\n")
