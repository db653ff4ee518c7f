"""Who may ask a server what: keys that close Triton's APIs, and TLS for its gRPC.

Without a key everybody may do what `OPEN` says and, where the server listens on this machine alone, read what
`DESCRIPTIVE` says, as perf_analyzer does; CLIP_OPEN_METADATA settles it either way. All the rest needs the admin key,
which every server has: the one of CLIP_ADMIN_KEY, else one made for this run. With an API key (CLIP_API_KEY) inference
needs that one too. With an HTTP key (CLIP_HTTP_KEY) inference over HTTP, whose JSON can bring Triton down
(server#8738), needs that one instead. A model's configuration, where clients read whose vectors these are, needs what
inference needs.
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

# Triton's own names for the parts of both protocols, all of them.
OPEN = ("health", "inference", "model-config")
DESCRIPTIVE = ("metadata", "statistics")  # they tell of the models and change nothing
CLOSED = ("model-repository", "shared-memory", "trace", "logging")

SHORTEST_KEY = 16
_USAGE = 2  # exit code


@dataclass(frozen=True)
class Tls:
    """The server's certificate and key, PEM; with `client_ca`, only clients with a certificate of it are let in."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def flags(self) -> list[str]:
        """tritonserver's. Raises ToolError for a file that is not there."""
        for path in filter(None, (self.cert, self.key, self.client_ca)):
            if not path.is_file():
                raise ToolError(f"{path}: expected a file in PEM, found none", exit_code=_USAGE)
        flags = ["--grpc-use-ssl=true", f"--grpc-server-cert={self.cert}", f"--grpc-server-key={self.key}"]
        if self.client_ca:
            flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_ca}"]
        return flags


@dataclass(frozen=True)
class Access:
    """The keys of a server. `admin_key` is never None: a server whose key nobody knows is closed, not open."""

    admin_key: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    api_key: str | None = field(default=None, repr=False)
    http_key: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], tls: Tls | None = None) -> "Access":
        """The keys that the environment names, and made ones. Raises ToolError as `keys_in` does."""
        return cls(**keys_in(environment), tls=tls)

    def secret_flags(self, *, open_metadata: bool) -> dict[str, str]:
        """tritonserver's flags that hold a key; of each what may be shown, and what it is."""
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
        """tritonserver's flags that may be shown."""
        return self.tls.flags() if self.tls else []

    def grpc_headers(self) -> dict[str, str]:
        """What a gRPC request for anything at all has to carry."""
        return {GRPC_PREFIX + name: key for name, key in self._headers(self.api_key).items()}

    def http_headers(self) -> dict[str, str]:
        """The same for HTTP."""
        return self._headers(self.http_key or self.api_key)

    def _headers(self, api_key: str | None) -> dict[str, str]:
        return {ADMIN_KEY_HEADER: self.admin_key} | ({API_KEY_HEADER: api_key} if api_key else {})


def keys_in(environment: Mapping[str, str]) -> dict[str, str]:
    """`Access`'s keys that the environment names. Raises ToolError for one that cannot be a key or is too short."""
    keys = {}
    variables = {"admin_key": ADMIN_KEY_VARIABLE, "api_key": API_KEY_VARIABLE, "http_key": HTTP_KEY_VARIABLE}
    for option, variable in variables.items():
        if value := environment.get(variable):
            if not is_key(value) or len(value) < SHORTEST_KEY:
                raise ToolError(
                    f"{variable}: expected {SHORTEST_KEY} or more letters, digits and . _ ~ -, came "
                    f"{len(value)} characters; `openssl rand -hex 32` makes one",
                    exit_code=_USAGE,
                )
            keys[option] = value
    return keys


def is_this_machine_alone(host: str) -> bool:
    """Whether a server that listens there is out of other machines' reach."""
    return host in ("localhost", "::1") or host.startswith("127.")


def exposure(host: str, access: Access) -> str | None:
    """What to know before other machines can reach the server; None when they cannot, or need a key or certificate."""
    if is_this_machine_alone(host) or access.api_key or (access.tls and access.tls.client_ca):
        return None
    # Beside an encrypted gRPC, HTTP is for this machine alone.
    crash = ", and a crafted HTTP request brings Triton down" if not (access.tls or access.http_key) else ""
    return (
        f"--host {host}: whoever reaches this machine can have images embedded{crash}; "
        f"set {API_KEY_VARIABLE}, or {HTTP_KEY_VARIABLE} for HTTP alone, or put a proxy before it (SECURITY.md)"
    )
