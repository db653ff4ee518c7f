"""Runs the server's steps in this process, for `clip-tools embed-dataset --local`."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clip_embed.errors import ImageFailure, InvalidImageError
from clip_embed.server_info import ServerInfo
from clip_embed.wire import OUTPUT, Embeddings, ImageBytes
from clip_tools.in_process import import_preprocess, open_engine
from clip_tools.repository import check_files, deployment, parameters_of
from clip_tools.serving.provenance import set_provenance
from clip_tools.serving.towers import Towers


class LocalTransport:
    """A `clip_embed.transport.Transport` that runs one request after the other."""

    def __init__(self, models: Path) -> None:
        """Raises ToolError for a missing or unusable file of the repository."""
        deployed, towers = deployment(models), Towers.of(models)
        check_files(deployed)
        for model in deployed:
            towers.apply_to(model.config)
        set_provenance(deployed)
        self._server_info = ServerInfo.of(parameters_of(deployed[-1].config))
        config = next(model.config for model in deployed if model.name == "preprocess")
        preprocess = import_preprocess(models)
        preprocess.missing_opener()  # registers HEIC with Pillow
        self._refused: type[Any] = preprocess.RefusedImage
        self._pixels_of = preprocess.open_pixels({**parameters_of(config), "side_px": str(config.output[0].dims[0])})
        self._session = open_engine(models)
        self._worker = ThreadPoolExecutor(1)

    def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Future[Embeddings]:
        return self._worker.submit(self._embed, images)

    def is_ready(self, timeout_s: float | None) -> Future[bool]:
        return self._worker.submit(lambda: True)

    def server_info(self, timeout_s: float | None) -> Future[ServerInfo]:
        return self._worker.submit(lambda: self._server_info)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _embed(self, images: Sequence[ImageBytes]) -> Embeddings:
        pixels, failures = [], []
        for index, image in enumerate(images):
            try:
                pixels.append(self._pixels_of(bytes(image)))
            except self._refused as error:
                failures.append(ImageFailure(index, error.code, error.reason))
        if failures:
            raise InvalidImageError(failures)
        embeddings: Embeddings = self._session.run([OUTPUT], {"pixels": np.stack(pixels)})[0]
        return embeddings
