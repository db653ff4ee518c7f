"""Access control: the keys that restrict Triton's APIs, and TLS for its gRPC.

- `OPEN` APIs require no key. With CLIP_API_KEY, inference and model configurations require that key. Clients read a
  model's configuration for the weights behind the vectors.
- With CLIP_HTTP_KEY, they require that key over HTTP instead. JSON over HTTP can crash Triton (server#8738).
- `DESCRIPTIVE` APIs require no key if the server listens on a loopback address; perf_analyzer reads them.
  CLIP_OPEN_METADATA overrides that.
- `CLOSED` APIs require the admin key. Every server has one: CLIP_ADMIN_KEY, or a random key for this run.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clip_embed.credentials import API_KEY_HEADER, API_KEY_VARIABLE, GRPC_PREFIX, is_key
from clip_tools.errors import ToolError

ADMIN_KEY_VARIABLE = "CLIP_ADMIN_KEY"
ADMIN_KEY_HEADER = "clip-admin-key"
HTTP_KEY_VARIABLE = "CLIP_HTTP_KEY"
OPEN_METADATA_VARIABLE = "CLIP_OPEN_METADATA"

# All APIs of both protocols, by Triton's names.
OPEN = ("health", "inference", "model-config")
DESCRIPTIVE = ("metadata", "statistics")  # read-only
CLOSED = ("model-repository", "shared-memory", "trace", "logging")

MIN_KEY_LENGTH = 16
_USAGE = 2  # exit code


@dataclass(frozen=True)
class Tls:
    """The server's certificate and private key, PEM. With `client_ca`, clients need a certificate signed by it."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def flags(self) -> list[str]:
        """tritonserver's TLS flags. Raises ToolError for a missing file."""
        for path in filter(None, (self.cert, self.key, self.client_ca)):
            if not path.is_file():
                raise ToolError(f"{path}: expected a PEM file, found none", exit_code=_USAGE)
        flags = ["--grpc-use-ssl=true", f"--grpc-server-cert={self.cert}", f"--grpc-server-key={self.key}"]
        if self.client_ca:
            flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_ca}"]
        return flags


@dataclass(frozen=True)
class Access:
    """The keys of a server. Without a given `admin_key` it is random, and only its key file gives admin access."""

    admin_key: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    api_key: str | None = field(default=None, repr=False)
    http_key: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], tls: Tls | None = None) -> "Access":
        """The keys from the environment, with a random admin key by default. Raises ToolError as `keys_in` does."""
        return cls(**keys_in(environment), tls=tls)

    def secret_flags(self, *, open_metadata: bool) -> dict[str, str]:
        """tritonserver's flags that contain a key: the form that may be shown, and the real one."""
        flags = {}
        closed = CLOSED if open_metadata else (*DESCRIPTIVE, *CLOSED)
        admin, api = f"{','.join(closed)}:{ADMIN_KEY_HEADER}", f"inference,model-config:{API_KEY_HEADER}"
        grpc, http = "--grpc-restricted-protocol", "--http-restricted-api"
        for flag, title, key in (
            (grpc, admin, self.admin_key),
            (http, admin, self.admin_key),
            (grpc, api, self.api_key),
            (http, api, self.http_key or self.api_key),
        ):
            if key:
                flags[f"{flag}={title}=***"] = f"{flag}={title}={key}"
        return flags

    def flags(self) -> list[str]:
        """tritonserver's flags without secrets."""
        return self.tls.flags() if self.tls else []

    def grpc_headers(self) -> dict[str, str]:
        """The headers that allow every gRPC request."""
        return {GRPC_PREFIX + name: key for name, key in self._headers(self.api_key).items()}

    def http_headers(self) -> dict[str, str]:
        """The same for HTTP."""
        return self._headers(self.http_key or self.api_key)

    def _headers(self, api_key: str | None) -> dict[str, str]:
        return {ADMIN_KEY_HEADER: self.admin_key} | ({API_KEY_HEADER: api_key} if api_key else {})


def keys_in(environment: Mapping[str, str]) -> dict[str, str]:
    """The arguments of `Access` from the environment. Raises ToolError for a malformed or short key."""
    keys = {}
    variables = {"admin_key": ADMIN_KEY_VARIABLE, "api_key": API_KEY_VARIABLE, "http_key": HTTP_KEY_VARIABLE}
    for option, variable in variables.items():
        if value := environment.get(variable):
            if not is_key(value) or len(value) < MIN_KEY_LENGTH:
                raise ToolError(
                    f"{variable}: expected {MIN_KEY_LENGTH} or more letters, digits and . _ ~ -, got "
                    f"{len(value)} characters; `openssl rand -hex 32` makes one",
                    exit_code=_USAGE,
                )
            keys[option] = value
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    return host in ("localhost", "::1") or host.startswith("127.")


def exposure_warning(host: str, access: Access) -> str | None:
    """A warning if other machines can reach the server without a key or certificate; else None."""
    if is_loopback(host) or access.api_key or (access.tls and access.tls.client_ca):
        return None
    # With TLS for gRPC, HTTP listens on the loopback alone.
    crash = ", and a crafted HTTP request can crash Triton" if not (access.tls or access.http_key) else ""
    return (
        f"--host {host}: anyone who can reach this machine can embed images{crash}; "
        f"set {API_KEY_VARIABLE}, or {HTTP_KEY_VARIABLE} for HTTP alone, or put a proxy in front (SECURITY.md)"
    )
