"""`clip-tools ab`: sends the same photographs to two running servers in turns and compares them."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from clip_embed import EmbeddingClient, EmbeddingError
from clip_tools.errors import ToolError
from clip_tools.measuring.load import measure
from clip_tools.measuring.noise import paired_ratio
from clip_tools.measuring.options import VGA
from clip_tools.measuring.services import remote_triton
from clip_tools.measuring.steps import STEP_HEAD, step_texts
from clip_tools.measuring.tables import table
from clip_tools.measuring.timing import in_turn
from clip_tools.measuring.workload import load_images
from clip_tools.progress import Tell, silent

SIDES = "AB"


def ab(
    urls: Sequence[str],
    images: str = VGA,
    *,
    batch: int = 1,
    concurrency: int = 8,
    rounds: int = 3,
    seconds: float = 8.0,
    tell: Tell = silent,
) -> tuple[list[dict[str, Any]], float]:
    """Every window, A and B in turn, and the worst cosine between the two servers' vectors of a photograph.

    By default a minute: three rounds of two windows of 8 s, with a warm-up before each. Raises ToolError for a URL that
    names no gRPC server, for one that does not answer, and for a failed request.
    """
    photographs = load_images(images)
    windows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        clients, references = [], []
        for url in urls:
            given = remote_triton(url).client_options
            clients.append(stack.enter_context(EmbeddingClient(url, retry=None, timeout_s=60, **given)))
            try:
                references.append(clients[-1].embed(photographs))
            except EmbeddingError as error:
                raise ToolError(str(error)) from error
        for number in range(rounds):
            for at in in_turn((0, 1), number):
                tell(f"round {number + 1}: {urls[at]}", len(windows), 2 * rounds)
                window = measure(
                    partial(_ask, clients[at], photographs),
                    partial(_check, references[at]),
                    len(photographs),
                    batch=batch,
                    concurrency=concurrency,
                    seconds=seconds,
                    warmup_s=1.0,
                    triton_url=urls[at],
                )
                windows.append({"side": SIDES[at], **window})
    return windows, _agreement(*references)


def _ask(client: Any, images: Sequence[bytes], indices: list[int]) -> Any:
    return client.embed([images[index] for index in indices])


def _check(reference: Any, indices: list[int], answer: Any) -> float:
    return _agreement(reference[indices], answer)


def _agreement(one: Any, other: Any) -> float:
    """The worst cosine of two arrays of unit vectors, row by row."""
    return float((one * other).sum(axis=1).min())


def text(urls: Sequence[str], windows: Sequence[dict[str, Any]], agreement: float) -> str:
    """Both servers as Markdown: what the client sees, what the servers say, and how alike their vectors are."""
    rows, steps, rates = [], [], []
    for side, url in zip(SIDES, urls, strict=True):
        found = [one for one in windows if one["side"] == side]
        rates.append([one["throughput"] for one in found])
        keys = ("throughput", "p50_ms", "p95_ms", "p99_ms")
        medians = (statistics.median(one[key] for one in found) for key in keys)
        rows.append(" | ".join([side, url, *(f"{median:.1f}" for median in medians)]))
        said = step_texts(step for one in found for step in one.get("steps", []))
        steps += [f"{side} | {step}" for step in said or ["its statistics are closed to us |  |  |  |  | "]]
    ratio = paired_ratio(rates[1], rates[0])
    return "\n".join(
        (
            table(" | server | images/s | p50 ms | p95 ms | p99 ms", rows),
            f"B against A: {ratio} times the images a second. Worst cosine between their vectors: {agreement:.5f}.\n",
            table(f" | {STEP_HEAD}", steps),
        )
    )
