"""A fake server on loopback sockets that speaks Triton's gRPC and HTTP, and a test of it."""

import hashlib
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

HTTP_STATUS = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "INTERNAL": 500}


def vector_of(image: bytes) -> np.ndarray:
    """A vector that only this image has: (512,) float32 of norm 1."""
    seed = int.from_bytes(hashlib.sha256(image).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Refused(Exception):
    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Brain:
    """What the server does with an image.

    An image `bad:CODE:REASON` is refused, `wait` waits for the gate, and `fail:STATUS:MESSAGE` fails the request.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.gate = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)
        self.requests: list[int] = []
        self.embedded: list[bytes] = []
        self.refusals: list[tuple[str, str]] = []  # of the next requests: status and message
        self.alter = lambda embeddings: embeddings
        self.ready = True
        self.has_texts = False
        self.parameters: dict[str, str] | None = None  # of the model's configuration; None: restricted

    def embed(self, raw: bytes, count: int) -> np.ndarray:
        images = []
        while raw:
            size = struct.unpack_from("<I", raw)[0]
            images.append(raw[4 : 4 + size])
            raw = raw[4 + size :]
        assert len(images) == count
        self.requests.append(count)
        self.arrived.release()
        if self.refusals:
            raise Refused(*self.refusals.pop(0))
        for image in images:
            if image.startswith(b"fail:"):
                raise Refused(*image.decode().split(":", 2)[1:])
        if b"wait" in images:
            self.waiting.release()
            self.gate.wait(30)
        bad = [
            f"[{i}] {image.decode()[4:].replace(':', ': ', 1)}"
            for i, image in enumerate(images)
            if image[:4] == b"bad:"
        ]
        if bad:
            message = f"image_bytes: {len(bad)} of {count} images refused. {'; '.join(bad)}"
            raise Refused("INVALID_ARGUMENT", f"in ensemble 'clip_ensemble', {message}")
        self.embedded += images
        return self.alter(np.stack([vector_of(image) for image in images]))


class GrpcServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def ModelReady(self, request, context):
        models = ("clip_ensemble", "clip_text_ensemble") if self.brain.has_texts else ("clip_ensemble",)
        return service_pb2.ModelReadyResponse(ready=self.brain.ready and request.name in models)

    def ModelConfig(self, request, context):
        if self.brain.parameters is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'x'")
        answer = service_pb2.ModelConfigResponse()
        for name, value in self.brain.parameters.items():
            answer.config.parameters[name].string_value = value
        return answer

    def ModelInfer(self, request, context):
        context.add_callback(lambda: None if context.is_active() or answered else self.brain.cancelled.release())
        answered = False
        (tensor,), (wanted,), (raw,) = request.inputs, request.outputs, request.raw_input_contents
        kinds = {"clip_ensemble": "image_bytes"} | ({"clip_text_ensemble": "text"} if self.brain.has_texts else {})
        assert (tensor.name, tensor.datatype) == (kinds[request.model_name], "BYTES")
        assert tensor.shape[1:] == [1] and wanted.name == "embedding"
        try:
            embeddings = self.brain.embed(raw, tensor.shape[0])
        except Refused as refused:
            answered = True
            context.abort(grpc.StatusCode[refused.status], refused.message)
        answered = True
        answer = service_pb2.ModelInferResponse(model_name="clip_ensemble", model_version="1")
        datatype = "FP32" if embeddings.dtype == np.float32 else "FP16"
        answer.outputs.add(name="embedding", datatype=datatype, shape=embeddings.shape)
        answer.raw_output_contents.append(embeddings.tobytes())
        return answer


def http_handler(brain: Brain) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.path == "/v2/models/clip_ensemble/config" and brain.parameters is not None:
                parameters = {name: {"string_value": value} for name, value in brain.parameters.items()}
                self.reply(200, json.dumps({"name": "clip_ensemble", "parameters": parameters}).encode())
                return
            if self.path == "/v2/models/clip_ensemble/config":
                self.reply(403, b'{"error":"This API is restricted, expecting header \'x\'"}')
                return
            ready = brain.ready and self.path == "/v2/models/clip_ensemble/ready"
            self.reply(*((200, b"") if ready else (400, b'{"error":"Model version not ready"}')))

        def do_POST(self):
            assert self.headers["Accept-Encoding"] == "identity"  # otherwise Triton would gzip the floats
            body = self.rfile.read(int(self.headers["Content-Length"]))
            end = int(self.headers["Inference-Header-Content-Length"])
            head, raw = json.loads(body[:end]), body[end:]
            (tensor,), (wanted,) = head["inputs"], head["outputs"]
            assert wanted == {"name": "embedding", "parameters": {"binary_data": True}}
            assert (tensor["name"], tensor["datatype"], tensor["shape"][1:]) == ("image_bytes", "BYTES", [1])
            assert tensor["parameters"] == {"binary_data_size": len(raw)}
            if self.path != "/v2/models/clip_ensemble/infer":
                self.reply(404, b"""{"error":"Request for unknown model: 'other' is not found"}""")
                return
            try:
                embeddings = brain.embed(raw, tensor["shape"][0])
            except Refused as refused:
                self.reply(HTTP_STATUS[refused.status], json.dumps({"error": refused.message}).encode())
                return
            output = {
                "name": "embedding",
                "datatype": "FP32" if embeddings.dtype == np.float32 else "FP16",
                "shape": embeddings.shape,
                "parameters": {"binary_data_size": embeddings.nbytes},
            }
            head = json.dumps({"model_name": "clip_ensemble", "outputs": [output]}).encode()
            self.reply(200, head + embeddings.tobytes(), len(head))

        def reply(self, status, body, head_size=None):
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if head_size is not None:
                    self.send_header("Inference-Header-Content-Length", str(head_size))
                self._headers_buffer.append(b"\r\n" + body)  # one write: two would wait for a delayed ACK
                self.flush_headers()
            except (BrokenPipeError, ConnectionResetError):
                brain.cancelled.release()

        def log_message(self, *_):
            pass

    return Handler


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with the default, 5, a client's simultaneous connections would wait a second


@contextmanager
def serve(scheme: str, brain: Brain, port: int = 0) -> Iterator[str]:
    """Runs a server and yields its URL. Port 0 means any free port."""
    if scheme == "grpc":
        with ThreadPoolExecutor(32) as pool:
            server = grpc.server(pool, options=[("grpc.max_metadata_size", 1 << 20)])
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcServer(brain), server)
            port = server.add_insecure_port(f"127.0.0.1:{port}")
            server.start()
            yield f"grpc://127.0.0.1:{port}"
            brain.gate.set()
            server.stop(None).wait()
    else:
        with HttpServer(("127.0.0.1", port), http_handler(brain)) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            brain.gate.set()
            server.shutdown()
            thread.join()


@contextmanager
def serve_in_a_process(scheme: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs a server that can be killed and yields its URL and process. It ends when its stdin is closed."""
    command = [sys.executable, __file__, scheme, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def test_different_images_have_different_vectors_of_norm_1():
    """Otherwise a client that swaps or loses images would pass the tests."""
    one, other = vector_of(b"one"), vector_of(b"other")
    assert abs(np.linalg.norm(one) - 1) < 1e-6  # float32 rounding
    assert one @ other < 0.5


if __name__ == "__main__":
    with serve(sys.argv[1], Brain(), int(sys.argv[2])) as url:
        print(url, flush=True)
        sys.stdin.read()
