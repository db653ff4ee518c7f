"""`clip-tools serve` when the process of a Python model is killed or stands still: not ready, and soon ready again."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from tests.conftest import options_for

from clip_embed import EmbeddingClient, EmbeddingError, ServerUnavailableError
from clip_tools.serving.watchdog import stubs

CLIP_TOOLS = str(Path(sys.executable).with_name("clip-tools"))
READY_PATHS = ("/v2/health/ready", "/v2/models/clip_ensemble/ready")  # what a Kubernetes probe would ask
# One image alone and within a batch run through other kernels, so the last bits of FP32 differ.
SAME_IMAGE_MAX_ABS = 1e-5
GENEROUS_S = 120


@contextlib.contextmanager
def serving(models, folder):
    """A running `clip-tools serve`, its options (the log among them) and a function that gives tritonserver's pid."""
    options = options_for(models, folder / "log")
    ports = [f"--{name}-port={getattr(options, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
    with (
        options.log.open("w") as log,
        subprocess.Popen([CLIP_TOOLS, "serve", f"--models={models}", *ports], stderr=log) as process,
    ):
        try:
            wait_until(lambda: "ready after" in options.log.read_text() or process.poll() is not None)
            assert process.poll() is None, options.log.read_text()
            yield options, lambda: psutil.Process(process.pid).children()[0].pid
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture(scope="module")
def served(repository, tmp_path_factory):
    """One for all that breaks it and waits until it is well again."""
    with serving(repository, tmp_path_factory.mktemp("readiness")) as running:
        yield running


def wait_until(condition) -> float:
    """How long it took, s."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < GENEROUS_S
        time.sleep(0.02)
    return time.monotonic() - began


def is_ready(options) -> bool:
    try:
        return all(httpx.get(options.http_url + path, timeout=5).status_code == 200 for path in READY_PATHS)
    except httpx.TransportError:
        return False


class Traffic:
    """Clients that embed one image after the other, each answer checked, until they are told to stop."""

    def __init__(self, url, images, clients=4):
        self._images, self._over = images, threading.Event()
        self.sent: list[int] = []  # lists, for threads lose no append; each image by its index
        self.lost: list[EmbeddingError] = []
        self.wrong: list[int] = []
        self._client = EmbeddingClient(url, timeout_s=GENEROUS_S)
        self._expected = self._client.embed(images)
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def _run(self, number):
        while not self._over.is_set():
            index = (len(self.sent) + number) % len(self._images)
            self.sent.append(index)
            try:
                got = self._client.embed([self._images[index]])
            except EmbeddingError as error:
                self.lost.append(error)
            else:
                if np.abs(got - self._expected[index]).max() > SAME_IMAGE_MAX_ABS:
                    self.wrong.append(index)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._client.close()


@pytest.mark.promise
@pytest.mark.parametrize(
    ("fault", "number", "instance", "words"),
    [
        ("stub_killed", signal.SIGKILL, "preprocess", "has ended"),
        ("stub_wedged", signal.SIGSTOP, "clip_onnx_0", "is stopped"),
    ],
)
def test_a_lost_model_turns_readiness_off_and_a_new_server_comes(
    served, demo_photos, record_reliability, fault, number, instance, words
):
    """Under traffic, of which nothing is lost."""
    options, server_pid = served
    assert is_ready(options)
    lost = next(pid for pid in stubs(server_pid()) if instance in Path(f"/proc/{pid}/cmdline").read_text())
    with Traffic(options.grpc_url, [photo.read_bytes() for photo in demo_photos]) as traffic:
        wait_until(lambda: len(traffic.sent) > 8)
        os.kill(lost, number)
        not_ready_s = wait_until(lambda: not is_ready(options))
        ready_s = not_ready_s + wait_until(lambda: is_ready(options))
        before = len(traffic.sent)
        wait_until(lambda: len(traffic.sent) > before + 8)
    assert (traffic.lost, traffic.wrong) == ([], [])
    assert f"(process {lost}) {words}; a new server takes its place in " in options.log.read_text()
    assert not Path(f"/proc/{lost}").exists()
    record_reliability(
        fault,
        faults=1,
        requests=len(traffic.sent),
        lost=len(traffic.lost),
        not_ready_after_s=round(not_ready_s, 1),
        ready_again_after_s=round(ready_s, 1),
    )


@pytest.mark.long
def test_a_server_that_stands_still_is_replaced(served, demo_photos):
    """What no process table shows, the test image does."""
    options, server_pid = served
    frozen = server_pid()
    with EmbeddingClient(options.grpc_url, timeout_s=2 * GENEROUS_S, attempt_timeout_s=10) as client:
        expected = client.embed(demo_photos[:1])
        os.kill(frozen, signal.SIGSTOP)
        assert not is_ready(options)
        assert np.array_equal(client.embed(demo_photos[:1]), expected)
    assert "a test image is not embedded: " in options.log.read_text()
    assert not Path(f"/proc/{frozen}").exists()


@pytest.mark.long
def test_a_decoder_that_hangs_ends_its_process_and_a_new_server_comes(repository, tmp_path):
    """One that takes a second in place of a minute to be called hung, and an image that takes longer."""
    models = tmp_path / "models"
    shutil.copytree(repository, models, symlinks=True)
    adapter = models / "preprocess" / "1" / "model.py"
    text = adapter.read_text()
    adapter.write_text(text.replace("_LONGEST_DECODE_S = 60", "_LONGEST_DECODE_S = 0.2"))
    assert adapter.read_text() != text
    slow, quick = io.BytesIO(), io.BytesIO()
    for file, side in ((slow, 9_000), (quick, 32)):
        Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "JPEG")
    with serving(models, tmp_path) as (options, _), EmbeddingClient(options.grpc_url, timeout_s=GENEROUS_S) as client:
        with EmbeddingClient(options.grpc_url, retry=None) as impatient, pytest.raises(ServerUnavailableError):
            impatient.embed([slow.getvalue()])
        wait_until(lambda: "a new server takes its place" in options.log.read_text())
        assert client.embed([quick.getvalue()]).shape == (1, 512)
        log = options.log.read_text()
    assert "Timeout (0:00:00.2" in log
    assert "clip_preprocess.py" in log
