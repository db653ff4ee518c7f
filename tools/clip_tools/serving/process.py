"""A tritonserver process: started, its log read, and ended with everything that it started."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from clip_tools.errors import ToolError
from clip_tools.serving.hidden_arguments import popen

DRAIN_S = 30  # as long as a request may wait in a queue
EXIT_TIMEOUT_S = 30  # Triton's own default: how long it waits for requests in flight
_LOG_LINES_KEPT = 2000  # tritonserver's own help, printed after a bad flag, has over 500
_PYTHON_BACKENDS = ("python", "onnxruntime", "tensorrt")
_DRAINED = "All models are stopped"  # of Triton's log, once it is ending and nothing is in flight any more
_LAST_ANSWERS_S = 0.2  # from then on, until they are on the wire; not measured
_BROKEN_DRAIN_S = 5.0  # not measured

# The lines of the log that say why it ended, the most telling first.
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
    """One tritonserver and its children. Its log goes to `log`, None for stderr; `secrets`: see `hidden_arguments`.

    It is asked to end when the thread that started it ends, for that is what Linux takes for a parent.
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
        # A prefix of our own, so that shared memory left by a killed stub can be found and removed.
        prefixes = [f"--backend-config={b},shm-region-prefix-name={self._shm_prefix}" for b in _PYTHON_BACKENDS]
        self._log = log
        self._tail: deque[str] = deque(maxlen=_LOG_LINES_KEPT)
        self._drained = threading.Event()
        self.is_stopping = False
        self._process = popen(
            [*command, *prefixes],
            secrets or {},
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return self._process.pid

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended, by itself or because it was asked to, within the time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def why_it_ended(self) -> str | None:
        """The exit code and the log's reason when it ended by itself; else None."""
        if self._process.poll() is None or self.is_stopping:
            return None
        self._reader.join(timeout=5)
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return "tritonserver was killed (SIGKILL): is there too little memory?"
        end = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"tritonserver ended {end}: {self.last_words()}"

    def raise_if_ended(self) -> None:
        """Raises ToolError when it ended by itself."""
        if why := self.why_it_ended():
            raise ToolError(why)

    def terminate(self, drain: Callable[[], None] | None = None) -> None:
        """Ask it to end, once `drain` has let it answer what it has taken; a second time: kill it. Does not wait."""
        if self._process.poll() is not None:
            return
        if self.is_stopping:
            _kill_group(self.pid)
        else:
            self.is_stopping = True
            threading.Thread(target=self._drain_and_terminate, args=(drain,), daemon=True).start()

    def _drain_and_terminate(self, drain: Callable[[], None] | None) -> None:
        with contextlib.suppress(Exception):  # it is broken, or its models may not be changed: it ends as it can
            if drain:
                drain()
        self._process.terminate()

    def stop(self, *, is_broken: bool = False) -> None:
        """End it and everything it started, when the requests in flight are answered. Safe to call twice.

        One that is broken has little time for that, and none to unload: a model whose process is gone never does.
        """
        if not self.is_stopping:
            self.terminate()
        try:
            if not is_broken:
                self.wait(DRAIN_S + EXIT_TIMEOUT_S + 5)
            elif self._drained.wait(_BROKEN_DRAIN_S):
                self.wait(_LAST_ANSWERS_S)
        finally:
            _kill_group(self.pid)  # a stub can outlive a server that was killed
            self._process.wait()
            self._reader.join(timeout=5)
            for region in Path("/dev/shm").glob(self._shm_prefix + "*"):  # noqa: S108
                region.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The line of the log that says why, as well as it can be found, and where the whole log is."""
        return self._reason() + (f" (its log: {self._log})" if self._log else "")

    def _reason(self) -> str:
        lines = [line for line in self._tail if line.strip()]
        for reason in _REASONS:
            for line in lines:
                if found := reason.search(line):
                    return found[1].strip().strip('"')
        return lines[-1].strip() if lines else "nothing was logged"

    def _read_log(self, stream: IO[str]) -> None:
        log = self._log
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with stream, log.open("w") if log else contextlib.nullcontext(sys.stderr) as sink:
            for line in stream:
                self._tail.append(line)
                if _DRAINED in line:
                    self._drained.set()
                with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop the reading
                    sink.write(line)
                    sink.flush()
        self._drained.set()


def _die_with_parent() -> None:
    """Runs in the child: it gets SIGTERM when this process is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
