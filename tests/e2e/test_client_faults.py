"""The real server is replaced while clients run: no image is lost or embedded twice."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import options_for

from clip_embed import EmbeddingClient
from clip_embed.table import parts_folder
from clip_tools.serving.server import EmbeddedServer

# Kernels depend on the batch size, so the last bits of FP32 differ.
SAME_IMAGE_MAX_ABS = 1e-5
CLIP_EMBED = str(Path(sys.executable).with_name("clip-embed"))


@pytest.mark.promise
def test_a_server_is_replaced_under_running_clients(light_repository, demo_photos, tmp_path, record_reliability):
    """SIGTERM, then a new server on the same port, during an embed_many and a clip-embed --resume."""
    options = options_for(light_repository, tmp_path / "log")
    old, new = EmbeddedServer(options), EmbeddedServer(options)
    images = [demo_photos[index % len(demo_photos)] for index in range(60)]
    paths = []
    for index, image in enumerate(images):
        paths.append(tmp_path / f"{index:02d}{image.suffix}")
        paths[-1].symlink_to(image)
    output = tmp_path / "vectors.jsonl"
    command = [CLIP_EMBED, "-", "--url", options.grpc_url, "--out", str(output), "--resume", "--batch-size=2"]
    stopped = threading.Event()

    def replace():
        old.stop()  # it finishes the requests in flight
        stopped.set()
        new.start()
        new.wait_until_ready()

    with (
        ThreadPoolExecutor(1) as pool,
        old,
        EmbeddingClient(options.grpc_url, batch_size=2, timeout_s=300) as client,
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            expected = client.embed(demo_photos)[[index % len(demo_photos) for index in range(60)]]
            process.stdin.writelines(f"{path}\n" for path in paths[:30])
            process.stdin.flush()
            deadline = time.monotonic() + 120
            # clip-embed creates the folder after it has reached the server.
            while not parts_folder(output).exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            replaced = []

            def some_before_and_some_after():
                yield from images[:30]
                replaced.append(pool.submit(replace))
                assert stopped.wait(120)
                process.stdin.writelines(f"{path}\n" for path in paths[30:])
                process.stdin.close()
                yield from images[30:]

            results = list(client.embed_many(some_before_and_some_after()))
            replaced[0].result(240)
            said = process.stderr.read()
            assert process.wait(240) == 0, said
        finally:
            process.kill()
            new.stop()
    assert [type(result) for result in results] == [np.ndarray] * 60
    assert np.abs(np.array(results) - expected).max() < SAME_IMAGE_MAX_ABS
    assert f"{options.grpc_url} gets no requests until it is ready again" in said
    assert said.splitlines()[-1] == f"{options.grpc_url} is ready again"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["path"] for line in lines] == list(map(str, paths))
    assert np.abs(np.array([line["embedding"] for line in lines]) - expected).max() < SAME_IMAGE_MAX_ABS
    record_reliability("faults_upgrade", faults=1, requests=60, lost=0, twice=0)
