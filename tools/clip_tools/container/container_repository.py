"""Writes the model repository that the container serves: built files, and configurations adapted to this host."""

import itertools
import shutil
from pathlib import Path
from typing import Any

from clip_tools.accuracy.sample import FILE as SAMPLE
from clip_tools.export.export_text import MERGES
from clip_tools.serving.machine import Machine
from clip_tools.serving.served_repository import adapt_config, rewrite_configs
from clip_tools.serving.towers import Towers

_BUILT = ("*.onnx", "*.onnx.data", "*.plan", "manifest*.json", SAMPLE, MERGES, "__pycache__")


def write_container_repository(
    models: Path,
    folder: Path,
    *,
    files: dict[str, Path],
    max_batch: int | None,
    machine: Machine,
    config_name: str | None = None,
) -> None:
    """Copy `models` to `folder` without built files, link `files` into it, and adapt its configurations.

    Args:
        files: by their path in the repository, such as "clip_trt/1/model.plan".
        max_batch: see `set_max_batch`; None changes nothing.
        config_name: the configuration whose towers decide the tensor dimensions.
    """
    shutil.copytree(models, folder, ignore=shutil.ignore_patterns(*_BUILT))
    for target, source in files.items():
        (folder / target).symlink_to(source.resolve())

    towers = Towers.of(folder, config_name)

    def change(config: Any) -> bool:
        is_adapted = adapt_config(config, towers, machine)
        return (max_batch is not None and set_max_batch(config, max_batch)) or is_adapted

    rewrite_configs(folder, change)


def set_max_batch(config: Any, max_batch: int) -> bool:
    """Set the largest batch of a `ModelConfig`; whether that changed it.

    A request is never allowed to be larger than before, so only `clip_trt` may get a larger batch, of several requests.
    Preferred batches, warm-ups and CUDA graphs above `max_batch` are removed, and one of `max_batch` is the last.
    """
    is_plan = config.backend == "tensorrt"
    largest = max_batch if is_plan else min(max_batch, config.max_batch_size)
    if largest == config.max_batch_size:
        return False
    config.max_batch_size = largest
    if config.model_warmup:
        _cut(config.model_warmup, largest)
        config.model_warmup[-1].name = f"batch {largest}"
    if config.optimization.cuda.graph_spec:
        _cut(config.optimization.cuda.graph_spec, largest)
        specs = config.optimization.cuda.graph_spec
        for before, spec in itertools.pairwise(specs):
            spec.ClearField("graph_lower_bound")
            if spec.batch_size > before.batch_size + 1:
                spec.graph_lower_bound.batch_size = before.batch_size + 1
                for name, shape in spec.input.items():
                    spec.graph_lower_bound.input[name].CopyFrom(shape)
    preferred = [size for size in config.dynamic_batching.preferred_batch_size if size < largest]
    if is_plan and config.dynamic_batching.preferred_batch_size:
        del config.dynamic_batching.preferred_batch_size[:]
        config.dynamic_batching.preferred_batch_size.extend([*preferred, largest])
    return True


def _cut(entries: Any, largest: int) -> None:
    """Keep the entries below `largest`, and add one of that size, copied from the last entry."""
    last = type(entries[-1])()
    last.CopyFrom(entries[-1])
    last.batch_size = largest
    kept = [entry for entry in entries if entry.batch_size < largest]
    del entries[len(kept) :]
    entries.append(last)
    if largest == 1 and hasattr(last, "graph_lower_bound"):
        entries[-1].ClearField("graph_lower_bound")
