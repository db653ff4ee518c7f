"""Watches whether a running server still embeds, by a probe image and by the processes of its Python models.

Triton 24.10 reports a Python model as ready after its process has ended: requests that meet it fail after a second, the
others succeed. Reloading the model leaves a thread of Triton waiting for the lost process. A process that was only
stopped, and continues, crashes the server when it answers late. So `supervisor` starts a new server.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Not measured; docs/reliability.md has the time that a loss takes to be found.
LOOK_EVERY_S = 0.5
PROBE_EVERY_S = 10.0
PROBE_AGAIN_S = 1.0  # after a failed probe
PROBE_DEADLINE_S = 20.0
FAILED_PROBES = 2  # in a row

Probe = Callable[[], str | None]
"""Asks the server to embed; returns what is wrong, or None."""

_STUB = "triton_python_b"  # triton_python_backend_stub, cut by the kernel
_BROKEN_STATES = {"Z": "has ended", "T": "is stopped"}  # states of proc(5)


class Watchdog:
    """Watches the server with this process id."""

    def __init__(self, pid: int, probe: Probe) -> None:
        self._pid, self._probe = pid, probe
        self._names: dict[int, str] = {}
        self._probe_failed: str | None = None

    def watch(self, has_ended: Callable[[float], bool]) -> str | None:
        """Watch until the server ends, or no longer embeds; the reason for the latter, or None.

        Args:
            has_ended: waits up to so many seconds for the server to end; whether it did.
        """
        over = threading.Event()
        threading.Thread(target=self._probe_until, args=(over,), name="clip-tools-probe", daemon=True).start()
        suspects: set[int] = set()
        try:
            while not has_ended(LOOK_EVERY_S):
                broken = self._broken_stubs()
                # Seen twice: the process of an unloaded model ends too, and Triton reaps it at once.
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
            try:
                wrong = self._probe()
            except Exception as error:  # a probe that crashed must not look like a success
                wrong = f"{type(error).__name__}: {error}"
            failed = failed + 1 if wrong else 0
            if failed == FAILED_PROBES:
                self._probe_failed = f"a test image was not embedded: {wrong}"
                return

    def _broken_stubs(self) -> dict[int, str]:
        """The processes of Python models that have ended or are stopped: process id and description."""
        broken = {}
        for pid, stub in stubs(self._pid).items():
            if stub.instance:
                self._names[pid] = stub.instance
            if stub.state in _BROKEN_STATES:
                broken[pid] = f"{self._names.get(pid, 'a Python model')} (process {pid}) {_BROKEN_STATES[stub.state]}"
        return broken


class Stub(NamedTuple):
    """The process of a Python model: its instance (empty once ended), its state as in proc(5), and its CPU time."""

    instance: str
    state: str
    cpu_s: float


def stubs(server_pid: int) -> dict[int, Stub]:
    """The processes of a server's Python models, by process id."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text(errors="replace").partition("(")[2].rpartition(")")
            fields = rest.split()  # from proc(5)'s third on
            if name == _STUB and int(fields[1]) == server_pid:
                ticks = int(fields[11]) + int(fields[12])
                words = (stat.parent / "cmdline").read_text(errors="replace").split("\0")
                instance = words[-3] if len(words) > 2 else ""
                found[int(stat.parent.name)] = Stub(instance, fields[0], ticks / os.sysconf("SC_CLK_TCK"))
    return found


def decoding_cpu_s(server_pid: int) -> float:
    """The CPU time of a server's `preprocess` processes."""
    return sum(stub.cpu_s for stub in stubs(server_pid).values() if stub.instance.startswith("preprocess"))
