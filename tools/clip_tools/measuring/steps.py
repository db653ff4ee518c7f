"""Where a request's time goes on the server: Triton's own statistics and metrics, taken before and after."""

import os
import re
from dataclasses import dataclass

from clip_tools.proxy import DIRECT
from clip_tools.serving.key_files import access_of

_PHASES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Step:
    """One model over an interval. Times in ms of a request; `batch` is the mean number of images in an execution."""

    model: str
    requests: int
    batch: float
    queue_ms: float
    compute_input_ms: float
    compute_infer_ms: float
    compute_output_ms: float


def statistics(grpc_url: str) -> dict[str, dict[str, int]]:
    """Each model's counters since it was loaded: requests, images, executions, and ns by phase."""
    import tritonclient.grpc as triton

    access = access_of(grpc_url, os.environ)
    with triton.InferenceServerClient(grpc_url.removeprefix("grpc://")) as client:
        answer = client.get_inference_statistics(headers=access.grpc_headers() if access else None)
    counters = {}
    for model in answer.model_stats:
        phases = {phase: getattr(model.inference_stats, phase).ns for phase in _PHASES}
        requests = model.inference_stats.success.count
        counters[model.name] = {
            "requests": requests,
            "images": model.inference_count,
            "executions": model.execution_count,
            **phases,
        }
    return counters


def device_of(grpc_url: str, model: str) -> str:
    """Where the server runs a model, of an ensemble its last step: "GPU", "CPU", or "?" where it does not tell us."""
    import tritonclient.grpc as triton

    access = access_of(grpc_url, os.environ)
    headers = access.grpc_headers() if access else None
    with triton.InferenceServerClient(grpc_url.removeprefix("grpc://")) as client:
        try:
            config = client.get_model_config(model, headers=headers).config
            while config.HasField("ensemble_scheduling"):
                config = client.get_model_config(config.ensemble_scheduling.step[-1].model_name, headers=headers).config
        except triton.InferenceServerException:  # it asks for a key that is not here
            return "?"
    # The server has put what KIND_AUTO is on its machine into the configuration.
    return "GPU" if any(group.Kind.Name(group.kind) == "KIND_GPU" for group in config.instance_group) else "CPU"


def between(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> list[Step]:
    """What each model did between two takes; models that did nothing are left out."""
    steps = []
    for name, now in after.items():
        then = before.get(name, {})
        delta = {key: value - then.get(key, 0) for key, value in now.items()}
        if delta["requests"] > 0:
            times = [round(delta[phase] / delta["requests"] / 1e6, 4) for phase in _PHASES]
            batch = delta["images"] / delta["executions"] if delta["executions"] else 0.0
            steps.append(Step(name, delta["requests"], round(batch, 2), *times))
    return steps


_SAMPLE = re.compile(r"^(?P<name>nv_\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)


def read_metrics(text: str) -> dict[str, float]:
    """Prometheus text -> {`name{labels}`: value}, Triton's own metrics only."""
    return {
        found["name"] + (f"{{{found['labels']}}}" if found["labels"] else ""): float(found["value"])
        for found in _SAMPLE.finditer(text)
    }


def metrics(host: str, port: int) -> dict[str, float]:
    """The server's Prometheus metrics now."""
    with DIRECT.open(f"http://{host}:{port}/metrics", timeout=10) as answer:
        return read_metrics(answer.read().decode())
