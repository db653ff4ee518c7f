"""A closed loop of concurrent callers on one arm, and what it measured."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clip_tools.errors import ToolError
from clip_tools.measuring.noise import percentile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Ask = Callable[[list[int]], "npt.NDArray[np.generic]"]
"""Send the images of these indices as one request, and give what came back: one row an image. Thread-safe."""

Check = Callable[[list[int], "npt.NDArray[np.generic]"], float]
"""How well an answer agrees with the reference (1 is best). Raises ToolError when it is wrong."""

_GIVE_UP_AFTER_S = 120.0


@dataclass(frozen=True)
class Measured:
    """One cell in one round. `throughput` in images a second; latencies in ms of a request, at the client.

    `agreement` is the worst answer's: the cosine to open_clip's embedding.
    """

    throughput: float
    requests: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    agreement: float


@dataclass
class _Loop:
    requests: list[tuple[float, float, list[int]]] = field(default_factory=list)  # begin, end, indices
    answers: list[tuple[list[int], "npt.NDArray[np.generic]"]] = field(default_factory=list)
    failure: BaseException | None = None
    stop: bool = False


def run_closed_loop(
    ask: Ask,
    check: Check,
    image_count: int,
    *,
    batch: int,
    concurrency: int,
    seconds: float,
    warmup_s: float,
    at_least: int = 3,
) -> Measured:
    """Ask from `concurrency` threads without a pause, and measure a window in the midst of it.

    The window opens after `warmup_s` and as many requests as callers, and lasts `seconds` and until `at_least` requests
    ended in it. Callers go on until it has closed, so neither a ramp nor a tail is in it. A request that lies only
    partly in it counts by that part. Every answer is checked, after the clock has stopped. Raises ToolError when a
    request fails or an answer is wrong.
    """
    loop = _Loop()
    lock = threading.Lock()
    next_image = iter(range(10**12))

    def call() -> None:
        try:
            while not loop.stop:
                with lock:
                    indices = [next(next_image) % image_count for _ in range(batch)]
                begin = time.perf_counter()
                answer = ask(indices)
                end = time.perf_counter()
                loop.requests.append((begin, end, indices))
                loop.answers.append((indices, answer))
        except BaseException as error:
            loop.failure = error
            loop.stop = True

    started = time.perf_counter()
    threads = [threading.Thread(target=call, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()

    def wait_until(reached: Callable[[], bool]) -> None:
        while not reached() and not loop.stop:
            if time.perf_counter() - started > _GIVE_UP_AFTER_S + seconds:
                loop.stop = True
                raise ToolError(f"only {len(loop.requests)} requests ended in {_GIVE_UP_AFTER_S + seconds:.0f} s")
            time.sleep(0.005)

    wait_until(lambda: time.perf_counter() - started >= warmup_s and len(loop.requests) >= concurrency)
    opened, before = time.perf_counter(), len(loop.requests)
    wait_until(lambda: time.perf_counter() - opened >= seconds and len(loop.requests) - before >= at_least)
    closed = time.perf_counter()
    loop.stop = True
    for thread in threads:
        thread.join(timeout=_GIVE_UP_AFTER_S)
    if loop.failure is not None:
        raise ToolError(f"a request failed: {type(loop.failure).__name__}: {loop.failure}") from loop.failure
    agreement = min(check(indices, answer) for indices, answer in loop.answers)
    return summarise([(b, e, len(i)) for b, e, i in loop.requests], opened, closed, agreement)


def summarise(requests: list[tuple[float, float, int]], opened: float, closed: float, agreement: float) -> Measured:
    """The window's figures from every request's begin, end (seconds of one clock) and number of images."""
    images = sum(
        count * max(0.0, min(end, closed) - max(begin, opened)) / (end - begin) for begin, end, count in requests
    )
    latencies_ms = [1000 * (end - begin) for begin, end, _ in requests if opened <= end <= closed]
    return Measured(
        throughput=images / (closed - opened),
        requests=len(latencies_ms),
        p50_ms=percentile(latencies_ms, 50),
        p95_ms=percentile(latencies_ms, 95),
        p99_ms=percentile(latencies_ms, 99),
        agreement=agreement,
    )
