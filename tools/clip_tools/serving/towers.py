"""What the exported towers want of the configurations: the dimensions of their tensors, and how `preprocess` resizes.

`models/` says what ViT-B-32 wants; the repository that is served says what was exported.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_tools.export.manifest import Manifest
from clip_tools.repository import deployment, text_deployment
from clip_tools.serving.told import manifest_of

# What `preprocess` does where a configuration does not say.
_FIT = {"resize_mode": "shortest", "interpolation": "bicubic", "fill_color": "0"}


@dataclass(frozen=True)
class Towers:
    """The manifests of both; None where one is not known, and then the configurations stay as they are."""

    image: Manifest | None = None
    text: Manifest | None = None

    @classmethod
    def of(cls, models: Path, config_name: str | None = None) -> "Towers":
        """Those of a deployment."""
        engines = [
            found[-2].file for found in (deployment(models, config_name), text_deployment(models, config_name)) if found
        ]
        return cls(*(manifest_of(file) if file else None for file in engines))

    def fit(self, config: Any) -> bool:
        """Put what they want into a `ModelConfig`; whether that changed it."""
        before = config.SerializeToString(deterministic=True)
        names = {tensor.name for tensor in (*config.input, *config.output)}
        made = self.text if names & {"text", "tokens"} else self.image
        if made:
            for name, dims in made.tensors.items():
                _resize(config, name, dims)
        if made and "image_bytes" in names and config.backend == "python":
            for key, value in made.fit.items():
                if key in config.parameters or value != _FIT[key]:
                    config.parameters[key].string_value = value
        return bool(config.SerializeToString(deterministic=True) != before)


def _resize(config: Any, name: str, dims: list[int]) -> None:
    """Give the tensor of this name these dimensions wherever the configuration has it."""
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
