"""open_clip's own pixels and embeddings: the reference that everything else is compared with.

It uses open_clip's transform and model and none of the served code, which would repeat its own mistakes.
"""

import contextlib
import logging
import re
import textwrap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError, needs_extra

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Orientation = Literal["ignore", "exif"]
ORIENTATIONS: tuple[Orientation, ...] = get_args(Orientation)

DEFAULT_MODEL = "ViT-B-32"
DEFAULT_PRETRAINED = "laion2b_s34b_b79k"


class WeightsUnavailable(ToolError):
    """The weights cannot be loaded: no hub answers, or the checkpoint is broken."""


class OtherTokenizer(ToolError):
    """The model needs a tokenizer that `tokenize` does not support."""


@dataclass(frozen=True)
class Weights:
    """An open_clip architecture and its weights: a pretrained tag, a checkpoint's path, or `random:SEED`."""

    model: str = DEFAULT_MODEL
    pretrained: str = DEFAULT_PRETRAINED

    @property
    def seed(self) -> int | None:
        """The seed of `random:SEED`; None for trained weights. Raises ToolError if it is not a number."""
        if not self.pretrained.startswith("random:"):
            return None
        if not re.fullmatch(r"random:\d+", self.pretrained):
            raise ToolError(f"--pretrained {self.pretrained}: expected random:SEED with a whole number", exit_code=2)
        return int(self.pretrained.removeprefix("random:"))

    @property
    def checkpoint_sha256(self) -> str | None:
        """The sha256 of the checkpoint file; None for a tag or random weights."""
        path = Path(self.pretrained)
        if self.seed is not None or not path.is_file():
            return None
        return sha256_of(path)

    @property
    def identity(self) -> tuple[str, str]:
        """The architecture, and the checkpoint's sha256 or the tag: equal for the same weights."""
        return self.model, self.checkpoint_sha256 or self.pretrained


@dataclass(frozen=True)
class Oracle:
    """open_clip's model and its inference transform. `device` is PyTorch's name: "cpu" or "cuda".

    `orientation`: "ignore" leaves images as they are stored, as open_clip does; "exif" first rotates them by their EXIF
    orientation. `fit` is how the transform resizes, as parameters of `preprocess`.
    """

    model: Any
    transform: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: str = "cpu"
    precision: Literal["fp32", "fp16"] = "fp32"
    orientation: Orientation = "ignore"
    fit: Mapping[str, str] = field(default_factory=dict)

    def pixels(self, image_bytes: bytes) -> "npt.NDArray[np.uint8]":
        """(side, side, 3) uint8 RGB: the image after open_clip's transform, without its normalisation."""
        import numpy as np

        image = self._opened(image_bytes)
        for step in self.transform.transforms:
            if type(step).__name__ in ("ToTensor", "MaybeToTensor"):
                return np.asarray(image)
            image = step(image)
        raise ToolError("open_clip's transform has no ToTensor step: this open_clip is newer than these tools")

    def embed(self, images: Sequence[bytes], *, batch_size: int = 16) -> "npt.NDArray[np.float32]":
        """(N, D) float32, L2 norm 1: open_clip's embeddings of N >= 1 encoded images, in order."""
        import torch

        rows = []
        for start in range(0, len(images), batch_size):
            batch = [self.transform(self._opened(data)) for data in images[start : start + batch_size]]
            rows.append(self.encode(torch.stack(batch)))
        result: npt.NDArray[np.float32] = torch.cat(rows).numpy()
        return result

    def _opened(self, image_bytes: bytes) -> Any:
        from PIL import Image, ImageOps

        image = Image.open(BytesIO(image_bytes))
        return ImageOps.exif_transpose(image) if self.orientation == "exif" else image

    def encode(self, batch: Any) -> Any:
        """(N, D) float32 tensor on the CPU: the embeddings of a batch of N transformed images."""
        import torch

        with torch.inference_mode():
            inputs = batch.to(self.device, torch.float16 if self.precision == "fp16" else torch.float32)
            return self.model.encode_image(inputs, normalize=True).float().cpu()

    def embed_tokens(self, tokens: Any) -> "npt.NDArray[np.float32]":
        """(N, D) float32, L2 norm 1: open_clip's embeddings of N texts; `tokens` are (N, context) int64."""
        import torch

        with torch.inference_mode():
            parts = torch.split(torch.as_tensor(tokens).to(self.device), 32)
            rows = [self.model.encode_text(part, normalize=True).float().cpu() for part in parts]
        result: npt.NDArray[np.float32] = torch.cat(rows).numpy()
        return result


def load_tokenizer(model: str) -> Any:
    """open_clip's tokenizer of this architecture. Raises OtherTokenizer if `tokenize` does not support it."""
    with needs_extra("export"):
        import open_clip
    text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    other = text.get("hf_tokenizer_name") or text.get("hf_model_name") or ("siglip" in model.lower() and "SigLIP's")
    if other or text.get("tokenizer_kwargs"):  # checked before open_clip downloads it
        raise OtherTokenizer(
            f"{model}: its tokenizer ({other or text['tokenizer_kwargs']}) is not the byte-pair one that `tokenize` "
            "serves; export the image tower alone with --image",
            exit_code=2,
        )
    return open_clip.get_tokenizer(model)


def register_heif() -> None:
    """Let Pillow open HEIC and HEIF by pillow_heif, as in `preprocess`, if it is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def best_device() -> str:
    """PyTorch's device name: "cuda" if it can use a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_oracle(weights: Weights, *, device: str = "cpu", precision: Literal["fp32", "fp16"] = "fp32") -> Oracle:
    """The open_clip model of these weights. Raises ToolError for an unknown name, or weights that cannot be loaded.

    It turns TF32 off for this process, so that FP32 is FP32 on a GPU too.
    """
    with needs_extra("export"):
        import open_clip
        import torch
    register_heif()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config = open_clip.get_model_config(weights.model)
    if config is None:
        raise ToolError(
            f"--model {weights.model}: open_clip does not know it; see open_clip.list_models()", exit_code=2
        )
    seed = weights.seed
    is_tag = seed is None and not Path(weights.pretrained).is_file()
    if seed is not None:
        torch.manual_seed(seed)
    elif is_tag:
        _check_tag(weights, open_clip.list_pretrained_tags_by_model(weights.model))
        _go_offline_without_a_hub()
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.CRITICAL)  # open_clip logs what our error says
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            weights.model,
            pretrained=None if seed is not None else weights.pretrained,
            device=device,
            precision=precision,
            weights_only=True,  # never run code from a checkpoint
            **({} if is_tag else _transform_of_a_tag(weights.model)),
        )
    except Exception as error:  # hub, file and state-dict errors come in many types
        line = textwrap.shorten(str(error), 200, placeholder=" ...")
        if "weights_only" in line:  # torch's message advises to turn weights_only off
            line = "it is neither safetensors nor a torch checkpoint of plain tensors"
        raise WeightsUnavailable(
            f"the weights '{weights.pretrained}' of {weights.model} cannot be loaded: {type(error).__name__}: {line}; "
            "pass --pretrained with a local checkpoint, or random:0 for untrained weights"
        ) from error
    finally:
        log.setLevel(level)
    model.eval()
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    return Oracle(model, transform, mean, std, device, precision, fit=_fit(weights.model, preprocessing))


def _transform_of_a_tag(model: str) -> dict[str, Any]:
    """The image settings of the architecture's first tag, for random weights and checkpoint files.

    open_clip would use its default for these, which is wrong for SigLIP and MobileCLIP.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    known = open_clip.get_pretrained_cfg(model, tags[0]) if tags else {}
    names = ("mean", "std", "interpolation", "resize_mode")
    return {f"image_{name}": known[name] for name in names if known.get(name)}


def _go_offline_without_a_hub(timeout_s: float = 10.0) -> None:
    """Ask the hub once; if it does not answer, use only the local cache. Its client would retry for a minute."""
    import huggingface_hub

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=timeout_s)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a DNS look-up can outlast any timeout
    asking.start()
    asking.join(timeout_s)
    if not answered.is_set():
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _check_tag(weights: Weights, tags: list[str]) -> None:
    if "/" in weights.pretrained or Path(weights.pretrained).suffix:
        raise ToolError(f"--pretrained {weights.pretrained}: no such file", exit_code=2)
    if weights.pretrained not in tags:
        raise ToolError(
            f"--pretrained {weights.pretrained}: expected a checkpoint's path, random:SEED or a tag "
            f"of {weights.model}: {', '.join(tags) or 'it has none'}",
            exit_code=2,
        )


def _fit(name: str, preprocessing: Mapping[str, Any]) -> dict[str, str]:
    """The parameters with which `preprocess` resizes as this model does. Raises ToolError if it cannot."""
    size = preprocessing["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    fit = {key: str(preprocessing[key]) for key in ("resize_mode", "interpolation", "fill_color")}
    if height != width or preprocessing["mode"] != "RGB" or fit["interpolation"] not in ("bicubic", "bilinear"):
        raise ToolError(
            f"`preprocess` cannot serve {name}: it makes a square RGB image by bicubic or bilinear interpolation, and "
            f"the model takes {dict(preprocessing)}"
        )
    return fit
