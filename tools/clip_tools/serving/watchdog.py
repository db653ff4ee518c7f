"""Whether a running server still embeds: a known image sent through it, and the processes of its Python models.

Triton 24.10 goes on calling a Python model ready whose process is gone: requests that meet it fail after a second, and
the others succeed. Reloading that model leaves a thread of Triton waiting for the lost process, and one that was only
stopped and goes on takes the whole server down when it answers late. So the cure is a new server; see `supervisor`.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clip_tools.proxy import DIRECT

if TYPE_CHECKING:
    from clip_embed import EmbeddingClient

# None of these was measured, but how long what they find takes to be found.
LOOK_EVERY_S = 0.5
PROBE_EVERY_S = 10.0
PROBE_AGAIN_S = 1.0  # after one that failed
PROBE_DEADLINE_S = 20.0
FAILED_PROBES = 2  # in a row
BUSY_SHARE = 0.1  # of a core, on which a decoder may have to wait its turn
STUCK_S = 30.0  # without a batch, while the queue is full: one batch of 64 took 5 s on two busy cores

Probe = Callable[[], str | None]
"""Asks the server to embed, and says what is wrong; None: nothing."""

_STUB = "triton_python_b"  # triton_python_backend_stub, as the kernel keeps names
_WRONG = {"Z": "has ended", "T": "is stopped"}  # states of proc(5)
# Of the image engine: `preprocess` goes on while that one is stuck, and texts have a tower for themselves.
_BATCHES = re.compile(r'^nv_inference_exec_count\{model="(?!preprocess|tokenize|clip_text).*\} (\d+)', re.MULTILINE)


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
            try:
                wrong = self._probe()
            except Exception as error:  # whatever it is: who no longer looks must not seem content
                wrong = f"{type(error).__name__}: {error}"
            failed = failed + 1 if wrong else 0
            if failed == FAILED_PROBES:
                self._probe_failed = f"a test image is not embedded: {wrong}"
                return

    def _broken_stubs(self) -> dict[int, str]:
        """By process id, the processes of Python models that are gone or stand still, in words."""
        broken = {}
        for pid, stub in stubs(self._pid).items():
            if stub.instance:
                self._names[pid] = stub.instance
            if stub.state in _WRONG:
                broken[pid] = f"{self._names.get(pid, 'a Python model')} (process {pid}) {_WRONG[stub.state]}"
        return broken


class Stub(NamedTuple):
    """A Python model's process: which instance it is, empty once it has ended; its state as proc(5) has it; and the
    CPU time that it has taken."""

    instance: str
    state: str
    cpu_s: float


def stubs(server_pid: int) -> dict[int, Stub]:
    """The processes of a server's Python models, by their ids."""
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
    """The CPU time that the processes of a server's `preprocess` have taken."""
    return sum(stub.cpu_s for stub in stubs(server_pid).values() if stub.instance.startswith("preprocess"))


class ImageProbe:
    """Sends an image through `clip_ensemble`, and texts through the text tower where there is one.

    A server that only takes its time, or has no room, embeds for others.

    Args:
        new_client: makes a client, one for each image, whose connection is new as well.
        metrics_url: the server's metrics, which tell whether it does; None, or ones that it never had: a full queue is
            taken for a sign of life.
        cpu_s: the CPU time that its `preprocess` has taken. While that goes on, it decodes something dear; one that
            hangs ends by itself.
        texts: what to send through the text tower.
    """

    def __init__(
        self,
        new_client: Callable[[], "EmbeddingClient"],
        image: bytes,
        metrics_url: str | None,
        cpu_s: Callable[[], float] = lambda: 0.0,
        texts: Sequence[str] = (),
    ) -> None:
        self._texts = texts
        self._new_client, self._image, self._metrics_url, self._cpu_s = new_client, image, metrics_url, cpu_s
        self._batches = self._count()
        self._seen_s, self._seen_cpu_s = time.monotonic(), cpu_s()
        self._worked_s = self._seen_s

    def __call__(self) -> str | None:
        from clip_embed import EmbeddingError

        try:
            self.ask()
        except EmbeddingError as error:
            return str(error)
        return None

    def ask(self) -> None:
        """Return when the server embedded the image and the texts, or is only busy. Else raises EmbeddingError."""
        from clip_embed import DeadlineExceededError, ServerOverloadedError

        try:
            with self._new_client() as client:
                client.embed([self._image])
                if self._texts:
                    client.embed_text(self._texts)
        except ServerOverloadedError:  # at once, so that one batch may not have ended since the last look
            if self._idle_s() > STUCK_S and self._batches is not None:
                raise
        except DeadlineExceededError:
            if self._idle_s() > 0:
                raise
        else:
            self._idle_s()

    def _idle_s(self) -> float:
        """How long the server has embedded and decoded nothing; 0 when it has since the last look."""
        batches, now_s, cpu_s = self._count(), time.monotonic(), self._cpu_s()
        has_executed = (batches or 0) > (self._batches or 0)
        has_decoded = cpu_s - self._seen_cpu_s > BUSY_SHARE * (now_s - self._seen_s)
        if has_executed or has_decoded:
            self._worked_s = now_s
        self._batches = self._batches if batches is None else batches
        self._seen_s, self._seen_cpu_s = now_s, cpu_s
        return now_s - self._worked_s

    def _count(self) -> int | None:
        """How many batches of images the engine has executed; None where the server does not say."""
        if self._metrics_url is None:
            return None
        try:
            with DIRECT.open(self._metrics_url, timeout=5) as answer:
                return sum(map(int, _BATCHES.findall(answer.read().decode())))
        except (OSError, HTTPException):
            return None
