"""`clip-tools soak`: sends good and bad traffic for a given time, and reports what grew or was lost."""

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clip_embed import EmbeddingClient
from clip_embed.errors import EmbeddingError
from clip_tools.errors import ToolError
from clip_tools.measuring import watch
from clip_tools.measuring.noise import percentile
from clip_tools.measuring.options import SoakOptions
from clip_tools.measuring.results import begin
from clip_tools.measuring.services import served
from clip_tools.measuring.soak_traffic import BAD_REQUESTS, Ended, Photographs, Traffic
from clip_tools.measuring.variants import Variant
from clip_tools.measuring.workload import load_images
from clip_tools.progress import Tell, silent

_WARM_UP = 2  # full batches before the clock starts: what holds the largest is filled
SAMPLES = 360  # of the whole soak, so that the slopes between all of them are quickly had
_FEWEST = 6
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Bound:
    """How much more of a quantity there may be after the second half than before it: the larger of the two.

    `of_level` is a fraction of what there was in the half's first third. Fewer samples than `needs` are not judged.
    """

    title: str
    of_level: float
    absolute: float
    reason: str
    needs: int = 3


BOUNDS = {
    "private_mib": Bound(
        "memory, MiB", 0.0, 32, "15 was seen while allocators fill, in minutes; in half an hour it is 1 KB an image"
    ),
    "open_files": Bound("open files", 0.0, 8, "connections come and go with the clients"),
    "threads": Bound("threads", 0.0, 4, "gRPC's pollers come and go"),
    "regions": Bound("regions of shared memory", 0.0, 0, "made when a model is loaded, and never later"),
    "shared_mib": Bound("shared memory, MiB", 0.02, 1, "a region grows to its largest batch, once"),
    # Within seconds a few full batches move it more than anything that lasts.
    "p50_ms": Bound(
        "latency, p50 ms", 0.5, 20, "other work on the machine comes and goes; what piles up doubles it", 20
    ),
}
"""What may not grow: columns of a sample, and why the bound is where it is."""


def soak(options: SoakOptions, *, tell: Tell = silent) -> dict[str, Any]:
    """Run the soak. `problems` of the result is empty if nothing grew or was lost."""
    result, seconds = begin("soak"), int(60 * options.minutes)
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(served(options.url, Variant(options.config_name), options.models))
        url, pid = service.url, service.pid or watch.listener(int(service.url.rpartition(":")[2]))
        client = stack.enter_context(EmbeddingClient(url, timeout_s=120, batch_size=64))
        images = load_images(options.images)
        photographs = Photographs(images, np.concatenate([client.embed([image]) for image in images]))
        for _ in range(_WARM_UP):
            client.embed([images[0]] * 64)
        began_with = _processes(pid)
        traffic = Traffic(url, photographs, clients=options.clients, bad_share=options.bad_share, seed=options.seed)
        every_s = max(1.0, seconds / SAMPLES)

        def take(at_s: float) -> watch.Sample:
            tell(f"soak: {url}", int(at_s), seconds)
            return watch.sample(pid, at_s)

        with watch.Sampler(take, every_s=every_s) as watched:
            traffic.start()
            ends_s = time.monotonic() + seconds
            while time.monotonic() < ends_s and watched.failure is None:
                time.sleep(0.1)
            hanging = traffic.stop()
        problems = [f"{hanging} of {options.clients} clients hang"] if hanging else []
        problems += [str(watched.failure)] if watched.failure else []
        try:
            if _processes(pid) != began_with:
                problems.append("a process of the server ended or was started anew")
            if not client.is_ready():
                problems.append("the server is not ready at the end")
            client.embed(images[:1])
        except (EmbeddingError, ToolError) as error:
            problems.append(f"at the end: {type(error).__name__}: {error}")
    points = _points(watched.samples, traffic.ended, every_s)
    if watched.failure and len(points) < _FEWEST:
        raise watched.failure  # too early for a result
    rises = judge(points)
    result["options"] = {**asdict(options), "models": None, "url": "given" if options.url else None}
    result["problems"] = problems + [rise["problem"] for rise in rises if rise["problem"]] + _lost(traffic.ended)
    result["calls"] = [_summary(kind, traffic.ended) for kind in sorted({one.kind for one in traffic.ended})]
    return result | {"rises": rises, "points": points}


def _processes(pid: int) -> set[int]:
    return set(watch.of_each(pid, lambda process: int(process.pid)))


def _points(samples: Sequence[watch.Sample], ended: Sequence[Ended], every_s: float) -> list[dict[str, float]]:
    """Each sample with the latencies of the photographs, one to four a request, that ended since the last one."""
    points = []
    few = [one for one in ended if one.kind == "few"]
    for sample in samples:
        since = [one.latency_ms for one in few if sample.at_s - every_s < one.at_s <= sample.at_s]
        latency = {f"p{percent}_ms": round(percentile(since, percent), 1) for percent in (50, 99) if since}
        points.append(asdict(sample) | latency)
    return points


def judge(points: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """For each quantity of BOUNDS its rise over the second half, by a slope that a few odd samples do not move.

    The first half is for filling what is filled once: pools, caches, regions for the largest batch.
    """
    if len(points) < _FEWEST:
        raise ToolError(f"only {len(points)} samples, expected {_FEWEST} or more: soak for longer")
    half = points[len(points) // 2 :]
    rises: list[dict[str, Any]] = []
    for name, bound in BOUNDS.items():
        x = [point["at_s"] for point in half if name in point]
        y = [point[name] for point in half if name in point]
        if len(y) < bound.needs:
            rises.append({"name": name, "title": bound.title, "rise": None, "problem": ""})
            continue
        rise = watch.theil_sen(x, y) * (x[-1] - x[0])
        most = max(bound.of_level * statistics.median(y[: len(y) // 3]), bound.absolute)
        problem = f"{bound.title}: {rise:+.1f} in the second half, over {most:.1f} ({bound.reason})"
        found = {"name": name, "title": bound.title, "at_half": y[0], "at_end": y[-1], "rise": round(rise, 2)}
        rises.append(found | {"bound": round(most, 2), "problem": problem if rise > most else ""})
    return rises


def _lost(ended: Sequence[Ended]) -> list[str]:
    """The problems of calls, each kind once with its count."""
    found = Counter((one.kind, one.problem) for one in ended if one.problem)
    shown = [f"{kind}, {count} times: {problem}" for (kind, problem), count in found.most_common(_SHOWN_PROBLEMS)]
    return shown + ([f"and {len(found) - _SHOWN_PROBLEMS} other problems"] if len(found) > _SHOWN_PROBLEMS else [])


def _summary(kind: str, ended: Sequence[Ended]) -> dict[str, Any]:
    mine = [one for one in ended if one.kind == kind]
    latencies = [one.latency_ms for one in mine]
    return {
        "kind": kind,
        "is_bad": kind in BAD_REQUESTS,
        "calls": len(mine),
        "images": sum(one.images for one in mine),
        "lost": sum(one.lost for one in mine),
        "p50_ms": round(percentile(latencies, 50), 1),
        "p99_ms": round(percentile(latencies, 99), 1),
    }


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """What docs/reliability.md shows of a soak."""
    rises = {rise["name"]: rise for rise in result["rises"]}
    return {
        "minutes": result["options"]["minutes"],
        "requests": sum(row["calls"] for row in result["calls"]),
        "bad_requests": sum(row["calls"] for row in result["calls"] if row["is_bad"]),
        "lost": sum(row["lost"] for row in result["calls"]),
        "memory_before_mb": result["points"][0]["private_mib"],
        "memory_half_time_mb": rises["private_mib"]["at_half"],
        "memory_after_mb": rises["private_mib"]["at_end"],
        "open_files_risen": rises["open_files"]["rise"],
        "threads_risen": rises["threads"]["rise"],
        "shm_regions_risen": rises["regions"]["rise"],
        "p99_ms": next(row["p99_ms"] for row in result["calls"] if row["kind"] == "few"),
    }
