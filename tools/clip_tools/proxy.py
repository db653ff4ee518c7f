"""This machine's own server is asked without the proxy of the environment, which is another machine."""

import os
import urllib.request

_LOOPBACK = "localhost,127.0.0.1,::1"  # httpx cannot read `[::1]` here

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of this machine's own server, whatever its address."""


def leave_this_machine_out() -> None:
    """Add this machine to `no_proxy`, for gRPC and for what is started from here, such as perf_analyzer."""
    given = [value for name in ("no_proxy", "NO_PROXY") if (value := os.environ.get(name))]
    if "*" not in given:  # which means every host only where it stands alone
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*dict.fromkeys(given), _LOOPBACK])
