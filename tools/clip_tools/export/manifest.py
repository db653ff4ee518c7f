"""What an exported ONNX file is, in a manifest beside it: weights, precision, tensors, agreement with PyTorch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clip_tools.digest import files_of, sha256_of
from clip_tools.oracle import Weights
from clip_tools.verification.gates import Precision


class Described(Protocol):
    """A manifest: of a graph, or of a plan."""

    def to_json(self) -> str:
        """What its file holds."""
        ...


# The version of the graph's form: 1 changed the pixels' layout before their type, which TensorRT cannot; 2 computed
# every token in the last block; 3 had a convolution and 602 nodes.
GRAPH = 4


@dataclass(frozen=True)
class Manifest:
    """What an exported ONNX file is, kept beside it.

    `graph` is the version of the graph's form, `tensors` the dimensions of what it takes and gives, of one image or
    text, `fit` how `preprocess` resizes for it; empty: an earlier version's, 224 px and 512 numbers. Of the lower
    precisions alone: `matrices` counts the products by precision, `gate` has the agreement with open_clip and why it
    counts for nothing, if it does, and `calibration` what an eight-bit graph was calibrated on.
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
        """The manifest beside the model; None when there is none or it is another version's."""
        try:
            return cls(**json.loads(manifest_path(model_path).read_text()))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None

    @property
    def identity(self) -> tuple[str, str]:
        """`Weights.identity` of the weights in the file."""
        return self.model, self.checkpoint_sha256 or self.pretrained

    def to_json(self) -> str:
        """The manifest as its file holds it."""
        return json.dumps(asdict(self), indent=2)


def manifest_path(model_path: Path) -> Path:
    """Where a model's manifest is: `manifest.json` of `model.onnx`, `manifest.fp16.json` of `model.fp16.onnx`."""
    variant = model_path.name.split(".")[1:-1]
    return model_path.with_name(".".join(["manifest", *variant, "json"]))


def is_exported(model_path: Path, weights: Weights) -> bool:
    """Whether `model_path` holds these very weights, unchanged since its export."""
    manifest = Manifest.read(model_path)
    return (
        manifest is not None
        and manifest.graph == GRAPH
        and model_path.is_file()
        and manifest.identity == weights.identity
        and sha256_of(model_path) == manifest.sha256
    )


def put_in_place(draft: Path, manifest: Described, output: Path, beside: Path | None = None) -> None:
    """Move a file that has passed to `output`, and its manifest to `beside`, by default the model's `manifest_path`.

    The draft's folder is on the same disk.
    """
    # The old manifest goes first: a crash between the two leaves a model without one, never with a wrong one.
    beside = beside or manifest_path(output)
    beside.unlink(missing_ok=True)
    new, old = files_of(draft), files_of(output)
    if len(new) > 1 or len(old) > 1:  # nor a graph with the weights of another
        for file in old:
            file.unlink(missing_ok=True)
    for file in reversed(new):
        file.replace(output.with_name(output.name + file.name.removeprefix(draft.name)))
    text = draft.with_name("manifest.json")
    text.write_text(manifest.to_json() + "\n")
    text.replace(beside)
