"""The manifest beside an exported ONNX file: its weights, precision, tensors, and agreement with PyTorch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clip_tools.accuracy.gates import Precision
from clip_tools.digest import files_of, sha256_of
from clip_tools.oracle import Weights


class Described(Protocol):
    """A manifest: of a graph, or of a plan."""

    def to_json(self) -> str:
        """The content of the manifest file."""
        ...


# The version of the graph that is exported. 1 changed the pixels' layout before their type, which TensorRT cannot do; 2
# computed every token in the last block; 3 had a convolution and 602 nodes.
GRAPH = 4


@dataclass(frozen=True)
class Manifest:
    """The manifest of an exported ONNX file.

    `graph` is the version of the graph. `tensors` has the dimensions of its inputs and outputs for one image or text,
    `fit` how `preprocess` resizes for it; empty in earlier versions, which have 224 px and 512 numbers. Only lower
    precisions have the rest: `matrices` counts the products by precision, `gate` is the agreement with open_clip and
    the reason if it counts for nothing, and `calibration` describes what an eight-bit graph was calibrated on.
    """

    sha256: str
    model: str
    pretrained: str
    checkpoint_sha256: str | None
    trained: bool
    precision: Precision
    opset: int
    max_batch: int
    worst_cosine: float
    max_abs_difference: float
    versions: dict[str, str]
    date: str
    graph: int = 1
    tensors: dict[str, list[int]] = field(default_factory=dict)
    fit: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, int] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, model_path: Path) -> "Manifest | None":
        """The manifest beside the model; None if it is missing or of another version."""
        try:
            return cls(**json.loads(manifest_path(model_path).read_text()))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None

    @property
    def identity(self) -> tuple[str, str]:
        """`Weights.identity` of the weights in the file."""
        return self.model, self.checkpoint_sha256 or self.pretrained

    def to_json(self) -> str:
        """The content of the manifest file."""
        return json.dumps(asdict(self), indent=2)


def manifest_path(model_path: Path) -> Path:
    """The path of a model's manifest: `manifest.json` for `model.onnx`, `manifest.fp16.json` for `model.fp16.onnx`."""
    variant = model_path.name.split(".")[1:-1]
    return model_path.with_name(".".join(["manifest", *variant, "json"]))


def is_exported(model_path: Path, weights: Weights) -> bool:
    """Whether `model_path` is this version's export of these weights, unchanged."""
    manifest = Manifest.read(model_path)
    return (
        manifest is not None
        and manifest.graph == GRAPH
        and model_path.is_file()
        and manifest.identity == weights.identity
        and sha256_of(model_path) == manifest.sha256
    )


def put_in_place(draft: Path, manifest: Described, output: Path, beside: Path | None = None) -> None:
    """Move a verified file to `output`, and its manifest to `beside`, by default the model's `manifest_path`.

    The draft must be on the same file system.
    """
    # The old manifest goes first: a crash in between leaves a model without a manifest, never with a wrong one.
    beside = beside or manifest_path(output)
    beside.unlink(missing_ok=True)
    new, old = files_of(draft), files_of(output)
    if len(new) > 1 or len(old) > 1:  # never a graph with the weights of another
        for file in old:
            file.unlink(missing_ok=True)
    for file in reversed(new):
        file.replace(output.with_name(output.name + file.name.removeprefix(draft.name)))
    text = draft.with_name("manifest.json")
    text.write_text(manifest.to_json() + "\n")
    text.replace(beside)
