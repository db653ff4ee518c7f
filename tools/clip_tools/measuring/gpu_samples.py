"""How busy the GPUs are while something runs, by nvidia-smi; nothing where there is none."""

import re
import statistics
import threading
from dataclasses import dataclass, field
from types import TracebackType

from clip_tools.measuring.fingerprint import ask_nvidia_smi

_PERIOD_S = 0.5


@dataclass
class GpuSamples:
    """Takes (utilisation in percent, memory in MiB) of the first GPU every half second, as a context manager."""

    samples: list[tuple[float, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "GpuSamples":
        if self._take():
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _type: type | None, _value: BaseException | None, _traceback: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def mean(self, column: int) -> float:
        """The mean of a column; the first sample was taken before the load and does not count."""
        return round(statistics.mean(row[column] for row in self.samples[1:] or self.samples), 1)

    def most(self, column: int) -> float:
        """The largest of a column."""
        return max(row[column] for row in self.samples)

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._take()

    def _take(self) -> bool:
        sample = read_sample(ask_nvidia_smi("utilization.gpu,memory.used"))
        if sample:
            self.samples.append(sample)
        return sample is not None


def read_sample(text: str) -> tuple[float, float] | None:
    """(percent, MiB) of nvidia-smi's first line, such as `37 %, 2048 MiB`; None for anything else."""
    found = re.match(r"(\d+) %, (\d+) MiB", text)
    return (float(found[1]), float(found[2])) if found else None
