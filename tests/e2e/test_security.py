"""What clients without a key can do on the real server, and how TLS, certificates and keys protect it."""

import asyncio
import contextlib
import gzip
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import trustme
from google.protobuf import message_factory
from tests.conftest import options_for
from tests.tls_proxy import nginx, tls_proxy
from tritonclient.grpc import service_pb2

from clip_embed import (
    AsyncEmbeddingClient,
    CredentialsError,
    EmbeddingClient,
    InvalidImageError,
    RequestTooLargeError,
    ServerUnavailableError,
)
from clip_embed.provenance import Provenance
from clip_tools.export.manifest import Manifest
from clip_tools.serving import key_files
from clip_tools.serving.access import Access, Tls
from clip_tools.serving.model_control import GrpcModelControl
from clip_tools.serving.probe import probe_image
from clip_tools.serving.server import EmbeddedServer

BIN = Path(sys.executable).parent
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
API_KEY = "the-key-of-those-who-may-embed"

# Open to everyone. All other methods are closed, including any that a later version adds.
OPEN_METHODS = {"ServerLive", "ServerReady", "ModelReady", "ModelConfig", "ModelInfer", "ModelStreamInfer"}
# Also open with `open_metadata`, which is the default if the server listens on this machine alone.
READ_METHODS = {"ServerMetadata", "ModelMetadata", "ModelStatistics"}
STREAMS = {"ModelStreamInfer"}

CONFIG = '{"backend": "python", "max_batch_size": 0}'
REQUESTS = {  # those of an attacker; the other methods' requests are empty
    "RepositoryModelLoad": {
        "model_name": "intruder",
        "parameters": {
            "config": {"string_param": CONFIG},
            "file:1/model.py": {"bytes_param": b"import os; os._exit(1)"},
        },
    },
    "RepositoryModelUnload": {"model_name": "clip_ensemble"},
    "SystemSharedMemoryRegister": {"name": "all", "key": "/clip_tools", "byte_size": 64},
    "CudaSharedMemoryRegister": {"name": "all", "raw_handle": b"x" * 64, "byte_size": 64},
    "TraceSetting": {"settings": {"trace_file": {"value": ["/tmp/trace"]}}},  # noqa: S108
    "LogSettings": {"settings": {"log_file": {"string_param": "/tmp/log"}}},  # noqa: S108
    "ModelConfig": {"name": "clip_ensemble"},
    "ModelMetadata": {"name": "clip_ensemble"},
    "ModelReady": {"name": "clip_ensemble"},
}


def grpc_request(method: str) -> bytes:
    kind = message_factory.GetMessageClass(SERVICE.methods_by_name[method].input_type)
    if method in ("ModelInfer", "ModelStreamInfer"):
        request = kind(model_name="clip_ensemble")
        request.inputs.add(name="image_bytes", datatype="BYTES", shape=[1, 1])
        image = probe_image()
        request.raw_input_contents.append(len(image).to_bytes(4, "little") + image)
    elif method == "RepositoryModelLoad":
        wanted = REQUESTS[method]
        request = kind(model_name=wanted["model_name"])
        for name, value in wanted["parameters"].items():
            for field, content in value.items():
                setattr(request.parameters[name], field, content)
    elif method in ("TraceSetting", "LogSettings"):
        request = kind()
        for name, value in REQUESTS[method]["settings"].items():
            for field, content in value.items():
                if isinstance(content, list):
                    getattr(request.settings[name], field).extend(content)
                else:
                    setattr(request.settings[name], field, content)
    else:
        request = kind(**REQUESTS.get(method, {}))
    return request.SerializeToString()


def ask_grpc(channel: grpc.Channel, path: str, request: bytes, *, metadata=(), streams: bool = False) -> str | None:
    """The reason of the refusal; None if the request was answered."""
    try:
        if streams:
            # Read to the end: after broken streams, Triton 24.10 took its whole 30 s to stop.
            list(channel.stream_stream(path)(iter([request]), timeout=60, metadata=metadata))
        else:
            channel.unary_unary(path)(request, timeout=60, metadata=metadata)
    except grpc.RpcError as error:
        return error.details()
    return None


def ask_every_method(address: str, *, metadata=()) -> dict[str, str | None]:
    with grpc.insecure_channel(address) as channel:
        return {
            method.name: ask_grpc(
                channel,
                f"/{SERVICE.full_name}/{method.name}",
                grpc_request(method.name),
                metadata=metadata,
                streams=method.name in STREAMS,
            )
            for method in SERVICE.methods
        }


# Every HTTP route of Triton that is not open to everyone; {m} is a model.
READ_ROUTES = [
    "/v2",
    "/v2/models/{m}",
    "/v2/models/{m}/versions/1",
    "/v2/models/{m}/stats",
    "/v2/models/{m}/versions/1/stats",
    "/v2/models/stats",
]
CLOSED_ROUTES = [
    "/v2/models/{m}/trace/setting",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/repository/index",
    "/v2/repository/models/{m}/load",
    "/v2/repository/models/{m}/unload",
    "/v2/repository/other/models/{m}/load",
    "/v2/systemsharedmemory/status",
    "/v2/systemsharedmemory/region/all/status",
    "/v2/systemsharedmemory/region/all/register",
    "/v2/systemsharedmemory/region/all/unregister",
    "/v2/systemsharedmemory/unregister",
    "/v2/cudasharedmemory/status",
    "/v2/cudasharedmemory/region/all/status",
    "/v2/cudasharedmemory/region/all/register",
    "/v2/cudasharedmemory/unregister",
]
# Other spellings of closed routes, and routes of other servers.
ODD_ROUTES = [
    "//v2/repository/index",
    "/v2//repository/index",
    "/v2/repository/index/",
    "/v2/./repository/index",
    "/v2/x/../repository/index",
    "/v2/%72epository/index",
    "/V2/repository/index",
    "/v2/health/ready/../../repository/index",
    "/v2/repository/index?x=/v2/health/ready",
    "/v2/models/clip_ensemble/../../repository/index",
    "/metrics",
    "/ping",
    "/invocations",
    "/models",
    "/v1/models",
    "/",
]


def ask_http(port: int, method: str, route: str, **headers: str) -> int:
    """The response's status. The route is sent exactly as written."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, route, body=b"{}" if method in ("POST", "PUT") else None, headers=headers)
        return connection.getresponse().status


@pytest.mark.promise
@pytest.mark.parametrize("open_metadata", [True, False])
def test_a_stranger_can_embed_and_read_health_and_metrics_and_nothing_else(
    server, light_repository, tmp_path, record_reliability, open_metadata
):
    """Every method and route of both protocols, without a key and with wrong ones, with metadata open and closed."""
    with contextlib.ExitStack() as stack:
        if not open_metadata:
            closed = options_for(light_repository, tmp_path / "log", open_metadata=False)
            server = stack.enter_context(EmbeddedServer(closed))
        readable = (READ_METHODS, READ_ROUTES) if open_metadata else (set(), [])
        figures = ask_for_everything(server, *readable)
    if open_metadata:
        record_reliability("closed_apis", **figures)


def ask_for_everything(server: EmbeddedServer, read_methods: set[str], read_routes: list[str]) -> dict[str, int]:
    """The number of requests and of refusals. Without a key only the named methods and routes may be read."""
    options, methods, refused = server.options, 0, 0
    open_methods = OPEN_METHODS | read_methods
    with GrpcModelControl(options.grpc_url) as control:
        before = control.ready_models()
    address = f"127.0.0.1:{options.grpc_port}"
    right = options.access.admin_key
    for metadata in (
        (),
        (("triton-grpc-protocol-clip-admin-key", "wrong"),),
        (("triton-grpc-protocol-clip-admin-key", ""),),
        (("clip-admin-key", right),),  # the name of HTTP's header
        (("triton-grpc-protocol-clip-api-key", right),),
    ):
        answers = ask_every_method(address, metadata=metadata)
        assert len(answers) == 20
        assert {name for name, reason in answers.items() if reason is None} == open_methods
        assert all("restricted" in reason for reason in answers.values() if reason is not None), answers
        methods, refused = methods + len(answers), refused + len(answers) - len(open_methods)
    with grpc.insecure_channel(address) as channel:
        assert ask_grpc(channel, "/grpc.health.v1.Health/Check", b"") is None
        for path in ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/inference.Other/Method"):
            assert ask_grpc(channel, path, b"") is not None
    for route in read_routes:
        assert ask_http(options.http_port, "GET", route.format(m="clip_ensemble")) == 200, route
    for route in (*CLOSED_ROUTES, *(route for route in READ_ROUTES if route not in read_routes)):
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            for headers in ({}, {"clip-admin-key": "wrong"}, {"triton-grpc-protocol-clip-admin-key": right}):
                status = ask_http(options.http_port, method, route.format(m="clip_ensemble"), **headers)
                assert status in (400, 403, 404, 405), (method, route, status)
                methods, refused = methods + 1, refused + 1
        assert 403 in (ask_http(options.http_port, m, route.format(m="clip_ensemble")) for m in ("GET", "POST")), route
    for route in ODD_ROUTES:
        for method in ("GET", "POST"):
            status = ask_http(options.http_port, method, route)
            assert status in (400, 403, 404, 405), (method, route, status)
            methods, refused = methods + 1, refused + 1

    for route in ("/v2/health/live", "/v2/health/ready", "/v2/models/clip_ensemble/ready"):
        assert ask_http(options.http_port, "GET", route) == 200
    assert "nv_inference_request_success" in httpx.get(options.metrics_url).text
    manifest = Manifest.read(options.models / "clip_onnx" / "1" / "model.onnx")
    for url in (options.grpc_url, options.http_url):
        with EmbeddingClient(url) as client:
            assert client.embed([probe_image()]).shape == (1, 512)
            served = client.served()
        weights = manifest.checkpoint_sha256 or manifest.pretrained
        assert served.provenance == Provenance(manifest.model, weights, "exact")
        assert {".jpg", ".jp2", ".png"} < served.suffixes
    with GrpcModelControl(options.grpc_url) as control:
        assert control.ready_models() == before
    return {"methods": methods, "refused": refused}


def test_with_the_key_every_method_is_open(server):
    """This shows that the calls above were refused only for lack of the key. Nothing is changed here."""
    harmless = [m.name for m in SERVICE.methods if m.name not in REQUESTS or m.name.startswith("Model")]
    with grpc.insecure_channel(f"127.0.0.1:{server.options.grpc_port}") as channel:
        for name in harmless:
            reason = ask_grpc(
                channel,
                f"/{SERVICE.full_name}/{name}",
                grpc_request(name),
                metadata=tuple(server.options.access.grpc_headers().items()),
                streams=name in STREAMS,
            )
            assert reason is None or "restricted" not in reason
    headers = server.options.access.http_headers()
    assert ask_http(server.options.http_port, "POST", "/v2/repository/index", **headers) == 200
    assert ask_http(server.options.http_port, "GET", "/v2", **headers) == 200


def run_swap(server: EmbeddedServer, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "clip-tools", "swap", "onnx", f"--models={server.options.models}"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CLIP_")}
    return subprocess.run(
        [*command, f"--url={server.options.grpc_url}"],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_swap_finds_the_admin_key_of_its_own_user_and_others_must_set_it(server, tmp_path):
    """TMPDIR stands for another user, whose folder of keys is another one."""
    assert "runs onnx already" in run_swap(server).stderr
    stranger = run_swap(server, TMPDIR=str(tmp_path))
    assert stranger.returncode == 1
    assert stranger.stderr.endswith("requires an admin key: set CLIP_ADMIN_KEY to the one it was started with\n")
    mistaken = run_swap(server, TMPDIR=str(tmp_path), CLIP_ADMIN_KEY="not-the-key-of-this-server")
    assert "rejects this admin key: set CLIP_ADMIN_KEY" in mistaken.stderr
    told = run_swap(server, TMPDIR=str(tmp_path), CLIP_ADMIN_KEY=server.options.access.admin_key)
    assert "runs onnx already" in told.stderr


def test_no_process_and_no_log_shows_the_key(server):
    key = server.options.access.admin_key.encode()
    shown = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            shown.append(path.read_bytes())
    assert any(b"clip-admin-key=***" in command_line for command_line in shown)
    assert not any(key in command_line for command_line in shown)
    assert key not in server.options.log.read_bytes()


class Certificates:
    """A certificate authority, its certificates for a server and a client, and another authority."""

    def __init__(self, folder: Path) -> None:
        self.ca, other = trustme.CA(), trustme.CA()
        server, client = self.ca.issue_cert("localhost", "127.0.0.1"), self.ca.issue_cert("client@example.org")
        self.server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.configure_cert(self.server_context)
        pems = {
            "ca": self.ca.cert_pem,
            "other": other.cert_pem,
            "cert": server.cert_chain_pems[0],
            "key": server.private_key_pem,
            "client": client.cert_chain_pems[0],
            "client_key": client.private_key_pem,
        }
        for name, pem in pems.items():
            pem.write_to_path(folder / f"{name}.pem")
            setattr(self, name, folder / f"{name}.pem")
        self.of_a_client = {"ca_file": self.ca_pem, "cert_file": self.client, "key_file": self.client_key}

    @property
    def ca_pem(self) -> Path:
        return self.cert.with_name("ca.pem")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def guarded(light_repository, certificates, tmp_path_factory):
    """A server with mutual TLS on gRPC and an API key."""
    tls = Tls(certificates.cert, certificates.key, certificates.ca_pem)
    options = options_for(
        light_repository, tmp_path_factory.mktemp("guarded") / "log", access=Access(api_key=API_KEY, tls=tls)
    )
    with EmbeddedServer(options) as running:
        yield running


def test_a_client_with_certificate_and_key_can_embed(guarded, certificates, server):
    url, image = guarded.options.grpc_url, probe_image()
    assert url.startswith("grpcs://")
    with EmbeddingClient(url, api_key=API_KEY, **certificates.of_a_client) as client:
        got = client.embed([image])
    with EmbeddingClient(server.options.grpc_url) as client:
        assert (got * client.embed([image])).sum() >= 0.99999  # FP32 in another process

    async def embed() -> np.ndarray:
        async with AsyncEmbeddingClient(url, api_key=API_KEY, **certificates.of_a_client) as client:
            return await client.embed([image])

    assert np.array_equal(asyncio.run(embed()), got)


@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_the_key_a_client_is_refused_at_once(guarded, certificates, key):
    """Long before its deadline, over gRPC and HTTP. It may still ask whether the server is ready."""
    for url, files in ((guarded.options.grpc_url, certificates.of_a_client), (guarded.options.http_url, {})):
        with EmbeddingClient(url, api_key=key, timeout_s=600, **files) as client:
            assert client.is_ready()
            with pytest.raises(CredentialsError, match="CLIP_API_KEY"):
                client.embed([probe_image()])


def test_a_server_certificate_of_another_authority_is_rejected(guarded, certificates):
    files = {**certificates.of_a_client, "ca_file": certificates.other}
    with (
        EmbeddingClient(guarded.options.grpc_url, api_key=API_KEY, timeout_s=600, **files) as client,
        pytest.raises(CredentialsError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.embed([probe_image()])


def test_a_client_without_a_certificate_or_without_encryption_is_refused(guarded, certificates):
    url = guarded.options.grpc_url
    for wrong, files in ((url, {"ca_file": certificates.ca_pem}), (url.replace("grpcs", "grpc"), {})):
        with EmbeddingClient(wrong, api_key=API_KEY, retry=None, **files) as client:
            assert not client.is_ready()
            with pytest.raises((CredentialsError, ServerUnavailableError)):
                client.embed([probe_image()])


def test_with_tls_on_grpc_http_listens_on_this_machine_only(guarded):
    assert guarded.options.http_host == "127.0.0.1"
    flags = Path(f"/proc/{guarded.pid}/cmdline").read_text().split("\0")
    assert "--http-address=127.0.0.1" in flags


def test_the_key_blocks_a_request_that_crashes_triton_24_10(guarded):
    """The request comes in a million chunks: see SECURITY.md and the test below."""
    assert b"403 Forbidden" in in_pieces(guarded.options.http_port, 1_000_000)
    with EmbeddingClient(guarded.options.http_url, api_key=API_KEY) as client:
        assert client.embed([probe_image()]).shape == (1, 512)


DEEP = b"[" * 1_000_000
PARAMETERS = json.dumps({"parameters": {f"p{number}": 1 for number in range(60_000)}, "inputs": []}).encode()


def test_a_key_for_http_only_blocks_json_before_the_parser_and_leaves_grpc_open(light_repository, tmp_path):
    """Deep JSON and many parameters then cost nothing. A client with the key can embed over HTTP."""
    options = options_for(light_repository, tmp_path / "log", access=Access(http_key=API_KEY))
    with EmbeddedServer(options):
        for route in ("infer", "generate", "generate_stream", "versions/1/infer"):
            for body in (DEEP, PARAMETERS):
                answer = httpx.post(f"{options.http_url}/v2/models/clip_ensemble/{route}", content=body, timeout=5)
                assert answer.status_code == 403
        for url, key in ((options.grpc_url, None), (options.http_url, API_KEY)):
            with EmbeddingClient(url, api_key=key) as client:
                assert client.embed([probe_image()]).shape == (1, 512)


@pytest.mark.long
@pytest.mark.parametrize("request_", ["pieces", "depth"])
def test_without_the_key_the_server_crashes_as_security_md_says(repository, tmp_path, request_):
    """If this fails, Triton is fixed: SECURITY.md and `access.exposure_warning` need not warn any more."""
    with EmbeddedServer(options_for(repository, tmp_path / "log")) as server:
        if request_ == "pieces":
            in_pieces(server.options.http_port, 1_000_000)
        else:
            with contextlib.suppress(httpx.TransportError):
                httpx.post(f"{server.options.http_url}/v2/models/clip_ensemble/infer", content=DEEP)
        assert server.process.wait(30)


def in_pieces(port: int, pieces: int, tls: ssl.SSLContext | None = None) -> bytes:
    """The answer to an inference request in `pieces` chunks of one byte; empty if the connection is lost."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        if tls:
            connection = stack.enter_context(tls.wrap_socket(connection, server_hostname="localhost"))
        connection.sendall(
            b"POST /v2/models/clip_ensemble/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(pieces // 1000):
                connection.sendall(b"1\r\nA\r\n" * 1000)
            connection.sendall(b"0\r\n\r\n")
            return connection.recv(1000)
        except OSError:
            return b""


def test_clients_reach_an_https_proxy_only_with_the_right_ca_file(guarded, certificates):
    with tls_proxy(certificates.server_context, guarded.options.http_port) as port:
        url, image = f"https://localhost:{port}", probe_image()
        with EmbeddingClient(url, api_key=API_KEY, ca_file=certificates.ca_pem) as client:
            assert client.embed([image]).shape == (1, 512)

        async def embed() -> tuple[int, ...]:
            async with AsyncEmbeddingClient(url, api_key=API_KEY, ca_file=certificates.ca_pem) as client:
                return (await client.embed([image])).shape

        assert asyncio.run(embed()) == (1, 512)
        for ca_file in (None, certificates.other):
            with (
                EmbeddingClient(url, api_key=API_KEY, ca_file=ca_file, timeout_s=600) as client,
                pytest.raises(CredentialsError, match="CERTIFICATE_VERIFY_FAILED"),
            ):
                client.embed([image])


def test_clip_embed_reads_key_and_certificates_from_the_environment(guarded, certificates, demo_photos):
    environment = {
        **os.environ,
        "CLIP_API_KEY": API_KEY,
        "CLIP_CA_FILE": str(certificates.ca_pem),
        "CLIP_CERT_FILE": str(certificates.client),
        "CLIP_KEY_FILE": str(certificates.client_key),
        "INFERENCE_SERVICE_URL": guarded.options.grpc_url,
    }
    command = [BIN / "clip-embed", demo_photos[0]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert '"embedding": [' in done.stdout
    del environment["CLIP_API_KEY"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "give the right api_key (CLIP_API_KEY)" in done.stderr
    assert done.stdout == ""
    environment["CLIP_CA_FILE"] = str(certificates.other)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.endswith("or give --url or the right --ca-file, --cert-file and --key-file\n")


def test_swap_uses_tls_with_the_certificates_of_the_environment(guarded, certificates, monkeypatch):
    for name, value in certificates.of_a_client.items():
        monkeypatch.setenv(f"CLIP_{name.upper()}", str(value))
    with GrpcModelControl(guarded.options.grpc_url) as control:
        assert "clip_ensemble" in control.ready_models()
        assert control.embed_image(probe_image()).shape == (1, 512)
    assert key_files.access_of(guarded.options.grpc_url, {}).api_key == API_KEY


@pytest.mark.promise
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx: apt-get install nginx-light")
def test_the_nginx_of_deploy_lets_strangers_embed_and_nothing_else(
    server, certificates, demo_photos, tmp_path, record_reliability
):
    """One port serves both protocols. Requests that crash the server itself do not get through."""
    with nginx(
        certificates.cert, certificates.key, server.options.http_port, server.options.grpc_port, tmp_path
    ) as port:
        trusting = ssl.create_default_context(cafile=certificates.ca_pem)
        images = [path.read_bytes() for path in demo_photos[:2]]
        for url in (f"https://localhost:{port}", f"grpcs://localhost:{port}"):
            with EmbeddingClient(url, ca_file=certificates.ca_pem, retry=None) as client:
                assert client.is_ready()
                assert client.served().provenance
                assert client.embed(images).shape == (2, 512)
                with pytest.raises(InvalidImageError, match="not_an_image"):
                    client.embed([b"no image"])
                with pytest.raises(RequestTooLargeError):
                    client.embed([bytes(65 << 20)])
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trusting) as http:
            for route in (
                *READ_ROUTES,
                *CLOSED_ROUTES,
                *ODD_ROUTES,
                "/v2/models/preprocess/infer",
                "/v2/models/clip_onnx/infer",
            ):
                path = route.format(m="clip_ensemble")
                assert {http.get(path).status_code, http.post(path, content=b"{}").status_code} <= {400, 404}, path
        with grpc.secure_channel(
            f"localhost:{port}", grpc.ssl_channel_credentials(certificates.ca_pem.read_bytes())
        ) as channel:
            for method in SERVICE.methods:
                reason = ask_grpc(channel, f"/{SERVICE.full_name}/{method.name}", grpc_request(method.name))
                assert (reason is None) == (method.name in OPEN_METHODS - STREAMS), method.name
        assert in_pieces(port, 1_000_000, trusting).startswith(b"HTTP/1.1 ")
        infer, length = f"https://localhost:{port}/v2/models/clip_ensemble/infer", "Inference-Header-Content-Length"
        too_much = [
            *((body, {}) for body in (DEEP, PARAMETERS, DEEP[:10_000], iter([DEEP]))),  # the last in chunks
            *((DEEP, {length: value}) for value in ("1000000", "10000", "+10", "0x10", "x", "1e4")),
            (DEEP, [(length, "1000000"), (length, "0")]),
            *((gzip.compress(DEEP), {"Content-Encoding": name, length: "9"}) for name in ("gzip", "deflate", "x")),
        ]
        for body, headers in too_much:
            answer = httpx.post(infer, content=body, headers=headers, verify=trusting, timeout=60)
            assert answer.status_code in (413, 415), (headers, answer.text)
        assert "at most 9999 bytes of JSON" in httpx.post(infer, content=DEEP, verify=trusting).text
        for body, headers in ((DEEP[:9999], {}), (DEEP[:9999] + images[0], {length: "9999"}), (DEEP, {length: "0"})):
            answer = httpx.post(infer, content=body, headers=headers, verify=trusting, timeout=5)
            assert answer.status_code in (400, 500), answer.text  # Triton's own answer
            assert "error" in answer.json()
        with (
            EmbeddingClient(f"grpcs://localhost:{port}", ca_file=certificates.ca_pem) as client,
            pytest.raises(grpc.RpcError),
        ):
            client._servers.transports[0]._infer(b"", compression=grpc.Compression.Gzip)
    with EmbeddingClient(server.options.http_url) as client:
        assert client.embed(images).shape == (2, 512)
    record_reliability("bounded_json", faults=len(too_much), lost=0)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx: apt-get install nginx-light")
def test_the_nginx_of_deploy_lets_in_only_clients_with_a_certificate_when_configured(server, certificates, tmp_path):
    """A client with none, or with one of another authority, is refused at once over both protocols."""
    foreign = tmp_path / "foreign.pem"
    trustme.CA().issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(foreign)
    stranger = {"ca_file": certificates.ca_pem}
    with nginx(
        certificates.cert,
        certificates.key,
        server.options.http_port,
        server.options.grpc_port,
        tmp_path,
        client_ca=certificates.ca_pem,
    ) as port:
        for url in (f"https://localhost:{port}", f"grpcs://localhost:{port}"):
            with EmbeddingClient(url, **certificates.of_a_client) as client:
                assert client.embed([probe_image()]).shape == (1, 512)
            for files in (stranger, {**stranger, "cert_file": foreign, "key_file": foreign}):
                with (
                    EmbeddingClient(url, timeout_s=600, **files) as client,
                    pytest.raises(CredentialsError, match="403"),
                ):
                    client.embed([probe_image()])
