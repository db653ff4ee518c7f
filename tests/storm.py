"""A storm of gRPC calls that their client gives up, as a program: `python -m tests.storm URL KIND SEED CALLS`.

It prints how many calls were given up and how many were answered.
"""

import contextlib
import random
import socket
import sys
import threading
import time

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from clip_tools.serving.probe import probe_image

THREADS = 16
KINDS = {
    # kind: shortest and longest deadline in ms, the share that is cancelled, after how many ms
    "deadline": ((20, 100), 0.0, 5),
    "short deadline": ((1, 20), 0.0, 5),
    "cancel": (None, 1.0, 5),
    "late cancel": (None, 1.0, 60),
    "both": ((20, 100), 1 / 3, 5),
    # These leave their connection with calls in flight: it is closed, or lost as by a client that is killed; or the
    # calls are those of a stream.
    "closed": (None, 1.0, 60),
    "lost": (None, 1.0, 60),
    "stream": (None, 1.0, 60),
}
LEAVING = ("closed", "lost", "stream")
IN_FLIGHT = 6


class Way:
    """A connection to the server that can be dropped."""

    def __init__(self, url: str) -> None:
        self._server = url.rpartition(":")[::2]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            self._ends.append(self._listener.accept()[0])
            self._ends.append(socket.create_connection(self._server))
            threading.Thread(target=self._copy, args=self._ends, daemon=True).start()
            self._copy(*self._ends[::-1])

    def _copy(self, one, other) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)

    def close(self) -> None:
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def is_lost(url: str) -> bool:
    """Whether nothing listens there."""
    try:
        socket.create_connection(url.rpartition(":")[::2]).close()
    except ConnectionRefusedError:
        return True
    return False


def image():
    tensor = triton.InferInput("image_bytes", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[probe_image()]], dtype=object))
    return tensor


def storm(url: str, kind: str, seed: int, calls: int) -> tuple[int, int]:
    """(calls given up, calls answered) by 16 threads with `calls` calls each, or until the server is gone."""
    deadlines, cancelled, after_ms = KINDS[kind]
    counts = {"given up": 0, "answered": 0}
    lock = threading.Lock()

    def count(what: str) -> None:
        with lock:
            counts[what] += 1

    def leave(number: int) -> None:
        rng = random.Random(f"{seed} {number}")  # noqa: S311
        for _ in range(calls // IN_FLIGHT):
            if is_lost(url):
                return
            way = Way(url)
            client = triton.InferenceServerClient(way.url if kind == "lost" else url)
            if kind == "stream":
                client.start_stream(lambda result, error: count("given up" if error else "answered"))
            try:
                for _ in range(IN_FLIGHT):
                    if kind == "stream":
                        client.async_stream_infer("clip_ensemble", [image()])
                    else:
                        client.async_infer(
                            "clip_ensemble", [image()], lambda result, error: count("given up" if error else "answered")
                        )
                time.sleep(rng.uniform(0, 2 * after_ms) / 1000)
            except InferenceServerException:
                count("given up")
            way.close()
            if kind == "stream":
                client.stop_stream(cancel_requests=True)
            client.close()

    def one(number: int) -> None:
        rng = random.Random(f"{seed} {number}")  # noqa: S311
        tensor = image()
        with triton.InferenceServerClient(url) as client:
            for _ in range(calls):
                timeout_s = rng.uniform(*deadlines) / 1000 if deadlines else None
                done = threading.Event()

                def take(result, error, done=done) -> None:
                    count("given up" if error else "answered")
                    done.set()

                try:
                    if rng.random() < cancelled:
                        call = client.async_infer("clip_ensemble", [tensor], take, client_timeout=timeout_s)
                        time.sleep(rng.uniform(0, 2 * after_ms) / 1000)
                        call.cancel()
                        done.wait(30)
                    else:
                        client.infer("clip_ensemble", [tensor], client_timeout=timeout_s)
                        count("answered")
                except InferenceServerException as error:
                    if error.status() == "StatusCode.UNAVAILABLE" and "connect" in str(error):
                        return
                    count("given up")

    threads = [threading.Thread(target=leave if kind in LEAVING else one, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts["given up"], counts["answered"]


if __name__ == "__main__":
    print(*storm(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
