"""Keeps a server going: one that no longer embeds is ended, and another takes its place."""

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

# How long from one server to the next: half a second after one that embedded, whose own start takes longer than that;
# twice as long each time after one that did not come to embed. Not measured.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0

Say = Callable[[str], object]


class Server(Protocol):
    """A server that can be started, once."""

    embeds: bool
    """Whether it has come to embed."""

    @property
    def process(self) -> TritonProcess: ...

    def start(self) -> None:
        """Start the process. Raises ToolError with the reason when it cannot be."""

    def wait_until_it_embeds(self) -> str | None:
        """What is to be said of it then. Raises ToolError with the reason when it does not."""

    def watchdog(self) -> Watchdog:
        """What looks after it from then on."""

    def terminate(self) -> None:
        """Ask it to end; a second time: kill it."""

    def stop(self, *, is_broken: bool) -> None:
        """End it and all that it started; one that is broken gets little time."""


class Supervisor:
    """Serves until it is asked to stop.

    Args:
        new_server: makes each server, the first one and those that take its place.
        say: takes one line for each thing that happens.
        ready_line: what to say of a server that embeds.
    """

    def __init__(self, new_server: Callable[[], Server], say: Say, ready_line: str) -> None:
        self._new_server, self._say, self._ready_line = new_server, say, ready_line
        self._server: Server | None = None
        self._asked = threading.Event()
        self._was_ready = False

    def stop(self) -> None:
        """Ask the server to finish what is in flight and end, and start no other; a second time: kill it."""
        self._asked.set()
        if self._server is not None:
            self._server.terminate()

    @contextlib.contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP stop it."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self) -> None:
        """Serve until `stop`. Raises ToolError when the first server does not come to embed."""
        try:
            self._run()
        except ToolError:
            if not self._asked.is_set():  # it may have been while that server ended
                raise

    def _run(self) -> None:
        next_wait_s = FIRST_WAIT_S
        while not self._asked.is_set():
            wait_s = 0.0
            server = self._server = self._new_server()
            try:
                why = self._serve(server)
                if not self._asked.is_set():
                    wait_s = FIRST_WAIT_S if server.embeds else next_wait_s
                    next_wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                    self._say(f"{why}; a new server takes its place in {wait_s:g} s")
            finally:
                server.stop(is_broken=not self._asked.is_set())
            self._asked.wait(wait_s)

    def _serve(self, server: Server) -> str:
        """Serve with one server; why it ended, or why it has to. Raises ToolError when none has ever embedded."""
        began = time.monotonic()
        try:
            server.start()
            if self._asked.is_set():  # while there was nothing to tell it to
                server.terminate()
            remark = server.wait_until_it_embeds()
        except ToolError as error:
            if self._was_ready or self._asked.is_set():
                return str(error)
            raise
        self._was_ready = True
        if remark:
            self._say(remark)
        self._say(f"ready after {time.monotonic() - began:.1f} s: {self._ready_line}")
        return server.watchdog().watch(server.process.wait) or server.process.why_it_ended() or "the server was ended"
