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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton

from clip_embed import EmbeddingClient
from clip_tools.accuracy.gates import GATES
from clip_tools.errors import ToolError, needs_extra
from clip_tools.measuring.load import Ask, Check
from clip_tools.measuring.variants import MEAN, STD, TENSOR_INPUT, TENSOR_MODEL
from clip_tools.measuring.workload import Workload
from clip_tools.repository import ENSEMBLE

KINDS = ("ensemble-grpc", "ensemble-http", "tensor-grpc", "json-http", "pytorch", "preprocess", "perf-analyzer")
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Arm:
    """One parsed arm name."""

    kind: str
    config_name: str | None = None
    preprocess_instances: int | None = None

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """The arm of this name. Raises ToolError for an unknown one."""
        found = re.fullmatch(r"([a-z-]+)(?:@([\w-]+))?(?::(\d+))?", name)
        if not found or found[1] not in KINDS or (found[1] == "pytorch" and name not in ("pytorch", "pytorch@fp16")):
            raise ToolError(f"'{name}' is no arm: expected KIND[@CONFIG][:N], KIND of {', '.join(KINDS)}", exit_code=2)
        return cls(found[1], found[2], int(found[3]) if found[3] else None)

    @property
    def name(self) -> str:
        """KIND[@CONFIG][:N]."""
        return self.kind + self._variant

    @property
    def server(self) -> str:
        """The name of its server: arms with the same name share one."""
        return self.name if self.kind == "pytorch" else f"triton{self._variant}"

    @property
    def _variant(self) -> str:
        config = f"@{self.config_name}" if self.config_name else ""
        return config + (f":{self.preprocess_instances}" if self.preprocess_instances else "")

    @property
    def model(self) -> str:
        """The Triton model that the arm asks."""
        if self.kind == "preprocess":
            return "preprocess"
        return TENSOR_MODEL if self.kind in ("tensor-grpc", "json-http") else ENSEMBLE


@dataclass(frozen=True)
class Caller:
    """An open client of one arm for one workload. `ask` is thread-safe; `check` is for afterwards."""

    ask: Ask
    check: Check


Send = Callable[[list[bytes]], Any]
"""Sends images and returns the rows of the answer."""


def open_caller(arm: Arm, service: Any, workload: Workload, stack: ExitStack) -> Caller:
    """The client of an arm, which the stack closes. Raises ToolError for an extra that is missing."""
    with needs_extra("http"):
        send = _open(arm, service, stack)
    check = _check_pixels if arm.kind == "preprocess" else _check_embeddings
    return Caller(
        lambda indices: send([workload.images[index] for index in indices]),
        lambda indices, answer: check(arm, workload, indices, answer),
    )


def _open(arm: Arm, service: Any, stack: ExitStack) -> Send:
    if arm.kind == "json-http":
        return _open_json(service.http_url, stack)
    if arm.kind in ("tensor-grpc", "preprocess"):
        return _open_grpc(arm, service.url, stack)
    url = service.http_url if arm.kind == "ensemble-http" else service.url
    options: dict[str, Any] = {"backend": "pytorch" if arm.kind == "pytorch" else "triton", **service.client_options}
    client = EmbeddingClient(url, batch_size=64, timeout_s=TIMEOUT_S, retry=None, **options)
    return stack.enter_context(client).embed


def _open_grpc(arm: Arm, url: str, stack: ExitStack) -> Send:
    client = stack.enter_context(triton.InferenceServerClient(url.removeprefix("grpc://")))

    def infer(name: str, data: Any, datatype: str, output: str) -> Any:
        tensor = triton.InferInput(name, list(data.shape), datatype)
        tensor.set_data_from_numpy(data)
        return client.infer(arm.model, [tensor], client_timeout=TIMEOUT_S).as_numpy(output)

    def send(images: list[bytes]) -> Any:
        if arm.kind == "tensor-grpc":
            return infer(TENSOR_INPUT, client_tensors(images), "FP32", "embedding")
        return infer("image_bytes", np.array([[image] for image in images], dtype=object), "BYTES", "pixels")

    return send


def _open_json(url: str, stack: ExitStack) -> Send:
    import httpx

    client = stack.enter_context(httpx.Client(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)))

    def send(images: list[bytes]) -> Any:
        tensors = client_tensors(images)
        entry = {"name": TENSOR_INPUT, "datatype": "FP32", "shape": tensors.shape, "data": tensors.ravel().tolist()}
        body = {"inputs": [entry], "outputs": [{"name": "embedding"}]}
        answer = client.post(f"{url}/v2/models/{TENSOR_MODEL}/infer", json=body).raise_for_status()
        (output,) = answer.json()["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    return send


def _check_embeddings(arm: Arm, workload: Workload, indices: list[int], answer: Any) -> float:
    """The worst cosine to open_clip's embeddings. Raises ToolError when it is too low, or a row is missing."""
    expected = _expected(arm, workload.embeddings, indices, answer)
    worst = float((answer.astype(expected.dtype) * expected).sum(axis=1).min())
    gates = [GATES["fp32"]] if arm.config_name is None else GATES.values()  # a name may mean any precision
    least = min(gate.worst_cosine for gate in gates)
    if not worst >= least:
        raise ToolError(
            f"{arm.name}: an embedding has cosine {worst:.6f} to open_clip's own, at least {least} was expected: are "
            "the weights the same?"
        )
    return worst


def _check_pixels(arm: Arm, workload: Workload, indices: list[int], answer: Any) -> float:
    """1 less the mean pixel difference in 255ths. Exact mode must give open_clip's pixels."""
    expected = _expected(arm, workload.pixels, indices, answer)
    difference = float(abs(answer.astype("int16") - expected).mean() / 255)
    if difference > (0 if arm.config_name is None else 0.05):
        raise ToolError(f"{arm.name}: pixels differ from open_clip's by {255 * difference:.2f} in the mean")
    return 1 - difference


def _expected(arm: Arm, of_all: Any, indices: list[int], answer: Any) -> Any:
    expected = of_all[indices]
    if answer.shape != expected.shape:
        raise ToolError(f"{arm.name}: expected an answer of shape {expected.shape}, came {answer.shape}")
    return expected


def client_tensors(images: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """(N, 3, 224, 224) float32, normalised, from open_clip's pixels: what a client sends if it preprocesses."""
    from clip_tools.in_process import open_preprocess

    preprocess = open_preprocess()
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    rows = [((preprocess(image).astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1) for image in images]
    return np.ascontiguousarray(np.stack(rows), np.float32)
