"""`drain` unloads the ensembles and waits for their requests. tests/e2e/test_faults.py shows it on a real server."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clip_tools.serving.drain import drain

KEY = {"clip-admin-key": "0123456789abcdef"}


@pytest.fixture
def server():
    """A server that reports the text ensemble as UNLOADING twice, then as UNAVAILABLE. It requires the admin key."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.server.asked.append((self.path, self.headers["clip-admin-key"]))
            is_unloading = len(self.server.asked) < self.server.unloaded_after
            state = "UNLOADING" if is_unloading else "UNAVAILABLE"
            body = json.dumps(
                [{"name": "clip_text_ensemble", "state": state}, {"name": "preprocess", "state": "READY"}]
            )
            self.send_response(200 if self.headers["clip-admin-key"] == KEY["clip-admin-key"] else 403)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.asked, made.unloaded_after = [], 5
        made.url = f"http://127.0.0.1:{made.server_port}"
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_drain_unloads_the_ensembles_and_waits_until_none_is_unloading(server):
    drain(server.url, KEY, 30)
    index = ("/v2/repository/index", KEY["clip-admin-key"])
    names = ("clip_ensemble", "clip_text_ensemble")
    unloads = [(f"/v2/repository/models/{name}/unload", KEY["clip-admin-key"]) for name in names]
    assert server.asked == [*unloads, *[index] * 3]


def test_drain_returns_after_its_timeout(server):
    server.unloaded_after = 1_000_000
    began = time.monotonic()
    drain(server.url, KEY, 0.3)
    assert time.monotonic() - began < 10


def test_a_server_that_refuses_the_key_is_an_error(server):
    with pytest.raises(OSError, match="403"):
        drain(server.url, {"clip-admin-key": "another"}, 30)
