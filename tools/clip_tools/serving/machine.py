"""This machine's cores and GPU, and what they change in the model configurations."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_tools.gpu import find_gpu
from clip_tools.paths import MODELS
from clip_tools.repository import deployment

INSTANCES_VARIABLE = "CLIP_PREPROCESS_INSTANCES"
# An instance group of this name gets its count at startup. Tuned configurations have a fixed count and another name.
BY_CORES = "preprocess_by_cores"


def available_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use, by its affinity and the CPU limit of its cgroup (version 2), rounded up."""
    cores = float(len(os.sched_getaffinity(0)))
    groups = root / "sys/fs/cgroup"
    lines = _words(root / "proc/self/cgroup")
    folder = groups / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for path in (folder, *folder.parents):
        if path == groups.parent:
            break
        limit = _words(path / "cpu.max")
        if len(limit) == 2 and limit[0] != "max":
            cores = min(cores, int(limit[0]) / int(limit[1]))
    return max(1, math.ceil(cores))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


@dataclass(frozen=True)
class Machine:
    """The hardware of a server. `instances` is the number of `preprocess` processes; None: chosen by the cores."""

    cores: int
    has_gpu: bool
    instances: int | None = None

    @classmethod
    def here(cls, instances: int | None = None) -> "Machine":
        """This machine, with the instances that the user asked for."""
        return cls(available_cores(), find_gpu() is not None, instances)

    @property
    def preprocess_instances(self) -> int:
        """The number of processes that decode.

        Without a GPU one for each core: they run at a lower priority than the engine, and on two cores two processes
        were measured as best. With a GPU and three or more cores, an eighth of them, at least one, stays free for the
        server and for feeding the GPU (not measured).
        """
        if self.instances is not None:
            return self.instances
        return max(min(2, self.cores), self.cores - max(1, self.cores // 8)) if self.has_gpu else self.cores

    def apply_to(self, config: Any, running: Any | None = None) -> bool:
        """Adapt a `ModelConfig` to this machine; whether that changed it.

        `preprocess` gets its instances; it keeps their count if `running` is its configuration on the server. On a GPU,
        ONNX Runtime gets a warm-up for each batch size. The committed configurations have none: on two cores without a
        GPU it made each start 11 s longer and nothing faster.
        """
        before = config.SerializeToString(deterministic=True)
        if config.backend == "python" and any(tensor.name == "image_bytes" for tensor in config.input):
            counts = {group.name: group.count for group in running.instance_group} if running else {}
            for group in config.instance_group:
                if self.instances is not None or group.name == BY_CORES:
                    group.count = counts.get(group.name, self.preprocess_instances)
        on_gpu = self.has_gpu and all(group.kind != group.KIND_CPU for group in config.instance_group)
        if config.backend == "onnxruntime" and on_gpu and not config.model_warmup:
            _warm_up(config)
        return bool(config.SerializeToString(deterministic=True) != before)

    def describe_preprocess(self, models: Path = MODELS, config_name: str | None = None) -> str:
        """The number of `preprocess` processes of a deployment, for the log."""
        config = next(model.config for model in deployment(models, config_name) if model.config.backend == "python")
        self.apply_to(config)
        count = config.instance_group[0].count
        return f"{count} process{'es' if count > 1 else ''} for preprocess on {self.cores} cores"


def _warm_up(config: Any) -> None:
    """Let the model run each batch size once before it is READY."""
    sizes = [2**power for power in range((config.max_batch_size - 1).bit_length())] + [config.max_batch_size]
    for size in sizes:
        warm_up = config.model_warmup.add(name=f"batch {size}", batch_size=size)
        for tensor in config.input:
            warm_up.inputs[tensor.name].data_type = tensor.data_type
            warm_up.inputs[tensor.name].dims.extend(tensor.dims)
            warm_up.inputs[tensor.name].zero_data = True
