"""This machine's own server is asked without the proxy of the environment, which is another machine."""

import os

_LOOPBACK = "localhost,127.0.0.1,::1"


def leave_this_machine_out() -> None:
    """Add this machine to `no_proxy`, for gRPC, urllib, curl and whatever is started from here."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{given},{_LOOPBACK}" if given else _LOOPBACK
