"""The two steps without a server, timed."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_tools.in_process import engine_settings, open_engine, open_preprocess
from clip_tools.measuring.timing import times_of


class Worker:
    """Both steps, open between rounds so that no round measures a start."""

    def __init__(self, models: Path, images: Sequence[bytes]) -> None:
        self._preprocess, self._images = open_preprocess(models), images
        self._on_gpu = engine_settings(models)[1].on_gpu
        self._session = open_engine(models)

    def _run(self, pixels: Any) -> None:
        self._session.run(["embedding"], {"pixels": pixels})

    def steps(self, seconds: float) -> dict[str, Any]:
        """Each step alone: `preprocess_s` of one thread for an image, and the engine's `engine_s` by batch size."""
        pixels = [self._preprocess(image) for image in self._images]
        batches = (1, 4, 8, 16, 64) if self._on_gpu else (1, 4, 8, 16)  # a GPU's best is the largest
        engine_s = {}
        for batch in batches:
            feed = np.stack([pixels[i % len(pixels)] for i in range(batch)])
            engine_s[batch] = statistics.mean(times_of(self._run, [feed] * 3, seconds / len(batches))) / batch
        preprocess_s = statistics.mean(times_of(self._preprocess, self._images, seconds))
        cores = len(os.sched_getaffinity(0))
        return {"cores": cores, "on_gpu": self._on_gpu, "preprocess_s": preprocess_s, "engine_s": engine_s}

    def single(self, seconds: float) -> dict[str, Any]:
        """`single_ms`: the time of each image through both steps, one after the other."""
        times = times_of(lambda image: self._run(self._preprocess(image)[None]), self._images, seconds)
        return {"single_ms": [round(1000 * time_s, 3) for time_s in times]}
