"""Model control of a running server over gRPC: lists, loads, unloads and asks its models."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from clip_tools.errors import ToolError, needs_extra
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE
from clip_tools.serving.access import ADMIN_KEY_VARIABLE
from clip_tools.serving.key_files import access_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_UNREACHABLE = 3  # exit code
_PROBE_TIMEOUT_S = 60.0


class ServerFullError(ToolError):
    """The server has no room in its queues: try again later."""


class ModelControl(Protocol):
    """What `clip-tools swap` needs of a server. Each method raises ToolError with the server's reason."""

    def configuration(self, model: str) -> Any:
        """The `ModelConfig` of a loaded model, as the server completed it."""

    def ready_models(self) -> list[str]:
        """The names of the models that answer requests."""

    def load(self, model: str, config: Any) -> None:
        """Load the model with this `ModelConfig`, or replace the loaded one; return when it is ready."""

    def unload(self, model: str) -> None:
        """Start to unload the model, which answers its requests first. No error if it is not loaded."""

    def forget_failures(self, models: Iterable[str]) -> None:
        """Make the server ready again if it is not because one of these models did not load."""

    def embed_pixels(self, model: str, pixels: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.float32]":
        """The model's own answer for `pixels` (N, side, side, 3) uint8 RGB."""

    def embed_image(self, image: bytes) -> "npt.NDArray[np.float32]":
        """The answer of `clip_ensemble` for one encoded image, (1, D)."""

    def embed_text(self, text: bytes) -> "npt.NDArray[np.float32]":
        """The answer of `clip_text_ensemble` for one text in UTF-8, (1, D)."""

    def answered(self, model: str) -> int:
        """The requests that the model has answered since it was loaded, with failures."""


class GrpcModelControl:
    """`ModelControl` of the server at a grpc:// or grpcs:// URL, as a context manager.

    It uses the key file of a server that this user runs on this machine, else the keys of the environment. For grpcs://
    it uses the certificates of the environment, as the client does.
    """

    def __init__(self, url: str) -> None:
        with needs_extra("server"):
            import tritonclient.grpc as triton

            from clip_embed.credentials import Credentials
            from clip_embed.endpoint import parse_url
        if not re.match(r"(grpcs?://)?[^/]+:\d+$", url):
            raise ToolError(f"'{url}': expected grpc://HOST:PORT; models are loaded over gRPC", exit_code=2)
        self.url = url
        self._triton = triton
        self._endpoint = parse_url(url)
        access = access_of(url, os.environ)
        self._headers = access.grpc_headers() if access else {}
        tls = {}
        if self._endpoint.is_secure:
            try:
                credentials = Credentials.from_environment(os.environ)
                credentials.check(self._endpoint)
            except ValueError as error:
                raise ToolError(str(error), exit_code=2) from error
            tls = {"ssl": True, "creds": credentials.grpc_credentials()}
        self._client = triton.InferenceServerClient(self._endpoint.address, **tls)

    def __enter__(self) -> "GrpcModelControl":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        from tritonclient.utils import InferenceServerException

        from clip_embed.errors import ServerOverloadedError, error_from_grpc

        try:
            yield
        except InferenceServerException as error:
            message, status = error.message() or str(error), str(error.status()).removeprefix("StatusCode.")
            if isinstance(error_from_grpc(status, message, url=self.url), ServerOverloadedError):
                raise ServerFullError(message) from error
            if "explicit model load" in message:
                raise ToolError(
                    f"the server at {self.url} does not allow model control: start it with "
                    "--model-control-mode=explicit, as `clip-tools serve` does"
                ) from error
            if status == "UNAVAILABLE" and "connect" in message:
                raise ToolError(f"nothing listens at {self.url}: start the server", exit_code=_UNREACHABLE) from error
            if "is restricted, expecting header" in message:
                wrong = "rejects this admin key" if self._headers else "requires an admin key"
                raise ToolError(
                    f"the server at {self.url} {wrong}: set {ADMIN_KEY_VARIABLE} to the one it was started with"
                ) from error
            raise ToolError(reason_in(message)) from error

    def configuration(self, model: str) -> Any:
        with self._our_errors():
            return self._client.get_model_config(model, headers=self._headers).config

    def ready_models(self) -> list[str]:
        with self._our_errors():
            index = self._client.get_model_repository_index(headers=self._headers)
        return [model.name for model in index.models if model.state == "READY"]

    def load(self, model: str, config: Any) -> None:
        from google.protobuf import json_format

        with self._our_errors():
            as_json = json_format.MessageToJson(config, preserving_proto_field_name=True)
            self._client.load_model(model, config=as_json, headers=self._headers)

    def unload(self, model: str) -> None:
        with self._our_errors():
            self._client.unload_model(model, headers=self._headers)

    def forget_failures(self, models: Iterable[str]) -> None:
        """Load and unload a copy of the ensemble under the name of each model that did not load.

        Triton 24.10 counts such a model as not ready until it is unloaded, and unloads only loaded models. The copy
        needs no file and loads at once.
        """
        from google.protobuf import json_format

        with self._our_errors():
            if self._client.is_server_ready(headers=self._headers):
                return
            index = self._client.get_model_repository_index(headers=self._headers).models
            others = {model.name for model in index if model.state != "UNAVAILABLE" or model.reason == "unloaded"}
            config = self.configuration(ENSEMBLE)
            for config.name in set(models) - others:
                copy = json_format.MessageToJson(config, preserving_proto_field_name=True)
                # With a file, Triton does not need the model's version folder, which may be missing.
                self._client.load_model(config.name, config=copy, files={"file:1/none": b""}, headers=self._headers)
                self._client.unload_model(config.name, headers=self._headers)

    def _infer(self, model: str, name: str, datatype: str, array: "npt.NDArray[Any]") -> "npt.NDArray[np.float32]":
        with self._our_errors():
            tensor = self._triton.InferInput(name, list(array.shape), datatype)
            tensor.set_data_from_numpy(array)
            result = self._client.infer(model, [tensor], client_timeout=_PROBE_TIMEOUT_S, headers=self._headers)
            answer = result.as_numpy("embedding")
        if answer is None:
            raise ToolError(f"{model} has no output 'embedding'")
        embedding: npt.NDArray[np.float32] = answer
        return embedding

    def embed_pixels(self, model: str, pixels: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.float32]":
        return self._infer(model, "pixels", "UINT8", pixels)

    def embed_image(self, image: bytes) -> "npt.NDArray[np.float32]":
        import numpy as np

        return self._infer(ENSEMBLE, "image_bytes", "BYTES", np.array([[image]], dtype=object))

    def embed_text(self, text: bytes) -> "npt.NDArray[np.float32]":
        import numpy as np

        return self._infer(TEXT_ENSEMBLE, "text", "BYTES", np.array([[text]], dtype=object))

    def statistics(self, model: str = "") -> Any:
        """Triton's `ModelStatistics` of one model, or of each."""
        with self._our_errors():
            return self._client.get_inference_statistics(model, headers=self._headers).model_stats

    def answered(self, model: str) -> int:
        stats = self.statistics(model)
        return sum(stat.inference_stats.success.count + stat.inference_stats.fail.count for stat in stats)


def reason_in(message: str) -> str:
    """The reason in Triton's message about a model that did not load, in one line."""
    first = message.split("\n\nAt:", maxsplit=1)[0].strip().rstrip(";")
    found = re.search(r"is at UNAVAILABLE state: (?:\w[\w ]*: )?(?:TritonModelException: )?(.*)", first, re.DOTALL)
    return " ".join((found[1] if found else first).split())
