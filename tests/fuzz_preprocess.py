"""Runs `clip_preprocess` on many cases in another process, so that a crash or a hang is reported with its case.

python -m tests.fuzz_preprocess reads the names of cases and writes the outcome of each, as lines of JSON.
"""

import collections
import json
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from clip_tools.paths import MODELS
from clip_tools.repository import read_config
from tests import fuzz_files
from tests.fuzz_bombs import LARGEST

CODES = frozenset(
    (
        "empty",
        "too_large",
        "too_many_pixels",
        "too_complex",
        "too_deep",
        "unsupported_format",
        "not_an_image",
        "truncated",
        "corrupt",
    )
)
# On an idle core at 2 GHz no case takes 6 s; other processes may run here.
HANG_S = 90
# The largest accepted image needs 1.6 GB. A case that asks for more has unbounded memory.
_MEMORY_LIMIT_BYTES = 4 << 30


@dataclass
class Outcomes:
    """The outcomes: how many cases gave pixels or a refusal, and the names of all others."""

    came: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: dict[str, str] = field(default_factory=dict)
    crashed: dict[str, int] = field(default_factory=dict)
    hung: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""
    memory_mb: list[int] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """The number of cases."""
        return self.came.total() + len(self.errors) + len(self.crashed) + len(self.hung)

    @property
    def refused(self) -> int:
        """The number of cases that were refused with a known code."""
        return self.came.total() - self.came["pixels"]

    def add(self, name: str, came: str, seconds: float) -> None:
        """Count one."""
        if came == "pixels" or came in CODES:
            self.came[came] += 1
        else:
            self.errors[name] = came
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest = round(seconds, 2), name


def fuzz(names: Sequence[str]) -> Outcomes:
    """Run each case through `clip_preprocess`. After a crash or a hang a new process takes the rest."""
    outcomes = Outcomes()
    left = collections.deque(names)
    while left:
        _fuzz_until_it_ends(left, outcomes)
    return outcomes


def _fuzz_until_it_ends(left: collections.deque[str], outcomes: Outcomes) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz_preprocess"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # libtiff writes to it
        text=True,
        cwd=Path(__file__).parents[1],
    )
    lines: queue.Queue[str] = queue.Queue()
    threads = [
        threading.Thread(target=_feed, args=(process.stdin, list(left)), daemon=True),
        threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put("")], daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while left:
            try:
                line = lines.get(timeout=HANG_S)
            except queue.Empty:
                outcomes.hung.append(left.popleft())
                return
            if not line:
                outcomes.crashed[left.popleft()] = process.wait()
                return
            answer = json.loads(line)
            assert answer["name"] == left.popleft()
            outcomes.add(answer["name"], answer["came"], answer["seconds"])
            outcomes.memory_mb.append(answer["memory_mb"])
    finally:
        process.kill()
        process.wait()
        for thread in threads:
            thread.join()
        process.stdout.close()


def _feed(stream, names: Iterable[str]) -> None:
    try:
        with stream:
            for name in names:
                stream.write(name + "\n")
    except OSError:
        pass  # it has ended


def _made_apart(name: str) -> bytes:
    """Make the case in another process, because encoders of large images leak more memory than decoders."""
    command = [sys.executable, "-m", "tests.fuzz_files", name]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def main() -> None:
    """Answer each name with the outcome of its case."""
    sys.path.append(str(MODELS / "preprocess" / "1"))
    from clip_preprocess import ImageLimits, RefusedImage, pixels_of

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    limits = ImageLimits.of(
        {key: one.string_value for key, one in read_config(MODELS, "preprocess").parameters.items()}
    )
    fuzz_files.whole_files()
    process = psutil.Process()
    for line in sys.stdin:
        name = line.rstrip("\n")
        content = _made_apart(name) if name.removeprefix("bomb ") in LARGEST else fuzz_files.make(name)
        started = time.process_time()  # CPU time: other processes do not count
        try:
            pixels = pixels_of(content, limits, upright=True)
            came = "pixels" if (pixels.shape, str(pixels.dtype)) == ((224, 224, 3), "uint8") else "no pixels"
        except RefusedImage as error:
            came = error.code if "\n" not in error.reason else f"more than a line: {error.reason}"
        except BaseException as error:
            came = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        memory_mb = process.memory_info().rss >> 20
        print(json.dumps({"name": name, "came": came, "seconds": seconds, "memory_mb": memory_mb}), flush=True)


if __name__ == "__main__":
    main()
