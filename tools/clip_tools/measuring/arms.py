"""The arms of `clip-tools bench`: ways to get from encoded images to embeddings, each behind one small interface.

An arm's name is KIND[@CONFIG][:N]: CONFIG is a named configuration of the deployment (pytorch: fp16), N a number of
preprocess instances. Arms of one deployment share one running server.

ensemble-grpc   image bytes over gRPC to clip_ensemble, by clip_embed
ensemble-http   the same over HTTP
tensor-grpc     the client preprocesses and sends FP32 tensors, as many deployments do
json-http       the same tensors as JSON lists
pytorch         image bytes as base64 to the PyTorch service
preprocess      image bytes over gRPC to the first step alone: pixels come back
perf-analyzer   clip_ensemble again, loaded by perf_analyzer in place of Python
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from clip_tools.errors import ToolError, missing_extra
from clip_tools.measuring.variants import MEAN, STD, TENSOR_INPUT, TENSOR_MODEL
from clip_tools.measuring.workload import Workload
from clip_tools.repository import ENSEMBLE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KINDS = ("ensemble-grpc", "ensemble-http", "tensor-grpc", "json-http", "pytorch", "preprocess", "perf-analyzer")
TIMEOUT_S = 120.0
# What each precision has to keep on real photographs; DESIGN.md, "Precision". Random weights are no easier.
MIN_COSINE_FP32 = 0.99999
MIN_COSINE_OTHER = 0.97


@dataclass(frozen=True)
class Arm:
    """One parsed arm name."""

    kind: str
    config_name: str | None = None
    preprocess_instances: int | None = None

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """The arm of a name. Raises ToolError for one that is none."""
        found = re.fullmatch(r"([a-z-]+)(?:@([\w-]+))?(?::(\d+))?", name)
        if not found or found[1] not in KINDS or (found[1] == "pytorch" and name not in ("pytorch", "pytorch@fp16")):
            raise ToolError(f"'{name}' is no arm: expected KIND[@CONFIG][:N], KIND of {', '.join(KINDS)}", exit_code=2)
        return cls(found[1], found[2], int(found[3]) if found[3] else None)

    @property
    def name(self) -> str:
        """KIND[@CONFIG][:N]."""
        config = f"@{self.config_name}" if self.config_name else ""
        return self.kind + config + (f":{self.preprocess_instances}" if self.preprocess_instances else "")

    @property
    def server(self) -> object:
        """What tells its server from those of other arms."""
        return self.name if self.kind == "pytorch" else (self.config_name, self.preprocess_instances)

    @property
    def model(self) -> str:
        """The model that it asks, of a Triton arm."""
        if self.kind == "preprocess":
            return "preprocess"
        return TENSOR_MODEL if self.needs_tensor_model else ENSEMBLE

    @property
    def needs_tensor_model(self) -> bool:
        """Whether the server has to take FP32 tensors."""
        return self.kind in ("tensor-grpc", "json-http")


class Caller(Protocol):
    """An open client of one arm for one workload. `ask` is thread-safe; `check` is for afterwards."""

    def ask(self, indices: list[int]) -> "npt.NDArray[np.generic]": ...

    def check(self, indices: list[int], answer: "npt.NDArray[np.generic]") -> float: ...

    def close(self) -> None: ...


def open_caller(arm: Arm, service: Any, workload: Workload) -> Caller:
    """The client of an arm. Raises ToolError for an extra that is missing."""
    try:
        match arm.kind:
            case "ensemble-grpc":
                return _EmbeddingCaller(
                    arm, workload, service.options.grpc_url, "triton", getattr(service, "client_options", None)
                )
            case "ensemble-http":
                return _EmbeddingCaller(arm, workload, service.options.http_url, "triton")
            case "pytorch":
                return _EmbeddingCaller(arm, workload, service.url, "pytorch")
            case "tensor-grpc":
                return _TensorGrpcCaller(arm, workload, service.options.grpc_url)
            case "json-http":
                return _JsonHttpCaller(arm, workload, service.options.http_url)
            case "preprocess":
                return _PreprocessCaller(arm, workload, service.options.grpc_url)
    except ImportError as error:
        raise missing_extra("http", error) from error
    raise ToolError(f"{arm.name} is not asked request by request")


class _Caller:
    """What all have: the images, and the check of embeddings."""

    def __init__(self, arm: Arm, workload: Workload) -> None:
        self._arm, self._workload = arm, workload
        self._min_cosine = MIN_COSINE_FP32 if arm.config_name is None else MIN_COSINE_OTHER

    def _images(self, indices: list[int]) -> list[bytes]:
        return [self._workload.images[index] for index in indices]

    def check(self, indices: list[int], answer: "npt.NDArray[np.generic]") -> float:
        """The worst cosine to open_clip's embeddings. Raises ToolError when it is too low, or a row is missing."""
        expected = self._workload.embeddings[indices]
        if answer.shape != expected.shape:
            raise ToolError(f"{self._arm.name}: expected {expected.shape} embeddings, came {answer.shape}")
        worst = float((answer.astype(expected.dtype) * expected).sum(axis=1).min())
        if not worst >= self._min_cosine:
            raise ToolError(
                f"{self._arm.name}: an embedding has cosine {worst:.6f} to open_clip's own, at least "
                f"{self._min_cosine} was expected: are the weights the same?"
            )
        return worst


class _EmbeddingCaller(_Caller):
    def __init__(
        self, arm: Arm, workload: Workload, url: str, backend: Any, keys: dict[str, Any] | None = None
    ) -> None:
        from clip_embed import EmbeddingClient

        super().__init__(arm, workload)
        options = {"batch_size": 64, "timeout_s": TIMEOUT_S, "retry": None, **(keys or {})}
        self._client = EmbeddingClient(url, backend=backend, **options)

    def ask(self, indices: list[int]) -> "npt.NDArray[np.generic]":
        return self._client.embed(self._images(indices))

    def close(self) -> None:
        self._client.close()


class _GrpcCaller(_Caller):
    """Asks one model of the server itself: one tensor in, one out."""

    def __init__(self, arm: Arm, workload: Workload, url: str) -> None:
        import tritonclient.grpc as triton

        super().__init__(arm, workload)
        self._triton = triton
        self._client = triton.InferenceServerClient(url.removeprefix("grpc://"))

    def _infer(self, model: str, name: str, data: "npt.NDArray[Any]", datatype: str, output: str) -> Any:
        tensor = self._triton.InferInput(name, list(data.shape), datatype)
        tensor.set_data_from_numpy(data)
        return self._client.infer(model, [tensor], client_timeout=TIMEOUT_S).as_numpy(output)

    def close(self) -> None:
        self._client.close()


class _TensorGrpcCaller(_GrpcCaller):
    def ask(self, indices: list[int]) -> "npt.NDArray[np.generic]":
        tensors = client_tensors(self._images(indices))
        embeddings: npt.NDArray[np.generic] = self._infer(TENSOR_MODEL, TENSOR_INPUT, tensors, "FP32", "embedding")
        return embeddings


class _JsonHttpCaller(_Caller):
    def __init__(self, arm: Arm, workload: Workload, url: str) -> None:
        import httpx

        super().__init__(arm, workload)
        self._url = f"{url}/v2/models/{TENSOR_MODEL}/infer"
        self._http = httpx.Client(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))

    def ask(self, indices: list[int]) -> "npt.NDArray[np.generic]":
        import numpy as np

        tensors = client_tensors(self._images(indices))
        entry = {"name": TENSOR_INPUT, "datatype": "FP32", "shape": tensors.shape, "data": tensors.ravel().tolist()}
        answer = self._http.post(self._url, json={"inputs": [entry], "outputs": [{"name": "embedding"}]})
        answer.raise_for_status()
        (output,) = answer.json()["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    def close(self) -> None:
        self._http.close()


class _PreprocessCaller(_GrpcCaller):
    def ask(self, indices: list[int]) -> "npt.NDArray[np.generic]":
        import numpy as np

        images = np.array([[image] for image in self._images(indices)], dtype=object)
        pixels: npt.NDArray[np.generic] = self._infer("preprocess", "image_bytes", images, "BYTES", "pixels")
        return pixels

    def check(self, indices: list[int], answer: "npt.NDArray[np.generic]") -> float:
        """1 less the mean pixel difference in 255ths. Exact mode has to give open_clip's very pixels."""
        import numpy as np

        expected = self._workload.pixels[indices]
        if answer.shape != expected.shape:
            raise ToolError(f"{self._arm.name}: expected {expected.shape} pixels, came {answer.shape}")
        difference = float(np.abs(answer.astype(np.int16) - expected).mean() / 255)
        if difference > (0 if self._arm.config_name is None else 0.05):
            raise ToolError(f"{self._arm.name}: pixels differ from open_clip's by {255 * difference:.2f} in the mean")
        return 1 - difference


def client_tensors(images: list[bytes]) -> "npt.NDArray[np.float32]":
    """(N, 3, 224, 224) float32, normalised: what a client sends that preprocesses by itself, with Pillow and numpy.

    The pixels are open_clip's.
    """
    import numpy as np

    from clip_tools.measuring.bare import open_preprocess

    preprocess = open_preprocess()
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    rows = [((preprocess(image).astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1) for image in images]
    return np.ascontiguousarray(np.stack(rows), np.float32)
