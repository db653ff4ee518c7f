"""Reads what a server and its stubs use: memory, CPU, file descriptors, threads, shared memory and the GPU."""

import contextlib
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np

from clip_tools.errors import ToolError
from clip_tools.measuring.fingerprint import ask_nvidia_smi

_SHARED_REGION = re.compile(r"^(\w+)-(\w+) .* (/dev/shm/\S+)", re.MULTILINE)
_MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """What the server and its children use at one moment.

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
    regions: dict[str, int] = {}

    def read(process: Any) -> tuple[int, ...]:
        memory = process.memory_full_info()
        for begin, end, name in _SHARED_REGION.findall(Path(f"/proc/{process.pid}/maps").read_text()):
            regions[name] = max(regions.get(name, 0), int(end, 16) - int(begin, 16))
        return memory.uss, memory.rss, process.num_fds(), process.num_threads()

    private, resident, open_files, threads = map(sum, zip(*of_each(pid, read), strict=True))
    mib = [round(size / _MIB, 1) for size in (private, resident, sum(regions.values()))]
    return Sample(round(at_s, 3), mib[0], mib[1], open_files, threads, len(regions), mib[2])


def resident_mib(pid: int) -> float:
    """The memory that a process and its children hold, MiB; pages that several share are counted once."""
    return float(sum(of_each(pid, lambda process: process.memory_full_info().pss)) / _MIB)


def cpu_seconds(pid: int) -> float:
    """The CPU time that a process and its children have used so far, s."""
    return float(sum(sum(of_each(pid, lambda process: process.cpu_times()[:2]), ())))


def of_each(pid: int, read: Callable[[Any], T]) -> list[T]:
    """What `read` gives for the `psutil.Process` and each child. Raises ToolError when the process is gone."""
    import psutil

    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                found.append(read(process))
    if not found:
        raise ToolError(f"the server, process {pid}, is gone: its log says why")
    return found


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


class Sampler(Generic[T]):
    """Calls `take`, with the seconds since it began, every `every_s` in a thread, as a context manager.

    It ends earlier if `take` returns None or raises ToolError, which is then in `failure`.
    """

    def __init__(self, take: Callable[[float], T | None], *, every_s: float) -> None:
        self.samples: list[T] = []
        self.failure: ToolError | None = None
        self._take, self._every_s = take, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began_s = time.monotonic()
        try:
            while (one := self._take(time.monotonic() - began_s)) is not None:
                self.samples.append(one)
                if self._stop.wait(self._every_s):
                    return
        except ToolError as error:
            self.failure = error


def gpu_sampler() -> Sampler[tuple[float, float]]:
    """Samples the first GPU every half second: `read_gpu`; none where there is no GPU."""
    return Sampler(lambda _: read_gpu(ask_nvidia_smi("utilization.gpu,memory.used")), every_s=0.5)


def read_gpu(text: str) -> tuple[float, float] | None:
    """(percent in use, MiB in use) of nvidia-smi's first line, such as `37 %, 2048 MiB`; None for anything else."""
    found = re.match(r"(\d+) %, (\d+) MiB", text)
    return (float(found[1]), float(found[2])) if found else None


def gpu_figures(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The mean utilisation and the peak memory. The first sample is from before the load and does not count."""
    utilisation = statistics.mean(percent for percent, _ in samples[1:] or samples)
    return {"utilisation_percent": round(utilisation, 1), "memory_mib": max(mib for _, mib in samples)}


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between every two points: a few odd ones, up to 29 % of them, do not move it.

    Sen, Estimates of the regression coefficient based on Kendall's tau, 1968. 0 for fewer than two points.
    """
    if len(x) < 2:
        return 0.0
    one, other = np.triu_indices(len(x), 1)
    x_, y_ = np.asarray(x, float), np.asarray(y, float)
    return float(np.median((y_[other] - y_[one]) / (x_[other] - x_[one])))
