"""Lets a server answer what it has taken before it is told to end.

SIGTERM alone does not: Triton 24.10 stops its models together, and a request that is between two steps of the ensemble
is then refused by the next one.
"""

import json
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from clip_tools.proxy import DIRECT
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE

_ANSWER_S = 5.0  # for the server to answer about its models: one that hangs is not waited for
_POLL_S = 0.05


def drain(http_url: str, headers: Mapping[str, str], timeout_s: float) -> None:
    """Unload the ensembles: new requests are told so at once; return when those it has are answered, or after the time.

    Raises OSError when the server does not answer, or does not let its models be changed.
    """
    deadline = time.monotonic() + timeout_s
    for name in (ENSEMBLE, TEXT_ENSEMBLE):  # one that is not loaded is no error
        _post(f"{http_url}/v2/repository/models/{name}/unload", headers)
    while time.monotonic() < deadline:
        index = json.loads(_post(f"{http_url}/v2/repository/index", headers))
        if not any(_is_unloading(model) for model in index):
            return
        time.sleep(_POLL_S)


def _is_unloading(model: Mapping[str, Any]) -> bool:
    return model["name"] in (ENSEMBLE, TEXT_ENSEMBLE) and model.get("state") == "UNLOADING"


def _post(url: str, headers: Mapping[str, str]) -> bytes:
    request = urllib.request.Request(url, b"{}", dict(headers))  # noqa: S310
    with DIRECT.open(request, timeout=_ANSWER_S) as answer:
        body: bytes = answer.read()
    return body
