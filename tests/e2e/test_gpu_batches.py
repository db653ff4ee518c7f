"""The configuration `gpu` on the real server, with the CPU in the GPU's place: batches, lent pixels, refusals."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests import host_gpu
from tests.conftest import options_for

from clip_embed import EmbeddingClient, InvalidImageError
from clip_tools.gpu import find_gpu
from clip_tools.serving.server import EmbeddedServer

IN_ITS_PLACE = """
from host_gpu import HostGpu

CudaGpu = lambda _: HostGpu(SOURCE.with_name("on_cpu.so"))
"""


@pytest.fixture(scope="module")
def by_batches(light_repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    shutil.copytree(light_repository, folder / "models", symlinks=True)
    version = folder / "models" / "preprocess" / "1"
    host_gpu.build(version)
    shutil.copy(host_gpu.__file__, version)
    with (version / "clip_gpu.py").open("a") as file:
        file.write(IN_ITS_PLACE)
    with EmbeddedServer(options_for(folder / "models", folder / "log", config_name="gpu")) as server:
        yield server


def test_photographs_in_batches_get_their_own_vectors_and_a_bad_one_a_refusal(server, by_batches, demo_photos):
    photos = [path.read_bytes() for path in demo_photos]
    with EmbeddingClient(server.options.grpc_url) as client:
        expected = client.embed(photos)
    with EmbeddingClient(by_batches.options.grpc_url) as client, ThreadPoolExecutor(16) as pool:

        def embed(index):
            images = [photos[index % len(photos)], photos[(index + 1) % len(photos)]]
            if index % 8 == 5:
                images[1] = images[1][: len(images[1]) // 2]
            try:
                return client.embed(images)
            except InvalidImageError as error:
                return [(failure.index, failure.code) for failure in error.failures]

        for index, answer in enumerate(pool.map(embed, range(64))):
            if index % 8 == 5:
                assert answer == [(1, "truncated")]
            else:
                rows = [index % len(photos), (index + 1) % len(photos)]
                assert np.abs(answer - expected[rows]).max() < 2e-4  # in other batches: see test_embeddings.py


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu_the_load_says_what_to_do(light_repository, tmp_path):
    options = options_for(light_repository, tmp_path / "log", config_name="gpu")
    with pytest.raises(Exception, match=r"mode gpu needs .*use mode exact or fast"), EmbeddedServer(options):
        pass
