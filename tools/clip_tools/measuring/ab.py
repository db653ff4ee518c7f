"""`clip-tools ab`: two running servers side by side: the same photographs to both, in turns, and their own times."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from clip_tools.errors import ToolError, missing_extra
from clip_tools.measuring import steps
from clip_tools.measuring.load import Measured, run_closed_loop
from clip_tools.measuring.noise import paired_ratio
from clip_tools.measuring.sections import markdown_table
from clip_tools.measuring.workload import VGA, load_images

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clip_embed import EmbeddingClient

SIDES = ("A", "B")


@dataclass(frozen=True)
class AbOptions:
    """How hard to ask. By default a minute: three rounds of two windows of 8 s, with a warm-up before each."""

    images: str = VGA
    batch: int = 1
    concurrency: int = 8
    rounds: int = 3
    seconds: float = 8.0
    warmup_s: float = 1.0


@dataclass(frozen=True)
class Round:
    """One window of one server. `steps` is empty where the server's statistics are closed to us."""

    side: str
    measured: Measured
    steps: Sequence[steps.Step]


def ab(
    urls: Sequence[str], options: AbOptions, *, tell: Callable[[str, int, int], None] = lambda *_: None
) -> tuple[list[Round], float]:
    """Every window, A and B in turn, and the worst cosine between the two servers' vectors of a photograph.

    Raises ToolError for a URL that names no gRPC server, for one that does not answer, and for a failed request.
    """
    from clip_embed import EmbeddingClient, EmbeddingError
    from clip_tools.measuring.services import RemoteTriton

    images = load_images(options.images)
    rounds: list[Round] = []
    with ExitStack() as stack:
        clients: list[EmbeddingClient] = []
        references: list[Any] = []
        for url in urls:
            given = RemoteTriton(url).client_options
            client = stack.enter_context(EmbeddingClient(url, retry=None, timeout_s=60, **given))
            try:
                references.append(client.embed(images))
            except EmbeddingError as error:
                raise ToolError(str(error)) from error
            clients.append(client)
        for number in range(options.rounds):
            for at in (0, 1) if number % 2 == 0 else (1, 0):
                tell(f"round {number + 1}: {urls[at]}", len(rounds), 2 * options.rounds)
                before = _statistics(urls[at])
                measured = run_closed_loop(
                    partial(_ask, clients[at], images),
                    partial(_check, references[at]),
                    len(images),
                    batch=options.batch,
                    concurrency=options.concurrency,
                    seconds=options.seconds,
                    warmup_s=options.warmup_s,
                )
                done = steps.between(before, _statistics(urls[at])) if before else []
                rounds.append(Round(SIDES[at], measured, done))
    return rounds, _agreement(*references)


def _ask(client: "EmbeddingClient", images: Sequence[bytes], indices: list[int]) -> "npt.NDArray[np.generic]":
    return client.embed([images[index] for index in indices])


def _check(reference: Any, indices: list[int], answer: Any) -> float:
    return _agreement(reference[indices], answer)


def _agreement(one: Any, other: Any) -> float:
    """The worst cosine of two arrays of unit vectors, row by row."""
    return float((one * other).sum(axis=1).min())


def _statistics(url: str) -> dict[str, dict[str, int]]:
    try:
        from tritonclient.utils import InferenceServerException
    except ImportError as error:
        raise missing_extra("profile", error) from error
    try:
        return steps.statistics(url)
    except InferenceServerException:  # closed to us: SECURITY.md
        return {}


def text(urls: Sequence[str], rounds: Sequence[Round], agreement: float) -> str:
    """Both servers as Markdown: what the client sees, what the servers say, and how alike their vectors are."""
    sides = {side: [one for one in rounds if one.side == side] for side in SIDES}
    keys = ("throughput", "p50_ms", "p95_ms", "p99_ms")
    rows, server = [], []
    for (side, found), url in zip(sides.items(), urls, strict=True):
        rows.append(
            (side, url, *(f"{statistics.median(getattr(one.measured, key) for one in found):.1f}" for key in keys))
        )
        every = [asdict(step) for one in found for step in one.steps]
        for model in sorted({step["model"] for step in every}):
            phases = ("batch", "queue_ms", "compute_input_ms", "compute_infer_ms", "compute_output_ms")
            of_it: list[dict[str, Any]] = [step for step in every if step["model"] == model]
            server.append((side, model, *(f"{statistics.median(step[key] for step in of_it):.2f}" for key in phases)))
        if not every:
            server.append((side, "its statistics are closed to us", *[""] * 5))
    ratio = paired_ratio(*([one.measured.throughput for one in sides[side]] for side in reversed(SIDES)))
    return "\n".join(
        (
            markdown_table(("", "server", "images/s", "p50 ms", "p95 ms", "p99 ms"), rows),
            f"B against A: {ratio} times the images a second. Worst cosine between their vectors: {agreement:.5f}.\n",
            markdown_table(("", "step", "batch", "queue ms", "input ms", "infer ms", "output ms"), server),
        )
    )
