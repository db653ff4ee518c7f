"""What a measuring verb can be asked: each field is an option of `clip-tools NAME`, with its default and its help.

A field without `Option` is not on the command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from clip_tools.option_types import ConfigName, Models, Port
from clip_tools.paths import MODELS, RESULTS, ROOT

VGA, PHONE = "640x480", "phone"

Images = Annotated[
    str, Option(help="640x480 (real photographs of that size), phone (12 MP originals), or a folder of images.")
]
Apply = Annotated[
    str | None, Option(help="Write the best setting as configs/NAME.pbtxt of the models that it changes.")
]
Window = Annotated[int, Option(min=100, help="perf_analyzer's measurement window, ms.")]
Stability = Annotated[int, Option(min=1, help="How much three windows may differ, in percent.")]


@dataclass(frozen=True)
class BenchOptions:
    """`bench`. A window lasts `seconds`, and until `at_least` requests ended in it."""

    arms: Annotated[
        tuple[str, ...],
        Option(
            help="What to compare, with commas: KIND[@CONFIG][:INSTANCES], kinds as in measuring/arms.py. By default "
            "ensemble-grpc,ensemble-http,tensor-grpc,json-http,pytorch, on a GPU with model.fp16.onnx also "
            "ensemble-grpc@ort-fp16,pytorch@fp16."
        ),
    ] = ()
    images: Images = VGA
    image_count: Annotated[int, Option(min=1, help="The maximum number of different photographs.")] = 32
    batches: Annotated[tuple[int, ...], Option(help="Images per request, with one request in flight.")] = (
        1,
        4,
        8,
        16,
        32,
    )
    concurrency: Annotated[tuple[int, ...], Option(help="Requests in flight, of one image each.")] = (1, 4, 16)
    rounds: Annotated[int, Option(min=1, help="How often to measure every arm, in turns.")] = 5
    seconds: Annotated[float, Option(help="The duration of one measurement.")] = 4.0
    warmup_s: float = 1.0
    at_least: int = 5
    cold_starts: Annotated[
        int, Option(min=0, help="How often to time each server from its start to its first embedding.")
    ] = 3
    for_targets: Annotated[bool, Option("--targets/--no-targets", help="Also measure what only the targets need.")] = (
        True
    )
    url: Annotated[
        str | None,
        Option(help="A running server with the same weights, grpc://HOST:8001; skips the targets."),
    ] = None
    pytorch_url: Annotated[str | None, Option(help="A running PyTorch service, http://HOST:8010.")] = None
    soak_requests: Annotated[
        int, Option("--soak", min=0, help="Watch the memory for this many requests; the target requires 20000.")
    ] = 0
    models: Models = MODELS


@dataclass(frozen=True)
class PerfOptions:
    """`perf`. A level is a number of requests in flight, or of requests a second."""

    model: Annotated[str, Option(help="clip_ensemble, or a step: preprocess, clip_onnx, clip_trt.")] = "clip_ensemble"
    images: Images = VGA
    url: Annotated[str, Option(help="The running server, HOST:PORT.")] = "localhost:8001"
    serve: Annotated[bool, Option("--serve", help="Start the embedded server for the run.")] = False
    config_name: ConfigName = None
    protocol: Annotated[str, Option(help="grpc or http.")] = "grpc"
    concurrency: Annotated[
        tuple[int, ...], Option(help="The numbers of requests in flight to measure; empty for none.")
    ] = (
        1,
        4,
        16,
    )
    request_rate: Annotated[tuple[int, ...], Option(help="The requests per second to measure; empty for none.")] = ()
    batch: Annotated[int, Option(min=1, max=64, help="Images per request.")] = 1
    window_ms: Window = 5000
    max_trials: Annotated[int, Option(min=1, help="The maximum number of windows; three that agree are enough.")] = 10
    stability_percent: Stability = 10
    models: Models = MODELS


@dataclass(frozen=True)
class OnnxProfileOptions:
    """`onnx-profile`."""

    config_name: ConfigName = None
    batches: Annotated[tuple[int, ...], Option(help="The batch sizes to time.")] = (1, 2, 4, 8, 16, 32, 64)
    operator_batch: Annotated[int, Option(min=1, help="The batch size for timing the operators.")] = 8
    seconds: Annotated[float, Option(help="How long to time each batch size.")] = 2.0
    beside: Annotated[
        Path | None,
        Option(help="Another ONNX file with the same inputs and outputs, timed in turns with the served one."),
    ] = None
    models: Models = MODELS


@dataclass(frozen=True)
class SerialisationOptions:
    """`serialisation`."""

    images: Images = VGA
    batches: Annotated[tuple[int, ...], Option(help="Images per message.")] = (1, 2, 4, 8, 16, 32)
    runs: Annotated[int, Option(min=1, help="How often to time each; the median counts.")] = 7


@dataclass(frozen=True)
class LibrariesOptions:
    """`libraries`."""

    rows: Annotated[int, Option(min=1000, help="How many synthetic vectors.")] = 100_000
    models: Models = MODELS


@dataclass(frozen=True)
class ProfileOptions:
    """`profile`. The ports are those of Model Analyzer's server."""

    mode: Annotated[str, Option(help="local (the embedded server), docker, or remote (a running server).")] = "local"
    apply: Apply = None
    images: Images = VGA
    folder: Annotated[
        Path, Option(help="The folder for Model Analyzer's files; an interrupted run continues from it.")
    ] = RESULTS / "model-analyzer"
    config: Annotated[Path, Option(help="Model Analyzer's configuration.")] = (
        ROOT / "tools" / "model_analyzer" / "ensemble.yaml"
    )
    host: Annotated[str, Option(help="The server's host in mode remote.")] = "localhost"
    http_port: Port = 8000
    grpc_port: Port = 8001
    metrics_port: Port = 8002
    docker_image: Annotated[str | None, Option(help="The server image in mode docker.")] = None
    quick: Annotated[bool, Option("--quick", help="Two configurations, a few requests; the figures do not count.")] = (
        False
    )
    models: Models = MODELS


@dataclass(frozen=True)
class SweepOptions:
    """`sweep`."""

    axes: Annotated[tuple[str, ...], Option(help="What to vary, in this order.")] = (
        *("preprocess_instances", "engine", "max_batch", "queue_delay_us"),
    )
    concurrency: Annotated[int, Option(min=1, help="Requests in flight.")] = 16
    images: Images = VGA
    window_ms: Window = 5000
    stability_percent: Stability = 10
    config_name: ConfigName = None
    also: Annotated[Path | None, Option(help="A result of clip-tools profile; its best setting is measured too.")] = (
        None
    )
    apply: Apply = None
    log: Annotated[Path, Option(help="The log of points, one JSON per line; an interrupted run continues from it.")] = (
        RESULTS / "sweep.jsonl"
    )
    models: Models = MODELS


@dataclass(frozen=True)
class SoakOptions:
    """`soak`. Bad calls are those of `soak_traffic.BAD_REQUESTS`."""

    minutes: Annotated[float, Option(min=0.1, help="How long the traffic lasts.")] = 60.0
    clients: Annotated[int, Option(min=1, help="The number of clients, each with its own connection.")] = 8
    bad_share: Annotated[float, Option(min=0.0, max=1.0, help="The share of bad calls.")] = 0.1
    url: Annotated[
        str | None, Option(help="A running server on this machine, grpc://HOST:PORT; by default one is started.")
    ] = None
    config_name: ConfigName = None
    images: Images = VGA
    seed: Annotated[int, Option(help="The same seed gives each client the same calls.")] = 0
    models: Models = MODELS
