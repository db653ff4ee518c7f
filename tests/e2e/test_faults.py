"""Faults in the real server and the real client: no image is lost or embedded twice, and errors name their cause."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from tests.conftest import options_for

from clip_embed import EmbeddingClient, EmbeddingError, ServerError, ServerUnavailableError
from clip_embed.table import parts_folder
from clip_tools.serving.probe import probe_image
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer

CLIP_EMBED = str(Path(sys.executable).with_name("clip-embed"))
CLIP_TOOLS = str(Path(sys.executable).with_name("clip-tools"))
# Kernels depend on the batch size, so the last bits of FP32 differ.
SAME_IMAGE_MAX_ABS = 1e-5
TIMEOUT_S = 300  # for everything here: only a hang reaches it, even on a loaded machine


def wait_until(reached: Callable[[], bool], *, what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not after {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def photographs(demo_photos, tmp_path_factory) -> list[Path]:
    """Small copies of the demo's photographs, so that a test can embed many."""
    folder = tmp_path_factory.mktemp("photographs")
    for photo in demo_photos:
        with Image.open(photo) as image:
            image.thumbnail((320, 320))
            image.convert("RGB").save(folder / f"{photo.stem}.jpg", "JPEG")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def embeddings(server, photographs) -> np.ndarray:
    """The photographs' embeddings from a server without faults."""
    with EmbeddingClient(server.options.grpc_url) as client:
        return client.embed(photographs)


class Library:
    """`count` files and their expected embeddings. File i links to photograph i modulo ten.

    `lost` and `twice` count the images that the checks found missing or repeated.
    """

    lost = twice = 0

    def __init__(self, folder: Path, photographs: list[Path], embeddings: np.ndarray, count: int) -> None:
        folder.mkdir()
        self.paths = [folder / f"{index:05d}.jpg" for index in range(count)]
        for index, path in enumerate(self.paths):
            path.symlink_to(photographs[index % len(photographs)])
        self.embeddings = embeddings[[index % len(photographs) for index in range(count)]]

    def check(self, results: list) -> None:
        """Assert that every image has its own vector."""
        errors = [result for result in results if isinstance(result, EmbeddingError)]
        self.lost += len(errors)
        assert errors == []
        assert np.abs(np.array(results) - self.embeddings).max() < SAME_IMAGE_MAX_ABS

    def check_file(self, output: Path) -> None:
        """Assert that every image is in the file once, in order, with its own vector."""
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        paths = [line["path"] for line in lines]
        self.lost += len(set(map(str, self.paths)) - set(paths))
        self.twice += len(paths) - len(set(paths))
        assert paths == list(map(str, self.paths))
        self.check([np.array(line["embedding"], np.float32) for line in lines])


@pytest.fixture
def library(photographs, embeddings, tmp_path) -> Callable[[int], Library]:
    return lambda count: Library(tmp_path / "library", photographs, embeddings, count)


class Fed:
    """A running `clip-embed -` that gets its paths on stdin during the test."""

    def __init__(self, url: str, output: Path) -> None:
        self.output = output
        command = [CLIP_EMBED, "-", "--url", url, "--out", str(output), "--batch-size=2"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def feed(self, paths: list[Path]) -> None:
        self.process.stdin.writelines(f"{path}\n" for path in paths)
        self.process.stdin.flush()

    def wait_until_it_has_begun(self) -> None:
        """It opens its output after it has reached the server."""
        unfinished = self.output.with_name(f"{self.output.name}.parts") / f"{self.output.name}.unfinished"
        wait_until(lambda: unfinished.exists() or self.process.poll() is not None, what="clip-embed has begun")

    def finish(self) -> str:
        """Wait for exit code 0. Returns stderr."""
        said = self.process.communicate(timeout=TIMEOUT_S)[1]
        assert self.process.returncode == 0, said
        return said

    def __enter__(self) -> "Fed":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def embed_with_a_fault(client: EmbeddingClient, library: Library, fed: Fed, fault: Callable[[], None]) -> list:
    """The results of an embed_many. The fault comes after a third of its images, and of those of a clip-embed."""
    third = len(library.paths) // 3

    def images() -> Iterator[Path]:
        fed.feed(library.paths[:third])
        fed.wait_until_it_has_begun()
        yield from library.paths[:third]
        fault()
        fed.feed(library.paths[third:])
        yield from library.paths[third:]

    return list(client.embed_many(images()))


@pytest.fixture(scope="module")
def pair(light_repository, tmp_path_factory) -> Iterator[list[EmbeddedServer]]:
    """Two servers that the next three tests share. Their docstrings say in what state they leave them."""
    folder = tmp_path_factory.mktemp("pair")
    servers = [EmbeddedServer(options_for(light_repository, folder / f"{number}.log")) for number in range(2)]
    try:
        for one in servers:
            one.start()
        for one in servers:
            one.wait_until_ready()
        yield servers
    finally:
        for one in servers:
            one.stop()


def replace(servers: list[EmbeddedServer], number: int) -> None:
    """Stop what is left of a server and start another one on its ports."""
    servers[number].stop()
    servers[number] = EmbeddedServer(servers[number].options)
    servers[number].start()
    servers[number].wait_until_ready()


@pytest.fixture(scope="module")
def new_server(pair) -> Iterator[ThreadPoolExecutor]:
    """The thread that starts new servers: a server ends with the thread that started it."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.promise
def test_a_killed_server_is_waited_for(pair, new_server, library, tmp_path, record_reliability):
    """kill -9 during an embed_many and a clip-embed that know only this server. A new one takes its port."""
    images, output, url = library(30), tmp_path / "vectors.jsonl", pair[0].options.grpc_url
    killed = []

    def kill() -> None:
        os.kill(pair[0].pid, signal.SIGKILL)
        killed.append((time.monotonic(), new_server.submit(replace, pair, 0)))

    with (
        EmbeddingClient(url, batch_size=2, timeout_s=TIMEOUT_S) as client,
        Fed(url, output) as fed,
    ):
        images.check(embed_with_a_fault(client, images, fed, kill))
        said = fed.finish()
    (killed_s, replaced), *_ = killed
    replaced.result(TIMEOUT_S)
    images.check_file(output)
    assert f"{url} gets no requests until it is ready again" in said
    assert f"{url} is ready again" in said
    record_reliability(
        "faults_server_killed",
        faults=1,
        requests=30,
        lost=images.lost,
        twice=images.twice,
        all_done_after_s=seconds_since(killed_s),
    )


def seconds_since(begin_s: float) -> float:
    return round(time.monotonic() - begin_s, 1)


@pytest.mark.promise
def test_when_one_of_two_servers_is_killed_the_other_answers(pair, library, tmp_path, record_reliability):
    """kill -9 of the second server under load. It stays down."""
    images, output = library(48), tmp_path / "vectors.jsonl"
    urls = [one.options.grpc_url for one in pair]
    with (
        EmbeddingClient(urls=urls, batch_size=2, timeout_s=TIMEOUT_S) as client,
        Fed(",".join(urls), output) as fed,
    ):
        results = embed_with_a_fault(client, images, fed, lambda: os.kill(pair[1].pid, signal.SIGKILL))
        said = fed.finish()
    images.check(results)
    images.check_file(output)
    assert f"{urls[1]} gets no requests until it is ready again" in said
    assert f"{urls[0]} gets no requests" not in said
    record_reliability("faults_replica_killed", faults=1, requests=48, lost=images.lost, twice=images.twice)


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.promise
def test_a_server_that_is_told_to_stop_finishes_what_it_has_taken(pair, photographs, embeddings, record_reliability):
    """SIGTERM with up to seven requests in flight, none of which is sent again. The server stays down."""
    stopping, images, expected = pair[0], photographs * 4, np.tile(embeddings, (4, 1))
    with EmbeddingClient(stopping.options.grpc_url, batch_size=len(images), timeout_s=TIMEOUT_S, retry=None) as client:
        with ThreadPoolExecutor(8) as pool:
            requests = [pool.submit(client.embed, images) for _ in range(8)]
            wait(requests, TIMEOUT_S, FIRST_COMPLETED)  # they were sent together, so the server has taken all
            in_flight = [request for request in requests if not request.done()]
            stopping.terminate()
            answers = [request.result(TIMEOUT_S) for request in requests]
        assert in_flight
        assert max(np.abs(answer - expected).max() for answer in answers) < SAME_IMAGE_MAX_ABS
        wait_until(lambda: has_ended(stopping.pid), what="the server ends by itself", timeout_s=60)
        with pytest.raises(ServerUnavailableError):
            client.embed(photographs[:1])
    record_reliability("faults_sigterm", faults=1, requests=8, in_flight=len(in_flight), lost=0)


@pytest.mark.long
def test_a_storm_of_faults(light_repository, library, tmp_path, record_reliability):
    """One of two servers is killed, replaced or frozen up to ten times, during an embed_many and clip-embed --resume.

    The faults are seeded. The requests in flight at a fault vary.
    """
    dice = random.Random(0)  # noqa: S311
    images, output = library(2000), tmp_path / "vectors.jsonl"
    servers = [EmbeddedServer(options_for(light_repository, tmp_path / f"{number}.log")) for number in range(2)]
    urls = [one.options.grpc_url for one in servers]
    injected: Counter[str] = Counter()
    over = threading.Event()

    def kill(number: int) -> None:
        os.kill(servers[number].pid, signal.SIGKILL)
        replace(servers, number)

    def upgrade(number: int) -> None:
        replace(servers, number)

    def freeze(number: int) -> None:
        group = servers[number].pid
        os.killpg(group, signal.SIGSTOP)
        over.wait(dice.uniform(2, 8))
        os.killpg(group, signal.SIGCONT)
        # As `clip-tools serve` does: Triton 24.10 aborts if a lock's time ran out while it was frozen.
        replace(servers, number)

    def storm() -> None:
        while not over.wait(dice.uniform(1, 5)) and injected.total() < 10:
            fault, number = dice.choice((kill, upgrade, freeze)), dice.randrange(2)
            injected[fault.__name__] += 1
            fault(number)

    listed = tmp_path / "paths"
    listed.write_text("".join(f"{path}\n" for path in images.paths))
    command = [CLIP_EMBED, "-", "--url", ",".join(urls), "--out", str(output), "--resume", "--batch-size=8"]
    command += [f"--timeout-s={TIMEOUT_S}", "--attempt-timeout-s=20"]
    with contextlib.ExitStack() as stack:
        for one in servers:
            stack.enter_context(one)
        stack.callback(lambda: [one.stop() for one in servers])  # also the replacements
        pool = stack.enter_context(ThreadPoolExecutor(1))
        paths = stack.enter_context(listed.open())
        process = stack.enter_context(subprocess.Popen(command, stdin=paths, stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        client = stack.enter_context(EmbeddingClient(urls=urls, timeout_s=TIMEOUT_S, attempt_timeout_s=20))
        stormed = pool.submit(storm)
        try:
            images.check(list(client.embed_many(images.paths)))
        finally:
            over.set()
        stormed.result(TIMEOUT_S)
        said = process.communicate(timeout=TIMEOUT_S)[1]
        assert process.returncode == 0, said
        client.embed(images.paths[:1])
    images.check_file(output)
    assert injected.total() >= 3
    record_reliability(
        "faults_storm", faults=injected.total(), **injected, requests=500, lost=images.lost, twice=images.twice
    )


def grpc_half_open(options) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", options.grpc_port), timeout=TIMEOUT_S)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x40\x01")
    return connection


def http_half_open(options) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", options.http_port), timeout=TIMEOUT_S)
    connection.sendall(
        b"POST /v2/models/clip_ensemble/infer HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\n\xff"
    )
    return connection


def slow_answer(options, image: bytes) -> bytes:
    """The server's answer to an image that is sent byte by byte.

    The head is sent at once: Triton 24.10 answers 404 if the request line comes in pieces.
    """
    head = (
        "POST /v2/models/clip_ensemble/infer HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
        f"Inference-Header-Content-Length: 0\r\nContent-Length: {len(image)}\r\n\r\n"
    )
    answer = b""
    with socket.create_connection(("127.0.0.1", options.http_port), timeout=TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode())
        for byte in image:
            connection.sendall(bytes([byte]))
            time.sleep(0.001)  # what makes the client slow
        while chunk := connection.recv(1 << 16):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200 OK"), answer[:500]
    return answer


@pytest.mark.parametrize(
    ("half_open", "requests"),
    [(100, 10), pytest.param(400, 600, marks=pytest.mark.long)],
)
def test_slow_and_half_open_clients_keep_nobody_waiting(
    server, photographs, embeddings, half_open, requests, record_reliability
):
    """Half of the half-open connections speak gRPC and half HTTP. The slow client gets its answer too."""
    options = server.options
    open_files = psutil.Process(server.pid).num_fds
    before, latencies_ms = open_files(), []
    with (
        EmbeddingClient(options.grpc_url, timeout_s=TIMEOUT_S, retry=None) as client,
        contextlib.ExitStack() as held,
        ThreadPoolExecutor(1) as pool,
    ):
        slow = pool.submit(slow_answer, options, probe_image())
        for number in range(half_open):
            held.enter_context((grpc_half_open, http_half_open)[number % 2](options))
        wait_until(lambda: open_files() >= before + half_open, what="the half-open connections are taken")
        for _ in range(requests):
            begin_s = time.monotonic()
            answer = client.embed(photographs[:1])
            latencies_ms.append(1000 * (time.monotonic() - begin_s))
            assert np.abs(answer - embeddings[:1]).max() < SAME_IMAGE_MAX_ABS
        expected = client.embed([probe_image()])[0]
        slowly = np.frombuffer(slow.result(TIMEOUT_S)[-2048:], "<f4")
    assert np.abs(slowly - expected).max() < SAME_IMAGE_MAX_ABS
    wait_until(lambda: open_files() <= before + 8, what="the connections that went away are closed")
    record_reliability(
        "faults_half_open",
        faults=half_open + 1,
        requests=requests + 1,
        lost=0,
        median_ms=round(float(np.median(latencies_ms)), 1),
    )


@pytest.fixture(scope="module")
def namespace() -> list[str]:
    """A command prefix that runs a shell script with its own mounts."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc"]
    done = subprocess.run([*command, "mount -t tmpfs tmpfs /mnt"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs to mount in a namespace of its own, which is not allowed here: {done.stderr.strip()}")
    return command


@pytest.mark.promise
def test_a_full_disk_keeps_what_is_written_and_is_gone_on_from(
    server, library, namespace, tmp_path, record_reliability
):
    """Three runs: one fits, one fills the disk, and one with more room embeds only the rest."""
    images, disk, kept = library(24), tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    output = disk / "vectors.jsonl"
    run = f"{CLIP_EMBED} --url {server.options.grpc_url} --out {output} --resume"
    script = f"""
        mount -t tmpfs -o size=160k tmpfs {disk}
        {run} {" ".join(map(str, images.paths[:4]))}
        set +e
        {run} {images.paths[0].parent} 2> {kept}/full
        echo $? > {kept}/code
        set -e
        cp {output} {kept}/first
        mount -o remount,size=8m {disk}
        {run} {images.paths[0].parent} 2> {kept}/rest
        ls {disk} > {kept}/left
        cp {output} {kept}/all
    """
    done = subprocess.run([*namespace, script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    full = (kept / "full").read_text()
    assert (kept / "code").read_text() == "2\n"
    assert f"cannot write {output}: No space left on device" in full
    assert full.splitlines()[-1].startswith("clip-embed: cannot write")
    assert len((kept / "first").read_text().splitlines()) == 4
    assert "4 of the images were there already" in (kept / "rest").read_text()
    assert (kept / "left").read_text() == "vectors.jsonl\nvectors.jsonl.provenance.json\n"
    images.check_file(kept / "all")
    record_reliability("faults_full_disk", faults=1, lost=images.lost, twice=images.twice)


def test_a_full_disk_behind_stdout_exits_2_with_one_line(server, photographs):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [CLIP_EMBED, "--url", server.options.grpc_url, *map(str, photographs)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "clip-embed: cannot write stdout: No space left on device\n")


@pytest.fixture(scope="module")
def cramped(light_repository, namespace, tmp_path_factory) -> Iterator[ServeOptions]:
    """The options of a `clip-tools serve` whose model folder is read-only and whose /dev/shm has 8 MB."""
    folder = tmp_path_factory.mktemp("cramped")
    options = options_for(light_repository, folder / "log")
    ports = " ".join(f"--{name}-port={getattr(options, f'{name}_port')}" for name in ("http", "grpc", "metrics"))
    script = f"""
        mount -t tmpfs -o size=8m tmpfs /dev/shm
        mount --bind {light_repository} {light_repository}
        mount -o remount,bind,ro {light_repository}
        if touch {light_repository}/written; then echo "the folder is not read-only"; exit 9; fi
        exec {CLIP_TOOLS} serve --models={light_repository} {ports}
    """
    with options.log.open("w") as log, subprocess.Popen([*namespace, script], stdout=log, stderr=log) as process:
        try:
            wait_until(
                lambda: "ready after" in options.log.read_text() or process.poll() is not None, what="serve is ready"
            )
            assert process.poll() is None, options.log.read_text()
            yield options
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


@pytest.mark.promise
def test_the_model_folder_may_be_read_only(cramped, photographs, embeddings, record_reliability):
    with EmbeddingClient(cramped.grpc_url) as client:
        assert np.abs(client.embed(photographs[:4]) - embeddings[:4]).max() < SAME_IMAGE_MAX_ABS
    record_reliability("faults_read_only_models", faults=1, requests=1, lost=0)


@pytest.mark.promise
def test_a_small_dev_shm_fails_the_large_request_alone(cramped, photographs, embeddings, record_reliability):
    """The pixels of 64 images are 9.6 MB. The error names the cause and the flag, and smaller requests still work."""
    images = [photographs[index % len(photographs)] for index in range(64)]
    with EmbeddingClient(cramped.grpc_url, batch_size=64, timeout_s=TIMEOUT_S) as client:
        with pytest.raises(ServerError, match=r"shared memory.*--shm-size.*No space left on device"):
            client.embed(images)
        assert client.is_ready()
        assert np.abs(client.embed(photographs[:4]) - embeddings[:4]).max() < SAME_IMAGE_MAX_ABS
    record_reliability("faults_small_shm", faults=1, requests=2, refused=1, lost=0)


@pytest.mark.promise
def test_a_damaged_model_file_is_named_with_what_to_do(light_repository, tmp_path, record_reliability):
    """With and without its manifest. Without one, ONNX Runtime is the first to detect the damage."""
    for number, has_manifest in enumerate((True, False)):
        models = tmp_path / str(number)
        shutil.copytree(light_repository, models, symlinks=True)
        file = models / "clip_onnx" / "1" / "model.onnx"
        whole = file.resolve()
        file.unlink()
        with whole.open("rb") as source:
            file.write_bytes(source.read(1 << 20))
        if not has_manifest:
            (file.parent / "manifest.json").unlink()
        options = options_for(models, tmp_path / "log")
        ports = [f"--{name}-port={getattr(options, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
        done = subprocess.run(
            [CLIP_TOOLS, "serve", f"--models={models}", *ports],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        said = done.stderr.splitlines()[-1]
        assert done.returncode == 1
        assert str(file) in said
        assert "clip-tools export-onnx" in said
    record_reliability("faults_corrupt_model", faults=2)


def faketime() -> Path | None:
    """The library of the package libfaketime, which gives a process another clock; None if it is not installed."""
    found = find_spec("libfaketime")
    folders = found.submodule_search_locations if found else None
    return next((path for folder in folders or () for path in Path(folder).rglob("libfaketime.so.1")), None)


@pytest.mark.promise
@pytest.mark.skipif(faketime() is None, reason="needs another clock: pip install libfaketime")
def test_a_clock_that_jumps_changes_nothing(light_repository, library, tmp_path, record_reliability):
    """The clock of server and clip-embed jumps back a year, then forward two hours, with requests in flight.

    It begins a year ahead, so that it is never behind the kernel's clock: libfaketime changes only what a process
    reads, and behind that clock every lock with a deadline would time out at once.
    """
    images, clock, output = library(30), tmp_path / "clock", tmp_path / "vectors.jsonl"
    clock.write_text("+31536000s")
    environment = os.environ | {
        "LD_PRELOAD": str(faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # setting a clock does not change it
    }
    options = options_for(light_repository, tmp_path / "log")
    ports = [f"--{name}-port={getattr(options, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
    command = [CLIP_TOOLS, "serve", f"--models={light_repository}", *ports]
    embed = [CLIP_EMBED, "-", "--url", options.grpc_url, "--out", output, "--resume", "--batch-size=2"]
    embed += ["--timeout-s=120", "--attempt-timeout-s=60"]

    def jump(to: str) -> None:
        before = now()
        clock.write_text(to)
        assert abs(now() - before) > 3600

    def now() -> float:
        """The time that a process with this clock reads."""
        read = [sys.executable, "-c", "import time; print(time.time())"]
        return float(subprocess.run(read, env=environment, capture_output=True, check=True).stdout)

    with (
        options.log.open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as serving,
    ):
        try:
            wait_until(lambda: "ready after" in options.log.read_text() or serving.poll() is not None, what="serve")
            assert serving.poll() is None, options.log.read_text()
            with (
                subprocess.Popen(embed, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as embedding,
                EmbeddingClient(options.grpc_url, batch_size=2, timeout_s=120, retry=None) as client,
            ):

                def with_jumps() -> Iterator[Path]:
                    for index, path in enumerate(images.paths):
                        if index in (10, 20):
                            wait_until(parts_folder(output).exists, what="clip-embed has begun")
                            jump("+0s" if index == 10 else "+7200s")
                        embedding.stdin.write(f"{path}\n".encode())
                        embedding.stdin.flush()
                        yield path

                images.check(list(client.embed_many(with_jumps())))
                said = embedding.communicate(timeout=TIMEOUT_S)[1]
            assert (embedding.returncode, said) == (0, b"")
            images.check_file(output)
        finally:
            serving.terminate()
            serving.wait(TIMEOUT_S)
    record_reliability("faults_clock_jump", faults=2, requests=30, lost=images.lost, twice=images.twice)
