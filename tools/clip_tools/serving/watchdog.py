"""Whether a running server still embeds: a known image sent through it, and the processes of its Python models.

Triton 24.10 goes on calling a Python model ready whose process is gone: requests that meet it fail after a second, and
the others succeed. Reloading that model leaves a thread of Triton waiting for the lost process, and one that was only
stopped and goes on takes the whole server down when it answers late. So the cure is a new server; see `supervisor`.
"""

import contextlib
import re
import threading
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_embed import EmbeddingClient

# None of these was measured, but how long what they find takes to be found.
LOOK_EVERY_S = 0.5
PROBE_EVERY_S = 10.0
PROBE_AGAIN_S = 1.0  # after one that failed
PROBE_DEADLINE_S = 20.0
FAILED_PROBES = 2  # in a row

Probe = Callable[[], str | None]
"""Asks the server to embed, and says what is wrong; None: nothing."""

_STUB = "triton_python_b"  # triton_python_backend_stub, as the kernel keeps names
_WRONG = {"Z": "has ended", "T": "is stopped"}  # states of proc(5)
_SERVED = re.compile(r'^nv_inference_request_success\{model="clip_ensemble",.*\} (\d+)', re.MULTILINE)


class Watchdog:
    """Looks after the server with this process id."""

    def __init__(self, pid: int, probe: Probe) -> None:
        self._pid, self._probe = pid, probe
        self._names: dict[int, str] = {}
        self._probe_failed: str | None = None

    def watch(self, has_ended: Callable[[float], bool]) -> str | None:
        """Why the server no longer embeds, when it no longer does; None when it ended before.

        Args:
            has_ended: waits for the server's end, so many seconds at most, and says whether it came.
        """
        over = threading.Event()
        threading.Thread(target=self._probe_until, args=(over,), name="clip-tools-probe", daemon=True).start()
        suspects: set[int] = set()
        try:
            while not has_ended(LOOK_EVERY_S):
                broken = self._broken_stubs()
                # Twice, since a model that is unloaded has its process end too, and Triton takes it in at once.
                if lost := suspects & broken.keys():
                    return "; ".join(broken[pid] for pid in sorted(lost))
                suspects = set(broken)
                if self._probe_failed:
                    return self._probe_failed
        finally:
            over.set()
        return None

    def _probe_until(self, over: threading.Event) -> None:
        failed = 0
        while not over.wait(PROBE_AGAIN_S if failed else PROBE_EVERY_S):
            wrong = self._probe()
            failed = failed + 1 if wrong else 0
            if failed == FAILED_PROBES:
                self._probe_failed = f"a test image is not embedded: {wrong}"
                return

    def _broken_stubs(self) -> dict[int, str]:
        """By process id, the processes of Python models that are gone or stand still, in words."""
        broken = {}
        for pid, state in stubs(self._pid).items():
            with contextlib.suppress(OSError, IndexError):  # of a process that has ended nothing can be read any more
                self._names[pid] = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-3]
            if state in _WRONG:
                broken[pid] = f"{self._names.get(pid, 'a Python model')} (process {pid}) {_WRONG[state]}"
        return broken


def stubs(server_pid: int) -> dict[int, str]:
    """The processes of a server's Python models, with their states as proc(5) has them."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if name == _STUB and int(parent) == server_pid:
                found[int(stat.parent.name)] = state
    return found


class ImageProbe:
    """Sends an image through `clip_ensemble`. A server that only takes its time, or has no room, embeds for others.

    Args:
        new_client: makes a client, one for each image, whose connection is new as well.
        metrics_url: the server's metrics, which tell whether it does.
    """

    def __init__(self, new_client: Callable[[], "EmbeddingClient"], image: bytes, metrics_url: str) -> None:
        self._new_client, self._image, self._metrics_url = new_client, image, metrics_url
        self._served = self._count()

    def __call__(self) -> str | None:
        from clip_embed import DeadlineExceededError, EmbeddingError, ServerOverloadedError

        before = self._served
        try:
            with self._new_client() as client:
                client.embed([self._image])
        except EmbeddingError as error:
            self._served = self._count()
            if isinstance(error, ServerOverloadedError | DeadlineExceededError) and self._served > before:
                return None
            return str(error)
        self._served = self._count()
        return None

    def _count(self) -> int:
        """How many requests `clip_ensemble` has embedded; 0 where the server does not say."""
        try:
            with urllib.request.urlopen(self._metrics_url, timeout=5) as answer:  # noqa: S310
                found = _SERVED.search(answer.read().decode())
        except (OSError, HTTPException):
            return 0
        return int(found[1]) if found else 0
