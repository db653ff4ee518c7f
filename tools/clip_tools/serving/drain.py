"""Drains a server before it is stopped: requests in flight are answered.

SIGTERM alone loses some: Triton 24.10 stops all models at once, so a request between two steps of the ensemble is
refused by the next step.
"""

import json
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from clip_tools.proxy import DIRECT
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE

_ANSWER_S = 5.0  # for one answer of the server: do not wait for one that hangs
_POLL_S = 0.05


def drain(http_url: str, headers: Mapping[str, str], timeout_s: float) -> None:
    """Unload the ensembles, and return when their requests are answered or the time is over.

    New requests are refused at once. Raises OSError if the server does not answer, or does not allow model control.
    """
    deadline = time.monotonic() + timeout_s
    for name in (ENSEMBLE, TEXT_ENSEMBLE):  # no error if it is not loaded
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
