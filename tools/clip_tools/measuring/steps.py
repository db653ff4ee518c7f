"""Where a request's time goes on the server: Triton's own statistics and metrics, taken before and after."""

import re
import statistics
from collections.abc import Iterable
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.proxy import DIRECT
from clip_tools.serving.model_control import GrpcModelControl

_PHASES = ("queue", "compute_input", "compute_infer", "compute_output")
STEP_HEAD = "step | batch | queue ms | input ms | infer ms | output ms"
Counters = dict[str, dict[str, int]]


def counters(grpc_url: str) -> Counters:
    """Each model's counters since it was loaded: requests, images, executions, and ns by phase.

    Empty where the server requires a key that is not here: SECURITY.md.
    """
    try:
        with GrpcModelControl(grpc_url) as server:
            models = server.statistics()
    except ToolError:
        return {}
    return {
        model.name: {
            "requests": model.inference_stats.success.count,
            "images": model.inference_count,
            "executions": model.execution_count,
            **{phase: getattr(model.inference_stats, phase).ns for phase in _PHASES},
        }
        for model in models
    }


def device_of(grpc_url: str, model: str) -> str:
    """Where the server runs a model, or an ensemble's last step: "GPU", "CPU", or "?" if it does not tell us."""
    try:
        with GrpcModelControl(grpc_url) as server:
            config = server.configuration(model)
            while config.HasField("ensemble_scheduling"):
                config = server.configuration(config.ensemble_scheduling.step[-1].model_name)
    except ToolError:  # it requires a key that is not here
        return "?"
    # The server has put what KIND_AUTO is on its machine into the configuration.
    return "GPU" if any(group.Kind.Name(group.kind) == "KIND_GPU" for group in config.instance_group) else "CPU"


def between(before: Counters, after: Counters) -> list[dict[str, Any]]:
    """What each model did between two takes: ms of a request by phase, and `batch`, images in a mean execution.

    Models that did nothing are left out.
    """
    steps = []
    for name, now in after.items():
        delta = {key: value - before.get(name, {}).get(key, 0) for key, value in now.items()}
        if delta["requests"] > 0:
            batch = delta["images"] / delta["executions"] if delta["executions"] else 0.0
            times = {f"{phase}_ms": round(delta[phase] / delta["requests"] / 1e6, 4) for phase in _PHASES}
            steps.append({"model": name, "requests": delta["requests"], "batch": round(batch, 2), **times})
    return steps


def step_texts(steps: Iterable[dict[str, Any]]) -> list[str]:
    """The columns of STEP_HEAD for each model: the medians of its steps."""
    models: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        models.setdefault(step["model"], []).append(step)
    keys = ("batch", *(f"{phase}_ms" for phase in _PHASES))
    return [
        " | ".join((model, *(f"{statistics.median(step[key] for step in found):.2f}" for key in keys)))
        for model, found in models.items()
    ]


_SAMPLE = re.compile(r"^(?P<name>nv_\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)


def metrics(url: str) -> dict[str, float]:
    """The server's own Prometheus metrics now: {`name{labels}`: value}."""
    with DIRECT.open(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        found["name"] + (f"{{{found['labels']}}}" if found["labels"] else ""): float(found["value"])
        for found in _SAMPLE.finditer(text)
    }
