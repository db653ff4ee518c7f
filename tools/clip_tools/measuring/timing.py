"""Times calls, and runs them in other processes."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")


def times_of(
    call: Callable[[T], object], inputs: Sequence[T], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The seconds of each call, over whole passes through the inputs, for `seconds` or more, after one warm-up call."""
    call(inputs[0])
    times: list[float] = []
    total_s = 0.0
    while not times or total_s < seconds or len(times) % len(inputs):
        begin = clock()
        call(inputs[len(times) % len(inputs)])
        times.append(clock() - begin)
        total_s += times[-1]
    return times


def in_turn(items: Sequence[T], number: int) -> list[T]:
    """The items in the order of round `number`: each comes first in one of the rounds."""
    turn = number % len(items)
    return [*items[turn:], *items[:turn]]


def timed(call: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """(The result of the call, its seconds)."""
    begin_s = time.perf_counter()
    made = call(*arguments)
    return made, time.perf_counter() - begin_s


def alone(call: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a new process, so that its threads and memory end with it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


class OwnProcess(ProcessPoolExecutor):
    """Holds `make(*arguments)` in a new process, which ends with the context manager."""

    _held: Any = None  # in that process

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(1, get_context("spawn"))
        self.submit(_make, make, arguments).result()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of one of the object's methods."""
        return self.submit(_ask, method, arguments).result()


def _make(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    OwnProcess._held = make(*arguments)


def _ask(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(OwnProcess._held, method)(*arguments)
