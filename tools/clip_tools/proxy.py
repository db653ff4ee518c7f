"""Requests to servers on this machine bypass the proxy of the environment."""

import os
import urllib.request

_LOOPBACK = "localhost,127.0.0.1,::1"  # httpx cannot read `[::1]` here

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs without a proxy, for this machine's server at any of its addresses."""


def bypass_for_localhost() -> None:
    """Add this machine to `no_proxy`, for gRPC and for child processes such as perf_analyzer."""
    given = [value for name in ("no_proxy", "NO_PROXY") if (value := os.environ.get(name))]
    if "*" not in given:  # "*" means every host only if it stands alone
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*dict.fromkeys(given), _LOOPBACK])
