"""`clip-tools serve` replaces a server that lost a model's process, hangs or died."""

import asyncio
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from tests.conftest import options_for
from tests.storm import KINDS, LEAVING, THREADS

from clip_embed import AsyncEmbeddingClient, EmbeddingClient, EmbeddingError, ServerUnavailableError
from clip_tools.measuring.watch import Sample, sample
from clip_tools.serving.model_control import GrpcModelControl
from clip_tools.serving.probe import probe_image
from clip_tools.serving.swap import swap
from clip_tools.serving.swap_steps import SwapOptions
from clip_tools.serving.watchdog import stubs

CLIP_TOOLS = str(Path(sys.executable).with_name("clip-tools"))
READY_PATHS = ("/v2/health/ready", "/v2/models/clip_ensemble/ready")  # what a Kubernetes probe would ask
# Kernels depend on the batch size, so the last bits of FP32 differ.
SAME_IMAGE_MAX_ABS = 1e-5
ROUNDS = 7  # of storms, each with one of every kind
GENEROUS_S = 300


@contextlib.contextmanager
def serving(models, folder, program=(CLIP_TOOLS,)):
    """Starts `clip-tools serve`: its options, and a function that returns tritonserver's pid."""
    options = options_for(models, folder / "log")
    ports = [f"--{name}-port={getattr(options, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
    with (
        options.log.open("w") as log,
        subprocess.Popen([*program, "serve", f"--models={models}", *ports], stderr=log) as process,
    ):

        def server_pid() -> int:
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                    if child.name() == "tritonserver":
                        return child.pid
            return 0

        try:
            wait_until(lambda: "ready after" in options.log.read_text() or process.poll() is not None)
            assert process.poll() is None, options.log.read_text()
            yield options, server_pid
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture(scope="module")
def served(light_repository, tmp_path_factory):
    """One server for the tests that break it and wait until it is ready again."""
    with serving(light_repository, tmp_path_factory.mktemp("readiness")) as running:
        yield running


def wait_until(condition) -> float:
    """Poll until the condition holds; the seconds it took."""
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


def has_said_so(options) -> bool:
    """Whether the log says that the newest server is ready, after its vectors were verified against open_clip."""
    log = options.log.read_text()
    return log.rfind("ready after") > log.rfind("a new server starts")


class Traffic:
    """Clients that embed one image after the other and check each answer, until the block ends."""

    def __init__(self, url, images, clients=4):
        self._images, self._over = images, threading.Event()
        self.sent: list[int] = []  # indices of images; threads may append to a list
        self.lost: list[EmbeddingError] = []
        self.wrong: list[int] = []
        self._client = EmbeddingClient(url, timeout_s=GENEROUS_S)
        self.expected = self._client.embed(images)
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
                if np.abs(got - self.expected[index]).max() > SAME_IMAGE_MAX_ABS:
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
    """No request of the traffic meanwhile is lost."""
    options, server_pid = served
    wait_until(lambda: has_said_so(options))
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
    assert f"(process {lost}) {words}; a new server starts in " in options.log.read_text()
    wait_until(lambda: not Path(f"/proc/{lost}").exists())
    record_reliability(
        fault,
        faults=1,
        requests=len(traffic.sent),
        lost=len(traffic.lost),
        not_ready_after_s=round(not_ready_s, 1),
        ready_again_after_s=round(ready_s, 1),
    )


@pytest.mark.long
def test_a_server_that_hangs_is_replaced(served, demo_photos):
    """The process table does not show it, but the test image gets no answer."""
    options, server_pid = served
    frozen = server_pid()
    with EmbeddingClient(options.grpc_url, timeout_s=2 * GENEROUS_S, attempt_timeout_s=10) as client:
        expected = client.embed(demo_photos[:1])
        os.kill(frozen, signal.SIGSTOP)
        assert not is_ready(options)
        assert np.array_equal(client.embed(demo_photos[:1]), expected)
    assert "a test image was not embedded: " in options.log.read_text()
    assert not Path(f"/proc/{frozen}").exists()


@pytest.mark.long
def test_a_decoder_that_hangs_ends_its_process_and_a_new_server_comes(repository, tmp_path):
    """The limit is a second here instead of a minute, and an image takes longer."""
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
        wait_until(lambda: "a new server starts" in options.log.read_text())
        assert client.embed([quick.getvalue()]).shape == (1, 512)
        log = options.log.read_text()
    assert "Timeout (0:00:00.2" in log
    assert "clip_preprocess.py" in log


class Deaths:
    """Measures how soon after each death of a server the next process started, and how soon it answered."""

    def __init__(self, options, server_pid):
        self._options, self._server_pid, self._over = options, server_pid, threading.Event()
        self.started_s: list[float] = []
        self.answered_s: list[float] = []
        self.dishonest = 0  # readiness answers without a process
        self._thread = threading.Thread(target=self._watch)

    def _watch(self):
        known = self._server_pid()
        while not self._over.wait(0.02):
            if known and lives(known):
                continue
            died = time.monotonic()
            self.dishonest += is_ready(self._options) and not self._server_pid()
            wait_until(lambda: self._server_pid() not in (0, known))  # noqa: B023
            known = self._server_pid()
            self.started_s.append(time.monotonic() - died)
            wait_until(lambda: answers(self._options.grpc_url))
            self.answered_s.append(time.monotonic() - died)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def answers(url) -> bool:
    """Whether the server embeds now, without retries, whose waits would be measured too."""
    try:
        with EmbeddingClient(url, retry=None, timeout_s=GENEROUS_S) as client:
            return client.embed([probe_image()]).shape == (1, 512)
    except EmbeddingError:
        return False


def lives(pid) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def run_storm(options, kind, seed, calls) -> int:
    """Start a storm; the number of calls that were given up."""
    address = options.grpc_url.removeprefix("grpc://")
    command = [sys.executable, "-m", "tests.storm", address, kind, str(seed), str(calls)]
    given_up, _ = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(given_up)


def storms(options, server_pid, kinds, rounds, *, calls=60) -> Counter:
    """Run `rounds` storms of each kind beside other clients; how many of each killed the server."""
    killed = Counter()
    for number in range(rounds):
        for kind in kinds:
            wait_until(lambda: has_said_so(options) and is_ready(options))
            server = psutil.Process(server_pid())
            assert run_storm(options, kind, number, calls) > 0
            killed[kind] += psutil.wait_procs([server], timeout=0.5)[1] == []
    return killed


def test_a_storm_of_calls_that_are_given_up_costs_others_nothing(served, demo_photos, tmp_path):
    """The server survives. If it dies of SIGSEGV all the same, our clients wait and lose nothing."""
    options, server_pid = served
    images = [photo.read_bytes() for photo in demo_photos]

    def many() -> list:
        with EmbeddingClient(options.grpc_url, timeout_s=GENEROUS_S) as client:
            return list(client.embed_many(images))

    async def many_async() -> list:
        async with AsyncEmbeddingClient(options.grpc_url, timeout_s=GENEROUS_S) as client:
            return [result async for result in client.embed_many(images)]

    command = [CLIP_TOOLS.replace("clip-tools", "clip-embed"), *map(str, demo_photos), "--url", options.grpc_url]
    command += ["--output", str(tmp_path / "vectors.npy")]
    with Deaths(options, server_pid) as deaths, Traffic(options.grpc_url, images, clients=1) as traffic:
        with ThreadPoolExecutor() as pool:
            ours = [pool.submit(many), pool.submit(lambda: asyncio.run(many_async()))]
            ours.append(pool.submit(subprocess.run, command, check=True, timeout=GENEROUS_S))
            assert not storms(options, server_pid, ["cancel", "closed", "lost"], 1, calls=30).total()
            os.kill(server_pid(), signal.SIGSEGV)
        wait_until(lambda: deaths.answered_s)
        expected = traffic.expected
    assert (traffic.lost, traffic.wrong, deaths.dishonest) == ([], [], 0)
    for got in (ours[0].result(), ours[1].result(), np.load(tmp_path / "vectors.npy")):
        assert np.abs(np.array(got) - expected).max() < SAME_IMAGE_MAX_ABS
    assert max(deaths.started_s) < 30  # 3.7 s at most on two busy cores
    assert "tritonserver ended by SIGSEGV" in options.log.read_text()


# `clip-tools serve` as on a machine where ignore_cancellation.c could not be built.
UNPROTECTED = """
from pathlib import Path
from clip_tools import c_libraries
c_libraries.library_path = lambda source: Path("/none")
from clip_tools.cli import main
main()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("entry", "program"),
    [("storms", [CLIP_TOOLS]), ("storms_unprotected", [sys.executable, "-c", UNPROTECTED])],
    ids=["protected", "unprotected"],
)
def test_storms_of_every_kind(repository, demo_photos, tmp_path, record_reliability, entry, program):
    """Records how many kill the server and how soon the next one answers. Other clients lose nothing."""
    images = [photo.read_bytes() for photo in demo_photos]
    with serving(repository, tmp_path, program) as (options, server_pid):
        cold_start_s = float(re.search(r"ready after ([\d.]+) s", options.log.read_text())[1])
        with Deaths(options, server_pid) as deaths, Traffic(options.grpc_url, images, clients=2) as traffic:
            killed = storms(options, server_pid, KINDS, ROUNDS)
            wait_until(lambda: is_ready(options))
    assert (traffic.lost, traffic.wrong, deaths.dishonest) == ([], [], 0)
    assert entry == "storms_unprotected" or not killed.total()
    answered = {}
    if deaths.answered_s:
        answered = {
            "median_answer_s": round(statistics.median(deaths.answered_s), 1),
            "slowest_answer_s": round(max(deaths.answered_s), 1),
        }
    started = {"slowest_new_process_s": round(max(deaths.started_s), 1)} if deaths.started_s else {}
    record_reliability(
        entry,
        storms=ROUNDS * len(KINDS),
        servers_killed=killed.total(),
        **{f"killed by {kind}": count for kind, count in killed.items() if count},
        requests=len(traffic.sent),
        lost=len(traffic.lost),
        cold_start_s=cold_start_s,
        **started,
        **answered,
    )


@pytest.mark.long
def test_a_storm_that_meets_a_server_as_it_starts(served):
    options, server_pid = served
    wait_until(lambda: has_said_so(options))
    killed = server_pid()
    os.kill(killed, signal.SIGKILL)
    host, _, port = options.grpc_url.removeprefix("grpc://").rpartition(":")

    def listens() -> bool:
        with socket.socket() as end:
            return server_pid() not in (0, killed) and end.connect_ex((host, int(port))) == 0

    wait_until(listens)
    started = server_pid()
    assert run_storm(options, "both", 0, 60) > 0
    wait_until(lambda: has_said_so(options) and is_ready(options))
    assert server_pid() == started


@pytest.mark.long
def test_a_storm_that_meets_a_swap(served, light_repository):
    options, server_pid = served
    wait_until(lambda: has_said_so(options) and is_ready(options))
    before, over = server_pid(), threading.Event()

    def storm_on() -> None:
        while not over.is_set():
            run_storm(options, "both", 0, 10)

    thread = threading.Thread(target=storm_on)
    thread.start()
    try:
        with GrpcModelControl(options.grpc_url) as control:
            for name in ("cpu-fp32", "onnx"):  # every CPU can run these
                swap(control, SwapOptions(name, models=light_repository), lambda _: None)
    finally:
        over.set()
        thread.join()
    assert server_pid() == before


def http_request(options, image: bytes) -> bytes:
    host, _, port = options.http_url.removeprefix("http://").rpartition(":")
    head = (
        f"POST /v2/models/clip_ensemble/infer HTTP/1.1\r\nHost: {host}:{port}\r\nInference-Header-Content-Length: 0\r\n"
    )
    return f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image


def leave_http(options, rounds, part):
    """Reset a connection after a part of the request, or after all of it while the server answers."""
    address = options.http_url.removeprefix("http://").rsplit(":", 1)
    request = http_request(options, probe_image())
    for _ in range(rounds):
        with socket.create_connection(address) as connection:
            connection.sendall(request[: int(part * len(request))])
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset


def leave_tasks(options, rounds):
    """Cancel tasks of our client, sixty-four at a time."""

    async def cancel() -> None:
        async with AsyncEmbeddingClient(options.grpc_url, timeout_s=GENEROUS_S) as client:
            for _ in range(rounds // 64):
                tasks = [asyncio.create_task(client.embed([probe_image()])) for _ in range(64)]
                await asyncio.sleep(0.02)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(cancel())


def leave_grpc(options, rounds, kind):
    """Cancelled calls of another program."""
    run_storm(options, kind, rounds, rounds // THREADS)


LEFT_MIDWAY = 10_080
LEFT = {
    "HTTP, half sent": partial(leave_http, part=0.5),
    "HTTP, in flight": partial(leave_http, part=1.0),
    "tasks": leave_tasks,
    **{f"gRPC, {kind}": partial(leave_grpc, kind=kind) for kind in LEAVING},
}


@pytest.mark.long
def test_what_is_left_midway_leaves_nothing_behind(served, demo_photos, record_reliability):
    """No file, thread or shared memory."""
    options, server_pid = served
    images, risen = [photo.read_bytes() for photo in demo_photos], Counter()

    def settled() -> Sample:
        with EmbeddingClient(options.grpc_url, timeout_s=GENEROUS_S) as client:
            client.embed(images)
        wait_until(lambda: is_ready(options))
        return sample(server_pid(), 0)

    wait_until(lambda: has_said_so(options) and is_ready(options))
    pid = server_pid()
    for name, leave in LEFT.items():
        leave(options, 640)  # pools grow to their size
        before = settled()
        leave(options, LEFT_MIDWAY)
        after = settled()
        assert server_pid() == pid, name
        for what in ("open_files", "threads", "regions"):
            risen[what] = max(risen[what], getattr(after, what) - getattr(before, what))
        assert max(risen.values()) <= 8, (name, risen)
        assert after.private_mib < before.private_mib + 200, name
    record_reliability(
        "left_midway",
        left=LEFT_MIDWAY * len(LEFT),
        kinds=len(LEFT),
        **{f"{what}_risen": rise for what, rise in risen.items()},
    )
