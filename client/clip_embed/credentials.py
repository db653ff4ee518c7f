"""A client's credentials: an API key, a client certificate, and the authorities that it trusts."""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from clip_embed.endpoint import Endpoint

API_KEY_VARIABLE = "CLIP_API_KEY"
CA_FILE_VARIABLE = "CLIP_CA_FILE"
CERT_FILE_VARIABLE = "CLIP_CERT_FILE"
KEY_FILE_VARIABLE = "CLIP_KEY_FILE"

API_KEY_HEADER = "clip-api-key"
GRPC_PREFIX = "triton-grpc-protocol-"
"""Triton's prefix for the header that gives access to a restricted gRPC protocol."""

_KEY = re.compile(r"[A-Za-z0-9._~-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The API key and the TLS files of a client.

    Args:
        api_key: sent with every request, in the header `clip-api-key`; None sends none.
        ca_file: PEM certificates of the trusted authorities, in place of the system's (https://) or gRPC's own
            (grpcs://).
        cert_file: the client's PEM certificate, for a server that requires one.
        key_file: its private key, unencrypted PEM.
    """

    api_key: str | None = field(default=None, repr=False)
    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not is_key(self.api_key):
            raise ValueError("api_key: expected letters, digits and . _ ~ -, got something else")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("expected cert_file and key_file together, got one of them")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """The credentials in CLIP_API_KEY, CLIP_CA_FILE, CLIP_CERT_FILE and CLIP_KEY_FILE; empty means unset."""
        return cls(**environment_options(environment))

    @property
    def has_tls_files(self) -> bool:
        """Whether it names files for TLS."""
        return self.ca_file is not None or self.cert_file is not None

    def http_headers(self) -> dict[str, str]:
        """The headers of an HTTP request."""
        return {} if self.api_key is None else {API_KEY_HEADER: self.api_key}

    def grpc_metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a gRPC call."""
        return tuple((GRPC_PREFIX + name, value) for name, value in self.http_headers().items())

    def check(self, endpoint: Endpoint) -> None:
        """Raises ValueError for files that are missing, not PEM or no pair, and for files with a URL without TLS."""
        if self.has_tls_files and not endpoint.is_secure:
            secure = "https" if endpoint.is_http else "grpcs"
            raise ValueError(f"{endpoint.url}: ca_file and cert_file are for {secure}://; this URL is not encrypted")
        if endpoint.is_secure:
            self.ssl_context()

    def ssl_context(self) -> ssl.SSLContext:
        """The TLS context for HTTPS. Raises ValueError as `check` does."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"ca_file {self.ca_file}: expected certificates in PEM, got {_reason(error)}") from error
        if self.cert_file is not None:
            try:
                # Otherwise OpenSSL would ask for a password on the terminal.
                context.load_cert_chain(self.cert_file, self.key_file, password=lambda: "")
            except (OSError, ssl.SSLError) as error:
                raise ValueError(
                    f"cert_file {self.cert_file}, key_file {self.key_file}: expected a certificate and its own key, "
                    f"PEM and not encrypted, got {_reason(error)}"
                ) from error
        return context

    def grpc_credentials(self) -> Any:
        """gRPC's channel credentials. Their errors appear only at the first request, so call `check` before."""
        import grpc  # type: ignore[import-untyped]

        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca_file),
            private_key=_read(self.key_file),
            certificate_chain=_read(self.cert_file),
        )


def is_key(text: str) -> bool:
    """Whether a text can be an API key: characters that need no quoting in headers, flags and shells."""
    return _KEY.fullmatch(text) is not None


def environment_options(environment: Mapping[str, str]) -> dict[str, Any]:
    """The client options that are set in the environment."""
    variables = {
        "api_key": API_KEY_VARIABLE,
        "ca_file": CA_FILE_VARIABLE,
        "cert_file": CERT_FILE_VARIABLE,
        "key_file": KEY_FILE_VARIABLE,
    }
    return {option: environment[name] for option, name in variables.items() if environment.get(name)}


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
