"""`clip_preprocess` over many cases, in a process of its own, so that a crash or a hang is found and told by its name.

python -m tests.fuzz_preprocess reads the names of cases and writes what came of each, as lines of JSON.
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
# No case takes 6 s alone on a core at 2 GHz; here others may use it too.
HANG_S = 90
# Over what the largest accepted image needs, 1.6 GB: a case that asks for more is one whose memory is not bounded.
_MEMORY_LIMIT_BYTES = 4 << 30


@dataclass
class Outcomes:
    """What came of the cases: how many gave pixels or a refusal, and by name each that gave anything else."""

    came: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: dict[str, str] = field(default_factory=dict)
    crashed: dict[str, int] = field(default_factory=dict)
    hung: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""
    memory_mb: list[int] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many there were."""
        return self.came.total() + len(self.errors) + len(self.crashed) + len(self.hung)

    @property
    def refused(self) -> int:
        """How many were refused with a known code."""
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
    """Each case through `clip_preprocess`; a process that crashed or hung is followed by a new one for the rest."""
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
        stderr=subprocess.DEVNULL,  # libtiff speaks there
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
    """The case, made by another process: an encoder of large images leaves more behind than their decoder."""
    command = [sys.executable, "-m", "tests.fuzz_files", name]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def main() -> None:
    """Answer each name with what came of its case."""
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
        started = time.process_time()  # of this process alone, whoever else uses the core
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
