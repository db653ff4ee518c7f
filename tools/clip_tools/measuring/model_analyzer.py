"""The real Model Analyzer with the keys of the server that it asks: `python -m clip_tools.measuring.model_analyzer`.

In remote mode it asks a running server for the repository's index and loads models, which Triton closes and opens
together, and it has no option for a key. Its flags are its own.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from clip_tools.errors import exits_with_reason, needs_extra
from clip_tools.serving.access import Access
from clip_tools.serving.key_files import access_of


def give_keys(client: Any, scheme: str, headers_of: Callable[[Access], Mapping[str, str]]) -> None:
    """Make every client of this tritonclient class send the keys of its server, if they are known."""
    make = client.__init__

    def make_with_keys(self: Any, url: str, *arguments: Any, **options: Any) -> None:
        make(self, url, *arguments, **options)
        if access := access_of(f"{scheme}://{url}", os.environ):
            self.register_plugin(lambda request: request.headers.update(headers_of(access)))

    client.__init__ = make_with_keys


def main() -> None:
    """Become Model Analyzer with the flags given."""
    with exits_with_reason("model-analyzer"):  # also for a key of the environment that cannot be one
        with needs_extra("profile"):
            names = ("model_analyzer.entrypoint", "tritonclient.grpc", "tritonclient.http")
            analyzer, grpc, http = map(importlib.import_module, names)
        give_keys(grpc.InferenceServerClient, "grpc", Access.grpc_headers)
        give_keys(http.InferenceServerClient, "http", Access.http_headers)
        analyzer.main()


if __name__ == "__main__":
    main()
