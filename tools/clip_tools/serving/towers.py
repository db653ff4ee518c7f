"""What the exported image and text towers change in the model configurations: tensor dimensions, and resizing.

The configurations in `models/` are those of ViT-B-32.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_tools.export.manifest import Manifest
from clip_tools.repository import deployment, engine_of, text_deployment
from clip_tools.serving.engine import manifest_of

# The defaults of `preprocess`.
_DEFAULT_FIT = {"resize_mode": "shortest", "interpolation": "bicubic", "fill_color": "0"}


@dataclass(frozen=True)
class Towers:
    """The manifests of both towers; None if unknown, which leaves the configurations unchanged."""

    image: Manifest | None = None
    text: Manifest | None = None

    @classmethod
    def of(cls, models: Path, config_name: str | None = None) -> "Towers":
        """The towers of a deployment."""
        engines = [
            engine_of(found).file
            for found in (deployment(models, config_name), text_deployment(models, config_name))
            if found
        ]
        return cls(*map(manifest_of, engines))

    def apply_to(self, config: Any) -> bool:
        """Adapt a `ModelConfig` to the towers; whether that changed it."""
        before = config.SerializeToString(deterministic=True)
        names = {tensor.name for tensor in (*config.input, *config.output)}
        made = self.text if names & {"text", "tokens"} else self.image
        if made:
            for name, dims in made.tensors.items():
                _resize(config, name, dims)
        if made and "image_bytes" in names and config.backend == "python":
            for key, value in made.fit.items():
                if key in config.parameters or value != _DEFAULT_FIT[key]:
                    config.parameters[key].string_value = value
        return bool(config.SerializeToString(deterministic=True) != before)


def _resize(config: Any, name: str, dims: list[int]) -> None:
    """Set the dimensions of a tensor everywhere in a configuration."""
    places = [tensor.dims for tensor in (*config.input, *config.output) if tensor.name == name]
    places += [warm_up.inputs[name].dims for warm_up in config.model_warmup if name in warm_up.inputs]
    for spec in config.optimization.cuda.graph_spec:
        places += [shapes[name].dim for shapes in (spec.input, spec.graph_lower_bound.input) if name in shapes]
    for place in places:
        place[:] = dims
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        for key, value in accelerator.parameters.items():  # TensorRT's profile: "pixels:16x224x224x3"
            if found := re.fullmatch(rf"{name}:(\d+)x[\dx]+", value):
                accelerator.parameters[key] = f"{name}:{found[1]}x{'x'.join(map(str, dims))}"
