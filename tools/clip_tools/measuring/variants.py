"""Writes model repositories that differ from the committed one in the values that a measurement varies."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_tools.errors import ToolError, needs_extra
from clip_tools.export.external_data import load_graph, save_graph
from clip_tools.paths import MODELS
from clip_tools.repository import deployment, read_config, write_config
from clip_tools.serving.machine import Machine

TENSOR_MODEL = "clip_tensors"
TENSOR_INPUT = "tensors"
# Of every OpenAI and LAION ViT-B-32.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Variant:
    """What is unlike the committed repository; None leaves the committed value.

    `engine_threads` are those of each engine instance; 0 is ONNX Runtime's choice. `max_batch` limits the batches that
    Triton forms, not a request. `with_tensor_model` adds a model that takes FP32 tensors, for clients that preprocess.
    """

    config_name: str | None = None
    preprocess_instances: int | None = None
    engine_instances: int | None = None
    engine_threads: int | None = None
    max_batch: int | None = None
    queue_delay_us: int | None = None
    with_tensor_model: bool = False


def write_repository(variant: Variant, folder: Path, models: Path = MODELS) -> Path:
    """Write a variant's repository to `folder`: its configurations, and links to the original's other files."""

    def copy(source: str, target: str) -> None:
        if source.endswith(".pbtxt"):
            shutil.copyfile(source, target)
        else:
            Path(target).symlink_to(Path(source).resolve())

    shutil.copytree(models, folder, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (path.parent.name for path in models.glob("*/config.pbtxt")):
        config = read_config(models, name, variant.config_name)
        if change(config, variant):
            write_config(folder, name, config, variant.config_name)
    if variant.with_tensor_model:
        write_tensor_model(folder)
    return folder


def committed_variant(models: Path = MODELS, config_name: str | None = None) -> Variant:
    """The deployment as it is served here, in every value that a variant can name."""
    steps = deployment(models, config_name)
    for step in steps:
        Machine.here().apply_to(step.config)
    preprocess = next(one.config for one in steps if one.config.backend == "python")
    engine = next(one.config for one in steps if one.config.backend and one.config.backend != "python")
    return Variant(
        config_name=config_name,
        preprocess_instances=preprocess.instance_group[0].count,
        engine_instances=engine.instance_group[0].count,
        engine_threads=int(engine.parameters["intra_op_thread_count"].string_value or 0),
        max_batch=steps[-1].config.max_batch_size,
        queue_delay_us=engine.dynamic_batching.max_queue_delay_microseconds,
    )


def change(config: Any, variant: Variant) -> bool:
    """Put the variant's values into a `ModelConfig`; whether that changed it."""
    before = config.SerializeToString(deterministic=True)
    if config.name == "preprocess" or config.backend == "python":
        served = type(config)()
        served.CopyFrom(config)
        Machine.here().apply_to(served)
        if variant.preprocess_instances not in (None, served.instance_group[0].count):
            config.instance_group[0].count = variant.preprocess_instances
            config.instance_group[0].ClearField("name")  # so that it is served in as many
    elif config.backend:
        if variant.engine_instances is not None:
            config.instance_group[0].count = variant.engine_instances
        if variant.engine_threads == 0:
            config.parameters.pop("intra_op_thread_count", None)
        elif variant.engine_threads is not None:
            config.parameters["intra_op_thread_count"].string_value = str(variant.engine_threads)
        if variant.queue_delay_us not in (None, config.dynamic_batching.max_queue_delay_microseconds):
            config.dynamic_batching.max_queue_delay_microseconds = variant.queue_delay_us
    if variant.max_batch is not None and config.HasField("dynamic_batching"):
        limit_batches(config, variant.max_batch)
    return bool(config.SerializeToString(deterministic=True) != before)


def limit_batches(config: Any, images: int) -> None:
    """Let Triton form batches of so many images. `max_batch_size`, which bounds a request, never shrinks."""
    if images < config.max_batch_size:
        preferred = config.dynamic_batching.preferred_batch_size
        preferred[:] = [size for size in preferred if size <= images] or [images]
    else:
        config.max_batch_size = images


def write_tensor_model(models: Path) -> None:
    """Add `clip_tensors`: `clip_onnx` with an FP32 input of (N, 3, 224, 224) that the client has normalised.

    It is the exported graph with another beginning: both run the same arithmetic from the patches on.
    """
    with needs_extra("export"):
        import onnx  # noqa: F401
    source = models / "clip_onnx" / "1" / "model.onnx"
    if not source.is_file():
        raise ToolError(f"{source} is not there: make it with `clip-tools export-onnx`")
    target = models / TENSOR_MODEL / "1" / "model.onnx"
    target.parent.mkdir(parents=True)
    graph = load_graph(source)
    take_tensors(graph)
    save_graph(graph, target)
    config = read_config(models, "clip_onnx")
    config.name = TENSOR_MODEL
    config.input[0].name = TENSOR_INPUT
    config.input[0].data_type = 11  # TYPE_FP32
    config.input[0].dims[:] = [3, 224, 224]
    write_config(models, TENSOR_MODEL, config, None)


def take_tensors(model: Any) -> None:
    """Give an exported graph an input of normalised tensors, in place of its pixels.

    The tensors are made pixels again, in three cheap nodes where the pixels were cast to floats: the graph may hold the
    normalisation in its weights. Raises ToolError for a graph that does not begin with a Cast of its pixels.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    pixels = graph.input[0]
    cast = next((node for node in graph.node if node.op_type == "Cast" and list(node.input) == [pixels.name]), None)
    if cast is None:
        raise ToolError("the exported graph has no Cast of its pixels: is it an image tower?")
    for name, values in (("tensors_std", STD), ("tensors_mean", MEAN)):
        constant = 255 * np.array(values, np.float32).reshape(3, 1, 1)
        graph.initializer.append(numpy_helper.from_array(constant, name))
    nodes = [
        helper.make_node("Mul", [TENSOR_INPUT, "tensors_std"], ["tensors_scaled"]),
        helper.make_node("Add", ["tensors_scaled", "tensors_mean"], ["tensors_as_pixels"]),
        helper.make_node("Transpose", ["tensors_as_pixels"], list(cast.output), perm=[0, 2, 3, 1]),
        *(node for node in graph.node if node is not cast),
    ]
    for node in nodes:  # the batch size is read off the input's shape, whose first number stays the same
        node.input[:] = [TENSOR_INPUT if name == pixels.name else name for name in node.input]
    batch = pixels.type.tensor_type.shape.dim[0].dim_param or "batch"
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(TENSOR_INPUT, TensorProto.FLOAT, [batch, 3, 224, 224]))
