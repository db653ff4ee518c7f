"""The client's API key and certificates: checked before anything is sent, and never shown in text."""

import asyncio
import contextlib

import pytest
import trustme
from tests.unit.test_client_loopback import Brain, serve

from clip_embed import AsyncEmbeddingClient, CredentialsError, EmbeddingClient
from clip_embed.credentials import Credentials
from clip_embed.endpoint import parse_url

KEY = "key-of-the-clients"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A CA, a certificate with its key, the key of another certificate, and a text file."""
    folder, ca = tmp_path_factory.mktemp("tls"), trustme.CA()
    one, other = ca.issue_cert("localhost"), ca.issue_cert("localhost")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    one.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    one.private_key_pem.write_to_path(folder / "key.pem")
    other.private_key_pem.write_to_path(folder / "other.pem")
    (folder / "text").write_text("no certificate")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("kind", [EmbeddingClient, AsyncEmbeddingClient])
def test_refused_credentials_are_a_credentials_error_and_not_retried(scheme, kind):
    """Triton's gRPC answers UNAVAILABLE, which is otherwise retried."""
    brain = Brain()
    brain.refusals = [
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'triton-grpc-protocol-clip-api-key'")
    ]

    async def embed(url: str) -> None:
        async with AsyncEmbeddingClient(url, api_key=KEY, timeout_s=60) as client:
            await client.embed([b"a"])

    with serve(scheme, brain) as url, pytest.raises(CredentialsError, match=r"give the right api_key \(CLIP_API_KEY\)"):
        if kind is AsyncEmbeddingClient:
            asyncio.run(embed(url))
        else:
            with EmbeddingClient(url, api_key=KEY, timeout_s=60) as client:
                client.embed([b"a"])
    assert len(brain.requests) == 1


def test_the_key_is_in_the_headers_and_not_in_the_repr():
    credentials = Credentials(api_key=KEY)
    assert credentials.http_headers() == {"clip-api-key": KEY}
    assert credentials.grpc_metadata() == (("triton-grpc-protocol-clip-api-key", KEY),)
    assert KEY not in repr(credentials)
    assert Credentials().http_headers() == {}


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "ключ", "a=b"])
def test_a_key_that_is_invalid_in_a_header_is_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="api_key: expected letters") as caught:
        EmbeddingClient(api_key=key)
    assert not key or key not in str(caught.value)


def test_certificate_files_are_checked_before_anything_is_sent(files):
    for scheme in ("grpcs", "https"):
        url = f"{scheme}://localhost:1"
        with EmbeddingClient(url, ca_file=files["ca"], cert_file=files["cert"], key_file=files["key"]):
            pass
        with pytest.raises(ValueError, match=r"ca_file .*nowhere: expected certificates in PEM, got No such file"):
            EmbeddingClient(url, ca_file="nowhere")
        with pytest.raises(ValueError, match=r"ca_file .*text: expected certificates in PEM"):
            EmbeddingClient(url, ca_file=files["text"])
        with pytest.raises(ValueError, match=r"expected a certificate and its own key.*KEY_VALUES_MISMATCH"):
            EmbeddingClient(url, cert_file=files["cert"], key_file=files["other"])
        with pytest.raises(ValueError, match="expected cert_file and key_file together"):
            EmbeddingClient(url, cert_file=files["cert"])


@pytest.mark.parametrize(("url", "secure"), [("grpc://localhost:1", "grpcs"), ("http://localhost:1", "https")])
def test_certificates_with_an_unencrypted_url_are_refused(url, secure, files):
    with pytest.raises(ValueError, match=f"are for {secure}://; this URL is not encrypted"):
        EmbeddingClient(url, ca_file=files["ca"])
    with pytest.raises(ValueError, match="not encrypted"):
        EmbeddingClient(urls=[f"{secure}://localhost:1", url], ca_file=files["ca"])


def test_the_key_and_the_certificate_files_come_from_the_environment(monkeypatch, files):
    names = {"API_KEY": KEY, "CA_FILE": files["ca"], "CERT_FILE": files["cert"], "KEY_FILE": files["key"]}
    expected = Credentials(api_key=KEY, ca_file=files["ca"], cert_file=files["cert"], key_file=files["key"])
    assert Credentials.from_environment({f"CLIP_{name}": value for name, value in names.items()}) == expected
    assert Credentials.from_environment({"CLIP_API_KEY": ""}) == Credentials()
    expected.check(parse_url("https://localhost"))
    monkeypatch.setenv("INFERENCE_SERVICE_URL", "grpcs://localhost:1")
    monkeypatch.setenv("CLIP_CA_FILE", files["text"])
    with pytest.raises(ValueError, match="ca_file"):
        EmbeddingClient.from_env()
    with contextlib.closing(EmbeddingClient.from_env(ca_file=files["ca"])):
        pass
