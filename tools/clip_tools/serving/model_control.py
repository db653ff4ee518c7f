"""A running server's models over gRPC: what is loaded and how configured; load, unload, and a probe of each."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from clip_tools.errors import ToolError, missing_extra
from clip_tools.repository import ENSEMBLE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_UNREACHABLE = 3  # exit code
_PROBE_TIMEOUT_S = 60.0


class ModelControl(Protocol):
    """What `clip-tools swap` needs of a server. Each method raises ToolError with the server's reason."""

    def configuration(self, model: str) -> Any:
        """The `ModelConfig` that a loaded model has now, as the server completed it."""

    def ready_models(self) -> list[str]:
        """The names of the models that answer requests."""

    def load(self, model: str, config: Any) -> None:
        """Load the model with this `ModelConfig`, in place of the one it may have; return when it is ready."""

    def unload(self, model: str) -> None:
        """Begin to unload the model; the requests that it has are answered. One that is not loaded is no error."""

    def embed_pixels(self, model: str, pixels: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.float32]":
        """What the model itself answers for `pixels` (N, 224, 224, 3) uint8 RGB."""

    def embed_image(self, image: bytes) -> "npt.NDArray[np.float32]":
        """What `clip_ensemble` answers for one encoded image, (1, 512)."""

    def answered(self, model: str) -> int:
        """How many requests the model has answered since it was loaded, failures among them."""


class GrpcModelControl:
    """`ModelControl` of the server at a grpc:// URL, as a context manager."""

    def __init__(self, url: str) -> None:
        try:
            import tritonclient.grpc as triton
        except ImportError as error:
            raise missing_extra("server", error) from error
        if not re.match(r"(grpc://)?[^/]+:\d+$", url):
            raise ToolError(f"'{url}': expected grpc://HOST:PORT; models are loaded over gRPC", exit_code=2)
        self.url = url
        self._triton = triton
        self._client = triton.InferenceServerClient(url.removeprefix("grpc://"))

    def __enter__(self) -> "GrpcModelControl":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            message = error.message() or str(error)
            if "explicit model load" in message:
                raise ToolError(
                    f"the server at {self.url} does not let its models be changed: start it with "
                    "--model-control-mode=explicit, as `clip-tools serve` does"
                ) from error
            if error.status() == "StatusCode.UNAVAILABLE" and "connect" in message:
                raise ToolError(f"nothing listens at {self.url}: start the server", exit_code=_UNREACHABLE) from error
            raise ToolError(reason_in(message)) from error

    def configuration(self, model: str) -> Any:
        with self._our_errors():
            return self._client.get_model_config(model).config

    def ready_models(self) -> list[str]:
        with self._our_errors():
            return [model.name for model in self._client.get_model_repository_index().models if model.state == "READY"]

    def load(self, model: str, config: Any) -> None:
        from google.protobuf import json_format

        with self._our_errors():
            self._client.load_model(model, config=json_format.MessageToJson(config, preserving_proto_field_name=True))

    def unload(self, model: str) -> None:
        with self._our_errors():
            self._client.unload_model(model)

    def _infer(self, model: str, name: str, datatype: str, array: "npt.NDArray[Any]") -> "npt.NDArray[np.float32]":
        with self._our_errors():
            tensor = self._triton.InferInput(name, list(array.shape), datatype)
            tensor.set_data_from_numpy(array)
            answer = self._client.infer(model, [tensor], client_timeout=_PROBE_TIMEOUT_S).as_numpy("embedding")
        if answer is None:
            raise ToolError(f"{model} has no output 'embedding'")
        embedding: npt.NDArray[np.float32] = answer
        return embedding

    def embed_pixels(self, model: str, pixels: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.float32]":
        return self._infer(model, "pixels", "UINT8", pixels)

    def embed_image(self, image: bytes) -> "npt.NDArray[np.float32]":
        import numpy as np

        return self._infer(ENSEMBLE, "image_bytes", "BYTES", np.array([[image]], dtype=object))

    def answered(self, model: str) -> int:
        with self._our_errors():
            stats = self._client.get_inference_statistics(model).model_stats
        return sum(stat.inference_stats.success.count + stat.inference_stats.fail.count for stat in stats)


def reason_in(message: str) -> str:
    """The reason itself, in one line, out of Triton's message about a model that did not load."""
    first = message.split("\n\nAt:", maxsplit=1)[0].strip().rstrip(";")
    found = re.search(r"is at UNAVAILABLE state: (?:\w[\w ]*: )?(?:TritonModelException: )?(.*)", first, re.DOTALL)
    return " ".join((found[1] if found else first).split())
