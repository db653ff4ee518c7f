"""The gRPC transport: one channel, with Triton's messages serialised by `wire`."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clip_embed.credentials import Credentials
from clip_embed.endpoint import Endpoint
from clip_embed.errors import EmbeddingError, error_from_grpc
from clip_embed.server_info import ServerInfo
from clip_embed.wire import Embeddings, ImageBytes, grpc_request, read_grpc_answer

T = TypeVar("T")

_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The error that lists a request's bad images travels as metadata, which gRPC limits to 8 KiB by default.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    # Reconnect to a returned server within a second; the default is up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Detect a dead peer in calls without a deadline too. Triton closes the connection of a client that pings more often
    # than every 300 s (--grpc-http2-min-recv-ping-interval-without-data).
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


def _open(module: Any, endpoint: Endpoint, credentials: Credentials) -> Any:
    """A channel of `grpc` or of `grpc.aio`."""
    options = [*_OPTIONS, ("grpc.enable_http_proxy", 0 if endpoint.is_local else 1)]
    if endpoint.is_secure:
        return module.secure_channel(endpoint.address, credentials.grpc_credentials(), options=options)
    return module.insecure_channel(endpoint.address, options=options)


def _infer_call(channel: Any) -> Any:
    """The stub's ModelInfer for an already serialised request."""
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )


def _server_info(parameters: Any) -> ServerInfo:
    return ServerInfo.of({name: parameter.string_value for name, parameter in parameters.items()})


def _our_error(error: Any, endpoint: Endpoint) -> EmbeddingError:
    return error_from_grpc(error.code().name, error.details() or "", url=endpoint.url)


class GrpcTransport:
    """Implements `transport.Transport`."""

    def __init__(self, endpoint: Endpoint, model: str, credentials: Credentials) -> None:
        self._endpoint, self._model = endpoint, model
        self._metadata = credentials.grpc_metadata()
        self._channel = _open(grpc, endpoint, credentials)
        self._infer = _infer_call(self._channel)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Future[Embeddings]:
        call = self._infer.future(grpc_request(self._model, images), timeout=timeout_s, metadata=self._metadata)
        return self._answer(call, lambda answer: read_grpc_answer(answer, len(images)))

    def is_ready(self, timeout_s: float | None) -> Future[bool]:
        request = service_pb2.ModelReadyRequest(name=self._model)
        call = self._stub.ModelReady.future(request, timeout=timeout_s, metadata=self._metadata)
        return self._answer(call, lambda answer: bool(answer.ready))

    def server_info(self, timeout_s: float | None) -> Future[ServerInfo]:
        request = service_pb2.ModelConfigRequest(name=self._model)
        call = self._stub.ModelConfig.future(request, timeout=timeout_s, metadata=self._metadata)
        return self._answer(call, lambda answer: _server_info(answer.config.parameters))

    def _answer(self, call: Any, read: Callable[[Any], T]) -> Future[T]:
        answer = _Answer[T](call)

        def settle(_: Any) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(read(call.result()))
            except grpc.RpcError as error:
                ours = _our_error(error, self._endpoint)
                ours.__cause__ = error
                answer.set_exception(ours)
            except Exception as error:
                answer.set_exception(error)

        call.add_done_callback(settle)
        return answer

    def close(self) -> None:
        # Ctrl-C while grpc starts a call can leave a call that never ends, and channel.close() waits for all calls
        # without a limit (grpcio 1.85: 3 of 8 interrupted runs hung here). So it gets one second.
        closing = threading.Thread(target=self._channel.close, name="clip-embed-close", daemon=True)
        closing.start()
        closing.join(timeout=1.0)


class _Answer(Future[T]):
    """A future that also cancels its gRPC call."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self._call = call

    def cancel(self) -> bool:
        cancelled = super().cancel()
        self._call.cancel()
        return cancelled


class AsyncGrpcTransport:
    """Implements `transport.AsyncTransport`. The channel belongs to the event loop of the first request."""

    def __init__(self, endpoint: Endpoint, model: str, credentials: Credentials) -> None:
        self._endpoint, self._model = endpoint, model
        self._credentials, self._metadata = credentials, credentials.grpc_metadata()

    @cached_property
    def _channel(self) -> Any:
        return _open(grpc.aio, self._endpoint, self._credentials)

    @cached_property
    def _infer(self) -> Any:
        return _infer_call(self._channel)

    async def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Embeddings:
        try:
            answer = await self._infer(grpc_request(self._model, images), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _our_error(error, self._endpoint) from error
        return read_grpc_answer(answer, len(images))

    async def is_ready(self, timeout_s: float | None) -> bool:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            request = service_pb2.ModelReadyRequest(name=self._model)
            return bool((await stub.ModelReady(request, timeout=timeout_s, metadata=self._metadata)).ready)
        except grpc.RpcError as error:
            raise _our_error(error, self._endpoint) from error

    async def close(self) -> None:
        if "_channel" in self.__dict__:
            await self._channel.close()
