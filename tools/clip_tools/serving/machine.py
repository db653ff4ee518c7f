"""The model repository as this machine serves it: links to the committed one, and configurations made for its cores."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_tools.gpu import find_gpu
from clip_tools.paths import MODELS
from clip_tools.repository import deployment, read_config
from clip_tools.serving.towers import Towers

INSTANCES = "CLIP_PREPROCESS_INSTANCES"
# The name of an instance group whose count the start decides. A tuned configuration has a count and no such name.
BY_CORES = "preprocess_by_cores"


def available_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: its affinity, or fewer where its control group (version 2) gives less time.

    A part of a core counts as one.
    """
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
    """What a server finds here. `instances` is how many processes `preprocess` is to have; None: by the cores."""

    cores: int
    has_gpu: bool
    instances: int | None = None

    @classmethod
    def here(cls, instances: int | None = None) -> "Machine":
        """This machine, and what the user asked for."""
        return cls(available_cores(), find_gpu() is not None, instances)

    @property
    def preprocess_instances(self) -> int:
        """How many processes decode.

        Without a GPU one for each core: the engine goes first wherever it wants one, and with two cores two processes
        were measured as best. Beside a GPU an eighth of the cores, at least one, is left to the server and to what
        feeds the GPU (not measured).
        """
        if self.instances is not None:
            return self.instances
        return max(min(2, self.cores), self.cores - max(1, self.cores // 8)) if self.has_gpu else self.cores

    def fit(self, config: Any, present: Any | None = None) -> bool:
        """Put what this machine needs into a `ModelConfig`; whether that changed it.

        `preprocess` gets its processes: as many as the server has now where `present` is what that runs. Beside a GPU
        an engine of ONNX Runtime is warmed up batch by batch. It is not committed so: on two cores without a GPU that
        took 11 s of each start, for nothing.
        """
        before = config.SerializeToString(deterministic=True)
        if config.backend == "python" and any(tensor.name == "image_bytes" for tensor in config.input):
            counts = {group.name: group.count for group in present.instance_group} if present else {}
            for group in config.instance_group:
                if self.instances is not None or group.name == BY_CORES:
                    group.count = counts.get(group.name, self.preprocess_instances)
        on_gpu = self.has_gpu and all(group.kind != group.KIND_CPU for group in config.instance_group)
        if config.backend == "onnxruntime" and on_gpu and not config.model_warmup:
            _warm_up(config)
        return bool(config.SerializeToString(deterministic=True) != before)

    def decoders(self, models: Path = MODELS, config_name: str | None = None) -> str:
        """How many processes a deployment decodes in, in words."""
        config = next(model.config for model in deployment(models, config_name) if model.config.backend == "python")
        self.fit(config)
        count = config.instance_group[0].count
        return f"{count} process{'es' if count > 1 else ''} for preprocess on {self.cores} cores"


def _warm_up(config: Any) -> None:
    """Let each batch size that a GPU runs run once before the model is READY."""
    sizes = [2**power for power in range((config.max_batch_size - 1).bit_length())] + [config.max_batch_size]
    for size in sizes:
        warm_up = config.model_warmup.add(name=f"batch {size}", batch_size=size)
        for tensor in config.input:
            warm_up.inputs[tensor.name].data_type = tensor.data_type
            warm_up.inputs[tensor.name].dims.extend(tensor.dims)
            warm_up.inputs[tensor.name].zero_data = True


def fit_all(config: Any, towers: Towers, machine: Machine, present: Any | None = None) -> bool:
    """Put what both want into a `ModelConfig`, the dimensions first; whether that changed it."""
    is_resized = towers.fit(config)
    return machine.fit(config, present) or is_resized


def write_served(models: Path, folder: Path, machine: Machine, towers: Towers | None = None) -> None:
    """Write the repository that is served to `folder`: links to what `models` has, also to what comes there later.

    Configurations that `machine` or `towers` change are files.
    """
    for model in (path.parent for path in models.glob("*/config.pbtxt")):
        (folder / model.name / "configs").mkdir(parents=True)
        for path in (*model.iterdir(), *model.glob("configs/*")):
            if path.name != "configs":
                (folder / path.relative_to(models)).symlink_to(path.resolve())
    rewrite_configs(folder, lambda config: fit_all(config, towers or Towers(), machine))


def rewrite_configs(folder: Path, change: Callable[[Any], bool]) -> None:
    """Write those configurations of a repository anew that `change` changes."""
    from google.protobuf import text_format

    for path in sorted([*folder.glob("*/config.pbtxt"), *folder.glob("*/configs/*.pbtxt")]):
        name = path.stem if path.parent.name == "configs" else None
        config = read_config(folder, path.relative_to(folder).parts[0], name)
        if change(config):
            path.unlink()
            path.write_text(text_format.MessageToString(config))
