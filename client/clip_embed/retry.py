"""How long a request waits before it is sent again."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Exponential backoff with full jitter: a random wait from 0 to first_wait_s, then to twice that, up to max_wait_s.

    So the clients of a returning server do not all retry at once:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    The client's `timeout_s` limits the total time. (tenacity and stamina repeat one call and block on it. Here many
    requests are in flight, and the servers' health decides which of them may be sent.)

    Args:
        first_wait_s: the longest wait after the first failure. Not measured.
        factor: by which it grows after each further failure.
        max_wait_s: the longest wait of all. Not measured.
        random: returns a number from 0 to 1.
    """

    first_wait_s: float = 0.1
    factor: float = 2.0
    max_wait_s: float = 5.0
    random: Callable[[], float] = field(default=random.random, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.first_wait_s <= self.max_wait_s or self.factor < 1:
            raise ValueError(
                "expected 0 <= first_wait_s <= max_wait_s and factor >= 1, "
                f"got {self.first_wait_s}, {self.max_wait_s} and {self.factor}"
            )

    def wait_s(self, failures: int) -> float:
        """The wait after this many failures in a row, 1 or more."""
        longest_s = self.first_wait_s
        for _ in range(failures - 1):
            if longest_s >= self.max_wait_s:
                break
            longest_s *= self.factor
        return self.random() * min(longest_s, self.max_wait_s)
