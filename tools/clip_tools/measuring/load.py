"""A closed loop of concurrent callers on one server, and what it measured."""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring import steps
from clip_tools.measuring.noise import percentile
from clip_tools.measuring.watch import cpu_seconds, gpu_figures, gpu_sampler

Ask = Callable[[list[int]], Any]
"""Send the images of these indices as one request, and give what came back: one row an image. Thread-safe."""

Check = Callable[[list[int], Any], float]
"""How well an answer agrees with the reference (1 is best). Raises ToolError when it is wrong."""

_GIVE_UP_AFTER_S = 120.0


@dataclass(frozen=True)
class Measured:
    """One window. `throughput` in images a second; latencies in ms of a request, at the client.

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
    requests: list[tuple[float, float, int]] = field(default_factory=list)  # begin, end, images
    answers: list[tuple[list[int], Any]] = field(default_factory=list)
    failure: BaseException | None = None
    stop: bool = False


def measure(
    ask: Ask, check: Check, image_count: int, *, triton_url: str | None, pid: int = 0, **loop: Any
) -> dict[str, Any]:
    """A window of `run_closed_loop` as JSON-able data, with what the server and the GPU did in it.

    `steps` are Triton's own times, where the server at `triton_url` lets us read them. `server_cores_busy` and `gpu`
    need a `pid`: a server that was started here.
    """
    before = steps.counters(triton_url) if triton_url else {}
    cpu_before_s, begin_s = cpu_seconds(pid) if pid else 0.0, time.perf_counter()
    with gpu_sampler() as gpu:
        measured = run_closed_loop(ask, check, image_count, **loop)
    row: dict[str, Any] = {key: rounded(value) for key, value in asdict(measured).items()}
    if pid:
        row["server_cores_busy"] = rounded((cpu_seconds(pid) - cpu_before_s) / (time.perf_counter() - begin_s))
        if gpu.samples:
            row["gpu"] = gpu_figures(gpu.samples)
    if triton_url and before:
        row["steps"] = steps.between(before, steps.counters(triton_url))
    return row


def rounded(value: Any) -> Any:
    """A float rounded to seven digits; other values unchanged."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


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
    """Send requests from `concurrency` threads without a pause, and measure a window in the middle.

    The window opens after `warmup_s` and as many requests as callers, and lasts `seconds` and until `at_least` requests
    ended in it. Callers go on until it has closed, so neither a ramp nor a tail is in it. A request that lies only
    partly in it counts by that part. Every answer is checked, after the clock has stopped. Raises ToolError when a
    request fails or an answer is wrong.
    """
    loop, lock, turns = _Loop(), threading.Lock(), itertools.count()

    def call() -> None:
        try:
            while not loop.stop:
                with lock:
                    indices = [next(turns) % image_count for _ in range(batch)]
                begin = time.perf_counter()
                answer = ask(indices)
                loop.requests.append((begin, time.perf_counter(), batch))
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
    return summarise(loop.requests, opened, closed, agreement)


def summarise(requests: list[tuple[float, float, int]], opened: float, closed: float, agreement: float) -> Measured:
    """The window's figures from every request's begin, end (seconds of one clock) and number of images."""
    images = sum(
        count * max(0.0, min(end, closed) - max(begin, opened)) / (end - begin) for begin, end, count in requests
    )
    latencies_ms = [1000 * (end - begin) for begin, end, _ in requests if opened <= end <= closed]
    p50, p95, p99 = (percentile(latencies_ms, percent) for percent in (50, 95, 99))
    return Measured(images / (closed - opened), len(latencies_ms), p50, p95, p99, agreement)
