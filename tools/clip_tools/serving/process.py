"""A tritonserver process: starts it, reads its log, and ends it with all its processes."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import IO

from clip_tools.errors import ToolError
from clip_tools.serving.secret_arguments import popen_with_secrets

DRAIN_S = 30  # the longest that a request may wait in a queue
EXIT_TIMEOUT_S = 30  # how long Triton waits for requests in flight; its own default
UNLOAD_S = 5.0  # to unload its models with nothing in flight: 3 s on two cores
_LOG_LINES_KEPT = 2000  # tritonserver's own help, printed after a bad flag, has over 500
_PYTHON_BACKENDS = ("python", "onnxruntime", "tensorrt")
_DRAINED = "All models are stopped"  # in Triton's log: it is ending, with nothing in flight
_LAST_ANSWERS_S = 0.2  # after `_DRAINED`, for a broken server to send its last answers; not measured
_BROKEN_DRAIN_S = 5.0  # for a broken server to finish the requests in flight; not measured
_KILLED_S = 5.0  # for a killed process to end; not measured
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

# Waits until this process has ended, even by SIGKILL, then kills the server's process group and removes its shared
# memory. Triton's stubs end by themselves without their server, but not while they are stopped or hang in a driver.
_GUARD = 'read -r _; kill -s KILL -- "-$1"; rm -f -- "/dev/shm/$2"*'

# Lines of the log that say why it ended, the most specific first.
_REASONS = tuple(
    map(
        re.compile,
        (
            r"what\(\):\s*(.*)",
            r"^E.*failed to load '.*?' version \d+: (?:\w+: )?(.*?)(?:\\n.*)?$",
            r"error: (.*)",
            r"(unrecognized option .*)",
            r"^E.*?\] (.*)",
        ),
    )
)


class TritonProcess:
    """One tritonserver and its children. Its log goes to `log`, None for stderr; `secrets`: see `secret_arguments`.

    If this process is killed, they are killed too.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        secrets: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self._shm_prefix = f"clip_tools_{os.getpid()}_{id(self):x}_"
        # Our prefix finds the shared memory that a killed stub leaves behind.
        prefixes = [f"--backend-config={b},shm-region-prefix-name={self._shm_prefix}" for b in _PYTHON_BACKENDS]
        self._log = log
        self._tail: deque[str] = deque(maxlen=_LOG_LINES_KEPT)
        self._drained = threading.Event()
        self.is_stopping = False
        self._start = partial(
            popen_with_secrets,
            [*command, *prefixes],
            secrets or {},
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
            preexec_fn=_dying_with_parent(),
        )
        started: Future[subprocess.Popen[str]] = Future()
        self._reader = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._reader.start()
        self._process = started.result()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "clip-tools-guard", str(self.pid), self._shm_prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return self._process.pid

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it ends within the time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def why_it_ended(self) -> str | None:
        """The exit code and the log's reason if it ended by itself; else None."""
        if self._process.poll() is None or self.is_stopping:
            return None
        _kill_group(self.pid)  # its stubs keep its log open
        self._reader.join(timeout=5)
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return "tritonserver was killed (SIGKILL): too little memory?"
        if code == -signal.SIGSEGV:  # the log does not say
            return "tritonserver ended by SIGSEGV: clients that cancel gRPC calls cause it before 25.04 (SECURITY.md)"
        end = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"tritonserver ended {end}: {self.log_reason()}"

    def raise_if_ended(self) -> None:
        """Raises ToolError if it ended by itself."""
        if why := self.why_it_ended():
            raise ToolError(why)

    def terminate(self, drain: Callable[[], None] | None = None, *, limit_s: float = EXIT_TIMEOUT_S) -> None:
        """Call `drain`, then ask it to end; called again, kill it. Does not wait.

        It is killed if requests are still in flight `limit_s` after `drain`, or if it does not end after the last one.
        """
        if self._process.poll() is not None:
            return
        if self.is_stopping:
            _kill_group(self.pid)
        else:
            self.is_stopping = True
            threading.Thread(target=self._end, args=(drain, limit_s), daemon=True).start()

    def _end(self, drain: Callable[[], None] | None, limit_s: float) -> None:
        with contextlib.suppress(Exception):  # a broken server, or one without model control, ends undrained
            if drain:
                drain()
        self._process.terminate()
        if not self._is_over_within(limit_s, UNLOAD_S):
            _kill_group(self.pid)

    def _is_over_within(self, limit_s: float, unload_s: float) -> bool:
        """Whether it ends within the limit, and within `unload_s` once nothing is in flight."""
        deadline = time.monotonic() + limit_s
        while not self.wait(_POLL_S):
            if self._drained.is_set():
                return self.wait(unload_s)
            if time.monotonic() > deadline:
                return False
        return True

    def stop(self, *, is_broken: bool = False) -> None:
        """End it and all its processes, once the requests in flight are answered. Safe to call twice.

        A broken server gets little time for that, and none to unload: a model without its process never unloads.
        """
        if not self.is_stopping:
            self.terminate()
        try:
            if is_broken:
                self._is_over_within(_BROKEN_DRAIN_S, _LAST_ANSWERS_S)
            else:
                self.wait(DRAIN_S + EXIT_TIMEOUT_S + 2 * UNLOAD_S)
        finally:
            _kill_group(self.pid)  # a stub can outlive a server that was killed
            if not self.wait(_KILLED_S):
                sys.stderr.write(f"clip-tools: tritonserver (process {self.pid}) was killed but has not ended\n")
            self._reader.join(timeout=5)
            for region in Path("/dev/shm").glob(self._shm_prefix + "*"):  # noqa: S108
                region.unlink(missing_ok=True)
            self._guard.kill()
            self._guard.communicate()

    def log_reason(self) -> str:
        """The log's most likely reason, and where the log is."""
        return self._reason() + (f" (its log: {self._log})" if self._log else "")

    def _reason(self) -> str:
        lines = [line for line in self._tail if line.strip()]
        for reason in _REASONS:
            for line in lines:
                if found := reason.search(line):
                    return found[1].strip().strip('"')
        return lines[-1].strip() if lines else "nothing was logged"

    def _run(self, started: "Future[subprocess.Popen[str]]") -> None:
        """Start it and read its log until it ends. This thread must last: its end kills the child (PDEATHSIG)."""
        try:
            if self._log:
                self._log.parent.mkdir(parents=True, exist_ok=True)
            sink = self._log.open("w") if self._log else contextlib.nullcontext(sys.stderr)
            process = self._start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        assert process.stdout is not None  # noqa: S101
        with sink as file:
            self._read_log(process.stdout, file)

    def _read_log(self, stream: IO[str], sink: IO[str]) -> None:
        with stream:
            for line in stream:
                self._tail.append(line)
                if _DRAINED in line:
                    self._drained.set()
                with contextlib.suppress(OSError, ValueError):  # keep reading without a terminal
                    sink.write(line)
                    sink.flush()
        self._drained.set()


def _dying_with_parent() -> Callable[[], None]:
    """A function for the child: it will be killed when this thread ends, and so when this process is killed."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has already ended
            os._exit(1)

    return die_with_parent


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
