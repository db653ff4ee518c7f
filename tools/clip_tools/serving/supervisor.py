"""Keeps a server running: one that no longer embeds is ended, and a new one is started."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

from clip_tools.errors import ToolError
from clip_tools.serving.process import TritonProcess
from clip_tools.serving.watchdog import Watchdog

# The wait before the next server: the first one after a server that was ready, then twice as long after each that was
# not. Not measured.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0

Say = Callable[[str], object]


class Server(Protocol):
    """A server that can be started once."""

    is_ready: bool
    """Whether it has embedded, and its vectors were not wrong."""

    @property
    def process(self) -> TritonProcess: ...

    def start(self) -> None:
        """Start the process. Raises ToolError with the reason."""

    def wait_until_ready(self) -> str | None:
        """Return when it is ready, with a line for the log. Raises ToolError with the reason."""

    def watchdog(self) -> Watchdog:
        """Watches it from then on."""

    def terminate(self) -> None:
        """Ask it to end; called again, kill it."""

    def stop(self, *, is_broken: bool) -> None:
        """End it and all its processes; a broken one gets little time."""


class Supervisor:
    """Serves until it is stopped.

    Args:
        new_server: makes each server.
        say: logs one line.
        ready_line: the line for a server that is ready.
    """

    def __init__(self, new_server: Callable[[], Server], say: Say, ready_line: str) -> None:
        self._new_server, self._say, self._ready_line = new_server, say, ready_line
        self._server: Server | None = None
        self._stop_requested = threading.Event()
        self._was_ready = False

    def stop(self) -> None:
        """Ask the server to answer what is in flight and end, and start no other; called again, kill it."""
        self._stop_requested.set()
        if self._server is not None:
            self._server.terminate()

    @contextlib.contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGINT (Ctrl-C), SIGTERM and SIGHUP stop it."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self) -> None:
        """Serve until `stop`. Raises ToolError if the first server does not become ready."""
        try:
            self._run()
        except ToolError:
            if not self._stop_requested.is_set():  # the stop may have come while that server ended
                raise
        self._say("the server was stopped")

    def _run(self) -> None:
        next_wait_s = FIRST_WAIT_S
        while not self._stop_requested.is_set():
            wait_s = 0.0
            server = self._server = self._new_server()
            try:
                why = self._serve(server)
                if not self._stop_requested.is_set():
                    wait_s = FIRST_WAIT_S if server.is_ready else next_wait_s
                    next_wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                    self._say(f"{why}; a new server starts in {wait_s:g} s")
            finally:
                server.stop(is_broken=not self._stop_requested.is_set())
            self._stop_requested.wait(wait_s)

    def _serve(self, server: Server) -> str:
        """Serve with one server; why it ended or is broken. Raises ToolError if no server has been ready yet."""
        began = time.monotonic()
        try:
            server.start()
            if self._stop_requested.is_set():  # before there was a process to end
                server.terminate()
            result = server.wait_until_ready()
        except ToolError as error:
            if self._was_ready or self._stop_requested.is_set():
                return str(error)
            raise
        self._was_ready = True
        if result:
            self._say(result)
        self._say(f"ready after {time.monotonic() - began:.1f} s: {self._ready_line}")
        return server.watchdog().watch(server.process.wait) or server.process.why_it_ended() or "the server was ended"
