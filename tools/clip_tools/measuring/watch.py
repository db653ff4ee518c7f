"""What a server and its stubs hold, sampled while they work: memory, file descriptors, threads, shared memory."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from clip_tools.errors import ToolError

_SHARED_REGION = re.compile(r"^(\w+)-(\w+) .* (/dev/shm/\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Sample:
    """A moment of the server, its children included.

    `private_mib` is the memory that would come back if they ended (USS), `resident_mib` counts what is shared with each
    (RSS); `shared_mib` and `regions` are what they have mapped of /dev/shm, each region once.
    """

    at_s: float
    private_mib: float
    resident_mib: float
    open_files: int
    threads: int
    regions: int
    shared_mib: float


def sample(pid: int, at_s: float) -> Sample:
    """The process and its children now. Raises ToolError when it is gone."""
    import psutil

    private = resident = open_files = threads = 0
    regions: dict[str, int] = {}
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            memory = process.memory_full_info()
            private += memory.uss
            resident += memory.rss
            open_files += process.num_fds()
            threads += process.num_threads()
            for begin, end, name in _SHARED_REGION.findall(Path(f"/proc/{process.pid}/maps").read_text()):
                regions[name] = max(regions.get(name, 0), int(end, 16) - int(begin, 16))
    mib = 2**20
    return Sample(
        round(at_s, 3),
        round(private / mib, 1),
        round(resident / mib, 1),
        open_files,
        threads,
        len(regions),
        round(sum(regions.values()) / mib, 1),
    )


def family(pid: int) -> list[Any]:
    """The process and its children, as psutil has them. Raises ToolError when it is gone."""
    import psutil

    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess as error:
        raise ToolError(f"the server, process {pid}, is gone: its log says why") from error


def listener(port: int) -> int:
    """The process that listens on a TCP port of this machine. Raises ToolError when none is seen."""
    import psutil

    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return int(connection.pid)
    raise ToolError(
        f"nothing of this user listens on port {port} of this machine: the server's memory is watched, so it has to "
        "run here, under this user"
    )


class Watch:
    """Samples in a thread of its own, as a context manager. `samples` grows; `failure` says why it ended early."""

    def __init__(self, pid: int, *, every_s: float, tell: Callable[[Sample], None] = lambda _: None) -> None:
        self.samples: list[Sample] = []
        self.failure: ToolError | None = None
        self._pid = pid
        self._every_s = every_s
        self._tell = tell
        self._stop = threading.Event()
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._every_s):
                self.samples.append(sample(self._pid, time.monotonic() - self._began_s))
                self._tell(self.samples[-1])
        except ToolError as error:
            self.failure = error


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between every two points: a few odd ones, up to 29 % of them, do not move it.

    Sen, Estimates of the regression coefficient based on Kendall's tau, 1968. 0 for fewer than two points.
    """
    import numpy as np

    if len(x) < 2:
        return 0.0
    one, other = np.triu_indices(len(x), 1)
    x_, y_ = np.asarray(x, float), np.asarray(y, float)
    return float(np.median((y_[other] - y_[one]) / (x_[other] - x_[one])))
